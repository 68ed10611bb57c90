"""What the stages share once they have a run: what is open while it trains (`session`), and the loop: dispatch, report,
measure, save, and stop when told to. `train_on` is both for stages that train on rows."""

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.checkpoints.store import Saver
from nanochat_jax.cli.device import pages_note
from nanochat_jax.data import batches as data_batches
from nanochat_jax.data import rows as data_rows
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.collectives import replicated_parameters
from nanochat_jax.distributed.describe import heads_note, replicas_note, table
from nanochat_jax.distributed.device_memory import is_out_of_memory
from nanochat_jax.distributed.mesh import row_part, row_shards
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.distributed.signals import Interrupted, Signals
from nanochat_jax.evals.bits_per_byte import make_bits_per_byte
from nanochat_jax.model.cost import flops_per_token, parameter_counts
from nanochat_jax.optim import groups
from nanochat_jax.train.metrics import MetricsLog, Reporter, SmoothedLoss
from nanochat_jax.train.remat import choose_remat
from nanochat_jax.train.run import Batches, Run
from nanochat_jax.train.step import TrainState, abstract_state, make_train_step

COMPILED = collections.Counter()  # JAX's events of this process, by name
jax.monitoring.register_event_listener(lambda name, **_: COMPILED.update([name]))
MAX_BAD_STEPS = 5  # updates skipped in a row before a run gives up


