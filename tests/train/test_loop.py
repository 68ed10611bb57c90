"""The life of a run's steps around a train step that is made up: what is logged, measured, saved, skipped, and when it
stops."""

import contextlib
import os
import signal
import time

import jax
import numpy as np
import pytest

from nanochat_jax.checkpoints.ownership import FolderLost
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.signals import FailedTogether
from nanochat_jax.train.loop import (
    MAX_BAD_STEPS,
    Run,
    exit_code,
    to_its_end,
)
from nanochat_jax.train.measurement import Measurement, take
from nanochat_jax.train.memory import explaining_memory
from nanochat_jax.train.metrics import MetricsLog, Reporter, SmoothedAverage, Throughput, read_metrics
from nanochat_jax.train.row_stages import throughput_line
from nanochat_jax.train.step import StepMetrics, TrainState


class FakeSaver:
    def __init__(self, folder):
        self.folder, self.best = folder, None
        self.saved, self.metas, self.measured, self.waited = [], {}, {}, 0
        self.sealed = 0

    def glance(self):
        pass

    def failure(self, wait=False):
        return ""

    def due(self):
        return False

    def save(self, step, items, make_meta):
        meta = make_meta()
        assert set(items) == {"params", "optimizer"} and float(items["params"]["w"]) == step
        self.saved.append(step)
        self.sealed = step
        self.metas[step] = meta

    def add_to_meta(self, step, numbers):
        self.measured[step] = dict(numbers)

    def close(self):
        self.waited += 1

    def newest(self):
        return f"the last good checkpoint is {self.folder / str(self.saved[-1])}" if self.saved else "there is none"


