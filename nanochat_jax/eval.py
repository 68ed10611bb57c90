"""Evaluation of a model: on tasks, with intervals and ChatCORE; of a base model CORE, bits per byte and samples.

Settings and examples: flags/eval.py.
"""

import dataclasses
import datetime
import json
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanochat_jax.checkpoints import find, store
from nanochat_jax.checkpoints.find import check_tokenizer
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli.bars import Bars
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.device import choose_attention, compute_dtype, describe_device, start_device
from nanochat_jax.cli.settings import check_bounds, require
from nanochat_jax.cli.waiting import saying
from nanochat_jax.data.documents import DocumentRows
from nanochat_jax.data.shards import find_shards
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import make_mesh, own_devices, row_shards
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import param_shardings
from nanochat_jax.evals.bits_per_byte import make_bits_per_byte, measure_rows
from nanochat_jax.evals.chatcore import WITH_SPELLING, chatcore
from nanochat_jax.evals.core import core_metric, make_core_task
from nanochat_jax.evals.core_bundle import CoreTask, find_bundle, read_tasks
from nanochat_jax.evals.eval_set import EvalSet, make_eval_set
from nanochat_jax.evals.evaluator import Evaluator
from nanochat_jax.evals.passes import PASS_TOKENS
from nanochat_jax.evals.records import core_csv, make_core_record, make_record, print_core, print_table, summary
from nanochat_jax.evals.samples import sample_prompts, sample_texts
from nanochat_jax.evals.span_scores import make_span_scores
from nanochat_jax.files import bucket
from nanochat_jax.files.json_numbers import finite_or_null
from nanochat_jax.files.paths import output_dir, write_atomically, write_to
from nanochat_jax.flags.eval import EvalConfig
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tools import Toolbox, make_toolbox
from nanochat_jax.model.attention import check_attention_backend
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.tasks.registry import TASKS, find_name, make_task
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.memory import explaining_memory

BASE_EVALS = ("CORE", "bpb", "sample")  # nanochat's evaluations of a base model, by its names for them
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
    """What -a names, each once: tasks, or evaluations of a base model; default: all tasks. ValueError: there is no such
    one."""
    if flag is None:
        return list(TASKS)
    return list(dict.fromkeys(find_name(name.strip(), also=BASE_EVALS) for name in flag.split("|")))


class Problems(NamedTuple):
    """What the model is measured on; empty or None where -a does not name it."""

    eval_sets: list[EvalSet]
    not_run: dict[str, str]  # tasks, and why they cannot be run
    core: list[CoreTask]
    held_out: DocumentRows | None
    sample: bool

    def longest(self, context: int) -> int:
        """Tokens of the longest prompt; CORE's are as long as the context at least."""
        lengths = [len(prompt) for eval_set in self.eval_sets for prompt in eval_set.prompts]
        return max([*lengths, *([] if self.eval_sets and not self.core else [context])])


def make_problems(cfg: EvalConfig, tokenizer: Tokenizer, context: int) -> Problems:
    """Everything that -a names. ValueError, OSError: something of it cannot be run, or no task can."""
    eval_sets, not_run = [], {}
    names = task_names(cfg.task_name)
    for name in names:
        if name in BASE_EVALS:
            continue
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
    require(len(not_run) < len(names), "no task can be run: see the reasons above")
    core = read_tasks(find_bundle(cfg.data_dir), cfg.max_problems) if "CORE" in names else []
    held_out = DocumentRows([find_shards()[-1]], tokenizer, context) if "bpb" in names else None
    if held_out:
        held_out.plan(0)  # tokenized now
    return Problems(eval_sets, not_run, core, held_out, "sample" in names)


