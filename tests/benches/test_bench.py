"""The command that times a model: what it promises to print, for each of the three things that it times.

Run: python -m pytest tests/benches
"""

import functools
import json

import pytest

from nanochat_jax import bench
from nanochat_jax.benches import decoding, infer, rl, sft
from nanochat_jax.benches.subject import byte_pair_tokenizer, config_of_sizes
from nanochat_jax.cli.device import PEAK_BANDWIDTH, PEAK_FLOPS, peak_bandwidth
from nanochat_jax.flags.bench import BenchConfig, ModelSizes
from nanochat_jax.model.cost import flops_per_token
from nanochat_jax.model.gpt import abstract_gpt
from tests.support.commands import run_command
from tests.support.models import tiny_config
from tests.support.yardsticks import shorten_yardsticks

SMALL = ["--depth=2", "--aspect-ratio=32", "--head-dim=16", "--vocab-size=512", "--max-seq-len=64", "--mesh=data=1"]
run = functools.partial(run_command, bench.main, BenchConfig)


@pytest.fixture
def timed(monkeypatch, capfd):
    """Runs the command with these flags -> its line of JSON, and what was said before."""
    shorten_yardsticks(monkeypatch)

    def run_it(*flags):
        capfd.readouterr()
        assert run(*flags) == 0
        out, err = capfd.readouterr()
        (line,) = out.splitlines()
        return json.loads(line), err

    return run_it


# ---- generating


def test_infer_times_each_batch_and_knows_no_peak_of_a_cpu(timed):
    result, said = timed(*SMALL, "--batch-sizes", "1,4", "--decode-tokens", "20", "--repeats", "1")
    assert (result["what"], result["prompt_tokens"], result["devices"]) == ("infer", 44, 1)
    assert "the prompt has 44 tokens: it must fit into the context with the answer" in said
    assert [found["batch"] for found in result["batches"]] == [1, 4]
    for found in result["batches"]:
        assert found["compiles_after_warm_up"] == 0 and 1 < found["decode_steps"] <= 20
        assert found["mbu"] is None and found["mfu"] is None and result["prefill_mfu"] is None
        for name in ("ttft_seconds", "seconds_per_token", "tokens_per_second", "memory_share"):
            assert found[name] > 0, name
    heads = ["batch", "TTFT ms", "ms/token", "tokens/s", "MBU %", "MFU %"]
    table = [row.split() for row in said.splitlines() if row.split()[:1] in (["batch"], ["1"], ["4"])]
    assert " ".join(table[0]) == " ".join(heads) and [row[-2:] for row in table[1:]] == [["-", "-"]] * 2


def test_shares_of_the_peaks_follow_from_what_is_read_and_computed(timed, monkeypatch):
    monkeypatch.setattr(infer, "peak_flops", lambda kind: 1e12)
    monkeypatch.setattr(infer, "peak_bandwidth", lambda kind: 1e11)
    flags = ("--batch-sizes", "2", "--prompt-tokens", "10", "--decode-tokens", "8", "--repeats", "1")
    result, _ = timed(*SMALL, *flags)
    (found,), config = result["batches"], config_of_sizes(bench_sizes())
    flops = 2 * flops_per_token(config, 10 + 4, "decode") / found["seconds_per_token"]
    assert found["mfu"] == pytest.approx(flops / 1e12, rel=1e-3)
    rate = result["memory_gb_per_second"] * 1e9
    assert found["mbu"] * 1e11 == pytest.approx(found["memory_share"] * rate, rel=1e-3)
    prefill = 10 * flops_per_token(config, 10, "prefill") / found["ttft_seconds"]
    assert result["prefill_mfu"] == pytest.approx(prefill / 1e12, rel=1e-3)


def bench_sizes() -> ModelSizes:
    return ModelSizes(depth=2, aspect_ratio=32, head_dim=16, vocab_size=512, max_seq_len=64)


def test_a_model_of_the_base_directory_is_timed_as_it_is(timed, in_base):
    result, said = timed(
        "-i", "base", "--batch-sizes", "1", "--decode-tokens", "4", "--repeats", "1", "--mesh", "data=1"
    )
    assert result["model"].endswith("base_checkpoints/d2/7") and "vocab_size" not in result["settings"]
    assert result["prompt_tokens"] == 60 and "context 64" in said


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
    assert decoding.kv_tokens(config, prompt, lengths, shared) == read
    assert decoding.kv_tokens(config, prompt, lengths, 1) >= read  # a prompt is read again for each


