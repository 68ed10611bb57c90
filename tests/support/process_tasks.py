"""Tasks for runs of several processes."""

import os
import random
import time
from pathlib import Path


class Letters:
    """Multiple choice: which of three letters comes first."""

    eval_type = "categorical"

    def __len__(self) -> int:
        return 13

    def __getitem__(self, i: int) -> dict:
        letters = ["A", "B", "C"][i % 3 :] + ["A", "B", "C"][: i % 3]
        texts = (("user", "first of " + " ".join(letters * (1 + i % 4))), ("assistant", letters[0]))
        return {"messages": [{"role": role, "content": text} for role, text in texts], "letters": letters}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return answer == conversation["messages"][1]["content"]


class Vowels:
    """Right with two vowels or more: a random model's answers differ."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int) -> dict:
        texts = (("user", "say " + "a" * i), ("assistant", "aa"))
        return {"messages": [{"role": role, "content": text} for role, text in texts]}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return sum(c in "aeiou" for c in answer) >= 2


class Slow(Vowels):
    """Its conversations take their time, so that a signal comes while they are read."""

    def __getitem__(self, i: int) -> dict:
        time.sleep(float(os.environ.get("SLOW_SECONDS", 1)))
        return super().__getitem__(i)


class Talk(Vowels):
    """Answers back, and rewards every turn. Where PAUSE_AFTER names a checkpoint's folder it waits for ever in the
    middle of the second turn, once that is there, and says so by a file beside it."""

    def respond(self, conversation: dict) -> str | None:
        turns = len(conversation["messages"]) // 2
        checkpoint = os.environ.get("PAUSE_AFTER")
        if checkpoint and turns == 2 and (Path(checkpoint) / "INTEGRITY.json").exists():
            (Path(checkpoint).parent / "paused").touch()
            time.sleep(600)
        return f"more than {len(conversation['messages'][-1]['content'])}" if turns < 4 else None

    def reward(self, conversation: dict, answer: str) -> list[float]:
        said = [message["content"] for message in conversation["messages"] if message["role"] == "assistant"]
        return [sum(c < "n" for c in text) / max(1, len(text)) for text in said]


class Late:
    """A tool that takes its time."""

    name, seconds = "late", 30.0

    def call(self, text: str) -> str | None:
        time.sleep(random.random() / 50)
        return text[::-1][:6] if len(text) % 3 else None
