"""Packed rows, each found by its number, and the batches that they make: the same for any number of processes."""

import functools
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from nanochat_jax.data.packing import Plan
from nanochat_jax.data.token_cache import Rendering

SECTIONS_HELD = 2  # the one that is being read, and at its end the next one


class Batch(TypedDict):
    """R packed rows of T tokens. Training takes them as A micro-batches of B rows, [A,B,T]; RL adds float32 arrays of
    the same shape, a number for each target."""

    inputs: np.ndarray  # int32 [R,T]
    targets: np.ndarray  # int32 [R,T], the next token; at the end of a conversation the next one's bos
    weights: np.ndarray  # float32 [R,T], 1 where the target is trained, else 0
    document_start: np.ndarray  # int32 [R,T], the place in the row where the token's conversation or document begins


class Section(NamedTuple):
    """Rows that are planned together: an epoch of conversations, or one shard of documents."""

    plan: Plan
    get: Callable[[int, int], Rendering]  # (item of the plan, limit) -> the first `limit` tokens of the item


class PackedRows(ABC):
    """Packed rows of T inputs, numbered through an endless sequence of sections, each planned when it is first needed.

    So a run's place in the data is one integer, the number of rows it has consumed, whatever the batch size and the
    number of processes. Several threads may read at once.
    """

    def __init__(self, T: int, bos: int, seed: int, sections_in_epoch: int = 1):
        self.T, self.bos, self.seed, self.sections_in_epoch = T, bos, seed, sections_in_epoch
        self._ends: list[int] = []  # for each section planned so far: the number of rows up to its end
        self._lock = threading.RLock()
        self._section = functools.lru_cache(SECTIONS_HELD)(self.make_section)

    @abstractmethod
    def make_section(self, number: int) -> Section:
        """Plan the section of this number, counted from 0 over all epochs."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the tokens and of how they are packed: a row number saved under another one means other data."""

    def record(self, consumed: int) -> dict:
        """What a checkpoint says of the data when so many rows are consumed."""
        return {"data": self.fingerprint()}

    def section(self, number: int) -> Section:
        """The section of this number, planned now where it is not yet."""
        with self._lock:  # else two threads could plan the same one
            return self._section(number)

    def plan(self, section: int) -> Plan:
        """How the section of this number is packed."""
        return self.section(section).plan

    def locate(self, row: int) -> tuple[int, int]:
        """(section, row within it), both counted from 0, of a row number."""
        if row < 0:
            raise IndexError(f"rows are counted from 0, got {row}")
        with self._lock:
            while not self._ends or row > self._ends[-1]:  # the first row of a section needs no plan of it
                self._ends.append((self._ends[-1] if self._ends else 0) + self.plan(len(self._ends)).n_rows)
            section = bisect_right(self._ends, row)
            return section, row - (self._ends[section - 1] if section else 0)

    def epoch(self, row: int) -> int:
        """The epoch that a row lies in, counted from 1."""
        return self.locate(row)[0] // self.sections_in_epoch + 1

    def contents(self, row: int) -> list[Rendering]:
        """Everything that lies in a row, at most T + 1 tokens together."""
        section, within = self.locate(row)
        plan, get = self.section(section)
        found, room = [], self.T + 1
        for item in plan.row(within):
            found.append(get(item, room))
            room -= len(found[-1][0])
        return found

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these numbers."""
        return assemble([self.contents(int(row)) for row in rows], self.T, self.bos)


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, int64 [n]: 0, 1, 2, ... for epoch 0, else a permutation drawn from (seed, epoch).

    It sorts raw bits of PCG64, a stream that NumPy keeps the same for ever, as it does not promise of `permutation`;
    grain's shuffle takes 10 us an element, and draws epoch e of seed s + 1 like epoch e + 1 of seed s.
    """
    if not epoch:
        return np.arange(n)
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(n), kind="stable")


def assemble(rows: Sequence[Sequence[Rendering]], T: int, bos: int) -> Batch:
    """Lay out rows of at most T + 1 tokens; padding is bos, never trained, and counts as a document of its own."""
    tokens = np.full((len(rows), T + 1), bos, np.int32)
    weights = np.zeros((len(rows), T + 1), np.float32)
    starts = np.zeros((len(rows), T + 1), np.int32)
    for r, renderings in enumerate(rows):
        at = 0
        for ids, mask in renderings:
            end = at + len(ids)
            tokens[r, at:end], weights[r, at:end], starts[r, at:end] = ids, mask, at
            at = end
        starts[r, at:] = at
    return Batch(
        inputs=np.ascontiguousarray(tokens[:, :-1]),
        targets=np.ascontiguousarray(tokens[:, 1:]),
        weights=np.ascontiguousarray(weights[:, 1:]),
        document_start=np.ascontiguousarray(starts[:, :-1]),
    )
