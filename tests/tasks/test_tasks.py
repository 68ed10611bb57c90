"""Tasks on small files written here: slices, mixtures, the hub's layout, your own JSON lines, --task."""

import json
import os
import random
import sys
import time

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.files.digest import file_digest
from nanochat_jax.files.parquet import read_files
from nanochat_jax.tasks import GSM8K, MMLU, SmolTalk, Task, TaskMixture, TaskSequence, load_task
from nanochat_jax.tasks.gsm8k import answer_parts, final_answer
from nanochat_jax.tasks.hub import split_files
from nanochat_jax.tasks.multiple_choice import choice_conversation
from nanochat_jax.tasks.task import as_number


@pytest.fixture(autouse=True)
def no_mirror_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def chat(user="u", assistant="a"):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


class Letters(Task):
    """Ten conversations, a to j."""

    def num_examples(self):
        return 10

    def get_example(self, index):
        return {"messages": chat("abcdefghij"[index])}

    def evaluate(self, conversation, answer):
        return answer == conversation["messages"][0]["content"]


def users(task):
    return "".join(conversation["messages"][0]["content"] for conversation in task)


# -------------------------------------------------------------------------------------------------------- slices
def test_a_slice_is_clipped_to_the_dataset_unless_nanochats_length_is_asked_for():
    assert users(Letters()) == "abcdefghij"
    assert users(Letters(start=2, stop=9, step=3)) == "cfi"
    assert users(Letters(start=8, stop=50)) == "ij"
    assert len(Letters(start=20)) == 0
    unclipped = Letters(start=8, stop=50, clip=False)
    assert len(unclipped) == 42 and unclipped[1]["messages"][0]["content"] == "j"
    with pytest.raises(IndexError, match="number 10"):
        unclipped[2]


@pytest.mark.parametrize("slice_", [{"start": -1}, {"start": 3, "stop": 2}, {"step": 0}, {"stop": -1}])
def test_an_impossible_slice_is_refused(slice_):
    with pytest.raises(ValueError, match="start <= stop"):
        Letters(**slice_)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_the_slice_is_an_index_error(index):
    with pytest.raises(IndexError, match="has 10 conversations"):
        Letters()[index]


def test_the_reward_is_the_evaluation_as_a_number_and_the_fingerprint_follows_the_content():
    task = Letters()
    assert task.reward(task[3], "d") == 1.0 and task.reward(task[3], "x") == 0.0
    assert task.name == "Letters" and task.eval_type == "generative"
    assert task.fingerprint() == Letters().fingerprint() != Letters(start=1).fingerprint()


# ------------------------------------------------------------------------------------------------------ mixtures
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=5), st.integers(0, 3))
def test_a_mixture_is_the_shuffled_list_of_pairs(stops, seed):
    tasks = [Letters(stop=stop) for stop in stops]
    pairs = [[t, i] for t, stop in enumerate(stops) for i in range(stop)]
    assert TaskSequence(tasks).pairs.tolist() == pairs
    random.Random(seed).shuffle(pairs)
    mixture = TaskMixture(tasks, seed=seed)
    assert mixture.pairs.tolist() == pairs and mixture.pairs.shape == (len(mixture), 2)
    assert users(mixture) == "".join("abcdefghij"[i] for _, i in pairs)


def test_a_million_pairs_take_eight_bytes_each():
    class Many(Letters):
        def num_examples(self):
            return 600_000

    pairs = TaskMixture([Many(), Many()]).pairs
    assert pairs.nbytes == 8 * 1_200_000
    assert np.array_equal(np.unique(pairs[:, 1]), np.arange(600_000))


def test_a_task_may_come_twice_and_any_sequence_may_be_mixed():
    conversations = [{"messages": chat("y")}, {"messages": chat("z")}]
    task = Letters(stop=2)
    assert sorted(users(TaskMixture([task, task, conversations]))) == list("aabbyz")
    with pytest.raises(ValueError, match="at least one task"):
        TaskMixture([])


