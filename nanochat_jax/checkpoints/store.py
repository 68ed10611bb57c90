"""Checkpoints on disk: named arrays as Orbax writes them, and reading them back on any mesh. See `saver` for a run's.

A checkpoint is a folder <tag>/<step> that holds everything the next step depends on: the items `params` and
`optimizer`, each a flat dict of arrays by path, `meta` as JSON (step, data cursor, resolved settings, model config,
versions), and the manifest of `integrity`, without which it does not count. Folders may lie in a bucket.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from nanochat_jax.checkpoints import integrity
from nanochat_jax.distributed.processes import versions as versions

MEASURED = "measured.json"  # in a checkpoint's folder, beside what the manifest lists
SOURCES = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every file, and prints what it raises too
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and of arrays that nobody asked for, with a traceback


def write(target: Path, params: Mapping[str, Any], optimizer: Mapping[str, Any] | None, meta: dict) -> None:
    """Write a checkpoint folder <tag>/<step> with its manifest, and return when it is done; what a killed call has left
    there is replaced."""
    if target.exists():
        integrity.discard(target)
    for leftover in target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)
    arrays = {"params": params} | ({"optimizer": optimizer} if optimizer else {})
    with orbax():
        ocp.save_checkpointables(target, jax.tree.map(jnp.asarray, arrays) | {"meta": meta})
    integrity.write_manifest(target)


def orbax() -> ocp.Context:
    """Orbax's settings while it is entered: one that writes and reads `meta` as JSON."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")  # else a JSON dict goes to the array handler
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def read_meta(folder: Path) -> dict:
    """The `meta` of a checkpoint folder <tag>/<step>, with what was measured of it afterwards."""
    with orbax():
        meta = ocp.load_checkpointables(folder, {"meta": None})["meta"]
    return meta | read_measured(folder)


def read_measured(folder: Path) -> dict:
    """What was measured of a checkpoint after its save began; {} where that is nothing, or damaged, as no step depends
    on it."""
    try:
        measured = json.loads((folder / MEASURED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return measured if isinstance(measured, dict) else {}


def best_step(folder: Path, name: str) -> int | None:
    """The step of the checkpoint in a folder <tag> of which the highest number `name` was measured, of equals the last
    one's; None where it was measured of none."""
    measured = {step: read_measured(folder / str(step)).get(name) for step in integrity.steps(folder)}
    values = {step: value for step, value in measured.items() if isinstance(value, int | float)}
    return max(values, key=lambda step: (values[step], step), default=None)


def converted_from(folder: Path) -> str | None:
    """SHA-256 of nanochat's file that a checkpoint, complete or not, was converted from; None where it was converted
    from none, or is damaged."""
    try:
        return read_meta(folder).get("converted_from")
    except Exception:  # whatever Orbax makes of a damaged folder
        return None


def restore(folder: Path, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The items of a checkpoint folder <tag>/<step> whose arrays `wanted` names, on the shardings of its abstract ones,
    or on the host where it has NumPy arrays."""
    with orbax():
        return ocp.load_checkpointables(folder, dict(wanted))


def read_arrays(folder: Path, item: str) -> dict[str, np.ndarray]:
    """`params` or `optimizer` of a checkpoint folder <tag>/<step>, on the host, whatever mesh they were saved from."""
    with orbax():
        stored = ocp.checkpointables_metadata(folder).metadata[item]
    return restore(folder, {item: {name: np.empty(array.shape, array.dtype) for name, array in stored.items()}})[item]
