"""What a stage computes on and how: JAX's platform, the compute type, the attention backend, each told to the user."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanochat_jax.distributed import processes
from nanochat_jax.files.paths import cpu_name, kept_dir, peak_flops, print0
from nanochat_jax.model import attention
from nanochat_jax.model.gpt import GPTConfig

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
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # where the user wants it
        jax.config.update("jax_compilation_cache_dir", str(kept_dir() / "compilation_cache"))
    if cfg:
        processes.join(dataclasses.asdict(cfg), platform=PLATFORMS[device_type])
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


def describe_device(mesh: Mesh, log: Callable) -> float | None:
    """Print the device -> peak bf16 FLOP/s of the whole mesh, None where it is unknown."""
    device = mesh.devices.flat[0]
    name = cpu_name() if device.platform == "cpu" else device.device_kind
    flops = peak_flops(name)
    kind = {"cpu": "CPU", "tpu": "TPU"}.get(device.platform, "GPU")
    log(f"{kind}: {name} | Peak FLOPS (BF16): {f'{flops:.2e}' if flops else 'unknown'} | devices: {mesh.size}")
    return flops * mesh.size if flops else None


def choose_attention(
    wanted: str, model: GPTConfig, T: int, *, mesh: Mesh, dtype: Any, log: Callable = print0, **how: bool
) -> str:
    """The backend for --attention in rows of T tokens, printed; `how` and ValueError as for `attention.choose`."""
    choice = attention.choose(wanted, mesh, dtype, attention.Shapes.of(model, T), **how)
    log(f"Attention: {choice.name}" + (f"\nWARNING: {choice.why}" if choice.why else ""))
    return choice.name
