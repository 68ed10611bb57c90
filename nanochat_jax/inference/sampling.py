"""From logits to a token: temperature, top-k and an exact draw, with the log-probability of what was drawn."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # tokens whose probabilities are summed before the first of the two draws


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. ValueError: a value that makes no sense, named by its flag."""

    temperature: float = 1.0  # 0 = always the token with the largest logit
    top_k: int = 50  # draw from the k tokens with the largest logits; 0 = from all
    max_new_tokens: int = 256  # of a sample, forced tokens included

    def __post_init__(self):
        def is_integer(value, least):
            return isinstance(value, int | np.integer) and value >= least

        for holds, rule, value in (
            (0 <= self.temperature <= 1e30, "--temperature must be a number from 0 to 1e30", self.temperature),
            (is_integer(self.top_k, 0), "--top-k must be at least 1, or 0 for no limit", self.top_k),
            (is_integer(self.max_new_tokens, 1), "--max-new-tokens must be at least 1", self.max_new_tokens),
        ):
            if not holds:
                raise ValueError(f"{rule}, got {value}")


def sample_keys(seed, step, examples, samples) -> jax.Array:
    """Keys [R] of samples. They depend on these numbers and on nothing else: seed and step uint32 scalars, examples and
    samples uint32 [R]."""
    root = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda e, s: jax.random.fold_in(jax.random.fold_in(root, e), s))(examples, samples)


def uniform_draws(keys, positions) -> jax.Array:
    """keys [R], positions int32 [R] that the tokens to be drawn will have -> float32 [R,2] in [0, 1)."""
    return jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n), (2,)))(keys, positions)


def choose_tokens(logits, draws, temperature, top_k) -> tuple[jax.Array, jax.Array]:
    """logits float32 [R,V], draws [R,2], temperature float32 scalar, top_k int32 scalar -> (tokens int32 [R], their
    log-probabilities float32 [R]).

    The distribution is softmax(logits / temperature) over the tokens whose logit is at least the k-th largest, so all
    tokens that tie for the k-th place stay. At temperature 0 the first of the largest logits wins, with log-probability
    0. Nothing is sorted, and no noise is drawn for the whole vocabulary: of the two draws the first picks a block of
    tokens, the second a token in it. Where logits are NaN, so is the log-probability; the token may be any.
    """

    def greedy():
        largest = jnp.max(logits, -1, keepdims=True)
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        first = jnp.min(jnp.where(logits == largest, ids, logits.shape[-1] - 1), -1)  # XLA on CPU is slow at argmax
        return first, jnp.zeros(len(logits), jnp.float32)

    return jax.lax.cond(temperature == 0, greedy, lambda: _draw(logits, draws, temperature, top_k))


def _draw(logits, draws, temperature, top_k):
    R, V = logits.shape
    largest = jnp.max(logits, -1)
    limited = (top_k > 0) & (top_k < V)
    floor = jax.lax.cond(limited, lambda: top_k_threshold(logits, top_k), lambda: jnp.full(R, -jnp.inf))
    weights = jnp.exp((logits - largest[:, None]) / temperature)
    weights = _blocks(jnp.where(logits >= floor[:, None], weights, 0.0), 0.0)
    sums = jnp.sum(weights, -1)
    block = _inverse_cdf(sums, draws[:, 0])
    inside = jnp.take_along_axis(weights, block[:, None, None], 1)[:, 0]
    index = _inverse_cdf(inside, draws[:, 1])
    weight = jnp.take_along_axis(inside, index[:, None], 1)[:, 0]
    return block * BLOCK + index, jnp.log(weight / jnp.sum(sums, -1))


def _inverse_cdf(weights, u):
    """weights [R,n] >= 0, u [R] in [0, 1) -> int32 [R]: i with probability weights[i] / sum, never one of weight 0."""
    n = weights.shape[-1]
    ids = jnp.arange(n, dtype=jnp.int32)[None]
    below = jnp.cumsum(weights, -1)
    reached = below > (u * below[:, -1])[:, None]
    # The first index whose sum is above u; where rounding leaves none, the last index of a weight above 0.
    rank = jnp.where(weights > 0, jnp.where(reached, 2 * n - ids, ids), -1)
    return jnp.argmax(rank, -1).astype(jnp.int32)


def top_k_threshold(x, k) -> jax.Array:
    """x float32 [R,V], k int32 scalar in 1..V -> float32 [R]: the entries at or above it are the k largest, and those
    that tie with the smallest of them. Bisection by counting takes a pass for each bit of the answer, and no sort."""

    def undecided(state):
        return jnp.any(~state[2])

    def halve(state):  # at least k entries reach `low`, fewer than k reach `high`
        low, high, decided = state
        middle = low + 0.5 * (high - low)
        # Counted in float32, exact up to 2^24: XLA on CPU adds floats at twice the speed of integers.
        count = jnp.sum((x >= middle[:, None]).astype(jnp.float32), -1)
        enough = count >= k
        tied = ~((low < middle) & (middle < high))  # no float lies between: `low` is the k-th largest (or all is NaN)
        low, high = (jnp.where(decided | tied | yes, old, middle) for yes, old in ((~enough, low), (enough, high)))
        return low, high, decided | tied | (count == k)

    tops = jnp.max(_blocks(x, -jnp.inf), -1)  # with k blocks or more, at least k entries reach the smallest of these
    low = jnp.where(k <= tops.shape[-1], jnp.min(tops, -1), jnp.min(x, -1))
    high = jnp.nextafter(jnp.max(tops, -1), jnp.inf)
    return jax.lax.while_loop(undecided, halve, (low, high, jnp.zeros(len(x), bool)))[0]


def _blocks(x, filling):
    """[R,V] -> [R,V/BLOCK,BLOCK], padded with `filling` where BLOCK does not divide V."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[-1] % BLOCK)], constant_values=filling).reshape(len(x), -1, BLOCK)
