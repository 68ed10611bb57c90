"""The tokenizer's commands.

python -m nanochat_jax.tokenizer train --download 8         # on shards that it fetches; without the flag, those there
python -m nanochat_jax.tokenizer train --input my_texts/ --vocab-size 4096 --output my_tokenizer
python -m nanochat_jax.tokenizer show conversations.jsonl   # what is trained, and what is not
python -m nanochat_jax.tokenizer eval                       # how well it compresses
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.settings import Maybe, flag, require
from nanochat_jax.data.shards import FOLDERS, fetch_shards, find_shards
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import base_dir, kept_dir
from nanochat_jax.tasks import CustomJSON, Task
from nanochat_jax.tasks.custom_json import LONGEST_LINE
from nanochat_jax.tasks.registry import make_task
from nanochat_jax.tokenizer.bpe import MAX_TOKENS, Tokenizer
from nanochat_jax.tokenizer.compression import compression_table
from nanochat_jax.tokenizer.conversation import BadConversation
from nanochat_jax.tokenizer.corpus import find_files, read_texts
from nanochat_jax.tokenizer.install import FILES, install, refuse_to_replace, staging_folder
from nanochat_jax.tokenizer.show import format_tokens, visible
from nanochat_jax.tokenizer.summary import summarize
from nanochat_jax.tokenizer.training import check_vocab_size, train_tokenizer

PROG = "python -m nanochat_jax.tokenizer"
SAMPLE_CHARS = 1_000_000  # of the training text, on which the new tokenizer's compression is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a tokenizer and write tokenizer.json, and nanochat's tokenizer.pkl and token_bytes.pt."""

    vocab_size: int = 32768  # tokens, the 9 special ones included
    max_chars: int = 2_000_000_000  # characters to read; reading stops with the document that passes this number
    doc_cap: int = 10_000  # characters of a document that count; plain text files are cut into documents of this length
    input: tuple[Path, ...] = ()  # file or folder: parquet, JSON lines, text; default: <base dir>'s shards but the last
    output: Maybe[Path] = None  # folder to write; default: <base dir>/tokenizer
    overwrite: bool = False  # replace the tokenizer in that folder; models trained with it cannot be used any more
    download: int = 0  # fetch this many shards of climbmix-400b-shuffle first, and one for validation, as for base


def train(cfg: Train) -> int:
    """Train and save a tokenizer -> the exit code, 0."""
    check_vocab_size(cfg.vocab_size)
    require_at_least(1, cfg, "max_chars", "doc_cap")
    require_at_least(0, cfg, "download")
    require(not (cfg.download and cfg.input), "--download is for the shards of the base directory: leave out --input")
    kept = bucket.as_path(cfg.output) if cfg.output else kept_dir() / "tokenizer"
    folder = bucket.fetch(kept, exact=True)
    refuse_to_replace(folder, cfg.overwrite)
    console = Console()
    with staging_folder(folder) as staging:
        if cfg.download:
            fetch_shards(cfg.download, base_dir() / FOLDERS[0])
        if cfg.input:
            files = find_files(cfg.input)
        else:  # the last shard is for validation
            files = find_shards(advice="give --input FILE or FOLDER, or --download N")[:-1]
        began = time.monotonic()
        tokenizer, sample, chars, documents = train_with_progress(cfg, files, console)
        refuse_to_replace(folder, cfg.overwrite)  # one that another process has put there since
        install(tokenizer, staging, folder)
    for name in FILES:
        bucket.upload(folder / name, kept / name)
    seconds = time.monotonic() - began
    say(console, f"read {chars:,} characters in {documents:,} documents")
    say(console, f"trained a vocabulary of {tokenizer.vocab_size:,} tokens in {seconds:.1f} s, written to {kept}")
    console.print(compression_table(tokenizer.encode, {"the text it learned from": sample}))
    return 0


