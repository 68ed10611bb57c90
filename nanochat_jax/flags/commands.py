"""The commands: what each is for, and where its settings are."""

from importlib import import_module
from typing import NamedTuple

from nanochat_jax.cli.command_line import parse


class Command(NamedTuple):
    """A command of `nanochat-jax`, which is a module of the package too."""

    summary: str
    settings: str = (
        ""  # class in the module of this folder with the command's name; "": the command has commands itself
    )

    def settings_class(self, name: str) -> type:
        """The class of settings of the command with this name."""
        return getattr(import_module(f"nanochat_jax.flags.{name}"), self.settings)


COMMANDS = {  # in the order of use
    "quickstart": Command("all stages in minutes, on texts that it writes itself", "QuickstartConfig"),
    "tokenizer": Command("train a tokenizer, show conversations as tokens"),
    "base": Command("documents -> base model", "BaseConfig"),
    "sft": Command("base model, conversations -> chat model", "SFTConfig"),
    "rl": Command("chat model, problems that can be judged -> better chat model", "RLConfig"),
    "eval": Command("right answers on tasks, with intervals, and ChatCORE", "EvalConfig"),
    "chat": Command("talk to a model in the terminal", "ChatConfig"),
    "serve": Command("a model behind OpenAI's interface, and a page to talk to it", "ServeConfig"),
    "models": Command("list the models of the base directory", "ModelsConfig"),
    "report": Command(
        "curves, settings and results of all runs on one HTML page, also while they train", "ReportConfig"
    ),
    "nanochat_import": Command("convert a nanochat base directory", "ImportConfig"),
    "nanochat_export": Command("write a model as nanochat's files", "ExportConfig"),
}


def show_help(name: str, argv: list[str]) -> None:
    """Print the help of `python -m nanochat_jax.<name>` and exit; return where that command has other ways to help."""
    if name in COMMANDS and COMMANDS[name].settings:
        parse(COMMANDS[name].settings_class(name), argv, f"python -m nanochat_jax.{name}")
