"""Finding a model by its stage and tag, and reading it: our checkpoints, or nanochat's own files where they are."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.checkpoints import integrity
from nanochat_jax.checkpoints.layout import STAGES, TRANSFORMERS, TREE, by_depth
from nanochat_jax.checkpoints.locate import Located, locate
from nanochat_jax.checkpoints.store import SOURCES, best_step, read_arrays, read_meta
from nanochat_jax.cli.device import compute_dtype
from nanochat_jax.cli.settings import BEST
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import path_name
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import base_dir, kept_dir
from nanochat_jax.files.safetensors_read import shard_files
from nanochat_jax.inference.chat_model import ChatModel
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.tools import CALCULATOR_ALONE, Toolbox
from nanochat_jax.interop import transformers_model
from nanochat_jax.interop.nanochat_model import (
    find_steps,
    meta_file,
    model_file,
    read_config,
    read_meta_file,
    read_model,
)
from nanochat_jax.interop.nanochat_optimizer import read_optimizer
from nanochat_jax.interop.optimizer_state import recorded_groups
from nanochat_jax.interop.transformers_model import CONFIG
from nanochat_jax.model.gpt import GPT, GPTConfig, abstract_gpt
from nanochat_jax.optim.groups import Groups, update_all_but_rates
from nanochat_jax.tokenizer import Tokenizer

Step = int | str | None  # of a model; "best", see BEST_BY; None: the last
BEST_BY = "pass@1"  # the measured number that the best checkpoint has the highest of
BLOCK = 1 << 18  # numbers that are checked at a time, 1 MB of float32


@dataclasses.dataclass(frozen=True)
class Found:
    """A model on disk: <folder>/<step> in our format, or the files of nanochat (of that step) or transformers in it."""

    folder: Path
    step: int
    ours: bool
    among: int = 1  # models of the stage of which it is the newest; 1 where it was named
    base: Located | None = None  # what --base names; None: the base directory

    @property
    def transformers(self) -> bool:
        """Whether it is in the form of transformers."""
        return self.base is not None and self.base.layout == TRANSFORMERS

    @property
    def tag(self) -> str:
        """The name of the model's folder, or of the repository or folder that holds this one model."""
        return self.folder.name if self.base is None or self.base.layout == TREE else self.base.tag

    @property
    def source(self) -> str:
        """The stage that made it."""
        in_tree = self.base is None or self.base.layout == TREE
        return STAGES[self.folder.parent.name] if in_tree else self.base.source

    @property
    def tokenizer(self) -> Any:
        """The folder of its tokenizer."""
        return base_dir() / "tokenizer" if self.base is None else self.base.tokenizer

    @property
    def files(self) -> tuple[Path, list[Path]]:
        """(what describes it, the files of its parameters), of a model that is not in our format."""
        if not self.transformers:
            return meta_file(self.folder, self.step), [model_file(self.folder, self.step)]
        return self.folder / CONFIG, shard_files(self.folder)

    def __str__(self) -> str:
        path = self.folder / str(self.step) if self.ours else self.files[1][0]
        return f"{path}{f', the newest of {self.among} (--model-tag names another)' if self.among > 1 else ''}"


def identity(found: Found) -> str:
    """The model's tag and step, with a hash of what tells it from another one there."""
    described = found.folder / str(found.step) / integrity.MANIFEST if found.ours else found.files[0]
    digest = hashlib.sha256(described.read_bytes()).hexdigest()
    size = 0 if found.ours else sum(file.stat().st_size for file in found.files[1])
    return f"{found.tag}, step {found.step}, {digest[:12]}{f', {size} bytes' if size else ''}"


def find_model(
    source: str,
    model_tag: str | None = None,
    step: Step = None,
    base: Path | str | None = None,
    *,
    optimizer: bool = False,
) -> Found:
    """Where the model is: unless they are given, the tag whose last checkpoint is newest, and its last step;
    "best": the one whose held-out pass@1 was highest in RL.

    base: another base directory than NANOCHAT_BASE_DIR's, or what else `locate` takes: a folder with one model, or
    hub:OWNER/NAME[@REVISION][/PREFIX], which is downloaded.
    optimizer: whether its optimizer state is going to be read too; what is not read is not compared with its hashes.
    FileNotFoundError says where was looked and what to do. A damaged checkpoint of ours is named and passed over, and
    so is a folder without an intact one where no tag is given. nanochat takes the largest d<number>.
    """
    if source not in SOURCES:
        raise ValueError(f"the source of a model must be one of {', '.join(SOURCES)}, got {source!r}")
    if base is None:
        return _find_in(kept_dir(), source, model_tag, step, optimizer)
    return found_at(locate(base, source, model_tag, step, optimizer=optimizer), optimizer)


def found_at(located: Located, optimizer: bool = False) -> Found:
    """The model that `locate` has found; optimizer: as of `find_model`."""
    if located.layout != TREE:
        return Found(located.folder, located.step, False, base=located)
    found = _find_in(located.folder, located.source, located.tag, located.step, optimizer)
    return dataclasses.replace(found, base=located)


