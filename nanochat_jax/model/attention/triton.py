"""Flash attention on NVIDIA GPUs of compute capability 8.0 and newer (Pallas, Triton), forward and backward.

The mathematics is FlashAttention-2's (arXiv 2307.08691), with one kernel for the output, one for dq, one for dk and dv.
A program computes a block of rows of its result and walks over the blocks of blocks.py, of which it masks only those
that need it. There are no atomics: every element has one writer, so results repeat bit for bit.

What kernels take and return: flash.py.

Why Triton, although JAX means to drop this way to it: its compiler places copies and barriers itself, so a kernel that
is right in the interpreter, on any CPU, has no race left that only a GPU could show, and the same lines compile for all
of these GPUs. Mosaic GPU's matrix product for them (`mma`) cannot be interpreted, and its copies are written by hand,
one way before Hopper and another after. Where a version of JAX no longer has Triton, `--attention auto` takes another
backend and says so.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

from nanochat_jax.model.attention.blocks import key_ranges, query_ranges, visit_blocks
from nanochat_jax.model.attention.flash import FlashKernels, flash_attention, lower_once

BLOCK = 128  # rows are padded to a multiple of it, which every block below divides


class Tiles(NamedTuple):
    """How a kernel's work is cut."""

    own: int  # queries (for dk and dv: keys) of a program
    step: int  # keys (queries) of a block that it walks over
    warps: int  # of 32 threads, which share the program's registers
    stages: int  # blocks in flight between global and shared memory


class Kernels(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles


# By head size and bytes of a number. Chosen so that ptxas spills no register and shared memory stays under the 99 KiB
# of the smallest of these GPUs (compute capability 8.6, 8.9, 12.0), see docs/predicted.md; not timed.
TILES = {
    (64, 2): Kernels(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 2)),
    (128, 2): Kernels(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    (64, 4): Kernels(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2)),
    (128, 4): Kernels(Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2)),
}


def triton_refuses(q_shape, kv_heads: int, dtype) -> str | None:
    """Why the kernels cannot take q of shape [B,T,N,H], this many kv heads and this type, as a sentence; else None."""
    *_, N, H = q_shape
    sizes = sorted({size for size, _ in TILES})
    if H not in sizes:
        return f"triton takes heads of size {' or '.join(map(str, sizes))}, got {H}"
    if N % kv_heads:
        return f"triton takes query heads that are a multiple of the kv heads, got {N} and {kv_heads}"
    if jnp.dtype(dtype).name not in ("bfloat16", "float16", "float32"):
        return f"triton takes bfloat16, float16 or float32, got {jnp.dtype(dtype)}"
    return None


