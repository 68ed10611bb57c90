import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data.packing import pack_rows, plan_epoch


def plain_rows(stream, capacity, buffer_size, too_long):
    """The rule in the plainest words: look through the whole buffer for each pick."""
    stream, buffer = iter(stream), []
    while True:
        row, room = [], capacity
        while room > 0:
            while len(buffer) < buffer_size and (entry := next(stream, None)) is not None:
                item, length = entry
                buffer.append((item, min(length, capacity) if too_long == "cut" else length))
            best = None
            for place, (_, length) in enumerate(buffer):
                if length <= room and (best is None or length > buffer[best][1]):
                    best = place
            if best is None:
                break
            row.append(buffer.pop(best))
            room -= row[-1][1]
        if not row:
            return
        yield row


lengths = st.lists(st.integers(1, 30), max_size=80)


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(1, 24), st.integers(1, 12))
def test_cut_rows_are_those_of_the_plain_rule_and_hold_each_conversation_once(lengths, capacity, buffer_size):
    rows = list(pack_rows(enumerate(lengths), capacity, buffer_size))
    assert rows == list(plain_rows(enumerate(lengths), capacity, buffer_size, "cut"))
    assert sorted(itertools.chain(*rows)) == [(i, min(n, capacity)) for i, n in enumerate(lengths)]
    assert all(0 < sum(length for _, length in row) <= capacity for row in rows)


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(12, 24), st.integers(1, 12))
def test_blocked_rows_are_those_of_the_plain_rule(lengths, capacity, buffer_size):
    if sum(n > capacity for n in lengths) >= buffer_size:
        with pytest.raises(ValueError, match="longer than a row"):
            list(pack_rows(enumerate(lengths), capacity, buffer_size, too_long="block"))
        return
    rows = list(pack_rows(enumerate(lengths), capacity, buffer_size, too_long="block"))
    assert rows == list(plain_rows(enumerate(lengths), capacity, buffer_size, "block"))
    assert sorted(itertools.chain(*rows)) == [(i, n) for i, n in enumerate(lengths) if n <= capacity]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(1, 24), st.integers(1, 12), st.randoms())
def test_a_plan_holds_the_rows_of_its_order(lengths, capacity, buffer_size, random):
    order = random.sample(range(len(lengths)), random.randint(1, len(lengths)))
    plan = plan_epoch(np.array(lengths), np.array(order), capacity, buffer_size)
    rows = list(pack_rows(((i, lengths[i]) for i in order), capacity, buffer_size))
    assert [plan.row(r).tolist() for r in range(plan.n_rows)] == [[i for i, _ in row] for row in rows]
    assert sorted(plan.items.tolist()) == sorted(order)
    assert plan.n_tokens == sum(length for row in rows for _, length in row)
    assert plan.n_cut == sum(lengths[i] > capacity for i in order)
    assert 0 < plan.fill <= 1 and plan.fill == plan.n_tokens / (plan.n_rows * capacity)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=60), st.integers(1, 12))
def test_a_plan_begins_with_the_rows_of_an_endless_stream(lengths, buffer_size):
    """nanochat's stream starts over where the plan drains its buffer: rows agree until the data has been read once."""
    taken = []

    def endless():
        for entry in itertools.cycle(enumerate(lengths)):
            taken.append(entry)
            yield entry

    plan = plan_epoch(np.array(lengths), np.arange(len(lengths)), 24, buffer_size)
    for r, row in enumerate(pack_rows(endless(), 24, buffer_size)):
        if len(taken) > len(lengths):
            break
        assert plan.row(r).tolist() == [i for i, _ in row]


def test_the_longest_that_fits_goes_first_and_of_equals_the_earliest():
    stream = [("a", 3), ("b", 5), ("c", 3), ("d", 5), ("e", 1)]
    assert list(pack_rows(stream, 9)) == [[("b", 5), ("a", 3), ("e", 1)], [("d", 5), ("c", 3)]]


def test_the_buffer_is_filled_up_before_every_pick():
    read = []
    stream = ((i, length) for i, length in enumerate([4, 2, 1, 3, 2, 2, 2]) if not read.append(i))
    rows = pack_rows(stream, 6, buffer_size=2)
    assert next(rows) == [(0, 4), (1, 2)]
    assert read == [0, 1, 2]  # the row was full at the second pick: nothing more is read for it
    assert next(rows) == [(3, 3), (4, 2), (2, 1)]


