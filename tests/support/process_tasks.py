"""Tasks for runs of several processes."""

import os
import time


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
