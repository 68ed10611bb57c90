"""A small bundle of CORE: a task of each kind, with examples before each one and without."""

import csv
import json
import random
from pathlib import Path

import yaml

RNG = random.Random(0)


def words(low: int, high: int) -> str:
    return " ".join(
        RNG.choices(("red", "green", "blue", "one", "two", "three", "under", "over"), k=RNG.randint(low, high))
    )


def choices(n: int) -> list[dict]:
    return [
        {"query": f"{words(1, 4)}?", "choices": [words(1, 2) for _ in range(2 + i % 3)], "gold": i % 2}
        for i in range(n)
    ]


def contexts(n: int) -> list[dict]:
    return [
        {"context_options": [words(2, 3) for _ in range(2)], "continuation": words(1, 3), "gold": i % 2}
        for i in range(n)
    ]


def continuations(n: int) -> list[dict]:
    return [{"context": f"{words(2, 5)} ", "continuation": words(1, 2)} for _ in range(n)]


TASKS = [  # entry of core.yaml, random baseline in per cent, lines
    (
        {
            "label": "which",
            "icl_task_type": "multiple_choice",
            "dataset_uri": "some/choices.jsonl",
            "num_fewshot": [2],
            "continuation_delimiter": "\nAnswer: ",
        },
        25,
        choices(7),
    ),
    ({"label": "who", "icl_task_type": "schema", "dataset_uri": "contexts.jsonl", "num_fewshot": [0]}, 50, contexts(5)),
    (
        {"label": "what", "icl_task_type": "language_modeling", "dataset_uri": "some/what.jsonl", "num_fewshot": [1]},
        0,
        continuations(6),
    ),
]


def write_bundle(folder: Path) -> Path:
    """core.yaml, eval_meta_data.csv and eval_data/ of TASKS -> the folder."""
    folder.mkdir(parents=True)
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [entry for entry, _, _ in TASKS]}, sort_keys=False))
    with (folder / "eval_meta_data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Task Category", "Random baseline"])
        writer.writerows([entry["label"], "made up", baseline] for entry, baseline, _ in TASKS)
    for entry, _, rows in TASKS:
        path = folder / "eval_data" / entry["dataset_uri"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
