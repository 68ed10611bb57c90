"""The life of a run's steps: what must happen between them and must never be forgotten.

A stage writes its own loop:

    with open_run(start, initial, ...) as run:
        for step, state in run.steps():
            state, metrics = train_step(state, batch, schedule(step))
            run.record(state, metrics)

`steps` saves checkpoints, measures, and stops after a signal; `record` logs a step while the next one runs, counts
updates that were skipped and gives up after too many. What was trained is saved before anything is measured.
"""

import collections
import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from nanochat_jax.checkpoints.ownership import FolderLost
from nanochat_jax.checkpoints.saver import Saver
from nanochat_jax.cli.settings import recorded_settings
from nanochat_jax.cli.waiting import saying
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.signals import Interrupted, Signals
from nanochat_jax.train.measurement import Measurement, Progress, take
from nanochat_jax.train.memory import FEWER_ROWS, explaining_memory
from nanochat_jax.train.metrics import MetricsLog, Reporter, SmoothedAverage, Throughput
from nanochat_jax.train.start import Initial, Start, hold_folder
from nanochat_jax.train.step import StepMetrics, TrainState, state_items
from nanochat_jax.train.summary import describe_run, end_lines

COMPILED = collections.Counter()  # JAX's events of this process, by name
jax.monitoring.register_event_listener(lambda name, **_: COMPILED.update([name]))
nothing = contextlib.nullcontext()
LAST_PAUSE = 10.0  # seconds between tries to save at the end of a run, at most
MAX_BAD_STEPS = 5  # updates skipped in a row before a run gives up


class Recorded(NamedTuple):
    """A step that was dispatched and waits to be logged."""

    step: int  # counted from 1
    metrics: StepMetrics
    numbers: Mapping[str, float]


