"""The settings of the benchmarks."""

import dataclasses
from typing import Annotated

from nanochat_jax.cli.settings import (
    ANSWERS,
    DEVICES,
    LENGTH,
    MODEL,
    RUN,
    SOURCES,
    Maybe,
    at_least,
    between,
    one_of,
    setting,
    short,
)
from nanochat_jax.flags.model import ModelConfig

COUNT = at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a model with random weights; by default nanochat's of this depth."""

    depth: int = setting(4, "layers of a model with random weights: 12, 20, 26, ...", group=MODEL)
    aspect_ratio: int = setting(64, "width = depth x this, rounded up to whole heads", group=MODEL)
    head_dim: int = setting(128, "width of an attention head", group=MODEL)
    kv_heads: int = setting(0, "key and value heads; 0 = as many as query heads", at_least(0), group=MODEL)
    window_pattern: str = setting("SSSL", "attention of the layers in turn: L = whole row, S = a quarter", group=MODEL)
    vocab_size: int = setting(32768, "tokens of the vocabulary", COUNT, group=MODEL)
    max_seq_len: int = setting(2048, "tokens in a row; its context", COUNT, group=MODEL)
    dtype: Annotated[str, short("-d")] = setting(
        "auto", "compute type: float32 or bfloat16; auto = as a run takes it", group=DEVICES
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(ModelConfig, ModelSizes):
    """Time a model: generating one prompt's continuations in batches (infer), an SFT step, or a step of RL.

    python -m nanochat_jax.bench --depth 12                     # infer: nanochat's protocol, on random weights
    python -m nanochat_jax.bench -i base -g d20                 # the same of a model of the base directory
    python -m nanochat_jax.bench --what sft --depth 20 --device-batch-size 8 --total-batch-size 65536
    python -m nanochat_jax.bench --what rl --depth 20
    """

    what: str = setting("infer", "infer, sft or rl", one_of("infer", "sft", "rl"), group=RUN)
    source: Annotated[Maybe[str], short("-i")] = setting(
        None, "stage of a real model; default: random weights", SOURCES, group=RUN
    )
    prompt_tokens: Maybe[int] = setting(
        None, "tokens of a prompt; default: 2048, but infer cuts it to the context; of rl 150", COUNT, group=ANSWERS
    )
    decode_tokens: int = setting(256, "tokens of an answer at most", at_least(2), group=ANSWERS)
    batch_sizes: str = setting("1,8,32,128", "infer: answers generated together", group=ANSWERS)
    temperature: Annotated[Maybe[float], short("-t")] = setting(
        None, "of the sampling; default: 0, the likeliest tokens, of rl 1", group=ANSWERS
    )
    top_k: Annotated[int, short("-k")] = setting(50, "sample among so many tokens; 0 = all", group=ANSWERS)
    examples_per_step: int = setting(16, "rl: problems in a step", COUNT, group=ANSWERS)
    num_samples: int = setting(16, "rl: answers to each", COUNT, group=ANSWERS)
    tools: bool = setting(True, "rl: with the calculator", group=ANSWERS)
    device_batch_size: int = setting(8, "rows per device in one pass of training", COUNT, group=LENGTH)
    total_batch_size: int = setting(
        -1, "sft: tokens of a step (-1 = of one pass)", at_least(1, "at least 1, or -1", also=-1), group=LENGTH
    )
    document_tokens: int = setting(
        0, "sft: mean length of documents packed into a row; 0 = one a row", at_least(0), group=LENGTH
    )
    repeats: Maybe[int] = setting(None, "timed repetitions; default: 3, of sft 12 steps", COUNT, group=LENGTH)
    slots: int = setting(256, "rl: answers that are generated together", COUNT, group=DEVICES)
    chunk: int = setting(16, "tokens between two visits of the host", between(1, 4096), group=DEVICES)
    device_type: str = setting("auto", "auto, cuda, tpu or cpu", group=DEVICES)
    attention: str = setting(
        "auto", "backend by name, see docs/training.md; auto = the fastest that passes a trial here", group=DEVICES
    )
    remat: str = setting(
        "auto",
        "computed again instead of kept: none, elementwise or block; auto = the least that fits",
        one_of("auto", "none", "elementwise", "block"),
        group=DEVICES,
    )
    mesh: Maybe[str] = setting(None, "devices by axis, such as data=4,model=2; default: all on data", group=DEVICES)
