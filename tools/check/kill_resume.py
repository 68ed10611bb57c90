"""Kill a training run at random moments, resume it each time, and compare its end with that of a run left alone.

python tools/check/kill_resume.py                                 # 1 and 8 CPU devices, SIGKILL and SIGTERM: 10 minutes
python tools/check/kill_resume.py --devices 8 --signals KILL --kills 3
python tools/check/kill_resume.py --stage base                    # pretraining, or rl; the default is sft

Prints a JSON line for every case, then a summary; exits with 1 where anything differs by a bit.
"""

import argparse
import dataclasses
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

import jax
import numpy as np

from nanochat_jax.checkpoints import store
from nanochat_jax.train.metrics import read_metrics

STAGES = {  # folder, flags of its name and of its length
    "sft": ("chatsft_checkpoints", "--output-tag", "--num-iterations"),
    "base": ("base_checkpoints", "--model-tag", "--num-iterations"),
    "rl": ("chatrl_checkpoints", "--output-tag", "--num-steps"),
}
WORK = {"rl": ("rollouts", "an update", "a save")}  # what a run is interrupted in, one after the other
STEP_AND_SAVE = ("a step", "a save")  # the other stages
PATIENCE = 20  # seconds to wait until it is at that
RESULTS = ("arrays_that_differ", "steps_whose_loss_differs", "rollouts_differ")
RL_FLAGS = [
    *("--source", "base", "--task", "tools.check.kill_resume:Early", "--resample", "--eval-every", "-1"),
    *("--examples-per-step", "4", "--num-samples", "4", "--max-new-tokens", "32"),
]
ROOT = Path(__file__).resolve().parents[2]