class Training:
    """A loop over `total` steps. losses: step (from 1) -> loss, default 1; on_step(k) is called inside step k,
    on_batch(k) before it."""

    def __init__(
        self,
        folder,
        total=10,
        *,
        losses=None,
        on_step=str,
        on_batch=str,
        start=0,
        bad_steps=0,
        eval_every=-1,
        others=(),
        **fields,
    ):
        self.saver, self.evaluated, self.seen, self.folder = FakeSaver(folder), [], [], folder
        self.losses, self.on_step, self.on_batch, self.total = losses or {}, on_step, on_batch, total
        self.log = MetricsLog(folder, "dummy", {}, project="test", resumed_at=start or None)
        self.run = Run(
            TrainState(np.int32(start), {"w": np.float32(start)}, NO_OPTIMIZER, np.int32(bad_steps)),
            total=total,
            measurements=[Measurement("eval", eval_every, self.evaluate, at_start=True), *others],
            saver=self.saver,
            record=lambda step: {"rows": 2 * step},
            log=self.log,
            reporter=Reporter(total, start),
            console=throughput_line,
            average=SmoothedAverage(),
            throughput=Throughput(1000, 10, 1e6),
            measured=self.log.measured_at(start),
            **({"save_every": -1, "save_patience": 0.0} | fields),
        )

    def train_step(self, state, batch, multiplier):
        k = int(state.step) + 1
        self.seen.append((k, batch, multiplier))
        self.on_step(k)
        loss = self.losses.get(k, 1.0)
        ok = np.isfinite(loss)
        metrics = StepMetrics(loss, None, 2.0, 5.0 if loss else 0.0, float(ok))
        params = {"w": np.float32(k)}
        return TrainState(np.int32(k), params, NO_OPTIMIZER, np.int32(0 if ok else state.bad_steps + 1)), metrics

    def evaluate(self, params, progress):
        self.evaluated.append(len(self.seen))
        return {"val_bpb": 1.5}

    def train(self):
        """As a stage does -> the exit code."""
        with to_its_end(self.run):
            for step, state in self.run.steps():
                assert int(state.step) == step
                self.on_batch(step + 1)
                multiplier = 1 - step / self.total
                state, metrics = self.train_step(state, step, multiplier)
                self.run.record(state, metrics, lr_multiplier=multiplier, epoch=1 + (step + 1) // 6)
        return exit_code(self.run)

    def records(self):
        return read_metrics(self.folder / "metrics.jsonl")


@pytest.fixture(autouse=True)
def no_optimizer(monkeypatch):
    monkeypatch.setattr("nanochat_jax.train.step.state_arrays", lambda opt_state: {})


NO_OPTIMIZER = ()


def test_evaluation_and_saving_come_every_so_often_and_at_the_end(tmp_path):
    training = Training(tmp_path, eval_every=4, save_every=3)
    assert training.train() == 0
    assert training.evaluated == [0, 4, 8, 10]
    assert training.saver.saved == [3, 6, 9, 10]
    assert training.saver.waited == 1
    assert training.saver.metas[9] == {
        "step": 9,
        "val_bpb": 1.5,
        "skipped": 0,
        "smoothed_loss": training.saver.metas[9]["smoothed_loss"],
        "rows": 18,
    }
    assert "val_bpb" in training.saver.metas[3] and training.saver.metas[3]["smoothed_loss"] != [0, 0]


def test_measurements_have_their_own_rhythm_and_texts_stay_out_of_the_checkpoint(tmp_path, capsys):
    seen = []

    def samples(params, progress):
        seen.append(len(training.seen))
        return {"samples": ["a b", "[red]c"], "length": 2.0}

    training = Training(
        tmp_path,
        5,
        eval_every=4,
        others=[Measurement("samples", 2, samples), Measurement("never", -1, None)],
        save_every=2,
    )
    training.train()
    assert (training.evaluated, seen) == ([0, 4, 5], [2, 4, 5])  # not before the first step, but at the end
    meta = training.saver.metas[2]
    assert meta["val_bpb"] == 1.5 and "length" not in meta  # measured after the save began, so added to it
    assert training.saver.measured[2] == {"val_bpb": 1.5, "length": 2.0}
    assert [r["step"] for r in training.records() if r.get("samples") == ["a b", "[red]c"]] == [2, 4, 5]
    assert "step 00002 | samples | [red]c" in capsys.readouterr().out.splitlines()


def test_minus_one_means_no_evaluation_and_a_checkpoint_at_the_end_only(tmp_path):
    training = Training(tmp_path)
    training.train()
    assert (training.evaluated, training.saver.saved) == ([], [10])


def test_every_step_takes_its_own_batch_and_rate_and_is_recorded_once(tmp_path, capsys):
    training = Training(tmp_path, 4, losses={1: 4.0, 2: 2.0})
    training.train()
    assert [(k, batch) for k, batch, _ in training.seen] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert [rate for *_, rate in training.seen] == [1.0, 0.75, 0.5, 0.25]
    records = training.records()
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert [r["loss"] for r in records] == [4.0, 2.0, 1.0, 1.0]
    assert records[0]["smoothed_loss"] == 4.0
    first = records[0]
    assert (first["lr_multiplier"], first["percent"], first["epoch"], first["trained_tokens"]) == (1.0, 25.0, 1, 5)
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] * 10 / 1e6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 00001/00004 | loss 4.0000 | lrm 1.000 | ")
    for part in (" tok/s | mfu ", "% | 25.0% | epoch 1"):
        assert part in lines[0]


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(tmp_path, capsys):
    training = Training(tmp_path, losses={3: np.nan, 7: np.inf}, save_every=5)
    assert training.train() == 0
    printed = capsys.readouterr().out.splitlines()
    assert "step 00003/00010 | loss 1.0000" in printed[2]  # the average without it
    lines = [line for line in printed if "WARNING" in line]
    assert len(lines) == 2
    assert (
        "step 3 skipped, its update is not finite (loss nan, gradient norm 2.0); 1 skipped so far, 1 in a row"
        in lines[0]
    )
    assert "step 7 skipped" in lines[1] and "2 skipped so far, 1 in a row" in lines[1]
    events = [r for r in training.records() if r.get("event") == "skipped"]
    assert [(r["step"], r["skipped"]) for r in events] == [(3, 1), (7, 2)]
    assert [training.saver.metas[step]["skipped"] for step in (5, 10)] == [1, 2]
    assert training.saver.metas[10]["smoothed_loss"][0] < 1  # the average has no NaN in it


