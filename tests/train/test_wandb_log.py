"""A run's page in wandb, read back from the files that wandb writes where it is offline."""

import json

import pytest

from nanochat_jax.train import wandb_log
from nanochat_jax.train.metrics import MetricsLog, read_metrics
from tests.support import wandb_files


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def opened(folder, resumed_at=None, run="named", config=None):
    return MetricsLog(folder, run, config or {}, project="test", resumed_at=resumed_at)


def written(folder):
    """wandb's files of a run, when wandb is done with them."""
    import wandb

    wandb.teardown()
    return wandb_files.files(folder)


def steps(log, numbers):
    for step in numbers:
        log.log(step, loss=1 / step, trained_tokens=10, seconds=2.0)


def test_texts_and_the_accuracies_of_tasks_are_tables_at_each_measurement(tmp_path):
    with opened(tmp_path) as log:
        steps(log, [1])
        log.log(1, samples=["one", "two"], measured="samples")
        log.log(1, **{"chatcore": 0.1, "chatcore/GSM8K": 0.2, "chatcore/MMLU": 0.3}, measured="ChatCORE")
        steps(log, [2])
        log.log(2, samples=["three"], measured="samples")
    (file,) = written(tmp_path)
    tasks = [{"step": 1, "task": "GSM8K", "accuracy": 0.2}, {"step": 1, "task": "MMLU", "accuracy": 0.3}]
    assert sorted(wandb_files.tables(file), key=str) == [
        ("chatcore/tasks", tasks),
        ("samples", [{"step": 1, "text": "one"}, {"step": 1, "text": "two"}]),
        ("samples", [{"step": 2, "text": "three"}]),
    ]
    assert wandb_files.history(file)[0]["chatcore/GSM8K"] == 0.2  # for the curve


def test_of_the_tables_between_two_checkpoints_the_newest_is_kept_and_a_long_one_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log, "TABLE_ROWS", 2)
    with opened(tmp_path) as log:
        for step in (1, 2, 3):
            steps(log, [step])
            log.table(step, "rollouts", [{"step": step, "answer": text} for text in ("a", "b", "c")])
            if step == 2:
                log.sync()
    (file,) = written(tmp_path)
    assert wandb_files.tables(file) == [("rollouts", [{"step": 2, "answer": "a"}, {"step": 2, "answer": "b"}])]


def test_the_summary_has_the_best_and_the_last_of_what_matters_with_its_cost(tmp_path):
    with opened(tmp_path, config={"matrix_lr": 0.5, "seed": 7}) as log:
        for step, val_bpb in ((1, 3.0), (2, 2.0), (3, 2.5)):
            steps(log, [step])
            log.log(step, val_bpb=val_bpb, **{"pass@1": val_bpb / 10}, measured="validation")
        log.log(3, val_bpb=float("nan"))
        log.saved(tmp_path / "2")
        log.saved(tmp_path / "3")
    (file,) = written(tmp_path)
    found = wandb_files.summary(file)

    def of(name):
        return [found[f"{name}{key}"] for key in ("", "_step", "_tokens", "_seconds")]

    assert (of("val_bpb/best"), of("val_bpb/last")) == ([2.0, 2, 20, 4.0], [2.5, 3, 30, 6.0])
    assert (of("pass@1/best"), of("pass@1/last")) == ([0.3, 1, 10, 2.0], [0.25, 3, 30, 6.0])
    assert found["checkpoint"] == str(tmp_path / "3")
    assert wandb_files.config(file) == {"matrix_lr": 0.5, "seed": 7}


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb_and_sends_no_step_twice(tmp_path):
    log = opened(tmp_path)
    steps(log, range(1, 5))
    log.log(4, val_bpb=2.0, measured="validation")
    steps(log, range(5, 8))
    log.table(7, "rollouts", [{"step": 7}])
    log.sync()
    log.close()
    with opened(tmp_path, resumed_at=4) as log:  # killed after step 7, with a checkpoint of step 4; and again after 6
        steps(log, range(5, 7))
    with opened(tmp_path, resumed_at=4) as log:
        steps(log, range(5, 8))
        log.table(7, "rollouts", [{"step": 7}])
        log.sync()
        log.log(7, val_bpb=1.5, measured="validation")  # which the first process did not come to
        steps(log, [8])
        log.log(8, val_bpb=1.75, measured="validation")
    first, second, third = written(tmp_path)
    assert first.name == second.name == third.name  # run-<id>.wandb
    sent = [row for file in (first, second, third) for row in wandb_files.history(file)]
    assert [row["step"] for row in sent] == [*range(1, 9)]
    assert [row.get("val_bpb") for row in sent] == [None, None, None, 2.0, None, None, None, 1.75]
    assert [len(wandb_files.tables(file)) for file in (first, second, third)] == [1, 0, 0]
    found = wandb_files.summary(third)
    assert (found["val_bpb/best"], found["val_bpb/best_step"], found["val_bpb/best_tokens"]) == (1.5, 7, 70)
    assert len(wandb_files.history(second)) == 0


