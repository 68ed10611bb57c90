"""The settings of the conversion of nanochat's models."""

import dataclasses
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Convert every model in a nanochat base directory, once; reading them in place works too."""

    src: tyro.conf.Positional[Path]  # nanochat's base directory (it holds base_checkpoints/, tokenizer/, ...)
    to: Path  # base directory to write, ours from then on
    logit_cap: float = 15.0  # 20 for models trained 2026-03-02 to 03-09, which cannot be told from the files
