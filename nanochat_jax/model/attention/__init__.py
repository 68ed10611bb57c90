"""Attention for packed rows. Every backend takes q, k, v and, for each query, the first key that it may see.

Causality, the left window and the documents of a packed row are together one interval of keys per query,
`k_start[t]..t`. `reference` is the definition that every backend must equal; select.py has the table of backends and
chooses among them. `decode_attention` is attention of single queries over a cache.
"""

import jax

from nanochat_jax.model.attention.decode import decode_attention as decode_attention
from nanochat_jax.model.attention.reference import first_key as first_key
from nanochat_jax.model.attention.select import NAMES as NAMES
from nanochat_jax.model.attention.select import AttentionShapes as AttentionShapes
from nanochat_jax.model.attention.select import backend
from nanochat_jax.model.attention.select import check_attention_backend as check_attention_backend
from nanochat_jax.model.attention.select import choose_attention_backend as choose_attention_backend


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, k_start: jax.Array, *, window: int = -1, impl: str = "chunked"
) -> jax.Array:
    """Causal attention: query t of row b sees the keys k_start[b,t]..t, both included. -> [B,T,N,H] in q's type.

    q [B,T,N,H]; k, v [B,T,K,H] with K dividing N; k_start int32 [B,T], which must not fall within a row, see
    `first_key`. window: the static one that k_start was made with (-1: none), by which a backend can leave out blocks
    of keys. impl: a backend of NAMES; cudnn does not look at k_start. Scores are scaled by H^-0.5.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of kv heads, got {q.shape=} {k.shape=}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"there must be one key per query, got {q.shape=} {k.shape=}")
    return backend(impl)(q, k, v, k_start, q.shape[-1] ** -0.5, window)
