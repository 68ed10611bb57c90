"""Compile the SFT step and the decode call ahead of time for TPU slices that are not here, and print what a chip would
hold, what the chips would send each other, and bounds of the time.

python tools/predict/aot_table.py --out tools/bench/results/aot_2026-11-22.jsonl       # all of CASES, an hour of CPU
python tools/predict/aot_table.py --cases d20:v5e-8 --programs sft --device-batch-size 8

Nothing is run, so no number here is a measurement. hlo_cost.py counts a program's operations, loop bodies as
often as they run, and roofline.py says how counts become bounds of the time.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tyro
from hlo_cost import cost
from roofline import RATES, append, attention_flops, bounds, head_split, provenance, sending, spans

from nanochat_jax.cli.device import peak_flops
from nanochat_jax.distributed.device_memory import beside_arguments, is_out_of_memory, parse_memory_error
from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.model.cost import flops_per_token, parameter_counts
from nanochat_jax.train import preflight, scaling_laws

CASES = ("d20:v5e-8", "d20:v6e-8", "d34:v5p-8", "d34:v5e-256:data=128,model=2")


@dataclasses.dataclass(frozen=True)
class Table:
    """Compile for TPU slices that are not here."""

    cases: tuple[str, ...] = CASES  # depth:slice, or depth:slice:mesh
    programs: tuple[str, ...] = ("sft", "decode")
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `preflight` reads of a stage's settings."""

    preflight: str
    mesh: str
    remat: str
    attention: str
    dtype: str = "bfloat16"
    replicate: bool = False


def compiler_of(table: Table, case: str) -> preflight.Compiler:
    depth, slice_name, *mesh = case.split(":")
    settings = Settings(slice_name, "".join(mesh), table.remat, table.attention)
    place = preflight.start(settings)
    dials = {"aspect_ratio": 64, "head_dim": 128, "window_pattern": "SSSL", "max_seq_len": table.max_seq_len}
    model = scaling_laws.config_of_depth(int(depth.removeprefix("d")), **dials, vocab_size=table.vocab_size)
    shards = row_shards(place.mesh)
    rows = min(table.device_batch_size, max(1, table.total_batch_size // (table.max_seq_len * shards)))
    passes = max(1, table.total_batch_size // (table.max_seq_len * shards * rows))
    batch = preflight.Batch(passes, rows * shards, table.max_seq_len)
    return preflight.Compiler(settings, place, model, batch, packed=True)


def measure(table: Table, case: str, program: str) -> dict[str, Any]:
    """One line of the table."""
    compiler = compiler_of(table, case)
    place, model, batch = compiler.place, compiler.model, compiler.batch
    chip = place.mesh.devices.flat[0].device_kind
    rollouts = preflight.Rollouts(max(1, table.slots // 16), 16, table.slots, table.max_new_tokens)
    line = {
        "case": case,
        "program": program,
        "chips": place.mesh.size,
        "chip": chip,
        "mesh": dict(place.mesh.shape),
        "parameters": parameter_counts(model)["total"],
        "attention": compiler.attention,
        "memory_of_a_chip": place.memory,
    }
    if program == "sft":
        line |= {"passes": batch.micro_batches, "rows_a_pass": batch.rows, "T": batch.T, "remat": compiler.remat}
    else:
        line |= {"slots": table.slots, "new_tokens": table.max_new_tokens, "chunk": rollouts.chunk}
    began = time.perf_counter()
    try:
        compiled = compiler.train_step() if program == "sft" else compiler.decode(rollouts)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        asked = parse_memory_error(error)[0]
        return line | {"fits": False, "memory_asked": asked, "said": str(error).splitlines()[0][:300]}
    line["compile_seconds"] = round(time.perf_counter() - began, 1)
    sizes, text = compiled.memory_analysis(), compiled.as_text()
    if table.hlo:
        table.hlo.mkdir(parents=True, exist_ok=True)
        (table.hlo / f"{case.replace(':', '_')}_{program}.hlo").write_text(text)
    held = {"arguments": sizes.argument_size_in_bytes, "beside_them": beside_arguments(compiled)}
    line["temporaries"] = sizes.temp_size_in_bytes
    if program == "decode":
        held["train_state"] = compiler.state_bytes  # stays where it is meanwhile
    line |= {"held": held, "held_in_all": sum(held.values()), "fits": sum(held.values()) <= place.memory}

    peak, (memory_rate, link_rate) = peak_flops(chip), RATES[chip]
    steps = batch.micro_batches if program == "sft" else rollouts.chunk
    found = cost(text, unknown_trips=steps, rates=(peak, memory_rate))
    kernels, mesh = 0.0, dict(place.mesh.shape)
    if found.kernels:
        backward = 7 if program == "sft" else 0
        rows = batch.rows // row_shards(place.mesh) * batch.micro_batches
        kernels = attention_flops(model, batch.T, rows, 2 + backward) / head_split(model, mesh)
    seconds = bounds(found.seconds, kernels / peak, sending(found.groups, mesh, spans(place.mesh), link_rate))
    tokens = batch.rows * batch.T * batch.micro_batches if program == "sft" else table.slots * rollouts.chunk
    line |= {
        "flops": found.flops + kernels,
        "memory_traffic": found.bytes,
        "collectives": found.collectives,
        "seconds": seconds,
        "tokens_per_second_at_most": tokens / seconds["at_least"],
        "tokens_per_second_if_nothing_overlaps": tokens / seconds["at_most"],
        "unknown_loops": found.unknown_loops,
    }
    if program == "sft":
        useful = tokens * flops_per_token(model, batch.T) / (peak * place.mesh.size)
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
    rows = []
    for case in table.cases:
        for program in table.programs:
            if program not in ("sft", "decode"):
                raise ValueError(f"--programs must be sft or decode, got {program!r}")
            line = measure(table, case, program) | provenance()
            print(json.dumps(line), flush=True)
            if table.out:
                append(table.out, line)
            rows.append(row(line))
    print("\n".join(rows), file=sys.stderr)


if __name__ == "__main__":
    try:
        main(tyro.cli(Table))
    except ValueError as e:
        sys.exit(f"error: {e}")
