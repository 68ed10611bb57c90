"""The settings of the report."""

import dataclasses
from pathlib import Path

import tyro

from nanochat_jax.cli.settings import Maybe


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw the curves of training runs into one HTML page."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()  # of runs; default: all in the base directory
    output: Maybe[Path] = None  # the page; default: report.html in the base directory
