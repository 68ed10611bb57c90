"""The base directory, and files that are never seen half written."""

import errno
import functools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat_jax.files import bucket

BUNDLED = Path(__file__).parents[1] / "bundled"  # data files of the package
OUTPUT = "NANOCHAT_OUTPUT_DIR"  # environment variable


def base_dir() -> Path:
    """Where tokenizer, datasets and caches live: NANOCHAT_BASE_DIR, else nanochat's own ~/.cache/nanochat.

    Where that is in a bucket, this is the machine's copy of it, with the bucket's tokenizer.
    """
    kept = kept_dir()
    return _copy_with_tokenizer(str(kept)) if bucket.in_bucket(kept) else kept


def kept_dir() -> Any:
    """Where checkpoints, metrics and all else that must be kept live: `base_dir`, or an epath.Path gs://bucket/folder.

    ValueError: the bucket cannot be used, or the library for it is not installed.
    """
    named = os.environ.get("NANOCHAT_BASE_DIR")
    if named and named.startswith("gs:/"):
        return bucket.as_path(named)
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "nanochat"


def output_dir() -> Any:
    """Where runs and caches are written: what --output-dir names, else `kept_dir`. The base directory can then be one
    that may only be read."""
    named = os.environ.get(OUTPUT)
    return (bucket.as_path(named) if named.startswith("gs:/") else Path(named)) if named else kept_dir()


def write_to(folder: Path | None) -> None:
    """From now on, and in processes that this one starts, `output_dir` is this folder; None changes nothing."""
    if folder is not None:
        path = bucket.as_path(folder)
        os.environ[OUTPUT] = str(path if bucket.in_bucket(path) else folder.expanduser().absolute())


def cache_dir() -> Path:
    """Where caches and downloads are written on this machine."""
    return base_dir() if bucket.in_bucket(output_dir()) or not os.environ.get(OUTPUT) else output_dir()


@functools.cache  # fetched once a process
def _copy_with_tokenizer(url: str) -> Path:
    return bucket.fetch(bucket.as_path(url) / "tokenizer", exact=True).parent


def write_atomically(path: Any, data: bytes | Iterable[bytes]) -> None:
    """A reader sees the old file or the new one, whole, whenever this process is killed. data: in one or in parts."""
    path, parts = bucket.as_path(path), [data] if isinstance(data, bytes) else data
    if bucket.in_bucket(path):
        path.write_bytes(b"".join(parts))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder, f".{path.name}")
        with temporary.open("wb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        temporary.chmod(0o644)  # whatever the umask: other users of a shared base directory read it
        temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What a folder on a disk lists now, it lists after a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems say that cannot do it for folders
            raise
    finally:
        os.close(descriptor)
