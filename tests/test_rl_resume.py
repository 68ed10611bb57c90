"""RL that is killed, and the record of its rollouts; tools/check/faults.py is longer."""

import random
import signal

import pytest

from nanochat_jax.rollouts.log import RolloutLog
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
