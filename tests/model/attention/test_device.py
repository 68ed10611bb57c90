"""Every attention backend on the accelerator at hand equals the definition; on a CPU there is nothing to see.

Run: JAX_PLATFORMS=cuda NANOCHAT_TEST_OPTIMIZED=1 python -m pytest tests/model/attention/test_device.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.model.attention import (
    NAMES,
    AttentionShapes,
    attention,
    choose_attention_backend,
    first_key,
    select,
)
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.optim.groups import default_groups, make_optimizer
from nanochat_jax.train.step import abstract_state, make_train_step, random_state

pytestmark = pytest.mark.skipif(
    jax.default_backend() == "cpu", reason="the default device is a CPU (tests choose it unless JAX_PLATFORMS is set)"
)
KERNELS = [name for name in NAMES if select.BACKENDS[name].platform]
CASES = {  # B, T, N, K, H, mean length of documents (0: one a row), window
    "dense": (2, 1024, 4, 4, 128, 0, -1),
    "dense, heads of 64": (2, 1024, 4, 4, 64, 0, -1),
    "a window": (2, 2048, 2, 2, 128, 0, 512),
    "a window, T no multiple of a block": (2, 1000, 4, 2, 64, 0, 100),
    "documents": (2, 2048, 4, 4, 128, 300, -1),
    "documents and a window, grouped heads": (3, 1500, 6, 2, 128, 200, 256),
    "tiny documents": (2, 700, 4, 1, 64, 5, -1),
    "a window of nothing": (1, 300, 2, 2, 64, 0, 0),
    "one token": (1, 1, 2, 1, 128, 0, -1),
    "a long row": (1, 8192, 2, 2, 128, 500, 512),
}


def one_device():
    return make_mesh("data=1,model=1")


def skip_if_refused(name, N, K, H, T, dtype, packed, window):
    """Only what the device or the shape excludes: a kernel of ours that does not compile must fail the test."""
    why, shapes = select.device_refuses(name, jax.devices()[0], packed), AttentionShapes(N, K, H, (window,), T)
    if not why and name == "cudnn":
        why = select.refuses(name, one_device(), dtype, shapes, packed)
    elif not why and name in KERNELS:
        why = select.shape_refuses(name, one_device(), dtype, shapes)
    if why:
        pytest.skip(why)


def draw(B, T, N, K, H, documents, window, dtype, seed=0):
    """q, k, v, the output's gradient, k_start [B,T]."""
    rng = np.random.default_rng(seed)
    borders = rng.random((B, T)) < 1 / documents if documents else np.zeros((B, T), bool)
    starts = np.maximum.accumulate(np.where(borders, np.arange(T), 0), -1).astype(np.int32)
    k_start = first_key(jnp.asarray(starts), jnp.arange(T, dtype=jnp.int32)[None], window)
    arrays = (jnp.asarray(rng.standard_normal((B, T, n, H), np.float32), dtype) for n in (N, K, K, N))
    return *arrays, k_start


def with_gradients(name, window):
    """(q, k, v, dy, k_start) -> y, dq, dk, dv."""

    def run(q, k, v, dy, k_start):
        y, pull = jax.vjp(lambda *x: attention(*x, k_start, window=window, impl=name), q, k, v)
        return y, *pull(dy)

    return jax.jit(run)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "reference"])
def test_values_and_gradients_equal_the_definition(name, case, dtype):
    B, T, N, K, H, documents, window = CASES[case]
    skip_if_refused(name, N, K, H, T, dtype, documents > 0, window)
    *arrays, k_start = draw(B, T, N, K, H, documents, window, dtype)
    found = with_gradients(name, window)(*arrays, k_start)
    with jax.default_matmul_precision("highest"):
        expected = with_gradients("reference", window)(*(x.astype(jnp.float32) for x in arrays), k_start)
    tolerance = 0.01 if dtype == "bfloat16" else 0.003  # float32 products may be made of tf32 ones
    for what, got, want in zip(("y", "dq", "dk", "dv"), found, expected):
        assert got.dtype == dtype and got.shape == want.shape
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        # Softmax over one key has no gradient: what is left of dq and dk is rounding, small beside the values.
        size = max(np.linalg.norm(want), 1e-2 * np.linalg.norm(expected[0]) if what in ("dq", "dk") else 0)
        error = np.linalg.norm(got - want) / size
        assert error < tolerance, f"{what}: {error:.2g}"  # also where it is NaN