def every_number(numbers: dict[str, float]) -> str:
    return " | ".join(f"{name} {value:.4f}" for name, value in numbers.items())


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Something that is found out about the parameters every so many steps, and at the end."""

    every: int  # steps; -1 = never
    measure: Callable[[Any], dict[str, Any]]  # params -> numbers, and lists of text lines, named as they are logged
    at_start: bool = False  # also before the first step
    shown: Callable[[dict[str, float]], str] = every_number  # the numbers -> the console's line


def train_on(
    rows: data_rows.PackedRows,
    run: Run,
    schedule: Mapping[str, Callable[[int], float]],
    *,
    batch: Batches,
    total: int,
    mesh: Mesh,
    dtype: Any,
    attention: str,
    peak_flops: float | None,
    measurements: Sequence[Measurement] = (),
    meta: Callable[[int], dict] = lambda step: {},
) -> int:
    """Train a run to its end -> the exit code: 0, or 128 + n after signal n.

    schedule: for each of the step's scalars (see `make_train_step`; lr_multiplier is the first) a function of the step,
    counted from 0. meta: step -> what its checkpoint records beside what every run's does.
    """
    cfg = run.cfg
    rows_per_device = batch.rows_per_pass // row_shards(mesh)
    sizes = {"device_batch_size": rows_per_device, "max_seq_len": rows.T, "total_batch_size": batch.tokens_per_step}

    def rows_before(step):
        return run.first_row + (step - run.first_step) * batch.rows_per_step

    opened = session(run, mesh, dtype, total, rows.T, rows_per_device)
    with explaining_memory(sizes), opened as on, contextlib.ExitStack() as stack:
        steps = {"rows_per_step": batch.rows_per_step, "micro_batches": batch.micro_batches}
        batches = data_batches.train_batches(rows, start_row=run.first_row, **steps, **shares(mesh))
        stack.callback(batches.close)
        taken = batches if cfg.document_mask else map(data_batches.without_documents, batches)
        smoothed = SmoothedLoss(0.9, *run.smoothed_loss)

        report = functools.partial(
            throughput,
            smoothed=smoothed,
            total=total,
            epoch_of=lambda step: rows.epoch_and_progress(rows_before(step) - 1)[0],
            tokens_per_step=batch.tokens_per_step,
            flops_per_token=on.flops_per_token,
            peak_flops=peak_flops,
        )

        def recorded(step):
            consumed = rows_before(step)
            place = {"rows_consumed": consumed, "smoothed_loss": smoothed.state(), **rows.record(consumed)}
            return run.meta(total) | place | meta(step)

        how = {"dtype": dtype, "attention": attention, "remat": on.remat, "scheduled": tuple(schedule)}
        received = Loop(
            train_step=make_train_step(run.model_config, on.tx, on.abstract, mesh, **how),
            next_batch=lambda state: to_global(next(taken), mesh),
            total=total,
            schedule=lambda step: tuple(value(step) for value in schedule.values()),
            measurements=measurements,
            saver=on.saver,
            save_every=cfg.save_every,
            meta=recorded,
            log=on.log,
            reporter=on.reporter,
            report=report,
            skipped=run.record.get("skipped", 0),
        ).run(on.state)
    return 128 + received if received else 0


def throughput(
    step: int,
    multiplier: float,
    metrics: Mapping[str, Any],
    seconds: float,
    *,
    smoothed: SmoothedLoss,
    total: int,
    epoch_of: Callable[[int], int],  # step -> epoch, counted from 1
    tokens_per_step: int,
    flops_per_token: int,
    peak_flops: float | None,  # of all devices together
) -> tuple[dict, str]:
    """What `Loop.report` tells of a step on rows."""
    tokens = tokens_per_step / seconds
    mfu = tokens * flops_per_token / peak_flops if peak_flops else math.nan
    record = {
        "smoothed_loss": smoothed.update(float(metrics["loss"]) if metrics["ok"] and metrics["tokens"] else math.nan),
        "tokens_per_second": tokens,
        "mfu": mfu,
        "percent": 100 * step / total,
        "epoch": epoch_of(step),
    }
    shown = "   -  " if math.isnan(mfu) else f"{100 * mfu:5.1f}%"
    return record, (
        f"loss {record['smoothed_loss']:.4f} | lrm {multiplier:.3f} | {tokens:,.0f} tok/s | mfu {shown} | "
        f"{record['percent']:.1f}% | epoch {record['epoch']}"
    )


@dataclasses.dataclass(frozen=True)
class Session:
    """What is open while a run trains."""

    tx: Any
    abstract: TrainState
    remat: str  # in force
    state: TrainState  # to start from; the first step takes its memory
    flops_per_token: int  # in rows of T tokens
    log: MetricsLog
    reporter: Reporter
    saver: Saver


@contextlib.contextmanager
def session(run: Run, mesh: Mesh, dtype: Any, total: int, T: int, rows: int):
    """While it is entered: the mesh in force, the run's folder this process's alone, its state on the devices.

    rows: of T tokens, of a device in one pass."""
    cfg = run.cfg
    with jax.set_mesh(mesh), replicated_parameters(cfg.replicate), contextlib.ExitStack() as stack:
        tx = groups.make_optimizer(run.groups, dtype)
        abstract = abstract_state(run.model_config, tx, mesh, cfg.replicate)
        lines, notes = table(abstract.params, mesh, cfg.replicate)
        asked = cfg.replicate or "replica" in (cfg.mesh or "")
        notes += [] if asked else replicas_note(run.model_config.n_embd, mesh)
        notes += heads_note(run.model_config.n_kv_head, mesh)
        notes += pages_note(mesh.devices.flat[0].platform)
        for line in [*(lines if cfg.verbose else []), *(f"NOTE: {note}" for note in notes)]:
            print0(line)
        remat, why = choose_remat(cfg.remat, run.model_config, abstract, dtype, rows, T)
        remat, why = processes.exchange("rematerialisation", [remat, why])[0]  # it depends on a machine's memory
        print0(f"Rematerialisation: {remat} ({why})")
        run.cfg = cfg = dataclasses.replace(cfg, remat=remat)
        state = run.initial_state(tx, abstract)
        flops = flops_per_token(run.model_config, T)
        counts = [f"{name} {count:,}" for name, count in parameter_counts(run.model_config).items()]
        print0(f"Parameters: {', '.join(counts)} | FLOPs per token: {flops:e} | steps: {total}")
        stack.enter_context(run.start())
        project = f"nanochat-{run.folder.parent.name.removesuffix('_checkpoints').removeprefix('chat')}"
        settings = run.meta(total)["user_config"]
        log = MetricsLog(run.folder, cfg.run, settings, project=project, resumed_at=run.resumed_at)
        stack.callback(log.close)
        reporter = Reporter(total, run.first_step)
        stack.callback(reporter.close)
        yield Session(tx, abstract, remat, state, flops, log, reporter, Saver(run.folder, cfg.keep_checkpoints))


def shares(mesh: Mesh) -> dict[str, int]:
    """Which part of every batch is this process's."""
    part, parts = row_part(mesh)
    return {"process_index": part, "process_count": parts}


