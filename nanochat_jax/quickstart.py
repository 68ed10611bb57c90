"""From nothing to a chat model in minutes, on any laptop and without a network: what tools/quickstart.sh runs.

It writes a small world of texts, and then runs the stages that a user would, with flags that a user could type: a
tokenizer, a base model, supervised fine-tuning, reinforcement learning, and after each problems that none has seen.
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nanochat_jax import base, chat, report, rl, sft
from nanochat_jax.checkpoints import find
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli import settings as cli_settings
from nanochat_jax.cli.settings import Maybe, require
from nanochat_jax.distributed import mesh
from nanochat_jax.evals import eval_set, evaluator
from nanochat_jax.evals.intervals import Share
from nanochat_jax.files.paths import write_atomically
from nanochat_jax.inference.samples import SamplingParams
from nanochat_jax.tasks import Arithmetic, SimpleSpelling
from nanochat_jax.tokenizer import Tokenizer, train_tokenizer

BUNDLED = Path(__file__).parent / "bundled"  # words, and conversations about the model itself
VOCAB_SIZE = 512
STORIES, SPELLINGS, HELD_OUT = 12_000, 3_000, 500  # documents for the base model, and of these for its validation
DEMONSTRATIONS = 150  # solved problems that fine-tuning shows
PROBLEMS = 400  # of the test split, to judge by
ANSWER_TOKENS = 80
ASKED = ("Who are you?", "What can you do?")
STEP = re.compile(r"step (\d+)/(\d+) \| (loss|reward) (\S+)")
BARS = "▁▂▃▄▅▆▇█"

# Sizes and rates found by trial for 2 cores. The base model's rates are scaled by sqrt(4096 / 524288) to this batch.
BASE = (
    *("--depth=2", "--aspect-ratio=48", "--head-dim=32", "--window-pattern=L", "--max-seq-len=128"),
    *("--num-iterations=200", "--total-batch-size=4096", "--warmup-steps=10"),
    *("--matrix-lr=0.2", "--embedding-lr=2", "--unembedding-lr=0.04", "--scalar-lr=5"),
    *("--eval-every=100", "--save-every=-1", "--sample-every=-1"),
)
SFT = (
    *("--smoltalk-epochs=0", "--mmlu-epochs=0", "--gsm8k-epochs=0"),
    *(f"--arithmetic-rows={DEMONSTRATIONS}", "--simple-spelling-rows=150", "--spelling-bee-rows=0"),
    *(f"--custom-json={BUNDLED / 'identity_conversations.jsonl'}", f"--data-dir={BUNDLED}"),
    *("--num-iterations=250", "--matrix-lr=0.02", "--embedding-lr=0.2", "--init-lr-frac=0.5", "--load-optimizer=0"),
    *("--eval-every=-1", "--save-every=-1", "--chatcore-every=-1"),
)
RL = (
    *("--task=arithmetic", "--num-steps=100", "--max-new-tokens=80", "--top-k=0"),
    *("--init-lr-frac=0.25", "--embedding-lr=0.005", "--scalar-lr=0.005"),
    *("--device-batch-size=32", "--eval-every=-1", "--save-every=-1"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Train a tokenizer, a base model and a chat model on word problems, in minutes and without a network."""

    out: Maybe[Path] = None  # new folder for all it makes; default: quickstart-1, or the next number that is free
    seed: int = 0  # texts, first weights, order and draws: another seed is another model


def main(cfg: QuickstartConfig) -> int:
    """Run all stages -> the exit code: 0, or that of the stage that was stopped."""
    require(0 <= cfg.seed < 2**31, f"--seed must be from 0 to {2**31 - 1}, got {cfg.seed}")
    out, began = new_folder(cfg.out), time.perf_counter()
    os.environ["NANOCHAT_BASE_DIR"] = str(out.absolute())
    tour = Tour(Console(file=sys.stdout, highlight=False), out, cfg.seed)
    tour.say(f"All of it goes to the folder {out}, the full output of the stages to log.txt in it.")

    tour.heading("1. Texts and a tokenizer", "a model reads pieces of words, so first the most useful pieces are found")
    tokenizer = tour.tokenizer()

    tour.heading("2. Base model", "it learns to go on with a text: questions without answers, and spelled words")
    if code := tour.stage(base, base.BaseConfig, BASE):
        return code
    tour.judge("base", "base model", tokenizer)

    tour.heading(
        "3. Supervised fine-tuning (SFT)",
        f"it learns to answer, and to call the calculator, from {DEMONSTRATIONS} solved problems and a few talks",
    )
    if code := tour.stage(sft, sft.SFTConfig, SFT):
        return code
    tour.judge("sft", "after SFT", tokenizer)
    spelling = SimpleSpelling("test", 1, data_dir=BUNDLED)[0]["messages"][0]["content"]
    tour.show_answers(tokenizer, [spelling, *ASKED])

    tour.heading(
        "4. Reinforcement learning (RL)",
        "demonstrations are few, problems are many: it tries new ones, and what turns out right becomes likelier",
    )
    if code := tour.stage(rl, rl.RLConfig, RL):
        return code
    tour.judge("rl", "after RL", tokenizer)

    tour.heading("5. What it can do now", "its most likely answers; in brackets what the calculator was asked and said")
    tour.show_answers(tokenizer, tour.questions[:3])
    tour.say("Only word problems were rewarded, so other answers may have suffered:")
    tour.show_answers(tokenizer, ASKED[:1])
    tour.show_shares()
    write_atomically(out / "report.html", report.page(report.find_runs(out)).encode())
    tour.say(f"Curves of all stages, for a browser:  {out / 'report.html'}")
    tour.say(f"Talk to it:  {tour.command('chat', ('-i', 'rl'))}")
    tour.say(f"{time.perf_counter() - began:.0f} seconds in all")
    return 0


