"""Compile the SFT step and the decode call ahead of time for TPU slices and GPUs that are not here, and print what a
chip would hold, what the chips would send each other, and bounds of the time: a JSON line for each program, then a
table on stderr.

python tools/predict/aot_table.py --out tools/bench/results/aot_2026-11-22.jsonl       # all of CASES, an hour of CPU
python tools/predict/aot_table.py --cases d20:h100 d20:h100-8 d20:a100-8 --device-batch-size 32
python tools/predict/aot_table.py --cases d20:v5e-8 --programs sft --device-batch-size 8

Nothing is run, so no number here is a measurement. cases.py says how a case is written; hlo_cost.py counts a program's
operations, loop bodies as often as they run, and roofline.py says how counts become bounds of the time.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tyro
from cases import model_of_depth, parse_case, sft_plan, slice_mesh
from hlo_cost import cost
from roofline import RATES, append, attention_flops, bounds, head_split, provenance, sending, spans

from nanochat_jax.cli.device import peak_flops
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.device_memory import beside_arguments, device_memory, is_out_of_memory, parse_memory_error
from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.model.cost import flops_per_token, parameter_counts
from nanochat_jax.train import preflight
from nanochat_jax.train.plan import Plan

CASES = ("d20:v5e-8", "d20:v6e-8", "d34:v5p-8", "d34:v5e-256:data=128,model=2")
PROGRAMS = ("sft", "decode")


@dataclasses.dataclass(frozen=True)
class Table:
    """Compile for TPU slices and GPUs that are not here."""

    cases: tuple[str, ...] = CASES  # depth:devices, or with a mesh or `replicate` behind
    programs: tuple[str, ...] = PROGRAMS
    device_batch_size: int = 8  # rows of a chip in one pass, at most
    total_batch_size: int = 524288  # tokens per step
    max_seq_len: int = 2048
    vocab_size: int = 32768
    slots: int = 256  # answers that are generated together, of 16 to a prompt
    max_new_tokens: int = 256
    remat: str = "auto"
    attention: str = "auto"
    out: Path | None = None  # also append the lines of JSON to this file
    hlo: Path | None = None  # keep the compiled programs' text in this folder


def plan_of(table: Table, text: str) -> Plan:
    case = parse_case(text)
    model = model_of_depth(case.depth, table.max_seq_len, table.vocab_size)
    mesh = slice_mesh(case, model)
    step = table.total_batch_size // (table.max_seq_len * row_shards(mesh))  # rows of a chip
    rows = min(table.device_batch_size, max(1, step))
    return sft_plan(
        model,
        mesh,
        passes=max(1, step // rows),
        rows=rows,
        remat=table.remat,
        attention=table.attention,
        replicate=case.replicate,
    )


def measure(table: Table, case: str, program: str) -> dict[str, Any]:
    """One line of the table."""
    plan = plan_of(table, case)
    model, batch, mesh, training = plan.model, plan.batch, dict(plan.mesh.shape), program == "sft"
    device = plan.mesh.devices.flat[0]
    chip, memory = device.device_kind, device_memory(device)
    rollouts = preflight.Answers(max(1, table.slots // 16), 16, table.slots, table.max_new_tokens)
    line = {
        "case": case,
        "program": program,
        "chips": plan.mesh.size,
        "chip": chip,
        "mesh": mesh,
        "parameters": parameter_counts(model)["total"],
        "attention": plan.attention,
        "memory_of_a_chip": memory,
    }
    if training:
        line |= {"passes": batch.micro_batches, "rows_a_pass": batch.rows, "T": batch.T, "remat": plan.remat}
    else:
        line |= {"slots": table.slots, "new_tokens": table.max_new_tokens, "chunk": rollouts.chunk}
    began = time.perf_counter()
    try:
        compiled = plan.compile_train_step() if training else preflight.compile_decode(plan, rollouts)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        asked, _ = parse_memory_error(error)
        return line | {"fits": False, "memory_asked": asked, "said": str(error).splitlines()[0][:300]}
    line["compile_seconds"] = round(time.perf_counter() - began, 1)
    sizes, text = compiled.memory_analysis(), compiled.as_text()
    if table.hlo:
        table.hlo.mkdir(parents=True, exist_ok=True)
        (table.hlo / f"{case.replace(':', '_')}_{program}.hlo").write_text(text)
    line["temporaries"] = sizes.temp_size_in_bytes
    held = {"arguments": sizes.argument_size_in_bytes, "beside_them": beside_arguments(compiled)}
    if not training:
        held["train_state"] = sum(preflight.state_bytes(plan).values())  # stays where it is meanwhile
    line |= {"held": held, "held_in_all": sum(held.values()), "fits": sum(held.values()) <= memory}

    peak, (memory_rate, link_rate) = peak_flops(chip), RATES[chip]
    steps = batch.micro_batches if training else rollouts.chunk
    found = cost(text, unknown_trips=steps, rates=(peak, memory_rate))
    kernels = 0.0
    if found.kernels:
        products = 2 + 7 if training else 2
        rows = plan.rows_per_device * batch.micro_batches
        kernels = attention_flops(model, batch.T, rows, products) / head_split(model, mesh)
    seconds = bounds(found.seconds, kernels / peak, sending(found.groups, mesh, spans(plan.mesh), link_rate))
    tokens = batch.tokens_per_step if training else table.slots * rollouts.chunk
    line |= {
        "flops": found.flops + kernels,
        "memory_traffic": found.bytes,
        "collectives": found.collectives,
        "seconds": seconds,
        "tokens_per_second_at_most": tokens / seconds["at_least"],
        "tokens_per_second_if_nothing_overlaps": tokens / seconds["at_most"],
        "unknown_loops": found.unknown_loops,
    }
    if training:
        useful = tokens * flops_per_token(model, batch.T) / (peak * plan.mesh.size)
        line |= {"mfu_at_most": useful / seconds["at_least"], "mfu_if_nothing_overlaps": useful / seconds["at_most"]}
    return line


def row(line: dict[str, Any]) -> str:
    """A line of the table."""
    gib = 2**30
    what = f"{line['case']:32} {line['program']:6}"
    if "held" not in line:
        asked = f"asks for {line['memory_asked'] / gib:.2f}" if line["memory_asked"] else "does not compile"
        return f"{what} {asked} of {line['memory_of_a_chip'] / gib:.2f} GiB: DOES NOT FIT"
    sent = ", ".join(f"{n:.0f} {kind} {size / 2**20:,.0f}" for kind, (n, size) in sorted(line["collectives"].items()))
    seconds = line["seconds"]
    return (
        f"{what} {line['held_in_all'] / gib:6.2f} of {line['memory_of_a_chip'] / gib:.2f} GiB"
        f" {'fits' if line['fits'] else 'DOES NOT FIT'} | sends MiB: {sent or 'nothing'} |"
        f" {1e3 * seconds['at_least']:,.1f} to {1e3 * seconds['at_most']:,.1f} ms"
        f" ({1e3 * seconds['operations']:,.1f} operations, {1e3 * seconds['attention_kernels']:,.1f} attention,"
        f" {1e3 * seconds['links']:,.1f} links)"
    )


def main(table: Table) -> None:
    for program in table.programs:
        require(program in PROGRAMS, f"--programs must be sft or decode, got {program!r}")
    rows = []
    for case in table.cases:
        for program in table.programs:
            line = measure(table, case, program) | provenance()
            print(json.dumps(line), flush=True)
            if table.out:
                append(table.out, line)
            rows.append(row(line))
    print("\n".join(rows), file=sys.stderr)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Table))
