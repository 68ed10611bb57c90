"""The page about runs, as HTML that needs nothing from elsewhere and is complete without its script."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.reports.charts import MARKS, STYLES, Curve, Points, chart, smoothed
from nanochat_jax.reports.document import STYLE, document, part
from nanochat_jax.reports.runs import STAGES, Log, Run, names_of, read_run
from nanochat_jax.reports.tables import Shown, differing_settings, evaluations, label, last_answers, samples, words

SCRIPT = "".join(map(part, ("values.js", "zoom.js", "follow.js")))
TITLES = dict(zip(STAGES, ("Base models", "Supervised fine-tuning (SFT)", "Reinforcement learning (RL)")))
COLOURS = 8  # in the style sheet; more runs begin again with the first, and have marks
IN_FOLDERS = {STAGES[0]: ("model_tag",)}  # settings that name a stage's folders
TASK = "chatcore/"  # the beginning of the names of ChatCORE's tasks, among the metrics
MOST_TASKS = 20


class Panel(NamedTuple):
    """A chart: its title, and its metrics, of which a run may have some. Where raw values would hide each other, their
    moving average is drawn over them: smoothed_loss over loss, and of a metric without one the mean of some steps."""

    title: str
    names: tuple[str, ...]
    log: bool = False
    noisy: bool = True  # False: what is drawn as it is, such as a schedule
    interval: bool = False  # shown as <name>_low to <name>_high


PANELS = (
    Panel("loss", ("loss", "smoothed_loss"), log=True),
    Panel("bits per byte of held-out text", ("val_bpb",), noisy=False),
    Panel("reward", ("reward", "smoothed_reward")),
    Panel("held-out problems solved, pass@1 with 95 % interval", ("pass@1",), noisy=False, interval=True),
    Panel("held-out problems solved, pass@k", ("pass@2", "pass@4", "pass@8", "pass@16"), noisy=False),
    Panel("CORE", ("core_metric",), noisy=False),
    Panel("ChatCORE", ("chatcore", "chatcore_cat", "chatcore_with_spelling"), noisy=False),
    Panel("difference of log-probabilities, sampler and trainer", ("delta_logp_mean", "delta_logp_max"), log=True),
    Panel("KL divergence from the first model (nats a token)", ("kl",)),
    Panel("entropy (nats a sampled token)", ("entropy",)),
    Panel("tokens in an answer", ("length_mean", "length_max")),
    Panel("shares of answers", ("cut", "tool_calls", "tool_failed", "tool_timeouts")),
    Panel("share of problems without signal", ("no_signal",)),
    Panel("shares of tokens", ("clipped", "capped")),
    Panel("gradient norm", ("grad_norm",), log=True),
    Panel("learning-rate multiplier", ("lr_multiplier",), noisy=False),
    Panel("tokens per second", ("tokens_per_second", "rollout_tokens_per_second", "update_tokens_per_second")),
    Panel("model FLOPs utilisation", ("mfu",)),
)
ZOOM = (
    "Dragging over a chart shows those steps in all charts of its stage; a double-click, or Escape, shows all steps "
    "again. Keys in a chart: + and − zoom, ← and → move."
)
MEANS = 100  # that a smoothed curve consists of, at least


def page(
    folders: Sequence[Path],
    log: Log = str,
    read: Callable[[Path, Log], Run] = read_run,
    *,
    links: Mapping[Path, str] | None = None,
    version: str = "",
) -> str:
    """The page about these runs. log: is told of a file that cannot be read, and of lines of another form, which are
    left out. links: to the pages about the rollouts of runs. version: of a page that is served: another one than its
    own makes it ask for itself again."""
    stages: dict[str, list[Path]] = {stage: [] for stage in STAGES}
    for folder in folders:
        stages.setdefault(folder.parent.name if folder.parent.name in TITLES else "", []).append(folder)
    overview, sections, number = "", "", 0
    for stage, of_stage in stages.items():
        shown = []
        for folder, name in zip(of_stage, names_of(of_stage)):
            shown.append(Shown(number, name, f"{anchor(stage)} {name}", read(folder, log)))
            number += 1
        if shown:
            title = TITLES.get(stage, "Other runs")
            overview += f"<tr><th colspan=2>{title}</th></tr>" + "".join(
                overview_row(one, stage, (links or {}).get(one.run.folder, "")) for one in shown
            )
            sections += section(stage, title, shown)
    table = f"<table class=overview>{overview}</table>" if overview else "<p>no run has begun yet</p>"
    rules = "".join(
        f".run{n}{{--run:var(--colour{n % COLOURS});--mark:var(--mark{mark_of(n)})}}"
        f"main:has(#show{n}:not(:checked)) svg .run{n}{{display:none}}"
        for n in range(number)
    )
    hint = f"<p class=hint>{ZOOM}</p>" if "<figure" in sections else ""
    return document("Runs", STYLE + rules, f"<main><h1>Runs</h1>{table}{hint}{sections}</main>", SCRIPT, version)


def mark_of(number: int) -> int:
    """Index in MARKS of the marks on the curves of a run with this number."""
    return number // COLOURS % len(MARKS)


# ----------------------------------------------------------------------------------------------------------- overview
def overview_row(shown: Shown, stage: str, link: str) -> str:
    """A run's row of the table at the top. link: to the page about its rollouts, empty where there is none."""
    if shown.run.error:
        text = f"cannot be read: {shown.run.error}"
    else:
        text = summary(shown.run)
    name = f"<a href='#{anchor(stage)}'>{label(shown)}</a>"
    rollouts = f"<br><a href='{html.escape(link)}'>its rollouts, token by token</a>" if link else ""
    return f"<tr><td>{name}</td><td>{html.escape(text)}{rollouts}</td></tr>"


