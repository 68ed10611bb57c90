"""Supervised fine-tuning: a base model becomes a chat model.

python -m nanochat_jax.sft                                  # everything inherited from the newest base checkpoint
python -m nanochat_jax.sft --custom-json mine.jsonl --num-iterations 500 --run my-run
"""

import dataclasses
from pathlib import Path

from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli import settings
from nanochat_jax.cli.device import choose_attention, compute_dtype, describe_device, start_device
from nanochat_jax.cli.settings import Maybe, StageConfig, require
from nanochat_jax.data import conversations as data
from nanochat_jax.data.token_cache import open_caches
from nanochat_jax.distributed import mesh as sharding
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.evals.chatcore import make_chatcore
from nanochat_jax.files.paths import base_dir
from nanochat_jax.model.attention import check as check_attention
from nanochat_jax.optim import schedules
from nanochat_jax.tasks import (
    GSM8K,
    MMLU,
    Arithmetic,
    CustomJSON,
    SimpleSpelling,
    SmolTalk,
    SpellingBee,
    TaskMixture,
    load_task,
)
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import preflight
from nanochat_jax.train.loop import Measurement, train_on, validation
from nanochat_jax.train.run import check_settings, open_run, plan_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """Fine-tune a base model on conversations. What is not given is inherited from the base checkpoint, or from the
    run's own one with --resume."""

    # which model and run
    model_tag: Maybe[str] = None  # tag of the base model; default: the largest d<number>
    model_step: Maybe[int] = None  # step of the base model; default: its last
    output_tag: Maybe[str] = None  # folder under chatsft_checkpoints; default: the run's name, else d<depth>
    load_optimizer: int = 1  # 1 = start from the base model's optimizer state, 0 = from an empty one
    seed: int = 42  # order of the conversations; 42 is nanochat's
    # length and batch
    num_iterations: int = -1  # optimizer steps (-1 = one epoch)
    max_seq_len: Maybe[int] = None  # tokens in a row; default: inherited
    device_batch_size: Maybe[int] = None  # rows per device in one forward and backward pass; default: inherited
    total_batch_size: Maybe[int] = None  # tokens per optimizer step, all devices together; default: inherited
    document_mask: bool = True  # conversations in one row do not see each other; off = nanochat's behaviour
    # optimizer
    embedding_lr: Maybe[float] = None  # AdamW: token and value embeddings, scaled by width; default: inherited
    unembedding_lr: Maybe[float] = None  # AdamW: lm_head, scaled by width; default: inherited
    matrix_lr: Maybe[float] = None  # Muon: matrices inside blocks; default: inherited
    scalar_lr: float = 0.5  # AdamW: residual scalars
    weight_decay: Maybe[float] = None  # Muon; default: that of the loaded optimizer, else 0
    init_lr_frac: float = 0.8  # all rates start at this fraction
    warmup_ratio: float = 0.0  # part of the run over which rates rise
    warmdown_ratio: float = 0.5  # part of the run over which rates fall
    final_lr_frac: float = 0.0  # rates end at this fraction
    # evaluation and checkpoints
    eval_every: int = 200  # steps between measurements of validation bits per byte (-1 = never)
    eval_tokens: int = 40 * 524288  # tokens to measure it on, at most one pass over the validation data
    chatcore_every: int = 200  # steps between ChatCORE evaluations (-1 = never)
    chatcore_max_cat: int = -1  # problems per multiple-choice task (-1 = all)
    chatcore_max_sample: int = 24  # problems per generative task
    save_every: int = 200  # steps between checkpoints (-1 = only at the end)
    keep_checkpoints: int = 2  # how many of them stay on disk
    # data
    data_dir: Maybe[Path] = None  # local mirror of the datasets; default: NANOCHAT_DATA_DIR, else <base dir>/task_data
    smoltalk_epochs: int = 1  # times SmolTalk is in the mixture (0 = left out)
    mmlu_epochs: int = 3  # times MMLU's auxiliary_train is in it
    gsm8k_epochs: int = 4  # times GSM8K's train split is in it
    simple_spelling_rows: int = 200_000  # words to spell (0 = left out)
    spelling_bee_rows: int = 80_000  # words to count a letter of
    arithmetic_rows: int = 0  # generated word problems
    custom_json: tuple[Path, ...] = ()  # file with a conversation a line
    custom_epochs: int = 1  # times the custom files are in the mixture
    val_json: tuple[Path, ...] = ()  # such a file to validate on, beside the tasks' own test splits
    task: tuple[str, ...] = ()  # a task of your own, as module:Class


