"""Read what torch.save wrote, without torch and without running anything from the file (see `plain_pickle`).

A .pt file is a zip: one pickle that describes the object, and the bytes of each storage that its tensors refer to.
"""

import collections
import math
import mmap
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from nanochat_jax.files.plain_pickle import (
    MAX_PICKLE,
    Global,
    Refused,
    open_file,
    read_pickle,
    refusing_failures,
    short,
)

STORAGES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save's files before the zip format begin, after PROTO


def read_pt(path: Path | str) -> object:
    """What torch.save put into `path`, with read-only numpy arrays for tensors (bfloat16 through ml_dtypes).

    The arrays are views of the mapped file: a checkpoint larger than memory can be read tensor by tensor.
    """
    with refusing_failures(path):
        archive = Archive(path)
        if archive.has("byteorder") and archive.record("byteorder") != b"little":
            raise Refused("it was written on a big-endian machine")
        return read_pickle(bytes(archive.record("data.pkl", MAX_PICKLE)), CALLS, archive.storage)


class Archive:
    """The records of a torch zip file, each checked (place, size, CRC-32) when it is asked for."""

    def __init__(self, path: Path | str):
        with open_file(path) as f:
            start = f.read(64)
            if not start:
                raise Refused("the file is empty")
            if start[2:].startswith(LEGACY_MAGIC):
                raise Refused("it is in torch's old format: load it with torch and save it again (torch 1.6 or later)")
            if not start.startswith(b"PK"):
                raise Refused(f"torch.save writes zip files, this one begins with {start[:8]!r}")
            self.data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
            with zipfile.ZipFile(f) as z:
                infos = z.infolist()
        self.infos = {info.orig_filename: info for info in infos}
        if len(self.infos) != len(infos):
            raise Refused("two of its records have the same name")
        if sum(info.compress_size for info in infos) > len(self.data):
            raise Refused("its records claim more bytes than the file has")
        roots = [name.removesuffix("/data.pkl") for name in self.infos if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused(f"a file of torch.save has one record data.pkl, this zip has {len(roots)}")
        self.root = roots[0]
        self.arrays = {}

    def has(self, name: str) -> bool:
        """Whether the archive has a record of this name."""
        return f"{self.root}/{name}" in self.infos

    def record(self, name: str, limit: int | None = None) -> memoryview:
        """The bytes of a record, of which there may be at most `limit`."""
        info = self.infos.get(f"{self.root}/{name}")
        if info is None:
            raise Refused(f"record {name} is missing")
        size, at = info.file_size, info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != size or info.flag_bits & 1:
            raise Refused(f"record {name} is compressed or encrypted; torch.save does neither")
        if limit is not None and size > limit:
            raise Refused(f"record {name} may have at most {limit:,} bytes, got {size:,}")
        header = bytes(self.data[at : at + 30])
        name_end = at + 30 + int.from_bytes(header[26:28], "little")
        begin = name_end + int.from_bytes(header[28:30], "little")
        stored_name = bytes(self.data[at + 30 : name_end])
        if header[:4] != b"PK\3\4" or stored_name.decode("utf-8", "replace") != info.orig_filename:
            raise Refused(f"the zip's directory and the header of record {name} disagree")
        content = self.data[begin : begin + size]
        if len(content) != size:
            raise Refused(f"record {name} is cut off: {size:,} bytes expected, got {len(content):,}")
        if zlib.crc32(content) != info.CRC:
            raise Refused(f"record {name} is damaged: its CRC-32 differs")
        return content

    def storage(self, persistent_id: object) -> np.ndarray:
        """The flat array of ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, _device, count = persistent_id
        if kind != "storage" or type(key) is not str or type(count) is not int or type(storage_type) is not Global:
            raise Refused("it has a storage record of unknown form")
        if (key, storage_type) not in self.arrays:
            dtype = np.dtype(STORAGES[storage_type.name])
            content = self.record(f"data/{key}")
            if len(content) != count * dtype.itemsize:
                raise Refused(f"storage {key} must have {count} x {dtype.itemsize} bytes, got {len(content):,}")
            array = np.frombuffer(content, dtype)
            if array.ctypes.data % dtype.itemsize:  # torch aligns to 64 bytes, other writers may not
                array = array.copy()
                array.flags.writeable = False
            self.arrays[key, storage_type] = array
        return self.arrays[key, storage_type]


def _rebuild_tensor(storage, offset, size, stride, *_):
    """A view of `storage` [n]; size and stride count elements, as in torch."""
    if not (isinstance(storage, np.ndarray) and storage.ndim == 1 and type(size) is tuple and type(stride) is tuple):
        raise Refused("it has a tensor of unknown form")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 32 or not all(type(v) is int and 0 <= v < 1 << 62 for v in numbers):
        raise Refused(f"bad tensor geometry: offset {short(offset)}, {len(size)} sizes, {len(stride)} strides")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if all(size) else offset - 1
    # The second condition: a stride of 0 would make a huge array of a few bytes.
    if last >= storage.size or math.prod(size) > storage.size:
        geometry = f"a tensor of shape {size}, strides {stride}, offset {offset}"
        raise Refused(f"{geometry} exceeds its {storage.size} elements")
    if not all(size):
        return np.zeros(size, storage.dtype)
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _rebuild_parameter(tensor, *_):
    if not isinstance(tensor, np.ndarray):
        raise Refused("it has a parameter without a tensor")
    return tensor


def _new_dict():  # OrderedDict itself would take arguments
    return collections.OrderedDict()


def _new_size(sizes):
    if type(sizes) is not tuple:
        raise Refused(f"a torch.Size must be made of a tuple, got {short(sizes)}")
    return sizes


def _refuse_call(*_):
    raise Refused("it calls a storage type")


CALLS = {  # names that a checkpoint's pickle may use
    "collections.OrderedDict": _new_dict,
    "torch.Size": _new_size,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    **dict.fromkeys(STORAGES, _refuse_call),
}
