"""Checkpoints: asynchronous Orbax saves, exact restore, and finding a model by its tag.

A checkpoint is a folder <tag>/<step> that holds everything the next step depends on: `params` and `optimizer` as flat
dicts of arrays by path, `meta` as JSON (step, data cursor, resolved settings, model config, versions), and the seal
(sealed.py) without which it does not count. Folders may lie in a bucket (storage.py).
"""

import dataclasses
import hashlib
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
from flax import nnx
from orbax.checkpoint import v1 as ocp

from nanochat_jax.checkpoints import integrity
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.sharding import by_path, path_name
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import base_dir, kept_dir, print0, process_index
from nanochat_jax.interop.nanochat_optimizer import read_optimizer, recorded_groups
from nanochat_jax.model.gpt import GPT, GPTConfig, abstract_gpt
from nanochat_jax.nanochat_import import _meta_file, _read_meta, find_steps, find_tag, read_config, read_model
from nanochat_jax.optim.groups import GROUP_OF, AdamW, Groups, Muon, state_arrays, with_state_arrays
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.step import TrainState

SOURCES = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file it writes


class Saver:
    """Writes the checkpoints of one run into <folder>/<step> in the background, and keeps the newest `keep`."""

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"--keep-checkpoints must be at least 1, got {keep}")
        self.folder, self.keep = folder, keep
        self._owner = bucket.Ownership(folder) if bucket.in_bucket(folder) and process_index() == 0 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: TrainState, meta: dict) -> None:
        """Start saving; returns when the arrays have been copied, so that the next step may overwrite them.

        Waits for the save before it, and raises here what went wrong there.
        """
        self.wait()
        target = self.folder / str(step)
        if self._owner:
            self._owner.check()
        if process_index() == 0 and target.exists():
            integrity.discard(target)  # a damaged or unsealed leftover: an intact one would have been resumed from
        processes.exchange("a checkpoint", step)  # the others must not find it there
        items = {"params": flat(state.params), "optimizer": loop_arrays(state), "meta": meta}
        with _orbax():
            response = ocp.save_checkpointables_async(target, items)
        self._thread = threading.Thread(target=self._finish, args=(response, target), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is on disk, sealed; OSError tells what went wrong in the background."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise OSError(f"the checkpoint could not be written to {self.folder}: {error}") from error

    def newest(self) -> str:
        """For an error's end: where to go on from."""
        step = integrity.newest_intact(self.folder)
        return (
            f"the last good checkpoint is {self.folder / str(step)}" if step is not None else "there is no checkpoint"
        )

    def _finish(self, response, target: Path) -> None:
        try:
            response.result()
            if process_index() == 0:
                if self._owner:
                    self._owner.check()
                integrity.seal(target)
                steps = [step for step in integrity.steps(self.folder) if step <= int(target.name)]
                for step in steps[: -self.keep]:  # a later one is damaged: the run went on from before it
                    integrity.discard(self.folder / str(step))
        except BaseException as e:
            self._error = e


def write(target: Path, params: Mapping[str, Any], optimizer: Mapping[str, Any] | None, meta: dict) -> None:
    """One sealed checkpoint folder <tag>/<step>, at once; what killed calls left of it is replaced."""
    if target.exists():
        integrity.discard(target)
    for leftover in target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)
    arrays = {"params": params} | ({"optimizer": optimizer} if optimizer else {})
    with _orbax():
        ocp.save_checkpointables(target, jax.tree.map(jnp.asarray, arrays) | {"meta": meta})
    integrity.seal(target)


def flat(tree: Any) -> dict[str, Any]:
    """{"blocks/0/attn/c_q": leaf, ...}"""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def loop_arrays(state: TrainState) -> dict[str, Any]:
    """What the checkpoint's `optimizer` holds: the optimizer's arrays and the count of skipped updates."""
    return state_arrays(state.opt_state) | {"bad_steps": state.bad_steps}


def _orbax() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")  # else a JSON dict goes to the array handler
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def read_meta(folder: Path) -> dict:
    """The `meta` of a checkpoint folder <tag>/<step>."""
    with _orbax():
        return ocp.load_checkpointables(folder, {"meta": None})["meta"]


def converted_from(folder: Path) -> str | None:
    """sha256 of the file that a checkpoint was converted from, sealed or not; None where it was not, or is damaged."""
    try:
        return read_meta(folder).get("converted_from")
    except Exception:  # whatever Orbax makes of a damaged folder
        return None


