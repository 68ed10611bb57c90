"""Kill training runs at random moments, resume them each time, and compare their end with that of a run left alone.

`storm` is the attack of tools/check/faults.py --kills; the tests use the rest for one kill at a time.
"""

import collections
import dataclasses
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanochat_jax.checkpoints import store
from nanochat_jax.train.metrics import read_metrics

STAGES = {"sft": "chatsft_checkpoints", "base": "base_checkpoints", "rl": "chatrl_checkpoints"}  # and their folders
WORK = {"rl": ("rollouts", "an update", "a save")}  # what a run is interrupted in, one after the other
STEP_AND_SAVE = ("a step", "a save")  # the other stages
PATIENCE = 20  # seconds to wait until it is at that
RESULTS = ("arrays_that_differ", "steps_whose_loss_differs", "rollouts_differ")
RL_FLAGS = [
    *("--source", "base", "--task", "tools.check.kill_resume:Early", "--resample", "--eval-every", "-1"),
    *("--examples-per-step", "4", "--num-samples", "4", "--max-new-tokens", "32", "--cut-answers", "keep"),
]
ROOT = Path(__file__).resolve().parents[2]
ORBAX = threading.Lock()  # it is not made for several threads of a process


class Early:
    """A task on which any model gets rewards that differ: the share of letters before n in an answer."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict:
        return {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "a"}]}

    def reward(self, conversation: dict, answer: str) -> float:
        return sum(c < "n" for c in answer) / max(1, len(answer))

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return self.reward(conversation, answer) > 0.5


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a stage, which can be started as often as it takes."""

    stage: str
    tag: str
    base: Path  # directory
    devices: int  # of the CPU, all processes together
    flags: list[str]
    processes: int = 1

    @property
    def folder(self) -> Path:
        """Of its checkpoints."""
        return self.base / STAGES[self.stage] / self.tag

    @property
    def name_flags(self) -> list[str]:
        return ["--model-tag" if self.stage == "base" else "--output-tag", self.tag]

    def start(self, *more: str) -> subprocess.Popen:
        """As one process."""
        places = {"NANOCHAT_BASE_DIR": str(self.base), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices)}
        return subprocess.Popen(
            [sys.executable, "-m", f"nanochat_jax.{self.stage}", *self.name_flags, *self.flags, *more],
            env=os.environ | places,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def to_end(self, *more: str) -> str:
        """What it prints, as one process. SystemExit with it where the run fails."""
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
        process = run.start("--resume=auto")
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
    resumed += re.findall(r"from step (\d+)", run.to_end("--resume=auto"))
    return {"exit_codes": codes, "interrupted": moments, "resumed_from": [int(s) for s in resumed]}


def is_in(folder: Path, work: str) -> bool:
    return work_in(folder) == work


def difference(one: Path, other: Path, total: int) -> dict:
    """What differs between the ends of two runs: arrays by name, steps by their recorded loss, in RL the rollouts."""
    compared, arrays = arrays_that_differ(one / str(total), other / str(total))
    a, b = (
        {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r} for folder in (one, other)
    )
    steps = [step for step in sorted(a.keys() | b.keys()) if a.get(step) != b.get(step)]
    found = {"arrays_compared": compared, "arrays_that_differ": arrays, "steps_whose_loss_differs": steps}
    if (one / "rollouts.jsonl").exists():
        found["rollouts_differ"] = (one / "rollouts.jsonl").read_bytes() != (other / "rollouts.jsonl").read_bytes()
    return found


def arrays_that_differ(one: Path, other: Path) -> tuple[int, list[str]]:
    """(how many two checkpoints have, the names of those that differ by a bit)"""
    differing, compared = [], 0
    for item in ("params", "optimizer"):
        with ORBAX:
            a, b = (store.read_arrays(folder, item) for folder in (one, other))
        if a.keys() != b.keys():
            raise SystemExit(f"{item}: {sorted(a.keys() ^ b.keys())} is in one run only")
        differing += [f"{item}/{name}" for name in a if np.asarray(a[name]).tobytes() != np.asarray(b[name]).tobytes()]
        compared += len(a)
    return compared, differing


# ---------------------------------------------------------------------------------------------------------------------
# Storms: every kind of signal, at every kind of moment, on one process or two

SAVE_EVERY, EVAL_EVERY, CHATCORE_EVERY = 3, 5, 10  # steps
MOMENTS = {
    "sft": ("a save", "the start", "a step", "compiling", "sealing", "validation", "ChatCORE", "the end"),
    "base": ("sealing", "the start", "compiling", "a save", "a step", "validation", "the end"),
    "rl": ("an update", "the start", "rollouts", "compiling", "a save", "sealing", "validation", "the end"),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)  # SIGCONT follows the last
CODES = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130, -2}, signal.SIGSTOP: set()}
OF_THE_OTHER = {75, 1}  # exit codes of a process that has lost another one, or did not meet it
LOST_SECONDS = 8  # after which a process that is silent is lost
HANG_SECONDS = 30.0  # a run that goes on for longer after a signal hangs
WHOLE_SECONDS = 600.0  # and one that goes on for longer without a signal


@dataclasses.dataclass(frozen=True)
class Kill:
    """One interruption: which signal, when, and to which processes."""

    number: signal.Signals
    step: int  # at the earliest
    moment: str
    delay: float  # seconds after that
    victims: tuple[int, ...]  # processes
    asleep: float  # seconds between SIGSTOP and SIGCONT