class Early:
    """A task on which any model gets rewards that differ: the share of letters before n in an answer."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict:
        return {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "a"}]}

    def reward(self, conversation: dict, answer: str) -> float:
        return sum(c < "n" for c in answer) / max(1, len(answer))


def make_base(base: Path, stage: str) -> list[str]:
    """A base directory to train in -> flags of the run. SFT and RL start from the golden files where they are; what
    else is needed is tiny and random."""
    sys.path.insert(0, str(ROOT))
    from tests.support import tiny

    if stage == "base":
        return tiny.base_flags(base)
    golden = Path(os.environ.get("NANOCHAT_GOLDEN", ROOT.parent / "shared" / "golden"))
    is_golden = (golden / "checkpoints" / "c1_master").is_dir()
    if is_golden:
        shutil.copytree(golden / "checkpoints" / "c1_master", base, dirs_exist_ok=True)
    else:
        tiny.write_base(base)
    if stage == "rl":
        return RL_FLAGS
    if is_golden:
        shutil.copytree(golden / "sft_run" / "task_data", base / "task_data")
        shutil.copy(golden / "words_alpha.txt", base)
        return ["--mmlu-epochs", "2", "--gsm8k-epochs", "2", "--total-batch-size", "2048", "--eval-tokens", "2048"]
    return tiny.sft_flags(base)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a stage, which can be started as often as it takes."""

    stage: str
    tag: str
    base: Path  # directory
    devices: int  # of the CPU
    flags: list[str]

    @property
    def folder(self) -> Path:
        """Of its checkpoints."""
        return self.base / STAGES[self.stage][0] / self.tag

    def start(self, *more: str) -> subprocess.Popen:
        places = {"NANOCHAT_BASE_DIR": str(self.base), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices)}
        command = [sys.executable, "-m", f"nanochat_jax.{self.stage}", STAGES[self.stage][1], self.tag]
        return subprocess.Popen(
            [*command, *self.flags, *more],
            env=os.environ | places,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def to_end(self, *more: str) -> str:
        """What it prints. SystemExit with it where the run fails."""
        process = self.start(*more)
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(output)
        return output


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


def work_in(folder: Path) -> str:
    """What the run in this folder is doing, or was when it was killed, by the files that it writes."""
    steps = [p for p in folder.glob("[0-9]*") if p.is_dir()]
    if any(not (p / "INTEGRITY.json").exists() for p in steps):  # not in its place yet, or not sealed
        return "a save"
    if not (folder / "rollouts.jsonl").exists():
        return "a step"
    answered, trained = (last_step(folder / name) for name in ("rollouts.jsonl", "metrics.jsonl"))
    return "an update" if answered > trained else "rollouts"  # a step's rollouts are on record before its update


def last_step(file: Path) -> int:
    """Of the last whole line; 0 where there is none."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def train_killed(run: Run, number: int, kills: int, total: int, rng: random.Random) -> dict:
    """Train to the end through `kills` interruptions: at random steps and moments, in turn during each kind of WORK;
    every fourth at a random moment of starting."""
    kinds, codes, moments, resumed = WORK.get(run.stage, STEP_AND_SAVE), [], [], []
    for i, step in enumerate(sorted(rng.randint(1, total - 1) for _ in range(kills))):
        process = run.start("--resume")
        if i % 4 == 3:
            moments.append("the start")
            code, output = run_until(process, ".", rng.uniform(0, 5), number)
        else:
            ready = functools.partial(is_in, run.folder, kinds[(i - i // 4) % len(kinds)])
            code, output = run_until(process, at_step(step, total), rng.uniform(0, 0.6), number, ready)
            moments.append(work_in(run.folder))
        codes.append(code)
        resumed += re.findall(r"from step (\d+)", output)
        if code == 0:
            break
        if "error:" in output or "Traceback" in output:
            raise SystemExit(output)
    resumed += re.findall(r"from step (\d+)", run.to_end("--resume"))
    return {"exit_codes": codes, "interrupted": moments, "resumed_from": [int(s) for s in resumed]}


def is_in(folder: Path, work: str) -> bool:
    return work_in(folder) == work


def difference(one: Path, other: Path, total: int) -> dict:
    """What differs between the ends of two runs: arrays by name, steps by their recorded loss, in RL the rollouts."""
    arrays, compared = [], 0
    for item in ("params", "optimizer"):
        a, b = (store.read_arrays(folder / str(total), item) for folder in (one, other))
        if a.keys() != b.keys():
            raise SystemExit(f"{item}: {sorted(a.keys() ^ b.keys())} is in one run only")
        arrays += [f"{item}/{name}" for name in a if np.asarray(a[name]).tobytes() != np.asarray(b[name]).tobytes()]
        compared += len(a)
    a, b = (
        {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r} for folder in (one, other)
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
    jax.config.update("jax_platforms", "cpu")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        flags = [*make_base(base, args.stage), "--device-batch-size", "1", "--save-every", str(args.save_every)]
        flags += [STAGES[args.stage][2], str(args.steps)] + ["--eval-every", "20"] * (args.stage != "rl")
        for devices in args.devices:
            alone = Run(args.stage, f"alone{devices}", base, devices, flags)
            began = time.perf_counter()
            alone.to_end()
            seconds = time.perf_counter() - began
            for name in args.signals:
                killed = dataclasses.replace(alone, tag=f"{name.lower()}{devices}")
                rng = random.Random(args.seed + devices)
                case = {"devices": devices, "signal": name, "uninterrupted_seconds": round(seconds, 1)}
                case |= train_killed(killed, getattr(signal, f"SIG{name}"), args.kills, args.steps, rng)
                case |= difference(alone.folder, killed.folder, args.steps)
                case["identical"] = not any(case.get(name) for name in RESULTS)
                print(json.dumps(case), flush=True)
                results.append(case)
    same = sum(case["identical"] for case in results)
    kills = sum(code != 0 for case in results for code in case["exit_codes"])  # 0: it was done before the signal came
    print(f"{same} of {len(results)} cases end bit-identical to the uninterrupted run, after {kills} kills")
    return 0 if same == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
