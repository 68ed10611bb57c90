"""The settings of the conversion of nanochat's models."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from nanochat_jax.cli.settings import OUTPUT, RUN, SOURCES, Maybe, setting, short


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Convert nanochat's models, once; reading them in place works too. Of a base directory all are converted, of a
    repository of the hub the last one of each stage, if no flag names another.

    python -m nanochat_jax.nanochat_import ~/.cache/nanochat --to ~/nanochat_jax
    python -m nanochat_jax.nanochat_import hub:karpathy/nanochat-d32 --to ~/d32
    """

    src: tyro.conf.Positional[Path] = setting(
        dataclasses.MISSING,
        "nanochat's base directory, a folder with one model, or hub:OWNER/NAME[@REVISION][/PREFIX]",
        group=RUN,
    )
    to: Path = setting(dataclasses.MISSING, "base directory to write, ours from then on", group=OUTPUT)
    source: Annotated[Maybe[str], short("--as")] = setting(
        None, "stage that made the model; needed where neither folders nor metadata tell it", SOURCES, group=RUN
    )
    model_tag: Maybe[str] = setting(None, "its tag", group=RUN)
    model_step: Maybe[int] = setting(None, "its step", group=RUN)
    optimizer: bool = setting(True, "also the optimizer's state, where the model has one", group=RUN)
    logit_cap: float = setting(
        15.0, "20 for models trained 2026-03-02 to 03-09, which cannot be told from the files", group=RUN
    )
