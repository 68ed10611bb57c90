"""The settings of the quickstart."""

import dataclasses
from pathlib import Path

from nanochat_jax.cli.settings import LARGEST, OUTPUT, RUN, Maybe, between, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Train a tokenizer, a base model and a chat model on word problems, in minutes and without a network.

    python -m nanochat_jax.quickstart
    python -m nanochat_jax.quickstart --seed 7 --output another
    """

    output: Maybe[Path] = setting(
        None, "new folder for all it makes; default: quickstart-1, or the next number that is free", group=OUTPUT
    )
    seed: int = setting(
        0,
        "texts, first weights, order and draws: another seed is another model",
        between(0, LARGEST, f"from 0 to {LARGEST}"),
        group=RUN,
    )
