"""The k largest logits, without a sort."""

import jax
import jax.numpy as jnp

BLOCK = 64  # tokens that are looked at together first: their largest logit, or the sum of their probabilities


def top_k_threshold(x, k) -> jax.Array:
    """x float32 [R,V], k int32 [R] or a scalar, in 1..V -> float32 [R]: the entries at or above it are the k largest,
    and those that tie with the smallest of them. Bisection by counting takes a pass for each bit of the answer, and no
    sort."""
    k = jnp.broadcast_to(k, len(x))

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

    tops = jnp.max(in_blocks(x, -jnp.inf), -1)  # with k blocks or more, at least k entries reach the smallest of these
    low = jnp.where(k <= tops.shape[-1], jnp.min(tops, -1), jnp.min(x, -1))
    high = jnp.nextafter(jnp.max(tops, -1), jnp.inf)
    return jax.lax.while_loop(undecided, halve, (low, high, k == x.shape[-1]))[0]  # of all, the smallest


def in_blocks(x, filling):
    """[R,V] -> [R,V/BLOCK,BLOCK], padded with `filling` where BLOCK does not divide V."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[-1] % BLOCK)], constant_values=filling).reshape(len(x), -1, BLOCK)
