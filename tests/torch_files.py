"""Write .pt files as torch.save does, without torch, from plain data and numpy arrays; also ones torch would not."""

import collections
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

KINDS = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


@dataclass(eq=False)
class Tensor:
    """A tensor of any geometry over `storage` [n]; `claimed` is the number of elements the file says it has."""

    storage: np.ndarray
    offset: int
    size: tuple
    stride: tuple
    claimed: int | None = None


@dataclass(frozen=True)
class Raw:
    """Pickle opcodes put into the stream as they are."""

    opcodes: bytes


@dataclass
class Pickled:
    """The pickle of an object and the storages it refers to, in order."""

    out: bytearray = field(default_factory=lambda: bytearray(b"\x80\x02"))
    storages: list = field(default_factory=list)

    def add(self, value) -> None:
        out = self.out
        if isinstance(value, Raw):
            out += value.opcodes
        elif value is None or isinstance(value, bool):
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
            self._marked(b"u", *(item for pair in value.items() for item in pair))
        elif isinstance(value, list):
            out += b"]"
            self._marked(b"e", *value)
        elif isinstance(value, tuple):
            self._marked(b"t", *value)
        elif isinstance(value, np.ndarray):
            flat = np.ascontiguousarray(value).reshape(-1)
            strides = [int(np.prod(value.shape[i + 1 :])) for i in range(value.ndim)]
            self.add(Tensor(flat, 0, value.shape, tuple(strides)))
        elif isinstance(value, Tensor):
            out += b"ctorch._utils\n_rebuild_tensor_v2\n"
            keys = [key for key, storage in enumerate(self.storages) if storage is value.storage]
            key = keys[0] if keys else len(self.storages)
            self.storages += [] if keys else [value.storage]
            kind = Raw(f"ctorch\n{KINDS[value.storage.dtype]}\n".encode())
            claimed = value.storage.size if value.claimed is None else value.claimed
            pid = Pickled(bytearray())
            pid.add(("storage", kind, str(key), "cpu", claimed))
            no_hooks = collections.OrderedDict()
            self.add((Raw(bytes(pid.out) + b"Q"), value.offset, value.size, value.stride, False, no_hooks))
            out += b"R"
        else:
            raise TypeError(f"cannot write {type(value)}")

    def _marked(self, opcode: bytes, *values) -> None:
        self.out += b"("
        for value in values:
            self.add(value)
        self.out += opcode


def write_pt(path: Path, value, *, byteorder: bytes = b"little", compressed: bool = False, align: int = 64) -> None:
    """torch.save(value, path) with numpy arrays for tensors; storages begin at multiples of `align` bytes."""
    pickled = Pickled()
    pickled.add(value)
    root = path.name.removesuffix(".pt")
    records = {"data.pkl": bytes(pickled.out) + b".", "byteorder": byteorder}
    records |= {f"data/{key}": storage.tobytes() for key, storage in enumerate(pickled.storages)}
    with zipfile.ZipFile(path, "w") as z:
        for name, content in (records | {"version": b"3\n"}).items():
            info = zipfile.ZipInfo(f"{root}/{name}")
            info.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            padding = -(z.fp.tell() + 30 + len(info.filename) + 4) % align
            info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
            z.writestr(info, content)
