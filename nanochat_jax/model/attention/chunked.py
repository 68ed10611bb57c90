"""Attention in plain XLA for any device, in blocks: the [T,S] matrix of scores never exists, and blocks that causality,
the window or the documents exclude are not computed.

It is the algorithm of FlashAttention (arXiv 2205.14135) without a kernel: the softmax is updated block of keys by block
of keys, the forward pass keeps the output and each query's log-sum-exp, the backward pass computes scores again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanochat_jax.distributed.mesh import platform
from nanochat_jax.model.attention.residuals import LSE, OUT

BLOCK_CPU, BLOCK = 128, 256  # most queries and keys: smaller ones make poor matrix products, larger ones skip less


def chunked(q, k, v, k_start, scale, window):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] -> [B,T,N,H], softmax in float32.

    A block of queries visits the keys from the first that one of its queries sees in one of the rows: `window` is not
    needed, k_start has it."""
    del window
    B, T, N, H = q.shape
    K = k.shape[2]
    blocks = -(-T // (BLOCK_CPU if platform() == "cpu" else BLOCK))
    pad = -T % blocks  # keys at the end, which no query of the T sees
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    k_start = jnp.pad(k_start, ((0, 0), (0, pad)), mode="edge")
    q = jnp.moveaxis(q.reshape(B, T + pad, K, N // K, H), 1, 3)  # [B,K,G,T,H]: batch axes lead, products need no copy
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))  # [B,K,S,H]
    o = _attend(scale, (T + pad) // blocks, q, k, v, k_start)
    return jnp.moveaxis(o, 3, 1).reshape(B, T + pad, N, H)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, block, q, k, v, k_start):
    return _forward(scale, block, q, k, v, k_start)[0]


def _forward(scale, block, q, k, v, k_start):
    read, write = partial(_read, block), partial(_write, block)

    def query_block(i, results):
        qs, starts = read(q, i), read(k_start, i, 1)

        def key_block(j, carry):
            top, total, o = carry  # largest score, sum of exponentials, sum of values so far
            s = jnp.where(_visible(starts, i, j), _products(qs, read(k, j)) * scale, -1e30)
            new_top = jnp.maximum(top, jnp.max(s, -1, keepdims=True))
            e, shrink = jnp.exp(s - new_top), jnp.exp(top - new_top)
            values = jnp.einsum("BKGTS,BKSH->BKGTH", e.astype(v.dtype), read(v, j), preferred_element_type=jnp.float32)
            return new_top, total * shrink + jnp.sum(e, -1, keepdims=True), o * shrink + values

        zero = jnp.zeros((*qs.shape[:-1], 1), jnp.float32)
        top, total, o = _over_keys(starts, i, key_block, (zero - 1e30, zero, jnp.zeros(qs.shape, jnp.float32)))
        total = jnp.where(total > 0, total, 1)  # a block whose queries see no key at all visits none
        outputs, lse = results
        return write(outputs, (o / total).astype(q.dtype), i), write(lse, top + jnp.log(total), i)

    # The loop overwrites all of q. Had it zeros instead, XLA would make those of all layers at once, before the first.
    empty = q, jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    o, lse = jax.lax.fori_loop(0, q.shape[-2] // block, query_block, empty)
    o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
    return o, (q, k, v, k_start, o, lse)


def _backward(scale, block, residuals, do):
    q, k, v, k_start, o, lse = residuals
    read, write = partial(_read, block), partial(_write, block)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1, keepdims=True)

    def query_block(i, grads):
        qs, dos, lses, deltas = (read(x, i) for x in (q, do, lse, delta))
        starts = read(k_start, i, 1)

        def key_block(j, carry):
            dq, dk, dv = carry
            ks = read(k, j)
            p = jnp.where(_visible(starts, i, j), jnp.exp(_products(qs, ks) * scale - lses), 0)
            ds = (p * (_products(dos, read(v, j)) - deltas) * scale).astype(q.dtype)
            dq += jnp.einsum("BKGTS,BKSH->BKGTH", ds, ks, preferred_element_type=jnp.float32)
            dks = jnp.einsum("BKGTH,BKGTS->BKHS", qs, ds, preferred_element_type=jnp.float32)
            dvs = jnp.einsum("BKGTH,BKGTS->BKHS", dos, p.astype(v.dtype), preferred_element_type=jnp.float32)
            return dq, write(dk, read(dk, j, -1) + dks, j, -1), write(dv, read(dv, j, -1) + dvs, j, -1)

        dq, *dkv = grads
        dqs, *dkv = _over_keys(starts, i, key_block, (jnp.zeros(qs.shape, jnp.float32), *dkv))
        return write(dq, dqs.astype(q.dtype), i), *dkv

    # dk and dv are [B,K,H,S] here: a CPU then transposes a block of queries for its products, not one of scores
    empty = q, *(jnp.zeros((*k.shape[:2], *k.shape[:1:-1]), jnp.float32) for _ in "kv")
    dq, dk, dv = jax.lax.fori_loop(0, q.shape[-2] // block, query_block, empty)
    return dq, *(jnp.swapaxes(x, -1, -2).astype(k.dtype) for x in (dk, dv)), None


_attend.defvjp(_forward, _backward)


def _read(block, x, i, axis=-2):
    """Block i of x."""
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _write(block, x, part, i, axis=-2):
    """x with `part` in place of block i."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * block, axis)


def _over_keys(starts, i, key_block, carry):
    """Fold key_block(j, carry) over the blocks j of keys that query block i sees. starts [B,t]: its k_start."""
    return jax.lax.fori_loop(jnp.min(starts) // starts.shape[1], i + 1, key_block, carry)


def _products(a, b):
    """a [B,K,G,t,H] and b [B,K,s,H] -> float32 [B,K,G,t,s]"""
    return jnp.einsum("BKGTH,BKSH->BKGTS", a, b, preferred_element_type=jnp.float32)


def _visible(starts, i, j):
    """Which keys of block j the queries of block i see, bool [B,1,1,t,s]."""
    t = jnp.arange(starts.shape[1])
    query, key = (i * t.size + t)[None, :, None], (j * t.size + t)[None, None]
    return ((key >= starts[..., None]) & (key <= query))[:, None, None]
