"""The tasks that tests/golden/test_text.py leaves out, on the golden lines. A failure names the line."""

import re

from nanochat_jax.tasks import ARC, SimpleSpelling, SpellingBee
from nanochat_jax.tasks.humaneval import extract_imports, extract_program
from nanochat_jax.tasks.spelling import TEST_SEED, parse_words

from . import data
from .test_text import lines, unmade

FORMATTED = re.compile(r"[a-z]+:[a-z](,[a-z])*|\d+:[a-z]( hit! count=\d+)?|#### \d+")  # the rest is words around it


def test_arc_rows_become_the_same_conversations_and_letters_are_judged_the_same():
    arc = unmade(ARC)
    for where, row in lines("multiple_choice.jsonl"):
        if row["task"] == "arc":
            conversation = arc.conversation(row["row"])
            assert conversation == row["conversation"], where
            for letter, expected in row["evaluate"].items():
                assert arc.evaluate(conversation, letter) == expected, (where, letter)


def test_programs_and_imports_are_cut_out_of_the_same_places():
    for where, row in lines("humaneval_text.jsonl"):
        if row["kind"] == "extract_program":
            assert extract_program(row["completion"]) == row["program"], where
        else:
            assert extract_imports(row["prompt"]) == row["imports"], where


def drawing_from_all_words(make, split):
    """The task as it was in nanochat, where both splits draw from the whole list."""
    task = unmade(make)
    task.split, task.size = split, TEST_SEED
    task.words = task.ordered(parse_words(data.path("words_alpha.txt").read_bytes()))
    return task


def test_spelling_asks_for_the_same_words_and_its_answers_have_the_same_form():
    for where, row in lines("spelling.jsonl"):
        if "conversation" not in row:
            continue
        make = {"SimpleSpelling": SimpleSpelling, "SpellingBee": SpellingBee}[row["task"]]
        ours = drawing_from_all_words(make, row["split"])[row["index"]]["messages"][1]["content"]
        theirs = row["conversation"]["messages"][1]["content"]
        if make is SimpleSpelling:
            assert ours == theirs, where
            continue
        assert [part["type"] for part in ours] == [part["type"] for part in theirs], where
        for mine, golden in zip(ours, theirs):
            if golden["type"] == "text":
                formatted = [list(filter(FORMATTED.fullmatch, p["text"].split("\n"))) for p in (mine, golden)]
                assert formatted[0] == formatted[1], where
            else:
                assert mine == golden, where


def test_answers_to_spelling_are_judged_the_same():
    def key(row):
        return row["task"], row["split"], row["index"]

    found = lines("spelling.jsonl")
    conversations = {key(row): row["conversation"] for _, row in found if "conversation" in row}
    for where, row in found:
        if "conversation" not in row and key(row) in conversations:  # a subset of the lines may lack it
            task = unmade({"SimpleSpelling": SimpleSpelling, "SpellingBee": SpellingBee}[row["task"]])
            assert task.evaluate(conversations[key(row)], row["completion"]) == row["evaluate"], where
            assert task.reward(conversations[key(row)], row["completion"]) == row["reward"], where
