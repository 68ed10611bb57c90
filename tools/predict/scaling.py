"""Predict SFT and RL steps on TPU slices of 8, 64 and 256 chips that are not here: bytes of a chip, what the chips send
each other, time, tokens/s and MFU.

python tools/predict/scaling.py --out tools/bench/results/scaling_2026-11-22.jsonl          # all cases: hours of CPU
python tools/predict/scaling.py --out FILE --cases d20:v6e-256 d20:v6e-256:model=2          # two meshes compared
python tools/predict/scaling.py --out FILE --alternatives                                   # where links decide
python tools/predict/scaling.py --out FILE --render --plot tools/bench/results/scaling.svg  # table and plot, in seconds

Nothing is run and nothing is measured. Programs are compiled by the TPU's own compiler (scaling_programs.py), their
operations counted (hlo_cost.py) and turned into seconds by the vendor's rates (roofline.py says how). A model of 20 to
34 layers takes the compiler very long, and its layers are alike, so:

- Forward and backward pass are compiled at the real width, vocabulary and rows of a chip, but with --layers 2 and 4
  layers, and every count is extended linearly to the real depth: products, memory traffic, roofline seconds,
  collectives, temporaries. Every second layer has a value embedding, so both numbers must be even as the depth is.
  Attention kernels are counted from the real depth's windows. --check-layers compiles a third depth and reports how far
  the extension is off (on d20:v5e-8, 0.2 to 8 % in each count); --full compiles the whole step at the real depth.
- The optimizer's part is compiled by itself at the real depth, because it is not linear in it: Muon puts as many whole
  matrices on a chip as the next multiple of the data axis says.
- Bytes of parameters, moments and batch are exact, from shapes. A chip holds these, and the larger of two: what the
  pass needs beside them, or the gradients and what the optimizer needs.
- The passes of a step cost the same, and are counted from one program.
- An RL step is: the weights gathered once, in float32 at most; prompts read by every chip for its own answers; each new
  token at the roofline of the decode program on one chip (--layers, extended) with a cache of half the new tokens,
  times the waves that fit the slots; and the update, with the passes that the packed answers need. All answers are as
  long as they may be; there is no reference model and one update a batch, so no scoring pass (the defaults); rewards,
  tools and their waiting are not in it.

Each compiled program is a line of --out with "line": "part", each case one with "line": "prediction". What is there
already is not compiled again, so an interrupted call goes on where it was. A file belongs to one state of the model's
and the step's code: begin a new one when that has changed.
"""

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro
from cases import Case, parse_case
from roofline import RATES, Span, append, attention_flops, bounds, head_split, provenance, sending
from scaling_programs import Workload, model_of
from scaling_table import render

from nanochat_jax.cli.device import peak_flops
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.model.cost import flops_per_token, parameter_counts

