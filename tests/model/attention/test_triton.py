"""The Triton kernels, interpreted on a CPU, equal the definition."""

from functools import partial

import jax
import numpy as np
import pytest

from nanochat_jax.model.attention.reference import reference
from nanochat_jax.model.attention.triton import BLOCK, TILES, triton
from tests.model.attention.test_hopper import draw, starts, with_gradients

CASES = {  # B, T, N, K, H, dtype, scale, k_start [B,T]
    "documents, a window": (2, 300, 2, 1, 64, "bfloat16", 0.1, [starts(300, (1, 70, 1, 128)), starts(300, window=100)]),
    "both, heads of 128": (1, 400, 3, 1, 128, "bfloat16", -0.06, [starts(400, (33, 100, 201), window=50)]),
    "float32, a kv head for each query head": (1, 257, 2, 2, 64, "float32", 0.1, [starts(257, (33, 100))]),
    "float16, one token, a zero scale": (1, 1, 1, 1, 64, "float16", 0.0, [starts(1)]),
}


@partial(jax.jit, static_argnums=5)
def interpreted(q, k, v, do, k_start, scale):
    return with_gradients(lambda q, k, v, s: triton(q, k, v, s, scale, -1, interpret=True))(q, k, v, do, k_start)


def defined(q, k, v, do, k_start, scale):
    x = [x.astype(np.float32) for x in (q, k, v, do)]
    return with_gradients(lambda q, k, v, s: reference(q, k, v, s, scale, -1))(*x, k_start)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_definition(name):
    *shape, dtype, scale, k_start = CASES[name]
    x, k_start = draw(*shape, dtype=dtype), np.stack(k_start).astype(np.int32)
    tolerance = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    for got, want in zip(interpreted(*x, k_start, scale), defined(*x, k_start, scale)):
        assert got.dtype == x[0].dtype and got.shape == want.shape
        got, want = np.asarray(got, np.float32), np.asarray(want)
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max() + 1e-6)


# The following are of the first case's shape: a kernel is compiled once.
@pytest.mark.parametrize(("poisoned", "clean"), [(slice(0, 256), slice(256, 300)), (slice(256, 300), slice(0, 256))])
def test_excluded_blocks_are_not_even_read(poisoned, clean):
    """A NaN times a masked 0 would be NaN."""
    x, k_start = draw(2, 300, 2, 1, 64), np.stack([starts(300, (256,))] * 2).astype(np.int32)
    for array in x:
        array[:, poisoned] = np.nan
    for got in interpreted(*x, k_start, 0.1):
        got = np.asarray(got, np.float32)
        assert np.isfinite(got[:, clean]).all() and np.isnan(got[:, poisoned]).all()


def test_large_scores_neither_overflow_nor_vanish_and_a_query_always_sees_itself():
    q, k, v, do = draw(2, 300, 2, 1, 64)
    k_start = np.stack([starts(300)] * 2).astype(np.int32)
    k_start[:, 299] = 300  # no key at all
    y, dq, *_ = (np.asarray(x, np.float32) for x in interpreted((300 * q).astype(q.dtype), k, v, do, k_start, 0.1))
    assert np.isfinite(y).all() and np.isfinite(300 * dq).all()
    np.testing.assert_array_equal(y[:, 299, 1], np.asarray(v, np.float32)[:, 299, 0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"H": 96}, "triton takes heads of size 64 or 128, got 96"),
        ({"K": 2}, "multiple of the kv heads, got 3 and 2"),
        ({"dtype": "int8"}, "triton takes bfloat16, float16 or float32, got int8"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_by_name(change, said):
    shape = {"B": 1, "T": 8, "N": 3, "K": 1, "H": 64, "dtype": "bfloat16"} | change
    q, k, v, _ = draw(**shape)
    with pytest.raises(ValueError, match=said):
        triton(q, k, v, np.zeros((1, 8), np.int32), 0.1, -1, interpret=True)
    q, k, v, _ = draw(1, 8, 1, 1, 64)
    with pytest.raises(ValueError, match="must have one type, got bfloat16, float16 and bfloat16"):
        triton(q, k.astype("float16"), v, np.zeros((1, 8), np.int32), 0.1, -1, interpret=True)


def test_every_kernel_has_blocks_that_divide_the_padded_rows():
    for tiles in (tiles for kernels in TILES.values() for tiles in kernels):
        assert BLOCK % tiles.own == 0 and BLOCK % tiles.step == 0 and tiles.warps in (4, 8)
