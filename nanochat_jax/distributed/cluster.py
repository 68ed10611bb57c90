"""Finds out whether this process is one of several: from flags, the environment, SLURM, Open MPI or a TPU slice."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

FLAGS = "--coordinator HOST:PORT --num-processes N --process-id I"
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ADDRESS_SECONDS = 300  # the longest that a TPU slice may take to learn the name of its first worker


@dataclass(frozen=True)
class ClusterInfo:
    """How many processes a run has, where they meet, and which of them this one is."""

    coordinator: str  # HOST:PORT at which process 0 listens
    process_count: int
    process_index: int
    local_devices: tuple[int, ...] | None = None  # the devices of this process; None: all that it sees
    source: str = "flags"  # what gave these values, as the user reads it

    def __post_init__(self):
        if not self.host or not 0 < self.port < 65536:
            raise ValueError(f"--coordinator must be HOST:PORT of process 0, got {self.coordinator!r:.100}")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                "--process-id must be from 0 to --num-processes - 1, "
                f"got {self.process_index} of {self.process_count} processes"
            )

    @property
    def host(self) -> str:
        """The coordinator's name or address, without its port."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """0 where the address has none."""
        port = self.coordinator.rpartition(":")[2]
        return int(port) if port.isdigit() else 0

    @property
    def loopback(self) -> bool:
        """Whether all processes are on this machine, so that no other machine may connect."""
        return self.host in ("localhost", "127.0.0.1")


def find_cluster(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    tpu: bool = True,
    environ: Mapping[str, str] = os.environ,
) -> ClusterInfo | None:
    """The processes of this run by the flags, else by VARIABLES, else as JAX detects them; None for a single process.

    tpu: whether the run may use a TPU. Raises ValueError where some of the flags are missing, a value is not valid, or
    JAX detects a cluster that it cannot read.
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
        cluster = ClusterInfo(address, count, index, source=source)
        return cluster if count > 1 else None
    # An interactive shell in a SLURM job of many tasks is a step of one task.
    if environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS")) == "1":
        return None
    return _detect_cluster(tpu, environ)


def _detect_cluster(tpu: bool, environ: Mapping[str, str]) -> ClusterInfo | None:
    """Ask JAX's own cluster classes, which are private: jax.distributed does not tell the coordinator's address."""
    from jax._src.clusters import ClusterEnv

    wanted = {"slurm", "ompi", *(("gcetpu", "gketpu") if tpu else ())}
    try:
        for env in ClusterEnv._cluster_types:
            if env.name not in wanted or not env.is_env_present():
                continue
            if (count := env.get_process_count()) == 1:
                return None
            local = None if env.name.endswith("tpu") else _local_devices(env.get_local_process_id(), environ)
            port = environ.get("JAX_COORDINATOR_PORT")
            address = env.get_coordinator_address(timeout_secs=ADDRESS_SECONDS, override_coordinator_port=port)
            return ClusterInfo(address, count, env.get_process_id(), local, env.name)
    except (RuntimeError, KeyError, OSError) as e:
        raise ValueError(f"{env.name} was detected but cannot be used ({e}): give {FLAGS}") from e
    return None


def _local_devices(local_index: int | None, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """One GPU for each task of a machine; all that it sees where it is the only task, or has been given its own GPU."""
    nodes = environ.get("SLURM_STEP_NUM_NODES")
    only_task = nodes is not None and nodes == environ.get("SLURM_STEP_NUM_TASKS")
    only_task = only_task or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    if only_task or local_index is None or (visible and "," not in visible):
        return None
    return (local_index,)
