"""The definition that every attention backend is tested against."""

import jax
import jax.numpy as jnp


def first_key(document_start: jax.Array, positions: jax.Array, window: int) -> jax.Array:
    """k_start int32 [B,T]: the first key that each query sees, after causality the one number that says what it sees.

    It is where the query's document begins, document_start [B,T], or later where a window (-1: none) reaches less far:
    `window` keys before the query's own at positions [B or 1, T]."""
    return document_start if window < 0 else jnp.maximum(document_start, positions - window)


def reference(q, k, v, k_start, scale, window):
    """Softmax attention over the keys k_start[t]..t of each query t, scores and softmax in float32.

    q [B,T,N,H], k and v [B,T,K,H], k_start [B,T] -> [B,T,N,H]. Query head n uses kv head n // (N // K). A query whose
    interval is empty gives the mean of all values, never NaN. k_start has the window already.
    """
    del window
    B, T, N, H = q.shape
    K = k.shape[2]
    keys = jnp.arange(T)[None, None]
    visible = (keys >= k_start[..., None]) & (keys <= jnp.arange(T)[None, :, None])  # [B,T,S]
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, K, N // K, H), k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * scale, -1e30)  # finite: -inf would make an empty interval NaN
    y = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores).astype(v.dtype), v)
    return y.reshape(B, T, N, H)
