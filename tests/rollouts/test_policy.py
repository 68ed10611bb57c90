"""What --policy trains: the gradient of the reward that the sampling earns, or one that is biased by what top-k hides.

With answers of one token everything can be summed up: the expected reward, its slope, and what the objective makes of
each token times how often it is drawn.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.inference import sampling
from nanochat_jax.model.loss import Limits, summed_token_loss
from nanochat_jax.rollouts.objective import Objective

V, D, CAP = 12, 6, 15.0
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((1, 1, D)), jnp.float32)
HEAD = RNG.standard_normal((V, D)).astype(np.float32)
REWARDS = RNG.random(V)


def sampled_distribution(head, temperature, top_k):
    """[V], float64: what the engine draws a token from."""
    z = np.asarray(X, np.float64)[0, 0] @ np.asarray(head, np.float64).T
    z = CAP * np.tanh(z / CAP)
    p = np.where(z >= np.sort(z)[-(top_k or V)], np.exp(z / temperature), 0)
    return p / p.sum()


def finite_difference(temperature, top_k, h=1e-5):
    """Slope of the expected reward in each entry of the head, [V,D]."""
    slope = np.zeros((V, D))
    for index in np.ndindex(V, D):
        step = np.zeros((V, D))
        step[index] = h
        up, down = (sampled_distribution(HEAD + sign * step, temperature, top_k) @ REWARDS for sign in (1, -1))
        slope[index] = (up - down) / (2 * h)
    return slope


def expected_gradient(objective, temperature, top_k):
    """Minus what the objective's gradient is on average over the draws, [V,D]."""
    p = sampled_distribution(HEAD, temperature, top_k)
    tokens = jnp.arange(V)[:, None]
    aux = {"weights": jnp.asarray(p, jnp.float32)[:, None], "advantages": jnp.asarray(REWARDS, jnp.float32)[:, None]}
    aux["logprobs"] = jnp.log(jnp.maximum(aux["weights"], 1e-30))
    x = jnp.broadcast_to(X, (V, 1, D))

    def loss(head):
        shape = {"cap": CAP, "vocab_size": V, "limits": objective.limits}
        return summed_token_loss(objective.token_loss, x, head, tokens, aux, **shape)[0]

    return -np.asarray(jax.grad(loss)(jnp.asarray(HEAD)))


def apart(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 4), (0.7, 6), (1.5, 0)])
def test_the_truncated_policys_gradient_is_the_slope_of_the_expected_reward(temperature, top_k):
    truncated = Objective(limits=Limits(temperature, top_k))
    assert apart(expected_gradient(truncated, temperature, top_k), finite_difference(temperature, top_k)) < 1e-3


def test_the_full_policys_gradient_is_that_slope_only_where_nothing_is_left_out():
    assert apart(expected_gradient(Objective(), 1.0, 0), finite_difference(1.0, 0)) < 1e-3
    assert apart(expected_gradient(Objective(), 1.0, 4), finite_difference(1.0, 4)) > 0.3  # biased by top-k


def test_importance_weights_do_not_bring_back_what_top_k_has_left_out():
    weighted = expected_gradient(Objective(is_cap=100.0), 1.0, 4)
    assert apart(weighted, finite_difference(1.0, 4)) > 0.3
    assert apart(weighted, finite_difference(1.0, 0)) > 0.3


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 4), (0.7, 6), (1.5, 0)])
def test_the_trainers_log_probabilities_are_those_that_the_sampler_has_noted(temperature, top_k):
    logits = CAP * jnp.tanh(X[:, 0] @ HEAD.T / CAP)
    n = 400
    draws = jax.random.uniform(jax.random.key(0), (n, 2))
    tokens, noted = sampling.choose_tokens(jnp.broadcast_to(logits, (n, V)), draws, temperature, top_k)
    objective = Objective(limits=Limits(temperature, top_k))
    aux = {"weights": jnp.ones((n, 1)), "advantages": jnp.ones((n, 1))}
    shape = {"cap": CAP, "vocab_size": V, "limits": objective.limits}
    x = jnp.broadcast_to(X, (n, 1, D))
    _, logp = summed_token_loss(objective.token_loss, x, jnp.asarray(HEAD), tokens[:, None], aux, **shape)
    np.testing.assert_allclose(logp[:, 0], noted, atol=1e-5)
    found = objective.statistics(logp, aux | {"logprobs": noted[:, None]})
    assert found["delta_logp_max"] < 1e-5


def test_a_penalty_on_whole_distributions_and_a_truncated_policy_contradict_each_other():
    with pytest.raises(ValueError, match=r"--kl-coef=0.1 compares whole distributions, and --policy=truncated"):
        Objective(kl_coef=0.1, limits=Limits(1.0, 50))
