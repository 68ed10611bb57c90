"""What scaling.py compiles for one case: a program's costs on one chip, as JSON. A process of its own for each program:
the compiler keeps what it has taken, and one that takes too long can be ended.

python tools/predict/scaling_programs.py \\
    '{"case": [2, "v5e-8", "", false], "name": "plan", "layers": null, "plan": null, "work": {}}'
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from cases import WINDOW_PATTERN, Case, model_of_depth, sft_plan, slice_mesh
from hlo_cost import Cost, cost
from roofline import RATES, spans

from nanochat_jax.cli.device import peak_flops
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.device_memory import (
    beside_arguments,
    bytes_on_device,
    device_memory,
    is_out_of_memory,
    parse_memory_error,
)
from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.model.gpt import REMAT, GPTConfig, window_sizes
from nanochat_jax.train import preflight
from nanochat_jax.train.plan import BatchShape, Plan
from nanochat_jax.train.remat import USABLE, held_anyway, kept_for_backward
from nanochat_jax.train.step import abstract_state, make_train_step

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


def model_of(work: Workload, depth: int, layers: int | None = None) -> GPTConfig:
    """nanochat's model of a depth; with `layers` as many of its layers, else alike.

    ValueError: too few layers, or a number that is odd where the depth is even (every other layer is of another kind).
    """
    model = model_of_depth(depth, work.max_seq_len, work.vocab_size)
    if layers is None:
        return model
    require(
        2 <= layers <= depth and (depth - layers) % 2 == 0,
        f"--layers must be from 2 to the depth, and odd or even as it, got {layers} of {depth}",
    )
    return dataclasses.replace(model, n_layer=layers, windows=window_sizes(WINDOW_PATTERN, layers, work.max_seq_len))


def rollouts_of(work: Workload, slots: int, chips: int, new_tokens: int) -> preflight.Answers:
    """With this many slots a chip."""
    prompts = max(1, slots * chips // work.samples)
    return preflight.Answers(prompts, work.samples, prompts * work.samples, new_tokens)


# ------------------------------------------------------------------------------------------------- from shapes alone
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
            if memory is None or needed <= USABLE * memory:
                return -(-step // rows), rows, remat
            rows //= 2
    return step, 1, REMAT[-1]


def sizes_of(work: Workload, case: Case) -> dict[str, Any]:
    """What follows from shapes at the real depth; nothing is compiled but a probe of the chip's memory."""
    model = model_of(work, case.depth)
    mesh = slice_mesh(case, model)
    device, shards = mesh.devices.flat[0], row_shards(mesh)
    memory = device_memory(device)
    plan = sft_plan(model, mesh, passes=1, rows=1, remat=REMAT[-1], replicate=case.replicate)
    passes, rows, remat = split_rows(work, model, shards, held_anyway(plan.abstract_state), memory)
    plan = dataclasses.replace(plan, batch=BatchShape(passes, rows * shards, work.max_seq_len), remat=remat)
    state_bytes = bytes_on_device(plan.abstract_state)

    def held_in_rollouts(slots: int) -> int:
        cache = preflight.cache_bytes(plan, rollouts_of(work, slots, mesh.size, work.new_tokens))
        return state_bytes + preflight.weight_copy_bytes(plan) + cache

    slots = max(work.samples, work.prompts * work.samples // mesh.size)
    slots = 1 << (slots.bit_length() - 1)
    while slots > work.samples and memory and held_in_rollouts(slots) > USABLE * memory:
        slots //= 2
    return {
        "chip": device.device_kind,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "spans": {name: dataclasses.asdict(found) for name, found in spans(mesh).items()},
        "memory_of_a_chip": memory,
        "attention": plan.attention,
        "passes": passes,
        "rows": rows,
        "remat": remat,
        "parameter_bytes": bytes_on_device(plan.abstract_state.params),
        "state_bytes": state_bytes,
        "batch_bytes": bytes_on_device(plan.abstract_batch),
        "weights_copied": 4 * sum(x.size for x in jax.tree.leaves(plan.abstract_state.params)),
        "slots": slots,
        "held_in_rollouts": held_in_rollouts(slots),
    }


# ------------------------------------------------------------------------------------------------------- the programs
def trace_gradient(plan: Plan) -> jax.stages.Traced:
    """The train step without its optimizer: the gradients are added to the parameters, and no moments are kept."""
    optimizer = optax.with_extra_args_support(optax.identity())
    state = abstract_state(plan.model, optimizer, plan.mesh, plan.replicate)
    with plan.scope():
        step = make_train_step(
            plan.model,
            optimizer,
            state,
            plan.mesh,
            dtype=plan.dtype,
            attention=plan.attention,
            remat=plan.remat,
            scheduled=plan.scalars,
        )
        numbers = [jax.ShapeDtypeStruct((), jnp.float32)] * len(plan.scalars)
        return step.trace(state, plan.abstract_batch, *numbers)


def trace_update(plan: Plan) -> jax.stages.Traced:
    """The optimizer's part of the train step: from gradients to what is added to the parameters."""
    _, params, opt_state, _ = plan.abstract_state
    param_shardings, opt_shardings = (jax.tree.map(lambda x: x.sharding, tree) for tree in (params, opt_state))

    def update(grads, opt_state, params, *scalars):
        return plan.optimizer.update(grads, opt_state, params, **dict(zip(plan.scalars, scalars, strict=True)))

    with plan.scope():
        numbers = [jax.ShapeDtypeStruct((), jnp.float32)] * len(plan.scalars)
        jitted = jax.jit(
            update,
            donate_argnums=(0, 1),
            in_shardings=(param_shardings, opt_shardings, param_shardings, *[None] * len(numbers)),
            out_shardings=(param_shardings, opt_shardings),
        )
        return jitted.trace(params, opt_state, params, *numbers)


TRACERS = {"gradient": trace_gradient, "update": trace_update, "step": Plan.trace_train_step}


def compile_traced(name: str, plan: Plan) -> jax.stages.Compiled:
    """The program of this name, one of TRACERS."""
    traced = TRACERS[name](plan)
    with plan.scope():
        return traced.lower().compile()


def compile_part(
    work: Workload, case: Case, name: str, layers: int | None, sizes: dict[str, Any] | None
) -> dict[str, Any]:
    """Costs of a program on one chip. name: one of TRACERS (step: both of the others, as they run), or decode (on one
    chip); or plan: `sizes_of`, which the others are compiled with."""
    if name == "plan":
        return sizes_of(work, case)
    model, passes, rows = model_of(work, case.depth, layers), 1, 1
    if name == "decode":
        single, mesh = SINGLE[case.kind]
        case = Case(case.depth, single, mesh)
    else:
        passes, rows = sizes["passes"], sizes["rows"]
    plan = sft_plan(
        model,
        slice_mesh(case, model),
        passes=passes,
        rows=rows,
        remat=sizes["remat"],
        attention=sizes["attention"],
        replicate=case.replicate,
    )
    if name == "decode":
        # half of the new tokens: the mean size of the continuation's cache while answers grow
        rollouts = rollouts_of(work, sizes["slots"], 1, work.new_tokens // 2)
        return costs(lambda: preflight.compile_decode(plan, rollouts), plan, {"once": rollouts.chunk})
    return costs(lambda: compile_traced(name, plan), plan, {"once": 1, "twice": 2})


def costs(compiled: Callable, plan: Plan, trips: dict[str, int]) -> dict[str, Any]:
    """trips: name -> how often to count the loops whose length the program does not say, as those over passes."""
    chip = plan.mesh.devices.flat[0].device_kind
    began = time.perf_counter()
    try:
        program = compiled()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"out_of_memory": True, "memory_asked": parse_memory_error(error)[0]}
    found = {
        "compile_seconds": round(time.perf_counter() - began, 1),
        "beside_arguments": beside_arguments(program),
        "arguments": program.memory_analysis().argument_size_in_bytes,
    }
    text, rates = program.as_text(), (peak_flops(chip), RATES[chip][0])
    counted = {name: cost(text, unknown_trips=count, rates=rates) for name, count in trips.items()}
    found |= {name: as_json(each) for name, each in counted.items()}
    return found | {"unknown_loops": counted["once"].unknown_loops}


def as_json(found: Cost) -> dict[str, Any]:
    """Numbers by name, nested: what `scaling.extended` takes."""
    return {
        "flops": found.flops,
        "bytes": found.bytes,
        "seconds": found.seconds,
        "kernels": float(sum(found.kernels.values())),
        "groups": {" ".join(map(str, key)): list(map(float, numbers)) for key, numbers in found.groups.items()},
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    work, case = Workload(**asked["work"]), Case(*asked["case"])
    print(json.dumps(compile_part(work, case, asked["name"], asked["layers"], asked["plan"])))
