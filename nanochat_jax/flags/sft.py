"""The settings of supervised fine-tuning."""

import dataclasses
from pathlib import Path

from nanochat_jax.cli.settings import (
    BASE_HELP,
    DATA,
    EVALUATION,
    LARGEST,
    LENGTH,
    OPTIMIZATION,
    RATE,
    RATIO,
    RUN,
    SOURCES,
    Maybe,
    ModelStep,
    at_least,
    between,
    one_of,
    setting,
)
from nanochat_jax.flags.stage import StageConfig

STEPS = between(1, LARGEST, "from 1 to 2147483647, or -1 for one epoch", also=-1)
TIMES = between(0, 1000, "from 0 to 1000 (see --num-iterations)")
ROWS = between(0, 10_000_000, "from 0 to 10000000")
PROBLEMS = at_least(1, "at least 1, or -1 for all", also=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """Fine-tune a model on conversations. What is not given is inherited from the checkpoint of that model, or from the
    run's own one with --resume.

    python -m nanochat_jax.sft                                  # everything inherited from the newest base model
    python -m nanochat_jax.sft --custom-json mine.jsonl --num-iterations 500 --run my-run
    python -m nanochat_jax.sft --source sft --custom-json mine.jsonl --run second    # a chat model learns more
    python -m nanochat_jax.sft --base hub:karpathy/nanochat-d32 --output-dir ~/from_d32    # from a model of the hub
    python -m nanochat_jax.sft --run my-run --resume            # go on after a stop
    """

    source: str = setting("base", "stage of the model to start from", SOURCES, group=RUN)
    base: Maybe[Path] = setting(None, BASE_HELP, group=RUN)
    model_tag: Maybe[str] = setting(None, "its tag; default: the one saved last", group=RUN)
    model_step: ModelStep = setting(None, "its step; best = of the highest pass@1 in RL; default: the last", group=RUN)
    output_tag: Maybe[str] = setting(
        None, "folder under chatsft_checkpoints; default: the run's name, else d<depth>", resume="own", group=RUN
    )
    load_optimizer: int = setting(
        1, "1 = start from that model's optimizer state, 0 = from an empty one", one_of(0, 1), group=RUN
    )
    seed: int = setting(42, "order of the conversations; 42 is nanochat's", at_least(0), group=RUN)
    num_iterations: int = setting(
        -1, "optimizer steps (-1 = one epoch); with --resume more than before", STEPS, resume="longer", group=LENGTH
    )
    max_seq_len: Maybe[int] = setting(None, "tokens in a row; default: inherited", inherited=2048, group=LENGTH)
    device_batch_size: Maybe[int] = setting(
        None,
        "rows per device in one forward and backward pass; default: inherited",
        inherited=32,
        resume="free",
        group=LENGTH,
    )
    total_batch_size: Maybe[int] = setting(
        None, "tokens per optimizer step, all devices together; default: inherited", inherited=524288, group=LENGTH
    )
    document_mask: bool = setting(
        True, "conversations in one row do not see each other; off = nanochat's behaviour", group=LENGTH
    )
    embedding_lr: Maybe[float] = setting(
        None,
        "AdamW: token and value embeddings, scaled by width; default: inherited",
        RATE,
        inherited=0.3,
        group=OPTIMIZATION,
    )
    unembedding_lr: Maybe[float] = setting(
        None, "AdamW: lm_head, scaled by width; default: inherited", RATE, inherited=0.004, group=OPTIMIZATION
    )
    matrix_lr: Maybe[float] = setting(
        None, "Muon: matrices inside blocks; default: inherited", RATE, inherited=0.02, group=OPTIMIZATION
    )
    scalar_lr: float = setting(0.5, "AdamW: residual scalars", RATE, group=OPTIMIZATION)
    weight_decay: Maybe[float] = setting(
        None, "Muon; default: that of the loaded optimizer, else 0", RATE, group=OPTIMIZATION
    )
    init_lr_frac: float = setting(0.8, "all rates start at this fraction", RATE, group=OPTIMIZATION)
    warmup_ratio: float = setting(0.0, "part of the run over which rates rise", RATIO, group=OPTIMIZATION)
    warmdown_ratio: float = setting(0.5, "part of the run over which rates fall", RATIO, group=OPTIMIZATION)
    final_lr_frac: float = setting(0.0, "rates end at this fraction", RATIO, group=OPTIMIZATION)
    eval_every: int = setting(
        200, "steps between measurements of validation bits per byte (-1 = never)", resume="free", group=EVALUATION
    )
    eval_tokens: int = setting(
        40 * 524288,
        "tokens to measure it on, at most one pass over the validation data",
        at_least(1, "at least 1 (--eval-every -1 measures nothing)"),
        resume="free",
        group=EVALUATION,
    )
    chatcore_every: int = setting(
        200, "steps between ChatCORE evaluations (-1 = never)", resume="free", group=EVALUATION
    )
    chatcore_max_cat: int = setting(
        -1, "problems per multiple-choice task (-1 = all)", PROBLEMS, resume="free", group=EVALUATION
    )
    chatcore_max_sample: int = setting(24, "problems per generative task", PROBLEMS, resume="free", group=EVALUATION)
    save_every: int = setting(200, "steps between checkpoints (-1 = only at the end)", resume="free", group=EVALUATION)
    data_dir: Maybe[Path] = setting(
        None,
        "local mirror of the datasets; default: NANOCHAT_DATA_DIR, else <base dir>/task_data",
        resume="free",
        group=DATA,
    )
    smoltalk_epochs: int = setting(1, "times SmolTalk is in the mixture (0 = left out)", TIMES, group=DATA)
    mmlu_epochs: int = setting(3, "times MMLU's auxiliary_train is in it", TIMES, group=DATA)
    gsm8k_epochs: int = setting(4, "times GSM8K's train split is in it", TIMES, group=DATA)
    simple_spelling_rows: int = setting(200_000, "words to spell (0 = left out)", ROWS, group=DATA)
    spelling_bee_rows: int = setting(80_000, "words to count a letter of", ROWS, group=DATA)
    arithmetic_rows: int = setting(0, "generated word problems", ROWS, group=DATA)
    custom_json: tuple[Path, ...] = setting((), "file of conversations, or hub:owner/dataset:split", group=DATA)
    custom_epochs: int = setting(1, "times the custom files are in the mixture", TIMES, group=DATA)
    val_json: tuple[Path, ...] = setting(
        (), "such a file to validate on, beside the tasks' own test splits", resume="free", group=DATA
    )
    longest_line: int = setting(
        16 << 20, "bytes of a conversation in their JSON", at_least(1), resume="free", group=DATA
    )
    allow_empty: bool = setting(
        False, "take conversations with empty answers from these files", resume="free", group=DATA
    )
    task: tuple[str, ...] = setting((), "another task, by its name in eval or as module:Class", group=DATA)
