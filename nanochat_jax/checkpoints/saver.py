"""The checkpoints of a run while it trains: saved in the background, and again where that has failed."""

import errno
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nanochat_jax.checkpoints import integrity
from nanochat_jax.checkpoints.ownership import FolderLost, Lock, Token
from nanochat_jax.checkpoints.store import MEASURED, best_step, orbax, read_measured
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.json_numbers import finite_or_null
from nanochat_jax.files.paths import write_atomically

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0  # seconds until a save is tried again; twice as long each time
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_WRITING = {errno.EROFS, errno.EACCES, errno.EPERM}


class Saver:
    """Writes the checkpoints of one run into <folder>/<step> in the background; the newest `keep` and the best stay.

    A save that fails ends nothing: `failure` tells of it, and `due` when it is time for another one. The more often the
    same cause has come, the longer that takes, as a try may write gigabytes.
    """

    def __init__(self, folder: Path, keep: int = 2, owner: Lock | Token | None = None, best: str | None = None):
        """owner: the right to write into the folder; None where nobody else can. best: a measured number; the
        checkpoint where it is highest is kept too."""
        if keep < 1:
            raise ValueError(f"--keep-checkpoints must be at least 1, got {keep}")
        self.folder, self.keep, self.owner, self.best = folder, keep, owner, best
        self.sealed = 0  # the last step that this process has written and sealed, 0 for none
        self.pause = FIRST_PAUSE  # seconds from the last failure to the next try
        self._step: int | None = None  # of the save whose outcome `failure` has not told yet
        self._bytes = 0  # of its arrays, on all devices
        self._thread: threading.Thread | None = None
        self._error = ""  # why it has failed here
        self._cause, self._failed_at = "", 0.0  # of the last failure; "": the last save is on disk
        self._measured: dict[int, dict[str, float]] = {}  # by step: not written yet

    def save(self, step: int, items: Mapping[str, Mapping[str, Any]], make_meta: Callable[[], dict]) -> None:
        """Start saving; returns when the arrays have been copied, so that the next step may overwrite them.

        items: {"params": {path: array}, "optimizer": {path: array}}. make_meta: an OSError there fails the save.
        FolderLost: this run must not write any more. All processes must call it, after `failure` or `wait` has told of
        the save before it.
        """
        self.wait()
        target = self.folder / str(step)
        self._step, self._error = step, ""
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(items)) if hasattr(leaf, "nbytes"))
        meta = {}
        try:
            if self.owner:
                self.owner.check()
            if not processes.index() and target.exists():
                integrity.discard(target)  # damaged or incomplete, else the run would have gone on from it
            meta = make_meta()
        except FolderLost:
            raise
        except OSError as e:
            self._error = _reason(e)
        if any(processes.exchange("a checkpoint", self._error)):  # the others must not find what was there
            return
        try:
            with orbax():
                response = ocp.save_checkpointables_async(target, {**items, "meta": finite_or_null(meta)})
        except Exception as e:  # whatever Orbax makes of a full disk
            self._error = _reason(e)
            return
        self._thread = threading.Thread(target=self._finish, args=(response, target), name="checkpoint")
        self._thread.start()

    def failure(self, *, wait: bool = False) -> str:
        """The sentence about the save that has just failed, once; "" where it is under way or on disk.

        wait: until it is one or the other. All processes must call it equally often, and get the same answer."""
        if self._step is None:
            return ""
        if wait:
            self._join()
        over = not (self._thread and self._thread.is_alive())
        parts = processes.exchange("the save", [over, self._error])
        if not all(over for over, _ in parts):
            return ""
        self._join()
        step, self._step = self._step, None
        error = next((error for _, error in parts if error), "")
        if not error:
            self._cause = ""
            self._write_measured()
            return ""
        if self.owner:  # a folder that is lost is the better reason
            self.owner.check()
        cause = re.sub(r"[0-9a-f]{8,}|\d+", "", error)  # without sizes and random names
        self.pause = min(2 * self.pause, LONGEST_PAUSE) if cause == self._cause else FIRST_PAUSE
        self._cause, self._failed_at = cause, time.monotonic()
        if not processes.index():
            self._remove_remains(step)
        return f"step {step} could not be saved in {self.folder}: {error}{self._advice(error)}; {self.newest()}"

    def wait(self) -> None:
        """Wait until the last save is on disk with its manifest; OSError tells why it is not."""
        if failed := self.failure(wait=True):
            raise OSError(failed)

    def due(self) -> bool:
        """Whether it is time to save again because the last save has failed; as `failure`, the same on all."""
        if not self._cause or self._step is not None:
            return False
        return processes.exchange("another try", time.monotonic() >= self._failed_at + self.pause)[0]

    def glance(self) -> None:
        """FolderLost: another run has taken the folder, or it was deleted. Quick enough for every step."""
        if self.owner:
            self.owner.glance()

    def add_to_meta(self, step: int, numbers: Mapping[str, float]) -> None:
        """What was measured of a checkpoint after its save began; `read_meta` gives it with the rest. Written when
        the save is done, at the latest by `close`."""
        self._measured[step] = dict(numbers)
        if self._step is None:
            self._write_measured()

    def close(self) -> None:
        """Wait until nothing is written any more; a failure that nobody has been told of is told now."""
        self._join()
        try:
            self.glance()
        except FolderLost:  # that has been told, or is told next
            return
        if self._step is not None and self._error:
            print0(f"WARNING: step {self._step} could not be saved in {self.folder}: {self._error}")
        self._write_measured()
        if self._measured:
            print0(f"WARNING: what was measured of step {max(self._measured)} could not be written to {self.folder}")

    def newest(self) -> str:
        """The end of an error's sentence: which checkpoint a run can go on from."""
        steps = integrity.steps(self.folder)
        return f"the last good checkpoint is {self.folder / str(steps[-1])}" if steps else "there is no checkpoint"

    def _advice(self, error: str) -> str:
        """What the user can do about it."""
        said = {number for number in NO_ROOM | NO_WRITING if os.strerror(number) in error}
        if said & NO_WRITING:
            return ", make it writable"
        if not said or bucket.in_bucket(self.folder):
            return ""
        try:
            free = f", {shutil.disk_usage(self.folder).free / 1e6:,.0f} MB are free"
        except OSError:
            free = ""
        return f" (a checkpoint has up to {self._bytes / 1e6:,.0f} MB{free}): free some space there"

    def _remove_remains(self, step: int) -> None:
        """Give back the room that a failed save has taken."""
        for remains in self.folder.glob("*.orbax-checkpoint-tmp*"):  # also what the one before wrote afterwards
            shutil.rmtree(remains, ignore_errors=True)
        target = self.folder / str(step)
        if target.exists() and not (target / integrity.MANIFEST).exists():
            integrity.discard(target)

    def _write_measured(self) -> None:
        for step in sorted(self._measured):
            folder, numbers = self.folder / str(step), self._measured[step]
            try:
                if self.owner:
                    self.owner.check()
                if not processes.index() and (folder / integrity.MANIFEST).exists():
                    measured = finite_or_null(read_measured(folder) | numbers)
                    write_atomically(folder / MEASURED, json.dumps(measured, allow_nan=False).encode())
            except OSError:  # no step depends on it: it is tried again with the next one
                return
            del self._measured[step]

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _finish(self, response, target: Path) -> None:
        try:
            response.result()
            if not processes.index():
                if self.owner:
                    self.owner.check()
                integrity.write_manifest(target)
                self.sealed = int(target.name)
                steps = [step for step in integrity.steps(self.folder) if step <= int(target.name)]
                best = best_step(self.folder, self.best) if self.best else None
                for step in steps[: -self.keep]:  # a later one is damaged: the run went on from before it
                    if step != best:
                        integrity.discard(self.folder / str(step))
        except FolderLost:
            pass  # the next step says so
        except BaseException as e:
            self._error = _reason(e)


def _reason(error: BaseException) -> str:
    """Why a save has failed, in a line: what the system says, where it has said something."""
    text = " ".join(str(error).split())
    told = re.search(r"(?:os_error_code='|\[Errno )(\d+)", text)  # TensorStore's errors are of other classes
    number = int(told[1]) if told else getattr(error, "errno", None)
    return os.strerror(number) if number else f"{type(error).__name__}: {text}"[:400]


def _without_late_answers(previous: Callable) -> Callable:
    """After a failed save TensorStore answers to Orbax's event loop when that is closed, and Python would print it."""

    def hook(found) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            previous(found)

    return hook


sys.unraisablehook = _without_late_answers(sys.unraisablehook)