def test_a_measurement_that_a_killed_process_did_not_end_comes_with_the_next_row(tmp_path):
    with opened(tmp_path) as log:
        steps(log, [1, 2])
    with opened(tmp_path, resumed_at=2) as log:
        log.log(2, val_bpb=2.0, measured="validation")
        steps(log, [3])
    with opened(tmp_path, resumed_at=3) as log:  # the last step of the run
        log.log(3, val_bpb=1.5, measured="validation")
    rows = [wandb_files.history(file) for file in written(tmp_path)]
    assert [[(r["step"], r.get("val_bpb")) for r in part] for part in rows] == [
        [(1, None), (2, None)],
        [(3, 2.0)],
        [(3, 1.5)],
    ]


def test_a_run_that_is_named_when_it_is_resumed_has_its_history_from_the_first_step(tmp_path):
    with opened(tmp_path, run="dummy") as log:
        steps(log, range(1, 5))
    with opened(tmp_path, resumed_at=3) as log:
        steps(log, [4])
    (file,) = written(tmp_path)
    assert [row["step"] for row in wandb_files.history(file)] == [1, 2, 3, 4]


def test_a_run_that_begins_anew_in_the_folder_is_another_run_of_wandb(tmp_path):
    for _ in range(2):
        with opened(tmp_path) as log:
            steps(log, [1, 2])
    one, other = written(tmp_path)
    assert one.name != other.name
    assert wandb_files.history(one) == wandb_files.history(other)


def test_records_of_another_name_or_without_wandb_were_not_sent():
    def named(run, step=0, **more):
        return {"step": step, "event": "wandb", "id": f"{run}-0123abcd", **more}

    records = [named("a"), {"step": 1}, named("b", 1), {"step": 2}, named("a", 2, sent=5), {"step": 3, "measured": "m"}]
    assert wandb_log.sent_before(records, "a") == ("a-0123abcd", 5, {(1, None), (3, "m")})
    assert wandb_log.sent_before(records, "b") == ("b-0123abcd", 2, {(2, None)})
    assert wandb_log.sent_before(records, "c") == (None, -1, set())


def test_wandb_that_fails_in_the_middle_ends_no_run(tmp_path, capsys, monkeypatch):
    import wandb

    class Full:
        def __init__(self):
            self.summary = {}

        def define_metric(self, *names, **more):
            pass

        def log(self, row, step):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", lambda **names: Full())
    with opened(tmp_path) as log:
        steps(log, [1, 2])
        log.saved(tmp_path / "2")
    said = capsys.readouterr().out
    assert said.count("WARNING: wandb has failed and gets no more of this run") == 1 and "No space left" in said
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r] == [1, 2]


def test_metrics_jsonl_names_the_run_of_wandb(tmp_path):
    with opened(tmp_path / "stage" / "tag", run="a run/one") as log:
        run = log.wandb.id
    start, named = map(json.loads, (tmp_path / "stage" / "tag" / "metrics.jsonl").read_text().splitlines())
    assert start["event"] == "start" and (named["event"], named["id"], named["sent"]) == ("wandb", run, -1)
    assert run.startswith("stage-tag-a-run-one-")
