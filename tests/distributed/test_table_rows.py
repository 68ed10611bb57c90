"""Rows of embedding tables, whose gradient must not depend on the order in which a GPU adds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.table_rows import _table_rows, sum_by_row

ROWS = 40


def updates(seed, count=3000, width=8, spread=6.0):
    """Vectors of very different sizes, and the rows that they come to, of which some are frequent."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width)) * np.exp(rng.uniform(-spread, spread, (count, 1)))
    return x.astype(np.float32), (rng.pareto(1.0, count) * 3 % ROWS).astype(np.int32)


def test_sums_are_the_same_bits_in_any_order_and_those_of_float64():
    x, ids = updates(0)
    order = np.random.default_rng(1).permutation(len(ids))
    found, again = (np.asarray(sum_by_row(jnp.asarray(x[o]), jnp.asarray(ids[o]), ROWS)) for o in (slice(None), order))
    assert (found.view(np.int32) == again.view(np.int32)).all()
    naive = [np.asarray(jnp.zeros((ROWS, 8)).at[ids[o]].add(x[o])) for o in (slice(None), order)]
    assert (naive[0] != naive[1]).any()  # so the order does matter to floats
    wanted, sizes = np.zeros((ROWS, 8)), np.zeros((ROWS, 8))
    np.add.at(wanted, ids, x.astype(np.float64))
    np.add.at(sizes, ids, np.abs(x).astype(np.float64))
    count = np.bincount(ids, minlength=ROWS)[:, None]
    assert (np.abs(found - wanted) <= 2.0**-22 * sizes + 2.0**-30 * count * np.abs(x).max()).all()


def test_devices_that_have_some_channels_or_some_vectors_add_up_the_same():
    x, ids = updates(4, count=64)
    alone = np.asarray(sum_by_row(jnp.asarray(x), jnp.asarray(ids), ROWS))
    mesh, add = make_mesh("data=8"), partial(sum_by_row, rows=ROWS)
    channels = jax.shard_map(add, mesh=mesh, in_specs=(P(None, "data"), P()), out_specs=P(None, "data"))(x, ids)
    np.testing.assert_allclose(channels, alone, rtol=1e-6, atol=1e-7)
    vectors = jax.shard_map(
        lambda x, ids: jax.lax.psum(add(x, ids), "data"), mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P()
    )(x, ids)
    np.testing.assert_allclose(vectors, alone, rtol=1e-5, atol=1e-6 * np.abs(x).max())


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e30])
@pytest.mark.parametrize("count", [1, 2, 1 << 17])
def test_any_size_and_number_of_updates_can_be_added(scale, count):
    ids = np.arange(count, dtype=np.int32) % 3
    found = np.asarray(sum_by_row(jnp.full((count, 2), scale, jnp.float32), jnp.asarray(ids), 3))
    wanted = np.float32(scale) * np.bincount(ids, minlength=3)[:, None] * np.ones((3, 2))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen(bad):
    x, ids = updates(2)
    x[17, 3] = bad
    assert np.isnan(np.asarray(sum_by_row(jnp.asarray(x), jnp.asarray(ids), ROWS))).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_that_of_indexing(dtype):
    x, ids = updates(3, count=60, spread=1.0)
    ids, dy, table = ids.reshape(5, 12), jnp.asarray(x).reshape(5, 12, 8), jnp.asarray(x[:ROWS], dtype)
    found, wanted = (
        jax.grad(lambda table: jnp.sum(rows(table, ids).astype(jnp.float32) * dy))(table)  # noqa: B023
        for rows in (_table_rows, lambda table, ids: table[ids])
    )
    assert found.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.02, "atol": 0.05}
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), **tolerance)
