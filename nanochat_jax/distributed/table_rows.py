"""Rows of an embedding table, with a gradient that repeats bit for bit on NVIDIA GPUs too.

There XLA adds up what comes to a row in any order, with atomic instructions, and a sum of floats depends on the order.
Sums of integers do not: so every number is cut into whole multiples of powers of two, which are added as int32.
"""

import jax
import jax.numpy as jnp

from nanochat_jax.distributed.mesh import platform

PRECISE_BITS = 30  # of a number against the largest one, that are added at least
SUM_BITS = 30  # of an int32, which also has a sign
SMALLEST_EXPONENT = -90  # numbers under 2^-90 are as good as 0, and their scale would be infinite


def table_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids]: of a table [V,D] the rows at ids int32 [...] -> [...,D], in the table's type."""
    return _table_rows(table, ids) if platform() == "gpu" else table[ids]


@jax.custom_vjp
def _table_rows(table, ids):
    return table[ids]


def _forward(table, ids):
    return table[ids], (ids, table[:, 0])  # the column for its length and type


def _backward(residuals, dy):
    ids, column = residuals
    return sum_by_row(dy, ids, len(column)).astype(column.dtype), None


_table_rows.defvjp(_forward, _backward)


def sum_by_row(x: jax.Array, ids: jax.Array, rows: int) -> jax.Array:
    """x [...,D], ids int32 [...] -> float32 [rows,D]: row i is the sum of the vectors whose id is i, the same bits in
    whatever order they are added. Each is exact to 2^-30 of the largest number in x; all is NaN where that is not
    finite."""
    x, ids = x.reshape(-1, x.shape[-1]).astype(jnp.float32), ids.reshape(-1)
    bits = SUM_BITS - (len(ids) - 1).bit_length()  # of a number, so that all of them together fit into an int32
    if bits < 1:
        raise ValueError(f"a device must look up at most {2 ** (SUM_BITS - 1):,} rows at once, got {len(ids):,}")
    largest = jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)))
    exponent = jnp.maximum(jnp.frexp(largest)[1], SMALLEST_EXPONENT)

    def add(_, carry):
        rest, unit, total = carry
        whole = jnp.round(rest)
        sums = jnp.zeros(total.shape, jnp.int32).at[ids].add(whole.astype(jnp.int32))
        return (rest - whole) * 2.0**bits, unit * 2.0**-bits, total + sums.astype(jnp.float32) * unit

    # A loop, so that integers do not outlive it: XLA would keep those of all tables until the end of the backward pass.
    nothing = jnp.full((rows, x.shape[-1]), 0 * (largest + ids[0]))  # of x and ids, as shard_map asks for in a loop
    begin = jnp.ldexp(x, bits - exponent), jnp.float32(1), nothing
    _, _, total = jax.lax.fori_loop(0, -(-PRECISE_BITS // bits), add, begin)
    return jnp.where(jnp.isfinite(largest), jnp.ldexp(total, exponent - bits), jnp.nan)