class Model(NamedTuple):
    """The model on this process's devices."""

    config: GPTConfig
    params: Any
    tokenizer: Tokenizer
    mesh: Mesh
    dtype: jnp.dtype
    attention: str


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
    found = find.find_model(cfg.source, cfg.model_tag, cfg.step, cfg.base)
    tokenizer = Tokenizer.load(found.tokenizer)
    meta = find.peek_meta(found)
    check_tokenizer(tokenizer, meta, found)
    with processes.process_zero_first("the problems"):
        problems = make_problems(cfg, tokenizer, meta["model_config"]["sequence_len"])
    sizes = [f"{eval_set.name}: {len(eval_set.prompts)}" for eval_set in problems.eval_sets]
    sizes += [f"{task.label}: {len(task.rows)}" for task in problems.core]
    facts = {"model": find.identity(found), "tokenizer": tokenizer.digest(), "problems": ", ".join(sizes)}
    processes.agree("the problems", facts | {"text": problems.held_out and problems.held_out.fingerprint()})
    print0(f"Model: {found}")
    with saying("reading the model"):
        model_config, params, _ = find.load_params(found)
    attention = choose_attention(
        cfg.attention,
        model_config,
        problems.longest(model_config.sequence_len),
        mesh=mesh,
        dtype=dtype,
        packed=False,
        training=False,
    )
    print0(f"{dtype.name}, attention {attention}")

    # One after the other; after each, --json has the numbers so far
    kept = place_beside(found.source, found)
    report = {
        "model": str(found),
        "checkpoint": find.identity(found),
        "time": round(time.time(), 3),
        "source": found.source,
        "step": found.step,
        "dtype": dtype.name,
        "attention": attention,
        "sampling": dataclasses.asdict(sampling) | {"samples": cfg.num_samples, "seed": cfg.seed},
        "max_turns": cfg.max_turns,
        "tools": [tool.name for tool in tools.tools],
        "max_problems": cfg.max_problems,
        "tasks": {},
        "not_run": problems.not_run,
        "versions": store.versions(),
    }
    bars = Bars()
    with explaining_memory({"slots": cfg.slots}, LESS_MEMORY), bars.shown():
        if problems.held_out:
            separate = bool(meta.get("user_config", {}).get("document_mask"))  # as it was trained
            model = Model(model_config, placed(params, mesh), tokenizer, mesh, dtype, attention)
            report |= held_out_bits(cfg, model, problems.held_out, separate, bars)
            save(cfg.json, report)
            del model
        own = own_devices(mesh)  # each process evaluates its part of the problems by itself
        model = Model(model_config, placed(params, own), tokenizer, own, dtype, attention)
        with jax.set_mesh(own):
            if problems.sample:
                report["samples"] = sample(model, bars)
            evaluate_core(cfg, model, problems.core, report, bars)
            evaluate_tasks(cfg, model, problems.eval_sets, sampling, tools, report, bars)
    accuracies = {name: record["accuracy"]["value"] for name, record in report["tasks"].items()}
    report["chatcore"] = chatcore(accuracies)
    report["chatcore_with_spelling"] = chatcore(accuracies, WITH_SPELLING)
    save(cfg.json, report)
    if report["tasks"]:
        print_table(bars.console, report)
    if "core" in report:
        print_core(bars.console, report)
        keep_csv(found.source, found, core_csv(report["core"], report["core_metric"]))
    keep(kept, report)
    return 0


def placed(params: Any, mesh: Mesh) -> Any:
    """Parameters of the host, on the devices of a mesh."""
    return jax.device_put(params, param_shardings(params, mesh))


