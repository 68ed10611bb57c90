"""The Hopper kernels, interpreted on a CPU with their warpgroups and barriers, equal the definition.

The interpreter starts shared memory as NaN, so that reading a slot nobody filled shows. It blocks one XLA thread for
each warpgroup that waits: with fewer than conftest's 8 CPU devices it can stand still.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from nanochat_jax.model.attention.blocks import key_ranges, query_ranges
from nanochat_jax.model.attention.hopper import primitives
from nanochat_jax.model.attention.hopper.forward import mosaic_gpu, mosaic_gpu_refuses
from nanochat_jax.model.attention.reference import reference
from nanochat_jax.model.attention.residuals import LSE, OUT


def draw(B, T, N, K, H, dtype=jnp.bfloat16, seed=0):
    """q, k, v and the output's gradient. Of NumPy, as all that tests do outside of the kernels: nothing to compile."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, T, n, H), np.float32).astype(dtype) for n in (N, K, K, N)]


def starts(T, lengths=(), window=-1):
    """k_start [T] of documents of these lengths, the rest of the row one more document."""
    cuts = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    document = cuts[np.searchsorted(cuts, np.arange(T), side="right") - 1]
    return np.maximum(document, np.arange(T) - window if window >= 0 else 0)


def with_gradients(attend):
    def run(q, k, v, do, k_start):
        o, pull = jax.vjp(lambda *x: attend(*x, k_start), q, k, v)
        return o, *pull(do.astype(o.dtype))

    return jax.jit(run)


@partial(jax.jit, static_argnums=5)
def interpreted(q, k, v, do, k_start, scale):
    return with_gradients(lambda q, k, v, s: mosaic_gpu(q, k, v, s, scale, -1, interpret=True))(q, k, v, do, k_start)


def defined(q, k, v, do, k_start, scale):
    x = [x.astype(np.float32) for x in (q, k, v, do)]
    return with_gradients(lambda q, k, v, s: reference(q, k, v, s, scale, -1))(*x, k_start)


RAGGED = (1, 70, 1, 1, 128, 27)