def test_a_row_ends_when_nothing_fits_and_what_did_not_fit_is_kept():
    assert list(pack_rows([("a", 6), ("b", 5)], 8)) == [[("a", 6)], [("b", 5)]]


def test_a_too_long_conversation_fills_a_row_or_blocks_its_place():
    stream = [("a", 2), ("long", 9), ("b", 3), ("c", 2)]
    assert list(pack_rows(stream, 5, buffer_size=2)) == [[("long", 5)], [("b", 3), ("a", 2)], [("c", 2)]]
    blocked = list(pack_rows(stream, 5, buffer_size=2, too_long="block"))
    assert blocked == [[("a", 2), ("b", 3)], [("c", 2)]]


def test_a_buffer_of_too_long_conversations_is_an_error_not_endless_padding():
    with pytest.raises(ValueError, match=r"all 3 conversations in the packing buffer are longer than a row of 5"):
        list(pack_rows(itertools.cycle([("a", 2), ("b", 9)]), 5, buffer_size=3, too_long="block"))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        list(pack_rows([("a", 0)], 5))
    with pytest.raises(ValueError, match="too_long must be"):
        next(pack_rows([], 5, too_long="drop"))
    with pytest.raises(ValueError, match="must be at least 1"):
        next(pack_rows([], 0))


def test_nothing_makes_no_rows():
    assert list(pack_rows([], 5)) == []
    plan = plan_epoch(np.zeros(0, np.int64), np.zeros(0, np.int64), 5)
    assert (plan.n_rows, plan.n_tokens, plan.fill) == (0, 0, 0)


def plain_full_rows(lengths, capacity, buffer_size):
    """nanochat's rule for documents in the plainest words; a last row that cannot be filled is dropped."""
    stream, buffer = iter(enumerate(lengths)), []
    while True:
        row, room = [], capacity
        while room > 0:
            while len(buffer) < buffer_size and (entry := next(stream, None)) is not None:
                buffer.append(entry)
            if not buffer:
                return
            fitting = [length for _, length in buffer if length <= room]
            wanted = max(fitting) if fitting else min(length for _, length in buffer)
            place = next(i for i, (_, length) in enumerate(buffer) if length == wanted)
            item, length = buffer.pop(place)
            row.append((item, min(length, room)))
            room -= row[-1][1]
        yield row


@settings(max_examples=300, deadline=None)
@given(lengths, st.integers(1, 24), st.integers(1, 12))
def test_full_rows_are_those_of_the_plain_rule_and_hold_no_document_twice(lengths, capacity, buffer_size):
    rows = list(pack_rows(enumerate(lengths), capacity, buffer_size, too_long="fill"))
    assert rows == list(plain_full_rows(lengths, capacity, buffer_size))
    assert all(sum(length for _, length in row) == capacity for row in rows)
    assert all(length == lengths[item] for row in rows for item, length in row[:-1])  # only the last one is cut
    placed = [item for row in rows for item, _ in row]
    assert len(placed) == len(set(placed))
    assert sum(lengths[i] for i in set(range(len(lengths))) - set(placed)) < capacity
    plan = plan_epoch(np.array(lengths, int), np.arange(len(lengths)), capacity, buffer_size, "fill")
    assert [plan.row(r).tolist() for r in range(plan.n_rows)] == [[item for item, _ in row] for row in rows]
    assert plan.n_tokens == plan.n_rows * capacity
    assert plan.n_cut == sum(row[-1][1] < lengths[row[-1][0]] for row in rows)


def test_when_no_document_fits_the_shortest_is_cut_of_equals_the_earliest():
    stream = [("a", 5), ("b", 4), ("c", 4), ("d", 9), ("e", 2), ("f", 7)]
    rows = list(pack_rows(stream, 8, buffer_size=4, too_long="fill"))
    # a fits best in 8, then of b, c, d, e: e (2 of 3), then none of b, c, d, f fits in 1: b is the earliest shortest
    assert rows == [[("a", 5), ("e", 2), ("b", 1)], [("f", 7), ("c", 1)], [("d", 8)]]
