"""Attention of one query a row, as decoding needs it, over keys and values that lie in several arrays."""

import jax.numpy as jnp

from nanochat_jax.distributed.mesh import platform


def decode_attention(q, parts, scale):
    """q [R,N,H], one query of each of R rows, over the visible keys of all parts together -> [R,N,H] in q's type.

    parts: a list of (k, v, visible), here the cache of the prompts, that of the rows' earlier tokens and the tokens of
    the running call (inference/decode.py), which it would cost a copy to join. k and v are [P,K,S,H] of one type: where
    P < R, R / P neighbouring rows share a prompt, whose keys are read once for all of them. visible is bool [R,S].
    Query head n uses kv head n // (N // K). Scores are float32 and must stay within +-80, as those of normalized
    queries and keys do: then exp needs no shift by the maximum, and the parts' sums simply add up. A row that sees no
    key gives NaN.
    """
    R, N, H = q.shape
    total, y = 0.0, 0.0
    for k, v, visible in parts:
        P, K, S, _ = k.shape
        M, G = R // P, N // K  # rows of a prompt, query heads of a kv head
        s = jnp.einsum(
            "PMKGH,PKSH->PKMGS", q.reshape(P, M, K, G, H).astype(k.dtype), k, preferred_element_type=jnp.float32
        )
        e = jnp.where(visible.reshape(P, 1, M, 1, S), jnp.exp(s * scale), 0.0)
        total += jnp.moveaxis(jnp.sum(e, -1), 1, 2).reshape(R, N)
        if platform() == "cpu" and M * G == 1:  # XLA on CPU sums products in half of the time of such a matrix product
            part = jnp.sum(e[..., None] * v[:, :, None, None].astype(jnp.float32), -2)
        else:
            part = jnp.einsum("PKMGS,PKSH->PKMGH", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
        y += jnp.moveaxis(part, 1, 2).reshape(R, N, H)
    return (y / total[..., None]).astype(q.dtype)
