"""What decoding must read from memory at the least."""

from collections.abc import Sequence

import numpy as np

from nanochat_jax.inference.engine import Engine
from nanochat_jax.model.cost import parameter_counts
from nanochat_jax.model.gpt import GPTConfig


def bytes_to_read(engine: Engine, steps: int, keys: float) -> float:
    """Of all devices together, in so many steps and for `kv_tokens` keys: at each step every device reads the matrices
    of the blocks and lm_head once, in the compute type (of embeddings a step reads a few rows: left out), and for every
    layer and token fed the keys and values that it sees."""
    counts = parameter_counts(engine.config)
    weights = (counts["matrices"] + counts["lm_head"]) * engine.programs.dtype.itemsize * engine.mesh.size
    return weights * steps + 2 * engine.config.kv_dim * engine.programs.layout.dtype.itemsize * keys


def kv_tokens(config: GPTConfig, prompt: int, lengths: Sequence[int], shared: int) -> float:
    """Pairs of a layer and a key that must be read for one prompt's samples of these lengths, `shared` at a time: those
    after the prompt for each sample, those of the prompt once for the samples that share them, that is max(over the
    longest sample, over all samples / shared), the fewest that any order of the samples allows.

    At step t a sample is at position P + t, P = prompt - 1 (the prompt's last token is fed first), and sees
    min(position, window) + 1 keys."""
    P, steps = prompt - 1, np.arange(max(lengths))
    own, of_prompt = np.zeros(len(steps)), np.zeros(len(steps))  # of all layers, at each step
    for window in config.windows:
        reach = steps + P if window < 0 else np.minimum(window, steps + P)  # keys before the token's own
        own += np.minimum(reach, steps) + 1
        of_prompt += np.maximum(reach - steps, 0)
    own, of_prompt = np.cumsum(own), np.cumsum(of_prompt)
    last = np.asarray(lengths) - 1
    return own[last].sum() + max(of_prompt[-1], of_prompt[last].sum() / shared)
