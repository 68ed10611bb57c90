"""Best-fit packing of conversations and of documents into training rows, planned from their lengths alone."""

import dataclasses
import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np

BUFFER_SIZE = 100  # conversations to choose from, as in nanochat
_ARRIVALS = 1 << 40  # above any number of conversations in one stream


def pack_rows(
    stream: Iterable[tuple[object, int]], capacity: int, buffer_size: int = BUFFER_SIZE, too_long: str = "cut"
) -> Iterator[list[tuple[object, int]]]:
    """Yield rows, lists of (item, length) whose lengths sum to at most `capacity`; what is missing there is padding.

    stream: (item, length) pairs, finite or endless. It is read lazily: the buffer is filled up before each pick.
    A pick is the longest item that still fits, of equals the earliest. When none fits, the row ends. When the stream
    ends, the buffer drains. What is too long for that is, by `too_long`,
    "cut": a conversation longer than a row is cut to fill one (its length is yielded as `capacity`);
    "block": it is never picked and keeps its place in the buffer (nanochat's rule for conversations; at the end of a
        finite stream such items are left over);
    "fill": when no item fits, the shortest in the buffer, of equals the earliest, is cut to the room that is left
        (nanochat's rule for pretraining documents): every row is full, and a last one that cannot be is dropped.

    ValueError: a length below 1; a bad argument; with "block", a buffer in which nothing can ever be picked.
    """
    if too_long not in ("cut", "block", "fill"):
        raise ValueError(f'too_long must be "cut", "block" or "fill", got {too_long!r}')
    if capacity < 1 or buffer_size < 1:
        raise ValueError(f"capacity and buffer size must be at least 1, got {capacity=} {buffer_size=}")
    cut, fill = too_long == "cut", too_long == "fill"
    # One integer orders the buffer: by length, then the later arrival first, so that the last key below a bound is
    # the pick: length * _ARRIVALS - arrival, with arrivals from 1.
    keys: list[int] = []
    waiting: dict[int, object] = {}
    arrivals = zip(itertools.count(1), stream)
    while True:
        row, room = [], capacity
        while room:
            for arrival, (item, length) in itertools.islice(arrivals, buffer_size - len(keys)):
                if length < 1:
                    raise ValueError(f"what is packed must have at least one token, got length {length} for {item!r}")
                if cut and length > capacity:
                    length = capacity
                insort(keys, length * _ARRIVALS - arrival)
                waiting[arrival] = item
            place = bisect_left(keys, room * _ARRIVALS)
            if not place:
                if not (fill and keys):
                    break
                place = bisect_left(keys, -(-keys[0] // _ARRIVALS) * _ARRIVALS)  # the earliest of the shortest
            key = keys.pop(place - 1)
            arrival = -key % _ARRIVALS
            length = min((key + arrival) // _ARRIVALS, room)
            row.append((waiting.pop(arrival), length))
            room -= length
        if row and not (fill and room):
            yield row
        elif len(keys) < buffer_size:  # the stream has ended, and what is left, if anything, is too long
            return
        else:
            raise ValueError(
                f"all {buffer_size} conversations in the packing buffer are longer than a row of {capacity} tokens, so "
                'no row can be filled any more: use longer rows, or too_long="cut"'
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of one stream: row r holds the items items[row_offsets[r] : row_offsets[r + 1]], in this order.

    row_offsets int64 [rows + 1]; items int64 [placed]: each to be read up to the room that is left in its row;
    n_tokens: those placed, after cuts, without padding; n_cut: items of which only the beginning is placed.
    """

    row_offsets: np.ndarray
    items: np.ndarray
    capacity: int
    n_tokens: int
    n_cut: int

    @property
    def n_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token of an item."""
        return self.n_tokens / max(1, self.n_rows * self.capacity)

    def row(self, r: int) -> np.ndarray:
        """The items of row r, int64 [k]."""
        return self.items[self.row_offsets[r] : self.row_offsets[r + 1]]


def plan_epoch(
    lengths: np.ndarray, order: np.ndarray, capacity: int, buffer_size: int = BUFFER_SIZE, too_long: str = "cut"
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
    return Plan(
        row_offsets=np.array(ends, np.int64),
        items=items,
        capacity=capacity,
        n_tokens=int(placed.sum()),
        n_cut=int((placed < lengths[items]).sum()),
    )
