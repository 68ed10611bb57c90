"""From nothing to a chat model in minutes, on any laptop and without a network: what tools/quickstart.sh runs.

It makes up texts, and then runs the stages that a user would, with flags that a user could type: a tokenizer, a base
model, supervised fine-tuning, reinforcement learning. After each stage the model is tried on problems that it has never
seen. Read `main` first: the rest of the file is what it calls, in order.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nanochat_jax import base, chat, report, rl, sft
from nanochat_jax.checkpoints import find
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import check_bounds
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.evals.eval_set import EvalSet, make_eval_set
from nanochat_jax.evals.evaluator import EvalResult, Evaluator
from nanochat_jax.evals.intervals import Share
from nanochat_jax.files.paths import BUNDLED, write_atomically
from nanochat_jax.flags.quickstart import QuickstartConfig
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.tasks import Arithmetic, CustomJSON
from nanochat_jax.tokenizer import train_tokenizer

TALKS = BUNDLED / "identity_conversations.jsonl"  # about the model itself
VOCAB_SIZE = 512
STORIES, REPEATS, HELD_OUT = 12_000, 20, 500  # texts for the base model, times that TALKS are, and for validation
DEMONSTRATIONS = 300  # solved problems that fine-tuning shows
PROBLEMS, SHOWN = 400, 3  # of the test split, which no stage trains on; how many of them with their answers
ANSWER_TOKENS = 64
ABOUT_ITSELF = ("Who are you?", "What can you do?")
# Of RL the smoothed reward: a step's own depends more on its 16 problems than on what was learned.
STEP = re.compile(r"step (\d+)/(\d+) \| (loss|reward) (?:\S+ \(smoothed )?([^\s)]+)")
BARS = "▁▂▃▄▅▆▇█"

# Sizes and rates found by trial for 2 cores. The base model's rates are scaled by sqrt(4096 / 524288) to this batch.
BASE = (
    *("--depth=2", "--aspect-ratio=48", "--head-dim=32", "--window-pattern=L", "--max-seq-len=128"),
    *("--num-iterations=150", "--total-batch-size=4096", "--warmup-steps=10"),
    *("--matrix-lr=0.2", "--embedding-lr=2", "--unembedding-lr=0.04", "--scalar-lr=5"),
    *("--eval-every=150", "--save-every=-1", "--sample-every=-1"),
)
SFT = (
    *("--smoltalk-epochs=0", "--mmlu-epochs=0", "--gsm8k-epochs=0"),
    *(f"--arithmetic-rows={DEMONSTRATIONS}", "--simple-spelling-rows=0", "--spelling-bee-rows=0"),
    *(f"--custom-json={TALKS}", "--num-iterations=170"),
    *("--matrix-lr=0.02", "--embedding-lr=0.2", "--init-lr-frac=0.5", "--load-optimizer=0"),
    *("--eval-every=-1", "--save-every=-1", "--chatcore-every=-1"),
)
RL = (
    *("--task=arithmetic", "--num-steps=70", f"--max-new-tokens={ANSWER_TOKENS}", "--device-batch-size=32"),
    *("--eval-every=-1", "--save-every=-1"),
)


def main(cfg: QuickstartConfig) -> int:
    """Run all stages -> the exit code: 0, or that of the stage that was stopped."""
    check_bounds(cfg)
    folder, began = new_folder(cfg.output), time.perf_counter()
    os.environ["NANOCHAT_BASE_DIR"] = str(folder.absolute())
    tour = Tour(Console(file=sys.stdout, highlight=False), folder, cfg.seed)
    tour.say(f"All of it goes to the folder {folder}, the full output of the stages to log.txt in it.")

    tour.heading("1. Texts and a tokenizer", "a model reads pieces of words, so first the most useful pieces are found")
    texts = documents(cfg.seed)
    write_shards(texts, folder / "base_data")
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    tokenizer.save(folder / "tokenizer")
    letters = sum(map(len, texts)) / sum(len(tokenizer.encode(text)) for text in texts)
    tour.done(f"{len(texts):,} texts, {tokenizer.vocab_size} tokens of {letters:.1f} letters on average", began)

    tour.heading(
        "2. Base model", "it learns to continue a text: questions without answers, and some lines about itself"
    )
    if code := tour.train(base, base.BaseConfig, BASE):
        return code
    config, params, _ = find.load_params(find.find_model("base"))
    evaluator = Evaluator(config, tokenizer, make_mesh(""), slots=PROBLEMS)  # of all models: they differ in parameters
    problems = make_eval_set("Arithmetic", Arithmetic("test", PROBLEMS, seed=cfg.seed), tokenizer)
    results = {"base model": tour.evaluate(evaluator, params, problems)}

    tour.heading(
        "3. Supervised fine-tuning (SFT)",
        f"it learns to answer, and to call the calculator, from {DEMONSTRATIONS} solved problems and conversations",
    )
    if code := tour.train(sft, sft.SFTConfig, SFT):
        return code
    _, params, _ = find.load_params(find.find_model("sft"))
    results["after SFT"] = tour.evaluate(evaluator, params, problems)
    tour.show_answers(evaluator, params, ABOUT_ITSELF)

    tour.heading(
        "4. Reinforcement learning (RL)",
        "demonstrations are few, problems are many: it tries new ones, and what turns out right becomes likelier",
    )
    if code := tour.train(rl, rl.RLConfig, RL):
        return code
    _, params, _ = find.load_params(find.find_model("rl"))
    results["after RL"] = tour.evaluate(evaluator, params, problems)

    tour.heading(
        "5. What it can do now",
        f"the first {SHOWN} problems that it solves, in brackets the calculator; only the last number was rewarded",
    )
    solved = results["after RL"][0].passed[:, 0]
    questions = [question_of(problem) for problem in itertools.compress(problems.conversations, solved)]
    tour.show_answers(evaluator, params, questions[:SHOWN])
    tour.say("Asked something that was not rewarded:")
    tour.show_answers(evaluator, params, ABOUT_ITSELF[:1])
    shares = {model: [result.accuracy for result in both] for model, both in results.items()}
    tour.show_shares(shares)
    write_atomically(folder / "shares.json", json.dumps(shares, indent=1).encode())
    report.write_pages(report.find_runs(folder), folder / "report.html")
    tour.say(f"Curves of all stages, for a browser:  {folder / 'report.html'}")
    tour.say(f"Talk to it:  {tour.command('chat', ('-i', 'rl'))}")
    tour.say(f"{time.perf_counter() - began:.0f} seconds in all")
    return 0


def new_folder(out: Path | None) -> Path:
    """Make the folder of this run. FileExistsError: there is something in it."""
    if out is None:
        for number in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                (out := Path(f"quickstart-{number}")).mkdir()
                return out
    out = out.expanduser()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"--output {out} must be a new or empty folder, there is something in it")
    return out


def documents(seed: int) -> list[str]:
    """Texts for the base model: questions of training problems, and what is said of the model itself, shuffled."""
    stories = Arithmetic("train", STORIES, seed=seed + 1)
    talks = CustomJSON(TALKS)
    texts = [question_of(stories[i]) for i in range(STORIES)]
    texts += ["\n".join(m["content"] for m in talks[i]["messages"]) for i in range(len(talks))] * REPEATS
    random.Random(seed).shuffle(texts)
    return texts


def question_of(conversation: dict) -> str:
    """The user's first message."""
    return conversation["messages"][0]["content"]


