"""The chunked loss equals the plain one, in a tenth of its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.model import loss
from nanochat_jax.model.loss import Limits, summed_token_loss, token_logprobs, weighted_nll

HEAD = {"cap": 15.0, "vocab_size": 90}


def draw(B=4, T=33, D=16, rows=96, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((rows, D)) * 2, jnp.float32)
    targets = jnp.asarray(rng.integers(0, 90, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((B, T)) * (rng.random((B, T)) < 0.6), jnp.float32)
    return x, head, targets, {"weights": weights}


def plain_logprobs(x, head, targets, cap=15.0, vocab_size=90):
    z = jnp.einsum("BTD,VD->BTV", x, head[:vocab_size], preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(cap * jnp.tanh(z / cap))
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]


def plain_loss(token_loss, x, head, targets, aux):
    return jnp.sum(token_loss(plain_logprobs(x, head, targets), aux))


@pytest.fixture(params=[200, 1 << 12, 1 << 20], ids=["many chunks", "few chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS_CPU", request.param)


def clipped(logp, aux):
    """A ratio clipped as in PPO, with a weight."""
    ratio = jnp.exp(logp - aux["old"])
    return -aux["weights"] * jnp.minimum(ratio, jnp.clip(ratio, 0.8, 1.2))


@pytest.mark.parametrize("token_loss", [weighted_nll, clipped])
def test_value_and_gradients_equal_the_plain_loss(chunk, token_loss):
    x, head, targets, aux = draw()
    aux["old"] = plain_logprobs(x, head, targets) + 0.1

    def ours(x, head):
        value, logp = summed_token_loss(token_loss, x, head, targets, aux, **HEAD)
        return 3 * value, logp

    (value, logp), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(x, head)
    want, expected = jax.value_and_grad(lambda x, h: 3 * plain_loss(token_loss, x, h, targets, aux), (0, 1))(x, head)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(logp, plain_logprobs(x, head, targets), atol=1e-5)
    for got, ref in zip(grads, expected):
        np.testing.assert_allclose(got, ref, atol=1e-5 * float(jnp.abs(ref).max()))
    assert not grads[1][90:].any()  # rows that pad the vocabulary


@pytest.mark.parametrize("limits", [Limits(1.0, 5), Limits(0.3, 20), Limits(2.0, 0), Limits(1.0, 90), Limits(0.01, 3)])
def test_limits_renormalise_over_the_k_largest_logits_and_the_target(chunk, limits):
    x, head, targets, aux = draw()

    def plain(x, head):
        z = 15 * jnp.tanh(jnp.einsum("BTD,VD->BTV", x, head[:90]) / 15)
        floor = jnp.sort(z)[..., -(limits.top_k or 90), None]
        stays = (z >= floor) | jax.nn.one_hot(targets, 90, dtype=bool)
        logp = jax.nn.log_softmax(jnp.where(stays, z / limits.temperature, -jnp.inf))
        logp = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
        return jnp.sum(weighted_nll(logp, aux)), logp

    def ours(x, head):
        return summed_token_loss(weighted_nll, x, head, targets, aux, **HEAD, limits=limits)

    (value, logp), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(x, head)
    (want, expected_logp), expected = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(x, head)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(logp, expected_logp, rtol=1e-5, atol=1e-5)
    for got, ref in zip(grads, expected):
        np.testing.assert_allclose(got, ref, atol=1e-4 * float(jnp.abs(ref).max()))


def test_a_sampled_token_that_is_not_among_the_k_largest_here_has_a_probability_all_the_same():
    x, head, _, aux = draw()
    least = jnp.argmin(jnp.einsum("BTD,VD->BTV", x, head[:90]), -1)
    value, logp = summed_token_loss(weighted_nll, x, head, least, aux, **HEAD, limits=Limits(1.0, 3))
    assert jnp.isfinite(logp).all() and jnp.isfinite(value) and (logp < 0).all()


def test_logprobs_alone_equal_the_plain_ones(chunk):
    x, head, targets, _ = draw()
    np.testing.assert_allclose(token_logprobs(x, head, targets, **HEAD), plain_logprobs(x, head, targets), atol=1e-5)


def test_logits_at_the_cap_stay_exact():
    x, head, targets, aux = draw()
    big = 1e4 * x
    value, grads = jax.value_and_grad(lambda x: summed_token_loss(weighted_nll, x, head, targets, aux, **HEAD)[0])(big)
    np.testing.assert_allclose(value, plain_loss(weighted_nll, big, head, targets, aux), rtol=1e-5)
    assert jnp.isfinite(grads).all()


def test_tokens_without_weight_have_no_gradient():
    x, head, targets, _ = draw()
    zero = {"weights": jnp.zeros(targets.shape)}
    value, grads = jax.value_and_grad(
        lambda x, h: summed_token_loss(weighted_nll, x, h, targets, zero, **HEAD)[0], (0, 1)
    )(x, head)
    assert value == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize(("spec", "B"), [("data=8", 8), ("data=4,model=2", 8), ("data=1,model=8", 8), ("data=8", 6)])
def test_eight_devices_give_the_loss_of_one(spec, B):
    """Also where the rows do not divide: then no device has a part of its own."""
    x, head, targets, aux = draw(B=B)

    def ours(x, head):
        return summed_token_loss(weighted_nll, x, head, targets, aux, **HEAD)[0]

    alone = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, head)
    with jax.set_mesh(make_mesh(spec)):
        together = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, head)
    for got, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(jnp.abs(want).max())))


def test_what_fills_up_the_last_chunk_cannot_spoil_the_gradient(monkeypatch):
    """A token loss may have no finite derivative where its inputs are the zeros of the padding."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS_CPU", 200)
    x, head, targets, _ = draw(T=7)
    aux = {"norm": jnp.ones(targets.shape)}
    grads = jax.grad(lambda h: summed_token_loss(lambda p, a: -p / a["norm"], x, h, targets, aux, **HEAD)[0])(head)
    assert jnp.isfinite(grads).all()


def test_bfloat16_activations_keep_a_float32_gradient_of_the_head():
    x, head, targets, aux = draw()
    grads = jax.grad(lambda x, h: summed_token_loss(weighted_nll, x, h, targets, aux, **HEAD)[0], (0, 1))(
        x.astype(jnp.bfloat16), head
    )
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    exact = jax.grad(lambda h: plain_loss(weighted_nll, x, h, targets, aux))(head)
    assert jnp.abs(grads[1] - exact).max() < 0.03 * jnp.abs(exact).max()


def test_peak_memory_is_under_a_tenth_of_full_logits():
    B, T, V, D = 8, 2048, 32768, 64
    x, head = jax.ShapeDtypeStruct((B, T, D), jnp.float32), jax.ShapeDtypeStruct((V, D), jnp.float32)
    targets, aux = jax.ShapeDtypeStruct((B, T), jnp.int32), {"weights": jax.ShapeDtypeStruct((B, T), jnp.float32)}

    def temporary(f):
        compiled = jax.jit(jax.value_and_grad(f, (0, 1))).lower(x, head, targets, aux).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def chunked(x, h, targets, aux):
        return summed_token_loss(weighted_nll, x, h, targets, aux, cap=15.0, vocab_size=V)[0]

    def full(x, h, targets, aux):
        return jnp.sum(-aux["weights"] * plain_logprobs(x, h, targets, vocab_size=V))

    assert temporary(chunked) < temporary(full) / 10