INHERITED = {
    "max_seq_len": 2048,
    "device_batch_size": 32,
    "total_batch_size": 524288,
    "embedding_lr": 0.3,
    "unembedding_lr": 0.004,
    "matrix_lr": 0.02,
}
HARMLESS = {  # what may change when a run is resumed: it alters what is watched and kept, not what is computed
    *("run", "resume", "overwrite", "config", "output_tag", "data_dir", "eval_every", "eval_tokens", "save_every"),
    *("keep_checkpoints", "chatcore_every", "chatcore_max_cat", "chatcore_max_sample", "device_type", "mesh"),
    *("replicate", "val_json", "device_batch_size", "remat"),
}


def training_tasks(cfg: SFTConfig) -> list:
    """The sources of the mixture, each as often as it has epochs; sharing one object costs its tokens once."""
    sources = ((SmolTalk, cfg.smoltalk_epochs), (MMLU, cfg.mmlu_epochs), (GSM8K, cfg.gsm8k_epochs))
    tasks = [task for make, epochs in sources if epochs > 0 for task in [make("train", data_dir=cfg.data_dir)] * epochs]
    spelling = ((SimpleSpelling, cfg.simple_spelling_rows), (SpellingBee, cfg.spelling_bee_rows))
    tasks += [make("train", rows, data_dir=cfg.data_dir) for make, rows in spelling if rows > 0]
    if cfg.arithmetic_rows > 0:
        tasks.append(Arithmetic("train", cfg.arithmetic_rows))
    if cfg.custom_epochs > 0:
        tasks += [task for path in cfg.custom_json for task in [own_file("custom_json", path)] * cfg.custom_epochs]
    tasks += [load_task(spec) for spec in cfg.task]
    require(bool(tasks), "the mixture is empty: all --*-epochs and --*-rows are 0, without --custom-json or --task")
    return tasks


def validation_tasks(cfg: SFTConfig) -> list:
    """nanochat's validation mixture (it has no spelling) of the tasks that are trained on, unseen problems of
    arithmetic, and the files of --val-json."""
    sources = [(SmolTalk, cfg.smoltalk_epochs, None), (MMLU, cfg.mmlu_epochs, 5200), (GSM8K, cfg.gsm8k_epochs, 420)]
    tasks = [make("test", stop=stop, data_dir=cfg.data_dir) for make, epochs, stop in sources if epochs > 0]
    if cfg.arithmetic_rows > 0:
        tasks.append(Arithmetic("test", 256))
    return tasks + [own_file("val_json", path) for path in cfg.val_json]


def own_file(name: str, path: Path) -> CustomJSON:
    """The task of a file that the flag `name` gives; ValueError where it holds nothing."""
    task = CustomJSON(path)
    require(len(task) > 0, f"--{name.replace('_', '-')} {path} must hold at least one conversation, it has none")
    return task


def check(cfg: SFTConfig) -> None:
    """ValueError for a setting that cannot work whatever the model and the data are."""
    ratios = ("warmup_ratio", "warmdown_ratio", "final_lr_frac")
    rates = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "init_lr_frac")
    epochs = ("smoltalk_epochs", "mmlu_epochs", "gsm8k_epochs", "custom_epochs")
    rows = ("simple_spelling_rows", "spelling_bee_rows", "arithmetic_rows")
    steps = cfg.num_iterations
    limits = ("chatcore_max_cat", "chatcore_max_sample")
    rules = (
        ("num_iterations", steps == -1 or 1 <= steps < 2**31, "from 1 to 2147483647, or -1 for one epoch"),
        ("load_optimizer", cfg.load_optimizer in (0, 1), "0 or 1"),
        *((name, 0 <= getattr(cfg, name) <= 1000, "from 0 to 1000 (see --num-iterations)") for name in epochs),
        *((name, 0 <= getattr(cfg, name) <= 10_000_000, "from 0 to 10000000") for name in rows),
        *((name, getattr(cfg, name) == -1 or getattr(cfg, name) >= 1, "at least 1, or -1 for all") for name in limits),
    )
    check_settings(cfg, rules, ratios, rates)


