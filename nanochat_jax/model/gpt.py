"""The model: nanochat's GPT. Its eras, which nanochat never named in a file, differ in the values of one config only.

Letters, here and everywhere: A micro-batches, B batch rows, T query time, S key time, D model, N query heads, K kv
heads, G = N // K, H head size, F mlp, V vocabulary, L layers, R rows of decode, C chunk. A matrix is (out, in) and
y = x W^T, as nanochat stores it: files map one to one, and XLA on CPU multiplies in this order at nearly twice the
speed of (in, out). Master weights are float32 and are cast to the compute type where they are used.

The network (facts: nanochat as of 2026; norms have no parameters):
    e = rms(wte[token]);  x = x0 = e + smear_lambda * sigmoid(smear_gate . e[:24]) * e of the token before
    each layer: x = resid_lambda * x + x0_lambda * x0;  x += attention(rms(x));  x += mlp(rms(x))
    logits = cap * tanh(lm_head rms(x - backout_lambda * x after layer L // 2) / cap)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.distributed.collectives import constrain_batch, gather_weight, look_up_embedding, weight_gradient
from nanochat_jax.model.attention import attention, first_key
from nanochat_jax.model.attention.residuals import LSE, OUT
from nanochat_jax.model.loss import capped_logits

SMEAR_CHANNELS = 24  # of an embedding, which the gate of smear reads; nanochat's
REMAT = ("none", "elementwise", "block")  # what the backward pass computes again, from nothing to a whole layer
RMS_EPS = float(np.finfo(np.float32).eps)  # also for bfloat16 activations, as in nanochat


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Everything that determines the network. interop/nanochat_model.py has the values of nanochat's eras."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    padded_vocab: int  # rows of wte, lm_head and value embeddings, >= vocab_size
    windows: tuple[int, ...]  # per layer: a query sees keys at distance <= W, so W + 1 keys; -1 = no limit
    rope_base: float = 100_000.0
    qk_scale: float = 1.2  # factor on q and k after their norm
    logit_cap: float = 15.0
    residual_lambdas: bool = True  # resid_lambdas and x0_lambdas exist
    value_embed_scale: float = 3.0  # 0 = no value embeddings
    value_gate_channels: int = 12
    smear: bool = True
    backout: bool = True

    def __post_init__(self):
        object.__setattr__(self, "windows", tuple(self.windows))  # JSON gives lists; the config must be hashable
        D, N, K = self.n_embd, self.n_head, self.n_kv_head
        if D % N or N % K or (D // N) % 2:
            raise ValueError(
                "n_embd must be an even multiple of n_head, and n_head a multiple of n_kv_head, "
                f"got n_embd {D}, n_head {N}, n_kv_head {K}"
            )
        gates = max(SMEAR_CHANNELS * self.smear, self.value_gate_channels * (self.value_embed_scale != 0))
        if gates > D:
            raise ValueError(f"n_embd must be at least the {gates} channels that a gate reads, got {D}")
        if len(self.windows) != self.n_layer:
            raise ValueError(f"windows needs one entry a layer, got {len(self.windows)} for {self.n_layer} layers")
        if self.padded_vocab < self.vocab_size:
            raise ValueError(f"padded_vocab must be at least vocab_size {self.vocab_size}, got {self.padded_vocab}")
        if not 0 < self.logit_cap <= 60:  # the loss takes exp(logit) in float32 without a shift: loss.pick_logprob
            raise ValueError(f"logit_cap must be above 0 and at most 60, got {self.logit_cap}")

    @property
    def head_dim(self) -> int:
        """H, the width of an attention head."""
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        """K x H, the width of a token's keys."""
        return self.n_kv_head * self.head_dim

    def has_value_embed(self, layer: int) -> bool:
        """Every second layer has one, counted so that the last does."""
        return self.value_embed_scale != 0 and layer % 2 == (self.n_layer - 1) % 2


