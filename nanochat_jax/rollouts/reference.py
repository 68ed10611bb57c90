"""The reference model of RL's penalty: the model that the run started from, which must still be what it was."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.checkpoints import find
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.train.step import place


def load_reference(
    source: str, model_tag: str, model_step: int, recorded: str | None, like: Any, *, base: Path | str | None = None
) -> tuple[Any, str]:
    """(parameters on the shardings of the abstract ones `like`, their sha256) of the model with this stage, tag, step.

    base: where it is, as of `find_model`.
    recorded: the hash that the run's checkpoint has, None for a new run. ValueError: the model is gone, or another."""
    try:
        _, params, _ = find.load_params(find.find_model(source, model_tag, model_step, base))
    except FileNotFoundError as e:
        raise ValueError(f"--kl-coef needs the model that the run started from: {e}") from e
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten_by_path(params).items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    require(
        recorded in (None, digest.hexdigest()),
        f"--kl-coef needs the model that the run started from, but {source} {model_tag}, step {model_step}, is another "
        "one now",
    )
    return place(params, like), digest.hexdigest()
