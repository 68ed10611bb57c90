"""Checkpoints on disk: asynchronous Orbax saves of named arrays, and reading them back on any mesh.

A checkpoint is a folder <tag>/<step> that holds everything the next step depends on: the items `params` and
`optimizer`, each a flat dict of arrays by path, `meta` as JSON (step, data cursor, resolved settings, model config,
versions), and the manifest of `integrity`, without which it does not count. Folders may lie in a bucket.
"""

import json
import logging
import shutil
import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from nanochat_jax.checkpoints import integrity
from nanochat_jax.distributed import processes
from nanochat_jax.files import bucket
from nanochat_jax.files.json_numbers import finite_or_null
from nanochat_jax.files.paths import write_atomically

MEASURED = "measured.json"  # in a checkpoint's folder, beside what the manifest lists
SOURCES = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file it writes


class Saver:
    """Writes the checkpoints of one run into <folder>/<step> in the background, and keeps the newest `keep`."""

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"--keep-checkpoints must be at least 1, got {keep}")
        self.folder, self.keep = folder, keep
        self._owner = bucket.Ownership(folder) if bucket.in_bucket(folder) and not processes.index() else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._measured: dict[int, dict[str, float]] = {}  # by step: not written yet

    def save(self, step: int, items: Mapping[str, Mapping[str, Any]], meta: dict) -> None:
        """Start saving; returns when the arrays have been copied, so that the next step may overwrite them.

        items: {"params": {path: array}, "optimizer": {path: array}}. Waits for the save before it, and raises here what
        went wrong there.
        """
        self.wait()
        target = self.folder / str(step)
        if self._owner:
            self._owner.check()
        if not processes.index() and target.exists():
            integrity.discard(target)  # damaged or incomplete, else the run would have gone on from it
        processes.exchange("a checkpoint", step)  # the others must not find it there
        with _orbax():
            response = ocp.save_checkpointables_async(target, {**items, "meta": finite_or_null(meta)})
        self._thread = threading.Thread(target=self._finish, args=(response, target), name="checkpoint")
        self._thread.start()

    def add_to_meta(self, step: int, numbers: Mapping[str, float]) -> None:
        """What was measured of a checkpoint after its save began; `read_meta` gives it with the rest. Written when
        the save is done, at the latest by `wait`."""
        self._measured[step] = dict(numbers)
        if not (self._thread and self._thread.is_alive()):
            self._write_measured()

    def _write_measured(self) -> None:
        if self._measured and self._owner:
            self._owner.check()
        for step in sorted(self._measured):
            folder, numbers = self.folder / str(step), self._measured.pop(step)
            if not processes.index() and (folder / integrity.MANIFEST).exists():
                measured = finite_or_null(_read_measured(folder) | numbers)
                write_atomically(folder / MEASURED, json.dumps(measured, allow_nan=False).encode())

    def wait(self) -> None:
        """Wait until the last save is on disk with its manifest; OSError tells what went wrong in the background."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self._write_measured()
        if self._error:
            error, self._error = self._error, None
            raise OSError(f"the checkpoint could not be written to {self.folder}: {error}") from error

    def newest(self) -> str:
        """The end of an error's sentence: which checkpoint a run can go on from."""
        step = integrity.newest_intact(self.folder)
        return (
            f"the last good checkpoint is {self.folder / str(step)}" if step is not None else "there is no checkpoint"
        )

    def _finish(self, response, target: Path) -> None:
        try:
            response.result()
            if not processes.index():
                if self._owner:
                    self._owner.check()
                integrity.write_manifest(target)
                steps = [step for step in integrity.steps(self.folder) if step <= int(target.name)]
                for step in steps[: -self.keep]:  # a later one is damaged: the run went on from before it
                    integrity.discard(self.folder / str(step))
        except BaseException as e:
            self._error = e


def write(target: Path, params: Mapping[str, Any], optimizer: Mapping[str, Any] | None, meta: dict) -> None:
    """Write a checkpoint folder <tag>/<step> with its manifest, and return when it is done; what a killed call has left
    there is replaced."""
    if target.exists():
        integrity.discard(target)
    for leftover in target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)
    arrays = {"params": params} | ({"optimizer": optimizer} if optimizer else {})
    with _orbax():
        ocp.save_checkpointables(target, jax.tree.map(jnp.asarray, arrays) | {"meta": meta})
    integrity.write_manifest(target)


def _orbax() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")  # else a JSON dict goes to the array handler
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def read_meta(folder: Path) -> dict:
    """The `meta` of a checkpoint folder <tag>/<step>, with what was measured of it afterwards."""
    with _orbax():
        meta = ocp.load_checkpointables(folder, {"meta": None})["meta"]
    return meta | _read_measured(folder)


def _read_measured(folder: Path) -> dict:
    """What was measured of a checkpoint after its save began; {} where that is nothing, or damaged, as no step depends
    on it."""
    try:
        measured = json.loads((folder / MEASURED).read_bytes())
    except (OSError, ValueError):
        return {}
    return measured if isinstance(measured, dict) else {}


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
    with _orbax():
        return ocp.load_checkpointables(folder, dict(wanted))


def read_arrays(folder: Path, item: str) -> dict[str, np.ndarray]:
    """`params` or `optimizer` of a checkpoint folder <tag>/<step>, on the host, whatever mesh they were saved from."""
    with _orbax():
        stored = ocp.checkpointables_metadata(folder).metadata[item]
    return restore(folder, {item: {name: np.empty(array.shape, array.dtype) for name, array in stored.items()}})[item]


def versions() -> dict[str, str]:
    """Of what a number may depend on."""
    return {name: version(name) for name in ("nanochat_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}
