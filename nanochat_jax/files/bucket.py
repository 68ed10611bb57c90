"""A base directory in a bucket of Google Cloud Storage, gs://bucket/folder.

What must outlive a machine is kept in the bucket itself, at the paths that it would have on a disk: checkpoints, which
Orbax writes and reads there, metrics and rollouts, the tokenizer, compiled programs. What is mapped into memory, locked
or appended to lies in the machine's own copy of the base directory: datasets and tokens, which are fetched or made
again, and logs, which go to the bucket whole with every checkpoint. An object is there as a whole or not at all.

A path in the bucket is an `epath.Path`, with the methods of pathlib's; each function takes a path on a disk too.
"""

import base64
import contextlib
import fnmatch
import functools
import hashlib
import logging
import os
import tempfile
import uuid
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

SCHEME = "gs://"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PATTERN = frozenset("*?[]#")  # characters that the libraries take for patterns or numbers of versions
OWNER = ".owner"  # object in a run's folder: who trains there


def in_bucket(path: Any) -> bool:
    return str(path).startswith(SCHEME)


def place(path: str | Path) -> Any:
    """The path that a user has given: an epath.Path where it is gs://, also where pathlib has taken a slash of it."""
    text = str(path)
    if not text.startswith("gs:/"):
        return Path(path)
    if in_bucket(path) and not isinstance(path, str):
        return path
    return connect(SCHEME + text.removeprefix("gs:").strip("/"))


def check_name(path: Any) -> None:
    """ValueError: a path in a bucket has characters that mean something else to the libraries."""
    if in_bucket(path) and PATTERN & set(str(path)):
        raise ValueError(f"{path} must not have any of the characters {' '.join(sorted(PATTERN))}")


@functools.cache
def connect(url: str) -> Any:
    """gs://bucket/folder as an epath.Path. ValueError: a library is missing, or the bucket cannot be read."""
    if not url.removeprefix(SCHEME).split("/")[0]:
        raise ValueError(f"{url} must be gs://bucket/folder")
    check_name(url)
    if find_spec("gcsfs") is None:
        raise ValueError(f"{url} needs the package gcsfs: run tools/setup.sh --extra gcs, or pip install gcsfs")
    os.environ.setdefault("EPATH_USE_TF", "false")  # TensorFlow, where installed, is slow to load and not needed
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # a second, gRPC client beside the first
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it raises what it logs
    import fsspec
    from etils import epath

    # What is there also changes by other machines, and by Orbax's own way of writing arrays.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    path = epath.Path(url)
    bucket, _, prefix = str(path).removeprefix(SCHEME).partition("/")
    try:
        _files().call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=1, json_out=True)
    except FileNotFoundError:
        raise ValueError(f"{url}: there is no bucket {bucket!r}: make it, or correct NANOCHAT_BASE_DIR") from None
    except Exception as e:
        said = explained(e) or f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise ValueError(
            f"{url} must be a bucket that this machine may use ({said}): log in with gcloud auth application-default "
            "login, or give the machine's service account the role roles/storage.objectAdmin"
        ) from e
    return path


def explained(error: BaseException) -> str | None:
    """What the storage service or the way to it has said, in one line; None where the error is another one."""
    if type(error).__module__.split(".")[0] not in ("gcsfs", "google", "aiohttp"):
        return None
    return f"Google Cloud Storage: {type(error).__name__}: {' '.join(str(error).split()) or 'no answer':.300}"


def _files():
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses


# --------------------------------------------------------------------------------------------- the machine's own copy
def local(path: Any) -> Path:
    """Where this machine keeps its copy of a path in a bucket; a path on a disk is its own."""
    if not in_bucket(path):
        return path
    root = os.environ.get("NANOCHAT_LOCAL_DIR")
    root = Path(root).expanduser().absolute() if root else Path.home() / ".cache" / "nanochat_gs"
    return root / str(path).removeprefix(SCHEME)