def test_a_step_without_trained_tokens_does_not_pull_the_shown_loss_to_zero(tmp_path):
    training = Training(tmp_path, losses={3: 0.0, 4: 0.0})
    assert training.train() == 0
    assert [r["loss"] for r in training.records()][2:4] == [0.0, 0.0]
    assert [r["smoothed_loss"] for r in training.records()] == pytest.approx([1.0] * 10)


def test_five_in_a_row_are_borne_and_a_sixth_stops_the_run_with_the_last_good_checkpoint_named(tmp_path):
    bad = dict.fromkeys(range(4, 9), np.nan)
    assert Training(tmp_path / "five", 12, losses=bad).train() == 0
    training = Training(tmp_path / "six", 12, losses=bad | {9: np.nan}, save_every=1)
    with pytest.raises(FloatingPointError) as stop:
        training.train()
    assert str(stop.value).startswith(
        f"{MAX_BAD_STEPS + 1} updates in a row were not finite, the last at step 9: lower"
    )
    assert str(stop.value).endswith(f"the last good checkpoint is {tmp_path}/six/3")
    assert training.saver.saved == [1, 2, 3]  # nothing is saved over the good ones
    assert training.saver.waited


def test_skipped_steps_before_a_resume_count(tmp_path):
    bad = dict.fromkeys(range(6, 9), np.nan)
    with pytest.raises(FloatingPointError, match=r"^6 updates in a row were not finite, the last at step 8"):
        Training(tmp_path, losses=bad, start=5, bad_steps=3, skipped=3).train()


def test_a_resumed_run_goes_on_with_the_next_step_and_does_not_evaluate_first(tmp_path):
    training = Training(tmp_path, start=6, eval_every=8, save_every=3)
    training.train()
    assert [k for k, *_ in training.seen] == [7, 8, 9, 10]
    assert len(training.evaluated) == 2 and training.saver.saved == [9, 10]


def test_a_run_that_is_done_says_so_and_saves_nothing(tmp_path, capsys):
    training = Training(tmp_path, start=10, save_every=1)
    assert training.train() == 0
    assert (training.seen, training.saver.saved) == ([], [])
    assert "All 10 steps are done already" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_it_and_is_returned(tmp_path, number, capsys):
    before = signal.getsignal(number)
    training = Training(tmp_path, on_step=lambda k: k == 4 and os.kill(os.getpid(), number), eval_every=4)
    assert training.train() == 128 + number
    assert training.saver.saved == [4] and training.saver.waited == 1
    assert training.evaluated == [0]  # an evaluation may take longer than whoever sent the signal waits
    assert [r["step"] for r in training.records() if "loss" in r] == [1, 2, 3, 4]
    assert signal.getsignal(number) is before
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"Stopped by {signal.Signals(number).name} after step 4, which is saved: --resume goes on from there"


def test_a_signal_before_the_first_step_leaves_nothing_to_save(tmp_path):
    def asked_to_end(params, progress):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    training = Training(tmp_path, others=[Measurement("long", 5, asked_to_end, at_start=True)])
    assert training.train() == 128 + signal.SIGTERM
    assert (training.seen, training.saver.saved) == ([], [])


def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path):
    def twice(k):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    training = Training(tmp_path, on_step=twice)
    with pytest.raises(KeyboardInterrupt):
        training.train()


def test_a_long_measurement_tells_the_part_and_how_much_of_it_is_done_in_a_line_now_and_then(
    tmp_path, monkeypatch, capsys
):
    def tell(count):
        progress = Training(tmp_path).run.progress("ChatCORE")
        for done in range(count):
            progress(done, 1400, part="MMLU")
        progress(7, 9)

    tell(3)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("nanochat_jax.cli.waiting.INTERVAL", -1.0)
    tell(2)
    assert capsys.readouterr().out == "ChatCORE: MMLU 0 of 1,400\nChatCORE: MMLU 1 of 1,400\nChatCORE: 7 of 9\n"


