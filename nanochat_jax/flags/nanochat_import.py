"""The settings of the conversion of nanochat's models."""

import dataclasses
from pathlib import Path

import tyro

from nanochat_jax.cli.settings import OUTPUT, RUN, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Convert every model in a nanochat base directory, once; reading them in place works too.

    python -m nanochat_jax.nanochat_import ~/.cache/nanochat --to ~/nanochat_jax
    """

    src: tyro.conf.Positional[Path] = setting(
        dataclasses.MISSING, "nanochat's base directory (it holds base_checkpoints/, tokenizer/, ...)", group=RUN
    )
    to: Path = setting(dataclasses.MISSING, "base directory to write, ours from then on", group=OUTPUT)
    logit_cap: float = setting(
        15.0, "20 for models trained 2026-03-02 to 03-09, which cannot be told from the files", group=RUN
    )
