"""What a task is: a slice of a dataset's conversations, and how an answer to one of them is judged.

    len(task)  task[i]                       conversations, {"messages": [{"role", "content"}, ...], ...}
    task.eval_type                           "generative" (judge a text) or "categorical" (judge one of few letters)
    task.evaluate(conversation, answer)      1 or True where the answer is right
    task.reward(conversation, answer)        float, what reinforcement learning maximises
    task.name  task.fingerprint()            for reports; for caches

A new dataset overrides num_examples, get_example and evaluate; `--task module:Class` also takes any class that only has
__len__ and __getitem__.
"""

import hashlib
import importlib
import inspect
import json
import operator
import os
import sys
from pathlib import Path

from nanochat_jax.files.digest import digest_of


class Task:
    """Examples start, start + step, ... below stop of a dataset; the conversations of a slice keep their order.

    stop=None means all. A stop beyond the dataset is clipped to its size, so that `len` never promises what cannot be
    read. nanochat does not clip: there the length is stop - start, and reading past the end fails during the run;
    clip=False gives that length, for comparisons. ValueError for a negative start, a stop below start, a step below 1.
    """

    eval_type = "generative"
    start, stop, step, clip = 0, None, 1, True  # also what a subclass has that does not call __init__

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1, *, clip: bool = True):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(f"a task needs 0 <= start <= stop and step >= 1, got {start=} {stop=} {step=}")
        self.start, self.stop, self.step, self.clip = start, stop, step, clip

    def num_examples(self) -> int:
        """The size of the whole dataset."""
        raise NotImplementedError(f"{self.name} must define num_examples()")

    def get_example(self, index: int) -> dict:
        """Conversation `index` of the whole dataset."""
        raise NotImplementedError(f"{self.name} must define get_example(index)")

    def evaluate(self, conversation: dict, answer: str) -> int | bool:
        raise NotImplementedError(f"{self.name} cannot judge answers: it defines no evaluate(conversation, answer)")

    def reward(self, conversation: dict, answer: str) -> float:
        return float(self.evaluate(conversation, answer))

    @property
    def name(self) -> str:
        return type(self).__name__

    def __len__(self) -> int:
        size = self.num_examples()
        stop = size if self.stop is None else min(self.stop, size) if self.clip else self.stop
        return len(range(self.start, stop, self.step))

    def source_index(self, index: int) -> int:
        """Where conversation `index` of this slice is in the whole dataset; IndexError outside the slice."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} conversations, there is no number {index}")
        return self.start + index * self.step

    def __getitem__(self, index: int) -> dict:
        source = self.source_index(index)
        if source >= self.num_examples():
            raise IndexError(f"{self.name} has {self.num_examples()} examples, but its slice asks for number {source}")
        return self.get_example(source)

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides the conversations; by default of the conversations themselves."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            try:
                digest.update(json.dumps(self[i], sort_keys=True, default=repr).encode() + b"\n")
            except (Exception, SystemExit) as e:  # whatever a user's class does
                raise ValueError(f"{self.name}, row {i} cannot be read: {type(e).__name__}: {e}") from e
        return digest.hexdigest()

    def _slice(self) -> list:
        return [self.start, self.stop, self.step, self.clip]

    def _sources(self) -> list[str]:
        """sha256 of the modules that define this task's class, up to Task: code decides conversations too."""
        modules = {sys.modules[cls.__module__] for cls in type(self).__mro__ if cls is not object}
        files = sorted(m.__file__ for m in modules if getattr(m, "__file__", None))
        return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]


def message_fault(messages) -> str | None:
    """Why this is no list of at least two messages of text that alternate from user; None where it is."""
    if not isinstance(messages, list):
        return f"messages must be a list, got {type(messages).__name__}"
    if len(messages) < 2:
        return f"a conversation needs at least 2 messages, got {len(messages)}"
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"message {i} must be an object with role and content, got {type(message).__name__}"
        expected = "user" if i % 2 == 0 else "assistant"
        role, content = message.get("role"), message.get("content")
        if role != expected:
            return f"message {i} must have role {expected!r}, as roles alternate from user, got {role!r:.40}"
        if not isinstance(content, str):
            return f"the content of message {i} must be a string, got {type(content).__name__}"
    return None


class AdaptedTask(Task):
    """Any sequence of conversations as a Task. Its own evaluate, reward, name, eval_type, fingerprint count."""

    def __init__(self, inner, start: int = 0, stop: int | None = None, step: int = 1, *, clip: bool = True):
        super().__init__(start, stop, step, clip=clip)
        self.inner = inner
        self.eval_type = getattr(inner, "eval_type", Task.eval_type)

    def num_examples(self) -> int:
        return len(self.inner)

    def get_example(self, index: int) -> dict:
        return self.inner[index]

    def evaluate(self, conversation: dict, answer: str) -> int | bool:
        own = getattr(self.inner, "evaluate", None)
        return own(conversation, answer) if own else super().evaluate(conversation, answer)

    def reward(self, conversation: dict, answer: str) -> float:
        own = getattr(self.inner, "reward", None)
        return float(own(conversation, answer)) if own else super().reward(conversation, answer)

    @property
    def name(self) -> str:
        own = getattr(self.inner, "name", None)
        return own if isinstance(own, str) else type(self.inner).__name__

    def fingerprint(self) -> str:
        own = getattr(self.inner, "fingerprint", None)
        if not callable(own):
            return super().fingerprint()
        try:
            return digest_of(own(), self._slice())
        except Exception as e:
            raise ValueError(f"{self.name}: fingerprint() must return text, {type(e).__name__}: {e}") from e


def load_task(spec: str, flag: str = "--task") -> Task:
    """The task that `--task module:Class` names, made without arguments; modules of the current directory count.

    flag is what the user typed it after. Class may also be a function that makes a task, or a task. ValueError, one
    sentence, where this does not work.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{flag} must be module:Class, got {spec!r}")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()  # the module may be younger than the last look into its folder
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as e:  # whatever a user's module does when it runs
        raise ValueError(f"{flag} {spec}: cannot import {module_name}: {type(e).__name__}: {e}") from e
    if not hasattr(module, attribute):
        raise ValueError(f"{flag} {spec}: {module.__file__ or module_name} has no {attribute}")
    made = getattr(module, attribute)
    if inspect.isclass(made) or inspect.isroutine(made):
        try:
            made = made()
        except (Exception, SystemExit) as e:
            raise ValueError(f"{flag} {spec}: {attribute}() failed, {type(e).__name__}: {e}") from e
    if isinstance(made, Task):
        return _sized(made, f"{flag} {spec}")
    if missing := [method for method in ("__len__", "__getitem__") if not hasattr(made, method)]:
        raise ValueError(
            f"{flag} {spec}: {attribute} is no sequence of conversations, it lacks {' and '.join(missing)}"
        )
    return _sized(AdaptedTask(made), f"{flag} {spec}")


def _sized(task: Task, typed: str) -> Task:
    """The task, when it can tell its length and name, as whatever a user wrote may not."""
    try:
        size, _ = len(task), task.name
    except Exception as e:
        raise ValueError(f"{typed}: its length and name must be known, {type(e).__name__}: {e}") from e
    if not 0 < size < 2**31:
        raise ValueError(f"{typed} must have from 1 to 2147483647 conversations, it has {size}")
    return task
