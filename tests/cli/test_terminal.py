"""What is typed while a chat answers, through a real terminal: a shell with job control that runs the chat."""

import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHAT = """
import os, time
from nanochat_jax.chat import Chat
from nanochat_jax.inference.samples import ControlTokens
from nanochat_jax.inference.sampling import SamplingParams
from tests.support import tiny

class Slow:
    tokenizer, context = tiny.tokenizer(), 200
    control_tokens = ControlTokens(tokenizer)

    def stream(self, params, prompt, sampling, *, seed):
        for token in b"answer":
            time.sleep(0.15)
            yield token, 1
        yield self.tokenizer.special("<|assistant_end|>"), 1

print(f"process {os.getpid()}", flush=True)
Chat(Slow(), None, SamplingParams(), 0).talk()
"""
SHELL = 'exec bash -mc \'"$0" -c "$1"; stty -a; fg; stty -a\' "$1" "$2" <"$0" >"$0" 2>&1'
PATIENCE = 120  # seconds for an import on a busy machine


class Terminal:
    """A terminal on which a shell runs the chat; `seen` is all that it has shown."""

    def __init__(self):
        self.main, other = os.openpty()
        command = ["sh", "-c", SHELL, os.ttyname(other), sys.executable, CHAT]
        env = os.environ | {"TERM": "dumb", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self.shell = subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True)
        self.seen, self.other = "", other

    def shows(self, pattern: str) -> str:
        """What is seen up to the end of the first match, which is forgotten."""
        until = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < until, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.main], [], [], 0.1)[0]:
                self.seen += os.read(self.main, 4096).decode(errors="replace").replace("\r", "")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def types(self, text: str) -> None:
        os.write(self.main, text.encode())

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.main)[3] & termios.ECHO)

    def becomes_silent(self) -> None:
        until = time.monotonic() + 30
        while self.echoes():
            assert time.monotonic() < until
            time.sleep(0.01)


def test_what_is_typed_ahead_waits_unseen_for_the_next_prompt_and_the_terminal_is_restored_whatever_happens():
    terminal = Terminal()
    try:
        pid = int(re.search(r"\d+", terminal.shows(r"process \d+\n"))[0])
        terminal.shows("> ")
        terminal.types("one\n")
        terminal.shows("an")
        terminal.types("two\nhal")
        assert terminal.shows(r"r\n") == "swer\n"  # nothing in between
        terminal.shows("> two\n")
        terminal.shows("answer\n")
        terminal.shows("> hal")
        terminal.types("f\n")

        terminal.shows("an")
        assert not terminal.echoes()
        terminal.types("\x1a")  # Ctrl-Z: the shell goes on, and then brings the chat back
        assert " echo " in terminal.shows(r"-?\becho .*\n")
        terminal.shows("swer|w|e|r")
        terminal.becomes_silent()  # which may take a moment: what is shown can be from before
        terminal.types("\x03")  # Ctrl-C, at the latest at the prompt
        terminal.shows(r"\((stopped|Ctrl-C again.*)\)\n")

        terminal.types("four\n")
        terminal.shows("> four\n")
        terminal.shows("an")
        assert not terminal.echoes()
        os.kill(pid, signal.SIGTERM)
        assert " echo " in terminal.shows(r"-?\becho .*\n")
        assert terminal.echoes()
    finally:
        terminal.shell.kill()
        terminal.shell.wait()
        os.close(terminal.main)
        os.close(terminal.other)
