"""The tools print what they promise. Run: python -m pytest tests/tools"""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import bench_attention
import bench_device
import bench_rollout
import bench_sft
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model.attention import NAMES
from nanochat_jax.model.gpt import abstract_gpt
from tests.support.models import tiny_config

ROOT = Path(__file__).parents[2]
SMALL = ["--depth=1", "--width=64", "--head-dim=16", "--vocab-size=256", "--seq-len=64", "--batch-size=8", "--steps=3"]
SMALL += ["--mesh=data=1"]
TINY_ROLLOUT = ["--depth=2", "--width=64", "--head-dim=16", "--vocab-size=512", "--prompts=3", "--prompt-tokens=10"]
TINY_ROLLOUT += ["--samples=4", "--new-tokens=20", "--slots=4", "--repeats=1", "--mesh=data=1"]
TINY_SERVER = [
    "--depth=1",
    "--width=64",
    "--head-dim=16",
    "--vocab-size=512",
    "--sequence-len=64",
    "--clients",
    "1",
    "2",
]
TINY_SERVER += ["--clients", "1", "2", "--slots=2", "--rounds=1", "--requests=1", "--new-tokens=12", "--prompt-chars=8"]


@pytest.fixture
def bench(monkeypatch, capfd):
    """Runs a benchmark as its command line does, in this process -> (lines of output, what went to stderr).

    The yardsticks run in it as they are, but in two short samples, and their large arrays hold ones: random numbers and
    repetitions take seconds, and change nothing that is promised about the output."""
    normal, timed = jax.random.normal, bench_device.seconds_per_call

    def briefly(call, *, samples, least):
        return timed(call, samples=min(samples, 2), least=min(least, 0.01))

    def drawn(key, shape, *dtype):
        return jnp.ones(shape, *dtype) if math.prod(shape) >= 1 << 20 else normal(key, shape, *dtype)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *flags])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"tools/bench/{name}.py"), run_name="__main__")
        assert not ended.value.code
        out, err = capfd.readouterr()
        return out.splitlines(), err

    monkeypatch.setattr(bench_device, "seconds_per_call", briefly)
    monkeypatch.setattr(jax.random, "normal", drawn)
    return run


def test_the_benchmark_prints_one_line_of_json(bench):
    ((line,), _) = bench("bench_sft", *SMALL)
    result = json.loads(line)
    for name in ("tokens_per_second", "flops_per_second", "compile_seconds", "peak_memory_bytes", "final_loss"):
        assert result[name] > 0, name
    assert result["compiles_after_step_1"] == 0
    assert (result["devices"], result["dtype"]) == (1, "float32")
    assert result["settings"]["seq_len"] == 64
    per_token = result["flops_per_second"] / result["tokens_per_second"]
    assert 6 * result["parameters"] / 2 < per_token < 6 * result["parameters"]  # lookups are not products
    assert (result["attention"], result["remat"], result["mfu"]) == ("chunked", "none", None)
    rates = [result["gflops_per_second" + more] for more in ("", "_with_optimizer")]
    assert 0 < rates[0] < rates[1]
    assert result["matmul_share"] == pytest.approx(rates[0] / result["matmul_gflops_per_second"], rel=0.01)


