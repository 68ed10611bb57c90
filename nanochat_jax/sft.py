"""Supervised fine-tuning: a base model becomes a chat model. Its settings, with examples: flags/sft.py."""

import math
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.device import describe_device, start_device
from nanochat_jax.cli.settings import check_bounds, flag, require
from nanochat_jax.cli.waiting import saying
from nanochat_jax.data.conversations import ConversationRows, ConversationStore, describe_conversations, first_rows
from nanochat_jax.data.token_cache import open_caches
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.processes import print0
from nanochat_jax.evals.chatcore import NEW_TOKENS, SLOTS, make_chatcore
from nanochat_jax.files.paths import cache_dir, write_to
from nanochat_jax.flags.sft import SFTConfig
from nanochat_jax.model.attention import check_attention_backend
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.optim.groups import Groups
from nanochat_jax.optim.schedules import sft_scalars
from nanochat_jax.tasks import GSM8K, MMLU, Arithmetic, CustomJSON, SimpleSpelling, SmolTalk, SpellingBee, TaskMixture
from nanochat_jax.tasks.registry import make_task
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import preflight
from nanochat_jax.train.base_model import run_tokenizer
from nanochat_jax.train.loop import exit_code
from nanochat_jax.train.measurement import Measurement
from nanochat_jax.train.plan import Plan, TokenLoss, make_plan
from nanochat_jax.train.row_stages import open_row_run, row_batch_shape, rows_before, rows_validated, validation
from nanochat_jax.train.start import Start, find_start, fine_tuning_groups, initial_state

STEPS_AHEAD = 4  # that batches may be prepared before they are needed, after a run's last step too


def main(cfg: SFTConfig) -> int:
    """Train -> the exit code: 0, or 128 + n after signal n; of --preflight 0 where it fits, else 1."""
    check_bounds(cfg)
    if cfg.preflight is not None:
        return preflight_of(cfg)
    write_to(cfg.output_dir)
    start_device(cfg.device_type, cfg)
    mesh = make_mesh(cfg.mesh or "")
    peak_flops = describe_device(mesh, print0)

    # The run: a new one from the base model, or one to go on with
    tokenizer = run_tokenizer(cfg)
    start = find_start(cfg, "sft", tokenizer, print0, source=cfg.source)
    cfg = start.cfg
    check_bounds(cfg)  # also what was inherited
    check_attention_backend(cfg.attention, mesh, packed=cfg.document_mask)
    model = start.model_config()
    mesh = make_mesh(cfg.mesh or "", n_embd=model.n_embd)
    plan = plan_of(cfg, model, mesh, start.recorded_groups(), start.recorded_attention())

    # Data: conversations once through the tokenizer, packed into rows by plan
    with processes.process_zero_first("the data"):
        tasks, held_out = training_tasks(cfg), validation_tasks(cfg) if cfg.eval_every > 0 else []
        rows, begun_with = training_rows(TaskMixture(tasks, seed=cfg.seed), start, plan, tokenizer)
    start.check_data(begun_with)
    print0("\n".join(describe_conversations(rows)))
    with processes.process_zero_first("the validation data"):
        held_out_rows = validation_rows(held_out, cfg, plan, tokenizer)
    total = cfg.num_iterations if cfg.num_iterations > 0 else -(-rows.plan(0).n_rows // plan.batch.rows_per_step)
    stretches = start.stretches(total, lambda first, last: steady_until(cfg, first, last), "num_iterations", print0)

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
        chatcore_measurement(cfg, plan, tokenizer),
    ]
    train_step = plan.make_train_step()
    opened = open_row_run(
        start,
        initial,
        rows,
        total=total,
        measurements=measurements,
        peak_flops=peak_flops,
        record=lambda step: {"stretches": stretches},
    )
    with opened as (run, batches):
        for step, state in run.steps():
            scalars = schedule(cfg, step, *stretches[-1])
            state, metrics = train_step(state, next(batches), scalars)
            epoch = rows.epoch(rows_before(start, plan, step + 1) - 1)
            run.record(state, metrics, lr_multiplier=scalars["lr_multiplier"], epoch=epoch)
    return exit_code(run)


