"""What a run measures between its steps, and what becomes of a measurement that fails."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from nanochat_jax.checkpoints.ownership import FolderLost
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.signals import FailedTogether, Interrupted


class Progress(Protocol):
    """Shows how far a measurement is, and raises Interrupted where a signal has come."""

    def __call__(self, done: int, total: int, part: str = "") -> None:
        """part: of the measurement that `done` of `total` is about, such as a task; default: the whole."""


def all_numbers(numbers: Mapping[str, float]) -> str:
    """Every number by its name, as the console shows it."""
    return " | ".join(f"{name} {value:.4f}" for name, value in numbers.items())


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Something that is found out about the parameters every so many steps, and at the end."""

    name: str  # for the console and the log
    every: int  # steps; -1 = never
    measure: Callable[[Any, Progress], dict[str, Any]]  # params -> numbers, and lists of text lines, as they are logged
    at_start: bool = False  # also before the first step
    in_step: bool = False  # all processes call Progress equally often, and a signal must end it at the same call
    shown: Callable[[Mapping[str, float]], str] = all_numbers  # the numbers -> the console's line
    flag: str = ""  # that sets `every`

    def due(self, step: int, total: int) -> bool:
        """Whether it is taken when `step` of `total` steps are done."""
        if step == 0:
            return self.every > 0 and self.at_start
        return self.every > 0 and (step % self.every == 0 or step == total)


def take(measurement: Measurement, params: Any, progress: Progress, *, may_fail: bool) -> tuple[dict[str, Any], str]:
    """(what was found, "") or ({}, a sentence about the error), the same on all processes.

    may_fail: else the error is raised. It is raised too where the other processes of the run do not know of it: they
    may wait for this one in the middle of the measurement."""
    try:
        return measurement.measure(params, progress), ""
    except (Interrupted, FolderLost):
        raise
    except Exception as error:
        if not may_fail or (processes.count() > 1 and not isinstance(error, FailedTogether)):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        advice = f"; {measurement.flag} -1 leaves it out" if measurement.flag else ""
        return {}, f"{measurement.name} could not be measured: {reason}. Training goes on{advice}"