def window_sizes(pattern: str, n_layer: int, sequence_len: int) -> tuple[int, ...]:
    """Windows per layer from nanochat's pattern letters, by its rule since 2026-03-14; the last layer is always L.

    L: sequence_len. S: a quarter of it, rounded up to a multiple of 128 (2048 -> 512, 256 -> 128).
    """
    if not pattern or set(pattern.upper()) - {"S", "L"}:
        raise ValueError(f"--window-pattern must be made of the letters S and L, got {pattern!r}")
    short = 128 * math.ceil(math.ceil(sequence_len / 4) / 128)
    letters = [pattern.upper()[i % len(pattern)] for i in range(n_layer - 1)] + ["L"]
    return tuple(sequence_len if letter == "L" else short for letter in letters)


def weight(rngs: nnx.Rngs, init: Callable, *shape: int) -> nnx.Param:
    """A float32 master weight."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32))


def uniform(bound: float) -> Callable:
    """The initializer U(-bound, bound); jax.nn.initializers.uniform would be U(0, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def rms_norm(x: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in float32, in x's type."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + RMS_EPS)).astype(x.dtype)


def linear(x: jax.Array, w: nnx.Param, path: str) -> jax.Array:
    """x [B,...,in] times w [out,in] transposed -> [B,...,out], in x's type; the gradient of w is float32.

    path: the end of the parameter's path, which the table in distributed/sharding.py knows. A device that holds a part
    of w gathers the others' in x's type, for the forward and again for the backward product, and gets the gradient of
    its own part only."""
    return _linear(path, x, w[...])


def _product(path, x, w):
    return jnp.einsum("...i,oi->...o", x, gather_weight(w.astype(x.dtype), path))


_linear = jax.custom_vjp(_product, nondiff_argnums=(0,))


def _linear_fwd(path, x, w):
    return _product(path, x, w), (x, w)  # not _linear: `rematerialized` must see the product, which it may keep


def _linear_bwd(path, residuals, dy):
    x, w = residuals
    dx = jnp.einsum("...o,oi->...i", dy, gather_weight(w.astype(x.dtype), path))
    return dx, weight_gradient(dy, x, path).astype(w.dtype)


_linear.defvjp(_linear_fwd, _linear_bwd)


def rotary(positions: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B or 1, T, 1, H/2], of positions [B or 1, T]. nanochat rounds some of them to bfloat16."""
    inverse = np.float32(1) / np.float32(base) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(inverse)[None, None, None]
    # Behind the barrier they are computed once; else XLA does so in each layer, and on a CPU for every head again.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate_and_scale(x: jax.Array, rope: tuple[jax.Array, jax.Array], scale: float) -> jax.Array:
    """Rotate the halves (not pairs) of x [B,T,N,H] by MINUS the angle, then rms norm, then `scale`."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return (rms_norm(jnp.concatenate([a * cos + b * sin, b * cos - a * sin], -1)) * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped kv heads, norms on q and k, and on some layers a gated value embedding."""

    def __init__(self, config: GPTConfig, layer: int, *, rngs: nnx.Rngs):
        self.config = config
        D, bound = config.n_embd, 3**0.5 * config.n_embd**-0.5
        self.c_q = weight(rngs, uniform(bound), D, D)
        self.c_k = weight(rngs, uniform(bound), config.kv_dim, D)
        self.c_v = weight(rngs, uniform(bound), config.kv_dim, D)
        self.c_proj = weight(rngs, nnx.initializers.zeros, D, D)  # a block starts as the identity
        if config.has_value_embed(layer):
            self.ve_gate = weight(rngs, nnx.initializers.zeros, config.n_kv_head, config.value_gate_channels)
            self.value_embed = weight(rngs, uniform(bound), config.padded_vocab, config.kv_dim)

    def __call__(self, h, ids, rope, attend):
        """h [B,T,D], ids [B,T], rope of `rotary`, attend(q, k, v) -> (y, kv) as in `GPT.hidden` -> ([B,T,D], kv)."""
        c = self.config
        B, T, _ = h.shape
        q = linear(h, self.c_q, "attn/c_q").reshape(B, T, c.n_head, c.head_dim)
        k = linear(h, self.c_k, "attn/c_k").reshape(B, T, c.n_kv_head, c.head_dim)
        v = linear(h, self.c_v, "attn/c_v").reshape(B, T, c.n_kv_head, c.head_dim)
        if hasattr(self, "value_embed"):
            gate = linear(h[..., : c.value_gate_channels], self.ve_gate, "attn/ve_gate")
            gate = c.value_embed_scale * jax.nn.sigmoid(gate)
            embed = look_up_embedding(self.value_embed[...], ids, v.dtype, "attn/value_embed")
            v = v + gate[..., None] * embed.reshape(v.shape)
        q, k = (rotate_and_scale(x, rope, c.qk_scale) for x in (q, k))
        y, kv = attend(q, k, v)
        return linear(y.reshape(B, T, c.n_embd), self.c_proj, "attn/c_proj"), kv


class MLP(nnx.Module):
    """c_proj(relu(c_fc(h))^2), with F = 4 D."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        D = config.n_embd
        self.c_fc = weight(rngs, uniform(3**0.5 * D**-0.5), 4 * D, D)
        self.c_proj = weight(rngs, nnx.initializers.zeros, D, 4 * D)

    def __call__(self, h):
        """[B,T,D] -> [B,T,D]"""
        return linear(jnp.square(jax.nn.relu(linear(h, self.c_fc, "mlp/c_fc"))), self.c_proj, "mlp/c_proj")


class Block(nnx.Module):
    """One layer: attention, then mlp, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int, *, rngs: nnx.Rngs):
        self.attn = Attention(config, layer, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, ids, rope, attend):
        """The residual stream x [B,T,D] -> ([B,T,D], kv); the other arguments are those of Attention."""
        y, kv = self.attn(rms_norm(x), ids, rope, attend)
        x = x + y
        return x + self.mlp(rms_norm(x)), kv


class GPT(nnx.Module):
    """The whole network, with new weights. dtype: the compute type. attention: a backend of `attention.NAMES`."""

    def __init__(self, config: GPTConfig, *, dtype=jnp.float32, attention: str = "chunked", rngs: nnx.Rngs):
        self.config, self.dtype, self.attention = config, jnp.dtype(dtype), attention
        L, D = config.n_layer, config.n_embd
        self.wte = weight(rngs, nnx.initializers.normal(0.8), config.padded_vocab, D)
        self.lm_head = weight(rngs, nnx.initializers.normal(0.001), config.padded_vocab, D)
        self.blocks = nnx.List([Block(config, i, rngs=rngs) for i in range(L)])
        if config.residual_lambdas:
            self.resid_lambdas = weight(rngs, nnx.initializers.ones, L)
            self.x0_lambdas = weight(rngs, nnx.initializers.constant(0.1), L)
        if config.smear:
            self.smear_gate = weight(rngs, nnx.initializers.zeros, 1, SMEAR_CHANNELS)
            self.smear_lambda = weight(rngs, nnx.initializers.zeros, 1)
        if config.backout:
            self.backout_lambda = weight(rngs, nnx.initializers.constant(0.2), 1)

    def __call__(self, ids: jax.Array, *, document_start: jax.Array | None = None) -> jax.Array:
        """ids int32 [B,T] -> logits float32 [B,T,V]; document_start as for `hidden`."""
        return self.logits(self.hidden(ids, document_start=document_start)[0])

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states [...,D] -> capped logits float32 [...,V]; rows that pad the vocabulary are left out."""
        head = self.lm_head[...][: self.config.vocab_size].astype(x.dtype)
        return capped_logits(x, head, self.config.logit_cap)[0]

    def hidden(self, ids, *, document_start=None, positions=None, previous=None, attend=None, remat="none"):
        """The one forward pass of training, prefill and decode -> (hidden states [B,T,D] ready for lm_head, kvs).

        ids int32 [B,T]. document_start int32 [B,T]: where in the row each token's document begins; attention and smear
        do not look further back (None: a row is one document). kvs: k and v [B,T,K,H] of each layer, for a cache.

        Where the tokens continue a text, there are also their `positions` int32 [B,T] (default 0..T-1), the token
        before them, `previous` int32 [B], and a function attend(layer, q [B,T,N,H], k and v [B,T,K,H]) -> (y [B,T,N,H],
        the layer's entry of kvs), which has the earlier keys and values.
        remat: one of REMAT, see `rematerialized`; then kvs are empty, as they would be kept for the backward pass.
        """
        c = self.config
        positions = jnp.arange(ids.shape[1])[None] if positions is None else positions
        document_start = jnp.zeros_like(ids) if document_start is None else document_start
        rope = rotary(positions, c.head_dim, c.rope_base)
        if attend is None:
            k_starts = {w: first_key(document_start, positions, w) for w in set(c.windows)}  # once, not once a layer

            def attend(layer, q, k, v):
                window = c.windows[layer]
                return attention(q, k, v, k_starts[window], window=window, impl=self.attention), (k, v)

        e = self._embed(ids)
        x = x0 = self._smear(e, previous, positions == document_start) if c.smear else e

        def layer(i, x):
            if c.residual_lambdas:
                x = scaled_sum(self.resid_lambdas[i], x, self.x0_lambdas[i], x0)
            x, kv = self.blocks[i](x, ids, rope, partial(attend, i))
            return constrain_batch(x), kv if remat == "none" else ()

        kvs = []
        for i in range(c.n_layer):
            x, kv = rematerialized(partial(layer, i), remat)(x)
            kvs.append(kv)
            if i == c.n_layer // 2:
                halfway = x
        if c.backout:
            x = scaled_sum(1.0, x, -self.backout_lambda[0], halfway)
        return rms_norm(x), tuple(kvs)

    def _embed(self, ids):
        """ids [...] -> normalized embeddings [...,D] in the compute type."""
        return rms_norm(look_up_embedding(self.wte[...], ids, self.dtype, "wte"))

    def _smear(self, e, previous, is_start):
        """Add the previous token's embedding, gated by the current one's first channels; none before a document."""
        before = jnp.zeros_like(e[:, 0]) if previous is None else self._embed(previous)
        before = jnp.concatenate([before[:, None], e[:, :-1]], 1)
        gate = jax.nn.sigmoid(linear(e[..., :SMEAR_CHANNELS], self.smear_gate, "smear_gate").astype(jnp.float32))
        gate = jnp.where(is_start[..., None], 0.0, self.smear_lambda[...][None, None] * gate)
        return (e.astype(jnp.float32) + gate * before.astype(jnp.float32)).astype(e.dtype)


def rematerialized(layer: Callable, remat: str) -> Callable:
    """`layer`, a function of x, whose backward pass computes again what it would else keep: "none" of it, all that is
    "elementwise" (products are kept), or the whole "block". Attention's results are kept: its kernel never runs twice.
    """
    policies = jax.checkpoint_policies
    attention_only = policies.save_only_these_names(OUT, LSE)
    if remat == "none":
        return layer
    if remat == "elementwise":
        products = policies.checkpoint_dots_with_no_batch_dims
        return jax.checkpoint(layer, policy=policies.save_from_both_policies(attention_only, products))
    return jax.checkpoint(layer, policy=attention_only)


def scaled_sum(a: jax.Array | float, x: jax.Array, b: jax.Array, y: jax.Array) -> jax.Array:
    """a x + b y in float32, in x's type: a bfloat16 lambda would lose its third digit."""
    return (a * x.astype(jnp.float32) + b * y.astype(jnp.float32)).astype(x.dtype)


def abstract_gpt(config: GPTConfig, dtype=jnp.float32, attention: str = "chunked") -> tuple[nnx.GraphDef, dict]:
    """(graphdef, parameters as a nested dict of ShapeDtypeStruct): the model's shape without its memory."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: GPT(config, dtype=dtype, attention=attention, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)
