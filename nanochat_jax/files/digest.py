"""Hashes of files and of JSON values, which tell whether data is what it was."""

import contextlib
import hashlib
import json
import time
from pathlib import Path

from nanochat_jax.files.paths import base_dir, write_atomically

RACY_SECONDS = 2  # a file this young may still change without changing size or time: its hash is not remembered


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


def digest_of(*parts) -> str:
    """sha256 (hex) of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
