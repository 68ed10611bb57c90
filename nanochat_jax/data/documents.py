"""Pretraining data: documents of parquet shards as full rows, each of which begins with bos.

Rows are made as nanochat makes them: from a buffer of 1000 documents a row takes the longest that fits as a whole, and
when none does, the shortest is cut to fill it. What is cut off is lost; `describe` says how much that is. Of a document
that is longer than a row nanochat keeps the beginning; here it is several pieces of a row, each behind a bos.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nanochat_jax.data.packing import plan_epoch
from nanochat_jax.data.rows import PackedRows, Section, shuffled
from nanochat_jax.data.shards import RENDERING, Documents
from nanochat_jax.data.token_cache import TokenCache
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.digest import digest_of, file_digest
from nanochat_jax.files.paths import base_dir

BUFFER_SIZE = 1000  # documents to choose from, as in nanochat


def render(tokenizer, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each text as (ids uint32 [k], mask uint8 [k] of ones): bos, then its tokens, with every core at work."""
    ids, lengths = tokenizer.encode_many(texts)
    ends = np.cumsum(lengths)
    ids = np.insert(ids, ends - lengths, tokenizer.bos)
    ends += np.arange(1, len(ends) + 1)
    ones = np.ones(len(ids), np.uint8)
    return [(ids[a:b], ones[a:b]) for a, b in zip([0, *ends[:-1]], ends)]


class DocumentRows(PackedRows):
    """The rows of some shards. A section is a shard: epoch 0 takes shards and documents in their own order, epoch e in
    permutations drawn from the seed. A shard is tokenized when its first row is near, so that training starts early."""

    def __init__(
        self,
        shards: Sequence[Path],
        tokenizer,
        T: int,
        *,
        seed: int = 0,
        buffer_size: int = BUFFER_SIZE,
        log: Callable = print0,
    ):
        """Reads the footers of all shards. ValueError: one that is empty or cannot be used, see Documents."""
        super().__init__(T, tokenizer.bos, seed)
        self.shards, self.tokenizer, self.buffer_size, self.log = shards, tokenizer, buffer_size, log
        sizes = [len(Documents(shard)) for shard in shards]
        if 0 in sizes:
            raise ValueError(f"{shards[sizes.index(0)]} must hold documents, it has 0 rows: take it out of the folder")
        self.n_documents = sum(sizes)
        self.sections_in_epoch = len(shards)
        self._prepared: set[int] = set()

    def fingerprint(self, reached: int | None = None) -> str:
        """reached: of so many shards alone, the first ones; None: of all."""
        return digest_of(RENDERING, self._digests[:reached], self.T, self.seed, self.buffer_size)

    def record(self, consumed: int) -> dict:
        """In the first epoch the shards that follow may still change: one that turns out damaged can be repaired."""
        reached = self.locate(consumed - 1)[0] + 1 if consumed else 0
        reached = reached if reached <= len(self.shards) else None
        return {"data": self.fingerprint(reached), "shards_reached": reached}

    @functools.cached_property
    def _digests(self) -> list[str]:
        return [file_digest(shard) for shard in self.shards]

    def contents(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        section, within = self.locate(row)
        if 2 * within >= self.plan(section).n_rows and section + 1 not in self._prepared:
            self._prepared.add(section + 1)
            threading.Thread(target=self._prepare, args=(section + 1,), daemon=True, name="tokenize").start()
        return super().contents(row)

    def cache(self, section: int) -> TokenCache:
        """The tokens of a section's shard, made now if no run has made them before."""
        epoch, place = divmod(section, len(self.shards))
        documents = Documents(self.shards[shuffled(len(self.shards), self.seed, epoch)[place]])
        how = {"log": self.log, "render": functools.partial(render, self.tokenizer)}
        return TokenCache.open_or_build(documents, self.tokenizer, base_dir() / "token_cache", **how)

    def _prepare(self, section: int) -> None:
        with contextlib.suppress(Exception):  # whoever needs the section will meet the error
            self.cache(section)

    def _section(self, number: int) -> Section:
        cache = self.cache(number)
        order = shuffled(len(cache), self.seed, number if number >= len(self.shards) else 0)
        document, start, lengths = pieces(cache.lengths, order, self.T)
        plan = plan_epoch(lengths, np.arange(len(lengths)), self.T + 1, self.buffer_size, "fill")
        if not plan.n_rows:
            raise ValueError(
                f"{cache.name} has {cache.n_tokens:,} tokens in {len(cache):,} documents, too few for one row of "
                f"{self.T + 1:,}: put more into a shard, or lower --max-seq-len"
            )

        def get(piece: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
            first = int(start[piece])
            if not first:
                return cache.get(int(document[piece]), limit)
            ids, mask = cache.get(int(document[piece]), first + limit - 1)
            return np.insert(ids[first:], 0, self.bos), np.insert(mask[first:], 0, 1)

        return plan, get


def pieces(lengths: np.ndarray, order: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of `lengths` tokens, bos counted, taken in this order and in pieces of at most T + 1 tokens.

    -> int64 [pieces] each: the document; its first token in the piece (from 0 on with its own bos, else behind a new
    one); the piece's tokens, bos counted."""
    counts = 1 + -(-np.maximum(lengths[order] - (T + 1), 0) // T)
    document = np.repeat(order, counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.where(number > 0, 1 + number * T, 0)
    return document, start, np.minimum(lengths[document] - start + (number > 0), T + 1)


def describe(rows: DocumentRows, wanted: int) -> list[str]:
    """Lines for the start of a run that takes `wanted` rows: the shards, and how the first one fills rows."""
    plan, cache = rows.plan(0), rows.cache(0)
    available = pieces(cache.lengths, np.arange(len(cache)), rows.T)[2].sum()
    lost, epochs = 1 - plan.n_tokens / available, wanted / (plan.n_rows * len(rows.shards))
    return [
        f"Training data: {len(rows.shards):,} shards in {rows.shards[0].parent}, {rows.n_documents:,} documents",
        f"  {cache.name}: {len(cache):,} documents, {cache.n_tokens:,} tokens, packed into {plan.n_rows:,} rows of "
        f"{rows.T:,} tokens",
        f"  {plan.n_cut:,} of them end with a document that is cut to fill them, which leaves out "
        f"{100 * lost:.1f}% of the tokens",
        f"  the run's {wanted:,} rows are about {epochs:.2g} times all shards",
    ]
