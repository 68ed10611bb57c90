"""Rollouts between the processes of one run, as bytes."""

import io
import json
from collections.abc import Sequence

import numpy as np

from nanochat_jax.inference.samples import Sample
from nanochat_jax.inference.tools import ToolCall

FIELDS = ("tokens", "mask", "logprobs", "policy_logprobs")  # the arrays of a sample


def to_bytes(drawn: Sequence[tuple[list[Sample], np.ndarray]], cost: Sequence[float]) -> bytes:
    """(samples, rewards) of some problems, and what they cost, for another process; no objects, arrays alone."""
    samples = [sample for group, _ in drawn for sample in group]
    calls = [[(call.expression, call.result, call.timed_out) for call in sample.tool_calls] for sample in samples]
    arrays = {name: np.concatenate([getattr(sample, name) for sample in samples] or [[]]) for name in FIELDS}
    arrays |= {
        "lengths": np.array([len(sample.tokens) for sample in samples], np.int64),
        "turns": np.array([sample.turns for sample in samples], np.int64),
        "ended": np.array([sample.ended for sample in samples], bool),
        "rewards": np.array([rewards for _, rewards in drawn], np.float64),
        "calls": np.frombuffer(json.dumps(calls).encode(), np.uint8),
        "cost": np.array(cost, np.float64),
    }
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def from_bytes(data: bytes) -> tuple[list[tuple[list[Sample], np.ndarray]], np.ndarray]:
    """What `to_bytes` was given."""
    arrays = dict(np.load(io.BytesIO(data), allow_pickle=False))
    calls = [[ToolCall(*call) for call in made] for made in json.loads(arrays["calls"].tobytes())]
    ends = np.cumsum(arrays["lengths"])[:-1]
    parts = zip(*(np.split(arrays[name], ends) for name in FIELDS))
    rest = zip(arrays["ended"].tolist(), calls, arrays["turns"].tolist())
    samples = [Sample(*part, ended, made, turns) for part, (ended, made, turns) in zip(parts, rest)]
    rewards = arrays["rewards"]
    size = rewards.shape[1] if len(rewards) else 1
    return [(samples[i * size : (i + 1) * size], worth) for i, worth in enumerate(rewards)], arrays["cost"]
