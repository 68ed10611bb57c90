"""Rows of conversations for fine-tuning: a mixture of tasks, packed into rows epoch by epoch."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat_jax.data.packing import BUFFER_SIZE, Plan, plan_epoch
from nanochat_jax.data.rows import PackedRows, Section, shuffled
from nanochat_jax.data.token_cache import Rendering, TokenCache, open_caches
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.digest import digest_of
from nanochat_jax.tasks.mixture import TaskSequence
from nanochat_jax.tasks.task import Task

RENDER_LIMIT = 2048  # tokens of a conversation, as in nanochat; rows longer than this raise it to their own length
FEWEST = 2000  # conversations that are tokenized at once for a run that reads no whole epoch


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

    def __init__(
        self,
        store: ConversationStore,
        T: int,
        *,
        seed: int = 0,
        buffer_size: int = BUFFER_SIZE,
        mixture_size: int | None = None,
    ):
        """mixture_size: where the store has only the first conversations of a mixture, how many that has. Then there
        are only the rows of epoch 0 that are the same without the others.

        ValueError: no conversation has a trained token within the cut."""
        super().__init__(T, store.bos, seed)
        self.store, self.buffer_size, self.mixture_size = store, buffer_size, mixture_size
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
        """How many rows an epoch, counted from 0, is packed into."""
        return self.plan(epoch).n_rows

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.store.pairs.tobytes())
        content = [cache.content for cache in self.store.caches]
        digest.update(repr((content, self.T, self.seed, self.buffer_size)).encode())
        return digest.hexdigest()

    def make_section(self, number: int) -> Section:
        order = shuffled(len(self.store), self.seed, number)
        plan = plan_epoch(self.lengths, order, self.T + 1, self.buffer_size)
        if self.mixture_size is not None:
            assert not number, "only the first rows of epoch 0 are there"
            plan = self._settled(plan)
        return Section(plan, lambda item, room: self.store.get(item, min(room, self.limit)))

    def _settled(self, plan: Plan) -> Plan:
        """The rows of a plan that do not depend on conversations behind those planned.

        When k conversations are placed the packing has seen the first k + buffer_size: they decide what comes next."""
        n = int(np.searchsorted(plan.row_offsets[1:], len(self.store) - self.buffer_size, "right"))
        offsets = plan.row_offsets[: n + 1]
        items = plan.items[: offsets[-1]]
        n_tokens = int(self.lengths[items].sum())  # nothing is cut: they are no longer than a row
        return dataclasses.replace(plan, row_offsets=offsets, items=items, n_tokens=n_tokens)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some conversations of a task, for a token cache."""

    task: Task
    numbers: np.ndarray  # int64 [n], ascending: which they are

    @property
    def name(self) -> str:
        """That of the task."""
        return self.task.name

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> dict:
        return self.task[int(self.numbers[i])]

    def fingerprint(self) -> str:
        """Hash of the task and of which of its conversations these are."""
        return digest_of(self.task.fingerprint(), hashlib.sha256(self.numbers.tobytes()).hexdigest())


def choose_first(mixture: TaskSequence, size: int) -> tuple[list[Chosen], np.ndarray]:
    """What is needed of each task for the first `size` conversations, and these as pairs int64 [size,2] of them."""
    distinct = list(
        {id(task): task for task in mixture.tasks}.values()
    )  # a task of several epochs is named several times
    number_of = {id(task): number for number, task in enumerate(distinct)}
    pairs = mixture.pairs[:size].astype(np.int64)
    pairs[:, 0] = np.array([number_of[id(task)] for task in mixture.tasks])[pairs[:, 0]]
    chosen = []
    for source in np.unique(pairs[:, 0]):
        mine = pairs[:, 0] == source
        numbers, places = np.unique(pairs[mine, 1], return_inverse=True)
        pairs[mine, 0], pairs[mine, 1] = len(chosen), places
        chosen.append(Chosen(distinct[source], numbers))
    return chosen, pairs


def first_rows(
    mixture: TaskSequence, tokenizer, folder: Path, T: int, *, seed: int, wanted: int, log: Callable = print0
) -> ConversationRows | None:
    """At least `wanted` rows of a mixture's first epoch, of which no more conversations are tokenized than about these
    rows need; None where that is most of the mixture. Rows are the same as of the whole mixture.
    """
    size = FEWEST
    while 2 * size < len(mixture):
        chosen, pairs = choose_first(mixture, size)
        store = ConversationStore(open_caches(chosen, tokenizer, folder, log), pairs)
        rows = ConversationRows(store, T, seed=seed, mixture_size=len(mixture))
        if (found := rows.rows_in_epoch(0)) >= wanted:
            return rows
        size = max(2 * size, BUFFER_SIZE + int(1.1 * (size - BUFFER_SIZE) * wanted / max(found, 1)))
    return None


def describe_conversations(rows: ConversationRows) -> list[str]:
    """Lines for the start of a run: what each task has in the mixture, and how that fills the rows."""
    plan, lines = rows.plan(0), ["Training data:"]
    if rows.mixture_size is not None:
        lines = [f"Training data, the first {len(rows.store):,} of {rows.mixture_size:,} conversations:"]
    for name, n in rows.store.counts(rows.limit).items():
        lines.append(f"  {name}: {n.conversations:,} rows, {n.tokens:,} tokens, {n.trained_tokens:,} of them trained")
    lines.append(f"  packed into {plan.n_rows:,} rows of {rows.T:,} tokens, {100 * plan.fill:.1f}% full")
    if rows.n_cut:
        lines.append(f"  {rows.n_cut:,} conversations are longer than {rows.limit:,} tokens and were cut")
    return lines
