"""Pretraining: from documents to a base model. Its settings, with examples: flags/base.py."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.device import describe_device, start_device
from nanochat_jax.cli.settings import (
    check_bounds,
    require,
)
from nanochat_jax.cli.waiting import saying
from nanochat_jax.data import shards
from nanochat_jax.data.documents import DocumentRows, describe_documents
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import make_mesh, own_devices, row_shards
from nanochat_jax.distributed.processes import print0
from nanochat_jax.evals.core import make_core
from nanochat_jax.evals.core_bundle import CoreTask, find_bundle, read_tasks
from nanochat_jax.evals.samples import PROMPTS, SAMPLE_TOKENS, sample_prompts, sample_texts
from nanochat_jax.files.paths import base_dir, cache_dir, output_dir, write_to
from nanochat_jax.flags.base import BaseConfig
from nanochat_jax.inference.engine import Engine
from nanochat_jax.model.attention import check_attention_backend
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.optim.groups import Groups, default_groups
from nanochat_jax.optim.schedules import base_decay_multiplier, base_scalars
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import preflight, scaling_laws
from nanochat_jax.train.loop import exit_code
from nanochat_jax.train.measurement import Measurement, all_numbers
from nanochat_jax.train.plan import Plan, TokenLoss, make_plan
from nanochat_jax.train.row_stages import open_row_run, row_batch_shape, rows_before, validation
from nanochat_jax.train.start import Start, check_agreement, find_run, initial_state


def main(cfg: BaseConfig) -> int:
    """Train -> the exit code: 0, or 128 + n after signal n; of --preflight 0 where it fits, else 1."""
    check_bounds(cfg)
    if cfg.preflight is not None:
        return preflight_of(cfg)
    write_to(cfg.output_dir)
    start_device(cfg.device_type, cfg)
    mesh = make_mesh(cfg.mesh or "")
    peak_flops = describe_device(mesh, print0)

    # The run: a new one, or one to go on with
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    start = check_agreement(find_run(cfg, "base", tag_of(cfg), tokenizer, print0))
    check_bounds(start.cfg)  # also what a checkpoint recorded
    check_attention_backend(start.cfg.attention, mesh, packed=start.cfg.document_mask)

    # Model, batch and length from the depth
    model = model_of(start.cfg, tokenizer.vocab_size)
    mesh = make_mesh(cfg.mesh or "", n_embd=model.n_embd)
    cfg = settings_of(start)
    cfg = sized(cfg, recipe_of(cfg, model).total_batch_size, row_shards(mesh))
    recipe = recipe_of(cfg, model)
    plan = plan_of(cfg, model, mesh, recipe, start.recorded_attention())
    print_model(model, plan.groups, recipe)
    total = recipe.iterations
    stretches = start.stretches(total, lambda first, last: steady_until(cfg, first, last), "num_iterations", print0)

    # Data: documents once through the tokenizer, a shard at a time, packed into full rows by plan
    with processes.process_zero_first("the data"):
        *training, held_out = shards_of(cfg)
        rows = DocumentRows(training, tokenizer, cfg.max_seq_len, seed=cfg.seed)
        held_out_rows = DocumentRows([held_out], tokenizer, cfg.max_seq_len) if cfg.eval_every > 0 else None
        core_tasks = core_tasks_of(cfg)
    start.check_data(rows.fingerprint(start.record.get("shards_reached")))
    with processes.process_zero_first("the first shard"):
        print0("\n".join(describe_documents(rows, total * plan.batch.rows_per_step)))

    # Train
    with saying("placing the model on the devices"):
        initial = initial_state(start, plan, print0)
    plan = initial.plan
    measurements = [
        validation(
            held_out_rows,
            plan,
            tokenizer.token_bytes(),
            every=cfg.eval_every,
            tokens=cfg.eval_tokens,
            document_mask=cfg.document_mask,
        ),
        core(cfg.core_every, plan, tokenizer, core_tasks),
        samples(cfg.sample_every, plan, tokenizer),
    ]

    def record(step: int) -> dict:
        """What fine-tuning inherits: the sizes in force, and the decay of the last step, as in nanochat's files."""
        groups = {name: dataclasses.asdict(group) for name, group in plan.groups.items()}
        first, last = stretches[-1]
        groups["matrix"]["weight_decay"] *= base_decay_multiplier(step - 1 - first, last - first)
        sizes = {"device_batch_size": plan.rows_per_device, "total_batch_size": plan.batch.tokens_per_step}
        return {"optimizer_groups": groups, "max_seq_len": cfg.max_seq_len, **sizes, "stretches": stretches}

    train_step = plan.make_train_step()
    opened = open_row_run(
        start, initial, rows, total=total, measurements=measurements, peak_flops=peak_flops, record=record
    )
    with opened as (run, batches):
        for step, state in run.steps():
            scalars = schedule(cfg, step, *stretches[-1])
            state, metrics = train_step(state, next(batches), scalars)
            epoch = rows.epoch(rows_before(start, plan, step + 1) - 1)
            run.record(state, metrics, lr_multiplier=scalars["lr_multiplier"], epoch=epoch)
    return exit_code(run)


