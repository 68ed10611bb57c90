"""Attention for packed rows. Every backend takes q, k, v and, per query, the first key it may see.

Causality, the left window and the documents of a packed row are together one interval of keys per query:
`[k_start[t], t]`. `reference` is the definition; the others must equal it. `choose` decides which one runs.
`decode_attention` is attention for decoding.
"""

import jax

from nanochat_jax.model.attention.decode import decode_attention as decode_attention
from nanochat_jax.model.attention.select import NAMES as NAMES
from nanochat_jax.model.attention.select import Shapes as Shapes
from nanochat_jax.model.attention.select import backend
from nanochat_jax.model.attention.select import check as check
from nanochat_jax.model.attention.select import choose as choose


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_start: jax.Array,
    *,
    window: int = -1,
    scale: float | None = None,
    impl: str = "chunked",
) -> jax.Array:
    """q [B,T,N,H], k and v [B,T,K,H] with K dividing N, k_start int32 [B,T] -> [B,T,N,H] in q's type.

    Query t sees the keys k_start[b,t]..t, both included. k_start does not fall within a row: it is where the query's
    document begins, or with a `window` (static) max(that, t - window), so that a backend can leave out blocks that it
    need not look at. `scale` defaults to H^-0.5. `impl`: a backend of NAMES, see `choose`; cudnn does not look at
    k_start.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of kv heads, got {q.shape=} {k.shape=}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"there must be one key per query, got {q.shape=} {k.shape=}")
    return backend(impl)(q, k, v, k_start, q.shape[-1] ** -0.5 if scale is None else scale, window)
