"""Memory-lean attention in plain XLA, for any device: one block of queries at a time, never the whole [T,S] matrix."""

from functools import partial

import jax
import jax.numpy as jnp

from nanochat_jax.attention.reference import reference

MIN_BLOCK = 128
MAX_BLOCKS = 8  # blocks are unrolled, because each has its own static range of keys; more would cost compile time


def chunked(q, k, v, k_start, scale, window):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H]; a block of queries reads only the keys that causality and
    the static `window` leave it. The backward pass recomputes a block's scores, so one block's are in memory at a time.
    """
    T = q.shape[1]
    block = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    attend = jax.checkpoint(partial(reference, scale=scale))
    out = []
    for low in range(0, T, block):
        high = min(low + block, T)
        first = 0 if window < 0 else max(0, low - window)
        last_key = jnp.arange(low - first, high - first)[None]
        out.append(attend(q[:, low:high], k[:, first:high], v[:, first:high], k_start[:, low:high] - first, last_key))
    return jnp.concatenate(out, 1)