def schedule(cfg: SFTConfig, step: int, first: int, last: int) -> dict[str, float]:
    """The scalars that the optimizer takes at a step, counted from 0, of the stretch from step `first` to `last`."""
    return sft_scalars(
        step - first,
        last - first,
        warmup_ratio=cfg.warmup_ratio,
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
    )


def steady_until(cfg: SFTConfig, first: int, last: int) -> int:
    """The step of a stretch up to which rates have not begun to fall."""
    return first + math.floor((1 - cfg.warmdown_ratio) * (last - first))


def plan_of(
    cfg: SFTConfig,
    model: GPTConfig,
    mesh: Mesh,
    groups: Groups | None = None,
    attention: Mapping[str, str] | None = None,
) -> Plan:
    """What is compiled for these settings; groups: of the optimizer, default: as the settings say.

    ValueError: sizes that do not fit together."""
    return make_plan(
        cfg,
        model,
        mesh,
        batch=row_batch_shape(cfg, mesh),
        loss=TokenLoss(),
        scalars=tuple(schedule(cfg, 0, 0, 1)),
        groups=groups or fine_tuning_groups(cfg, model, abstract_gpt(model)[1]),
        attention=attention,
        packed=cfg.document_mask,
    )


def preflight_of(cfg: SFTConfig) -> int:
    """--preflight -> the exit code: 0 where it fits, else 1."""
    devices = preflight.start(cfg)
    model, cfg = preflight.model_for(
        cfg, cfg.source, lambda: find_start(cfg, "sft", run_tokenizer(cfg), print0, cfg.source)
    )
    plan = plan_of(cfg, model, make_mesh(cfg.mesh or "", devices, model.n_embd))
    phases = [preflight.update_phase(plan)]
    if cfg.chatcore_every > 0:
        problems = cfg.chatcore_max_sample if cfg.chatcore_max_sample >= 0 else SLOTS
        answers = preflight.Answers(problems, 1, SLOTS, NEW_TOKENS)
        advice = f"lower --chatcore-max-sample (now {cfg.chatcore_max_sample}), or leave it out: --chatcore-every -1"
        phases.append(preflight.generation_phase("ChatCORE", plan, answers, advice))
    return preflight.report(plan, phases)


def training_tasks(cfg: SFTConfig) -> list:
    """The sources of the mixture, each as often as it has epochs; sharing one object costs its tokens once."""
    sources = ((SmolTalk, cfg.smoltalk_epochs), (MMLU, cfg.mmlu_epochs), (GSM8K, cfg.gsm8k_epochs))
    tasks = [task for make, epochs in sources if epochs > 0 for task in [make("train", data_dir=cfg.data_dir)] * epochs]
    spelling = ((SimpleSpelling, cfg.simple_spelling_rows), (SpellingBee, cfg.spelling_bee_rows))
    tasks += [make("train", rows, data_dir=cfg.data_dir) for make, rows in spelling if rows > 0]
    if cfg.arithmetic_rows > 0:
        tasks.append(Arithmetic("train", cfg.arithmetic_rows))
    if cfg.custom_epochs > 0:
        tasks += [task for path in cfg.custom_json for task in [own_file(cfg, "custom_json", path)] * cfg.custom_epochs]
    tasks += [make_task(name, "train", data_dir=cfg.data_dir, flag="--task") for name in cfg.task]
    require(bool(tasks), "the mixture is empty: all --*-epochs and --*-rows are 0, without --custom-json or --task")
    return tasks


