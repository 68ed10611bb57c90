"""What a run's folder holds for a reader: the numbers of its steps, texts of its model, results of eval, its settings.

Everything is read as others may have left it: what has another form is left out, and `log` is told.
"""

import collections
import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_jax.checkpoints import integrity
from nanochat_jax.reports.charts import Points
from nanochat_jax.train.metrics import is_step, read_metrics

STAGES = ("base_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints")
NUMBERS = ("core_metric", "val_bpb")  # in results of eval, of a base model
TAIL_BYTES = 2_000_000  # of rollouts.jsonl are read, from its end
Log = Callable[[str], None]


class Evaluation(NamedTuple):
    """A file that eval has written."""

    file: str
    step: int  # of the model
    tasks: dict[str, dict]  # see `is_result`
    core: dict[str, dict]  # the same for CORE's tasks, with their centred accuracies too
    facts: dict[str, Any]  # all that the file holds


class Run(NamedTuple):
    """A run as far as it has come."""

    folder: Path
    records: list[dict]  # of metrics.jsonl, see `read_metrics`
    numbers: dict[str, Points]  # what of them can be drawn, see `numbers_of`
    samples: list[tuple[int, list[str]]]  # (step, texts), in the order of the file
    answers: list[dict]  # to the last problem in rollouts.jsonl, from the best to the worst; [] where there is none
    evaluations: list[Evaluation]  # in the order of their steps
    settings: dict[str, Any]  # of the newest checkpoint; {} where there is none
    error: str = ""  # why metrics.jsonl cannot be read


def find_runs(base: Path) -> list[Path]:
    """Folders of runs in a base directory, stage after stage."""
    return [path.parent for stage in STAGES for path in sorted((base / stage).glob("*/metrics.jsonl"))]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as tell them apart."""
    for count in range(1, max((len(folder.parts) for folder in folders), default=0)):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len({*names}) == len({*folders}):
            return names
    return [str(folder) for folder in folders]


def read_run(folder: Path, log: Log = str) -> Run:
    """The run in a folder; what cannot be read is empty."""
    path, records, error = folder / "metrics.jsonl", [], ""
    try:
        records = read_metrics(path, log)
    except OSError as e:
        error = e.strerror or str(e)
        log(f"{path}: {error}")
    return Run(
        folder,
        records,
        numbers_of(records),
        [(record["step"], record["samples"]) for record in records if is_texts(record.get("samples"))],
        last_answers(folder / "rollouts.jsonl", log),
        evaluations_of(records, read_evaluations(folder, log)),
        read_settings(folder, log),
        error,
    )


def evaluations_of(records: Sequence[dict], found: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that are younger than the run's first record: older ones are of a run that --overwrite has deleted."""
    began = next((record["time"] for record in records if is_number(record.get("time"))), 0.0)
    return [one for one in found if not is_number(when := one.facts.get("time")) or when >= began]


def read_json(path: Path) -> Any:
    """What a file holds, None where it is no JSON. OSError: it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


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


def is_number_or_none(value: object) -> bool:
    """The same, or what stands in a file for a number that is not finite."""
    return value is None or is_number(value)


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
        if record := read_rollout(line):
            records.append(record)
        else:
            others += 1
    if others:
        log(f"{path}: {no_rollouts(others)}")
    last = records[-1] if records else {}
    answers = [r for r in records if (r["step"], r["example"]) == (last["step"], last["example"])]
    return sorted(answers, key=lambda record: math.inf if record["reward"] is None else -record["reward"])


def read_rollout(line: bytes) -> dict | None:
    """The answer in a line of rollouts.jsonl, its numbers that are not finite as None; None where it is another."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line, parse_constant=lambda _: None)
        return record if is_rollout(record) else None
    return None


def no_rollouts(lines: int) -> str:
    """What is said of so many lines."""
    return f"{lines:,} line{'s are' if lines > 1 else ' is'} no answer of a rollout"


def is_rollout(record: object) -> bool:
    """Whether a line of rollouts.jsonl has what the page shows, each of its type."""
    return (
        isinstance(record, dict)
        and is_step(record.get("step"))
        and type(record.get("example")) is int
        and all(name in record and is_number_or_none(record[name]) for name in ("reward", "advantage"))
        and all(isinstance(record.get(name), str) for name in ("prompt", "text"))
    )


# ---------------------------------------------------------------------------------------------------- results of eval
def read_evaluations(folder: Path, log: Log = str) -> list[Evaluation]:
    """The results of eval that lie in a run's folder, whatever their names are, in the order of their steps; of a step
    the newest last."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            facts = read_json(path)
        except OSError as e:
            log(f"{path}: {e.strerror}")
            continue
        if is_evaluation(facts):
            found.append(Evaluation(path.name, facts["step"], facts["tasks"], core_of(facts), facts))
        else:
            log(f"{path}: no result of eval")
    return sorted(found, key=lambda one: (one.step, when if is_number(when := one.facts.get("time")) else 0.0))


def evaluated(folder: Path, checkpoint: str) -> dict[str, float]:
    """Of a model, by its `find.identity`, the share of right answers to each task, where eval has kept it in the run's
    folder; the newest of each."""
    mine = [one for one in read_evaluations(folder) if one.facts.get("checkpoint") == checkpoint]
    return {task: result["accuracy"]["value"] for one in mine for task, result in one.tasks.items()}


def evaluated_numbers(folder: Path, checkpoint: str) -> dict[str, float]:
    """The same for the NUMBERS of a base model."""
    mine = [one.facts for one in read_evaluations(folder) if one.facts.get("checkpoint") == checkpoint]
    return {name: facts[name] for facts in mine for name in NUMBERS if is_number(facts.get(name))}


def core_of(facts: dict[str, Any]) -> dict[str, dict]:
    """CORE's tasks in a result of eval; {} where there are none, or in another form."""
    tasks = facts.get("core")
    whole = isinstance(tasks, dict) and all(
        is_result(task) and is_number(task.get("centered")) for task in tasks.values()
    )
    return tasks if whole else {}


def is_evaluation(facts: object) -> bool:
    """Whether a file has the form that eval gives it."""
    return (
        isinstance(facts, dict)
        and is_step(facts.get("step"))
        and isinstance(facts.get("tasks"), dict)
        and all(map(is_result, facts["tasks"].values()))
    )


def is_result(task: object) -> bool:
    """Whether an entry has the share of right answers, its 95 % interval, and of how many problems."""
    return (
        isinstance(task, dict)
        and is_step(task.get("problems"))
        and isinstance(share := task.get("accuracy"), dict)
        and all(is_number(share.get(end)) for end in ("value", "low", "high"))
    )


def is_texts(value: object) -> bool:
    """Whether a record's value is a list of texts, as samples of a model are."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


# ----------------------------------------------------------------------------------------------------------- settings
def read_settings(folder: Path, log: Log = str) -> dict[str, Any]:
    """The settings that the newest checkpoint of a run has recorded, without Orbax, whose import takes seconds."""
    for step in reversed(integrity.steps(folder)):
        path = folder / str(step) / "meta" / "data.json"
        with contextlib.suppress(OSError):  # the run has deleted the checkpoint meanwhile
            meta = read_json(path)
            settings = meta.get("user_config") if isinstance(meta, dict) else None
            if isinstance(settings, dict):
                return settings
            log(f"{path}: no settings of a run")
    return {}
