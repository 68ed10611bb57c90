"""Generated word problems: right, told apart by split for good, and the same whenever they are asked for."""

import random
import re
from collections import Counter
from itertools import product

import pytest

from nanochat_jax.inference.calculator import calculate
from nanochat_jax.tasks import Arithmetic
from nanochat_jax.tasks.arithmetic import (
    NAMES,
    OPERATIONS,
    SMALLEST_LARGEST,
    STORIES,
    THINGS,
    draw_numbers,
    is_held_out,
)
from nanochat_jax.tasks.gsm8k import final_answer


def question(conversation):
    return conversation["messages"][0]["content"]


def parts(conversation, kind):
    return [part["text"] for part in conversation["messages"][1]["content"] if part["type"] == kind]


def problems(count, *args, **kwargs):
    task = Arithmetic(*args, **kwargs)
    return [task[i] for i in range(count)]


def test_a_problem_is_written_as_gsm8k_writes_it():
    answer = [
        {"type": "text", "text": "Hana puts away "},
        {"type": "python", "text": "17-2"},
        {"type": "python_output", "text": "15"},
        {"type": "text", "text": "15 cards. In each bag are "},
        {"type": "python", "text": "15//3"},
        {"type": "python_output", "text": "5"},
        {"type": "text", "text": "5.\n#### 5"},
    ]
    asked = "Hana has 17 cards, keeps 2 and puts the others into 3 bags equally. How many are in each bag?"
    assert Arithmetic("train", seed=3, steps=[2])[4] == {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    }


@pytest.mark.parametrize("kwargs", [{}, {"largest": 12}, {"largest": 1000}, {"steps": [1]}, {"steps": [2]}])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_calculator_prints_what_the_answer_says_and_the_last_result_is_the_answer(split, kwargs):
    largest, steps = kwargs.get("largest", 20), kwargs.get("steps", [1, 2])
    for conversation in problems(300, split, **kwargs):
        calls, outputs, texts = (parts(conversation, kind) for kind in ("python", "python_output", "text"))
        assert len(calls) in steps and [calculate(call) for call in calls] == outputs
        assert all(text.startswith(output) for output, text in zip(outputs, texts[1:]))
        assert texts[-1].endswith(f"\n#### {outputs[-1]}") and final_answer(texts[-1]) == outputs[-1]
        kinds = [part["type"] for part in conversation["messages"][1]["content"]]
        assert kinds == ["text", "python", "python_output"] * len(calls) + ["text"]
        asked = [int(n) for n in re.findall(r"\d+", question(conversation))]
        assert all(2 <= number <= largest for number in asked)
        assert all(int(output) >= 2 for output in outputs)
        known = {*map(str, asked), *outputs[:-1]}
        assert all(number in known for call in calls for number in re.findall(r"\d+", call))


def test_every_story_name_and_thing_is_told_and_no_slot_is_left_open():
    conversations = problems(4000)
    told = " ".join(question(conversation) for conversation in conversations)
    whole = told + " ".join(text for conversation in conversations for text in parts(conversation, "text"))
    assert "{" not in whole and "<<" not in whole
    assert all(re.search(rf"\b{word}\b", told) for word in NAMES + THINGS)
    signs = [tuple(re.sub(r"\d+", "", call) for call in parts(c, "python")) for c in conversations]
    assert {tuple(sign for _, sign, _ in story.steps) for story in STORIES} == set(signs)
    assert {sign for pair in signs for sign in pair} == set(OPERATIONS)
    shapes = {
        re.sub(r"\d+", "N", re.sub(rf"\b({'|'.join(NAMES + THINGS)})\b", "W", question(c))) for c in conversations
    }
    assert len(shapes) == len(STORIES) >= 24


def either_way_round(call):
    left, sign, right = re.fullmatch(r"(\d+)(\D+)(\d+)", call).groups()
    return (sign, *(sorted((left, right)) if sign in "+*" else (left, right)))


def test_no_calculation_of_one_split_is_in_the_other_whatever_seed_size_and_numbers():
    seen = {"train": set(), "test": set()}
    questions = {"train": set(), "test": set()}
    for split, seed, largest in product(seen, (0, 1, -7), (12, 20, 300)):
        for conversation in problems(2500, split, seed=seed, largest=largest):
            seen[split].add(tuple(map(either_way_round, parts(conversation, "python"))))
            questions[split].add(question(conversation))
    assert len(questions["train"]) > 18_000 and len(questions["test"]) > 16_000
    assert not seen["train"] & seen["test"] and not questions["train"] & questions["test"]