def triton(q, k, v, k_start, scale, window, *, interpret: bool = False):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] with the keys k_start[t]..t, k_start int32 [B,T] ->
    [B,T,N,H]. bf16, f16 or f32 in and out, float32 softmax and accumulators; repeats bit for bit, forward and backward.

    Products of float32 are made of tf32 ones, as XLA's are on these GPUs. `window` is not needed: the blocks that it
    excludes follow from k_start, as those of other documents do. `interpret` runs the kernels on a CPU, for tests.
    ValueError where `triton_refuses`."""
    del window
    if why := triton_refuses(q.shape, k.shape[2], q.dtype):
        raise ValueError(why)
    return flash_attention(KERNELS, q, k, v, k_start, scale, interpret)


@lower_once
def forward(q, k, v, k_start, scale, interpret):
    """-> (o [B,T,N,H] in q's type, lse float32 [B,N,T], the base-2 logarithm of each query's sum of exponentials)."""
    tiles = _tiles(q).forward

    def attention_forward(q_ref, k_ref, v_ref, start_ref, *refs):
        *ranges, o_ref, lse_ref = refs
        q, start = q_ref[...], start_ref[...]
        query = _positions(_last_first(), tiles.own)

        def visit(j, carry, masked):
            o, top, total = carry  # sum of values, largest score, sum of exponentials so far
            here = pl.ds(j * tiles.step, tiles.step)
            s = _product(q, k_ref[here, :].T) * scale
            if masked:
                key = _positions(j, tiles.step)
                s = _mask(s, query[:, None], key[None], start[:, None])
            new_top = jnp.maximum(top, s.max(axis=1))
            p = jnp.exp2(s - new_top[:, None])
            shrink = jnp.exp2(top - new_top)
            o = o * shrink[:, None] + _product(p.astype(q.dtype), v_ref[here, :])
            return o, new_top, total * shrink + p.sum(axis=1)

        zeros = jnp.zeros((tiles.own,), jnp.float32)
        carry = jnp.zeros(q.shape, jnp.float32), zeros - 1e30, zeros
        o, top, total = visit_blocks([x[0] for x in ranges], visit, carry)
        o_ref[...] = (o / total[:, None]).astype(o_ref.dtype)
        lse_ref[...] = top + jnp.log2(total)

    B, T, N, _ = q.shape
    own, whole, starts, per_query, one = _query_specs(q, k, tiles)
    kernel = _kernel(
        attention_forward,
        tiles,
        grid=(T // tiles.own, N, B),
        in_specs=[own, whole, whole, starts, *[one] * 4],
        out_specs=[own, per_query],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        interpret=interpret,
    )
    return kernel(q, k, v, k_start, *key_ranges(k_start, tiles.own, tiles.step))


@lower_once
def grad_queries(q, k, v, k_start, do, lse, delta, scale, interpret):
    """-> dq [B,T,N,H] in q's type. do is the output's gradient, delta [B,N,T] its products with the output."""
    tiles = _tiles(q).dq

    def attention_dq(q_ref, k_ref, v_ref, start_ref, do_ref, lse_ref, delta_ref, *refs):
        *ranges, dq_ref = refs
        q, do, start = q_ref[...], do_ref[...], start_ref[...]
        lse, delta = lse_ref[...], delta_ref[...]
        query = _positions(_last_first(), tiles.own)

        def visit(j, dq, masked):
            here = pl.ds(j * tiles.step, tiles.step)
            k = k_ref[here, :]
            s = _product(q, k.T) * scale
            if masked:
                key = _positions(j, tiles.step)
                s = _mask(s, query[:, None], key[None], start[:, None])
            p = jnp.exp2(s - lse[:, None])
            ds = p * (_product(do, v_ref[here, :].T) - delta[:, None])
            return dq + _product(ds.astype(q.dtype), k)

        dq = visit_blocks([x[0] for x in ranges], visit, jnp.zeros(q.shape, jnp.float32))
        dq_ref[...] = (dq * (scale * math.log(2))).astype(dq_ref.dtype)  # scale without its log2(e)

    B, T, N, _ = q.shape
    own, whole, starts, per_query, one = _query_specs(q, k, tiles)
    kernel = _kernel(
        attention_dq,
        tiles,
        grid=(T // tiles.own, N, B),
        in_specs=[own, whole, whole, starts, own, per_query, per_query, *[one] * 4],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret=interpret,
    )
    return kernel(q, k, v, k_start, do, lse, delta, *key_ranges(k_start, tiles.own, tiles.step))


@lower_once
def grad_keys(q, k, v, k_start, do, lse, delta, scale, interpret):
    """-> dk and dv [B,T,K,H] in k's type, each summed over its group of query heads in float32."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    tiles = _tiles(q).dkv

    def attention_dkv(q_ref, k_ref, v_ref, start_ref, do_ref, lse_ref, delta_ref, *refs):
        *ranges, dk_ref, dv_ref = refs
        k, v = k_ref[...], v_ref[...]
        key = _positions(pl.program_id(0), tiles.own)

        def visit(turn, carry, masked):
            dk, dv = carry
            i, g = lax.div(turn, G), lax.rem(turn, G)  # a block of queries of each head in turn: one loop, not two
            here = pl.ds(i * tiles.step, tiles.step)
            q, do = q_ref[here, g, :], do_ref[here, g, :]
            s = _product(k, q.T) * scale  # transposed: a row is a key, a column a query
            if masked:
                query = _positions(i, tiles.step)
                s = _mask(s, query[None], key[:, None], start_ref[here][None])
            p = jnp.exp2(s - lse_ref[g, here][None])
            dv += _product(p.astype(q.dtype), do)
            ds = p * (_product(v, do.T) - delta_ref[g, here][None])
            return dk + _product(ds.astype(q.dtype), q), dv

        zeros = jnp.zeros(k.shape, jnp.float32)
        dk, dv = visit_blocks([x[0] * G for x in ranges], visit, (zeros, zeros))
        dk_ref[...] = (dk * (scale * math.log(2))).astype(dk_ref.dtype)  # scale without its log2(e)
        dv_ref[...] = dv.astype(dv_ref.dtype)

    own = pl.BlockSpec((None, tiles.own, None, H), lambda j, m, b: (b, j, m, 0))
    group = pl.BlockSpec((None, T, G, H), lambda j, m, b: (b, 0, m, 0))
    starts = pl.BlockSpec((None, T), lambda j, m, b: (b, 0))
    per_query = pl.BlockSpec((None, G, T), lambda j, m, b: (b, m, 0))
    one = pl.BlockSpec((None, 1), lambda j, m, b: (b, j))
    kernel = _kernel(
        attention_dkv,
        tiles,
        grid=(T // tiles.own, K, B),
        in_specs=[group, own, own, starts, group, per_query, per_query, *[one] * 4],
        out_specs=[own, own],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        interpret=interpret,
    )
    return kernel(q, k, v, k_start, do, lse, delta, *query_ranges(k_start, tiles.step, tiles.own))


def _kernel(body, tiles: Tiles, *, grid, in_specs, out_specs, out_shape, interpret):
    """body(arrays of in_specs, then those of out_specs) as a function of whole arrays; it runs once for each place in
    `grid`, the first axis fastest."""
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=pallas_triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
    )


def _query_specs(q, k, tiles: Tiles):
    """What a program for a block of queries gets, in the grid (blocks, N, B): its part of an array like q, a whole row
    of one like k, its part of k_start, of lse or delta, and its entry of one of the `Ranges`.

    Blocks come the last first: with causality they are the longest."""
    T, N, H = q.shape[1:]
    G, last = N // k.shape[2], T // tiles.own - 1
    return (
        pl.BlockSpec((None, tiles.own, None, H), lambda i, n, b: (b, last - i, n, 0)),
        pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n // G, 0)),
        pl.BlockSpec((None, tiles.own), lambda i, n, b: (b, last - i)),
        pl.BlockSpec((None, None, tiles.own), lambda i, n, b: (b, n, last - i)),
        pl.BlockSpec((None, 1), lambda i, n, b: (b, last - i)),
    )


def _last_first():
    """The number of this program's block of queries, see `_query_specs`."""
    return pl.num_programs(0) - 1 - pl.program_id(0)


def _tiles(q) -> Kernels:
    return TILES[q.shape[-1], q.dtype.itemsize]


def _positions(block, size: int):
    """The numbers of a block's queries or keys, int32 [size]."""
    return block * size + lax.iota(jnp.int32, size)


def _product(a, b):
    """a @ b in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _mask(s, query, key, start):
    """Scores with -inf where the query, which sees the keys start..query, does not see the key."""
    return jnp.where((key <= query) & (key >= start), s, -jnp.inf)


KERNELS = FlashKernels(BLOCK, forward, grad_queries, grad_keys)
