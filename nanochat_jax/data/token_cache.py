"""A task's conversations, or a shard's documents, as token ids and masks on disk: rendered once, opened at once by
every later run."""

import hashlib
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

VERSION = 1  # of the format below and of what is stored (renderings, never cut); part of every cache's key
BATCH = 1000  # conversations handed to the tokenizer at a time
CHECKED_BLOCKS, BLOCK = 256, 1 << 16  # what is read of a file to recognise damage: all of it up to 16 MiB
FILES = ("ids.npy", "mask.npy", "offsets.npy", "trained.npy")


class Damaged(Exception):
    """A cache folder that cannot be used; the message says why."""


class TokenCache:
    """The rendered conversations of one task, memory-mapped; conversation i is get(i).

    Files of its folder: ids.npy uint16 (uint32 for a vocabulary above 65,536) [tokens]; mask.npy uint8, 8 tokens a
    byte; offsets.npy int64 [n + 1]; trained.npy int32 [n], trained tokens of each conversation; meta.json, written
    last: name, key, bos, counts, sizes and checksums. Renderings are stored whole: cuts belong to whoever reads.
    """

    def __init__(self, folder: Path):
        """Open a finished cache. Damaged: the folder is missing, incomplete or not as it was written."""
        self.folder = folder
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.name, self.key, self.bos = str(meta["name"]), str(meta["key"]), int(meta["bos"])
            self.tokenizer = str(meta["tokenizer"])
            self.n_tokens, self.n_trained = int(meta["tokens"]), int(meta["trained_tokens"])
            for file in FILES:
                size, checksum = meta["files"][file]["size"], meta["files"][file]["checksum"]
                if (found := (folder / file).stat().st_size) != size:
                    raise Damaged(f"{file} has {found:,} bytes instead of {size:,}")
                if _checksum(folder / file) != checksum:
                    raise Damaged(f"the content of {file} has changed since it was written")
            self.content = [meta["files"][file]["checksum"] for file in FILES]  # what was rendered, however it was made
            self.ids, self.mask, self.offsets, self.trained = (
                np.asarray(np.load(folder / f, mmap_mode="r"))
                for f in FILES  # plain views: memmap's own slicing is slow
            )
            if len(self.trained) != meta["conversations"]:
                raise Damaged(f"{len(self.trained)} conversations instead of {meta['conversations']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{type(error).__name__}: {error}") from error

    def __len__(self) -> int:
        return len(self.trained)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation, uncut, int64 [n]."""
        return np.diff(self.offsets)

    def get(self, i: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Conversation i, cut to its first `limit` tokens: ids uint16 or uint32 [k], mask uint8 [k] of 0 and 1."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} conversations, asked for number {i}")
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        if limit is not None:
            stop = min(stop, start + limit)
        bits = np.unpackbits(self.mask[start // 8 : (stop + 7) // 8])
        return self.ids[start:stop], bits[start % 8 :][: stop - start]

    @classmethod
    def open_or_build(
        cls, task, tokenizer, folder: Path, log: Callable = print0, render: Callable | None = None
    ) -> "TokenCache":
        """The cache of `task` in `folder`, built first where there is none; processes that want it at once share it.

        task: a sequence of conversations with `name` and `fingerprint()`, the hash of its content. tokenizer: has
        `render_many(conversations, max_tokens)`, `render_conversation`, `bos`, `vocab_size` and `digest()`.
        render: list of entries -> list of (ids, mask), where the task's entries are no conversations.
        ValueError: a conversation that cannot be rendered, named by its row.
        """
        key = cache_key(task, tokenizer)
        final = Path(folder) / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', task.name)[:80]}-{key[:20]}"
        try:
            return cls(final)
        except Damaged:
            final.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(final)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log(f"another process is building the token cache of {task.name}: waiting for it")
            lock.acquire()
        try:
            if not _is_usable(final, log):  # another process may have built it meanwhile
                _build(task, tokenizer, final, key, log, render)
        finally:
            lock.release()
        _sweep(final.parent)
        return cls(final)


def cache_key(task, tokenizer) -> str:
    """Changes with anything that changes a stored token: the conversations, the tokenizer, the format."""
    parts = [VERSION, tokenizer.RENDERING, task.fingerprint(), tokenizer.digest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_caches(tasks, tokenizer, folder: Path, log: Callable = print0) -> list[TokenCache]:
    """One cache for each task, in order; tasks of equal name and content share one object."""
    opened: dict[tuple[str, str], TokenCache] = {}
    caches = []
    for task in tasks:
        known = (task.name, cache_key(task, tokenizer))
        if known not in opened:
            opened[known] = TokenCache.open_or_build(task, tokenizer, folder, log)
        caches.append(opened[known])
    return caches


def _is_usable(folder: Path, log: Callable) -> bool:
    if not folder.exists():
        return False
    try:
        TokenCache(folder)
    except Damaged as why:
        log(f"token cache {folder} is damaged ({why}): building it anew")
        return False
    return True


def _build(task, tokenizer, final: Path, key: str, log: Callable, render: Callable | None) -> None:
    """Write the cache beside its place, then move it there in one step. The caller holds the lock."""
    building = final.with_name(final.name + ".building")
    shutil.rmtree(building, ignore_errors=True)  # of a build that was killed: the lock is ours, so nobody writes there
    building.mkdir()
    try:
        started = time.perf_counter()
        counts = _write_arrays(task, tokenizer, building, log, render)
        files = {f: {"size": (building / f).stat().st_size, "checksum": _checksum(building / f)} for f in FILES}
        meta = {"name": task.name, "key": key, "tokenizer": tokenizer.digest(), "bos": int(tokenizer.bos)}
        _write(building / "meta.json", json.dumps(meta | counts | {"files": files}, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.rename(building, final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    log(
        f"tokenized {task.name}: {counts['conversations']:,} entries, {counts['tokens']:,} tokens, "
        f"{counts['trained_tokens']:,} of them trained, in {time.perf_counter() - started:.1f} s"
    )


def _write_arrays(task, tokenizer, folder: Path, log: Callable, render: Callable | None) -> dict[str, int]:
    """Write FILES into the folder, a batch of conversations at a time; return the counts of meta.json."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    lengths, trained = [], []
    odd_bits = np.empty(0, np.uint8)  # mask bits that do not fill a byte yet
    with open(folder / "ids.npy", "wb") as ids_file, open(folder / "mask.npy", "wb") as mask_file:
        _header(ids_file, dtype, 0)
        _header(mask_file, np.dtype(np.uint8), 0)
        said = time.perf_counter()
        for rendered in _render(task, tokenizer, render):
            sizes = [len(ids) for ids, _ in rendered]
            ids_file.write(np.concatenate([ids for ids, _ in rendered]).astype(dtype).tobytes())
            mask = np.concatenate([mask for _, mask in rendered]).astype(np.uint8)
            trained.append(np.add.reduceat(mask, np.cumsum([0, *sizes[:-1]]), dtype=np.int32))
            lengths.append(np.array(sizes, np.int64))
            bits = np.concatenate([odd_bits, mask])
            whole = len(bits) - len(bits) % 8
            mask_file.write(np.packbits(bits[:whole]).tobytes())
            odd_bits = bits[whole:]
            if time.perf_counter() - said > 10:
                said = time.perf_counter()
                log(f"tokenizing {task.name}: {sum(map(len, lengths)):,} of {len(task):,} entries")
        mask_file.write(np.packbits(odd_bits).tobytes())
        offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
        tokens = int(offsets[-1])
        for file, entry, count in ((ids_file, dtype, tokens), (mask_file, np.dtype(np.uint8), (tokens + 7) // 8)):
            file.seek(0)
            _header(file, entry, count)
            file.flush()
            os.fsync(file.fileno())
    trained = np.concatenate([np.zeros(0, np.int32), *trained])
    for name, array in (("offsets.npy", offsets), ("trained.npy", trained)):
        with open(folder / name, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    return {"conversations": len(trained), "tokens": tokens, "trained_tokens": int(trained.sum(dtype=np.int64))}


def _render(task, tokenizer, render: Callable | None) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Batches of (ids, mask), uncut. ValueError: the first row that cannot be read or rendered, with the reason."""
    render_many = render or partial(tokenizer.render_many, max_tokens=None)
    for start in range(0, len(task), BATCH):
        rows = range(start, min(start + BATCH, len(task)))
        try:
            rendered = render_many([task[i] for i in rows])
        except Exception:  # find the row to blame; one that fails only among others is told as it came
            for i in rows:
                try:
                    render([task[i]]) if render else tokenizer.render_conversation(task[i], max_tokens=None)
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise ValueError(f"{task.name}, row {i} cannot be rendered: {reason}") from error
            raise
        for i, (ids, mask) in zip(rows, rendered, strict=True):
            if not len(ids) or len(ids) != len(mask):
                raise ValueError(f"{task.name}, row {i} was rendered to {len(ids)} tokens and {len(mask)} mask values")
        yield rendered


def _header(file, dtype: np.dtype, count: int) -> None:
    """The start of an .npy file; NumPy pads it so that any count fits in the same room, to be filled in at the end."""
    shape = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, shape)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> str:
    """SHA-256 of the file, of evenly spread blocks of it where it is large: an open must not read gigabytes."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= CHECKED_BLOCKS * BLOCK:
            digest.update(file.read())
        else:
            for block in range(CHECKED_BLOCKS):
                file.seek(block * (size - BLOCK) // (CHECKED_BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _lock(final: Path) -> FileLock:
    return FileLock(final.with_name(f".{final.name}.lock"))


def _sweep(folder: Path) -> None:
    """Remove what killed builds left behind; one whose lock is held is being written right now and stays."""
    for building in folder.glob("*.building"):
        lock = _lock(building.with_suffix(""))
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(building, ignore_errors=True)
        except Timeout:
            continue