def read_arrays(folder: Path, item: str) -> dict[str, np.ndarray]:
    """`params` or `optimizer` of a checkpoint folder <tag>/<step>, on the host, whatever mesh they were saved from."""
    with _orbax():
        stored = ocp.checkpointables_metadata(folder).metadata[item]
        wanted = {name: np.empty(array.shape, array.dtype) for name, array in stored.items()}
        return ocp.load_checkpointables(folder, {item: wanted})[item]


def restore_state(folder: Path, like: TrainState) -> TrainState:
    """A TrainState from the checkpoint folder <tag>/<step>, on the shardings of the abstract state `like`."""
    wanted = {"params": flat(like.params), "optimizer": loop_arrays(like)}
    with _orbax():
        loaded = ocp.load_checkpointables(folder, wanted)
    params = jax.tree.map_with_path(lambda path, _: loaded["params"][path_name(path)], like.params)
    opt_state = with_state_arrays(like.opt_state, loaded["optimizer"])
    step = jax.device_put(jnp.int32(int(folder.name)), like.step.sharding)
    return TrainState(step, params, opt_state, loaded["optimizer"]["bad_steps"])


@dataclasses.dataclass(frozen=True)
class Found:
    """A model on disk: <folder>/<step> in our format, or nanochat's files of that step in <folder>."""

    folder: Path
    step: int
    ours: bool

    @property
    def tag(self) -> str:
        return self.folder.name

    def __str__(self) -> str:
        return str(self.folder / (str(self.step) if self.ours else f"model_{self.step:06d}.pt"))


