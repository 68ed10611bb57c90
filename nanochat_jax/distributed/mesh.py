"""The mesh of devices, and how a batch's rows are split over its devices and over the processes.

Axes: `data` splits rows, and parameters and optimizer state (FSDP); `model` splits matrices (tensor parallelism). A
third one before them, `replica`, is optional: it splits rows too, and each replica holds all parameters.
"""

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

MIN_CHANNELS = 8  # of a matrix on one device, where `choose_replicas` splits it: a TPU's tile has 8 rows
REPLICATE_FROM = 64  # devices from which on `choose_replicas` makes at least two replicas


def make_mesh(spec: str = "", devices=None, n_embd: int | None = None) -> Mesh:
    """The mesh of a --mesh such as "data=8", "data=4,model=2", "replica=2,data=4"; "" has all devices on data.

    An axis without a size has 1, and data all devices that are left; with a model's width n_embd, where neither replica
    nor data has a size, `choose_replicas` divides those among the two. A mesh with one replica has no such axis. The
    devices of a process are neighbours, so that it holds whole rows of a batch. Raises ValueError for another form of
    the flag, too few devices, or a model axis over parts of processes.
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
        replica, data = choose_replicas(n_embd, data)
    size = replica * data * model
    local = sum(device.process_index == jax.process_index() for device in devices)
    if size > len(devices) or (local < len(devices) and size != len(devices)):
        shape = " x ".join(map(str, [replica, data, model][sizes["replica"] is None :]))
        raise ValueError(f"--mesh={spec or 'default'} needs {shape} devices, got {len(devices)}")
    if local < len(devices) and local % model and model % local:
        raise ValueError(f"--mesh={spec}: model={model} must divide the {local} devices of a process, or be a multiple")
    shape = ({"replica": replica} if replica > 1 else {}) | {"data": data, "model": model}
    grid = np.asarray(devices[:size]).reshape(*shape.values())
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def choose_replicas(n_embd: int, devices: int) -> tuple[int, int]:
    """(replica, data) for this many devices and a model of this width: the largest data axis that splits the channels
    into equal parts of at least MIN_CHANNELS, with two replicas or more from REPLICATE_FROM devices on.

    Predicted from compiled programs (tools/predict): across a whole slice of 64 chips or more XLA for TPU turns gathers
    and scatters into all-reduces, across half of one it does not. Milliseconds of a step of depth 20 on 256 v5e chips:
    84 to 120 with data=256 (5 channels a chip), 47 to 93 with replica=2, 58 to 109 with replica=4; on 64 chips: 191 to
    272 with data=64, 167 to 234 with replica=2."""
    most = devices if devices < REPLICATE_FROM else devices // 2
    fitting = (n for n in range(most, 0, -1) if devices % n == 0 and n_embd % n == 0 and n_embd // n >= MIN_CHANNELS)
    data = next(fitting, 1)
    return devices // data, data


def row_axes(mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
    """The axes that split the rows of a batch; mesh: by default the one in force (`jax.set_mesh`)."""
    mesh = mesh or jax.sharding.get_abstract_mesh()
    return ("replica", "data") if "replica" in mesh.shape else ("data",)


def row_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """The number of parts that the rows of a batch are split into; 1 without a mesh in force."""
    mesh = mesh or jax.sharding.get_abstract_mesh()
    return mesh.shape.get("replica", 1) * mesh.shape.get("data", 1)


def row_part(mesh: Mesh) -> tuple[int, int]:
    """(which part of a batch's rows this process holds, number of parts); processes on one model axis hold the same."""
    sharing = max(1, mesh.shape["model"] * jax.process_count() // mesh.size)
    return jax.process_index() // sharing, jax.process_count() // sharing


def own_devices(mesh: Mesh) -> Mesh:
    """The mesh of this process's devices alone, for what it computes by itself."""
    if jax.process_count() == 1:
        return mesh
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return make_mesh(f"model={min(mesh.shape['model'], len(devices))}", devices)


def platform() -> str:
    """The platform of the devices of the mesh in force, which may be compile-only ones; without one the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "platform", None) or jax.default_backend()
