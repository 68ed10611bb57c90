"""The definition that every attention backend is tested against."""

import jax
import jax.numpy as jnp


def reference(q, k, v, k_start, k_last, scale):
    """Softmax attention over the keys k_start..k_last of each query, scores and softmax in float32.

    q [B,T,N,H], k and v [B,S,K,H], k_start [B,T], k_last [B,T] or None (t) -> [B,T,N,H]. Query head n uses kv head
    n // (N // K). A query whose interval is empty gives the mean of all values, never NaN.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if k_last is None:
        k_last = jnp.arange(T)[None]
    keys = jnp.arange(S)[None, None]
    visible = (keys >= k_start[..., None]) & (keys <= k_last[..., None])  # [B,T,S]
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, K, N // K, H), k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * scale, -1e30)  # finite: -inf would make an empty interval NaN
    y = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores).astype(v.dtype), v)
    return y.reshape(B, T, N, H)
