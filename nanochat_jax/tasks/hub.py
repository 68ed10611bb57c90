"""Datasets of the Hugging Face hub as parquet files on this disk: where they are found, and rows out of them.

A folder of datasets has DIR/<owner>--<name>/<subset>/<split>/manifest.json, a list of the parquet files beside it in
order. This is also how nanochat's own cache looks. Such folders are the `data_dir` argument, NANOCHAT_DATA_DIR and
task_data/ of the base directory; each may have its datasets in hub/ instead. A split that is in none of them is
downloaded into task_data/.
"""

import functools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Unpack

import numpy as np

from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.digest import file_digest
from nanochat_jax.files.download import DownloadError, download, fetch_parquet, list_repository, locked, writing
from nanochat_jax.files.parquet import ParquetRows
from nanochat_jax.files.paths import cache_dir, kept_dir, write_atomically
from nanochat_jax.tasks.sources import SOURCES, source_hint
from nanochat_jax.tasks.task import Slice, Task

SHUFFLE_SEED = 42  # nanochat permutes every dataset with this seed before it slices
EXPORT = "refs/convert/parquet"  # the branch of every dataset in which the hub keeps its conversion to parquet
WORD_LIST = "words_alpha.txt"  # is downloaded unasked, as CORE's bundle is; conversations are the user's choice


def split_files(repo: str, subset: str, split: str, data_dir: Path | str | None = None) -> list[Path]:
    """The split's parquet files in order, downloaded where no folder of datasets has it.

    FileNotFoundError: it cannot be had; it says where it was looked for and what helps. ValueError: a damaged manifest.
    """
    looked = []
    for root in dict.fromkeys([*_roots(data_dir), kept_dir() / "task_data", cache_dir() / "task_data"]):
        for parent in (root, root / "hub"):
            folder = bucket.fetch(parent / repo.replace("/", "--") / subset / split)
            if (folder / "manifest.json").exists():
                return _read_manifest(folder)
            looked.append(folder)
    for part in (subset, split):
        if part != os.path.basename(part) or part in ("", ".", ".."):
            raise ValueError(f"the subset or split {part!r:.80} of {repo} must be the name of a folder")
    final = cache_dir() / "task_data" / repo.replace("/", "--") / subset / split
    try:
        with locked(final):
            if not (final / "manifest.json").exists():  # another process may have made it meanwhile
                _download_split(repo, subset, split, final)
    except DownloadError as e:
        raise FileNotFoundError(
            f"dataset {repo} (subset {subset}, split {split}) is not on this machine, looked for manifest.json in "
            f"{', '.join(map(str, looked))}, and the hub does not give it: {e}; or set NANOCHAT_DATA_DIR or --data-dir "
            f"to a folder that holds {repo.replace('/', '--')}/"
        ) from e
    return _read_manifest(final)


def _download_split(repo: str, subset: str, split: str, final: Path) -> None:
    """Fill a folder beside `final`, manifest last, then move it there in one step. The caller holds the lock.

    What a download has left that was stopped is used again where the dataset has not changed since.
    """
    commit, paths = list_repository("dataset", repo, EXPORT)
    parts = (f"{subset}/{split}/", f"{subset}/partial-{split}/")  # partial-: the first 5 GB of a larger dataset
    paths = [path for path in paths if path.startswith(parts) and path.endswith(".parquet")]
    if not paths:
        raise DownloadError(f"dataset {repo} ({EXPORT}) has no {parts[0]}: check the names of subset and split")
    print0(f"downloading {repo} (subset {subset}, split {split}), {len(paths)} files, to {final}")
    building = final.with_name(f".{final.name}.building")
    folder, names = building / commit, [f"{i:05d}.parquet" for i in range(len(paths))]
    with writing(final.parent):
        if not folder.is_dir():
            shutil.rmtree(building, ignore_errors=True)  # of another commit
            folder.mkdir(parents=True)
    fetch_parquet(repo, commit, dict(zip(paths, names)), folder)
    with writing(final.parent):
        write_atomically(folder / "manifest.json", json.dumps(names).encode())
        if final.exists() and any(final.iterdir()):  # of nanochat's download, stopped halfway, or a user's own
            aside = final.with_name(f"{final.name}.{time.time_ns()}")
            os.rename(final, aside)
            print0(f"{final} had no manifest.json: what was in it is now in {aside}")
        os.rename(folder, final)
        building.rmdir()


