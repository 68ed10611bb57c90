"""A task's problems as the model gets them, and whether an answer to one of them is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nanochat_jax.tasks import Task
from nanochat_jax.tasks.task import as_played


@dataclass(frozen=True)
class EvalSet:
    """A task's problems as the model gets them."""

    name: str
    task: Task
    conversations: list[dict]
    prompts: list[np.ndarray]  # int32 [T] each, up to assistant_start
    letters: list[list[int]] | None  # token ids of each problem's letters; None: the answers are generated


def make_eval_set(name: str, task: Task, tokenizer, limit: int | None = None) -> EvalSet:
    """The first `limit` problems (None: all). They are multiple choice if the conversations have letters.

    ValueError names a problem that cannot be rendered, a letter that is not one token, or a task that cannot judge.
    """
    conversations, prompts, letters = [], [], []
    choice = False
    for i in range(len(task) if limit is None else min(limit, len(task))):
        try:
            conversation = task[i]
            conversations.append(conversation)
            prompts.append(np.array(tokenizer.render_for_completion(conversation), np.int32))
            choice = choice if i else task.eval_type == "categorical" or "letters" in conversation
            if choice:
                letters.append(letter_tokens(conversation["letters"], tokenizer))
        except (Exception, SystemExit) as e:  # a user's class may do anything
            raise ValueError(f"{name}, problem {i}: {error_text(e)}") from e
    if not conversations:
        raise ValueError(f"{name} has no problems to put to the model")
    eval_set = EvalSet(name, task, conversations, prompts, letters if choice else None)
    judge(eval_set, 0, conversations[0]["letters"][0] if choice else "")  # fails now, before any answer is generated
    if not choice and (reply := replies(task, conversations.__getitem__)):
        reply(0, [""])
    return eval_set


def letter_tokens(letters: Sequence[str], tokenizer) -> list[int]:
    """The token of each letter. ValueError: there are no letters, or one is not a single token."""
    if not letters:
        raise ValueError("a multiple-choice question must offer at least one letter")
    split = [tokenizer.encode(letter) for letter in letters]
    for letter, ids in zip(letters, split):
        if len(ids) != 1:
            raise ValueError(f"each letter must be one token, but {letter!r:.40} is {len(ids)} for this tokenizer")
    return [ids[0] for ids in split]


def judge(eval_set: EvalSet, i: int, *turns: str) -> bool:
    """Whether the task accepts the answer to problem i; of an environment all answers and the replies, in turns.
    ValueError: `evaluate` fails, or returns neither 0 nor 1."""
    try:
        score = eval_set.task.evaluate(as_played(eval_set.task, eval_set.conversations[i], turns), turns[-1])
        known = bool(score in (0, 1))
    except (Exception, SystemExit) as e:
        raise ValueError(f"{eval_set.name} cannot judge the answer to problem {i}: {error_text(e)}") from e
    if not known:
        raise ValueError(f"{eval_set.name}: evaluate must return 0 or 1, got {score!r:.40} for problem {i}")
    return bool(score)


def replies(task: Task, conversation: Callable[[int], dict]) -> Callable[[int, Sequence[str]], str | None] | None:
    """reply(i, turns): what an environment says to the last of the turns, answers and replies, of its problem i, which
    is conversation(i); None: nothing more. None in place of the function: the task is no environment.

    Its ValueError: `respond` fails, or returns something else."""
    if getattr(task, "respond", None) is None:
        return None

    def reply(i: int, turns: Sequence[str]) -> str | None:
        try:
            said = task.respond(as_played(task, conversation(i), turns))
            if not isinstance(said, str | None):
                raise TypeError(f"respond must return text or None, got {type(said).__name__}")
        except (Exception, SystemExit) as e:  # a user's class may do anything
            raise ValueError(f"{task.name} cannot respond to an answer to problem {i}: {error_text(e)}") from e
        return said

    return reply


def error_text(e: BaseException) -> str:
    """The error as a sentence: with its class, unless the message was written for a user to read."""
    return str(e) if isinstance(e, ValueError | NotImplementedError) else f"{type(e).__name__}: {e}"
