"""Write .pt files as torch.save does, and also ones that torch would not: any geometry, any opcode, any layout."""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat_jax.files import torch_write


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


class AnyPickle(torch_write.Pickle):
    """Also takes Raw and tensors of any geometry; those over one array share its storage."""

    def __init__(self):
        super().__init__()
        self.keys = {}

    def add(self, value) -> None:
        if isinstance(value, Raw):
            self.out += value.opcodes
        elif isinstance(value, Tensor):
            flat = value.storage
            if id(flat) not in self.keys:
                self.keys[id(flat)] = len(self.storages)
                self.storages.append(torch_write.Tensor(flat.shape, flat.dtype, [flat]))
            claimed = flat.size if value.claimed is None else value.claimed
            kind = torch_write.STORAGE_OF[flat.dtype]
            self.tensor(self.keys[id(flat)], kind, claimed, value.offset, value.size, value.stride)
        else:
            super().add(value)


def write_pt(path: Path, value, *, byteorder: bytes = b"little", compressed: bool = False, align: int = 64) -> None:
    """torch.save(value, path) with numpy arrays for tensors; storages begin at multiples of `align` bytes."""
    pickled = AnyPickle()
    pickled.add(value)
    torch_write.write_archive(path, pickled)
    if (byteorder, compressed, align) == (b"little", False, 64):
        return
    with zipfile.ZipFile(path) as z:
        records = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for name, content in records.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            padding = -(z.fp.tell() + 30 + len(name) + 4) % align
            info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
            z.writestr(info, byteorder if name.endswith("/byteorder") else content)
