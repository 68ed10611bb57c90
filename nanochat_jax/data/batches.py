"""Batches of packed rows: endless ones for training, fixed ones for validation, and a process's part of each."""

from collections.abc import Iterator

import grain
import numpy as np

from nanochat_jax.data.rows import Batch, PackedRows, assemble


def train_batches(
    rows: PackedRows,
    *,
    start_row: int,
    rows_per_step: int,
    micro_batches: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator:
    """Endless iterator of this process's batches, arrays [A, B/P, T]; close() it when done.

    Step k takes the rows from start_row + k * rows_per_step on. Micro-batch a is their a-th run of B rows, of which
    process p has the p-th run of B/P: the processes' batches, joined on axis 1, are the batch of one process.
    prefetch: steps prepared ahead by a thread; 0 prepares each when it is asked for.
    ValueError: the rows of a step cannot be split like that.
    """
    share = _rows_of_process(rows_per_step, micro_batches, process_index, process_count)
    if start_row < 0:
        raise ValueError(f"start_row must be at least 0, got {start_row}")

    def step(k: int) -> Batch:
        batch = rows.batch((start_row + k * rows_per_step + share).ravel())
        return {name: array.reshape(*share.shape, -1) for name, array in batch.items()}

    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(1 << 40).map(step).to_iter_dataset(options))


def validation_batches(
    rows: PackedRows, *, n_rows: int, rows_per_batch: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """This process's part of the first `n_rows` rows of section 0, the same at each call: arrays [B/P, T].

    No row comes twice: a shorter section gives fewer, and rows of padding fill the last batch up.
    """
    share = _rows_of_process(rows_per_batch, 1, process_index, process_count)[0]
    n_rows = min(n_rows, rows.plan(0).n_rows)
    for start in range(0, n_rows, rows_per_batch):
        wanted = (start + share)[start + share < n_rows]
        padding = [[]] * (len(share) - len(wanted))
        yield assemble([rows.contents(int(row)) for row in wanted] + padding, rows.T, rows.bos)


def _rows_of_process(n_rows: int, micro_batches: int, process_index: int, process_count: int) -> np.ndarray:
    """Which of a step's n_rows = A * B rows are this process's: int64 [A, B/P]."""
    parts = micro_batches * process_count
    if min(n_rows, parts) < 1 or n_rows % parts:
        raise ValueError(
            f"a batch of {n_rows} rows cannot be split into {micro_batches} micro-batches for {process_count} "
            f"processes: its rows must be a multiple of {parts}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process index must be in 0..{process_count - 1}, got {process_index}")
    return np.arange(n_rows).reshape(micro_batches, process_count, -1)[:, process_index]


def without_documents(batch: Batch) -> Batch:
    """The batch with every row as one document: conversations see those before them, as in nanochat."""
    return batch | {"document_start": np.zeros_like(batch["document_start"])}