SLICES = {8: ("v5e-8", "v6e-8", "v5p-16"), 64: ("v5e-64", "v6e-64", "v5p-128"), 256: ("v5e-256", "v6e-256", "v5p-512")}
CASES = tuple(f"d{depth}:{name}" for depth in (20, 26, 34) for names in SLICES.values() for name in names)
ALTERNATIVES = ("model=2", "model=4", "replicate")
PROGRAMS = Path(__file__).with_name("scaling_programs.py")  # compiles one in a process of its own
DECIDES = 0.5  # where links take this part of computing or more, other meshes are looked at
CHUNK = 16  # tokens of a decode call, as Engine has it; the costs of one are of the whole call


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Predict training steps on TPU slices that are not here."""

    out: Path | None = None  # the lines of JSON
    cases: tuple[str, ...] = CASES  # depth:slice, or with a mesh or `replicate` behind
    layers: tuple[int, int] = (2, 4)  # compiled in place of the real depth
    full: bool = False  # compile the SFT step at the real depth
    check_layers: int | None = None  # also compile forward and backward with so many, and report the extension's error
    alternatives: bool = False  # also other meshes, where a case in --out is bound by its links
    minutes: float = 60.0  # that a program may take to compile
    render: bool = False  # compile nothing: the table of --out
    plot: Path | None = None  # with --render: an SVG picture too
    work: tyro.conf.OmitArgPrefixes[Workload] = dataclasses.field(default_factory=Workload)


# ------------------------------------------------------------------------------------------------------ the arithmetic
def extended(a: Any, b: Any, layers: tuple[int, int], depth: int) -> Any:
    """Numbers counted at two depths -> at a third, on the line through them, at least 0. What is missing is 0."""
    if isinstance(a, dict) or isinstance(b, dict):
        a, b = a or {}, b or {}
        return {name: extended(a.get(name), b.get(name), layers, depth) for name in a | b}
    if isinstance(a, list) or isinstance(b, list):
        zeros = [0.0] * len(a or b)
        return [extended(x, y, layers, depth) for x, y in zip(a or zeros, b or zeros)]
    a, b = a or 0.0, b or 0.0
    return max(0.0, a + (b - a) * (depth - layers[0]) / (layers[1] - layers[0]))


def of_passes(part: dict[str, Any], passes: int) -> dict[str, Any]:
    """Costs of a program with so many passes. One that was compiled for a single pass has no loop: all of it again."""
    if not part["unknown_loops"]:
        return extended(None, part["once"], (0, 1), passes)
    return extended(part["once"], part["twice"], (1, 2), passes)


def summed(*costs: dict[str, Any]) -> dict[str, Any]:
    """Costs of programs that run one after the other."""
    total: dict[str, Any] = {name: sum(found[name] for found in costs) for name in ("flops", "bytes", "seconds")}
    total["groups"] = {}
    for found in costs:
        add_up(total["groups"], found["groups"])
    return total


def by_kind(groups: dict[str, list[float]]) -> dict[str, list[float]]:
    """Collectives of all groups: kind -> [how many, bytes that a chip sends]."""
    kinds: dict[str, list[float]] = {}
    for key, numbers in groups.items():
        add_up(kinds, {key.split()[0]: numbers})
    return kinds


def add_up(total: dict[str, list[float]], more: dict[str, list[float]]) -> None:
    """Add [how many, bytes] of collectives to those of the same name."""
    for name, (count, sent) in more.items():
        had = total.get(name, (0.0, 0.0))
        total[name] = [had[0] + count, had[1] + sent]


def seconds_of(cost: dict[str, Any], kernel_flops: float, sizes: dict[str, Any]) -> dict[str, float]:
    """Bounds of the time of a program with these costs, on the chips of these sizes (`scaling_programs.sizes_of`)."""
    spans = {name: Span(**numbers) for name, numbers in sizes["spans"].items()}
    groups = {}
    for key, numbers in cost["groups"].items():
        kind, size, distance = key.split()
        groups[kind, int(size), int(distance)] = numbers
    links = sending(groups, sizes["mesh"], spans, RATES[sizes["chip"]][1])
    return bounds(cost["seconds"], kernel_flops / peak_flops(sizes["chip"]), links)


def predict(
    case: Case, work: Workload, sizes: dict[str, Any], parts: dict[str, dict], layers: tuple[int, int]
) -> dict[str, Any]:
    """The prediction's line. sizes: as `scaling_programs.sizes_of`. parts: program's name -> costs, of `update` and
    `gradient` or of `step`, and of `decode`; those of the small depths under "gradient 4", "gradient 8", ...

    A part that the compiler refused for want of memory makes the case one that does not fit."""
    model = model_of(work, case.depth)
    line = {name: sizes[name] for name in ("chip", "chips", "mesh", "memory_of_a_chip", "attention", "passes", "rows")}
    line |= {"remat": sizes["remat"], "parameters": parameter_counts(model)["total"]}
    line["method"] = "compiled at its depth" if "step" in parts else f"depths {layers[0]} and {layers[1]}, extended"
    refused = {name: part["memory_asked"] for name, part in parts.items() if part.get("out_of_memory")}
    if refused:
        return line | {"fits": False, "refused": refused}

    def at_depth(name):
        return extended(*(parts[f"{name} {n}"] for n in layers), layers, case.depth)

    # The bytes of a chip
    gradient = parts["step"] if "step" in parts else at_depth("gradient")
    held = sizes["state_bytes"] + sizes["batch_bytes"] + gradient["beside_arguments"]
    if "update" in parts:
        held = max(held, sizes["state_bytes"] + sizes["parameter_bytes"] + parts["update"]["beside_arguments"])
    line |= {"held": held, "fits": held <= (sizes["memory_of_a_chip"] or math.inf)}

    def step(passes):
        cost = of_passes(gradient, passes)
        if "update" in parts:
            cost = summed(cost, parts["update"]["once"])
        kernels = attention_flops(model, work.max_seq_len, sizes["rows"] * passes, 2 + 7)
        kernels /= head_split(model, sizes["mesh"])
        return cost, kernels, seconds_of(cost, kernels, sizes)

    rows = sizes["rows"] * sizes["chips"] // sizes["mesh"]["model"]  # of a pass: chips of a model axis have the same
    cost, kernels, seconds = step(sizes["passes"])
    tokens = sizes["passes"] * rows * work.max_seq_len
    useful = tokens * flops_per_token(model, work.max_seq_len) / (peak_flops(sizes["chip"]) * sizes["chips"])
    line |= {"flops": cost["flops"] + kernels, "memory_traffic": cost["bytes"], "collectives": by_kind(cost["groups"])}
    line |= {"groups": cost["groups"], "seconds": seconds} | rates(tokens, useful, seconds)
    answers_of_a_row = max(1, work.max_seq_len // (work.prompt_tokens + work.new_tokens))
    passes = math.ceil(work.prompts * work.samples / answers_of_a_row / rows)
    _, _, update = step(passes)
    return line | {"rl": rl_step(model, work, sizes, at_depth("decode"), passes, update)}


def rl_step(
    model: Any, work: Workload, sizes: dict[str, Any], decode: dict[str, Any], passes: int, update: dict[str, float]
) -> dict[str, Any]:
    """Of one RL step: seconds of its parts, tokens/s of new tokens, MFU. passes, update: passes of its update, and the
    bounds of their time."""
    peak, (_, link_rate), chips = peak_flops(sizes["chip"]), RATES[sizes["chip"]], sizes["chips"]
    samples, length = work.prompts * work.samples, work.prompt_tokens + work.new_tokens
    prompt_flops = work.prompt_tokens * flops_per_token(model, work.prompt_tokens, "prefill")
    waves = math.ceil(samples / (sizes["slots"] * chips))
    gather_rate = sizes["spans"]["all"]["links"] * link_rate
    seconds = {
        "gather_weights": sizes["weights_copied"] / gather_rate * (chips - 1) / chips,
        "prompts": math.ceil(work.prompts / chips) * prompt_flops / peak,
        "new_tokens": waves * work.new_tokens * decode["once"]["seconds"] / CHUNK,
    }
    rollouts = sum(seconds.values())
    seconds |= {"update_at_least": update["at_least"], "update_at_most": update["at_most"]}
    seconds |= {name: rollouts + update[name] for name in ("at_least", "at_most")}
    new = samples * work.new_tokens
    useful = samples * length * flops_per_token(model, length) + new * flops_per_token(model, length, "decode")
    useful += work.prompts * prompt_flops
    return {
        "passes": passes,
        "slots": sizes["slots"],
        "waves": waves,
        "held": sizes["held_in_rollouts"],
        "fits": sizes["held_in_rollouts"] <= (sizes["memory_of_a_chip"] or math.inf),
        "seconds": seconds,
    } | rates(new, useful / (peak * chips), seconds)


def rates(tokens: int, useful_seconds: float, seconds: dict[str, float]) -> dict[str, Any]:
    """(lowest, highest) tokens/s and MFU; useful_seconds: of the model's own products at the peak."""
    ends = seconds["at_most"], seconds["at_least"]
    return {"tokens_per_second": [tokens / s for s in ends], "mfu": [useful_seconds / s for s in ends]}


