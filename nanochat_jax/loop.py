"""The training loop that SFT and pretraining share: dispatch, report, evaluate, save, and stop when told to."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Saver
from nanochat_jax.metrics import MetricsLog, Reporter, SmoothedLoss
from nanochat_jax.sharding import to_global
from nanochat_jax.train import TrainState

MAX_BAD_STEPS = 5  # updates skipped in a row before a run gives up


@dataclasses.dataclass
class Loop:
    """Everything a run needs beside its state. Steps are counted from 0; step k takes the k-th batch."""

    train_step: Callable
    batches: Iterator[dict[str, np.ndarray]]
    mesh: Mesh
    total: int  # steps of the whole run
    schedule: Callable[[int], tuple[float, float]]  # step -> (learning-rate multiplier, Muon momentum)
    evaluate: Callable[[Any], dict[str, float]]  # params -> measurements, named as they are logged
    eval_every: int
    saver: Saver
    save_every: int
    meta: Callable[[int], dict]  # step -> what the checkpoint of that step records
    log: MetricsLog
    reporter: Reporter
    epoch_of: Callable[[int], int]  # step -> epoch, counted from 1
    tokens_per_step: int
    flops_per_token: int
    peak_flops: float | None  # of all devices together
    smoothed: SmoothedLoss
    skipped: int = 0  # updates so far that were not finite

    def run(self, state: TrainState) -> int:
        """Train to the end or to a signal, saving both times -> the signal's number, or 0.

        FloatingPointError after more than MAX_BAD_STEPS updates in a row that were not finite.
        """
        start = step = int(state.step)
        self.bad_steps, self.measured = int(state.bad_steps), {}
        self.clock = time.perf_counter()
        pending = None
        saved = step  # step 0 is the base model's own checkpoint
        if start >= self.total:
            self.reporter.say(f"All {self.total} steps are done already")
        with Signals() as signals:
            if start == 0 and self.eval_every > 0:
                self._evaluate(0, state)
            while step < self.total and not signals.received:
                multiplier, momentum = self.schedule(step)
                batch = to_global(next(self.batches), self.mesh)
                state, metrics = self.train_step(state, batch, np.float32(multiplier), np.float32(momentum))
                step += 1
                self._report(pending)  # of the step before: the device is not kept waiting
                pending = (step, multiplier, metrics)
                last = step == self.total
                evaluating = self.eval_every > 0 and (step % self.eval_every == 0 or last)
                saving = last or signals.received or (self.save_every > 0 and step % self.save_every == 0)
                if evaluating or saving:
                    pending = self._report(pending)
                if evaluating and not signals.received:  # whoever sent one does not wait long
                    self._evaluate(step, state)
                if saving and (last or signals.received or not self.bad_steps):  # not over the last good one
                    self._save(step, state)
                    saved = step
            self._report(pending)
            if saved != step:  # a signal that came between the steps
                self._save(step, state)
            self.saver.wait()
        return signals.received

    def _report(self, pending) -> None:
        if pending is None:
            return
        step, multiplier, metrics = pending
        loss, ok = float(metrics["loss"]), bool(metrics["ok"])
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        tokens = self.tokens_per_step / seconds
        mfu = tokens * self.flops_per_token / self.peak_flops if self.peak_flops else math.nan
        record = {
            "loss": loss,
            "smoothed_loss": self.smoothed.update(loss if ok and metrics["tokens"] else math.nan),
            "lr_multiplier": multiplier,
            "grad_norm": float(metrics["grad_norm"]),
            "trained_tokens": int(metrics["tokens"]),
            "tokens_per_second": tokens,
            "mfu": mfu,
            "seconds": seconds,
            "percent": 100 * step / self.total,
            "epoch": self.epoch_of(step),
        }
        self.log.log(step, **record)
        shown = "   -  " if math.isnan(mfu) else f"{100 * mfu:5.1f}%"
        self.reporter.step(
            step,
            f"loss {record['smoothed_loss']:.4f} | lrm {multiplier:.3f} | {tokens:,.0f} tok/s | mfu {shown} | "
            f"{record['percent']:.1f}% | epoch {record['epoch']}",
        )
        self._check(step, ok, loss, record["grad_norm"])

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

    def _evaluate(self, step: int, state: TrainState) -> None:
        self.measured = self.evaluate(state.params)
        if self.measured:
            self.log.log(step, **self.measured)
            self.reporter.say(f"step {step:05d} | " + " | ".join(f"{k} {v:.4f}" for k, v in self.measured.items()))
        self.clock = time.perf_counter()

    def _save(self, step: int, state: TrainState) -> None:
        self.log.sync()
        counts = {"skipped": self.skipped, "smoothed_loss": self.smoothed.state()}
        meta = {"step": step, **self.measured, **counts, **self.meta(step)}
        self.saver.save(step, state, meta)
        self.reporter.say(f"step {step:05d} | saving {self.saver.folder / str(step)}")
        self.clock = time.perf_counter()


class Signals:
    """While it is entered, SIGTERM and SIGINT are noted instead of ending the process; a second SIGINT ends it."""

    def __init__(self):
        self.received = 0

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@contextlib.contextmanager
def explaining_memory(sizes: dict[str, Any]):
    """Where the device runs out of memory inside, MemoryError with the sizes in force and the flags to lower."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        in_force = ", ".join(f"--{name.replace('_', '-')}={value}" for name, value in sizes.items())
        raise MemoryError(
            f"Out of device memory with {in_force}. Lower --device-batch-size first: gradient accumulation keeps "
            "--total-batch-size, and so the training, the same. Then lower --max-seq-len, or use more devices "
            f"(parameters and optimizer are sharded over them). The device said: {text.splitlines()[0][:300]}"
        ) from error
