"""Each option of the RL objective against a plain statement of its formula, in value and in gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.sharding import param_shardings, to_global
from nanochat_jax.model.loss import summed_token_loss
from nanochat_jax.rollouts.objective import ADVANTAGES, MAX_REWARD, Objective, advantages, k3, make_score
from tests.support import reference
from tests.support.models import random_batch, random_params, tiny_config

REWARDS = np.array([[1, 0, 0, 1], [0.2, 0.7, -1, 3], [0, 0, 0, 1]])


def test_the_mean_advantage_is_the_distance_from_the_groups_mean():
    np.testing.assert_allclose(advantages([[1, 0, 0, 1], [0, 0, 0, 1]]), [[0.5, -0.5, -0.5, 0.5], [-0.25] * 3 + [0.75]])


def test_the_grpo_advantage_is_the_z_score():
    for found, r in zip(advantages(REWARDS, "grpo"), REWARDS):
        mean = sum(r) / 4
        deviation = (sum((x - mean) ** 2 for x in r) / 4) ** 0.5
        np.testing.assert_allclose(found, [(x - mean) / (deviation + 1e-6) for x in r], rtol=1e-6)


def test_the_rloo_advantage_compares_with_the_other_samples():
    for found, r in zip(advantages(REWARDS, "rloo"), REWARDS):
        np.testing.assert_allclose(found, [r[g] - np.delete(r, g).mean() for g in range(4)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "grpo", "rloo"])
def test_equal_rewards_give_exactly_no_advantage(kind):
    """Also where the mean of equal numbers is not the number."""
    found = advantages([[0.1] * 3, [1e5 + 0.1] * 3, [0, 0, 1]], kind)
    assert not found[:2].any() and found[2].all() and found.dtype == np.float32


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize(
    "option", [{}, {"clip_low": 0.2, "clip_high": 0.2}, {"is_cap": 1e3}, {"kl_coef": 1.0}], ids=str
)
def test_the_largest_rewards_that_are_taken_leave_loss_gradient_and_their_squares_finite(kind, option):
    """Also where a token has become e^8 times as probable, at 1 / normaliser = 1, summed over a step's tokens."""
    found = advantages(MAX_REWARD * np.array([[-1, 1], [1, -1], [1, 0], [1 - 1e-9, 1]]), kind)
    assert found.dtype == np.float32 and np.isfinite(found).all() and found.any()
    tokens = jnp.tile(jnp.asarray(found.ravel()), 128)
    far, near = jnp.full_like(tokens, -40.0), jnp.full_like(tokens, -32.0)
    aux = {"weights": jnp.ones_like(tokens), "advantages": tokens, "old_logprobs": far}
    aux |= {"logprobs": far, "reference_logprobs": far}
    loss, slope = jax.value_and_grad(lambda p: Objective(**option).token_loss(p, aux).sum())(near)
    squares = [loss**2, (slope**2).sum(), (1e6 * slope) ** 2]  # the last: a parameter that many tokens share
    assert slope.any() and all(jnp.isfinite(square).all() for square in squares)


@pytest.mark.parametrize(
    ("rewards", "kind", "match"),
    [
        ([[0, 1]], "ppo", "--advantage must be one of mean, grpo, rloo"),
        ([[0, 1], [0, np.nan]], "mean", "got nan for sample 1 of prompt 1"),
        ([[np.inf, 1]], "grpo", "got inf for sample 0 of prompt 0"),
        ([[-1e39, 1]], "mean", "at most 1e\\+06, got -1e\\+39 for sample 0 of prompt 0"),
        ([[1]], "rloo", "--num-samples must be at least 2"),
        ([0, 1], "mean", r"shape \[prompts, samples\]"),
    ],
)
def test_rewards_that_cannot_work_are_refused(rewards, kind, match):
    with pytest.raises(ValueError, match=match):
        advantages(np.array(rewards), kind)


@pytest.mark.parametrize(
    "setting",
    [{"clip_low": 0}, {"clip_low": 1.5}, {"clip_high": 0}, {"clip_high": np.inf}, {"kl_coef": -1}, {"is_cap": 0}]
    + [{name: np.nan} for name in ("clip_low", "clip_high", "kl_coef", "is_cap")],
)
def test_settings_out_of_range_name_their_flag(setting):
    with pytest.raises(ValueError, match=f"--{next(iter(setting)).replace('_', '-')} must be"):
        Objective(**setting)


def draw(n=400, seed=0):
    """log p of n tokens, and everything that a token loss may read; a third is not sampled and has no arrays."""
    rng = np.random.default_rng(seed)
    sampled = rng.random(n) < 0.67
    logp = -rng.exponential(1.0, n)
    near = {name: logp + 0.4 * rng.standard_normal(n) for name in ("old_logprobs", "reference_logprobs", "logprobs")}
    aux = {"weights": sampled * rng.random(n), "advantages": rng.standard_normal(n) * (rng.random(n) < 0.9)}
    aux |= {name: np.where(sampled, value, 0) for name, value in near.items()}
    return logp, aux


