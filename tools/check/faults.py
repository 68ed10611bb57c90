"""Attack the program: kill its runs, damage its files, fill its disk, and feed it hostile files, flags and tasks.

python tools/check/faults.py --kills 100 --damages 500 --inputs 10000 --seed 0    # an hour on 2 cores, by an estimate
python tools/check/faults.py --short                        # what CI runs: 4 minutes of a core's time
python tools/check/faults.py --short --only damage:17       # one case again, with all that it says

Whatever happens, a run that is resumed must end bit-identical to one that nothing interrupted, and a command must end
as on undamaged files, or with one sentence and exit code 1; never with a traceback, a hang, more than 1 GiB of memory,
or another result without a word. Prints a JSON line for each case, with what was said where that is a fault, and at the
end a table; the exit code is 1 where there was a fault.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import damage
import full_disk
import hostile_tasks
import inputs
import kill_resume
from limited import Worker

from nanochat_jax.checkpoints import store

sys.path.append(str(kill_resume.ROOT))
from tests.support import process_runs, tiny

SHORT = {"kills": 3, "damages": 16, "inputs": 250, "commands": 1, "disks": 1, "tasks": 3}
LONG = {"kills": 100, "damages": 500, "inputs": 10_000, "commands": 20, "disks": 13, "tasks": 1000}
SHORT_STORMS = ("sft",)
STORMS = ("sft", "base", "rl", "sft2", "base2", "rl2")  # the stage, and 2 where it has two processes
DAMAGE_SECONDS, INPUT_SECONDS, TASK_SECONDS = 30.0, 5.0, 60.0
ALLOWED = {*damage.ALLOWED, "well", "skipped", "identical"}
SHOWN = 3000  # characters of what a faulty case has said


class Case(NamedTuple):
    """What came of one attack."""

    category: str
    number: int  # in its category: with the seed and the sizes it is this attack again
    what: str
    group: str  # of the table
    verdict: str
    seconds: float
    memory: int = 0  # bytes
    said: str = ""

    @property
    def is_fault(self) -> bool:
        return self.verdict not in ALLOWED


# -------------------------------------------------------------------------------------------------------- categories
def kills(args: argparse.Namespace, work: Path, worker: Worker, only: int | None) -> Iterator[Case]:
    """A case is a storm: one run with its share of the interruptions. `--only` runs one storm."""
    base = work / "storms"
    sft, pretraining = tiny.sft_flags(base), tiny.base_flags(base)
    (base / "words_alpha.txt").write_text("\n".join(f"{a}{b}ord" for a in "bcdfghklmn" for b in "aeiou"))
    rl = [*kill_resume.RL_FLAGS, "--max-new-tokens", "16", "--device-batch-size", "1", "--eval-samples", "2"]
    rl += ["--eval-task", "tools.check.kill_resume:Early", "--eval-examples", "4"]
    if not args.short:
        sft += ["--chatcore-every", str(kill_resume.CHATCORE_EVERY), "--chatcore-max-sample", "1"]
    of_stage = {"sft": sft, "base": pretraining, "rl": rl}

    def storm(number: int, name: str) -> Case:
        stage, processes = name.rstrip("2"), 2 if name.endswith("2") else 1
        count = args.kills // len(args.storms) + (number < args.kills % len(args.storms))
        total = (6 + count // 2) if stage == "rl" else 10 + 2 * count
        steps = ["--num-steps" if stage == "rl" else "--num-iterations", str(total)]
        flags = [*of_stage[stage], *steps, "--eval-every", str(kill_resume.EVAL_EVERY)]
        flags += ["--save-every", str(kill_resume.SAVE_EVERY)]
        run = kill_resume.Run(stage, f"{name}-killed", base, processes, flags, processes)
        alone = dataclasses.replace(run, tag=f"{name}-alone")
        began = time.perf_counter()
        how = {"count": processes, "devices": processes, "NANOCHAT_LOST_SECONDS": 60}
        process_runs.run(base, stage, [*alone.name_flags, *flags], **how)
        planned = kill_resume.kills_of(run, count, total, random.Random(f"{args.seed} {name}"))
        found = kill_resume.storm(run, alone.folder, planned, total, tell)
        verdict = f"{len(found['faults'])} faults" if found["faults"] else "identical"
        what = f"{count} kills in {total} steps of {name}, {found.get('arrays_compared', 0)} arrays compared"
        return Case("kills", number, what, name, verdict, time.perf_counter() - began, 0, "\n".join(found["faults"]))

    for number, name in chosen(args.storms, only):
        yield storm(number, name)


def damages(args: argparse.Namespace, work: Path, worker: Worker, only: int | None) -> Iterator[Case]:
    base, pristine = work / "base", work / "pristine"
    planned = damage.damages_of(pristine, args.damages, random.Random(args.seed))
    expected = {}
    for number, one in chosen(planned, only):
        reader = damage.reader_for(one)
        if reader not in expected:
            damage.renew(pristine, base)
            undamaged = worker.run(reader, base, 10 * DAMAGE_SECONDS)
            if undamaged.how != "well":
                raise SystemExit(f"{reader.__name__} fails on undamaged files: {undamaged}")
            expected[reader] = undamaged.result
        damage.renew(pristine, base)
        damage.do_damage(base, one)
        ended = worker.run(reader, base, DAMAGE_SECONDS)
        verdict = damage.verdict(ended.how, reader, ended.result, expected[reader], ended.said)
        what = f"{one.kind} of {one.file} (seed {one.seed}), read by {reader.__name__}"
        group = f"files in {damage.reader_of(one.file) or 'token_cache/, *.jsonl'}"
        yield Case("damages", number, what, group, verdict, ended.seconds, ended.memory, ended.said)


LETTERS = ("-a", "tests.support.process_tasks:Letters", "-x", "2", "--batch-size", "2")
COMMANDS = {
    damage.resume_sft: ("sft", "--output-tag", damage.TAGS["sft"], "--resume"),
    damage.compile_again: ("sft", "--output-tag", damage.TAGS["sft"], "--resume"),
    damage.resume_rl: ("rl", "--output-tag", damage.TAGS["rl"], "--resume"),
    damage.resume_base: ("base", "--model-tag", damage.TAGS["base"], "--resume"),
    damage.draw_report: ("report",),
    damage.load_ours: ("eval", "-i", "base", "-g", "d2", *LETTERS),
    damage.load_theirs: ("eval", "-i", "base", "-g", "theirs", *LETTERS),
}


def commands(args: argparse.Namespace, work: Path, worker: Worker, only: int | None) -> Iterator[Case]:
    """Damages of which the reader is a command in a process of its own."""
    base, pristine = work / "base", work / "pristine"
    planned = damage.damages_of(pristine, args.commands, random.Random(args.seed + 1))
    for number, one in chosen(planned, only):
        damage.renew(pristine, base)
        damage.do_damage(base, one)
        reader = damage.reader_for(one)
        command, *given = COMMANDS[reader]
        if reader is damage.compile_again:
            shutil.rmtree(
                base / "chatsft_checkpoints" / damage.TAGS["sft"] / str(damage.STEPS["sft"]), ignore_errors=True
            )
        began = time.perf_counter()
        with process_runs.started(base, command, given, count=1, devices=1) as processes:
            in_time = kill_resume.all_end(processes, 120.0)
            code, output = processes.all[0].poll(), processes.output(0)
        verdict = command_verdict(code, output, in_time)
        if verdict == "well" and command in ("sft", "rl", "base"):
            verdict = "same" if same_end(base, pristine, command) else "another result without a word"
        what = f"{one.kind} of {one.file} (seed {one.seed}), read by {command} {' '.join(given)}"
        yield Case("commands", number, what, command, verdict, time.perf_counter() - began, 0, output)


def command_verdict(code: int | None, output: str, in_time: bool) -> str:
    if not in_time:
        return "hang"
    if "Traceback" in output:
        return "traceback"
    if code == 0:
        return "well"
    return "refused" if code == 1 and output.count("error: ") == 1 else f"exit code {code}"


def same_end(base: Path, pristine: Path, stage: str) -> bool:
    folder = Path(store.SOURCES[stage], damage.TAGS[stage], str(damage.STEPS[stage]))
    return not kill_resume.arrays_that_differ(base / folder, pristine / folder)[1]


def hostile_inputs(args: argparse.Namespace, work: Path, worker: Worker, only: int | None) -> Iterator[Case]:
    base, pristine = work / "inputs", work / "pristine"
    shutil.copytree(pristine, base)
    endless = inputs.inputs(pristine, base, random.Random(args.seed))
    for kind, one in inputs.KINDS.items():  # what is loaded and compiled once is no case's time
        worker.run(inputs.read_input, inputs.Input(kind, next(one.make(pristine, random.Random(0))), str(base)), 60.0)
    for number, one in chosen((next(endless) for _ in range(args.inputs)), only):
        ended = worker.run(inputs.read_input, one, INPUT_SECONDS, (1 << 30) + len(one.data))
        what = f"{one.kind}: {one.data[:60]!r}"
        yield Case("inputs", number, what, one.kind, ended.how, ended.seconds, ended.memory, ended.said)
        if ended.how in ("hang", "died"):
            shutil.rmtree(base)
            shutil.copytree(pristine, base)


def tasks(args: argparse.Namespace, work: Path, worker: Worker, only: int | None) -> Iterator[Case]:
    base, pristine = work / "tasks", work / "pristine"
    shutil.copytree(pristine, base)
    model = ["--model-tag", "d2", "--overwrite", "--output-tag", "hostile", "--device-batch-size", "2", "--eval-every"]
    rl = ["--source", "base", *model, "2", "--num-steps", "2", "--examples-per-step", "2", "--num-samples", "2"]
    rl += ["--max-new-tokens", "8", "--eval-examples", "2", "--eval-samples", "2"]
    sft = [*tiny.FLAGS, *model, "-1", "--total-batch-size", "512", "--num-iterations", "2"]
    planned = []
    for task, expected in hostile_tasks.EXPECTED.items():
        name = f"tools.check.hostile_tasks:{task.__name__}"
        planned.append(("rl", [*rl, "--task", name, "--eval-task", name], expected[0]))
        planned.append(("sft", [*sft, "--task", name], expected[1]))
        planned.append(
            ("eval", ["-i", "base", "-g", "d2", "-a", name, "-x", "3", "-m", "8", "--slots", "4"], expected[2])
        )
    control, others = planned[:1], planned[1:]
    random.Random(args.seed).shuffle(others)
    for number, (command, flags, expected) in chosen((control + others)[: args.tasks], only):
        ended = worker.run(damage.run_command, (command, flags, str(base)), TASK_SECONDS)
        verdict = ended.how
        if verdict in ("well", "refused") and verdict not in expected:
            verdict = f"{verdict} instead of {' or '.join(sorted(expected))}"
        what = f"{command} {' '.join(flags)}"
        yield Case("tasks", number, what, command, verdict, ended.seconds, ended.memory, ended.said)


def disks(args: argparse.Namespace, work: Path, worker: Worker, only: int | None) -> Iterator[Case]:
    alone = full_disk.run_alone(work / "pristine", work / "room")
    for number, (which, left, freed) in chosen(full_disk.cases(args.disks), only):
        began = time.perf_counter()
        if which == "readonly":
            verdict, said = full_disk.read_only(work / "pristine")
        else:
            verdict, said = full_disk.full(which, left, freed, work / "pristine", alone)
        what = f"{which}: {left:,} bytes left, {'freed after 2 seconds' if freed else 'never freed'}"
        yield Case("disks", number, what, which, verdict, time.perf_counter() - began, 0, said)


CATEGORIES: dict[str, Callable[[argparse.Namespace, Path, Worker, int | None], Iterator[Case]]] = {
    "kills": kills,
    "damages": damages,
    "commands": commands,
    "disks": disks,
    "inputs": hostile_inputs,
    "tasks": tasks,
}
SIDE_BY_SIDE = (
    ("kills",),
    ("damages", "commands", "disks", "inputs", "tasks"),
)  # two cores; the first has gone on alone


# -------------------------------------------------------------------------------------------------------------- running
def chosen(planned: Iterable[Any], only: int | None) -> Iterator[tuple[int, Any]]:
    """The numbered cases, or the one with this number."""
    return ((number, one) for number, one in enumerate(planned) if only in (None, number))


PRINTING = threading.Lock()


def tell(record: dict) -> None:
    with PRINTING:
        print(json.dumps(record, default=str), flush=True)


def run_categories(
    names: Iterable[str], args: argparse.Namespace, work: Path, prepared: Future, only: int | None
) -> list[Case]:
    found = []
    with contextlib.closing(Worker(damage.VARIABLES)) as worker:
        for name in names:
            if name != "kills":
                prepared.result()
            for case in CATEGORIES[name](args, work, worker, only):
                record = case._asdict() | {"seconds": round(case.seconds, 2), "fault": case.is_fault}
                record["said"] = case.said[-SHOWN:] if case.is_fault or only is not None else ""
                tell(record)
                found.append(case)
    return found


def prepare(work: Path) -> None:
    """work/base, and work/pristine, of which the base directories of the attacks are copies."""
    with contextlib.closing(Worker(damage.VARIABLES)) as worker:
        damage.run_stages(work / "base", worker)
    shutil.copytree(work / "base", work / "pristine")


def table(cases: list[Case]) -> str:
    """One line for each group of cases, and the faults' numbers."""
    rows = [("category", "of", "cases", "verdicts", "slowest", "memory", "faults")]
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.category, case.group), []).append(case)
    for (category, group), members in sorted(groups.items()):
        verdicts: dict[str, int] = {}
        for case in members:
            verdicts[case.verdict] = verdicts.get(case.verdict, 0) + 1
        told = ", ".join(f"{verdict} {count}" for verdict, count in sorted(verdicts.items()))
        slowest, most = max(case.seconds for case in members), max(case.memory for case in members)
        numbers = " ".join(str(case.number) for case in members if case.is_fault)
        rows.append((category, group, f"{len(members):,}", told, f"{slowest:.1f} s", f"{most >> 20} MiB", numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[6]]).rstrip() for row in rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="small sizes, as CI runs them; others may be given")
    parser.add_argument("--kills", type=int, help="interruptions, shared among the storms")
    parser.add_argument("--damages", type=int, help="damaged files")
    parser.add_argument("--inputs", type=int, help="hostile inputs")
    parser.add_argument("--commands", type=int, help="damaged files that a command in a process of its own reads")
    parser.add_argument("--disks", type=int, help="full or read-only disks")
    parser.add_argument("--tasks", type=int, help="commands on hostile tasks")
    parser.add_argument("--storms", nargs="+", choices=STORMS, help="the runs that are killed")
    parser.add_argument("--only", help="CATEGORY:NUMBER, one case of a call with this seed and these sizes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, size in (SHORT if args.short else LONG).items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    args.storms = args.storms or (SHORT_STORMS if args.short else STORMS)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else the runs of a script in the background ignore it
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.pop(
        "JAX_COMPILATION_CACHE_DIR", None
    )  # what is compiled lies in base directories, and is attacked there
    category, _, number = (args.only or "").partition(":")
    names = [name for name in CATEGORIES if getattr(args, name) > 0 and category in ("", name)]
    began = time.perf_counter()
    tell({"seed": args.seed, **vars(args)})
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        work = Path(folder)
        damage.write_models(work / "base")
        shutil.copytree(work / "base", work / "storms")
        with ThreadPoolExecutor(3) as pool:
            prepared = pool.submit(prepare, work)  # its error is raised by the sides
            only = int(number) if number else None
            sides = [[name for name in side if name in names] for side in SIDE_BY_SIDE]
            ended = [pool.submit(run_categories, side, args, work, prepared, only) for side in sides]
            for failed in wait(ended, return_when=FIRST_EXCEPTION).done:
                if failed.exception():
                    print(f"{failed.exception()!r}: the other side goes on to its end", file=sys.stderr, flush=True)
            found = [case for side in ended for case in side.result()]
    faults = [case for case in found if case.is_fault]
    print(table(found))
    print(f"{len(found):,} cases, seed {args.seed}, {time.perf_counter() - began:.0f} seconds: {len(faults):,} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
