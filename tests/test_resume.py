"""Runs that are killed and resumed end bit-identical to one left alone; tools/check/faults.py is longer."""

import dataclasses
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from nanochat_jax.checkpoints import integrity, store
from nanochat_jax.checkpoints.saver import Saver
from nanochat_jax.cli.settings import Maybe, recorded_settings, resumed_settings, setting
from nanochat_jax.data.packing import PACKING
from nanochat_jax.flags.stage import StageConfig
from nanochat_jax.sft import SFTConfig
from nanochat_jax.train import step as train
from nanochat_jax.train.start import Start, changed_versions, find_run
from tests.support import tiny
from tools.check import kill_resume

STEPS = 16


def flags(base, save_every=2):
    steps = ["--num-iterations", str(STEPS), "--save-every", str(save_every), "--eval-every", "-1"]
    return [*tiny.sft_flags(base), *steps]


@pytest.fixture(scope="module")
def alone(base):
    """devices -> the folder of a run that nothing interrupted."""
    folders = {}

    def get(devices):
        if devices not in folders:
            run = kill_resume.Run("sft", f"alone{devices}", base, devices, flags(base, save_every=-1))
            run.to_end()
            folders[devices] = run.folder
        return folders[devices]

    return get


def assert_identical(one, other):
    found = kill_resume.difference(one, other, STEPS)
    assert found.pop("arrays_compared") > 40
    assert found == {"arrays_that_differ": [], "steps_whose_loss_differs": []}


def test_a_run_on_eight_devices_that_is_killed_at_a_random_moment_ends_bit_identical(base, alone):
    run = kill_resume.Run("sft", "kill8", base, 8, flags(base))
    case = kill_resume.train_killed(run, signal.SIGKILL, 1, STEPS, random.Random(8))
    assert case["exit_codes"] == [-signal.SIGKILL]
    assert_identical(run.folder, alone(8))


def test_pretraining_that_is_killed_ends_bit_identical_across_shards_and_epochs(tmp_path):
    steps = ["--num-iterations", str(STEPS), "--save-every", "3", "--eval-every", "-1"]
    run_flags = [*tiny.base_flags(tmp_path), *steps]
    alone, killed = (kill_resume.Run("base", tag, tmp_path, 1, run_flags) for tag in ("alone", "killed"))
    output = alone.to_end("--save-every", "-1")
    case = kill_resume.train_killed(killed, signal.SIGKILL, 2, STEPS, random.Random(1))
    assert -signal.SIGKILL in case["exit_codes"]
    assert "epoch 2" in output and case["resumed_from"], output
    assert_identical(killed.folder, alone.folder)


def test_sigterm_saves_the_step_it_came_in_and_exits_with_143(base, alone):
    run = kill_resume.Run("sft", "term", base, 1, flags(base, save_every=-1))
    code, output = kill_resume.run_until(run.start(), kill_resume.at_step(5, STEPS), 0.0, signal.SIGTERM)
    assert code == 143, output
    (step,) = integrity.steps(run.folder)
    assert 5 <= step < STEPS and integrity.is_intact(run.folder / str(step))
    again = kill_resume.Run("sft", "term", base, 1, [])  # what is not given is the run's own
    output = again.to_end("--resume")
    assert f"Resuming {run.folder} from step {step}" in output, output
    assert_identical(run.folder, alone(1))


def test_a_save_that_is_killed_in_the_middle_leaves_the_one_before_it_and_so_does_a_kill_after_that(base, alone):
    run = kill_resume.Run("sft", "midsave", base, 1, flags(base))
    again, folder = kill_resume.Run("sft", "midsave", base, 1, ["--resume"]), run.folder
    for _ in range(8):  # the moment is short: look for it again where it was missed
        shutil.rmtree(folder, ignore_errors=True)
        process = run.start()
        while process.poll() is None and not any(folder.glob("6.orbax-checkpoint-tmp*")):
            time.sleep(0.001)
        process.kill()
        process.communicate()
        if kill_resume.is_in(folder, "a save"):
            break
    else:
        pytest.skip("this machine writes a checkpoint faster than one can look")
    before = integrity.newest_intact(folder)
    assert before == 4
    rng = random.Random(1)
    later = kill_resume.at_step(rng.randint(7, 13), STEPS)
    code, output = kill_resume.run_until(again.start(), later, rng.uniform(0, 0.1), signal.SIGKILL)
    assert code == -signal.SIGKILL and f"from step {before}" in output, output
    output = again.to_end()
    assert "from step" in output, output
    assert not list(folder.glob("*tmp*"))
    assert_identical(folder, alone(1))


# ---------------------------------------------------------------------------------------------------------------------
# Settings of a run that goes on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(StageConfig):
    steps: int = setting(1, "steps")
    files: tuple[Path, ...] = setting((), "data")
    data_dir: Maybe[Path] = setting(None, "where data is", resume="free")
    tasks: tuple[str, ...] = setting((), "tasks")


def go_on(cfg, saved, said=str):
    return resumed_settings(cfg, saved, "--output-tag", said)


def test_paths_are_recorded_so_that_they_hold_in_another_folder_and_come_back_as_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    cfg = Settings(steps=2, files=(Path("a.jsonl"), Path("/b.jsonl")), data_dir=Path("~/data"), tasks=("module:Class",))
    saved = recorded_settings(cfg)
    assert (saved["files"], saved["data_dir"]) == ([f"{tmp_path}/a.jsonl", "/b.jsonl"], "/home/somebody/data")
    monkeypatch.chdir("/")
    found = go_on(Settings(), saved)
    assert (found.steps, found.files, found.data_dir, found.tasks) == (
        2,
        (tmp_path / "a.jsonl", Path("/b.jsonl")),
        Path("/home/somebody/data"),
        cfg.tasks,
    )


