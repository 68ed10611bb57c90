"""Compile the Hopper kernels of attention for an H100 that is not here, and print what the compiler makes of them: a
JSON line for each kernel.

python tools/predict/hopper_kernels.py                                   # all shapes in use
python tools/predict/hopper_kernels.py --heads 10/10x128 --dtypes bfloat16

It needs `tools/setup.sh --extra cuda13-aot`. `ptxas` says the same for both ways in which JAX has kernels compiled:
relocatable code where nvJitLink is found, as in NVIDIA's wheels, and whole programs elsewhere: registers of a thread,
bytes spilled, and `warnings`, such as of products that had to be serialised. `loop` counts what a warp executes for a
block that needs no mask, see `main_loop`. Nothing is run, so no number here is a measurement.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import SingleDeviceSharding

from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed import compile_only
from nanochat_jax.model.attention.hopper.forward import mosaic_gpu

MODES = {"relocatable": ("--compile-only",), "whole program": ()}  # how ptxas is called for each
KINDS = {  # of machine instructions, by how their names begin
    "products": ("HGMMA",),
    "exponentials": ("MUFU",),
    "float arithmetic": ("FADD", "FFMA", "FMNMX", "FMUL", "FSEL", "FSETP", "F2F"),
    "shared memory": ("LDS", "STS"),
    "shuffles": ("SHFL",),
    "waits": ("SYNCS", "BAR", "WARPGROUP", "DEPBAR"),
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Compile the Hopper kernels of attention for an H100 that is not here."""

    heads: tuple[str, ...] = ("6/6x128", "8/2x128", "6/6x64", "8/2x64")  # query heads/kv heads x size
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    tokens: tuple[int, ...] = (2048, 1000)  # of a row


class Kernel(NamedTuple):
    """A compiled kernel, as files in a folder of the compiler's."""

    name: str
    ptx: Path
    shared_memory: int  # bytes of a program


def compile_kernels(heads: str, dtype: str, T: int, folder: Path) -> list[Kernel]:
    """Attention's kernels, forward and backward, of two rows of T tokens."""
    found = re.fullmatch(r"(\d+)/(\d+)x(\d+)", heads)
    require(found, f"--heads must be query heads/kv heads x size, such as 8/2x128, got {heads!r:.60}")
    N, K, H = map(int, found.groups())
    on = SingleDeviceSharding(compile_only.devices("h100")[0])
    q, kv = (jax.ShapeDtypeStruct((2, T, n, H), dtype, sharding=on) for n in (N, K))
    k_start = jax.ShapeDtypeStruct((2, T), jnp.int32, sharding=on)

    def with_gradients(q, k, v, do, k_start):
        o, pull = jax.vjp(lambda *x: mosaic_gpu(*x, k_start, H**-0.5, -1), q, k, v)
        return o, *pull(do)

    os.environ["MOSAIC_GPU_DUMP_TO"] = os.fspath(folder)
    jax.jit(with_gradients).lower(q, kv, kv, q, k_start).compile()
    kernels = {ptx.stem.rpartition("_")[0]: ptx for ptx in sorted(folder.glob("*.ptx"))}  # numbered behind the name
    return [Kernel(name, ptx, shared_memory(name, folder)) for name, ptx in kernels.items()]


def shared_memory(name: str, folder: Path) -> int:
    """Bytes that the kernel asks for when it is started, barriers included."""
    (resources,) = folder.glob(f"{name}_*.resources.txt")
    said = resources.read_text()
    barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", said)
    return int(re.search(r"smem_scratch_bytes=(\d+)", said)[1]) + 8 * sum(int(n) * int(m) for n, m in barriers)


def cuda_tool(name: str) -> Path | None:
    """ptxas or nvdisasm of the packages beside the CUDA compiler, where it is there."""
    compile_only.load_cuda_compiler()
    spec = importlib.util.find_spec("nvidia.cu13")
    found = [Path(folder, "bin", name) for folder in spec.submodule_search_locations or ()] if spec else []
    return next((path for path in found if path.exists()), None)


