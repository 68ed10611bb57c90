"""Pretraining: from documents to a base model.

python -m nanochat_jax.base --download 8 --depth 12         # fetch 8 shards, then train for the best length
python -m nanochat_jax.base --data-dir shards --depth 4 --num-iterations 300 --total-batch-size 8192
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

from nanochat_jax.checkpoints import integrity, store
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli import settings
from nanochat_jax.cli.device import choose_attention, compute_dtype, describe_device, start_device
from nanochat_jax.cli.settings import Maybe, StageConfig
from nanochat_jax.data import documents
from nanochat_jax.data import shards as data_shards
from nanochat_jax.distributed import mesh as sharding
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.paths import base_dir, kept_dir
from nanochat_jax.model.attention import check as check_attention
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.optim import groups as optim_groups
from nanochat_jax.optim import schedules
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import preflight, scaling_laws
from nanochat_jax.train.loop import Measurement, train_on, validation
from nanochat_jax.train.run import Run, check_agreement, check_settings, open_folder, plan_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(StageConfig):
    """Pretrain a model on documents. Everything follows from --depth; the other defaults are nanochat's."""

    # which model and run
    model_tag: Maybe[str] = None  # folder under base_checkpoints; default: d<depth>
    seed: int = 42  # first weights, and the order of the documents from the second epoch on
    # model
    depth: int = 20  # layers: the dial that decides everything else
    aspect_ratio: int = 64  # width = depth x this, rounded up to whole heads
    head_dim: int = 128  # width of an attention head
    window_pattern: str = "SSSL"  # attention of the layers in turn: L = whole row, S = a quarter; the last is L
    max_seq_len: int = 2048  # tokens in a row
    # length: the first of these three that is above 0
    num_iterations: int = -1  # optimizer steps
    target_flops: float = -1.0  # floating-point operations of the whole training
    target_param_data_ratio: float = 12.0  # tokens per parameter of matrices and lm_head
    # batch
    device_batch_size: Maybe[int] = None  # rows per device in one pass; default: 32, or fewer that divide the batch
    total_batch_size: int = -1  # tokens per optimizer step, all devices together (-1 = the best for the model's size)
    document_mask: bool = True  # documents in one row do not see each other; off = nanochat's behaviour
    # optimizer: rates for batches of 524,288 tokens, scaled to the batch in force
    embedding_lr: float = 0.3  # AdamW: token and value embeddings, scaled by width too
    unembedding_lr: float = 0.008  # AdamW: lm_head, scaled by width too
    matrix_lr: float = 0.02  # Muon: matrices inside blocks
    scalar_lr: float = 0.5  # AdamW: residual scalars
    weight_decay: float = 0.28  # Muon, at depth 12; scaled to the model and to the batch, and falling to 0
    warmup_steps: int = 40  # steps over which rates rise
    warmdown_ratio: float = 0.65  # part of the run over which rates fall
    final_lr_frac: float = 0.05  # rates end at this fraction
    # evaluation and checkpoints
    eval_every: int = 250  # steps between measurements of validation bits per byte (-1 = never)
    eval_tokens: int = 80 * 524288  # tokens to measure it on, at most one pass over the validation shard
    sample_every: int = 2000  # steps between samples from the model (-1 = never)
    save_every: int = 250  # steps between checkpoints (-1 = only at the end)
    keep_checkpoints: int = 2  # how many of them stay on disk
    # data
    data_dir: Maybe[Path] = None  # parquet files with a column text; default: base_data_climbmix of the base dir
    download: int = 0  # fetch this many shards of climbmix-400b-shuffle first, and one for validation


HARMLESS = {  # what may change when a run is resumed: it alters what is watched and kept, not what is computed
    *("run", "resume", "overwrite", "config", "model_tag", "data_dir", "download", "eval_every", "eval_tokens"),
    *("sample_every", "save_every", "keep_checkpoints", "device_type", "mesh", "replicate", "device_batch_size"),
    "remat",
}
PROMPTS = (  # what is sampled from as training goes on: facts, a rule, arithmetic, a story
    "The largest ocean on Earth is",
    "Water is made of hydrogen and",
    "One, two, three, four,",
    "The opposite of early is",
    "Seven plus two equals",
    "Once upon a time there was a",
)
SAMPLE_TOKENS = 16


def check(cfg: BaseConfig) -> None:
    """ValueError for a setting that cannot work whatever the data are."""
    rates = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
    rules = (
        ("num_iterations", -1 <= cfg.num_iterations < 2**31, "from 1 to 2147483647, or -1"),
        ("target_flops", math.isfinite(cfg.target_flops), "a finite number"),
        ("target_param_data_ratio", math.isfinite(cfg.target_param_data_ratio), "a finite number"),
        ("total_batch_size", cfg.total_batch_size == -1 or cfg.total_batch_size >= 1, "at least 1, or -1"),
        ("warmup_steps", cfg.warmup_steps >= 0, "at least 0"),
        ("download", cfg.download >= 0, "at least 0"),
        ("seed", cfg.seed < 2**32, "below 4294967296"),
    )
    check_settings(cfg, rules, ("warmdown_ratio", "final_lr_frac"), rates)


