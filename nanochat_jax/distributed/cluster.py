"""Whether this process is one of several, and which: from flags, the environment, SLURM, Open MPI or a TPU slice."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

FLAGS = "--coordinator HOST:PORT --num-processes N --process-id I"
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ADDRESS_SECONDS = 300  # until a TPU slice knows the name of its first worker


@dataclass(frozen=True)
class Place:
    """This process among the others."""

    coordinator: str  # HOST:PORT where process 0 listens
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None  # of this machine, where its processes share them; None: all it sees
    source: str = "flags"

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"--coordinator must be HOST:PORT of process 0, got {self.coordinator!r:.100}")
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(
                f"--process-id must be from 0 to --num-processes - 1, got {self.index} of {self.count} processes"
            )

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])

    @property
    def loopback(self) -> bool:
        """All processes are on this machine, and nobody else must be able to connect."""
        return self.host in ("localhost", "127.0.0.1")


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    tpu: bool = True,
    environ: Mapping[str, str] = os.environ,
) -> Place | None:
    """Where this process stands, by the flags, else by the environment, else as JAX detects it; None: it is alone.

    tpu: whether the run may use one. A shell inside a cluster's job that is no task of several counts as alone.
    ValueError: only some of the flags, a value that cannot be, or a cluster that JAX cannot read.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    source = "flags"
    if all(value is None for value in given.values()):
        given, source = {name: environ.get(name) or None for name in VARIABLES}, "the environment"
    if any(value is not None for value in given.values()):
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(f"several processes need {FLAGS}, {' and '.join(missing)} is missing")
        address, *numbers = given.values()
        try:
            count, index = map(int, numbers)
        except ValueError:
            raise ValueError(f"{' and '.join(list(given)[1:])} must be numbers, got {numbers}") from None
        place = Place(address, count, index, source=source)
        return place if place.count > 1 else None
    if alone_in_slurm(environ):
        return None
    return _detected(tpu, environ)


def alone_in_slurm(environ: Mapping[str, str]) -> bool:
    """A step of SLURM with one task, whatever the job around it has: an interactive shell, a single-node run."""
    return environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "")) == "1"


def _detected(tpu: bool, environ: Mapping[str, str]) -> Place | None:
    """As JAX's own cluster classes find it. They have no public name: jax.distributed keeps the address to itself."""
    from jax._src.clusters import ClusterEnv

    wanted = {"slurm", "ompi", *(("gcetpu", "gketpu") if tpu else ())}
    try:
        for cluster in ClusterEnv._cluster_types:
            if cluster.name in wanted and cluster.is_env_present():
                count = cluster.get_process_count()
                if count == 1:
                    return None
                where = {
                    "timeout_secs": ADDRESS_SECONDS,
                    "override_coordinator_port": environ.get("JAX_COORDINATOR_PORT"),
                }
                local = (
                    None if cluster.name.endswith("tpu") else _local_devices(cluster.get_local_process_id(), environ)
                )
                address = cluster.get_coordinator_address(**where)
                return Place(address, count, cluster.get_process_id(), local, cluster.name)
    except (RuntimeError, KeyError, OSError) as e:
        raise ValueError(f"{cluster.name} was detected but cannot be used ({e}): give {FLAGS}") from e
    return None


def _local_devices(local_index: int | None, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """One GPU for each task of a machine; all of them for its only task, or where the cluster shows each its own."""
    nodes = environ.get("SLURM_STEP_NUM_NODES")
    only = nodes is not None and nodes == environ.get("SLURM_STEP_NUM_TASKS")
    only = only or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    if only or local_index is None or (shown and "," not in shown):
        return None
    return (local_index,)
