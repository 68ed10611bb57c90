"""The table and the plot of the predictions in a file of tools/predict/scaling.py: what its --render shows."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nanochat_jax.files.paths import write_atomically

HEAD = (
    *("model, slice", "mesh", "passes x rows, remat", "GiB a chip", "MiB a chip sends in a step", "ms a step"),
    *("thousand tokens/s", "MFU %", "RL: s a step", "RL: thousand new tokens/s"),
)
KINDS = {"all-gather": "gather", "reduce-scatter": "scatter", "all-reduce": "reduce", "all-to-all": "to all"}
BETTER = 0.9  # of the other's time, and an alternative mesh is named
COLOURS = {20: "#3366cc", 26: "#109618", 34: "#dc3912"}
GREY = "#888888"
GIB, MIB = 2**30, 2**20


def latest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each case, one compiled at its depth before one that was extended; by depth, chip, chips."""
    best: dict[str, dict] = {}
    for line in lines:
        had = best.get(line["case"])
        if had is None or line["full"] >= had["full"]:
            best[line["case"]] = line
    return sorted(best.values(), key=lambda x: (depth_of(x), x["chip"], x["chips"], x["case"].count(":"), x["case"]))


def depth_of(line: dict[str, Any]) -> int:
    return int(line["case"].partition(":")[0].removeprefix("d"))


def between(low: float, high: float, form: str = "{:,.0f}") -> str:
    """Two bounds, or one number where they look alike."""
    low, high = form.format(low), form.format(high)
    return low if low == high else f"{low} to {high}"


def between_thousands(rates: Sequence[float]) -> str:
    return between(*(rate / 1000 for rate in rates))


def row(line: dict[str, Any]) -> list[str]:
    """The cells of a prediction, under HEAD."""
    _, name, *mesh = line["case"].split(":")
    axes = [f"{axis}={n}" for axis, n in line["mesh"].items() if n > 1] + ["whole copies"] * ("replicate" in mesh)
    cells = [f"d{depth_of(line)} on {name}", ", ".join(axes), f"{line['passes']} x {line['rows']}, {line['remat']}"]
    if "seconds" not in line:
        return [*cells, f"does not fit {line['memory_of_a_chip'] / GIB:.1f}", *[""] * 6]
    memory = "" if line["memory_of_a_chip"] is None else f" of {line['memory_of_a_chip'] / GIB:.1f}"
    cells.append(f"{line['held'] / GIB:.1f}{memory}" + ("" if line["fits"] else ": **does not fit**"))
    sent = {kind: size for kind, (_, size) in line["collectives"].items()}
    small = sum(size for kind, size in sent.items() if kind not in KINDS)
    named = [f"{name} {sent[kind] / MIB:,.0f}" for kind, name in KINDS.items() if sent.get(kind, 0) >= MIB / 2]
    cells.append(", ".join(named + [f"other {small / MIB:,.0f}"] * (small >= MIB / 2)) or "less than 1")
    cells.append(between(1e3 * line["seconds"]["at_least"], 1e3 * line["seconds"]["at_most"]))
    cells += [between_thousands(line["tokens_per_second"]), between(*(100 * x for x in line["mfu"]))]
    rl = line["rl"]
    fits = "" if rl["fits"] else ": **does not fit**"
    seconds = between(rl["seconds"]["at_least"], rl["seconds"]["at_most"], "{:,.1f}")
    return [*cells, seconds + fits, between_thousands(rl["tokens_per_second"])]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [HEAD, ["---"] * len(HEAD), *(row(line) for line in latest(lines))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def better(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each slice and model on which another mesh than the default is predicted to be clearly faster."""
    slices: dict[tuple[str, str], list[dict]] = {}
    for line in latest(lines):
        slices.setdefault(tuple(line["case"].split(":")[:2]), []).append(line)
    said = []
    for (depth, name), found in slices.items():
        default = next((line for line in found if line["case"].count(":") == 1), None)
        fitting = [line for line in found if line["fits"]]
        if default is None or not fitting:
            continue
        best = min(fitting, key=lambda line: line["seconds"]["at_most"])
        mesh = best["case"].split(":", 2)[-1]
        if best is default:
            continue
        if not default["fits"]:
            said.append(f"{depth} on {name}: the default mesh does not fit, {mesh} does")
            continue
        ends = [best["seconds"][end] / default["seconds"][end] for end in ("at_least", "at_most")]
        if ends[1] <= BETTER and ends[0] <= 1:
            said.append(f"{depth} on {name}: {mesh} takes {between(*(100 * x for x in sorted(ends)))} % of the time")
    return said


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """MFU between its bounds over the number of chips, a panel for each kind of chip; the default meshes only."""
    lines = [line for line in latest(lines) if line["case"].count(":") == 1 and "seconds" in line]
    kinds = sorted({line["case"].split(":")[1].partition("-")[0] for line in lines})
    figure = Figure(figsize=(3.2 * max(1, len(kinds)), 3.0), layout="constrained")
    panels = figure.subplots(1, max(1, len(kinds)), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds):
        for depth in sorted({depth_of(line) for line in lines}):
            here = [x for x in lines if depth_of(x) == depth and x["case"].split(":")[1].partition("-")[0] == kind]
            if not here:
                continue
            chips, colour = [line["chips"] for line in here], COLOURS.get(depth, GREY)
            low, high = ([100 * line["mfu"][end] for line in here] for end in (0, 1))
            panel.fill_between(chips, low, high, alpha=0.2, color=colour, linewidth=0)
            panel.plot(chips, high, color=colour, marker="o", markersize=3, label=f"d{depth}")
            panel.plot(chips, low, color=colour, marker="o", markersize=3, linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks := sorted({line["chips"] for line in lines}), list(map(str, ticks)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set(title=kind, xlabel="chips", ylim=(0, 100))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("MFU of an SFT step, %")
    if lines:
        panels[-1].legend(loc="lower left", fontsize="small")
    figure.suptitle("Predicted, not measured: sending wholly hidden (solid), not at all (dotted)", fontsize="medium")
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanochat_jax"}):  # text, and the same bytes
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    write_atomically(path, file.getvalue())


def render(lines: Sequence[dict[str, Any]], plot: Path | None) -> str:
    """The table with what it says about meshes below; the plot into `plot`."""
    if plot:
        draw(lines, plot)
    return "\n".join([table(lines), *([""] * bool(said := better(lines))), *(f"- {sentence}" for sentence in said)])
