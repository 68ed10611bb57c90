"""The mesh of devices, and how rows of a batch are split over its devices and over the processes."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

# Channels that a device holds at least of a matrix, on a mesh that is chosen here: a TPU's tile has 8 rows.
MIN_CHANNELS = 8


REPLICAS_FROM = 64  # devices from which on such a mesh has two replicas at least


def make_mesh(spec: str = "", devices=None, n_embd: int | None = None) -> Mesh:
    """A mesh with axes data and model, and before them replica where that is not 1. spec: "" (all devices on data),
    "data=8", "data=4,model=2", "replica=2,data=4".

    What is not given is 1 for replica and model, and all that is left for data; with a width n_embd, where neither
    replica nor data are given, `choose_replicas` divides that among the two. The devices of a process are neighbours,
    so that it holds whole rows of a batch. ValueError: the flag's form, too few devices, or a model axis that tears processes.
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
    shape = {"replica": replica, "data": data, "model": model}
    if replica == 1:
        del shape["replica"]
    grid = np.asarray(devices[:size]).reshape(*shape.values())
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def choose_replicas(n_embd: int, devices: int) -> tuple[int, int]:
    """(replica, data) for so many devices and a model of this width: as many parts as possible, of MIN_PART channels or
    more and all alike, since what does not divide is not split; and on MANY devices at least two replicas.

    By prediction (tools/predict): across whole slices of 64 chips and more, XLA for TPU makes all-reduces of gathers
    and scatters, across half of one it does not. Depth 20 on 256 v5e chips: data=256, 5 channels each, 84 to 120 ms a
    step; replica=2 47 to 93, replica=4 58 to 109. On 64: data=64 191 to 272, replica=2 167 to 234."""
    most = devices if devices < REPLICAS_FROM else devices // 2
    fitting = (n for n in range(most, 0, -1) if devices % n == 0 and n_embd % n == 0 and n_embd // n >= MIN_CHANNELS)
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


def platform() -> str:
    """Of the devices of the mesh in force, which may be compile-only ones; without one, of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "platform", None) or jax.default_backend()