def main(cfg: BaseConfig) -> int:
    """Train -> the exit code: 0, or 128 + n after signal n."""
    check(cfg)
    if cfg.preflight is not None:
        return fits(cfg)
    start_device(cfg.device_type, cfg)
    mesh = sharding.make_mesh(cfg.mesh or "")
    peak = describe_device(mesh, print0)

    # The run: a new one, or one to go on with
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    run = check_agreement(open_folder(cfg, "base", tag_of(cfg), tokenizer, HARMLESS, print0))
    cfg = run.cfg
    check(cfg)  # also what a checkpoint recorded
    check_attention(cfg.attention, mesh, packed=cfg.document_mask)
    dtype = compute_dtype(cfg.dtype)

    # Model, batch and length from the depth
    run.model_config, recipe_for = model_and_recipe(cfg, tokenizer.vocab_size)
    mesh = sharding.make_mesh(cfg.mesh or "", n_embd=run.model_config.n_embd)
    if run.resumed:  # the best batch is rounded to what the devices of the run's start could split
        cfg = dataclasses.replace(cfg, total_batch_size=run.record["total_batch_size"])
    cfg = sized(cfg, recipe_for(total_batch_size=cfg.total_batch_size).total_batch_size, sharding.row_shards(mesh))
    batch = plan_batches(cfg, mesh, print0)
    recipe = recipe_for(total_batch_size=cfg.total_batch_size)
    total = recipe.iterations
    run.groups = groups_of(cfg, run.model_config.n_embd, recipe)
    tell(run, recipe)

    # Data: documents once through the tokenizer, a shard at a time, packed into full rows by plan
    with processes.process_zero_first("the data"):
        *shards, held_out = shards_of(cfg)
        rows = documents.DocumentRows(shards, tokenizer, cfg.max_seq_len, seed=cfg.seed)
        held_out_rows = documents.DocumentRows([held_out], tokenizer, cfg.max_seq_len) if cfg.eval_every > 0 else None
    run.check_data(rows.fingerprint(run.record.get("shards_reached")))
    with processes.process_zero_first("the first shard"):
        print0("\n".join(documents.describe(rows, total * batch.rows_per_step)))

    # Schedule and loop
    shape = {"warmdown_ratio": cfg.warmdown_ratio}
    warm = {"warmup_steps": cfg.warmup_steps, "final_lr_frac": cfg.final_lr_frac}
    schedule = {
        "lr_multiplier": lambda step: schedules.base_lr_multiplier(step, total, **shape, **warm),
        "muon_momentum": lambda step: schedules.base_muon_momentum(step, total, **shape),
        "decay_multiplier": lambda step: schedules.base_decay_multiplier(step, total),
    }
    where, packed = {"mesh": mesh, "dtype": dtype}, cfg.document_mask
    where["attention"] = choose_attention(cfg.attention, run.model_config, rows.T, packed=packed, **where)
    how = where | {"batch": batch}
    measurements = [validation(held_out_rows, run, tokenizer, **how), samples(run, tokenizer, **where)]

    def meta(step):
        """What fine-tuning inherits: the sizes in force, and the last step's decay, as in nanochat's files."""
        groups = {name: dataclasses.asdict(group) for name, group in run.groups.items()}
        groups["matrix"]["weight_decay"] *= schedules.base_decay_multiplier(step - 1, total)
        per_device = batch.rows_per_pass // sharding.row_shards(mesh)
        sizes = {"device_batch_size": per_device, "total_batch_size": batch.tokens_per_step}
        return {"optimizer_groups": groups, "max_seq_len": cfg.max_seq_len, **sizes}

    return train_on(rows, run, schedule, **how, total=total, peak_flops=peak, measurements=measurements, meta=meta)


def tag_of(cfg: BaseConfig) -> str:
    """The run's folder. Of --resume without a word on which run, the only one; ValueError: there are several."""
    given = {"depth", "model_tag", "config"} & getattr(cfg, "given", frozenset())
    if cfg.resume and not given and cfg.model_tag is None and cfg.depth == BaseConfig.depth:
        folders = sorted((kept_dir() / store.SOURCES["base"]).glob("*"))
        tags = [folder.name for folder in folders if integrity.steps(folder)]
        settings.require(len(tags) < 2, f"--resume: which run? Name one of {', '.join(tags)} with --model-tag")
        if tags:
            return tags[0]
    return cfg.model_tag or f"d{cfg.depth}"


def shards_of(cfg: BaseConfig) -> list[Path]:
    """The parquet files of the run, the last for validation: those that --download names, else all of the folder."""
    if not cfg.download:
        return data_shards.find_shards(cfg.data_dir)
    from nanochat_jax.data.shards import fetch_shards

    folder = cfg.data_dir.expanduser() if cfg.data_dir else base_dir() / data_shards.FOLDERS[0]
    return fetch_shards(cfg.download, folder, print0)