def test_a_dataset_of_the_hub_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Settings(files=(Path("hub:owner/dataset:test"),))
    saved = recorded_settings(cfg)
    assert saved["files"] == ["hub:owner/dataset:test"]
    monkeypatch.chdir("/")
    assert go_on(Settings(), saved).files == cfg.files == go_on(cfg, saved).files


def test_the_same_files_by_another_name_are_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    for files in ([f"{tmp_path}/a.jsonl"], ["a.jsonl"], [f"../{tmp_path.name}/a.jsonl"]):
        for ours in ("a.jsonl", tmp_path / "a.jsonl"):
            cfg = Settings(files=(Path(ours),), data_dir=Path("data"))
            assert go_on(cfg, {"files": files, "data_dir": "data"}, said.append) == cfg
    assert said == []
    with pytest.raises(
        ValueError, match=r"--files was \['a.jsonl'\] and is \['.*/b.jsonl'\]; use another --output-tag"
    ):
        go_on(Settings(files=(Path("b.jsonl"),)), {"files": ["a.jsonl"]})


# ---------------------------------------------------------------------------------------------------------------------
# Data, packing and versions of a run that goes on


def started(**record):
    return Start(None, Path("/runs/mine"), "", record={"step": 3, **record})


def test_a_run_whose_data_and_packing_are_the_same_goes_on():
    started(data="one", packing=PACKING).check_data("one")
    started(data="one").check_data("one")  # of before the packing had a number
    Start(None, Path("/runs/mine"), "").check_data("anything")


@pytest.mark.parametrize("packing", [PACKING + 1, PACKING - 1, "1", True if PACKING != 1 else 1.5])
def test_a_run_whose_rows_were_packed_by_other_rules_does_not_go_on(packing):
    with pytest.raises(ValueError, match=r"rows of /runs/mine are packed by the rules number .*--output-tag") as error:
        started(data="one", packing=packing).check_data("one")
    assert f"has number {PACKING}" in str(error.value) and "\n" not in str(error.value)


def test_other_data_and_data_that_an_earlier_version_recorded_are_told_apart():
    with pytest.raises(ValueError, match="data of /runs/mine has changed since step 3; restore the files, or start an"):
        started(data="one", packing=PACKING).check_data("two")
    with pytest.raises(
        ValueError, match=r"recorded by an earlier version of nanochat_jax.*go on with that version, or"
    ):
        started(data="one").check_data("two")


def test_each_version_that_differs_is_named_with_both_values():
    now = store.versions()
    assert changed_versions(now) == ""
    assert changed_versions(now | {"jax": "0.0.1"}) == f"jax 0.0.1 to {now['jax']}"
    assert changed_versions(None).count(" ? to ") == len(now)


@pytest.mark.parametrize(("changed", "notes"), [({}, 0), ({"jaxlib": "0.0.1"}, 1)])
def test_a_resumed_run_says_which_versions_have_changed(tmp_path, monkeypatch, changed, notes):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    state, groups = tiny.random_state()
    tokenizer, said = tiny.tokenizer(), []
    saver = Saver(tmp_path / "chatsft_checkpoints" / "mine", keep=9)
    recorded = {"tokenizer": tokenizer.digest(), "versions": store.versions() | changed}
    saver.save(3, train.state_items(state), lambda: tiny.meta(groups, step=3, **recorded))
    saver.wait()
    assert find_run(SFTConfig(resume="run"), "sft", "mine", tokenizer, said.append).first_step == 3
    found = [line for line in said if "jaxlib" in line]
    assert len(found) == notes and all(
        line.startswith("NOTE: since then versions have changed (jaxlib 0.0.1 to ") for line in found
    )


@pytest.mark.parametrize(
    ("done", "recorded", "total", "expected"),
    [
        (4, [[0, 10]], 10, [[0, 10]]),
        (10, [[0, 10]], 15, [[0, 10], [10, 15]]),
        (5, [[0, 10]], 20, [[0, 5], [5, 20]]),  # rates have not begun to fall
        (10, [[0, 10], [10, 20]], 30, [[0, 10], [10, 30]]),  # nothing of the second one is done
        (20, [[0, 10], [10, 20]], 30, [[0, 10], [10, 20], [20, 30]]),
        (6, [[0, 10]], 20, "before step 5, from which its rates fall, or when it has ended, at step 10"),
        (16, [[0, 10], [10, 20]], 30, "before step 15, from which its rates fall, or when it has ended, at step 20"),
        (10, [[0, 10]], 8, "has 10 of 10 steps and cannot be made one of 8"),
    ],
)
def test_a_run_is_made_longer_where_its_rates_have_not_begun_to_fall_or_it_has_ended(done, recorded, total, expected):
    start = Start(None, Path("mine"), "", record={"step": done, "total_steps": recorded[-1][1], "stretches": recorded})
    if isinstance(expected, list):
        found = start.stretches(total, lambda first, last: (first + last) // 2, "num_iterations", str)
        assert found == expected
    else:
        with pytest.raises(ValueError, match=expected):
            start.stretches(total, lambda first, last: (first + last) // 2, "num_iterations", str)