def validation(
    rows: data_rows.PackedRows | None, run: Run, tokenizer, *, batch: Batches, mesh: Mesh, dtype, attention: str
) -> Measurement:
    """Bits per byte (val_bpb) on the first --eval-tokens of `rows`, the same at each call; None: measures nothing."""
    cfg = run.cfg
    if rows is None:
        return Measurement(-1, lambda params: {})
    count = max(1, cfg.eval_tokens // (batch.rows_per_pass * rows.T)) * batch.rows_per_pass
    how = {"dtype": dtype, "attention": attention}
    bits_per_byte = make_bits_per_byte(run.model_config, tokenizer.token_bytes(), **how)

    def measure(params):
        batches = data_batches.validation_batches(
            rows, n_rows=count, rows_per_batch=batch.rows_per_pass, **shares(mesh)
        )
        if not cfg.document_mask:
            batches = map(data_batches.without_documents, batches)
        return {"val_bpb": bits_per_byte(params, (to_global(b, mesh) for b in batches))}

    return Measurement(cfg.eval_every, measure, at_start=True)


@dataclasses.dataclass
class Loop:
    """Everything a run needs beside its state. Steps are counted from 0; step k takes the k-th batch."""

    train_step: Callable
    next_batch: Callable[[TrainState], Any]  # the state before the step -> what train_step takes
    total: int  # steps of the whole run
    schedule: Callable[[int], tuple[float, ...]]  # step -> the step's scalars, the learning-rate multiplier first
    measurements: Sequence[Measurement]
    saver: Saver
    save_every: int
    meta: Callable[[int], dict]  # step -> what the checkpoint of that step records
    log: MetricsLog
    reporter: Reporter
    report: Callable[..., tuple[dict, str]]  # (step, multiplier, metrics, seconds) -> its record, its line
    report_late: bool = True  # while the next step runs, so that the device is not kept waiting
    skipped: int = 0  # updates so far that were not finite
    signals: Signals = dataclasses.field(default_factory=Signals)

    def run(self, state: TrainState) -> int:
        """Train to the end or to a signal, saving both times -> the signal's number, or 0.

        FloatingPointError after more than MAX_BAD_STEPS updates in a row that were not finite. Where the data fail, the
        steps before are saved too.
        """
        start = step = int(state.step)
        self.first = start + 1
        self.bad_steps, self.measured = int(state.bad_steps), {}
        self.clock = time.perf_counter()
        pending = None
        saved = step  # step 0 is the base model's own checkpoint
        if start >= self.total:
            self.reporter.say(f"All {self.total} steps are done already")
        with self.signals as signals:
            try:
                with contextlib.suppress(Interrupted):
                    if start == 0:
                        self._measure(0, state, [m for m in self.measurements if m.every > 0 and m.at_start])
                    while step < self.total and not signals.stop():
                        scalars = self.schedule(step)
                        try:
                            batch = self.next_batch(state)
                        except (ValueError, OSError):
                            self._report(pending)
                            # Alone: other processes may have got their part, and be in the step already
                            if saved != step and not self.bad_steps and jax.process_count() == 1:
                                self._save(step, state)
                            raise
                        state, metrics = self.train_step(state, batch, *map(np.float32, scalars))
                        step += 1
                        self._report(pending)  # of the step before
                        pending = (step, scalars[0], metrics)
                        last = step == self.total
                        due = [m for m in self.measurements if m.every > 0 and (step % m.every == 0 or last)]
                        saving = last or signals.stop() or (self.save_every > 0 and step % self.save_every == 0)
                        if due or saving or not self.report_late:
                            pending = self._report(pending)
                        if not signals.stop():  # whoever sent one does not wait long
                            self._measure(step, state, due)
                        if saving and (last or signals.stop() or not self.bad_steps):  # not over the last good one
                            self._save(step, state)
                            saved = step
                self._report(pending)
                if saved != step:  # a signal that came between the steps, or before a measurement's end
                    self._save(step, state)
            finally:
                self.saver.wait()  # Python cannot shut down while Orbax writes
        return signals.received

    def _report(self, pending) -> None:
        if pending is None:
            return
        step, multiplier, metrics = pending
        loss, ok, grad_norm = float(metrics["loss"]), bool(metrics["ok"]), float(metrics["grad_norm"])
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        record, line = self.report(step, multiplier, metrics, seconds)
        record = {"loss": loss, "grad_norm": grad_norm, "lr_multiplier": multiplier} | record
        if step == self.first:
            found, written = (COMPILED[f"/jax/compilation_cache/cache_{what}"] for what in ("hits", "misses"))
            warm = found > 0 and written == 0
            record |= {"seconds_to_first_step": seconds, "warm_compilation_cache": warm}
            line += f" | first step after {seconds:.1f} s, {'warm' if warm else 'cold'} compilation cache"
        self.log.log(step, **record, trained_tokens=int(metrics["tokens"]), seconds=seconds)
        self.reporter.step(step, line)
        self._check(step, ok, loss, grad_norm)

    def _check(self, step: int, ok: bool, loss: float, grad_norm: float) -> None:
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
            self.saver.wait()
            raise FloatingPointError(
                f"{self.bad_steps} updates in a row were not finite, the last at step {step}: lower the learning rates "
                f"(--embedding-lr, --matrix-lr, ...) or look at the data; {self.saver.newest()}"
            )

    def _measure(self, step: int, state: TrainState, due: Sequence[Measurement]) -> None:
        for measurement in due:
            found = measurement.measure(state.params)
            texts = {name: value for name, value in found.items() if isinstance(value, list)}
            numbers = {name: value for name, value in found.items() if name not in texts}
            if found:
                self.log.log(step, **found)
            if shown := measurement.shown(numbers):
                self.reporter.say(f"step {step:05d} | {shown}")
            for name, lines in texts.items():
                self.reporter.say("\n".join(f"step {step:05d} | {name} | {line}" for line in lines))
            self.measured |= numbers
        if due:
            self.clock = time.perf_counter()

    def _save(self, step: int, state: TrainState) -> None:
        self.log.sync()
        meta = {"step": step, **self.measured, "skipped": self.skipped, **self.meta(step)}
        self.saver.save(step, state, meta)
        self.reporter.say(f"step {step:05d} | saving {self.saver.folder / str(step)}")
        self.clock = time.perf_counter()


FEWER_ROWS = (
    "Lower --device-batch-size first: gradient accumulation keeps --total-batch-size, and so the training, the same. "
    "Then --remat block, a lower --max-seq-len, or more devices (parameters and optimizer are sharded over them)"
)


@contextlib.contextmanager
def explaining_memory(sizes: dict[str, Any], advice: str = FEWER_ROWS):
    """Where the device runs out of memory inside, MemoryError with the sizes in force and the flags to lower."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if not is_out_of_memory(error):
            raise
        in_force = ", ".join(f"--{name.replace('_', '-')}={value}" for name, value in sizes.items())
        raise MemoryError(
            f"Out of device memory with {in_force}. {advice}. The device said: {text.splitlines()[0][:300]}"
        ) from error
