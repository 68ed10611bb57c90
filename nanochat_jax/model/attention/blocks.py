"""Which blocks of keys and queries the kernels visit, from the first key that each query sees.

Query t sees the keys k_start[t]..t. Of blocks of `block_q` queries and `block_k` keys, a block of queries has a range
of key blocks [first, last) that hold something it sees, and in that a range [full_first, full_last) of blocks that all
its queries see whole, where no mask is needed. For a block of keys it is the other way round.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ranges(NamedTuple):
    """Visit [first, last), mask outside of [full_first, full_last). All int32 [B, blocks of the visiting side].

    first <= full_first <= full_last <= last; ranges may be empty."""

    first: jax.Array
    full_first: jax.Array
    full_last: jax.Array
    last: jax.Array


def _extremes(k_start, block_q):
    """The smallest and the largest k_start of each block of queries, [B, T // block_q]."""
    B, T = k_start.shape
    if T % block_q:
        raise ValueError(f"length must be a multiple of the block, got {T} and {block_q}")
    starts = k_start.reshape(B, T // block_q, block_q)
    return starts.min(-1), starts.max(-1)


def _ranges(first, full_first, full_last, last, like):
    first, full_first, full_last, last = (jnp.broadcast_to(x, like.shape) for x in (first, full_first, full_last, last))
    full_first = jnp.clip(full_first, first, last)
    return Ranges(*(x.astype(jnp.int32) for x in (first, full_first, jnp.clip(full_last, full_first, last), last)))


def key_ranges(k_start, block_q: int, block_k: int) -> Ranges:
    """For each block of queries, the blocks of keys it visits. k_start [B,T] with T a multiple of block_q."""
    low, high = _extremes(k_start, block_q)
    begin = jnp.arange(low.shape[1])[None] * block_q  # each block's first query
    return _ranges(low // block_k, -(-high // block_k), (begin + 1) // block_k, -(-(begin + block_q) // block_k), low)


def query_ranges(k_start, block_q: int, block_k: int) -> Ranges:
    """For each block of keys, the blocks of queries that visit it. k_start [B,T] with T a multiple of both blocks."""
    low, high = _extremes(k_start, block_q)
    T, blocks = k_start.shape[1], low.shape[1]
    if T % block_k:
        raise ValueError(f"length must be a multiple of the block, got {T} and {block_k}")
    begin = jnp.arange(T // block_k)[None, :, None] * block_k  # each key block's first key
    end, i = begin + block_k, jnp.arange(blocks)[None, None]
    low, high = low[:, None], high[:, None]
    # k_start does not decrease, so the query blocks that see a part of the key block, and those that see all of it, are
    # both prefixes of what causality leaves. Taking the last and the first index keeps the ranges safe (too wide, too
    # much masked) even where that promise is broken.
    last = 1 + jnp.max(jnp.where(low < end, i, -1), -1)  # [B, key blocks]
    cut = jnp.min(jnp.where(high > begin, i, blocks), -1)
    begin, end = begin[..., 0], end[..., 0]
    first = begin // block_q
    return _ranges(first, -(-(end - 1) // block_q), cut, jnp.maximum(last, first), last)


def visit_blocks(ranges, visit, carry):
    """Fold visit(block, carry, masked) over the blocks of one program's `Ranges`."""
    first, full_first, full_last, last = ranges
    carry = jax.lax.fori_loop(first, full_first, partial(visit, masked=True), carry)
    carry = jax.lax.fori_loop(full_first, full_last, partial(visit, masked=False), carry)
    return jax.lax.fori_loop(full_last, last, partial(visit, masked=True), carry)
