"""Pictures of runs: one page that needs nothing else, with the curves of every run and a few of RL's answers.

python -m nanochat_jax.report                                    # all runs of the base directory
python -m nanochat_jax.report ~/.cache/nanochat/chatrl_checkpoints/d20 --output rl.html

The page is made from what lies in the runs' folders, also while a run is under way.
"""

import dataclasses
from pathlib import Path

import tyro

from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import Maybe, parse, require
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import kept_dir, write_atomically
from nanochat_jax.reports.page import page
from nanochat_jax.reports.runs import find_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw the curves of training runs into one HTML page."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()  # of runs; default: all in the base directory
    output: Maybe[Path] = None  # the page; default: report.html in the base directory


def main(cfg: ReportConfig) -> int:
    """Write the page -> 0. ValueError: there is no run to draw."""
    folders = [bucket.as_path(folder.expanduser()) for folder in cfg.folders] or find_runs(kept_dir())
    require(
        bool(folders), f"{kept_dir()} has no run with a metrics.jsonl: name a run's folder, or set NANOCHAT_BASE_DIR"
    )
    for folder in folders:
        require((folder / "metrics.jsonl").exists(), f"{folder} must be the folder of a run: it has no metrics.jsonl")
    output = bucket.as_path(cfg.output.expanduser()) if cfg.output else kept_dir() / "report.html"
    skipped: list[str] = []
    write_atomically(output, page(folders, skipped.append).encode("utf-8", "replace"))
    for what in skipped:
        print(f"WARNING: left out: {what}")
    print(f"{len(folders)} run{'s' * (len(folders) > 1)} -> {output}")
    return 0


if __name__ == "__main__":
    run_stage(main, parse(ReportConfig, prog="python -m nanochat_jax.report"))