def test_a_signal_in_the_middle_of_a_batch_gives_it_up_and_saves_what_was_before(tmp_path):
    def interrupted(k):
        if k == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            training.run.progress("answers")(3, 9)

    training = Training(tmp_path, on_batch=interrupted, log_late=False)
    assert training.train() == 128 + signal.SIGTERM
    assert training.saver.saved == [4] and [k for k, *_ in training.seen] == [1, 2, 3, 4]


@pytest.mark.parametrize("in_step", [False, True])
def test_a_signal_ends_a_measurement_whose_step_is_on_disk_by_then_and_that_is_made_up_for(tmp_path, in_step):
    def long(params, progress):
        progress(1, 1000)
        assert training.saver.saved == [2]
        os.kill(os.getpid(), signal.SIGTERM)
        for done in range(2, 1001):
            progress(done, 1000)
        raise AssertionError("the signal was not seen")

    training = Training(tmp_path, 8, eval_every=2, others=[Measurement("long", 2, long, in_step=in_step)], save_every=2)
    assert training.train() == 128 + signal.SIGTERM
    assert training.saver.saved == [2] and training.evaluated == [0, 2]
    measured = []
    again = Measurement("long", 2, lambda params, progress: measured.append(len(resumed.seen)) or {"long": 1.0})
    resumed = Training(tmp_path, 8, eval_every=2, others=[again], start=2, save_every=2)
    assert resumed.train() == 0
    assert measured == [0, 2, 4, 6] and resumed.evaluated == [2, 4, 6]  # the other one was done before


def test_a_measurement_that_fails_is_told_ends_nothing_and_is_not_made_up_for(tmp_path, capsys):
    tried = []

    def fail(params, progress):
        tried.append(float(params["w"]))
        raise RuntimeError("a judge\nis broken")

    broken = Measurement("broken", 5, fail, flag="--broken-every")
    assert Training(tmp_path, others=[broken], eval_every=5, save_every=5).train() == 0
    said = "WARNING: step 5: broken could not be measured: RuntimeError: a judge is broken. Training goes on; "
    assert said + "--broken-every -1 leaves it out\n" in capsys.readouterr().out and tried == [5, 10]
    resumed = Training(tmp_path, 12, start=10, others=[broken], eval_every=5)
    assert resumed.train() == 0 and tried == [5, 10, 12] and resumed.evaluated == [2]


def test_a_measurement_that_fails_before_the_first_step_ends_the_run(tmp_path):
    def fail(params, progress):
        raise ValueError("a judge is broken")

    training = Training(tmp_path, others=[Measurement("broken", 5, fail, at_start=True)])
    with pytest.raises(ValueError, match="a judge is broken"):
        training.train()
    assert training.seen == []


def test_of_several_processes_an_error_that_the_others_do_not_know_of_ends_the_run(tmp_path, monkeypatch):
    errors = []

    def fail(params, progress):
        raise errors[-1]

    broken = Measurement("broken", 1, fail)
    monkeypatch.setattr(processes, "count", lambda: 2)
    for error, may_go_on in ((FailedTogether("a judge is broken (process 1)"), True), (ValueError("alone"), False)):
        errors.append(error)
        raised = contextlib.nullcontext() if may_go_on else pytest.raises(ValueError, match="alone")
        with raised:
            found, said = take(broken, {}, str, may_fail=True)
            assert found == {} and "a judge is broken (process 1)" in said


def test_an_error_of_a_step_loses_no_step_before_it(tmp_path):
    def fail(k):
        if k == 6:
            raise RuntimeError("the step is broken")

    training = Training(tmp_path, on_batch=fail)
    with pytest.raises(RuntimeError, match="the step is broken"):
        training.train()
    assert training.saver.saved == [5] and training.saver.waited