def evaluate_tasks(
    cfg: EvalConfig,
    model: Model,
    eval_sets: list[EvalSet],
    sampling: SamplingParams,
    tools: Toolbox,
    report: dict,
    bars: Bars,
) -> None:
    """Put each task's record into the report, and the report so far into --json."""
    if not eval_sets:
        return
    evaluator = Evaluator(
        model.config,
        model.tokenizer,
        model.mesh,
        dtype=model.dtype,
        attention=model.attention,
        rows=cfg.batch_size,
        slots=max(1, cfg.slots // processes.count()),
        tools=tools,
    )
    for eval_set in eval_sets:
        began = time.perf_counter()
        with bars.bar(eval_set.name, len(eval_set.prompts)) as progress:
            result = evaluator.evaluate(
                model.params,
                eval_set,
                sampling,
                samples=cfg.num_samples,
                seed=cfg.seed,
                max_turns=cfg.max_turns,
                progress=progress,
            )
        record = report["tasks"][eval_set.name] = make_record(eval_set, result, time.perf_counter() - began)
        bars.say(f"{eval_set.name}: {summary(record)}")
        save(cfg.json, report)


def evaluate_core(cfg: EvalConfig, model: Model, tasks: list[CoreTask], report: dict, bars: Bars) -> None:
    """The same for CORE's tasks, and their metric in the end."""
    if not tasks:
        return
    span_scores = make_span_scores(
        model.config, model.mesh, model.tokenizer.bos, dtype=model.dtype, attention=model.attention, rows=cfg.batch_size
    )
    evaluate = make_core_task(model.config.sequence_len, model.tokenizer, span_scores)
    results, report["core"] = [], {}
    for task in tasks:
        began = time.perf_counter()
        with bars.bar(task.label, len(task.rows)) as progress:
            results.append(evaluate(model.params, task, progress))
        record = report["core"][task.label] = make_core_record(results[-1], time.perf_counter() - began)
        bars.say(f"{task.label}: {summary(record)}")
        save(cfg.json, report)
    report["core_metric"] = core_metric(results)


def held_out_bits(cfg: EvalConfig, model: Model, rows: DocumentRows, document_mask: bool, bars: Bars) -> dict:
    """val_bpb on the validation shard, of as many rows as hold --eval-tokens, and how it was measured."""
    shards, T = row_shards(model.mesh), model.config.sequence_len
    n_rows = min(rows.plan(0).n_rows, max(1, cfg.eval_tokens // T))
    B = shards * (cfg.batch_size or max(1, PASS_TOKENS // T))
    bits_per_byte = make_bits_per_byte(
        model.config, model.tokenizer.token_bytes(), dtype=model.dtype, attention=model.attention
    )
    with jax.set_mesh(model.mesh), bars.bar("bpb", -(-n_rows // B)) as progress:
        found = measure_rows(
            bits_per_byte,
            model.params,
            rows,
            model.mesh,
            n_rows=n_rows,
            rows_per_batch=B,
            document_mask=document_mask,
            progress=progress,
        )
    bars.say(f"bits per byte: {found:.6f} on {n_rows * T:,} tokens of {rows.shards[0].name}")
    return {"val_bpb": found, "val_tokens": n_rows * T, "document_mask": document_mask}


def sample(model: Model, bars: Bars) -> list[str]:
    """A few continuations, a line each."""
    prompts = sample_prompts(model.tokenizer, model.config.sequence_len)
    engine = Engine(model.config, model.tokenizer, model.mesh, tools=None, dtype=model.dtype, attention=model.attention)
    texts = sample_texts(engine, engine.cast_params(model.params), prompts)
    for text in texts:
        bars.say(f"sample: {text}")
    return texts


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
    """The whole result in the model's folder."""
    if path is not None:
        keep_bytes(path, json_bytes(report))


def keep_bytes(path: Any, data: bytes) -> None:
    """A file beside what is printed; that it cannot be written there is a sentence, as it was printed."""
    try:
        write_atomically(path, data)
    except Exception as e:
        reason = (e.strerror or str(e)) if isinstance(e, OSError) else bucket.error_text(e)
        if reason is None:
            raise
        print0(f"NOTE: the result is not kept: {path}: {reason}")
    else:
        print0(f"The result is in {path}")


def keep_csv(source: str, found: find.Found, text: str) -> None:
    """nanochat's file of CORE, under nanochat's name for it, or with the tag and the time where that is taken."""
    if processes.index():
        return
    path = output_dir() / "base_eval" / f"{source}_model_{found.step:06d}.csv"
    if path.exists():
        path = path.with_name(f"{path.stem}_{found.tag}_{datetime.datetime.now():%Y-%m-%dT%H-%M-%S-%f}.csv")
    keep_bytes(path, text.encode())


def save(path: Any, report: dict) -> None:
    """The report so far as the file of this path, by process 0; nothing for None."""
    if path and not processes.index():
        write_atomically(path, json_bytes(report))


def json_bytes(report: dict) -> bytes:
    """The report as one line of JSON."""
    return (json.dumps(finite_or_null(report), allow_nan=False) + "\n").encode()


if __name__ == "__main__":
    cli_main.run_stage(main, parse(EvalConfig, prog="python -m nanochat_jax.eval"))
