"""The tools print what they promise. Run: python -m pytest tests/test_tools.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = ["--depth=2", "--width=64", "--head-dim=16", "--vocab-size=256", "--seq-len=64", "--batch-size=2", "--steps=3"]


def bench(*flags: str) -> subprocess.CompletedProcess:
    """On one device, with the compiler options of the other tests."""
    command = [sys.executable, ROOT / "tools/bench_sft.py", *flags]
    return subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT, capture_output=True, text=True)


def test_the_benchmark_prints_one_line_of_json():
    (line,) = bench(*SMALL).stdout.splitlines()
    result = json.loads(line)
    for name in ("tokens_per_second", "flops_per_second", "compile_seconds", "peak_memory_bytes", "final_loss"):
        assert result[name] > 0, name
    assert result["compiles_after_step_1"] == 0
    assert (result["devices"], result["dtype"]) == (1, "float32")
    assert result["settings"]["seq_len"] == 64
    per_token = result["flops_per_second"] / result["tokens_per_second"]
    assert 6 * result["parameters"] / 2 < per_token < 6 * result["parameters"]  # lookups are not products


def test_settings_that_cannot_be_built_are_refused_with_a_sentence():
    for flags, sentence in (
        (("--width", "70", "--head-dim", "16"), "--width=70 must be a multiple of --head-dim=16"),
        (("--kv-heads", "3"), "--kv-heads=3 must divide the 4 query heads"),
        (("--window-pattern", "X"), "--window-pattern must be made of the letters S and L"),
    ):
        done = bench(*flags)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and sentence in done.stderr
