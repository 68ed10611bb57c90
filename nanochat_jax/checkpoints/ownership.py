"""The right to write into a run's folder, which one run at a time has, and which it can lose."""

import os
import time
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanochat_jax.files import bucket

LOCK = ".lock"  # file in a folder on a disk, locked by the run that trains there
OWNER = ".owner"  # file with the token of the run that started there last, where there are no locks
GLANCE_SECONDS = 30.0  # a bucket is not asked at every step


class FolderLost(OSError):
    """The folder belongs to another run now, or is gone: this run must not write there again."""


class Lock:
    """A lock on a folder of a disk, while it is held. Timeout: another process has it. NotImplementedError: the file
    system has no locks."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        folder.mkdir(parents=True, exist_ok=True)
        self._held: list[FileLock] = []
        self._take()

    def _take(self) -> None:
        lock = FileLock(self.path)
        lock.acquire(timeout=0)
        self._held.append(lock)
        self._file = _identity(self.path)

    def check(self) -> None:
        """FolderLost: the lock file has been deleted, which lets others in, and another run has come."""
        found = _identity(self.path)
        if found == self._file:
            return
        if not self.path.parent.is_dir():
            raise FolderLost(f"{self.path.parent} was deleted while this run trained in it: the run ends")
        if found is None:
            try:
                return self._take()
            except Timeout:
                pass
        raise FolderLost(_lost(self.path.parent))

    glance = check

    def release(self) -> None:
        """Let another run have the folder."""
        for lock in self._held:
            lock.release()


class Token:
    """A token in a folder where locks do not work, such as one in a bucket. The run that started last has the folder;
    one before it, perhaps on a machine that was believed lost, ends before it saves again."""

    def __init__(self, folder: Any, here: Lock | None = None):
        """here: the lock on this machine's copy of a bucket's folder, released with the token."""
        self.path, self.token, self._checked = folder / OWNER, uuid.uuid4().hex, time.monotonic()
        self._here = here
        self.path.write_text(self.token)

    def check(self) -> None:
        """FolderLost: another run has taken the folder, or it was deleted."""
        self._checked = time.monotonic()
        try:
            if self.path.read_text() == self.token:
                return
        except FileNotFoundError:
            pass
        raise FolderLost(_lost(self.path.parent))

    def glance(self) -> None:
        """`check`, where the last one is long ago."""
        if time.monotonic() - self._checked > GLANCE_SECONDS:
            self.check()

    def release(self) -> None:
        """Let another run of this machine have the folder."""
        if self._here:
            self._here.release()


def own(folder: Any) -> Lock | Token:
    """The right to write into a folder, until `release`. Timeout: another run on this file system has it."""
    try:
        lock = Lock(bucket.local_path(folder))
    except NotImplementedError:  # so FileLock says that the file system has no locks
        return Token(folder)
    return Token(folder, lock) if bucket.in_bucket(folder) else lock


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _lost(folder: Any) -> str:
    return f"another run has started in {folder}: this one has lost it and saves nothing more"
