"""The shape of RL's batches, from the settings alone, so that the train step compiles once."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.rollouts.pack import most_rows


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of every batch, from the settings alone: the train step compiles once."""

    T: int
    rows: int  # of a micro-batch, all devices together
    micro_batches: int

    def rows_per_device(self, mesh: Mesh) -> int:
        """Of a micro-batch."""
        return self.rows // row_shards(mesh)


def plan_shape(cfg: Any, mesh: Mesh, longest: int, sequence_len: int) -> Shape:
    """longest: tokens of the longest prompt with an answer. ValueError: the sizes do not fit together."""
    T = cfg.max_seq_len or max(sequence_len, longest - 1)
    samples, shards = cfg.examples_per_step * cfg.num_samples, row_shards(mesh)
    if cfg.objective == "nanochat":
        if cfg.num_samples % cfg.device_batch_size or cfg.device_batch_size % shards:
            raise ValueError(
                f"--objective nanochat: a pass has --device-batch-size={cfg.device_batch_size} answers to one problem, "
                f"which must divide --num-samples={cfg.num_samples} and be a multiple of the {shards} devices "
                "that rows are split over"
            )
        return Shape(longest - 1, cfg.device_batch_size, samples // cfg.device_batch_size)
    most = most_rows(samples, longest, T)
    rows = shards * min(cfg.device_batch_size, -(-most // shards))
    return Shape(T, rows, -(-most // rows))