def write_shards(texts: list[str], folder: Path) -> None:
    """Two parquet files as `base` reads them, the second for validation."""
    folder.mkdir()
    for number, part in enumerate((texts[:-HELD_OUT], texts[-HELD_OUT:])):
        pq.write_table(pa.table({"text": part}), folder / f"shard_{number:05d}.parquet")


@dataclasses.dataclass(frozen=True)
class Tour:
    """Runs stages and models in one folder, and says on the screen what comes of it."""

    console: Console
    folder: Path
    seed: int

    def say(self, text: str, style: str = "") -> None:
        """Print a line, however long."""
        self.console.print(Text(text, style), soft_wrap=True)

    def heading(self, title: str, why: str) -> None:
        """Begin a stage, and say what it is for."""
        self.say("")
        self.say(f"{title}: {why}.", "bold")

    def done(self, what: str, began: float) -> None:
        """Say what a stage has done, and how long that took since `began`, of time.perf_counter."""
        self.say(f"{what} ({time.perf_counter() - began:.0f} s)")

    def command(self, module: str, flags: tuple[str, ...]) -> str:
        """What a user types to run a stage in the folder, from anywhere."""
        words = [sys.executable, "-m", f"nanochat_jax.{module}", *flags]
        return f"NANOCHAT_BASE_DIR={shlex.quote(str(self.folder.absolute()))} {shlex.join(words)}"

    def train(self, stage: Any, settings: type, flags: tuple[str, ...]) -> int:
        """Run the module of a stage, its output into the log and its steps as a bar -> its exit code."""
        flags = (*flags, f"--seed={self.seed}")
        command = self.command(stage.__name__.rpartition(".")[2], flags)
        self.say(command, "dim")
        began = time.perf_counter()
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log, StepBar(self.console) as bar:
            log.write(f"$ {command}\n")
            with contextlib.redirect_stdout(Tee(log, bar.line)):
                code = stage.main(parse(settings, [*flags]))
        self.done(bar.last, began)
        return code

    def evaluate(self, evaluator: Evaluator, params: Any, problems: EvalSet) -> list[EvalResult]:
        """Which answers are right: of the most likely ones, and of some drawn at temperature 1."""
        began = time.perf_counter()
        results = [
            evaluator.evaluate(params, problems, SamplingParams(temperature, 0, ANSWER_TOKENS), seed=self.seed)
            for temperature in (0.0, 1.0)
        ]
        right = f"right on {format_share(results[0].accuracy)} of {PROBLEMS} unseen problems"
        self.done(f"{right}, {results[0].cut:.1%} of the answers do not end", began)
        return results

    def show_answers(self, evaluator: Evaluator, params: Any, questions: Sequence[str]) -> None:
        """The questions, with the model's most likely answers. They are asked again and again, as often as there are
        problems to evaluate: another number of rows would be compiled anew, which takes longer."""
        empty, tokenizer = {"role": "assistant", "content": ""}, evaluator.tokenizer
        asked = [{"messages": [{"role": "user", "content": question}, empty]} for question in questions]
        prompts = [tokenizer.render_for_completion(conversation) for conversation in asked]
        rows = list(itertools.islice(itertools.cycle(prompts), PROBLEMS))
        groups = evaluator.engine.generate(params, rows, SamplingParams(0.0, 0, ANSWER_TOKENS))
        for question, (sample,) in zip(questions, groups):
            pieces = chat.Answer(tokenizer).pieces(zip(sample.tokens, sample.mask))
            answer = "".join(text for text, _ in pieces)
            self.say(question)
            self.say("  " + answer.replace("\n", "\n  "), "green")

    def show_shares(self, shares: dict[str, list[Share]]) -> None:
        """The table that ends the tour."""
        table = Table(title=f"right answers to {PROBLEMS} unseen problems (95 % interval)")
        for column in ("", "most likely answer", "drawn at temperature 1"):
            table.add_column(column)
        for model, both in shares.items():
            table.add_row(model, *map(format_share, both))
        self.console.print(table)


