"""rollouts.jsonl: every answer that a run of RL keeps, with what it was worth."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket


class RolloutLog:
    """rollouts.jsonl in a run's folder, a sample a line, for whoever wants to know what the model does.

    A checkpoint records `saved()`, the file's size; a run that goes on from it begins with that size, so that the file
    becomes the one of a run that nothing interrupted.
    """

    def __init__(self, folder: Path, size: int = 0):
        self.file = None
        if processes.index():  # process 0 writes for all
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
