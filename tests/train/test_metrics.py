"""What a run measured: averages, metrics.jsonl through kills and resumes, the console, and the same in wandb."""

import json
import math
import os
import pty
import subprocess
import sys

import pytest

from nanochat_jax.train.metrics import MetricsLog, Reporter, SmoothedAverage, read_metrics
from tests.support import wandb_files


def opened(folder, resumed_at=None, run="dummy"):
    return MetricsLog(folder, run, {"seed": 1}, project="test", resumed_at=resumed_at)


def logged(folder, steps, resumed_at=None):
    log = opened(folder, resumed_at)
    for step in steps:
        log.log(step, loss=step / 2)
    log.close()


def test_the_smoothed_loss_is_the_loss_at_step_1_and_weighs_later_ones_as_it_says():
    smoothed = SmoothedAverage()
    assert smoothed.update(4.0) == 4.0
    assert smoothed.update(2.0) == pytest.approx((0.9 * 4 + 2) / 1.9)
    for _ in range(500):
        last = smoothed.update(3.0)
    assert last == pytest.approx(3.0, abs=1e-9)


def test_a_loss_that_is_not_finite_leaves_the_average_as_it_was():
    smoothed = SmoothedAverage()
    assert math.isnan(smoothed.update(math.nan))
    assert smoothed.update(2.0) == 2.0
    assert smoothed.update(math.inf) == 2.0


def test_an_average_that_is_restored_goes_on_as_if_it_had_not_stopped():
    whole, first = SmoothedAverage(), SmoothedAverage()
    for loss in (3.0, 2.5, 2.0):
        whole.update(loss), first.update(loss)
    second = SmoothedAverage("loss", *json.loads(json.dumps(first.state())))
    assert second.update(1.0) == whole.update(1.0)


def test_records_come_back_in_order_with_a_time(tmp_path):
    log = opened(tmp_path / "run")
    log.log(1, loss=2.5, note="text")
    log.log(2, loss=1.5)
    log.close()
    one, two = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (one["step"], one["loss"], one["note"], two["loss"]) == (1, 2.5, "text", 1.5)
    assert one["time"] <= two["time"]


def test_a_resumed_run_takes_back_the_steps_after_its_checkpoint(tmp_path):
    logged(tmp_path, range(1, 8))
    logged(tmp_path, [5, 6], resumed_at=4)
    logged(tmp_path, [6, 7], resumed_at=5)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_new_run_in_the_same_folder_takes_back_everything_but_deletes_nothing(tmp_path):
    logged(tmp_path, [0, 1, 2])
    logged(tmp_path, [0, 1])
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


def test_a_line_that_a_kill_cut_off_is_left_out_and_the_next_one_is_whole(tmp_path):
    logged(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "lo')
    logged(tmp_path, [3], resumed_at=2)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_numbers_that_json_does_not_have_are_written_as_null(tmp_path):
    log = opened(tmp_path)
    log.log(1, loss=math.nan, grad_norm=math.inf, mfu=0.5, nested={"a": [math.nan, 2.0]})
    log.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = [json.loads(line, parse_constant=refuse) for line in lines][-1]
    assert (record["loss"], record["grad_norm"], record["mfu"]) == (None, None, 0.5)
    assert record["nested"] == {"a": [None, 2.0]}


def test_a_record_is_in_the_file_at_once(tmp_path):
    log = opened(tmp_path)
    log.log(1, loss=1.0)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0
    log.close()


def test_wandb_offline_gets_the_same_numbers(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = opened(tmp_path / "tag", run="a run: with/odd#characters")
    for step in (1, 2, 3):
        log.log(step, loss=1 / step, skipped=0, event="text stays here")
    log.close()
    wandb.teardown()  # as at a program's exit: the process that writes wandb's file is done with it only then
    recorded = [r for r in read_metrics(tmp_path / "tag" / "metrics.jsonl") if "loss" in r]
    (file,) = wandb_files.files(tmp_path / "tag")
    assert wandb_files.history(file) == [
        {"step": r["step"], "loss": r["loss"], "skipped": r["skipped"]} for r in recorded
    ]


def test_wandb_that_cannot_start_is_one_sentence(tmp_path, monkeypatch):
    import wandb

    def fail(**_):
        raise wandb.errors.UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(ValueError, match=r"wandb cannot start: no API key configured; set WANDB_MODE=offline"):
        opened(tmp_path, run="named")


def test_without_a_terminal_the_console_has_plain_lines(capsys):
    reporter = Reporter(20)
    reporter.step(3, "loss 1.0")
    reporter.say("val [bold] 2")
    reporter.close()
    assert capsys.readouterr().out == "step 00003/00020 | loss 1.0\nval [bold] 2\n"


def test_on_a_terminal_there_is_a_bar_with_the_time_left():
    program = """
import time
from nanochat_jax.train.metrics import Reporter
reporter = Reporter(4)
for step in (1, 2):
    reporter.step(step, f"loss {step}.5 [x]")
    time.sleep(0.3)
reporter.say("a line [that] stays")
time.sleep(0.2)
reporter.close()
"""
    main, terminal = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", program], stdout=terminal, stderr=terminal, env=env) as process:
        os.close(terminal)
        output = b""
        try:
            while chunk := os.read(main, 4096):
                output += chunk
        except OSError:  # the other end is closed
            pass
    os.close(main)
    text = output.decode()
    assert process.returncode == 0, text
    assert "2/4" in text and "loss 2.5 [x]" in text and "ETA" in text and "a line [that] stays" in text
    assert "step 0000" not in text


def test_lines_that_are_no_record_of_a_step_are_skipped(tmp_path):
    bad = [
        b"[]",
        b"5",
        b'{"loss": 1}',
        b'{"step": "1"}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1%s}' % (b"0" * 400),
        b'{"event": "resume"}',
        b"\xff",
        b"[" * 10**5,
    ]
    (tmp_path / "m.jsonl").write_bytes(b"\n".join([b'{"step": 1}', *bad, b'{"step": 2}']))
    said = []
    assert read_metrics(tmp_path / "m.jsonl", said.append) == [{"step": 1}, {"step": 2}]
    assert said == [f"{tmp_path / 'm.jsonl'}: {len(bad)} lines are no record of a step"]


@pytest.mark.parametrize(("kept", "told"), [(5, ""), (2, "2 of 5 are there"), (None, "0 of 5 are there")])
def test_a_resumed_run_says_that_records_of_earlier_steps_are_gone(tmp_path, capsys, kept, told):
    if kept is not None:
        (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {k}, "loss": 1.0}}\n' for k in range(1, kept + 1)))
    MetricsLog(tmp_path, "dummy", {}, project="test", resumed_at=5).close()
    said = capsys.readouterr().out
    assert said == (f"NOTE: {tmp_path / 'metrics.jsonl'} has lost records of earlier steps: {told}\n" if told else "")
