"""Write plain data with tensors as torch.save does, without torch.

A .pt file is a zip: one pickle that describes the object, and the bytes of each storage that its tensors refer to. The
pickle holds only what torch.load allows with weights_only.
"""

import collections
import dataclasses
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanochat_jax.files.torch_read import STORAGES

STORAGE_OF = {np.dtype(dtype): name.removeprefix("torch.") for name, dtype in STORAGES.items()}
ALIGNMENT = 64  # bytes; torch places storages so, and a reader may map them
ZIP64_FROM = 1 << 30  # bytes; the sizes of a record that is larger are in an extra field of 20 bytes, which 2 GiB need


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A contiguous tensor of this shape, whose elements are those of `pieces`, one array after the other."""

    shape: tuple[int, ...]
    dtype: np.dtype  # the pieces are converted to it when they are written
    pieces: Sequence[np.ndarray]


class Pickle:
    """The pickle (protocol 2) of plain data with numpy arrays and Tensors in it, and their storages in order.

    None, bool, int, float, str, list, tuple, dict and OrderedDict are plain; anything else is a TypeError.
    """

    def __init__(self):
        self.out = bytearray(b"\x80\x02")
        self.storages: list[Tensor] = []

    def add(self, value: object) -> None:
        """Append a value, see the class."""
        out = self.out
        if value is None or isinstance(value, bool):
            out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            small = -(1 << 31) <= value < 1 << 31
            out += b"J" + struct.pack("<i", value) if small else b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode()
            out += b"X" + struct.pack("<I", len(text)) + text
        elif isinstance(value, dict):
            out += b"ccollections\nOrderedDict\n)R" if isinstance(value, collections.OrderedDict) else b"}"
            self._marked(b"u", [item for pair in value.items() for item in pair])
        elif isinstance(value, list):
            out += b"]"
            self._marked(b"e", value)
        elif isinstance(value, tuple):
            self._marked(b"t", value)
        elif isinstance(value, np.ndarray):
            self.add(Tensor(value.shape, value.dtype, [value]))
        elif isinstance(value, Tensor):
            self.storages.append(value)
            strides = tuple(int(np.prod(value.shape[i + 1 :])) for i in range(len(value.shape)))
            kind, count = STORAGE_OF[value.dtype], int(np.prod(value.shape))
            self.tensor(len(self.storages) - 1, kind, count, 0, value.shape, strides)
        else:
            raise TypeError(f"a plain value or a tensor is needed, got {type(value).__name__}")

    def tensor(self, key: int, kind: str, count: int, offset: int, size: tuple, stride: tuple) -> None:
        """A tensor over storage `key` of `count` elements of type torch.<kind>; offset and stride in elements."""
        self.out += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self.add("storage")
        self.out += f"ctorch\n{kind}\n".encode()
        for value in (str(key), "cpu", count):
            self.add(value)
        self.out += b"tQ"
        for value in (offset, size, stride, False, collections.OrderedDict()):  # no gradient, no hooks
            self.add(value)
        self.out += b"tR"

    def _marked(self, opcode: bytes, values: Sequence) -> None:
        self.out += b"("
        for value in values:
            self.add(value)
        self.out += opcode


def write_pt(path: Path, value: object) -> None:
    """torch.save(value, path) for plain data with tensors; see Pickle. The file is on disk when this returns."""
    pickled = Pickle()
    pickled.add(value)
    write_archive(path, pickled)


def write_archive(path: Path, pickled: Pickle) -> None:
    """The zip file of a pickle that is complete but for its end."""
    small = {"data.pkl": bytes(pickled.out) + b".", "byteorder": b"little"}
    with open(path, "wb") as f:
        with zipfile.ZipFile(f, "w") as z:
            for name, content in small.items():
                _write_record(z, path.stem, name, len(content), [content])
            for key, tensor in enumerate(pickled.storages):
                size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
                pieces = (as_bytes(np.asarray(piece, tensor.dtype)) for piece in tensor.pieces)
                _write_record(z, path.stem, f"data/{key}", size, pieces)
            _write_record(z, path.stem, "version", 2, [b"3\n"])
        f.flush()
        os.fsync(f.fileno())


def as_bytes(array: np.ndarray) -> memoryview:
    """bfloat16 arrays have no buffer of their own."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _write_record(z: zipfile.ZipFile, root: str, name: str, size: int, pieces) -> None:
    info = zipfile.ZipInfo(f"{root}/{name}")
    info.file_size = size
    large = size >= ZIP64_FROM
    padding = -(z.fp.tell() + 30 + len(info.filename.encode()) + 4 + 20 * large) % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with z.open(info, "w", force_zip64=large) as record:
        for piece in pieces:
            record.write(piece)
