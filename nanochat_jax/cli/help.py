"""--help: the flags of a command in groups, what is used most first."""

import dataclasses
import inspect
import shutil
import textwrap
from typing import get_args

from nanochat_jax.cli.settings import GROUPS, flag, is_positional, marks

INDENT, WIDEST = 28, 120  # columns: where explanations begin, and where lines end at most


def help_text(cls: type, prog: str, width: int | None = None) -> str:
    """What --help prints of a command with these settings. width: of a line; default: the terminal's.

    The class's docstring is the description, and what follows its first blank line is shown as it is: examples."""
    width = min(width or shutil.get_terminal_size((100, 24)).columns, WIDEST)
    description, _, examples = inspect.getdoc(cls).partition("\n\n")
    places = [_place(field) for field in dataclasses.fields(cls) if is_positional(field)]
    parts = [" ".join(["usage:", prog, "[flags]", *places]), textwrap.fill(" ".join(description.split()), width)]
    if examples:
        parts.append(f"examples\n{textwrap.indent(examples, '  ')}")
    shown = [field for field in dataclasses.fields(cls) if "group" in field.metadata]
    for group in (*GROUPS, ""):
        lines = [_lines(field, width) for field in shown if field.metadata["group"] == group]
        if lines:
            parts.append("\n".join([group or "others", *lines]))
    return "\n\n".join(parts)


def _lines(field: dataclasses.Field, width: int) -> str:
    """A flag with its other names and its value, and beside it, or below, what it means."""
    others = [name for mark in marks(field) for name in getattr(mark, "aliases", None) or ()]  # of settings.short
    names = sorted([flag(field.name), *others], key=lambda name: (name.startswith("--"), name != flag(field.name)))
    if isinstance(field.default, bool):
        head, default = f"{', '.join(names)}, --no-{flag(field.name)[2:]}", "on" if field.default else "off"
    else:
        head = _place(field) if is_positional(field) else f"{', '.join(names)} {_value(field)}"
        default = field.default
    text = field.metadata["help"]
    if default is dataclasses.MISSING:
        text += " (must be given)"
    elif isinstance(default, tuple) and is_positional(field):
        text += " (any number)"
    elif isinstance(default, tuple):
        text += " (may be given again)"
    elif default is not None:
        text += f" (default: {default})"
    body = textwrap.wrap(text, max(20, width - INDENT))
    head = f"  {head}"
    if len(head) > INDENT - 2:
        return "\n".join([head, *(" " * INDENT + line for line in body)])
    return "\n".join([head.ljust(INDENT) + body[0], *(" " * INDENT + line for line in body[1:])])


def _place(field: dataclasses.Field) -> str:
    """What stands for a setting that is given by its place: in brackets where it may be left out."""
    name = field.name.upper()
    return name if field.default is dataclasses.MISSING else f"[{name}{' ...' * isinstance(field.default, tuple)}]"


def _value(field: dataclasses.Field) -> str:
    """What stands for the flag's value: its choices, or its type."""
    bounds = field.metadata["bounds"]
    if own := next(filter(None, (getattr(mark, "metavar", None) for mark in marks(field))), None):
        return own
    if bounds and bounds.choices:
        return "{" + ",".join(map(str, bounds.choices)) + "}"
    kind = str(get_args(field.type)[0] if marks(field) else field.type)
    return next((name for part, name in (("Path", "PATH"), ("int", "N"), ("float", "X")) if part in kind), "TEXT")
