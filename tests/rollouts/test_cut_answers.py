"""What becomes of answers that do not end: worth nothing, not trained, or taken as they are."""

import numpy as np
import pytest

from nanochat_jax.inference.samples import Sample
from nanochat_jax.rollouts.collector import make_group
from nanochat_jax.rollouts.pack import packed_rows

PROMPT = np.array([9, 1], np.int32)


def sample(length, ended):
    tokens = np.arange(2, 2 + length, dtype=np.int32)
    logprobs = np.full(length, -1, np.float32)
    return Sample(tokens, np.ones(length, np.uint8), logprobs, logprobs, ended, [])


def group(rewards, ended, rule, advantage="mean"):
    samples = [sample(3 + i, end) for i, end in enumerate(ended)]
    return make_group(5, PROMPT, samples, np.array(rewards, float), advantage, rule)


def test_a_right_answer_that_does_not_end_is_worth_nothing_by_default():
    found = group([1, 1, 0, -2], [True, False, True, False], "wrong")
    np.testing.assert_array_equal(found.rewards, [1, 0, 0, -2])
    np.testing.assert_allclose(found.advantages, np.array([1, 0, 0, -2]) + 0.25)
    assert found.trained is found.samples


def test_keep_takes_the_answers_as_they_are_judged():
    found = group([1, 1, 0, 0], [True, False, True, False], "keep")
    np.testing.assert_array_equal(found.rewards, [1, 1, 0, 0])
    np.testing.assert_allclose(found.advantages, [0.5, 0.5, -0.5, -0.5])


@pytest.mark.parametrize("advantage", ["mean", "grpo", "rloo"])
def test_mask_compares_the_others_as_if_the_cut_ones_were_not_there(advantage):
    found = group([1, 7, 0, 0], [True, False, True, True], "mask", advantage)
    without = group([1, 0, 0], [True, True, True], "keep", advantage)
    np.testing.assert_array_equal(found.advantages[[0, 2, 3]], without.advantages)
    assert found.advantages[1] == 0
    np.testing.assert_array_equal(found.rewards, [1, 7, 0, 0])  # what is logged is what was judged


def test_of_a_masked_answer_no_token_is_trained_or_counted():
    rows, both = [], (True, False, True)
    for rule in ("mask", "keep"):
        found = group([1, 1, 0], both, rule)
        how = {"bos": 9, "rows": 1, "micro_batches": 1}
        rows.append(packed_rows([PROMPT], [found.trained], found.advantages[None], 30, **how)["weights"])
    assert rows[0].sum() == 3 + 5 and rows[1].sum() == 3 + 4 + 5


@pytest.mark.parametrize("ended", [(False, False, False), (False, True, False)])
def test_mask_with_fewer_than_two_answers_that_end_has_nothing_to_compare(ended):
    assert not group([1, 0, 1], ended, "mask").has_signal


def test_when_nothing_ends_there_is_no_signal_in_answers_that_are_right():
    assert not group([1, 1, 0], [False] * 3, "wrong").has_signal
