"""Tasks that answer back: problems with further tries, and a number to be guessed. They need no data."""

import random
import re
from typing import Unpack

from nanochat_jax.tasks.arithmetic import Arithmetic
from nanochat_jax.tasks.task import MadeUpTask, Slice, question_and_answer, require_text

WRONG = "That is wrong, try again."
INTEGER = re.compile(r"-?[0-9]+")
SMALLEST_RANGE, LARGEST_RANGE = 8, 32  # of numbers that a game has
SENSIBLE = 0.05  # what a guess is worth that the replies have left possible


class SecondTry(Arithmetic):
    """Arithmetic's problems, of which a wrong answer may be tried again. Right at once is worth 1, at the second try a
    half, at the third a third."""

    def make(self, index: int) -> dict:
        conversation = super().make(index)
        return conversation | {"reference": conversation["messages"][-1]["content"]}

    def evaluate(self, conversation: dict, answer: str) -> int:
        return super().evaluate(question_and_answer("", conversation["reference"]), answer)

    def respond(self, conversation: dict) -> str | None:
        return None if self.evaluate(conversation, conversation["messages"][-1]["content"]) else WRONG

    def reward(self, conversation: dict, answer: str) -> float:
        tries = sum(message["role"] == "assistant" for message in conversation["messages"])
        return self.evaluate(conversation, answer) / tries


class GuessNumber(MadeUpTask):
    """A number is to be found by guessing; the replies say whether it is larger or smaller.

    The last integer of an answer is the guess. Each that the replies have left possible is worth a little, the right
    one 1: so each turn has a reward of its own."""

    def __init__(self, split: str = "train", size: int = 100_000, *, seed: int = 0, **slice_: Unpack[Slice]):
        super().__init__(split, size, **slice_)
        self.seed = seed

    def make(self, index: int) -> dict:
        rng = random.Random(f"{self.seed} {self.split} {index}")
        low = rng.randint(1, 50)
        high = low + rng.randint(SMALLEST_RANGE, LARGEST_RANGE) - 1
        question = f"I think of a number from {low} to {high}. Which one is it?"
        game = {"low": low, "high": high, "number": rng.randint(low, high)}
        return question_and_answer(question, str((low + high) // 2)) | game

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return guess_of(answer) == conversation["number"]

    def respond(self, conversation: dict) -> str | None:
        guess, number = guess_of(conversation["messages"][-1]["content"]), conversation["number"]
        if guess is None:
            return "Say a number."
        return None if guess == number else f"No, it is {'larger' if number > guess else 'smaller'}."

    def reward(self, conversation: dict, answer: str) -> list[float]:
        low, high, number = conversation["low"], conversation["high"], conversation["number"]
        rewards = []
        for message in conversation["messages"]:
            if message["role"] == "user":
                continue
            guess = guess_of(message["content"])
            sensible = guess is not None and low <= guess <= high
            rewards.append(1.0 if guess == number else SENSIBLE * sensible)
            if sensible:
                low, high = (guess + 1, high) if guess < number else (low, guess - 1)
        return rewards

    def fingerprint(self) -> str:
        return self.fingerprint_of(type(self).__name__, self.split, self.size, self.seed)


def guess_of(answer: str) -> int | None:
    """The last integer of an answer, None where there is none."""
    require_text(answer)
    found = INTEGER.findall(answer)
    return int(found[-1][:20]) if found else None
