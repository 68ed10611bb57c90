"""The settings of the list of models."""

import dataclasses

from nanochat_jax.cli.settings import RUN, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """List the models of the base directory: stage, tag, steps, size, what was measured, what they come from, and when
    they were saved, the newest first. The first of each stage is what commands take where no --model-tag is given.

    python -m nanochat_jax.models
    python -m nanochat_jax.models --json    # a line of JSON for each
    """

    json: bool = setting(False, "a line of JSON for each model instead of the table", group=RUN)
