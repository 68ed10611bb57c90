"""The pages of docs/, and README as one of them: links lead somewhere, and commands can be typed as they are.

tools/check/readme_walk.py runs the commands. Run: python -m pytest tests/test_docs.py
"""

import ast
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from nanochat_jax import base, bench, chat, eval, nanochat_export, nanochat_import, quickstart, report, rl, serve, sft
from nanochat_jax.cli.command_line import parse
from nanochat_jax.evals.eval_set import replies
from nanochat_jax.flags.tokenizer import Eval, Show, Train
from nanochat_jax.inference.tools import make_toolbox
from nanochat_jax.tasks import CustomJSON
from nanochat_jax.tasks.chat_forms import message_fault
from nanochat_jax.tasks.registry import TASKS
from nanochat_jax.tasks.task import as_played, load_task
from tests.support import tiny
from tests.support.commands import run_command
from tools.check import readme_walk as walk
from tools.tpu_vm import launcher

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
SETTINGS = {
    "base": base.BaseConfig,
    "sft": sft.SFTConfig,
    "rl": rl.RLConfig,
    "eval": eval.EvalConfig,
    "chat": chat.ChatConfig,
    "serve": serve.ServeConfig,
    "bench": bench.BenchConfig,
    "report": report.ReportConfig,
    "nanochat_export": nanochat_export.ExportConfig,
    "nanochat_import": nanochat_import.ImportConfig,
    "tokenizer train": Train,
    "tokenizer show": Show,
    "tokenizer eval": Eval,
}
STAGE = re.compile(r"\.venv/bin/python -m nanochat_jax\.(tokenizer \w+|\w+)(.*)", re.DOTALL)
TOOL = re.compile(r"(?:\.venv/bin/python )?(tools/\S+)(.*)", re.DOTALL)
FILES = [  # all that a page may name
    path.relative_to(ROOT).as_posix()
    for name in ("nanochat_jax", "tools", "tests", "configs", "docs")
    for path in (ROOT / name).rglob("*")
    if path.is_file()
]
every_page = pytest.mark.parametrize("page", PAGES)


# ---- commands


@every_page
def test_every_command_is_one_that_its_program_takes(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in walk.commands(PAGES[page]):
        if command.startswith("cat > "):  # a Python block that is a file
            ast.parse(command.partition("\n")[2].removesuffix("END"))
        elif command.startswith(".venv/bin/python -c "):
            ast.parse(shlex.split(command)[-1])
        elif STAGE.match(command):
            check_stage(command)
        elif found := TOOL.match(command):
            check_tool(found[1], shlex.split(found[2]))
        elif command.startswith(".venv/bin/python -m pytest "):
            assert all((ROOT / word).exists() for word in shlex.split(command)[3:])
        else:
            assert command.startswith(tuple(walk.ELSEWHERE)), command


def check_stage(command):
    """The stage's settings take the flags, as typed and as tools/check/readme_walk.py gives them."""
    stage, flags = STAGE.match(command).groups()
    for typed in (flags, walk.sized(command).partition(f"nanochat_jax.{stage}")[2]):
        parse(SETTINGS[stage], shlex.split(typed))


def check_tool(tool, words):
    """The tool has the flags. A shell script also has the words in its text, or they are files."""
    path = ROOT / tool
    assert path.is_file(), tool
    if tool == "tools/tpu_vm.py":
        check_launcher(words)
    elif tool == "tools/quickstart.sh":
        parse(quickstart.QuickstartConfig, words)
    elif path.suffix == ".sh":
        assert all(word in path.read_text(encoding="utf-8") or (ROOT / word).is_file() for word in words), words
    else:
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= flags_in(path.parent), f"{tool} {' '.join(words)}"


def check_launcher(words):
    """tools/tpu_vm.py VERB [FLAGS] [-- COMMAND]"""
    cut = words.index("--") if "--" in words else len(words)
    verb, *flags = ["--follow" if word == "-f" else word for word in words[:cut]]
    assert verb in launcher.VERBS
    parse(launcher.Settings, flags)
    if command := shlex.join(words[cut + 1 :]):
        check_stage(command)


def flags_in(folder):
    """Every flag that a Python file of the folder declares: a field, an argument of its main, a literal "--name"."""
    names = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names |= {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
            elif isinstance(node, ast.FunctionDef) and node.name == "main":
                names |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                names.add(node.value.removeprefix("--"))
    return {f"--{name.replace('_', '-')}" for name in names}


def test_every_command_of_the_package_is_shown_somewhere():
    shown = {found[1] for page in PAGES.values() for command in walk.commands(page) if (found := STAGE.match(command))}
    assert shown == {*SETTINGS}


def test_the_walk_runs_every_page_that_has_commands():
    with_commands = {page for page, text in PAGES.items() if walk.commands(text)}
    assert with_commands <= {path.relative_to(ROOT).as_posix() for path in walk.PAGES}


# ---- links and names


def anchors(text):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = Path(os.path.normpath((ROOT / page).parent / path)) if path else ROOT / page
        assert found.is_file(), target
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), target


@every_page
def test_every_file_that_is_named_is_there(page):
    named = set(re.findall(r"(?:tools|configs|tests|docs)/[\w./]+\.(?:sh|py|toml|sbatch|yaml|svg|md)", PAGES[page]))
    named |= set(re.findall(r"`([\w/]+\.py)`", PAGES[page]))
    assert [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)] == []


@every_page
def test_every_folder_that_is_named_is_there(page):
    named = set(re.findall(r"`((?:tools|configs|tests|docs)/[\w/]*)/`", PAGES[page]))
    assert [name for name in named if not (ROOT / name).is_dir()] == []


