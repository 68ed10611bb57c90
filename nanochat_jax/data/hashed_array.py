"""Arrays on disk that are hashed block by block as they are written, and checked as they are read."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

BLOCK = 1 << 20  # bytes that one hash covers; checking them takes a millisecond


@contextlib.contextmanager
def write_array(path: Path, dtype: type[np.generic], blocks: list[str]) -> Iterator[Callable[[np.ndarray], None]]:
    """append(values) for an .npy file of one dimension, whose length is put into the header when all is written.

    blocks: an empty list; at the end it has the SHA-256 (hex) of each BLOCK of the file."""
    count, pending = 0, bytearray()

    def write_header():  # NumPy pads it, so that it takes the same room for any count
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})

    def hash_whole_blocks():
        while len(pending) >= BLOCK:
            blocks.append(hashlib.sha256(pending[:BLOCK]).hexdigest())
            del pending[:BLOCK]

    def append(values):
        nonlocal count, pending
        data = np.asarray(values, dtype).tobytes()
        file.write(data)
        count += len(values)
        pending += data
        hash_whole_blocks()

    with open(path, "w+b") as file:
        write_header()
        pending += bytes(file.tell())  # stands for the header, which is not known yet
        yield append
        if pending:
            blocks.append(hashlib.sha256(pending).hexdigest())
        file.seek(0)
        write_header()
        file.seek(0)
        blocks[0] = hashlib.sha256(file.read(BLOCK)).hexdigest()
        file.flush()
        os.fsync(file.fileno())


class HashedArray:
    """A file of `write_array`, mapped from disk. Several threads may read.

    A block is hashed when something in it is read for the first time, so that gigabytes are opened at once and nothing
    damaged is used. (Two threads that hash a block at the same time do no harm.)
    """

    def __init__(self, path: Path, dtype: type[np.generic], blocks: Sequence[str]):
        """blocks: what `write_array` gave. ValueError, OSError: the file is not the one that was written."""
        self.path, self._blocks, self._checked = path, blocks, bytearray(len(blocks))
        # asarray: slicing a np.memmap costs several times as much as slicing a plain array
        self._bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))
        if len(blocks) != -(-len(self._bytes) // BLOCK):
            raise ValueError(f"{path.name} has {len(self._bytes):,} bytes, not the {len(blocks):,} blocks written")
        self._check(0)  # the header lies in it
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            self._header = file.tell()
        self._values = self._bytes[self._header :].view(dtype)
        if (shape, found) != (self._values.shape, self._values.dtype):
            raise ValueError(f"{path.name} is {found} {shape} instead of {self._values.dtype} {self._values.shape}")

    def __len__(self) -> int:
        return len(self._values)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements start to stop, not copied. ValueError: they are not as they were written."""
        size = self._values.itemsize
        first, end = (self._header + start * size) // BLOCK, -(-(self._header + stop * size) // BLOCK)
        for block in range(first, end):
            if not self._checked[block]:
                self._check(block)
        return self._values[start:stop]

    def _check(self, block: int) -> None:
        found = hashlib.sha256(self._bytes[block * BLOCK : (block + 1) * BLOCK]).hexdigest()
        if found != self._blocks[block]:
            raise ValueError(f"the content of {self.path.name} has changed since it was written")
        self._checked[block] = 1
