"""The settings of the quickstart."""

import dataclasses
from pathlib import Path

from nanochat_jax.cli.settings import Maybe


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Train a tokenizer, a base model and a chat model on word problems, in minutes and without a network."""

    output: Maybe[Path] = None  # new folder for all it makes; default: quickstart-1, or the next number that is free
    seed: int = 0  # texts, first weights, order and draws: another seed is another model
