"""What a stage computes on and how: JAX's platform, the compute type, the attention backend, each told to the user."""

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanochat_jax.cli.compilation_cache import keep_compiled_programs
from nanochat_jax.cli.settings import values_of
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.model.attention import AttentionShapes, choose_attention_backend
from nanochat_jax.model.gpt import GPTConfig

BFLOAT16_WIDTH = 256  # of a model that trains 1.8 to 2.1 times as fast in bfloat16 on a CPU with AMX
PLATFORMS = {"auto": None, "": None, "cuda": "cuda", "gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}


def start_device(device_type: str, cfg: Any = None) -> None:
    """Choose JAX's platform and start it, together with the run's other processes where `cfg` is the settings of a
    stage that may have some; ValueError says what to use or install instead, or which process does not fit."""
    if device_type == "mps":
        raise ValueError("--device-type=mps: JAX has no maintained backend for Apple's GPUs; use --device-type=cpu")
    if device_type not in PLATFORMS:
        raise ValueError(f"--device-type must be one of auto, cuda, tpu, cpu, got {device_type!r}")
    if PLATFORMS[device_type]:
        jax.config.update("jax_platforms", PLATFORMS[device_type])
    keep_compiled_programs()
    if cfg:
        processes.join(values_of(cfg), platform=PLATFORMS[device_type])
    if os.environ.get("TPU_SKIP_MDS_QUERY"):  # JAX has seen no TPU here: libtpu, if installed, need not complain of it
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # the second where JAX knows the platform but has no plugin for it
        extra = {"cuda": " --extra cuda13", "gpu": " --extra cuda13", "tpu": " --extra tpu"}.get(device_type, "")
        said = "".join(str(e).splitlines()[:1]) or "no device or no plugin found"
        raise ValueError(
            f"--device-type={device_type} cannot be started ({said}): "
            f"set up with tools/setup.sh{extra}, or choose another"
        ) from e
    processes.agree("the devices", {"devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"})


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """The --dtype in force: auto is float32 on CPU and bfloat16 elsewhere. platform: default that of JAX's devices."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32 or bfloat16, got {name!r}")
    automatic = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return jnp.dtype(automatic if name == "auto" else name)


def training_dtype(name: str, platform: str, width: int) -> jnp.dtype:
    """The --dtype in force in training: auto is also bfloat16 for a model of at least BFLOAT16_WIDTH on a CPU that has
    matrix units for it, where it is faster; answers and evaluations stay in float32 there."""
    native = (
        name == "auto" and platform == "cpu" and width >= BFLOAT16_WIDTH and "amx_bf16" in cpu_info("flags").split()
    )
    return compute_dtype("bfloat16" if native else name, platform)


def describe_device(mesh: Mesh, log: Callable) -> float | None:
    """Print the device -> peak bf16 FLOP/s of the whole mesh, None where it is unknown, as of every CPU."""
    device = mesh.devices.flat[0]
    name = cpu_name() if device.platform == "cpu" else device.device_kind
    flops = peak_flops(name)
    kind = {"cpu": "CPU", "tpu": "TPU"}.get(device.platform, "GPU")
    peak = f" | Peak FLOPS (BF16): {f'{flops:.2e}' if flops else 'unknown'}" if kind != "CPU" else ""
    log(f"{kind}: {name}{peak} | devices: {mesh.size}")
    return flops * mesh.size if flops else None


def choose_attention(
    wanted: str,
    model: GPTConfig,
    T: int,
    *,
    mesh: Mesh,
    dtype: Any,
    rows: int = 1,
    packed: bool = True,
    training: bool = True,
    recorded: Mapping[str, str] | None = None,
    verbose: bool = False,
    log: Callable = print0,
) -> str:
    """The backend for --attention in `rows` rows of T tokens a device; see `choose_attention_backend`, also for
    ValueError. Where there is a fast one that cannot do it, a warning tells why.

    recorded: what `attention_record` made of the choice of a run that goes on, None for another run; on devices of the
    same kind "auto" is this choice. verbose: print the times of all backends, where times are taken."""
    shapes, kind, before = AttentionShapes.of(model, T, rows), mesh.devices.flat[0].device_kind, None
    if recorded and wanted == "auto":
        if recorded["device"] == kind:
            before = recorded["backend"]
        else:
            began = f"the run's attention was {recorded['backend']} on {recorded['device']}"
            log(f"NOTE: {began}; on this {kind} it is chosen anew, so what follows may differ in the last bits")
    choice = choose_attention_backend(
        wanted,
        mesh,
        dtype,
        shapes,
        packed=packed,
        training=training,
        before=before,
        tell=log if verbose else None,
    )
    if choice.why:
        log(f"WARNING: attention is {choice.name}: {choice.why}")
    return choice.name


def attention_record(backend: str, mesh: Mesh) -> dict[str, str]:
    """What a checkpoint records of the attention of its run."""
    return {"backend": backend, "device": mesh.devices.flat[0].device_kind}


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


# Peak bytes/s of one device's memory, in the same way.
PEAK_BANDWIDTH = {
    "h200": 4.8e12,
    "h100 nvl": 3.9e12,
    "h100 pcie": 2.0e12,
    "h100": 3.35e12,
    "h800": 3.35e12,
    "gb200": 8e12,
    "b200": 8e12,
    "b100": 8e12,
    "a100-sxm4-40gb": 1.555e12,
    "a100-pcie-40gb": 1.555e12,
    "a100-pcie-80gb": 1.935e12,
    "a100": 2.039e12,
    "a800": 2.039e12,
    "l40s": 864e9,
    "l40": 864e9,
    "l4": 300e9,
    "a10g": 600e9,
    "rtx 5090": 1.792e12,
    "rtx 4090": 1.008e12,
    "rtx 3090": 936e9,
    "tpu v3": 450e9,  # half of the chip's
    "tpu v4": 1.228e12,
    "tpu v5 lite": 819e9,
    "tpu v5e": 819e9,
    "tpu v5": 2.765e12,
    "tpu v6": 1.64e12,
    "tpu7x": 3.69e12,  # half of the chip's
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device of this kind; None where the table does not know it."""
    return _of_kind(PEAK_FLOPS, device_kind)


def peak_bandwidth(device_kind: str) -> float | None:
    """Bytes/s of the memory of one device of this kind; None where the table does not know it."""
    return _of_kind(PEAK_BANDWIDTH, device_kind)


def _of_kind(table: Mapping[str, float], device_kind: str) -> float | None:
    kind = device_kind.lower()
    return next((value for name, value in table.items() if name in kind), None)


def cpu_name() -> str:
    """The processor's name as the system tells it, with the number of cores this process may use."""
    name = cpu_info("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({cores} cores)"


def cpu_info(field: str) -> str:
    """What Linux tells of the first processor; empty where it tells nothing."""
    info = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in (info.read_text().splitlines() if info.exists() else ()))
    return next((value.strip() for name, _, value in lines if name.strip() == field), "")


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def pages_note(platform: str) -> list[str]:
    """What makes steps on a CPU faster and must be set before a program starts, if there is something.

    A step's buffers are asked for and given back each time: 133,000 page faults in each step of the CPU bench, 600 with
    large pages, which the kernel gives to those who ask, and glibc asks for if told to."""
    if platform != "cpu" or "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""):
        return []
    try:
        for_who_asks = "[madvise]" in LARGE_PAGES.read_text()
    except OSError:  # another system than Linux
        return []
    said = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment makes steps on this CPU faster (large pages)"
    return [said] * for_who_asks