def test_the_fingerprint_of_a_mixture_follows_tasks_order_and_seed():
    a, b = Letters(stop=2), Letters(start=2)
    mixtures = [TaskMixture([a, b]), TaskMixture([b, a]), TaskMixture([a]), TaskMixture([a, b], seed=1)]
    assert len({m.fingerprint() for m in [*mixtures, TaskSequence([a, b])]}) == 5
    assert TaskMixture([a, b]).fingerprint() == mixtures[0].fingerprint()


# ----------------------------------------------------------------------------------------------------------- hub
def write_split(root, repo, subset, split, *files):
    """Each of `files` is a dict of columns, or a Table."""
    folder = root / repo.replace("/", "--") / subset / split
    folder.mkdir(parents=True)
    names = [f"{i:05d}.parquet" for i in range(len(files))]
    for name, columns in zip(names, files):
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), folder / name)
    (folder / "manifest.json").write_text(json.dumps(names))
    return folder


PROBLEMS = {"question": [f"q{i}" for i in range(5)], "answer": [f"<<{i}+1={i + 1}>>\n#### {i}" for i in range(5)]}


def gsm8k(root, *files):
    return write_split(root, "openai/gsm8k", "main", "train", *(files or [PROBLEMS]))


def test_rows_come_in_nanochats_permuted_order_also_across_files(tmp_path):
    halves = [{k: v[:2] for k, v in PROBLEMS.items()}, {k: v[2:] for k, v in PROBLEMS.items()}]
    gsm8k(tmp_path, *halves)
    task = GSM8K("train", data_dir=tmp_path)
    order = [4, 2, 3, 1, 0]  # numpy's default_rng(42).permutation(5)
    assert [conversation["messages"][0]["content"] for conversation in task] == [f"q{i}" for i in order]
    assert users(GSM8K("train", data_dir=tmp_path, start=1, stop=3)) == "q2q3"
    table = read_files(split_files("openai/gsm8k", "main", "train", tmp_path), ("question",))
    assert table["question"].to_pylist() == PROBLEMS["question"]


def test_a_mirror_is_found_by_argument_then_environment_then_base_directory(tmp_path, monkeypatch):
    def one(text):
        return {"question": [text], "answer": ["#### 1"]}

    gsm8k(tmp_path / "base" / "task_data", one("base"))
    assert users(GSM8K()) == "base"
    gsm8k(tmp_path / "named" / "hub", one("environment"))
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "named"))
    assert users(GSM8K()) == "environment"
    gsm8k(tmp_path / "argument", one("argument"))
    assert users(GSM8K(data_dir=tmp_path / "argument")) == "argument"
    assert users(GSM8K(data_dir=tmp_path / "nothing here")) == "environment"


def test_a_missing_dataset_is_one_sentence_with_places_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        GSM8K("test", data_dir=tmp_path)
    message = str(missing.value)
    assert "openai/gsm8k (subset main, split test)" in message and "NANOCHAT_DATA_DIR" in message
    assert str(tmp_path) in message and str(tmp_path / "base" / "task_data") in message and "\n" not in message


