"""Read tensors from safetensors files, one or several shards of a model.

A file is 8 bytes with the length of a header, the header as JSON (name -> dtype, shape, begin and end of its bytes) and
the bytes of all tensors without gaps. Every length is checked against the file before it is used.
"""

import json
import math
import mmap
from pathlib import Path

import ml_dtypes
import numpy as np

from nanochat_jax.files.json_read import read_json_object, without_repeats
from nanochat_jax.files.plain_pickle import Refused, naming_file, open_file, refusing_failures, short

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MAX_HEADER = 16 << 20  # bytes; that of a model with 10,000 tensors has 2 MB
FILE = "model.safetensors"  # of a model in one file
INDEX = "model.safetensors.index.json"  # of one in several: which file has which tensor


def read_safetensors(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a file by name, as read-only arrays (bfloat16 through ml_dtypes), views of the mapped file."""
    with refusing_failures(path), open_file(path) as f:
        size = f.seek(0, 2)
        if size < 8:
            raise Refused(f"a safetensors file has at least 8 bytes, this one has {size}")
        data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        begin = 8 + int.from_bytes(data[:8], "little")
        if begin > min(size, MAX_HEADER):
            raise Refused(
                f"its header must fit into the file and into {MAX_HEADER:,} bytes, it claims {begin - 8:,} of {size:,}"
            )
        header = json.loads(bytes(data[8:begin]), object_pairs_hook=without_repeats)
        if not isinstance(header, dict):
            raise Refused(f"its header must be an object, got {short(header)}")
        header.pop("__metadata__", None)
        tensors = {name: _tensor(name, entry, data[begin:]) for name, entry in header.items()}
        end = 0
        for first, last in sorted(entry["data_offsets"] for entry in header.values()):
            if first != end:
                raise Refused(f"its tensors must follow one another, but one begins at {first:,} instead of {end:,}")
            end = last
        if begin + end != size:
            raise Refused(f"its tensors have {end:,} bytes, but after the header there are {size - begin:,}")
        return tensors


def read_shards(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a model in `folder`, in one file or in those that its index names."""
    if (folder / FILE).exists():
        return read_safetensors(folder / FILE)
    weight_map, tensors = read_index(folder / INDEX), {}
    for path in shard_files(folder):
        content = read_safetensors(path)
        listed = {name for name, file in weight_map.items() if file == path.name}
        if content.keys() != listed:
            raise Refused(f"{path}: it and {INDEX} disagree about {short(min(content.keys() ^ listed))}")
        tensors |= content
    return tensors


def shard_files(folder: Path) -> list[Path]:
    """The files that `read_shards` reads tensors from."""
    if (folder / FILE).exists():
        return [folder / FILE]
    return [folder / file for file in sorted(set(read_index(folder / INDEX).values()))]


def read_index(path: Path) -> dict[str, str]:
    """name of a tensor -> name of its file, which lies beside the index."""
    index = read_json_object(path)
    with naming_file(path):
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Refused("it must be an object with a weight_map, an object from names to files")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise Refused(f"it must name .safetensors files beside it, got {short(file)}")
        return weight_map


def _tensor(name: str, entry: object, data: memoryview) -> np.ndarray:
    """The array that an entry of the header describes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"{short(name)} must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(f"{short(name)} must be one of {', '.join(DTYPES)}, got {short(dtype)}")
    if not _are_sizes(shape) or len(shape) > 32 or not _are_sizes(offsets) or len(offsets) != 2:
        raise Refused(f"the shape and data_offsets of {short(name)} must be lists of sizes, the second one of two")
    kind, (begin, end) = np.dtype(DTYPES[dtype]), offsets
    if begin > end or end > len(data):
        raise Refused(f"{short(name)} must lie within the {len(data):,} bytes of the tensors, got {begin:,} to {end:,}")
    if math.prod(shape) * kind.itemsize != end - begin:
        raise Refused(f"{short(name)} of shape {shape} in {dtype} cannot have {end - begin:,} bytes")
    array = np.frombuffer(data[begin:end], kind)
    if array.ctypes.data % kind.itemsize:  # writers align the header's length, but need not
        array = array.copy()
        array.flags.writeable = False
    return array.reshape(shape)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
