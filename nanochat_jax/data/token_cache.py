"""Tokens on disk: a task's conversations, or a shard's documents, are tokenized once and only opened by later runs."""

import contextlib
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

from nanochat_jax.data.hashed_array import HashedArray, write_array
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.digest import digest_of
from nanochat_jax.files.paths import write_atomically

Rendering = tuple[np.ndarray, np.ndarray]  # token ids [k], and a mask uint8 [k]: 1 where the token is trained, else 0
RenderMany = Callable[[list], list[Rendering]]  # entries of a task -> the tokens of each

VERSION = 2  # part of every cache's key: raise it when the files below come to mean something else
KEPT_BYTES = 50_000_000_000  # of all caches together, above which old ones are deleted
SILENCE = 5.0  # seconds of tokenizing between two lines about it
KEPT_DAYS = 30  # after a cache was last opened, during which it stays
RENDER_BATCH = 1000  # entries handed to the tokenizer at a time
FILES = ("ids.npy", "mask.npy", "offsets.npy", "trained.npy")


class DamagedCache(ValueError):
    """A cache folder that cannot be used; the message says why."""


class TokenCache:
    """The tokens of one task's conversations, or of one shard's documents, mapped from disk; entry i is get(i).

    Files in its folder: ids.npy uint16 [tokens] (uint32 for a vocabulary above 65,536); mask.npy uint8, 8 tokens in a
    byte; offsets.npy int64 [n + 1]; trained.npy int32 [n], the trained tokens of each entry; and meta.json with name,
    key, bos, counts, and a hash of each block of the files. Entries are stored whole: whoever reads them cuts them.
    Offsets and counts are checked when the cache is opened, ids and mask block by block when they are first read.
    """

    def __init__(self, folder: Path):
        """Open a finished cache. DamagedCache: the folder is missing, incomplete or not as it was written."""
        self.folder = folder
        try:
            meta = json.loads((folder / "meta.json").read_bytes())
            if meta.pop("digest") != digest_of(meta):
                raise ValueError("the content of meta.json has changed since it was written")
            self.name, self.tokenizer = meta["name"], meta["tokenizer"]
            self.bos, self.n_tokens = meta["bos"], meta["tokens"]
            blocks, ids_dtype = meta["blocks"], {2: np.uint16, 4: np.uint32}[meta["bytes_of_an_id"]]
            if list(map(type, (self.name, self.tokenizer, self.bos, self.n_tokens))) != [str, str, int, int]:
                raise ValueError("meta.json has values of other types")
            self.ids = HashedArray(folder / "ids.npy", ids_dtype, blocks["ids.npy"])
            self.mask = HashedArray(folder / "mask.npy", np.uint8, blocks["mask.npy"])
            offsets = HashedArray(folder / "offsets.npy", np.int64, blocks["offsets.npy"])
            trained = HashedArray(folder / "trained.npy", np.int32, blocks["trained.npy"])
            self.offsets, self.trained = (array.read(0, len(array)) for array in (offsets, trained))
            self.content = [digest_of(blocks[file]) for file in FILES]
            sizes = (len(self.offsets) - 1, self.offsets[-1], len(self.ids), len(self.mask))
            wanted = (len(self.trained), self.n_tokens, self.n_tokens, (self.n_tokens + 7) // 8)
            if sizes != wanted or self.offsets[0] or (self.lengths < 0).any():
                raise ValueError("its files do not fit together")
            with contextlib.suppress(OSError):  # the folder may be somebody else's
                os.utime(folder / "meta.json")  # for _delete_old
        except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise DamagedCache(f"{type(error).__name__}: {error}") from error

    def __len__(self) -> int:
        return len(self.trained)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each entry, uncut, int64 [n]."""
        return np.diff(self.offsets)

    def get(self, i: int, limit: int | None = None) -> Rendering:
        """Entry i, cut to its first `limit` tokens: ids uint16 or uint32 [k], mask uint8 [k].

        ValueError: the files are not as they were written."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} conversations, asked for number {i}")
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        if limit is not None:
            stop = min(stop, start + limit)
        try:
            ids, bits = self.ids.read(start, stop), np.unpackbits(self.mask.read(start // 8, (stop + 7) // 8))
        except ValueError as error:
            raise ValueError(f"{error}: delete the folder {self.folder}, it is built anew") from error
        return ids, bits[start % 8 :][: stop - start]

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
            _delete_old(final.parent, log)
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
        counts, blocks = _write_arrays(task, tokenizer, building, log, render)
        meta = {"name": task.name, "key": key, "tokenizer": tokenizer.digest(), "bos": int(tokenizer.bos)}
        meta |= {"bytes_of_an_id": _ids_dtype(tokenizer)().itemsize, **counts, "blocks": blocks}
        write_atomically(building / "meta.json", json.dumps(meta | {"digest": digest_of(meta)}, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.rename(building, final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    log(
        f"tokenized {task.name}: {counts['conversations']:,} entries, {counts['tokens']:,} tokens, "
        f"{counts['trained_tokens']:,} of them trained, in {time.perf_counter() - started:.1f} s"
    )


def _write_arrays(task, tokenizer, folder: Path, log: Callable, render: RenderMany | None) -> tuple[dict, dict]:
    """Write FILES into the folder, a batch of entries at a time -> counts, and hashes of each file's blocks."""
    blocks: dict[str, list[str]] = {file: [] for file in FILES}
    entries = tokens = trained = 0
    odd_bits = np.empty(0, np.uint8)  # mask bits that do not fill a byte yet
    said = began = time.perf_counter()
    with (
        write_array(folder / "ids.npy", _ids_dtype(tokenizer), blocks["ids.npy"]) as append_ids,
        write_array(folder / "mask.npy", np.uint8, blocks["mask.npy"]) as append_mask,
        write_array(folder / "offsets.npy", np.int64, blocks["offsets.npy"]) as append_offsets,
        write_array(folder / "trained.npy", np.int32, blocks["trained.npy"]) as append_trained,
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
            if (now := time.perf_counter()) - said > SILENCE:
                said, rate = now, entries / (now - began)
                log(
                    f"tokenizing {task.name}: {entries:,} of {len(task):,} entries, {rate:,.0f} a second, "
                    f"{(len(task) - entries) / rate:,.0f} s to go"
                )
        append_mask(np.packbits(odd_bits))
    return {"conversations": entries, "tokens": tokens, "trained_tokens": trained}, blocks


def _ids_dtype(tokenizer) -> type[np.generic]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


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
                    number = getattr(task, "numbers", range(len(task)))[i]  # of conversations.Chosen
                    raise ValueError(f"{task.name}, row {number} cannot be rendered: {reason}") from error
            raise


def _lock(final: Path) -> FileLock:
    return FileLock(final.with_name(f".{final.name}.lock"))


def _remove_abandoned_builds(folder: Path) -> None:
    """Remove what killed builds left behind; one whose lock is held is being written right now and stays."""
    for building in folder.glob("*.building"):
        with contextlib.suppress(Timeout), _lock(building.with_suffix("")).acquire(timeout=0):
            shutil.rmtree(building, ignore_errors=True)


def _delete_old(folder: Path, log: Callable) -> None:
    """Delete caches that nobody has opened for KEPT_DAYS, the oldest first, until all together have KEPT_BYTES."""
    caches = []
    for meta in folder.glob("*/meta.json"):
        with contextlib.suppress(OSError):  # another process may delete it
            size = sum(file.stat().st_size for file in meta.parent.iterdir())
            caches.append((meta.stat().st_mtime, size, meta.parent))
    total, deleted = sum(size for _, size, _ in caches), 0
    for opened, size, cache in sorted(caches):
        if total <= KEPT_BYTES or opened > time.time() - KEPT_DAYS * 86_400:
            break
        if re.search("-[0-9a-f]{20}$", cache.name):  # nothing that somebody else put there
            with contextlib.suppress(OSError, Timeout), _lock(cache).acquire(timeout=0):
                going = cache.rename(f"{cache}.building")  # at once, so that no process opens half of it
                shutil.rmtree(going)
                total, deleted = total - size, deleted + 1
    if deleted:
        log(f"deleted {deleted:,} token caches of {folder} that no run has opened for {KEPT_DAYS} days")
