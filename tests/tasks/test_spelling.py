"""Spelling tasks on a word list written here: where it is found, what is asked, how answers are judged."""

import re
from itertools import product

import pytest

from nanochat_jax.inference.calculator import calculate
from nanochat_jax.tasks import SimpleSpelling, SpellingBee
from nanochat_jax.tasks.spelling import COUNT, SPELL, TEST_SEED, count_parts, word_list

WORDS = ["".join(letters) for letters in product(*["bcdfgl", "aeo", "lmnrst", "aei", "kmnst"])]  # 1620
WORDS += ["strawberry", "profile", "important", "evaluate", "directory"]  # the last hold names of Python's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "words_alpha.txt").write_bytes("\r\n".join(WORDS).encode() + b"\r\n")
    return folder


@pytest.fixture(autouse=True)
def no_words_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def question(conversation):
    return conversation["messages"][0]["content"]


def answer(conversation):
    return conversation["messages"][1]["content"]


def test_a_word_is_spelled(folder):
    task = SimpleSpelling(data_dir=folder)
    for conversation in task:
        word, letters = answer(conversation).split(":")
        assert word in WORDS and letters.split(",") == list(word)
        assert word in question(conversation) and "{" not in question(conversation)
    right = answer(task[0])
    assert task.evaluate(task[0], right) == 1 and task.reward(task[0], f" {right}\n") == 1.0
    for wrong in ("", right[:-1], right + ",", right.upper(), right.replace(",", "-")):
        assert task.evaluate(task[0], wrong) == 0 and task.reward(task[0], wrong) == 0.0


def test_letters_are_counted_by_hand_and_by_the_tool():
    texts = [part["text"] for part in count_parts("banana", "a")]
    assert "\nbanana:b,a,n,a,n,a\n" in texts[0]
    assert "\n1:b\n2:a hit! count=1\n3:n\n4:a hit! count=2\n5:n\n6:a hit! count=3\n" in texts[0]
    assert texts[2:4] == ["'banana'.count('a')", "3"] and texts[4].endswith("\n#### 3")
    assert [part["type"] for part in count_parts("b", "c")] == ["text", "text", "python", "python_output", "text"]
    assert "hit!" not in count_parts("b", "c")[0]["text"] and count_parts("b", "c")[3]["text"] == "0"


def test_the_calculator_prints_what_the_answers_show(folder):
    task = SpellingBee(data_dir=folder)
    counts = set()
    for conversation in task:
        parts = answer(conversation)
        code, output = parts[2]["text"], parts[3]["text"]
        assert calculate(code) == output and parts[4]["text"].endswith(f"#### {output}")
        word, letter = re.fullmatch(r"'([a-z]+)'\.count\('([a-z])'\)", code).groups()
        assert word in WORDS and output == str(word.count(letter))
        assert word in question(conversation) and letter in question(conversation).replace(word, "")
        counts.add(output)
    assert counts >= {"0", "1", "2"}
    for word in WORDS[-4:]:
        parts = count_parts(word, word[0])
        assert calculate(parts[2]["text"]) == parts[3]["text"] == str(word.count(word[0]))


def test_answers_to_counting_are_judged_by_their_final_number(folder):
    task = SpellingBee("test", data_dir=folder)
    count = answer(task[3])[3]["text"]
    assert task.evaluate(task[3], f"#### {count}\n#### 99") == 1 and task.reward(task[3], f"#### {count}") == 1.0
    for wrong in ("", count, f"#### {count}.", f"####{count}", f"#### 9{count}"):
        assert task.evaluate(task[3], wrong) == 0 and task.reward(task[3], wrong) == 0.0
    with pytest.raises(ValueError, match="must be text"):
        task.evaluate(task[3], 4)
    with pytest.raises(ValueError, match="must be text"):
        SimpleSpelling(data_dir=folder).evaluate(task[3], None)


def test_the_splits_share_no_word_across_both_tasks(folder):
    train, test = (
        {word for make in (SimpleSpelling, SpellingBee) for word in make(split, data_dir=folder).words}
        for split in ("train", "test")
    )
    assert not train & test and train | test == set(WORDS) and 40 < len(test) < 130
    for make, split in product((SimpleSpelling, SpellingBee), ("train", "test")):
        asked = {word for c in make(split, data_dir=folder) for word in re.findall("[a-z]{5,}", question(c))}
        assert not asked & (test if split == "train" else train)