class Run:
    """A run while it trains. Steps are counted from 0; step k takes the k-th batch, and leaves k + 1 steps done.

    log_late: log a step while the next one runs, so that the device is not kept waiting.
    """

    def __init__(
        self,
        state: TrainState,
        *,
        total: int,
        save_every: int,
        save_patience: float,
        measurements: Sequence[Measurement],
        record: Callable[[int], dict],
        saver: Saver,
        log: MetricsLog,
        reporter: Reporter,
        console: Callable[[Mapping[str, float]], str],
        average: SmoothedAverage,
        throughput: Throughput | None = None,
        log_late: bool = True,
        skipped: int = 0,
        measured: frozenset[str] = frozenset(),
    ):
        """record: step -> what its checkpoint records. console: a step's record in metrics.jsonl -> its line. skipped:
        updates so far that were not finite. measured: names of what has been measured already at the first step."""
        self.state, self.step = state, int(state.step)
        self.total, self.measurements, self.record_of = total, measurements, record
        self.save_every, self.save_patience = save_every, save_patience
        self.saver, self.log, self.reporter = saver, log, reporter
        self.signals = Signals(self._stopping, self._ending)
        self.console, self.average, self.throughput, self.log_late = console, average, throughput, log_late
        self.until = total  # the last step; before `total` where `end` was called
        self.first, self.saved, self.measured_before = self.step, self.step, measured
        self.skipped, self.bad_steps, self.found = skipped, int(state.bad_steps), {}
        self.waiting: list[Recorded] = []  # at most two
        self.began = self.clock = time.perf_counter()

    def steps(self) -> Iterator[tuple[int, TrainState]]:
        """(step, state before it) until the run is done or a signal has come. The body of the loop must call `record`
        once. FloatingPointError after more than MAX_BAD_STEPS updates in a row that were not finite."""
        if self.step >= self.total:
            self.reporter.say(f"All {self.total} steps are done already")
        with contextlib.suppress(Interrupted):
            if self.step == 0:
                self._measure(self._due())
            else:  # a run that ended between its save and its measurements makes up for them
                self._measure([m for m in self._due() if m.name not in self.measured_before])
            while self.step < self.until and not self.signals.stop():
                step = self.step
                with saying("compiling the train step, at its first call", self.say) if step == self.first else nothing:
                    yield step, self.state
                if self.step != step + 1:
                    raise RuntimeError("the body of the loop must call record(state, metrics) once for each step")
                self._between_steps()

    def record(self, state: TrainState, metrics: StepMetrics, **numbers: float) -> None:
        """A step is dispatched: `state` is what it leaves. numbers: what else metrics.jsonl records of it. FolderLost:
        another run has taken the folder."""
        self.saver.glance()
        self.state, self.step = state, self.step + 1
        self.waiting.append(Recorded(self.step, metrics, numbers))

    def say(self, text: str) -> None:
        """A line that stays on the console; nothing for an empty text."""
        if text:
            self.reporter.say(text)

    def end(self, why: str) -> None:
        """The step that was just recorded is to be the last: it is saved and measured as the last one is. All
        processes must call it at the same step."""
        if self.step < self.until:
            self.until = self.step
            self.say(f"The run ends after step {self.step}: {why}; --resume goes on")

    def progress(self, what: str, in_step: bool = False) -> Progress:
        """For long work inside a step or a measurement: the bar shows "what: part done of all", a signal raises
        Interrupted.

        in_step: as in Measurement."""

        def report(done: int, total: int, part: str = "") -> None:
            self.reporter.doing(f"{what}: {part}{' ' * bool(part)}{done:,} of {total:,}")
            if in_step and self.signals.stop():
                raise Interrupted
            if not in_step:
                self.signals.check()

        return report

    def finish(self) -> None:
        """After the last step, or a signal: log and save what is not yet. OSError: that cannot be done, and has not
        become possible for `save_patience` seconds."""
        self._log_waiting()
        if self.saved != self.step:
            self._save()
        until, signal_before = time.monotonic() + self.save_patience, self.signals.received
        with saying("writing the last checkpoint", self.say):
            failed = self.saver.failure(wait=True)
        while failed:
            left = until - time.monotonic()
            if processes.exchange("patience", left <= 0 or self.signals.received != signal_before)[0]:
                raise OSError(f"{failed}; the steps after it are lost")
            self.say(f"WARNING: {failed}. It is tried again for {left:,.0f} s (--save-patience); Ctrl-C gives up")
            next_try = time.monotonic() + min(self.saver.pause, LAST_PAUSE, left)
            while time.monotonic() < next_try and self.signals.received == signal_before:
                time.sleep(0.1)
            self._save()
            failed = self.saver.failure(wait=True)
        self._tell_saved()

    def rescue(self) -> None:
        """After an error that is none of the steps before: log them, and save them where that can be done alone."""
        self._log_waiting()
        alive = not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state) if isinstance(leaf, jax.Array))
        # With other processes it cannot: they may have got their part, and be in the step already.
        if self.saved != self.step and not self.bad_steps and alive and jax.process_count() == 1:
            self.finish()

    def _due(self) -> list[Measurement]:
        return [m for m in self.measurements if m.due(self.step, self.until)]

    def _between_steps(self) -> None:
        last, stop, due = self.step == self.until, self.signals.stop(), self._due()
        self._tell(self.saver.failure())
        regular = self.save_every > 0 and self.step % self.save_every == 0
        measured = bool(due and self.saver.best)  # the best checkpoint can only be one that was measured
        saving = last or stop or regular or measured or self.saver.due()
        now = saving or due or not self.log_late or self.step == self.first + 1
        self._log_waiting(keep=0 if now else 1)  # the step before this one, while this one runs
        if saving and (last or stop or not self.bad_steps):  # a state of skipped updates does not replace a good one
            self._save()
        if not stop:  # whoever sent a signal does not wait long
            self._measure(due)

    def _log_waiting(self, keep: int = 0) -> None:
        """Log the steps that wait, but for the last `keep`. Two steps share the time: when the first was done, nobody
        has looked."""
        count = len(self.waiting) - keep
        ready, self.waiting = self.waiting[:count], self.waiting[count:]
        jax.block_until_ready([recorded.metrics for recorded in ready])
        now = time.perf_counter()
        for recorded in ready:
            self._log(recorded, (now - self.clock) / len(ready))
        if ready:
            self.clock = now

    def _log(self, recorded: Recorded, seconds: float) -> None:
        step, metrics, numbers = recorded
        loss, ok, grad_norm = float(metrics.loss), bool(metrics.ok), float(metrics.grad_norm)
        tokens = int(metrics.tokens)
        record = {"loss": loss, "grad_norm": grad_norm, **numbers, "percent": 100 * step / self.total}
        finite_loss = loss if ok and tokens else float("nan")  # a skipped step does not count in the average
        values = record | {"loss": finite_loss}
        record[f"smoothed_{self.average.name}"] = self.average.update(values[self.average.name])
        if self.throughput:
            record |= self.throughput.of(seconds)
        line = self.console(record)
        if step == self.first + 1:
            found, written = (COMPILED[f"/jax/compilation_cache/cache_{what}"] for what in ("hits", "misses"))
            warm = found > 0 and written == 0
            record |= {"seconds_to_first_step": seconds, "warm_compilation_cache": warm}
            line += f" | first step after {seconds:.1f} s, {'warm' if warm else 'cold'} compilation cache"
        self.log.log(step, **record, trained_tokens=tokens, seconds=seconds)
        self.reporter.step(step, line)
        self._count_skipped(step, ok, loss, grad_norm)

    def _count_skipped(self, step: int, ok: bool, loss: float, grad_norm: float) -> None:
        self.bad_steps = 0 if ok else self.bad_steps + 1
        if ok:
            return
        self.skipped += 1
        self.reporter.say(
            f"WARNING: step {step} skipped, its update is not finite (loss {loss}, gradient norm {grad_norm}); "
            f"{self.skipped} skipped so far, {self.bad_steps} in a row"
        )
        self.log.log(step, event="skipped", skipped=self.skipped)
        if self.bad_steps > MAX_BAD_STEPS:
            self._tell(self.saver.failure(wait=True))
            raise FloatingPointError(
                f"{self.bad_steps} updates in a row were not finite, the last at step {step}: lower the learning rates "
                f"(--embedding-lr, --matrix-lr, ...) or look at the data; {self.saver.newest()}"
            )

    def _measure(self, due: Sequence[Measurement]) -> None:
        for measurement in due:
            progress = self.progress(measurement.name, measurement.in_step)
            found, failed = take(measurement, self.state.params, progress, may_fail=self.step > 0)
            texts = {name: value for name, value in found.items() if isinstance(value, list)}
            numbers = {name: value for name, value in found.items() if name not in texts}
            if failed:
                self.say(f"WARNING: step {self.step}: {failed}")
                self.log.log(self.step, event="measurement failed", measured=measurement.name)
            elif found:
                self.log.log(self.step, **found, measured=measurement.name)
            if shown := measurement.shown(numbers):
                self.reporter.say(f"step {self.step:05d} | {shown}")
            for name, lines in texts.items():
                self.reporter.say("\n".join(f"step {self.step:05d} | {name} | {line}" for line in lines))
            self.found |= numbers
            if self.saved == self.step > 0:
                self.saver.add_to_meta(self.step, self.found)
        if due:
            self.clock = time.perf_counter()

    def _save(self) -> None:
        self._tell(self.saver.failure(wait=True))
        self._tell_saved()

        def meta() -> dict:
            self.log.sync()
            found = {"step": self.step, **self.found, "skipped": self.skipped, **self.record_of(self.step)}
            return found | {f"smoothed_{self.average.name}": self.average.state()}

        self.saver.save(self.step, state_items(self.state), meta)
        self.saved = self.step
        self.reporter.say(f"step {self.step:05d} | saving {self.saver.folder / str(self.step)}")
        self.clock = time.perf_counter()

    def _tell_saved(self) -> None:
        if self.saver.sealed:
            self.log.saved(self.saver.folder / str(self.saver.sealed))

    def _stopping(self) -> str:
        return f"Stopping after this step, and saving what is not saved yet; Ctrl-C again {self._loss()}"

    def _ending(self) -> str:
        return f"Interrupted twice: this {self._loss()}"

    def _loss(self) -> str:
        on_disk = max(self.first, self.saver.sealed)
        if on_disk == self.step:
            return "loses nothing"
        return f"loses the steps since {on_disk}" if on_disk else "loses all steps of this run"

    def _tell(self, failed: str) -> None:
        """Training goes on after a save that failed: `_between_steps` tries it again."""
        if failed:
            self.saved = -1
            self.say(f"WARNING: {failed}. Training goes on; the next try is in {self.saver.pause:.0f} s")


