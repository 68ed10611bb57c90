"""Evaluation of a model on tasks: accuracies with intervals, and ChatCORE. Settings and examples: flags/eval.py."""

import dataclasses
import datetime
import json
import os
import time
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nanochat_jax.checkpoints import find, store
from nanochat_jax.checkpoints.find import check_tokenizer
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.device import choose_attention, compute_dtype, describe_device, start_device
from nanochat_jax.cli.settings import check_bounds, require
from nanochat_jax.cli.waiting import Silence, saying
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import make_mesh, own_devices
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import param_shardings
from nanochat_jax.evals.chatcore import BASELINES, WITH_SPELLING, chatcore
from nanochat_jax.evals.eval_set import EvalSet, make_eval_set
from nanochat_jax.evals.evaluator import EvalResult, Evaluator
from nanochat_jax.files import bucket
from nanochat_jax.files.json_numbers import finite_or_null
from nanochat_jax.files.paths import base_dir, output_dir, write_atomically, write_to
from nanochat_jax.flags.eval import EvalConfig
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tools import make_toolbox
from nanochat_jax.model.attention import check_attention_backend
from nanochat_jax.tasks.registry import TASKS, find_name, make_task
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.memory import explaining_memory

LESS_MEMORY = "Lower --slots or --max-new-tokens, for multiple choice --batch-size, or use more devices"


def check(cfg: EvalConfig) -> SamplingParams:
    """How to sample. ValueError for a setting that cannot work, whatever the model and the tasks are."""
    check_bounds(cfg)
    require(
        cfg.num_samples == 1 or cfg.temperature > 0,
        f"--num-samples={cfg.num_samples} at --temperature 0 would be the same answer each time: give a --temperature",
    )
    if cfg.json:
        require(not bucket.as_path(cfg.json).exists(), f"--json {cfg.json} exists: name a new file")
    if cfg.json and not bucket.in_bucket(bucket.as_path(cfg.json)):
        folder = cfg.json.absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        require(os.access(folder, os.W_OK), f"--json {cfg.json} must be in a folder with write access")
    return SamplingParams(cfg.temperature, cfg.top_k, cfg.max_new_tokens)


def task_names(flag: str | None) -> list[str]:
    """The tasks that -a names, each once; default: all. ValueError: there is no such task."""
    if flag is None:
        return list(TASKS)
    return list(dict.fromkeys(find_name(name.strip()) for name in flag.split("|")))


def make_eval_sets(cfg: EvalConfig, tokenizer: Tokenizer) -> tuple[list[EvalSet], dict[str, str]]:
    """The problems of every task that can be run, and why the others cannot. ValueError, OSError: a task that -a names
    cannot be run, or none can."""
    eval_sets, not_run = [], {}
    for name in task_names(cfg.task_name):
        try:
            task = make_task(name, data_dir=cfg.data_dir, unsafe=cfg.unsafe_exec)
        except (ValueError, OSError) as e:
            if cfg.task_name:
                raise
            not_run[name] = str(e)
            continue
        eval_sets.append(make_eval_set(name, task, tokenizer, cfg.max_problems))
    for name, reason in not_run.items():
        print0(f"WARNING: {name} is not run: {reason}")
    require(bool(eval_sets), "no task can be run: see the reasons above")
    return eval_sets, not_run


