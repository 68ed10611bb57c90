"""What of runs is read and not drawn, read back from the page.

Run: python -m pytest tests/reports/test_tables.py
"""

import dataclasses
import json
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from nanochat_jax import base, rl, sft
from nanochat_jax.checkpoints import store
from nanochat_jax.eval import make_record
from nanochat_jax.evals.eval_set import EvalSet
from nanochat_jax.evals.evaluator import EvalResult
from nanochat_jax.reports.page import page
from nanochat_jax.reports.runs import read_evaluations, read_run, read_settings
from nanochat_jax.reports.tables import NOT_COMPARED, plain
from tests.reports.folders import RL, Elements, answer, checkpoint, result, write


def table(shown, beginning):
    """The rows of the first table after a text of the page, each a list of its cells' texts."""
    found = re.search(r"<table>(.*?)</table>", shown.partition(beginning)[2])
    root = ET.fromstring(f"<t>{found[1]}</t>")
    return [[" ".join(part.strip() for part in cell.itertext()).strip() for cell in row] for row in root]


# ---- settings


def test_only_settings_that_differ_within_a_stage_are_shown_and_runs_without_a_checkpoint_have_dashes(tmp_path):
    for tag, rate in (("a", 0.02), ("b", 0.04)):
        checkpoint(write(tmp_path / f"chatrl_checkpoints/{tag}", RL), 3, matrix_lr=rate, seed=42, run=tag, task="gsm8k")
    write(tmp_path / "chatrl_checkpoints/c", RL)
    other_stage = write(tmp_path / "chatsft_checkpoints/a", RL)
    checkpoint(other_stage, 3, matrix_lr=0.9, seed=7)
    shown = page([other_stage, *(tmp_path / f"chatrl_checkpoints/{tag}" for tag in "abc")])
    assert shown.count("Settings that differ") == 1
    assert table(shown, "Settings that differ") == [["", "a", "b", "c"], ["matrix lr", "0.02", "0.04", "–"]]


def test_runs_with_the_same_settings_have_no_table(tmp_path):
    folders = [write(tmp_path / tag, RL) for tag in "ab"]
    for folder in folders:
        checkpoint(folder, 3, matrix_lr=0.02, data_dir=f"/home/{folder.name}/data")
    assert "Settings that differ" not in page(folders)


def test_the_newest_checkpoint_counts_that_is_whole_and_can_be_read(tmp_path):
    for step in (5, 10, 9):
        checkpoint(tmp_path, step, seed=step)
    assert read_settings(tmp_path) == {"seed": 10}
    (tmp_path / "10/meta/data.json").write_text("[")
    said = []
    assert read_settings(tmp_path, said.append) == {"seed": 9}
    assert said == [f"{tmp_path / '10/meta/data.json'}: no settings of a run"]
    (tmp_path / "9/INTEGRITY.json").unlink()  # a save that was killed
    assert read_settings(tmp_path) == {"seed": 5}
    (tmp_path / "5/meta/data.json").unlink()
    assert read_settings(tmp_path) == {}


def test_settings_that_are_not_compared_are_settings_of_a_stage():
    fields = {
        field.name for stage in (base.BaseConfig, sft.SFTConfig, rl.RLConfig) for field in dataclasses.fields(stage)
    }
    assert fields >= NOT_COMPARED


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not set"),
        (True, "true"),
        (0.02, "0.02"),
        ("gsm8k", "gsm8k"),
        ("/home/me/chats.jsonl", "chats.jsonl"),
        (["/a/b.jsonl", "/c/d.jsonl"], "b.jsonl, d.jsonl"),
        ({"a": 1}, '{"a": 1}'),
        ("x" * 100, "x" * 79 + "…"),
    ],
)
def test_a_setting_is_shown_as_a_short_text(value, text):
    assert plain(value) == text


def test_what_a_checkpoint_of_a_run_records_is_read(tmp_path):
    """The place and the form of the file are Orbax's: this fails if they change."""
    store.write(tmp_path / "3", {"w": np.zeros(1)}, None, {"user_config": {"seed": 5}})
    assert read_settings(tmp_path) == {"seed": 5}


# ---- results of eval


