"""Runs of 2 processes with 4 CPU devices each, over loopback: the same training as one process with 8, also when one of
them is killed, told to stop, late, or not like the others.

Run: python -m pytest tests/distributed/test_processes.py
"""

import json
import random
import re
import signal
import socket
import time

import numpy as np
import pytest

from nanochat_jax.checkpoints import integrity, store
from nanochat_jax.distributed import coordinator, processes
from nanochat_jax.inference.samples import Sample
from nanochat_jax.inference.tools import ToolCall
from nanochat_jax.rollouts import exchange
from nanochat_jax.train import start
from nanochat_jax.train.metrics import read_metrics
from tests.support import process_runs, tiny
from tests.support.process_runs import INT, KILL, TERM, run, started
from tools.check import kill_resume

STEPS = {"sft": 20, "rl": 5}
FOLDERS = {"sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
SEED = random.randrange(1 << 30)  # of the moments at which runs are interrupted; a failure tells it


@pytest.fixture(scope="module")
def flags(base):
    """Of a stage's run."""
    sft = [*tiny.sft_flags(base), "--num-iterations", str(STEPS["sft"]), "--eval-every", "10"]
    rl = [*kill_resume.RL_FLAGS, "--num-steps", str(STEPS["rl"]), "--device-batch-size", "1"]
    rl += [
        "--cut-answers",
        "keep",
        "--max-new-tokens",
        "16",
    ]  # one call of the device: each further one is two more programs
    rl += ["--eval-every", "5", "--eval-task", "tests.support.process_tasks:Vowels", "--eval-samples", "2"]
    sft += ["--save-every", "4", "--keep-checkpoints", "9"]
    return {"sft": sft, "rl": [*rl, "--save-every", "1", "--keep-checkpoints", "9"]}


@pytest.fixture(scope="module")
def undisturbed(base, flags):
    """stage -> the folder of a run of 2 processes that nothing interrupted, but for an uninvited third one."""
    done = {}

    def get(stage):
        if stage not in done:
            with started(base, stage, [*flags[stage], "--output-tag", "alone"]) as runs:
                runs.wait_for("step 0*1/")
                if stage == "sft":
                    late = process_runs.Processes([runs.all[1].args], [runs.envs[1]])
                    assert late.wait() == [1]
                    assert "the 2 processes of this run have begun already" in late.output(0)
                assert runs.wait() == [0, 0], runs.all_output()
            done[stage] = base / FOLDERS[stage] / "alone"
        return done[stage]

    return get


def measured(folder, *names):
    """The values that metrics.jsonl has under the first of these names, by step."""
    records = read_metrics(folder / "metrics.jsonl")
    return {r["step"]: [r[name] for name in names] for r in records if names[0] in r}


def assert_close(folder, other, *names):
    ours, theirs = measured(folder, *names), measured(other, *names)
    assert ours.keys() == theirs.keys() and ours
    for step, values in ours.items():
        np.testing.assert_allclose(values, theirs[step], rtol=1e-5, atol=1e-7, err_msg=f"step {step}")


def assert_bit_identical(folder, other, step):
    """Checkpoints of this step, and what was recorded up to it."""
    for item in ("params", "optimizer"):
        ours, theirs = (store.read_arrays(f / str(step), item) for f in (folder, other))
        assert ours.keys() == theirs.keys()
        differing = [name for name, array in ours.items() if array.tobytes() != theirs[name].tobytes()]
        assert not differing, f"{SEED=} {differing}"
    losses = [{k: v for k, v in measured(f, "loss", "grad_norm").items() if k <= step} for f in (folder, other)]
    assert losses[0] == losses[1] and len(losses[0]) == step, f"{SEED=}"
    if (folder / "rollouts.jsonl").exists():
        ours, theirs = ((f / "rollouts.jsonl").read_bytes() for f in (folder, other))
        assert theirs.startswith(ours) and ours, f"{SEED=}"


def interrupted(base, stage, flags, victim, number, at, delay, **how):
    """A run of which one process gets a signal at a step -> exit codes and the processes."""
    with started(base, stage, flags, **how) as runs:
        runs.wait_for(kill_resume.at_step(at, STEPS[stage]))
        time.sleep(delay)
        began = time.monotonic()
        runs.signal(victim, number)
        codes = runs.wait()
        return codes, time.monotonic() - began, runs


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_lost_process_ends_the_others_by_name_and_a_stopped_one_saves_with_them(base, flags, undisturbed, stage):
    alone, rng = undisturbed(stage), random.Random(f"{SEED} {stage}")
    folder, total = base / FOLDERS[stage] / "disturbed", STEPS[stage]
    these = [*flags[stage], "--output-tag", "disturbed", "--resume=auto", "--eval-every", "-1"]
    victim, at, delay = rng.randrange(2), rng.randint(1, total // 2), rng.uniform(0, 0.1)
    codes, seconds, runs = interrupted(base, stage, these, victim, KILL, at, delay)
    assert codes[victim] == -KILL and codes[1 - victim] == coordinator.LOST_EXIT_CODE, f"{SEED=}\n{runs.all_output()}"
    assert seconds < 30
    host = re.escape(socket.gethostname())
    (said,) = re.findall(r"^error: (.*)", runs.output(1 - victim), re.MULTILINE)
    assert re.match(rf"process {victim} on {host} is lost .*--resume", said), f"{SEED=}\n{runs.all_output()}"

    told, at = rng.randrange(2), rng.randint(total // 2 + 1, 3 * total // 4)
    codes, _, runs = interrupted(base, stage, these, told, TERM, at, rng.uniform(0, 0.1))
    assert codes == [143, 143], f"{SEED=}\n{runs.all_output()}"
    newest = integrity.newest_intact(folder)
    assert f"step {newest:05d} | saving" in runs.output(0) and newest >= at, f"{SEED=}\n{runs.all_output()}"

    if stage == "sft":
        assert f"Resuming {folder} from step {newest}" in run(base, stage, these)
        newest = total
    assert_bit_identical(folder, alone, newest)
    assert not [p.name for p in folder.iterdir() if "tmp" in p.name or "deleted" in p.name]


def test_fine_tuning_moves_between_one_process_and_two_and_stays_the_same(base, flags, undisturbed):
    alone, folder = undisturbed("sft"), base / FOLDERS["sft"] / "moving"
    these = [*flags["sft"], "--output-tag", "moving", "--resume=auto"]
    codes, _, runs = interrupted(base, "sft", these, 0, INT, 3, 0.0, count=1)
    assert codes == [130], runs.all_output()
    codes, _, runs = interrupted(base, "sft", [*these, "--mesh", "replica=2"], 0, INT, 11, 0.0)
    assert codes == [130, 130], runs.all_output()
    output = run(base, "sft", [*these, "--verbose"], count=1, devices=1)
    assert f"Resuming {folder} from step" in output and re.search(r"blocks/\*/attn/c_q x 2 +64 x 64 ", output)
    assert_close(folder, alone, "loss", "grad_norm")
    assert_close(folder, alone, "val_bpb")


def test_rl_in_two_processes_draws_and_learns_as_in_one(base, flags, undisturbed):
    alone, folder = undisturbed("rl"), base / FOLDERS["rl"] / "one"
    run(base, "rl", [*flags["rl"], "--output-tag", "one"], count=1)
    assert_close(folder, alone, "loss", "reward", "pass_rate", "no_signal", "length_mean", "tool_calls", "entropy")
    assert_close(folder, alone, "pass@1", "pass@2")
    ours, theirs = ((f / "rollouts.jsonl").read_text().splitlines() for f in (folder, alone))
    assert len(ours) == len(theirs) == STEPS["rl"] * 2 * 4
    for one, other in zip(map(json.loads, ours), map(json.loads, theirs)):
        for name in ("logprobs", "policy_logprobs"):
            np.testing.assert_allclose(one.pop(name), other.pop(name), atol=1e-5)
        assert one == other


def test_an_evaluation_is_shared_and_judged_alike(base, tmp_path):
    tasks = "tests.support.process_tasks:Letters|tests.support.process_tasks:Vowels"
    sizes = ["-m", "24", "-n", "2", "-t", "1", "--slots", "16"]
    reports = []
    for count in (1, 2):
        file = tmp_path / f"{count}.json"
        run(base, "eval", ["-i", "base", "-a", tasks, *sizes, "--json", str(file)], count=count)
        reports.append(json.loads(file.read_text()))
        del reports[-1]["time"]
        for result in reports[-1]["tasks"].values():
            del result["seconds"]
    assert reports[0] == reports[1]
    assert {0, 1, 2} <= set(reports[0]["tasks"]["tests.support.process_tasks:Vowels"]["right"])


# ---------------------------------------------------------------------------------------------------------------------
# The start


def test_a_process_with_another_setting_is_refused_by_name_on_both_before_anything_is_done(base, flags):
    folder = base / FOLDERS["sft"] / "refused"
    with started(base, "sft", [*flags["sft"], "--output-tag", "refused"], more={1: ["--seed", "7"]}) as runs:
        assert runs.wait() == [1, 1]
        for i in range(2):
            assert re.search("error: process 1 on .* is refused.*--seed is 7 instead of 42", runs.output(i))
    assert not folder.exists()


def test_a_signal_while_the_data_are_read_ends_both_with_its_code(base, flags):
    slow = ["--task", "tests.support.process_tasks:Slow", "--output-tag", "early"]
    with started(base, "sft", [*flags["sft"], *slow], SLOW_SECONDS=5) as runs:
        runs.wait_for("Total batch size")
        runs.signal(1, TERM)
        assert runs.wait() == [143, 143], runs.all_output()
        for i in range(2):
            assert re.search(r"error: process 1 on .* got signal 15", runs.output(i))


def test_a_process_that_hangs_is_lost_too(base, flags):
    slow = ["--task", "tests.support.process_tasks:Slow", "--output-tag", "hanging"]
    with started(base, "sft", [*flags["sft"], *slow], SLOW_SECONDS=9, NANOCHAT_LOST_SECONDS=3) as runs:
        runs.wait_for("Total batch size")
        runs.signal(1, signal.SIGSTOP)
        runs.all[0].wait(30)
        runs.signal(1, signal.SIGCONT)
        assert runs.wait() == [coordinator.LOST_EXIT_CODE] * 2, runs.all_output()
        assert re.search(r"error: process 1 on .* is lost \(nothing was heard of it for 3 seconds\)", runs.output(0))


def test_processes_that_see_other_checkpoints_are_refused(base, flags, tmp_path):
    """As where each machine has a disk of its own."""
    tiny.write_base(tmp_path, step=8)
    with started(base, "sft", [*flags["sft"], "--output-tag", "disks"], bases={1: tmp_path}) as runs:
        assert runs.wait() == [1, 1]
        for i in range(2):
            said = r"process 1 on .* is refused.*, model to start from is d2, step 8, \w+ instead of d2, step 7"
            assert re.search(said, runs.output(i)), runs.all_output()


def test_processes_without_a_common_disk_for_checkpoints_are_refused(tmp_path, monkeypatch):
    """Process 1, told that process 0 has made the folder."""
    told = []
    for name, value in {"count": 2, "exchange": [True, False]}.items():
        monkeypatch.setattr(processes, name, lambda *args, value=value: told.append(args) or value)
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(start, "SEEN_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"process 1 does not see .*not-there of process 0: set NANOCHAT_BASE_DIR"):
        with start.hold_folder(start.Start(None, tmp_path / "not-there", "")):
            pass
    assert ("who sees it", False) in told


def test_what_may_differ_between_machines_is_not_compared():
    settings = {"seed": 1, "data_dir": "/a", "process_id": 3, "coordinator": "x", "max_seq_len": 64}
    assert processes.compared_settings(settings) == {"--seed": "1", "--max-seq-len": "64"}


# ---------------------------------------------------------------------------------------------------------------------
# What travels


def test_samples_travel_unchanged():
    rng = np.random.default_rng(0)

    def sample(n, calls=()):
        floats = [rng.normal(size=n).astype(np.float32) for _ in range(2)]
        return Sample(np.arange(n, dtype=np.int32), np.ones(n, np.uint8), *floats, bool(n % 2), list(calls), n + 1)

    calls = [ToolCall("1+1", "2"), ToolCall("é\n", None, True)]
    drawn = [([sample(3), sample(0)], np.array([0.5, -1])), ([sample(7, calls), sample(1)], np.array([1.0, 1 / 3]))]
    found, cost = exchange.from_bytes(exchange.to_bytes(drawn, (11, 0.25)))
    assert cost.tolist() == [11, 0.25] and len(found) == 2
    for (samples, rewards), (others, worth) in zip(found, drawn):
        assert rewards.tolist() == worth.tolist()
        for one, other in zip(samples, others, strict=True):
            for name in exchange.FIELDS:
                a, b = getattr(one, name), getattr(other, name)
                assert a.dtype == b.dtype and a.tolist() == b.tolist()
            assert (one.ended, one.tool_calls, one.turns) == (other.ended, other.tool_calls, other.turns)
    assert exchange.from_bytes(exchange.to_bytes([], (0, 0.0)))[0] == []


def test_one_process_needs_no_coordinator():
    assert (processes.count(), processes.index(), processes.mine([1, 2, 3])) == (1, 0, [1, 2, 3])
    assert processes.exchange("x", [1, None]) == [[1, None]] and processes.gather("x", b"abc") == [b"abc"]
    assert processes.gather("x", None) is None and not processes.stop_here() and not processes.signal_noticed()
    with processes.process_zero_first("x"), processes.stopping_in_order():
        processes.agree("x", {"a": 1})
