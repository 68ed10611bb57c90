"""What devices send each other in the forward and backward pass, written out: gather, scatter, embedding lookup."""

import contextlib
import contextvars
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nanochat_jax.distributed.mesh import row_axes, row_shards
from nanochat_jax.distributed.sharding import P, nearest, param_spec, without_data

_whole = contextvars.ContextVar("whole copies over the data axis", default=False)


@contextlib.contextmanager
def replicated_parameters(replicate: bool = True):
    """While it is entered, `spec_in_force` and what reads it take parameters as --replicate keeps them."""
    token = _whole.set(replicate)
    try:
        yield
    finally:
        _whole.reset(token)


def spec_in_force(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How PARAM_SPECS splits a parameter on the mesh in force; an axis of size 1 splits nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return P()
    spec = without_data(param_spec(path)) if _whole.get() else param_spec(path)
    return P(*(axis if axis and mesh.shape[axis] > 1 else None for axis in nearest(spec, shape, mesh).spec))


def gathered(w: jax.Array, path: str) -> jax.Array:
    """A matrix (out, in) whole on each device of the data axis, for a product with its rows; split over the model axis
    as before. Left to itself XLA for TPU multiplies the pieces as they come round instead, into buffers that it
    allocates for all layers at once: 6 GiB in a step of depth 20 with gradient accumulation."""
    spec = spec_in_force(path, w.shape)
    if "data" not in spec:
        return w
    with jax.named_scope("gathered"):
        w = jax.lax.with_sharding_constraint(w, spec)  # what is sent is what came in, in its type
        return jax.lax.with_sharding_constraint(w, without_data(spec))


def summed_products(dy: jax.Array, x: jax.Array, path: str) -> jax.Array:
    """The gradient of a matrix (out, in), float32: dy [B,...,out] times x [B,...,in], summed over all rows. Each device
    multiplies its own rows, and gets the sum of its own part only (reduce-scatter), where the matrix is split."""

    def products(dy, x):
        return jnp.einsum("...o,...i->oi", dy, x, preferred_element_type=jnp.float32)

    spec = spec_in_force(path, (dy.shape[-1], x.shape[-1]))
    if "data" not in spec or x.shape[0] % row_shards():
        return products(dy, x)

    def local(dy, x):
        return scattered(products(dy, x), spec.index("data"))

    sides = [P(row_axes(), *[None] * (x.ndim - 2), side) for side in without_data(spec)]
    return jax.shard_map(local, in_specs=tuple(sides), out_specs=spec, check_vma=False)(dy, x)


def scattered(x: jax.Array, side: int) -> jax.Array:
    """The sum of the devices' x over all rows, in a shard_map: of each device its part of the data axis along `side`.

    Parts are the leading axis, where XLA for TPU neither pads them to its tiles nor sums the whole first."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = x.reshape(*x.shape[:side], mesh.shape["data"], -1, *x.shape[side + 1 :])
    part = jax.lax.psum_scatter(jnp.moveaxis(parts, side, 0), "data")
    return jax.lax.psum(part, "replica") if "replica" in mesh.shape else part


def embedded(table: jax.Array, ids: jax.Array, dtype: Any, path: str) -> jax.Array:
    """Rows of a table [V,D] at ids int32 [B,...] -> [B,...,D] in dtype, B split over `row_axes`.

    Each device looks up its columns for all rows of its replica, and they exchange what they found: the table stays
    where it is, and so does its gradient. A table whose rows the data axis splits (see `nearest`) is gathered."""
    spec = spec_in_force(path, table.shape)
    if not any(spec) or spec[-1] == "model" or len(ids) % row_shards():
        return constrain_batch(table[ids]).astype(dtype)

    def local(table, ids):
        columns, words = spec[-1] == "data", spec[0] == "model"
        if spec[0] == "data":
            table = jax.lax.all_gather(table, "data", tiled=True)
        if columns:
            ids = jax.lax.all_gather(ids, "data", tiled=True)
        if words:
            ids = ids - jax.lax.axis_index("model") * len(table)
            mine = ((ids >= 0) & (ids < len(table)))[..., None]
        x = table[ids].astype(dtype)
        if words:
            x = jax.lax.psum(jnp.where(mine, x, 0), "model")
        return jax.lax.all_to_all(x, "data", 0, x.ndim - 1, tiled=True) if columns else x

    rows = P(row_axes())
    return jax.shard_map(local, in_specs=(spec, rows), out_specs=rows)(table, ids)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keep activations [B,...] split over `row_axes`; without it the partitioner may gather whole batches.

    Nothing happens without a mesh in force or where the batch does not divide (a single prompt)."""
    shards = row_shards()
    if shards == 1 or x.shape[0] % shards:
        return x
    return jax.lax.with_sharding_constraint(x, P(row_axes(), *[None] * (x.ndim - 1)))
