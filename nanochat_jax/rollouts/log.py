"""rollouts.jsonl: every answer that a run of RL keeps, with what it was worth."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files import bucket
from nanochat_jax.files.append import AppendedFile
from nanochat_jax.files.json_numbers import finite_or_null
from nanochat_jax.rollouts.collector import Group


class RolloutLog:
    """rollouts.jsonl in a run's folder, a sample a line, for whoever wants to know what the model does.

    A checkpoint records `saved()`, the file's size; a run that goes on from it begins with that size, so that the file
    becomes the one of a run that nothing interrupted.
    """

    def __init__(self, folder: Path, size: int = 0):
        """size: what a checkpoint has recorded, 0 for a new run. The file is opened when it is first needed, which is
        when the run's folder is this run's alone. Process 0 writes for all."""
        self.path, self.size = folder / "rollouts.jsonl", size

    @functools.cached_property
    def _file(self):
        file = AppendedFile(bucket.fetch(self.path, exact=True))
        if file.size > self.size:
            file.truncate(self.size)
        elif file.size < self.size:  # of a folder that was copied or restored in part
            print0(
                f"NOTE: {file.path} has lost answers of earlier steps: {file.size:,} of {self.size:,} bytes are there"
            )
            if file.ends_in_the_middle_of_a_line():
                file.write(b"\n")  # what is written next is a line of its own
        return file

    def write(self, step: int, group: Group, decode: Callable[[Sequence[int]], str]) -> list[dict]:
        """The samples of one prompt, with their rewards and advantages; floats as short as float32 can be told.

        -> a row of a table for each, for whoever reads them by eye; none on other processes than 0."""
        if processes.index():
            return []
        lines, rows = b"", []
        for number, (sample, reward, advantage) in enumerate(
            zip(group.samples, group.rewards, group.advantages, strict=True)
        ):
            record = {
                "step": step,
                "example": group.example,
                "sample": number,
                "reward": float(reward),
                "advantage": _short(advantage),
                "ended": bool(sample.ended),
                "prompt": decode(group.prompt),
                "text": decode(sample.tokens),
                "tools": [dataclasses.asdict(call) for call in sample.tool_calls],
                "tokens": sample.tokens.tolist(),
                "mask": sample.mask.tolist(),
                "logprobs": [_short(value) for value in sample.logprobs],
                "policy_logprobs": [_short(value) for value in sample.policy_logprobs],
            }
            line = json.dumps(finite_or_null(record), ensure_ascii=False, allow_nan=False)
            lines += line.encode("utf-8", "replace") + b"\n"
            calls = "\n".join(" = ".join(filter(None, (c.expression, c.result))) for c in sample.tool_calls)
            row = {"step": step, "problem": record["prompt"], "answer": record["text"], "reward": record["reward"]}
            rows.append(row | {"advantage": record["advantage"], "ended": record["ended"], "tool calls": calls})
        self._file.write(lines)
        return rows

    def saved(self) -> int:
        """Bytes so far, all of them on disk, or in the bucket. OSError: the disk is full."""
        if processes.index():
            return 0
        self._file.sync()
        bucket.upload(self._file.path, self.path)
        return self._file.size

    def close(self) -> None:
        """Close the file, where one was opened."""
        if "_file" in vars(self):
            self._file.close()


def _short(value: np.float32) -> float:
    return float(str(np.float32(value)))
