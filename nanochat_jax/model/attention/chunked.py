"""Memory-lean attention in plain XLA, for any device: a block of queries meets a block of keys at a time, never the
whole [T,S] matrix, and only the blocks that causality, the window and the documents leave.

The mathematics of FlashAttention (arXiv 2205.14135) without its kernel: the softmax grows with the blocks of keys, the
forward pass keeps only the output and the log-sum-exp of each query, the backward pass computes a block's scores again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanochat_jax.distributed.mesh import platform
from nanochat_jax.model.attention.residuals import LSE, OUT

BLOCK_CPU, BLOCK = 128, 256  # queries and keys, at most: small ones make poor matrix products, large ones skip less


def chunked(q, k, v, k_start, scale, window):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] -> [B,T,N,H], softmax in float32.

    A block of queries visits the keys from the first that one of its queries sees in one of the rows: `window` is not
    needed, k_start has it."""
    del window
    B, T, N, H = q.shape
    K = k.shape[2]
    blocks = -(-T // (BLOCK_CPU if platform() == "cpu" else BLOCK))
    more = -T % blocks  # at the end, which no query of the T sees
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    k_start = jnp.pad(k_start, ((0, 0), (0, more)), mode="edge")
    q = jnp.moveaxis(q.reshape(B, T + more, K, N // K, H), 1, 3)  # [B,K,G,T,H]: batch axes lead, products need no copy
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))  # [B,K,S,H]
    o = _attend(scale, (T + more) // blocks, q, k, v, k_start)
    return jnp.moveaxis(o, 3, 1).reshape(B, T + more, N, H)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, block, q, k, v, k_start):
    return _forward(scale, block, q, k, v, k_start)[0]


def _forward(scale, block, q, k, v, k_start):
    read, written = partial(_read, block), partial(_written, block)

    def query_block(i, done):
        qs, starts = read(q, i), read(k_start, i, 1)

        def key_block(j, so_far):
            top, total, o = so_far
            s = jnp.where(_visible(starts, i, j), _products(qs, read(k, j)) * scale, -1e30)
            new_top = jnp.maximum(top, jnp.max(s, -1, keepdims=True))
            e, shrink = jnp.exp(s - new_top), jnp.exp(top - new_top)
            values = jnp.einsum("BKGTS,BKSH->BKGTH", e.astype(v.dtype), read(v, j), preferred_element_type=jnp.float32)
            return new_top, total * shrink + jnp.sum(e, -1, keepdims=True), o * shrink + values

        none = jnp.zeros((*qs.shape[:-1], 1), jnp.float32)
        top, total, o = _over_keys(starts, i, key_block, (none - 1e30, none, jnp.zeros(qs.shape, jnp.float32)))
        total = jnp.where(total > 0, total, 1)  # a block whose queries see no key at all visits none
        outputs, normalisers = done
        return written(outputs, (o / total).astype(q.dtype), i), written(normalisers, top + jnp.log(total), i)

    # q is written over, all of it: zeros in its place XLA would make for all layers at once, before the first
    empty = q, jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    o, lse = jax.lax.fori_loop(0, q.shape[-2] // block, query_block, empty)
    o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
    return o, (q, k, v, k_start, o, lse)


def _backward(scale, block, residuals, do):
    q, k, v, k_start, o, lse = residuals
    read, written = partial(_read, block), partial(_written, block)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1, keepdims=True)

    def query_block(i, done):
        qs, dos, normaliser, shift = (read(x, i) for x in (q, do, lse, delta))
        starts = read(k_start, i, 1)

        def key_block(j, so_far):
            dq, dk, dv = so_far
            keys = read(k, j)
            p = jnp.where(_visible(starts, i, j), jnp.exp(_products(qs, keys) * scale - normaliser), 0)
            ds = (p * (_products(dos, read(v, j)) - shift) * scale).astype(q.dtype)
            dq += jnp.einsum("BKGTS,BKSH->BKGTH", ds, keys, preferred_element_type=jnp.float32)
            dks = jnp.einsum("BKGTH,BKGTS->BKHS", qs, ds, preferred_element_type=jnp.float32)
            dvs = jnp.einsum("BKGTH,BKGTS->BKHS", dos, p.astype(v.dtype), preferred_element_type=jnp.float32)
            return dq, written(dk, read(dk, j, -1) + dks, j, -1), written(dv, read(dv, j, -1) + dvs, j, -1)

        dq, *rest = done
        dqs, *rest = _over_keys(starts, i, key_block, (jnp.zeros(qs.shape, jnp.float32), *rest))
        return written(dq, dqs.astype(q.dtype), i), *rest

    # dk and dv are [B,K,H,S] here: a CPU then transposes a block of queries for its products, not one of scores
    empty = q, *(jnp.zeros((*k.shape[:2], *k.shape[:1:-1]), jnp.float32) for _ in "kv")
    dq, dk, dv = jax.lax.fori_loop(0, q.shape[-2] // block, query_block, empty)
    return dq, *(jnp.swapaxes(x, -1, -2).astype(k.dtype) for x in (dk, dv)), None


_attend.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------------------------------------- blocks
def _read(block, x, i, axis=-2):
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _written(block, x, part, i, axis=-2):
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * block, axis)


def _over_keys(starts, i, key_block, so_far):
    """key_block(j, so_far) for each block j of keys that query block i looks at. starts [B,t]: its k_start."""
    return jax.lax.fori_loop(jnp.min(starts) // starts.shape[1], i + 1, key_block, so_far)


def _products(a, b):
    """Float32 [B,K,G,t,s] of a [B,K,G,t,H] and b [B,K,s,H]."""
    return jnp.einsum("BKGTH,BKSH->BKGTS", a, b, preferred_element_type=jnp.float32)


def _visible(starts, i, j):
    """Which keys of block j the queries of block i see, bool [B,1,1,t,s]."""
    t = jnp.arange(starts.shape[1])
    query, key = (i * t.size + t)[None, :, None], (j * t.size + t)[None, None]
    return ((key >= starts[..., None]) & (key <= query))[:, None, None]
