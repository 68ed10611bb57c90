"""What pretraining and fine-tuning share: both train on packed rows, and validate by bits per byte on others."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.cli.settings import flag, require
from nanochat_jax.data.batches import train_batches, without_documents
from nanochat_jax.data.rows import PackedRows
from nanochat_jax.distributed.mesh import row_part, row_shards
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.evals.bits_per_byte import make_bits_per_byte, measure_rows
from nanochat_jax.model.cost import flops_per_token
from nanochat_jax.train.loop import Run, open_run
from nanochat_jax.train.measurement import Measurement
from nanochat_jax.train.metrics import Throughput
from nanochat_jax.train.plan import BatchShape, Plan
from nanochat_jax.train.start import Initial, Start


def row_batch_shape(cfg: Any, mesh: Mesh, log: Callable = print0) -> BatchShape:
    """The shape of a step's batch: as much gradient accumulation as --max-seq-len, --device-batch-size and
    --total-batch-size need; ValueError where these do not fit together."""
    for name in ("max_seq_len", "device_batch_size", "total_batch_size"):
        size = getattr(cfg, name)
        require(0 < size < 2**31, f"{flag(name)} must be from 1 to 2147483647, got {size}")
    rows, T, total = cfg.device_batch_size * row_shards(mesh), cfg.max_seq_len, cfg.total_batch_size
    per_pass = rows * T
    if total % per_pass:
        nearest = max(1, round(total / per_pass)) * per_pass
        raise ValueError(
            f"--total-batch-size={total} must be a multiple of {per_pass:,} tokens (--device-batch-size="
            f"{cfg.device_batch_size} x --max-seq-len={T} x {row_shards(mesh)} devices that rows are split over); "
            f"nearest: {nearest}"
        )
    passes = total // per_pass
    log(f"Total batch size: {total:,} tokens, as {passes} micro-batch{'es' * (passes > 1)} of {rows} x {T}")
    return BatchShape(passes, rows, T)


def rows_before(start: Start, plan: Plan, step: int) -> int:
    """Rows that the run has consumed when `step` steps are done: its place in the data."""
    return start.record.get("rows_consumed", 0) + (step - start.first_step) * plan.batch.rows_per_step


@contextlib.contextmanager
def open_row_run(
    start: Start,
    initial: Initial,
    rows: PackedRows,
    *,
    total: int,
    measurements: Sequence[Measurement],
    peak_flops: float | None,
    record: Callable[[int], dict] = lambda step: {},
) -> Iterator[tuple[Run, Iterator[dict[str, jax.Array]]]]:
    """While it is entered, the run (see `open_run`) and an endless iterator of its batches from its first step on:
    leaves [A,B,T] on the devices. With --no-document-mask a row is one document, as in nanochat.

    peak_flops: of all devices together, None: unknown. record: step -> what its checkpoint records beside what every
    run's does and the place in the data."""
    plan = initial.plan

    def record_rows(step: int) -> dict:
        consumed = rows_before(start, plan, step)
        return {"rows_consumed": consumed, **rows.record(consumed), **record(step)}

    process_index, process_count = row_part(plan.mesh)
    batches = train_batches(
        rows,
        start_row=rows_before(start, plan, start.first_step),
        rows_per_step=plan.batch.rows_per_step,
        micro_batches=plan.batch.micro_batches,
        process_index=process_index,
        process_count=process_count,
    )
    opened = open_run(
        start,
        initial,
        total=total,
        record=record_rows,
        console=throughput_line,
        measurements=measurements,
        throughput=Throughput(plan.batch.tokens_per_step, flops_per_token(plan.model, plan.batch.T), peak_flops),
    )
    with contextlib.closing(batches), opened as run:
        separate = start.cfg.document_mask
        yield run, (to_global(b if separate else without_documents(b), plan.mesh) for b in batches)


def rows_validated(plan: Plan, tokens: int) -> int:
    """Rows of the passes that hold so many tokens, and of one at least."""
    return max(1, tokens // (plan.batch.rows * plan.batch.T)) * plan.batch.rows


def validation(
    rows: PackedRows | None, plan: Plan, token_bytes: np.ndarray, *, every: int, tokens: int, document_mask: bool
) -> Measurement:
    """Bits per byte (val_bpb) on the first `tokens` of `rows`, in whole passes, the same at each call. rows: None
    measures nothing. token_bytes int32 [V]: bytes of each token, 0 for specials."""
    if rows is None:
        return Measurement("validation", -1, lambda params, progress: {})
    B, n_rows = plan.batch.rows, rows_validated(plan, tokens)
    bits_per_byte = make_bits_per_byte(plan.model, token_bytes, dtype=plan.dtype, attention=plan.attention)

    def measure(params, progress: Callable[[int, int], None]) -> dict[str, float]:
        value = measure_rows(
            bits_per_byte,
            params,
            rows,
            plan.mesh,
            n_rows=n_rows,
            rows_per_batch=B,
            document_mask=document_mask,
            progress=progress,
        )
        return {"val_bpb": value}

    return Measurement("validation", every, measure, at_start=True, in_step=True, flag="--eval-every")


def throughput_line(record: Mapping[str, float]) -> str:
    """The console's line of a step."""
    mfu = record["mfu"]
    shown = "   -  " if mfu is None else f"{100 * mfu:5.1f}%"
    return (
        f"loss {record['smoothed_loss']:.4f} | lrm {record['lr_multiplier']:.3f} | "
        f"{record['tokens_per_second']:,.0f} tok/s | mfu {shown} | {record['percent']:.1f}% | epoch {record['epoch']}"
    )
