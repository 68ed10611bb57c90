"""cuDNN's flash attention, through JAX: a yardstick on NVIDIA GPUs, and for rows that hold one document."""

import jax


def cudnn(q, k, v, k_start, scale, window, *, implementation="cudnn"):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] -> [B,T,N,H], bfloat16 or float16.

    k_start is not looked at: a row must be one document. A query sees `window` keys before its own (-1: all).
    implementation: "xla" is the same call in plain XLA, for tests."""
    del k_start
    left = None if window < 0 else (window, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=left, implementation=implementation
    )


def cudnn_refuses(q_shape, kv_heads, dtype) -> str | None:
    """Why cuDNN cannot take q of this shape [B,T,N,H] and type; None where it can."""
    if dtype.name not in ("bfloat16", "float16"):
        return f"cudnn takes bfloat16, this is {dtype.name} (--dtype)"
    if q_shape[-1] % 8 or q_shape[-1] > 256:
        return f"cudnn takes heads of a multiple of 8 and at most 256, this model's have {q_shape[-1]}"
    return None
