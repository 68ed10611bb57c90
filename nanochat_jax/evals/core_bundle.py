"""The files of CORE: nanochat's eval_bundle, fetched where it is missing, and the tasks in it, checked line by line."""

import csv
import json
import os
import random
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.download import DownloadError, download, locked, writing
from nanochat_jax.files.paths import cache_dir, kept_dir
from nanochat_jax.files.unzip import unzip_folder
from nanochat_jax.tasks.sources import SOURCES

FOLDER = "eval_bundle"  # of the base directory
ADDRESS = "NANOCHAT_EVAL_BUNDLE_URL"  # environment variable: another address of the zip file
SHUFFLE_SEED = 1337
FIELDS = {  # of a line, by the kind of its task: texts, and a list of texts of which `gold` numbers the right one
    "multiple_choice": (("query",), "choices"),
    "schema": (("continuation",), "context_options"),
    "language_modeling": (("context", "continuation"), None),
}


class CoreTask(NamedTuple):
    """A task of CORE."""

    label: str
    kind: str  # one of FIELDS
    fewshot: int  # examples before each one
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing, 0 to below 1
    rows: list[dict[str, Any]]  # the lines, shuffled


def find_bundle(data_dir: Path | None = None, log: Callable = print0) -> Path:
    """The folder eval_bundle of `data_dir` or of the base directory; downloaded into that where neither has one.
    DownloadError: it cannot be had."""
    given = [data_dir.expanduser()] if data_dir else []
    for root in dict.fromkeys([*given, kept_dir(), cache_dir()]):
        folder = bucket.fetch(root / FOLDER)
        if folder.is_dir():
            return folder
    target, archive = cache_dir() / FOLDER, cache_dir() / f".{FOLDER}.zip"
    address = os.environ.get(ADDRESS) or SOURCES[f"{FOLDER}.zip"]
    with locked(target, log):
        if not target.is_dir():  # another process may have made it meanwhile
            log(f"downloading CORE's tasks (162 MB) to {target}")
            download(address, archive, log)
            try:
                with writing(target.parent):
                    unzip_folder(archive, FOLDER, target)
            except ValueError as e:
                raise DownloadError(f"{address.split('?')[0]} is damaged at its source: {e}") from e
            finally:
                archive.unlink(missing_ok=True)
    return target


def read_tasks(folder: Path, max_per_task: int | None = None) -> list[CoreTask]:
    """The tasks of a bundle, in its order, each with the first `max_per_task` (None: all) of its shuffled lines.

    ValueError, OSError: one sentence about a file that is missing, or not as it must be."""
    path = folder / "core.yaml"
    settings = read_yaml(path)
    listed = settings.get("icl_tasks") if isinstance(settings, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path} must have a list of tasks, icl_tasks")
    baselines = read_baselines(folder / "eval_meta_data.csv")
    tasks = [read_task(folder, number, entry, baselines, max_per_task) for number, entry in enumerate(listed, 1)]
    labels = [task.label for task in tasks]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"{path}: each task must have a label of its own, {twice[0]!r:.60} comes twice")
    return tasks


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. ValueError: it is none."""
    import yaml

    try:
        return yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: delete {path.parent}, and it is fetched anew") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} must be YAML: {' '.join(str(e).split())[:200]}") from e


def read_baselines(path: Path) -> dict[str, float]:
    """Label -> accuracy of guessing. ValueError: a row has no such number, 0 to below 100 per cent."""
    found = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                percent = float(row["Random baseline"])
                if not 0 <= percent < 100:
                    raise ValueError(f"the baseline of {row['Eval Task']} is {percent}")
                found[row["Eval Task"]] = 0.01 * percent
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        said = f"no column {e}" if isinstance(e, KeyError) else str(e)
        raise ValueError(
            f"{path} must have the columns Eval Task and Random baseline, this a number from 0 to below 100: {said}"
        ) from e
    return found


def read_task(folder: Path, number: int, entry: Any, baselines: dict[str, float], max_per_task: int | None) -> CoreTask:
    """The task of an entry of core.yaml, the number-th."""

    def check(holds: bool, must: str) -> None:
        if not holds:
            raise ValueError(f"{folder / 'core.yaml'}, task {number}: {must}, got {entry!r:.300}")

    check(isinstance(entry, dict), "a task must be a mapping")
    label, kind, shots = (entry.get(name) for name in ("label", "icl_task_type", "num_fewshot"))
    uri, delimiter = entry.get("dataset_uri"), entry.get("continuation_delimiter", " ")
    check(isinstance(label, str), "label must be a text")
    check(kind in [*FIELDS], f"icl_task_type must be one of {', '.join(FIELDS)}")
    one = isinstance(shots, list) and bool(shots) and type(shots[0]) is int and shots[0] >= 0
    check(one, "num_fewshot must be a list that begins with a number of at least 0")
    check(isinstance(delimiter, str), "continuation_delimiter must be a text")
    inside = isinstance(uri, str) and not PurePosixPath(uri).is_absolute() and ".." not in PurePosixPath(uri).parts
    check(inside, "dataset_uri must be a path inside eval_data")
    if label not in baselines:
        raise ValueError(f"{folder / 'eval_meta_data.csv'} must have the random baseline of {label!r:.60}")
    rows = read_rows(folder / "eval_data" / uri, kind)
    random.Random(SHUFFLE_SEED).shuffle(rows)
    rows = rows[:max_per_task]
    if len(rows) <= shots[0]:
        raise ValueError(
            f"{label} shows {shots[0]} other examples before each, so it needs at least {shots[0] + 1}, got "
            f"{len(rows)}: raise the number of examples a task (--max-problems, --core-max-per-task)"
        )
    return CoreTask(label, kind, shots[0], delimiter, baselines[label], rows)


def read_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a task's file, in order; empty ones are left out."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(checked_row(json.loads(line), kind))
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"{path}, line {number}: {e}") from e
    if not rows:
        raise ValueError(f"{path} must hold examples, a line each, it is empty")
    return rows


def checked_row(row: Any, kind: str) -> dict[str, Any]:
    """A line with what its kind of task needs. ValueError: it lacks something."""
    names, several = FIELDS[kind]
    if not isinstance(row, dict):
        raise ValueError(f"an example must be an object, got {row!r:.60}")
    for name in names:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name} must be a text, got {row.get(name)!r:.60}")
    if several:
        offered, gold = row.get(several), row.get("gold")
        if not isinstance(offered, list) or not offered or not all(isinstance(text, str) for text in offered):
            raise ValueError(f"{several} must be a list of texts, got {offered!r:.60}")
        if type(gold) is not int or not 0 <= gold < len(offered):
            raise ValueError(f"gold must number one of the {len(offered)} {several}, from 0, got {gold!r:.60}")
    return row
