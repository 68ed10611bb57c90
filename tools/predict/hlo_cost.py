"""What a compiled program does on one device, from the text of its HLO: products, memory traffic, collectives, with
loop bodies counted as often as they run (the compiler's own cost analysis counts them once). For the tools beside it.

- Counted is what is reached from the entry. How often a loop runs is noted by the compiler, or else read from its
  condition and its counter's step.
- FLOPs are 2 per multiply-add of every dot, convolution and call of cuBLAS, also within fusions; a kernel of our own
  (another custom call) is opaque and has none here.
- Bytes are those of operands and results in the device's memory (not those the compiler keeps on the chip, S(1)), of
  slices and updates only the part: XLA may read less, so it is an upper bound.
- Bytes of a collective are what a device sends in a ring. One that the compiler cut into several fusions counts once:
  its pieces have one channel, which collectives that stand alone may share. A fusion that sums and keeps a part
  (all-reduce-scatter) is a reduce-scatter. `groups` has the same collectives by who takes part: (kind, devices of a
  group, distance of neighbours in the order of the mesh).
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

SIZES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
SIZES |= {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 0.5, "u4": 0.5}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {  # no traffic of their own: names for what is there, or the second half of what was counted at its start
    *("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "while", "conditional", "call"),
    *("copy-done", "slice-done", "async-done", "async-update", "optimization-barrier", "partition-id", "replica-id"),
    *(f"{name}-done" for name in COLLECTIVES),
}
PART_READ = {"slice", "dynamic-slice", "slice-start", "gather"}
KERNELS = ("tpu_custom_call", "mosaic_gpu", "triton")  # targets of the custom calls that are kernels of our own


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # of the result, as text
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes


@dataclasses.dataclass
class Cost:
    """Of a program on one device."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0  # sum over operations of the longer of products and traffic; needs `rates`
    kernels: Counter = dataclasses.field(default_factory=Counter)  # name -> calls
    collectives: dict[str, list] = dataclasses.field(default_factory=dict)  # kind -> [how many, bytes sent]
    groups: dict[tuple[str, int, int], list] = dataclasses.field(default_factory=dict)  # likewise
    unknown_loops: int = 0


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """(computation -> its instructions by name, the entry's name)"""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := INSTRUCTION.match(line):
            name, right = found.groups()
            shape, right = split_shape(right)
            opcode, _, right = right.partition("(")
            inside, rest = split_parenthesis(right)
            operands = tuple(re.findall(r"%([\w.\-]+)", re.sub(r"/\*.*?\*/", "", inside)))
            current[name] = Instruction(name, shape, opcode.strip(), operands, f"{inside}){rest}")
    return computations, entry


def split_shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    inside, rest = split_parenthesis(text[1:])
    return f"({inside})", rest.lstrip()


def split_parenthesis(text: str) -> tuple[str, str]:
    """(what comes before the parenthesis that closes, what comes after it)"""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def parts(shape: str) -> list[str]:
    """The shapes that a tuple's shape is made of."""
    found, depth = [""], 0
    for c in shape.removeprefix("(").removesuffix(")"):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    return found


def arrays(shape: str) -> Iterator[tuple[float, tuple[int, ...], bool]]:
    """(bytes, dimensions, whether it lies in the device's memory) of each array of a shape."""
    for kind, dims, layout in ARRAY.findall(shape):
        if kind in SIZES:
            sizes = tuple(int(d) for d in dims.split(",") if d)
            yield SIZES[kind] * math.prod(sizes), sizes, "S(" not in layout


def in_memory(shape: str) -> float:
    return sum(size for size, _, outside in arrays(shape) if outside)


