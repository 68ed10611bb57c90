"""Runs Python that a model wrote without trusting it: in a process that the kernel locks in before the first line.

guard.py says what the process cannot do. Not covered are faults of the kernel and side channels; and, where the machine
allows no namespaces, the names and sizes of files whose path the program guesses. A program runs in the interpreter
that judges it, so `ok` is no proof against a program that looks for the guard's own variables.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
OUTPUT_BYTES = 1 << 16  # kept of stdout and of stderr each; what follows is read and thrown away
START_SECONDS = 30.0  # for the interpreter and the guard, before the program's own time begins
MAX_SECONDS = 86_400


class GuardError(RuntimeError):
    """The program was not run, because nothing would hold it."""


@dataclass(frozen=True)
class Result:
    """What became of a program.

    reason: "" the program ran to its last line; "error" an exception, which stderr ends with; "memory" MemoryError;
    "timeout"; "exit" it left before its end, with whatever code; "signal" the interpreter crashed.
    """

    stdout: str
    stderr: str
    reason: str

    @property
    def ok(self) -> bool:
        return not self.reason


def run(program: str, *, timeout: float = 5.0, memory_bytes: int = 256 << 20, unsafe: bool = False) -> Result:
    """Runs a program for at most `timeout` seconds of wall clock within `memory_bytes` of address space. Any thread.

    GuardError where this machine has no guard (`guard_fault`), unless `unsafe`: then as much of the guard as there is.
    """
    if not 0 < timeout <= MAX_SECONDS:
        raise ValueError(f"timeout must be above 0 and at most {MAX_SECONDS} seconds, got {timeout}")
    if memory_bytes <= 0:
        raise ValueError(f"memory_bytes must be above 0, got {memory_bytes}")
    if not unsafe and (fault := guard_fault()):
        raise GuardError(
            f"{fault}, so model-written code is not run; --unsafe-exec runs it with your files and network in reach"
        )
    return _run(program, timeout, memory_bytes, unsafe)


@functools.cache
def guard_fault() -> str | None:
    """Why this machine cannot lock a program in, in one sentence, None where it can: found by trying."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux with Landlock and seccomp, and this is {sys.platform}"
    try:
        _run("", 10.0, 256 << 20, unsafe=False)
    except GuardError as e:
        return str(e)
    return None


def _run(program: str, timeout: float, memory_bytes: int, unsafe: bool) -> Result:
    done = 3 + secrets.randbelow(117)  # the exit status that means "ran to its end": the program cannot know it
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True))
        source = stack.enter_context(tempfile.TemporaryFile())
        status, report = os.pipe()
        stack.callback(os.close, status)
        try:
            limits = {"memory_bytes": memory_bytes, "cpu_seconds": math.ceil(timeout) + 1, "unsafe": unsafe}
            start = {"program": program, "folder": folder, "status": report, "done": done, **limits}
            source.write(json.dumps(start).encode())
            source.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(GUARD)],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[report],
                env={},
                cwd=folder,
                start_new_session=True,
            )
        finally:
            os.close(report)
        with process:
            try:
                state, stdout, stderr, in_time = _watch(process, status, timeout)
            finally:
                if unsafe or process.poll() is None:  # a guarded process has no children
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)
    if state.strip() != "ready":
        raise GuardError(state.strip() or f"the guard did not start: {stderr.strip()[-300:] or process.returncode}")
    return Result(stdout, stderr, _reason(process.returncode, done, in_time, stderr))


def _watch(process: subprocess.Popen, status: int, timeout: float) -> tuple[str, str, str, bool]:
    """The guard's state, stdout, stderr, and whether the process ended in time, counted from when the state came."""
    pipes = [status, process.stdout.fileno(), process.stderr.fileno()]
    kept = {pipe: bytearray() for pipe in pipes}
    deadline = time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                data = os.read(key.fd, 1 << 16)
                kept[key.fd] += data[: OUTPUT_BYTES - len(kept[key.fd])]
                if not data:
                    selector.unregister(key.fd)
                    if key.fd == status:
                        deadline = time.monotonic() + timeout
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
    state, stdout, stderr = (kept[pipe].decode(errors="replace") for pipe in pipes)
    return state, stdout, stderr, process.returncode is not None


def _reason(code: int, done: int, in_time: bool, stderr: str) -> str:
    if not in_time or code in (-signal.SIGXCPU, -signal.SIGKILL):  # the kernel's limit of processor time kills
        return "timeout"
    if code == done:
        return ""
    if code == 1:
        return "memory" if stderr.rstrip().rpartition("\n")[2].startswith("MemoryError") else "error"
    return "signal" if code < 0 else "exit"
