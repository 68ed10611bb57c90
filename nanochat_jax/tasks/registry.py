"""The tasks that have a name on the command line: `eval -a NAME`, `rl --task NAME`. A new task gets a line in TASKS."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from nanochat_jax.tasks import sandbox
from nanochat_jax.tasks.arc import ARC
from nanochat_jax.tasks.arithmetic import Arithmetic
from nanochat_jax.tasks.environments import GuessNumber, SecondTry
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.spelling import SimpleSpelling, SpellingBee
from nanochat_jax.tasks.task import Task, load_task


def make_human_eval(split: str, data_dir: Path | None, unsafe: bool) -> HumanEval:
    """ValueError where no guard can hold the programs that the model writes, unless `unsafe`."""
    if not unsafe and (fault := sandbox.guard_fault()):
        raise ValueError(
            f"{fault}, so HumanEval, which runs what the model writes, is refused; --unsafe-exec of "
            "nanochat_jax.eval runs it with your files and network in reach"
        )
    return HumanEval(split, unsafe=unsafe, data_dir=data_dir)


MADE_UP = 256  # problems of a task that makes them up, where nobody asks for a number: as nanochat's SpellingBee had
TASKS: dict[str, Callable[[str, int, Path | None, bool], Task]] = {  # called with split, size if made up, ...
    "ARC-Easy": lambda split, size, data_dir, unsafe: ARC("ARC-Easy", split, data_dir=data_dir),
    "ARC-Challenge": lambda split, size, data_dir, unsafe: ARC("ARC-Challenge", split, data_dir=data_dir),
    "MMLU": lambda split, size, data_dir, unsafe: MMLU(split, data_dir=data_dir),
    "GSM8K": lambda split, size, data_dir, unsafe: GSM8K(split, data_dir=data_dir),
    "HumanEval": lambda split, size, data_dir, unsafe: make_human_eval(split, data_dir, unsafe),
    "SpellingBee": lambda split, size, data_dir, unsafe: SpellingBee(split, size, data_dir=data_dir),
    "SimpleSpelling": lambda split, size, data_dir, unsafe: SimpleSpelling(split, size, data_dir=data_dir),
    # SFT shows the answers to the training problems of seed 0, so RL trains on those of another seed
    "Arithmetic": lambda split, size, data_dir, unsafe: Arithmetic(split, size, seed=int(split == "train")),
    "SecondTry": lambda split, size, data_dir, unsafe: SecondTry(split, size, seed=int(split == "train")),
    "GuessNumber": lambda split, size, data_dir, unsafe: GuessNumber(split, size),
}
NAMES = {name.lower(): name for name in TASKS} | {"spelling": "SpellingBee"}  # what users type, in any case -> name


def find_name(typed: str, flag: str = "-a", also: Sequence[str] = ()) -> str:
    """The name in TASKS, or among those of `also`, of what a user typed; module:Class stays as it is. ValueError: there
    is no such task."""
    if ":" in typed:
        return typed
    names = NAMES | {name.lower(): name for name in also}
    if typed.lower() not in names:
        near = "".join(f"; did you mean {names[n]}?" for n in difflib.get_close_matches(typed.lower(), names, 1, 0.3))
        known = ", ".join([*TASKS, *also])
        raise ValueError(f"{flag} must name tasks among {known}, or module:Class, got {typed!r:.60}{near}")
    return names[typed.lower()]


def make_task(
    name: str,
    split: str = "test",
    size: int | None = None,
    data_dir: Path | None = None,
    flag: str = "-a",
    unsafe: bool = False,
) -> Task:
    """The task of this name, or the one that module:Class names, which has no splits.

    size: problems of a task that makes them up; None is MADE_UP. unsafe: run what a model writes also where no guard
    can hold it. FileNotFoundError: the data cannot be had. ValueError: no such task, or it is refused.
    """
    name = find_name(name, flag)
    if ":" in name:
        return load_task(name, flag)
    return TASKS[name](split, MADE_UP if size is None else size, data_dir, unsafe)
