"""The tokenizer's commands. Their settings, with examples: flags/tokenizer.py."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.settings import check_bounds, require
from nanochat_jax.data.shards import FOLDERS, fetch_shards, find_shards
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import base_dir, kept_dir
from nanochat_jax.flags.commands import no_command, show_help
from nanochat_jax.flags.tokenizer import COMMANDS, Eval, Show, Train
from nanochat_jax.tasks import CustomJSON, Task
from nanochat_jax.tasks.registry import make_task
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.compression import compression_table
from nanochat_jax.tokenizer.conversation import BadConversation
from nanochat_jax.tokenizer.corpus import find_files, read_texts
from nanochat_jax.tokenizer.install import FILES, install, refuse_to_replace, staging_folder
from nanochat_jax.tokenizer.show import format_tokens, visible
from nanochat_jax.tokenizer.summary import summarize
from nanochat_jax.tokenizer.training import check_vocab_size, train_tokenizer

PROG = "python -m nanochat_jax.tokenizer"
SAMPLE_CHARS = 1_000_000  # of the training text, on which the new tokenizer's compression is measured


def train(cfg: Train) -> int:
    """Train and save a tokenizer -> the exit code, 0."""
    check_vocab_size(cfg.vocab_size)
    check_bounds(cfg)
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


def show(cfg: Show) -> int:
    """Print conversations as tokens -> the exit code, 0."""
    require((cfg.file is None) != (cfg.task is None), "name one file of conversations, or one --task module:Class")
    check_bounds(cfg)
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


def evaluate(cfg: Eval) -> int:
    """Print how well a tokenizer compresses, beside others -> the exit code, 0."""
    check_bounds(cfg)
    tokenizer = Tokenizer.load(cfg.tokenizer or base_dir() / "tokenizer")
    files = find_files(cfg.input)
    texts = {visible(str(path), ""): list(read_texts([path], cfg.doc_cap, cfg.max_chars)) for path in files}
    Console().print(compression_table(tokenizer.encode, texts))
    return 0


def say(console: Console, sentence: str, style: str = "") -> None:
    """Print without markup or line breaks, and with what a path may bring to a terminal made visible."""
    console.print(Text(visible(sentence, ""), style), soft_wrap=True)


RUN = {"train": train, "show": show, "eval": evaluate}


def main(argv: list[str]) -> None:
    """The command that the first argument names."""
    name, *flags = argv or ["--help"]
    if name in ("-h", "--help"):
        show_help("tokenizer", [name])
    if name not in RUN:
        sys.exit(no_command(name, RUN, PROG))
    cli_main.run_stage(RUN[name], parse(COMMANDS[name], flags, f"{PROG} {name}"))


if __name__ == "__main__":
    main(sys.argv[1:])
