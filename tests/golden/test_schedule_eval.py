"""Schedules, the defaults of nanochat's flags, bits per byte, multiple choice and ChatCORE."""

import dataclasses
import math

import numpy as np
import pytest

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.evals.bits_per_byte import make_bits_per_byte
from nanochat_jax.evals.chatcore import BASELINES, chatcore
from nanochat_jax.evals.eval_set import EvalSet, judge, make_eval_set
from nanochat_jax.evals.evaluator import Evaluator
from nanochat_jax.evals.multiple_choice import make_letter_logits
from nanochat_jax.files.torch_read import read_pt
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.optim.schedules import rl_lr_multiplier, sft_lr_multiplier, sft_muon_momentum
from nanochat_jax.sft import SFTConfig
from nanochat_jax.tasks.multiple_choice import is_right
from nanochat_jax.tasks.task import AdaptedTask
from nanochat_jax.tokenizer import Tokenizer
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
    inherited = {field.name: field.metadata.get("inherited") for field in dataclasses.fields(SFTConfig)}
    assert all(theirs[flag] is None for flag, fallback in inherited.items() if fallback is not None)
    fallbacks = {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02}  # OPTIMIZER.md
    assert fallbacks.items() <= inherited.items()


def cases_of(prefix: str) -> list[str]:
    """Models whose entry in eval.json begins with `prefix`, for parametrize."""
    known = data.load_json("eval.json") if (data.GOLDEN / "eval.json").exists() else {}
    return [key.removeprefix(prefix) for key in known if key.startswith(prefix)] or ["(none)"]


@pytest.mark.parametrize("name", cases_of("bpb_"))
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


# --------------------------------------------------------------------------------------------------- chat evaluation
class Quiz:
    """The items of a golden case as a task."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def evaluate(self, conversation, answer):
        return is_right(conversation, answer)


def quiz(name: str) -> tuple[dict, EvalSet, GPTConfig, dict, Tokenizer]:
    """(the golden case, its items as an eval set, the model's config and parameters, the tokenizer)."""
    config, params, _ = models.load(name)
    tokenizer = Tokenizer.load(data.path(f"checkpoints/{name}/tokenizer"))
    golden = data.load_json("eval.json")[f"categorical_{name}"]
    return golden, make_eval_set(name, AdaptedTask(Quiz(golden["items"])), tokenizer), config, params, tokenizer


@pytest.mark.parametrize("name", cases_of("categorical_"))
def test_prompts_and_the_letters_logits_are_nanochats(name):
    golden, eval_set, config, params, tokenizer = quiz(name)
    rows = max(run["batch_size"] for run in golden["runs"])  # a program that the test below needs, too
    letter_logits = make_letter_logits(config, make_mesh("data=1"), tokenizer.bos, rows=rows)
    with models.rotary_tables_of(name):
        ours = letter_logits(params, eval_set.prompts, eval_set.letters)
    for prompt, logits, item in zip(eval_set.prompts, ours, golden["per_item"], strict=True):
        assert prompt.tolist() == item["prompt_ids"]
        np.testing.assert_allclose(logits, item["letter_logits"], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", cases_of("categorical_"))
def test_letters_and_accuracies_are_nanochats_whatever_the_batch(name):
    golden, eval_set, config, params, tokenizer = quiz(name)
    sizes = [run["batch_size"] for run in golden["runs"]]
    for rows in {min(sizes), max(sizes)}:
        evaluator = Evaluator(config, tokenizer, make_mesh("data=1"), rows=rows)
        with models.rotary_tables_of(name):
            chosen = evaluator.choose_letters(params, eval_set)
        right = [judge(eval_set, i, letter) for i, letter in enumerate(chosen)]
        for run in golden["runs"]:
            assert chosen[: run["max_problems"]] == run["predicted"]
            assert np.mean(right[: run["max_problems"]]) == pytest.approx(run["accuracy"], abs=1e-12)


def test_chatcore_is_nanochats():
    for case in data.load_json("eval.json")["chatcore"]:
        assert case["baselines"] == BASELINES
        assert chatcore(case["accuracies"]) == pytest.approx(case["chatcore"], abs=1e-12)
