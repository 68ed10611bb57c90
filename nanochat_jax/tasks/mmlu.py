"""MMLU: multiple choice questions of 57 subjects, https://arxiv.org/abs/2009.03300"""

from nanochat_jax.tasks.multiple_choice import MultipleChoice, choice_conversation

LETTERS = ["A", "B", "C", "D"]


class MMLU(MultipleChoice):
    """MMLU(split): "train" is the hub's auxiliary_train, the others are test, validation and dev."""

    repo = "cais/mmlu"
    subset = "all"
    columns = ("question", "subject", "choices", "answer")
    splits = ("train", "auxiliary_train", "test", "validation", "dev")

    def split_on_hub(self, split: str) -> str:
        return "auxiliary_train" if split == "train" else split

    def conversation(self, row: dict) -> dict:
        choices, answer = row["choices"], row["answer"]
        if not isinstance(choices, list) or len(choices) != len(LETTERS):
            raise ValueError(f"choices must be a list of {len(LETTERS)}, got {choices!r:.80}")
        if not isinstance(answer, int) or not 0 <= answer < len(LETTERS):
            raise ValueError(f"answer must be an index in 0..{len(LETTERS) - 1}, got {answer!r:.40}")
        return choice_conversation(row["question"], choices, LETTERS, LETTERS[answer]) | {"subject": row["subject"]}
