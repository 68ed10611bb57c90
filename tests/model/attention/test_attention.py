"""Every backend equals the definition, values and gradients, and the definition equals a loop over tokens."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model.attention import attention, decode_attention
from nanochat_jax.model.attention.cudnn import cudnn
from nanochat_jax.model.attention.residuals import LSE, OUT
from nanochat_jax.model.attention.splash import block_and_padded_length, document_numbers, splash
from nanochat_jax.model.attention.triton import triton


def draw(B=2, T=40, N=4, K=2, H=8, seed=0, documents=True):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
    starts = np.where(rng.random((B, T)) < 0.1, np.arange(T), 0) if documents else np.zeros((B, T), int)
    return q, k, v, np.maximum.accumulate(starts, -1).astype(np.int32)


def with_window(k_start, window):
    return k_start if window < 0 else np.maximum(k_start, np.arange(k_start.shape[1], dtype=np.int32)[None] - window)


# All around these is NumPy: an operation outside of a program is a program of its own for each shape.
@partial(jax.jit, static_argnames=("impl", "window"))
def attended(impl, q, k, v, k_start, window=-1):
    return attention(q, k, v, k_start, window=window, impl=impl)


def pulled_back(impl, q, k, v, k_start, dy, window=-1):
    """[y, dq, dk, dv] of the output's gradient dy, or where it is None, of the output itself."""
    return list(map(np.asarray, _pulled_back(impl, q, k, v, k_start, dy, window)))


@partial(jax.jit, static_argnames=("impl", "window"))
def _pulled_back(impl, q, k, v, k_start, dy, window):
    y, pull = jax.vjp(lambda *x: attention(*x, k_start, window=window, impl=impl), q, k, v)
    return y, *pull(y if dy is None else dy)


def test_the_definition_is_a_softmax_over_an_interval_of_keys():
    q, k, v, k_start = (np.asarray(x, np.float64) for x in draw())
    got = np.asarray(attended("reference", *draw()))
    for b, t, n in itertools.product(range(2), range(40), range(4)):
        keys = slice(int(k_start[b, t]), t + 1)
        scores = k[b, keys, n // 2] @ q[b, t, n] / 8**0.5
        p = np.exp(scores - scores.max())
        np.testing.assert_allclose(got[b, t, n], p / p.sum() @ v[b, keys, n // 2], atol=1e-5)


@pytest.mark.parametrize(("T", "window"), [(1, -1), (40, 7), (257, -1), (600, 200)])
@pytest.mark.parametrize(("documents", "N", "K"), [(False, 4, 4), (True, 4, 2), (True, 3, 1)])
def test_chunked_equals_the_definition_in_values_and_gradients(T, window, documents, N, K):
    arrays = draw(T=T, N=N, K=K, documents=documents)
    assert_equal_to_the_definition(partial(attention, impl="chunked"), *arrays, window)


REFERENCE = partial(attention, impl="reference")  # one for all windows, which k_start has: it is compiled once a shape


@partial(jax.jit, static_argnums=0)
def values_and_gradients(attend, q, k, v, k_start, weight):
    """-> (gradients of the sum of attend(q, k, v, k_start) * weight, attend's value)."""

    def loss(q, k, v):
        y = attend(q, k, v, k_start)
        return jnp.sum(y * weight), y

    return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)


def assert_equal_to_the_definition(attend, q, k, v, k_start, window, tolerance=1e-5):
    """Values and gradients of attend(q, k, v, k_start, window=window), in parts of the largest entry."""
    k_start = with_window(k_start, window)
    weight = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)
    grads, y = values_and_gradients(partial(attend, window=window), q, k, v, k_start, weight)
    expected_grads, expected = values_and_gradients(REFERENCE, q, k, v, k_start, weight)
    assert y.dtype == q.dtype
    for got, want in zip((y, *grads), (expected, *expected_grads)):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max() + 5e-6)


def on_cpu(q, k, v, k_start, *, window):
    """Splash, which needs a TPU, by its interpreter."""
    return splash(q, k, v, k_start, q.shape[-1] ** -0.5, window, interpret=True)