@pytest.mark.parametrize(
    "manifest", ["{", "{}", "[]", "[1]", '["../../x.parquet"]', '["/etc/passwd"]', '["b.parquet"]']
)
def test_a_damaged_manifest_is_named(tmp_path, manifest):
    (gsm8k(tmp_path) / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        GSM8K(data_dir=tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = gsm8k(tmp_path) / "00000.parquet"
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[: len(whole) // 2], b"x" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"00000\.parquet is not a readable parquet file"):
            GSM8K(data_dir=tmp_path)
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])  # the footer is good, the data is not
    with pytest.raises(ValueError, match=r"gsm8k|00000\.parquet"):
        list(GSM8K(data_dir=tmp_path))


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    gsm8k(tmp_path, {"question": ["q"], "solution": ["a"]})
    with pytest.raises(ValueError, match=r"00000\.parquet has no column answer; it has question, solution"):
        GSM8K(data_dir=tmp_path)


def test_a_column_that_is_there_twice_is_refused_and_others_may_be(tmp_path):
    names = ["question", "answer", "more", "more"]
    gsm8k(tmp_path / "more", pa.table([["q"], ["1 #### 1"], ["x"], ["y"]], names=names))
    assert len(list(GSM8K(data_dir=tmp_path / "more"))) == 1
    gsm8k(tmp_path, pa.table([["q"], ["1 #### 1"], ["#### 2"]], names=["question", "answer", "answer"]))
    with pytest.raises(ValueError, match=r"00000\.parquet must have one column answer, it has 2"):
        GSM8K(data_dir=tmp_path)


def test_files_that_do_not_fit_together_are_an_ordinary_error(tmp_path):
    gsm8k(tmp_path, {"question": ["q"], "answer": ["a"]}, {"question": [["q"]], "answer": ["a"]})
    with pytest.raises(ValueError, match="do not fit together"):
        list(GSM8K(data_dir=tmp_path))


def test_a_bad_row_is_named_when_it_is_read(tmp_path):
    gsm8k(tmp_path, {"question": ["q", None], "answer": ["a", "b"]})
    with pytest.raises(ValueError, match=r"row 1 of openai/gsm8k \(main/train\): question must be text, got None"):
        list(GSM8K(data_dir=tmp_path))


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="train, test, got 'dev'"):
        GSM8K("dev", data_dir=tmp_path)


