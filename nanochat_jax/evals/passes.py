"""Texts of many lengths through a model: those of similar length share a pass, and passes have few shapes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.distributed.sharding import to_global
from nanochat_jax.inference.shapes import padded_size

# Of the texts in one pass, per device: on CPU as many as fit its cache (with four times more it takes 1.4 times as
# long).
PASS_TOKENS_CPU, PASS_TOKENS = 2048, 16384


def run_passes(
    compute: Callable[[dict[str, jax.Array]], Any],
    texts: Sequence[Sequence[int]],
    others: Callable[[Sequence[int], tuple[int, int]], dict[str, np.ndarray]],
    *,
    mesh: Mesh,
    pad: int,
    size: Callable[[int], int],
    beside: int = 0,
    rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[list[int], Any]]:
    """(numbers of some texts, what compute found of them, as arrays [B,...] of which the first rows are theirs), until
    all texts (token ids, at least one) have had their turn, the longest first.

    compute: batch -> arrays [B,...]. A batch holds `ids` int32 [B,T], padded with the token `pad` at the end, and what
    others(numbers, (B, T)) gives, arrays with B rows. T is size(tokens of the longest one), B a device's `rows` times
    the devices; by default it is a power of 2, as many rows as fill PASS_TOKENS with the tokens that come `beside` each
    text: few shapes, so few programs are compiled. progress(texts done, texts in all) is called after each pass, with
    at most one more on the devices; what it raises ends the iterator.
    """
    devices = row_shards(mesh)
    tokens = PASS_TOKENS_CPU if jax.default_backend() == "cpu" else PASS_TOKENS

    def dispatched():
        waiting = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        while waiting:
            T = size(len(texts[waiting[0]]))
            fitting = 1 << max(tokens // (T + beside), 1).bit_length() - 1
            B = devices * min(rows or fitting, padded_size(-(-len(texts) // devices)))
            numbers, waiting = waiting[:B], waiting[B:]
            ids = np.full((B, T), pad, np.int32)
            for row, i in enumerate(numbers):
                ids[row, : len(texts[i])] = texts[i]
            yield numbers, compute(to_global({"ids": ids, **others(numbers, (B, T))}, mesh))

    done = 0
    for (numbers, found), _ in itertools.pairwise(itertools.chain(dispatched(), [None])):  # the next one runs already
        yield numbers, jax.device_get(found)
        done += len(numbers)
        if progress:
            progress(done, len(texts))


def check_finite(values: Any, what: str) -> None:
    """FloatingPointError where a number is not finite; what: it was found after."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"the model's logits are not finite {what}: go back to an earlier checkpoint, and lower the learning rates "
            "if this model is in training"
        )