def plain_loss(logp, aux, clip_low=None, clip_high=None, kl_coef=0.0, is_cap=None):
    """Token by token, as the formulas are written in the papers."""
    losses = []
    for i, w in enumerate(aux["weights"]):
        if w == 0:
            losses.append(0.0)
            continue
        A, old = aux["advantages"][i], aux["old_logprobs"][i]
        gain = A * logp[i]
        if clip_low is not None or clip_high is not None:
            low = 0 if clip_low is None else 1 - clip_low
            high = 1e30 if clip_high is None else 1 + clip_high
            ratio = np.exp(logp[i] - old)
            gain = min(A * ratio, A * min(max(ratio, low), high))
        if is_cap is not None:
            gain *= min(np.exp(old) / np.exp(aux["logprobs"][i]), is_cap)
        quotient = np.exp(aux["reference_logprobs"][i]) / np.exp(logp[i])
        losses.append(w * (-gain + kl_coef * (quotient - np.log(quotient) - 1)))
    return np.array(losses)


OPTIONS = {"clip_low": (None, 0.2), "clip_high": (None, 0.3), "kl_coef": (0.0, 0.05), "is_cap": (None, 1.2)}
SETTINGS = [dict(zip(OPTIONS, values)) for values in itertools.product(*OPTIONS.values())]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: " ".join(k for k, v in s.items() if v) or "none")
def test_value_and_gradient_are_those_of_the_plain_formula(setting):
    logp, aux = draw()
    single = {name: jnp.asarray(value, jnp.float32) for name, value in aux.items()}
    losses, pullback = jax.vjp(lambda p: Objective(**setting).token_loss(p, single), jnp.asarray(logp, jnp.float32))
    np.testing.assert_allclose(losses, plain_loss(logp, aux, **setting), atol=3e-6, rtol=2e-5)
    h = 1e-6
    slope = (plain_loss(logp + h, aux, **setting) - plain_loss(logp - h, aux, **setting)) / (2 * h)
    np.testing.assert_allclose(pullback(jnp.ones_like(losses))[0], slope, atol=3e-6, rtol=2e-5)


def test_clipping_takes_the_gradient_of_what_has_gone_far_enough():
    ratio, advantage = np.array([1.5, 1.5, 0.5, 0.5, 1.1]), np.array([1, -1, 1, -1, 1])
    aux = {"weights": np.ones(5), "advantages": advantage, "old_logprobs": np.full(5, -1.0)}
    aux = {name: jnp.asarray(value, jnp.float32) for name, value in aux.items()}
    logp = jnp.asarray(np.log(ratio) - 1, jnp.float32)
    objective = Objective(clip_low=0.2, clip_high=0.2)
    slope = jax.grad(lambda p: objective.token_loss(p, aux).sum())(logp)
    np.testing.assert_allclose(slope, [0, 1.5, -0.5, 0, -1.1], rtol=1e-6)
    assert objective.statistics(logp[None], {k: v[None] for k, v in aux.items()})["clipped"] == pytest.approx(0.4)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: " ".join(k for k, v in s.items() if v) or "none")
def test_without_old_log_probabilities_the_policy_is_its_own(setting):
    logp, aux = draw()
    single = {name: jnp.asarray(value, jnp.float32) for name, value in aux.items()}
    logp = jnp.asarray(logp, jnp.float32)

    def loss(aux):
        return jax.value_and_grad(lambda p: Objective(**setting).token_loss(p, aux).sum())(logp)

    with_old = loss(single | {"old_logprobs": logp})
    del single["old_logprobs"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loss(single), with_old)


def test_on_the_first_update_clipping_leaves_the_gradient_of_reinforce():
    logp, aux = draw()
    aux = {name: jnp.asarray(value, jnp.float32) for name, value in aux.items() if name != "old_logprobs"}

    def slope(objective):
        return jax.grad(lambda p: objective.token_loss(p, aux).sum())(jnp.asarray(logp, jnp.float32))

    clipped, plain = slope(Objective(clip_low=0.1, clip_high=0.1)), slope(Objective())
    np.testing.assert_allclose(clipped, plain, rtol=1e-6)


def test_what_was_not_sampled_cannot_spoil_the_gradient():
    """A prompt's token may be as unlikely as you like, and the arrays hold 0 there."""
    zero = jnp.zeros(3)
    aux = dict.fromkeys(("weights", "advantages", "old_logprobs", "reference_logprobs", "logprobs"), zero)
    objective = Objective(clip_low=0.2, clip_high=0.2, kl_coef=1.0, is_cap=2.0)
    value, slope = jax.value_and_grad(lambda p: objective.token_loss(p, aux).sum())(jnp.array([-500.0, -1.0, 0.0]))
    assert value == 0 and not slope.any()


