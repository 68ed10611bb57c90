"""Commands as a user runs them, but in this process."""

import pytest

from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage


def run_command(main, settings: type, *argv) -> int | str:
    """The exit code of a command with these flags, or its error's sentence."""
    with pytest.raises(SystemExit) as stop:
        run_stage(main, parse(settings, [*map(str, argv)]))
    return stop.value.code