def _find_in(base: Any, source: str, model_tag: str | None, step: Step, optimizer: bool) -> Found:
    """The model in a base directory."""
    root = base / SOURCES[source]
    if not root.is_dir():
        raise FileNotFoundError(
            f"no {source} model: {root} does not exist; train one there, or set NANOCHAT_BASE_DIR to the folder that "
            f"holds {SOURCES[source]}/"
        )
    if model_tag is not None:
        return _find_step(root / model_tag, step, optimizer)
    tags = tags_by_time(root)
    for tag in tags:
        try:
            return dataclasses.replace(_find_step(root / tag, step, optimizer), among=len(tags))
        except FileNotFoundError as error:
            if step is not None or len(tags) == 1:
                raise
            print0(f"WARNING: {error}; looking at the one saved before it")
    raise FileNotFoundError(
        f"no {source} model in {root}: train one, or set NANOCHAT_BASE_DIR to the folder that holds nanochat's"
    )


def tags_by_time(root: Path) -> list[str]:
    """Tags of the folders in `root` that hold checkpoints, the one with the newest last checkpoint first; of those that
    are equally old, as after a copy, the deepest d<number> first."""
    folders = [folder for folder in root.iterdir() if folder.is_dir()] if root.is_dir() else []
    saved = {folder.name: last_saved(folder) for folder in folders}

    return sorted(
        (tag for tag, when in saved.items() if when is not None), key=lambda tag: (-saved[tag], by_depth(tag))
    )


def last_saved(folder: Path) -> int | None:
    """When the last checkpoint in a folder <tag> was written, in nanoseconds since 1970; None where there is none."""
    ours, theirs = integrity.steps(folder), sorted(folder.glob("model_*.pt"))
    files = [folder / str(ours[-1]) / integrity.MANIFEST] if ours else []
    files += theirs[-1:]
    if bucket.in_bucket(folder):
        objects = bucket.list_objects(folder) if files else {}
        return max((objects[file.relative_to(folder).as_posix()].changed_ns for file in files), default=None)
    return max((file.stat().st_mtime_ns for file in files), default=None)


def _find_step(folder: Path, step: Step, optimizer: bool) -> Found:
    """The model of this step, or the last intact one, in the folder <tag>; see `find_model`."""
    if not folder.is_dir():
        tags = ", ".join(sorted(p.name for p in folder.parent.iterdir() if p.is_dir())) or "none"
        raise FileNotFoundError(f"--model-tag={folder.name}: {folder} does not exist; tags in {folder.parent}: {tags}")
    if step == BEST:
        step = best_step(folder, BEST_BY)
        if step is None:
            raise FileNotFoundError(
                f"--model-step=best: {BEST_BY} was measured of no checkpoint in {folder}: pass a number instead, or "
                "nothing for the last one"
            )
    ours, theirs = integrity.steps(folder), nanochat_steps(folder)
    if step is not None:
        if step not in (*ours, *theirs):
            raise FileNotFoundError(f"--model-step={step} is not in {folder}; its steps: {sorted({*ours, *theirs})}")
        ours, theirs = [s for s in ours if s == step], [s for s in theirs if s == step]
    while ours and not (theirs and theirs[-1] > ours[-1]):
        if integrity.is_intact(folder / str(ours[-1]), optimizer):
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


def nanochat_steps(folder: Path) -> list[int]:
    """Steps of nanochat's complete checkpoints in a folder <tag>, ascending; [] where there is none."""
    try:
        return find_steps(folder)
    except FileNotFoundError:
        return []


def peek_meta(found: Found) -> dict:
    """The model's meta alone, without reading a tensor; its sizes are there."""
    if found.ours:
        return read_meta(found.folder / str(found.step))
    if found.transformers:
        return _transformers_meta(load_config(found))
    meta = read_meta_file(meta_file(found.folder, found.step))
    for size in ("n_layer", "sequence_len", "vocab_size"):
        value = meta["model_config"].get(size)
        if type(value) is not int or value < 1:
            message = f"model_config must have an integer {size} of at least 1, got {value!r:.60}"
            raise ValueError(f"{meta_file(found.folder, found.step)}: {message}")
    return meta


def load_config(found: Found) -> GPTConfig:
    """The network of a model in either format; no parameter is read."""
    if found.transformers:
        return transformers_model.read_config(found.folder, _tokens(found))
    if not found.ours:
        return read_config(found.folder, found.step)
    return GPTConfig(**read_meta(found.folder / str(found.step))["model_config"])


def load_params(found: Found, logit_cap: float = 15.0) -> tuple[GPTConfig, dict, dict]:
    """(config, parameters as a nested dict of float32, meta) of a model in either format; nanochat's are imported.

    logit_cap: of nanochat's checkpoints from 2026-03-02 to 03-09, which had 20 and do not say so. ValueError: a number
    of a parameter is infinite or NaN."""
    if found.transformers:
        config, params = transformers_model.read_model(found.folder, _tokens(found))
        return config, params, _transformers_meta(config)
    if not found.ours:
        return read_model(found.folder, found.step, logit_cap)
    folder = found.folder / str(found.step)
    meta = read_meta(folder)
    config = GPTConfig(**meta["model_config"])
    arrays = read_finite_arrays(folder, "params")
    return config, jax.tree.map_with_path(lambda path, _: arrays[path_name(path)], abstract_gpt(config)[1]), meta


