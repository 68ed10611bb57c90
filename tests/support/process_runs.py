"""Start a stage as several processes over loopback, and see how they end; none outlives its test."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 240.0  # seconds of one run, at most


class Processes:
    """The processes of a run, and what each has printed so far."""

    def __init__(self, commands: list[list[str]], envs: list[dict[str, str]]):
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        self.envs = envs
        self.all = [subprocess.Popen(command, env=env, **how) for command, env in zip(commands, envs, strict=True)]
        self.lines: list[list[str]] = [[] for _ in commands]
        self.readers = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(len(commands))]
        self.deadline = time.monotonic() + LIMIT
        for reader in self.readers:
            reader.start()

    def _read(self, i: int) -> None:
        for line in self.all[i].stdout:
            self.lines[i].append(line)

    def output(self, i: int) -> str:
        return "".join(self.lines[i])

    def wait_for(self, pattern: str, i: int = 0) -> None:
        """Until process i has printed a line with the pattern; AssertionError where it ends before."""
        while not re.search(pattern, self.output(i)):
            over = self.all[i].poll() is not None or time.monotonic() > self.deadline
            assert not over, f"{pattern!r} never came:\n{self.all_output()}"
            time.sleep(0.005)

    def signal(self, i: int, number: int) -> None:
        self.all[i].send_signal(number)

    def wait(self) -> list[int]:
        """Exit codes."""
        for process in self.all:
            process.wait(max(0.1, self.deadline - time.monotonic()))
        for reader in self.readers:
            reader.join(10)
        return [process.returncode for process in self.all]

    def all_output(self) -> str:
        return "\n".join(f"---- process {i}, exit code {p.poll()}\n{self.output(i)}" for i, p in enumerate(self.all))

    def kill(self) -> None:
        for process in self.all:
            if process.poll() is None:
                process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(
    base: Path, stage: str, flags: list[str], *, count: int = 2, devices: int = 8, more=None, bases=None, **variables
):
    """`count` processes of a stage with `devices` CPU devices in all, one alone without any flag of ours. more, bases:
    flags and base directories of single processes, {1: ...}. variables: of the environment, for all."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices // count),
        "NANOCHAT_START_SECONDS": "60",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # so that a run finds all that one before it has compiled
        "PYTHONUNBUFFERED": "1",
    }
    env |= {name: str(value) for name, value in variables.items()}
    port, commands = free_port(), []
    for i in range(count):
        which = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), "--process-id", str(i)]
        command = [sys.executable, "-m", f"nanochat_jax.{stage}", *flags, *(which if count > 1 else [])]
        commands.append(command + (more or {}).get(i, []))
    places = [{"NANOCHAT_BASE_DIR": str((bases or {}).get(i, base))} for i in range(count)]
    processes = Processes(commands, [env | place for place in places])
    try:
        yield processes
    finally:
        processes.kill()


def run(base: Path, stage: str, flags: list[str], **how) -> str:
    """A run that ends well -> what process 0 printed."""
    with started(base, stage, flags, **how) as processes:
        codes = processes.wait()
        assert set(codes) == {0}, processes.all_output()
        return processes.output(0)


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
