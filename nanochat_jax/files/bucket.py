"""A base directory in a bucket of Google Cloud Storage, gs://bucket/folder.

What must outlive a machine is kept in the bucket itself, at the paths that it would have on a disk: checkpoints, which
Orbax writes and reads there, metrics and rollouts, the tokenizer, compiled programs. What is mapped into memory, locked
or appended to lies in the machine's own copy of the base directory: datasets and tokens, which are fetched or made
again, and logs, which are uploaded whole with every checkpoint. An object is there as a whole or not at all.

A path in the bucket is an `epath.Path`, with the methods of pathlib's; each function takes a path on a disk too.
"""

import base64
import fnmatch
import functools
import hashlib
import logging
import os
import tempfile
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

SCHEME = "gs://"
PATTERN = frozenset("*?[]#")  # characters that the libraries take for patterns or numbers of versions


def in_bucket(path: Any) -> bool:
    """Whether a path is one of gs://."""
    return str(path).startswith(SCHEME)


def as_path(path: str | Path) -> Any:
    """The path that a user has given: an epath.Path where it is gs://, also where pathlib has made gs:/ of it."""
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

    # Other machines also change what is there, and so does Orbax with a client of its own.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    path = epath.Path(url)
    bucket, _, prefix = str(path).removeprefix(SCHEME).partition("/")
    try:
        _filesystem().call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=1, json_out=True)
    except FileNotFoundError:
        raise ValueError(f"{url}: there is no bucket {bucket!r}: make it, or correct NANOCHAT_BASE_DIR") from None
    except Exception as e:
        reason = error_text(e) or f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise ValueError(
            f"{url} must be a bucket that this machine may use ({reason}): log in with gcloud auth application-default "
            "login, or give the machine's service account the role roles/storage.objectAdmin"
        ) from e
    return path


def error_text(error: BaseException) -> str | None:
    """An error of the storage service, or of the way to it, in one line; None where it is another error."""
    if type(error).__module__.split(".")[0] not in ("gcsfs", "google", "aiohttp"):
        return None
    return f"Google Cloud Storage: {type(error).__name__}: {' '.join(str(error).split()) or 'no answer':.300}"


def _filesystem() -> Any:
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath uses


# --------------------------------------------------------------------------------------------- the machine's own copy
def local_path(path: Any) -> Path:
    """Where this machine keeps its copy of a path in a bucket; a path on a disk is its own."""
    if not in_bucket(path):
        return path
    root = os.environ.get("NANOCHAT_LOCAL_DIR")
    root = Path(root).expanduser().absolute() if root else Path.home() / ".cache" / "nanochat_gs"
    return root / str(path).removeprefix(SCHEME)


def fetch(path: Any, pattern: str = "*", *, exact: bool = False) -> Path:
    """The local copy of an object, or of the objects directly or deeper in a folder whose names match `pattern`.

    What is there with the same content is not copied again. exact: what the bucket does not have is removed.
    """
    target = local_path(path)
    if not in_bucket(path):
        return target
    found = {name: info for name, info in list_objects(path).items() if fnmatch.fnmatch(name, pattern)}
    if exact:
        for file in [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]:
            # what begins with a dot is being fetched by another process
            if file.relative_to(target).as_posix() not in found and not file.name.startswith("."):
                file.unlink(missing_ok=True)
    missing = {name: info for name, info in found.items() if not _is_copy(target / name, info)}
    if (size := sum(info.size for info in missing.values())) > 1 << 26:
        print(f"fetching {len(missing)} files, {size >> 20:,} MiB, from {path}", flush=True)
    for name, info in missing.items():
        _fetch_object(str(path / name) if name != "." else str(path), target / name, info)
    return target


def _is_copy(file: Path, info: "ObjectInfo") -> bool:
    """By size and time, which a copy has of its object; else by content."""
    if not file.is_file() or file.stat().st_size != info.size:
        return False
    if file.stat().st_mtime_ns != info.changed_ns:
        if md5(file) != f"md5:{info.md5}":
            return False
        os.utime(file, ns=(info.changed_ns, info.changed_ns))
    return True


def _fetch_object(url: str, file: Path, info: "ObjectInfo") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        temporary = Path(folder, f".{file.name}")
        _filesystem().get_file(url, str(temporary))
        if info.md5 and (got := md5(temporary).removeprefix("md5:")) != info.md5:
            raise OSError(f"{url} must have the content with the MD5 hash {info.md5}, what came has {got}: try again")
        os.utime(temporary, ns=(info.changed_ns, info.changed_ns))
        temporary.replace(file)


def upload(file: Path, path: Any) -> None:
    """Put a local file into the bucket, in place of what is there; nothing is done for a path on a disk."""
    if in_bucket(path):
        _filesystem().put_file(str(file), str(path))


# -------------------------------------------------------------------------------------------------------- the bucket
class ObjectInfo(NamedTuple):
    """What the service tells of a stored object."""

    size: int  # bytes
    md5: str | None  # in base64, as the service has it; of what was composed of several uploads it has none
    changed_ns: int  # since 1970


def list_objects(folder: Any) -> dict[str, ObjectInfo]:
    """Objects in a folder of a bucket and deeper, by their names relative to it; "." is an object of the very name."""
    found = {}
    for name, info in _filesystem().find(str(folder), detail=True).items():
        if info["type"] != "file" or name.endswith("/"):  # a folder's placeholder
            continue
        relative = PurePosixPath(f"{SCHEME}{name}").relative_to(PurePosixPath(str(folder))).as_posix()
        updated = info.get("updated")
        microseconds = round(datetime.fromisoformat(updated).timestamp() * 1e6) if updated else 0
        found[relative] = ObjectInfo(int(info["size"]), info.get("md5Hash"), microseconds * 1000)
    return found


def md5(path: Any) -> str:
    """The hash of a file here or there: "md5:" and what ObjectInfo has."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False))
    return f"md5:{base64.b64encode(digest.digest()).decode()}"
