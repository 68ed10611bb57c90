"""The definition that every attention backend is tested against."""

import jax
import jax.numpy as jnp


def reference(q, k, v, k_start, scale):
    """Softmax attention over the keys k_start[t]..t of each query t, scores and softmax in float32.

    q [B,T,N,H], k and v [B,T,K,H], k_start [B,T] -> [B,T,N,H]. Query head n uses kv head n // (N // K). A query whose
    interval is empty gives the mean of all values, never NaN.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    keys = jnp.arange(T)[None, None]
    visible = (keys >= k_start[..., None]) & (keys <= jnp.arange(T)[None, :, None])  # [B,T,S]
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, K, N // K, H), k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * scale, -1e30)  # finite: -inf would make an empty interval NaN
    y = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores).astype(v.dtype), v)
    return y.reshape(B, T, N, H)
