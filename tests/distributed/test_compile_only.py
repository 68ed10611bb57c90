"""Devices that are not there: names, facts, and that programs are compiled for them.

Run: tools/setup.sh --extra aot --extra cuda13-aot && python -m pytest tests/distributed/test_compile_only.py
"""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from nanochat_jax.cli.device import peak_flops
from nanochat_jax.distributed import compile_only
from tests.support.marks import needs_cuda_compiler

ROOT = Path(__file__).parents[2]


def test_an_unknown_device_is_a_sentence_with_those_that_there_are():
    known = r"--preflight must name no device .* \(v5e-\{1,4,8.*\) or NVIDIA GPUs \(a100"
    for name in ("v5e-7", "h100-3", "h100-", "h100-x", "gpu", "v5e", "v4-8", "", "v5e:2by4", "H100"):
        with pytest.raises(ValueError, match=known):
            compile_only.devices(name)


def test_without_a_compiler_a_sentence_names_the_set_up(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_only, "CUDA_FOLDER", tmp_path)
    monkeypatch.setattr(compile_only, "CUDA_PLUGIN", "jax_plugins.nobody_has_this")
    with pytest.raises(ValueError, match=r"need the CUDA compiler.* tools/setup.sh --extra cuda13-aot"):
        compile_only.load_cuda_compiler.__wrapped__()


def test_every_gpu_has_a_peak_and_the_memory_that_its_name_or_data_sheet_says():
    gigabytes = {
        "a100": 80,
        "h100": 80,
        "h200": 141,
        "b200": 180,
        "l4": 24,
        "rtx3090": 24,
        "rtx4090": 24,
        "rtx5090": 32,
    }
    assert gigabytes.keys() == compile_only.GPUS.keys()
    for name, gpu in compile_only.GPUS.items():
        assert peak_flops(gpu.kind), name
        assert 0.92 < gpu.memory / 2**30 / gigabytes[name] < 1.01, name
        assert compile_only.gpu_of(types.SimpleNamespace(device_kind=gpu.kind)) is gpu


def test_a_run_has_the_share_of_memory_that_jax_takes(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    gpu = compile_only.GPUS["h100"]
    assert compile_only.usable_memory(gpu) == gpu.memory * 3 // 4
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".5")
    assert compile_only.usable_memory(gpu) == gpu.memory // 2


COMPILE = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from nanochat_jax.distributed import compile_only

jax.devices()
for name, count in (("h100-8", 8), ("a100", 1), ("h100-16", 16)):
    devices = compile_only.devices(name)
    assert len(devices) == count and {device.platform for device in devices} == {"gpu"}
    mesh = Mesh(devices, ("data",))
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, jax.P("data")))
    step = jax.jit(lambda x: jnp.tanh(x) @ x + jax.random.normal(jax.random.key(0), x.shape))
    compiled = step.lower(x).compile()
    print(name, compiled.memory_analysis().argument_size_in_bytes, "all-gather" in compiled.as_text())
print({device.process_index for device in devices}, jax.devices()[0].platform)
"""


@needs_cuda_compiler
def test_programs_are_compiled_for_gpus_that_are_not_there_after_jax_has_started():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "h100-8 32768 True",
        "a100 262144 False",
        "h100-16 16384 True",
        "{0, 1} cpu",
    ]
