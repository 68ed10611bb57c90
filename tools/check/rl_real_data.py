"""Reinforcement learning on GSM8K end to end, from data that lies in ../shared: a small base model of its questions,
fine-tuning on its solutions, RL that is killed (SIGKILL) halfway and resumed, and an evaluation. Prints one JSON line;
what the stages say goes to stderr.

python tools/check/rl_real_data.py --out /tmp/rl_real
python tools/check/rl_real_data.py --out /tmp/hopeless --checkpoint ../shared/golden/checkpoints/c1_master \
    --sft-iterations 0 --num-steps 4      # random weights: no answer is right, and nothing may move
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from kill_resume import Run, at_step, run_until

from nanochat_jax.checkpoints.find import find_model, load_params
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.quickstart import write_shards
from nanochat_jax.tasks import GSM8K
from nanochat_jax.tasks.gsm8k import final_answer
from nanochat_jax.tokenizer import train_tokenizer
from nanochat_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 1024
MODEL = ("--depth", 4, "--aspect-ratio", 32, "--head-dim", 32, "--max-seq-len", 512)
FAST = ("--matrix-lr", 0.2, "--embedding-lr", 2, "--unembedding-lr", 0.04, "--scalar-lr", 5)  # for few small batches
GENTLE = ("--matrix-lr", 0.02, "--embedding-lr", 0.2)
OF_A_STEP = ("reward", "pass_rate", "no_signal", "length_mean", "cut", "tool_calls", "tool_failed", "grad_norm")


def main(
    out: Path,
    checkpoint: Path | None = None,
    data: Path = ROOT.parent / "shared/data/hub",
    base_iterations: int = 100,
    sft_iterations: int = 200,
    num_steps: int = 10,
    problems: int = 400,
    seed: int = 42,
) -> None:
    """out: base directory to make (must not exist); checkpoint: nanochat base directory to start from, in place of a
    base model of depth 4 that is trained here; data: mirror of the datasets; sft_iterations: 0 = RL of the base model;
    problems: of GSM8K's test split, the first, to judge by."""
    out, seconds, result = out.absolute(), {}, {}
    os.environ |= {"NANOCHAT_BASE_DIR": str(out), "JAX_PLATFORMS": "cpu"}
    jax.config.update("jax_platforms", "cpu")  # in this process the variable is read already
    if checkpoint:
        shutil.copytree(checkpoint, out)
    else:
        questions = write_texts(out, data)
        length = ("--num-iterations", base_iterations, "--warmup-steps", 10, "--total-batch-size", 4096)
        often = ("--eval-every", -1, "--save-every", -1, "--sample-every", -1, "--seed", seed)
        seconds["base"] = run("base", "--data-dir", questions, *MODEL, *length, *FAST, *often)
    common = ("--data-dir", data, "--seed", seed)
    source = "sft" if sft_iterations else "base"
    if sft_iterations:
        mixture = ("--smoltalk-epochs", 0, "--mmlu-epochs", 0, "--simple-spelling-rows", 0, "--spelling-bee-rows", 0)
        often = ("--eval-every", 100, "--eval-tokens", 65536, "--chatcore-every", -1, "--save-every", -1)
        sizes = ("--num-iterations", sft_iterations, "--init-lr-frac", 0.5, "--load-optimizer", 0, *GENTLE)
        seconds["sft"] = run("sft", "--gsm8k-epochs", 4, *mixture, *sizes, *often, *common)
        records = read_metrics(find_model("sft", base=out).folder / "metrics.jsonl")
        result["sft_val_bpb"] = {r["step"]: round(r["val_bpb"], 4) for r in records if "val_bpb" in r}
    result["before"], seconds[f"eval_{source}"] = evaluate(source, out, problems, common)

    sizes = ("--num-steps", num_steps, "--save-every", 2, "--device-batch-size", 16, "--log-rollouts", 16)
    often = ("--eval-every", num_steps, "--eval-examples", 64, "--eval-samples", 4)
    rates = ("--init-lr-frac", 0.25, "--embedding-lr", 0.005, "--scalar-lr", 0.005)  # the quickstart's, for few weights
    flags = [str(flag) for flag in ("--source", source, *sizes, *often, *rates, *common)]
    rl, began = Run("rl", "gsm8k", out, 1, flags), time.perf_counter()
    code, output = run_until(rl.start(), at_step(num_steps // 2 + 1, num_steps), 0.5, signal.SIGKILL)
    sys.stderr.write(output)
    if code != -signal.SIGKILL:
        raise SystemExit(f"RL ended with {code}, for -9")
    again = rl.to_end("--resume")
    sys.stderr.write(again)
    seconds["rl"] = round(time.perf_counter() - began, 1)
    result["rl"] = history(rl.folder) | {"resumed_from": [int(s) for s in re.findall(r"from step (\d+)", again)]}
    result["rl"]["weights_moved"] = moved(*(weights_of(stage, out) for stage in (source, "rl")))
    result["rl"] |= kept_answers(rl.folder)
    result["after"], seconds["eval_rl"] = evaluate("rl", out, problems, common)
    print(json.dumps(result | {"seconds": seconds}))


def write_texts(out: Path, data: Path) -> Path:
    """A tokenizer, and parquet files of GSM8K's questions (training split) for a base model -> their folder."""
    task = GSM8K("train", data_dir=data)
    table = [task[i]["messages"] for i in range(len(task))]
    questions = [user["content"] for user, _ in table]
    answers = ["".join(part["text"] for part in assistant["content"]) for _, assistant in table]
    train_tokenizer(questions + answers, VOCAB_SIZE).save(out / "tokenizer")
    write_shards(questions, out / "base_data")
    return out / "base_data"


def run(module: str, *flags: Any) -> float:
    """Run a stage, its output on stderr -> the seconds that it took. SystemExit: it fails."""
    began = time.perf_counter()
    command = [sys.executable, "-m", f"nanochat_jax.{module}", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)
    return round(time.perf_counter() - began, 1)


def evaluate(stage: str, out: Path, problems: int, common: tuple) -> tuple[dict, float]:
    """(GSM8K with the most likely answers, as `nanochat_jax.eval` judges them; seconds)"""
    report = out / f"gsm8k_{stage}.json"
    seconds = run("eval", "-i", stage, "-a", "GSM8K", "-x", problems, "-m", 256, "--json", report, *common)
    task = json.loads(report.read_text())["tasks"]["GSM8K"]
    share = {name: round(value, 4) for name, value in task["accuracy"].items()}
    return share | {"problems": task["problems"], "cut": round(task["cut"], 4)}, seconds


def weights_of(stage: str, out: Path) -> dict[str, np.ndarray]:
    _, params, _ = load_params(find_model(stage, base=out))
    return {name: np.asarray(leaf, np.float64) for name, leaf in flatten_by_path(params).items()}


def moved(before: dict, after: dict) -> float:
    """|after - before| / |before|, over all parameters."""
    squares = [sum(float(np.sum((after[n] - s * before[n]) ** 2)) for n in before) for s in (1, 0)]
    base = sum(float(np.sum(before[n] ** 2)) for n in before)
    return round((squares[0] / base) ** 0.5, 6)


def history(folder: Path) -> dict:
    """The run's steps and measurements, from its metrics.jsonl."""
    records = read_metrics(folder / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    found = {name: [round(r[name], 4) for r in steps] for name in OF_A_STEP}
    found["delta_logp_mean"] = [r.get("delta_logp_mean") for r in steps]
    found["steps_without_signal"] = steps[-1]["steps_without_signal"]
    measured = [r for r in records if "pass@1" in r]
    found["pass_at"] = {r["step"]: {k: round(v, 4) for k, v in r.items() if k.startswith("pass@")} for r in measured}
    return found


def kept_answers(folder: Path) -> dict:
    """Of rollouts.jsonl: how many answers there are, end with a number, are right; and the first that is."""
    with (folder / "rollouts.jsonl").open(encoding="utf-8") as lines:
        kept = [json.loads(line) for line in lines]
    right = [record for record in kept if record["reward"] > 0]
    return {
        "answers": len(kept),
        "with_a_number": sum(final_answer(record["text"]) is not None for record in kept),
        "right": len(right),
        "a_right_one": right[0]["text"] if right else None,
    }


if __name__ == "__main__":
    tyro.cli(main)
