"""Kill a training run at random moments, resume it each time, and compare its end with that of a run left alone.

python tools/check/kill_resume.py                                 # 1 and 8 CPU devices, SIGKILL and SIGTERM: 10 minutes
python tools/check/kill_resume.py --devices 8 --signals KILL --kills 3
python tools/check/kill_resume.py --stage base                    # pretraining, or rl; the default is sft

Prints a JSON line for every case, then a summary; exits with 1 where anything differs by a bit.
"""

import argparse
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

STAGES = {  # folder, flags of its name and of its length
    "sft": ("chatsft_checkpoints", "--output-tag", "--num-iterations"),
    "base": ("base_checkpoints", "--model-tag", "--num-iterations"),
    "rl": ("chatrl_checkpoints", "--output-tag", "--num-steps"),
}
WORK = {"rl": ("rollouts", "an update", "a save")}  # what a run is interrupted in, one after the other
STEP_AND_SAVE = ("a step", "a save")  # the other stages
PATIENCE = 20  # seconds to wait until it is at that
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tests.tiny


class Early:
    """A task on which any model gets rewards that differ: the share of letters before n in an answer."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict:
        texts = (("user", f"say {i}"), ("assistant", "a"))
        return {"messages": [{"role": role, "content": text} for role, text in texts]}

    def reward(self, conversation: dict, answer: str) -> float:
        return sum(c < "n" for c in answer) / max(1, len(answer))


def make_base(base: Path, stage: str) -> list[str]:
    """A base directory to train in -> flags of the run. SFT and RL start from the golden files where they are; what
    else is needed is tiny and random."""
    if stage == "base":
        return tiny_base_flags(base)
    golden = Path(os.environ.get("NANOCHAT_GOLDEN", ROOT.parent / "shared" / "golden"))
    if (golden / "checkpoints" / "c1_master").is_dir():
        shutil.copytree(golden / "checkpoints" / "c1_master", base, dirs_exist_ok=True)
        if stage == "rl":
            return rl_flags()
        shutil.copytree(golden / "sft_run" / "task_data", base / "task_data")
        return ["--mmlu-epochs", "2", "--gsm8k-epochs", "2", "--total-batch-size", "2048", "--eval-tokens", "2048"]
    from tests.support import tiny

    tiny.write_base(base)
    return rl_flags() if stage == "rl" else tiny_flags(base)


def rl_flags() -> list[str]:
    sizes = ["--examples-per-step", "4", "--num-samples", "4", "--max-new-tokens", "32", "--eval-every", "-1"]
    return ["--source", "base", "--task", "tools.check.kill_resume:Early", "--resample", *sizes]


def tiny_flags(base: Path) -> list[str]:
    from tests.support import tiny

    files = [tiny.write_conversations(base / f"{name}.jsonl", seed=i) for i, name in enumerate(("train", "val"))]
    return [*tiny.FLAGS, "--custom-json", str(files[0]), "--val-json", str(files[1]), "--eval-tokens", "512"]


def tiny_base_flags(base: Path) -> list[str]:
    from tests.support import tiny

    tiny.tokenizer().save(base / "tokenizer")
    return [*tiny.BASE_FLAGS, "--data-dir", str(tiny.write_shards(base / "shards")), "--eval-tokens", "512"]


def start(base: Path, tag: str, devices: int, flags: list[str], stage: str = "sft") -> subprocess.Popen:
    env = os.environ | {"NANOCHAT_BASE_DIR": str(base), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", f"nanochat_jax.{stage}", STAGES[stage][1], tag, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, **pipes)


def run_until(
    process: subprocess.Popen, pattern: str, delay: float, number: int, ready: Callable[[], bool] = lambda: True
) -> tuple[int, str]:
    """Send the signal `delay` seconds after the first line with `pattern`, or when after that the run is `ready`, at
    most PATIENCE later -> (exit code, everything it printed)."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            time.sleep(delay)
            latest = time.monotonic() + PATIENCE
            while not ready() and process.poll() is None and time.monotonic() < latest:
                time.sleep(0.002)
            process.send_signal(number)
            break
    rest, _ = process.communicate()
    return process.returncode, "".join(lines) + rest


def at_step(step: int, total: int) -> str:
    """Pattern of the lines of this step and those after it; the console is one step behind the device."""
    return "step 0*(" + "|".join(map(str, range(step, total + 1))) + ")/"


def unfinished(folder: Path) -> bool:
    """A save was interrupted: it has not been moved to its place, or not been sealed."""
    steps = [p for p in folder.glob("[0-9]*") if p.is_dir()]
    return any(not (p / "INTEGRITY.json").exists() for p in steps)


def at_work_on(folder: Path) -> str:
    """What the run in this folder is doing, or was when it was killed, by the files that it writes."""
    if unfinished(folder):
        return "a save"
    if not (folder / "rollouts.jsonl").exists():
        return "a step"
    answered, trained = (last_step(folder / name) for name in ("rollouts.jsonl", "metrics.jsonl"))
    return "an update" if answered > trained else "rollouts"  # a step's rollouts are on record before its update


