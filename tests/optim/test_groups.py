"""The optimizer's parts against plain NumPy statements of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.optim import groups as optim_groups
from nanochat_jax.optim.groups import AdamW, Muon, default_groups, make_optimizer
from nanochat_jax.optim.muon import POLAR_EXPRESS
from nanochat_jax.train.step import init_state, state_shardings
from tests.support.models import random_params, tiny_config

GROUPS = default_groups(64, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.1)


def like(params, seed):
    return jax.tree.map(lambda p: np.random.default_rng(seed).standard_normal(p.shape).astype(np.float32), params)


@jax.jit  # tests share it: compiling takes seconds
def step(params, state, grads, multiplier):
    updates, state = make_optimizer(GROUPS).update(grads, state, params, lr_multiplier=multiplier, muon_momentum=0.9)
    return optax.apply_updates(params, updates), state


init = jax.jit(make_optimizer(GROUPS).init)


def take_steps(params, count=3, multiplier=1.0, step=step):
    state = init(params)
    for seed in range(count):
        params, state = step(params, state, like(params, seed), multiplier)
    return params, state


def test_adamw_decays_first_and_adds_eps_after_bias_correction():
    params = random_params(tiny_config())
    p, m, v = np.float64(params["lm_head"]), 0.0, 0.0
    group = GROUPS["unembedding"]
    for t in range(1, 4):
        g = np.float64(like(params, t - 1)["lm_head"])
        p = p * (1 - group.lr * group.weight_decay)
        m, v = group.b1 * m + (1 - group.b1) * g, group.b2 * v + (1 - group.b2) * g * g
        p = p - group.lr / (1 - group.b1**t) * m / (np.sqrt(v / (1 - group.b2**t)) + group.eps)
    np.testing.assert_allclose(take_steps(params)[0]["lm_head"], p, atol=2e-6)


def muon_in_numpy(p, grads, lr, wd, mu=0.9):
    r, c = p.shape
    buf, second = np.zeros_like(p), np.zeros((r, 1) if r >= c else (1, c))
    for g in grads:
        buf = mu * buf + (1 - mu) * g
        u = (1 - mu) * g + mu * buf
        rows = np.linalg.norm(u, axis=1, keepdims=True)
        u = u * (np.linalg.norm(u) / r**0.5) / np.maximum(rows, 1e-6)
        X = u / (1.01 * np.linalg.norm(u) + 1e-6)
        for a, b, d in POLAR_EXPRESS:
            A = X @ X.T
            X = a * X + (b * A + d * A @ A) @ X
        X = X * min(r, c) ** 0.5 / np.linalg.norm(X)
        axis, n = (1, c) if r >= c else (0, r)
        q = (X**2).mean(axis, keepdims=True)
        second = 0.9 * second + 0.1 * q
        f = 1 / np.sqrt(np.maximum(second, 1e-10))
        X = X * f * np.sqrt(n * q.sum()) / np.sqrt((n * q * f * f).sum())
        L = lr * max(1, r / c) ** 0.5
        p = p - L * X - L * wd * p * (X * p >= 0)
    return p


@pytest.mark.parametrize(
    "path", [("attn", "c_q"), ("attn", "c_k"), ("mlp", "c_fc"), ("mlp", "c_proj"), ("attn", "ve_gate")]
)
def test_muon_follows_its_formula_for_tall_wide_and_square_matrices(path):
    params = random_params(tiny_config())

    def pick(tree):
        return np.float64(tree["blocks"][0][path[0]][path[1]])

    grads = [pick(like(params, seed)) for seed in range(3)]
    expected = muon_in_numpy(pick(params), grads, lr=0.02, wd=0.1)
    np.testing.assert_allclose(pick(take_steps(params)[0]), expected, atol=3e-6)


def test_devices_share_the_orthogonalisation_and_agree_with_one():
    params = random_params(tiny_config())
    alone, mesh, tx = take_steps(params)[0], make_mesh("data=8"), make_optimizer(GROUPS)
    shardings = state_shardings(jax.eval_shape(lambda p: init_state(p, tx), params), tx, mesh)
    placed = shardings.params, shardings.opt_state  # as in training, before a step and after it: one program
    run = jax.jit(step.__wrapped__, out_shardings=placed)

    def together_step(params, state, *rest):
        return run(*jax.device_put((params, state), placed), *rest)

    with jax.set_mesh(mesh):
        together = take_steps(params, step=together_step)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone, together)


def test_a_multiplier_of_zero_leaves_every_parameter():
    params = random_params(tiny_config())
    after = take_steps(params, multiplier=0.0)[0]
    jax.tree.map(np.testing.assert_array_equal, after, params)


def test_rates_scale_with_width_and_decay_reaches_the_matrices_only():
    narrow, wide = (default_groups(w, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02) for w in (192, 768))
    assert narrow["embedding"].lr == pytest.approx(2 * wide["embedding"].lr)
    assert narrow["matrix"] == wide["matrix"] == Muon(0.02, 0.0)
    assert wide["value_embedding"] == AdamW(0.15, 0.8, 0.995, 0.01)
    assert GROUPS["matrix"].weight_decay == 0.1 and GROUPS["x0"].weight_decay == 0
    assert optim_groups.scale_rates(GROUPS, 0.5)["smear"].lr == 0.1


def test_a_parameter_without_a_group_is_an_error():
    with pytest.raises(ValueError, match="no rule matches parameter 'mystery'"):
        make_optimizer(GROUPS).init({"mystery": jnp.zeros(3)})


def test_a_scalar_of_the_schedule_that_no_group_reads_changes_nothing():
    """So a new one is known only to the transform that reads it and to the stage that computes it."""
    params = {"wte": np.ones((4, 2), np.float32), "blocks": [{"attn": {"c_q": np.ones((2, 2), np.float32)}}]}
    tx = make_optimizer(optim_groups.groups_in_use(GROUPS, params))

    def updates(**more):
        return tx.update(params, tx.init(params), params, lr_multiplier=1.0, muon_momentum=0.9, **more)[0]

    jax.tree.map(np.testing.assert_array_equal, updates(), updates(unheard_of=0.5))


def test_state_goes_out_as_flat_arrays_and_comes_back():
    params = random_params(tiny_config())
    _, state = take_steps(params, count=1)
    arrays = optim_groups.state_arrays(state)
    assert arrays["count/smear"] == 1 and arrays["momentum/blocks/1/mlp/c_fc"].shape == (256, 64)
    empty = init(params)
    back = optim_groups.with_state_arrays(empty, arrays)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_the_decay_multiplier_reaches_the_matrices_only():
    params, half = random_params(tiny_config()), {**GROUPS, "matrix": Muon(GROUPS["matrix"].lr, 0.05)}

    @jax.jit  # one program for all three, which have all but the decay in common
    def run(params, multiplier):
        def updates(groups, **scalars):
            tx = make_optimizer(groups)
            grads = jax.tree.map(jnp.ones_like, params)
            return tx.update(grads, tx.init(params), params, lr_multiplier=1.0, muon_momentum=0.9, **scalars)[0]

        return updates(GROUPS, decay_multiplier=multiplier), updates(half), updates(GROUPS)

    scaled, halved, whole = jax.device_get(run(params, np.float32(0.5)))
    jax.tree.map(np.testing.assert_array_equal, scaled, halved)
    different = jax.tree.map(lambda a, b: bool((a != b).any()), scaled, whole)
    assert different["blocks"][0]["mlp"]["c_fc"] and not different["wte"] and not different["x0_lambdas"]
