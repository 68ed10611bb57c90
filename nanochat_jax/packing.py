"""Best-fit packing of conversations into training rows, planned from their lengths alone."""

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
    ends, the buffer drains. A conversation longer than a row is either cut to fill one (too_long="cut": its length is
    yielded as `capacity`) or never picked while it keeps its place in the buffer (too_long="block", nanochat's rule;
    at the end of a finite stream such items are left over).

    ValueError: a length below 1; a bad argument; with "block", a buffer in which nothing can ever be picked.
    """
    if too_long not in ("cut", "block"):
        raise ValueError(f'too_long must be "cut" or "block", got {too_long!r}')
    if capacity < 1 or buffer_size < 1:
        raise ValueError(f"capacity and buffer size must be at least 1, got {capacity=} {buffer_size=}")
    cut = too_long == "cut"
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
                    raise ValueError(f"a conversation must have at least one token, got length {length} for {item!r}")
                if cut and length > capacity:
                    length = capacity
                insort(keys, length * _ARRIVALS - arrival)
                waiting[arrival] = item
            place = bisect_left(keys, room * _ARRIVALS)
            if not place:
                break
            key = keys.pop(place - 1)
            arrival = -key % _ARRIVALS
            length = (key + arrival) // _ARRIVALS
            row.append((waiting.pop(arrival), length))
            room -= length
        if row:
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
    """The rows of one epoch: row r holds the conversations items[row_offsets[r] : row_offsets[r + 1]], in this order.

    row_offsets int64 [rows + 1]; items int64 [conversations]; n_tokens: those placed, after cuts, without padding;
    n_cut: conversations that were longer than a row.
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
        """Share of the rows' places that hold a token of a conversation."""
        return self.n_tokens / max(1, self.n_rows * self.capacity)

    def row(self, r: int) -> np.ndarray:
        """The conversations of row r, int64 [k]."""
        return self.items[self.row_offsets[r] : self.row_offsets[r + 1]]


def plan_epoch(lengths: np.ndarray, order: np.ndarray, capacity: int, buffer_size: int = BUFFER_SIZE) -> Plan:
    """Pack each conversation of `order` exactly once; those longer than a row are cut to one.

    lengths: tokens of each conversation, int [N]; order: indices into it, int [n]. Where nothing is too long, the rows
    are nanochat's for one process, up to the point where its stream would begin the next epoch.
    """
    lengths, order = np.asarray(lengths), np.asarray(order, np.int64)
    ordered = lengths[order]
    rows = pack_rows(zip(order.tolist(), ordered.tolist()), capacity, buffer_size)
    items, ends = [], [0]
    for row in rows:
        items.extend(item for item, _ in row)
        ends.append(len(items))
    return Plan(
        row_offsets=np.array(ends, np.int64),
        items=np.array(items, np.int64),
        capacity=capacity,
        n_tokens=int(np.minimum(ordered, capacity).sum()),
        n_cut=int((ordered > capacity).sum()),
    )
