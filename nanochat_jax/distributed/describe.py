"""What a run tells its user about the mesh: how each parameter is split, and which sizes the mesh does not divide."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax.distributed.sharding import param_spec, path_name


def parameter_table(params: Any, mesh: Mesh, replicate: bool = False) -> tuple[list[str], list[str]]:
    """(lines with path, shape, mesh axes and bytes per device of every parameter, one line for those that layers have
    in common; a note on each size that an axis of PARAM_SPECS does not divide). params: abstract, with shardings."""
    groups: dict[tuple, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = re.sub(r"/\d+/", "/*/", path_name(path))
        groups.setdefault((name, leaf.shape, leaf.sharding.spec), []).append(leaf)
    rows, total, undivided = [("parameter", "shape", "sharding", "bytes a device")], 0, {}
    for (name, shape, spec), leaves in groups.items():
        size = len(leaves) * leaves[0].dtype.itemsize * math.prod(leaves[0].sharding.shard_shape(shape))
        total += size
        axes = ", ".join(str(axis) for axis in (*spec, *[None] * len(shape))[: len(shape)])
        times = f" x {len(leaves)}" if len(leaves) > 1 else ""
        rows.append((name + times, " x ".join(map(str, shape)), f"({axes})", f"{size:,}"))
        for n, axis in zip(shape, param_spec(name)):
            if axis and n % mesh.shape[axis] and not (replicate and axis == "data"):
                undivided.setdefault((n, axis, axis in spec), []).append(name)
    rows.append(("all", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + f"  {row[3]:>16}" for row in rows]
    return lines, [
        f"{n} is no multiple of the mesh's {axis}={mesh.shape[axis]}, so "
        f"{'split along the other side' if moved else 'not split'}: {', '.join(names)}"
        for (n, axis, moved), names in undivided.items()
    ]


def heads_note(n_kv_head: int, mesh: Mesh) -> list[str]:
    """A note where the model axis does not divide the kv heads, which model.attention.sharded then does not split."""
    size = mesh.shape["model"]
    if n_kv_head % size == 0:
        return []
    return [f"{n_kv_head} kv heads are no multiple of the mesh's model={size}, so attention is computed {size} times"]


def replicas_note(n_embd: int, mesh: Mesh) -> list[str]:
    """A note where `choose_replicas` has given the mesh replicas."""
    if "replica" not in mesh.shape:
        return []
    replica, data = mesh.shape["replica"], mesh.shape["data"]
    return [
        f"parameters are split over {data} devices and kept {replica} times (--mesh replica={replica},data={data}), "
        f"which suits {n_embd} channels on {replica * data} devices"
    ]
