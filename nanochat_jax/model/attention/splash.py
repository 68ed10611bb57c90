"""JAX's splash attention (a Pallas kernel for TPU) behind the interface of our backends.

It skips the blocks that causality and the window exclude. Documents are segments to it: other documents' keys are
masked, but their blocks are computed. Its library loads with this module, so import it only where it is used.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from nanochat_jax.model.attention.residuals import OUT

LANES = 128  # of a TPU's vector registers: blocks are multiples of it
# Most queries and keys of a block, for layers (without, with) a window. A step of the kernel's grid has a fixed cost,
# which weighs more on a faster chip; larger blocks skip less. Chosen by that and compiled for these chips, not timed.
BLOCKS = {"TPU v5": (1024, 512), "TPU v6 lite": (1024, 512), "TPU7x": (1024, 512)}
OTHER_BLOCKS = (512, 512)  # on all other chips


def splash(q, k, v, k_start, scale, window, *, interpret: bool = False):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] -> [B,T,N,H], softmax in float32.

    The kernel knows no scale: q is scaled, in its type. interpret: run it on any device, slowly, for tests."""
    T, N = q.shape[1:3]
    block, padded = block_and_padded_length(T, largest_block(window))
    pad = padded - T

    def heads_first(x):  # [B,T,n,H] -> [B,n,T + pad,H]
        return jnp.pad(jnp.moveaxis(x, 1, 2), [(0, 0), (0, 0), (0, pad), (0, 0)])

    mask = splash_attention_mask.LocalMask((padded, padded), (None if window < 0 else window, 0), 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * N),
        block_sizes=block_sizes(block),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=OUT,  # of the output and of the log-sum-exp
        interpret=interpret,
    )
    documents = document_numbers(k_start, pad)
    ids = splash_attention_kernel.SegmentIds(documents, documents)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    y = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(*map(heads_first, (q, k, v)), ids)
    return jnp.moveaxis(y, 2, 1)[:, :T].astype(q.dtype)


def document_numbers(k_start: jax.Array, pad: int) -> jax.Array:
    """k_start int32 [B,T] -> the number of each token's document, int32 [B, T + pad]; padding is one more document.

    A document begins where a token sees itself alone. With a window of 0 that is every token, which sees no other."""
    T = k_start.shape[1]
    k_start = jnp.pad(k_start, [(0, 0), (0, pad)], constant_values=T)
    return jnp.cumsum(k_start == jnp.arange(T + pad)[None], 1, dtype=jnp.int32)


def largest_block(window: int) -> int:
    """The most tokens of a block on the chip that is compiled for, in a layer with this window."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return BLOCKS.get(device.device_kind if device else "", OTHER_BLOCKS)[window >= 0]


def block_and_padded_length(T: int, most: int) -> tuple[int, int]:
    """(block, T rounded up to whole blocks): blocks of at most `most`, as few and as small as hold T tokens."""
    count = -(-T // most)
    block = -(-T // (count * LANES)) * LANES
    return block, count * block


def block_sizes(block: int) -> splash_attention_kernel.BlockSizes:
    """The sizes for the forward and both backward kernels, which multiply at most 512 keys at a time."""
    compute = next(size for size in (512, 384, 256, 128) if block % size == 0)
    return splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=block,
    )


def splash_refuses(q_shape, kv_heads, dtype) -> str | None:
    """Why splash cannot take arrays of this type; None where it can. It takes every shape."""
    if dtype.name not in ("bfloat16", "float32"):
        return f"splash takes bfloat16 or float32, this is {dtype.name} (--dtype)"
    return None