@pytest.mark.parametrize("story", {story.steps: story for story in STORIES}.values(), ids=lambda s: str(s.steps))
def test_with_the_fewest_numbers_every_story_has_problems_for_both_splits(story):
    """So drawing ends: a larger `largest` only adds calculations."""
    rng, found = random.Random(0), set()
    for _ in range(1000):
        if values := draw_numbers(story, rng, SMALLEST_LARGEST):
            found.add(is_held_out([f"{values[left]}{sign}{values[right]}" for left, sign, right in story.steps]))
    assert found == {True, False}


def test_both_splits_tell_the_stories_equally_often():
    counts = {}
    for split in ("train", "test"):
        signs = ["".join(re.sub(r"\d+", "", call) for call in parts(c, "python")) for c in problems(4000, split)]
        counts[split] = Counter(signs)
    assert counts["train"].keys() == counts["test"].keys()
    assert all(abs(n - counts["test"][sign]) < 6 * n**0.5 for sign, n in counts["train"].items())


def test_about_a_fifth_of_all_calculations_is_held_out():
    calls = [[f"{a}{sign}{b}"] for a in range(2, 101) for b in range(2, 101) for sign in "+*"]
    assert 0.19 < sum(map(is_held_out, calls)) / len(calls) < 0.21


def test_a_sum_and_a_product_belong_to_one_split_whichever_way_round_they_are_written():
    for a, b, sign in product(range(2, 40), range(2, 40), "+*"):
        for more in ([], ["70-3"], ["9*8"]):
            assert is_held_out([f"{a}{sign}{b}", *more]) == is_held_out([f"{b}{sign}{a}", *more])
    differences = [is_held_out([f"{a}-{b}"]) == is_held_out([f"{b}-{a}"]) for a in range(20) for b in range(a)]
    assert not all(differences)  # these are other calculations


def test_a_problem_depends_on_split_seed_and_index_alone():
    forwards = problems(50, "train", seed=1)
    task = Arithmetic("train", 2**31 - 1, seed=1)
    assert [task[i] for i in reversed(range(50))] == forwards[::-1]
    assert task[2**31 - 2] == Arithmetic("train", 2**31 - 1, seed=1)[2**31 - 2]
    assert Arithmetic("train", seed=1, start=10, stop=50, step=7)[2] == forwards[24]
    for other in (problems(50, "test", seed=1), problems(50, "train", seed=2)):
        assert sum(a != b for a, b in zip(forwards, other)) > 45


def test_answers_are_judged_by_their_final_number():
    task = Arithmetic("test")
    for i in range(20):
        right = parts(task[i], "python_output")[-1]
        assert task.evaluate(task[i], f"so\n#### {right}") == 1 and task.reward(task[i], f"#### {right}") == 1.0
        for wrong in ("", right, f"#### {right}.0", f"####{right}", f"#### {int(right) + 1}"):
            assert task.evaluate(task[i], wrong) == 0 and task.reward(task[i], wrong) == 0.0
    with pytest.raises(ValueError, match="must be text"):
        task.evaluate(task[0], None)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "validation"}, "splits train, test"),
        ({"size": 0}, "size from 1 to"),
        ({"size": 2**31}, "size from 1 to"),
        ({"largest": 11}, "from 12 to 1,000, got 11"),
        ({"largest": 1001}, "from 12 to 1,000"),
        ({"steps": []}, "steps of 1, 2 or both"),
        ({"steps": [1, 3]}, "steps of 1, 2 or both"),
    ],
)
def test_what_cannot_be_made_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Arithmetic(**kwargs)


def test_an_index_outside_is_an_index_error():
    task = Arithmetic(size=5)
    assert len(list(task)) == len(task) == 5
    for index in (-1, 5):
        with pytest.raises(IndexError, match="number"):
            task[index]
        with pytest.raises(IndexError, match="number"):
            task.get_example(index)


def test_the_fingerprint_follows_everything_that_changes_the_problems():
    variants = [
        {},
        {"split": "test"},
        {"size": 9},
        {"seed": 1},
        {"steps": [1]},
        {"steps": [2]},
        {"largest": 21},
        {"start": 1},
    ]
    assert len({Arithmetic(**kwargs).fingerprint() for kwargs in variants}) == len(variants)
    assert Arithmetic(steps=(2, 1)).fingerprint() == Arithmetic().fingerprint()


def test_a_fingerprint_reads_no_conversation(monkeypatch):
    monkeypatch.delattr(Arithmetic, "make")
    assert len(Arithmetic().fingerprint()) > 8