def main(cfg: EvalConfig) -> int:
    """Evaluate -> the exit code, 0."""
    sampling = check(cfg)
    task_names(cfg.task_name)  # a wrong name is found before anything is loaded
    tools = make_toolbox(cfg.tool, cfg.tool_tokens)
    write_to(cfg.output_dir)
    start_device(cfg.device_type, cfg)
    mesh = make_mesh(cfg.mesh or "")
    check_attention_backend(cfg.attention, mesh, packed=False)
    describe_device(mesh, print0)
    dtype = compute_dtype(cfg.dtype)

    # Problems and model; what can fail without the weights comes before they are read
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    found = find.find_model(cfg.source, cfg.model_tag, cfg.step)
    check_tokenizer(tokenizer, find.peek_meta(found))
    with processes.process_zero_first("the problems"):
        eval_sets, not_run = make_eval_sets(cfg, tokenizer)
    sizes = ", ".join(f"{eval_set.name}: {len(eval_set.prompts)}" for eval_set in eval_sets)
    processes.agree("the problems", {"model": find.identity(found), "tokenizer": tokenizer.digest(), "problems": sizes})
    print0(f"Model: {found}")
    with saying("reading the model"):
        model_config, params, _ = find.load_params(found)
    longest = max(len(prompt) for eval_set in eval_sets for prompt in eval_set.prompts)
    attention = choose_attention(
        cfg.attention, model_config, longest, mesh=mesh, dtype=dtype, packed=False, training=False
    )
    print0(f"{dtype.name}, attention {attention}")
    own = own_devices(mesh)  # each process evaluates its part of the problems by itself
    evaluator = Evaluator(
        model_config,
        tokenizer,
        own,
        dtype=dtype,
        attention=attention,
        rows=cfg.batch_size,
        slots=max(1, cfg.slots // processes.count()),
        tools=tools,
    )

    # One task after the other; after each, --json has the numbers so far
    kept = place_beside(cfg.source, found)
    report = {
        "model": str(found),
        "checkpoint": find.identity(found),
        "time": round(time.time(), 3),
        "source": cfg.source,
        "step": found.step,
        "dtype": dtype.name,
        "attention": attention,
        "sampling": dataclasses.asdict(sampling) | {"samples": cfg.num_samples, "seed": cfg.seed},
        "max_turns": cfg.max_turns,
        "tools": [tool.name for tool in tools.tools],
        "max_problems": cfg.max_problems,
        "tasks": {},
        "not_run": not_run,
        "versions": store.versions(),
    }
    console, silence = Console(quiet=processes.index() > 0), Silence()
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        jax.set_mesh(own),
        explaining_memory({"slots": cfg.slots}, LESS_MEMORY),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars,
    ):
        params = jax.device_put(params, param_shardings(params, own))
        for eval_set in eval_sets:
            bar = bars.add_task(eval_set.name, total=len(eval_set.prompts))

            def progress(done: int, total: int, name: str = eval_set.name, bar=bar) -> None:
                bars.update(bar, completed=done, total=total)
                if not console.is_terminal and silence.over():
                    print_line(console, f"{name}: {done:,} of {total:,}")
                    silence.begin()

            began = time.perf_counter()
            result = evaluator.evaluate(
                params,
                eval_set,
                sampling,
                samples=cfg.num_samples,
                seed=cfg.seed,
                max_turns=cfg.max_turns,
                progress=progress,
            )
            bars.remove_task(bar)
            record = report["tasks"][eval_set.name] = make_record(eval_set, result, time.perf_counter() - began)
            print_line(console, f"{eval_set.name}: {summary(record)}")
            silence.begin()
            save(cfg.json, report)
    accuracies = {name: record["accuracy"]["value"] for name, record in report["tasks"].items()}
    report["chatcore"] = chatcore(accuracies)
    report["chatcore_with_spelling"] = chatcore(accuracies, WITH_SPELLING)
    save(cfg.json, report)
    print_table(console, report)
    keep(kept, report)
    return 0


def place_beside(source: str, found: find.Found) -> Any:
    """A new file for the result in the model's folder, of the directory that is written to; None, and said so, where
    that cannot be written. On process 0; None on others."""
    if processes.index():
        return None
    folder = output_dir() / store.SOURCES[source] / found.tag
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = bucket.in_bucket(folder) or os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        print0(f"NOTE: {folder} cannot be written to, so the result is not kept there (--output-dir: in another place)")
        return None
    return folder / f"eval_{found.step:06d}_{datetime.datetime.now():%Y-%m-%dT%H-%M-%S-%f}.json"


def keep(path: Any, report: dict) -> None:
    """The whole result in the model's folder; that it cannot be written there is a sentence, as it was printed."""
    if path is None:
        return
    try:
        save(path, report)
    except Exception as e:
        reason = (e.strerror or str(e)) if isinstance(e, OSError) else bucket.error_text(e)
        if reason is None:
            raise
        print0(f"NOTE: the result is not kept: {path}: {reason}")
    else:
        print0(f"The result is in {path}")


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
    if record.get("cut"):
        parts.append(f"{record['cut']:.1%} of the answers were cut at --max-new-tokens or the context's end")
    return "; ".join([*parts, f"{record['seconds']:.1f} s"])


def percent(share: dict) -> str:
    """A share of a record in per cent."""
    return f"{share['value']:.2%}"


def interval(share: dict) -> str:
    """Its 95 % interval."""
    return f"{share['low']:.1%} to {share['high']:.1%}"


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


def print_line(console: Console, text: str) -> None:
    """A line as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def save(path: Any, report: dict) -> None:
    """The report so far as the file of this path, by process 0; nothing for None."""
    if path and not processes.index():
        write_atomically(path, (json.dumps(finite_or_null(report), allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    cli_main.run_stage(main, parse(EvalConfig, prog="python -m nanochat_jax.eval"))