def product_flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    """Of a dot, a convolution or a call of cuBLAS; 0 for anything else."""
    cublas = instruction.opcode == "custom-call" and "__cublas$" in instruction.rest
    if instruction.opcode not in ("dot", "convolution") and not cublas:
        return 0.0
    _, out, _ = next(arrays(instruction.shape))  # the first of cuBLAS's results; the second is its work space
    (_, left, _), (_, right, _) = (next(arrays(shapes[name])) for name in instruction.operands[:2])
    if instruction.opcode != "convolution":
        contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.rest)[1]
        return 2 * math.prod(out) * math.prod(left[int(d)] for d in contracted.replace('"', "").split(",") if d)
    labels_left, labels_right, labels_out = re.match(
        r"(\w+)_(\w+)->(\w+)", re.search(r"dim_labels=([\w\->]+)", instruction.rest)[1]
    ).groups()
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or ["", ""])[1]))
    flops = 2.0 * math.prod(out[labels_out.index(c)] for c in "bf") * right[labels_right.index("i")]
    for i, c in enumerate(sorted(set(labels_out) - set("bf"))):
        pick = {name: window[name].split("x")[i] for name in window}
        flops *= positions(left[labels_left.index(c)], right[labels_right.index(c)], out[labels_out.index(c)], pick)
    return flops