def schedule(cfg: BaseConfig, step: int, first: int, last: int) -> dict[str, float]:
    """The scalars that the optimizer takes at a step, counted from 0, of the stretch from step `first` to `last`."""
    return base_scalars(
        step - first,
        last - first,
        warmup_steps=cfg.warmup_steps,
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
    )


def steady_until(cfg: BaseConfig, first: int, last: int) -> int:
    """The step of a stretch up to which rates have not begun to fall."""
    return last - round(cfg.warmdown_ratio * (last - first))


def plan_of(
    cfg: BaseConfig,
    model: GPTConfig,
    mesh: Mesh,
    recipe: scaling_laws.Recipe,
    attention: Mapping[str, str] | None = None,
) -> Plan:
    """What is compiled for these settings. ValueError: sizes that do not fit together."""
    return make_plan(
        cfg,
        model,
        mesh,
        batch=row_batch_shape(cfg, mesh),
        loss=TokenLoss(),
        scalars=tuple(schedule(cfg, 0, 0, 1)),
        groups=groups_of(cfg, model.n_embd, recipe),
        attention=attention,
        packed=cfg.document_mask,
    )


def preflight_of(cfg: BaseConfig) -> int:
    """--preflight -> the exit code: 0 where it fits, else 1."""
    devices, vocab_size = preflight.start(cfg), preflight.vocabulary()
    if cfg.resume:
        cfg = settings_of(find_run(cfg, "base", tag_of(cfg), Tokenizer.load(base_dir() / "tokenizer"), print0))
    model = model_of(cfg, vocab_size)
    mesh = make_mesh(cfg.mesh or "", devices, model.n_embd)
    cfg = sized(cfg, recipe_of(cfg, model).total_batch_size, row_shards(mesh))
    plan = plan_of(cfg, model, mesh, recipe_of(cfg, model))
    phases = [preflight.update_phase(plan)]
    if cfg.sample_every > 0:
        longest = 1 + max(map(len, PROMPTS))  # a token is a character at least
        answers = preflight.Answers(len(PROMPTS), 1, len(PROMPTS), SAMPLE_TOKENS, longest)
        phases.append(preflight.generation_phase("samples", plan, answers, "leave them out: --sample-every -1"))
    return preflight.report(plan, phases)


def tag_of(cfg: BaseConfig) -> str:
    """The run's folder. Of --resume without a word on which run, the only one; ValueError: there are several."""
    if cfg.resume and not {"depth", "model_tag", "config"} & cfg.given and cfg.depth == BaseConfig.depth:
        root = output_dir() / store.SOURCES["base"]
        tags = [tag for tag in sorted(find.tags_by_time(root)) if integrity.steps(root / tag)]
        require(len(tags) < 2, f"--resume: which run? Name one of {', '.join(tags)} with --model-tag")
        if tags:
            return tags[0]
    return cfg.model_tag or f"d{cfg.depth}"


def shards_of(cfg: BaseConfig) -> list[Path]:
    """The parquet files of the run, the last for validation: those that --download names, else all of the folder."""
    if not cfg.download:
        return shards.find_shards(cfg.data_dir)
    folder = cfg.data_dir.expanduser() if cfg.data_dir else cache_dir() / shards.FOLDERS[0]
    return shards.fetch_shards(cfg.download, folder, print0)


def model_of(cfg: BaseConfig, vocab_size: int, depth: int | None = None) -> GPTConfig:
    """The network of a depth, default --depth, with the other dials of the settings."""
    return scaling_laws.config_of_depth(
        cfg.depth if depth is None else depth,
        aspect_ratio=cfg.aspect_ratio,
        head_dim=cfg.head_dim,
        window_pattern=cfg.window_pattern,
        max_seq_len=cfg.max_seq_len,
        vocab_size=vocab_size,
    )


def recipe_of(cfg: BaseConfig, model: GPTConfig) -> scaling_laws.Recipe:
    """What follows from the model's size, for the batch that the settings name."""
    return scaling_laws.recipe(
        model,
        model_of(cfg, model.vocab_size, scaling_laws.REFERENCE_DEPTH),
        total_batch_size=cfg.total_batch_size,
        num_iterations=cfg.num_iterations,
        target_flops=cfg.target_flops,
        target_param_data_ratio=cfg.target_param_data_ratio,
    )


