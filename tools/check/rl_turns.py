"""What further turns are worth: RL on tasks that answer back, with one answer and with several. Prints a JSON line a
run: its curves, and the share of held-out problems that are solved before and after it, with the 95 % interval.

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

LIMIT = "300"  # new tokens, of all turns together
SETTINGS = (
    *(f"--max-new-tokens={LIMIT}", "--max-seq-len=384", "--device-batch-size=16", "--save-every=-1"),
    *("--log-rollouts=1", "--eval-examples=128", "--eval-samples=2"),
)
VARIANTS = {  # the task, and how many answers the model may give
    "word problems, one answer": ("SecondTry", 1),
    "word problems, two answers": ("SecondTry", 2),
    "guessing, one answer": ("GuessNumber", 1),
    "guessing, six answers": ("GuessNumber", 6),
}
ANSWERS = 4  # conversations about each held-out problem


def solved(folder: Path, source: tuple[str, ...], task: str, turns: int) -> dict[str, float]:
    """The share of held-out problems that a model of the folder solves with so many answers."""
    file = folder / f"{'_'.join(source[1::2])}_{task}_{turns}.json"
    if not file.exists():
        drawn = ("-t", "1.0", "-n", str(ANSWERS), "-m", LIMIT, "--max-turns", str(turns), "--json", str(file))
        command = [sys.executable, "-m", "nanochat_jax.eval", *source, "-a", task, *drawn]
        environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder.absolute())}
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
    return json.loads(file.read_text())["tasks"][task]["accuracy"]


def main(
    out: Path, seeds: tuple[int, ...] = (0, 1, 2), variants: tuple[str, ...] = tuple(VARIANTS), steps: int = 100
) -> None:
    """out: folder of the models and runs, made where it is not there; variants: names of VARIANTS."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        folder = out / f"seed-{seed}"
        quickstart_model(folder, seed)
        for name in variants:
            task, turns = VARIANTS[name]
            own = (*SETTINGS, f"--task={task}", f"--max-turns={turns}")
            before = {"before": solved(folder, ("-i", "sft"), task, turns)}
            line = train(folder, name, own, seed, steps) | before
            line["after"] = solved(folder, ("-i", "rl", "-g", tag_of(name)), task, turns)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
