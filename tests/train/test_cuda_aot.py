"""A train step, a decode call and a prefill through NVIDIA's compilers, on a machine without a GPU.

Run: tools/setup.sh --extra cuda13-aot && python -m pytest tests/train/test_cuda_aot.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.marks import needs_cuda_compiler

QUICK = (
    "--xla_backend_optimization_level=0 --xla_gpu_enable_triton_gemm=false --xla_gpu_disable_gpuasm_optimizations=true"
)


@needs_cuda_compiler
def test_a_train_step_and_what_generates_answers_compile_for_gpus_that_are_not_there():
    """Two layers as wide as nanochat's d12; in one process, because most of the time goes into the compiler."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.cuda_compiler", "a100-8", "sft", "a100", "decode", "a100", "prefill"],
        env=os.environ | {"XLA_FLAGS": QUICK},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = list(map(json.loads, done.stdout.splitlines()))
    assert len(lines) == 3
    for found in lines:
        least = 0.5 if found["program"] == "prefill" else 1  # it needs keys and values alone of the last layer
        assert least <= found["arguments"] < 1.02 and found["beside_them"] > 0
        assert found["program"] != "sft" or not found["float_scatters"]  # else a resumed run would differ
