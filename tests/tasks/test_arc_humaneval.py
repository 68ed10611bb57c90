"""ARC's rows and HumanEval's verdicts, on small files written here."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.tasks import ARC, HumanEval, humaneval, sandbox
from nanochat_jax.tasks.humaneval import extract_imports, extract_program


@pytest.fixture(autouse=True)
def no_mirror_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_split(root, repo, subset, split, rows):
    folder = root / repo.replace("/", "--") / subset / split
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "manifest.json").write_text(json.dumps(["00000.parquet"]))
    return root


# ----------------------------------------------------------------------------------------------------------- ARC
def arc_row(labels="ABCD", answer="C", **changes):
    choices = {"text": [f"choice {label}" for label in labels], "label": list(labels)}
    return {"id": "x", "question": "Which?", "choices": choices, "answerKey": answer} | changes


def test_letters_are_those_of_the_row(tmp_path):
    rows = [arc_row(), arc_row("1234", "2"), arc_row("ABCDE", "E"), arc_row("123", "1")]
    write_split(tmp_path, "allenai/ai2_arc", "ARC-Challenge", "validation", rows)
    task = ARC("ARC-Challenge", "validation", data_dir=tmp_path)
    assert len(task) == 4 and task.name == "ARC-Challenge" and task.eval_type == "categorical"
    assert {"".join(c["letters"]) + c["messages"][1]["content"] for c in task} == {"ABCDC", "12342", "ABCDEE", "1231"}
    two = next(c for c in task if c["letters"] == ["1", "2", "3"])
    assert two["messages"][0]["content"] == (
        "Multiple Choice question: Which?\n- choice 1=1\n- choice 2=2\n- choice 3=3\n\n"
        "Respond only with the letter of the correct answer."
    )
    assert task.evaluate(two, "1") is True and task.evaluate(two, "2") is False and task.reward(two, "1") == 1.0
    with pytest.raises(ValueError, match="must be one of 1, 2, 3"):
        task.evaluate(two, "A")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (arc_row(answer="E"), "must be one of A, B, C, D, got 'E'"),
        (arc_row(answer=None), "must be one of"),
        (arc_row("ABCA"), "letter of its own"),
        (arc_row(choices={"text": ["a", "b"], "label": ["A"]}), "letter of its own"),
        (arc_row(choices={"text": ["a", "b"], "label": None}), "lists of text and label"),
        (arc_row(choices=None), "lists of text and label"),
        (arc_row(question=None), "must be text"),
    ],
)
def test_a_row_that_is_no_question_is_refused_by_its_number(row, message, tmp_path):
    task = ARC.__new__(ARC)
    with pytest.raises(ValueError, match=message):
        task.conversation(row)
    write_split(tmp_path, "allenai/ai2_arc", "ARC-Easy", "test", [arc_row(question="2?"), arc_row(answer="Z")])
    task = ARC("ARC-Easy", "test", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"row 1 of allenai/ai2_arc \(ARC-Easy/test\): the answer"):
        list(task)


def test_an_unknown_subset_split_or_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="subsets ARC-Easy, ARC-Challenge, got 'easy'"):
        ARC("easy")
    with pytest.raises(ValueError, match="ARC-Easy has the splits train, validation, test, got 'dev'"):
        ARC("ARC-Easy", "dev")
    with pytest.raises(FileNotFoundError, match="allenai--ai2_arc"):
        ARC("ARC-Easy", data_dir=tmp_path)


# ----------------------------------------------------------------------------------------------------- HumanEval
ROW = {
    "task_id": "t/0",
    "prompt": "from math import sqrt\n\n\ndef root(x):\n    '''The root.'''\n",
    "canonical_solution": "    return sqrt(x)\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n    assert candidate(9) == 3\n",
    "entry_point": "root",
}


def run(program, *, timeout=5.0, memory_bytes=0, unsafe=False):
    """What the sandbox does, without walls: this file's programs are harmless."""
    calls.append(unsafe)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=20)
    return SimpleNamespace(ok=done.returncode == 0, stdout=done.stdout, stderr=done.stderr, reason="")


calls = []


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setattr(humaneval, "sandbox", SimpleNamespace(run=run))
    calls.clear()
    write_split(tmp_path, "openai/openai_humaneval", "openai_humaneval", "test", [ROW])
    return HumanEval(data_dir=tmp_path)


