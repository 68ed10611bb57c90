"""Tokens become text, calls and log-probabilities, however they are cut into pieces.

Run: python -m pytest tests/serving/test_choice.py
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_jax.serving.choice import Choice, Part, merged, plain_text
from nanochat_jax.serving.worker import Progress
from tests.support.serving import END, TOKENIZER, call, said


def parts_of(pairs, stop=(), step=1, finished=True):
    """(parts, finish_reason, tokens) of an answer that comes in steps."""
    choice, parts = Choice(TOKENIZER, {END}, stop, None), []
    for at in range(0, len(pairs), step):
        tokens, sampled = map(list, zip(*pairs[at : at + step]))
        last = finished and at + step >= len(pairs)
        parts += choice.take(Progress(tokens, sampled, [0.0] * len(tokens), [], last))[0]
        if choice.finish_reason:
            break
    return merged(parts), choice.finish_reason, choice.tokens


@pytest.mark.parametrize("step", [1, 3, 100])
def test_calculator_calls_are_parts_of_their_own(step):
    pairs = said("It is ", False) + call("2*21", "42") + said("42, 4€")
    expected = [Part("text", "It is "), Part("python", "2*21"), Part("python_output", "42"), Part("text", "42, 4€")]
    assert parts_of(pairs, step=step) == (expected, "stop", len(pairs))


def test_an_answer_that_is_cut_ends_with_what_is_whole():
    assert parts_of(said("ab€", False)[:-1]) == ([Part("text", "ab\ufffd")], "length", 4)
    assert parts_of(said("ab", False) + call("1+1", "2")[:3]) == ([Part("text", "ab")], "length", 5)


def test_special_tokens_that_mean_nothing_where_they_stand_are_not_shown():
    names = ("output_start", "output_end", "python_end", "user_start")
    drawn = [(TOKENIZER.special(f"<|{name}|>"), 1) for name in names]
    assert parts_of([*drawn, *said("a")])[0] == [Part("text", "a")]


def test_text_that_looks_like_a_special_token_is_text():
    assert parts_of(said("<|python_start|>1<|assistant_end|>"))[0] == [
        Part("text", "<|python_start|>1<|assistant_end|>")
    ]


def test_a_stop_text_over_a_call_is_none_and_what_was_held_back_comes():
    pairs = said("ab", False) + call("1", "1") + said("cd")
    assert [part.text for part in parts_of(pairs, ("bc",))[0]] == ["ab", "1", "1", "cd"]


@given(
    text=st.text("abé", max_size=12),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    step=st.integers(1, 5),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_text_from_a_stop_text_on_is_shown_and_all_before_it_is(text, stop, step):
    """One character a token, so the first stop text to be complete is the one that counts."""
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    first = min((end for end, _ in ends), default=None)
    expected = text if first is None else text[: min(at for end, at in ends if end == first)]
    parts, reason, _ = parts_of([*said(text, False), (END, 1)], tuple(stop), step)
    assert plain_text(parts) == expected and reason == "stop"


def test_scores_are_of_what_the_model_drew_and_a_token_has_one_number_everywhere():
    """The engine computes a token's log-probability twice; the last digit may differ."""
    choice = Choice(TOKENIZER, {END}, (), 2)
    pairs = call("1", "1") + said("a")
    tokens, sampled = map(list, zip(*pairs))
    alternatives = [(np.asarray([t, 5, 6]), np.asarray([-0.2500001, -1.0, -2.0], np.float32)) for t in tokens]
    _, scores = choice.take(Progress(tokens, sampled, [-0.25] * len(tokens), alternatives, True))
    assert [score.token for score in scores] == [token for token, drawn in pairs if drawn]
    for score in scores:
        assert (score.logprob, score.alternatives) == (-0.25, ((score.token, -0.25), (5, -1.0)))