def test_settings_that_cannot_be_built_are_refused_with_a_sentence(monkeypatch):
    command = [sys.executable, ROOT / "tools/bench/bench_sft.py", "--width", "70", "--head-dim", "16"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --width=70 must be a multiple of --head-dim=16")
    for flags, sentence in (
        (("--kv-heads", "3"), "--kv-heads=3 must divide the 4 query heads"),
        (("--window-pattern", "X"), "--window-pattern must be made of the letters S and L"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench", *flags])
        with pytest.raises(ValueError, match=sentence):
            bench_sft.main(bench_device.parse(bench_sft.Bench, bench_sft.PRESETS))


@pytest.mark.parametrize(("name", "depth", "width"), [("d12", 12, 768), ("d20", 20, 1280), ("d26", 26, 1664)])
def test_presets_are_nanochats_shapes_and_flags_beside_them_hold(name, depth, width, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--preset", name, "--batch-size=3"])
    cfg = bench_device.parse(bench_sft.Bench, bench_sft.PRESETS)
    assert (cfg.preset, cfg.batch_size, cfg.seq_len) == (name, 3, 2048)
    config = bench_device.model_config(cfg, cfg.seq_len)
    assert (config.n_layer, config.n_embd, config.head_dim, config.vocab_size) == (depth, width, 128, 32768)
    assert config.windows[:4] == (512, 512, 512, 2048)


def test_the_optimizers_products_are_those_of_every_matrix():
    config = tiny_config(n_layer=1, n_head=2, n_kv_head=1, windows=(-1,), value_embed_scale=0.0)
    sides = [(64, 64), (32, 64), (32, 64), (64, 64), (64, 256), (64, 256)]  # q, k, v, proj; fc, proj
    expected = sum(5 * (4 * s * s * l + 2 * s**3) for s, l in sides)
    assert bench_sft.orthogonalization_flops(abstract_gpt(config)[1]) == expected


@pytest.mark.parametrize(("lengths", "shared"), [([5, 9, 2], 3), ([40, 40], 2), ([1], 1)])
def test_the_keys_that_decoding_must_read_are_those_that_some_row_sees(lengths, shared):
    prompt, windows = 12, (6, 30, -1)
    config = tiny_config(windows=windows)
    read = 0
    for window in windows:
        for t in range(max(lengths)):  # all rows at once
            position = prompt - 1 + t
            seen = range(max(0, position - window) if window >= 0 else 0, position + 1)
            read += sum(key < prompt - 1 for key in seen)
            read += sum(key >= prompt - 1 for key in seen) * sum(length > t for length in lengths)
    assert bench_rollout.kv_tokens(config, prompt, lengths, shared) == read
    assert bench_rollout.kv_tokens(config, prompt, lengths, 1) >= read  # a prompt is read again for each


def test_the_rollout_bench_tells_speed_and_the_share_of_memory_bandwidth(bench):
    ((line,), _) = bench("bench_rollout", *TINY_ROLLOUT)
    result = json.loads(line)
    for name in ("tokens_per_second", "ms_per_decode_step", "mbu", "memory_gb_per_second", "peak_memory_bytes"):
        assert result[name] > 0, name
    assert 0 < result["host_share"] < 1 and result["compiles_after_warmup"] == 0
    assert (result["attention"], result["dtype"], result["prompts"]) == ("chunked", "float32", 3)
    seconds = result["ms_per_decode_step"] / 1e3
    rate = result["mb_per_decode_step"] / 1e3 / seconds
    assert result["mbu"] == pytest.approx(rate / result["memory_gb_per_second"], rel=0.05, abs=1e-4)


def test_the_server_bench_tells_the_speed_of_each_number_of_clients(bench):
    lines, _ = bench("bench_serve", *TINY_SERVER)
    alone, together = map(json.loads, lines)
    assert (alone["clients"], together["clients"], together["dtype"]) == (1, 2, "float32")
    for name in ("tokens_per_second", "first_token_ms", "processor_seconds_per_1000_tokens"):
        assert alone[name] > 0 and together[name] > 0, name
    assert alone["compiles_after_warmup"] == 0


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
case "$*" in *bench_sft*) [ -f "$1" ] && echo no such device >&2; exit 7;; esac
exec {sys.executable} "$@"
""")
    broken.chmod(0o755)
    parts = ("sft_d20", "environment")
    for _ in range(2):  # into the same folder again
        done = check("--quick", "--out", tmp_path / "results", *parts, PYTHON=str(broken))
    assert done.returncode == 1
    rows = [row.split("\t") for row in (tmp_path / "results/summary.tsv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["sft_d20", "7"], ["environment", "0"]]
    assert "--preset d20" in rows[0][3]
    assert "no such device" in (tmp_path / "results/sft_d20.log").read_text()
    facts = (tmp_path / "results/environment.txt").read_text()
    assert "jaxlib " in facts and "cpu" in facts.lower()


def test_the_gpu_check_refuses_what_it_does_not_know(tmp_path):
    for arguments in (("--fast",), ("sft_d99",), ("--out",)):
        done = check(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("gpu_check.sh: ")
    assert check("--help").stdout.startswith("usage: tools/bench/gpu_check.sh")
