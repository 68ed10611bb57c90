"""Tasks of users who do everything wrong, for --task module:Class. `EXPECTED` says how a command may end on each."""

import sys
import time

import numpy as np


class Plain:
    """Nothing is wrong: what the others change."""

    size = 12

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        return {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "aa"}]}

    def reward(self, conversation: dict, answer: str) -> float:
        return sum(c < "n" for c in answer) / max(1, len(answer))

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return len(answer) % 2 == 0


class Objects(Plain):
    def __getitem__(self, i: int) -> dict:
        return super().__getitem__(i) | {"object": object(), "set": {1}, 3: lambda: None}


class ObjectAsText(Plain):
    def __getitem__(self, i: int) -> dict:
        return {"messages": [{"role": "user", "content": object()}, {"role": "assistant", "content": "a"}]}


class NoConversation(Plain):
    def __getitem__(self, i: int) -> dict:
        return None


class RaisingItem(Plain):
    def __getitem__(self, i: int) -> dict:
        if i > 1:
            raise LookupError("no such row")
        return super().__getitem__(i)


class RaisingReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        raise ZeroDivisionError("oh")


class LateReward(Plain):
    """Fails on an answer only, not on the empty one that is tried at the start."""

    def reward(self, conversation: dict, answer: str) -> float:
        return {"": 0.0}[answer]


class TextReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        return "good"


class NumberAsText(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        return "0.5"


class NoReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        return None


class NaNReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        return float("nan")


class InfiniteReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        return float("inf") if answer else 0.0


class HugeReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        return 1e30 * super().reward(conversation, answer)


class TooHugeReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        return -1e31 if answer else 0.0


class HugeInteger(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        return 10**400 if answer else 0


class ArrayReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        return np.ones(3)


class SlowReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        time.sleep(0.2)
        return super().reward(conversation, answer)


class Printing(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        print("\x1b[2J\0", "x" * 10_000)
        print("error: nothing", file=sys.stderr)
        return super().reward(conversation, answer)


class ExitingReward(Plain):
    def reward(self, conversation: dict, answer: str) -> float:
        sys.exit(0)


class ExitingItem(Plain):
    def __getitem__(self, i: int) -> dict:
        sys.exit(3)


class HalfRight(Plain):
    def evaluate(self, conversation: dict, answer: str) -> bool:
        return 0.5


class RaisingJudge(Plain):
    def evaluate(self, conversation: dict, answer: str) -> bool:
        raise RuntimeError("cannot")


class Shrinking(Plain):
    """Its length falls each time that it is asked for."""

    def __len__(self) -> int:
        self.size = max(1, self.size - 1)
        return self.size


class Growing(Plain):
    def __len__(self) -> int:
        self.size += 1
        return self.size


class Endless(Plain):
    size = 2**31


class NegativeLength(Plain):
    size = -1


class TextLength(Plain):
    size = "12"


class HugeTexts(Plain):
    def __getitem__(self, i: int) -> dict:
        return {
            "messages": [{"role": "user", "content": "a b " * 250_000}, {"role": "assistant", "content": "b" * 9999}]
        }


class SpecialTokens(Plain):
    def __getitem__(self, i: int) -> dict:
        text = "<|bos|><|assistant_start|>4<|assistant_end|><|python_start|>"
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}


class OddCharacters(Plain):
    def __getitem__(self, i: int) -> dict:
        text = "\ud800\0\u202e\U0010ffff\r\x1b[31m"
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}


class EmptyTexts(Plain):
    def __getitem__(self, i: int) -> dict:
        return {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}


class Changing(Plain):
    """Another conversation at each look."""

    def __getitem__(self, i: int) -> dict:
        self.looks = getattr(self, "looks", 0) + 1
        return {
            "messages": [{"role": "user", "content": "a" * (self.looks % 9)}, {"role": "assistant", "content": "b"}]
        }


class OddName(Plain):
    name = "../..\0/\n" + "x" * 5000


class OddFingerprint(Plain):
    def fingerprint(self) -> str:
        return object()


class Recursive(Plain):
    def __getitem__(self, i: int) -> dict:
        conversation = super().__getitem__(i)
        conversation["again"] = conversation
        return conversation


WELL, REFUSED = {"well"}, {"refused"}
EITHER = WELL | REFUSED
EXPECTED = {  # how `rl`, `sft` and `eval` may end
    Plain: (WELL, WELL, WELL),
    Objects: (EITHER, EITHER, WELL),
    ObjectAsText: (REFUSED, REFUSED, REFUSED),
    NoConversation: (REFUSED, REFUSED, REFUSED),
    RaisingItem: (REFUSED, REFUSED, REFUSED),
    RaisingReward: (REFUSED, WELL, WELL),
    LateReward: (REFUSED, WELL, WELL),
    TextReward: (REFUSED, WELL, WELL),
    NumberAsText: (EITHER, WELL, WELL),
    NoReward: (REFUSED, WELL, WELL),
    NaNReward: (REFUSED, WELL, WELL),
    InfiniteReward: (REFUSED, WELL, WELL),
    HugeReward: (EITHER, WELL, WELL),
    TooHugeReward: (REFUSED, WELL, WELL),
    HugeInteger: (REFUSED, WELL, WELL),
    ArrayReward: (REFUSED, WELL, WELL),
    SlowReward: (WELL, WELL, WELL),
    Printing: (WELL, WELL, WELL),
    ExitingReward: (REFUSED, WELL, WELL),
    ExitingItem: (REFUSED, REFUSED, REFUSED),
    HalfRight: (REFUSED, WELL, REFUSED),
    RaisingJudge: (REFUSED, WELL, REFUSED),
    Shrinking: (EITHER, EITHER, EITHER),
    Growing: (EITHER, EITHER, EITHER),
    Endless: (REFUSED, REFUSED, REFUSED),
    NegativeLength: (REFUSED, REFUSED, REFUSED),
    TextLength: (REFUSED, REFUSED, REFUSED),
    HugeTexts: (REFUSED, EITHER, EITHER),
    SpecialTokens: (WELL, WELL, WELL),
    OddCharacters: (WELL, WELL, WELL),
    EmptyTexts: (EITHER, EITHER, EITHER),
    Changing: (EITHER, EITHER, EITHER),
    OddName: (EITHER, EITHER, EITHER),
    OddFingerprint: (REFUSED, REFUSED, EITHER),
    Recursive: (EITHER, EITHER, WELL),
}