def _transformers_meta(config: GPTConfig) -> dict:
    """What the form of transformers tells of a model, as a meta file would; runs from it have rows of its length."""
    return {"model_config": dataclasses.asdict(config), "max_seq_len": config.sequence_len}


def _tokens(found: Found) -> int:
    """How many its tokenizer has: the class of transformers counts rows that pad the vocabulary as tokens."""
    return Tokenizer.load(found.tokenizer).vocab_size


def read_finite_arrays(folder: Path, item: str) -> dict[str, np.ndarray]:
    """`read_arrays` of a checkpoint folder <tag>/<step>. ValueError: a number is infinite or NaN."""
    arrays = read_arrays(folder, item)
    for name, array in arrays.items():
        flat = array.reshape(-1)
        blocks = (flat[i : i + BLOCK] for i in range(0, flat.size, BLOCK))  # a mask of the whole would take a quarter
        if bad := sum(block.size - np.count_nonzero(np.isfinite(block)) for block in blocks):
            raise ValueError(
                f"{folder}: {name} in {item} must be finite, but {bad:,} of its {flat.size:,} numbers are not: pass "
                "another --model-tag or --model-step"
            )
    return arrays


def load_optimizer(found: Found, config: GPTConfig, groups: Groups) -> tuple[Groups, Mapping[str, Any]] | None:
    """Warm start: (groups with the file's betas, eps and decay but the given rates, `optim.state_arrays`); None where
    the model came without optimizer state."""
    if found.ours:
        folder = found.folder / str(found.step)
        if not (folder / "optimizer").is_dir():
            return None
        arrays = read_finite_arrays(folder, "optimizer")
        return update_all_but_rates(groups, read_meta(folder)["optimizer_groups"]), arrays
    state = None if found.transformers else read_optimizer(found.folder, found.step, config)
    if state is None:
        return None
    return update_all_but_rates(groups, recorded_groups(state.groups)), state.arrays


def load_model(
    source: str,
    model_tag: str | None = None,
    step: Step = None,
    *,
    base: Path | str | None = None,
    dtype=None,
):
    """-> (model, tokenizer, meta): model(ids int32 [B,T]) gives float32 logits [B,T,V].

    source: "base", "sft" or "rl". Finds the model as nanochat does and imports nanochat's own files where needed.
    base: another base directory, a folder with one model, or hub:OWNER/NAME, as of `find_model`.
    dtype: compute type; default float32 on CPU, bfloat16 elsewhere.
    """
    found = find_model(source, model_tag, step, base)
    config, params, meta = load_params(found)
    graphdef, _ = abstract_gpt(config, compute_dtype("auto") if dtype is None else dtype)
    model: GPT = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
    return model, Tokenizer.load(found.tokenizer), meta


def load_chat_model(
    source: str,
    model_tag: str | None = None,
    step: Step = None,
    *,
    base: Path | str | None = None,
    dtype=None,
) -> ChatModel:
    """A model to talk with, on one device: `load_chat_model("sft").answer("What is 2+2?")`.

    Arguments as of `load_model`. ValueError: the base directory's tokenizer is not the model's."""
    return chat_model_of(find_model(source, model_tag, step, base), dtype)


def chat_model_of(
    found: Found,
    dtype=None,
    *,
    slots: int = 256,
    chunk: int = 16,
    alternatives: int = 0,
    tools: Toolbox = CALCULATOR_ALONE,
) -> ChatModel:
    """The same of a model that `find_model` has found. Its context is the length that it was trained with. slots,
    chunk, alternatives, tools: of the `Engine`."""
    tokenizer = Tokenizer.load(found.tokenizer)
    check_tokenizer(tokenizer, peek_meta(found), found)
    config, params, _ = load_params(found)
    mesh, dtype = make_mesh("data=1"), compute_dtype("auto") if dtype is None else dtype
    engine = Engine(
        config,
        tokenizer,
        mesh,
        dtype=dtype,
        slots=slots,
        chunk=chunk,
        context=config.sequence_len,
        alternatives=alternatives,
        tools=tools,
    )
    return ChatModel(engine, engine.cast_params(params))


def check_tokenizer(tokenizer: Tokenizer, meta: dict, found: Found | None = None) -> None:
    """ValueError where the model was trained with another tokenizer, as far as its meta tells. found: where the model
    and the tokenizer are; default: in the base directory."""
    size = meta["model_config"]["vocab_size"]
    if tokenizer.vocab_size != size or meta.get("tokenizer", tokenizer.digest()) != tokenizer.digest():
        where = found.base.name if found and found.base else base_dir()
        raise ValueError(
            f"the tokenizer in {where} ({tokenizer.vocab_size} tokens) is not the one that the model was trained with "
            f"({size} tokens): set NANOCHAT_BASE_DIR to the folder that holds both"
        )
