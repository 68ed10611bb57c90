"""Run a part of the program on hostile input, in a process that serves many cases: with a limit on the time of each, a
limit on its memory, and a look at how it ended. The process is replaced where a case hangs or kills it."""

import contextlib
import importlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0  # that a process may take to begin, on a busy machine
BUSY = 8
GUARD = 4 << 30  # bytes that a case may ask for before the system refuses more
CASES = 400  # after so many a process is replaced: what has been compiled stays in its memory


class Ended(NamedTuple):
    """How a case ended."""

    how: str  # "well", "refused" (a sentence and exit code 1) or a fault: "traceback", "hang", "died", "memory", ...
    result: str | None  # of a case that ended well
    said: str  # everything that it printed; where it failed, the error's sentence or traceback last
    seconds: float  # processor time
    memory: int  # bytes, the most above what the process had before


class Worker:
    """The process; `variables` are those of its environment, `module` is loaded before a case's time begins."""

    def __init__(self, variables: dict[str, str], module: str = "nanochat_jax.sft"):
        self.variables, self.module, self.process, self.served = variables, module, None, 0

    def run(self, function: Callable[[Any], str], argument: Any, seconds: float, memory: int = 1 << 30) -> Ended:
        """function(argument), which must be importable, as a command would run it.

        seconds: of the process's own time; of the clock, on which others may be as busy, BUSY times as many."""
        if self.served >= CASES:
            self.close()
        if self.process is None:
            self._start()
        self.served += 1
        began = time.perf_counter()
        self.connection.send((function, argument))
        spent = own_seconds(self.process.pid)
        while not self.connection.poll(0.2):
            used, passed = own_seconds(self.process.pid) - spent, time.perf_counter() - began
            if used > seconds or passed > BUSY * seconds:
                self.close()
                said = f"no end after {used:.0f} seconds of its own and {passed:.0f} of the clock"
                return Ended("hang", None, said, passed, 0)
        try:
            ended = Ended(*self.connection.recv())
        except EOFError:
            self.process.join()
            how = (
                f"the process ended with {self.process.exitcode}: {Path(self.log).read_text(errors='replace')[-2000:]}"
            )
            self.close()
            return Ended("died", None, how, time.perf_counter() - began, 0)
        return ended._replace(how="memory") if ended.memory > memory else ended

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            os.unlink(self.log)
        self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        file, self.log = tempfile.mkstemp(prefix="limited-")
        os.close(file)
        self.process = context.Process(target=serve, args=(theirs, self.variables, self.module, self.log), daemon=True)
        self.process.start()
        theirs.close()
        self.served = 0
        if not self.connection.poll(START_SECONDS):
            raise SystemExit(f"a process for hostile input did not begin within {START_SECONDS:.0f} seconds")
        self.connection.recv()


def serve(connection, variables: dict[str, str], module: str, log: str) -> None:
    """In the process: what is asked for, one after the other."""
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    importlib.import_module(module)

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    connection.send("ready")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, argument = connection.recv()
            os.ftruncate(1, 0)
            os.lseek(1, 0, os.SEEK_SET)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
            before = kilobytes("VmRSS")
            resource.setrlimit(resource.RLIMIT_AS, ((kilobytes("VmSize") << 10) + GUARD, hard))
            began = time.process_time()
            how, result, error = ended(function, argument)
            seconds = time.process_time() - began
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            sys.stdout.flush()
            sys.stderr.flush()
            said = Path(log).read_text(errors="replace") + error
            connection.send((how, result, said, seconds, (kilobytes("VmHWM") - before) << 10))


def ended(function: Callable[[Any], str], argument: Any) -> tuple[str, str | None, str]:
    """function(argument) as a command -> (how it ended, its result, the error)."""
    from nanochat_jax.cli.main import run_stage

    results, too_much = [], []

    def command(argument: Any) -> int:
        try:
            results.append(function(argument))
        except MemoryError as e:  # of which a command makes a sentence
            too_much.append(e)
            raise
        return 0

    try:
        run_stage(command, argument)
    except SystemExit as e:
        if too_much:
            return "memory", None, str(e.code)
        if e.code == 0:
            return "well", results[0], ""
        if not results and isinstance(e.code, str):
            return ("refused" if is_sentence(e.code) else "no sentence"), None, e.code
        return "refused" if e.code == 2 else "another exit code", None, f"exit code {e.code}"  # 2: tyro's, of a flag
    except BaseException:
        return "traceback", None, traceback.format_exc()


def is_sentence(error: str) -> bool:
    """Whether a user can make something of it: not empty, not a page, no traceback, no bare class of an exception."""
    told = error.removeprefix("error: ").strip()
    return len(told.split()) >= 3 and len(told) <= 4000 and "Traceback" not in told and "Error: " not in told[:40]


def own_seconds(pid: int) -> float:
    """Processor time that a process has had."""
    with contextlib.suppress(OSError):  # it has just ended
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def kilobytes(field: str) -> int:
    """A size of this process, as the system counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"the system does not tell {field}")
