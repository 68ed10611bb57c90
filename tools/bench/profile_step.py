"""Where the time of a train step goes, by JAX's profiler: a JSON line with the seconds of each function of the package.

The step is that of `bench --what sft`, with its flags. Wall time in which several operations run at once is shared
evenly among them; `waiting` is the time in which none runs. An operation belongs to the innermost function of the
package in the Python stack that it was traced from, forward and backward together; what XLA has fused belongs to where
the last of it came from. One device's operations are counted, a step on average.

python tools/bench/profile_step.py --head-dim 64 --vocab-size 4096 --max-seq-len 512        # the CPU yardstick
python tools/bench/profile_step.py --depth 20                                               # on a GPU
"""

import collections
import contextlib
import dataclasses
import gzip
import json
import re
import sys
import tempfile
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from nanochat_jax.benches.rates import facts
from nanochat_jax.benches.sft import plan_of, random_batch
from nanochat_jax.benches.subject import config_of_sizes
from nanochat_jax.cli.device import start_device
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.flags.bench import BenchConfig, ModelSizes
from nanochat_jax.train.step import random_state

PACKAGE = "nanochat_jax/"
CONTROL = ("while", "call", "conditional")  # run what others are counted for
SHOWN = 12  # operations
STEPS = 4


def functions_of(text: str) -> dict[str, str]:
    """Name of an operation of a compiled program -> the function that it comes from, as optim/muon.py:orthogonalize (a
    function in another one counts as that); "other" where none of the package is known. Operations that only run others
    are left out."""
    tables: dict[str, dict[int, str]] = {}
    for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
        _, _, rest = text.partition(f"\n{name}\n")
        tables[name] = {int(n): row for n, row in re.findall(r"^(\d+) (.*)$", rest.partition("\n\n")[0], re.MULTILINE)}

    def numbers(table: str, row: int) -> list[int]:
        return [int(n) for n in re.findall(r"=(\d+)", tables[table].get(row, ""))]

    def function(frame: int) -> str:
        while found := numbers("StackFrames", frame):
            location, parent = found
            file, name, *_ = numbers("FileLocations", location)
            _, inside, path = tables["FileNames"][file].strip('"').rpartition(PACKAGE)
            if inside:
                outermost, *_ = tables["FunctionNames"][name].strip('"').split(".<locals>")
                return f"{path}:{outermost}"
            if parent == frame:
                break
            frame = parent
        return "other"

    found = {}
    for name, opcode, rest in re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\((.*)$", text, re.MULTILINE):
        if opcode not in CONTROL:
            frame = re.search(r"stack_frame_id=(\d+)", rest)
            found[name] = function(int(frame[1])) if frame else "other"
    return found


def shares(events: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """(begin, duration, name) of what ran -> name -> its share of the time: moments in which several run count evenly
    for each of them, and those in which none runs, between the first and the last, as "waiting"."""
    borders = sorted((t, step, name) for t0, d, name in events for t, step in ((t0, 1), (t0 + d, -1)))
    found: dict[str, float] = collections.defaultdict(float)
    running: collections.Counter = collections.Counter()
    last = None
    for t, step, name in borders:
        if last is not None and t > last:
            now = +running
            for other, n in now.items():
                found[other] += (t - last) * n / now.total()
            if not now:
                found["waiting"] += t - last
        running[name] += step
        last = t
    return dict(found)


def events_of(trace: Mapping[str, Any], operations: Container[str]) -> list[tuple[float, float, str]]:
    """(begin, duration, operation) of what ran on the first device, microseconds: events that are named for one of
    these operations, by themselves or in an argument. ValueError: there is none."""
    found = []
    for event in trace["traceEvents"]:
        given = event.get("args", {})
        if event.get("ph") == "X" and (name := given.get("hlo_op", event["name"])) in operations:
            device = given.get("device_ordinal", "0"), event["pid"]
            found.append((device, (event["ts"], event.get("dur", 0.0), name)))
    require(bool(found), "JAX's profiler has recorded no operation of the step on this device")
    first = min(device for device, _ in found)
    return [event for device, event in found if device == first]


def main(cfg: BenchConfig) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        start_device(cfg.device_type)
        model = config_of_sizes(cfg)
        plan = plan_of(cfg, model, make_mesh(cfg.mesh or "", n_embd=model.n_embd))
    steps, train_step = cfg.repeats or STEPS, plan.compile_train_step()
    with plan.scope():
        state = random_state(model, plan.optimizer, plan.abstract_state, seed=0)
    batch = to_global(random_batch(cfg, model.vocab_size, plan.batch, 0), plan.mesh)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # else Python's own calls slow down what is measured
    with tempfile.TemporaryDirectory() as folder:
        for i in range(2 + steps):
            if i == 2:
                jax.profiler.start_trace(folder, profiler_options=options)
            state, metrics = train_step(state, batch, np.float32(1.0), np.float32(0.9))
            jax.block_until_ready(metrics.loss)
        jax.profiler.stop_trace()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        trace = json.loads(gzip.decompress(file.read_bytes()))
    functions = functions_of(train_step.as_text())
    by_operation = {name: time / steps / 1e6 for name, time in shares(events_of(trace, functions)).items()}
    by_function: dict[str, float] = collections.defaultdict(float)
    for name, seconds in by_operation.items():
        by_function[functions.get(name, name)] += seconds

    def longest(found: Mapping[str, float], most: int | None = None) -> dict[str, float]:
        return {name: round(found[name], 6) for name in sorted(found, key=found.__getitem__, reverse=True)[:most]}

    operations = longest(by_operation, SHOWN)
    line = {"seconds_per_step": round(sum(by_operation.values()), 6), "functions": longest(by_function)}
    line["operations"] = [[name, functions.get(name, ""), seconds] for name, seconds in operations.items()]
    sizes = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(ModelSizes)}
    sizes |= {"batch": plan.batch, "document_tokens": cfg.document_tokens, "mesh": dict(plan.mesh.shape)}
    chosen = {"dtype": plan.dtype.name, "attention": plan.attention, "remat": plan.remat}
    print(json.dumps(line | facts(plan.mesh.devices.flat[0]) | sizes | chosen))


if __name__ == "__main__":
    run_stage(main, tyro.cli(BenchConfig))