def is_at(folder: Path, work: str) -> bool:
    return at_work_on(folder) == work


def last_step(file: Path) -> int:
    """Of the last whole line; 0 where there is none."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def killed_run(
    base: Path, tag: str, devices: int, flags: list[str], number: int, kills: int, total: int, rng, stage: str = "sft"
) -> dict:
    """Train to the end through `kills` interruptions: at random steps and moments, in turn during each kind of WORK;
    every fourth at a random moment of starting."""
    folder = base / STAGES[stage][0] / tag
    steps = sorted(rng.randint(1, total - 1) for _ in range(kills))
    kinds, codes, moments, resumed = WORK.get(stage, STEP_AND_SAVE), [], [], []
    for i, step in enumerate(steps):
        process = start(base, tag, devices, [*flags, "--resume"], stage)
        if i % 4 == 3:
            moments.append("the start")
            code, output = run_until(process, ".", rng.uniform(0, 5), number)
        else:
            ready = functools.partial(is_at, folder, kinds[(i - i // 4) % len(kinds)])
            code, output = run_until(process, at_step(step, total), rng.uniform(0, 0.6), number, ready)
            moments.append(at_work_on(folder))
        codes.append(code)
        resumed += re.findall(r"from step (\d+)", output)
        if code == 0:
            break
        if "error:" in output or "Traceback" in output:
            raise SystemExit(output)
    last = start(base, tag, devices, [*flags, "--resume"], stage)
    output, _ = last.communicate()
    if last.returncode:
        raise SystemExit(output)
    resumed += re.findall(r"from step (\d+)", output)
    return {"exit_codes": codes, "interrupted": moments, "resumed_from": [int(s) for s in resumed]}


def difference(one: Path, other: Path, total: int) -> dict:
    """What differs between the ends of two runs: arrays by name, steps by their recorded loss, in RL the rollouts."""
    from nanochat_jax.checkpoints import store
    from nanochat_jax.train import metrics

    arrays, compared = [], 0
    for item in ("params", "optimizer"):
        a, b = (store.read_arrays(folder / str(total), item) for folder in (one, other))
        if a.keys() != b.keys():
            raise SystemExit(f"{item}: {sorted(a.keys() ^ b.keys())} is in one run only")
        arrays += [f"{item}/{name}" for name in a if np.asarray(a[name]).tobytes() != np.asarray(b[name]).tobytes()]
        compared += len(a)
    a, b = (
        {r["step"]: r["loss"] for r in metrics.read_metrics(folder / "metrics.jsonl") if "loss" in r}
        for folder in (one, other)
    )
    steps = [step for step in sorted(a.keys() | b.keys()) if a.get(step) != b.get(step)]
    found = {"arrays_compared": compared, "arrays_that_differ": arrays, "steps_whose_loss_differs": steps}
    if (one / "rollouts.jsonl").exists():
        found["rollouts_differ"] = (one / "rollouts.jsonl").read_bytes() != (other / "rollouts.jsonl").read_bytes()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=tuple(STAGES), default="sft")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--signals", nargs="+", choices=("KILL", "TERM"), default=["KILL", "TERM"])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        flags = make_base(base, args.stage)
        flags += [STAGES[args.stage][2], str(args.steps), "--save-every", str(args.save_every)]
        flags += [] if args.stage == "rl" else ["--eval-every", "20"]
        for devices in args.devices:
            flags_now = [*flags, "--device-batch-size", "1"]
            began = time.perf_counter()
            alone = start(base, f"alone{devices}", devices, flags_now, args.stage)
            output, _ = alone.communicate()
            if alone.returncode:
                raise SystemExit(output)
            seconds = time.perf_counter() - began
            for name in args.signals:
                number, tag = getattr(signal, f"SIG{name}"), f"{name.lower()}{devices}"
                rng = random.Random(args.seed + devices)
                case = {"devices": devices, "signal": name, "uninterrupted_seconds": round(seconds, 1)}
                case |= killed_run(base, tag, devices, flags_now, number, args.kills, args.steps, rng, args.stage)
                runs = base / STAGES[args.stage][0]
                case |= difference(runs / f"alone{devices}", runs / tag, args.steps)
                same = ("arrays_that_differ", "steps_whose_loss_differs", "rollouts_differ")
                case["identical"] = not any(case.get(name) for name in same)
                print(json.dumps(case), flush=True)
                results.append(case)
    same = sum(case["identical"] for case in results)
    kills = sum(code != 0 for case in results for code in case["exit_codes"])  # 0: it was done before the signal came
    print(f"{same} of {len(results)} cases end bit-identical to the uninterrupted run, after {kills} kills")
    return 0 if same == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
