"""Where in a folder or a repository a model lies, from the names of its files alone, and how a repository is named.

A model and its tokenizer come in three layouts:
    tree          a base directory: <stage>_checkpoints/<tag>/ with nanochat's files or ours, and tokenizer/
    flat          nanochat's files of one model, model_SSSSSS.pt and meta_SSSSSS.json, beside its tokenizer
    transformers  config.json, model.safetensors (or its shards and their index) and tokenizer.json
"""

import re
from collections.abc import Iterable
from pathlib import PurePath, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from nanochat_jax.checkpoints.integrity import MANIFEST
from nanochat_jax.checkpoints.store import SOURCES
from nanochat_jax.cli.settings import BEST
from nanochat_jax.files.safetensors_read import FILE, INDEX
from nanochat_jax.interop.transformers_model import CONFIG

HUB = "hub:"
GRAMMAR = "hub:OWNER/NAME[@REVISION][/PREFIX]"
TREE, FLAT, TRANSFORMERS = "a base directory", "nanochat's files of one model", "the form of transformers"
STAGES = {folder: stage for stage, folder in SOURCES.items()}
TOKENIZER = ("tokenizer.json", "tokenizer.pkl")
CHECKPOINT = re.compile(r"(model|meta|optim)_([0-9]{6,})(_rank[0-9]+)?\.(pt|json)")
SHARD = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")


class Address(NamedTuple):
    """A folder of a repository of the hub; the prefix is "" for the whole."""

    repo: str
    revision: str
    prefix: str


def read_address(text: str) -> Address:
    """What hub:OWNER/NAME[@REVISION][/PREFIX] names. The revision ends at the next slash, but one that begins with
    refs/ has three parts, as refs/pr/1; any other slash in it is written %2F. ValueError: it is not of this form."""
    name = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
    found = re.fullmatch(rf"hub:({name}/{name})(?:@(refs/[^/@]+/[^/@]+|[^/@]+))?(?:/(.*))?", text.rstrip("/"), re.ASCII)
    prefix = PurePosixPath(found[3] or "") if found else PurePosixPath()
    if not found or ".." in prefix.parts or prefix.is_absolute():
        raise ValueError(f"must be {GRAMMAR}, such as hub:karpathy/nanochat-d32 or hub:me/models@refs/pr/1/runs/d20")
    return Address(found[1], unquote(found[2] or "main"), "" if prefix == PurePosixPath() else prefix.as_posix())


class Place(NamedTuple):
    """A folder with models, among the paths of a listing; "" is the folder that was listed."""

    folder: str
    layout: str


class Choice(NamedTuple):
    """One model of a place, and the files that are needed to read it and its tokenizer."""

    step: int
    tag: str | None  # None where the place holds one model only
    ours: bool  # it is a checkpoint of ours, else a file of nanochat's or of transformers
    files: list[str]  # the smallest first
    tokenizer: str  # folder
    among: str  # what it was chosen from, for the user; "" where there was no choice


def enclosing(path: PurePath) -> tuple[PurePath, str | None, str | None]:
    """(base directory, stage, tag) of a path that names a stage's folder in a tree, or a model's; else (path, None,
    None)."""
    parts = path.parts
    if parts and parts[-1] in STAGES:
        return path.parent, STAGES[parts[-1]], None
    if len(parts) > 1 and parts[-2] in STAGES:
        return path.parent.parent, STAGES[parts[-2]], parts[-1]
    return path, None, None


def find_place(paths: Iterable[str], prefix: str = "") -> Place:
    """The folder `prefix` if it holds models, else the only one below that does. ValueError: none, or more than one."""
    paths = [path for path in paths if _is_below(path, prefix)]
    places = _places(paths)
    if prefix in places or len(places) == 1:
        folder = prefix if prefix in places else next(iter(places))
        return Place(folder, places[folder])
    if places:
        shown = ", ".join(sorted(places)[:6]) + (", ..." if len(places) > 6 else "")
        raise ValueError(f"has models in several folders, so name one, as {GRAMMAR}: {shown}")
    shown = ", ".join(sorted({path.split("/")[0] for path in paths})[:8]) or "nothing"
    raise ValueError(
        f"has no model{f' in {prefix}' if prefix else ''}: neither <stage>_checkpoints/<tag>/, nor model_*.pt with "
        f"meta_*.json, nor {CONFIG} with {FILE}; it has {shown}"
    )


def stages_in(paths: Iterable[str], place: Place) -> list[str]:
    """The stages that have a folder in a tree."""
    names = {path[len(place.folder) :].lstrip("/").split("/")[0] for path in paths if _is_below(path, place.folder)}
    return [stage for stage, folder in SOURCES.items() if folder in names]