def format_share(share: Share) -> str:
    """A share with its interval, in per cent."""
    return f"{100 * share.value:.1f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


class Tee(io.TextIOBase):
    """Writes to a file, and gives every whole line to a function."""

    def __init__(self, file: TextIO, on_line: Callable[[str], None]):
        self.file, self.on_line, self.rest = file, on_line, ""

    def write(self, text: str) -> int:
        """Write to the file, and give the function what has become a whole line."""
        self.file.write(text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.on_line(line)
        return len(text)

    def flush(self) -> None:
        """Write to the disk what is not there yet."""
        if not self.file.closed:  # at the end of the process this one may be closed after it
            self.file.flush()


class StepBar(Progress):
    """Turns the lines of a stage's steps into a bar on a terminal, and into a few short ones elsewhere."""

    def __init__(self, console: Console):
        columns = BarColumn(20), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
        text = TextColumn("{task.description}", markup=False)
        quiet = not console.is_terminal
        super().__init__(*columns, text, console=console, transient=True, redirect_stdout=False, disable=quiet)
        self.last, self.values = "", []
        self.steps = self.add_task("compiling", total=None)

    def line(self, line: str) -> None:
        """Show a line of the stage's output, if it is about a step."""
        if not (found := STEP.match(line)):
            return
        step, total, name, value = int(found[1]), int(found[2]), found[3], found[4]
        self.values.append(float(value))
        self.last = f"{step} steps, {name} {value}"
        curve = sparkline(self.values, 30) if name == "reward" else ""
        self.update(self.steps, completed=step, total=total, description=f"{name} {value} {curve}")
        if not self.console.is_terminal and step % max(1, total // 5) == 0 and step < total:
            self.console.print(f"step {step} of {total}: {name} {value} {curve}".rstrip(), markup=False)


def sparkline(values: list[float], width: int) -> str:
    """A curve of at most `width` block characters, from the smallest mean of some values to the largest."""
    parts = np.array_split(np.array(values), min(width, len(values)))
    means = [part.mean() for part in parts if np.isfinite(part).all()]
    if not means:
        return ""
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BARS[min(7, int(8 * (mean - low) / span))] for mean in means)


if __name__ == "__main__":
    run_stage(main, parse(QuickstartConfig, prog="python -m nanochat_jax.quickstart"))
