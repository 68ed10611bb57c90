"""ARC: science questions of school exams, an easy and a hard set, https://arxiv.org/abs/1803.05457"""

from typing import Unpack

from nanochat_jax.tasks.hub import HubOptions
from nanochat_jax.tasks.multiple_choice import MultipleChoice, choice_conversation

SUBSETS = ("ARC-Easy", "ARC-Challenge")


class ARC(MultipleChoice):
    """ARC(subset, split): ARC-Easy or ARC-Challenge; train, validation or test.

    A question has 3 to 5 choices, and its own labels for them: A, B, C, ... or 1, 2, 3, ...
    """

    repo = "allenai/ai2_arc"
    columns = ("question", "choices", "answerKey")
    splits = ("train", "validation", "test")

    def __init__(self, subset: str = "ARC-Easy", split: str = "train", **options: Unpack[HubOptions]):
        if subset not in SUBSETS:
            raise ValueError(f"ARC has the subsets {', '.join(SUBSETS)}, got {subset!r:.40}")
        self.subset = subset  # already here: what follows may refuse the split, by name
        super().__init__(split, **options)

    @property
    def name(self) -> str:
        return self.subset

    def conversation(self, row: dict) -> dict:
        choices = row["choices"]
        if not isinstance(choices, dict) or not all(isinstance(choices.get(key), list) for key in ("text", "label")):
            raise ValueError(f"choices must have lists of text and label, got {choices!r:.80}")
        return choice_conversation(row["question"], choices["text"], choices["label"], row["answerKey"])
