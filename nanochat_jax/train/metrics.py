"""What a run measured: metrics.jsonl is the truth; the console and wandb show the same numbers."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from nanochat_jax.checkpoints.ownership import FolderLost
from nanochat_jax.cli.waiting import Silence
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.append import AppendedFile
from nanochat_jax.files.json_numbers import finite_or_null
from nanochat_jax.train.wandb_log import WandbLog


@dataclasses.dataclass(frozen=True)
class Throughput:
    """How fast steps of a known size are."""

    tokens_per_step: int
    flops_per_token: int
    peak_flops: float | None  # of all devices together; None: unknown

    def of(self, seconds: float) -> dict[str, float | None]:
        """tokens_per_second and mfu (None where the peak is unknown) of a step that took so long."""
        tokens = self.tokens_per_step / seconds
        return {
            "tokens_per_second": tokens,
            "mfu": tokens * self.flops_per_token / self.peak_flops if self.peak_flops else None,
        }


class SmoothedAverage:
    """Exponential moving average of one of a step's numbers, de-biased so that the first average is the first value.

    nanochat's base training shows the loss so, with this decay."""

    DECAY = 0.9

    def __init__(self, name: str = "loss", total: float = 0.0, weight: float = 0.0):
        self.name, self.total, self.weight = name, total, weight

    def update(self, value: float) -> float:
        """The average with this value in it; one that is not finite is left out."""
        if math.isfinite(value):
            self.total = self.DECAY * self.total + (1 - self.DECAY) * value
            self.weight = self.DECAY * self.weight + (1 - self.DECAY)
        return self.total / self.weight if self.weight else float("nan")

    def state(self) -> list[float]:
        """[total, weight], which with the name make the average again."""
        return [self.total, self.weight]


class MetricsLog:
    """Append-only metrics.jsonl in the run's folder, and wandb where the run has a name other than "dummy".

    A record is {"step": k, ...}. A resumed run begins with {"event": "resume", "step": k}, which takes back what was
    recorded of later steps, a new one with {"event": "start"}, which takes back everything (see `read_metrics`). In a
    bucket, where nothing can be appended, the file is put anew by every `sync`.
    """

    def __init__(self, folder: Path, run: str, config: dict, *, project: str, resumed_at: int | None):
        self.file = self.wandb = None
        self._before: list[dict] = []
        self._table: tuple[int, str, Sequence[Mapping[str, Any]]] | None = None
        if processes.index():  # process 0 writes for all
            return
        bucket.local_path(folder).mkdir(parents=True, exist_ok=True)
        self.kept = folder / "metrics.jsonl"
        path = bucket.fetch(self.kept, exact=True)
        if resumed_at is not None:
            self._before = read_metrics(path) if path.exists() else []
            logged = len({r["step"] for r in self._before if "loss" in r and r["step"] <= resumed_at})
            if logged < resumed_at:  # of a folder that was copied or restored in part
                print0(f"NOTE: {path} has lost records of earlier steps: {logged:,} of {resumed_at:,} are there")
        self.file = AppendedFile(path)
        if self.file.ends_in_the_middle_of_a_line():
            self.file.write(b"\n")
        if run != "dummy":
            try:
                names = {"project": project, "directory": path.parent}
                self.wandb = WandbLog(folder, run, config, **names, before=self._before, resumed_at=resumed_at)
            except ValueError:
                self.close()
                raise
        self._write({"event": "start"} if resumed_at is None else {"event": "resume", "step": resumed_at})
        if self.wandb:
            self._write({"step": resumed_at or 0, "event": "wandb", "id": self.wandb.id, "sent": self.wandb.sent})

    def log(self, step: int, **values: Any) -> None:
        """One record; values are numbers, short strings or lists of them. A number that is not finite becomes null in
        the file."""
        if self.file:
            self._write({"step": step, **values})
        if self.wandb:
            self.wandb.log(step, values)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """For wandb alone, which gets the newest one with each checkpoint: a table costs it a file, and texts change
        little from step to step. rows: of the same columns, which are numbers or texts."""
        self._table = step, name, rows

    def measured_at(self, step: int) -> frozenset[str]:
        """Names of the measurements that this run, before it was resumed, has recorded of a step."""
        return frozenset(r["measured"] for r in self._before if r["step"] == step and "measured" in r)

    def records(self) -> list[dict]:
        """What the run has recorded so far, see `read_metrics`; on process 0, [] on others, and where it cannot be
        read."""
        try:
            return read_metrics(self.file.path) if self.file else []
        except OSError:
            return []

    def sync(self) -> None:
        """Force what was logged to disk; called with every checkpoint. OSError: the disk is full."""
        if self.file:
            self.file.sync()
            bucket.upload(self.file.path, self.kept)
        if self.wandb and self._table:
            self.wandb.table(*self._table)
            self._table = None

    def saved(self, checkpoint: Path) -> None:
        """The newest checkpoint that is whole on disk, for wandb's summary."""
        if self.wandb:
            self.wandb.summarise(checkpoint=str(checkpoint))

    def close(self, *, folder_lost: bool = False) -> None:
        """folder_lost: another run's records are in the bucket now."""
        if self.file:
            self.file.close()
            if not folder_lost:
                bucket.upload(self.file.path, self.kept)
        if self.wandb:
            self.wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        self.close(folder_lost=kind is not None and issubclass(kind, FolderLost))

    def _write(self, record: dict) -> None:
        record = finite_or_null(record | {"time": round(time.time(), 3)})
        self.file.write(json.dumps(record, allow_nan=False).encode() + b"\n")


