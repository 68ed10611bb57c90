"""The settings of the conversion to nanochat's files, or those of the transformers library."""

import dataclasses
from pathlib import Path
from typing import Annotated

from nanochat_jax.cli.settings import OUTPUT, RUN, SOURCES, Maybe, at_least, one_of, setting, short
from nanochat_jax.flags.model import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelConfig):
    """Write a model, in whatever format it is, and its tokenizer as files that nanochat or transformers loads.

    python -m nanochat_jax.nanochat_export --source rl --output ~/nanochat
    python -m nanochat_jax.nanochat_export --source rl --format hf --output ~/my-model --push me/my-model
    """

    source: Annotated[str, short("-i")] = setting("base", "stage that made the model", SOURCES, group=RUN)
    format: str = setting(
        "nanochat",
        "whose files to write: nanochat's, or with hf those of transformers, for the Hugging Face hub",
        one_of("nanochat", "hf"),
        group=OUTPUT,
    )
    output: Path = setting(
        dataclasses.MISSING,
        "nanochat base directory to write into, made where it does not exist; for hf the model's folder, new or empty",
        group=OUTPUT,
    )
    output_tag: Maybe[str] = setting(
        None, "its tag in the base directory; default: d<depth>, as nanochat names models", group=OUTPUT
    )
    dtype: str = setting(
        "float32",
        "of the embeddings, for hf of all matrices: float32 is exact, bfloat16 is what nanochat keeps on a GPU",
        one_of("float32", "bfloat16"),
        group=OUTPUT,
    )
    optimizer: bool = setting(True, "for nanochat: also the optimizer's state, where the model has one", group=OUTPUT)
    ranks: int = setting(
        1,
        "processes of nanochat that will train it (torchrun --nproc_per_node); each has a file of the optimizer state",
        at_least(1),
        group=OUTPUT,
    )
    push: Maybe[str] = setting(
        None,
        "upload the hf folder to this repository OWNER/NAME of the Hugging Face hub, after a question",
        group=OUTPUT,
    )
    private: bool = setting(True, "only its owner sees a repository that --push makes", group=OUTPUT)
    yes: bool = setting(False, "upload without the question", group=OUTPUT)
