"""The last answers go on in fewer rows: the same answers, sooner.

Run: python -m pytest tests/inference/test_tail.py
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.inference import scheduler
from nanochat_jax.inference.decode import GenerationPrograms
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tail import FEWEST_ROWS, fewest_rows, tail_shapes
from nanochat_jax.inference.tools import Tool, Toolbox
from tests.support.models import tiny_config
from tests.support.scripted import END, call, scripted_engine

CONFIG = tiny_config(vocab_size=265, padded_vocab=320, n_layer=2, windows=(7, -1))  # a ring that turns
LONG = SamplingParams(max_new_tokens=60)


def test_shapes_are_a_sixteenth_and_a_quarter_of_the_rows():
    assert tail_shapes(16, 16) == [(16, 1), (32, 2)]
    assert tail_shapes(256, 1) == [(16, 1), (64, 1)]
    assert tail_shapes(10, 3) == [(4, 1), (8, 1)]
    assert tail_shapes(1, 16) == [(2, 2)]
    assert tail_shapes(2, 2) == tail_shapes(1, 1) == []


def test_rows_of_a_prompt_stay_together_and_each_on_its_device():
    prompts = [0, -1, 0, 0] + [-1, -1, 1, -1] + [-1, 2, -1, -1] + [-1] * 4
    table = fewest_rows(prompts, 2, [(1, 2), (2, 2), (4, 2)])
    assert table.tolist() == [[[0, 2], [3, -1], [6, -1], [-1, -1]], [[9, -1]] + [[-1, -1]] * 3]
    assert fewest_rows(prompts, 1, [(2, 2), (4, 2)]).tolist() == [[[0, 2], [3, -1], [6, -1], [9, -1]]]
    assert fewest_rows(prompts, 1, [(2, 2)]) is None and fewest_rows(prompts, 1, []) is None


@given(groups=st.integers(1, 9), rows=st.integers(1, 9), devices=st.integers(1, 3), data=st.data())
def test_every_row_that_is_left_goes_on_once_in_a_group_of_its_prompt(groups, rows, devices, data):
    shapes = tail_shapes(groups, rows)
    sizes = [count * each for count, each in shapes]
    assert all(FEWEST_ROWS <= size < groups * rows for size in sizes) and sizes == sorted(set(sizes))
    assert all(count <= 2 * groups for count, _ in shapes)
    left = data.draw(st.lists(st.booleans(), min_size=devices * groups * rows, max_size=devices * groups * rows))
    prompts = [r // rows if here else -1 for r, here in enumerate(left)]
    table = fewest_rows(prompts, devices, shapes)
    if table is None:
        return
    assert sorted(table[table >= 0]) == [r for r, here in enumerate(left) if here]
    for device, kept in enumerate(table):
        assert all(r < 0 or r // (groups * rows) == device for r in kept.ravel())
        assert all(len({prompts[r] for r in group if r >= 0}) <= 1 for group in kept)


@pytest.fixture
def sizes(monkeypatch):
    """Rows of each device call, as they come."""
    found, decode = [], GenerationPrograms.decode

    def counted(self, params, prompt, continuation, slots, settings):
        found.append(len(slots.token))
        return decode(self, params, prompt, continuation, slots, settings)

    monkeypatch.setattr(GenerationPrograms, "decode", counted)
    return found


def assert_same(ours, theirs):
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_allclose(a.policy_logprobs, b.policy_logprobs, atol=1e-5)
        assert (a.ended, a.turns, a.tool_calls) == (b.ended, b.turns, b.tool_calls)


@pytest.mark.parametrize(
    ("mesh", "slots", "seconds", "expected"),
    [
        ("data=1", 24, 0.0, [24, 6, 4]),
        ("data=2", 24, 0.0, [24, 8]),
        ("data=1", 12, 0.0, [12, 4]),
        ("data=1", 24, 5.0, [24]),
    ],
)
def test_the_same_answers_come_of_fewer_rows_but_where_threads_answer_calls(
    monkeypatch, sizes, mesh, slots, seconds, expected
):
    """Games of four turns with tools, in one sample each of two examples, beside short and middling answers. With fewer
    slots than samples, rows move together once nothing waits for one."""
    tools = Toolbox([Tool("twice", lambda words: 2 * words, seconds)])

    def game(e):
        turn = [*call(f"{e}5"), *[0] * 6, 9, END]
        return [token for t in range(4) for token in [*turn, *[0] * (4 + t)]]

    def respond(example, turns):
        return None if turns[0].startswith("\x08") else "b" * (len(turns) // 2 + 1)

    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    script = [[[8, 9, END]] * 4 + [[8] * 13 + [END]] + [game(e) if e < 2 else [8, END]] for e in range(4)]
    script = [[[0] * (len(prompt) - 1) + row for row in rows] for prompt, rows in zip(prompts, script)]
    settings = {"tools": tools, "slots": slots, "chunk": 4}
    engine, params = scripted_engine(monkeypatch, script, CONFIG, logits=True, mesh=mesh, **settings)

    def generate():
        sizes.clear()
        return engine.generate(params, prompts, LONG, samples=6, respond=respond, max_turns=4)

    found = generate()
    assert sorted(set(sizes), reverse=True) == expected and sizes == sorted(sizes, reverse=True)
    before = engine.compiles
    assert_same(generate(), found)
    assert engine.compiles == before
    monkeypatch.setattr(scheduler, "tail_shapes", lambda groups, rows: [])
    assert_same(generate(), found)
    assert {len(sample.tokens) for sample in itertools.chain(*found)} > {3} and set(sizes) == {expected[0]}