@contextlib.contextmanager
def open_run(
    start: Start,
    initial: Initial,
    *,
    total: int,
    record: Callable[[int], dict],
    console: Callable[[Mapping[str, float]], str],
    measurements: Sequence[Measurement] = (),
    smoothed: str = "loss",
    throughput: Throughput | None = None,
    log_late: bool = True,
    keep_best: str | None = None,
    in_force: Mapping[str, Any] | None = None,
    advice: str = FEWER_ROWS,
) -> Iterator[Run]:
    """While it is entered, the run's folder is this process's alone and its mesh in force; see `Run`.

    record: step -> what its checkpoint records beside what every run's does: the place in the data. console: a step's
    record -> its line. smoothed: the number whose moving average is logged. keep_best: a measured number; the
    checkpoint where it was highest stays on disk. in_force, advice: for the error where the device runs out of memory,
    see `explaining_memory`; default: the sizes of the plan's batch.
    """
    cfg, plan = start.cfg, initial.plan
    if in_force is None:
        sizes = plan.rows_per_device, plan.batch.T, plan.batch.tokens_per_step
        in_force = dict(zip(("device_batch_size", "max_seq_len", "total_batch_size"), sizes))
    with explaining_memory(in_force, advice), plan.scope(), contextlib.ExitStack() as stack:
        describe_run(start, plan, total)
        owner = stack.enter_context(hold_folder(start))
        project = f"nanochat-{start.folder.parent.name.removesuffix('_checkpoints').removeprefix('chat')}"
        resumed_at = start.first_step if start.resumed else None
        log = stack.enter_context(
            MetricsLog(start.folder, cfg.run, recorded_settings(cfg), project=project, resumed_at=resumed_at)
        )
        reporter = Reporter(total, start.first_step)
        stack.callback(reporter.close)
        measured = processes.exchange("what was measured", sorted(log.measured_at(start.first_step)))[0]
        run = Run(
            initial.state,
            total=total,
            save_every=cfg.save_every,
            save_patience=cfg.save_patience,
            measurements=measurements,
            record=lambda step: start.recorded(plan, total) | record(step),
            saver=Saver(start.folder, cfg.keep_checkpoints, owner, keep_best),
            log=log,
            reporter=reporter,
            console=console,
            average=SmoothedAverage(smoothed, *start.record.get(f"smoothed_{smoothed}", ())),
            throughput=throughput,
            log_late=log_late,
            skipped=start.record.get("skipped", 0),
            measured=frozenset(measured),
        )
        with to_its_end(run):
            yield run


