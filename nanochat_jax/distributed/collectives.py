"""What the devices send each other in the forward and backward pass, written out where XLA's own choice is worse."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.mesh import row_axes, row_shards
from nanochat_jax.distributed.sharding import fit_param_spec, param_spec, without_data
from nanochat_jax.distributed.table_rows import table_rows

_replicated = contextvars.ContextVar("replicated_parameters", default=False)


@contextlib.contextmanager
def replicated_parameters(replicate: bool = True) -> Iterator[None]:
    """Functions traced inside take parameters as --replicate keeps them, whole on each device of the data axis."""
    token = _replicated.set(replicate)
    try:
        yield
    finally:
        _replicated.reset(token)


def spec_in_force(path: str, shape: tuple[int, ...]) -> P:
    """How the parameter with this path is split on the mesh in force; axes of size 1 are left out."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return P()
    spec = without_data(param_spec(path)) if _replicated.get() else param_spec(path)
    return P(*(axis if axis and mesh.shape[axis] > 1 else None for axis in fit_param_spec(spec, shape, mesh).spec))


def gather_weight(w: jax.Array, path: str) -> jax.Array:
    """A matrix (out, in) made whole over the data axis, for a product with each device's rows; the model axis still
    splits it. Without this XLA for TPU multiplies piece by piece as the pieces arrive, into buffers that it allocates
    for all layers at once: 6 GiB in a step of depth 20 with gradient accumulation."""
    spec = spec_in_force(path, w.shape)
    if "data" not in spec:
        return w
    with jax.named_scope("gathered"):
        w = jax.lax.with_sharding_constraint(w, spec)  # sends w in the dtype that it has here
        return jax.lax.with_sharding_constraint(w, without_data(spec))


def weight_gradient(dy: jax.Array, x: jax.Array, path: str) -> jax.Array:
    """The gradient float32 (out, in) of a matrix with y = x @ w.T, from dy [B,...,out] and x [B,...,in], summed over
    all rows. Each device multiplies its own rows, and receives the sum of only those entries that it holds."""

    def multiply(dy, x):
        return jnp.einsum("...o,...i->oi", dy, x, preferred_element_type=jnp.float32)

    spec = spec_in_force(path, (dy.shape[-1], x.shape[-1]))
    if "data" not in spec or x.shape[0] % row_shards():
        return multiply(dy, x)

    def local(dy, x):
        return reduce_scatter(multiply(dy, x), spec.index("data"))

    in_specs = tuple(P(row_axes(), *[None] * (x.ndim - 2), axis) for axis in without_data(spec))
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(dy, x)


def reduce_scatter(x: jax.Array, dim: int) -> jax.Array:
    """In a shard_map: the sum of x over all rows' devices, of which each keeps its part, cut along `dim` by the data
    axis. The parts become the leading dimension, where XLA for TPU neither pads them to its tiles nor sums all first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = x.reshape(*x.shape[:dim], mesh.shape["data"], -1, *x.shape[dim + 1 :])
    part = jax.lax.psum_scatter(jnp.moveaxis(parts, dim, 0), "data")
    return jax.lax.psum(part, "replica") if "replica" in mesh.shape else part


def look_up_embedding(table: jax.Array, ids: jax.Array, dtype: Any, path: str) -> jax.Array:
    """Rows of an embedding table [V,D] at ids int32 [B,...] -> [B,...,D] in dtype, with B split over `row_axes`.

    Where the data axis splits D, each device looks up its columns for all rows of its replica and then exchanges them
    for all columns of its own rows, so that the table and its gradient stay where they are. A table whose V the data
    axis splits (see `fit_param_spec`) is gathered."""
    spec = spec_in_force(path, table.shape)
    if not any(spec) or spec[-1] == "model" or len(ids) % row_shards():
        return constrain_batch(table_rows(table, ids)).astype(dtype)
    vocabulary_axis, channel_axis = spec

    def local(table, ids):
        if vocabulary_axis == "data":
            table = jax.lax.all_gather(table, "data", tiled=True)
        if channel_axis == "data":
            ids = jax.lax.all_gather(ids, "data", tiled=True)
        if vocabulary_axis == "model":
            ids = ids - jax.lax.axis_index("model") * len(table)
            held = ((ids >= 0) & (ids < len(table)))[..., None]
        x = table_rows(table, ids).astype(dtype)
        if vocabulary_axis == "model":
            x = jax.lax.psum(jnp.where(held, x, 0), "model")
        return jax.lax.all_to_all(x, "data", 0, x.ndim - 1, tiled=True) if channel_axis == "data" else x

    rows = P(row_axes())
    return jax.shard_map(local, in_specs=(spec, rows), out_specs=rows)(table, ids)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keep activations [B,...] split over `row_axes`, so that XLA does not gather whole batches. Nothing happens
    without a mesh in force, or where it does not divide B (a single prompt)."""
    shards = row_shards()
    if shards == 1 or x.shape[0] % shards:
        return x
    return jax.lax.with_sharding_constraint(x, P(row_axes(), *[None] * (x.ndim - 1)))
