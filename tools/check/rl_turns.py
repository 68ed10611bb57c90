"""What a second try is worth: RL on word problems with one answer and with two. Prints a JSON line a run: its curves,
and how many held-out problems are solved in the end, at the first answer and at the second at the latest.

python tools/check/rl_turns.py --out /tmp/rl_turns --seeds 0 1 2 > rl_turns.jsonl

It starts from the quickstart's model. A run that is there already is not trained again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import tyro
from rl_long import quickstart_model, tag_of, train

SETTINGS = (
    *("--task=secondtry", "--max-new-tokens=160", "--device-batch-size=32", "--save-every=-1", "--log-rollouts=1"),
    *("--eval-examples=200", "--eval-samples=2"),
)
VARIANTS = {"one answer": ("--max-turns=1",), "two answers": ("--max-turns=2",)}
PROBLEMS, ANSWERS = 400, 4


def solved(folder: Path, source: tuple[str, ...], turns: int) -> dict[str, float]:
    """The share of held-out problems that a model of the folder solves with so many answers, with its 95 % interval."""
    file = folder / f"{'_'.join(source).replace('-', '')}_{turns}.json"
    if not file.exists():
        drawn = ("-t", "1.0", "-n", str(ANSWERS), "-x", str(PROBLEMS), "-m", "160", "--max-turns", str(turns))
        command = [sys.executable, "-m", "nanochat_jax.eval", *source, "-a", "SecondTry", *drawn, "--json", str(file)]
        environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder.absolute())}
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
    return json.loads(file.read_text())["tasks"]["SecondTry"]["accuracy"]


def main(out: Path, seeds: tuple[int, ...] = (0, 1, 2), steps: int = 100) -> None:
    """out: folder of the models and runs, made where it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        folder = out / f"seed-{seed}"
        quickstart_model(folder, seed)
        before = {f"solved_by_{turns}": solved(folder, ("-i", "sft"), turns) for turns in (1, 2)}
        print(json.dumps({"variant": "before RL", "seed": seed} | before), flush=True)
        for name, own in VARIANTS.items():
            line = train(folder, name, (*SETTINGS, *own), seed, steps)
            source = ("-i", "rl", "-g", tag_of(name))
            line |= {f"solved_by_{turns}": solved(folder, source, turns) for turns in (1, 2)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
