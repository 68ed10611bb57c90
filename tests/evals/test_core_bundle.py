"""CORE's files: fetched from a server on loopback, found where they are, and refused in a sentence where they are not
as they must be.

Run: python -m pytest tests/evals/test_core_bundle.py
"""

import io
import json
import random
import zipfile

import huggingface_hub
import pytest

from nanochat_jax.evals import core_bundle
from nanochat_jax.evals.core_bundle import find_bundle, read_tasks
from nanochat_jax.files.download import DownloadError
from tests.support.core_files import TASKS, write_bundle
from tests.support.loopback import Answer, isolate, servers


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "eval_bundle")


# ---------------------------------------------------------------------------------------------------------- the tasks
def test_tasks_come_in_the_order_of_the_list_with_their_lines_shuffled_and_then_cut(bundle):
    tasks = read_tasks(bundle, 4)
    assert [task.label for task in tasks] == [entry["label"] for entry, _, _ in TASKS]
    assert next((task.kind, task.fewshot, task.delimiter) for task in tasks) == ("multiple_choice", 2, "\nAnswer: ")
    assert tasks[1].delimiter == " " and tasks[0].baseline == 0.25
    rows = [*TASKS[0][2]]
    random.Random(1337).shuffle(rows)
    assert tasks[0].rows == rows[:4] and len(read_tasks(bundle)[0].rows) == len(rows)


def test_empty_lines_are_no_examples(bundle):
    path = bundle / "eval_data" / "some" / "choices.jsonl"
    path.write_text(path.read_text().replace("\n", "\n\n  \n"))
    assert len(read_tasks(bundle)[0].rows) == len(TASKS[0][2])


