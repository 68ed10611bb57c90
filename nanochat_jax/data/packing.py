"""Best-fit packing of conversations and of documents into training rows, planned from their lengths alone."""

import dataclasses
import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

PACKING = 1  # recorded by checkpoints: raise it when the same lengths come to lie in other rows than before
BUFFER_SIZE = 100  # conversations to choose from, as in nanochat
TooLong = Literal["cut", "block", "fill"]


def pack_rows(
    stream: Iterable[tuple[object, int]], capacity: int, buffer_size: int = BUFFER_SIZE, too_long: TooLong = "cut"
) -> Iterator[list[tuple[object, int]]]:
    """Yield rows, lists of (item, length) whose lengths sum to at most `capacity`; the rest of a row is padding.

    stream: (item, length) pairs, finite or endless; it is read only to fill the buffer up before each pick. A pick is
    the longest item that still fits, of equals the earliest, and when none fits, the row ends. When the stream ends,
    the buffer is emptied. `too_long` says what becomes of items that never fit like that:
    "cut": an item longer than a row is cut to `capacity`, so it fills a row of its own;
    "block": an item longer than a row is never picked and keeps its place in the buffer, which is what nanochat does
        with conversations; at the end of a finite stream such items are left over;
    "fill": when no item fits, the shortest in the buffer, of equals the earliest, is cut to the room that is left,
        which is what nanochat does with documents: every row is full, and an incomplete last row is dropped.

    ValueError: a length below 1; a bad argument; with "block", a buffer in which nothing can ever be picked.
    """
    if too_long not in ("cut", "block", "fill"):
        raise ValueError(f'too_long must be "cut", "block" or "fill", got {too_long!r}')
    if capacity < 1 or buffer_size < 1:
        raise ValueError(f"capacity and buffer size must be at least 1, got {capacity=} {buffer_size=}")
    cut, fill = too_long == "cut", too_long == "fill"
    buffer: list[tuple[int, int, object]] = []  # (length, -arrival, item), sorted: of equals the earliest comes last
    arrivals = zip(itertools.count(), stream)
    while True:
        row, room = [], capacity
        while room:
            for arrival, (item, length) in itertools.islice(arrivals, buffer_size - len(buffer)):
                if length < 1:
                    raise ValueError(f"what is packed must have at least one token, got length {length} for {item!r}")
                insort(buffer, (min(length, capacity) if cut else length, -arrival, item))
            fitting = bisect_left(buffer, (room + 1,))
            if not fitting and fill and buffer:
                fitting = bisect_left(buffer, (buffer[0][0] + 1,))  # the shortest ones, to be cut
            if not fitting:
                break
            length, _, item = buffer.pop(fitting - 1)
            row.append((item, min(length, room)))
            room -= row[-1][1]
        if row and not (fill and room):
            yield row
        elif len(buffer) < buffer_size:  # the stream has ended, and what is left, if anything, is too long
            return
        else:
            raise ValueError(
                f"all {buffer_size} conversations in the packing buffer are longer than a row of {capacity} tokens, so "
                'no row can be filled any more: use longer rows, or too_long="cut"'
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which items lie in which row: row r holds items[row_offsets[r] : row_offsets[r + 1]], in this order."""

    row_offsets: np.ndarray  # int64 [R + 1]
    items: np.ndarray  # int64 [items placed]; an item is read up to the room that those before it leave in its row
    capacity: int  # tokens of a row
    n_tokens: int  # tokens placed, after cuts and without padding
    n_cut: int  # items of which only the beginning is placed

    @property
    def n_rows(self) -> int:
        """How many rows are planned."""
        return len(self.row_offsets) - 1

    @property
    def fill(self) -> float:
        """Tokens placed per token of capacity, 0 to 1."""
        return self.n_tokens / max(1, self.n_rows * self.capacity)

    def row(self, r: int) -> np.ndarray:
        """The items of row r, int64 [k]."""
        return self.items[self.row_offsets[r] : self.row_offsets[r + 1]]


def plan_epoch(
    lengths: np.ndarray, order: np.ndarray, capacity: int, buffer_size: int = BUFFER_SIZE, too_long: TooLong = "cut"
) -> Plan:
    """Pack each item of `order` once, by the rules of `pack_rows`; "fill" may leave out a few at the end.

    lengths: tokens of each item, int [N]; order: indices into it, int [n]. Where nothing is too long, the rows are
    nanochat's for one process, up to the point where its stream would begin the next epoch.
    """
    lengths, order = np.asarray(lengths), np.asarray(order, np.int64)
    items, placed, ends = [], [], [0]
    for row in pack_rows(zip(order.tolist(), lengths[order].tolist()), capacity, buffer_size, too_long):
        for item, length in row:
            items.append(item)
            placed.append(length)
        ends.append(len(items))
    items, placed = np.array(items, np.int64), np.array(placed, np.int64)
    return Plan(np.array(ends, np.int64), items, capacity, int(placed.sum()), int((placed < lengths[items]).sum()))