def choose(
    paths: Iterable[str],
    place: Place,
    source: str | None,
    tag: str | None = None,
    step: int | str | None = None,
    *,
    optimizer: bool = False,
) -> Choice:
    """The model of a place: in a tree of the stage `source` the deepest tag; its last step; unless they are given.

    optimizer: whether its state is going to be read too. ValueError: what is asked for is not there."""
    paths = sorted(paths)
    if step == BEST:
        raise ValueError("does not tell which --model-step is best: pass a number, or nothing for the last one")
    if place.layout == TRANSFORMERS:
        if step:
            raise ValueError(f"is in {TRANSFORMERS}, which knows no steps: leave --model-step out")
        beside = {path.rpartition("/")[2]: path for path in paths if path.rpartition("/")[0] == place.folder}
        weights = [FILE] if FILE in beside else [INDEX, *(name for name in beside if SHARD.fullmatch(name))]
        files = [beside[name] for name in (CONFIG, *weights)]
        return _with_tokenizer(paths, place, Choice(0, None, False, files, "", ""))
    folder, among = place.folder, ""
    if place.layout == TREE:
        root = _join(folder, SOURCES[source])
        tags = {path[len(root) + 1 :].split("/")[0] for path in paths if path.startswith(f"{root}/") and _counts(path)}
        if not tags:
            stages = ", ".join(stages_in(paths, place))
            raise ValueError(f"has no {source} model, its stages are {stages}: name one with --source")
        if tag is None and len(tags) > 1:
            among = f", of the tags {', '.join(sorted(tags, key=by_depth))} (--model-tag names another)"
        tag = tag or min(tags, key=by_depth)
        if tag not in tags:
            raise ValueError(f"has no {source} model with --model-tag={tag}, its tags are {', '.join(sorted(tags))}")
        folder = f"{root}/{tag}"
    inside = [path[len(folder) :].lstrip("/") for path in paths if _is_below(path, folder)]
    named = [match for name in inside if (match := CHECKPOINT.fullmatch(name))]
    metas = {int(match[2]) for match in named if match[1] == "meta"}
    theirs = {int(match[2]) for match in named if match[1] == "model"} & metas
    ours = {int(name.split("/")[0]) for name in inside if re.fullmatch(rf"[0-9]{{1,18}}/{MANIFEST}", name)}
    if not ours | theirs or (step is not None and step not in ours | theirs):
        inside = f" in {folder}" if folder else ""
        if not ours | theirs:
            raise ValueError(f"has no complete checkpoint{inside}: a model_*.pt needs its meta_*.json")
        raise ValueError(
            f"has no --model-step={step}{inside}, its steps are {', '.join(map(str, sorted(ours | theirs)))}"
        )
    step = max(ours | theirs) if step is None else step
    if step in ours:
        needed = [name for name in inside if name.startswith(f"{step}/")]
        needed = [name for name in needed if optimizer or not name.startswith(f"{step}/optimizer/")]
    else:
        kinds = ("meta", "model", "optim") if optimizer else ("meta", "model")
        needed = [match[0] for kind in kinds for match in named if match[1] == kind and int(match[2]) == step]
    files = [_join(folder, name) for name in needed]
    return _with_tokenizer(paths, place, Choice(step, tag, step in ours, files, "", among))


def _with_tokenizer(paths: list[str], place: Place, choice: Choice) -> Choice:
    """The choice with the tokenizer that is nearest: in the place, or in a folder above it."""
    above = [place.folder, *(path.as_posix() for path in PurePosixPath(place.folder).parents)] if place.folder else [""]
    for folder in above:
        folder = "" if folder == "." else folder
        for there in (_join(folder, "tokenizer"), folder):
            files = [_join(there, name) for name in TOKENIZER if _join(there, name) in paths]
            if files:
                return choice._replace(files=[*files, *choice.files], tokenizer=there)
    raise ValueError(f"has no {' or '.join(TOKENIZER)} beside the model in {place.folder or 'it'}, or in tokenizer/")


def by_depth(tag: str) -> tuple:
    """Sorts tags: the deepest d<number> first, "d20" before "d20_long"."""
    depth = re.match(r"d([0-9]+)", tag)
    return -int(depth[1][:9]) if depth else 0, len(tag), tag


def stage_of(meta: dict) -> str | None:
    """The stage that made nanochat's checkpoint with this meta file; None where it does not tell."""
    settings = meta.get("user_config") if isinstance(meta.get("user_config"), dict) else {}
    if meta.keys() == {"model_config"}:  # all that its RL records
        return "rl"
    if "depth" in settings:
        return "base"
    if "mmlu_epochs" in settings or "val_loss" in meta:  # since 2026, and before
        return "sft"
    return "mid" if "init_lr_frac" in settings else None


def _places(paths: list[str]) -> dict[str, str]:
    """Folder -> layout of what is in it."""
    trees, flat, names = set(), set(), {}
    for path in paths:
        parts = path.split("/")
        names.setdefault("/".join(parts[:-1]), set()).add(parts[-1])
        match = CHECKPOINT.fullmatch(parts[-1])
        ours = parts[-1] == MANIFEST
        at = len(parts) - 3 - ours  # of the stage's folder
        if (ours or (match and match[1] == "model")) and at >= 0 and parts[at] in STAGES:
            trees.add("/".join(parts[:at]))
        elif match and match[1] == "model":
            flat.add("/".join(parts[:-1]))
    forms = {folder for folder, beside in names.items() if CONFIG in beside and beside & {FILE, INDEX}}
    return dict.fromkeys(forms, TRANSFORMERS) | dict.fromkeys(flat, FLAT) | dict.fromkeys(trees, TREE)


def _counts(path: str) -> bool:
    """Whether a file makes the folder that it is in, or the one above, a model's."""
    name = path.rpartition("/")[2]
    return name == MANIFEST or bool(CHECKPOINT.fullmatch(name))


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