def test_results_of_eval_are_a_table_of_tasks_and_steps(tmp_path):
    folder = write(tmp_path / "a", RL)
    (folder / "second.json").write_text(json.dumps(result(20, GSM8K=0.5)))
    (folder / "z.json").write_text(json.dumps(result(10, GSM8K=0.25, MMLU=0.75) | {"chatcore": None}))
    sampled = result(20, GSM8K=0.55) | {"sampling": {"samples": 8, "temperature": 0.7}}
    (folder / "third.json").write_text(json.dumps(sampled))
    assert table(page([folder]), "right answers, with 95 % intervals") == [
        ["", "step 10 z.json", "step 20 second.json", "step 20 third.json 8 answers at temperature 0.7"],
        ["GSM8K", *(f"{v}.0 % {v - 5}.0 to {v + 5}.0, of 400" for v in (25, 50, 55))],
        ["MMLU", "75.0 % 70.0 to 80.0, of 400", "–", "–"],
        ["ChatCORE", "–", "0.2500", "0.2500"],
    ]


def test_of_a_step_the_newest_result_is_last(tmp_path):
    for name, when in (("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", "no time")):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(1, A=0.5) | {"time": when}))
    (tmp_path / "e.json").write_text(json.dumps(result(0, A=0.5) | {"time": 9.0}))
    assert [one.file[0] for one in read_evaluations(tmp_path)] == ["e", "d", "b", "c", "a"]


def test_results_of_a_run_that_was_deleted_are_not_those_of_the_next_one_in_its_folder(tmp_path):
    run = write(tmp_path / "run", [{"step": 1, "loss": 1.0, "time": 100.0}, {"step": 2, "loss": 1.0, "time": 101.0}])
    for name, when in (("old", {"time": 99.0}), ("new", {"time": 102.0}), ("without a time", {})):
        (run / f"{name}.json").write_text(json.dumps(result(2, A=0.5) | when))
    assert {one.file for one in read_run(run).evaluations} == {"new.json", "without a time.json"}


@pytest.mark.parametrize("change", [{"step": "1"}, {"tasks": []}, {"tasks": {"A": {"accuracy": 1}}}, {"tasks": None}])
def test_files_of_another_form_are_left_out_and_named(tmp_path, change):
    (tmp_path / "good.json").write_text(json.dumps(result(1, A=0.5)))
    (tmp_path / "other.json").write_text(json.dumps(result(1, A=0.5) | change))
    (tmp_path / "cut.json").write_text('{"step": 1, "tas')
    (tmp_path / "folder.json").mkdir()
    said = []
    assert [one.file for one in read_evaluations(tmp_path, said.append)] == ["good.json"]
    assert said == [
        f"{tmp_path / 'cut.json'}: no result of eval",
        f"{tmp_path / 'folder.json'}: Is a directory",
        f"{tmp_path / 'other.json'}: no result of eval",
    ]


def test_what_eval_writes_has_the_form_that_is_read(tmp_path):
    eval_set = EvalSet("A", None, [{}], [[1]], None)
    record = make_record(eval_set, EvalResult(np.array([[True]])), 1.0)
    (tmp_path / "a.json").write_text(json.dumps({"step": 3, "tasks": {"A": record}}))
    assert [one.tasks["A"]["problems"] for one in read_evaluations(tmp_path)] == [1]


# ---- texts


def test_samples_of_a_base_model_are_shown_from_the_last_step_on(tmp_path):
    samples = [{"step": step, "samples": [f"One, two at {step}", "<b>"]} for step in (10, 20)]
    found = Elements(page([write(tmp_path / "a", [*RL, *samples, {"step": 30, "samples": [1]}])]))
    assert "samples, the last at step 20" in found.texts and found.count("b") == 0
    assert [text for text in found.texts if text.startswith("One, two")] == [
        "One, two at 20\n<b>",
        "One, two at 10\n<b>",
    ]


def test_the_best_and_the_worst_answers_to_the_last_problem_are_shown(tmp_path):
    last = [answer(i, float(i), f"answer {i}") for i in range(10)]
    found = Elements(page([write(tmp_path / "a/b", RL, last)]))
    shown = [text.strip() for text in found.texts if text.startswith("answer")]
    assert shown == ["answer 9", "answer 6", "answer 3", "answer 0"]
    assert "step 3: 4 of 10 answers to one problem" in found.texts
