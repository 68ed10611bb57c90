"""Small models, batches and mixtures that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax.distributed.sharding import path_name
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt

# An optimizer for what is not about ours: a step with it is compiled in half the time.
DESCENT = optax.with_extra_args_support(optax.sgd(0.5))


def tiny_config(**changes) -> GPTConfig:
    """Three layers, grouped kv heads, a padded vocabulary, windows that bite: everything that can go wrong."""
    values = {
        "sequence_len": 64,
        "vocab_size": 90,
        "padded_vocab": 128,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 64,
        "windows": (7, -1, 40),
    }
    return GPTConfig(**(values | changes))


def random_params(config: GPTConfig, seed: int = 0, scale: float = 0.2) -> dict:
    """Parameters without the zeros of an initial state, so that every path is used."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        center = 1.0 if path_name(path) == "resid_lambdas" else 0.0
        return jnp.asarray(center + scale * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, abstract_gpt(config)[1])


def random_batch(config: GPTConfig, A: int = 1, B: int = 8, T: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows [A,B,T] with documents of about 12 tokens and about half of the targets trained."""
    rng = np.random.default_rng(seed)
    starts = np.where(rng.random((A, B, T)) < 1 / 12, np.arange(T), 0)
    return {
        "inputs": rng.integers(0, config.vocab_size, (A, B, T), dtype=np.int32),
        "targets": rng.integers(0, config.vocab_size, (A, B, T), dtype=np.int32),
        "weights": (rng.random((A, B, T)) < 0.5).astype(np.float32),
        "document_start": np.maximum.accumulate(starts, -1).astype(np.int32),
    }
