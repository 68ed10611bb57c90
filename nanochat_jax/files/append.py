"""A file that only grows, and that a full disk does not tear."""

import os
from pathlib import Path

from nanochat_jax.distributed.processes import print0


class AppendedFile:
    """A file on a disk, to whose end is written. What does not get there, because the disk is full, waits in memory and
    is written before anything else as soon as there is room, so that the file never has a gap."""

    def __init__(self, path: Path):
        """The file is made where there is none."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._waiting = b""
        self.size = os.fstat(self._descriptor).st_size  # bytes, with those that wait

    def ends_in_the_middle_of_a_line(self) -> bool:
        """As after a process that was killed while it wrote."""
        return self.size > 0 and os.pread(self._descriptor, 1, self.size - 1) != b"\n"

    def truncate(self, size: int) -> None:
        """Leave the first `size` bytes."""
        os.ftruncate(self._descriptor, size)
        self.size = size

    def write(self, data: bytes) -> None:
        """Append; a line of the console tells where that fails, and where what was waiting is written."""
        waited = bool(self._waiting)
        self._waiting += data
        self.size += len(data)
        try:
            self._flush()
        except OSError as e:
            if not waited:
                print0(f"WARNING: {self.path} cannot be written ({e.strerror}): its lines wait in memory")
        else:
            if waited:
                print0(f"{self.path} has been written again")

    def sync(self) -> None:
        """Force everything to the disk. OSError: something waits."""
        self._flush()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Write what waits, if that is possible now."""
        try:
            self.sync()
        except OSError as e:
            print0(f"WARNING: the last {len(self._waiting):,} bytes of {self.path} are lost ({e.strerror})")
        os.close(self._descriptor)

    def _flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
