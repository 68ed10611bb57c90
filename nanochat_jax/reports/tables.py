"""What of runs is read and not drawn: their settings, their results on tasks, texts of their models. As HTML."""

import html
import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from nanochat_jax.reports.runs import Evaluation, Run, is_number

SHOWN_ANSWERS = 4  # to a problem
SHOWN_SAMPLES = 10  # measurements of a run, the last ones
LONGEST = 80  # letters of a setting
# Settings that name a run, or say how it was started or kept, and nothing of what was trained.
NOT_COMPARED = {
    *("run", "output_tag", "config", "preflight", "resume", "overwrite", "verbose", "keep_checkpoints"),
    *("save_patience", "coordinator", "num_processes", "process_id"),
}
SCORES = {
    "chatcore": "ChatCORE",
    "chatcore_with_spelling": "ChatCORE with SpellingBee",
    "core_metric": "CORE",
    "val_bpb": "bits per byte of held-out text",
}


class Shown(NamedTuple):
    """A run on the page."""

    number: int  # on the page: its colour, and part of what is named after it
    name: str  # among the runs of its stage
    key: str  # its stage and name: it stays the same when other runs come
    run: Run


def label(shown: Shown) -> str:
    """A run's name with its colour."""
    return f"<span class='run{shown.number} swatch'></span>{html.escape(shown.name)}"


def words(name: str) -> str:
    """A name of a setting or metric as it is read."""
    return name.replace("_", " ")


# ----------------------------------------------------------------------------------------------------------- settings
def differing_settings(shown: Sequence[Shown], also_not_compared: Sequence[str] = ()) -> str:
    """The settings in which runs differ, a row each; a run without a checkpoint has none."""
    known = [one.run.settings for one in shown if one.run.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    rows = ""
    for name in names:
        if name in NOT_COMPARED or name in also_not_compared:
            continue
        if len({plain(settings.get(name)) for settings in known}) > 1:
            cells = "".join(
                f"<td>{html.escape(plain(one.run.settings.get(name))) if one.run.settings else '–'}</td>"
                for one in shown
            )
            rows += f"<tr><th>{html.escape(words(name))}</th>{cells}</tr>"
    if not rows:
        return ""
    head = "".join(f"<th>{label(one)}</th>" for one in shown)
    return f"<h3>Settings that differ</h3><div class=wide><table><tr><td></td>{head}</tr>{rows}</table></div>"


def plain(value: Any) -> str:
    """A setting as text. Of a path only the name counts: the same data may lie elsewhere on another machine."""
    if value is None:
        return "not set"
    if isinstance(value, list):
        text = ", ".join(map(plain, value))
    elif isinstance(value, str):
        text = PurePath(value).name if value.startswith("/") else value
    else:
        text = json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


# --------------------------------------------------------------------------------------------------------- evaluations
def evaluations(shown: Shown) -> str:
    """A run's results on tasks: a row for a task, a column for each file of eval."""
    files = shown.run.evaluations
    if not files:
        return ""
    head = "".join(
        f"<th>step {one.step:,}<small>{html.escape(one.file)}</small>{how_sampled(one)}</th>" for one in files
    )
    rows = ""
    for task in dict.fromkeys(task for one in files for task in one.tasks):
        cells = "".join(f"<td>{result(one.tasks[task]) if task in one.tasks else '–'}</td>" for one in files)
        rows += f"<tr><th>{html.escape(task)}</th>{cells}</tr>"
    for task in dict.fromkeys(task for one in files for task in one.core):
        cells = "".join(f"<td>{core_result(one.core[task]) if task in one.core else '–'}</td>" for one in files)
        rows += f"<tr><th>CORE: {html.escape(task)}</th>{cells}</tr>"
    for key, title in SCORES.items():
        found = [one.facts.get(key) for one in files]
        if any(map(is_number, found)):
            cells = "".join(f"<td>{f'{value:.4f}' if is_number(value) else '–'}</td>" for value in found)
            rows += f"<tr><th>{title}</th>{cells}</tr>"
    table = f"<div class=wide><table><tr><td></td>{head}</tr>{rows}</table></div>"
    return details("evaluations", shown, "right answers, with 95 % intervals", table, is_open=True)


def how_sampled(one: Evaluation) -> str:
    """How answers were drawn, where they are not the likeliest ones."""
    sampling = one.facts.get("sampling")
    samples, temperature = (
        sampling.get(name) if isinstance(sampling, dict) else None for name in ("samples", "temperature")
    )
    if not (is_number(samples) and is_number(temperature) and temperature > 0):
        return ""
    return f"<small>{samples:,} answers at temperature {temperature:g}</small>"


def result(task: dict) -> str:
    """A share of right answers with its interval, and the number of problems."""
    share = task["accuracy"]
    value, low, high = (f"{100 * share[end]:.1f}" for end in ("value", "low", "high"))
    return f"{value} %<small>{low} to {high}, of {task['problems']:,}</small>"


def core_result(task: dict) -> str:
    """The same of a task of CORE, with its centred accuracy."""
    return f"{result(task)}<small>centred {task['centered']:.4f}</small>"


# --------------------------------------------------------------------------------------------------------------- texts
def samples(shown: Shown) -> str:
    """What a base model has continued texts with, the last measurement first."""
    found = shown.run.samples[-SHOWN_SAMPLES:]
    if not found:
        return ""
    texts = "".join(
        f"<h4>step {step:,}</h4><pre>{html.escape(chr(10).join(lines))}</pre>" for step, lines in reversed(found)
    )
    return details("samples", shown, f"samples, the last at step {found[-1][0]:,}", texts)


def last_answers(shown: Shown) -> str:
    """Some of the answers to RL's last problem, from the best to the worst."""
    answers = shown.run.answers
    if not answers:
        return ""
    count = min(SHOWN_ANSWERS, len(answers))
    some = [answers[round(i * (len(answers) - 1) / max(1, count - 1))] for i in range(count)]
    texts = "".join(
        f"<pre class='{'right' if (record['reward'] or 0) > 0 else 'wrong'}'>{html.escape(record['text'])}\n"
        f"<small>reward {number(record['reward'])}, advantage {number(record['advantage'])}</small></pre>"
        for record in some
    )
    said = f"step {answers[0]['step']:,}: {count} of {len(answers)} answers to one problem"
    return details("answers", shown, said, f"<pre>{html.escape(answers[0]['prompt'])}</pre>{texts}")


def number(value: float | None) -> str:
    """A number as text, also one that was not finite."""
    return "–" if value is None else f"{value:g}"


def details(kind: str, shown: Shown, said: str, inside: str, *, is_open: bool = False) -> str:
    """What a reader opens; said: what it is, beside the run's name."""
    summary = f"<summary>{label(shown)} <span class=said>{said}</span></summary>"
    key = html.escape(f"{kind} {shown.key}")
    return f"<details data-key='{key}'{' open' * is_open}>{summary}{inside}</details>"