def model_and_recipe(cfg: BaseConfig, vocab_size: int) -> tuple[GPTConfig, Callable[..., scaling_laws.Recipe]]:
    """(the network, total_batch_size=... -> what follows from its size)"""
    dials = {name: getattr(cfg, name) for name in ("aspect_ratio", "head_dim", "window_pattern", "max_seq_len")}
    model, reference = (
        scaling_laws.config_of_depth(depth, **dials, vocab_size=vocab_size)
        for depth in (cfg.depth, scaling_laws.REFERENCE_DEPTH)
    )
    lengths = {name: getattr(cfg, name) for name in ("num_iterations", "target_flops", "target_param_data_ratio")}
    return model, functools.partial(scaling_laws.recipe, model, reference, **lengths)


def fits(cfg: BaseConfig) -> int:
    """--preflight -> the exit code: 0 where it fits, else 1."""
    place, vocab_size = preflight.start(cfg), preflight.vocabulary()
    if cfg.resume:
        run = open_folder(cfg, "base", tag_of(cfg), Tokenizer.load(base_dir() / "tokenizer"), HARMLESS, print0)
        cfg = dataclasses.replace(run.cfg, total_batch_size=run.record.get("total_batch_size", cfg.total_batch_size))
    model, recipe_for = model_and_recipe(cfg, vocab_size)
    cfg = sized(
        cfg, recipe_for(total_batch_size=cfg.total_batch_size).total_batch_size, sharding.row_shards(place.mesh)
    )
    return preflight.rows_fit(cfg, place, model, plan_batches(cfg, place.mesh, print0), scalars=3)


def sized(cfg: BaseConfig, total_batch_size: int, row_shards: int) -> BaseConfig:
    """The settings with the batch in force; a device gets 32 rows at a time, or as many as divide it.

    A batch that the user has not chosen is rounded to whole passes."""
    rows = cfg.device_batch_size
    if rows is None:
        wanted = total_batch_size // (cfg.max_seq_len * row_shards)
        rows = next(n for n in range(max(1, min(32, wanted)), 0, -1) if n == 1 or wanted % n == 0)
    per_pass = rows * cfg.max_seq_len * row_shards
    if cfg.total_batch_size == -1 and per_pass > 0:
        total_batch_size = max(1, round(total_batch_size / per_pass)) * per_pass
    return dataclasses.replace(cfg, device_batch_size=rows, total_batch_size=total_batch_size)


def groups_of(cfg: BaseConfig, n_embd: int, recipe: scaling_laws.Recipe) -> optim_groups.Groups:
    """The optimizer's groups with the rates scaled to the batch, but for the fixed one of the smear."""
    rates = {name: getattr(cfg, name) for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")}
    rates = {name: rate * recipe.rate_factor for name, rate in rates.items()}
    return optim_groups.default_groups(n_embd, **rates, weight_decay=cfg.weight_decay * recipe.decay_factor)


def tell(run: Run, recipe: scaling_laws.Recipe) -> None:
    """The model and what follows from its size."""
    model = run.model_config
    ratio = recipe.iterations * recipe.total_batch_size / scaling_laws.scaling_params(model)
    print0(
        f"Model: depth {model.n_layer}, width {model.n_embd}, {model.n_head} heads of {model.head_dim}, windows "
        f"{', '.join(map(str, dict.fromkeys(model.windows)))}, vocabulary {model.vocab_size:,}"
    )
    print0(
        f"{recipe.iterations:,} steps of {recipe.total_batch_size:,} tokens from {recipe.why}: "
        f"{recipe.iterations * recipe.total_batch_size:,} tokens, {ratio:.2f} for each scaling parameter"
    )
    decay = run.groups["matrix"].weight_decay
    print0(f"Learning rates x {recipe.rate_factor:.4f} for this batch, Muon's weight decay {decay:.6f}")


def samples(run: Run, tokenizer: Tokenizer, mesh, **how) -> Measurement:
    """The most likely continuations of PROMPTS, as far as they fit into a row."""
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in PROMPTS]
    prompts = [ids for ids in prompts if len(ids) + SAMPLE_TOKENS <= run.model_config.sequence_len]

    def measure(params):
        if not prompts:
            return {}
        from nanochat_jax.inference.engine import Engine
        from nanochat_jax.inference.samples import SamplingParams

        engine = Engine(run.model_config, tokenizer, sharding.own_devices(mesh), tools=False, **how)
        with engine.holding(params, mesh):
            answers = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=SAMPLE_TOKENS))
        return {"samples": [printable(tokenizer.decode([*p[1:], *a[0].tokens])) for p, a in zip(prompts, answers)]}

    return Measurement(run.cfg.sample_every, measure)


def printable(text: str) -> str:
    """One line that no terminal takes for a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    cli_main.run_stage(main, settings.parse(BaseConfig, prog="python -m nanochat_jax.base"))