def settings(bundle, old, new):
    path = bundle / "core.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def line(bundle, text):
    path = bundle / "eval_data" / "some" / "choices.jsonl"
    path.write_text("\n".join([*path.read_text().splitlines()[:2], text]))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda b: (b / "core.yaml").unlink(), r"core\.yaml does not exist: delete "),
        (lambda b: (b / "core.yaml").write_text("a: [1"), r"core\.yaml must be YAML"),
        (lambda b: (b / "core.yaml").write_bytes(b"\xff\xfe\x00"), r"core\.yaml must be YAML"),
        (lambda b: (b / "core.yaml").write_text("[" * 5000), r"core\.yaml must be YAML"),
        (lambda b: (b / "core.yaml").write_text("!!python/object/apply:os.getcwd []"), r"core\.yaml must be YAML"),
        (lambda b: (b / "core.yaml").write_text("3"), r"must have a list of tasks"),
        (lambda b: (b / "core.yaml").write_text("icl_tasks: []"), r"must have a list of tasks"),
        (lambda b: (b / "core.yaml").write_text("icl_tasks: [x]"), r"task 1: a task must be a mapping, got 'x'"),
        (lambda b: settings(b, "schema", "essay"), r"task 2: icl_task_type must be one of multiple_choice, schema, "),
        (lambda b: settings(b, "schema", "[schema]"), r"task 2: icl_task_type must be one of"),
        (lambda b: settings(b, "- 2", "- -2"), r"task 1: num_fewshot must be a list that begins with a number"),
        (lambda b: settings(b, "- 2", "- true"), r"task 1: num_fewshot must be a list that begins with a number"),
        (lambda b: settings(b, "- 2", "- 99"), r"shows 99 other examples before each, so it needs at least 100, got 7"),
        (lambda b: settings(b, "some/choices", "../choices"), r"dataset_uri must be a path inside eval_data"),
        (lambda b: settings(b, "some/choices", "/some/choices"), r"dataset_uri must be a path inside eval_data"),
        (lambda b: settings(b, "some/choices", "some/absent"), r"absent\.jsonl"),
        (lambda b: settings(b, "label: which", "label: 7"), r"task 1: label must be a text"),
        (lambda b: settings(b, "label: which", "label: who"), r"'who' comes twice|random baseline of 'which'"),
        (lambda b: settings(b, "label: which", "label: unheard"), r"must have the random baseline of 'unheard'"),
        (lambda b: (b / "eval_meta_data.csv").unlink(), r"eval_meta_data\.csv"),
        (lambda b: (b / "eval_meta_data.csv").write_text("a,b\n1,2\n"), r"no column 'Random baseline'"),
        (lambda b: (b / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nwhich,100\n"), r"is 100\.0"),
        (lambda b: (b / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nwhich,nan\n"), r"is nan"),
        (lambda b: (b / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nwhich\n"), r"eval_meta_data\.csv"),
        (lambda b: (b / "eval_data" / "some" / "choices.jsonl").write_text("\n"), r"it is empty"),
        (lambda b: line(b, '{"query": "q'), r"choices\.jsonl, line 3: Unterminated string"),
        (lambda b: line(b, "[" * 100_000), r"choices\.jsonl, line 3: "),
        (lambda b: line(b, "7"), r"choices\.jsonl, line 3: an example must be an object, got 7"),
        (lambda b: line(b, '{"choices": ["a"], "gold": 0}'), r"line 3: query must be a text, got None"),
        (lambda b: line(b, '{"query": "q", "choices": "ab", "gold": 0}'), r"line 3: choices must be a list of texts"),
        (lambda b: line(b, '{"query": "q", "choices": [], "gold": 0}'), r"line 3: choices must be a list of texts"),
        (lambda b: line(b, '{"query": "q", "choices": ["a"], "gold": 1}'), r"line 3: gold must number one of the 1 "),
        (lambda b: line(b, '{"query": "q", "choices": ["a"], "gold": -1}'), r"line 3: gold must number one of the 1 "),
        (lambda b: line(b, '{"query": "q", "choices": ["a"], "gold": "a"}'), r"line 3: gold must number one"),
    ],
)
def test_what_is_not_as_it_must_be_is_one_sentence(bundle, spoil, said):
    spoil(bundle)
    with pytest.raises((ValueError, OSError), match=said) as e:
        read_tasks(bundle)
    assert "\n" not in str(e.value)


def test_too_few_examples_for_those_that_are_shown_before_each_name_the_flag(bundle):
    with pytest.raises(ValueError, match=r"needs at least 3, got 2: .*--max-problems, --core-max-per-task"):
        read_tasks(bundle, 2)


# ------------------------------------------------------------------------------------------------------- the download
@pytest.fixture
def server(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)
    with servers(1) as (made,):
        monkeypatch.setenv(core_bundle.ADDRESS, f"{made.url}/bundle.zip?signature=secret")
        yield made
    huggingface_hub.close_session()


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    return tmp_path / "home"


def zipped(folder):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder.parent))
    return file.getvalue()


def test_a_missing_bundle_is_fetched_once_and_unpacked_into_the_base_directory(bundle, server, home):
    server.answers["/bundle.zip"] = Answer(zipped(bundle))
    said = []
    assert find_bundle(log=said.append) == home / "eval_bundle" == find_bundle(log=said.append)
    assert server.paths() == ["/bundle.zip"] and len(said) == 1
    assert read_tasks(home / "eval_bundle") == read_tasks(bundle)
    assert {path.name for path in home.iterdir()} == {"eval_bundle", ".eval_bundle.lock", "..eval_bundle.zip.lock"}


def test_a_bundle_that_is_there_is_taken_and_nothing_is_asked(bundle, server, home, tmp_path):
    assert find_bundle(tmp_path, str) == bundle
    write_bundle(home / "eval_bundle")
    assert find_bundle(None, str) == home / "eval_bundle"
    assert server.paths() == []


@pytest.mark.parametrize("body", [b"no archive at all", b"PK\3\4 cut"])
def test_a_damaged_bundle_is_said_and_the_next_start_fetches_it_anew(bundle, server, home, body):
    server.answers["/bundle.zip"] = [Answer(body), Answer(zipped(bundle))]
    with pytest.raises(DownloadError, match=r"/bundle\.zip is damaged at its source: .* cannot be unpacked") as e:
        find_bundle(log=str)
    assert "secret" not in str(e.value)
    assert find_bundle(log=str).is_dir()


def test_a_bundle_that_cannot_be_had_is_a_sentence(server, home):
    with pytest.raises(DownloadError, match=r"bundle\.zip does not exist \(404"):
        find_bundle(log=str)
    assert not (home / "eval_bundle").exists()


def test_a_line_of_a_task_may_hold_what_others_need(bundle):
    """A bundle's lines have more keys than are read."""
    line(bundle, json.dumps(TASKS[0][2][0] | {"category": "x", "aliases": ["y"]}))
    assert len(read_tasks(bundle)[0].rows) == 3