def test_a_step_is_logged_at_once_where_the_next_batch_waits_for_it_anyway(tmp_path):
    for late, known in ((True, [0, 1, 1, 2]), (False, [0, 1, 2, 3])):  # the first step's time is known at once
        logged, file = [], tmp_path / str(late) / "metrics.jsonl"

        def count(k, logged=logged, file=file):
            logged.append(len([r for r in read_metrics(file) if "loss" in r]))

        training = Training(file.parent, 4, log_late=late, on_batch=count)
        training.train()
        assert logged == known


def test_a_loop_that_forgets_to_record_a_step_is_told_so(tmp_path):
    run = Training(tmp_path).run
    with pytest.raises(RuntimeError, match="must call record"), to_its_end(run):
        for _ in run.steps():
            pass


def test_a_measurement_may_say_what_the_console_shows_of_it(tmp_path, capsys):
    found = {"pass@1": 0.5, "pass@1_low": 0.25}
    shown = Measurement("pass", 2, lambda params, progress: found, shown=lambda n: f"pass {n['pass@1']}")
    training = Training(tmp_path, 2, others=[shown])
    training.train()
    assert "step 00002 | pass 0.5" in capsys.readouterr().out.splitlines()
    assert training.saver.measured[2]["pass@1_low"] == 0.25


@pytest.mark.parametrize(
    "text", ["RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9\nmore", "CUDA out of memory"]
)
def test_out_of_memory_is_one_paragraph_with_the_sizes_and_the_flags_to_lower(text):
    with pytest.raises(MemoryError) as error:
        with explaining_memory({"device_batch_size": 32, "max_seq_len": 2048, "total_batch_size": 524288}):
            raise jax.errors.JaxRuntimeError(text)
    message = str(error.value)
    assert "\n" not in message
    for part in ("--device-batch-size=32, --max-seq-len=2048, --total-batch-size=524288", "Lower --device-batch-size"):
        assert part in message
    assert message.endswith(text.splitlines()[0])


def test_other_errors_of_the_device_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with explaining_memory({}):
            raise jax.errors.JaxRuntimeError("INTERNAL: broken")


@pytest.mark.parametrize(("losses", "saved"), [({}, [3, 5]), ({5: np.nan}, [3])])
def test_data_that_cannot_be_read_end_the_run_with_what_is_good_saved(tmp_path, losses, saved):
    def fail(k):
        if k == 6:
            raise ValueError("b.parquet, row 7")

    training = Training(tmp_path, losses=losses, save_every=3, on_batch=fail)
    with pytest.raises(ValueError, match=r"b\.parquet, row 7"):
        training.train()
    assert (training.saver.saved, training.saver.waited) == (saved, 1)
    assert [r["step"] for r in training.records() if "loss" in r] == [1, 2, 3, 4, 5]


def test_a_step_that_fails_ends_the_run_when_the_last_save_is_on_disk(tmp_path):
    def fail(k):
        if k == 5:
            raise ValueError("row 7 cannot be rendered")

    training = Training(tmp_path, on_step=fail, save_every=4)
    with pytest.raises(ValueError, match="row 7"):
        training.train()
    assert (training.saver.saved, training.saver.waited) == ([4], 1)


def test_the_first_step_of_a_run_tells_how_long_it_took(tmp_path, capsys):
    training = Training(tmp_path, 3)
    training.train()
    first, *others = training.records()
    assert first["seconds_to_first_step"] == first["seconds"] and first["warm_compilation_cache"] in (True, False)
    assert not any("seconds_to_first_step" in record for record in others)
    lines = capsys.readouterr().out.splitlines()
    assert [" first step after " in line for line in lines[:3]] == [True, False, False]


# ------------------------------------------------------------------------------------------------- saves that fail
class FullDisk(FakeSaver):
    """Has no room from the `full`-th save on, until the `free`-th; a failure is told by the next question."""

    pause = 0.05

    def __init__(self, folder, full, free):
        super().__init__(folder)
        self.full, self.free, self.tries, self.untold, self.failed = full, free, 0, "", False

    def save(self, step, items, make_meta):
        self.tries += 1
        self.failed = self.full <= self.tries < self.free
        if self.failed:
            self.untold = f"step {step} could not be saved in {self.folder}: No space left on device"
        else:
            super().save(step, items, make_meta)

    def failure(self, wait=False):
        said, self.untold = self.untold, ""
        return said

    def due(self):
        return self.failed


