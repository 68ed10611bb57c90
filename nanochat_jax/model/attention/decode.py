"""Attention of one query a row over keys that lie in several places, as decoding has them."""

import jax.numpy as jnp


def decode_attention(q, parts, scale):
    """q [R,N,H], parts: a list of (k, v, visible) -> softmax attention over the visible keys of all parts, [R,N,H].

    k and v are [P,K,S,H] of one type with P dividing R: each is shared by R / P neighbouring rows, and is read once for
    them. visible bool [R,S]. Query head n uses kv head n // (N // K). Scores are float32 and must stay within +-80, as
    normalised queries and keys do: exp needs no shift by the maximum, so the parts' sums simply add up. A row that sees
    no key gives NaN.
    """
    R, N, H = q.shape
    total, y = 0.0, 0.0
    for k, v, visible in parts:
        P, K, S, _ = k.shape
        M, G = R // P, N // K
        s = jnp.einsum(
            "PMKGH,PKSH->PKMGS", q.reshape(P, M, K, G, H).astype(k.dtype), k, preferred_element_type=jnp.float32
        )
        e = jnp.where(visible.reshape(P, 1, M, 1, S), jnp.exp(s * scale), 0.0)
        total += jnp.moveaxis(jnp.sum(e, -1), 1, 2).reshape(R, N)
        part = jnp.einsum("PKMGS,PKSH->PMKGH", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
        y += part.reshape(R, N, H)
    return (y / total[..., None]).astype(q.dtype)
