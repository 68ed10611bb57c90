"""How likely parts of texts are after what stands before them, many texts at a time.

The texts of an example mostly begin alike: they are the same question with one answer or another, behind the same
other examples. What they have in common goes through the model once; each text goes on from its keys and values.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.evals.passes import check_finite, run_passes
from nanochat_jax.inference.kv_cache import reach
from nanochat_jax.inference.shapes import coarse_size, padded_size
from nanochat_jax.model.attention import decode_attention
from nanochat_jax.model.gpt import GPT, GPTConfig, abstract_gpt
from nanochat_jax.model.loss import CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU, pick_logprob

REST_STEP = 16  # tokens; sizes of what comes after a prefix are a `coarse_size` of it


class Span(NamedTuple):
    """The tokens of a text from `start` to before `end`; `start` is at least 1, or the span is empty."""

    ids: np.ndarray  # int32 [n], the whole text
    start: int
    end: int


class SpanScore(NamedTuple):
    """What a model says of a span."""

    mean_loss: float  # nats a token, at temperature 1; NaN for an empty span
    greedy: bool  # each of its tokens is the likeliest, the first of equals


class _Example(NamedTuple):
    """Spans of texts that begin with the same tokens."""

    number: int  # in the list that was given
    spans: Sequence[Span]
    prefix: np.ndarray  # int32 [at least 1]: tokens that all texts begin with, before all spans
    size: int  # tokens that a row has for what comes after the prefix of a text


def common_length(sequences: Sequence[np.ndarray]) -> int:
    """How many tokens at the beginning all sequences have in common."""
    shortest = min(map(len, sequences))
    stacked = np.stack([tokens[:shortest] for tokens in sequences])
    differing = np.flatnonzero((stacked != stacked[0]).any(0))
    return int(differing[0]) if len(differing) else shortest


def make_span_scores(
    config: GPTConfig,
    mesh: Mesh,
    pad: int,
    *,
    dtype=jnp.float32,
    attention: str = "chunked",
    rows: int | None = None,
) -> Callable[..., list[list[SpanScore]]]:
    """-> span_scores(params, examples, progress=None): for each example, some Spans, a SpanScore of each.

    All texts of an example must begin with the same token; the more they have in common, the less an example costs. The
    logits are those of what comes after that. pad, rows, progress: see `run_passes`, for which an example is one text.
    FloatingPointError: the model gives a token of a span no finite log-probability.
    """
    graphdef, _ = abstract_gpt(config, dtype, attention)
    elements = CHUNK_ELEMENTS_CPU if jax.default_backend() == "cpu" else CHUNK_ELEMENTS
    devices = row_shards(mesh)

    # Two programs: that of prefixes, with the attention of long rows in it, is the same whatever comes after them.
    @jax.jit
    def read_prefixes(params, ids, length):
        """ids int32 [B,T], length [B] -> (the last token's hidden state [B,1,D] and id [B,1], each layer's k and v)."""
        x, kvs = nnx.merge(graphdef, params).hidden(ids)
        last = length[:, None] - 1
        return jnp.take_along_axis(x, last[..., None], 1), jnp.take_along_axis(ids, last, 1), kvs

    @jax.jit
    def score_rest(params, prefixes, batch):
        """`rest` int32 [B,M,S]: what comes after the prefixes, of `length` [B], in the texts of each, of which the
        tokens from `start` to before `end` [B,M] are scored -> (float32 [B,M] summed loss, bool [B,M] greedy)."""
        model = nnx.merge(graphdef, params)
        (last, previous, kvs), rest = prefixes, batch["rest"]
        B, M, S = rest.shape
        x = _continue(model, rest, batch["length"], previous, kvs)
        x = jnp.concatenate([jnp.repeat(last, M, 0), x[:, :-1]], 1)  # that each token is predicted from
        block = REST_STEP
        while block > 1 and B // devices * M * block * config.vocab_size > elements:
            block //= 2

        def scored(inputs):
            x, targets = inputs  # [B * M,block,D], int32 [B * M,block]
            logits = model.logits(x)
            return pick_logprob(logits, targets)[0], jnp.argmax(logits, -1) == targets

        def split(a):  # [B * M,S,...] -> [S / block,B * M,block,...]
            return jnp.moveaxis(a.reshape(B * M, S // block, block, *a.shape[2:]), 1, 0)

        logprobs, likeliest = (
            jnp.moveaxis(a, 0, 1).reshape(B, M, S)
            for a in jax.lax.map(scored, (split(x), split(rest.reshape(B * M, S))))
        )
        at = jnp.arange(S)[None, None]
        counted = (at >= batch["start"][..., None]) & (at < batch["end"][..., None])
        return -jnp.sum(jnp.where(counted, logprobs, 0.0), -1), jnp.all(likeliest | ~counted, -1)

    def span_scores(
        params, examples: Sequence[Sequence[Span]], progress: Callable[[int, int], None] | None = None
    ) -> list[list[SpanScore]]:
        scores: list[list[SpanScore]] = [[]] * len(examples)
        texts = padded_size(max(map(len, examples), default=0))
        done = 0
        sized = sorted((_example(i, spans) for i, spans in enumerate(examples)), key=lambda example: example.size)
        for size, some in itertools.groupby(sized, key=lambda example: example.size):
            some = list(some)

            def after_prefixes(numbers, shape, some=some, size=size):
                rest = np.full((shape[0], texts, size), pad, np.int32)
                start, end = np.zeros((2, shape[0], texts), np.int32)
                length = np.ones(shape[0], np.int32)
                for row, example in enumerate(some[i] for i in numbers):
                    length[row] = n = len(example.prefix)
                    for text, span in enumerate(example.spans):
                        rest[row, text, : max(span.end - n, 0)] = span.ids[n : span.end]
                        start[row, text], end[row, text] = (span.start - n, span.end - n) if span.start else (0, 0)
                return {"rest": rest, "start": start, "end": end, "length": length}

            passes = run_passes(
                lambda batch: score_rest(params, read_prefixes(params, batch.pop("ids"), batch["length"]), batch),
                [example.prefix for example in some],
                after_prefixes,
                mesh=mesh,
                pad=pad,
                size=partial(coarse_size, factor=2),
                beside=texts * size,
                rows=rows,
                progress=progress and (lambda count, _, before=done: progress(before + count, len(examples))),
            )
            for numbers, (losses, greedy) in passes:
                check_finite(losses, "in a text that is scored")
                for example, *of_texts in zip((some[i] for i in numbers), losses, greedy):
                    scores[example.number] = [
                        SpanScore(float(loss) / count if count else float("nan"), bool(all_likeliest))
                        for count, loss, all_likeliest in zip(map(_count, example.spans), *of_texts)
                    ]
            done += len(some)
        return scores

    return span_scores


def _continue(model: GPT, rest, length, previous, prefix):
    """Hidden states [B * M,S,D] of the tokens rest [B,M,S] that come after prefixes of `length` [B] tokens, the last of
    them `previous` [B,1]; prefix: k and v [B,T,K,H] of each layer, also behind the length."""
    config = model.config
    B, M, S = rest.shape
    # All tokens of all texts of an example attend to the one prefix: to `decode_attention` they are rows of a prompt.
    prefix = [tuple(jnp.moveaxis(a, 1, 2) for a in kv) for kv in prefix]
    position = length[:, None] + jnp.arange(S)[None]  # [B,S]
    keys = jnp.arange(prefix[0][0].shape[2])[None, None]
    back = position[..., None] - keys  # [B,S,T]
    within = jnp.arange(S)[:, None] - jnp.arange(S)[None]  # [S,S]

    def visible(window):
        in_prefix = (keys < length[:, None, None]) & (back <= reach(window))
        in_rest = (within >= 0) & (within <= reach(window))
        return jnp.repeat(in_prefix, M, 0).reshape(B * M * S, -1), jnp.tile(in_rest, (B * M, 1))

    seen = {window: visible(window) for window in set(config.windows)}

    def attend(layer, q, k, v):
        own = (jnp.moveaxis(a, 1, 2) for a in (k, v))
        in_prefix, in_rest = seen[config.windows[layer]]
        parts = [(*prefix[layer], in_prefix), (*own, in_rest)]
        y = decode_attention(q.reshape(-1, *q.shape[2:]), parts, config.head_dim**-0.5)
        return y.reshape(q.shape), ()

    return model.hidden(
        rest.reshape(B * M, S),
        positions=jnp.repeat(position, M, 0),
        previous=jnp.repeat(previous[:, 0], M),
        attend=attend,
    )[0]


def _example(number: int, spans: Sequence[Span]) -> _Example:
    """An example with the sizes that its rows have in a pass."""
    starts = [span.start if _count(span) else span.end for span in spans]
    prefix = max(1, min(common_length([span.ids for span in spans]), *starts))
    longest = max(1, *(span.end - prefix for span in spans))
    return _Example(number, spans, spans[0].ids[:prefix], coarse_size(longest, step=REST_STEP))


def _count(span: Span) -> int:
    """Tokens of a span that are scored."""
    return span.end - span.start if span.start else 0
