"""cuDNN's flash attention, through JAX: a yardstick on NVIDIA GPUs, and for rows that hold one document."""

import jax


def cudnn(q, k, v, k_start, scale, window):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] -> [B,T,N,H], bfloat16 or float16.

    k_start is not looked at: it must be max(0, t - window), a row must be one document."""
    del k_start
    return one_document(q, k, v, scale, window, "cudnn")


def one_document(q, k, v, scale, window, implementation):
    """jax.nn.dot_product_attention with this interface's window: a query sees `window` keys beside its own."""
    left = None if window < 0 else (window, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=left, implementation=implementation
    )


def cudnn_refuses(q_shape, kv_heads, dtype) -> str | None:
    """Why cuDNN does not take q of this shape [B,T,N,H] and type with so many kv heads; None where it does."""
    if dtype.name not in ("bfloat16", "float16"):
        return f"cudnn takes bfloat16, this is {dtype.name} (--dtype)"
    if q_shape[-1] % 8 or q_shape[-1] > 256:
        return f"cudnn takes heads of a multiple of 8 and at most 256, this model's have {q_shape[-1]}"
    return None
