"""Devices: the mesh, the table from parameter path to PartitionSpec, and host batches as global arrays.

Mesh axes: `data` (batch rows, and FSDP shards of parameters and optimizer state) and `model` (tensor parallel).
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

P = PartitionSpec

# Parameter path -> mesh axes of a (out, in) matrix. To try another strategy, edit this table and nothing else.
PARAM_SPECS = [
    (r"wte|lm_head|.*/value_embed", P("model", "data")),
    (r".*/c_(q|k|v|fc)", P("model", "data")),
    (r".*/c_proj", P("data", "model")),
    (r".*/ve_gate|smear_gate|.*_lambdas?", P()),
]


def by_path(tree: Any, table: list[tuple[str, Any]]) -> Any:
    """Replace each leaf by the value of the first pattern that matches the whole of its path ("blocks/0/attn/c_q").

    ValueError names a leaf that no pattern matches."""

    def lookup(path, leaf):
        name = path_name(path)
        for pattern, value in table:
            if re.fullmatch(pattern, name):
                return value
        raise ValueError(f"no rule matches parameter {name!r} of shape {np.shape(leaf)}; add one to the table")

    return jax.tree.map_with_path(lookup, tree)


def path_name(path: tuple) -> str:
    """A path of jax.tree_util as text: "blocks/0/attn/c_q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_mesh(spec: str = "", devices=None) -> Mesh:
    """A mesh with axes data and model. spec: "" (all devices on data), "data=8", "data=4,model=2".

    What is not given is 1 for model and all that is left for data. ValueError: the flag's form, or too few devices."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": None, "model": None}
    for part in filter(None, spec.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or sizes[name] or not size.isdigit() or int(size) < 1:
            raise ValueError(f"--mesh must look like data=4,model=2, got {spec!r}")
        sizes[name] = int(size)
    model = sizes["model"] or 1
    data = sizes["data"] or max(1, len(devices) // model)
    if data * model > len(devices) or (jax.process_count() > 1 and data * model != len(devices)):
        raise ValueError(f"--mesh={spec or 'default'} needs {data} x {model} devices, got {len(devices)}")
    grid = np.asarray(devices[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`spec` on `mesh`, without the axes that do not divide their dimension (a factored moment, a small matrix)."""
    padded = (*spec, *[None] * len(shape))[: len(shape)]
    return NamedSharding(mesh, P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(padded, shape))))


def param_shardings(params: Any, mesh: Mesh, replicate: bool = False) -> Any:
    """A NamedSharding for each parameter, by PARAM_SPECS; `replicate` keeps whole copies over the data axis."""
    specs = by_path(params, PARAM_SPECS)
    if replicate:
        specs = jax.tree.map(lambda s: P(*(None if a == "data" else a for a in s)), specs, is_leaf=_is_spec)
    return jax.tree.map(lambda leaf, spec: fit(spec, leaf.shape, mesh), params, specs)


def _is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole of an array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a training batch: leaves [A,B,T], rows over the data axis."""
    return NamedSharding(mesh, P(None, "data"))


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of the rows as global arrays: leaves [A,B_local,T] -> [A,B,T], [B_local,T] -> [B,T]."""

    def put(array):
        spec = P(*[None] * (array.ndim - 2), "data")
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), array)

    return {name: put(array) for name, array in batch.items()}


def data_shards() -> int:
    """Size of the data axis of the mesh in force (jax.set_mesh); 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get("data", 1)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keep activations [B,...] split over the data axis; without it the partitioner may gather whole batches.

    Nothing happens without a mesh in force or where the batch does not divide (a single prompt)."""
    shards = data_shards()
    if shards == 1 or x.shape[0] % shards:
        return x
    return jax.lax.with_sharding_constraint(x, P("data", *[None] * (x.ndim - 1)))
