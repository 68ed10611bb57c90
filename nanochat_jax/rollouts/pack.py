"""From samples to training rows, in NumPy: each prompt with one sample is a document.

A sample is an `samples.Sample`: tokens, mask (1 sampled, 0 forced), log-probabilities, ended, tool_calls.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat_jax.data.packing import plan_epoch
from nanochat_jax.data.rows import Batch, assemble

Groups = Sequence[Sequence[Any]]  # samples of each prompt, [P][G]


def most_rows(samples: int, longest: int, T: int) -> int:
    """Rows of T tokens that suffice for so many documents of at most `longest` tokens, however long each turns out.

    A shape that depends on settings alone: the train step compiles once. ValueError: a document cannot fit."""
    if longest > T + 1:
        raise ValueError(
            f"the longest prompt with its answer takes {longest} tokens and must fit into a row of {T} and its last "
            "target: lower --max-new-tokens, or use longer rows"
        )
    return -(-samples // ((T + 1) // longest))  # a row is closed only when what is left does not fit


def packed_rows(
    prompts: Sequence[Sequence[int]],
    samples: Groups,
    advantages: np.ndarray,
    T: int,
    *,
    bos: int,
    micro_batches: int,
    rows: int,
    fields: Sequence[str] = (),
    every_group: bool = False,
) -> Batch:
    """The samples of one step as packed documents that do not see each other, leaves [A,B,T] with A = micro_batches,
    B = rows; what is missing are rows of padding, which weigh nothing.

    prompts: P lists of ids; samples [P][G]; advantages [P,G]. inputs, targets, document_start int32 as `data.assemble`
    gives them; weights float32: 1 where the target was sampled, 0 where it is the prompt's or forced. The end token is
    part of its sample. For each target, float32, 0 in front of the sample: advantages, and the samples' arrays that
    `fields` names ("logprobs", "policy_logprobs").

    Groups whose advantages are all 0 are left out (every_group keeps them, for a penalty that reaches them too), but
    their tokens stay in the normaliser: the train step divides by the tokens in the rows, so advantages are scaled by
    those over the tokens of all samples. So leaving a group out saves its backward pass and changes no number. A sample
    of which no token was sampled, or none is to be trained, is left out too.
    ValueError: the rows do not suffice (see `most_rows`).
    """
    advantages = _matching(prompts, samples, advantages)
    trained = np.array([[np.count_nonzero(sample.mask) for sample in group] for group in samples])
    kept = np.full(len(prompts), True) if every_group else advantages.any(1)
    scaled = advantages * (trained[kept].sum() / max(1, trained.sum()))
    documents = [
        (prompts[p], sample, scaled[p, g])
        for p in np.flatnonzero(kept)
        for g, sample in enumerate(samples[p])
        if trained[p, g]
    ]
    lengths = np.array([len(prompt) + len(sample.tokens) for prompt, sample, _ in documents], np.int64)
    most_rows(len(documents), lengths.max(initial=1), T)
    plan = plan_epoch(lengths, np.arange(len(lengths)), T + 1, max(1, len(lengths)))
    if plan.n_rows > micro_batches * rows:
        raise ValueError(
            f"the samples fill {plan.n_rows} rows of {T} tokens, which must fit into {micro_batches} micro-batches of "
            f"{rows} rows: see most_rows for the number that always does"
        )
    packed = [[documents[i] for i in plan.row(r)] for r in range(plan.n_rows)]
    packed += [[]] * (micro_batches * rows - plan.n_rows)
    return _lay_out(packed, T, bos, fields, rows)


def nanochat_rows(
    prompts: Sequence[Sequence[int]],
    samples: Groups,
    advantages: np.ndarray,
    T: int,
    *,
    pad: int,
    rows: int,
    fields: Sequence[str] = (),
) -> Batch:
    """nanochat's passes: micro-batches of `rows` samples of one prompt, a row each, padded with `pad` (assistant_end).

    Leaves [P * G / B, B, T] as those of `packed_rows`, advantages as given. The end token is left out, so ending a turn
    is not trained; every group is there. ValueError: the samples of a prompt cannot be split into such passes.
    """
    advantages = _matching(prompts, samples, advantages)
    if advantages.shape[1] % rows:
        raise ValueError(
            f"--num-samples must be a multiple of the {rows} rows of a pass (--device-batch-size), "
            f"got {advantages.shape[1]}"
        )
    documents = [
        [(prompt, sample, advantage)]
        for prompt, group, line in zip(prompts, samples, advantages)
        for sample, advantage in zip(group, line)
    ]
    most_rows(1, max(len(p) + len(s.tokens) - s.ended for [(p, s, _)] in documents), T)
    return _lay_out(documents, T, pad, fields, rows, end_token=False)


def _matching(prompts, samples, advantages) -> np.ndarray:
    """The advantages, where their shape is that of the samples."""
    advantages = np.asarray(advantages)
    if advantages.ndim != 2 or [len(advantages)] * 2 != [len(prompts), len(samples)] or not len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(samples)} groups need advantages [P,G], {advantages.shape=}")
    if {len(group) for group in samples} != {advantages.shape[1]}:
        raise ValueError(f"every group must have {advantages.shape[1]} samples, got {[len(g) for g in samples]}")
    return advantages


def _lay_out(rows: list[list[tuple]], T, pad, fields, B, end_token=True) -> Batch:
    """Rows of (prompt, sample, advantage) -> leaves [A,B,T]. What belongs to a token is laid out as its mask is."""

    def placed(name: str) -> Batch:
        def document(prompt, sample, advantage):
            n = len(sample.tokens) - (sample.ended and not end_token)
            values = np.full(n, advantage) if name == "advantages" else getattr(sample, name)[:n]
            ids = np.concatenate([np.asarray(prompt, np.int32), sample.tokens[:n]])
            return ids, np.concatenate([np.zeros(len(prompt), np.float32), values])

        return assemble([[document(*one) for one in row] for row in rows], T, pad)

    batch = placed("mask") | {name: placed(name)["weights"] for name in ("advantages", *fields)}
    return {name: leaf.reshape(-1, B, T) for name, leaf in batch.items()}
