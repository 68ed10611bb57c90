"""The depth dial: a model from its depth, and the batch, rates and length of its training from the model.

All numbers are nanochat's as of 2026, measured there on a model of depth 12 and carried to other depths: the best
batch grows as tokens^0.383 (arXiv 2505.13738), rates as the root of the batch, and weight decay so that the time over
which it acts stays the same part of the run (arXiv 2405.13698).
"""

import dataclasses
import math

from nanochat_jax.cli.settings import require
from nanochat_jax.model.cost import flops_per_token, parameter_counts
from nanochat_jax.model.gpt import SMEAR_CHANNELS, GPTConfig, window_sizes

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens, the best batch of the reference model


def config_of_depth(
    depth: int, *, aspect_ratio: int, head_dim: int, window_pattern: str, max_seq_len: int, vocab_size: int
) -> GPTConfig:
    """nanochat's model of today: width aspect_ratio * depth rounded up to whole heads, as many kv heads as query heads.

    ValueError names the flags of a size that cannot be built.
    """
    for name, holds, rule, got in (
        ("depth", 1 <= depth <= 1000, "from 1 to 1000", depth),
        ("aspect-ratio", 1 <= aspect_ratio <= 10_000, "from 1 to 10000", aspect_ratio),
        ("head-dim", 2 <= head_dim <= 1024 and head_dim % 2 == 0, "an even number from 2 to 1024", head_dim),
        ("max-seq-len", 1 <= max_seq_len < 2**31, "from 1 to 2147483647", max_seq_len),
    ):
        require(holds, f"--{name} must be {rule}, got {got}")
    heads = -(-depth * aspect_ratio // head_dim)
    require(
        heads * head_dim >= SMEAR_CHANNELS,
        f"--depth={depth} x --aspect-ratio={aspect_ratio}, rounded up to a multiple of --head-dim={head_dim}, must "
        f"give a width of at least {SMEAR_CHANNELS}, the channels that a gate reads, got {heads * head_dim}",
    )
    return GPTConfig(
        sequence_len=max_seq_len,
        vocab_size=vocab_size,
        padded_vocab=-(-vocab_size // 64) * 64,
        n_layer=depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=heads * head_dim,
        windows=window_sizes(window_pattern, depth, max_seq_len),
    )


def scaling_params(config: GPTConfig) -> int:
    """The parameters that the horizon is counted in: matrices inside blocks and lm_head."""
    counts = parameter_counts(config)
    return counts["matrices"] + counts["lm_head"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What follows from the model's size."""

    total_batch_size: int  # tokens per optimizer step
    rate_factor: float  # on every learning rate
    decay_factor: float  # on Muon's weight decay
    iterations: int
    why: str  # where the number of iterations comes from


def recipe(
    config: GPTConfig,
    reference: GPTConfig,
    *,
    total_batch_size: int = -1,
    num_iterations: int = -1,
    target_flops: float = -1.0,
    target_param_data_ratio: float = -1.0,
) -> Recipe:
    """nanochat's scaling of a model from `reference`, the model of depth REFERENCE_DEPTH with the other dials equal.

    total_batch_size: -1 = the best one, a power of two. The length comes from the first of the last three that is above
    0; ratio means tokens per scaling parameter. Batch and decay take the best length for granted, in which the ratio
    cancels: it is as many times the reference's as the model has scaling parameters. ValueError: no length is given, or
    it is less than one step.
    """
    params = scaling_params(config)
    growth = params / scaling_params(reference)
    batch = total_batch_size
    if batch == -1:
        batch = 2 ** round(math.log2(REFERENCE_BATCH * growth**0.383))
    require(batch >= 1, f"--total-batch-size must be at least 1, or -1 for the best one, got {batch}")
    if num_iterations > 0:
        iterations, why = num_iterations, f"--num-iterations={num_iterations}"
    elif target_flops > 0:
        iterations = round(target_flops / (flops_per_token(config, config.sequence_len) * batch))
        why = f"--target-flops={target_flops:g}"
    else:
        iterations = int(target_param_data_ratio * params) // batch
        why = f"--target-param-data-ratio={target_param_data_ratio:g} x {params:,} scaling parameters"
    require(
        target_param_data_ratio > 0 or target_flops > 0 or num_iterations > 0,
        "one of --num-iterations, --target-flops and --target-param-data-ratio must be above 0: how long to train?",
    )
    require(
        1 <= iterations < 2**31,
        f"{why} gives {iterations} steps of --total-batch-size={batch} tokens, it must be from 1 to 2147483647: change "
        "either",
    )
    rate_factor = math.sqrt(batch / REFERENCE_BATCH)
    return Recipe(batch, rate_factor, rate_factor / growth, iterations, why)
