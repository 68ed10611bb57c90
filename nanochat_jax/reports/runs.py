"""What a run's folder holds for a reader: the numbers of its steps, texts of its model, results of eval, its settings.

Everything is read as others may have left it: what has another form is left out, and `log` is told.
"""

import collections
import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.reports.charts import Points
from nanochat_jax.train.metrics import is_step, read_metrics

STAGES = ("base_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints")
TAIL_BYTES = 2_000_000  # of rollouts.jsonl are read, from its end
Log = Callable[[str], None]


class Run(NamedTuple):
    """A run as far as it has come."""

    folder: Path
    records: list[dict]  # of metrics.jsonl, see `read_metrics`
    numbers: dict[str, Points]  # what of them can be drawn, see `numbers_of`
    answers: list[dict]  # to the last problem in rollouts.jsonl, from the best to the worst; [] where there is none
    error: str = ""  # why metrics.jsonl cannot be read


def find_runs(base: Path) -> list[Path]:
    """Folders of runs in a base directory, stage after stage."""
    return [path.parent for stage in STAGES for path in sorted((base / stage).glob("*/metrics.jsonl"))]


def read_run(folder: Path, log: Log = str) -> Run:
    """The run in a folder; what cannot be read is empty."""
    path = folder / "metrics.jsonl"
    try:
        records = read_metrics(path, log)
    except OSError as e:
        log(f"{path}: {e.strerror}")
        return Run(folder, [], {}, [], e.strerror or str(e))
    return Run(folder, records, numbers_of(records), last_answers(folder / "rollouts.jsonl", log))


# --------------------------------------------------------------------------------------------- numbers over the steps
def numbers_of(records: Sequence[dict]) -> dict[str, Points]:
    """Of each metric (step, value), in the order of the steps, where it was logged as a number that can be drawn; of a
    step that was logged twice, the later."""
    found = collections.defaultdict(dict)
    for record in records:
        step = record["step"]
        for name, value in record.items():
            if is_number(value):
                found[name][step] = value
    return {name: sorted(by_step.items()) for name, by_step in found.items()}


def is_number(value: object) -> bool:
    """Whether a value of a file is a number that can be drawn; integers of any size are JSON."""
    return type(value) in (float, int) and abs(value) < 1e300


# ------------------------------------------------------------------------------------------------------ answers of RL
def last_answers(path: Path, log: Log = str) -> list[dict]:
    """All answers to the last problem in rollouts.jsonl, from the best to the worst."""
    try:
        with path.open("rb") as file:
            start = file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as e:
        log(f"{path}: {e.strerror}")
        return []
    records, others = [], 0
    for line in filter(None, lines[1:] if start else lines):  # the seek has cut the first one
        with contextlib.suppress(ValueError, RecursionError):
            if is_rollout(record := json.loads(line)):
                records.append(record)
                continue
        others += 1
    if others:
        log(f"{path}: {others:,} line{'s are' if others > 1 else ' is'} no answer of a rollout")
    last = records[-1] if records else {}
    answers = [r for r in records if (r["step"], r["example"]) == (last["step"], last["example"])]
    return sorted(answers, key=lambda record: -record["reward"])


def is_rollout(record: object) -> bool:
    """Whether a line of rollouts.jsonl has what the page shows, each of its type."""
    return (
        isinstance(record, dict)
        and is_step(record.get("step"))
        and type(record.get("example")) is int
        and all(is_number(record.get(name)) for name in ("reward", "advantage"))
        and all(isinstance(record.get(name), str) for name in ("prompt", "text"))
    )
