"""Conversations with an environment: what is forced between two answers, and where they end.

Run: python -m pytest tests/inference/test_turns.py
"""

import itertools

import numpy as np
import pytest

from nanochat_jax.inference.samples import turns_of
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tools import Tool, Toolbox, ToolCall
from tests.support.models import tiny_config
from tests.support.scripted import END, TOKENIZER, apart, call, result, scripted

LONG = SamplingParams(max_new_tokens=70)


def text(words):
    return TOKENIZER.encode(words)


def reply(words):
    """The ids that are forced behind the end of an answer."""
    user = [TOKENIZER.special(f"<|user_{side}|>") for side in ("start", "end")]
    return [user[0], *text(words), user[1], TOKENIZER.special("<|assistant_start|>")]


def row(*parts):
    """(what a scripted model draws, the tokens and their masks that come of it): lists of ids are drawn, of tuples
    forced, and what is drawn in their place is thrown away."""
    drawn = [token for part in parts for token in (part if isinstance(part, list) else [END] * len(part))]
    tokens = [token for part in parts for token in part]
    return drawn, tokens, [int(isinstance(part, list)) for part in parts for _ in part]


def forced(words):
    return tuple(reply(words))


def check(sample, expected):
    _, tokens, mask = expected
    assert sample.tokens.tolist() == tokens and sample.mask.tolist() == mask
    np.testing.assert_array_equal(sample.logprobs, np.where(mask, np.float32(-0.5), 0))


def test_a_reply_is_forced_behind_the_end_of_an_answer_and_the_next_one_follows(monkeypatch):
    """Of two samples one is answered twice, the other not at all."""
    first = row(
        [*text("one"), END], forced("no <|bos|> \u00e9"), [*text("two"), END], forced(""), [*text("three"), END]
    )
    other = row([*text("right"), END])
    heard = []

    def respond(example, turns):
        heard.append((example, list(turns)))
        return {"one": "no <|bos|> \u00e9", "two": ""}.get(turns[-1])

    generate = scripted(monkeypatch, [[first[0], other[0]]], chunk=5)
    ((one, two),) = generate([[1]], LONG, samples=2, examples=[0], respond=respond, max_turns=9)
    check(one, first)
    check(two, other)
    assert (one.turns, one.ended, two.turns, two.ended) == (3, True, 1, True)
    whole = ["one", "no <|bos|> \u00e9", "two", "", "three"]
    assert turns_of(TOKENIZER, one) == whole and turns_of(TOKENIZER, two) == ["right"]
    assert sorted(heard) == [(0, ["one"]), (0, ["one", *whole[1:3]]), (0, whole), (0, ["right"])]


def test_the_number_of_answers_is_bounded(monkeypatch):
    script = [[row([9, END], forced("more"), [9, END], forced("more"), [9, END])[0]]]
    generate = scripted(monkeypatch, script, chunk=5)
    for most, tokens in ((1, 2), (2, 2 + 7 + 2), (3, 2 + 7 + 2 + 7 + 2)):
        ((sample,),) = generate([[1]], LONG, respond=lambda example, turns: "more", max_turns=most)
        assert (len(sample.tokens), sample.turns, sample.ended) == (tokens, most, True)


def test_the_limit_of_tokens_is_that_of_all_turns_together(monkeypatch):
    """Seven tokens of a reply: it is not given where they would leave none for an answer."""
    script = [[row([9, END], forced("more"), [9, 9, END])[0]]]
    generate = scripted(monkeypatch, script, chunk=5)
    for limit, length, ended, turns in ((2, 2, True, 1), (9, 2, True, 1), (10, 10, False, 2), (12, 12, True, 2)):
        limited = SamplingParams(max_new_tokens=limit)
        ((sample,),) = generate([[1]], limited, respond=lambda example, turns: "more", max_turns=2)
        assert (len(sample.tokens), sample.ended, sample.turns) == (length, ended, turns), limit
    assert turns_of(TOKENIZER, sample) == ["\t", "more", "\t\t"]


def test_bos_ends_everything_and_an_open_call_ends_with_its_turn(monkeypatch):
    start, end = call("x")[0], call("x")[-1]
    rows = [row([9, TOKENIZER.bos]), row([start, *text("1+1"), END], forced("no"), [*text("2"), end, 9, END])]
    generate = scripted(monkeypatch, [[r[0] for r in rows]], chunk=5)
    ((over, left),) = generate([[1]], LONG, samples=2, respond=lambda example, turns: "no", max_turns=2)
    check(over, rows[0])
    check(left, rows[1])
    assert over.turns == 1 and left.tool_calls == []


def test_tools_are_called_in_every_turn(monkeypatch):
    tools = Toolbox([Tool("twice", lambda words: 2 * words)])
    expected = row(call("ab"), tuple(result("abab")), [END], forced("again"), call("c"), tuple(result("cc")), [9, END])
    generate = scripted(monkeypatch, [[expected[0]]], chunk=4, tools=tools)
    ((sample,),) = generate([[1]], LONG, respond=lambda example, turns: "again", max_turns=2)
    check(sample, expected)
    assert sample.tool_calls == [ToolCall("ab", "abab"), ToolCall("c", "cc")]
    assert turns_of(TOKENIZER, sample)[1] == "again"


def test_a_fault_of_the_environment_ends_the_call(monkeypatch):
    def respond(example, turns):
        raise ValueError("out of words")

    with pytest.raises(ValueError, match="out of words"):
        scripted(monkeypatch, [[[9, END]]])([[1]], LONG, respond=respond, max_turns=2)


LAYERS = tiny_config(vocab_size=265, padded_vocab=320, n_layer=2, windows=(7, -1))


def test_slots_and_chunks_change_nothing_and_log_probabilities_are_those_of_the_training_forward(monkeypatch):
    """Games of one to four turns with slow and quick tools, whose answers depend on the example."""
    tools = Toolbox([Tool("twice", lambda words: 2 * words)])

    def game(e, s):
        turn = [*call(f"{e}{s}"), *[0] * 6, *[9] * s, END]
        return [token for t in range(4) for token in [*turn, *[0] * (4 + t + e)]]

    def respond(example, turns):
        number = len(turns) // 2
        return None if number == example else "b" * (number + 1 + example)

    script = [[game(e, s) for s in range(3)] for e in range(4)]
    found = []
    for slots, chunk in ((12, 5), (3, 4)):
        generate = scripted(monkeypatch, script, LAYERS, logits=True, tools=tools, slots=slots, chunk=chunk)
        found.append(generate([[1]] * 4, LONG, samples=3, respond=respond, max_turns=4))
    for one, other in zip(*map(itertools.chain.from_iterable, found), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.mask, other.mask)
        np.testing.assert_allclose(one.policy_logprobs, other.policy_logprobs, atol=1e-5)
    assert [[sample.turns for sample in group] for group in found[0]] == [[1] * 3, [2] * 3, [3] * 3, [4] * 3]
    assert apart(LAYERS, itertools.chain(*found[0])) < 1e-5
