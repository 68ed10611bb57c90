"""Questions with lettered choices: how they are put to the model, and how a letter is judged."""

from nanochat_jax.tasks.hub import HubTask
from nanochat_jax.tasks.task import question_and_answer

CLOSING = "Respond only with the letter of the correct answer."


def choice_conversation(question: str, choices: list[str], letters: list[str], answer: str) -> dict:
    """The question with one `- choice=letter` line each, answered by the letter alone.

    The letter comes last in its line and without a space before it, so that it is the token that the model is to
    produce after assistant_start. ValueError: not as many letters as choices, or an answer that is none of them.
    """
    if not isinstance(question, str) or not all(isinstance(text, str) for text in [*choices, *letters]):
        raise ValueError("the question, its choices and its letters must be text")
    if len(letters) != len(choices) or len(set(letters)) < len(letters):
        raise ValueError(f"each of the {len(choices)} choices needs a letter of its own, got {letters!r:.80}")
    if answer not in letters:
        raise ValueError(f"the answer must be one of {', '.join(letters)}, got {answer!r:.40}")
    listed = "\n".join(f"- {choice}={letter}" for choice, letter in zip(choices, letters))
    prompt = f"Multiple Choice question: {question}\n{listed}\n\n{CLOSING}"
    return question_and_answer(prompt, answer) | {"letters": list(letters)}


def is_right(conversation: dict, letter: str) -> bool:
    """Whether `letter` is the conversation's answer. ValueError: it is none of the letters on offer."""
    if letter not in conversation["letters"]:
        raise ValueError(f"the answer must be one of {', '.join(conversation['letters'])}, got {letter!r:.40}")
    return letter == conversation["messages"][-1]["content"]


class MultipleChoice(HubTask):
    """A dataset of the hub whose rows are such questions."""

    eval_type = "categorical"

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return is_right(conversation, answer)