def extension_error(
    parts: dict[str, dict], checked: dict[str, Any], layers: tuple[int, int], depth: int, passes: int
) -> dict[str, float]:
    """By how much the extension is above what was compiled with `depth` layers, relative."""

    def numbers(part):
        cost = of_passes(part, passes)
        sent = {kind: sent for kind, (_, sent) in by_kind(cost["groups"]).items()}
        return {name: cost[name] for name in ("flops", "bytes", "seconds")} | {"held": part["beside_arguments"]} | sent

    guess = numbers(extended(*(parts[f"gradient {n}"] for n in layers), layers, depth))
    return {name: guess.get(name, 0.0) / value - 1 for name, value in numbers(checked).items() if value}


# ----------------------------------------------------------------------------------------------------------- the files
def lines_of(path: Path) -> list[dict[str, Any]]:
    """Those that are there, without a last one that was cut off."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def compiled_part(
    s: Scaling, text: str, name: str, layers: int | None, sizes: dict[str, Any] | None
) -> dict[str, Any] | None:
    """A part's costs for the case `text`: from --out, else compiled now and appended there. None: it took too long, or
    failed, and that was said."""
    case = parse_case(text)
    if name == "decode":  # the same on one chip of every slice of this kind
        text, sizes = f"d{case.depth}:{case.kind}", {what: sizes[what] for what in ("slots", "attention", "remat")}
    work = dataclasses.asdict(s.work)
    key = {"line": "part", "case": text, "part": name, "layers": layers, "work": work, "plan": sizes}
    for line in lines_of(s.out):
        if key.items() <= line.items():
            return line["found"]
    print(f"compiling {text} {name}{f' with {layers} layers' if layers else ''}", file=sys.stderr, flush=True)
    asked = {"case": list(case), "name": name, "layers": layers, "plan": sizes, "work": work}
    command = [sys.executable, PROGRAMS, json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * s.minutes)
    except subprocess.TimeoutExpired:
        print(f"  no result in {s.minutes:g} minutes, left out", file=sys.stderr)
        return None
    if done.returncode:
        print(f"  failed, left out: {(done.stderr.strip().splitlines() or ['?'])[-1][:300]}", file=sys.stderr)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    append(s.out, key | {"found": found} | provenance())
    return found


def predict_case(s: Scaling, text: str) -> dict[str, Any] | None:
    """The prediction's line of a case; None: a part is missing."""
    case, layers = parse_case(text), s.layers
    sizes = compiled_part(s, text, "plan", None, None)
    if not sizes:
        return None
    line = {"line": "prediction", "case": text, "work": dataclasses.asdict(s.work)}
    line |= {"layers": list(layers), "full": s.full}
    least = sizes["state_bytes"] + sizes["parameter_bytes"]
    if least > (sizes["memory_of_a_chip"] or math.inf):  # no need to compile
        refused = {"plan": {"out_of_memory": True, "memory_asked": least}}
        return line | predict(case, s.work, sizes, refused, layers)
    wanted = [("step", None)] if s.full else [("update", None), *(("gradient", n) for n in layers)]
    wanted += [("decode", n) for n in layers]
    parts = {}
    for name, n in wanted:
        found = parts[f"{name} {n}" if n else name] = compiled_part(s, text, name, n, sizes)
        if found is None:
            return None
    checked = compiled_part(s, text, "gradient", s.check_layers, sizes) if s.check_layers else None
    if s.check_layers and checked is None:
        return None
    line |= predict(case, s.work, sizes, parts, layers)
    if checked:
        line["extension_error"] = extension_error(parts, checked, layers, s.check_layers, sizes["passes"])
    return line