@pytest.mark.parametrize(
    ("T", "window", "documents", "N", "K", "H", "dtype"),
    [
        (128, -1, False, 2, 2, 64, "float32"),
        (300, 100, True, 4, 2, 64, "float32"),
        (130, 0, True, 2, 1, 128, "float32"),
        (700, 512, True, 2, 1, 128, "float32"),  # two blocks, and the window is none of their size
        (1, -1, True, 2, 2, 16, "float32"),
        (300, -1, True, 3, 1, 128, "bfloat16"),
    ],
)
def test_splash_equals_the_definition_in_values_and_gradients(T, window, documents, N, K, H, dtype):
    *arrays, k_start = draw(T=T, N=N, K=K, H=H, documents=documents)
    arrays = [x.astype(dtype) for x in arrays]
    assert_equal_to_the_definition(on_cpu, *arrays, k_start, window, 0.02 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("window", [-1, 0, 3, 64])
def test_splash_knows_the_documents_from_where_queries_begin_to_look(window):
    *_, k_start = draw(T=200)
    number = np.asarray(document_numbers(with_window(k_start, window), 56))
    assert number.shape == (2, 256)
    assert (number[:, 200:] == number[:, 199:200] + 1).all()  # the padding is a document of its own
    if window:
        np.testing.assert_array_equal(np.diff(number[:, :200]), np.diff(k_start) > 0)
    else:
        assert (np.diff(number[:, :200]) == 1).all()


def test_blocks_of_splash_are_whole_lanes_and_waste_little():
    for T, most in itertools.product(range(1, 5000, 7), (512, 1024)):
        block, padded = block_and_padded_length(T, most)
        assert block % 128 == 0 and block <= most and padded % block == 0 and padded >= T
        assert padded - T < 128 * (padded // block)
    assert [block_and_padded_length(2048, most) for most in (512, 1024)] == [(512, 2048), (1024, 2048)]


@pytest.mark.parametrize("window", [-1, 0, 5, 100])
def test_what_cudnn_is_asked_for_is_attention_within_one_document(window):
    """The same call with XLA's implementation in place of cuDNN's."""

    def attend(q, k, v, k_start, *, window):
        return cudnn(q, k, v, k_start, q.shape[-1] ** -0.5, window, implementation="xla")

    assert_equal_to_the_definition(attend, *draw(documents=False), window)


@pytest.mark.parametrize("impl", ["chunked", "splash", "triton"])
def test_a_rematerialisation_policy_finds_the_residuals_by_name(impl):
    """With the output and the log-sum-exp kept, the backward pass has no reason to run the forward one again."""
    q, k, v, k_start = draw(T=128, H=64)
    attend = {
        "chunked": partial(attention, impl="chunked"),
        "splash": on_cpu,
        "triton": lambda *x, window: triton(*x, 0.1, window, interpret=True),
    }[impl]

    def kernels(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        f = jax.checkpoint(lambda q: attend(q, k, v, k_start, window=-1).sum(), policy=policy)
        text = str(jax.make_jaxpr(jax.grad(f))(q))
        return text.count("= exp") if impl == "chunked" else text.count("pallas_call[")

    assert kernels(OUT, LSE) < kernels()


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, k_start = draw(T=200)
    for impl in ("reference", "chunked"):
        y, dq, *_ = pulled_back(impl, 300 * q, k, v, k_start, None)
        assert np.isfinite(y).all() and np.isfinite(300 * dq).all()


def test_a_query_does_not_depend_on_keys_outside_its_interval():
    q, k, v, k_start = draw(T=300)
    k_start = with_window(k_start, 50)
    y = np.asarray(attended("chunked", q, k, v, k_start, window=50))
    t = 170
    outside = np.ones(300, bool)
    outside[k_start[0, t] : t + 1] = False
    k[:, outside], v[:, outside] = 9, -9
    changed = np.asarray(attended("chunked", q, k, v, k_start, window=50))
    np.testing.assert_array_equal(y[0, t], changed[0, t])
    assert (y != changed).any()  # another query saw some of them


@pytest.mark.parametrize(
    ("window", "document", "poisoned", "clean"),
    [
        (-1, 0, slice(768, 1024), slice(0, 768)),  # causality
        (200, 0, slice(0, 256), slice(512, 1024)),
        (-1, 512, slice(0, 512), slice(512, 1024)),
    ],
)
def test_chunked_does_not_even_multiply_excluded_blocks(window, document, poisoned, clean):
    """A NaN times a masked 0 would be NaN."""
    q, k, v, _ = draw(B=2, T=1024, documents=False)
    starts = np.where(np.arange(1024) < document, 0, document).astype(np.int32)
    k_start = with_window(np.broadcast_to(starts, (2, 1024)), window)
    expected = np.asarray(attended("reference", q, k, v, k_start, window=window))
    k[:, poisoned] = v[:, poisoned] = np.nan
    dy = np.zeros_like(q)
    dy[:, clean] = 1
    y, dq, *_ = pulled_back("chunked", q, k, v, k_start, dy, window=window)
    assert np.isfinite(y[:, clean]).all() and np.isfinite(dq[:, clean]).all()
    assert not np.isfinite(y[:, poisoned]).any()
    np.testing.assert_allclose(y[:, clean], expected[:, clean], atol=1e-5)


def test_chunked_gives_numbers_to_a_query_that_sees_no_key():
    q, k, v, k_start = draw(T=600, documents=False)
    k_start[:, 100], k_start[:, 300:] = 101, 600  # one among others, and a whole block
    y, *gradients = pulled_back("chunked", q, k, v, k_start, None)
    assert all(np.isfinite(x).all() for x in (y, *gradients))
    expected = np.asarray(attended("reference", q, k, v, k_start))
    np.testing.assert_allclose(y[:, 200:300], expected[:, 200:300], atol=1e-5)


def test_chunked_never_holds_the_score_matrix():
    B, T, N, H = 1, 4096, 2, 32
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    k_start = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def temporary(impl):
        def f(q, k, v, k_start):
            return jax.grad(lambda q: attention(q, k, v, k_start, impl=impl).sum())(q)

        return jax.jit(f).lower(x, x, x, k_start).compile().memory_analysis().temp_size_in_bytes

    assert temporary("chunked") < temporary("reference") / 2.5


@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 2), (3, 1)])
def test_attention_over_parts_is_that_over_all_their_keys(N, K):
    """Six rows in groups of three over a shared part, each with a part of its own, a second one, and an empty one."""
    rng = np.random.default_rng(0)
    R, H, sizes = 6, 8, [(2, 30), (6, 11), (6, 4), (6, 1)]
    q = rng.standard_normal((R, N, H)).astype(np.float32)
    parts = [[rng.standard_normal((P, K, S, H)).astype(np.float32) for _ in "kv"] for P, S in sizes]
    seen = [rng.random((R, S)) < share for (_, S), share in zip(sizes, (0.5, 0.7, 1, 0))]
    got = jax.jit(decode_attention)(q, [(k, v, visible) for (k, v), visible in zip(parts, seen)], H**-0.5)
    for r, n in itertools.product(range(R), range(N)):
        k, v = (
            np.concatenate([part[i][r * len(part[i]) // R, n * K // N][s[r]] for part, s in zip(parts, seen)])
            for i in (0, 1)
        )
        p = np.exp(k.astype(np.float64) @ q[r, n] / H**0.5)
        np.testing.assert_allclose(got[r, n], p / p.sum() @ v, atol=2e-6)


def test_bfloat16_goes_in_and_comes_out_with_a_float32_softmax():
    q, k, v, k_start = draw(T=200)
    exact = attended("chunked", q, k, v, k_start)
    for impl in ("reference", "chunked"):
        y = attended(impl, *(x.astype(jnp.bfloat16) for x in (q, k, v)), k_start)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.05)


def test_shapes_that_cannot_work_are_refused():
    q, k, v, k_start = draw()
    with pytest.raises(ValueError, match="multiple of kv heads"):
        attention(q[:, :, :3], k, v, k_start)
    with pytest.raises(ValueError, match="one key per query"):
        attention(q[:, :10], k, v, k_start[:, :10])
    with pytest.raises(ValueError, match="backend"):
        attention(q, k, v, k_start, impl="magic")
