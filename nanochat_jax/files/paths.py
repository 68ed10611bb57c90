"""Plumbing that every stage needs: where files live, who prints, what machine this is."""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

from nanochat_jax.files import bucket


def base_dir() -> Path:
    """Where tokenizer, datasets and caches live: NANOCHAT_BASE_DIR, else nanochat's own ~/.cache/nanochat.

    Of a base directory in a bucket it is this machine's copy: the tokenizer is the bucket's, the rest comes and goes.
    """
    kept = kept_dir()
    return _with_tokenizer(str(kept)) if bucket.in_bucket(kept) else kept


def kept_dir() -> Any:
    """Where checkpoints, metrics and what else must be kept lives: `base_dir`, or gs://bucket/folder as an epath.Path.

    ValueError: the bucket cannot be used, or the library for it is not installed."""
    named = os.environ.get("NANOCHAT_BASE_DIR")
    if named and named.startswith("gs:/"):
        return bucket.place(named)
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "nanochat"


@functools.cache
def _with_tokenizer(url: str) -> Path:
    return bucket.fetch(bucket.place(url) / "tokenizer", exact=True).parent


def write_atomically(path: Any, data: bytes) -> None:
    """A reader sees the old file or the new one, whole, whenever this process is killed."""
    if bucket.in_bucket(path := bucket.place(path)):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide the file from the other users of a shared base directory
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
