"""The Triton kernels, interpreted on a CPU, equal the definition."""

from functools import partial

import jax
import numpy as np
import pytest

from nanochat_jax.model.attention.reference import reference
from nanochat_jax.model.attention.triton import triton
from tests.model.attention.test_hopper import draw, starts, with_gradients

RAGGED = (1, 70, 1, 1, 128, 27)
CASES = {  # B, T, N, K, H, scale, k_start [B,T]
    "documents, a window": (2, 300, 2, 1, 64, 0.1, [starts(300, RAGGED), starts(300, window=100)]),
    "both, heads of 128": (1, 400, 3, 1, 128, 0.06, [starts(400, (33, 100, 201), window=50)]),
    "float32": (1, 200, 2, 1, 64, 0.1, [starts(200, (33, 100))]),
    "float32, heads of 128": (1, 200, 2, 2, 128, 0.1, [starts(200, (33, 100))]),
    "one query head to a kv head": (1, 129, 2, 2, 64, 0.1, [starts(129)]),
    "float16, a negative scale": (1, 128, 1, 1, 64, -0.1, [starts(128, (5,))]),
    "a zero scale": (1, 5, 1, 1, 64, 0.0, [starts(5)]),
}


@partial(jax.jit, static_argnums=5)
def interpreted(q, k, v, do, k_start, scale):
    return with_gradients(lambda q, k, v, s: triton(q, k, v, s, scale, -1, interpret=True))(q, k, v, do, k_start)


def defined(q, k, v, do, k_start, scale):
    x = [x.astype(np.float32) for x in (q, k, v, do)]
    return with_gradients(lambda q, k, v, s: reference(q, k, v, s, scale, -1))(*x, k_start)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_definition(name):
    *shape, scale, k_start = CASES[name]
    x = draw(*shape, dtype=next((d for d in ("float16", "float32") if d in name), "bfloat16"))
    k_start = np.stack(k_start).astype(np.int32)
    for got, want in zip(interpreted(*x, k_start, scale), defined(*x, k_start, scale)):
        assert got.dtype == x[0].dtype and got.shape == want.shape
        got, want = np.asarray(got, np.float32), np.asarray(want)
        np.testing.assert_allclose(got, want, atol=(1e-5 if "float32" in name else 8e-3) * np.abs(want).max() + 1e-6)
