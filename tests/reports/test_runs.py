"""What is read from a run's folder, as a killed run, a resumed one or a stranger has left it.

Run: python -m pytest tests/reports/test_runs.py
"""

import json

import pytest

from nanochat_jax.reports.runs import find_runs, last_answers, numbers_of, read_run
from tests.reports.folders import RL, answer, write


def test_runs_are_found_stage_after_stage(tmp_path):
    assert find_runs(tmp_path) == []
    rl = write(tmp_path / "chatrl_checkpoints/d2", RL)
    base = [write(tmp_path / f"base_checkpoints/{tag}", RL) for tag in ("d2", "d4")]
    (tmp_path / "base_checkpoints/imported").mkdir()
    assert find_runs(tmp_path) == [*base, rl]


def test_what_a_resumed_run_took_back_is_not_drawn(tmp_path):
    records = [*RL, {"event": "resume", "step": 2}, {"step": 3, "reward": 0.9}]
    assert read_run(write(tmp_path / "a", records)).numbers["reward"] == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_values_that_are_not_finite_numbers_are_left_out():
    records = [{"step": 1, "mfu": "nan"}, {"step": 2, "mfu": None}, {"step": 3, "mfu": True}, {"step": 4, "mfu": 0.5}]
    assert numbers_of(records)["mfu"] == [(4, 0.5)]


def test_a_number_that_cannot_be_drawn_is_left_out():
    assert numbers_of([{"step": 1, "loss": 10**400}, {"step": 2, "loss": 2.0}])["loss"] == [(2, 2.0)]


def test_of_a_step_that_was_logged_twice_the_later_counts():
    assert numbers_of([{"step": 2, "loss": 3.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0}])["loss"] == [
        *((1, 4.0), (2, 2.0))
    ]


def test_a_log_that_a_kill_cut_off_is_read_as_far_as_it_goes(tmp_path):
    folder = write(tmp_path / "a/b", RL, [answer(0, 1.0), answer(1, 0.0)])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 6, "rew')
    run = read_run(folder)
    assert run.numbers["reward"][-1] == (5, 0.5) and len(run.answers) == 2


def test_the_answers_to_the_last_problem_are_sorted_from_the_best_to_the_worst(tmp_path):
    earlier = [answer(i, 1.0, "earlier", step=2) for i in range(4)]
    last = [answer(i, float(i), f"answer {i}") for i in range(3)]
    folder = write(tmp_path / "a", RL, earlier + last)
    assert [record["text"] for record in last_answers(folder / "rollouts.jsonl")] == [
        "answer 2",
        "answer 1",
        "answer 0",
    ]


@pytest.mark.parametrize(
    "change", [{"step": "<script>alert(1)</script>"}, {"reward": "1"}, {"text": None}, {"example": []}]
)
def test_an_answer_of_another_form_is_left_out(tmp_path, change):
    folder, said = write(tmp_path / "a", RL, [answer(0, 1.0), answer(1, 1.0) | change]), []
    assert last_answers(folder / "rollouts.jsonl", said.append) == [answer(0, 1.0)]
    assert said == [f"{folder / 'rollouts.jsonl'}: 1 line is no answer of a rollout"]


def test_of_a_long_file_of_answers_only_the_end_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat_jax.reports.runs.TAIL_BYTES", 2 * len(json.dumps(answer(0, 1.0))))
    folder, said = write(tmp_path / "a", RL, [answer(i, 1.0) for i in range(9)]), []
    assert [record["sample"] for record in last_answers(folder / "rollouts.jsonl", said.append)] == [8]
    assert said == []  # the line that the beginning cuts is no fault