@contextlib.contextmanager
def to_its_end(run: Run) -> Iterator[None]:
    """While it is entered, signals are noted; afterwards everything is logged and on disk, also after an error."""
    waits = True
    with run.signals:
        try:
            with contextlib.suppress(Interrupted):  # a signal in the middle of a step, which is given up
                yield
        except FolderLost:  # nothing more may be written there
            raise
        except KeyboardInterrupt:  # whoever sends a second signal does not wait for what is being written
            waits = False
            raise
        except Exception:
            try:
                run.rescue()
            except Exception as e:  # the first error is the one to tell
                run.reporter.say(f"WARNING: steps that were not saved are lost: {e}")
            raise
        else:
            run.finish()
        finally:
            if waits:
                run.saver.close()  # Python cannot shut down while Orbax writes
        if run.signals.received and 0 < run.step < run.until:
            name = signal.Signals(run.signals.received).name
            run.say(f"Stopped by {name} after step {run.step}, which is saved: --resume goes on from there")
        elif run.first < run.step == run.until:
            for line in end_lines(run.log.records(), run.saver.folder, run.step, time.perf_counter() - run.began):
                run.say(line)


def exit_code(run: Run) -> int:
    """0, or 128 + n after signal n; to be asked when the run is closed."""
    return 128 + run.signals.received if run.signals.received else 0
