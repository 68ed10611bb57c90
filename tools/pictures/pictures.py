"""README's pictures, from real runs: tools/pictures/*.svg.

.venv/bin/python tools/pictures/pictures.py                         # all: runs the quickstart, and a preflight of v5e-8
.venv/bin/python tools/pictures/pictures.py --run quickstart-pictures   # again, from the folder of that run

training.svg is drawn from the run's metrics and shares. quickstart.svg and preflight.svg are what the two commands
print, kept in the run's folder as screen.txt and preflight.txt, and cut: of the quickstart no command of a stage and
one answer only, of the preflight no settings. A bar is shown as it stood when its stage ended; on the terminal the line
"100 steps, ..." then takes its place. stages.svg is drawn from STAGES and READERS below.
The preflight needs the TPU compiler (tools/setup.sh --extra aot); it and the quickstart take minutes each.
The same folder gives the same bytes.
"""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import Maybe, require
from nanochat_jax.files.paths import write_atomically
from nanochat_jax.reports.runs import numbers_of
from nanochat_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
NEW_RUN = Path("quickstart-pictures")  # git ignores it
QUICKSTART = ("tools/quickstart.sh",)
PREFLIGHT = ("-m", "nanochat_jax.sft", "--preflight", "v5e-8", "--model-tag", "d20", "--device-batch-size", "8")
WIDTH = 100  # columns of a terminal

