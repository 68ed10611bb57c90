"""The tools print what they promise. Run: python -m pytest tests/tools"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import bench_attention
import numpy as np
import profile_step
import pytest

from nanochat_jax.model.attention import NAMES
from tests.support.yardsticks import shorten_yardsticks

ROOT = Path(__file__).parents[2]
TINY_SERVER = ["--depth=1", "--aspect-ratio=64", "--head-dim=16", "--vocab-size=512", "--max-seq-len=64"]
TINY_SERVER += ["--clients", "1", "2", "--slots=2", "--rounds=1", "--requests=1", "--new-tokens=12", "--prompt-chars=8"]


@pytest.fixture
def bench(monkeypatch, capfd):
    """Runs a benchmark as its command line does, in this process -> (lines of output, what went to stderr)."""
    shorten_yardsticks(monkeypatch)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *flags])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"tools/bench/{name}.py"), run_name="__main__")
        assert not ended.value.code
        out, err = capfd.readouterr()
        return out.splitlines(), err

    return run


def test_the_server_bench_tells_the_speed_of_each_number_of_clients(bench):
    lines, _ = bench("bench_serve", *TINY_SERVER)
    alone, together = map(json.loads, lines)
    assert (alone["clients"], together["clients"], together["dtype"]) == (1, 2, "float32")
    for name in ("tokens_per_second", "first_token_ms", "processor_seconds_per_1000_tokens"):
        assert alone[name] > 0 and together[name] > 0, name
    assert alone["compiles_after_warmup"] == 0


def test_the_bench_of_rollouts_compares_the_same_answers_in_all_rows_and_in_fewer(bench):
    sizes = ["--depth=1", "--aspect-ratio=64", "--head-dim=16", "--vocab-size=512", "--max-seq-len=64", "--rounds=1"]
    sizes += ["--prompts=2", "--samples=8", "--prompt-tokens=4", "--decode-tokens=40", "--chunk=4"]
    lines, _ = bench("bench_rollouts", *sizes, "--lengths", "uneven")
    all_rows, fewer = map(json.loads, lines)
    assert (all_rows["fewer_rows"], fewer["fewer_rows"], fewer["lengths"]) == (False, True, "uneven")
    assert all_rows["same_tokens"] and fewer["row_steps"] < all_rows["row_steps"] and fewer["tokens_per_second"] > 0
    assert fewer["tokens"] == all_rows["tokens"] and fewer["compiles_after_warm_up"] == 0


def test_the_profile_tells_how_long_each_function_of_a_step_takes(bench):
    sizes = ["--depth=2", "--aspect-ratio=32", "--head-dim=16", "--vocab-size=512", "--max-seq-len=64", "--repeats=2"]
    (line,), _ = bench("profile_step", *sizes)
    found = json.loads(line)
    expected = {"waiting", "optim/muon.py:orthogonalize", "model/gpt.py:linear", "model/loss.py:_scan_chunks"}
    assert expected <= found["functions"].keys()
    assert sum(found["functions"].values()) == pytest.approx(found["seconds_per_step"], rel=0.01)
    assert found["functions"].get("other", 0) < 0.3 * found["seconds_per_step"]
    assert len(found["operations"]) == 12 and (found["batch"], found["mesh"]["data"]) == ([1, 64, 64], 8)


def test_time_in_which_several_operations_run_is_shared_among_them():
    events = [(0.0, 4.0, "a"), (2.0, 4.0, "b"), (2.0, 1.0, "a"), (8.0, 2.0, "a")]
    assert profile_step.shares(events) == {"a": 2 + 2 / 3 + 1 / 2 + 2, "b": 1 / 3 + 1 / 2 + 2, "waiting": 2.0}
    assert profile_step.shares([]) == {}


def test_the_attention_bench_times_what_runs_here_and_says_why_the_rest_does_not(bench):
    printed, said = bench("bench_attention", "--quick", "--head-dims=64")
    lines = [json.loads(line) for line in printed]
    assert {line["backend"] for line in lines} == set(NAMES)
    for line in lines:
        if line["backend"] not in ("reference", "chunked"):
            assert "needs a" in line["refused"] and line["refused"] in said
            continue
        assert (line["visible_pairs"] < line["dense_causal_pairs"]) == (line["packed"] or line["window"] >= 0)
        for part, flops in (("forward", 4), ("backward", 10), ("both", 14)):
            found = line[part]
            assert found["seconds"] > 0 and found["share"] > 0
            count = flops * line["H"] * line["N"] * line["visible_pairs"]
            assert found["flops_per_second"] == pytest.approx(count / found["seconds"], rel=0.01)
    pairs = {line["packed"]: line["visible_pairs"] for line in lines if "forward" in line}
    assert pairs[True] < pairs[False]
    assert all(line["visible_pairs"] == pairs[line["packed"]] for line in lines if "forward" in line)


def test_visible_pairs_are_counted_as_the_mask_shows_them():
    cfg = bench_attention.Bench(document_tokens=9)
    for window, packed in ((7, True), (-1, True), (7, False)):
        case = bench_attention.Case("reference", packed, window, 64, 8, 3, 1, 1)
        k_start = bench_attention.k_starts(cfg, case)
        t = np.arange(64)
        visible = (t >= k_start[..., None]) & (t <= t[:, None])
        assert (np.arange(64) - k_start + 1).sum() == visible.sum()
        assert window < 0 or visible.sum(-1).max() == window + 1
        assert packed == bool(((k_start == t) & (t > 0)).any())


def check(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [ROOT / "tools/bench/gpu_check.sh", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_part_of_the_gpu_check_that_fails_is_recorded_and_the_others_run(tmp_path):
    broken = tmp_path / "python"
    broken.write_text(f"""#!/bin/sh
case "$*" in *"--what sft"*) echo no such device >&2; exit 7;; esac
exec {sys.executable} "$@"
""")
    broken.chmod(0o755)
    parts = ("sft_d20", "environment")
    for _ in range(2):  # into the same folder again
        done = check("--quick", "--out", tmp_path / "results", *parts, PYTHON=str(broken))
    assert done.returncode == 1
    rows = [row.split("\t") for row in (tmp_path / "results/summary.tsv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["sft_d20", "7"], ["environment", "0"]]
    assert "nanochat_jax.bench --what sft --depth" in rows[0][3]
    assert "no such device" in (tmp_path / "results/sft_d20.log").read_text()
    facts = (tmp_path / "results/environment.txt").read_text()
    assert "jaxlib " in facts and "cpu" in facts.lower()


def test_the_gpu_check_refuses_what_it_does_not_know(tmp_path):
    for arguments in (("--fast",), ("sft_d99",), ("--out",)):
        done = check(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("gpu_check.sh: ")
    assert check("--help").stdout.startswith("usage: tools/bench/gpu_check.sh")
