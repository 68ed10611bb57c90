"""Token log-probabilities under soft-capped logits, and sums of a loss over them, without the logits of a whole batch.

SFT, RL and pretraining differ in one function, the loss of one token's log-probability; `summed_token_loss` sums it.
Its gradient is computed in the forward pass, chunk by chunk, while a chunk's logits are there: nothing is computed
twice, and memory holds the logits of one chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.collectives import reduce_scatter, spec_in_force
from nanochat_jax.distributed.mesh import platform, row_axes, row_shards
from nanochat_jax.model.top_k import top_k_threshold

# Float32 logits of a chunk, per device: on a CPU what stays in its cache (four times more takes 1.4 times as long), and
# elsewhere 256 MiB, to fill the matrix units.
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS = 1 << 20, 1 << 26


def capped_logits(x: jax.Array, head: jax.Array, cap: float) -> tuple[jax.Array, jax.Array]:
    """x [...,D], head [V,D] in x's type -> (cap * tanh(z / cap), tanh(z / cap)), float32 [...,V], z = x head^T."""
    t = jnp.tanh(jnp.einsum("...D,VD->...V", x, head, preferred_element_type=jnp.float32) * (1 / cap))
    return cap * t, t


def pick_logprob(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Capped logits float32 [...,V], targets int32 [...] -> (log p of each target, log-normalizer), float32 [...].

    They lie within +-cap, so that exp needs no shift by the maximum."""
    normalizer = jnp.log(jnp.sum(jnp.exp(logits), -1))
    return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - normalizer, normalizer


class Limits(NamedTuple):
    """The distribution of a token: softmax(logits / temperature) over the top_k largest logits; 0 = over all."""

    temperature: float = 1.0
    top_k: int = 0


NO_LIMITS = Limits()  # the model's own distribution


def limited_distribution(logits: jax.Array, targets: jax.Array, limits: Limits) -> tuple[jax.Array, jax.Array]:
    """Logits float32 [...,V], targets int32 [...] -> (log p of each target [...], p [...,V]) under these limits.

    A target is always among the tokens that stay: where the sampler has drawn it, and rounding alone has moved it
    below the k-th here, it must not become impossible. Tokens that tie for the k-th place stay, as in the sampling; two
    that nearly do may change places by rounding, which changes log p by what one of them weighs."""
    V = logits.shape[-1]
    limited = logits / limits.temperature
    if 0 < limits.top_k < V:
        floor = top_k_threshold(logits.reshape(-1, V), limits.top_k).reshape(targets.shape)[..., None]
        stays = (logits >= floor) | jax.nn.one_hot(targets, V, dtype=bool)
        limited = jnp.where(stays, limited, -jnp.inf)
    logp = jax.nn.log_softmax(limited, -1)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], jnp.exp(logp)


def token_logprobs(x: jax.Array, lm_head: jax.Array, targets: jax.Array, *, cap: float, vocab_size: int) -> jax.Array:
    """log p(target), float32 [B,T], from hidden states x [B,T,D], lm_head [>=V,D], targets int32 [B,T] in 0..V-1.

    No gradient flows: to train on log-probabilities, give `summed_token_loss` a function of them."""
    return _loss_and_logprobs(_zero_loss, cap, vocab_size, NO_LIMITS, x, lm_head, targets, None)[1]


def summed_token_loss(
    token_loss: Callable,
    x: jax.Array,
    lm_head: jax.Array,
    targets: jax.Array,
    aux: Any,
    *,
    cap: float,
    vocab_size: int,
    limits: Limits = NO_LIMITS,
) -> tuple[jax.Array, jax.Array]:
    """(sum over tokens of token_loss(log p(target), aux), float32 scalar; log p(target), float32 [B,T], no gradient).

    x [B,T,D] in the compute type; lm_head float32 [>=V,D], whose rows from vocab_size on take no part; targets int32
    [B,T] in 0..V-1; aux a pytree of arrays [B,T] (weights, advantages, ...), constants for the gradient. token_loss
    maps float32 [...] and aux [...] to float32 [...], element by element. Gradients flow to x and lm_head. With a mesh
    in force each device works on its own rows. limits: of the distribution that p is of, and its gradient.
    """
    return _loss_and_logprobs(token_loss, cap, vocab_size, limits, x, lm_head, targets, aux)


def weighted_nll(logp: jax.Array, aux: dict[str, jax.Array]) -> jax.Array:
    """The token loss of SFT and pretraining: -weight * log p."""
    return -aux["weights"] * logp


def _zero_loss(logp, aux):
    """The token loss of `token_logprobs`."""
    return jnp.zeros_like(logp)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _loss_and_logprobs(token_loss, cap, vocab_size, limits, x, lm_head, targets, aux):
    return _per_device(token_loss, cap, vocab_size, limits, x, lm_head, targets, aux, False)[0]


def _loss_and_gradients(token_loss, cap, vocab_size, limits, x, lm_head, targets, aux):
    return _per_device(token_loss, cap, vocab_size, limits, x, lm_head, targets, aux, True)


def _scale_gradients(token_loss, cap, vocab_size, limits, gradients, cotangents):
    dx, dhead = gradients
    scale = cotangents[0]  # of the loss; the log-probabilities have none
    return (dx * scale.astype(dx.dtype), dhead * scale, None, None)


_loss_and_logprobs.defvjp(_loss_and_gradients, _scale_gradients)


def _per_device(token_loss, cap, vocab_size, limits, x, lm_head, targets, aux, with_gradient):
    """`_scan_chunks` of each device's rows; the head's gradients are summed over devices once, not per chunk."""
    scan = partial(_scan_chunks, token_loss, cap, vocab_size, limits, with_gradient)
    if row_shards() == 1 or x.shape[0] % row_shards():
        return scan(x, lm_head, targets, aux)

    spec = spec_in_force("lm_head", lm_head.shape)
    axes = row_axes()
    side = spec.index("data") if "data" in spec else None  # along which the head, and so its gradient, is split

    def local(x, lm_head, targets, aux):
        (loss, logp), gradients = scan(x, lm_head, targets, aux)
        loss = jax.lax.psum(loss, axes)
        if with_gradient:
            dx, dhead = gradients
            gradients = dx, jax.lax.psum(dhead, axes) if side is None else reduce_scatter(dhead, side)
        return (loss, logp), gradients

    rows, split = P(axes), {None: P(), 0: P("data"), 1: P(None, "data")}[side]
    out_specs = ((P(), rows), (rows, split) if with_gradient else None)
    sharded = jax.shard_map(
        local, in_specs=(rows, P(), rows, rows), out_specs=out_specs, axis_names=set(axes), check_vma=False
    )
    return sharded(x, lm_head, targets, aux)


def _scan_chunks(token_loss, cap, vocab_size, limits, with_gradient, x, lm_head, targets, aux):
    """((loss, logp [B,T]), (dx [B,T,D], dhead float32 like lm_head) or None) of the rows at hand."""
    B, T = targets.shape
    head = lm_head[:vocab_size].astype(x.dtype)
    cpu = platform() == "cpu"
    # dhead as [D,V]: a CPU multiplies this in two thirds of the time, but in bfloat16 not at all
    transposed = cpu and x.dtype == jnp.float32
    chunk = min(T, max(1, (CHUNK_ELEMENTS_CPU if cpu else CHUNK_ELEMENTS) // (B * vocab_size)))
    count = -(-T // chunk)
    chunk = -(-T // count)

    def split(a):  # [B,T,...] -> [count,B,chunk,...]; `join` cuts off again what fills up the last chunk
        a = jnp.pad(a, [(0, 0), (0, count * chunk - T)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, count, chunk, *a.shape[2:]), 1, 0)

    def join(a):
        return jnp.moveaxis(a, 0, 1).reshape(B, count * chunk, *a.shape[3:])[:, :T]

    def body(carry, chunk):
        x, targets, real, aux = chunk
        logits, t = capped_logits(x, head, cap)
        if limits == NO_LIMITS:
            logp, normalizer = pick_logprob(logits, targets)
        else:
            logp, p = limited_distribution(logits, targets, limits)
        losses, pullback = jax.vjp(lambda logp: token_loss(logp, aux), logp)
        loss, dhead = carry
        loss = loss + jnp.sum(jnp.where(real, losses, 0.0))
        if not with_gradient:
            return (loss, dhead), (logp, None)
        dlogp = jnp.where(real, pullback(jnp.ones_like(losses))[0], 0.0)
        # d logp / d z = (onehot - p)(1 - tanh^2); a weight of 0 gives exact zeros
        if limits == NO_LIMITS:  # p of the exponentials that the normalizer has summed
            weighted_p = jnp.exp(logits) * (dlogp * jnp.exp(-normalizer))[..., None]
        else:
            dlogp = dlogp / limits.temperature
            weighted_p = p * dlogp[..., None]
        is_target = jnp.arange(vocab_size)[None, None] == targets[..., None]  # turned into numbers it is slow on a CPU
        dz = ((jnp.where(is_target, dlogp[..., None], 0.0) - weighted_p) * (1 - t * t)).astype(x.dtype)
        dx = jnp.einsum("BCV,VD->BCD", dz, head)
        if transposed:
            dhead = dhead + jnp.einsum("BCD,BCV->DV", x, dz, preferred_element_type=jnp.float32)
        else:
            dhead = dhead + jnp.einsum("BCV,BCD->VD", dz, x, preferred_element_type=jnp.float32)
        return (loss, dhead), (logp, dx)

    real = jnp.ones((B, T), bool)  # after `split`: not the padding
    dhead = jnp.zeros(head.shape[::-1] if transposed else head.shape, jnp.float32) if with_gradient else None
    chunks = jax.tree.map(split, (x, targets, real, aux))
    (loss, dhead), (logp, dx) = jax.lax.scan(body, (jnp.float32(0), dhead), chunks)
    if not with_gradient:
        return (loss, join(logp)), None
    dhead = jnp.pad(dhead.T if transposed else dhead, [(0, lm_head.shape[0] - vocab_size), (0, 0)])
    return (loss, join(logp)), (join(dx), dhead)
