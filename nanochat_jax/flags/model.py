"""The settings of the commands that take a model as it is: which one. One-letter flags are those of nanochat."""

import dataclasses
from pathlib import Path
from typing import Annotated

from nanochat_jax.cli.settings import BASE_HELP, RUN, SOURCES, Maybe, ModelStep, setting, short


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The settings of the commands that take a model as it is: which one."""

    source: Annotated[str, short("-i")] = setting("sft", "stage that made the model", SOURCES, group=RUN)
    base: Maybe[Path] = setting(None, BASE_HELP, group=RUN)
    model_tag: Annotated[Maybe[str], short("-g")] = setting(
        None, "tag of the model; default: the one saved last", group=RUN
    )
    step: Annotated[ModelStep, short("-s", "--model-step")] = setting(
        None, "its step; best = of the highest pass@1 in RL; default: the last", group=RUN
    )
