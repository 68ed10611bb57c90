"""The quickstart beside its control: the time that RL takes, spent on more fine-tuning. Prints a JSON line a seed.

python tools/check/quickstart_control.py --out /tmp/control --seeds 0 1 2
"""

import json
import os
import sys
from pathlib import Path

import tyro
from rich.console import Console

from nanochat_jax import quickstart, sft
from nanochat_jax.checkpoints import find
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.evals.eval_set import make_eval_set
from nanochat_jax.evals.evaluator import Evaluator
from nanochat_jax.quickstart import QuickstartConfig, Tour
from nanochat_jax.tasks import Arithmetic
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.metrics import read_metrics


def seconds_of(folder: Path) -> float:
    """What a run's steps took, without compiling, which the first of them waits for."""
    return sum(
        sorted(record["seconds"] for record in read_metrics(folder / "metrics.jsonl") if "seconds" in record)[:-1]
    )


def main(out: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """out: folder to make; each seed's quickstart is a folder in it."""
    out.mkdir(parents=True)
    for seed in seeds:
        folder = out / f"seed-{seed}"
        stdout, sys.stdout = sys.stdout, sys.stderr  # the tour is not what this prints
        try:
            if code := quickstart.main(QuickstartConfig(seed=seed, out=folder)):
                raise SystemExit(code)
            shares = json.loads((folder / "shares.json").read_text())
            spent = {name: seconds_of(folder / f"chat{name}_checkpoints/d2") for name in ("sft", "rl")}
            (number,) = (flag for flag in quickstart.SFT if flag.startswith("--num-iterations="))
            steps = int(number.partition("=")[2])
            longer = round(steps * (1 + spent["rl"] / spent["sft"]))
            flags = [flag for flag in quickstart.SFT if flag != number]
            os.environ["NANOCHAT_BASE_DIR"] = str(folder.absolute())
            tour = Tour(Console(file=sys.stderr), folder, seed)
            if code := tour.train(sft, sft.SFTConfig, (*flags, f"--num-iterations={longer}", "--output-tag=control")):
                raise SystemExit(code)
            tokenizer = Tokenizer.load(folder / "tokenizer")
            config, params, _ = find.load_params(find.find_model("sft", "control"))
            task = Arithmetic("test", quickstart.PROBLEMS, seed=seed)
            evaluator = Evaluator(config, tokenizer, make_mesh(""), slots=quickstart.PROBLEMS)
            problems = make_eval_set("Arithmetic", task, tokenizer)
            shares["control"] = tour.evaluate(evaluator, params, problems)
        finally:
            sys.stdout = stdout
        names = ("value", "low", "high")
        result = {
            stage: {how: dict(zip(names, share)) for how, share in zip(("greedy", "temperature 1"), pair)}
            for stage, pair in shares.items()
        }
        print(
            json.dumps({"seed": seed, "sft_steps": steps, "control_steps": longer, "seconds": spent, **result}),
            flush=True,
        )


if __name__ == "__main__":
    tyro.cli(main)
