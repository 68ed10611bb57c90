"""Several processes of one run: they meet, agree, stop together, and notice when one of them is lost.

JAX's own service (`jax.distributed`) joins the devices; it kills the process with a page of C++ where anything is
wrong, and only minutes later. So the processes also keep a line to process 0, a TCP connection with lines of JSON: over
it they compare what they are about to do before a device is used, exchange small values in rounds, decide after which
step a signal stops them all, and see within a second that a process has died (LOST_AFTER seconds where its machine or
network has). In a run of one process all of this does nothing.
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

from nanochat_jax.distributed.cluster import find_place
from nanochat_jax.distributed.coordinator import LOST_AFTER, Line, difference, receive_all, visit

PER_PROCESS = {"process_id", "coordinator", "config", "data_dir", "json", "verbose"}  # settings that may differ
VERSIONS = ("nanochat_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")

_line: Line | None = None


# ------------------------------------------------------------------------------------------------------- for the stages
def count() -> int:
    """Processes of this run."""
    return _line.place.count if _line else 1


def index() -> int:
    """The number of this one, from 0."""
    return _line.place.index if _line else 0


def mine(items: Sequence) -> Sequence:
    """This process's part of what is done by all together: every count-th item."""
    return items[index() :: count()]


def join(settings: Mapping[str, Any], *, platform: str | None = None) -> None:
    """Meet the other processes, where there are any, and start jax.distributed; before any device is used.

    settings: what the stage was told; coordinator, num_processes and process_id among it. platform: JAX's name of the
    device that the user wants, None for any. ValueError, within START_SECONDS: not all came, or one of them has other
    code, versions or settings than process 0, named by its number and host.
    """
    global _line
    names = ("coordinator", "num_processes", "process_id")
    allowed = platform or os.environ.get("JAX_PLATFORMS", "")
    place = find_place(*(settings.get(name) for name in names), tpu=not allowed or "tpu" in allowed)
    if place is None:
        return
    import jax

    facts = {name: version(name) for name in VERSIONS} | {"code": code_hash(), **compared_settings(settings)}
    _line = (receive_all if place.index == 0 else visit)(place, facts)
    _line.start()
    jax.config.update("jax_enable_preemption_service", False)  # `stop_here` answers every signal
    jax.distributed.initialize(
        f"{place.coordinator.rpartition(':')[0]}:{_line.jax_port}",
        place.count,
        place.index,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=60,
        shutdown_timeout_seconds=60,
        coordinator_bind_address=f"127.0.0.1:{_line.jax_port}" if place.loopback else None,
    )
    if place.index == 0:
        print(f"{place.count} processes on {', '.join(dict.fromkeys(_line.hosts))} ({place.source})", flush=True)


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """ValueError, on every process, where one of them differs from process 0; it is named with what differs."""
    if _line:
        told = {name: str(value) for name, value in facts.items()}
        values = _line.exchange(what, told)
        faults = [difference(i, _line.hosts[i], other, values[0]) for i, other in enumerate(values)]
        if faults := list(filter(None, faults)):
            raise ValueError("; ".join(faults))


def exchange(what: str, value: Any) -> list[Any]:
    """Small JSON values of all processes, by their numbers. All must come here in the same order; who is late is waited
    for as long as it lives."""
    return _line.exchange(what, value) if _line else [json.loads(json.dumps(value))]


def gather(what: str, data: bytes | None) -> list[bytes] | None:
    """Bytes of all processes, carried by the devices' own network; None on all where one of them gives None."""
    sizes = exchange(what, None if data is None else len(data))
    if None in sizes:
        return None
    if not _line:
        return [data]
    import numpy as np
    from jax.experimental import multihost_utils

    room = 1 << max(max(sizes) - 1, 1023).bit_length()  # few sizes, few programs
    padded = np.frombuffer(data.ljust(room, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(rows, sizes)]


@contextlib.contextmanager
def process_zero_first(what: str) -> Iterator[None]:
    """What is inside is done by process 0, then by the others: on a file system that they share they find it done."""
    if index():
        exchange(what, None)
    try:
        yield
    finally:
        if not index():
            exchange(what, None)


def signal_noticed() -> int:
    """The number of the signal that one of the processes got, 0 for none. Each process learns of it in its own time."""
    return _line.noticed if _line else 0


@contextlib.contextmanager
def stopping_in_order() -> Iterator[None]:
    """While it is entered, a signal makes `stop_here` true; outside, it ends all processes at once."""
    if not _line:
        yield
        return
    _line.in_order = True
    yield
    _line.noticed = max(exchange("the end of the loop", _line.noticed))  # until here a signal must not end the others
    _line.in_order = False


def stop_here() -> bool:
    """Whether a signal ends the run here: the same answer on all processes, which must call it equally often."""
    return _line.stop_here() if _line else False


def leave() -> None:
    """At the end of a stage, in a `finally`: wait for the others where all went well; else tell them, and exit."""
    if not _line:
        return
    error = sys.exception()
    if error is None or (isinstance(error, SystemExit) and isinstance(error.code, int | None)):
        _line.exchange("end", None)
        return
    if _was_device(error):  # as a rule because another process is lost, which the line knows better
        time.sleep(LOST_AFTER + 5)
    sys.stdout.flush()
    if isinstance(error, SystemExit):
        said = str(error.code)
        print(said, file=sys.stderr, flush=True)
    else:
        said = f"{type(error).__name__}: {error}"
        traceback.print_exception(error)
    _line.fail(said)


def code_hash() -> str:
    """Of the package's own files."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compared_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings that must agree, by their flags."""
    return {f"--{k.replace('_', '-')}": str(v) for k, v in settings.items() if k not in PER_PROCESS}


def _was_device(error: BaseException | None) -> bool:
    """Whether a failure of the devices, or of a transfer between them, is behind the error."""
    if error is None:
        return False
    said = str(error)
    if (
        type(error).__name__ == "JaxRuntimeError"
        and "RESOURCE_EXHAUSTED" not in said
        and "out of mem" not in said.lower()
    ):
        return True
    return _was_device(error.__cause__ or error.__context__)


def print0(*args, **kwargs) -> None:
    """Print on process 0 only, at once."""
    if not index():
        print(*args, **{"flush": True, **kwargs})