def identity(found: Found) -> str:
    """The model's tag and step, with a hash of what tells it from another one there."""
    folder = found.folder / str(found.step)
    files = [folder / integrity.SEAL] if found.ours else [_meta_file(found.folder, found.step)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    size = 0 if found.ours else (found.folder / f"model_{found.step:06d}.pt").stat().st_size
    return f"{found.tag}, step {found.step}, {digest[:12]}{f', {size} bytes' if size else ''}"


def find_model(source: str, model_tag: str | None = None, step: int | None = None, base: Path | None = None) -> Found:
    """Where the model is: the tag d<number> with the largest number, and its last step, unless they are given.

    FileNotFoundError says where was looked and what to do. A damaged checkpoint of ours is named and passed over.
    """
    if source not in SOURCES:
        raise ValueError(f"the source of a model must be one of {', '.join(SOURCES)}, got {source!r}")
    root = (base or kept_dir()) / SOURCES[source]
    if not root.is_dir():
        raise FileNotFoundError(
            f"no {source} model: {root} does not exist; train one there, or set NANOCHAT_BASE_DIR to the folder that "
            f"holds {SOURCES[source]}/"
        )
    folder = root / (model_tag or find_tag(root))
    if not folder.is_dir():
        tags = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise FileNotFoundError(f"--model-tag={model_tag}: {folder} does not exist; tags in {root}: {tags}")
    ours, theirs = integrity.steps(folder), _nanochat_steps(folder)
    if step is not None:
        if step not in (*ours, *theirs):
            raise FileNotFoundError(f"--model-step={step} is not in {folder}; its steps: {sorted({*ours, *theirs})}")
        ours, theirs = [s for s in ours if s == step], [s for s in theirs if s == step]
    while ours and not (theirs and theirs[-1] > ours[-1]):
        if integrity.is_intact(folder / str(ours[-1])):
            return Found(folder, ours[-1], True)
        print0(f"WARNING: checkpoint {folder / str(ours.pop())} is damaged and is passed over")
    if theirs:
        return Found(bucket.fetch(folder, f"*_{theirs[-1]:06d}*"), theirs[-1], False)
    if any(folder.glob("model_*.pt")):
        find_steps(folder)  # raises the sentence that says what is missing
    raise FileNotFoundError(
        f"no intact checkpoint in {folder}" + ("" if step is None else f" at --model-step={step}") + ": pass another "
        "--model-tag or --model-step"
    )


def _nanochat_steps(folder: Path) -> list[int]:
    try:
        return find_steps(folder)
    except FileNotFoundError:
        return []


def peek_meta(found: Found) -> dict:
    """The model's meta alone, without reading a tensor; its sizes are there."""
    if found.ours:
        return read_meta(found.folder / str(found.step))
    meta = _read_meta(_meta_file(found.folder, found.step))
    for size in ("n_layer", "sequence_len", "vocab_size"):
        value = meta["model_config"].get(size)
        if type(value) is not int or value < 1:
            message = f"model_config must have an integer {size} of at least 1, got {value!r:.60}"
            raise ValueError(f"{_meta_file(found.folder, found.step)}: {message}")
    return meta


def load_config(found: Found) -> GPTConfig:
    """The network of a model in either format; no parameter is read."""
    if not found.ours:
        return read_config(found.folder, found.step)
    return GPTConfig(**read_meta(found.folder / str(found.step))["model_config"])


def load_params(found: Found, logit_cap: float = 15.0) -> tuple[GPTConfig, dict, dict]:
    """(config, parameters as a nested dict of float32, meta) of a model in either format; nanochat's are imported.

    logit_cap: of nanochat's checkpoints from 2026-03-02 to 03-09, which had 20 and do not say so."""
    if not found.ours:
        return read_model(found.folder, found.step, logit_cap)
    folder = found.folder / str(found.step)
    meta = read_meta(folder)
    config = GPTConfig(**meta["model_config"])
    arrays = read_arrays(folder, "params")
    return config, jax.tree.map_with_path(lambda path, _: arrays[path_name(path)], abstract_gpt(config)[1]), meta


def load_optimizer(found: Found, config: GPTConfig, groups: Groups) -> tuple[Groups, Mapping[str, Any]] | None:
    """Warm start: (groups with the file's betas, eps and decay but the given rates, `optim.state_arrays`); None where
    the model came without optimizer state."""
    if found.ours:
        folder = found.folder / str(found.step)
        if not (folder / "optimizer").is_dir():
            return None
        return replace_groups(groups, read_meta(folder)["optimizer_groups"]), read_arrays(folder, "optimizer")
    state = read_optimizer(found.folder, found.step, config)
    if state is None:
        return None
    return replace_groups(groups, recorded_groups(state["groups"])), imported_arrays(state)


def imported_arrays(state: dict) -> dict[str, Any]:
    """nanochat's optimizer state, as `read_optimizer` gives it, in the form of `optim.state_arrays`."""
    arrays = {}
    for kind in ("exp_avg", "exp_avg_sq", "momentum", "second_momentum"):
        for path, array in state[kind].items():
            arrays[f"{kind}/{path}"] = array
    for path, array in state["momentum"].items():  # era A's Muon had no second moment: it starts from zero
        r, c = array.shape
        arrays.setdefault(f"second_momentum/{path}", jnp.zeros((r, 1) if r >= c else (1, c)))
    counts = {path: (group, state["count"][path]) for path, group in flat(by_path(state["count"], GROUP_OF)).items()}
    for group, count in counts.values():
        if any(other != count for name, other in counts.values() if name == group):
            raise ValueError(f"parameters of one learning-rate group must have taken equally many steps: {counts}")
        arrays[f"count/{group}"] = jnp.int32(count)
    return arrays


def replace_groups(groups: Groups, recorded: Mapping[str, Mapping]) -> Groups:
    """Each group with the recorded values, the learning rate left as it is."""
    return {
        name: dataclasses.replace(group, **{k: v for k, v in recorded.get(name, {}).items() if k != "lr"})
        for name, group in groups.items()
    }


def groups_from(recorded: Mapping[str, Mapping]) -> Groups:
    """Groups from the `optimizer_groups` of a checkpoint's meta, rates included."""
    return {name: (AdamW if "b1" in fields else Muon)(**fields) for name, fields in recorded.items()}


def versions() -> dict[str, str]:
    """Of what a number may depend on."""
    return {name: version(name) for name in ("nanochat_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}


def load_model(source: str, model_tag: str | None = None, step: int | None = None, *, dtype=None):
    """-> (model, tokenizer, meta): model(ids int32 [B,T]) gives float32 logits [B,T,V].

    source: "base", "sft" or "rl". Finds the model as nanochat does and imports nanochat's own files where needed.
    dtype: compute type; default float32 on CPU, bfloat16 elsewhere.
    """
    found = find_model(source, model_tag, step)
    config, params, meta = load_params(found)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    graphdef, _ = abstract_gpt(config, dtype)
    model: GPT = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
    return model, Tokenizer.load(base_dir() / "tokenizer"), meta
