"""The settings of the report."""

import dataclasses
from pathlib import Path

import tyro

from nanochat_jax.cli.settings import OUTPUT, RUN, Maybe, between, setting, with_optional_value

PORT = 8765
Watch = with_optional_value(PORT, "[PORT]", int)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw the curves of training runs into one HTML page, and beside it for each run of RL one of its rollouts.

    python -m nanochat_jax.report                                    # all runs of the base directory
    python -m nanochat_jax.report ~/.cache/nanochat/chatrl_checkpoints/d20 --output rl.html
    python -m nanochat_jax.report --watch                            # in the browser, and kept up to date
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = setting(
        (), "of runs; default: all in the base directory", group=RUN
    )
    output: Maybe[Path] = setting(
        None, "the page, and beside it those of rollouts; default: report.html in the base directory", group=OUTPUT
    )
    watch: Watch = setting(
        None,
        f"instead of writing the pages serve them to this machine, as runs go on; at port {PORT}, or at any for 0",
        between(0, 65535, "a port from 0 to 65535"),
        group=OUTPUT,
    )
