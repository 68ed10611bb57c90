"""Write tensors as safetensors files, one or several shards of a model; see `files/safetensors_read.py`.

Tensors are written one after the other, each converted when its turn comes, so that nothing is in memory twice.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nanochat_jax.files.safetensors_read import DTYPES, FILE, INDEX
from nanochat_jax.files.torch_write import Tensor, as_bytes

NAME_OF = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5_000_000_000  # of tensors in a file, as in most repositories of the hub
ALIGNMENT = 8  # bytes; the header is padded to it, so that a reader may map the tensors


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file with these tensors by name, in their order. It is on disk when this returns."""
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers loads no file without this format
    for name, tensor in tensors.items():
        begin, end = end, end + byte_count(tensor)
        header[name] = {"dtype": NAME_OF[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % ALIGNMENT)
    with path.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            for piece in tensor.pieces:
                f.write(as_bytes(np.asarray(piece, tensor.dtype)))
        f.flush()
        os.fsync(f.fileno())


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """A model's tensors in `folder`: in one file, or where they have more than `shard_bytes` in several with an index.

    A tensor is never cut: one that is larger has a file of its own."""
    shards, room = [[]], shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and byte_count(tensor) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= byte_count(tensor)
    if len(shards) == 1:
        write_safetensors(folder / FILE, tensors)
        return
    where = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        where |= dict.fromkeys(names, file)
    total = sum(map(byte_count, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def byte_count(tensor: Tensor) -> int:
    """How many bytes the tensor has in a file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
