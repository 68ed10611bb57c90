"""RL with an environment and a slow tool, from the command line to what it leaves: numbers, records, processes, kills.

Run: python -m pytest tests/test_environments.py
"""

import contextlib
import io
import json
import signal
import time

import numpy as np
import pytest

from nanochat_jax import eval, rl
from nanochat_jax.train.metrics import read_metrics
from tests.support import columns, process_runs, tiny
from tests.support.commands import run_command
from tools.check import kill_resume

TOKENIZER = tiny.tokenizer()
TALK = "tests.support.process_tasks:Talk"
LATE = ["--tool", "tests.support.process_tasks:Late"]
FLAGS = ["--source", "base", "--device-batch-size", "1", "--examples-per-step", "2", "--num-samples", "4"]
FLAGS += ["--max-new-tokens", "60", "--max-turns", "3", "--task", TALK, "--cut-answers", "keep", "--seed", "1"]
EVALUATED = ["--eval-task", TALK, "--eval-every", "3", "--eval-examples", "4", "--eval-samples", "2"]
STEPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory whose model often ends its turn and often calls a tool."""
    base = tmp_path_factory.mktemp("talk")
    tiny.write_base(base, likely=("<|assistant_end|>", "<|python_start|>", "<|python_end|>"))
    return base


@pytest.fixture(scope="module")
def two(base):
    """The folder of a run of two processes."""
    flags = [*FLAGS, *LATE, *EVALUATED, "--num-steps", str(STEPS), "--log-rollouts", "2", "--output-tag", "two"]
    process_runs.run(base, "rl", flags, devices=2)
    return base / "chatrl_checkpoints" / "two"


def steps(folder):
    return [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def rollouts(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_sampler_and_trainer_agree_and_what_was_forced_is_not_trained(two):
    found, kept = steps(two), rollouts(two)
    assert len(found) == STEPS and len(kept) == STEPS * 2 * 4 and columns.unknown(two) == set()
    for record in found:
        assert 0 <= record["delta_logp_mean"] < 1e-5
        of_step = [r for r in kept if r["step"] == record["step"]]
        with_signal = {r["example"] for r in of_step if r["advantage"]}
        assert record["trained_tokens"] == sum(sum(r["mask"]) for r in of_step if r["example"] in with_signal) > 0
        assert record["turns"] == np.mean([r["text"].count("<|user_start|>more than ") + 1 for r in of_step])
        assert 1 < record["turns"] < 3 and record["tool_timeouts"] == 0
        failed = [any(call["result"] is None for call in r["tools"]) for r in of_step]
        assert (record["tool_calls"], record["tool_failed"]) == (
            np.mean([bool(r["tools"]) for r in of_step]),
            np.mean(failed),
        )
    start, end = (TOKENIZER.special(f"<|user_{side}|>") for side in ("start", "end"))
    results = 0
    for r in kept:
        for i, (token, mask) in enumerate(zip(r["tokens"], r["mask"])):
            if token == start and not mask:
                assert r["mask"][i - 1] and r["tokens"][i - 1] == TOKENIZER.special("<|assistant_end|>")
                after = r["tokens"].index(end, i)
                assert not any(r["mask"][i : after + 2])
                assert r["tokens"][after + 1] == TOKENIZER.special("<|assistant_start|>")
        results += sum(call["result"] is not None for call in r["tools"])
        assert all(call.keys() == {"expression", "result", "timed_out"} for call in r["tools"])
    assert results > 0
    (first, *_, last) = [r for r in read_metrics(two / "metrics.jsonl") if "pass@1" in r]
    assert {first["step"], last["step"]} == {0, STEPS}


def test_one_process_draws_and_learns_as_two(base, two):
    flags = [*FLAGS, *LATE, "--eval-every", "-1", "--num-steps", str(STEPS), "--log-rollouts", "2"]
    process_runs.run(base, "rl", [*flags, "--output-tag", "one"], count=1, devices=2)
    one = base / "chatrl_checkpoints" / "one"
    for ours, theirs in zip(steps(one), steps(two), strict=True):
        for name in ("loss", "reward", "turns", "tool_calls", "tool_failed", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    for ours, theirs in zip(rollouts(one), rollouts(two), strict=True):
        for name in ("logprobs", "policy_logprobs"):
            np.testing.assert_allclose(ours.pop(name), theirs.pop(name), atol=1e-4)
        for name in ("reward", "advantage"):
            assert ours.pop(name) == pytest.approx(theirs.pop(name), abs=1e-6)
        assert ours == theirs


def test_a_run_that_is_killed_in_the_middle_of_a_turn_ends_bit_identical(base):
    flags = [*FLAGS, "--eval-every", "-1", "--num-steps", "5", "--save-every", "1", "--keep-checkpoints", "9"]
    alone, killed = (kill_resume.Run("rl", tag, base, 1, flags) for tag in ("alone", "killed"))
    alone.to_end()
    variables = {"PAUSE_AFTER": str(killed.folder / "2")}
    with process_runs.started(base, "rl", [*killed.name_flags, *flags], count=1, devices=1, **variables) as runs:
        while not (killed.folder / "paused").exists():
            assert runs.all[0].poll() is None and time.monotonic() < runs.deadline, runs.all_output()
            time.sleep(0.01)
        runs.signal(0, signal.SIGKILL)
        assert runs.wait() == [-signal.SIGKILL]
    assert "from step 2" in killed.to_end("--resume")
    found = kill_resume.difference(killed.folder, alone.folder, 5)
    assert found.pop("arrays_compared") > 40
    assert found == {"arrays_that_differ": [], "steps_whose_loss_differs": [], "rollouts_differ": False}


def test_an_evaluation_has_the_turns_and_tools_that_it_is_given(base, in_base, tmp_path):
    argv = ["-i", "base", "-a", f"{TALK}|guessnumber", "-x", "3", "-m", "40", "--max-turns", "2", *LATE]
    with contextlib.redirect_stdout(io.StringIO()):
        assert run_command(eval.main, eval.EvalConfig, *argv, "--json", str(tmp_path / "found.json")) == 0
    report = json.loads((tmp_path / "found.json").read_text())
    assert (report["tools"], report["max_turns"], list(report["tasks"])) == (["late"], 2, [TALK, "GuessNumber"])
    assert "--tool must be calculator" in run_command(eval.main, eval.EvalConfig, *argv[:-2], "--tool", "abacus")


def test_what_is_no_tool_is_refused_before_anything_is_read(in_base):
    assert "--tool must be calculator" in run_command(rl.main, rl.RLConfig, *FLAGS, "--tool", "abacus")
    assert "--max-turns must be at least 1, got 0" in run_command(rl.main, rl.RLConfig, *FLAGS, "--max-turns", "0")
