"""A signal ends a command with one line and its exit code, also while the command still imports."""

import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["sft", "eval", "tokenizer"])
def test_a_signal_during_imports_ends_a_command_with_one_line(command, number):
    words = [sys.executable, "-v", "-m", f"nanochat_jax.{command}"]
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


COMMAND = """
import sys, threading, time, weakref
from nanochat_jax.cli.main import run_stage

def main(cfg):
    {body}

print("begun", flush=True)
run_stage(main, None)
"""
DROPPED = """
    class Thing: pass
    def callback(_):
        time.sleep(2)
    thing = Thing()
    kept = weakref.ref(thing, callback)
    print("ready", flush=True)
    del thing  # an exception in the callback goes no further
    time.sleep(60)
"""
WRITING = """
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("body", [DROPPED, WRITING], ids=["dropped in a callback", "while a thread writes"])
def test_an_interrupt_ends_a_command_wherever_it_is(body, tmp_path):
    package = tmp_path / "nanochat_jax_command"  # a module whose name begins with the package's is a command of it
    package.mkdir()
    (package / "__init__.py").write_text("import nanochat_jax")
    (package / "__main__.py").write_text(COMMAND.format(body=body.strip()))
    words = [sys.executable, "-m", "nanochat_jax_command"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=tmp_path, **pipes) as process:
        while process.stdout.readline() != "ready\n":
            pass
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        said = process.stderr.read()
    assert process.returncode == 130 and time.monotonic() - sent < 10
    assert said == "\nStopped by SIGINT\n"
