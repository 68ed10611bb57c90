"""nanochat-jax: what commands there are, and one of them with its flags.

`nanochat-jax sft ...`, `python -m nanochat_jax sft ...` and `python -m nanochat_jax.sft ...` are the same.
"""

import functools
import importlib
import operator
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import tyro

from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage
from nanochat_jax.flags.commands import COMMANDS, lines_of, no_command, show_help

PROG = "nanochat-jax"
PACKAGES = ("nanochat_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tiktoken", "grain", "wandb")
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")


def main(argv: list[str] | None = None) -> None:
    """Run the command that the words name; exits."""
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        print(versions())
    elif name.startswith(COMPLETION):
        print_completion([name, *flags])
    elif name not in COMMANDS:
        sys.exit(no_command(name, COMMANDS, PROG))
    else:
        run(name, flags)


def run(name: str, flags: list[str]) -> None:
    """Run a command with these words as its flags; exits. What is wrong with them is found before JAX is loaded."""
    if not COMMANDS[name].settings:
        if not {"-h", "--help"}.isdisjoint(flags or ["--help"]):
            show_help(name, flags or ["--help"])
        importlib.import_module(f"nanochat_jax.{name}.__main__").main(flags)
        return
    cfg = parse(COMMANDS[name].settings_class(name), flags, f"{PROG} {name}")
    run_stage(importlib.import_module(f"nanochat_jax.{name}").main, cfg)


def overview() -> str:
    """The commands with a line each, and what to type first."""
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [flags]    (or python -m nanochat_jax.COMMAND [flags])",
            "",
            "Trains small chat models: text -> tokenizer -> base model -> chat model -> better by its own answers.",
            "",
            *lines_of({name: command.summary for name, command in COMMANDS.items()}),
            "",
            f"  {PROG} COMMAND --help    flags of a command, with examples",
            f"  {PROG} --version         versions and devices, for a bug report",
            f"  {PROG} --tyro-print-completion bash    completion for a shell: bash, zsh or tcsh",
            "",
            f"To begin: {PROG} quickstart makes a small chat model on a CPU in minutes; {PROG} chat talks to one.",
        ]
    )


def versions() -> str:
    """Versions and devices, a line each, to be pasted into a bug report."""
    lines = [f"Python {platform.python_version()}, {platform.platform()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} is not installed")
    try:
        import jax

        devices = jax.devices()
        lines.append(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
    except (ImportError, RuntimeError) as e:
        lines.append(f"no devices: {e}")
    return "\n".join(lines)


def print_completion(words: list[str]) -> None:
    """tyro's script for a shell, of all commands whose settings are in flags/; exits."""
    kinds = [
        Annotated[command.settings_class(name), tyro.conf.subcommand(name)]
        for name, command in COMMANDS.items()
        if command.settings
    ]
    tyro.cli(functools.reduce(operator.or_, kinds), args=words, prog=PROG)


if __name__ == "__main__":
    main()