def find_file(name: str, data_dir: Path | str | None = None) -> Path:
    """NAME or words/NAME in `data_dir`, in NANOCHAT_DATA_DIR, in the folders around these, or in the base directory.

    The word list is downloaded to the base directory where no place has it. FileNotFoundError: it cannot be had.
    """
    folders = *(folder for root in _roots(data_dir) for folder in (root, root.parent)), kept_dir(), cache_dir()
    places = [
        bucket.fetch(place) for folder in dict.fromkeys(folders) for place in (folder / name, folder / "words" / name)
    ]
    if found := next((place for place in places if place.is_file()), None):
        return found
    why = ""
    if name == WORD_LIST:
        try:
            return download(SOURCES[name], cache_dir() / name)
        except DownloadError as e:
            why = f", and cannot be downloaded: {e}"
    raise FileNotFoundError(
        f"{name} is not on this machine, looked for {', '.join(map(str, places))}{why}; put it into one of these, or "
        f"set NANOCHAT_DATA_DIR or --data-dir to a folder that holds it{source_hint(cache_dir() / name)}"
    )


def _roots(data_dir: Path | str | None) -> list[Path]:
    """Where a user says that data lies; the first place that has it wins."""
    return [Path(root).expanduser() for root in (data_dir, os.environ.get("NANOCHAT_DATA_DIR")) if root]


def _read_manifest(folder: Path) -> list[Path]:
    path = folder / "manifest.json"
    try:
        names = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from e
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"{path} must be a list of parquet file names")
    for name in names:
        if name != os.path.basename(name) or name in (".", ".."):
            raise ValueError(f"{path} must name files of its own folder, got {name!r:.80}")
        if not (folder / name).is_file():
            raise ValueError(f"{path} lists {name!r:.80}, which is not there")
    return [folder / name for name in names]


class HubOptions(Slice, total=False):
    """What every task of the hub takes besides its split, for signatures: **options: Unpack[HubOptions]."""

    subset: str
    data_dir: Path | str | None


class HubTask(Task):
    """A task on one split of a hub dataset, in nanochat's order: default_rng(42).permutation(rows), then the slice.

    A subclass sets repo, subset, columns and splits, and defines `conversation(row) -> dict`, where ValueError says
    what is wrong with the row. Rows stay in Arrow until they are asked for; making a task reads the footers only.
    """

    repo: str
    subset: str
    columns: tuple[str, ...]
    splits: tuple[str, ...]

    def __init__(
        self, split: str = "train", subset: str = "", data_dir: Path | str | None = None, **slice_: Unpack[Slice]
    ):
        super().__init__(**slice_)
        if split not in self.splits:
            raise ValueError(f"{self.name} has the splits {', '.join(self.splits)}, got {split!r:.40}")
        self.subset, self.split = subset or self.subset, self.split_on_hub(split)
        self.files = split_files(self.repo, self.subset, self.split, data_dir)
        self._rows = ParquetRows(self.files, self.columns)

    def split_on_hub(self, split: str) -> str:
        return split

    def require_columns_of_text(self, row: dict) -> None:
        for column in self.columns:
            if not isinstance(row[column], str):
                raise ValueError(f"{column} must be text, got {row[column]!r:.40}")

    def num_examples(self) -> int:
        return len(self._rows)

    def get_example(self, index: int) -> dict:
        at = int(self._order[index])
        try:
            return self.conversation(self._rows[at])
        except ValueError as e:
            raise ValueError(f"row {at} of {self.repo} ({self.subset}/{self.split}): {e}") from e

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng(SHUFFLE_SEED).permutation(len(self._rows))

    def fingerprint(self) -> str:
        return self.fingerprint_of([file_digest(file) for file in self.files])
