"""The quickstart beside its control: the time that RL takes, spent on more fine-tuning. Prints a JSON line
a seed, after some minutes.

python tools/check/quickstart_control.py --out /tmp/control --seeds 0 1 2
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from nanochat_jax import quickstart, sft
from nanochat_jax.checkpoints import find
from nanochat_jax.cli.command_line import parse
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.evals.eval_set import make_eval_set
from nanochat_jax.evals.evaluator import Evaluator
from nanochat_jax.quickstart import QuickstartConfig, Tour
from nanochat_jax.tasks import Arithmetic
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.metrics import read_metrics


def seconds_of(folder: Path) -> float:
    """What a run's steps took, without the longest: the first, which waits for compiling."""
    return sum(sorted(r["seconds"] for r in read_metrics(folder / "metrics.jsonl") if "seconds" in r)[:-1])


def share_by_name(share: Sequence[float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), share))


def compare(folder: Path, seed: int) -> dict[str, Any]:
    """Run the quickstart and its control in the folder -> seconds, steps, and shares of right answers."""
    if code := quickstart.main(QuickstartConfig(seed=seed, output=folder)):
        raise SystemExit(code)
    spent = {name: seconds_of(folder / f"chat{name}_checkpoints/d2") for name in ("sft", "rl")}
    steps = parse(sft.SFTConfig, [*quickstart.SFT]).num_iterations
    longer = round(steps * (1 + spent["rl"] / spent["sft"]))
    tour = Tour(Console(file=sys.stderr), folder, seed)
    flags = (*quickstart.SFT, f"--num-iterations={longer}", "--output-tag=control")  # the last of a flag counts
    if code := tour.train(sft, sft.SFTConfig, flags):
        raise SystemExit(code)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    config, params, _ = find.load_params(find.find_model("sft", "control"))
    evaluator = Evaluator(config, tokenizer, make_mesh(""), slots=quickstart.PROBLEMS)
    problems = make_eval_set("Arithmetic", Arithmetic("test", quickstart.PROBLEMS, seed=seed), tokenizer)
    shares = json.loads((folder / "shares.json").read_text())
    shares["control"] = [result.accuracy for result in tour.evaluate(evaluator, params, problems)]
    named = {
        stage: {"greedy": share_by_name(greedy), "temperature 1": share_by_name(drawn)}
        for stage, (greedy, drawn) in shares.items()
    }
    return {"seed": seed, "sft_steps": steps, "control_steps": longer, "seconds": spent} | named


def main(out: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """out: folder to make; each seed's quickstart is a folder in it."""
    out.mkdir(parents=True)
    for seed in seeds:
        with contextlib.redirect_stdout(sys.stderr):
            result = compare(out / f"seed-{seed}", seed)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
