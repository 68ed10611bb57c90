"""Hashes of files and of JSON values, which tell whether data is what it was."""

import contextlib
import hashlib
import json
import re
import time
from pathlib import Path

from nanochat_jax.files.paths import cache_dir, write_atomically

RACY_SECONDS = 2  # a file this young may still change without changing size or time: its hash is not remembered


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's content, remembered by path, size and time so that a warm start reads no gigabytes."""
    path = Path(path).absolute()
    # Damage that leaves size and time as they were is not seen: only reading the file again could find it.
    memo_file = cache_dir() / "token_cache" / "file_digests.json"
    stat = path.stat()
    match _read_memo(memo_file).get(str(path)):
        case [stat.st_size, stat.st_mtime_ns, str(known)] if re.fullmatch("[0-9a-f]{64}", known):
            return known
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if time.time() - stat.st_mtime > RACY_SECONDS:
        memo = _read_memo(memo_file)  # again, because other processes write it too
        memo[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
        with contextlib.suppress(OSError):  # a read-only base directory only costs the time to hash again
            write_atomically(memo_file, json.dumps(memo, indent=0).encode())
    return digest


def _read_memo(path: Path) -> dict:
    try:
        memo = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # absent or corrupt: everything is hashed again
    if not isinstance(memo, dict):
        return {}
    return {path: entry for path, entry in memo.items() if _is_entry(entry)}


def _is_entry(entry) -> bool:
    return isinstance(entry, list) and list(map(type, entry)) == [int, int, str]


def digest_of(*parts) -> str:
    """sha256 (hex) of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
