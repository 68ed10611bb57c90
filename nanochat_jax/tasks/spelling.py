"""Spelling: words letter by letter, and how often a letter is in a word, on the list github.com/dwyl/english-words

Both tasks were in nanochat from 2025-10 to 2026-07. Words, letters, the form of the answers and the judgement are
theirs (golden/spelling.jsonl), the wording is ours. One thing differs: there both splits draw from all words; here one
word in HELD_OUT belongs to the test split alone, so that a test asks for words that no training row of either task had.
"""

import hashlib
import random
import zlib
from pathlib import Path
from string import ascii_lowercase
from typing import Unpack

from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.hub import WORD_LIST, find_file
from nanochat_jax.tasks.task import MadeUpTask, Slice, question_and_answer, require_text

HELD_OUT = 20  # the checksum of a word decides, so that other words in the list change nothing for it
TEST_SEED = 10_000_000  # example i has the seed i, in the test split TEST_SEED + i
LIST_SEED = 42  # shuffles SimpleSpelling's list, else example i of both tasks would have the same word


def split_questions(table: str) -> list[str]:
    """Questions that stand in lines, with | between two of a line."""
    return table.strip().replace("\n", " | ").split(" | ")


SPELL = split_questions("""
Spell {word} | Please spell {word} | Can you spell {word}? | How is {word} spelled? | How do you spell {word}?
Spell the word {word} | Spell {word} for me | Spell out {word} | Spell {word} letter by letter
Give me the letters of {word} | Which letters make up {word}? | What is the spelling of {word}?
List the letters of the word {word} | I need the spelling of {word} | Take {word} apart into letters
Write {word} one letter at a time
""")
COUNT = split_questions("""
How often is {letter} in {word}? | How often does {letter} occur in {word}?
How often does the letter {letter} come up in {word}? | How many times does {word} have the letter {letter}?
How many times do you see {letter} in {word}? | How many times is {letter} used to write {word}?
How many letters {letter} does {word} have? | How many of the letters in {word} are {letter}?
How many {letter} does one need to write {word}? | How many {letter} can you find in the word {word}?
In {word}, how many letters are {letter}? | In the word {word}, how often do you find {letter}?
If you spell {word}, how often do you say {letter}? | Looking at {word}, how many {letter} are there?
What is the number of letters {letter} in {word}? | What number of {letter} does {word} contain?
What do you get when you count {letter} in {word}? | Does {word} have any {letter}, and how many?
Can you say how many {letter} the word {word} has? | Could you count {letter} in {word} for me?
Do you know how many times {letter} is in {word}? | I want to know how many {letter} are in {word}
I wonder how often {letter} stands in {word} | Please count the letter {letter} in {word}
Please tell me how often {word} has {letter} | Count {letter} in {word}
Count how often the letter {letter} is in {word} | Go through {word} and count every {letter}
Find every {letter} in {word} and say how many there are | Give the number of times that {letter} is in {word}
{word}: how many {letter}? | The word is {word}, the letter is {letter}, how many are there?
""")
QUOTES = ("", "'", '"')


def word_list(data_dir: Path | str | None = None) -> Path:
    """Where the word list is: hub.find_file. FileNotFoundError where it is not and cannot be downloaded."""
    try:
        return find_file(WORD_LIST, data_dir)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e}; to do without: --simple-spelling-rows 0 --spelling-bee-rows 0") from e


def parse_words(data: bytes) -> list[str]:
    """The words of a list, one a line. ValueError: anything but the letters a to z and white space."""
    try:
        words = data.decode("ascii").split()
    except UnicodeDecodeError as e:
        raise ValueError(f"must have words of the letters a to z, got the byte 0x{data[e.start]:02x}") from e
    if wrong := next((word for word in words if not (word.isalpha() and word.islower())), None):
        raise ValueError(f"must have words of the letters a to z, got {wrong!r:.40}")
    return words


class Spelling(MadeUpTask):
    """What the two tasks share. A subclass defines exchange(word, rng) -> question and answer about the word."""

    max_size = TEST_SEED

    def __init__(
        self, split: str = "train", size: int = 1000, *, data_dir: Path | str | None = None, **slice_: Unpack[Slice]
    ):
        super().__init__(split, size, **slice_)
        path = word_list(data_dir)
        data = path.read_bytes()
        self._digest = hashlib.sha256(data).hexdigest()
        try:
            words = parse_words(data)
        except ValueError as e:
            raise ValueError(f"{path} {e}") from e
        self.words = self.ordered([w for w in words if (zlib.crc32(w.encode()) % HELD_OUT == 0) == (split == "test")])
        if not self.words:
            raise ValueError(f"{path} has {len(words)} words, too few for one in the {split} split")

    def ordered(self, words: list[str]) -> list[str]:
        return words

    def make(self, index: int) -> dict:
        rng = random.Random(index + (TEST_SEED if self.split == "test" else 0))
        return question_and_answer(*self.exchange(rng.choice(self.words), rng))

    def fingerprint(self) -> str:
        return self.fingerprint_of(type(self).__name__, self._digest, self.split, self.size)


class SimpleSpelling(Spelling):
    """SimpleSpelling(split, size): "how is cat spelled?", answered by cat:c,a,t"""

    def ordered(self, words: list[str]) -> list[str]:
        random.Random(LIST_SEED).shuffle(words)
        return words

    def exchange(self, word: str, rng: random.Random) -> tuple[str, str]:
        return ask(SPELL, rng, word=quoted(word, rng)), f"{word}:{','.join(word)}"

    def evaluate(self, conversation: dict, answer: str) -> int:
        """1 where the answer is the reference, white space around it aside."""
        require_text(answer)
        return int(answer.strip() == conversation["messages"][-1]["content"])


class SpellingBee(Spelling):
    """SpellingBee(split, size): "how many r are in strawberry?", counted by hand, then by the tool."""

    evaluate = GSM8K.evaluate  # the number after `#### ` decides

    def exchange(self, word: str, rng: random.Random) -> tuple[str, list[dict]]:
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(ascii_lowercase)  # often one of the word's own
        question = ask(COUNT, rng, word=quoted(word, rng), letter=quoted(letter, rng))
        return question, count_parts(word, letter)


def ask(templates: list[str], rng: random.Random, **slots: str) -> str:
    """One of the questions about `slots`, in one of the ways in which people type it."""
    template = rng.choice(templates)
    if rng.random() < 0.3:
        template = template.lower()
    if rng.random() < 0.3:
        template = template.rstrip("?")
    return template.format(**slots)


def quoted(text: str, rng: random.Random) -> str:
    """The text between quotation marks of a kind that is drawn."""
    mark = rng.choice(QUOTES)
    return mark + text + mark


def count_parts(word: str, letter: str) -> list[dict]:
    """The answer to how often `letter` is in `word`: spelled, counted by hand, checked with the tool."""
    lines, count = [], 0
    for i, each in enumerate(word, start=1):
        count += each == letter
        lines.append(f"{i}:{each} hit! count={count}" if each == letter else f"{i}:{each}")
    by_hand = "\n".join(lines)
    return [
        {
            "type": "text",
            "text": f"I first count the letter '{letter}' in '{word}' by hand.\n\nThe word letter by letter:\n{word}:"
            f"{','.join(word)}\n\nNow I go through it and look for '{letter}':\n{by_hand}\n\nThat makes {count}.",
        },
        {"type": "text", "text": "\n\nPython can check this:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython finds {count} too.\n\nSo the answer is:\n\n#### {count}"},
    ]