def positions(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of an output and a kernel position along one dimension that meet an element of the input."""
    stride, dilate_in, dilate = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(re.match(r"-?\d+", window.get("pad", "0"))[0])
    reached = (size - 1) * dilate_in
    count = 0
    for k in range(kernel):  # outputs o with 0 <= o * stride + k * dilate - low <= reached
        offset = k * dilate - low
        if dilate_in == 1:
            first = max(0, -(offset // stride))
            count += max(0, min(out - 1, (reached - offset) // stride) - first + 1)
        else:
            at = (o * stride + offset for o in range(out))
            count += sum(0 <= x <= reached and x % dilate_in == 0 for x in at)
    return count


def loop_trips(condition: dict[str, Instruction], body: dict[str, Instruction]) -> int | None:
    """How often a loop runs, whose counter starts at 0: the integer that its condition compares with, over the step of
    the counter, which is 2 or more where the compiler has unrolled the body. None: no such integer."""

    def constant(instruction):
        found = re.match(r"(\d+)\)", instruction.rest) if instruction and instruction.opcode == "constant" else None
        return int(found[1]) if found else None

    compares = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.rest]
    limit = max((n for i in condition.values() if (n := constant(i)) is not None), default=None)
    if limit is None or len(compares) != 1:
        return limit
    counter = condition.get(compares[0].operands[0])
    where = re.search(r"index=(\d+)", counter.rest) if counter else None
    if not where:
        return limit
    after = body.get(list(body.values())[-1].operands[int(where[1])])
    while after and after.opcode in ("copy", "bitcast"):
        after = body.get(after.operands[0])
    steps = [constant(body.get(name)) for name in after.operands] if after and after.opcode == "add" else []
    return -(-limit // next(filter(None, steps), 1))


def cost(text: str, *, unknown_trips: int = 1, rates: tuple[float, float] = (math.inf, math.inf)) -> Cost:
    """What the program with this text costs. unknown_trips: how often to count a loop whose length it does not say.
    rates: FLOP/s and bytes/s of a device, for `seconds`."""
    computations, entry = parse(text)
    shapes = {name: {i.name: i.shape for i in body.values()} for name, body in computations.items()}
    total, seen = Cost(), set()

    def flops_within(name: str) -> float:
        body = computations.get(name, {})
        own = sum(product_flops(i, shapes[name]) for i in body.values())
        return own + sum(flops_within(c) for i in body.values() for c in called(i, "calls"))

    def count_collective(instruction: Instruction, times: float, fusion: str = "") -> None:
        if not (found := collective(instruction, fusion)):
            return
        if fusion:
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = instruction.opcode.removesuffix("-start"), channel[1] if channel else (fusion, instruction.name)
            if key in seen:
                return
            seen.add(key)
        kind, n, distance, sent = found
        for counts, name in ((total.collectives, kind), (total.groups, (kind, n, distance))):
            entry = counts.setdefault(name, [0, 0.0])
            entry[0] += times
            entry[1] += times * sent

    def visit_fusion(name: str, times: float) -> None:
        for instruction in computations.get(name, {}).values():
            count_collective(instruction, times, name)
            for inner in called(instruction, "calls"):
                visit_fusion(inner, times)

    def visit(name: str, times: float) -> None:
        for i in computations[name].values():
            if i.opcode == "while":
                (condition,), (body,) = called(i, "condition"), called(i, "body")
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
                trips = int(known[1]) if known else loop_trips(computations[condition], computations[body])
                total.unknown_loops += trips is None
                visit(body, times * (trips or unknown_trips))
            elif i.opcode in ("call", "conditional"):
                for inner in called(i, "to_apply", "true_computation"):
                    visit(inner, times)
            count_collective(i, times)
            if i.opcode == "fusion":
                for inner in called(i, "calls"):
                    visit_fusion(inner, times)
            if i.opcode in FREE:
                continue
            if i.opcode == "custom-call" and any(target in i.rest for target in KERNELS):
                total.kernels[re.sub(r"[.\d]+$", "", i.name)] += times
            moved = traffic(i, shapes[name])
            flops = product_flops(i, shapes[name]) + sum(flops_within(c) for c in called(i, "calls"))
            total.flops += times * flops
            total.bytes += times * moved
            total.seconds += times * max(flops / rates[0], moved / rates[1])

    visit(entry, 1)
    return total


def called(instruction: Instruction, *names: str) -> list[str]:
    """The computations that these attributes of an instruction name."""
    return [m[1] for name in names if (m := re.search(rf"{name}=%?([\w.\-]+)", instruction.rest))]


def traffic(instruction: Instruction, shapes: dict[str, str]) -> float:
    """Bytes that it reads from the device's memory and writes to it."""
    result = in_memory(instruction.shape)
    if instruction.opcode in PART_READ:
        return 2 * min(result, *(size for size, _, _ in arrays(instruction.shape)))
    if instruction.opcode == "dynamic-update-slice":
        return 2 * in_memory(shapes.get(instruction.operands[1], ""))
    if instruction.opcode.endswith("-start"):
        return result
    return result + sum(in_memory(shapes.get(operand, "")) for operand in instruction.operands)


def collective(instruction: Instruction, fusion: str) -> tuple[str, int, int, float] | None:
    """(kind, devices of a group, their distance, bytes that a device sends); None where it is no collective.

    fusion: name of the fusion that it is in, or ""."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    start = instruction.opcode.endswith("-start") and kind != "all-reduce"  # of which the shape is (operands, results)
    sizes = [size for size, _, _ in arrays(parts(instruction.shape)[1] if start else instruction.shape)]
    n, distance = group(instruction.rest)
    if kind == "all-reduce" and fusion.startswith("all-reduce-scatter"):
        kind, sizes = "reduce-scatter", [size / n for size in sizes]
    factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return kind, n, distance, sum(sizes) * factor.get(kind, (n - 1) / n)


def group(rest: str) -> tuple[int, int]:
    """(devices that a collective goes over, distance between the first two of them in the order of the devices), from
    its attributes."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        over = re.findall(r"'(\w+)'", mesh[2])
        names = list(sizes)
        order = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        order = np.moveaxis(order, [names.index(name) for name in over], range(-len(over), 0))
        first = order.reshape(-1, math.prod(sizes[name] for name in over))[0]
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims = [int(d) for d in iota[3].split(",")]
        order = np.arange(math.prod(dims)).reshape(dims)
        order = order.transpose([int(d) for d in iota[4].split(",")]) if iota[4] else order
        first = order.reshape(int(iota[1]), int(iota[2]))[0]
    elif listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", rest):
        first = [int(d) for d in listed[1].split(",")]
    else:
        return 2, 1
    return len(first), abs(int(first[1]) - int(first[0])) if len(first) > 1 else 0