def new_folder(out: Path | None) -> Path:
    """Make the folder of this run. FileExistsError: there is something in it."""
    if out is None:
        number = 1
        while True:
            with contextlib.suppress(FileExistsError):
                (out := Path(f"quickstart-{number}")).mkdir()
                return out
            number += 1
    out = out.expanduser()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"--out {out} must be a new or empty folder, there is something in it")
    return out


def documents(seed: int) -> list[str]:
    """Texts for the base model: questions of training problems, and spelled words, shuffled."""
    stories = Arithmetic("train", STORIES, seed=seed + 1)
    spellings = SimpleSpelling("train", SPELLINGS, data_dir=BUNDLED)
    texts = [stories[i]["messages"][0]["content"] for i in range(STORIES)]
    texts += ["\n".join(m["content"] for m in spellings[i]["messages"]) for i in range(SPELLINGS)]
    random.Random(seed).shuffle(texts)
    return texts


def write_shards(texts: list[str], folder: Path) -> None:
    """Two parquet files as `base` reads them, the second for validation."""
    folder.mkdir()
    for number, part in enumerate((texts[:-HELD_OUT], texts[-HELD_OUT:])):
        pq.write_table(pa.table({"text": part}), folder / f"shard_{number:05d}.parquet")


class Tee(io.TextIOBase):
    """Writes to a file, and gives every whole line to a function."""

    def __init__(self, file, line):
        self.file, self.line, self.rest = file, line, ""

    def write(self, text: str) -> int:
        self.file.write(text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.line(line)
        return len(text)

    def flush(self) -> None:
        if not self.file.closed:  # at the end of the process this one may be closed after it
            self.file.flush()


class StepBar:
    """Turns the lines of a stage's steps into a bar on a terminal, and into a few short ones elsewhere."""

    def __init__(self, console: Console):
        self.console, self.last, self.values = console, "", []
        columns = BarColumn(20), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
        text = TextColumn("{task.description}", markup=False)
        quiet = {"transient": True, "redirect_stdout": False, "disable": not console.is_terminal}
        self.progress = Progress(*columns, text, console=console, **quiet)
        self.task = self.progress.add_task("compiling", total=None)

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def line(self, line: str) -> None:
        """Show a line of the stage's output, if it tells of a step."""
        if not (found := STEP.match(line)):
            return
        step, total, what = int(found[1]), int(found[2]), f"{found[3]} {found[4]}"
        self.values.append(float(found[4]))
        self.last = f"{step} steps, {what}"
        curve = sparkline(self.values, 30) if found[3] == "reward" else ""
        self.progress.update(self.task, completed=step, total=total, description=f"{what} {curve}")
        if not self.console.is_terminal and step % max(1, total // 5) == 0 and step < total:
            self.console.print(f"step {step} of {total}: {what} {curve}".rstrip(), markup=False)


def sparkline(values: list[float], width: int) -> str:
    """A curve of at most `width` block characters, from the smallest mean of some values to the largest."""
    parts = np.array_split(np.array(values), min(width, len(values)))
    means = [part.mean() for part in parts if np.isfinite(part).all()]
    if not means:
        return ""
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BARS[min(7, int(8 * (mean - low) / span))] for mean in means)


class Tour:
    """The stages in one folder, and what is told of them."""

    def __init__(self, console: Console, out: Path, seed: int):
        self.console, self.out, self.seed = console, out, seed
        self.shares: dict[str, list[Share]] = {}  # after a stage: right answers, most likely and drawn
        self.evaluator = None

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style), soft_wrap=True)

    def command(self, module: str, flags: tuple[str, ...]) -> str:
        """What a user types to run a stage in the folder, from anywhere."""
        words = [sys.executable, "-m", f"nanochat_jax.{module}", *flags]
        return f"NANOCHAT_BASE_DIR={shlex.quote(str(self.out.absolute()))} {shlex.join(words)}"

    def heading(self, title: str, why: str) -> None:
        self.say("")
        self.say(f"{title}: {why}.", "bold")

    def tokenizer(self) -> Tokenizer:
        """Write the texts, and the tokenizer that is trained on them."""
        began, texts = time.perf_counter(), documents(self.seed)
        tokenizer = train_tokenizer(texts, VOCAB_SIZE)
        tokenizer.save(self.out / "tokenizer")
        write_shards(texts, self.out / "base_data")
        letters = sum(map(len, texts)) / sum(len(tokenizer.encode(text)) for text in texts)
        self.done(f"{len(texts):,} texts, {tokenizer.vocab_size} tokens of {letters:.1f} letters on average", began)
        return tokenizer

    def stage(self, module, settings: type, flags: tuple[str, ...]) -> int:
        """Run a stage, its output into the log and its steps as a bar -> its exit code."""
        flags = (*flags, f"--seed={self.seed}")
        command = self.command(module.__name__.rpartition(".")[2], flags)
        self.say(command, "dim")
        began = time.perf_counter()
        with open(self.out / "log.txt", "a", encoding="utf-8") as log, StepBar(self.console) as bar:
            log.write(f"$ {command}\n")
            with contextlib.redirect_stdout(Tee(log, bar.line)):
                code = module.main(cli_settings.parse(settings, [*flags]))
        self.done(bar.last, began)
        return code

    def judge(self, source: str, name: str, tokenizer: Tokenizer, tag: str | None = None) -> None:
        """Put the unseen problems to the model that the last stage has made; shares.json keeps what comes of it."""
        began = time.perf_counter()
        model_config, params, _ = find.load_params(find.find_model(source, tag))
        if self.evaluator is None:
            self.problems = eval_set.make_eval_set(
                "Arithmetic", Arithmetic("test", PROBLEMS, seed=self.seed), tokenizer
            )
            self.evaluator = evaluator.Evaluator(model_config, tokenizer, mesh.make_mesh(""), slots=PROBLEMS)
        self.evaluator.load(params)
        drawn = [SamplingParams(temperature, 0, ANSWER_TOKENS) for temperature in (0.0, 1.0)]
        shares = [self.evaluator.evaluate_set(self.problems, how, seed=self.seed).accuracy for how in drawn]
        self.shares[name] = shares
        write_atomically(self.out / "shares.json", json.dumps(self.shares, indent=1).encode())
        self.done(f"right on {spoken(shares[0])} of {PROBLEMS} unseen problems", began)

    @property
    def questions(self) -> list[str]:
        """The unseen problems that the models are judged by."""
        return [conversation["messages"][0]["content"] for conversation in self.problems.conversations]

    def show_answers(self, tokenizer: Tokenizer, questions: Sequence[str]) -> None:
        """The questions, with the most likely answers of the model that was judged last."""
        empty = {"role": "assistant", "content": ""}
        asked = [{"messages": [{"role": "user", "content": question}, empty]} for question in questions]
        prompts = [tokenizer.render_for_completion(conversation) for conversation in asked]
        groups = self.evaluator.engine.generate(prompts, SamplingParams(0.0, 0, ANSWER_TOKENS))
        for question, (sample,) in zip(questions, groups):
            pieces = chat.Answer(tokenizer).pieces(zip(sample.tokens, sample.mask))
            answer = "".join(text for text, _ in pieces)
            self.say(question)
            self.say("  " + answer.replace("\n", "\n  "), "green")

    def show_shares(self) -> None:
        """The table that ends the tour."""
        table = Table(title=f"right answers to {PROBLEMS} unseen problems (95 % interval)")
        for column in ("", "most likely answer", "drawn at temperature 1"):
            table.add_column(column)
        for name, shares in self.shares.items():
            table.add_row(name, *map(spoken, shares))
        self.console.print(table)

    def done(self, what: str, began: float) -> None:
        self.say(f"{what} ({time.perf_counter() - began:.0f} s)")


def spoken(share: Share) -> str:
    return f"{100 * share.value:.1f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


if __name__ == "__main__":
    cli_main.run_stage(main, cli_settings.parse(QuickstartConfig, prog="python -m nanochat_jax.quickstart"))
