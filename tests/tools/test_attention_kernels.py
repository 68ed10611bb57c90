"""tools/predict/attention_kernels.py compiles the Triton kernels for GPUs that are not here.

Run: tools/setup.sh --extra cuda13-aot && python -m pytest tests/tools/test_attention_kernels.py
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.marks import needs_cuda_compiler

TOOL = Path(__file__).parents[2] / "tools" / "predict" / "attention_kernels.py"
SHARED_MEMORY = {"l4": 99 * 1024, "b200": 227 * 1024}  # bytes that a program can have


@needs_cuda_compiler
def test_the_kernels_compile_for_an_old_and_a_new_gpu_without_spills_and_fit_into_shared_memory(tmp_path):
    arguments = ["--gpus", *SHARED_MEMORY, "--head-sizes", "128", "--dtypes", "bfloat16", "--out", tmp_path / "lines"]
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = list(map(json.loads, done.stdout.splitlines()))
    assert [(x["gpu"], x["kernel"]) for x in lines] == [(g, k) for g in SHARED_MEMORY for k in ("forward", "dq", "dkv")]
    for line in lines:
        assert line["spilled_bytes"] == 0 and 64 < line["registers"] <= 255
        assert 16_384 < line["shared_memory_bytes"] <= SHARED_MEMORY[line["gpu"]]
    assert (tmp_path / "lines").read_text().splitlines() == done.stdout.splitlines()
