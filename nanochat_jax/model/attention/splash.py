"""JAX's splash attention (a Pallas kernel for TPU) behind this interface.

It leaves out the blocks that causality and the window exclude. Documents are segments to it: they are masked, but their
blocks are computed. Its library is imported here, so import this module only where it is used.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from nanochat_jax.model.attention.residuals import OUT

LANES = 128  # blocks are multiples of it
# Most queries and keys of a block, for layers without and with a window. A step of the kernel's grid costs time of its
# own, which weighs more on a faster chip; larger blocks leave out less. Chosen by that, and so that they compile for
# the chip; not timed.
BLOCKS = {"TPU v5": (1024, 512), "TPU v6 lite": (1024, 512), "TPU7x": (1024, 512)}
OTHERS = (512, 512)


def splash(q, k, v, k_start, scale, window, *, interpret: bool = False):
    """Causal attention of q [B,T,N,H] over k, v [B,T,K,H] -> [B,T,N,H], softmax in float32.

    The kernel knows no scale: it goes into q, in q's type. interpret: on any device, slowly, for tests."""
    T, N = q.shape[1:3]
    block, padded = tiles(T, limit(window))
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
    documents = segments(k_start, pad)
    ids = splash_attention_kernel.SegmentIds(documents, documents)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    y = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(*map(heads_first, (q, k, v)), ids)
    return jnp.moveaxis(y, 2, 1)[:, :T].astype(q.dtype)


def segments(k_start: jax.Array, pad: int) -> jax.Array:
    """k_start int32 [B,T] -> the number of each token's document, int32 [B, T + pad]; padding is one more.

    A document begins where a token sees itself alone; a window of 0 makes one of every token, with the same result."""
    T = k_start.shape[1]
    k_start = jnp.pad(k_start, [(0, 0), (0, pad)], constant_values=T)
    return jnp.cumsum(k_start == jnp.arange(T + pad)[None], 1, dtype=jnp.int32)


def limit(window: int) -> int:
    """The largest block on the chip that this is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return BLOCKS.get(device.device_kind if device else "", OTHERS)[window >= 0]


def tiles(T: int, most: int) -> tuple[int, int]:
    """(block, T rounded up to whole blocks): blocks of at most `most`, as few and as small as hold T tokens."""
    count = -(-T // most)
    block = -(-T // (count * LANES)) * LANES
    return block, count * block


def block_sizes(block: int) -> splash_attention_kernel.BlockSizes:
    """Of all three kernels; keys are multiplied at most 512 at a time."""
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
    """Why splash does not take q of this shape [B,T,N,H] and type with so many kv heads; None where it does."""
    del q_shape, kv_heads
    if dtype.name not in ("bfloat16", "float32"):
        return f"splash takes bfloat16 or float32, this is {dtype.name} (--dtype)"
    return None
