"""A signal ends a command with one line and its exit code, also while the command still imports."""

import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["sft", "report", "tokenizer"])
def test_a_signal_during_imports_ends_a_command_with_one_line(command, number):
    words = [sys.executable, "-v", "-m", f"nanochat_jax.{command}", "--help"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("import 'numpy"):  # the first of the heavy imports
                break
        process.send_signal(number)
        sent = time.monotonic()
        said = process.stderr.read()
    assert process.returncode == 128 + number
    assert said.count(f"Stopped by {number.name}") == 1 and "Traceback" not in said
    assert time.monotonic() - sent < 10
