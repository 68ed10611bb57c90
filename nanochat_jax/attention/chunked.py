"""Memory-lean attention in plain XLA, for any device: one block of queries at a time, never the whole [T,S] matrix.

The mathematics of FlashAttention (arXiv 2205.14135) without its kernel: the forward pass keeps only the output and the
log-sum-exp of each query, the backward pass computes a block's scores again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanochat_jax.attention.names import LSE, OUT

MIN_BLOCK = 64
MAX_BLOCKS = 8  # blocks are unrolled, because each has its own static range of keys; more would cost compile time


def chunked(q, k, v, k_start, scale, window):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] -> [B,T,N,H]. A block of queries reads only the keys that
    causality and the static `window` leave it; softmax in float32."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)  # [B,K,G,T,H]: batch axes lead, so that products need no copy
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))  # [B,K,S,H]
    o = _attend(scale, window, q, k, v, k_start)
    return jnp.moveaxis(o, 3, 1).reshape(B, T, N, H)


def _blocks(T: int, window: int) -> list[tuple[slice, slice]]:
    """(queries, the keys they may see) of each block."""
    size = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    spans = [(low, min(low + size, T)) for low in range(0, T, size)]
    return [(slice(low, high), slice(0 if window < 0 else max(0, low - window), high)) for low, high in spans]


def _scores(q, k, k_start, queries, keys, scale):
    """A block's scaled scores, float32 [B,K,G,t,s], -1e30 where the query may not look."""
    s = jnp.einsum("BKGTH,BKSH->BKGTS", q[..., queries, :], k[:, :, keys], preferred_element_type=jnp.float32)
    key = jnp.arange(keys.start, keys.stop)[None, None]
    query = jnp.arange(queries.start, queries.stop)[None, :, None]
    visible = (key >= k_start[:, queries, None]) & (key <= query)
    return jnp.where(visible[:, None, None], s * scale, -1e30)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, window, q, k, v, k_start):
    return _forward(scale, window, q, k, v, k_start)[0]


def _forward(scale, window, q, k, v, k_start):
    outputs, normalisers = [], []
    for queries, keys in _blocks(q.shape[3], window):
        if outputs:  # one block after the other: the compiler may otherwise hold the scores of all of them
            q, outputs[-1] = jax.lax.optimization_barrier((q, outputs[-1]))
        s = _scores(q, k, k_start, queries, keys, scale)
        top = jnp.max(s, -1, keepdims=True)
        e = jnp.exp(s - top)
        total = jnp.sum(e, -1, keepdims=True)
        values = v[:, :, keys]
        o = jnp.einsum("BKGTS,BKSH->BKGTH", e.astype(v.dtype), values, preferred_element_type=jnp.float32)
        outputs.append((o / total).astype(q.dtype))
        normalisers.append(top + jnp.log(total))
    o = checkpoint_name(jnp.concatenate(outputs, 3), OUT)
    lse = checkpoint_name(jnp.concatenate(normalisers, 3), LSE)
    return o, (q, k, v, k_start, o, lse)


def _backward(scale, window, residuals, do):
    q, k, v, k_start, o, lse = residuals
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1, keepdims=True)
    dq = []
    dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for queries, keys in _blocks(q.shape[3], window):
        q, dk, dv = jax.lax.optimization_barrier((q, dk, dv))
        qs, dos = q[..., queries, :], do[..., queries, :]
        p = jnp.exp(_scores(q, k, k_start, queries, keys, scale) - lse[..., queries, :])
        dp = jnp.einsum("BKGTH,BKSH->BKGTS", dos, v[:, :, keys], preferred_element_type=jnp.float32)
        ds = (p * (dp - delta[..., queries, :]) * scale).astype(q.dtype)
        dq.append(jnp.einsum("BKGTS,BKSH->BKGTH", ds, k[:, :, keys], preferred_element_type=jnp.float32))
        dks = jnp.einsum("BKGTS,BKGTH->BKSH", ds, qs, preferred_element_type=jnp.float32)
        dvs = jnp.einsum("BKGTS,BKGTH->BKSH", p.astype(v.dtype), dos, preferred_element_type=jnp.float32)
        dk, dv = dk.at[:, :, keys].add(dks), dv.at[:, :, keys].add(dvs)
    return jnp.concatenate(dq, 3).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
