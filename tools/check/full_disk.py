"""Disks that are full at a save, or read-only: a small tmpfs where root may mount one, else a limit on the size of
files, which fails a write in the same place."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kill_resume import RESULTS, STAGES, at_step, difference

from nanochat_jax.checkpoints import integrity

MIB = 1 << 20
STEPS, SAVE_EVERY, FULL_AT = 36, 12, 13
LEVELS = (0, 4 << 10, 200 << 10, 500 << 10, 900 << 10)  # bytes that are left; a checkpoint of the model has 1.5 MiB
COMPLAINT = "No space left|too large|could not be (written|saved)|disk"
PATIENCE = "3"  # --save-patience, in its own unit; where the stage has the flag
GIVES_UP = 240.0  # seconds, at most


def cases(count: int) -> list[tuple[str, int, bool]]:
    """(which, bytes left, freed again): "two" saves after a good one, or the "only" one; "readonly" is by itself."""
    every = [("saves", level, freed) for freed in (True, False) for level in LEVELS]
    every += [("only", 0, True), ("readonly", 0, False), ("only", 0, False)]
    order = [0, 5, 11, 10, 2, 7, *(i for i in range(len(every)) if i not in (0, 5, 11, 10, 2, 7))]
    return [every[i] for i in order][:count]


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[tuple[Path, bool]]:
    """(a folder, whether it is a disk of its own)"""
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        try:
            yield Path(folder), mounted
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=True)


def flags(base: Path, only: bool = False) -> list[str]:
    from tests.support import tiny

    given = [*tiny.sft_flags(base), "--model-tag", "d2", "--num-iterations", str(STEPS), "--eval-every", "-1"]
    return [*given, "--save-every", "-1" if only else str(SAVE_EVERY), "--output-tag", "run"]


def run_alone(pristine: Path, base: Path) -> Path:
    """The folder of a run that has room."""
    from tests.support.process_runs import run

    copy(pristine, base)
    run(base, "sft", flags(base), count=1, devices=1)
    return base / STAGES["sft"] / "run"


def copy(pristine: Path, base: Path) -> None:
    for name in ("tokenizer", "base_checkpoints/d2", "compilation_cache"):
        shutil.copytree(pristine / name, base / name, dirs_exist_ok=True)


def full(which: str, left: int, freed: bool, pristine: Path, alone: Path) -> tuple[str, str]:
    """(verdict, what was said) of a run whose disk is full from step FULL_AT on, for good or for some seconds."""
    from nanochat_jax.sft import SFTConfig
    from tests.support.process_runs import started

    patience = ["--save-patience", PATIENCE] if hasattr(SFTConfig, "save_patience") and not freed else []
    with small_disk(24 * MIB) as (base, mounted):
        copy(pristine, base)
        given = [*flags(base, which == "only"), *patience]
        with started(base, "sft", given, count=1, devices=1) as processes:
            process, filler, folder = processes.all[0], base / "filler", base / STAGES["sft"] / "run"
            first = folder / str(SAVE_EVERY) / "INTEGRITY.json"

            def begun() -> bool:
                return (which == "only" or first.exists()) and re.search(at_step(FULL_AT, STEPS), processes.output(0))

            if not wait(begun, process):
                return "the run does not begin", processes.output(0)
            if mounted:
                free = os.statvfs(base).f_bavail * os.statvfs(base).f_frsize
                with filler.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, free - left))
            else:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (max(1024, left), resource.RLIM_INFINITY))
            began = len(processes.output(0))
            wait(lambda: re.search(COMPLAINT, processes.output(0)[began:]), process)
            if freed:
                time.sleep(2)
                filler.unlink(missing_ok=True)
                if not mounted and process.poll() is None:
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            if not wait(lambda: process.poll() is not None, process):
                return "hang", processes.output(0)
            processes.wait()
            code, output = process.returncode, processes.output(0)
        if "Traceback" in output:
            return "traceback", output
        if code == 0 and (freed or left):  # what was left may have been enough
            found = difference(alone, folder, STEPS)
            return ("another end" if any(found.get(name) for name in RESULTS) else "same"), output
        if freed:
            return f"exit code {code} although there was room again", output
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        if code != 1 or len(errors) != 1:
            return f"exit code {code} with {len(errors)} errors", output
        good = integrity.newest_intact(folder, lambda _: None)
        named = str(base if good is None else folder / str(good)) in errors[0]
        return ("refused" if named else "an error without the path or the last good checkpoint"), output


def wait(done, process) -> bool:
    """Until done(), or the process has ended -> whether it is done."""
    latest = time.monotonic() + GIVES_UP
    while not done() and process.poll() is None and time.monotonic() < latest:
        time.sleep(0.01)
    return bool(done())


def read_only(pristine: Path) -> tuple[str, str]:
    """Commands on a read-only base directory: reading works, writing is refused in a sentence."""
    from tests.support import tiny
    from tests.support.process_runs import started

    with small_disk(64 * MIB) as (base, mounted):
        if not mounted:
            return "skipped", "a tmpfs cannot be mounted here"
        shutil.copytree(pristine, base, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(base)], check=True)
        letters = ["-i", "base", "-g", "d2", "-a", "tests.support.process_tasks:Letters", "-x", "2"]
        told = ""
        for command, given, codes in (
            ("eval", letters, {0}),
            ("report", [], {1}),
            (
                "sft",
                [*tiny.FLAGS, "--model-tag", "d2", "--custom-json", f"{base}/train.jsonl", "--output-tag", "new"],
                {1},
            ),
            ("sft", ["--output-tag", "tuned", "--resume"], {0, 1}),
        ):
            with started(base, command, given, count=1, devices=1) as processes:
                if not wait(lambda: processes.all[0].poll() is not None, processes.all[0]):
                    return "hang", processes.output(0)
                (code,) = processes.wait()
                output = processes.output(0)
            told += f"{command} {given}: {code}\n{output}\n"
            errors = output.count("error: ")
            if "Traceback" in output:
                return "traceback", told
            if code not in codes or (code == 1 and errors != 1):
                return f"{command} ends with {code} and {errors} errors", told
    return "refused", told
