"""How likely a part of a text is after what stands before it, many texts at a time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.evals.passes import check_finite, run_passes
from nanochat_jax.inference.shapes import coarse_size
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.model.loss import CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU, pick_logprob

LENGTH_STEP = 32  # tokens; sizes of texts and spans are multiples of it, and a block has so many at most


class Span(NamedTuple):
    """The tokens of a text from `start` to before `end`; `start` is at least 1, or the span is empty."""

    ids: np.ndarray  # int32 [n], the whole text
    start: int
    end: int


class SpanScore(NamedTuple):
    """What a model says of a span."""

    mean_loss: float  # nats a token, at temperature 1; NaN for an empty span
    greedy: bool  # each of its tokens is the likeliest, the first of equals


def make_span_scores(
    config: GPTConfig,
    mesh: Mesh,
    pad: int,
    *,
    dtype=jnp.float32,
    attention: str = "chunked",
    rows: int | None = None,
) -> Callable[..., list[SpanScore]]:
    """-> span_scores(params, spans, progress=None): a SpanScore for each Span.

    The logits are those of the spans alone, a block at a time. pad, rows, progress: see `run_passes`.
    FloatingPointError: the model gives a token of a span no finite log-probability.
    """
    graphdef, _ = abstract_gpt(config, dtype, attention)
    elements = CHUNK_ELEMENTS_CPU if jax.default_backend() == "cpu" else CHUNK_ELEMENTS
    devices = row_shards(mesh)

    @jax.jit
    def score(params, batch):  # ids int32 [B,T], at int32 [B,S] -> (float32 [B], bool [B])
        model = nnx.merge(graphdef, params)
        x, _ = model.hidden(batch["ids"])
        at, (B, S) = batch["at"], batch["at"].shape
        targets = jnp.take_along_axis(batch["ids"], at, 1)
        x = jnp.take_along_axis(x, jnp.maximum(at - 1, 0)[..., None], 1)  # that the token is predicted from
        block = LENGTH_STEP
        while block > 1 and B // devices * block * config.vocab_size > elements:
            block //= 2

        def scored(inputs):
            x, targets = inputs  # [B,block,D], int32 [B,block]
            logits = model.logits(x)
            return pick_logprob(logits, targets)[0], jnp.argmax(logits, -1) == targets

        def split(a):  # [B,S,...] -> [S / block,B,block,...]
            return jnp.moveaxis(a.reshape(B, S // block, block, *a.shape[2:]), 1, 0)

        logprobs, likeliest = (
            jnp.moveaxis(a, 0, 1).reshape(B, S) for a in jax.lax.map(scored, (split(x), split(targets)))
        )
        counted = at > 0
        return -jnp.sum(jnp.where(counted, logprobs, 0.0), 1), jnp.all(likeliest | ~counted, 1)

    def span_scores(
        params, spans: Sequence[Span], progress: Callable[[int, int], None] | None = None
    ) -> list[SpanScore]:
        def positions(numbers, shape):
            """Of the spans' tokens; 0, where no span begins, is no token."""
            B, T = shape
            lengths = [spans[i].end - spans[i].start for i in numbers]
            at = np.zeros((B, coarse_size(max(lengths), T)), np.int32)
            for row, (i, length) in enumerate(zip(numbers, lengths)):
                at[row, :length] = np.arange(spans[i].start, spans[i].end) if spans[i].start else 0
            return {"at": at}

        scores = [None] * len(spans)
        passes = run_passes(
            lambda batch: score(params, batch),
            [span.ids for span in spans],
            positions,
            mesh=mesh,
            pad=pad,
            step=LENGTH_STEP,
            rows=rows,
            progress=progress,
        )
        for numbers, (losses, greedy) in passes:
            check_finite(losses, "in a text that is scored")
            for i, loss, all_likeliest in zip(numbers, losses, greedy):
                length = spans[i].end - spans[i].start if spans[i].start else 0
                scores[i] = SpanScore(float(loss) / length if length else float("nan"), bool(all_likeliest))
        return scores

    return span_scores
