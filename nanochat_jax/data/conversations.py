"""Rows of conversations for fine-tuning: a mixture of tasks, packed into rows epoch by epoch."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanochat_jax.data.packing import BUFFER_SIZE, plan_epoch
from nanochat_jax.data.rows import PackedRows, Section, shuffled
from nanochat_jax.data.token_cache import Rendering, TokenCache

RENDER_LIMIT = 2048  # tokens of a conversation, as in nanochat; rows longer than this raise it to their own length


class Counts(NamedTuple):
    """How much one source of the mixture has."""

    conversations: int
    tokens: int
    trained_tokens: int


class ConversationStore:
    """A mixture of conversations by number; each is an entry of one of several token caches."""

    def __init__(self, caches: Sequence[TokenCache], pairs: np.ndarray):
        """pairs: int [N,2], the cache and the entry of each conversation. ValueError: no pairs, or one out of range."""
        self.caches, self.pairs = caches, np.asarray(pairs, np.int64).reshape(-1, 2)
        if not len(self.pairs):
            raise ValueError("the mixture has no conversations: name at least one task that is not empty")
        if len({cache.tokenizer for cache in caches}) > 1:
            raise ValueError(f"caches of different tokenizers cannot be mixed: {[c.folder.name for c in caches]}")
        self.bos = caches[0].bos
        sizes, (source, index) = np.array([len(cache) for cache in caches]), self.pairs.T
        known = (source >= 0) & (source < len(caches))
        outside = ~known | (index < 0) | (index >= sizes[np.where(known, source, 0)])
        if outside.any():
            source, index = self.pairs[outside][0].tolist()
            sizes = [f"{c.name}: {len(c)}" for c in caches]
            raise ValueError(f"the mixture asks for (source {source}, conversation {index}); there are {sizes}")
        entry = (np.cumsum(sizes) - sizes)[source] + index  # in the caches' arrays, one after the other
        self._lengths = np.concatenate([cache.lengths for cache in caches])[entry]
        self._trained = np.concatenate([cache.trained for cache in caches]).astype(np.int64)[entry]

    def __len__(self) -> int:
        return len(self.pairs)

    def lengths(self, limit: int | None = None) -> np.ndarray:
        """Tokens of each conversation, at most `limit`, int64 [N]."""
        return self._lengths if limit is None else np.minimum(self._lengths, limit)

    def trained(self, limit: int | None = None) -> np.ndarray:
        """Trained tokens among the first `limit` of each conversation, int64 [N]."""
        if limit is None:
            return self._trained
        counts = self._trained.copy()
        for i in np.flatnonzero(self._lengths > limit):
            counts[i] = self.get(i, limit)[1].sum()
        return counts

    def get(self, i: int, limit: int | None = None) -> Rendering:
        """Conversation i, cut to its first `limit` tokens."""
        source, index = self.pairs[i]
        return self.caches[source].get(int(index), limit)

    def counts(self, limit: int | None = None) -> dict[str, Counts]:
        """What each name has in the mixture, conversations cut to `limit`; caches of one name are counted together."""
        names = list(dict.fromkeys(cache.name for cache in self.caches))
        of_conversation = np.array([names.index(cache.name) for cache in self.caches])[self.pairs[:, 0]]
        weights = (None, self.lengths(limit), self.trained(limit))
        sums = [np.bincount(of_conversation, weight, len(names)).astype(int).tolist() for weight in weights]
        return {name: Counts(*numbers) for name, *numbers in zip(names, *sums)}


class ConversationRows(PackedRows):
    """The rows of a mixture. A section is an epoch: each packs all conversations, in the order of `shuffled`."""

    def __init__(self, store: ConversationStore, T: int, *, seed: int = 0, buffer_size: int = BUFFER_SIZE):
        """ValueError: no conversation has a trained token within the cut."""
        super().__init__(T, store.bos, seed)
        self.store, self.buffer_size = store, buffer_size
        self.limit = min(max(RENDER_LIMIT, T), T + 1)  # nanochat's cut of a rendering, then that of a row
        self.lengths = store.lengths(self.limit)
        whole = store.lengths() <= self.limit
        self.n_cut = int((~whole).sum())
        if not store.trained()[whole].any() and not store.trained(self.limit).any():
            names = ", ".join(dict.fromkeys(cache.name for cache in store.caches))
            raise ValueError(
                f"no conversation of {names} has a token to train on within its first {self.limit} tokens: the "
                "assistant must say something there, so check the data, or make the rows longer"
            )

    def rows_in_epoch(self, epoch: int) -> int:
        return self.plan(epoch).n_rows

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.store.pairs.tobytes())
        content = [cache.content for cache in self.store.caches]
        digest.update(repr((content, self.T, self.seed, self.buffer_size)).encode())
        return digest.hexdigest()

    def make_section(self, number: int) -> Section:
        order = shuffled(len(self.store), self.seed, number)
        plan = plan_epoch(self.lengths, order, self.T + 1, self.buffer_size)
        return Section(plan, lambda item, room: self.store.get(item, min(room, self.limit)))


def describe_conversations(rows: ConversationRows) -> list[str]:
    """Lines for the start of a run: what each task has in the mixture, and how that fills the rows."""
    plan, lines = rows.plan(0), ["Training data:"]
    for name, n in rows.store.counts(rows.limit).items():
        lines.append(f"  {name}: {n.conversations:,} rows, {n.tokens:,} tokens, {n.trained_tokens:,} of them trained")
    lines.append(f"  packed into {plan.n_rows:,} rows of {rows.T:,} tokens, {100 * plan.fill:.1f}% full")
    if rows.n_cut:
        lines.append(f"  {rows.n_cut:,} conversations are longer than {rows.limit:,} tokens and were cut")
    return lines
