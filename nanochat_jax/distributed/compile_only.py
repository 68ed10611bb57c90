"""Devices that are not there: TPU slices and NVIDIA GPUs that programs can be compiled for on any machine, not run on.

Compilers come with `tools/setup.sh --extra aot` (TPUs) and `--extra cuda13-aot` (NVIDIA GPUs). The second is not kept
with the packages, because JAX would load it at every start and complain that there is no GPU.
"""

import functools
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax

FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SLICES = {  # the number in a slice's name -> how its chips are laid out; v5p counts cores, two a chip
    "v5e": FLAT,
    "v6e": FLAT,
    "v5p": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"},
}
LIBTPU = {  # so that libtpu compiles on any machine, beside another process that does, and asks no server what it is on
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any; the topology's name decides
    "TPU_WORKER_HOSTNAMES": "localhost",
}

CUDA_FOLDER = Path(sys.prefix) / "compilers" / "cuda13"  # where tools/setup.sh puts the CUDA compiler
CUDA_PLUGIN = "jax_plugins.xla_cuda13"
MOSAIC_RUNTIME = "libmosaic_gpu_runtime.so"
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
GPUS_A_HOST = 8


class GPU(NamedTuple):
    """What a program is compiled for: an NVIDIA GPU's limits and rates."""

    kind: str  # as a real one tells it: `device_kind`
    capability: tuple[int, int]
    multiprocessors: int
    memory: int  # bytes that the driver tells
    bandwidth: float  # bytes/s
    shared: int  # bytes of shared memory of a multiprocessor
    l2: int  # bytes
    clock: float  # GHz, at most


# XLA's own descriptions (xla/backends/gpu/target_config/specs) of a100, h100, h200 and b200; of the others the vendor's
# data sheets, their CUDA programming guide for shared memory, and what nvidia-smi tells of the memory.
GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_100_068_864, 2_039e9, 167_936, 41_943_040, 1.41),
    "h100": GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 84_942_979_072, 3_352e9, 233_472, 52_428_800, 1.98),
    "h200": GPU("NVIDIA H200", (9, 0), 132, 151_397_597_184, 4_800e9, 233_472, 52_428_800, 1.98),
    "b200": GPU("NVIDIA B200", (10, 0), 148, 191_514_411_008, 7_672e9, 233_472, 132_644_864, 1.965),
    "l4": GPU("NVIDIA L4", (8, 9), 58, 24_152_899_584, 300e9, 102_400, 50_331_648, 2.04),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", (8, 6), 82, 25_769_803_776, 936e9, 102_400, 6_291_456, 1.695),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", (8, 9), 128, 25_757_220_864, 1_008e9, 102_400, 75_497_472, 2.52),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", (12, 0), 170, 34_190_917_632, 1_792e9, 102_400, 100_663_296, 2.407),
}
DATA_CENTRE = {(8, 0), (9, 0), (10, 0)}  # capabilities with 2,048 threads a multiprocessor; the others have 1,536
ACCELERATED = {(9, 0), (10, 0)}  # compiled for sm_90a and sm_100a, which have instructions of no other GPU


def devices(name: str) -> list:
    """Compile-only devices: of a TPU slice v5e-8, v6e-8, v5p-8, ..., of a TPU topology as v5e:2x4, or NVIDIA GPUs as
    h100 (one) or h100-8.

    From here on this process compiles only: JAX starts nothing but the CPU, and compiled programs are not kept, since
    they cannot be read back without their devices. ValueError: an unknown name, or its compiler is not installed."""
    kind, _, size = name.replace("v5litepod", "v5e").partition("-")
    count = int(size) if size.isdecimal() else 0
    if kind in GPUS and (name == kind or count in GPU_COUNTS):
        load = functools.partial(_gpus, kind, count or 1)
    elif layout := SLICES.get(kind, {}).get(count):
        load = functools.partial(_tpus, name, f"{kind}:{layout}")
    elif re.fullmatch(r"(v5e|v5p|v6e):\d+(x\d+){1,2}", name):
        load = functools.partial(_tpus, name, name)
    else:
        slices = ", ".join(f"{kind}-{{{','.join(map(str, sizes))}}}" for kind, sizes in SLICES.items())
        raise ValueError(
            f"--preflight must name no device (then those at hand), a TPU slice ({slices}) or NVIDIA GPUs "
            f"({', '.join(GPUS)}; several as h100-8), got {name!r:.60}"
        )
    jax.config.update("jax_platforms", "cpu")  # whatever else is here is left alone
    jax.config.update("jax_enable_compilation_cache", False)
    return load()