def test_the_reference_is_the_prompt_with_its_solution_and_passes(task):
    conversation = task[0]
    assert [m["content"] for m in conversation["messages"]] == [
        ROW["prompt"],
        ROW["prompt"] + "\n" + ROW["canonical_solution"],
    ]
    assert conversation["entry_point"] == "root" and conversation["test"] == ROW["test"]
    reference = conversation["messages"][1]["content"]
    assert task.evaluate(conversation, reference) == 1
    assert task.reward(conversation, f"Like this:\n```python\n{reference}\n```\nDone.") == 1.0
    assert len(task) == 1 and task.name == "HumanEval" and task.eval_type == "generative"


RIGHT = "def root(x):\n    return sqrt(x)\n"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (RIGHT, 1),  # the import is the prompt's
        (RIGHT + "print('noise', end='')\n", 1),
        (RIGHT + "import sys, io\nsys.stdout = io.StringIO()\n", 1),
        (RIGHT + "import sys\nsys.stdout.close()\n", 1),
        ("def root(x):\n    return x\n", 0),
        ("def other(x):\n    return sqrt(x)\n", 0),
        ("", 0),
        ("def root(x:", 0),
        ("exit(0)", 0),
        ("raise SystemExit", 0),
        ("import os\nos._exit(0)", 0),
        ("def root(x):\n    import os\n    os._exit(0)", 0),
        ("def root(x):\n    raise SystemExit(0)", 0),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 0),
        ("print('0' * 32)\nexit()", 0),
        (RIGHT + "import atexit, os\natexit.register(os._exit, 1)", 0),
        ("def check(candidate):\n    pass\nroot = None", 0),  # the tests' own check is the one that counts
        ("root = None\n@(lambda check: lambda candidate: None)", 0),  # nor does a decorator reach it
        ("root = None\nif False:", 0),
        ("root = None\nx = '''", 0),
        ("root = None\nx = (", 0),
        (RIGHT + "\x00", 0),
        (RIGHT + "x = '\ud800'", 0),
    ],
)
def test_only_a_program_that_reaches_the_end_of_the_tests_passes(task, answer, verdict):
    assert task.evaluate(task[0], answer) == verdict and isinstance(task.evaluate(task[0], answer), int)


def test_programs_run_without_walls_only_where_that_was_asked_for(task, tmp_path):
    task.evaluate(task[0], RIGHT)
    HumanEval(data_dir=tmp_path, unsafe=True).evaluate(task[0], RIGHT)
    assert calls == [False, True]


def test_an_answer_that_is_no_text_and_a_split_that_is_none_are_refused(task, tmp_path):
    with pytest.raises(ValueError, match="must be text"):
        task.evaluate(task[0], None)
    with pytest.raises(ValueError, match="splits test, got 'train'"):
        HumanEval("train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="prompt must be text, got None"):
        task.conversation(ROW | {"prompt": None})


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("a\n```python\nb\n```\n```\nc\n```", "b"),
        ("```\n\n\n  b\n```", "b"),
        ("```\n```python\nb\n```", "```python\nb"),
        ("```\n\n```", ""),
        ("```\n```", "```\n```"),
        ("```\n\n```\nb\n```", "```\nb"),
        ("``` python\nb\n```", "``` python\nb\n```"),
        ("```pythonx\nb\n```", "```pythonx\nb\n```"),
        ("```Python\nb\n```", "```Python\nb\n```"),
        ("x ````\nb\n````", "b"),
    ],
)
def test_the_first_fenced_block_is_the_program(text, program):
    assert extract_program(text) == program


@pytest.mark.parametrize(
    "text", ["```" + "\n" * 300_000, "a```\n" * 60_000, "``` " * 80_000, "`" * 300_000, "```\n \n" * 60_000]
)
def test_finding_a_program_takes_no_time_in_hostile_text(text):
    started = time.process_time()  # of this process alone, whatever else the machine does
    extract_program(text)
    assert time.process_time() - started < 5  # milliseconds; hours where the search goes back and forth


def test_imports_are_those_before_anything_else():
    assert extract_imports("import a\n# c\n\n from b import c\ndef f(): 0\nimport d") == "import a\nfrom b import c"
    assert extract_imports("importance = 1\nimport a") == extract_imports("") == ""


def test_the_sandbox_gives_the_same_verdicts(tmp_path):
    if fault := sandbox.guard_fault():
        pytest.skip(fault)
    write_split(tmp_path, "openai/openai_humaneval", "openai_humaneval", "test", [ROW])
    task = HumanEval(data_dir=tmp_path)
    answers = [RIGHT, "def root(x):\n    return x", "exit(0)", "while True:\n    pass"]
    assert [task.evaluate(task[0], answer) for answer in answers] == [1, 0, 0, 0]