def test_importance_weights_make_up_for_the_temperature():
    """In expectation over what the sampler draws, the gradient is that of the policy's own expected advantage."""
    rng = np.random.default_rng(0)
    logits, advantage = (jnp.asarray(rng.standard_normal(12), jnp.float32) for _ in range(2))
    sampler = jax.nn.log_softmax(logits / 0.7)

    def expected_loss(logits, objective):
        aux = {"weights": jnp.ones(12), "advantages": advantage, "logprobs": sampler}
        losses = objective.token_loss(jax.nn.log_softmax(logits), aux)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(sampler)) * losses)

    truth = jax.grad(lambda z: -jnp.sum(jax.nn.softmax(z) * advantage))(logits)
    found = jax.grad(lambda z: expected_loss(z, Objective(is_cap=1e6)))(logits)
    np.testing.assert_allclose(found, truth, atol=1e-6)
    biased = jax.grad(lambda z: expected_loss(z, Objective()))(logits)
    assert jnp.abs(biased - truth).max() > 0.01


def test_the_penalty_is_the_divergence_in_expectation_and_never_negative():
    rng = np.random.default_rng(0)
    p, q = (np.asarray(jax.nn.log_softmax(jnp.asarray(rng.standard_normal(30), jnp.float32))) for _ in range(2))
    np.testing.assert_allclose(np.sum(np.exp(p) * k3(q - p)), np.sum(np.exp(p) * (p - q)), rtol=1e-5)
    assert (np.asarray(k3(np.linspace(-5, 5, 101))) >= 0).all()


def test_statistics_are_over_the_sampled_tokens():
    logp = np.array([[-1.0, -2.0, -3.0, -9.0]])
    batch = {
        "weights": np.array([[1, 1, 1, 0]]),
        "advantages": np.array([[1, -1, 1, 0]]),
        "policy_logprobs": np.array([[-1.0, -2.3, -3.1, 0]]),
        "logprobs": np.array([[-2.0, -2.0, -2.5, 0]]),
        "reference_logprobs": np.array([[-1.0, -2.0, -2.0, 0]]),
    }
    found = Objective(kl_coef=0.1, is_cap=2.0).statistics(logp, batch)
    assert found["delta_logp_mean"] == pytest.approx(0.4 / 3) and found["delta_logp_max"] == pytest.approx(0.3)
    assert found["kl"] == pytest.approx((np.e - 2) / 3, rel=1e-5) and found["capped"] == pytest.approx(1 / 3)
    assert "clipped" not in found
    nothing = Objective(kl_coef=0.1, is_cap=2.0, clip_low=0.1).statistics(logp, batch | {"weights": np.zeros((1, 4))})
    assert not any(nothing.values())


def test_all_options_together_through_the_chunked_loss():
    """Against the gradient of full logits by automatic differentiation."""
    rng = np.random.default_rng(0)
    B, T, D, V = 2, 12, 8, 40
    x, head = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((B, T, D), (V, D)))
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    objective = Objective(clip_low=0.3, clip_high=0.4, kl_coef=0.1, is_cap=1.5)

    def logprobs(x, head):
        logits = 15 * jnp.tanh(x @ head.T / 15)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

    _, aux = draw(B * T)
    noise = {name: 0.3 * rng.standard_normal((B, T)) for name in ("old_logprobs", "reference_logprobs", "logprobs")}
    aux = {name: aux[name].reshape(B, T) for name in ("weights", "advantages")}
    aux |= {name: logprobs(x, head) + value for name, value in noise.items()}
    aux = {name: jnp.asarray(value, jnp.float32) for name, value in aux.items()}

    def ours(x, head):
        return summed_token_loss(objective.token_loss, x, head, targets, aux, cap=15.0, vocab_size=V)[0]

    def plain(x, head):
        return objective.token_loss(logprobs(x, head), aux).sum()

    (value, grads), (want, expected) = (jax.value_and_grad(f, (0, 1))(x, head) for f in (ours, plain))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, ref in zip(grads, expected):
        np.testing.assert_allclose(got, ref, atol=1e-5 * float(jnp.abs(ref).max()))


CONFIG = tiny_config(n_layer=2, windows=(7, -1))


def scored(spec, batches, params):
    """The scores of each batch by one make_score."""
    mesh = make_mesh(spec)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(params, mesh))
        score = make_score(CONFIG, params, mesh)
        return [np.asarray(score(params, to_global(batch, mesh))) for batch in batches]


def test_scores_are_the_models_log_probabilities_on_any_number_of_devices():
    params, batch = random_params(CONFIG), random_batch(CONFIG, A=2)
    batch["weights"][1] = 0
    (one,), (eight,) = (scored(spec, [batch], params) for spec in ("data=1", "data=8"))
    np.testing.assert_allclose(eight, one, atol=1e-5)
    assert not one[1].any()  # nothing to train there
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    ids, starts, targets = (batch[name][0, 3] for name in ("inputs", "document_start", "targets"))
    plain = -reference.losses(reference.logits(CONFIG, wide, ids, starts), targets)
    np.testing.assert_allclose(one[0, 3], plain, atol=2e-4)


def test_scoring_compiles_once_whatever_else_is_in_the_batch(monkeypatch):
    traced = []
    monkeypatch.setattr(
        "nanochat_jax.rollouts.objective.token_logprobs", lambda x, *_, **__: traced.append(1) or jnp.zeros(x.shape[:2])
    )
    batch = random_batch(CONFIG, A=2)
    scored("data=1", [batch, batch | {"advantages": batch["weights"]}], random_params(CONFIG))
    assert traced == [1]
