"""Long runs of RL under different settings, from the quickstart's model. Prints a JSON line a run: its curves.

python tools/check/rl_long.py --out /tmp/rl_long --seeds 0 1 2 > rl_long.jsonl
python tools/check/rl_long.py --out /tmp/rl_long --table-of rl_long.jsonl --plot rl_long.svg

A run that is there already is not trained again, so that a study that was stopped goes on with the same command.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import tyro
from matplotlib.figure import Figure

from nanochat_jax import quickstart
from nanochat_jax.files.paths import write_atomically
from nanochat_jax.quickstart import QuickstartConfig
from nanochat_jax.train.metrics import read_metrics

VARIANTS = {
    "default": (),
    "nanochat": ("--objective=nanochat", "--device-batch-size=16", "--cut-answers=keep"),
    "cut answers kept": ("--cut-answers=keep",),
    "cut answers masked": ("--cut-answers=mask",),
    "rates x2": ("--init-lr-frac=0.1",),
    "rates x5": ("--init-lr-frac=0.25",),
    "rates x10": ("--init-lr-frac=0.5",),
    "rates x5, cut answers kept": ("--init-lr-frac=0.25", "--cut-answers=keep"),
    "rates x5, truncated policy": ("--init-lr-frac=0.25", "--policy=truncated"),
    "rates x5, top-k 0": ("--init-lr-frac=0.25", "--top-k=0"),
    "rates x5, cosine": ("--init-lr-frac=0.25", "--schedule=cosine"),
    "top-k 0": ("--top-k=0",),
    "kl-coef 0.05": ("--kl-coef=0.05",),
    "truncated policy": ("--policy=truncated",),
}
SETTINGS = (  # of all: the quickstart's task, with room for answers that go on
    *("--task=arithmetic", "--max-new-tokens=80", "--device-batch-size=32", "--save-every=-1", "--log-rollouts=0"),
    *("--eval-examples=200", "--eval-samples=2"),
)
CURVES = ("reward", "entropy", "delta_logp_mean", "cut")  # means over the steps from one measurement to the next
MEASURED = ("pass@1", "pass@1_kept", "held_out_cut")
DRAWN = {"reward": "reward", "pass@1": "pass@1", "entropy": "entropy, nats a token", "delta_logp_mean": "|dlogp|"}
LOGARITHMIC = ("entropy", "delta_logp_mean")
COLOURS = {
    "default": "#1f77b4",
    "nanochat": "#17becf",
    "kl-coef 0.05": "#9467bd",
    "rates x2": "#2ca02c",
    "rates x5": "#ff7f0e",
    "rates x5, truncated policy": "#8c564b",
    "rates x10": "#d62728",
}


def quickstart_model(folder: Path, seed: int) -> None:
    """Make the quickstart's models in the folder, unless they are there."""
    if not (folder / "shares.json").exists():
        with contextlib.redirect_stdout(sys.stderr):
            code = quickstart.main(QuickstartConfig(seed=seed, output=folder))
        if code:
            raise SystemExit(code)


def tag_of(name: str) -> str:
    """A variant's folder."""
    return name.replace(" ", "_").replace(",", "")


def train(folder: Path, name: str, own: Iterable[str], seed: int, steps: int) -> dict[str, Any]:
    """The run of a variant, whose flags are its `own`, trained where it is not there -> its curves."""
    tag = tag_of(name)
    run = folder / "chatrl_checkpoints" / tag
    if not (run / str(steps)).exists():
        length = (f"--num-steps={steps}", f"--eval-every={max(1, steps // 10)}", f"--seed={seed}")
        flags = (*length, f"--output-tag={tag}", "--resume=auto", *own)
        environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder.absolute())}
        command = [sys.executable, "-m", "nanochat_jax.rl", *flags]
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
    return {"variant": name, "seed": seed, "steps": steps} | curves(read_metrics(run / "metrics.jsonl"))


def curves(records: Iterable[Mapping[str, Any]]) -> dict[str, list]:
    """What a run has recorded, at each measurement of held-out problems."""
    found: dict[str, list] = {name: [] for name in ("step", *MEASURED, *CURVES)}
    since: list[Mapping[str, Any]] = []
    for record in records:
        if "reward" in record:
            since.append(record)
        elif "pass@1" in record:
            values = {name: [r[name] for r in since if name in r] for name in CURVES}
            means = {name: statistics.fmean(v) if v else None for name, v in values.items()}
            point = {"pass@1_kept": record["pass@1"], **record, **means}  # which is the same where all count
            for name, values in found.items():
                values.append(point[name])
            since = []
    return found


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of the variants: mean over the runs, with the lowest and highest."""

    def over_runs(values: list[float], scale: float = 100) -> str:
        return f"{scale * statistics.fmean(values):.1f} ({scale * min(values):.1f} to {scale * max(values):.1f})"

    by_variant: dict[str, list] = {}
    for line in lines:
        by_variant.setdefault(line["variant"], []).append(line)
    rows = [
        "| variant | runs | pass@1 before, % | best | at the end | with cut answers | cut at the end, % | entropy |"
    ]
    rows.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, runs in by_variant.items():
        cells = [
            over_runs([run["pass@1"][0] for run in runs]),
            over_runs([max(run["pass@1"]) for run in runs]),
            over_runs([run["pass@1"][-1] for run in runs]),
            over_runs([run["pass@1_kept"][-1] for run in runs]),
            over_runs([run["held_out_cut"][-1] for run in runs]),
            f"{statistics.fmean(run['entropy'][-1] for run in runs):.3f}",
        ]
        rows.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(lines: Iterable[Mapping[str, Any]], path: Path) -> None:
    """An SVG of the curves of COLOURS' variants, of runs of one length: means over the runs, and all between the lowest
    and the highest run."""
    by_variant: dict[str, list] = {}
    for line in lines:
        by_variant.setdefault(line["variant"], []).append(line)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for panel, (curve, title) in zip(figure.subplots(2, 2, sharex=True).flat, DRAWN.items()):
        for name in filter(by_variant.__contains__, COLOURS):
            runs = by_variant[name]
            values = {step: [run[curve][i] for run in runs] for i, step in enumerate(runs[0]["step"])}
            values = {step: at for step, at in values.items() if None not in at}
            low, mean, high = ([of(at) for at in values.values()] for of in (min, statistics.fmean, max))
            panel.plot(list(values), mean, color=COLOURS[name], label=name)
            panel.fill_between(list(values), low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
        panel.set(title=title, xlabel="step", yscale="log" if curve in LOGARITHMIC else "linear")
        panel.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS))
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanochat_jax"}):  # text, and the same bytes
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    write_atomically(path, file.getvalue())


def main(
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    variants: tuple[str, ...] = tuple(VARIANTS),
    steps: int = 500,
    table_of: Path | None = None,
    plot: Path | None = None,
) -> None:
    """out: folder of the models and runs, made where it is not there; variants: names of VARIANTS; table_of: a file of
    these lines, of which the runs of `steps` steps are printed as a table in place of training, and drawn into plot."""
    if table_of:
        lines = [line for line in map(json.loads, table_of.read_text().splitlines()) if line["steps"] == steps]
        print(table(lines))
        if plot:
            draw(lines, plot)
        return
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        quickstart_model(out / f"seed-{seed}", seed)
        for name in variants:
            print(json.dumps(train(out / f"seed-{seed}", name, (*SETTINGS, *VARIANTS[name]), seed, steps)), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
