"""What a task is: a slice of a dataset's conversations, and how an answer to one of them is judged.

    len(task)  task[i]                       conversations, {"messages": [{"role", "content"}, ...], ...}
    task.eval_type                           "generative" (judge a text) or "categorical" (judge one of few letters)
    task.evaluate(conversation, answer)      1 or True where the answer is right
    task.reward(conversation, answer)        float, what reinforcement learning maximises; or a list, its sum
    task.respond(conversation)               only of an environment: what the user says to an answer, None to end
    task.name  task.fingerprint()            for reports; for caches

A new dataset overrides num_examples, get_example and evaluate; `--task module:Class` also takes any class that only has
__len__ and __getitem__.

A task with `respond` is an environment: a conversation of several turns. What its respond, evaluate and reward get is
the conversation as it went: its messages are those of the problem without the reference, and then the model's answers
and the replies in turns, of which the last is the answer to be judged. All other keys are as the task has given them;
there it finds what it must know. Its reward may be a list, a number for each answer.
"""

import hashlib
import itertools
import json
import numbers
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from nanochat_jax.cli.own_code import load_object
from nanochat_jax.files.digest import digest_of

MAX_SIZE = 2**31 - 1  # conversations are numbered by int32


class Slice(TypedDict, total=False):
    """Which examples a task takes of its dataset, for signatures: **slice_: Unpack[Slice]."""

    start: int
    stop: int | None
    step: int
    clip: bool


class Task:
    """Examples start, start + step, ... below stop of a dataset; the conversations of a slice keep their order.

    stop=None means all. A stop beyond the dataset is clipped to its size, so that `len` never promises what cannot be
    read. nanochat does not clip: there the length is stop - start, and reading past the end fails during the run;
    clip=False gives that length, for comparisons. ValueError for a negative start, a stop below start, a step below 1.
    """

    eval_type = "generative"
    respond: Callable[[dict], str | None] | None = None  # a method of environments
    start, stop, step, clip = 0, None, 1, True  # also what a subclass has that does not call __init__

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1, *, clip: bool = True):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(f"a task needs 0 <= start <= stop and step >= 1, got {start=} {stop=} {step=}")
        self.start, self.stop, self.step, self.clip = start, stop, step, clip

    def num_examples(self) -> int:
        """The size of the whole dataset."""
        raise NotImplementedError(f"{self.name} must define num_examples()")

    def get_example(self, index: int) -> dict:
        """Conversation `index` of the whole dataset, where 0 <= index < num_examples()."""
        raise NotImplementedError(f"{self.name} must define get_example(index)")

    def evaluate(self, conversation: dict, answer: str) -> int | bool:
        raise NotImplementedError(f"{self.name} cannot judge answers: it defines no evaluate(conversation, answer)")

    def reward(self, conversation: dict, answer: str) -> float:
        return as_number(self.evaluate(conversation, answer))

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
                digest.update(json.dumps(self[i], sort_keys=True, default=_as_json).encode() + b"\n")
            except (Exception, SystemExit) as e:  # whatever a user's class does
                raise ValueError(f"{self.name}, row {i} cannot be read: {type(e).__name__}: {e}") from e
        return digest.hexdigest()

    def fingerprint_of(self, *parts) -> str:
        """sha256 (hex) of `parts` (JSON values), the slice, and the modules that define the task's class."""
        modules = {sys.modules[cls.__module__] for cls in type(self).__mro__ if cls is not object}
        files = sorted(m.__file__ for m in modules if getattr(m, "__file__", None))
        code = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
        return digest_of(*parts, [self.start, self.stop, self.step, self.clip], code)


class MadeUpTask(Task):
    """`size` problems that are made up as they are asked for, in a train and a test split.

    A subclass defines make(index) -> conversation, which must depend on the arguments of the task and on nothing else.
    """

    max_size = MAX_SIZE

    def __init__(self, split: str, size: int, **slice_: Unpack[Slice]):
        super().__init__(**slice_)
        if split not in ("train", "test"):
            raise ValueError(f"{self.name} has the splits train, test, got {split!r:.40}")
        if not 1 <= operator.index(size) <= self.max_size:
            raise ValueError(f"{self.name} needs a size from 1 to {self.max_size:,}, got {size}")
        self.split, self.size = split, size

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name} has {self.size} examples, there is no number {index}")
        return self.make(index)