def main(cfg: SFTConfig) -> int:
    """Train -> the exit code: 0, or 128 + n after signal n."""
    check(cfg)
    if cfg.preflight is not None:
        return fits(cfg)
    start_device(cfg.device_type, cfg)
    mesh = sharding.make_mesh(cfg.mesh or "")
    peak = describe_device(mesh, print0)

    # The run: a new one from the base model, or one to go on with
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    run = open_run(cfg, "sft", tokenizer, HARMLESS, INHERITED, print0)
    cfg = run.cfg
    check(cfg)  # also what was inherited
    check_attention(cfg.attention, mesh, packed=cfg.document_mask)
    dtype = compute_dtype(cfg.dtype)
    batch = plan_batches(cfg, mesh, print0)

    # Data: conversations once through the tokenizer, packed into rows by plan
    with processes.process_zero_first("the data"):
        tasks, held_out = training_tasks(cfg), validation_tasks(cfg) if cfg.eval_every > 0 else []
        rows = row_source(TaskMixture(tasks, seed=cfg.seed), cfg, tokenizer)
    run.check_data(rows.fingerprint())
    print0("\n".join(data.describe(rows)))
    with processes.process_zero_first("the validation data"):
        held_out_rows = validation_rows(held_out, cfg, tokenizer)
    total = cfg.num_iterations if cfg.num_iterations > 0 else -(-rows.rows_in_epoch(0) // batch.rows_per_step)

    # Model, schedule and loop
    run.load(print0)
    mesh = sharding.make_mesh(cfg.mesh or "", n_embd=run.model_config.n_embd)
    ratios = {name: getattr(cfg, name) for name in ("warmup_ratio", "warmdown_ratio", "final_lr_frac")}
    schedule = {
        "lr_multiplier": lambda step: schedules.sft_lr_multiplier(step / total, **ratios),
        "muon_momentum": schedules.sft_muon_momentum,
    }
    where, packed = {"mesh": mesh, "dtype": dtype}, cfg.document_mask
    where["attention"] = choose_attention(cfg.attention, run.model_config, rows.T, packed=packed, **where)
    how = where | {"batch": batch}
    limits = {"max_cat": cfg.chatcore_max_cat, "max_sample": cfg.chatcore_max_sample}
    limits["data_dir"] = cfg.data_dir
    chatcore = make_chatcore(run.model_config, tokenizer, **where, **limits) if cfg.chatcore_every > 0 else None
    chat = Measurement(cfg.chatcore_every if chatcore else -1, chatcore)
    measurements = [validation(held_out_rows, run, tokenizer, **how), chat]
    return train_on(rows, run, schedule, **how, total=total, peak_flops=peak, measurements=measurements)


def fits(cfg: SFTConfig) -> int:
    """--preflight -> the exit code: 0 where it fits, else 1."""
    place = preflight.start(cfg)

    def go_on():
        return open_run(cfg, "sft", Tokenizer.load(base_dir() / "tokenizer"), HARMLESS, INHERITED, print0)

    model, cfg = preflight.model_for(cfg, "base", INHERITED, go_on)
    return preflight.rows_fit(cfg, place, model, plan_batches(cfg, place.mesh, print0))


def row_source(mixture: TaskMixture, cfg: SFTConfig, tokenizer: Tokenizer) -> data.RowSource:
    """The rows that a mixture is packed into; its conversations are tokenized now, if no run did before."""
    caches = open_caches(mixture.tasks, tokenizer, base_dir() / "token_cache", print0)
    return data.RowSource(data.ConversationStore(caches, mixture.pairs), cfg.max_seq_len, seed=cfg.seed)


def validation_rows(tasks: list, cfg: SFTConfig, tokenizer: Tokenizer) -> data.RowSource | None:
    """The rows of the validation mixture; None where there is nothing to measure."""
    if not tasks:
        if cfg.eval_every > 0:
            print0("NOTE: no validation data, bits per byte are not measured (give --val-json FILE)")
        return None
    try:
        return row_source(TaskMixture(tasks), cfg, tokenizer)
    except ValueError as e:
        raise ValueError(f"validation data: {e}") from e


if __name__ == "__main__":
    cli_main.run_stage(main, settings.parse(SFTConfig, prog="python -m nanochat_jax.sft"))
