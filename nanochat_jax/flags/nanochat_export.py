"""The settings of the conversion to nanochat's files."""

import dataclasses
from pathlib import Path

from nanochat_jax.cli.settings import Maybe


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model, in our format or nanochat's, and its tokenizer as files that nanochat loads."""

    output: Path  # nanochat base directory to write into; it is made where it does not exist
    source: str = "base"  # which model: base, sft or rl
    model_tag: Maybe[str] = None  # its tag; default: the one saved last
    model_step: Maybe[int] = None  # its step; default: the last
    output_tag: Maybe[str] = None  # its tag in the output; default: d<depth>, as nanochat names models
    dtype: str = "float32"  # of the embeddings: float32 is exact, bfloat16 is what nanochat keeps on a GPU
    optimizer: bool = True  # also the optimizer's state, where the model has one
