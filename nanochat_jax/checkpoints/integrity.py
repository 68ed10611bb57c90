"""The seal of a checkpoint: a hash of every file of its folder <tag>/<step>, written last.

Orbax finds neither a flipped bit nor an older step by itself, so only what is sealed counts, and is compared with its
hashes before it is used. In a bucket (storage.py) files have their final names from the beginning, so that the seal
alone tells a checkpoint from what a killed save has left; its hashes are those that the bucket keeps, of what arrived.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import write_atomically

MANIFEST = "INTEGRITY.json"


def write_manifest(folder: Path) -> None:
    """Record a hash of every file. Call when the save is committed; a checkpoint without its seal does not count."""
    write_atomically(folder / MANIFEST, json.dumps(_digests(folder)).encode())


def steps(folder: Path) -> list[int]:
    """Steps of our own checkpoints in the folder, ascending; whether they are intact is another question."""
    names = {p.parent.name for p in folder.glob(f"*/{MANIFEST}")}
    return sorted(int(name) for name in names if name.isdigit() and name == str(int(name)))


def is_intact(folder: Path) -> bool:
    """Every file that was sealed is there and has its bytes. Files beside them do not matter."""
    try:
        digests = json.loads((folder / MANIFEST).read_bytes())
        return bool(digests) and _as_sealed(folder, digests)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError, TypeError) as e:  # unreadable, or not the JSON that was written
        if isinstance(e, OSError) and bucket.in_bucket(folder):  # the way there fails: that is no damage
            raise
        return False


def newest_intact(folder: Path, log: Callable = print0) -> int | None:
    """The last step whose files are as they were sealed; newer damaged ones are named. None: there is none."""
    for step in reversed(steps(folder)):
        if is_intact(folder / str(step)):
            return step
        log(f"WARNING: checkpoint {folder / str(step)} is damaged; using the one before it")
    return None


def discard(folder: Path) -> None:
    """Delete a checkpoint; one that is deleted by half, because the process was killed, does not look like one."""
    if bucket.in_bucket(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)
        return
    doomed = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what killed saves and deletions left in a run's folder. No other process may be saving there."""
    if bucket.in_bucket(folder):
        bucket.Ownership(folder)  # first: a run that was believed lost must not seal what is swept away here
        begun = {name.split("/")[0] for name in bucket.list_objects(folder) if "/" in name}
        for name in begun - {str(step) for step in steps(folder)}:
            if name.isdigit():
                discard(folder / name)
        return
    for leftover in (*folder.glob("*.orbax-checkpoint-tmp*"), *folder.glob("*.deleted")):
        if leftover.name.split(".")[0].isdigit():
            shutil.rmtree(leftover, ignore_errors=True)


def _digests(folder: Path) -> dict[str, str]:
    if bucket.in_bucket(folder):
        return {
            name: f"md5:{entry.md5}" if entry.md5 else bucket.md5(folder / name)
            for name, entry in bucket.list_objects(folder).items()
            if name != MANIFEST
        }
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    return {p.relative_to(folder).as_posix(): _digest(p) for p in files}


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _as_sealed(folder: Path, sealed: Mapping[str, str]) -> bool:
    """A folder that was copied from a bucket, or to one, has the other place's kind of hashes."""
    found = _digests(folder) if bucket.in_bucket(folder) else {}
    return all(
        (found.get(name) or bucket.md5(folder / name)) == digest
        if digest.startswith("md5:")
        else _digest(folder / name) == digest
        for name, digest in sealed.items()
    )
