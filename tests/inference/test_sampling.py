"""Draws follow the distribution that they claim, and a key decides them alone.

Run: python -m pytest tests/inference/test_sampling.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.inference import sampling
from nanochat_jax.model.top_k import top_k_threshold

choose_tokens = jax.jit(sampling.choose_tokens)


def logits_of(kind, V, R=4, seed=0):
    rng = np.random.default_rng(seed)
    x = {
        "wide": lambda: rng.normal(0, 4, (R, V)),
        "narrow": lambda: 1e-20 * rng.normal(0, 1, (R, V)),
        "equal": lambda: np.zeros((R, V)),
        "with ties": lambda: np.round(rng.normal(0, 2, (R, V))),
        "saturated": lambda: np.where(rng.random((R, V)) < 3 / V, 15.0, -15.0),
        "negative": lambda: -np.exp(rng.normal(0, 1, (R, V))),
    }[kind]()
    return x.astype(np.float32)


def distribution(logits, temperature, top_k):
    """What `choose_tokens` promises, in float64, for one row."""
    x = np.asarray(logits, np.float64)
    p = np.exp((x - x.max()) / temperature)
    if top_k:
        p[x < np.sort(x)[-top_k]] = 0
    return p / p.sum()


@pytest.mark.parametrize("kind", ["wide", "narrow", "equal", "with ties", "saturated", "negative"])
@pytest.mark.parametrize("V", [70, 1000])
def test_the_threshold_separates_the_k_largest_and_their_ties(kind, V):
    x, threshold = logits_of(kind, V), jax.jit(top_k_threshold)
    for k in (1, 2, 50, V - 1, V):
        kth = np.sort(x, -1)[:, -k]
        np.testing.assert_array_equal(x >= np.asarray(threshold(x, k))[:, None], x >= kth[:, None])


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.0, 5), (0.5, 20), (3.0, 1), (1.0, 1000)])
def test_draws_have_the_frequencies_and_log_probabilities_of_the_distribution(temperature, top_k):
    n, V = 40_000, 150
    logits = logits_of("wide", V, R=1, seed=3) / 2
    draws = jax.random.uniform(jax.random.key(1), (n, 2))
    tokens, logprobs = choose_tokens(jnp.broadcast_to(jnp.asarray(logits), (n, V)), draws, temperature, top_k)
    p = distribution(logits[0], temperature, min(top_k, V))
    counts = np.bincount(tokens, minlength=V)
    assert counts[p == 0].sum() == 0
    likely = p * n > 5
    expected, degrees = p[likely] * n, max(likely.sum() - 1, 1)
    chi_square = ((counts[likely] - expected) ** 2 / expected).sum()
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5
    np.testing.assert_allclose(logprobs, np.log(p[np.asarray(tokens)]), atol=2e-5)


def test_temperature_0_takes_the_first_of_the_largest_and_is_sure_of_it():
    logits = np.asarray([[1, 3, 3, 2], [-1, -5, -1, -1]], np.float32)
    tokens, logprobs = choose_tokens(logits, np.full((2, 2), 0.99, np.float32), 0.0, 0)
    assert tokens.tolist() == [1, 0] and logprobs.tolist() == [0, 0]


def test_a_token_of_weight_0_is_never_drawn_even_at_the_ends_of_the_unit_interval():
    rng = np.random.default_rng(0)
    for top_k in (1, 3, 7):
        logits = logits_of("wide", 130, R=200, seed=top_k)
        draws = rng.choice([0.0, np.float32(1 - 2**-24), 0.5], (200, 2)).astype(np.float32)
        tokens, logprobs = choose_tokens(logits, draws, 1.0, top_k)
        kept = logits >= np.sort(logits, -1)[:, -top_k][:, None]
        assert kept[np.arange(200), tokens].all() and np.isfinite(logprobs).all()


def test_logits_that_are_not_numbers_do_not_hang_and_are_seen_in_the_log_probability():
    logits = np.full((2, 100), np.nan, np.float32)
    for temperature in (0.0, 1.0):
        tokens, logprobs = choose_tokens(logits, np.full((2, 2), 0.5, np.float32), temperature, 5)
        assert ((tokens >= 0) & (tokens < 100)).all() and (temperature == 0 or np.isnan(logprobs).all())


def test_a_draw_depends_on_run_step_example_sample_and_position_and_not_on_the_row():
    def draw(seed, step, example, sample, position):
        numbers = [jnp.asarray([0, n], jnp.uint32) for n in (example, sample)]
        keys = sampling.sample_keys(seed, step, *numbers)
        return tuple(np.asarray(sampling.uniform_draws(keys, jnp.asarray([0, position])))[1].tolist())

    known = {draw(*numbers) for numbers in np.concatenate([np.full((1, 5), 3), 3 + np.eye(5, dtype=int)]).tolist()}
    assert len(known) == 6
    keys = sampling.sample_keys(3, 3, jnp.full(1, 3, jnp.uint32), jnp.full(1, 3, jnp.uint32))
    assert tuple(np.asarray(sampling.uniform_draws(keys, jnp.full(1, 3)))[0].tolist()) in known


def nucleus(logits, temperature, top_k, top_p):
    """Which tokens top-p lets stay, by sorting, in float64, for one row."""
    p = distribution(logits, temperature, top_k)
    ordered = np.sort(p)[::-1]
    least = ordered[np.searchsorted(np.cumsum(ordered), top_p * (1 - 1e-12))]
    return p >= least


@pytest.mark.parametrize("kind", ["wide", "equal", "with ties", "saturated"])
def test_top_p_keeps_the_fewest_of_the_likeliest_tokens_that_have_the_probability(kind):
    top_p = np.asarray([0.05, 0.35, 0.77, 0.99, 1.0, 0.5], np.float32)
    temperature, top_k = np.asarray([1, 0.5, 2, 1, 1, 0], np.float32), np.asarray([0, 9, 0, 40, 0, 0], np.int32)
    logits = logits_of(kind, 150, R=6) / 2
    kept = np.asarray(jax.jit(sampling.within_top_p)(logits, temperature, top_k, top_p))
    for r in range(4):
        expected = nucleus(logits[r], temperature[r], top_k[r], top_p[r])
        np.testing.assert_array_equal(kept[r], np.where(expected, logits[r], -np.inf))
    np.testing.assert_array_equal(kept[4:], logits[4:])  # a top_p of 1, and temperature 0


def test_top_p_of_0_leaves_the_likeliest_token_and_its_log_probability_is_0():
    logits = logits_of("wide", 130, R=50)
    ones = np.ones(50, np.float32)
    kept = sampling.within_top_p(logits, ones, np.zeros(50, np.int32), 0 * ones)
    tokens, logprobs = choose_tokens(kept, np.full((50, 2), 0.999, np.float32), ones, np.full(50, 20, np.int32))
    assert tokens.tolist() == logits.argmax(-1).tolist() and not np.asarray(logprobs).any()


def test_what_a_row_draws_does_not_depend_on_how_its_neighbours_draw():
    logits, draws = logits_of("wide", 200, R=4), np.random.default_rng(2).random((4, 2)).astype(np.float32)
    temperature, top_k = np.asarray([0.7, 0, 1, 1.5], np.float32), np.asarray([5, 3, 0, 200], np.int32)
    tokens, logprobs = choose_tokens(logits, draws, temperature, top_k)
    for r in range(4):
        alone = choose_tokens(logits, draws, temperature[r], top_k[r])  # all rows as this one
        assert (tokens[r], logprobs[r]) == (alone[0][r], alone[1][r])


def test_each_row_may_have_a_seed_of_its_own():
    seeds, numbers = np.asarray([3, 4], np.uint32), np.zeros(2, np.uint32)
    keys = jax.random.key_data(sampling.sample_keys(seeds, 1, numbers, numbers))
    for r in range(2):
        alone = jax.random.key_data(sampling.sample_keys(seeds[r], 1, numbers, numbers))
        np.testing.assert_array_equal(keys[r], alone[r])
