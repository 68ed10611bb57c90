"""How parameters and batches lie on the mesh: the table from parameter path to PartitionSpec, and global arrays."""

import re
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.mesh import own_devices, row_axes

# Parameter path -> mesh axes of a matrix (out, in). To try another strategy, edit this table and nothing else.
PARAM_SPECS = [
    (r"wte|lm_head|.*/value_embed", P("model", "data")),
    (r".*/c_(q|k|v|fc)", P("model", "data")),
    (r".*/c_proj", P("data", "model")),
    (r".*/ve_gate|smear_gate|.*_lambdas?", P()),
]


def path_name(path: tuple) -> str:
    """A path of jax.tree_util as text: "blocks/0/attn/c_q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_by_path(tree: Any) -> dict[str, Any]:
    """{"blocks/0/attn/c_q": leaf, ...}"""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_by_path(tree: Any, table: list[tuple[str, Any]]) -> Any:
    """Replace each leaf by the value of the first pattern that matches its whole path; ValueError where none does."""
    return jax.tree.map_with_path(lambda path, leaf: _find(path_name(path), table, np.shape(leaf)), tree)


def param_spec(path: str) -> P:
    """The entry of PARAM_SPECS for the parameter with this path; ValueError where there is none."""
    return _find(path, PARAM_SPECS, ())


def _find(name: str, table: list[tuple[str, Any]], shape: tuple[int, ...]) -> Any:
    for pattern, value in table:
        if re.fullmatch(pattern, name):
            return value
    raise ValueError(f"no rule matches parameter {name!r} of shape {shape}; add one to the table")


def without_data(spec: P) -> P:
    """The spec without the data axis: whole copies of what it split."""
    return P(*(axis if axis != "data" else None for axis in spec))


def fit_spec(spec: P, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The spec on this mesh, without the axes that do not divide their dimension (factored moments, small matrices)."""
    padded = (*spec, *[None] * len(shape))[: len(shape)]
    return NamedSharding(mesh, P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(padded, shape))))


def fit_param_spec(spec: P, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """As `fit_spec`, but an axis that does not divide its dimension moves to another one that it divides and that is
    not split, if there is one."""
    axes = [*fit_spec(spec, shape, mesh).spec, *[None] * len(shape)][: len(shape)]
    for axis in spec:
        if axis and axis not in axes:
            whole = (i for i, other in enumerate(axes) if not other or mesh.shape[other] == 1)
            if (i := next((i for i in whole if shape[i] % mesh.shape[axis] == 0), None)) is not None:
                axes[i] = axis
    return NamedSharding(mesh, P(*axes))


def param_shardings(params: Any, mesh: Mesh, replicate: bool = False) -> Any:
    """A NamedSharding for each parameter by PARAM_SPECS; replicate: with whole copies over the data axis."""

    def shard(path, leaf):
        spec = _find(path_name(path), PARAM_SPECS, leaf.shape)
        return fit_param_spec(without_data(spec) if replicate else spec, leaf.shape, mesh)

    return jax.tree.map_with_path(shard, params)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole arrays on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For the leaves [A,B,T] of a training batch: rows split over `row_axes`."""
    return NamedSharding(mesh, P(None, row_axes(mesh)))


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays [A,B,T] or [B,T] from the rows [A,B_local,T] or [B_local,T] that this process has (`row_part`)."""

    def put(array):
        sharding = NamedSharding(mesh, P(*[None] * (array.ndim - 2), row_axes(mesh)))
        return jax.make_array_from_process_local_data(sharding, array)

    return {name: put(array) for name, array in batch.items()}


def matrices_in(dtype: Any, params: Any) -> Any:
    """The parameters with matrices in `dtype`, as the model multiplies them, and the rest as it is."""
    return jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, params)


def own_copy(params: Any, mesh: Mesh, dtype: Any) -> Any:
    """The parameters, sharded over `mesh`, as a copy on `own_devices(mesh)`, sharded over these by the same table: what
    a process needs to compute by itself. Matrices are copied in `dtype`, in which they are multiplied; one process
    needs no copy. All processes must call it together."""
    if jax.process_count() == 1:
        return params
    own = own_devices(mesh)
    names = ("process", *own.axis_names)
    groups = Mesh(mesh.devices.reshape(-1, *own.devices.shape), names, axis_types=(AxisType.Auto,) * len(names))
    shardings = param_shardings(params, own)
    in_groups = jax.tree.map(lambda sharding: NamedSharding(groups, sharding.spec), shardings)
    with jax.set_mesh(groups):
        copies = jax.jit(partial(matrices_in, dtype), out_shardings=in_groups)(params)

    def local(copy, sharding):
        parts = {part.device: part.data for part in copy.addressable_shards}
        return jax.make_array_from_single_device_arrays(copy.shape, sharding, [parts[d] for d in own.devices.flat])

    return jax.tree.map(local, copies, shardings)
