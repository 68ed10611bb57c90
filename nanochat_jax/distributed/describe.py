"""What a user is told of the mesh: how each parameter is split, and sizes that do not divide."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax.distributed.sharding import param_spec, path_name


def table(params: Any, mesh: Mesh, replicate: bool = False) -> tuple[list[str], list[str]]:
    """(lines: path, shape, axes and bytes a device of every parameter, layers that are alike in one line; and a note on
    each size that a mesh axis of the rules does not divide). params: abstract, with their shardings."""
    kinds: dict[tuple, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = re.sub(r"/\d+/", "/*/", path_name(path))
        kinds.setdefault((name, leaf.shape, leaf.sharding.spec), []).append(leaf)
    rows, total, notes = [("parameter", "shape", "sharding", "bytes a device")], 0, {}
    for (name, shape, spec), leaves in kinds.items():
        size = len(leaves) * leaves[0].dtype.itemsize * math.prod(leaves[0].sharding.shard_shape(shape))
        total += size
        axes = ", ".join(str(axis) for axis in (*spec, *[None] * len(shape))[: len(shape)])
        times = f" x {len(leaves)}" if len(leaves) > 1 else ""
        rows.append((name + times, " x ".join(map(str, shape)), f"({axes})", f"{size:,}"))
        for n, axis in zip(shape, param_spec(name)):
            if axis and n % mesh.shape[axis] and not (replicate and axis == "data"):
                notes.setdefault((n, axis, axis in spec), []).append(name)
    rows.append(("all", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + f"  {row[3]:>16}" for row in rows]
    said, how = "is no multiple of the mesh's", {True: "split along the other side", False: "not split"}
    return lines, [
        f"{n} {said} {axis}={mesh.shape[axis]}, so {how[moved]}: {', '.join(names)}"
        for (n, axis, moved), names in notes.items()
    ]


def heads_note(n_kv_head: int, mesh: Mesh) -> list[str]:
    """What to tell of a model axis that does not divide the kv heads (attention.sharded), if so."""
    size = mesh.shape["model"]
    if n_kv_head % size == 0:
        return []
    return [f"{n_kv_head} kv heads are no multiple of the mesh's model={size}, so attention is computed {size} times"]


def replicas_note(n_embd: int, mesh: Mesh) -> list[str]:
    """What to tell of a mesh that has replicas by `choose_replicas`, if so."""
    if "replica" not in mesh.shape:
        return []
    replica, data = mesh.shape["replica"], mesh.shape["data"]
    return [
        f"parameters are split over {data} devices and kept {replica} times (--mesh replica={replica},data={data}), "
        f"which suits {n_embd} channels on {replica * data} devices"
    ]