def further(lines: list[dict[str, Any]]) -> list[str]:
    """Cases with other meshes, of those lines whose links take long."""
    bound = [line["case"] for line in lines if line["case"].count(":") == 1 and is_bound(line)]
    return [f"{case}:{mesh}" for case in bound for mesh in ALTERNATIVES]


def is_bound(line: dict[str, Any]) -> bool:
    """Whether links decide, or the parameters do not fit."""
    seconds = line.get("seconds")
    return not line["fits"] or seconds["links"] > DECIDES * (seconds["operations"] + seconds["attention_kernels"])


def main(s: Scaling) -> None:
    require(s.out, "--out must name the file of the lines of JSON")
    require(s.layers[0] < s.layers[1], f"--layers must be two numbers, the smaller first, got {s.layers}")
    for text in s.cases:  # refused before anything is compiled
        for layers in filter(None, (*s.layers, s.check_layers)):
            model_of(s.work, parse_case(text).depth, layers)
    recorded = [line for line in lines_of(s.out) if line.get("line") == "prediction"]
    if s.render:
        require(recorded, f"--render: there is no prediction in {s.out}")
        print(render(recorded, s.plot))
        return
    for text in further(recorded) if s.alternatives else s.cases:
        wanted = {"case": text, "work": dataclasses.asdict(s.work), "full": s.full, "layers": list(s.layers)}
        if any(wanted.items() <= line.items() for line in recorded):
            continue
        if line := predict_case(s, text):
            append(s.out, line | provenance())
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and what is being compiled ends too
    run_stage(main, tyro.cli(Scaling))
