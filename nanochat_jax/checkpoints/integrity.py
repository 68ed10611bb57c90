"""The manifest of a checkpoint: a hash of every file of its folder <tag>/<step>, written last.

Orbax finds neither a flipped bit nor an older step by itself. So a checkpoint counts only once it has its manifest, and
its files are compared with the hashes before it is used. In a bucket files have their final names from the beginning,
and only the manifest tells a checkpoint from what a killed save has left; there the hashes are those that the bucket
keeps, of what has arrived.
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
    """Write the manifest of a checkpoint whose files are all there; from now on the checkpoint counts."""
    write_atomically(folder / MANIFEST, json.dumps(_digests(folder)).encode())


def steps(folder: Path) -> list[int]:
    """Steps of our own checkpoints in the folder, ascending, also of those that are damaged."""
    names = {p.parent.name for p in folder.glob(f"*/{MANIFEST}")}
    return sorted(int(name) for name in names if name.isdigit() and name == str(int(name)))


def is_intact(folder: Path) -> bool:
    """Whether every file of the manifest is there with its bytes. Other files in the folder do not matter."""
    try:
        digests = json.loads((folder / MANIFEST).read_bytes())
        return bool(digests) and _matches(folder, digests)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError, TypeError) as e:  # unreadable, or not the JSON that was written
        if isinstance(e, OSError) and bucket.in_bucket(folder):  # the way there fails: that is no damage
            raise
        return False


def newest_intact(folder: Path, log: Callable = print0) -> int | None:
    """The last step that is intact, None where there is none; later ones that are damaged are named."""
    for step in reversed(steps(folder)):
        if is_intact(folder / str(step)):
            return step
        log(f"WARNING: checkpoint {folder / str(step)} is damaged; using the one before it")
    return None


def discard(folder: Path) -> None:
    """Delete a checkpoint. If the process is killed meanwhile, what is left does not look like a checkpoint."""
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
        bucket.Ownership(folder)  # first: a run that was believed lost must not complete what is deleted here
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


def _matches(folder: Path, manifest: Mapping[str, str]) -> bool:
    """Whether the files have these hashes: MD5 where the manifest was made in a bucket, else SHA-256."""
    found = _digests(folder) if bucket.in_bucket(folder) else {}
    return all(
        (found.get(name) or bucket.md5(folder / name)) == digest
        if digest.startswith("md5:")
        else _digest(folder / name) == digest
        for name, digest in manifest.items()
    )
