"""Attention for packed rows. Every backend takes q, k, v and, per query, the first key it may see.

Causality, the left window and the documents of a packed row are together one interval of keys per query:
`[k_start[t], t]`. `reference` is the definition; the others must equal it. `over_parts` is attention for decoding.
"""

import jax

from nanochat_jax.attention.chunked import chunked
from nanochat_jax.attention.parts import over_parts as over_parts
from nanochat_jax.attention.reference import reference


def missing_kernel(platform: str) -> str | None:
    """Why the fast attention is not used on this platform ("cpu", "gpu", "tpu"), as a sentence; None where it is."""
    return f"no flash-attention kernel for {platform}: attention runs in blocks of plain XLA (exact, but slower)"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_start: jax.Array,
    *,
    window: int = -1,
    scale: float | None = None,
    impl: str | None = None,
) -> jax.Array:
    """q [B,T,N,H], k and v [B,T,K,H] with K dividing N, k_start int32 [B,T] -> [B,T,N,H] in q's type.

    Query t sees the keys k_start[b,t]..t, both included. `window` (static) promises k_start[b,t] >= t - window, so that
    a backend can leave out blocks it need not look at; -1 promises nothing. `scale` defaults to H^-0.5. `impl` forces a
    backend: "reference" or "chunked".
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of kv heads, got {q.shape=} {k.shape=}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"there must be one key per query, got {q.shape=} {k.shape=}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "reference":
        return reference(q, k, v, k_start, scale)
    if impl in (None, "chunked"):
        return chunked(q, k, v, k_start, scale, window)
    raise ValueError(f"attention backend must be 'reference' or 'chunked', got {impl!r}")
