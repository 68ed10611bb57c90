"""From samples to training rows, in NumPy: each prompt with one sample is a document. And their record on disk.

A sample is an `samples.Sample`: tokens, mask (1 sampled, 0 forced), log-probabilities, ended, tool_calls.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.data.packing import plan_epoch
from nanochat_jax.data.rows import Batch, assemble
from nanochat_jax.files import bucket
from nanochat_jax.files.paths import print0, process_index

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
    those over the tokens of all samples. So leaving a group out saves its backward pass and changes no number.
    ValueError: the rows do not suffice (see `most_rows`).
    """
    advantages = _matching(prompts, samples, advantages)
    trained = np.array([[np.count_nonzero(sample.mask) for sample in group] for group in samples])
    kept = np.full(len(prompts), True) if every_group else advantages.any(1)
    scaled = advantages * (trained[kept].sum() / max(1, trained.sum()))
    documents = [
        (prompts[p], sample, scaled[p, g]) for p in np.flatnonzero(kept) for g, sample in enumerate(samples[p])
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


def step_statistics(samples: Groups, rewards: np.ndarray, advantages: np.ndarray) -> dict[str, float]:
    """What a step's samples [P][G], rewards and advantages [P,G] show, as logged.

    reward: mean; pass_rate: share of samples with a reward above 0; no_signal: share of groups without an advantage;
    length_mean, length_max: generated tokens; cut: share not ended by an end token; tool_calls, tool_failed: shares of
    samples with a call, with a failed one; entropy: of the sampling distribution, in nats a sampled token, estimated by
    the mean of -log p over what was sampled.
    """
    rewards = np.asarray(rewards, np.float64)
    flat = [sample for group in samples for sample in group]
    lengths = np.array([len(sample.tokens) for sample in flat])
    sampled = np.concatenate([sample.logprobs[sample.mask > 0] for sample in flat]).astype(np.float64)
    return {
        "reward": float(rewards.mean()),
        "pass_rate": float((rewards > 0).mean()),
        "no_signal": 1 - float(np.any(advantages, 1).mean()),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "cut": float(np.mean([not sample.ended for sample in flat])),
        "tool_calls": float(np.mean([bool(sample.tool_calls) for sample in flat])),
        "tool_failed": float(np.mean([any(call.result is None for call in sample.tool_calls) for sample in flat])),
        "entropy": float(-sampled.mean()) if sampled.size else 0.0,
    }


class RolloutLog:
    """rollouts.jsonl in a run's folder, a sample a line, for whoever wants to know what the model does.

    A checkpoint records `saved()`, the file's size; a run that goes on from it begins with that size, so that the file
    becomes the one of a run that nothing interrupted.
    """

    def __init__(self, folder: Path, size: int = 0):
        self.file = None
        if process_index():  # process 0 writes for all
            return
        self.kept = folder / "rollouts.jsonl"
        path = bucket.fetch(self.kept, exact=True)
        self.file = path.open("a+b")
        if self.file.tell() > size:
            self.file.truncate(size)
        elif self.file.tell() < size:  # of a folder that was copied or restored in part
            print0(f"NOTE: {path} has lost answers of earlier steps: {self.file.tell():,} of {size:,} bytes are there")
            self.file.seek(max(0, self.file.tell() - 1))
            if self.file.read() not in (b"", b"\n"):
                self.file.write(b"\n")  # what is written next is a line of its own

    def write(
        self,
        step: int,
        example: int,
        prompt: Sequence[int],
        samples: Sequence[Any],
        rewards: np.ndarray,
        advantages: np.ndarray,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """The samples of one prompt, with their rewards and advantages [G]; floats as short as float32 can be told."""
        if not self.file:
            return
        for number, (sample, reward, advantage) in enumerate(zip(samples, rewards, advantages, strict=True)):
            record = {
                "step": step,
                "example": example,
                "sample": number,
                "reward": float(reward),
                "advantage": _short(advantage),
                "ended": bool(sample.ended),
                "prompt": decode(prompt),
                "text": decode(sample.tokens),
                "tools": [{"expression": call.expression, "result": call.result} for call in sample.tool_calls],
                "tokens": sample.tokens.tolist(),
                "mask": sample.mask.tolist(),
                "logprobs": [_short(value) for value in sample.logprobs],
                "policy_logprobs": [_short(value) for value in sample.policy_logprobs],
            }
            self.file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self.file.flush()  # whoever follows the file sees whole steps

    def saved(self) -> int:
        """Bytes so far, all of them on disk, or in the bucket."""
        if not self.file:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        bucket.send(Path(self.file.name), self.kept)
        return self.file.tell()

    def close(self) -> None:
        if self.file:
            self.file.close()


def _short(value: np.float32) -> float:
    return float(str(np.float32(value)))
