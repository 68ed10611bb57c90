"""Datasets of the Hugging Face hub as local parquet files: where they are found, and rows out of them.

A mirror holds DIR/<owner>--<name>/<subset>/<split>/manifest.json, a list of the parquet files beside it in order. This
is also how nanochat's own cache looks. A mirror is looked for in the `data_dir` argument, in NANOCHAT_DATA_DIR and in
task_data/ of the base directory; each may be the folder of the <owner>--<name> folders or one with hub/ in it.
"""

import bisect
import contextlib
import functools
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

from nanochat_jax.common import base_dir, write_atomically
from nanochat_jax.tasks.task import Task, digest_of

SHUFFLE_SEED = 42  # nanochat permutes every dataset with this seed before it slices
RACY_SECONDS = 2  # a file this young may still change without changing size or time: its hash is not remembered


def split_files(repo: str, subset: str, split: str, data_dir: Path | str | None = None) -> list[Path]:
    """The split's parquet files in order. FileNotFoundError: in no mirror; ValueError: a damaged manifest."""
    roots = [data_dir, os.environ.get("NANOCHAT_DATA_DIR"), base_dir() / "task_data"]
    folders = []
    for root in [Path(root).expanduser() for root in roots if root]:
        for parent in (root, root / "hub"):
            folder = parent / repo.replace("/", "--") / subset / split
            if (folder / "manifest.json").exists():
                return _read_manifest(folder)
            folders.append(folder)
    return fetch_split(repo, subset, split, folders)


def fetch_split(repo: str, subset: str, split: str, looked: list[Path]) -> list[Path]:
    """What happens when no mirror has the split: the place for a download into task_data/. It returns its files."""
    raise FileNotFoundError(
        f"dataset {repo} (subset {subset}, split {split}) is not on this machine, looked for manifest.json in "
        f"{', '.join(map(str, looked))}: set NANOCHAT_DATA_DIR to a folder that holds {repo.replace('/', '--')}/"
    )


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


def count_rows(files: list[Path], columns: tuple[str, ...]) -> int:
    """Rows of all files, from their footers. ValueError: a damaged file, or one without one of the columns."""
    import pyarrow.parquet as pq

    total = 0
    for path in files:
        footer = _naming(path, pq.read_metadata, path)
        present = set(footer.schema.to_arrow_schema().names)
        if missing := [c for c in columns if c not in present]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(sorted(present))}")
        total += footer.num_rows
    return total


def load_split(
    repo: str, subset: str, split: str, data_dir: Path | str | None = None, columns: tuple[str, ...] | None = None
):
    """A split as a pyarrow Table: columns in Arrow's own memory, no Python object per row. Errors as split_files."""
    return read_files(split_files(repo, subset, split, data_dir), columns)


def read_files(files: list[Path], columns: tuple[str, ...] | None = None):
    """pyarrow Table of these columns (None: all) of the files, one after the other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if columns is not None:
        count_rows(files, columns)  # its message names a missing column
        columns = list(columns)
    tables = [
        _naming(path, pq.read_table, path, columns=columns, memory_map=True).replace_schema_metadata(None)
        for path in files
    ]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"the parquet files of {files[0].parent} do not fit together: {_first_line(e)}") from e


def _naming(path: Path, read, *args, **kwargs):
    import pyarrow as pa

    try:
        return read(*args, **kwargs)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise ValueError(f"{path} is not a readable parquet file: {_first_line(e)}") from e


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]


class HubTask(Task):
    """A task on one split of a hub dataset, in nanochat's order: default_rng(42).permutation(rows), then the slice.

    A subclass sets repo, subset, columns and splits (what the user writes -> the split's folder), and defines
    `conversation(row) -> dict`, where ValueError says what is wrong with the row. Rows stay in Arrow until they are
    asked for; making a task reads the files' footers only.
    """

    repo: str
    subset: str
    columns: tuple[str, ...]
    splits: dict[str, str]

    def __init__(
        self, split: str = "train", *, subset: str | None = None, data_dir: Path | str | None = None, **slice_
    ):
        super().__init__(**slice_)
        if split not in self.splits:
            raise ValueError(f"{self.name} has the splits {', '.join(self.splits)}, got {split!r:.40}")
        self.subset, self.split = subset or self.subset, split
        self.files = split_files(self.repo, self.subset, self.splits[split], data_dir)
        self._size = count_rows(self.files, self.columns)

    def conversation(self, row: dict) -> dict:
        raise NotImplementedError(f"{self.name} must define conversation(row)")

    def num_examples(self) -> int:
        return self._size

    def get_example(self, index: int) -> dict:
        if not 0 <= index < self._size:
            raise IndexError(f"{self.name} has {self._size} examples, there is no number {index}")
        at = int(self._order[index])
        batches, starts = self._batches
        i = bisect.bisect_right(starts, at) - 1
        try:
            return self.conversation({name: column[at - starts[i]].as_py() for name, column in batches[i]})
        except ValueError as e:  # UnicodeDecodeError is one: Arrow does not check that text is UTF-8
            raise ValueError(f"row {at} of {self.repo} ({self.subset}/{self.splits[self.split]}): {e}") from e

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng(SHUFFLE_SEED).permutation(self._size)

    @functools.cached_property
    def _batches(self) -> tuple[list[list[tuple]], list[int]]:
        """(column name, Arrow array) pairs of every record batch, and the number of each batch's first row."""
        batches = [b for b in read_files(self.files, self.columns).to_batches() if b.num_rows]
        starts = np.cumsum([0, *(b.num_rows for b in batches)]).tolist()
        return [[(name, b.column(name)) for name in self.columns] for b in batches], starts

    def fingerprint(self) -> str:
        return digest_of([file_digest(file) for file in self.files], self._slice(), self._sources())


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's content, remembered by path, size and time so that a warm start reads no gigabytes."""
    path = Path(path).absolute()
    memo_file = base_dir() / "token_cache" / "file_digests.json"
    stat = path.stat()
    key = [stat.st_size, stat.st_mtime_ns]
    known = _read_memo(memo_file).get(str(path))
    if isinstance(known, list) and len(known) == 3 and known[:2] == key and _is_digest(known[2]):
        return known[2]
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if time.time() - stat.st_mtime > RACY_SECONDS:
        memo = _read_memo(memo_file) | {str(path): [*key, digest]}  # read again: others write it too
        with contextlib.suppress(OSError):  # a read-only base directory only costs the time to hash again
            write_atomically(memo_file, json.dumps(memo, indent=0).encode())
    return digest


def _is_digest(value) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _read_memo(path: Path) -> dict:
    try:
        memo = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # absent or corrupt: everything is hashed again
    return memo if isinstance(memo, dict) else {}