class AdaptedTask(Task):
    """Any sequence of conversations as a Task. Its own evaluate, reward, name, eval_type, fingerprint count."""

    def __init__(self, inner, **slice_: Unpack[Slice]):
        super().__init__(**slice_)
        self.inner = inner
        self.eval_type = getattr(inner, "eval_type", Task.eval_type)
        self.respond = getattr(inner, "respond", None)

    def num_examples(self) -> int:
        return len(self.inner)

    def get_example(self, index: int) -> dict:
        return self.inner[index]

    def evaluate(self, conversation: dict, answer: str) -> int | bool:
        return (getattr(self.inner, "evaluate", None) or super().evaluate)(conversation, answer)

    def reward(self, conversation: dict, answer: str) -> float:
        return total((getattr(self.inner, "reward", None) or super().reward)(conversation, answer))

    @property
    def name(self) -> str:
        own = getattr(self.inner, "name", None)
        return own if isinstance(own, str) else type(self.inner).__name__

    def fingerprint(self) -> str:
        own = getattr(self.inner, "fingerprint", None)
        if not callable(own):
            return super().fingerprint()
        try:
            return digest_of(own(), [self.start, self.stop, self.step, self.clip])
        except Exception as e:
            raise ValueError(f"{self.name}: fingerprint() must return text, {type(e).__name__}: {e}") from e


def as_number(value) -> float:
    """A number of Python or of an array library, or a bool. TypeError, ValueError: something else, such as text."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"it must be a number, got {type(value).__name__}")
    return float(value)


def total(reward) -> float:
    """A reward as one number: itself, or the sum of a list. Errors as of `as_number`."""
    return sum(map(as_number, reward)) if isinstance(reward, list | tuple) else as_number(reward)


def as_played(task: Any, conversation: dict, turns: Sequence[str]) -> dict:
    """The conversation that a task judges; turns: the model's answers and the replies to them, answer first and last.

    For an environment the conversation as it went, for other tasks the one with the reference."""
    if getattr(task, "respond", None) is None:
        return conversation
    messages = list(conversation["messages"])
    if messages[-1]["role"] == "assistant":
        del messages[-1]
    said = zip(itertools.cycle(("assistant", "user")), turns)
    return conversation | {"messages": [*messages, *({"role": role, "content": text} for role, text in said)]}


def _as_json(value):
    """What `json` cannot write by itself: arrays and their numbers. TypeError: anything else, of which `repr` may be
    another text in each process (an address, the order of a set), so that data would seem to have changed."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(
        f"a conversation holds text, numbers, lists and dictionaries, not {type(value).__name__}: change it to one of "
        "these, or define fingerprint()"
    )


def question_and_answer(question: str, answer: str | list[dict]) -> dict:
    """A conversation of two messages; the answer is a text, or parts of text, code and what the code prints."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def require_text(answer: str) -> None:
    """ValueError: an answer to be judged is no text."""
    if not isinstance(answer, str):
        raise ValueError(f"the answer must be text, got {type(answer).__name__}")


def load_task(spec: str, flag: str = "--task") -> Task:
    """The task that `--task module:Class` names, see `load_object`. ValueError, one sentence, where this does not
    work."""
    made, attribute = load_object(spec, flag), spec.partition(":")[2]
    if missing := [m for m in ("__len__", "__getitem__") if not hasattr(made, m)]:
        lacks = " and ".join(missing)
        raise ValueError(f"{flag} {spec}: {attribute} is no sequence of conversations, it lacks {lacks}")
    task = made if isinstance(made, Task) else AdaptedTask(made)
    try:
        size, _ = len(task), task.name
    except Exception as e:  # whatever a user's class does
        raise ValueError(f"{flag} {spec}: its length and name must be known, {type(e).__name__}: {e}") from e
    if not 0 < size <= MAX_SIZE:
        raise ValueError(f"{flag} {spec} must have from 1 to {MAX_SIZE} conversations, it has {size}")
    return task
