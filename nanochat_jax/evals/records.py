"""Results as eval keeps them in files, and shows them to people."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanochat_jax.cli.bars import print_line
from nanochat_jax.evals.chatcore import BASELINES, WITH_SPELLING
from nanochat_jax.evals.core import CoreResult
from nanochat_jax.evals.eval_set import EvalSet
from nanochat_jax.evals.evaluator import EvalResult


def make_record(eval_set: EvalSet, result: EvalResult, seconds: float) -> dict:
    """A task's entry in the JSON file; shares as value, low and high of the 95 % interval."""
    generated = eval_set.letters is None
    record = {
        "kind": "generated" if generated else "multiple choice",
        "problems": len(eval_set.prompts),
        "accuracy": result.accuracy._asdict(),
        "right": result.passed.sum(1).tolist(),  # answers to each problem
        "seconds": round(seconds, 3),
    }
    if generated:
        record["pass_at"] = {str(k): share._asdict() for k, share in result.pass_at().items()}
        record |= {"cut": result.cut, "too_long": result.too_long}
    return record


def summary(record: dict) -> str:
    """A task's record in one line."""
    parts = [f"{percent(record['accuracy'])} of {record['problems']:,} problems, {interval(record['accuracy'])}"]
    if record.get("too_long"):
        parts.append(f"{record['too_long']:,} do not fit into the context and count as wrong")
    if record.get("beyond_context"):
        parts.append(f"{record['beyond_context']:,} are longer than the model's context, and nothing is cropped")
    if record.get("cut"):
        parts.append(f"{record['cut']:.1%} of the answers were cut at --max-new-tokens or the context's end")
    return "; ".join([*parts, f"{record['seconds']:.1f} s"])


def percent(share: dict) -> str:
    """A share of a record in per cent."""
    return f"{share['value']:.2%}"


def interval(share: dict) -> str:
    """Its 95 % interval."""
    return f"{share['low']:.1%} to {share['high']:.1%}"


def make_core_record(result: CoreResult, seconds: float) -> dict:
    """A CORE task's entry in the JSON file."""
    return {
        "kind": "CORE",
        "problems": len(result.right),
        "accuracy": result.accuracy._asdict(),
        "centered": result.centered,
        "right": result.right.astype(int).tolist(),  # each example
        "beyond_context": result.beyond_context,
        "seconds": round(seconds, 3),
    }


def core_csv(records: Mapping[str, dict[str, Any]], core_metric: float) -> str:
    """The lines of nanochat's CSV file of these tasks: columns Task, Accuracy and Centered, CORE in the last line."""
    lines = [("Task", "Accuracy", "Centered")]
    for label, record in records.items():
        label = f'"{label}"' if "," in label else label
        lines.append((label, f"{record['accuracy']['value']:.6f}", f"{record['centered']:.6f}"))
    lines.append(("CORE", "", f"{core_metric:.6f}"))
    return "".join(f"{task:<35}, {accuracy:<10}, {centered:<10}\n" for task, accuracy, centered in lines)


def print_table(console: Console, report: dict) -> None:
    """The table of all tasks, and ChatCORE."""
    n = report["sampling"]["samples"]
    table = Table("task", title=f"{report['source']} model, step {report['step']}")
    for header in ("problems", "accuracy", "95 % interval", *([f"pass@{n}"] if n > 1 else [])):
        table.add_column(header, justify="right")
    for name, record in report["tasks"].items():
        pass_at_n = [percent(record["pass_at"][str(n)]) if "pass_at" in record else "-"] if n > 1 else []
        accuracy = record["accuracy"]
        table.add_row(Text(name), f"{record['problems']:,}", percent(accuracy), interval(accuracy), *pass_at_n)
    for name in report["not_run"]:
        table.add_row(Text(name), "not run")
    console.print(table)
    if n > 1:
        print_line(console, f"accuracy is pass@1; nanochat's, where one right answer of {n} is enough, is pass@{n}")
    for key, title, baselines in (
        ("chatcore", "ChatCORE", BASELINES),
        ("chatcore_with_spelling", "ChatCORE with SpellingBee", WITH_SPELLING),
    ):
        if report[key] is not None:
            print_line(console, f"{title}: {report[key]:.4f}")
        elif report["not_run"]:
            missing = ", ".join(name for name in baselines if name not in report["tasks"])
            print_line(console, f"{title}: not computed, it needs {missing} too")
    if report["chatcore"] is not None:
        print_line(console, "(mean over its tasks of how far accuracy is from guessing, 0, to perfect, 1)")


def print_core(console: Console, report: dict) -> None:
    """The table of CORE's tasks, and CORE."""
    table = Table("CORE task", title=f"{report['source']} model, step {report['step']}")
    for header in ("examples", "accuracy", "95 % interval", "centred"):
        table.add_column(header, justify="right")
    for label, record in report["core"].items():
        accuracy = record["accuracy"]
        cells = f"{record['problems']:,}", percent(accuracy), interval(accuracy), f"{record['centered']:.4f}"
        table.add_row(Text(label), *cells)
    console.print(table)
    limited = f", of the first {report['max_problems']} examples of each task" if report["max_problems"] else ""
    print_line(console, f"CORE: {report['core_metric']:.4f}{limited}")
