"""RL from the command line to the checkpoint, on a tiny model: what it says, what it refuses, and that it learns."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nanochat_jax import checkpoint, config, rl, sealed
from nanochat_jax.engine import Engine
from nanochat_jax.metrics import read_metrics
from nanochat_jax.practice import Exercises, Practice, plan_shape
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tasks.task import AdaptedTask
from tests import tiny

TASKS = '''
class Early:
    """Problems without an answer: every reply is worth its share of characters in the first half of the alphabet."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"messages": [{"role": "user", "content": "say " + "a" * i}, {"role": "assistant", "content": "a"}]}

    def reward(self, conversation, answer):
        return sum(c < "n" for c in answer) / max(1, len(answer))

    def evaluate(self, conversation, answer):
        return int("a" in answer)


class Hopeless(Early):
    def reward(self, conversation, answer):
        return 0.0


class Rare(Early):
    def reward(self, conversation, answer):
        return super().reward(conversation, answer) * (len(conversation["messages"][0]["content"]) % 3 == 0)


class NoReward:
    __len__, __getitem__ = Early.__len__, Early.__getitem__


class NotANumber(Early):
    def reward(self, conversation, answer):
        return float("nan")


class TooMuch(Early):
    def reward(self, conversation, answer):
        return 1e300


class NoneAtAll(Early):
    def reward(self, conversation, answer):
        return None


class Long(Early):
    def __getitem__(self, i):
        return {"messages": [{"role": "user", "content": "a" * 700 * (i == 7)}, {"role": "assistant", "content": "a"}]}


class TooLong(Long):
    def __getitem__(self, i):
        return {"messages": [{"role": "user", "content": "a" * 3000}, {"role": "assistant", "content": "a"}]}


class Unfinished(Early):
    def __getitem__(self, i):
        return {"messages": [{"role": "user", "content": "a"}]}