def validation_tasks(cfg: SFTConfig) -> list:
    """nanochat's validation mixture (it has no spelling) of the tasks that are trained on, unseen problems of
    arithmetic, and the files of --val-json."""
    sources = [(SmolTalk, cfg.smoltalk_epochs, None), (MMLU, cfg.mmlu_epochs, 5200), (GSM8K, cfg.gsm8k_epochs, 420)]
    tasks = [make("test", stop=stop, data_dir=cfg.data_dir) for make, epochs, stop in sources if epochs > 0]
    if cfg.arithmetic_rows > 0:
        tasks.append(Arithmetic("test", 256))
    return tasks + [own_file(cfg, "val_json", path) for path in cfg.val_json]


def own_file(cfg: SFTConfig, name: str, path: Path) -> CustomJSON:
    """The task of a file that the flag `name` gives; ValueError where it holds nothing."""
    task = CustomJSON(path, data_dir=cfg.data_dir, longest_line=cfg.longest_line, allow_empty=cfg.allow_empty)
    require(len(task) > 0, f"{flag(name)} {path} must hold at least one conversation, it has none")
    return task


def training_rows(mixture: TaskMixture, start: Start, plan: Plan, tokenizer: Tokenizer) -> tuple[ConversationRows, str]:
    """(the rows of a run, tokenized as far as it reads them; the fingerprint that the run's checkpoints have where it
    sees the data that it began with)."""
    cfg = start.cfg

    def rows_of(steps: int) -> ConversationRows:
        wanted = rows_before(start, plan, steps + STEPS_AHEAD) if steps > 0 else None
        return packed_rows(mixture, cfg, tokenizer, wanted)

    rows = rows_of(cfg.num_iterations)
    compared = rows
    if start.resumed:  # it may have begun with fewer steps, or when everything was tokenized
        for steps in (start.record["user_config"].get("num_iterations", -1), -1):
            if compared.fingerprint() != start.record.get("data"):
                compared = rows_of(steps)
    return rows, compared.fingerprint()


def packed_rows(
    mixture: TaskMixture, cfg: SFTConfig, tokenizer: Tokenizer, wanted: int | None = None
) -> ConversationRows:
    """The rows that a mixture is packed into; its conversations are tokenized now, if no run did before.

    wanted: how many rows are read, of which the others may be missing; None: any number."""
    folder = cache_dir() / "token_cache"
    if wanted is not None:
        first = first_rows(mixture, tokenizer, folder, cfg.max_seq_len, seed=cfg.seed, wanted=wanted)
        if first is not None:
            return first
    caches = open_caches(mixture.tasks, tokenizer, folder, print0)
    return ConversationRows(ConversationStore(caches, mixture.pairs), cfg.max_seq_len, seed=cfg.seed)


def validation_rows(tasks: list, cfg: SFTConfig, plan: Plan, tokenizer: Tokenizer) -> ConversationRows | None:
    """The rows of the validation mixture; None where there is nothing to measure."""
    if not tasks:
        if cfg.eval_every > 0:
            print0("NOTE: no validation data, bits per byte are not measured (give --val-json FILE)")
        return None
    try:
        return packed_rows(TaskMixture(tasks), cfg, tokenizer, rows_validated(plan, cfg.eval_tokens))
    except ValueError as e:
        raise ValueError(f"validation data: {e}") from e


def chatcore_measurement(cfg: SFTConfig, plan: Plan, tokenizer: Tokenizer) -> Measurement:
    """ChatCORE every --chatcore-every steps, on as many problems as the flags say."""
    measure = None
    if cfg.chatcore_every > 0:
        measure = make_chatcore(
            plan.model,
            tokenizer,
            mesh=plan.mesh,
            dtype=plan.dtype,
            attention=plan.attention,
            data_dir=cfg.data_dir,
            max_cat=cfg.chatcore_max_cat,
            max_sample=cfg.chatcore_max_sample,
        )
    return Measurement("ChatCORE", cfg.chatcore_every if measure else -1, measure, flag="--chatcore-every")


if __name__ == "__main__":
    cli_main.run_stage(main, parse(SFTConfig, prog="python -m nanochat_jax.sft"))