def kills_of(run: Run, kills: int, total: int, rng: random.Random) -> list[Kill]:
    """Signals and moments in turn, so that each meets each; steps, delays and victims drawn."""
    steps, planned = sorted(rng.randint(1, total - 1) for _ in range(kills)), []
    moments = MOMENTS[run.stage]
    for i, step in enumerate(steps):
        moment = moments[i % (len(moments) - (i < kills - 1))]  # the end comes last
        longest = {"the start": 5.0, "compiling": 3.0, "ChatCORE": 1.5, "validation": 0.2}.get(moment, 0.05)
        one = (rng.randrange(run.processes),)
        victims = one if rng.random() < 0.7 else tuple(range(run.processes))
        number = SIGNALS[(i + i // len(SIGNALS)) % len(SIGNALS)]
        planned.append(Kill(number, step, moment, rng.uniform(0, longest), victims, rng.uniform(0.05, 2)))
    return planned


def is_at(kill: Kill, folder: Path, output: str, total: int) -> bool:
    """Whether a run that has printed this is where the interruption waits for it."""
    if kill.moment == "the start":
        return True
    if kill.moment == "compiling":
        return "Parameters: " in output
    step = total if kill.moment == "the end" else kill.step
    if kill.moment in ("validation", "ChatCORE"):  # they follow the line of the step that they measure
        every = EVAL_EVERY if kill.moment == "validation" else CHATCORE_EVERY
        step = min(total, -(-step // every) * every)
    if not re.search(at_step(step, total), output):
        return False
    if kill.moment == "a save":
        return any(folder.glob("*.orbax-checkpoint-tmp*"))
    if kill.moment == "sealing":
        return any(p.name.isdigit() and not (p / "INTEGRITY.json").exists() for p in folder.glob("[0-9]*"))
    return kill.moment not in ("rollouts", "an update") or work_in(folder) == kill.moment


def storm(run: Run, alone: Path, planned: list[Kill], total: int, tell: Callable[[dict], None]) -> dict:
    """Train to the end through the interruptions -> what came of it; "faults" are its sentences about what must not
    be. alone: the folder of the same run, which nothing interrupted. tell: gets every interruption's record."""
    from tests.support.process_runs import started

    waiting, faults = collections.deque(planned), []
    variables = {"NANOCHAT_LOST_SECONDS": LOST_SECONDS, "NANOCHAT_START_SECONDS": 20}
    flags = [*run.name_flags, *run.flags, "--resume=auto"]
    while True:
        with started(run.base, run.stage, flags, count=run.processes, devices=run.devices, **variables) as processes:
            kill, met = None, None
            processes.deadline = time.monotonic() + WHOLE_SECONDS
            while waiting and (kill is None or kill.number == signal.SIGSTOP):
                kill = waiting.popleft()
                met = interrupt(kill, run, processes, total)
                tell({"run": run.tag, **dataclasses.asdict(kill), "signal": kill.number.name, "met": met})
            limit = HANG_SECONDS + LOST_SECONDS * (run.processes > 1)
            last = kill is None or kill.number == signal.SIGSTOP or not met
            hung = not all_end(processes, WHOLE_SECONDS if last else limit)
            codes = [process.poll() for process in processes.all]
            output = processes.all_output()
        expected = {0} | (CODES[kill.number] if kill else set())
        if kill and run.processes > 1 and not last:
            expected |= OF_THE_OTHER
        where = (
            f"after {kill.number.name} to {kill.victims} in {kill.moment}, step {kill.step}" if kill else "at the end"
        )
        if hung:
            faults.append(f"{where}: no end within {limit:.0f} seconds\n{output[-3000:]}")
        elif "Traceback" in output:
            faults.append(f"{where}: a traceback\n{output[-3000:]}")
        elif not set(codes) <= expected:
            faults.append(f"{where}: exit codes {codes} instead of {sorted(expected)}\n{output[-3000:]}")
        if not waiting and set(codes) == {0}:
            break
        if not waiting and kill is None:
            return {"faults": [*faults, f"it cannot be resumed\n{output[-3000:]}"]}
    found = difference(alone, run.folder, total)
    if any(found.get(name) for name in RESULTS):
        faults.append(f"its end is not that of the run left alone: {json.dumps(found)}")
    leftovers = [p.name for p in run.folder.iterdir() if "tmp" in p.name or p.name.endswith(".deleted")]
    if leftovers:
        faults.append(f"it leaves {leftovers}")
    return {"faults": faults, **found}


def interrupt(kill: Kill, run: Run, processes, total: int) -> bool:
    """Wait for the moment and send the signal -> whether all processes were alive until then."""
    patience = time.monotonic() + WHOLE_SECONDS
    while not is_at(kill, run.folder, processes.output(0), total):
        if any(process.poll() is not None for process in processes.all) or time.monotonic() > patience:
            return False
        time.sleep(0.002)
    time.sleep(kill.delay)
    alive = all(process.poll() is None for process in processes.all)
    for victim in kill.victims:
        processes.signal(victim, kill.number)
    if kill.number == signal.SIGSTOP:
        time.sleep(kill.asleep)
        for victim in kill.victims:
            processes.signal(victim, signal.SIGCONT)
    return alive


def all_end(processes, seconds: float) -> bool:
    latest = time.monotonic() + seconds
    while any(process.poll() is None for process in processes.all):
        if time.monotonic() > latest:
            return False
        time.sleep(0.01)
    processes.wait()
    return True
