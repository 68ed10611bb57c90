"""Devices: the mesh, the table from parameter path to PartitionSpec, and host batches as global arrays.

Mesh axes: `data` (batch rows, and FSDP shards of parameters and optimizer state) and `model` (tensor parallel). A mesh
may have a third one before them, `replica`: rows are split over it too, and each of its groups holds all parameters.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanochat_jax.distributed.mesh import own_devices, row_axes

P = PartitionSpec


# Parameter path -> mesh axes of a (out, in) matrix. To try another strategy, edit this table and nothing else.
PARAM_SPECS = [
    (r"wte|lm_head|.*/value_embed", P("model", "data")),
    (r".*/c_(q|k|v|fc)", P("model", "data")),
    (r".*/c_proj", P("data", "model")),
    (r".*/ve_gate|smear_gate|.*_lambdas?", P()),
]


def map_by_path(tree: Any, table: list[tuple[str, Any]]) -> Any:
    """Replace each leaf by the value of the first pattern that matches the whole of its path ("blocks/0/attn/c_q").

    ValueError names a leaf that no pattern matches."""

    return jax.tree.map_with_path(lambda path, leaf: _lookup(path_name(path), table, np.shape(leaf)), tree)


def _lookup(name: str, table: list[tuple[str, Any]], shape: tuple[int, ...]) -> Any:
    for pattern, value in table:
        if re.fullmatch(pattern, name):
            return value
    raise ValueError(f"no rule matches parameter {name!r} of shape {shape}; add one to the table")


def param_spec(path: str) -> PartitionSpec:
    """What PARAM_SPECS says of the parameter with this path; ValueError: nothing."""
    return _lookup(path, PARAM_SPECS, ())


def path_name(path: tuple) -> str:
    """A path of jax.tree_util as text: "blocks/0/attn/c_q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`spec` on `mesh`, without the axes that do not divide their dimension (a factored moment, a small matrix)."""
    padded = (*spec, *[None] * len(shape))[: len(shape)]
    return NamedSharding(mesh, P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(padded, shape))))


def nearest(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`spec` on `mesh` for a parameter: an axis that does not divide its side goes to the other one, if that is whole
    and divides, and is left out otherwise."""
    axes = [*fit(spec, shape, mesh).spec, *[None] * len(shape)][: len(shape)]
    for axis in spec:
        if axis and axis not in axes:
            whole = [i for i, other in enumerate(axes) if not other or mesh.shape[other] == 1]
            for i in [i for i in whole if shape[i] % mesh.shape[axis] == 0][:1]:
                axes[i] = axis
    return NamedSharding(mesh, P(*axes))


def param_shardings(params: Any, mesh: Mesh, replicate: bool = False) -> Any:
    """A NamedSharding for each parameter, by PARAM_SPECS; `replicate` keeps whole copies over the data axis."""
    specs = map_by_path(params, PARAM_SPECS)
    if replicate:
        specs = jax.tree.map(without_data, specs, is_leaf=_is_spec)
    return jax.tree.map(lambda leaf, spec: nearest(spec, leaf.shape, mesh), params, specs)


def _is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole of an array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a training batch: leaves [A,B,T], rows over `row_axes`."""
    return NamedSharding(mesh, P(None, row_axes(mesh)))


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of the rows as global arrays: leaves [A,B_local,T] -> [A,B,T], [B_local,T] -> [B,T]."""

    def put(array):
        spec = P(*[None] * (array.ndim - 2), row_axes(mesh))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), array)

    return {name: put(array) for name, array in batch.items()}


def own_copy(params: Any, mesh: Mesh) -> Any:
    """Parameters on `mesh`, whole on the devices of each process, there split by the same table: what a process needs
    to compute by itself. All processes must call this together."""
    if jax.process_count() == 1:
        return params
    own = own_devices(mesh)
    names = ("process", *own.axis_names)
    groups = Mesh(mesh.devices.reshape(-1, *own.devices.shape), names, axis_types=(AxisType.Auto,) * len(names))
    shardings = param_shardings(params, own)
    spread = jax.tree.map(lambda sharding: NamedSharding(groups, sharding.spec), shardings)
    with jax.set_mesh(groups):
        copies = jax.jit(lambda tree: tree, out_shardings=spread)(params)

    def local(copy, sharding):
        parts = {part.device: part.data for part in copy.addressable_shards}
        return jax.make_array_from_single_device_arrays(copy.shape, sharding, [parts[d] for d in own.devices.flat])

    return jax.tree.map(local, copies, shardings)


def without_data(spec: PartitionSpec) -> PartitionSpec:
    """The same, whole over the data axis."""
    return P(*(axis if axis != "data" else None for axis in spec))


def flatten_by_path(tree: Any) -> dict[str, Any]:
    """{"blocks/0/attn/c_q": leaf, ...}"""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
