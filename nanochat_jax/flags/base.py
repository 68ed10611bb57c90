"""The settings of pretraining."""

import dataclasses
from pathlib import Path

from nanochat_jax.cli.settings import (
    DATA,
    EVALUATION,
    FINITE,
    LARGEST,
    LENGTH,
    MODEL,
    OPTIMIZATION,
    RATE,
    RATIO,
    RUN,
    Maybe,
    at_least,
    between,
    setting,
)
from nanochat_jax.flags.stage import StageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(StageConfig):
    """Pretrain a model on documents. Everything follows from --depth; the other defaults are nanochat's.

    python -m nanochat_jax.base --download 8 --depth 12         # fetch 8 shards, then train for the best length
    python -m nanochat_jax.base --data-dir shards --depth 4 --num-iterations 300 --total-batch-size 8192
    """

    model_tag: Maybe[str] = setting(None, "folder under base_checkpoints; default: d<depth>", resume="free", group=RUN)
    seed: int = setting(
        42,
        "first weights, and the order of the documents from the second epoch on",
        between(0, 2**32 - 1, "from 0 to 4294967295"),
        group=RUN,
    )
    depth: int = setting(20, "layers: the dial that decides everything else", group=MODEL)
    aspect_ratio: int = setting(64, "width = depth x this, rounded up to whole heads", group=MODEL)
    head_dim: int = setting(128, "width of an attention head", group=MODEL)
    window_pattern: str = setting(
        "SSSL", "attention of the layers in turn: L = whole row, S = a quarter; the last is L", group=MODEL
    )
    max_seq_len: int = setting(2048, "tokens in a row", group=MODEL)
    num_iterations: int = setting(
        -1,
        "optimizer steps; with --resume more than before",
        between(-1, LARGEST, "from 1 to 2147483647, or -1"),
        resume="longer",
        group=LENGTH,
    )
    target_flops: float = setting(-1.0, "floating-point operations of the whole training", FINITE, group=LENGTH)
    target_param_data_ratio: float = setting(12.0, "tokens per parameter of matrices and lm_head", FINITE, group=LENGTH)
    device_batch_size: Maybe[int] = setting(
        None, "rows per device in one pass; default: 32, or fewer that divide the batch", resume="free", group=LENGTH
    )
    total_batch_size: int = setting(
        -1,
        "tokens per optimizer step, all devices together (-1 = the best for the model's size)",
        at_least(1, "at least 1, or -1", also=-1),
        group=LENGTH,
    )
    document_mask: bool = setting(
        True, "documents in one row do not see each other; off = nanochat's behaviour", group=LENGTH
    )
    embedding_lr: float = setting(
        0.3, "AdamW: token and value embeddings, scaled by width too", RATE, group=OPTIMIZATION
    )
    unembedding_lr: float = setting(0.008, "AdamW: lm_head, scaled by width too", RATE, group=OPTIMIZATION)
    matrix_lr: float = setting(0.02, "Muon: matrices inside blocks", RATE, group=OPTIMIZATION)
    scalar_lr: float = setting(0.5, "AdamW: residual scalars", RATE, group=OPTIMIZATION)
    weight_decay: float = setting(
        0.28, "Muon, at depth 12; scaled to the model and to the batch, and falling to 0", RATE, group=OPTIMIZATION
    )
    warmup_steps: int = setting(40, "steps over which rates rise", at_least(0), group=OPTIMIZATION)
    warmdown_ratio: float = setting(0.65, "part of the run over which rates fall", RATIO, group=OPTIMIZATION)
    final_lr_frac: float = setting(0.05, "rates end at this fraction", RATIO, group=OPTIMIZATION)
    eval_every: int = setting(
        250, "steps between measurements of validation bits per byte (-1 = never)", resume="free", group=EVALUATION
    )
    eval_tokens: int = setting(
        80 * 524288,
        "tokens to measure it on, at most one pass over the validation shard",
        at_least(1, "at least 1 (--eval-every -1 measures nothing)"),
        resume="free",
        group=EVALUATION,
    )
    core_every: int = setting(
        -1,
        "steps between measurements of CORE (-1 = never; its tasks are downloaded, 162 MB)",
        resume="free",
        group=EVALUATION,
    )
    core_max_per_task: int = setting(
        500,
        "examples of each of CORE's tasks (-1 = all)",
        at_least(1, "at least 1, or -1", also=-1),
        resume="free",
        group=EVALUATION,
    )
    sample_every: int = setting(
        2000, "steps between samples from the model (-1 = never)", resume="free", group=EVALUATION
    )
    save_every: int = setting(250, "steps between checkpoints (-1 = only at the end)", resume="free", group=EVALUATION)
    data_dir: Maybe[Path] = setting(
        None, "parquet files with a column text; default: base_data_climbmix of the base dir", resume="free", group=DATA
    )
    download: int = setting(
        0,
        "fetch this many shards of climbmix-400b-shuffle first, and one for validation",
        at_least(0),
        resume="free",
        group=DATA,
    )