def test_the_fingerprint_follows_the_files_content_and_the_slice(tmp_path):
    gsm8k(tmp_path / "a")
    gsm8k(tmp_path / "b")
    gsm8k(tmp_path / "c", PROBLEMS | {"answer": ["#### 0"] * 5})
    prints = [GSM8K(data_dir=tmp_path / name).fingerprint() for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert GSM8K(data_dir=tmp_path / "a", stop=3).fingerprint() != prints[0]


def test_a_file_is_hashed_once_until_it_changes_and_a_corrupt_memo_is_ignored(tmp_path, monkeypatch):
    path, memo = tmp_path / "file", tmp_path / "base" / "token_cache" / "file_digests.json"

    def write(content, age):
        path.write_bytes(content)
        os.utime(path, ns=(0, time.time_ns() - age * 10**9))

    write(b"one", age=0)
    file_digest(path)
    assert not memo.exists()  # so young a file may change again without changing its time
    write(b"one", age=100)
    first = file_digest(path)
    assert memo.exists()
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert file_digest(path) == first
    write(b"two", age=50)
    assert file_digest(path) != first
    for garbage in (
        *(b"", b"[", b"[1]", b"\xff", json.dumps({str(path): [1]}).encode()),
        *(b"[" * 200_000, b'{"a": ' * 200_000, b'{"a": 1e999, "b": NaN, "c": [true, 1, "x"]}', b"1" * 9999),
        b'{"a": ' + b"[" * 1100 + b"]" * 1100 + b"}",  # can be read, but writing it would go too deep
        json.dumps({str(path): [3, path.stat().st_mtime_ns, "0" * 63]}).encode(),
        json.dumps({str(path): [1e999, [], {}]}).encode(),
    ):
        memo.write_bytes(garbage)
        write(b"one", age=100)
        assert file_digest(path) == first


class Extra(Letters):
    """Letters whose conversation 4 has something more."""

    def __init__(self, more):
        super().__init__()
        self.more = more

    def get_example(self, index):
        return super().get_example(index) | ({"more": self.more} if index == 4 else {})


@pytest.mark.parametrize("more", [object(), {1, 2}, b"x", {"deep": [{"in": lambda: 0}]}, {(1, 2): 3}, 1j], ids=range(6))
def test_an_item_that_json_cannot_hold_is_found_out_at_once_with_its_row(more):
    with pytest.raises(ValueError, match=r"^Extra, row 4 cannot be read: TypeError: [^\n]+ not \w+") as error:
        Extra(more).fingerprint()
    assert " at 0x" not in str(error.value)


def test_numbers_of_array_libraries_and_nan_have_a_fingerprint():
    for more, same in ((np.int64(3), 3), (np.arange(3), [0, 1, 2]), (np.float32(0.5), 0.5), (float("nan"),) * 2):
        assert Extra(more).fingerprint() == Extra(same).fingerprint()
    assert Extra(float("nan")).fingerprint() != Extra(None).fingerprint()


@pytest.mark.parametrize(
    ("given", "number"),
    [(True, 1.0), (2, 2.0), (0.5, 0.5), (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (np.array([[3]]), 3.0)],
    ids=repr,
)
def test_a_reward_may_be_a_number_of_python_or_of_an_array_library(given, number):
    assert as_number(given) == number and type(as_number(given)) is float


def test_a_reward_may_be_a_number_on_a_device():
    assert [as_number(jnp.asarray(0.5, dtype)) for dtype in (jnp.float32, jnp.bfloat16)] == [0.5, 0.5]
    assert as_number(jnp.ones((1, 1), bool)) == 1.0


@pytest.mark.parametrize(
    "given", ["0.5", b"1", None, [1], np.array([1, 2]), np.str_("1"), 1j, np.array(["1"])], ids=repr
)
def test_a_reward_that_is_no_single_number_is_refused(given):
    with pytest.raises((TypeError, ValueError)):
        as_number(given)


# ------------------------------------------------------------------------------------------------ the hub's tasks
def test_smoltalk_reads_messages_and_keeps_a_system_message(tmp_path):
    rows = [[{"role": "system", "content": "s"}, *chat("u1")], chat("u2")]
    write_split(tmp_path, "HuggingFaceTB/smol-smoltalk", "default", "train", {"messages": rows})
    task = SmolTalk("train", data_dir=tmp_path)
    assert sorted((task[0]["messages"], task[1]["messages"]), key=len) == [rows[1], rows[0]]


BAD_MESSAGES = {
    "null": None,
    "empty": [],
    "one": chat()[:1],
    "twice": chat()[:1] * 2,
    "no text": [{"role": "user", "content": None}, chat()[1]],
    "system without text": [{"role": "system", "content": None}, *chat()],
}


@pytest.mark.parametrize("messages", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_smoltalk_refuses_a_bad_row_by_its_number(tmp_path, messages):
    rows = {"messages": pa.array([chat(), messages])}
    write_split(tmp_path, "my/talks", "default", "train", rows)
    with pytest.raises(ValueError, match=r"row 1 of my/talks \(default/train\)"):
        list(SmolTalk("train", repo="my/talks", data_dir=tmp_path))


def test_mmlu_takes_training_questions_from_auxiliary_train(tmp_path):
    row = {"question": ["2+2?"], "subject": ["maths"], "choices": [["1", "2", "4", "8"]], "answer": [2]}
    write_split(tmp_path, "cais/mmlu", "all", "auxiliary_train", row)
    task = MMLU("train", data_dir=tmp_path)
    assert task.eval_type == "categorical"
    assert task[0] == {
        "messages": chat(
            "Multiple Choice question: 2+2?\n- 1=A\n- 2=B\n- 4=C\n- 8=D\n\n"
            "Respond only with the letter of the correct answer.",
            "C",
        ),
        "letters": ["A", "B", "C", "D"],
        "subject": "maths",
    }
    assert task.evaluate(task[0], "C") and not task.evaluate(task[0], "A")
    with pytest.raises(ValueError, match="one of A, B, C, D, got 'E'"):
        task.evaluate(task[0], "E")


@pytest.mark.parametrize("change", [{"answer": [4]}, {"answer": [-1]}, {"choices": [["a", "b"]]}, {"question": [None]}])
def test_mmlu_refuses_a_bad_row(tmp_path, change):
    row = {"question": ["?"], "subject": ["s"], "choices": [["1", "2", "4", "8"]], "answer": [2]} | change
    row["question"] = pa.array(row["question"], pa.string())
    write_split(tmp_path, "cais/mmlu", "all", "test", row)
    with pytest.raises(ValueError, match="row 0 of cais/mmlu"):
        MMLU("test", data_dir=tmp_path)[0]


@pytest.mark.parametrize("letters", [["A"], ["A", "A"], ["A", None]])
def test_every_choice_needs_a_letter_of_its_own(letters):
    with pytest.raises(ValueError, match="letter"):
        choice_conversation("q", ["x", "y"], letters, "A")


def test_gsm8k_calls_become_parts_and_nothing_of_the_text_is_lost():
    assert answer_parts("a<<1+1=2>>2") == [
        {"type": "text", "text": "a"},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2"},
    ]
    assert [p["text"] for p in answer_parts("<<7>><<a=b=5>>")] == ["", "7", "", "", "a=b", "5", ""]
    assert answer_parts("x <<>> <<y>") == [{"type": "text", "text": "x <<>> <<y>"}]


def test_the_final_answer_is_the_first_after_the_marker():
    assert [final_answer(t) for t in ("#### 1,234", "#### -5.\n#### 6", "####5", "#### $5", "#### ٣")] == [
        *("1234", "-5.", None, None, None)
    ]


# -------------------------------------------------------------------------------------------------------- --task
@pytest.fixture
def here(tmp_path, monkeypatch):
    """A module of the current directory; a name of its own, as imports stay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    name = f"my_tasks_{time.time_ns()}"
    (tmp_path / f"{name}.py").write_text(
        """
from nanochat_jax.tasks import Task
C = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
class Mine(Task):
    def __init__(self):
        pass
    def num_examples(self):
        return 3
    def get_example(self, index):
        return C
class Plain:
    eval_type = "categorical"
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return C
    def evaluate(self, conversation, answer):
        return answer == "a"
def make():
    return [C]
made = [C, C, C, C]
class NeedsArguments(Plain):
    def __init__(self, size):
        pass
class NoLength:
    def __getitem__(self, index):
        return C
number = 5
"""
    )
    (tmp_path / f"{name}_broken.py").write_text("1 / 0")
    return name


def test_a_task_of_the_current_directory_is_loaded(here):
    assert [len(load_task(f"{here}:{name}")) for name in ("Mine", "Plain", "make", "made")] == [3, 2, 1, 4]
    plain = load_task(f"{here}:Plain")
    assert plain.name == "Plain" and plain.eval_type == "categorical" and len(plain.fingerprint()) == 64
    assert len(list(plain)) == 2 and plain.evaluate(plain[0], "a") and plain.reward(plain[0], "b") == 0.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{here}", "must be module:Class"),
        (":Mine", "must be module:Class"),
        ("no_such_module_here:Mine", "cannot import no_such_module_here"),
        ("{here}_broken:Mine", "ZeroDivisionError"),
        ("{here}:Nothing", "has no Nothing"),
        ("{here}:NeedsArguments", r"NeedsArguments\(\) failed, TypeError"),
        ("{here}:NoLength", "lacks __len__"),
        ("{here}:number", "lacks __len__ and __getitem__"),
    ],
)
def test_a_task_that_cannot_be_loaded_says_why(here, spec, message):
    with pytest.raises(ValueError, match=message):
        load_task(spec.format(here=here))


def test_a_task_without_evaluate_says_so():
    with pytest.raises(NotImplementedError, match="Bare cannot judge answers"):
        type("Bare", (Task,), {})().evaluate({}, "")