def is_step(number: object) -> bool:
    """Whether a value of a file is the number of a step, which a chart can show too."""
    return type(number) is int and 0 <= number < 2**53


def read_metrics(path: Path, log: Callable[[str], None] = str) -> list[dict]:
    """Records of metrics.jsonl in step order, without what later runs took back.

    A line that is no JSON object with a step, such as one that was cut off, is skipped; `log` is told how many.
    """
    records: list[dict] = []
    skipped = 0
    for line in filter(None, path.read_bytes().split(b"\n")):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        is_start = isinstance(record, dict) and record.get("event") == "start"
        if is_start:
            records = []
        elif not (isinstance(record, dict) and is_step(record.get("step"))):
            skipped += 1
        elif record.get("event") == "resume":
            records = [r for r in records if r["step"] <= record["step"]]
        else:
            records.append(record)
    if skipped:
        log(f"{path}: {skipped:,} line{'s are' if skipped > 1 else ' is'} no record of a step")
    return records


class Reporter:
    """The console of a training run: a progress bar with the time left on a terminal, plain lines otherwise."""

    def __init__(self, total: int, done: int = 0):
        self.total, self.enabled, self.progress = total, not processes.index(), None
        self.silence = Silence()
        if self.enabled and sys.stdout.isatty():
            numbers = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # what gives way on a narrow terminal
            self.progress = Progress(
                *(BarColumn(10), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn(compact=True)),
                TextColumn("{task.description}", markup=False, table_column=numbers),
                console=Console(),
                expand=True,
            )
            self.task = self.progress.add_task("", total=total, completed=done)
            self.progress.start()

    def step(self, done: int, text: str) -> None:
        """After every step: moves the bar, or prints a line."""
        if self.progress:
            self.progress.update(self.task, completed=done, description=text)
        else:
            self.say(f"step {done:05d}/{self.total:05d} | {text}")

    def doing(self, text: str) -> None:
        """In the middle of long work: what the bar shows meanwhile, or a line now and then."""
        if self.progress:
            self.progress.update(self.task, description=text)
        elif self.enabled and self.silence.over():
            self.say(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.silence.begin()
        if self.progress:
            self.progress.console.print(text, markup=False, highlight=False)
        elif self.enabled:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.progress:
            self.progress.stop()
