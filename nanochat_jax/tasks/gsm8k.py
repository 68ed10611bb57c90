"""GSM8K: grade school word problems whose solutions call a calculator, https://arxiv.org/abs/2110.14168

In the data a call is written into the text as <<12*3=36>>. Here it becomes a python part ("12*3") and a python_output
part ("36"), so that the model learns to call the tool and to go on from what the tool says.
"""

import re

from nanochat_jax.tasks.hub import HubTask
from nanochat_jax.tasks.task import question_and_answer, require_text

CALL = re.compile(r"<<([^>]+)>>")
FINAL = re.compile(r"#### (-?[0-9.,]+)")


def answer_parts(answer: str) -> list[dict]:
    """A solution cut at its calls; the text before, between and after them is kept even where it is empty."""
    parts = []
    for i, piece in enumerate(CALL.split(answer)):  # text, call, text, call, ..., text
        if i % 2 == 0:
            parts.append({"type": "text", "text": piece})
        else:
            code, equals, result = piece.rpartition("=")
            parts.append({"type": "python", "text": code if equals else piece})
            parts.append({"type": "python_output", "text": result if equals else ""})
    return parts


def final_answer(text: str) -> str | None:
    """The number after the first `#### `, as text without commas; None where there is none."""
    found = FINAL.search(text)
    return found[1].replace(",", "") if found else None


class GSM8K(HubTask):
    """GSM8K(split): train or test; subset "socratic" has the same problems with guiding questions."""

    repo = "openai/gsm8k"
    subset = "main"
    columns = ("question", "answer")
    splits = ("train", "test")

    def conversation(self, row: dict) -> dict:
        self.require_columns_of_text(row)
        return question_and_answer(row["question"], answer_parts(row["answer"]))

    def evaluate(self, conversation: dict, answer: str) -> int:
        """1 where the answer's final number is, as a string, that of the last part of the reference.

        As in nanochat 5.0 is not 5, and two answers without a number are equal.
        """
        require_text(answer)
        reference = conversation["messages"][-1]["content"][-1]["text"]
        return int(final_answer(reference) == final_answer(answer))
