"""Tokens on disk: a task's conversations, or a shard's documents, are tokenized once and only opened by later runs."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.digest import digest_of
from nanochat_jax.files.paths import write_atomically

Rendering = tuple[np.ndarray, np.ndarray]  # token ids [k], and a mask uint8 [k]: 1 where the token is trained, else 0
RenderMany = Callable[[list], list[Rendering]]  # entries of a task -> the tokens of each

VERSION = 1  # part of every cache's key: raise it when the files below come to mean something else
RENDER_BATCH = 1000  # entries handed to the tokenizer at a time
BLOCK = 1 << 16  # bytes
CHECKED_BLOCKS = 256  # of a file above so many blocks (16 MiB) the checksum covers only so many: opening stays quick
FILES = ("ids.npy", "mask.npy", "offsets.npy", "trained.npy")


class DamagedCache(Exception):
    """A cache folder that cannot be used; the message says why."""


class TokenCache:
    """The tokens of one task's conversations, or of one shard's documents, mapped from disk; entry i is get(i).

    Files in its folder: ids.npy uint16 [tokens] (uint32 for a vocabulary above 65,536); mask.npy uint8, 8 tokens in a
    byte; offsets.npy int64 [n + 1]; trained.npy int32 [n], the trained tokens of each entry; and meta.json with name,
    key, bos, counts, sizes and checksums. Entries are stored whole: whoever reads them cuts them.
    """

    def __init__(self, folder: Path):
        """Open a finished cache. DamagedCache: the folder is missing, incomplete or not as it was written."""
        self.folder = folder
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.name, self.tokenizer = str(meta["name"]), str(meta["tokenizer"])
            self.bos, self.n_tokens = int(meta["bos"]), int(meta["tokens"])
            for file in FILES:
                size, checksum = meta["files"][file]["size"], meta["files"][file]["checksum"]
                if (found := (folder / file).stat().st_size) != size:
                    raise DamagedCache(f"{file} has {found:,} bytes instead of {size:,}")
                if _checksum(folder / file) != checksum:
                    raise DamagedCache(f"the content of {file} has changed since it was written")
            self.content = [meta["files"][file]["checksum"] for file in FILES]
            # asarray: slicing a np.memmap costs several times as much as slicing a plain array
            arrays = [np.asarray(np.load(folder / file, mmap_mode="r")) for file in FILES]
            self.ids, self.mask, self.offsets, self.trained = arrays
            if len(self.trained) != meta["conversations"]:
                raise DamagedCache(f"{len(self.trained)} conversations instead of {meta['conversations']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCache(f"{type(error).__name__}: {error}") from error

    def __len__(self) -> int:
        return len(self.trained)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each entry, uncut, int64 [n]."""
        return np.diff(self.offsets)

    def get(self, i: int, limit: int | None = None) -> Rendering:
        """Entry i, cut to its first `limit` tokens: ids uint16 or uint32 [k], mask uint8 [k]."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} conversations, asked for number {i}")
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        if limit is not None:
            stop = min(stop, start + limit)
        bits = np.unpackbits(self.mask[start // 8 : (stop + 7) // 8])
        return self.ids[start:stop], bits[start % 8 :][: stop - start]

    @classmethod
    def open_or_build(
        cls, task, tokenizer, folder: Path, log: Callable = print0, render: RenderMany | None = None
    ) -> "TokenCache":
        """The cache of `task` in `folder`, built first if there is none. Of several processes one builds, others wait.

        task: a sequence of entries with a `name` and `fingerprint()`, a hash of its content. render: None where entries
        are conversations, which the tokenizer renders.
        ValueError: an entry that cannot be rendered; the message names its row.
        """
        key = cache_key(task, tokenizer)
        final = Path(folder) / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', task.name)[:80]}-{key[:20]}"
        with contextlib.suppress(DamagedCache):
            return cls(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_builds(final.parent)
        lock = _lock(final)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log(f"another process is building the token cache of {task.name}: waiting for it")
            lock.acquire()
        try:
            return cls(final)  # another process may have built it meanwhile
        except DamagedCache as why:
            if final.exists():
                log(f"token cache {final} is damaged ({why}): building it anew")
            _build(task, tokenizer, final, key, log, render)
            return cls(final)
        finally:
            lock.release()


def cache_key(task, tokenizer) -> str:
    """Changes with anything that changes a stored token: the conversations, the tokenizer, the format."""
    return digest_of(VERSION, tokenizer.RENDERING, task.fingerprint(), tokenizer.digest())


def open_caches(tasks, tokenizer, folder: Path, log: Callable = print0) -> list[TokenCache]:
    """One cache for each task, in order; tasks of equal name and content share one object."""
    keys = [(task.name, cache_key(task, tokenizer)) for task in tasks]
    different = dict(zip(keys, tasks))
    opened = {key: TokenCache.open_or_build(task, tokenizer, folder, log) for key, task in different.items()}
    return [opened[key] for key in keys]


def _build(task, tokenizer, final: Path, key: str, log: Callable, render: RenderMany | None) -> None:
    """Write the cache beside its place, then move it there in one step. The caller holds the lock."""
    building = final.with_name(f"{final.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # of a build that was killed
    building.mkdir()
    try:
        started = time.perf_counter()
        counts = _write_arrays(task, tokenizer, building, log, render)
        files = {f: {"size": (building / f).stat().st_size, "checksum": _checksum(building / f)} for f in FILES}
        meta = {"name": task.name, "key": key, "tokenizer": tokenizer.digest(), "bos": int(tokenizer.bos)}
        write_atomically(building / "meta.json", json.dumps(meta | counts | {"files": files}, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.rename(building, final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    log(
        f"tokenized {task.name}: {counts['conversations']:,} entries, {counts['tokens']:,} tokens, "
        f"{counts['trained_tokens']:,} of them trained, in {time.perf_counter() - started:.1f} s"
    )


def _write_arrays(task, tokenizer, folder: Path, log: Callable, render: RenderMany | None) -> dict[str, int]:
    """Write FILES into the folder, a batch of entries at a time; return the counts for meta.json."""
    entries = tokens = trained = 0
    odd_bits = np.empty(0, np.uint8)  # mask bits that do not fill a byte yet
    said = time.perf_counter()
    with (
        _npy_writer(folder / "ids.npy", np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32) as append_ids,
        _npy_writer(folder / "mask.npy", np.uint8) as append_mask,
        _npy_writer(folder / "offsets.npy", np.int64) as append_offsets,
        _npy_writer(folder / "trained.npy", np.int32) as append_trained,
    ):
        append_offsets([0])
        for rendered in _render(task, render or partial(tokenizer.render_many, max_tokens=None)):
            ends = np.cumsum([len(ids) for ids, _ in rendered])
            mask = np.concatenate([mask for _, mask in rendered]).astype(np.uint8)
            sums = np.add.reduceat(mask, [0, *ends[:-1]], dtype=np.int32)
            bits = np.concatenate([odd_bits, mask])
            whole = len(bits) - len(bits) % 8
            append_ids(np.concatenate([ids for ids, _ in rendered]))
            append_mask(np.packbits(bits[:whole]))
            append_offsets(tokens + ends)
            append_trained(sums)
            odd_bits = bits[whole:]
            entries, tokens, trained = entries + len(ends), tokens + int(ends[-1]), trained + int(sums.sum())
            if time.perf_counter() - said > 10:
                said = time.perf_counter()
                log(f"tokenizing {task.name}: {entries:,} of {len(task):,} entries")
        append_mask(np.packbits(odd_bits))
    return {"conversations": entries, "tokens": tokens, "trained_tokens": trained}


def _render(task, render_many: RenderMany) -> Iterator[list[Rendering]]:
    """Batches of uncut entries. ValueError: the first row that cannot be read or rendered, with the reason."""
    for rows in itertools.batched(range(len(task)), RENDER_BATCH):
        try:
            yield render_many([task[i] for i in rows])
        except Exception:
            for i in rows:  # find the row to blame; if each alone is fine, the batch's own error is raised
                try:
                    render_many([task[i]])
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise ValueError(f"{task.name}, row {i} cannot be rendered: {reason}") from error
            raise


@contextlib.contextmanager
def _npy_writer(path: Path, dtype: type[np.generic]) -> Iterator[Callable[[np.ndarray], None]]:
    """append(values) for an .npy file of one dimension, whose length is put into the header when all is written."""
    count = 0

    def write_header():  # NumPy pads it, so that it takes the same room for any count
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})

    def append(values):
        nonlocal count
        file.write(np.asarray(values, dtype).tobytes())
        count += len(values)

    with open(path, "wb") as file:
        write_header()
        yield append
        file.seek(0)
        write_header()
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> str:
    """SHA-256 of the file, or of CHECKED_BLOCKS evenly spread blocks of a large one."""
    size, digest = path.stat().st_size, hashlib.sha256()
    starts, length = [0], size
    if size > CHECKED_BLOCKS * BLOCK:
        starts = [block * (size - BLOCK) // (CHECKED_BLOCKS - 1) for block in range(CHECKED_BLOCKS)]
        length = BLOCK
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def _lock(final: Path) -> FileLock:
    return FileLock(final.with_name(f".{final.name}.lock"))


def _remove_abandoned_builds(folder: Path) -> None:
    """Remove what killed builds left behind; one whose lock is held is being written right now and stays."""
    for building in folder.glob("*.building"):
        with contextlib.suppress(Timeout), _lock(building.with_suffix("")).acquire(timeout=0):
            shutil.rmtree(building, ignore_errors=True)
