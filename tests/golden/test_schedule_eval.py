"""Schedules, the defaults of nanochat's flags, and bits per byte."""

import math

import numpy as np
import pytest

from nanochat_jax.evals import make_bits_per_byte
from nanochat_jax.optim import rl_lr_multiplier, sft_lr_multiplier, sft_muon_momentum
from nanochat_jax.safe_pickle import read_pt
from nanochat_jax.sft import INHERITED, SFTConfig
from tests.golden import data, models

EXACT = {"rtol": 1e-9, "atol": 1e-15}  # atol: where a multiplier reaches 0


def test_sft_multipliers_are_nanochats():
    for case in data.load_json("schedule.json")["sft"]:
        ratios = {key: case[key] for key in ("warmup_ratio", "warmdown_ratio", "final_lr_frac")}
        ours = [sft_lr_multiplier(progress, **ratios) for progress in case["progress"]]
        np.testing.assert_allclose(ours, case["lr_multiplier"], **EXACT, err_msg=str(ratios))


def test_muon_momenta_are_nanochats():
    golden = data.load_json("schedule.json")["sft_muon_momentum"]
    np.testing.assert_allclose([sft_muon_momentum(step) for step in golden["step"]], golden["momentum"], **EXACT)


def test_rl_multipliers_are_nanochats():
    for case in data.load_json("schedule.json")["rl"]:
        ours = [rl_lr_multiplier(step, case["num_steps"]) for step in case["step"]]
        np.testing.assert_allclose(ours, case["lr_multiplier"], **EXACT)


def test_every_sft_flag_of_nanochat_exists_with_its_default():
    """None means inherited from the base checkpoint, here and there."""
    ours, theirs = vars(SFTConfig()), data.load_json("schedule.json")["sft_script_defaults"]
    named_otherwise = {"device_type": {"": "auto"}}
    for flag, default in theirs.items():
        assert ours[flag] == named_otherwise.get(flag, {}).get(default, default), flag
    assert all(theirs[flag] is None for flag in INHERITED)
    fallbacks = {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02}  # OPTIMIZER.md
    assert fallbacks.items() <= INHERITED.items()


def bpb_cases() -> list[str]:
    known = data.load_json("eval.json") if (data.GOLDEN / "eval.json").exists() else {}
    return [key.removeprefix("bpb_") for key in known if key.startswith("bpb_")] or ["(none)"]


@pytest.mark.parametrize("name", bpb_cases())
def test_bits_per_byte_are_nanochats(name):
    config, params, _ = models.load(name)
    token_bytes = read_pt(data.path(f"checkpoints/{name}/tokenizer/token_bytes.pt"))
    bits_per_byte = make_bits_per_byte(config, token_bytes)
    for case in data.load_json("eval.json")[f"bpb_{name}"]:
        batches = []
        for batch in case["batches"][: case["steps"]]:
            x, y = (np.array(batch[key], np.int32) for key in "xy")
            arrays = {"inputs": x, "targets": np.maximum(y, 0), "weights": np.float32(y >= 0)}
            batches.append(arrays | {"document_start": np.zeros_like(x)})
        expected = float(case["bpb"])
        with models.rotary_tables_of(name):
            ours = bits_per_byte(params, batches)
        assert ours == expected if math.isinf(expected) else math.isclose(ours, expected, rel_tol=1e-5), case["bpb"]
