"""RL that is killed, and the record of its rollouts; tools/check/faults.py is longer."""

import random
import signal
import sys

import pytest

from nanochat_jax import rl
from nanochat_jax.checkpoints import store
from nanochat_jax.checkpoints.saver import Saver
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.settings import recorded_settings
from nanochat_jax.data.packing import PACKING
from nanochat_jax.rollouts.collector import RESAMPLE_ROUNDS
from nanochat_jax.rollouts.log import RolloutLog
from nanochat_jax.rollouts.prompts import PromptStream
from nanochat_jax.tasks import Task, load_task
from nanochat_jax.train import step as train
from tests.support import tiny
from tests.support.commands import run_command
from tools.check import kill_resume

STEPS = 8


def test_a_run_that_is_killed_at_a_random_moment_ends_bit_identical(base):
    flags = [*kill_resume.RL_FLAGS, "--num-steps", str(STEPS), "--save-every", "2", "--device-batch-size", "1"]
    alone, killed = (kill_resume.Run("rl", tag, base, 1, flags) for tag in ("alone", "killed"))
    alone.to_end("--save-every", "-1")
    case = kill_resume.train_killed(killed, signal.SIGKILL, 1, STEPS, random.Random(0))
    assert case["exit_codes"] == [-signal.SIGKILL]
    found = kill_resume.difference(killed.folder, alone.folder, STEPS)
    assert found.pop("arrays_compared") > 40
    assert found == {"arrays_that_differ": [], "steps_whose_loss_differs": [], "rollouts_differ": False}


SOURCE = """
from nanochat_jax.tasks import Task


class Words(Task):
    def num_examples(self):
        return 40

    def get_example(self, index):
        return {"messages": [{"role": "user", "content": f"say {index}"}, {"role": "assistant", "content": "a"}]}

    def reward(self, conversation, answer):
        return sum(c < "n" for c in answer) / max(1, len(answer))

    def fingerprint(self):
        return self.fingerprint_of()  # of this file
"""
EDITS = {  # what is edited -> does the run go on
    "a comment": (SOURCE + "# a comment\n", True),
    "the reward": (SOURCE.replace('"n"', '"m"'), True),
    "a prompt": (SOURCE.replace("say {index}", "say {index + (index == 9)}"), False),
    "the order": (SOURCE.replace("say {index}", "say {index ^ 1}"), False),
    "the name": (SOURCE + "    name = 'Others'\n", False),
}


def words_of(folder, source, monkeypatch) -> Task:
    """The task of a module in the folder, written anew."""
    (folder / "edited_words.py").write_text(source)
    monkeypatch.delitem(sys.modules, "edited_words", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # else a file of equal size and second is not read again
    monkeypatch.syspath_prepend(str(folder))
    return load_task("edited_words:Words")


@pytest.mark.parametrize("edit", EDITS)
def test_what_rl_compares_are_the_prompts_in_their_order_and_not_the_source(tmp_path, monkeypatch, edit):
    source, goes_on = EDITS[edit]
    prints, sources = [], []
    for text in (SOURCE, source):
        task = words_of(tmp_path, text, monkeypatch)
        prints.append(PromptStream(task, tiny.tokenizer(), 0, 100).fingerprint())
        sources.append(task.fingerprint())
    assert sources[0] != sources[1] and (prints[0] == prints[1]) == goes_on


def test_a_run_goes_on_when_its_tasks_source_is_edited_and_not_with_other_prompts(in_base, monkeypatch, capsys):
    """The run is a checkpoint that is written here; what comes after the data is not reached."""
    flags = [*kill_resume.RL_FLAGS, "--task", "edited_words:Words", "--num-steps", "2", "--mesh", "data=1"]
    task, tokenizer = words_of(in_base, SOURCE, monkeypatch), tiny.tokenizer()
    data = PromptStream(task, tokenizer, 42, 2 * 4 * RESAMPLE_ROUNDS).fingerprint()
    record = {"step": 1, "data": data, "task_digest": task.fingerprint(), "packing": PACKING}
    record |= {"user_config": recorded_settings(parse(rl.RLConfig, flags)), "versions": store.versions()}
    state, groups = tiny.random_state()
    saver = Saver(in_base / "chatrl_checkpoints" / "edited")
    meta = tiny.meta(groups, tokenizer=tokenizer.digest())
    meta |= record | {"user_config": meta["user_config"] | record["user_config"]}
    saver.save(1, train.state_items(state), lambda: meta)
    saver.wait()

    def reached(*_):
        raise ValueError("the data is accepted")

    monkeypatch.setattr(rl, "initial_state", reached)
    for edit, end, note in (("a comment", "accepted", True), ("a prompt", "has changed since step 1", False)):
        words_of(in_base, EDITS[edit][0], monkeypatch)
        capsys.readouterr()
        assert end in run_command(rl.main, rl.RLConfig, "--resume", "--output-tag", "edited")
        said = "NOTE: the data or the source of Words has changed since step 1; its prompts are the same"
        assert (said in capsys.readouterr().out) == note


def test_what_a_killed_run_was_at_is_told_by_its_files(tmp_path):
    assert kill_resume.work_in(tmp_path) == "a step"
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    (tmp_path / "rollouts.jsonl").write_text('{"step": 2}\n{"st')  # a line that is not whole yet
    assert kill_resume.work_in(tmp_path) == "rollouts"
    (tmp_path / "rollouts.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    assert kill_resume.work_in(tmp_path) == "an update"
    (tmp_path / "2").mkdir()
    assert kill_resume.work_in(tmp_path) == "a save"
    (tmp_path / "2" / "INTEGRITY.json").touch()
    assert kill_resume.work_in(tmp_path) == "an update"


def test_a_log_is_cut_back_to_the_size_that_was_recorded(tmp_path):
    log = RolloutLog(tmp_path)
    log._file.write(b"one\n")
    size = log.saved()
    log._file.write(b"two\n")
    log.close()
    log = RolloutLog(tmp_path, size)
    log._file.write(b"three\n")
    assert log.saved() == 10
    log.close()
    assert (tmp_path / "rollouts.jsonl").read_bytes() == b"one\nthree\n"
    log = RolloutLog(tmp_path)  # of a new run
    assert log.saved() == 0
    log.close()
    assert (tmp_path / "rollouts.jsonl").read_bytes() == b""


@pytest.mark.parametrize(("left", "expected"), [(b"one\ntwo\n", b"one\ntwo\n"), (b"one\ntw", b"one\ntw\n"), (b"", b"")])
def test_a_log_that_has_lost_its_end_says_so_and_goes_on_with_a_line_of_its_own(tmp_path, capsys, left, expected):
    (tmp_path / "rollouts.jsonl").write_bytes(left)
    log = RolloutLog(tmp_path, 100)
    log._file.write(b"three\n")
    log.close()
    assert (tmp_path / "rollouts.jsonl").read_bytes() == expected + b"three\n"
    assert f"has lost answers of earlier steps: {len(left)} of 100 bytes" in capsys.readouterr().out
