"""The commands: what each is for, and where its settings are."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import NamedTuple

from nanochat_jax.cli.command_line import parse, print_and_exit


class Command(NamedTuple):
    """A command of `nanochat-jax`, which is a module of the package too."""

    summary: str
    settings: str = ""  # class in this folder's module of the command's name; "": its COMMANDS are commands themselves

    def settings_class(self, name: str) -> type:
        """The class of settings of the command with this name."""
        return getattr(import_module(f"nanochat_jax.flags.{name}"), self.settings)


COMMANDS = {  # in the order of use
    "quickstart": Command("all stages in minutes, on texts that it writes itself", "QuickstartConfig"),
    "tokenizer": Command("train a tokenizer, show conversations as tokens"),
    "base": Command("documents -> base model", "BaseConfig"),
    "sft": Command("base model, conversations -> chat model", "SFTConfig"),
    "rl": Command("chat model, problems that can be judged -> better chat model", "RLConfig"),
    "eval": Command("right answers on tasks, with intervals, ChatCORE and CORE", "EvalConfig"),
    "chat": Command("talk to a model in the terminal", "ChatConfig"),
    "serve": Command("a model behind OpenAI's interface, and a page to talk to it", "ServeConfig"),
    "bench": Command("how fast a model is: generating, an SFT step, a step of RL", "BenchConfig"),
    "models": Command("list the models of the base directory", "ModelsConfig"),
    "report": Command(
        "curves, settings and results of all runs on one HTML page, also while they train", "ReportConfig"
    ),
    "nanochat_import": Command("convert models of nanochat, also from the hub, to ours", "ImportConfig"),
    "nanochat_export": Command("write a model as files of nanochat or transformers, and upload it", "ExportConfig"),
}


def show_help(name: str, argv: list[str]) -> None:
    """Print the help of `python -m nanochat_jax.<name>`, for which these words ask, and exit; return where there is no
    such command."""
    if name not in COMMANDS:
        return
    prog = f"python -m nanochat_jax.{name}"
    if COMMANDS[name].settings:
        parse(COMMANDS[name].settings_class(name), argv, prog)
    inner = import_module(f"nanochat_jax.flags.{name}").COMMANDS
    if argv[0] in inner:
        parse(inner[argv[0]], argv[1:], f"{prog} {argv[0]}")
    first_lines = {word: inspect.getdoc(cls).partition("\n")[0] for word, cls in inner.items()}
    usage = f"usage: {prog} COMMAND [flags]", "", *lines_of(first_lines), ""
    print_and_exit("\n".join([*usage, f"  {prog} COMMAND --help    flags of a command, with examples"]))


def lines_of(summaries: Mapping[str, str]) -> list[str]:
    """A line for each command, by its name."""
    width = max(map(len, summaries))
    return [f"  {name.ljust(width)}  {summary}" for name, summary in summaries.items()]


def no_command(name: str, commands: Iterable[str], prog: str) -> str:
    """The sentence about a word that is none of the program's commands."""
    near = "".join(f"; did you mean {found}?" for found in difflib.get_close_matches(name, commands, 1))
    return f"error: there is no command {name!r}{near} See {prog} --help"
