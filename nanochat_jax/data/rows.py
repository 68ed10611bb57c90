"""From token caches to training batches: rows by number, over endless epochs, the same for any number of processes."""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from nanochat_jax.data.packing import BUFFER_SIZE, Plan, plan_epoch
from nanochat_jax.data.token_cache import TokenCache

RENDER_LIMIT = 2048  # a conversation's tokens, as in nanochat; rows longer than this raise it to their own length
Batch = dict[str, np.ndarray]


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


Section = tuple[Plan, Callable[[int, int], tuple[np.ndarray, np.ndarray]]]  # and get(item, limit) -> (ids, mask)


class PackedRows:
    """Packed rows of T inputs by number, in an endless sequence of sections, each planned when it is first needed.

    So a run's place in the data is one integer, the number of rows it has consumed, whatever the batch size and the
    number of processes. A subclass defines `_section`, `sections_in_epoch` and `fingerprint`.
    """

    sections_in_epoch = 1
    SECTIONS_HELD = 2  # at a border the prefetching thread and the progress display need both

    def __init__(self, T: int, bos: int, seed: int):
        self.T, self.bos, self.seed = T, bos, seed
        self._held: dict[int, Section] = {}
        self._ends: list[int] = []  # rows up to the end of each section planned so far
        self._lock = threading.Lock()

    def _section(self, number: int) -> Section:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of the tokens and of how they are packed: a row number saved under another one means other data."""
        raise NotImplementedError

    def record(self, consumed: int) -> dict:
        """What a checkpoint says of the data when so many rows are consumed."""
        return {"data": self.fingerprint()}

    def plan(self, section: int) -> Plan:
        """The plan of a section, counted from 0."""
        with self._lock:
            return self._get(section)[0]

    def locate(self, row: int) -> tuple[int, int]:
        """(section, row within it), both counted from 0, of a global row number."""
        if row < 0:
            raise IndexError(f"rows are counted from 0, got {row}")
        with self._lock:
            while not self._ends or row > self._ends[-1]:  # the first row of a section needs no plan of it
                self._ends.append((self._ends[-1] if self._ends else 0) + self._get(len(self._ends))[0].n_rows)
            section = bisect_right(self._ends, row)
            return section, row - (self._ends[section - 1] if section else 0)

    def epoch_and_progress(self, row: int) -> tuple[int, float]:
        """For display, of a run that has consumed `row` rows: the epoch, counted from 1, and how much of it is done."""
        section, within = self.locate(row)
        epoch, done = divmod(section, self.sections_in_epoch)
        part = within / self.plan(section).n_rows if within else 0.0
        return epoch + 1, (done + part) / self.sections_in_epoch

    def contents(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, mask) of everything that lies in a row, at most T + 1 tokens together."""
        section, within = self.locate(row)
        with self._lock:
            plan, get = self._get(section)
        found, room = [], self.T + 1
        for item in plan.row(within):
            found.append(get(item, room))
            room -= len(found[-1][0])
        return found

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these numbers, as assemble() gives them: leaves [len(rows), T]."""
        return assemble([self.contents(int(row)) for row in rows], self.T, self.bos)

    def _get(self, number: int) -> Section:
        if number not in self._held:
            while len(self._held) >= self.SECTIONS_HELD:
                del self._held[next(iter(self._held))]
            self._held[number] = self._section(number)
        return self._held[number]


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


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, int64 [n]: as it is for epoch 0, else a permutation drawn from (seed, epoch).

    Sorted raw bits of PCG64: NumPy keeps that stream the same for ever, which it does not promise of `permutation`;
    grain's shuffle takes 10 us an element and draws epoch e of seed s + 1 like epoch e + 1 of seed s.
    """
    if not epoch:
        return np.arange(n)
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(n), kind="stable")


def assemble(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], T: int, bos: int) -> Batch:
    """Lay out rows of (ids, mask) conversations, at most T + 1 tokens a row; padding is bos, never trained.

    inputs, targets int32 [n,T]: a target is the next token, at a border the next conversation's bos.
    weights float32 [n,T]: 1 where the target is trained, else 0.
    document_start int32 [n,T]: where in the row the position's conversation begins; padding counts as one.
    """
    tokens = np.full((len(rows), T + 1), bos, np.int32)
    weights = np.zeros((len(rows), T + 1), np.float32)
    starts = np.zeros((len(rows), T + 1), np.int32)
    for r, conversations in enumerate(rows):
        at = 0
        for ids, mask in conversations:
            end = at + len(ids)
            tokens[r, at:end], weights[r, at:end], starts[r, at:end] = ids, mask, at
            at = end
        starts[r, at:] = at
    leaves = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights[:, 1:],
        "document_start": starts[:, :-1],
    }
    return {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}


def train_batches(
    rows: PackedRows,
    *,
    start_row: int,
    rows_per_step: int,
    micro_batches: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator:
    """Endless iterator of this process's batches, leaves [A, B/P, T]; close() it when done.

    Step k takes the rows from start_row + k * rows_per_step on; micro-batch a is their a-th run of B rows, and process
    p has the p-th run of B/P of those: the processes' batches, joined on axis 1, are the batch of one process.
    prefetch: steps prepared ahead by a thread; 0 prepares each when it is asked for.
    ValueError: the rows of a step cannot be split like that.
    """
    share = _share(rows_per_step, micro_batches, process_index, process_count)
    if start_row < 0:
        raise ValueError(f"start_row must be at least 0, got {start_row}")

    def step(k: int) -> Batch:
        batch = rows.batch((start_row + k * rows_per_step + share).ravel())
        return {name: leaf.reshape(*share.shape, -1) for name, leaf in batch.items()}

    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(1 << 40).map(step).to_iter_dataset(options))


def fixed_batches(
    rows: PackedRows, *, n_rows: int, rows_per_batch: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """This process's share of the first `n_rows` rows of section 0, the same at each call: leaves [B/P, T].

    No row comes twice: fewer come where the section is shorter, and the last batch is filled up with rows of padding.
    """
    share = _share(rows_per_batch, 1, process_index, process_count)[0]
    n_rows = min(n_rows, rows.plan(0).n_rows)
    for start in range(0, n_rows, rows_per_batch):
        wanted = (start + share)[start + share < n_rows]
        padding = [[]] * (len(share) - len(wanted))
        yield assemble([rows.contents(int(row)) for row in wanted] + padding, rows.T, rows.bos)


def _share(n_rows: int, micro_batches: int, process_index: int, process_count: int) -> np.ndarray:
    """Which rows of a step are this process's: offsets int64 [A, B/P]."""
    parts = micro_batches * process_count
    if min(n_rows, parts) < 1 or n_rows % parts:
        raise ValueError(
            f"a batch of {n_rows} rows cannot be split into {micro_batches} micro-batches for {process_count} "
            f"processes: its rows must be a multiple of {parts}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process index must be in 0..{process_count - 1}, got {process_index}")
    return np.arange(n_rows).reshape(micro_batches, process_count, -1)[:, process_index]


def without_documents(batch: Batch) -> Batch:
    """The batch with every row as one document: conversations see those before them, as in nanochat."""
    return batch | {"document_start": np.zeros_like(batch["document_start"])}


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
