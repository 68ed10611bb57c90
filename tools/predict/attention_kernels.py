"""Compile the Triton attention kernels for NVIDIA GPUs that are not here, and print what each needs there: a line of
JSON for each kernel, then a table on stderr.

tools/setup.sh --extra cuda13-aot
python tools/predict/attention_kernels.py --out tools/bench/results/attention_kernels_2026-11-29.jsonl
python tools/predict/attention_kernels.py --gpus l4 --head-sizes 64 --dtypes float32

Nothing is run. Registers and spills are those that ptxas tells of the PTX that XLA dumps, compiled as relocatable code,
as XLA does. Shared memory is what XLA launches the kernel with. Status 1 where a kernel does not compile or spills.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table as RichTable
from roofline import append

from nanochat_jax.cli.main import run_stage
from nanochat_jax.distributed import compile_only
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.model.attention import triton

COLUMNS = ("gpu", "dtype", "head_size", "kernel", "tiles", "registers", "spilled_bytes", "shared_memory_bytes")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Compile the Triton attention kernels for GPUs that are not here."""

    gpus: tuple[str, ...] = ("a100", "l4", "rtx4090", "h100", "b200", "rtx5090")
    head_sizes: tuple[int, ...] = (64, 128)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    kernels: tuple[str, ...] = triton.Kernels._fields
    rows: int = 2
    T: int = 2048
    heads: int = 4
    kv_heads: int = 2
    out: Path | None = None  # also append the lines of JSON to this file


def main(cfg: Kernels) -> int:
    with tempfile.TemporaryDirectory() as dump:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text "
            "--xla_gpu_dump_llvmir --xla_dump_emitter_re=ptx"
        )
        lines = []
        for gpu in cfg.gpus:
            device = compile_only.devices(gpu)[0]
            for dtype in cfg.dtypes:
                for head_size in cfg.head_sizes:
                    for kernel in cfg.kernels:
                        case = {"gpu": gpu, "device_kind": device.device_kind, "dtype": dtype, "head_size": head_size}
                        line = case | {"kernel": kernel} | compiled(cfg, device, dtype, head_size, kernel, Path(dump))
                        lines.append(line)
                        print(json.dumps(line), flush=True)
                        if cfg.out:
                            append(cfg.out, line)
    table = RichTable(*COLUMNS)
    for line in lines:
        table.add_row(*(str(line.get(name, "")) for name in COLUMNS))
    Console(stderr=True, width=140).print(table)
    return int(any(line.get("spilled_bytes", 1) for line in lines))  # 1 where it did not compile


def compiled(cfg: Kernels, device: Any, dtype: str, head_size: int, kernel: str, dump: Path) -> dict[str, Any]:
    """What a kernel needs on the device; `failed` is the compiler's first line where it does not compile."""
    mesh = make_mesh("data=1", [device])
    B, T, N, K, H = cfg.rows, cfg.T, cfg.heads, cfg.kv_heads, head_size

    def array(*shape: int, of: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of, sharding=NamedSharding(mesh, P()))

    q, k, per_query = array(B, T, N, H), array(B, T, K, H), array(B, N, T, of="float32")
    arrays = [q, k, k, array(B, T, of="int32")]
    run = {"forward": triton.forward, "dq": triton.grad_queries, "dkv": triton.grad_keys}[kernel]
    if kernel != "forward":
        arrays += [q, per_query, per_query]
    for file in dump.iterdir():
        file.unlink()
    tiles = getattr(triton.TILES[H, jnp.dtype(dtype).itemsize], kernel)
    found, start = {"tiles": list(tiles), "jax": jax.__version__}, time.process_time()
    try:
        with jax.set_mesh(mesh):
            run.lower(*arrays, scale=0.1, interpret=False).compile()
    except Exception as e:  # the compiler's own, of several types
        return found | {"failed": str(e).splitlines()[0][:300]}
    found["compile_processor_seconds"] = round(time.process_time() - start, 1)
    (ptx,) = (file for file in dump.glob("*.ptx") if f".entry attention_{kernel}(" in file.read_text())
    launches = "\n".join(file.read_text() for file in dump.glob("*thunk_sequence.txt"))
    shared = re.search(rf"attention_{kernel} .*shared_memory: (\d+)", launches)
    return found | registers(ptx) | {"shared_memory_bytes": int(shared[1])}


def registers(ptx: Path) -> dict[str, int]:
    """What ptxas says of the one kernel in a file of PTX."""
    target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)[1]
    ptxas = Path(importlib.util.find_spec("nvidia.cu13").submodule_search_locations[0], "bin", "ptxas")
    command = [ptxas, "-c", "-v", f"-arch={target}", ptx, "-o", os.devnull]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", said)[1]),
    }


if __name__ == "__main__":
    run_stage(main, tyro.cli(Kernels))