def test_training_goes_on_after_a_failed_save_and_saves_again(tmp_path, capsys):
    training = Training(tmp_path, save_every=4)
    training.run.saver = training.saver = FullDisk(tmp_path, full=1, free=3)
    assert training.train() == 0
    assert [k for k, _, _ in training.seen] == list(range(1, 11))
    assert training.saver.saved == [6, 8, 10] and training.saver.tries == 5  # of 4 and 5 nothing came
    said = capsys.readouterr().out
    assert said.count("WARNING: step 4 could not be saved") == 1 == said.count("WARNING: step 5 could not be saved")
    assert "Training goes on; the next try is in" in said


def test_the_only_save_waits_for_room_as_long_as_the_patience_lasts(tmp_path, capsys):
    training = Training(tmp_path, save_patience=30.0)
    training.run.saver = training.saver = FullDisk(tmp_path, full=1, free=4)
    assert training.train() == 0 and training.saver.saved == [10] and training.saver.tries == 4
    assert "It is tried again for 30 s (--save-patience); Ctrl-C gives up" in capsys.readouterr().out
    training = Training(tmp_path, save_patience=0.2)
    training.run.saver = training.saver = FullDisk(tmp_path, full=1, free=10**9)
    with pytest.raises(OSError, match=r"step 10 could not be saved in .*; the steps after it are lost"):
        training.train()
    assert 2 <= training.saver.tries <= 5


def test_a_signal_ends_the_waiting_for_room(tmp_path):
    training = Training(tmp_path, save_patience=60.0)
    training.run.saver = training.saver = FullDisk(tmp_path, full=1, free=10**9)
    say = training.run.reporter.say

    def interrupt(text):
        say(text)
        if "Ctrl-C gives up" in text:
            os.kill(os.getpid(), signal.SIGINT)

    training.run.reporter.say = interrupt
    with pytest.raises(OSError, match="No space left on device"):
        training.train()
    assert training.saver.tries <= 2


def test_a_run_that_has_lost_its_folder_ends_at_the_next_step_and_writes_nothing_more(tmp_path):
    training = Training(tmp_path, save_every=2, eval_every=1)

    def lose(k):
        if k == 5:
            training.saver.glance = lambda: (_ for _ in ()).throw(FolderLost("another run has started in it"))
            training.size = (tmp_path / "metrics.jsonl").stat().st_size

    training.on_step = lose
    with pytest.raises(FolderLost, match="another run has started"):
        training.train()
    assert training.saver.saved == [2, 4] and len(training.seen) == 5
    assert (tmp_path / "metrics.jsonl").stat().st_size == training.size


def test_the_first_signal_is_answered_at_once_and_a_second_says_what_it_loses(tmp_path, capfd):
    training = Training(tmp_path, save_every=4)

    def interrupt(k):
        if k == 7:
            os.kill(os.getpid(), signal.SIGINT)
            told.append(capfd.readouterr().err)
            os.kill(os.getpid(), signal.SIGINT)

    told, training.on_step = [], interrupt
    with pytest.raises(KeyboardInterrupt):
        training.train()
    assert told == [
        "\nStopping after this step, and saving what is not saved yet; Ctrl-C again loses the steps since 4\n"
    ]
    assert capfd.readouterr().err == "\nInterrupted twice: this loses the steps since 4\n"


def test_no_step_is_logged_as_faster_than_it_was_where_two_are_logged_at_once(tmp_path):
    """A save, a measurement or a signal looks at two steps when both are done."""
    training = Training(tmp_path, 8, save_every=4, on_step=lambda k: time.sleep(0.05))
    training.train()
    seconds = {r["step"]: r["seconds"] for r in training.records() if "loss" in r}
    assert min(seconds.values()) > 0.025 and seconds[3] == seconds[4] and seconds[7] == seconds[8]
