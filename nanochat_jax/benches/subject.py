"""The model that is timed: one of the base directory, or one of any size with random weights."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from nanochat_jax.checkpoints import find
from nanochat_jax.cli.settings import require
from nanochat_jax.flags.bench import BenchConfig, ModelSizes
from nanochat_jax.model.gpt import GPT, GPTConfig
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_jax.train.scaling_laws import config_of_depth

TEXT = (
    "Rivers begin as small streams in the hills, gather water from rain and melting snow, and run through fields and "
    "towns until they reach the sea. "
)


class Subject(NamedTuple):
    """What is timed."""

    config: GPTConfig
    params: Any  # a tree as GPT's, float32
    tokenizer: Tokenizer

    def prompt(self, tokens: int) -> list[int]:
        """A text of so many tokens behind bos, that included."""
        ids = [self.tokenizer.bos]
        while len(ids) < tokens:
            ids += self.tokenizer.encode(TEXT)
        return ids[:tokens]


def config_of(cfg: BenchConfig) -> tuple[str, GPTConfig]:
    """(name, network) of the model that the settings name; no parameter is read. ValueError names the flags that do not
    fit together."""
    if cfg.source is None:
        return f"depth {cfg.depth}, random weights", config_of_sizes(cfg)
    found = find.find_model(cfg.source, cfg.model_tag, cfg.step, cfg.base)
    return str(found), find.load_config(found)


def subject_of(cfg: BenchConfig) -> Subject:
    """The same with its parameters, in this machine's memory or on its first device."""
    if cfg.source is None:
        config, tokenizer = config_of_sizes(cfg), byte_pair_tokenizer(cfg.vocab_size)
        return Subject(config, random_params(config), tokenizer)
    found = find.find_model(cfg.source, cfg.model_tag, cfg.step, cfg.base)
    tokenizer = Tokenizer.load(found.tokenizer)
    find.check_tokenizer(tokenizer, find.peek_meta(found), found)
    config, params, _ = find.load_params(found)
    return Subject(config, params, tokenizer)


def config_of_sizes(cfg: ModelSizes) -> GPTConfig:
    """ValueError names the flags that do not fit together."""
    config = config_of_depth(
        cfg.depth,
        aspect_ratio=cfg.aspect_ratio,
        head_dim=cfg.head_dim,
        window_pattern=cfg.window_pattern,
        max_seq_len=cfg.max_seq_len,
        vocab_size=cfg.vocab_size,
    )
    kv_heads = cfg.kv_heads or config.n_head
    require(config.n_head % kv_heads == 0, f"--kv-heads={kv_heads} must divide the {config.n_head} query heads")
    return dataclasses.replace(config, n_kv_head=kv_heads)


def byte_pair_tokenizer(size: int) -> Tokenizer:
    """Of `size` tokens: bytes, pairs of bytes, and the special ones. ValueError: that is too few, or too many."""
    most = 256 + 256**2 + len(SPECIAL_TOKENS)
    require(
        256 + len(SPECIAL_TOKENS) <= size <= most,
        f"--vocab-size must be from {256 + len(SPECIAL_TOKENS)} to {most}, got {size}",
    )
    ranks = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    ranks = ranks[: size - len(SPECIAL_TOKENS)]
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Tokenizer("bench", r"\w+|\W", {token: i for i, token in enumerate(ranks)}, specials)


def random_params(config: GPTConfig) -> dict:
    """An untrained model's, with the zeros of an initial state replaced, so that every path counts."""

    def fresh():
        leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0)))))
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return tree.unflatten(w + 0.02 * jax.random.normal(key, w.shape) for w, key in zip(leaves, keys))

    return jax.jit(fresh)()


def document_starts(rng: np.random.Generator, shape: tuple[int, ...], mean: int) -> np.ndarray:
    """int32 [...,T]: where each token's document begins, in rows packed with documents of random lengths around `mean`
    (a border before every token with probability 1 / mean); 0: one document a row."""
    if not mean:
        return np.zeros(shape, np.int32)
    borders = rng.random(shape) < 1 / mean
    return np.maximum.accumulate(np.where(borders, np.arange(shape[-1]), 0), -1).astype(np.int32)