@every_page
def test_no_page_names_a_path_that_its_reader_does_not_have(page):
    assert not re.search(r"\.\./(?!README\.md|tools/)|/(?:home|root|work)/|shared/", PAGES[page])


@every_page
def test_every_picture_has_a_text_in_its_place(page):
    for text, _ in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", PAGES[page]):
        assert len(text.split()) >= 10, text


def test_every_picture_is_shown():
    shown = {Path(target).name for page in PAGES.values() for target in re.findall(r"\]\(([^)\s]+\.svg)\)", page)}
    assert shown == {path.name for path in (ROOT / "tools").rglob("*.svg")}


# ---- what a page must have


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_a_page_begins_with_one_sentence_on_what_it_is_for(page):
    title, paragraph, *_ = PAGES[page].split("\n\n")
    assert re.fullmatch(r"# .+", title)
    assert re.fullmatch(r"This page [^.]+(?:\.\w[^.]*)*\.", paragraph), paragraph


def test_every_page_is_named_in_readme():
    assert {page for page in PAGES if page != "README.md"} <= set(
        re.findall(r"\]\((docs/[\w.-]+)\)", PAGES["README.md"])
    )


def test_every_task_in_the_table_of_tasks_has_a_name_or_a_flag_of_sft():
    rows = PAGES["docs/data.md"].partition("| task | where from |")[2].partition("\n\n")[0].splitlines()[2:]
    names = [name for row in rows for name in row.split("|")[1].strip().split(", ")]
    assert len(names) >= 9
    assert [name for name in names if name not in TASKS and name != "SmolTalk"] == []


def test_every_variable_of_the_package_is_in_the_table_of_variables():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "nanochat_jax").rglob("*.py")]
    read = {name for source in sources for name in re.findall(r"NANOCHAT_[A-Z_]+", source)}
    assert [name for name in read if f"| `{name}" not in PAGES["docs/data.md"]] == []


def test_every_form_of_a_row_that_is_shown_is_taken_and_means_what_it_says(tmp_path):
    table = PAGES["docs/own-data.md"].partition("| form | a row |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = {name.strip(): row.strip(" `") for _, name, row, _ in (line.split("|") for line in table)}
    assert len(rows) == 6
    for name, row in rows.items():
        (tmp_path / "row.jsonl").write_text(row)
        (found,) = CustomJSON(tmp_path / "row.jsonl")
        asked = "Translate.\n\nBonjour!" if name == "Alpaca" else "Hi!"
        assert [message["content"] for message in found["messages"]] == [asked, "Hello!"], name


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """A folder with the files of the page's tasks and tool, as the current directory."""
    files = [command for command in walk.commands(PAGES["docs/own-data.md"]) if command.startswith("cat > ")]
    names = [file.split()[2] for file in files]
    assert names == ["my_module.py", "my_game.py", "my_tools.py"]
    for name, file in zip(names, files):
        (tmp_path / name).write_text(file.partition("\n")[2].removesuffix("END"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in names:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_task_of_your_own_can_be_trained_on_and_judged(own_task):
    task, held_out = load_task("my_module:MyTask"), load_task("my_module:HeldOut")
    talks = [[message["content"] for message in conversation["messages"]] for conversation in (*task, *held_out)]
    assert len(talks) == 1500 == len({question for question, _ in talks})
    assert not any(message_fault(conversation["messages"]) for conversation in (*task, *held_out))
    conversation = task[3]
    answer = conversation["messages"][-1]["content"]
    assert task.evaluate(conversation, answer) and not task.evaluate(conversation, "none")
    assert [task.reward(conversation, said) for said in (answer, "999", "none")] == [1.0, 0.1, 0.0]


def test_the_environment_of_your_own_can_be_played_and_judged(own_task):
    task = load_task("my_game:MyGame")
    reply = replies(task, task.__getitem__)
    assert task[2]["number"] == 15 and reply(2, ["10"]) == "larger" and reply(2, ["10", "larger", "15"]) is None
    for turns, worth in ((["10", "larger", "15"], 0.95), (["15"], 1.0), (["none"], -0.05)):
        conversation = as_played(task, task[2], turns)
        assert task.reward(conversation, turns[-1]) == pytest.approx(worth)
        assert task.evaluate(conversation, turns[-1]) == (worth > 0)


def test_the_tool_of_your_own_answers(own_task):
    (tool,) = make_toolbox(["my_tools:Capital"]).tools
    assert (tool.name, tool.seconds, tool.call(" Peru"), tool.call("x")) == ("capital", 2.0, "Lima", None)


@pytest.mark.usefixtures("in_base")
def test_the_task_of_your_own_is_fine_tuned_on_improved_and_measured(own_task, base):
    short = ["--device-batch-size", "2", "--mesh", "data=1", "--eval-every", "-1", "--output-tag", "own"]
    sft_argv = [*tiny.FLAGS, *short, "--task", "my_module:MyTask", "--num-iterations", "1"]
    assert run_command(sft.main, sft.SFTConfig, *sft_argv) == 0
    size = ["--examples-per-step", "2", "--num-samples", "2", "--max-new-tokens", "4", "--num-steps", "1"]
    rl_argv = ["--source", "sft", "--model-tag", "own", *short, *size, "--task", "my_module:MyTask"]
    assert run_command(rl.main, rl.RLConfig, *rl_argv) == 0
    eval_argv = ["--source", "rl", "-a", "my_module:HeldOut", "--max-problems", "2", "--max-new-tokens", "4"]
    assert run_command(eval.main, eval.EvalConfig, *eval_argv) == 0
