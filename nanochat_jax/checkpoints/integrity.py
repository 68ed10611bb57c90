"""The manifest of a checkpoint: a hash of every file of its folder <tag>/<step>, written last.

Orbax finds neither a flipped bit nor an older step by itself. So a checkpoint counts only once it has its manifest, and
its files are compared with the hashes before it is used. In a bucket files have their final names from the beginning,
and only the manifest tells a checkpoint from what a killed save has left; there the hashes are those that the bucket
keeps, of what has arrived.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import sync_folder, write_atomically

MANIFEST = "INTEGRITY.json"
ORBAX = "_CHECKPOINT_METADATA"  # file in every checkpoint that Orbax has written
THREADS = min(8, os.cpu_count() or 1)  # that hash files; each hashes 0.3 to 2 GB a second


def write_manifest(folder: Path) -> None:
    """Write the manifest of a checkpoint whose files are all there; from now on the checkpoint counts. On a disk all of
    it survives a power cut from here on, so that an older one may be deleted."""
    if cloud := bucket.in_bucket(folder):
        names = [name for name in bucket.list_objects(folder) if name != MANIFEST]
    else:
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
        names = [p.relative_to(folder).as_posix() for p in files]
    write_atomically(folder / MANIFEST, json.dumps(_digests(folder, names, md5=cloud, to_disk=not cloud)).encode())


def steps(folder: Path) -> list[int]:
    """Steps of our own checkpoints in the folder, ascending, also of those that are damaged."""
    return sorted(int(p.parent.name) for p in folder.glob(f"*/{MANIFEST}") if _is_step(p.parent.name))


def is_intact(folder: Path, optimizer: bool = True) -> bool:
    """Whether every file of the manifest is there with its bytes; without `optimizer` the files of its state need not
    be. Other files in the folder do not matter. Process 0 looks, and tells the others."""
    found = _is_intact(folder, optimizer) if not processes.index() else None
    return processes.exchange("whether a checkpoint is intact", found)[0]


def _is_intact(folder: Path, optimizer: bool) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        wanted = {name: digest for name, digest in manifest.items() if optimizer or name.split("/")[0] != "optimizer"}
        md5 = any(digest.startswith("md5:") for digest in wanted.values())  # so it was made in a bucket
        return bool(wanted) and _digests(folder, wanted, md5=md5) == wanted
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as e:  # not what was written
        if isinstance(e, OSError) and bucket.in_bucket(folder):  # the way there fails: that is no damage
            raise
        return False


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name[:20]))


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
        begun = {name.split("/")[0] for name in bucket.list_objects(folder) if "/" in name}
    else:
        for leftover in (*folder.glob("*.orbax-checkpoint-tmp*"), *folder.glob("*.deleted")):
            if _is_step(leftover.name.split(".")[0]):
                shutil.rmtree(leftover, ignore_errors=True)
        begun = {p.parent.name for p in folder.glob(f"*/{ORBAX}")}  # Orbax was done, the manifest was not
    for name in begun - {str(step) for step in steps(folder)}:
        if _is_step(name):
            discard(folder / name)


def _digests(folder: Path, names: Iterable[str], *, md5: bool, to_disk: bool = False) -> dict[str, str]:
    """{path in the folder: hash} of these files: SHA-256, or MD5, which a bucket keeps of what has arrived there.

    to_disk: afterwards they survive a power cut. FileNotFoundError: a file is missing, or is none."""
    listed = bucket.list_objects(folder) if md5 and bucket.in_bucket(folder) else {}

    def digest(name: str) -> str:
        if name in listed and listed[name].md5:
            return f"md5:{listed[name].md5}"
        if not (folder / name).is_file():  # a device would never end
            raise FileNotFoundError(folder / name)
        if md5:
            return bucket.md5(folder / name)
        with (folder / name).open("rb") as file:
            if to_disk:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, pool.map(digest, names)))
    if to_disk:
        for inside in {folder, folder.parent, *((folder / name).parent for name in names)}:
            sync_folder(inside)
    return found