def train_with_progress(cfg: Train, files: list[Path], console: Console) -> tuple[Tokenizer, list[str], int, int]:
    """-> (tokenizer, the first SAMPLE_CHARS of its documents, characters read, documents read)."""
    sample, chars, documents = [], 0, 0

    def texts(progress, task):
        nonlocal chars, documents
        for text in read_texts(files, cfg.doc_cap, cfg.max_chars):
            if chars < SAMPLE_CHARS:
                sample.append(text)
            chars, documents = chars + len(text), documents + 1
            progress.update(task, description=f"read {chars:,} characters")
            yield text
        require(chars > 0, f"there is no text in {', '.join(map(str, files[:3]))}{' ...' if files[3:] else ''}")
        progress.update(task, description=f"merging pairs of {chars:,} characters into {cfg.vocab_size:,} tokens")

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tokenizer = train_tokenizer(texts(progress, progress.add_task("reading", total=None)), cfg.vocab_size)
    return tokenizer, sample, chars, documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Print conversations as tokens: those that are trained green and in [ ], the others grey, | between tokens."""

    file: tyro.conf.Positional[Maybe[Path]] = None  # JSON lines, a JSON array or parquet; or hub:owner/dataset:split
    task: Maybe[str] = None  # a task to show instead, by its name in eval or as module:Class
    max_conversations: int = 10  # to print; 0 = all
    max_tokens: int = MAX_TOKENS  # tokens of each; SFT cuts at 2048, or at its longer rows; 0 = all
    tokenizer: Maybe[Path] = None  # folder; default: <base dir>/tokenizer
    data_dir: Maybe[Path] = None  # where datasets are looked for first, as of sft
    longest_line: int = LONGEST_LINE  # bytes of a conversation in its JSON, as of sft
    allow_empty: bool = False  # take conversations with empty answers, as of sft


def show(cfg: Show) -> int:
    """Print conversations as tokens -> the exit code, 0."""
    require((cfg.file is None) != (cfg.task is None), "name one file of conversations, or one --task module:Class")
    require_at_least(0, cfg, "max_conversations", "max_tokens")
    require_at_least(1, cfg, "longest_line")
    tokenizer = Tokenizer.load(cfg.tokenizer or base_dir() / "tokenizer")
    console = Console()
    task, place = conversations(cfg, console)
    require(len(task) > 0, f"{cfg.file or cfg.task} holds no conversation")
    shown = min(len(task), cfg.max_conversations or len(task))
    say(console, f"{shown:,} of {len(task):,} follow")
    console.print()
    for i in range(shown):
        try:
            ids, mask = tokenizer.render_conversation(task[i], max_tokens=None)
        except BadConversation as e:
            raise ValueError(f"{place(i)}: {e}") from e
        cut = cfg.max_tokens or len(ids)
        rest = f"; the first {cut:,} follow, with {sum(mask[:cut]):,} trained" if cut < len(ids) else ""
        say(console, f"{place(i)}: {len(ids):,} tokens, {sum(mask):,} trained{rest}", "bold")
        console.print(format_tokens(tokenizer, ids[:cut], mask[:cut]), soft_wrap=True, end="\n\n")
    for sentence in summarize(task, tokenizer, cfg.max_tokens or None, place):
        say(console, sentence)
    return 0


def conversations(cfg: Show, console: Console) -> tuple[Task, Callable[[int], str]]:
    """What is to be shown, and how the place of a conversation is called."""
    if cfg.file is not None:
        own = CustomJSON(
            cfg.file,
            data_dir=cfg.data_dir,
            log=lambda sentence: say(console, sentence),
            longest_line=cfg.longest_line,
            allow_empty=cfg.allow_empty,
        )
        return own, own.place
    task = make_task(cfg.task, "train", data_dir=cfg.data_dir, flag="--task")
    return task, lambda i: f"{task.name} {i}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Print how many bytes a token stands for, on samples of several kinds and on files of your own."""

    input: tuple[Path, ...] = ()  # file or folder, as of train
    max_chars: int = 10_000_000  # characters of each file to read
    doc_cap: int = 10_000  # as of train
    tokenizer: Maybe[Path] = None  # folder; default: <base dir>/tokenizer


def evaluate(cfg: Eval) -> int:
    """Print how well a tokenizer compresses, beside others -> the exit code, 0."""
    require_at_least(1, cfg, "max_chars", "doc_cap")
    tokenizer = Tokenizer.load(cfg.tokenizer or base_dir() / "tokenizer")
    files = find_files(cfg.input)
    texts = {visible(str(path), ""): list(read_texts([path], cfg.doc_cap, cfg.max_chars)) for path in files}
    Console().print(compression_table(tokenizer.encode, texts))
    return 0


def require_at_least(smallest: int, cfg: Train | Show | Eval, *names: str) -> None:
    """ValueError where one of these settings is smaller."""
    for name in names:
        value = getattr(cfg, name)
        require(value >= smallest, f"{flag(name)} must be at least {smallest}, got {value}")


def say(console: Console, sentence: str, style: str = "") -> None:
    """Print without markup or line breaks, and with what a path may bring to a terminal made visible."""
    console.print(Text(visible(sentence, ""), style), soft_wrap=True)


COMMANDS = {"train": (Train, train), "show": (Show, show), "eval": (Eval, evaluate)}
Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
)


def main(argv: list[str]) -> None:
    """The command that the first argument names."""
    name = argv[0] if argv else "--help"
    if name not in COMMANDS:
        parse(Command, [name], PROG)  # prints the commands, or what is wrong, and exits
    cls, run = COMMANDS[name]
    cli_main.run_stage(run, parse(cls, argv[1:], f"{PROG} {name}"))


if __name__ == "__main__":
    main(sys.argv[1:])
