"""The front door: `nanochat-jax`, its commands, and what is answered before JAX is loaded."""

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nanochat_jax
from nanochat_jax import __main__ as front
from nanochat_jax.cli.help import help_text
from nanochat_jax.flags.commands import COMMANDS
from nanochat_jax.flags.rl import ADVANTAGES
from nanochat_jax.flags.tokenizer import COMMANDS as inner
from nanochat_jax.rollouts import objective

ROOT = Path(__file__).parents[1]


def run(*words, **env):
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "COLUMNS": "100"} | env
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_command_is_listed_with_a_line_and_has_its_settings_and_its_module():
    shown = front.overview()
    modules = {path.stem for path in Path(nanochat_jax.__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(COMMANDS) - {"tokenizer"}
    for name, command in COMMANDS.items():
        assert re.search(rf"(?m)^  {name} +{re.escape(command.summary)}$", shown)
        if command.settings:
            assert dataclasses.is_dataclass(command.settings_class(name))
            assert importlib.import_module(f"nanochat_jax.{name}").main


def test_the_summaries_are_those_of_readme():
    readme = (ROOT / "README.md").read_text()
    for name, command in COMMANDS.items():
        if command.settings:
            assert re.search(rf"(?m)^  {name}\.py +{re.escape(command.summary)}$", readme), name


@pytest.mark.parametrize("command", [*COMMANDS, "tokenizer show"])
def test_help_is_the_same_by_both_ways_and_loads_nothing_heavy(command):
    code = f"import sys; sys.argv[1:] = {[*command.split(), '--help']}; import nanochat_jax.__main__ as m\n"
    code += "try: m.main()\nexcept SystemExit: pass\n"
    code += "print({'jax', 'numpy', 'pyarrow', 'tiktoken'} & {*sys.modules}, file=sys.stderr)"
    ours = run(sys.executable, "-c", code)
    assert ours.stderr.splitlines()[-1] == "set()", ours.stderr
    usual = f"python -m nanochat_jax.{command}"
    module = run(sys.executable, "-m", *f"nanochat_jax.{command} --help".split())
    assert module.returncode == 0 and module.stdout == ours.stdout.replace(f"nanochat-jax {command}", usual)
    assert usual in module.stdout


def test_every_flag_of_every_command_has_a_group_and_help_and_every_command_examples():
    classes = [command.settings_class(name) for name, command in COMMANDS.items() if command.settings]
    for cls in (*classes, *inner.values()):
        without = [
            field.name
            for field in dataclasses.fields(cls)
            if field.name != "given" and not (field.metadata.get("group") and field.metadata.get("help"))
        ]
        assert without == [] and "\npython -m nanochat_jax." in inspect.getdoc(cls), cls


def test_what_must_be_given_and_what_is_given_by_its_place_is_told():
    imports = help_text(COMMANDS["nanochat_import"].settings_class("nanochat_import"), "import", 100)
    assert imports.startswith("usage: import [flags] SRC\n") and imports.count("(must be given)") == 2
    reports = help_text(COMMANDS["report"].settings_class("report"), "report", 100)
    assert reports.startswith("usage: report [flags] [FOLDERS ...]\n") and "--folders" not in reports


def test_a_command_of_the_tokenizer_that_is_not_there_is_answered_with_those_that_are(capsys):
    with pytest.raises(SystemExit, match=r"error: there is no command 'shwo'; did you mean show\? See .* --help"):
        front.main(["tokenizer", "shwo"])
    with pytest.raises(SystemExit) as ended:
        front.main(["tokenizer"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"\n  {name} " in said for name in inner)


def test_groups_come_in_order_with_choices_defaults_and_examples():
    text = run(sys.executable, "-m", "nanochat_jax", "rl", "--help").stdout
    places = [text.index(f"\n{title}\n") for title in ("examples", "model and run", "data", "answers", "optimization")]
    assert places == sorted(places)
    assert "--source {base,mid,sft,rl}" in text and "--advantage {mean,grpo,rloo}" in text
    assert "--resample, --no-resample" in text and "(default: off)" in text
    assert all(len(line) <= 100 for line in text.splitlines() if "python -m" not in line)
    assert objective.ADVANTAGES == ADVANTAGES


def test_what_is_wrong_is_answered_before_jax_is_loaded():
    found = run(sys.executable, "-m", "nanochat_jax", "stf", "--run", "x")
    assert found.returncode == 1 and found.stderr == (
        "error: there is no command 'stf'; did you mean sft? See nanochat-jax --help\n"
    )
    found = run(sys.executable, "-X", "importtime", "-m", "nanochat_jax", "sft", "--mtrix-lr", "1")
    assert found.returncode == 2 and "--matrix-lr" in found.stderr and "| jax\n" not in found.stderr


def test_the_version_can_be_pasted_into_a_report():
    lines = run(sys.executable, "-m", "nanochat_jax", "--version").stdout.splitlines()
    assert lines[0].startswith("Python 3.") and any(line.startswith("jaxlib ") for line in lines)
    assert re.fullmatch(r"\d+ x cpu \(cpu\)", lines[-1])


def test_the_script_runs_a_command_and_answers_signals_as_a_module_does(tmp_path):
    script = Path(sys.executable).with_name("nanochat-jax")
    found = run(script, "models", NANOCHAT_BASE_DIR=str(tmp_path))
    assert found.returncode == 0 and found.stdout == (
        f"no models in {tmp_path} (NANOCHAT_BASE_DIR names another folder)\n"
    )


def test_without_the_packages_one_sentence_says_what_to_do(tmp_path):
    found = run(sys.executable, "-S", "-E", "-m", "nanochat_jax.sft")
    assert found.returncode == 1 and found.stderr.startswith("the packages of nanochat_jax are not installed in ")
    assert "run tools/setup.sh" in found.stderr and found.stderr.count("\n") == 1


def test_an_old_python_is_told_which_one_is_needed(monkeypatch):
    monkeypatch.setattr(nanochat_jax, "OLDEST_PYTHON", (9, 9))
    monkeypatch.setattr(nanochat_jax.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"nanochat_jax needs Python 9\.9 or newer, .* is 3\."):
        nanochat_jax.begin_command("nanochat_jax.sft")


def test_completion_is_a_script_for_the_shell():
    found = run(sys.executable, "-m", "nanochat_jax", "--tyro-print-completion", "bash")
    assert found.returncode == 0 and "nanochat-jax" in found.stdout and "--custom-json" in found.stdout
    assert os.sep not in found.stderr