'''
FLAGS = ["--source", "base", "--device-batch-size", "2", "--examples-per-step", "2", "--num-samples", "4"]
FLAGS += ["--max-new-tokens", "12", "--num-steps", "4", "--eval-every", "-1", "--mesh", "data=1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    before = jax.config.jax_compilation_cache_dir
    base = tmp_path_factory.mktemp("base")
    tiny.write_base(base)
    (base / "rl_tasks.py").write_text(TASKS)
    sys.path.insert(0, str(base))
    yield base
    sys.path.remove(str(base))
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(autouse=True)
def in_base(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)


def run(*argv) -> tuple[int | str, str]:
    """(exit code or the error's sentence, what was printed)"""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        config.run_stage(rl.main, config.parse(rl.RLConfig, [*FLAGS, "--task", "rl_tasks:Early", *argv]))
    return stop.value.code, printed.getvalue()


EVALUATED = ["--eval-task", "rl_tasks:Early", "--eval-every", "2", "--eval-examples", "3", "--eval-samples", "2"]


@pytest.fixture(scope="module")
def trained(base):
    """(folder, output) of a run of 4 steps that measures and saves every 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        code, printed = run("--output-tag", "trained", "--save-every", "2", "--log-rollouts", "1", *EVALUATED)
    assert code == 0, printed
    return base / "chatrl_checkpoints" / "trained", printed


def records(folder):
    return [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def rollouts(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def arrays(folder, step=4):
    found = (
        checkpoint.read_arrays(folder / str(step), "params"),
        checkpoint.read_arrays(folder / str(step), "optimizer"),
    )
    return {f"{i}/{name}": np.asarray(array) for i, part in enumerate(found) for name, array in part.items()}


def assert_same(one, other):
    """Two folders' runs of 4 steps ended with the same bits, and answered the same."""
    a, b = arrays(one), arrays(other)
    assert a.keys() == b.keys() and len(a) > 40
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []
    assert (one / "rollouts.jsonl").read_bytes() == (other / "rollouts.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# What it says and leaves behind


def test_the_console_tells_what_is_trained_on_and_how_it_goes(base, trained):
    lines = trained[1].splitlines()
    assert f"Base model: {base}/base_checkpoints/d2/7" in lines
    told = next(line for line in lines if line.startswith("Early: 10 problems, 2 a step with 4 answers each"))
    assert "the longest prompt has 15 tokens" in told  # of the 8 problems of 4 steps
    steps = [line for line in lines if " | reward " in line]
    assert [line[:16] for line in steps] == [f"step 0000{k}/00004" for k in (1, 2, 3, 4)]
    for part in ("| pass ", "% | signal ", " | length ", " | dlogp ", " | lrm 1.000 | ", " tok/s ", "| 25.0%"):
        assert part in steps[0]
    assert [line[:20] for line in lines if "pass@1 " in line] == [f"step 0000{k} | pass@1 " for k in (0, 2, 4)]
    assert f"step 00004 | saving {trained[0]}/4" in lines and "\x1b" not in trained[1]


def test_every_step_is_measured(trained):
    found = records(trained[0])
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    for r in found:
        assert r["delta_logp_mean"] < 1e-5 and 0 <= r["delta_logp_mean"] <= r["delta_logp_max"] < 1e-4
        assert 0 < r["entropy"] < math.log(50) + 0.2  # top-k; it is an estimate
        assert 0 < r["length_mean"] <= r["length_max"] <= 12 and r["grad_norm"] > 0 and r["trained_tokens"] > 0
        assert {"reward", "pass_rate", "no_signal", "cut", "tool_calls", "tool_failed", "smoothed_reward"} <= r.keys()
        for what in ("rollout", "reward", "update"):
            assert r[f"{what}_seconds"] > 0 and r[f"{what}_tokens_per_second"] > 0
    assert [r["lr_multiplier"] for r in found] == [1, 0.75, 0.5, 0.25]
    assert found[1]["compiles"] == found[3]["compiles"]  # the evaluation after step 2 and two more steps: nothing new


def test_held_out_problems_are_measured_with_intervals(trained):
    measured = [r for r in read_metrics(trained[0] / "metrics.jsonl") if "pass@1" in r]
    assert [r["step"] for r in measured] == [0, 2, 4]
    for r in measured:
        assert 0 <= r["pass@1_low"] <= r["pass@1"] <= r["pass@1_high"] <= 1 and r["pass@1"] <= r["pass@2"] <= 1


def test_the_rollouts_of_the_first_problems_are_kept_whole(trained):
    kept, tokenizer = rollouts(trained[0]), tiny.tokenizer()
    assert [(r["step"], r["example"], r["sample"]) for r in kept] == [
        (s, 2 * s - 2, i) for s in (1, 2, 3, 4) for i in range(4)
    ]
    for r in kept:
        n = len(r["tokens"])
        assert n == len(r["mask"]) == len(r["logprobs"]) == len(r["policy_logprobs"]) and r["tools"] == []
        assert r["text"] == tokenizer.decode(r["tokens"]) and r["prompt"].endswith("<|assistant_start|>")
        assert all(p <= s < 0 for p, s in zip(r["policy_logprobs"], r["logprobs"]))  # the limit gives the rest more
    for step in range(4):
        group = kept[4 * step : 4 * step + 4]
        mean = np.mean([r["reward"] for r in group])
        assert [r["advantage"] for r in group] == pytest.approx([r["reward"] - mean for r in group], abs=1e-6)


def test_the_checkpoint_records_everything_the_next_step_depends_on(trained):
    folder = trained[0]
    meta = checkpoint.read_meta(folder / "4")
    assert (meta["step"], meta["problems_consumed"], meta["total_steps"]) == (4, 8, 4)
    assert meta["rollouts_bytes"] == (folder / "rollouts.jsonl").stat().st_size
    assert (meta["user_config"]["model_tag"], meta["user_config"]["model_step"]) == ("d2", 7)
    assert {"data", "tokenizer", "pass@1", "smoothed_reward", "steps_without_signal"} <= meta.keys()
    assert meta["optimizer_groups"]["matrix"]["lr"] == pytest.approx(0.05 * 0.02)
    model, _, _ = checkpoint.load_model("rl", "trained")
    assert model.config == tiny.CONFIG


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


def test_answers_become_worth_more(base):
    argv = ["--init-lr-frac", "1", "--matrix-lr", "0.05", "--num-samples", "16", "--examples-per-step", "2"]
    code, printed = run("--output-tag", "learns", "--num-steps", "12", "--save-every", "-1", *argv)
    assert code == 0, printed
    rewards = [r["reward"] for r in records(base / "chatrl_checkpoints" / "learns")]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards


def test_neither_passes_nor_devices_nor_slots_change_the_result(base, trained):
    argv = ["--device-batch-size", "1", "--mesh", "data=8", "--slots", "3"]
    code, printed = run("--output-tag", "other", "--log-rollouts", "1", *argv)
    assert code == 0, printed
    folder = base / "chatrl_checkpoints" / "other"
    for ours, theirs in zip(rollouts(folder), rollouts(trained[0]), strict=True):
        assert ours["tokens"] == theirs["tokens"]
    for ours, theirs in zip(records(folder), records(trained[0]), strict=True):
        for name in ("reward", "entropy", "trained_tokens", "loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    start = checkpoint.read_arrays(base / "base_checkpoints" / "d2" / "7", "params")
    ours, theirs = arrays(folder), arrays(trained[0])
    for name, before in start.items():
        if before.size == 1:  # of a lone scalar the gradient may cancel to nothing, and Adam divides by its size
            continue
        update = theirs[f"0/{name}"] - before
        np.testing.assert_allclose(ours[f"0/{name}"] - before, update, atol=1e-5 + 0.01 * np.abs(update).max())


def test_in_bfloat16_sampler_and_trainer_agree_as_far_as_it_can_tell_numbers_apart(base):
    code, printed = run("--output-tag", "bf16", "--num-steps", "1", "--dtype", "bfloat16")
    assert code == 0, printed
    (step,) = records(base / "chatrl_checkpoints" / "bf16")
    assert 1e-5 < step["delta_logp_mean"] < 5e-3


EVERYTHING = ["--advantage", "rloo", "--clip-low", "0.2", "--clip-high", "0.3", "--updates-per-batch", "2"]
EVERYTHING += ["--kl-coef", "0.1", "--is-cap", "2", "--top-k", "0", "--temperature", "0.7", "--resample"]


def test_all_options_of_the_objective_compose_and_resume(base):
    code, printed = run("--output-tag", "everything", "--task", "rl_tasks:Rare", "--save-every", "2", *EVERYTHING)
    assert code == 0, printed
    folder = base / "chatrl_checkpoints" / "everything"
    found = records(folder)
    assert {"kl", "clipped", "capped"} <= found[-1].keys()
    assert found[0]["kl"] < 1e-9 < found[-1]["kl"]  # the first step starts from the reference
    assert max(r["groups"] for r in found) > 2  # problems were drawn again
    assert checkpoint.read_meta(folder / "4")["problems_consumed"] == sum(r["groups"] for r in found)
    assert arrays(folder)["1/count/embedding"] == 8  # two updates a step
    cut = copy_from_step_2(folder, "everything_cut")
    code, printed = run("--resume", "--output-tag", "everything_cut", "--task", "rl_tasks:Rare")
    assert code == 0 and "from step 2" in printed, printed
    assert_same(cut, folder)


def copy_from_step_2(folder, tag):
    """The folder as a process leaves it that was killed after step 2 and wrote on."""
    copy = folder.with_name(tag)
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "4")
    with (copy / "rollouts.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "tok')
    return copy


def test_nanochats_objective_runs_its_passes(base):
    argv = ["--objective", "nanochat", "--num-steps", "2", "--output-tag", "nanochat", "--log-rollouts", "2"]
    code, printed = run(*argv)
    assert code == 0, printed
    folder = base / "chatrl_checkpoints" / "nanochat"
    (first, _), sampled = records(folder), [r for r in rollouts(folder) if r["step"] == 1]
    assert first["trained_tokens"] == sum(sum(r["mask"]) - r["ended"] for r in sampled)  # the end is not trained
    # its loss: the mean over passes of two answers of -advantage * log p over the pass's tokens
    losses = []
    for pair in zip(sampled[::2], sampled[1::2]):
        terms = [(-r["advantage"] * p, 1) for r in pair for p in r["policy_logprobs"][: len(r["tokens"]) - r["ended"]]]
        losses.append(sum(t for t, _ in terms) / max(1, len(terms)))
    assert first["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    code, _ = run("--resume", *argv, "--device-batch-size", "4")
    assert "--device-batch-size, which was 2" in code


def test_a_step_without_a_signal_changes_nothing_and_is_counted(base):
    code, printed = run("--output-tag", "hopeless", "--task", "rl_tasks:Hopeless", "--save-every", "-1")
    assert code == 0, printed
    folder = base / "chatrl_checkpoints" / "hopeless"
    start = checkpoint.read_arrays(base / "base_checkpoints" / "d2" / "7", "params")
    end = checkpoint.read_arrays(folder / "4", "params")
    assert all(np.array_equal(start[name], end[name]) for name in start)
    assert [r["steps_without_signal"] for r in records(folder)] == [1, 2, 3, 4]
    assert printed.count("no signal, no update") == 4
    (warning,) = [line for line in printed.splitlines() if "too little to learn from" in line]
    assert warning.startswith("WARNING: ") and warning.endswith("train SFT longer, or choose easier problems")


@pytest.mark.parametrize(
    ("signal", "passed", "told"),
    [
        ([0, 0.25, 0.125], [0, 0.02, 0.01], ("12% differ in reward (pass rate 1.0%)", "easier")),
        ([0, 0, 0], [0.99, 1, 1], ("0% differ in reward (pass rate 99.7%)", "harder")),
        ([0, 0.25, 0.375], [0.02, 0.02, 0.02], None),
    ],
)
def test_the_warning_of_too_little_signal_is_about_the_first_steps_together_and_comes_once(signal, passed, told):
    said = []
    practice = Practice.__new__(Practice)
    practice.first_steps, practice.reporter = [], SimpleNamespace(say=said.append)
    for step in range(3):
        practice._warn(step + 1, {"no_signal": 1 - signal[step], "pass_rate": passed[step]})
    for step in range(8, 12):  # also where the run is resumed
        practice._warn(step, {"no_signal": 1, "pass_rate": 0})
    assert len(said) == (told is not None)
    assert all(told[0] in line and line.endswith(f"choose {told[1]} problems") for line in said)


def test_every_epoch_has_every_problem_once_in_an_order_of_its_own(base):
    task, tokenizer = AdaptedTask(__import__("rl_tasks").Early()), tiny.tokenizer()
    exercises = Exercises(task, tokenizer, 3, 100)
    orders = [[exercises[10 * epoch + i][0] for i in range(10)] for epoch in range(3)]
    assert orders[0] == list(range(10)) and all(sorted(order) == orders[0] for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert exercises.longest == 17 and len(Exercises(task, tokenizer, 3, 4).prompts) == 4


def test_rows_are_as_many_as_the_longest_answers_can_need():
    cfg = rl.RLConfig(examples_per_step=4, num_samples=4, device_batch_size=2)
    mesh = make_mesh("data=2")
    shape = plan_shape(cfg, mesh, 20, 64)  # 3 documents of 20 in a row of 64 and its last target
    assert (shape.T, shape.rows, shape.micro_batches) == (64, 4, 2)  # 6 rows
    shape = plan_shape(cfg, mesh, 100, 64)
    assert (shape.T, shape.rows, shape.micro_batches) == (99, 4, 4)
    shape = plan_shape(dataclasses.replace(cfg, device_batch_size=64), mesh, 20, 64)
    assert (shape.T, shape.rows, shape.micro_batches) == (64, 6, 1)  # not 128 rows of padding
    nanochat = dataclasses.replace(cfg, objective="nanochat", device_batch_size=4)
    shape = plan_shape(nanochat, mesh, 20, 64)
    assert (shape.T, shape.rows, shape.micro_batches) == (19, 4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# How it goes on


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(trained):
    folder = copy_from_step_2(trained[0], "killed")
    code, printed = run("--resume", "--output-tag", "killed")  # what is not given is the run's own
    assert code == 0 and f"Resuming {folder} from step 2" in printed, printed
    assert_same(folder, trained[0])


def test_a_signal_during_rollouts_saves_the_step_before_at_once(base, trained, monkeypatch):
    generate, folder = Engine.generate, base / "chatrl_checkpoints" / "term"
    steps = []

    def interrupted(self, prompts, sampling, **how):
        steps.append(how["step"])
        if how["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, prompts, sampling, **how)

    monkeypatch.setattr(Engine, "generate", interrupted)
    code, printed = run("--output-tag", "term", "--save-every", "2", "--log-rollouts", "1")
    assert code == 128 + signal.SIGTERM, printed
    assert sealed.steps(folder) == [2, 3] and steps[-1] == 3
    monkeypatch.setattr(Engine, "generate", generate)
    code, printed = run("--resume", "--output-tag", "term")
    assert code == 0 and "from step 3" in printed, printed
    assert_same(folder, trained[0])


def test_a_reference_that_has_changed_is_not_taken_for_the_one_it_was(base):
    for tag, seed in (("one", 0), ("other", 1)):
        tiny.write_base(base, tag, 7, seed=seed)
    argv = ["--kl-coef", "0.1", "--num-steps", "1", "--output-tag", "reference"]
    assert run("--model-tag", "one", *argv)[0] == 0
    shutil.rmtree(base / "base_checkpoints" / "one")
    code, _ = run("--resume", *argv)
    assert "--kl-coef needs the model that the run started from" in code and "one does not exist" in code
    shutil.copytree(base / "base_checkpoints" / "other", base / "base_checkpoints" / "one")
    code, _ = run("--resume", *argv)
    assert (
        code == "error: --kl-coef needs the model that the run started from, but base one, step 7, is another one now"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses, before anything is compiled

BAD = [
    (["--num-samples", "1"], "--num-samples must be from 2"),
    (["--temperature", "0"], "--temperature must be above 0"),
    (["--temperature", "inf"], "--temperature must be a number"),
    (["--top-k", "-1"], "--top-k must be at least 1, or 0"),
    (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    (["--max-new-tokens", "700"], "--max-new-tokens=700 more may follow, but the model's context ends at 640"),
    (["--max-new-tokens", "1000000000"], "--max-new-tokens=1000000000"),
    (["--examples-per-step", "0"], "--examples-per-step must be from 1"),
    (["--num-steps", "-1", "--examples-per-step", "11"], "10 problems, fewer than --examples-per-step=11"),
    (["--max-seq-len", "20"], "the longest prompt with its answer takes 27 tokens"),
    (["--max-seq-len", "700"], "--max-seq-len=700 must be at most 640"),
    (["--objective", "ppo"], "--objective must be global or nanochat, got ppo"),
    (["--objective", "nanochat", "--device-batch-size", "3"], "which must divide --num-samples=4"),
    (["--advantage", "gae"], "--advantage must be one of mean, grpo, rloo"),
    (["--updates-per-batch", "2"], "bound how far with --clip-low 0.2"),
    (["--clip-low", "2"], "--clip-low must be above 0"),
    (["--is-cap", "-1"], "--is-cap must be above 0"),
    (["--kl-coef", "nan"], "--kl-coef must be at least 0"),
    (["--matrix-lr", "nan"], "--matrix-lr must be between 0 and 1000"),
    (["--source", "pretrained"], "--source must be sft, rl or base"),
    (["--source", "sft"], "no sft model"),
    (["--task", "gsm9k"], "did you mean gsm8k?"),
    (["--task", "rl_tasks:Missing"], "has no Missing"),
    (["--task", "rl_tasks:NoReward"], "cannot reward an answer to problem 0: NoReward cannot judge answers"),
    (["--task", "rl_tasks:NotANumber"], "a reward must be finite and at most 1e+30, got nan for problem 0"),
    (["--task", "rl_tasks:TooMuch"], "a reward must be finite and at most 1e+30, got 1e+300 for problem 0"),
    (["--task", "rl_tasks:NoneAtAll"], "cannot reward an answer to problem 0: TypeError"),
    (["--task", "rl_tasks:Long", "--num-steps", "5"], "the longest prompt has 704 tokens"),
    (["--task", "rl_tasks:TooLong"], "problem 0: a prompt must have at most 2,048 tokens"),
    (["--task", "rl_tasks:Unfinished"], "problem 0: the last message must be the assistant's"),
    (["--eval-every", "2", "--eval-task", "rl_tasks:Missing"], "--eval-task rl_tasks:Missing: "),
    (["--eval-every", "2", "--eval-task", "rl_tasks:NoReward"], "NoReward cannot judge the answer to problem 0"),
]


@pytest.mark.parametrize(("argv", "sentence"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_what_cannot_work_is_refused_in_one_sentence(argv, sentence, monkeypatch):
    monkeypatch.setattr(rl, "session", lambda *_: pytest.fail("a model was placed on the device"))
    code, _ = run("--output-tag", "bad", *argv)
    assert isinstance(code, str) and sentence in code and "\n" not in code, code


def test_a_run_does_not_delete_the_model_that_it_starts_from(trained):
    code, _ = run("--source", "rl", "--model-tag", "trained", "--output-tag", "trained", "--overwrite")
    assert "choose another folder for this run with --output-tag" in code
    assert sealed.steps(trained[0]) == [2, 4]


def test_another_objective_is_not_a_resume(trained):
    code, _ = run("--resume", "--output-tag", "trained", "--kl-coef", "0.1")
    assert "--kl-coef was 0.0 and is 0.1" in code
    code, _ = run("--resume", "--output-tag", "trained", "--task", "rl_tasks:Rare")
    assert "--task was rl_tasks:Early" in code
