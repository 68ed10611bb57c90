"""Pretraining text on disk: parquet shards, found in a folder or downloaded, and the documents in one of them."""

import functools
from collections.abc import Callable
from pathlib import Path

from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.digest import digest_of, file_digest
from nanochat_jax.files.download import fetch_parquet, locked
from nanochat_jax.files.parquet import count_rows, read_files
from nanochat_jax.files.paths import cache_dir, kept_dir

FOLDERS = ("base_data_climbmix", "base_data")  # of nanochat's base directory, today's and that of before 2026-03
RENDERING = "documents 1"  # change it when a document becomes other tokens than before
ADVICE = "give --data-dir FOLDER with parquet files that have a column text, or --download N"


def find_shards(folder: Path | None = None, advice: str = ADVICE) -> list[Path]:
    """The parquet files of `folder` (None: nanochat's own in the base directory) by name; the last is for validation.

    FileNotFoundError, NotADirectoryError: there is no such folder; ValueError: fewer than two files in it.
    """
    if folder is None:
        candidates = [
            bucket.fetch(root / name) for name in FOLDERS for root in dict.fromkeys([kept_dir(), cache_dir()])
        ]
        folder = next((c for c in candidates if c.is_dir()), candidates[0])
    folder = folder.expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"no pretraining data, {folder} does not exist: {advice}")
    if not folder.is_dir():
        raise NotADirectoryError(f"no pretraining data, {folder} must be a folder of parquet files: {advice}")
    shards = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    if len(shards) < 2:
        raise ValueError(
            f"{folder} must hold at least two parquet files, the last of them for validation, it has {len(shards)}: "
            f"{advice}"
        )
    return shards


class Documents:
    """The texts of one parquet shard: a sequence of str with a name and a fingerprint, for the token cache."""

    def __init__(self, path: Path):
        """Reads the schema only: of a damaged footer, pyarrow's answers about its columns end the process. ValueError:
        no parquet file, or no column of strings."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.name = path, path.name
        self._size = count_rows([path], ("text",))
        kind = pq.read_schema(path).field("text").type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise ValueError(f"{path}: the column text must hold strings, it holds {kind}")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> str:
        text = self._texts[index].as_py()
        if text is None:
            raise ValueError("the text is missing (null)")
        return text

    def fingerprint(self) -> str:
        """Hash of the file and of how its texts are rendered."""
        return digest_of(RENDERING, file_digest(self.path))

    @functools.cached_property
    def _texts(self):
        return read_files([self.path], ("text",)).column("text")


CLIMBMIX = "karpathy/climbmix-400b-shuffle"  # nanochat's pretraining text
LAST_SHARD = 6542  # of climbmix, for validation


def fetch_shards(n: int, folder: Path, log: Callable = print0) -> list[Path]:
    """Climbmix's first `n` training shards and its validation shard in `folder`, in order; those missing downloaded.

    ValueError: there are not so many. DownloadError: one cannot be had; those that are there stay.
    """
    if not 1 <= n <= LAST_SHARD:
        raise ValueError(f"the number of training shards must be in 1..{LAST_SHARD}, got --download={n}")
    files = [Path(folder) / f"shard_{i:05d}.parquet" for i in (*range(n), LAST_SHARD)]
    if missing := [file for file in files if not file.is_file()]:
        log(f"downloading {len(missing):,} of {len(files):,} shards of {CLIMBMIX} to {folder}")
        with locked(Path(folder) / "shards", log):
            fetch_parquet(CLIMBMIX, "main", {file.name: file.name for file in missing}, Path(folder), log)
    return files
