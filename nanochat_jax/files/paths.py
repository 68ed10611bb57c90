"""Plumbing that every stage needs: where files live, who prints, what machine this is."""

import functools
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from nanochat_jax.files import bucket

# Peak dense bf16 FLOP/s of one device, from the vendors' data sheets; the first key contained in the name decides.
PEAK_FLOPS = {
    "h200": 989e12,
    "h100 nvl": 835e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "h800": 989e12,
    "gb200": 2.5e15,
    "b200": 2.25e15,
    "b100": 1.8e15,
    "a100": 312e12,
    "a800": 312e12,
    "l40s": 362e12,
    "l40": 181e12,
    "l4": 121e12,
    "a10g": 70e12,
    "rtx 5090": 209.5e12,
    "rtx 4090": 165.2e12,
    "rtx 3090": 71e12,
    "tpu v3": 61.5e12,  # one core; the chip has two
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v6": 918e12,
    "tpu7x": 1.15e15,  # one of the chip's two devices
}


def base_dir() -> Path:
    """Where tokenizer, datasets and caches live: NANOCHAT_BASE_DIR, else nanochat's own ~/.cache/nanochat.

    Of a base directory in a bucket it is this machine's copy: the tokenizer is the bucket's, the rest comes and goes.
    """
    kept = kept_dir()
    return _with_tokenizer(str(kept)) if bucket.in_bucket(kept) else kept


def kept_dir() -> Any:
    """Where checkpoints, metrics and what else must be kept lives: `base_dir`, or gs://bucket/folder as an epath.Path.

    ValueError: the bucket cannot be used, or the library for it is not installed."""
    named = os.environ.get("NANOCHAT_BASE_DIR")
    if named and named.startswith("gs:/"):
        return bucket.place(named)
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "nanochat"


@functools.cache
def _with_tokenizer(url: str) -> Path:
    return bucket.fetch(bucket.place(url) / "tokenizer", exact=True).parent


def print0(*args, **kwargs) -> None:
    """Print on process 0 only, at once."""
    if process_index() == 0:
        print(*args, **{"flush": True, **kwargs})


def process_index() -> int:
    """This process's number among those of jax.distributed; asking does not start a device."""
    jax = sys.modules.get("jax")
    return jax.process_index() if jax and jax.distributed.is_initialized() else 0


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device of this kind; None where the table does not know it."""
    kind = device_kind.lower()
    return next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)


def cpu_name() -> str:
    """The processor's name as the system tells it, with the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({cores} cores)"


def write_atomically(path: Any, data: bytes) -> None:
    """A reader sees the old file or the new one, whole, whenever this process is killed."""
    if bucket.in_bucket(path := bucket.place(path)):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide the file from the other users of a shared base directory
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
