"""From token caches to training batches: rows by number, over endless epochs, the same for any number of processes."""

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from nanochat_jax.data.packing import Plan

Batch = dict[str, np.ndarray]


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
