"""Rows of conversations for fine-tuning: a mixture of tasks, tokenized once and packed into rows epoch by epoch."""

import hashlib
from collections.abc import Sequence

import numpy as np

from nanochat_jax.data.packing import BUFFER_SIZE, plan_epoch
from nanochat_jax.data.rows import PackedRows, Section, shuffled
from nanochat_jax.data.token_cache import TokenCache

RENDER_LIMIT = 2048  # a conversation's tokens, as in nanochat; rows longer than this raise it to their own length


class ConversationStore:
    """A mixture: conversation i is entry pairs[i] = (source, index) of the sources' caches."""

    def __init__(self, caches: Sequence[TokenCache], pairs: np.ndarray):
        """caches: one for each source, equal ones held once; pairs: int [N,2]. ValueError: empty or out of range."""
        pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
        if not len(pairs):
            raise ValueError("the mixture has no conversations: name at least one task that is not empty")
        if len({cache.tokenizer for cache in caches}) > 1:
            raise ValueError(f"caches of different tokenizers cannot be mixed: {[c.folder.name for c in caches]}")
        held: dict[str, TokenCache] = {}
        self.caches = [held.setdefault(cache.key, cache) for cache in caches]
        self.pairs, self.bos = pairs, caches[0].bos
        self._lengths = np.zeros(len(pairs), np.int64)
        self._trained = np.zeros(len(pairs), np.int64)
        in_range = np.zeros(len(pairs), bool)
        for source, cache in enumerate(self.caches):
            ours = np.flatnonzero(pairs[:, 0] == source)
            index = pairs[ours, 1]
            in_range[ours] = (index >= 0) & (index < len(cache))
            if in_range[ours].all():
                self._lengths[ours], self._trained[ours] = cache.lengths[index], cache.trained[index]
        if not in_range.all():
            source, index = pairs[~in_range][0].tolist()
            sizes = [f"{c.name}: {len(c)}" for c in self.caches]
            raise ValueError(f"the mixture asks for (source {source}, conversation {index}); there are {sizes}")

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

    def get(self, i: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Conversation i cut to `limit` tokens: ids uint16 or uint32 [k], mask uint8 [k]."""
        source, index = self.pairs[i]
        return self.caches[source].get(int(index), limit)

    def report(self, limit: int | None = None) -> list[dict]:
        """For each source: name, conversations, tokens and trained_tokens of its share, cut to `limit`."""
        n = len(self.caches)
        source = self.pairs[:, 0]
        sums = [np.bincount(source, values, n) for values in (None, self.lengths(limit), self.trained(limit))]
        fields = ("conversations", "tokens", "trained_tokens")
        return [
            {"name": cache.name} | {field: int(total[s]) for field, total in zip(fields, sums)}
            for s, cache in enumerate(self.caches)
        ]


class RowSource(PackedRows):
    """The rows of a mixture of conversations. A section is an epoch: epoch 0 packs the mixture in its own order, epoch
    e in a permutation drawn from (seed, e)."""

    def __init__(self, store: ConversationStore, T: int, *, seed: int = 0, buffer_size: int = BUFFER_SIZE):
        """ValueError: no conversation has a trained token within the cut."""
        super().__init__(T, store.bos, seed)
        self.store, self.buffer_size = store, buffer_size
        self.limit = min(max(RENDER_LIMIT, T), T + 1)  # nanochat's cut of a rendering, then that of a row
        self.lengths = store.lengths(self.limit)
        self.n_cut = int((store.lengths() > self.limit).sum())
        whole = store.lengths() <= self.limit
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

    def _section(self, number: int) -> Section:
        order = shuffled(len(self.store), self.seed, number)
        plan = plan_epoch(self.lengths, order, self.T + 1, self.buffer_size)
        return plan, lambda item, room: self.store.get(item, min(room, self.limit))


def describe(rows: RowSource) -> list[str]:
    """Lines for the start of a run: conversations and tokens by source, and how they fill the rows."""
    plan, lines = rows.plan(0), ["Training data:"]
    merged: dict[str, list[int]] = {}
    for part in rows.store.report(rows.limit):
        numbers = [part["conversations"], part["tokens"], part["trained_tokens"]]
        merged[part["name"]] = [a + b for a, b in zip(merged.get(part["name"], [0, 0, 0]), numbers)]
    for name, (conversations, tokens, trained) in merged.items():
        lines.append(f"  {name}: {conversations:,} rows, {tokens:,} tokens, {trained:,} of them trained")
    lines.append(f"  packed into {plan.n_rows:,} rows of {rows.T:,} tokens, {100 * plan.fill:.1f}% full")
    if rows.n_cut:
        lines.append(f"  {rows.n_cut:,} conversations are longer than {rows.limit:,} tokens and were cut")
    return lines
