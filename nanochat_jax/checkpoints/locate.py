"""The model that --base names: in a folder on this disk or in a repository of the hub, in any of the layouts.

Of a repository only what is needed is downloaded, into the hub library's own cache (HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE are the library's).
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nanochat_jax.checkpoints import layout
from nanochat_jax.checkpoints.layout import FLAT, HUB, TREE, Address, Choice, Place, read_address
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.download import DownloadError, cached_model, fetch_model, is_offline, list_repository
from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.interop.nanochat_model import meta_file, read_meta_file


class Located(NamedTuple):
    """A model, or the base directory that it is in."""

    folder: Any  # a base directory where the layout is a tree, else the model's own folder
    layout: str
    source: str | None  # the model's stage
    tag: str | None  # None: in a tree on a disk, still to be chosen
    step: int | str | None
    tokenizer: Any  # folder
    name: str  # what a checkpoint records: hub:owner/name@commit/prefix, or the folder


def is_on_hub(base: Any) -> bool:
    """Whether --base names a repository."""
    return str(base).startswith(HUB)


def locate(
    base: Any,
    source: str | None,
    tag: str | None = None,
    step: int | str | None = None,
    *,
    optimizer: bool = False,
    flag: str = "--base=",
) -> Located:
    """Where the model is that a user has named; of a repository it is on this disk then. A line says what was found.

    base: a folder or hub:OWNER/NAME[@REVISION][/PREFIX]. source: its stage, which gives way to what the metadata of a
    single model says; None: what the folders or the metadata say, and nothing else. optimizer: whether its state is
    going to be read. ValueError, OSError: it cannot be had, in a sentence that begins with `flag` and what was named.
    """
    with naming(f"{flag}{base}"):
        if is_on_hub(base):
            with processes.process_zero_first("the model"):
                return _on_hub(str(base), source, tag, step, optimizer)
        return _on_disk(base, source, tag, step)


@contextlib.contextmanager
def naming(named: str) -> Iterator[None]:
    """Put what a user has named before the message of what goes wrong inside."""
    try:
        yield
    except Refused:  # it names its file
        raise
    except ValueError as e:
        raise ValueError(f"{named} {' '.join(str(e).split())}") from None
    except DownloadError as e:
        raise DownloadError(f"{named}: {e}") from e


def _on_disk(base: Any, source: str | None, tag: str | None, step: int | str | None) -> Located:
    folder = bucket.as_path(base)
    if bucket.in_bucket(folder):
        return Located(folder, TREE, source, tag, step, folder / "tokenizer", str(folder))
    folder, stage, named = layout.enclosing(folder.expanduser().absolute())
    source, tag = stage or source, _agreed(named, tag)
    in_tree = Located(folder, TREE, source, tag, step, folder / "tokenizer", str(folder))
    if stage or any((folder / name).is_dir() for name in layout.STAGES) or not folder.is_dir():
        return in_tree
    paths = [path.relative_to(folder).as_posix() for pattern in ("*", "tokenizer/*") for path in folder.glob(pattern)]
    place = layout.find_place(paths)
    choice = layout.choose(paths, place, source, step=step)
    found = _single(folder, folder / choice.tokenizer, place, choice, source, tag, folder.name, str(folder))
    print0(f"{folder}: {place.layout}, {found.source} model, step {found.step}")
    return found


@functools.cache  # asked once a process
def _on_hub(text: str, source: str | None, tag: str | None, step: int | str | None, optimizer: bool) -> Located:
    address, place, stage, named, commit, paths = _find_on_hub(text)
    source, tag = stage or source, _agreed(named, tag)
    name = "--".join([address.repo.replace("/", "--"), *PurePosixPath(place.folder).parts])
    choice = layout.choose(paths, place, source, tag, step, optimizer=optimizer)
    root = fetch_model(address.repo, address.revision, commit, choice.files)
    folder, tokenizer = root / place.folder, root / choice.tokenizer
    origin = f"{HUB}{address.repo}@{commit}{f'/{place.folder}' if place.folder else ''}"
    if place.layout == TREE:
        found = Located(folder, TREE, source, choice.tag, choice.step, tokenizer, origin)
    else:
        found = _single(folder, tokenizer, place, choice, source, tag, name, origin)
    where = f"{place.layout}{f' in {place.folder}' if place.folder else ''}"
    print0(f"{text}: {where}, {found.source} model {found.tag}, step {found.step}{choice.among}; commit {commit}")
    return found


@functools.cache
def _find_on_hub(text: str) -> tuple[Address, Place, str | None, str | None, str, list[str]]:
    """(address, place, stage and tag that the prefix names, commit, paths)"""
    address = read_address(text)
    prefix, stage, tag = layout.enclosing(PurePosixPath(address.prefix))
    if is_offline():
        commit, paths = cached_model(address.repo, address.revision)
    else:
        commit, paths = list_repository("model", address.repo, address.revision)
    prefix = prefix.as_posix()
    return address, layout.find_place(paths, "" if prefix == "." else prefix), stage, tag, commit, paths


def stages_at(base: Any) -> list[str]:
    """The stages that a repository of the hub has folders for; none where it holds a single model."""
    with naming(str(base)):
        _, place, stage, _, _, paths = _find_on_hub(str(base))
    return [stage] if stage else layout.stages_in(paths, place)


def _agreed(named: str | None, tag: str | None) -> str | None:
    """The model's tag, from the folder that was named or from --model-tag. ValueError: they differ."""
    if named and tag not in (None, named):
        raise ValueError(f"names the model {named}: leave --model-tag={tag} out")
    return named or tag


def _single(
    folder: Path,
    tokenizer: Path,
    place: Place,
    choice: Choice,
    source: str | None,
    tag: str | None,
    name: str,
    origin: str,
) -> Located:
    """The one model of a folder. ValueError: another one is asked for."""
    if tag not in (None, name):
        raise ValueError(f"holds one model only: leave --model-tag={tag} out")
    stage = None
    if place.layout == FLAT:
        stage = layout.stage_of(read_meta_file(meta_file(folder, choice.step)))
    if stage is None and source is None:
        raise ValueError("does not tell which stage made its model: name it with --source, such as --source base")
    return Located(folder, place.layout, stage or source, name, choice.step, tokenizer, origin)
