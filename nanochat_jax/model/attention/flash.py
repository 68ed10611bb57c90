"""What flash attention is beside its kernels: padding to whole blocks, residuals, and the gradients' order.

Kernels take q, o, do [B,T,N,H]; k, v [B,T,K,H]; k_start int32 [B,T]; lse, delta float32 [B,N,T]; T a multiple of their
block. Scores are in base 2: `scale` holds log2(e), and lse is a base-2 logarithm.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanochat_jax.model.attention.residuals import LSE, OUT

# For kernels. Lowering one takes seconds: so it is done once, not in every layer.
lower_once = partial(jax.jit, static_argnames=("scale", "interpret"))


class FlashKernels(NamedTuple):
    """The three kernels of a kind of device, each in `lower_once`."""

    block: int  # rows are padded to a multiple of it
    output: Callable  # (q, k, v, k_start, scale, interpret) -> (o, lse)
    grad_queries: Callable  # (q, k, v, k_start, do, lse, delta, scale, interpret) -> dq; delta: sum of do * o
    grad_keys: Callable  # the same -> (dk, dv)


def flash_attention(kernels: FlashKernels, q, k, v, k_start, scale: float, interpret: Any):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] with the keys k_start[t]..t, k_start int32 [B,T] ->
    [B,T,N,H], and its gradients. ValueError: q, k and v are of several types."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one type, got {q.dtype}, {k.dtype} and {v.dtype}")
    T = q.shape[1]
    pad = -T % kernels.block
    # A padded query sees its own padded key only: a finite softmax, whose zero gradient reaches nothing.
    k_start = jnp.minimum(jnp.pad(k_start, ((0, 0), (0, pad)), constant_values=T + pad), jnp.arange(T + pad)[None])
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    return _attend(kernels, float(scale) * math.log2(math.e), interpret, q, k, v, k_start)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(kernels, scale, interpret, q, k, v, k_start):
    return _forward(kernels, scale, interpret, q, k, v, k_start)[0]


def _forward(kernels, scale, interpret, q, k, v, k_start):
    o, lse = kernels.output(q, k, v, k_start, scale, interpret)
    o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
    return o, (q, k, v, k_start, o, lse)


def _backward(kernels, scale, interpret, residuals, do):
    q, k, v, k_start, o, lse = residuals
    delta = jnp.einsum("BTNH,BTNH->BNT", do, o, preferred_element_type=jnp.float32)
    arguments = (q, k, v, k_start, do, lse, delta, scale, interpret)
    return kernels.grad_queries(*arguments), *kernels.grad_keys(*arguments), None


_attend.defvjp(_forward, _backward)