def anchor(stage: str) -> str:
    """What links to a stage's part of the page name."""
    return stage or "other"


def summary(run: Run) -> str:
    """Steps, time and last values of a run, in a line."""
    steps = max((record["step"] for record in run.records), default=0)
    seconds = sum(seconds for _, seconds in run.numbers.get("seconds", ()))
    facts = [f"{steps:,} steps", f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"]
    if percent := run.numbers.get("percent"):
        facts[0] += f" ({percent[-1][1]:.0f} %)"
    for name in ("smoothed_loss", "val_bpb", "core_metric", "smoothed_reward", "pass@1", "chatcore"):
        if curve := run.numbers.get(name):
            facts.append(f"{words(name)} {curve[-1][1]:.4g}")
    if skipped := sum(record.get("event") == "skipped" for record in run.records):
        facts.append(f"{skipped} updates skipped")
    return ", ".join(facts)


# ------------------------------------------------------------------------------------------------------------ a stage
def section(stage: str, title: str, shown: Sequence[Shown]) -> str:
    """All about the runs of a stage."""
    legend = ""
    for one in shown:
        box = f"<input type=checkbox checked id=show{one.number} data-key='{html.escape(one.key)}'>"
        legend += f"<label>{box}{label(one)}</label>"
    charts = "".join(figure(panel, shown) for panel in (*PANELS, *task_panels(shown)))
    details = "".join(evaluations(one) for one in shown)
    details += "".join(samples(one) for one in shown)
    details += "".join(last_answers(one) for one in shown)
    return (
        f"<section id='{anchor(stage)}'><h2>{title}</h2><div class=legend>{legend}</div>"
        f"<div class=charts>{charts or '<p>nothing measured yet</p>'}</div>"
        f"{differing_settings(shown, IN_FOLDERS.get(stage, ()))}{details}</section>"
    )


def task_panels(shown: Sequence[Shown]) -> list[Panel]:
    """The accuracies on ChatCORE's tasks, a chart each."""
    names = dict.fromkeys(name for one in shown for name in one.run.numbers if name.startswith(TASK))
    return [Panel(f"{name.removeprefix(TASK)}, accuracy", (name,), noisy=False) for name in [*names][:MOST_TASKS]]


def figure(panel: Panel, shown: Sequence[Shown]) -> str:
    """A panel's chart with every run that has one of its metrics; empty where none has."""
    measured = [(one, {name: points for name in panel.names if (points := one.run.numbers.get(name))}) for one in shown]
    longest = max((len(points) for _, found in measured for points in found.values()), default=0)
    if not longest:
        return ""
    window = longest // MEANS | 1 if panel.noisy else 1  # odd, as a mean stands in the middle of its steps
    curves = [curve for one, found in measured for curve in curves_of(panel, one, found, window)]
    styles = {curve.name: curve.style for curve in curves if not curve.faint}
    key = [
        f"<svg viewBox='0 0 24 8'><path class='curve style{style}' d='M0 4H24'/></svg>{html.escape(name)}"
        for name, style in styles.items()
        if len(styles) > 1
    ]
    if any(is_averaged(name, found, window) for _, found in measured for name in found):
        key.append(f"mean of {window} steps")
    drawn = chart(panel.title, curves, panel.log) + "".join(f"<span class=key>{text}</span>" for text in key)
    return f"<figure><figcaption>{html.escape(panel.title)}</figcaption>{drawn}</figure>"


def curves_of(panel: Panel, shown: Shown, measured: dict[str, Points], window: int) -> list[Curve]:
    """A run's curves of a panel; window: steps of a mean."""
    main = [name for name in panel.names if f"smoothed_{name}" not in panel.names]  # each with its own stroke
    curves = []
    for name, points in measured.items():
        style = main.index(name) % STYLES if name in main else 0
        averaged = is_averaged(name, measured, window)
        faint = averaged or f"smoothed_{name}" in measured
        interval = interval_of(shown.run.numbers, name) if panel.interval else []
        mark = mark_of(shown.number)
        curves.append(Curve(shown.number, words(name), points, style, faint, interval, mark))
        if averaged:
            curves.append(Curve(shown.number, words(name), smoothed(points, window), style, mark=mark))
    return curves


def interval_of(numbers: dict[str, Points], name: str) -> list[tuple[int, float, float]]:
    """(step, low, high) of a metric, where both ends were logged."""
    low, high = (dict(numbers.get(f"{name}_{end}", ())) for end in ("low", "high"))
    return [(step, low[step], high[step]) for step in low if step in high]


def is_averaged(name: str, measured: dict[str, Points], window: int) -> bool:
    """Whether the page smooths a metric, since the run's log does not."""
    return window > 1 and not name.startswith("smoothed_") and f"smoothed_{name}" not in measured
