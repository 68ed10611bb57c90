"""What scaling.py compiles for one case, a program at a time, each as a dict of JSON. A process of its own for
each: the compiler keeps what it has taken, and one that takes too long can be ended.

A case is depth:slice, then in any order a mesh and `replicate`: d20:v5e-8, d34:v6e-256:model=2, d20:v5e-8:replicate.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from hlo_cost import Cost, cost
from roofline import RATES, spans

from nanochat_jax.cli.device import peak_flops
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.collectives import replicated_parameters
from nanochat_jax.distributed.device_memory import (
    beside_arguments,
    bytes_on_device,
    is_out_of_memory,
    parse_memory_error,
)
from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.model.gpt import REMAT, GPTConfig, window_sizes
from nanochat_jax.train import preflight, scaling_laws
from nanochat_jax.train.remat import ROOM, held_anyway, kept_for_backward
from nanochat_jax.train.step import abstract_state

PATTERN = "SSSL"
SINGLE = {"v5e": ("v5e-1", "data=1"), "v6e": ("v6e-1", "data=1"), "v5p": ("v5p-8", "data=1")}  # one chip, for decoding


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step works on. Of RL: all answers are as long as they may be, as the device sees the last of them."""

    device_batch_size: int = 8  # rows of a chip in one pass, at most
    total_batch_size: int = 524288  # tokens of an SFT step
    max_seq_len: int = 2048
    vocab_size: int = 32768
    prompts: int = 256  # problems of an RL step
    samples: int = 16  # answers to each
    prompt_tokens: int = 150  # of a problem; the cache has room for preflight.PROMPT_TOKENS
    new_tokens: int = 256  # of an answer


class Case(NamedTuple):
    depth: int
    slice: str
    mesh: str = ""
    replicate: bool = False

    @property
    def kind(self) -> str:
        """v5e, v5p or v6e"""
        return self.slice.partition("-")[0]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `preflight` reads of a stage's settings."""

    preflight: str
    mesh: str
    remat: str = "auto"
    attention: str = "auto"
    dtype: str = "bfloat16"
    replicate: bool = False


def parse(text: str) -> Case:
    """ValueError: the form of a case."""
    depth, _, rest = text.partition(":")
    slice_name, *more = rest.split(":")
    mesh = ",".join(part for part in more if part != "replicate")
    require(
        depth.startswith("d") and depth[1:].isdecimal() and int(depth[1:]) > 0 and "-" in slice_name,
        f"--cases must look like d20:v5e-8, d34:v6e-256:model=2 or d20:v5e-8:replicate, got {text!r:.60}",
    )
    return Case(int(depth[1:]), slice_name, mesh, "replicate" in more)


def model_of(work: Workload, depth: int, layers: int | None = None) -> GPTConfig:
    """nanochat's model of a depth; with `layers` as many of its layers, else alike.

    ValueError: too few layers, or a number that is odd where the depth is even (every other layer is of another kind).
    """
    dials = {"aspect_ratio": 64, "head_dim": 128, "window_pattern": PATTERN}
    sizes = {"max_seq_len": work.max_seq_len, "vocab_size": work.vocab_size}
    model = scaling_laws.config_of_depth(depth, **dials, **sizes)
    if layers is None:
        return model
    require(
        2 <= layers <= depth and (depth - layers) % 2 == 0,
        f"--layers must be from 2 to the depth, and odd or even as it, got {layers} of {depth}",
    )
    return dataclasses.replace(model, n_layer=layers, windows=window_sizes(PATTERN, layers, work.max_seq_len))