CASES = {  # B, T, N, K, H, scale, k_start [B,T]
    "documents, a window": (2, 300, 2, 1, 64, 0.1, [starts(300, RAGGED), starts(300, window=100)]),
    "both, heads of 128": (1, 200, 3, 1, 128, 0.06, [starts(200, (33, 100), window=50)]),
    "one query head to a kv head": (1, 129, 2, 2, 64, 0.1, [starts(129)]),
    "float16, a negative scale": (1, 128, 1, 1, 64, -0.1, [starts(128, (5,))]),
    "a zero scale": (1, 5, 1, 1, 64, 0.0, [starts(5)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_definition(name):
    *shape, scale, k_start = CASES[name]
    x = draw(*shape, dtype=jnp.float16 if "float16" in name else jnp.bfloat16)
    k_start = np.stack(k_start).astype(np.int32)
    for got, want in zip(interpreted(*x, k_start, scale), defined(*x, k_start, scale)):
        assert got.dtype == x[0].dtype and got.shape == want.shape
        got, want = np.asarray(got, np.float32), np.asarray(want)
        np.testing.assert_allclose(got, want, atol=8e-3 * np.abs(want).max())


def test_results_repeat_bit_for_bit_and_large_scores_neither_overflow_nor_vanish():
    q, *x = draw(1, 129, 2, 2, 64)
    q, k_start = (300 * q).astype(q.dtype), starts(129, (128,))[None].astype(np.int32)
    first, second = (interpreted(q, *x, k_start, 0.1) for _ in range(2))
    for a, b in zip(first, second):
        assert np.isfinite(np.asarray(a, np.float32)).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("k_start", "poisoned", "clean"),
    [
        (starts(384, (256,)), slice(0, 256), slice(256, 384)),  # the first document, and what sees the second
        (starts(384, (256,)), slice(256, 384), slice(0, 256)),
        (starts(384, window=100), slice(0, 128), slice(256, 384)),  # queries from 256 on see keys from 156 on
        (starts(384, window=100), slice(256, 384), slice(0, 128)),
    ],
    ids=["earlier document", "later document", "before the window", "after the window"],
)
def test_excluded_blocks_are_not_even_multiplied(k_start, poisoned, clean):
    arrays = draw(1, 384, 1, 1, 64)
    for x in arrays:
        x[:, poisoned] = np.nan
    for y in interpreted(*arrays, k_start[None].astype(np.int32), 0.125):
        y = np.asarray(y, np.float32)
        assert np.isfinite(y[:, clean]).all() and np.isnan(y[:, poisoned]).any()


def test_the_warpgroups_do_not_race_for_the_slots_of_a_small_ring(monkeypatch):
    for blocks in (primitives.FORWARD, primitives.DQ, primitives.DKV):
        monkeypatch.setitem(blocks, 64, primitives.Blocks(64, 2))
    q, k, v, do = draw(1, 256, 1, 1, 64)
    k_start = starts(256, (100,))[None].astype(np.int32)
    detect = plgpu.InterpretGPUParams(detect_races=True)  # a race raises
    run = with_gradients(lambda q, k, v, s: mosaic_gpu(q, k, v, s, 0.1, -1, interpret=detect))
    jax.block_until_ready(run(q, k, v, do, k_start))


BLOCKS = st.sampled_from([2, 4, 8])
RANGES = [jax.jit(ranges, static_argnums=(1, 2)) for ranges in (key_ranges, query_ranges)]


@given(data=st.data(), block_q=BLOCKS, block_k=BLOCKS, window=st.integers(-1, 9))
@settings(max_examples=40, deadline=None)
def test_ranges_visit_exactly_the_blocks_with_a_visible_key_and_mask_those_not_seen_whole(
    data, block_q, block_k, window
):
    T = 32
    lengths = data.draw(st.lists(st.integers(1, 20), max_size=8))
    k_start = starts(T, np.array(lengths)[np.cumsum(lengths) < T] if lengths else (), window)
    t = np.arange(T)
    visible = (t >= k_start[:, None]) & (t <= t[:, None])  # [queries, keys]
    tiles = visible.reshape(T // block_q, block_q, T // block_k, block_k)
    some, every = tiles.any((1, 3)), tiles.all((1, 3))
    row = k_start[None].astype(np.int32)
    for of, visit, whole in zip(RANGES, (some, some.T), (every, every.T)):
        first, full_first, full_last, last = (np.asarray(x)[0, :, None] for x in of(row, block_q, block_k))
        j = np.arange(visit.shape[1])
        np.testing.assert_array_equal((first <= j) & (j < last), visit)
        unmasked = (full_first <= j) & (j < full_last)
        assert not (unmasked & ~whole).any()
        if block_q % block_k == 0 or block_k % block_q == 0:
            np.testing.assert_array_equal(unmasked, whole)


def lowered(T, N, K, H, wrap=lambda f: f):
    """StableHLO for CUDA of the value and gradients of two layers of attention, as text."""

    def loss(q, k, v, k_start):
        for _ in range(2):
            q = mosaic_gpu(q, k, v, k_start, H**-0.5, -1)
        return q.astype(jnp.float32).sum()

    q, kv = (jax.ShapeDtypeStruct((2, T, n, H), jnp.bfloat16) for n in (N, K))
    k_start = jax.ShapeDtypeStruct((2, T), jnp.int32)
    grad = jax.jit(jax.value_and_grad(wrap(loss), (0, 1, 2)))
    return grad.trace(q, kv, kv, k_start).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    return len(re.findall(r"custom_call @mosaic_gpu\w*\(", text))


@pytest.mark.parametrize(("T", "N", "K", "H"), [(2048, 8, 2, 128), (1000, 2, 2, 64)])
def test_the_program_of_the_gpu_lowers_without_one_and_each_kernel_once_for_all_layers(T, N, K, H):
    assert kernels(lowered(T, N, K, H)) == 3  # output, dq, dk with dv


def test_a_rematerialisation_policy_keeps_output_and_log_sum_exp_by_name():
    policy = jax.checkpoint_policies.save_only_these_names(OUT, LSE)
    assert kernels(lowered(256, 2, 1, 64, partial(jax.checkpoint, policy=policy))) == 3
    assert kernels(lowered(256, 2, 1, 64, jax.checkpoint)) == 4


def test_what_the_kernels_cannot_take_is_said_in_one_sentence():
    assert mosaic_gpu_refuses((1, 64, 4, 128), 2, jnp.bfloat16) is None
    for arguments, why in (
        (((1, 64, 4, 96), 2, jnp.bfloat16), "heads of size 64 or 128, got 96"),
        (((1, 64, 4, 64), 3, jnp.bfloat16), "got 4 and 3"),
        (((1, 64, 4, 64), 2, jnp.float32), "got float32"),
    ):
        assert why in mosaic_gpu_refuses(*arguments)
    q, k, v, _ = draw(1, 8, 1, 1, 32)
    with pytest.raises(ValueError, match="got 32"):
        mosaic_gpu(q, k, v, jnp.zeros((1, 8), jnp.int32), 0.1, -1)


def test_blocks_that_exceed_shared_memory_are_refused_before_they_run(monkeypatch):
    monkeypatch.setitem(primitives.FORWARD, 128, primitives.Blocks(128, 8))
    with pytest.raises(ValueError, match="bytes of shared memory, got 5"):
        lowered(256, 1, 1, 128)