def fetch(path: Any, pattern: str = "*", *, exact: bool = False) -> Path:
    """The local copy of an object, or of the objects directly or deeper in a folder whose names match `pattern`;
    what is there with the same content is not copied again. exact: what the bucket does not have is removed."""
    target = local(path)
    if not in_bucket(path):
        return target
    found = {name: entry for name, entry in listing(path).items() if fnmatch.fnmatch(name, pattern)}
    if exact:
        for file in [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]:
            if file.relative_to(target).as_posix() not in found and not file.name.startswith("."):  # a fetch under way
                file.unlink(missing_ok=True)
    missing = {name: entry for name, entry in found.items() if not _is_copy(target / name, entry)}
    if (size := sum(entry.size for entry in missing.values())) > 1 << 26:
        print(f"fetching {len(missing)} files, {size >> 20:,} MiB, from {path}", flush=True)
    for name, entry in missing.items():
        _get(str(path / name) if name != "." else str(path), target / name, entry)
    return target


def _is_copy(file: Path, entry: "Entry") -> bool:
    """By size and time, which a copy has of its object; else by content."""
    if not file.is_file() or file.stat().st_size != entry.size:
        return False
    if file.stat().st_mtime_ns != entry.changed_ns:
        if entry.md5 is None or _md5(file) != entry.md5:
            return False
        os.utime(file, ns=(entry.changed_ns, entry.changed_ns))
    return True


def _get(url: str, file: Path, entry: "Entry") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        _files().get_file(url, temporary)
        if entry.md5 and (got := _md5(Path(temporary))) != entry.md5:
            raise OSError(f"{url} must have the content with the MD5 hash {entry.md5}, what came has {got}: try again")
        os.chmod(temporary, 0o644)
        os.utime(temporary, ns=(entry.changed_ns, entry.changed_ns))
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def send(file: Path, path: Any) -> None:
    """Put a local file into the bucket, in place of what is there; nothing is done for a path on a disk."""
    if in_bucket(path):
        _files().put_file(str(file), str(path))


# -------------------------------------------------------------------------------------------------------- the bucket
class Entry(NamedTuple):
    size: int
    md5: str | None  # base64, as the service tells it; it does not of what was composed of several uploads
    changed_ns: int  # since 1970


def listing(folder: Any) -> dict[str, Entry]:
    """Objects in a folder of a bucket and deeper, by their names relative to it; "." is an object of the very name."""
    found = {}
    for name, info in _files().find(str(folder), detail=True).items():
        if info["type"] != "file" or name.endswith("/"):  # a folder's placeholder
            continue
        relative = PurePosixPath(f"{SCHEME}{name}").relative_to(PurePosixPath(str(folder))).as_posix()
        found[relative] = Entry(int(info["size"]), info.get("md5Hash"), _nanoseconds(info.get("updated")))
    return found


def _nanoseconds(time: str | None) -> int:
    microseconds = (datetime.fromisoformat(time) - EPOCH) // timedelta(microseconds=1) if time else 0
    return microseconds * 1000


def modified(folder: Any) -> int:
    """When something in the folder changed last, in nanoseconds."""
    if not in_bucket(folder):
        return folder.stat().st_mtime_ns
    return max((entry.changed_ns for entry in listing(folder).values()), default=0)


def md5(path: Any) -> str:
    """The content's hash, in base64 as `listing` has it and behind "md5:", of a file here or there."""
    return f"md5:{_read_md5(str(path)) if in_bucket(path) else _md5(path)}"


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return _base64(hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)))


def _read_md5(url: str) -> str:
    with _files().open(url, "rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while block := file.read(1 << 22):
            digest.update(block)
    return _base64(digest)


def _base64(digest: Any) -> str:
    return base64.b64encode(digest.digest()).decode()


# --------------------------------------------------------------------------------------------------- one run at a time
class Ownership:
    """A run's folder in a bucket, where locks do not work: who has started last owns it, and the one before, which may
    be a machine that was believed lost, ends before it saves again."""

    def __init__(self, folder: Any):
        self.path, self.sign = folder / OWNER, uuid.uuid4().hex
        self.path.write_text(self.sign)

    def check(self) -> None:
        """OSError: another run has taken the folder."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.read_text() == self.sign:
                return
        raise OSError(f"another run has started in {self.path.parent}: this one has lost it and saves nothing more")