@pytest.mark.parametrize("name", ["chunked", "mosaic_gpu", "splash"])
def test_results_repeat_bit_for_bit(name):
    N, K, H, T, window = 4, 2, 128, 2048, 512
    skip_if_refused(name, N, K, H, T, "bfloat16", True, window)
    arrays = draw(4, T, N, K, H, 300, window, "bfloat16")
    run = with_gradients(name, window)
    first = [np.asarray(x, np.float32) for x in run(*arrays)]
    for _ in range(20):
        for a, b in zip(first, run(*arrays)):
            np.testing.assert_array_equal(a, np.asarray(b, np.float32))


def test_the_hopper_kernels_do_not_look_at_excluded_blocks():
    skip_if_refused("mosaic_gpu", 2, 2, 128, 2048, "bfloat16", True, -1)
    q, k, v, dy, _ = draw(1, 2048, 2, 2, 128, 0, -1, "bfloat16")
    k_start = jnp.where(jnp.arange(2048) < 1024, 0, 1024).astype(jnp.int32)[None]
    for poisoned, clean in ((slice(0, 1024), slice(1024, 2048)), (slice(1024, 2048), slice(0, 1024))):
        arrays = [x.at[:, poisoned].set(jnp.nan) for x in (q, k, v, dy)]
        for x in with_gradients("mosaic_gpu", -1)(*arrays, k_start):
            x = np.asarray(x, np.float32)
            assert np.isfinite(x[:, clean]).all() and np.isnan(x[:, poisoned]).any()


def test_auto_takes_the_fast_kernel_where_the_device_has_it():
    first = (*select.kernels_of(jax.devices()[0].platform), "")[0]
    skip_if_refused(first or "mosaic_gpu", 4, 4, 128, 2048, "bfloat16", True, 512)
    assert choose_attention_backend(
        "auto", one_device(), "bfloat16", AttentionShapes(4, 4, 128, (512, 2048), 2048)
    ) == (first, None)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_training_with_the_chosen_backend_is_training_with_the_definition(remat):
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 256}
    config = GPTConfig(sequence_len=512, vocab_size=512, padded_vocab=512, windows=(128, 512), **shape)
    mesh = one_device()
    name = choose_attention_backend("auto", mesh, "bfloat16", AttentionShapes.of(config, 512)).name
    tx = make_optimizer(default_groups(256, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02), jnp.bfloat16)
    rng = np.random.default_rng(0)
    shape = (1, 4, 512)
    starts = np.maximum.accumulate(np.where(rng.random(shape) < 0.01, np.arange(512), 0), -1).astype(np.int32)
    inputs = rng.integers(0, 512, shape, dtype=np.int32)
    batch = {"inputs": inputs, "targets": np.roll(inputs, -1, -1), "weights": np.ones(shape, np.float32)}

    def losses(attention):
        with jax.set_mesh(mesh):
            abstract = abstract_state(config, tx, mesh)
            state = random_state(config, tx, abstract, seed=0)
            step = make_train_step(config, tx, abstract, mesh, dtype=jnp.bfloat16, attention=attention, remat=remat)
            rows = to_global(batch | {"document_start": starts}, mesh)
            found = []
            for _ in range(6):
                state, metrics = step(state, rows, np.float32(1.0), np.float32(0.9))
                found.append(float(metrics.loss))
        return found

    got, want = losses(name), losses("reference")
    assert want[-1] < want[0]
    np.testing.assert_allclose(got, want, rtol=0.01)
