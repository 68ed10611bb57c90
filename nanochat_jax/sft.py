"""Supervised fine-tuning: a base model becomes a chat model.

python -m nanochat_jax.sft                                  # everything inherited from the newest base checkpoint
python -m nanochat_jax.sft --custom-json mine.jsonl --num-iterations 500 --run my-run
"""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli import settings
from nanochat_jax.cli.device import describe_device, start_device
from nanochat_jax.cli.settings import (
    LARGEST,
    RATE,
    RATIO,
    Maybe,
    StageConfig,
    at_least,
    between,
    check_bounds,
    flag,
    one_of,
    require,
    setting,
)
from nanochat_jax.data.conversations import ConversationRows, ConversationStore, describe_conversations, first_rows
from nanochat_jax.data.token_cache import open_caches
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.processes import print0
from nanochat_jax.evals.chatcore import make_chatcore
from nanochat_jax.files.paths import base_dir
from nanochat_jax.model.attention import check_attention_backend
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.optim.groups import Groups
from nanochat_jax.optim.schedules import sft_scalars
from nanochat_jax.tasks import (
    GSM8K,
    MMLU,
    Arithmetic,
    CustomJSON,
    SimpleSpelling,
    SmolTalk,
    SpellingBee,
    TaskMixture,
)
from nanochat_jax.tasks.custom_json import LONGEST_LINE
from nanochat_jax.tasks.registry import make_task
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import preflight
from nanochat_jax.train.loop import exit_code
from nanochat_jax.train.measurement import Measurement
from nanochat_jax.train.plan import Plan, TokenLoss, make_plan
from nanochat_jax.train.row_stages import open_row_run, row_batch_shape, rows_before, rows_validated, validation
from nanochat_jax.train.start import Start, find_start, fine_tuning_groups, initial_state