def test_a_word_keeps_its_split_when_the_list_changes(folder, tmp_path):
    (tmp_path / "words_alpha.txt").write_text("\n".join(reversed(WORDS[::2])))
    assert set(SpellingBee("test", data_dir=tmp_path).words) <= set(SpellingBee("test", data_dir=folder).words)


def test_an_example_depends_on_split_and_index_alone(folder):
    for make in (SimpleSpelling, SpellingBee):
        few, many = make(size=20, data_dir=folder), make(size=TEST_SEED, data_dir=folder)
        assert [many[i] for i in reversed(range(20))] == list(few)[::-1]
        assert many[TEST_SEED - 1] == make(size=TEST_SEED, data_dir=folder)[TEST_SEED - 1]
        assert make(size=20, start=3, step=4, data_dir=folder)[2] == few[11]
        assert len({question(c) for c in make(size=200, data_dir=folder)}) > 190
        for index in (-1, 20):
            with pytest.raises(IndexError, match="number"):
                few[index]
            with pytest.raises(IndexError, match="number"):
                few.get_example(index)
    words = [answer(c).split(":")[0] for c in SimpleSpelling(size=50, data_dir=folder)]
    assert sum(w in question(c) for w, c in zip(words, SpellingBee(size=50, data_dir=folder))) < 5


def test_questions_are_worded_in_many_ways(folder):
    asked = [question(c) for c in SpellingBee(size=3000, data_dir=folder)]
    shapes = {re.sub(r"(?<![a-z])[a-z](?![a-z])|[\"'?]", "", re.sub("|".join(WORDS), "W", q).lower()) for q in asked}
    assert len(COUNT) >= 30 and len(shapes) >= len(COUNT) - 1
    assert len(SPELL) >= 12 and all(t.count("{word}") == 1 for t in SPELL)
    assert any(q.endswith("?") for q in asked) and any(q.islower() for q in asked) and any('"' in q for q in asked)


def test_the_list_is_found_by_argument_environment_and_base_directory(folder, tmp_path, monkeypatch):
    assert word_list(folder) == folder / "words_alpha.txt"
    with pytest.raises(FileNotFoundError, match="--simple-spelling-rows 0 --spelling-bee-rows 0") as e:
        SpellingBee()
    assert "curl" in str(e.value) and "\n" not in str(e.value)
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    (base / "words_alpha.txt").write_text("\n".join(WORDS))
    assert word_list() == base / "words_alpha.txt"
    (tmp_path / "mirror" / "words").mkdir(parents=True)
    (tmp_path / "mirror" / "words" / "words_alpha.txt").write_text("\n".join(WORDS))
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "mirror"))
    assert word_list() == tmp_path / "mirror" / "words" / "words_alpha.txt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"apple\nit's\n", 'a to z, got "it\'s"'),
        (b"apple\nAda\n", "a to z, got 'Ada'"),
        ("apple\nnaïve\n".encode(), "a to z, got the byte 0xc3"),
        (b"apple\n7\n", "a to z, got '7'"),
        (b"\x00", "a to z"),
        (b"", "0 words, too few"),
        (b"apple\n", "1 words, too few"),
    ],
)
def test_a_list_that_will_not_do_is_refused_with_its_name(content, message, tmp_path):
    (tmp_path / "words_alpha.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        [SpellingBee(split, data_dir=tmp_path) for split in ("train", "test")]  # one word is in one of them
    assert str(tmp_path / "words_alpha.txt") in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"split": "dev"}, "splits train, test"), ({"size": 0}, "size from 1"), ({"size": TEST_SEED + 1}, "size from 1")],
)
def test_what_cannot_be_made_is_refused(kwargs, message, folder):
    with pytest.raises(ValueError, match=message):
        SimpleSpelling(**kwargs, data_dir=folder)


def test_the_fingerprint_follows_task_split_size_slice_and_list(folder, tmp_path):
    variants = [{}, {"split": "test"}, {"size": 9}, {"start": 1}]
    prints = {make(**kw, data_dir=folder).fingerprint() for make in (SimpleSpelling, SpellingBee) for kw in variants}
    (tmp_path / "words_alpha.txt").write_text("\n".join(WORDS[1:]))
    prints.add(SpellingBee(data_dir=tmp_path).fingerprint())
    assert len(prints) == 9
    assert SpellingBee(data_dir=folder).fingerprint() in prints
