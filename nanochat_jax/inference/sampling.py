"""From logits to a token: temperature, top-k, top-p and an exact draw, with the log-probability of what was drawn."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.model.top_k import BLOCK, in_blocks, top_k_threshold


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. ValueError: a value that makes no sense, named by its flag."""

    temperature: float = 1.0  # 0 = always the token with the largest logit
    top_k: int = 50  # draw from the k tokens with the largest logits; 0 = from all
    max_new_tokens: int = 256  # of a sample, forced tokens included
    top_p: float = 1.0  # draw from the likeliest tokens that have this probability together; 1 = from all

    def __post_init__(self):
        def is_integer(value, least):
            return isinstance(value, int | np.integer) and value >= least

        for holds, rule, value in (
            (0 <= self.temperature <= 1e30, "--temperature must be a number from 0 to 1e30", self.temperature),
            (is_integer(self.top_k, 0), "--top-k must be at least 1, or 0 for no limit", self.top_k),
            (is_integer(self.max_new_tokens, 1), "--max-new-tokens must be at least 1", self.max_new_tokens),
            (0 <= self.top_p <= 1, "--top-p must be a number from 0 to 1", self.top_p),
        ):
            if not holds:
                raise ValueError(f"{rule}, got {value}")


def sample_keys(seed, step, examples, samples) -> jax.Array:
    """Keys [R] of samples. They depend on these numbers and on nothing else: seed uint32 [R] or a scalar, step a uint32
    scalar, examples and samples uint32 [R]."""

    def key(*numbers):
        root = jax.random.fold_in(jax.random.key(numbers[0]), step)
        return jax.random.fold_in(jax.random.fold_in(root, numbers[1]), numbers[2])

    return jax.vmap(key)(jnp.broadcast_to(seed, examples.shape), examples, samples)


def uniform_draws(keys, positions) -> jax.Array:
    """keys [R], positions int32 [R] that the tokens to be drawn will have -> float32 [R,2] in [0, 1)."""
    return jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n), (2,)))(keys, positions)


def within_top_p(logits, temperature, top_k, top_p) -> jax.Array:
    """Logits float32 [R,V] -> the same with -inf for the tokens that top-p leaves out; all else float32 or int32 [R].

    Those that stay are, after temperature and top-k, the fewest of the likeliest tokens whose probabilities sum to at
    least top_p, and all that tie with the last of them. A row with a top_p of 1, or at temperature 0, stays as it is.
    """
    limited = (top_p < 1) & (temperature > 0)
    weights = _weights(logits, _top_k_floor(logits, top_k), jnp.where(limited, temperature, 1.0))
    needed = top_p * jnp.sum(weights, -1)

    def halve(_, bounds):  # tokens of weight `low` and more have the mass that is needed, those of `high` have not
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(weights >= _as_float(middle)[:, None], weights, 0.0), -1) >= needed
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The bits of floats that are not negative are in the order of the floats; the largest weight is 1.
    bounds = jnp.zeros(len(logits), jnp.int32), jnp.full(len(logits), _ONE_AS_BITS + 1, jnp.int32)
    least, _ = jax.lax.fori_loop(0, _ONE_AS_BITS.bit_length(), halve, bounds)
    return jnp.where(limited[:, None] & (weights < _as_float(least)[:, None]), -jnp.inf, logits)


_ONE_AS_BITS = 0x3F800000  # of 1.0 in float32


def _as_float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def choose_tokens(logits, draws, temperature, top_k) -> tuple[jax.Array, jax.Array]:
    """logits float32 [R,V], draws [R,2], temperature float32 [R], top_k int32 [R], either perhaps a scalar -> (tokens
    int32 [R], their log-probabilities float32 [R]).

    The distribution is softmax(logits / temperature) over the tokens whose logit is at least the k-th largest, so all
    tokens that tie for the k-th place stay. At temperature 0 the first of the largest logits wins, with log-probability
    0. Nothing is sorted, and no noise is drawn for the whole vocabulary: of the two draws the first picks a block of
    tokens, the second a token in it. Where logits are NaN, so is the log-probability; the token may be any.
    """
    R = len(logits)
    temperature, top_k = (jnp.broadcast_to(jnp.asarray(x), R) for x in (temperature, top_k))
    greedy = temperature == 0

    def first_largest():
        largest = jnp.max(logits, -1, keepdims=True)
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        return jnp.min(jnp.where(logits == largest, ids, logits.shape[-1] - 1), -1)  # XLA on CPU is slow at argmax

    nothing = jnp.zeros(R, jnp.int32), jnp.zeros(R, jnp.float32)
    tokens, logprobs = jax.lax.cond(
        jnp.all(greedy), lambda: nothing, lambda: _draw(logits, draws, jnp.where(greedy, 1.0, temperature), top_k)
    )
    tokens = jax.lax.cond(jnp.any(greedy), lambda: jnp.where(greedy, first_largest(), tokens), lambda: tokens)
    return tokens, jnp.where(greedy, 0.0, logprobs)


def _draw(logits, draws, temperature, top_k):
    weights = in_blocks(_weights(logits, _top_k_floor(logits, top_k), temperature), 0.0)
    sums = jnp.sum(weights, -1)
    block = _inverse_cdf(sums, draws[:, 0])
    inside = jnp.take_along_axis(weights, block[:, None, None], 1)[:, 0]
    index = _inverse_cdf(inside, draws[:, 1])
    weight = jnp.take_along_axis(inside, index[:, None], 1)[:, 0]
    return block * BLOCK + index, jnp.log(weight / jnp.sum(sums, -1))


def _top_k_floor(logits, top_k):
    """float32 [R]: the smallest logit that top-k lets stay, -inf where it limits nothing."""
    R, V = logits.shape
    limited = (top_k > 0) & (top_k < V)
    unlimited = jnp.full(R, -jnp.inf)
    return jax.lax.cond(
        jnp.any(limited),
        lambda: jnp.where(limited, top_k_threshold(logits, jnp.where(limited, top_k, V)), unlimited),
        lambda: unlimited,
    )


def _weights(logits, floor, temperature):
    """float32 [R,V]: what the tokens' probabilities are in proportion to; the largest is 1."""
    weights = jnp.exp((logits - jnp.max(logits, -1, keepdims=True)) / temperature[:, None])
    return jnp.where(logits >= floor[:, None], weights, 0.0)


def _inverse_cdf(weights, u):
    """weights [R,n] >= 0, u [R] in [0, 1) -> int32 [R]: i with probability weights[i] / sum, never one of weight 0."""
    n = weights.shape[-1]
    ids = jnp.arange(n, dtype=jnp.int32)[None]
    below = jnp.cumsum(weights, -1)
    reached = below > (u * below[:, -1])[:, None]
    # The first index whose sum is above u; where rounding leaves none, the last index of a weight above 0.
    rank = jnp.where(weights > 0, jnp.where(reached, 2 * n - ids, ids), -1)
    return jnp.argmax(rank, -1).astype(jnp.int32)