STEPS = between(1, LARGEST, "from 1 to 2147483647, or -1 for one epoch", also=-1)
TIMES = between(0, 1000, "from 0 to 1000 (see --num-iterations)")
ROWS = between(0, 10_000_000, "from 0 to 10000000")
STEPS_AHEAD = 4  # that batches may be prepared before they are needed, after a run's last step too
PROBLEMS = at_least(1, "at least 1, or -1 for all", also=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """Fine-tune a base model on conversations. What is not given is inherited from the base checkpoint, or from the
    run's own one with --resume."""

    # which model and run
    model_tag: Maybe[str] = setting(None, "tag of the base model; default: the largest d<number>")
    model_step: Maybe[int] = setting(None, "step of the base model; default: its last")
    output_tag: Maybe[str] = setting(
        None, "folder under chatsft_checkpoints; default: the run's name, else d<depth>", resume="own"
    )
    load_optimizer: int = setting(
        1, "1 = start from the base model's optimizer state, 0 = from an empty one", one_of(0, 1)
    )
    seed: int = setting(42, "order of the conversations; 42 is nanochat's", at_least(0))
    # length and batch
    num_iterations: int = setting(
        -1,
        "optimizer steps (-1 = one epoch)",
        STEPS,
    )
    max_seq_len: Maybe[int] = setting(None, "tokens in a row; default: inherited", inherited=2048)
    device_batch_size: Maybe[int] = setting(
        None,
        "rows per device in one forward and backward pass; default: inherited",
        inherited=32,
        resume="free",
    )
    total_batch_size: Maybe[int] = setting(
        None, "tokens per optimizer step, all devices together; default: inherited", inherited=524288
    )
    document_mask: bool = setting(True, "conversations in one row do not see each other; off = nanochat's behaviour")
    # optimizer
    embedding_lr: Maybe[float] = setting(
        None, "AdamW: token and value embeddings, scaled by width; default: inherited", RATE, inherited=0.3
    )
    unembedding_lr: Maybe[float] = setting(
        None, "AdamW: lm_head, scaled by width; default: inherited", RATE, inherited=0.004
    )
    matrix_lr: Maybe[float] = setting(None, "Muon: matrices inside blocks; default: inherited", RATE, inherited=0.02)
    scalar_lr: float = setting(0.5, "AdamW: residual scalars", RATE)
    weight_decay: Maybe[float] = setting(None, "Muon; default: that of the loaded optimizer, else 0", RATE)
    init_lr_frac: float = setting(0.8, "all rates start at this fraction", RATE)
    warmup_ratio: float = setting(0.0, "part of the run over which rates rise", RATIO)
    warmdown_ratio: float = setting(0.5, "part of the run over which rates fall", RATIO)
    final_lr_frac: float = setting(0.0, "rates end at this fraction", RATIO)
    # evaluation and checkpoints
    eval_every: int = setting(200, "steps between measurements of validation bits per byte (-1 = never)", resume="free")
    eval_tokens: int = setting(
        40 * 524288,
        "tokens to measure it on, at most one pass over the validation data",
        at_least(1, "at least 1 (--eval-every -1 measures nothing)"),
        resume="free",
    )
    chatcore_every: int = setting(200, "steps between ChatCORE evaluations (-1 = never)", resume="free")
    chatcore_max_cat: int = setting(-1, "problems per multiple-choice task (-1 = all)", PROBLEMS, resume="free")
    chatcore_max_sample: int = setting(24, "problems per generative task", PROBLEMS, resume="free")
    save_every: int = setting(200, "steps between checkpoints (-1 = only at the end)", resume="free")
    # data
    data_dir: Maybe[Path] = setting(
        None,
        "local mirror of the datasets; default: NANOCHAT_DATA_DIR, else <base dir>/task_data",
        resume="free",
    )
    smoltalk_epochs: int = setting(1, "times SmolTalk is in the mixture (0 = left out)", TIMES)
    mmlu_epochs: int = setting(3, "times MMLU's auxiliary_train is in it", TIMES)
    gsm8k_epochs: int = setting(4, "times GSM8K's train split is in it", TIMES)
    simple_spelling_rows: int = setting(200_000, "words to spell (0 = left out)", ROWS)
    spelling_bee_rows: int = setting(80_000, "words to count a letter of", ROWS)
    arithmetic_rows: int = setting(0, "generated word problems", ROWS)
    custom_json: tuple[Path, ...] = setting((), "file of conversations, or hub:owner/dataset:split")
    custom_epochs: int = setting(1, "times the custom files are in the mixture", TIMES)
    val_json: tuple[Path, ...] = setting(
        (), "such a file to validate on, beside the tasks' own test splits", resume="free"
    )
    longest_line: int = setting(LONGEST_LINE, "bytes of a conversation in their JSON", at_least(1), resume="free")
    allow_empty: bool = setting(False, "take conversations with empty answers from these files", resume="free")
    task: tuple[str, ...] = setting((), "another task, by its name in eval or as module:Class")


def main(cfg: SFTConfig) -> int:
    """Train -> the exit code: 0, or 128 + n after signal n; of --preflight 0 where it fits, else 1."""
    check_bounds(cfg)
    if cfg.preflight is not None:
        return preflight_of(cfg)
    start_device(cfg.device_type, cfg)
    mesh = make_mesh(cfg.mesh or "")
    peak_flops = describe_device(mesh, print0)

    # The run: a new one from the base model, or one to go on with
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    start = find_start(cfg, "sft", tokenizer, print0)
    cfg = start.cfg
    check_bounds(cfg)  # also what was inherited
    check_attention_backend(cfg.attention, mesh, packed=cfg.document_mask)
    model = start.model_config()
    mesh = make_mesh(cfg.mesh or "", n_embd=model.n_embd)
    plan = plan_of(cfg, model, mesh, start.recorded_groups())

    # Data: conversations once through the tokenizer, packed into rows by plan
    with processes.process_zero_first("the data"):
        tasks, held_out = training_tasks(cfg), validation_tasks(cfg) if cfg.eval_every > 0 else []
        rows = training_rows(TaskMixture(tasks, seed=cfg.seed), start, plan, tokenizer)
    start.check_data(rows.fingerprint())
    print0("\n".join(describe_conversations(rows)))
    with processes.process_zero_first("the validation data"):
        held_out_rows = validation_rows(held_out, cfg, plan, tokenizer)
    total = cfg.num_iterations if cfg.num_iterations > 0 else -(-rows.plan(0).n_rows // plan.batch.rows_per_step)

    # Train
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
    opened = open_row_run(start, initial, rows, total=total, measurements=measurements, peak_flops=peak_flops)
    with opened as (run, batches):
        for step, state in run.steps():
            scalars = schedule(cfg, step, total)
            state, metrics = train_step(state, next(batches), scalars)
            epoch = rows.epoch(rows_before(start, plan, step + 1) - 1)
            run.record(state, metrics, lr_multiplier=scalars["lr_multiplier"], epoch=epoch)
    return exit_code(run)


def schedule(cfg: SFTConfig, step: int, total: int) -> dict[str, float]:
    """The scalars that the optimizer takes at a step, counted from 0; total: steps of the run."""
    return sft_scalars(
        step,
        total,
        warmup_ratio=cfg.warmup_ratio,
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
    )


def plan_of(cfg: SFTConfig, model: GPTConfig, mesh: Mesh, groups: Groups | None = None) -> Plan:
    """What is compiled for these settings; groups: of the optimizer, default: as the settings say.

    ValueError: sizes that do not fit together."""
    return make_plan(
        cfg,
        model,
        mesh,
        batch=row_batch_shape(cfg, mesh),
        loss=TokenLoss(),
        scalars=tuple(schedule(cfg, 0, 1)),
        groups=groups or fine_tuning_groups(cfg, model, abstract_gpt(model)[1]),
        packed=cfg.document_mask,
    )


def preflight_of(cfg: SFTConfig) -> int:
    """--preflight -> the exit code: 0 where it fits, else 1."""
    devices = preflight.start(cfg)
    model, cfg = preflight.model_for(
        cfg, "base", lambda: find_start(cfg, "sft", Tokenizer.load(base_dir() / "tokenizer"), print0)
    )
    plan = plan_of(cfg, model, make_mesh(cfg.mesh or "", devices, model.n_embd))
    return preflight.report(plan, [preflight.update_phase(plan)])


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


def training_rows(mixture: TaskMixture, start: Start, plan: Plan, tokenizer: Tokenizer) -> ConversationRows:
    """The rows of a run, tokenized as far as it reads them."""
    cfg = start.cfg
    if cfg.num_iterations > 0:
        wanted = rows_before(start, plan, cfg.num_iterations + STEPS_AHEAD)
        rows = packed_rows(mixture, cfg, tokenizer, wanted)
        if start.record.get("data") in (None, rows.fingerprint()):
            return rows  # else the run began when everything was tokenized
    return packed_rows(mixture, cfg, tokenizer)


def packed_rows(
    mixture: TaskMixture, cfg: SFTConfig, tokenizer: Tokenizer, wanted: int | None = None
) -> ConversationRows:
    """The rows that a mixture is packed into; its conversations are tokenized now, if no run did before.

    wanted: how many rows are read, of which the others may be missing; None: any number."""
    folder = base_dir() / "token_cache"
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
    cli_main.run_stage(main, settings.parse(SFTConfig, prog="python -m nanochat_jax.sft"))
