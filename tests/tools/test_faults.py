"""The attack on the program in its short form, and that the attack itself can fail."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import damage
import faults
import kill_resume
import numpy as np
import pytest
from limited import Worker, is_sentence

from nanochat_jax.checkpoints import store
from tests.support import stub_cases

ROOT = Path(__file__).parents[2]


def test_whatever_is_done_to_it_the_program_ends_well_or_with_a_sentence():
    """Killed runs, damaged files, a full disk, hostile inputs and tasks: the same ones each time."""
    command = [sys.executable, str(ROOT / "tools/check/faults.py"), "--short"]
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    records = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"category"')]
    assert [record for record in records if record["fault"]] == [], ran.stdout[-3000:]
    assert ran.returncode == 0, ran.stderr
    counts = {name: sum(record["category"] == name for record in records) for name in faults.SHORT}
    assert counts == faults.SHORT | {"kills": len(faults.SHORT_STORMS)}
    assert f"{len(records)} cases, seed 0" in ran.stdout.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# What each of these does must be found


@pytest.fixture(scope="module")
def worker():
    worker = Worker({}, module="tests.support.stub_cases")
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("attacked", "how"),
    [
        (stub_cases.end_well, "well"),
        (stub_cases.refuse, "refused"),
        (stub_cases.raise_something, "traceback"),
        (stub_cases.say_nothing, "no sentence"),
    ],
)
def test_how_a_case_ends_is_told(worker, attacked, how):
    ended = worker.run(attacked, None, 30)
    assert ended.how == how
    assert ("said" in ended.said) == (attacked is stub_cases.end_well) and ended.result == (
        "result" if how == "well" else None
    )
    assert ("Traceback" in ended.said) == (how == "traceback")


def test_memory_beyond_the_limit_is_told_and_little_memory_is_not(worker):
    assert worker.run(stub_cases.take_memory, 200 << 20, 30, memory=100 << 20).how == "memory"
    assert worker.run(stub_cases.take_memory, 10 << 20, 30, memory=100 << 20).how == "well"
    assert worker.run(stub_cases.take_memory, 64 << 30, 30).how == "memory"


def test_a_case_that_hangs_or_kills_its_process_is_told_and_the_next_one_runs(worker):
    assert worker.run(stub_cases.hang, None, 0.2).how == "hang"
    ended = worker.run(stub_cases.die, None, 30)
    assert ended.how == "died" and "the process ended with -6" in ended.said
    assert worker.run(stub_cases.end_well, None, 30).how == "well"


def test_a_sentence_is_no_traceback_no_page_and_no_bare_class():
    assert is_sentence("error: --seed must be at least 0, got -1")
    for told in (
        "error: ",
        "error: 'step'",
        "error: KeyError: 'step' is not",
        "Traceback (most recent call last)",
        "a b " * 2000,
    ):
        assert not is_sentence(told)


def test_a_changed_array_a_lost_step_and_a_changed_answer_are_differences(base, tmp_path):
    alone, other = tmp_path / "alone", tmp_path / "other"
    for folder in (alone, other):
        shutil.copytree(base / "base_checkpoints" / "d2", folder)
        (folder / "metrics.jsonl").write_text('{"step": 6, "loss": 1.5}\n{"step": 7, "loss": 1.25}\n')
        (folder / "rollouts.jsonl").write_text('{"step": 7}\n')
    found = kill_resume.difference(alone, other, 7)
    assert found["arrays_compared"] > 40 and not any(found[name] for name in kill_resume.RESULTS)
    params, optimizer = (store.read_arrays(other / "7", item) for item in ("params", "optimizer"))
    name = "blocks/0/attn/c_q"
    params[name].view(np.uint32)[0, 0] ^= 1  # the last bit of one number
    store.write(other / "7", params, optimizer, {"step": 7})
    (other / "metrics.jsonl").write_text('{"step": 7, "loss": 1.25}\n')
    (other / "rollouts.jsonl").write_text('{"step": 8}\n')
    found = kill_resume.difference(alone, other, 7)
    assert [found[name] for name in kill_resume.RESULTS] == [[f"params/{name}"], [6], True]


def test_a_result_that_nobody_warned_of_is_a_fault():
    told = "WARNING: checkpoint /d2/9 is damaged and is passed over"
    for reader, result, said, expected in (
        (damage.resume_sft, "same", "", "same"),
        (damage.resume_sft, "other", "", "another result without a word"),
        (damage.resume_sft, "other", told, "another result without a word"),  # it must end as if nothing had happened
        (damage.load_ours, "other", told, "passed over"),
        (damage.load_ours, "other", "", "another result without a word"),
        (damage.draw_report, "other", "", "other"),
    ):
        verdict = damage.verdict("well", reader, result, "same", said)
        assert verdict == expected
        assert faults.Case("damages", 0, "", "", verdict, 0.0).is_fault == ("without a word" in expected)
    assert damage.verdict("hang", damage.draw_report, None, "same", "") == "hang"


@pytest.mark.parametrize(
    ("code", "output", "in_time", "expected"),
    [
        (0, "done", True, "well"),
        (1, "error: a b c", True, "refused"),
        (1, "", True, "exit code 1"),
        (0, "Traceback (most recent call last):", True, "traceback"),
        (None, "", False, "hang"),
        (-11, "", True, "exit code -11"),
    ],
)
def test_how_a_command_ends_is_told(code, output, in_time, expected):
    assert faults.command_verdict(code, output, in_time) == expected


def test_damages_reach_every_reader_and_are_the_same_again(tmp_path):
    names = [f"{start}{name}" for start in damage.READERS for name in ("a", "b")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"0123456789")
    count = len(names) * len(damage.KINDS)
    planned = damage.damages_of(tmp_path, count, random.Random(3))
    assert planned == damage.damages_of(tmp_path, count, random.Random(3))
    assert len({(one.file, one.kind) for one in planned}) == count
    early = planned[: len(damage.READERS)]
    assert {damage.reader_of(one.file) for one in early} == set(damage.READERS)


@pytest.mark.parametrize("kind", damage.KINDS)
def test_a_damage_changes_its_file(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(1, 101)))
    kind(path, random.Random(0))
    assert not path.is_file() or path.read_bytes() != bytes(range(1, 101))


def test_interruptions_are_planned_so_that_signals_meet_moments_and_the_end_comes_last():
    run = kill_resume.Run("sft", "run", Path(), 2, [], 2)
    planned = kill_resume.kills_of(run, 40, 100, random.Random(0))
    assert planned == kill_resume.kills_of(run, 40, 100, random.Random(0))
    assert {kill.number for kill in planned} == set(kill_resume.SIGNALS)
    assert {kill.moment for kill in planned} >= set(kill_resume.MOMENTS["sft"][:-1])
    assert {kill.victims for kill in planned} == {(0,), (1,), (0, 1)}
    assert [kill.step for kill in planned] == sorted(kill.step for kill in planned)


def test_the_table_counts_verdicts_and_names_the_numbers_of_the_faults():
    cases = [faults.Case("damages", i, "", "files", verdict, i, 2 << 20) for i, verdict in enumerate(("same", "hang"))]
    header, row = faults.table(cases).splitlines()
    assert header.split() == ["category", "of", "cases", "verdicts", "slowest", "memory", "faults"]
    assert row.split() == ["damages", "files", "2", "hang", "1,", "same", "1", "1.0", "s", "2", "MiB", "1"]
