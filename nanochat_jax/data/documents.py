"""Rows of pretraining text: documents of parquet shards as full rows, each of which begins with bos.

Rows are made as nanochat makes them: from a buffer of 1000 documents a row takes the longest that fits as a whole, and
when none does, the shortest is cut to fill it. What is cut off is lost; the lines at the start of a run say how much.
Of a document longer than a row nanochat keeps the beginning; here it becomes several pieces, each behind a bos.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat_jax.data.packing import plan_epoch
from nanochat_jax.data.rows import PackedRows, Section, shuffled
from nanochat_jax.data.shards import RENDERING, Documents
from nanochat_jax.data.token_cache import Rendering, TokenCache
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.digest import digest_of, file_digest
from nanochat_jax.files.paths import cache_dir

BUFFER_SIZE = 1000  # documents to choose from, as in nanochat


def render_documents(tokenizer, texts: Sequence[str]) -> list[Rendering]:
    """Each text as bos and its tokens, all of them trained: ids uint32 [k], mask uint8 [k]. It uses every core."""
    ids, lengths = tokenizer.encode_many(texts)
    ends = np.cumsum(lengths)
    ids = np.insert(ids, ends - lengths, tokenizer.bos)
    ends += np.arange(1, len(ends) + 1)
    ones = np.ones(len(ids), np.uint8)
    return [(ids[a:b], ones[a:b]) for a, b in zip([0, *ends[:-1]], ends)]


class Pieces(NamedTuple):
    """The pieces that a shard's documents are cut into."""

    document: np.ndarray  # int64 [pieces], which document
    start: np.ndarray  # int64 [pieces], its first token in the piece: 0 with its own bos, else behind a new one
    lengths: np.ndarray  # int64 [pieces], tokens of the piece with its bos


def split_into_pieces(lengths: np.ndarray, order: np.ndarray, T: int) -> Pieces:
    """Pieces of at most T + 1 tokens of the documents in this order; lengths: tokens of each document with its bos."""
    counts = 1 + -(-np.maximum(lengths[order] - (T + 1), 0) // T)
    document = np.repeat(order, counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.where(number > 0, 1 + number * T, 0)
    return Pieces(document, start, np.minimum(lengths[document] - start + (number > 0), T + 1))


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
        super().__init__(T, tokenizer.bos, seed, sections_in_epoch=len(shards))
        self.shards, self.tokenizer, self.buffer_size, self.log = shards, tokenizer, buffer_size, log
        sizes = [len(Documents(shard)) for shard in shards]
        if 0 in sizes:
            raise ValueError(f"{shards[sizes.index(0)]} must hold documents, it has 0 rows: take it out of the folder")
        self.n_documents = sum(sizes)
        self._tokenized_ahead: set[int] = set()  # sections

    def fingerprint(self, reached: int | None = None) -> str:
        """reached: of so many shards alone, the first ones; None: of all."""
        return digest_of(RENDERING, self._digests[:reached], self.T, self.seed, self.buffer_size)

    def record(self, consumed: int) -> dict:
        """In the first epoch it is bound to the shards reached: a later one may turn out damaged and be repaired."""
        reached = self.locate(consumed - 1)[0] + 1 if consumed else 0
        reached = reached if reached <= len(self.shards) else None
        return {"data": self.fingerprint(reached), "shards_reached": reached}

    @functools.cached_property
    def _digests(self) -> list[str]:
        return [file_digest(shard) for shard in self.shards]

    def contents(self, row: int) -> list[Rendering]:
        section, within = self.locate(row)
        if 2 * within >= self.plan(section).n_rows and section + 1 not in self._tokenized_ahead:
            self._tokenized_ahead.add(section + 1)
            threading.Thread(target=self._tokenize_ahead, args=(section + 1,), daemon=True, name="tokenize").start()
        return super().contents(row)

    def _tokenize_ahead(self, section: int) -> None:
        with contextlib.suppress(Exception):  # make_section will meet the error again
            self.cache(section)

    def cache(self, section: int) -> TokenCache:
        """The tokens of a section's shard, made now if no run has made them before."""
        epoch, place = divmod(section, len(self.shards))
        documents = Documents(self.shards[shuffled(len(self.shards), self.seed, epoch)[place]])
        render = functools.partial(render_documents, self.tokenizer)
        return TokenCache.open_or_build(documents, self.tokenizer, cache_dir() / "token_cache", self.log, render)

    def make_section(self, number: int) -> Section:
        cache = self.cache(number)
        order = shuffled(len(cache), self.seed, number if number >= len(self.shards) else 0)
        document, start, lengths = split_into_pieces(cache.lengths, order, self.T)
        plan = plan_epoch(lengths, np.arange(len(lengths)), self.T + 1, self.buffer_size, "fill")
        if not plan.n_rows:
            raise ValueError(
                f"{cache.name} has {cache.n_tokens:,} tokens in {len(cache):,} documents, too few for one row of "
                f"{self.T + 1:,}: put more into a shard, or lower --max-seq-len"
            )

        def get(piece: int, limit: int) -> Rendering:
            first = int(start[piece])
            if not first:
                return cache.get(int(document[piece]), limit)
            ids, mask = cache.get(int(document[piece]), first + limit - 1)
            return np.insert(ids[first:], 0, self.bos), np.insert(mask[first:], 0, 1)

        return Section(plan, get)


def describe_documents(rows: DocumentRows, wanted: int) -> list[str]:
    """Lines for the start of a run that takes `wanted` rows: the shards, and how the first one fills rows."""
    plan, cache = rows.plan(0), rows.cache(0)
    available = split_into_pieces(cache.lengths, np.arange(len(cache)), rows.T).lengths.sum()
    lost, epochs = 1 - plan.n_tokens / available, wanted / (plan.n_rows * len(rows.shards))
    return [
        f"Training data: {len(rows.shards):,} shards in {rows.shards[0].parent}, {rows.n_documents:,} documents",
        f"  {cache.name}: {len(cache):,} documents, {cache.n_tokens:,} tokens, packed into {plan.n_rows:,} rows of "
        f"{rows.T:,} tokens",
        f"  {plan.n_cut:,} of them end with a document that is cut to fill them, which leaves out "
        f"{100 * lost:.1f}% of the tokens",
        f"  the run's {wanted:,} rows are about {epochs:.2g} times all shards",
    ]
