"""Several tasks as one: shuffled together for training, or one after the other."""

import functools
import random
from typing import Unpack

import numpy as np

from nanochat_jax.files.digest import digest_of
from nanochat_jax.tasks.task import AdaptedTask, Slice, Task


class TaskSequence(Task):
    """The conversations of all tasks, task by task. To train more on a task, name it several times."""

    def __init__(self, tasks: list, **slice_: Unpack[Slice]):
        super().__init__(**slice_)
        self.tasks = [task if isinstance(task, Task) else AdaptedTask(task) for task in tasks]
        if not self.tasks:
            raise ValueError(f"{self.name} needs at least one task")
        self.lengths = [len(task) for task in self.tasks]

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        """int32 [N,2]: (task, index within the task) of every conversation, in order; the slice is not applied."""
        starts = np.cumsum([0, *self.lengths[:-1]])
        pairs = np.empty((sum(self.lengths), 2), np.int32)
        pairs[:, 0] = np.repeat(np.arange(len(self.tasks)), self.lengths)
        pairs[:, 1] = np.arange(len(pairs)) - starts[pairs[:, 0]]
        return pairs[self.order()]

    def order(self) -> list[int] | slice:
        """How the tasks' conversations, task by task, are put in order."""
        return slice(None)

    def num_examples(self) -> int:
        return sum(self.lengths)

    def get_example(self, index: int) -> dict:
        task, at = self.pairs[index].tolist()
        return self.tasks[task][at]

    def fingerprint(self) -> str:
        known = {id(task): task.fingerprint() for task in {id(task): task for task in self.tasks}.values()}
        return self.fingerprint_of([known[id(task)] for task in self.tasks])


class TaskMixture(TaskSequence):
    """The conversations of all tasks in the order of `random.Random(seed).shuffle`, as in nanochat."""

    def __init__(self, tasks: list, seed: int = 42, **slice_: Unpack[Slice]):
        super().__init__(tasks, **slice_)
        self.seed = seed

    def order(self) -> list[int]:
        order = list(range(sum(self.lengths)))  # how a list is shuffled depends on its length alone
        random.Random(self.seed).shuffle(order)
        return order

    def fingerprint(self) -> str:
        return digest_of(super().fingerprint(), self.seed)
