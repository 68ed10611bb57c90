"""Devices: the mesh, the table from parameter path to PartitionSpec, and host batches as global arrays.

Mesh axes: `data` (batch rows, and FSDP shards of parameters and optimizer state) and `model` (tensor parallel). A mesh
may have a third one before them, `replica`: rows are split over it too, and each of its groups holds all parameters.
"""

import contextlib
import contextvars
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

P = PartitionSpec

MIN_PART = (
    8  # channels that a device holds at least of a matrix, on a mesh that is chosen here: a TPU's tile has 8 rows
)
MANY = 64  # devices from which on such a mesh has two replicas at least

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


def make_mesh(spec: str = "", devices=None, n_embd: int | None = None) -> Mesh:
    """A mesh with axes data and model, and before them replica where that is not 1. spec: "" (all devices on data),
    "data=8", "data=4,model=2", "replica=2,data=4".

    What is not given is 1 for replica and model, and all that is left for data; with a width n_embd, where neither
    replica nor data are given, `suiting` divides that among the two. The devices of a process are neighbours, so that
    it holds whole rows of a batch. ValueError: the flag's form, too few devices, or a model axis that tears processes.
    """
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id)) if devices is None else devices
    sizes = {"replica": None, "data": None, "model": None}
    for part in filter(None, spec.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or sizes[name] or not size.isdigit() or int(size) < 1:
            raise ValueError(f"--mesh must look like data=4,model=2, got {spec!r}")
        sizes[name] = int(size)
    model = sizes["model"] or 1
    replica = sizes["replica"] or 1
    data = sizes["data"] or max(1, len(devices) // (model * replica))
    if n_embd and not sizes["data"] and not sizes["replica"]:
        replica, data = suiting(n_embd, data)
    size = replica * data * model
    local = sum(device.process_index == jax.process_index() for device in devices)
    if size > len(devices) or (local < len(devices) and size != len(devices)):
        shape = " x ".join(map(str, [replica, data, model][sizes["replica"] is None :]))
        raise ValueError(f"--mesh={spec or 'default'} needs {shape} devices, got {len(devices)}")
    if local < len(devices) and local % model and model % local:
        raise ValueError(f"--mesh={spec}: model={model} must divide the {local} devices of a process, or be a multiple")
    shape = {"replica": replica, "data": data, "model": model}
    if replica == 1:
        del shape["replica"]
    grid = np.asarray(devices[:size]).reshape(*shape.values())
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def suiting(n_embd: int, devices: int) -> tuple[int, int]:
    """(replica, data) for so many devices and a model of this width: as many parts as possible, of MIN_PART channels or
    more and all alike, since what does not divide is not split; and on MANY devices at least two replicas.

    By prediction (tools/predict): across whole slices of 64 chips and more, XLA for TPU makes all-reduces of gathers
    and scatters, across half of one it does not. Depth 20 on 256 v5e chips: data=256, 5 channels each, 84 to 120 ms a
    step; replica=2 47 to 93, replica=4 58 to 109. On 64: data=64 191 to 272, replica=2 167 to 234."""
    most = devices if devices < MANY else devices // 2
    fitting = (n for n in range(most, 0, -1) if devices % n == 0 and n_embd % n == 0 and n_embd // n >= MIN_PART)
    data = next(fitting, 1)
    return devices // data, data


def row_axes(mesh: Any = None) -> tuple[str, ...]:
    """The axes that rows of a batch are split over, of this mesh or of the one in force."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return ("replica", "data") if "replica" in mesh.shape else ("data",)


def row_shards(mesh: Any = None) -> int:
    """Into how many parts the rows of a batch are split; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return mesh.shape.get("replica", 1) * mesh.shape.get("data", 1)


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
    specs = by_path(params, PARAM_SPECS)
    if replicate:
        specs = jax.tree.map(without_data, specs, is_leaf=_is_spec)
    return jax.tree.map(lambda leaf, spec: nearest(spec, leaf.shape, mesh), params, specs)


def table(params: Any, mesh: Mesh, replicate: bool = False) -> tuple[list[str], list[str]]:
    """(lines: path, shape, axes and bytes a device of every parameter, layers that are alike in one line; and a note on
    each size that a mesh axis of the rules does not divide). params: abstract, with their shardings."""
    kinds: dict[tuple, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = re.sub(r"/\d+/", "/*/", path_name(path))
        kinds.setdefault((name, leaf.shape, leaf.sharding.spec), []).append(leaf)
    rows, total, notes = [("parameter", "shape", "sharding", "bytes a device")], 0, {}
    for (name, shape, spec), leaves in kinds.items():
        size = len(leaves) * leaves[0].dtype.itemsize * math.prod(leaves[0].sharding.shard_shape(shape))
        total += size
        axes = ", ".join(str(axis) for axis in (*spec, *[None] * len(shape))[: len(shape)])
        times = f" x {len(leaves)}" if len(leaves) > 1 else ""
        rows.append((name + times, " x ".join(map(str, shape)), f"({axes})", f"{size:,}"))
        for n, axis in zip(shape, param_spec(name)):
            if axis and n % mesh.shape[axis] and not (replicate and axis == "data"):
                notes.setdefault((n, axis, axis in spec), []).append(name)
    rows.append(("all", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + f"  {row[3]:>16}" for row in rows]
    said, how = "is no multiple of the mesh's", {True: "split along the other side", False: "not split"}
    return lines, [
        f"{n} {said} {axis}={mesh.shape[axis]}, so {how[moved]}: {', '.join(names)}"
        for (n, axis, moved), names in notes.items()
    ]


def heads_note(n_kv_head: int, mesh: Mesh) -> list[str]:
    """What to tell of a model axis that does not divide the kv heads (attention.sharded), if so."""
    size = mesh.shape["model"]
    if n_kv_head % size == 0:
        return []
    return [f"{n_kv_head} kv heads are no multiple of the mesh's model={size}, so attention is computed {size} times"]


def replicas_note(n_embd: int, mesh: Mesh) -> list[str]:
    """What to tell of a mesh that has replicas by `suiting`, if so."""
    if "replica" not in mesh.shape:
        return []
    replica, data = mesh.shape["replica"], mesh.shape["data"]
    return [
        f"parameters are split over {data} devices and kept {replica} times (--mesh replica={replica},data={data}), "
        f"which suits {n_embd} channels on {replica * data} devices"
    ]


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


def row_part(mesh: Mesh) -> tuple[int, int]:
    """(number of this process's part, parts) of a batch's rows; processes that the model axis spans share one."""
    sharing = max(1, mesh.shape["model"] * jax.process_count() // mesh.size)
    return jax.process_index() // sharing, jax.process_count() // sharing


def own_devices(mesh: Mesh) -> Mesh:
    """The part of the mesh that is this process's: all of it in a run of one process."""
    if jax.process_count() == 1:
        return mesh
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return make_mesh(f"model={min(mesh.shape['model'], len(devices))}", devices)


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


_whole = contextvars.ContextVar("whole copies over the data axis", default=False)


@contextlib.contextmanager
def whole_copies(replicate: bool = True):
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


def without_data(spec: PartitionSpec) -> PartitionSpec:
    """The same, whole over the data axis."""
    return P(*(axis if axis != "data" else None for axis in spec))


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


def platform() -> str:
    """Of the devices of the mesh in force, which may be compile-only ones; without one, of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "platform", None) or jax.default_backend()


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keep activations [B,...] split over `row_axes`; without it the partitioner may gather whole batches.

    Nothing happens without a mesh in force or where the batch does not divide (a single prompt)."""
    shards = row_shards()
    if shards == 1 or x.shape[0] % shards:
        return x
    return jax.lax.with_sharding_constraint(x, P(row_axes(), *[None] * (x.ndim - 1)))
