"""Several processes of one run: they agree on what to do, exchange values, stop together, and notice a lost one.

`jax.distributed` connects the devices, but reports what goes wrong only after minutes, by killing the process. So the
processes are also connected to process 0 (see `coordinator`). Over these connections they compare their settings before
any device is used, exchange small values, agree on the step after which a signal stops them, and see within a second
that a process has died, or within LOST_SECONDS that its machine or network has. In a run of one process all functions
return at once.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nanochat_jax.distributed.cluster import find_cluster
from nanochat_jax.distributed.coordinator import LOST_SECONDS, Coordinator
from nanochat_jax.distributed.rendezvous import accept_processes, connect, describe_difference

# Settings that may differ between processes; `given` is which of them the user has set.
PER_PROCESS = {"process_id", "coordinator", "config", "data_dir", "json", "verbose"}

_coordinator: Coordinator | None = None  # set by `join`; None in a run of one process


def count() -> int:
    """The number of processes of this run."""
    return _coordinator.cluster.process_count if _coordinator else 1


def index() -> int:
    """The number of this process, from 0."""
    return _coordinator.cluster.process_index if _coordinator else 0


def mine(items: Sequence) -> Sequence:
    """This process's part of the items that all processes divide among themselves: every count()-th one."""
    return items[index() :: count()]


def merge(parts: Sequence[Sequence]) -> list:
    """What all processes found of their parts (see `mine`), by their numbers -> in the order of the items."""
    items = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        items[i :: len(parts)] = part
    return items


def join(settings: Mapping[str, Any], *, platform: str | None = None) -> None:
    """Meet the other processes, if there are any, and start jax.distributed. Call it before a device is used.

    settings: all of the stage, with coordinator, num_processes and process_id. platform: JAX's name of the device that
    the user wants, None for any. Raises ValueError where not all processes come within START_SECONDS, or where one of
    them, which it names, has other code, versions or settings than process 0.
    """
    global _coordinator
    platforms = platform or os.environ.get("JAX_PLATFORMS", "")
    addresses = (settings.get(name) for name in ("coordinator", "num_processes", "process_id"))
    cluster = find_cluster(*addresses, tpu=not platforms or "tpu" in platforms)
    if cluster is None:
        return
    import jax

    facts = versions() | {"code": code_hash(), **compared_settings(settings)}
    _coordinator = connect(cluster, facts) if cluster.process_index else accept_processes(cluster, facts)
    _coordinator.start()
    jax.config.update("jax_enable_preemption_service", False)  # `stop_here` answers every signal
    jax.distributed.initialize(
        f"{cluster.coordinator.rpartition(':')[0]}:{_coordinator.jax_port}",
        cluster.process_count,
        cluster.process_index,
        cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=60,
        shutdown_timeout_seconds=60,
        coordinator_bind_address=f"127.0.0.1:{_coordinator.jax_port}" if cluster.loopback else None,
    )
    hosts = ", ".join(dict.fromkeys(_coordinator.hosts))
    print0(f"{cluster.process_count} processes on {hosts} ({cluster.source})")


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Raise ValueError on all processes where one has other facts than process 0; it names the process and facts."""
    if _coordinator:
        values = exchange(what, {name: str(value) for name, value in facts.items()})
        faults = [describe_difference(i, _coordinator.hosts[i], other, values[0]) for i, other in enumerate(values)]
        if any(faults):
            raise ValueError("; ".join(filter(None, faults)))


def exchange(what: str, value: Any) -> list[Any]:
    """The values of all processes, by their numbers. They are small and travel as JSON. All processes must make the
    same exchanges in the same order; a slow process is waited for as long as it lives."""
    value = json.loads(json.dumps(value))  # its own value comes back to a process as it does to the others
    return _coordinator.exchange(what, value) if _coordinator else [value]


def gather(what: str, data: bytes | None) -> list[bytes] | None:
    """The bytes of all processes, sent over the devices' network; None on all where one of them passes None."""
    sizes = exchange(what, None if data is None else len(data))
    if None in sizes:
        return None
    if not _coordinator:
        return [data]
    import numpy as np
    from jax.experimental import multihost_utils

    padded_size = 1 << max(max(sizes) - 1, 1023).bit_length()  # a power of two, so that few programs are compiled
    padded = np.frombuffer(data.ljust(padded_size, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(rows, sizes)]


@contextlib.contextmanager
def process_zero_first(what: str) -> Iterator[None]:
    """Process 0 runs the body before the others do, which on a common file system find its files there."""
    if index():
        exchange(what, None)
    try:
        yield
    finally:
        if not index():
            exchange(what, None)


def signal_noticed() -> int:
    """The number of the signal that one of the processes got, 0 for none. It changes at another moment on each."""
    return _coordinator.signal_number if _coordinator else 0


def stopping_in_order() -> contextlib.AbstractContextManager[None]:
    """Inside, a signal makes `stop_here` true; outside, a signal ends all processes at once."""
    return _coordinator.stopping_in_order() if _coordinator else contextlib.nullcontext()


def stop_here() -> bool:
    """Whether a signal stops the run here. All processes must call it equally often, and get the same answer."""
    return _coordinator.stop_here() if _coordinator else False


def leave() -> None:
    """End a stage, in a `finally`: wait for the other processes, or after an error end them too and exit."""
    if not _coordinator:
        return
    error = sys.exception()
    if error is None or (isinstance(error, SystemExit) and isinstance(error.code, int | None)):
        exchange("end", None)
        return
    if _is_device_failure(error):  # most likely another process is lost, which the coordinator reports better
        time.sleep(LOST_SECONDS + 5)
    sys.stdout.flush()
    if isinstance(error, SystemExit):
        reason = str(error.code)
        print(reason, file=sys.stderr, flush=True)
    else:
        reason = f"{type(error).__name__}: {error}"
        traceback.print_exception(error)
    _coordinator.fail(reason)


def _is_device_failure(error: BaseException | None) -> bool:
    """Whether a device or a transfer between devices failed, other than for lack of memory, and led to the error."""
    while error is not None:
        text = str(error)
        out_of_memory = "RESOURCE_EXHAUSTED" in text or "out of mem" in text.lower()
        if type(error).__name__ == "JaxRuntimeError" and not out_of_memory:
            return True
        error = error.__cause__ or error.__context__
    return False


def versions() -> dict[str, str]:
    """Of the packages that a number may depend on."""
    return {name: version(name) for name in ("nanochat_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}


def code_hash() -> str:
    """A hash of the package's source files."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compared_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Flag -> value of the settings that must be the same on all processes."""
    return {f"--{k.replace('_', '-')}": str(v) for k, v in settings.items() if k not in PER_PROCESS}


def print0(*values: object) -> None:
    """Print on process 0 only, at once."""
    if not index():
        print(*values, flush=True)
