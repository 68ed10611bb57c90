"""Pictures of runs: one page that needs nothing else, with the curves of every run and a few of RL's answers.

python -m nanochat_jax.report                                    # all runs of the base directory
python -m nanochat_jax.report ~/.cache/nanochat/chatrl_checkpoints/d20 --output rl.html

The page is made from metrics.jsonl and rollouts.jsonl, also while a run is under way.
"""

import contextlib
import dataclasses
import html
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import kept_dir, write_atomically
from nanochat_jax.flags.report import ReportConfig
from nanochat_jax.train.metrics import is_step, read_metrics

STAGES = ("base_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints")
COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#888888", "#66aa00")
TAIL_BYTES = 2_000_000  # of rollouts.jsonl are read, from its end
SHOWN_ANSWERS = 4  # to a problem

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1rem .2rem 0; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } .charts svg { width: 22rem; height: auto; }
pre { white-space: pre-wrap; background: #f5f5f5; padding: .6rem; border-left: 4px solid #bbb; }
pre.right { border-color: #109618; } pre.wrong { border-color: #dc3912; }
"""


@dataclasses.dataclass(frozen=True)
class Panel:
    """A chart: its title, and its metrics, of which a run may have some."""

    title: str
    names: tuple[str, ...]
    log: bool = False


PANELS = (
    Panel("loss", ("loss", "smoothed_loss")),
    Panel("bits per byte of held-out text", ("val_bpb",)),
    Panel("reward", ("reward", "smoothed_reward")),
    Panel("held-out problems solved", tuple(f"pass@{k}" for k in (1, 2, 4, 8, 16))),
    Panel("ChatCORE", ("chatcore", "chatcore_cat", "chatcore_with_spelling")),
    Panel("difference of log-probabilities, sampler and trainer", ("delta_logp_mean", "delta_logp_max"), log=True),
    Panel("entropy (nats a sampled token)", ("entropy",)),
    Panel("tokens in an answer", ("length_mean", "length_max")),
    Panel("shares of answers", ("cut", "tool_calls", "tool_failed")),
    Panel("share of problems without signal", ("no_signal",)),
    Panel("gradient norm", ("grad_norm",), log=True),
    Panel("learning-rate multiplier", ("lr_multiplier",)),
    Panel("tokens per second", ("tokens_per_second", "rollout_tokens_per_second", "update_tokens_per_second")),
)


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


def find_runs(base: Path) -> list[Path]:
    """Folders of runs in a base directory, stage after stage."""
    return [path.parent for stage in STAGES for path in sorted((base / stage).glob("*/metrics.jsonl"))]


def page(folders: Sequence[Path], log: Callable[[str], None] = str) -> str:
    """The page about these runs, as HTML without any reference to elsewhere.

    log: is told of a file that cannot be read, and of lines of another form, which are left out."""
    overview, runs = "", ""
    for n, folder in enumerate(folders):
        name = html.escape(f"{folder.parent.name}/{folder.name}")
        try:
            records = read_metrics(folder / "metrics.jsonl", log)
        except OSError as e:
            log(f"{folder / 'metrics.jsonl'}: {e.strerror}")
            overview += f"<tr><td>{name}</td><td>cannot be read: {html.escape(str(e.strerror))}</td></tr>"
            continue
        charts = "".join(svg(chart) for panel in PANELS if (chart := draw(panel, records)))
        overview += f"<tr><td><a href='#run{n}'>{name}</a></td><td>{html.escape(summary(records))}</td></tr>"
        runs += f"<h2 id='run{n}'>{name}</h2><div class='charts'>{charts or 'nothing measured yet'}</div>"
        runs += last_answers(folder / "rollouts.jsonl", log)
    head = "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    return f"{head}<title>Runs</title><style>{STYLE}</style><h1>Runs</h1><table>{overview}</table>{runs}\n"


def draw(panel: Panel, records: Sequence[dict]) -> Figure | None:
    """A panel's chart over the steps; None where none of its metrics was measured."""
    curves = {name: curve for name in panel.names if (curve := values(records, name))}
    if not curves:
        return None
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    names = list(curves)
    for name, colour in zip(names, COLOURS):
        steps, heights = zip(*curves[name])
        alpha = 0.3 if f"smoothed_{name}" in curves else 1  # raw values are the background of the smoothed ones
        axes.plot(steps, heights, color=colour, alpha=alpha, lw=1.3, marker="." if len(steps) <= 30 else None)
        low, high = (dict(values(records, f"{name}_{end}")) for end in ("low", "high"))
        known = [step for step in steps if step in low and step in high]
        if known and name == names[0]:  # the 95 % interval, of one curve: more would hide each other
            axes.fill_between(known, [low[s] for s in known], [high[s] for s in known], color=colour, alpha=0.15, lw=0)
    if panel.log and all(height > 0 for curve in curves.values() for _, height in curve):
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        axes.legend([name.replace("_", " ") for name in names], fontsize=7, frameon=False)
    return figure


def values(records: Sequence[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) where a metric was logged as a finite number; of a step that was logged twice, the later."""
    by_step = {}
    for record in records:
        value = record.get(name)
        if is_number(value):
            by_step[record["step"]] = value
    return sorted(by_step.items())


def is_number(value: object) -> bool:
    """Whether a value of a file is a number that can be drawn; integers of any size are JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def summary(records: Sequence[dict]) -> str:
    """Steps, time and last values of a run, in a line."""
    steps = max((record["step"] for record in records), default=0)
    seconds = sum(seconds for _, seconds in values(records, "seconds"))
    facts = [f"{steps:,} steps", f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"]
    for name in ("smoothed_loss", "val_bpb", "smoothed_reward", "pass@1", "chatcore"):
        if curve := values(records, name):
            facts.append(f"{name.replace('_', ' ')} {curve[-1][1]:.4g}")
    if skipped := sum(record.get("event") == "skipped" for record in records):
        facts.append(f"{skipped} updates skipped")
    return ", ".join(facts)


def svg(figure: Figure) -> str:
    """A figure as an SVG element: text stays text, and the same numbers give the same bytes."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanochat_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "<svg" + file.getvalue().partition("<svg")[2]  # without the head of a file


def last_answers(path: Path, log: Callable[[str], None] = str) -> str:
    """The last problem in rollouts.jsonl with some of the answers to it, from the best to the worst, as HTML."""
    try:
        with path.open("rb") as file:
            start = file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return ""
    except OSError as e:
        log(f"{path}: {e.strerror}")
        return ""
    records, others = [], 0
    for line in filter(None, lines[1:] if start else lines):  # the seek has cut the first one
        with contextlib.suppress(ValueError, RecursionError):
            if is_rollout(record := json.loads(line)):
                records.append(record)
                continue
        others += 1
    if others:
        log(f"{path}: {others:,} line{'s are' if others > 1 else ' is'} no answer of a rollout")
    if not records:
        return ""
    step, example = records[-1]["step"], records[-1]["example"]
    answers = [record for record in records if (record["step"], record["example"]) == (step, example)]
    answers.sort(key=lambda record: -record["reward"])
    count = min(SHOWN_ANSWERS, len(answers))
    shown = [answers[round(i * (len(answers) - 1) / max(1, count - 1))] for i in range(count)]
    title = f"<h3>Step {step}: {count} of {len(answers)} answers to one problem</h3>"
    return f"{title}<pre>{html.escape(answers[0]['prompt'])}</pre>" + "".join(
        f"<pre class='{'right' if record['reward'] > 0 else 'wrong'}'>{html.escape(record['text'])}\n"
        f"reward {record['reward']:g}, advantage {record['advantage']:g}</pre>"
        for record in shown
    )


def is_rollout(record: object) -> bool:
    """Whether a line of rollouts.jsonl has what the page shows, each of its type."""
    return (
        isinstance(record, dict)
        and is_step(record.get("step"))
        and type(record.get("example")) is int
        and all(is_number(record.get(name)) for name in ("reward", "advantage"))
        and all(isinstance(record.get(name), str) for name in ("prompt", "text"))
    )


if __name__ == "__main__":
    run_stage(main, parse(ReportConfig, prog="python -m nanochat_jax.report"))