# Dark cards, which stand out from a light page and lie flat on a dark one.
BACKGROUND, PANEL, TEXT, FAINT = "#1d2129", "#282e39", "#d5d9e0", "#8b93a1"
BLUE, GREEN, ORANGE = "#6ea8fe", "#7fcf8a", "#f0b36b"
RGB = {name: tuple(bytes.fromhex(name[1:])) for name in (BACKGROUND, PANEL, TEXT, FAINT, BLUE, GREEN, ORANGE)}
ANSI = (PANEL, ORANGE, GREEN, ORANGE, BLUE, BLUE, BLUE, TEXT)  # black, red, green, yellow, blue, magenta, cyan, white
THEME = TerminalTheme(RGB[BACKGROUND], RGB[TEXT], [RGB[name] for name in ANSI])
LOOK = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), BACKGROUND),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), FAINT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "grid.alpha": 0.25,
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.monospace": ["DejaVu Sans Mono", "Menlo", "Consolas"],
    "axes.titlesize": 11,
}
# rich's own frame of a terminal would fetch its font from a server.
TERMINAL = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
line-height: {line_height}px; }}
.{unique_id}-title {{ font: bold 18px sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""

# Lines of the quickstart that are shown: headings, texts, bars, right answers, and the table with its title.
SHOWN = re.compile(r"\x1b\[1m\d\. |[\d,]+ texts|.*━|right on|\x1b\[3m|[┏┃┡│└]|$")
ANSWER = "\x1b[32m"  # a line of an answer; the line above the first is its question
NOT_SHOWN = re.compile("Using |NOTE: there is no tokenizer")  # of the preflight

MODELS = {"base model": FAINT, "after SFT": BLUE, "after RL": GREEN}  # as the quickstart names them

# Module, what it does, where in the base directory.
STAGES = (
    ("tokenizer", "finds the pieces\nof words", "tokenizer/"),
    ("base", "learns to go on\nwith a text", "base_checkpoints/"),
    ("sft", "learns to answer,\nfrom conversations", "chatsft_checkpoints/"),
    ("rl", "gets better, by its\nown answers", "chatrl_checkpoints/"),
)
READERS = (
    ("eval", "ARC, MMLU, GSM8K,\nHumanEval, ..."),
    ("chat", "talk to it"),
    ("report", "curves of all runs,\none HTML page"),
    ("nanochat_export", "back to nanochat's\nown files"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """Draw README's pictures from a run of the quickstart."""

    run: Maybe[Path] = None  # folder of a finished quickstart; default: quickstart-pictures, which is made first
    output: Path = ROOT / "tools/pictures"  # folder of the pictures


def main(cfg: Pictures) -> int:
    """Write the pictures -> 0. ValueError: the folder is not that of a finished quickstart, or a command failed."""
    folder = cfg.run.expanduser() if cfg.run else run_quickstart()
    cfg.output.mkdir(parents=True, exist_ok=True)

    def write(name: str, picture: str) -> None:
        write_atomically(cfg.output / f"{name}.svg", picture.encode())
        print(f"{len(picture.encode()) / 1000:.1f} kB -> {cfg.output / name}.svg", flush=True)

    write("training", training(folder))
    write("stages", stages())
    if (screen := folder / "screen.txt").is_file():
        write("quickstart", terminal("quickstart", QUICKSTART, shortened(screen.read_bytes().decode())))
    else:
        print(f"NOTE: quickstart.svg is not drawn: {screen} is missing, which only a run started by this tool leaves")
    said = [line for line in preflight(folder).strip().split("\n") if not NOT_SHOWN.match(line)]
    write("preflight", terminal("preflight", (".venv/bin/python", *PREFLIGHT), Text("\n".join(said))))
    return 0


# ----------------------------------------------------------------------------------------------------- what is recorded
def recorded(command: Sequence[str], env: dict[str, str]) -> str:
    """What a command prints on a terminal of WIDTH columns. ValueError: it fails."""
    print(f"running {' '.join(command)}", flush=True)
    seen = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(WIDTH), "JAX_PLATFORMS": "cpu"}
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | seen | env
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE)
    require(done.returncode == 0, f"{' '.join(command)} must succeed, it ended with exit code {done.returncode}")
    return done.stdout.decode()  # not as text, which would turn \r into \n


def run_quickstart() -> Path:
    """Run it -> its folder, with what it printed in screen.txt."""
    said = recorded([str(ROOT / QUICKSTART[0]), "--output", str(NEW_RUN)], {})
    write_atomically(NEW_RUN / "screen.txt", said.encode())
    return NEW_RUN


def preflight(folder: Path) -> str:
    """What the preflight prints, from preflight.txt if it is there; with a base directory that is empty."""
    if not (kept := folder / "preflight.txt").is_file():
        with tempfile.TemporaryDirectory() as empty:
            said = recorded([sys.executable, *PREFLIGHT], {"NANOCHAT_BASE_DIR": empty})
        write_atomically(kept, said.encode())
    return kept.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- the curves
def training(folder: Path) -> str:
    """Loss of SFT, reward of RL, and the right answers after each stage, side by side, as SVG.

    ValueError: it is not the folder of a finished quickstart."""
    panels = []
    for stage, name, title in (("sft", "loss", "SFT: loss"), ("rl", "reward", "RL: mean reward")):
        path = next(iter(sorted((folder / f"chat{stage}_checkpoints").glob("*/metrics.jsonl"))), None)
        records = read_metrics(path) if path else []
        numbers = numbers_of(records)
        curves = [numbers.get(key) for key in (name, f"smoothed_{name}")]
        require(all(curves), f"--run {folder} must be a finished quickstart: it has no {name} of {stage} to draw")
        panels.append((title, *curves))
    path = folder / "shares.json"
    shares = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    unjudged = ", ".join(MODELS.keys() - shares.keys())
    require(not unjudged, f"--run {folder} must be a finished quickstart: {path.name} has no share of: {unjudged}")
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(10, 3.3), layout="constrained")
        axes = figure.subplots(1, 3)
        for place, (title, measured, smoothed), colour in zip(axes, panels, (BLUE, GREEN)):
            place.plot(*zip(*measured), color=colour, alpha=0.35, lw=1, label="step")
            place.plot(*zip(*smoothed), color=colour, lw=2, label="smoothed")
            place.set(title=title, xlabel="step")
            place.grid()
            place.legend()
        axes[0].set_yscale("log")
        axes[0].minorticks_off()
        draw_shares(axes[2], shares)
        return svg(figure)


def svg(figure: Figure) -> str:
    """A figure as an SVG element: text stays text, and the same numbers give the same bytes."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanochat_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "<svg" + file.getvalue().partition("<svg")[2]  # without the head of a file


def draw_shares(axes: Axes, shares: dict[str, list]) -> None:
    """A bar with its 95 % interval for each model: right answers, drawn at temperature 1."""
    for place, (name, colour) in enumerate(MODELS.items()):
        value, low, high = shares[name][1]
        axes.bar(place, value, color=colour, width=0.6)
        axes.errorbar(place, value, [[value - low], [high - value]], color=TEXT, capsize=4, lw=1.2)
        axes.text(place, high + 0.02, f"{100 * value:.1f} %", ha="center", va="bottom")
    axes.set(title="right answers to unseen problems", ylim=(0, 1.1), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xticks(range(len(MODELS)), list(MODELS))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


# -------------------------------------------------------------------------------------------------------- the terminals
def shortened(screen: str) -> Text:
    """What of the quickstart's screen is shown. ValueError: it is not its screen."""
    kept: list[str] = []
    question, last_stage, answers = "", False, 0
    for line in screen.split("\n"):
        line = line.rpartition("\r")[2]  # a bar is drawn again and again: as it stood at the end
        last_stage |= "5. " in line[:10]
        if line.startswith(ANSWER):
            answers += last_stage and bool(question)
            kept += [text for text in (question, line) if text and last_stage and answers == 1]
            question = ""
        else:
            question = line
            if SHOWN.match(line) and (line or (kept and kept[-1])):  # one empty line at most, and none at the top
                kept.append(line)
    require(last_stage, "screen.txt must be what a whole quickstart printed on a terminal: it has no stage 5")
    return Text("\n").join(Text.from_ansi(line) for line in kept[: None if kept[-1] else -1])


def terminal(name: str, command: Sequence[str], said: Text) -> str:
    """A command and what it said, as an SVG of a terminal."""
    console = Console(
        record=True, file=io.StringIO(), width=WIDTH, highlight=False, color_system="truecolor", no_color=False
    )
    console.print(Text.assemble(("$ ", FAINT), (" ".join(command), f"bold {BLUE}")))
    console.print(said)
    return console.export_svg(title="", theme=THEME, code_format=TERMINAL, unique_id=name)


# ---------------------------------------------------------------------------------------------------------- the stages
def stages() -> str:
    """The commands, and the one folder that they write to and read, as SVG."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(10, 4.3))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 100), ylim=(0, 43))
        axes.set_axis_off()
        lefts = [3 + 24.7 * place for place in range(4)]
        for place, (left, (name, what, made)) in enumerate(zip(lefts, STAGES)):
            box(axes, left, 31, name, what, BLUE)
            if place:
                arrow(axes, (left - 4.7, 35.5), (left, 35.5))
            arrow(axes, (left + 10, 31), (left + 10, 26.5))
            axes.text(left + 10, 23.6, made, ha="center", va="center", family="monospace", fontsize=9)
        axes.add_patch(patch(3, 16.5, 94.1, 10, FAINT, linestyle="--"))
        folder = "base directory, nanochat's own: its files are read as they are; a stopped run goes on with --resume"
        axes.text(50, 19.4, folder, ha="center", va="center", color=FAINT)
        for left, (name, what) in zip(lefts, READERS):
            box(axes, left, 3, name, what, GREEN)
            arrow(axes, (left + 10, 16.5), (left + 10, 12))
        return svg(figure)


def box(axes: Axes, left: float, bottom: float, name: str, what: str, colour: str) -> None:
    """A command, 20 wide and 9 high."""
    axes.add_patch(patch(left, bottom, 20, 9, colour))
    axes.text(left + 10, bottom + 6.7, name, ha="center", va="center", weight="bold", color=colour, fontsize=11)
    lines = what.split("\n")
    for number, line in enumerate(lines):  # each by itself, so that it is in the middle in any font
        height = bottom + 3 + 1.9 * ((len(lines) - 1) / 2 - number)
        axes.text(left + 10, height, line, ha="center", va="center")


def patch(left: float, bottom: float, width: float, height: float, colour: str, linestyle: str = "-") -> FancyBboxPatch:
    shape = "round,pad=0,rounding_size=1.2"
    corner = (left, bottom)
    return FancyBboxPatch(corner, width, height, shape, facecolor=PANEL, edgecolor=colour, linestyle=linestyle)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": FAINT, "shrinkA": 1, "shrinkB": 1})


if __name__ == "__main__":
    run_stage(main, parse(Pictures, prog="tools/pictures/pictures.py"))
