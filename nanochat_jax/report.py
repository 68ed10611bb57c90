"""Pictures of runs: one page that needs nothing else, with the curves of every run, their settings, results and texts.

python -m nanochat_jax.report                                    # all runs of the base directory
python -m nanochat_jax.report ~/.cache/nanochat/chatrl_checkpoints/d20 --output rl.html
python -m nanochat_jax.report --watch                            # in the browser, and kept up to date

The page is made from what lies in the runs' folders, also while a run is under way.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import Maybe, between, check_bounds, parse, require, setting
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import kept_dir, write_atomically
from nanochat_jax.reports.page import page
from nanochat_jax.reports.runs import find_runs
from nanochat_jax.reports.watch import watch

PORT = 8765
# The type of --watch, whose value may be left out: then it is PORT. None where the flag is not given.
Watch = Annotated[
    int | None,
    PrimitiveConstructorSpec(
        (0, 1),
        "[PORT]",
        lambda texts: int(texts[0]) if texts else PORT,
        lambda value: value is None or isinstance(value, int),
        lambda value: [] if value is None else [str(value)],
    ),
    tyro.conf.arg(help_behavior_hint=""),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw the curves of training runs into one HTML page."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()  # of runs; default: all in the base directory
    output: Maybe[Path] = None  # the page; default: report.html in the base directory
    watch: Watch = setting(
        None,
        f"instead of writing the page serve it to this machine, as runs go on; at port {PORT}, or at any for 0",
        between(0, 65535, "a port from 0 to 65535"),
    )


def main(cfg: ReportConfig) -> int:
    """Write the page -> 0, or serve it until a signal comes. ValueError: there is no run to draw."""
    check_bounds(cfg)
    named = [bucket.as_path(folder.expanduser()) for folder in cfg.folders]
    for folder in named:
        require((folder / "metrics.jsonl").exists(), f"{folder} must be the folder of a run: it has no metrics.jsonl")
    if cfg.watch is not None:
        require(cfg.output is None, f"--watch writes no page: leave out --output {cfg.output}")
        for folder in named or [kept_dir()]:
            require(
                not bucket.in_bucket(folder), f"--watch needs runs on a disk, {folder} is in a bucket: leave it out"
            )
        watch(cfg.watch, lambda: named or find_runs(kept_dir()), print_left_out)
    folders = named or find_runs(kept_dir())
    require(
        bool(folders), f"{kept_dir()} has no run with a metrics.jsonl: name a run's folder, or set NANOCHAT_BASE_DIR"
    )
    output = bucket.as_path(cfg.output.expanduser()) if cfg.output else kept_dir() / "report.html"
    skipped: list[str] = []
    write_atomically(output, page(folders, skipped.append).encode("utf-8", "replace"))
    for what in skipped:
        print_left_out(what)
    print(f"{len(folders)} run{'s' * (len(folders) > 1)} -> {output}")
    return 0


def print_left_out(what: str) -> None:
    print(f"WARNING: left out: {what}", flush=True)


if __name__ == "__main__":
    run_stage(main, parse(ReportConfig, prog="python -m nanochat_jax.report"))