def split_rows(work: Workload, model: GPTConfig, shards: int, fixed: int, memory: int | None) -> tuple[int, int, str]:
    """(passes, rows of a chip in each, what is computed again): as little as fits by the estimate that a run makes, and
    then as many rows as fit. fixed: bytes that are there whatever the rows.

    ValueError: fewer rows in a step than shards."""
    step = work.total_batch_size // (work.max_seq_len * shards)
    require(
        step >= 1,
        f"--total-batch-size={work.total_batch_size} must be at least a row of --max-seq-len={work.max_seq_len} tokens "
        f"for each of {shards} shards of the data axis: a model axis makes them fewer",
    )
    most = 1 << (min(work.device_batch_size, step).bit_length() - 1)
    for remat in REMAT:
        rows = most
        while rows:
            needed = fixed + kept_for_backward(model, remat, rows * work.max_seq_len, jnp.bfloat16)
            if memory is None or needed <= ROOM * memory:
                return -(-step // rows), rows, remat
            rows //= 2
    return step, 1, REMAT[-1]


def compiler_of(work: Workload, case: Case, layers: int | None = None, plan: dict | None = None):
    """Without a plan that of a single row a chip, which is never compiled."""
    known = {name: plan[name] for name in ("remat", "attention")} if plan else {"remat": REMAT[-1]}
    settings = Settings(case.slice, case.mesh, replicate=case.replicate, **known)
    place = preflight.start(settings)
    passes, rows = (plan["passes"], plan["rows"]) if plan else (1, 1)
    batch = preflight.Batch(passes, rows * row_shards(place.mesh), work.max_seq_len)
    return preflight.Compiler(settings, place, model_of(work, case.depth, layers), batch, packed=True)


def rollouts_of(work: Workload, slots: int, chips: int, new_tokens: int) -> preflight.Rollouts:
    """With this many slots a chip."""
    prompts = max(1, slots * chips // work.samples)
    return preflight.Rollouts(prompts, work.samples, prompts * work.samples, new_tokens)


def make_plan(work: Workload, case: Case) -> dict[str, Any]:
    """What follows from shapes alone, at the real depth: nothing is compiled but a probe of the chip's memory."""
    compiler = compiler_of(work, case)
    mesh, memory, model = compiler.place.mesh, compiler.place.memory, compiler.model
    passes, rows, remat = split_rows(work, model, row_shards(mesh), held_anyway(compiler.state), memory)
    compiler.batch = dataclasses.replace(compiler.batch, micro_batches=passes, rows=rows * row_shards(mesh))
    slots = max(work.samples, work.prompts * work.samples // mesh.size)
    slots = 1 << (slots.bit_length() - 1)

    def held_in_rollouts(slots):
        cache = compiler.cache_bytes(rollouts_of(work, slots, mesh.size, work.new_tokens))
        return compiler.state_bytes + compiler.copy_bytes() + cache

    while slots > work.samples and memory and held_in_rollouts(slots) > ROOM * memory:
        slots //= 2
    return {
        "chip": mesh.devices.flat[0].device_kind,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "spans": {name: dataclasses.asdict(found) for name, found in spans(mesh).items()},
        "memory_of_a_chip": memory,
        "attention": compiler.attention,
        "passes": passes,
        "rows": rows,
        "remat": remat,
        "parameter_bytes": compiler.parameter_bytes,
        "state_bytes": compiler.state_bytes,
        "batch_bytes": bytes_on_device(compiler.arrays()),
        "weights_copied": 4 * sum(x.size for x in jax.tree.leaves(compiler.state.params)),
        "slots": slots,
        "held_in_rollouts": held_in_rollouts(slots),
    }


def without_optimizer(compiler: preflight.Compiler, replicate: bool) -> preflight.Compiler:
    """The same, but its train step adds the gradients to the parameters and keeps no moments."""
    compiler.tx = optax.with_extra_args_support(optax.identity())
    compiler.state = abstract_state(compiler.model, compiler.tx, compiler.place.mesh, replicate)
    return compiler


def compile_update(compiler: preflight.Compiler, replicate: bool = False):
    """The optimizer's part of the train step: from gradients to what is added to the parameters."""
    state = compiler.state
    params, opt_state = (jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (state.params, state.opt_state))

    def update(grads, opt_state, params, lr_multiplier, muon_momentum):
        scalars = {"lr_multiplier": lr_multiplier, "muon_momentum": muon_momentum}
        return compiler.tx.update(grads, opt_state, params, **scalars)

    with jax.set_mesh(compiler.place.mesh), replicated_parameters(replicate):
        shardings = {"in_shardings": (params, opt_state, params, None, None), "out_shardings": (params, opt_state)}
        jitted = jax.jit(update, donate_argnums=(0, 1), **shardings)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        return jitted.lower(state.params, state.opt_state, state.params, number, number).compile()


def compile_part(work: Workload, case: Case, name: str, layers: int | None, plan: dict | None) -> dict[str, Any]:
    """A program's costs on one chip. name: gradient, update, step (both, as they run) or decode (on one chip); or plan,
    which compiles none."""
    if name == "plan":
        return make_plan(work, case)
    if name == "decode":
        single, mesh = SINGLE[case.kind]
        compiler = compiler_of(work, Case(case.depth, single, mesh), layers, plan | {"passes": 1, "rows": 1})
        # half of the new tokens: the size that the own part has on average while answers grow
        rollouts = rollouts_of(work, plan["slots"], 1, work.new_tokens // 2)
        return costs(lambda: compiler.decode(rollouts), compiler, rollouts.chunk)
    compiler = compiler_of(work, case, layers, plan)
    if name == "gradient":
        compiler = without_optimizer(compiler, case.replicate)
    program = compiler.train_step if name != "update" else partial(compile_update, compiler, case.replicate)
    return costs(program, compiler, None)


def costs(compiled: Callable, compiler: preflight.Compiler, trips: int | None) -> dict[str, Any]:
    """trips: of the loops whose length the program does not say; None: count with 1 and with 2, as `passes` do."""
    chip = compiler.place.mesh.devices.flat[0].device_kind
    began = time.perf_counter()
    try:
        program = compiled()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"out_of_memory": True, "memory_asked": parse_memory_error(error)[0]}
    text, how = program.as_text(), {"rates": (peak_flops(chip), RATES[chip][0])}
    found = {"compile_seconds": round(time.perf_counter() - began, 1), "beside_arguments": beside_arguments(program)}
    found["arguments"] = program.memory_analysis().argument_size_in_bytes
    for name, count in {"once": 1, "twice": 2}.items() if trips is None else {"once": trips}.items():
        counted = cost(text, unknown_trips=count, **how)
        found[name] = as_json(counted)
    return found | {"unknown_loops": counted.unknown_loops}


def as_json(found: Cost) -> dict[str, Any]:
    """Numbers by name, nested: what `scaling.extended` takes."""
    groups = {" ".join(map(str, key)): list(map(float, numbers)) for key, numbers in found.groups.items()}
    numbers = {"flops": found.flops, "bytes": found.bytes, "seconds": found.seconds}
    return numbers | {"kernels": float(sum(found.kernels.values())), "groups": groups}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    asked |= {"work": Workload(**asked["work"]), "case": Case(*asked["case"])}
    print(json.dumps(compile_part(**asked)))