def gpu_of(device) -> GPU | None:
    """The line of the table for a device, which may be compile-only; None for another device."""
    return next((gpu for gpu in GPUS.values() if gpu.kind == device.device_kind), None)


def usable_memory(gpu: GPU) -> int:
    """Bytes that a run may use on such a GPU: the share that JAX takes, three quarters where no variable says more."""
    share = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    return int(gpu.memory * float(share))


def _tpus(name: str, topology: str) -> list:
    if not importlib.util.find_spec("libtpu"):
        raise ValueError(f"{name} needs the TPU compiler, which runs on any machine: tools/setup.sh --extra aot")
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as e:  # libtpu's own, of several types
        raise ValueError(f"--preflight {name}: {str(e).splitlines()[0][:200]}") from e


def _gpus(kind: str, count: int) -> list:
    load_cuda_compiler()
    from jax.experimental import topologies

    hosts, local = max(1, count // GPUS_A_HOST), min(count, GPUS_A_HOST)
    layout = f"1x{hosts}x{local}"  # NVLink domains, hosts of each, GPUs of each
    description = topologies.get_topology_desc(platform="cuda", topology=layout, target_config=_target(GPUS[kind]))
    return list(description.devices)


@functools.cache
def load_cuda_compiler() -> None:
    """Give JAX the CUDA plugin, once in a process; ValueError where it is not installed."""
    if not has_cuda_compiler():
        raise ValueError(
            "NVIDIA GPUs that are not here need the CUDA compiler, which runs on any machine: "
            "tools/setup.sh --extra cuda13-aot"
        )
    jax.devices("cpu")  # JAX looks for plugins now, and never again: one among the packages is loaded
    if not _is_package():
        sys.path.append(os.fspath(CUDA_FOLDER))
        # JAX looks for this library when Pallas is imported, which may have been before.
        os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = os.fspath(CUDA_FOLDER / "jax_cuda13_plugin" / MOSAIC_RUNTIME)
        importlib.import_module(CUDA_PLUGIN).initialize()
    _tell_pallas_triton_the_capabilities()


def has_cuda_compiler() -> bool:
    """Whether programs can be compiled for NVIDIA GPUs that are not here."""
    return (CUDA_FOLDER / "jax_plugins").is_dir() or _is_package()


def _is_package() -> bool:
    """Whether JAX finds the CUDA plugin by itself, as after `tools/setup.sh --extra cuda13`."""
    try:
        return importlib.util.find_spec(CUDA_PLUGIN) is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


def _tell_pallas_triton_the_capabilities() -> None:
    """Let Pallas lower Triton kernels for GPUs that its own table lacks, such as the RTX 5090; it would ask the device,
    which is not here. Where this JAX has moved the function, such kernels do not compile for these GPUs."""
    from jax._src.pallas.triton import gpu_info

    original = gpu_info._get_device_arch_name

    def capability(kind: str) -> str:
        gpu = next((gpu for gpu in GPUS.values() if gpu.kind == kind), None)
        return f"{gpu.capability[0]}.{gpu.capability[1]}" if gpu else original(kind)

    gpu_info._get_device_arch_name = capability


def _target(gpu: GPU) -> str:
    """XLA's GpuTargetConfigProto of a GPU, as text."""
    (major, minor), reserved = gpu.capability, 1024  # bytes of shared memory that the system keeps for each block
    extension = "ACCELERATED_FEATURES" if gpu.capability in ACCELERATED else "NONE"
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {gpu.multiprocessors} fpus_per_core: {64 if gpu.capability == (8, 0) else 128}
  clock_rate_ghz: {gpu.clock} device_memory_size: {gpu.memory} memory_bandwidth: {int(gpu.bandwidth)}
  l2_cache_size: {gpu.l2} shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared - reserved} threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: {2048 if gpu.capability in DATA_CENTRE else 1536}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" name: "{gpu.kind}" device_address_bits: 64 pcie_bandwidth: 34359738368
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{gpu.kind}"
"""
