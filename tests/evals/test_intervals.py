"""Intervals that hold what they promise, and the unbiased pass@k."""

import itertools
import math

import numpy as np
import pytest

from nanochat_jax.evals.intervals import Z95, pass_at_k, share


def test_scores_of_0_and_1_have_wilsons_interval():
    found = share([1, 1, 0, 1, 0, 0, 0, 0, 0, 0])
    assert found.value == pytest.approx(0.3)
    np.testing.assert_allclose(found[1:], (0.1077913, 0.6032219), atol=1e-7)  # Wilson (1927) for 3 of 10


def test_wilsons_interval_is_where_the_normal_test_of_p_just_passes():
    found = share([1] * 7 + [0] * 33)
    for p in found[1:]:
        assert abs(7 / 40 - p) == pytest.approx(Z95 * np.sqrt(p * (1 - p) / 40))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_scores_still_leave_a_doubt(value):
    found = share([value] * 20, trials=8)
    assert 0 <= found.low <= value <= found.high <= 1 and found.high - found.low > 0.1


def test_more_problems_and_more_samples_narrow_the_interval():
    rng = np.random.default_rng(0)
    passed = rng.random((400, 8)) < rng.beta(0.5, 1.0, (400, 1))
    widths = [x.high - x.low for x in (pass_at_k(passed[:50])[1], pass_at_k(passed[:, :1])[1], pass_at_k(passed)[1])]
    assert widths[0] > 1.5 * widths[1] > 1.5 * widths[2]


@pytest.mark.parametrize(("P", "n", "k"), [(200, 1, 1), (200, 8, 1), (200, 8, 4), (60, 16, 1), (40, 4, 4)])
def test_the_interval_covers_the_truth_in_95_of_100_draws(P, n, k):
    """Problems of very different difficulty, drawn anew each time."""
    rng = np.random.default_rng(P + n)
    truth = 1 - ((1 - rng.beta(0.4, 1.2, 1 << 18)) ** k).mean()
    found = [pass_at_k(rng.random((P, n)) < rng.beta(0.4, 1.2, (P, 1)))[k] for _ in range(500)]
    covered = np.mean([low <= truth <= high for _, low, high in found])
    assert 0.92 <= covered <= 0.99
    assert np.mean([value for value, _, _ in found]) == pytest.approx(truth, abs=0.01)


def test_pass_at_k_is_the_share_over_all_choices_of_k_samples():
    rng = np.random.default_rng(1)
    passed = rng.random((6, 5)) < 0.4
    for k, found in pass_at_k(passed).items():
        plain = np.mean([row[list(chosen)].any() for row in passed for chosen in itertools.combinations(range(5), k)])
        assert found.value == pytest.approx(plain)
    assert pass_at_k(passed)[1].value == pytest.approx(passed.mean())


@pytest.mark.parametrize("scores", [[], [0.5, 1.2], [-0.1], [float("nan")]])
def test_scores_that_are_no_shares_are_refused(scores):
    with pytest.raises(ValueError, match="between 0 and 1"):
        share(scores)


def test_pass_at_k_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one problem and one sample"):
        pass_at_k(np.zeros((0, 4)))


def test_thousands_of_samples_are_counted_at_once_and_right():
    passed = np.zeros((3, 4000), bool)
    passed[1, :7], passed[2] = True, True
    found = pass_at_k(passed)
    unsolved = 1 - math.comb(4000 - 7, 500) / math.comb(4000, 500)
    assert found[500].value == pytest.approx((0 + unsolved + 1) / 3, rel=1e-12) and found[4000].value == 2 / 3