def ptxas(ptx: Path, mode: str) -> tuple[dict[str, Any], Path]:
    """What ptxas says of a kernel that is compiled in this mode, and the machine code."""
    code = ptx.with_suffix(f".{mode.replace(' ', '_')}.cubin")
    command = [cuda_tool("ptxas"), "--gpu-name", "sm_90a", "--verbose", *MODES[mode], ptx, "--output-file", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return read_ptxas(said), code


def read_ptxas(said: str) -> dict[str, Any]:
    """Registers of a thread, bytes spilled, and warnings, from ptxas' words."""
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said.partition("Function prop")[2])),
        "warnings": [line.strip() for line in said.splitlines() if re.search(r"\(C\d+\)|warning", line)],
    }


class Instruction(NamedTuple):
    name: str
    target: int | None  # of a branch: where in the list it goes


def read_machine_code(text: str) -> list[Instruction]:
    """The instructions of nvdisasm's text, in order."""
    labels: dict[str, int] = {}
    lines = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(\S+)(.*)", line):
            branch = re.search(r"`\((\.L_x_\d+)\)", found[2]) if found[1] == "BRA" else None
            lines.append((found[1].rstrip(";"), branch and branch[1]))
    return [Instruction(name, labels[label] if label else None) for name, label in lines]


def main_loop(instructions: list[Instruction]) -> dict[str, Any]:
    """The smallest loop with a product: what a warp executes each time around, all but what branches in it can jump
    over (the mask, the refill of a slot).

    kinds: instructions by KINDS. product_cycles: those of a warpgroup's products on tensor cores that are never idle,
    half a cycle for a column. between: of each stretch without a product, its instructions and its waits."""
    backward = [(x.target, at + 1) for at, x in enumerate(instructions) if x.target is not None and x.target <= at]
    spans = [(span, instructions[slice(*span)]) for span in backward]
    # behind the program's end come waits that take long, which branch back into the loop
    loops = [span for span, inside in spans if any(map(is_product, inside)) and all(x.name != "EXIT" for x in inside)]
    begin, end = min(loops, key=lambda loop: loop[1] - loop[0])
    executed, at = [], begin
    while at < end:
        executed.append(instructions[at])
        target = instructions[at].target
        at = target if target is not None and at < target < end else at + 1
    first = next(at for at, x in enumerate(executed) if is_product(x))
    stretches = itertools.groupby(executed[first:] + executed[:first], is_product)
    between = [[x.name for x in stretch] for product, stretch in stretches if not product]
    columns = [int(re.search(r"64x(\d+)x16", x.name)[1]) for x in executed if is_product(x)]
    return {
        "instructions": len(executed),
        "kinds": dict(Counter(map(kind_of, executed)).most_common()),
        "product_cycles": sum(columns) // 2,
        "between": [(len(names), dict(Counter(filter(is_wait, names)))) for names in between if len(names) > 20],
    }


def is_product(x: Instruction) -> bool:
    return x.name.startswith(KINDS["products"])


def is_wait(name: str) -> bool:
    return name.startswith(KINDS["waits"]) and "ARRIVE" not in name


def kind_of(x: Instruction) -> str:
    return next((kind for kind, names in KINDS.items() if x.name.startswith(names)), "addresses and the rest")


def describe(kernel: Kernel) -> dict[str, Any]:
    """A kernel's part of a line."""
    said = {mode: ptxas(kernel.ptx, mode) for mode in MODES}
    line = {"kernel": kernel.name, "shared_memory": kernel.shared_memory, "ptxas": {x: y for x, (y, _) in said.items()}}
    if nvdisasm := cuda_tool("nvdisasm"):
        _, code = said["relocatable"]
        text = subprocess.run([nvdisasm, "--print-code", code], capture_output=True, text=True, check=True).stdout
        line["loop"] = main_loop(read_machine_code(text))
    return line


def main(shapes: Shapes) -> None:
    for heads, dtype, T in itertools.product(shapes.heads, shapes.dtypes, shapes.tokens):
        with tempfile.TemporaryDirectory() as folder:
            for kernel in compile_kernels(heads, dtype, T, Path(folder)):
                line = {"heads": heads, "dtype": dtype, "T": T} | describe(kernel)
                print(json.dumps(line | {"jax": jax.__version__}), flush=True)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Shapes))
