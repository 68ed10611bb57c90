"""Draws follow the distribution that they claim, and a key decides them alone.

Run: python -m pytest tests/inference/test_sampling.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.inference import sampling

top_k_threshold, choose_tokens = jax.jit(sampling.top_k_threshold), jax.jit(sampling.choose_tokens)


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
    x = logits_of(kind, V)
    for k in (1, 2, 50, V - 1, V):
        kth = np.sort(x, -1)[:, -k]
        np.testing.assert_array_equal(x >= np.asarray(top_k_threshold(x, k))[:, None], x >= kth[:, None])


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
