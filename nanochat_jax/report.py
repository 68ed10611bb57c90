"""Pictures of runs: one page that needs nothing else, with the curves of every run, their settings, results and texts;
and beside it a page for each run of RL, with its rollouts token by token.

The pages are made from what lies in the runs' folders, also while a run is under way. Settings: flags/report.py.
"""

from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import check_bounds, require
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import kept_dir, write_atomically
from nanochat_jax.flags.report import ReportConfig
from nanochat_jax.reports.page import page
from nanochat_jax.reports.rollouts import is_page, rollout_pages, rollouts_page
from nanochat_jax.reports.runs import Log, find_runs
from nanochat_jax.reports.watch import watch


def main(cfg: ReportConfig) -> int:
    """Write the pages -> 0, or serve them until a signal comes. ValueError: there is no run to draw, or a page's file
    is another's."""
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
    written = write_pages(folders, output, skipped.append)
    for what in dict.fromkeys(skipped):  # of rollouts both pages may say the same
        print_left_out(what)
    print(f"{len(folders)} run{'s' * (len(folders) > 1)} -> {output}")
    for path in written:
        print(f"rollouts -> {path}")
    return 0


def write_pages(folders: Sequence[Path], output: Path, log: Log = str) -> list[Path]:
    """Write the page about these runs, and beside it those about their rollouts -> the files of the latter.

    ValueError: one of these exists, and is no such page."""
    pages = rollout_pages(folders, output.name)
    written = [output.parent / one.file for one in pages]
    for path in written:
        require(
            not path.exists() or is_page(path),
            f"{path} would be replaced by a page about rollouts, and is none: move it, or name another --output",
        )
    links = {one.folder: one.file for one in pages}
    write_atomically(output, page(folders, log, links=links).encode("utf-8", "replace"))
    for one, path in zip(pages, written):
        write_atomically(path, rollouts_page(one, output.name, log).encode("utf-8", "replace"))
    return written


def print_left_out(what: str) -> None:
    """A line about a file, or lines of one, that the page leaves out."""
    print(f"WARNING: left out: {what}", flush=True)


if __name__ == "__main__":
    run_stage(main, parse(ReportConfig, prog="python -m nanochat_jax.report"))