def settings_of(start: Start) -> BaseConfig:
    """The run's settings. One that goes on has the batch of its start, which was rounded to the devices of then."""
    total_batch_size = start.record.get("total_batch_size", start.cfg.total_batch_size)
    return dataclasses.replace(start.cfg, total_batch_size=total_batch_size)


def sized(cfg: BaseConfig, total_batch_size: int, row_shards: int) -> BaseConfig:
    """The settings with the batch in force; a device gets 32 rows at a time, or as many as divide it.

    A batch that the user has not chosen is rounded to whole passes. row_shards: parts that rows are split into."""
    rows = cfg.device_batch_size
    if rows is None:
        wanted = total_batch_size // (cfg.max_seq_len * row_shards)
        rows = next(n for n in range(max(1, min(32, wanted)), 0, -1) if n == 1 or wanted % n == 0)
    per_pass = rows * cfg.max_seq_len * row_shards
    if cfg.total_batch_size == -1 and per_pass > 0:
        total_batch_size = max(1, round(total_batch_size / per_pass)) * per_pass
    return dataclasses.replace(cfg, device_batch_size=rows, total_batch_size=total_batch_size)


def groups_of(cfg: BaseConfig, n_embd: int, recipe: scaling_laws.Recipe) -> Groups:
    """The optimizer's groups with the rates scaled to the batch, except for the fixed one of the smear."""
    return default_groups(
        n_embd,
        embedding_lr=cfg.embedding_lr * recipe.rate_factor,
        unembedding_lr=cfg.unembedding_lr * recipe.rate_factor,
        matrix_lr=cfg.matrix_lr * recipe.rate_factor,
        scalar_lr=cfg.scalar_lr * recipe.rate_factor,
        weight_decay=cfg.weight_decay * recipe.decay_factor,
    )


def print_model(model: GPTConfig, groups: Groups, recipe: scaling_laws.Recipe) -> None:
    """Print the model and what follows from its size."""
    tokens = recipe.iterations * recipe.total_batch_size
    print0(
        f"Model: depth {model.n_layer}, width {model.n_embd}, {model.n_head} heads of {model.head_dim}, windows "
        f"{', '.join(map(str, dict.fromkeys(model.windows)))}, vocabulary {model.vocab_size:,}"
    )
    print0(
        f"{recipe.iterations:,} steps of {recipe.total_batch_size:,} tokens from {recipe.why}: {tokens:,} tokens, "
        f"{tokens / scaling_laws.scaling_params(model):.2f} for each scaling parameter"
    )
    decay = groups["matrix"].weight_decay
    print0(f"Learning rates x {recipe.rate_factor:.4f} for this batch, Muon's weight decay {decay:.6f}")


def core_tasks_of(cfg: BaseConfig) -> list[CoreTask]:
    """CORE's tasks, where they are to be measured."""
    if cfg.core_every < 1:
        return []
    return read_tasks(find_bundle(), cfg.core_max_per_task if cfg.core_max_per_task > 0 else None)


def core(every: int, plan: Plan, tokenizer: Tokenizer, tasks: Sequence[CoreTask]) -> Measurement:
    """CORE, as core_metric, and the centred accuracy on each of its tasks."""
    measure = make_core(plan.model, tokenizer, tasks, mesh=plan.mesh, dtype=plan.dtype, attention=plan.attention)

    def shown(numbers: Mapping[str, float]) -> str:
        return all_numbers({name: value for name, value in numbers.items() if name == "core_metric"})

    return Measurement("CORE", every if tasks else -1, measure, shown=shown, flag="--core-every")


def samples(every: int, plan: Plan, tokenizer: Tokenizer) -> Measurement:
    """The most likely continuations of PROMPTS, as far as they fit into a row."""
    prompts = sample_prompts(tokenizer, plan.model.sequence_len)

    def measure(params, progress) -> dict[str, list[str]]:
        own = own_devices(plan.mesh)
        engine = Engine(plan.model, tokenizer, own, tools=None, dtype=plan.dtype, attention=plan.attention)
        with engine.holding(params, plan.mesh) as held:
            return {"samples": sample_texts(engine, held, prompts, progress)}

    return Measurement("samples", every if prompts else -1, measure, flag="--sample-every")


if __name__ == "__main__":
    cli_main.run_stage(main, parse(BaseConfig, prog="python -m nanochat_jax.base"))
