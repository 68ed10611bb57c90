"""The settings of the tokenizer's commands: train, show and eval."""

import dataclasses
import math
from pathlib import Path

import tyro

from nanochat_jax.cli.settings import DATA, MODEL, OUTPUT, Maybe, at_least, between, setting

AT_LEAST_1 = between(1, math.inf, "at least 1")  # of numbers that may be beyond LARGEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a tokenizer and write tokenizer.json, and nanochat's tokenizer.pkl and token_bytes.pt.

    python -m nanochat_jax.tokenizer train --download 8    # on shards that it fetches; without the flag, those there
    python -m nanochat_jax.tokenizer train --input my_texts/ --vocab-size 4096 --output my_tokenizer
    """

    input: tuple[Path, ...] = setting(
        (), "file or folder: parquet, JSON lines, text; default: the base directory's shards but the last", group=DATA
    )
    download: int = setting(
        0,
        "fetch this many shards of climbmix-400b-shuffle first, and one for validation, as for base",
        at_least(0),
        group=DATA,
    )
    max_chars: int = setting(
        2_000_000_000,
        "characters to read; reading stops with the document that passes this number",
        AT_LEAST_1,
        group=DATA,
    )
    doc_cap: int = setting(
        10_000,
        "characters of a document that count; plain text files are cut into documents of this length",
        AT_LEAST_1,
        group=DATA,
    )
    vocab_size: int = setting(32768, "tokens, the 9 special ones included", group=MODEL)
    output: Maybe[Path] = setting(None, "folder to write; default: tokenizer in the base directory", group=OUTPUT)
    overwrite: bool = setting(
        False,
        "replace the tokenizer in that folder; models trained with it cannot be used any more",
        group=OUTPUT,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Print conversations as tokens: those that are trained green and in [ ], the others grey, | between tokens.

    python -m nanochat_jax.tokenizer show conversations.jsonl
    python -m nanochat_jax.tokenizer show --task GSM8K --max-conversations 2
    """

    file: tyro.conf.Positional[Maybe[Path]] = setting(
        None, "JSON lines, a JSON array or parquet; or hub:owner/dataset:split", group=DATA
    )
    task: Maybe[str] = setting(None, "a task to show instead, by its name in eval or as module:Class", group=DATA)
    max_conversations: int = setting(10, "to print; 0 = all", at_least(0), group=DATA)
    max_tokens: int = setting(
        2048,
        "tokens of each; SFT cuts at 2048, or at its longer rows; 0 = all",
        at_least(0),
        group=DATA,
    )
    data_dir: Maybe[Path] = setting(None, "where datasets are looked for first, as of sft", group=DATA)
    longest_line: int = setting(16 << 20, "bytes of a conversation in its JSON, as of sft", AT_LEAST_1, group=DATA)
    allow_empty: bool = setting(False, "take conversations with empty answers, as of sft", group=DATA)
    tokenizer: Maybe[Path] = setting(None, "folder; default: tokenizer in the base directory", group=MODEL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Print how many bytes a token stands for, on samples of several kinds and on files of your own.

    python -m nanochat_jax.tokenizer eval
    python -m nanochat_jax.tokenizer eval --tokenizer my_tokenizer --input my_texts/
    """

    input: tuple[Path, ...] = setting((), "file or folder, as of train", group=DATA)
    max_chars: int = setting(10_000_000, "characters of each file to read", AT_LEAST_1, group=DATA)
    doc_cap: int = setting(10_000, "as of train", AT_LEAST_1, group=DATA)
    tokenizer: Maybe[Path] = setting(None, "folder; default: tokenizer in the base directory", group=MODEL)


COMMANDS = {"train": Train, "show": Show, "eval": Eval}