def test_every_device_whose_arithmetic_is_known_has_a_memory_too():
    assert all(peak_bandwidth(kind) for kind in PEAK_FLOPS)
    assert peak_bandwidth("NVIDIA A100-SXM4-40GB") < peak_bandwidth("NVIDIA A100-SXM4-80GB")
    assert peak_bandwidth("TPU v5 lite") < peak_bandwidth("TPU v5") and peak_bandwidth("AMD EPYC") is None
    assert all(1e11 < rate < 1e13 for rate in PEAK_BANDWIDTH.values())


# ---- SFT


def test_a_step_of_sft_is_timed_beside_what_products_reach(timed):
    result, _ = timed(*SMALL, "--what", "sft", "--repeats", "3")
    for name in ("tokens_per_second", "flops_per_second", "compile_seconds", "peak_memory_bytes", "final_loss"):
        assert result[name] > 0, name
    assert result["compiles_after_step_1"] == 0
    assert (result["devices"], result["dtype"], result["batch"]) == (1, "float32", [1, 8, 64])
    per_token = result["flops_per_second"] / result["tokens_per_second"]
    assert 6 * result["parameters"] / 3 < per_token < 6 * result["parameters"]  # lookups are not products
    assert (result["attention"], result["remat"], result["mfu"]) == ("chunked", "none", None)
    given = [result["gflops_per_second" + more] for more in ("", "_with_optimizer")]
    assert 0 < given[0] < given[1]
    assert result["matmul_share"] == pytest.approx(given[0] / result["matmul_gflops_per_second"], rel=0.01)


def test_the_optimizers_products_are_those_of_every_matrix():
    config = tiny_config(n_layer=1, n_head=2, n_kv_head=1, windows=(-1,), value_embed_scale=0.0)
    sides = [(64, 64), (32, 64), (32, 64), (64, 64), (64, 256), (64, 256)]  # q, k, v, proj; fc, proj
    expected = sum(5 * (4 * s * s * l + 2 * s**3) for s, l in sides)
    assert sft.orthogonalization_flops(abstract_gpt(config)[1]) == expected


# ---- RL


def test_a_step_of_rl_is_its_answers_and_the_update_on_them(timed):
    sizes = ("--examples-per-step=3", "--num-samples=4", "--prompt-tokens=10", "--decode-tokens=20", "--slots=4")
    result, _ = timed(*SMALL, "--what", "rl", *sizes, "--repeats", "1")
    for name in ("tokens_per_second", "ms_per_decode_step", "memory_share", "peak_memory_bytes"):
        assert result[name] > 0, name
    assert 0 < result["host_share"] < 1 and result["compiles_after_warm_up"] == 0
    assert (result["attention"], result["dtype"], result["mbu"]) == ("chunked", "float32", None)
    assert result["seconds_per_step"] == pytest.approx(result["rollout_seconds"] + result["update_seconds"], rel=1e-3)
    assert 0 < result["update_tokens"] <= result["generated_tokens"] <= 12 * 20
    seconds = result["ms_per_decode_step"] / 1e3
    rate = result["mb_per_decode_step"] / 1e3 / seconds
    assert result["memory_share"] == pytest.approx(rate / result["memory_gb_per_second"], rel=0.05, abs=1e-4)


def test_the_prompts_length_of_rl_is_not_that_of_infer():
    assert infer.PROMPT_TOKENS == 2048 and rl.PROMPT_TOKENS == 150


# ---- settings


@pytest.mark.parametrize(("depth", "width"), [(12, 768), (20, 1280), (26, 1664)])
def test_a_depth_is_nanochats_shape(depth, width):
    config = config_of_sizes(BenchConfig(depth=depth))
    assert (config.n_layer, config.n_embd, config.head_dim, config.vocab_size) == (depth, width, 128, 32768)
    assert config.windows[:4] == (512, 512, 512, 2048) and config.sequence_len == 2048
    assert byte_pair_tokenizer(32768).vocab_size == 32768


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--kv-heads", "3"), "--kv-heads=3 must divide the 4 query heads"),
        (("--window-pattern", "X"), "--window-pattern must be made of the letters S and L"),
        (("--vocab-size", "200"), "--vocab-size must be from 265 to 65801, got 200"),
        (("--what", "serve"), "--what must be infer, sft or rl, got serve"),
        (("--batch-sizes", "1,0"), "--batch-sizes must be numbers of at least 1, like 1,8,32, got '1,0'"),
        (("--batch-sizes", ""), "--batch-sizes must be numbers of at least 1"),
        (("--decode-tokens", "64"), "--decode-tokens=64 must be fewer than the context of 64"),
        (("--what", "rl", "--prompt-tokens", "60"), "must fit into the context of 64 together"),
        (("--what", "sft", "--total-batch-size", "100"), "--total-batch-size=100 must be a multiple of 512 tokens"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(flags, sentence):
    said = run(*SMALL, *flags)
    assert said.startswith("error: ") and sentence in said and "\n" not in said
