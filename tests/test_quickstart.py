"""The quickstart goes from nothing to a judged chat model; here with a handful of steps.

Run: python -m pytest tests/test_quickstart.py
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from nanochat_jax import quickstart, rl
from nanochat_jax.checkpoints import find, integrity
from nanochat_jax.cli import settings
from nanochat_jax.cli.command_line import parse
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.evals.evaluator import Evaluator
from nanochat_jax.inference import engine
from nanochat_jax.quickstart import QuickstartConfig, StepBar, Tee, Tour, documents, main, new_folder, sparkline
from nanochat_jax.tasks import Arithmetic, CustomJSON
from nanochat_jax.tasks.registry import make_task
from nanochat_jax.tokenizer import Tokenizer


def shorten(patch, folder):
    """Two steps a stage and eight problems, with the working directory in a temporary folder.

    Prompts of all lengths go into rows of one size, which is one program instead of one for each size."""
    patch.setattr(engine, "PROMPT_STEP", 64)
    patch.setenv("NANOCHAT_BASE_DIR", "")  # main sets it; this puts it back afterwards
    patch.chdir(folder)
    for name, value in {"STORIES": 400, "REPEATS": 2, "HELD_OUT": 60, "PROBLEMS": 8, "ANSWER_TOKENS": 8}.items():
        patch.setattr(quickstart, name, value)
    for name in ("BASE", "SFT"):
        flags = [flag for flag in getattr(quickstart, name) if not flag.startswith("--num-iterations")]
        patch.setattr(quickstart, name, (*flags, "--num-iterations=2", "--mesh=data=1"))
    few = ("--total-batch-size=1024", "--device-batch-size=8")  # which SFT inherits
    patch.setattr(quickstart, "BASE", (*quickstart.BASE, *few))
    few = ("--num-steps=2", "--max-new-tokens=8", "--examples-per-step=2", "--num-samples=2", "--mesh=data=1")
    flags = [flag for flag in quickstart.RL if flag.split("=")[0] not in ("--num-steps", "--max-new-tokens")]
    patch.setattr(quickstart, "RL", (*flags, *few))


@pytest.fixture
def short(monkeypatch, tmp_path):
    shorten(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    """(folder, output) of a whole run without a name, with seed 3."""
    folder, printed = tmp_path_factory.mktemp("tour"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        shorten(patch, folder)
        assert main(QuickstartConfig(seed=3)) == 0
    return folder / "quickstart-1", printed.getvalue()


def test_every_stage_runs_and_the_table_ends_it(toured):
    folder, out = toured
    titles = re.findall(r"^(\d)\. ", out, re.MULTILINE)
    assert titles == ["1", "2", "3", "4", "5"]
    assert re.findall(r"^│ ([a-zA-Z ]+?) +│ \d", out, re.MULTILINE) == ["base model", "after SFT", "after RL"]
    assert "Who are you?" in out and "/quickstart-1" in out
    assert integrity.steps(folder / "base_checkpoints/d2") == [2]
    assert integrity.steps(folder / "chatsft_checkpoints/d2") == [2]
    assert integrity.steps(folder / "chatrl_checkpoints/d2") == [2]
    log = (folder / "log.txt").read_text()
    commands = re.findall(r"^\$ (.*)$", log, re.MULTILINE)
    typed = [shlex.split(command) for command in commands]
    begin = [f"NANOCHAT_BASE_DIR={folder}", sys.executable, "-m"]
    assert [words[:4] for words in typed] == [[*begin, f"nanochat_jax.{stage}"] for stage in ("base", "sft", "rl")]
    assert all(words[-1] == "--seed=3" for words in typed)
    assert all(command in out for command in commands)  # on one line each, to be typed again
    assert "step 00002/00002" in log and "step 00002/00002" not in out
    assert (folder / "report.html").read_text().count("<svg") > 10 and "quickstart-1/report.html" in out


def test_the_same_seed_is_the_same_model_and_another_one_begins_with_other_texts(toured, short, tmp_path, capsys):
    assert main(QuickstartConfig(seed=3, output=Path("again"))) == 0
    first, again = (find.load_params(find.find_model("rl", base=base))[1] for base in (toured[0], tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert documents(3) == documents(3) != documents(4)


def test_a_folder_with_something_in_it_is_refused_before_anything_runs(short, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(FileExistsError, match="--output mine must be a new or empty folder"):
        main(QuickstartConfig(output=Path("mine")))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="--seed must be from 0"):
        main(QuickstartConfig(seed=-1))


def test_without_a_name_the_next_free_number_is_taken(short, tmp_path):
    (tmp_path / "quickstart-1").mkdir()
    (tmp_path / "quickstart-3").mkdir()
    assert [new_folder(None).name for _ in range(3)] == ["quickstart-2", "quickstart-4", "quickstart-5"]


def test_no_text_of_the_base_model_and_no_demonstration_is_among_the_problems():
    texts = set(documents(0))
    demonstrations, tried = Arithmetic("train", quickstart.DEMONSTRATIONS), make_task("arithmetic", "train", 2000)
    shown, met = ({task[i]["messages"][0]["content"] for i in range(len(task))} for task in (demonstrations, tried))
    assert len(shown & met) < 0.1 * len(shown)  # RL meets other problems than the demonstrations
    problems = Arithmetic("test", quickstart.PROBLEMS, seed=0)
    asked = {problems[i]["messages"][0]["content"] for i in range(len(problems))}
    assert not asked & (texts | shown | met) and len(asked) > 0.9 * quickstart.PROBLEMS
    assert not any("####" in text for text in texts)  # the base model sees no solution


def test_what_the_model_is_asked_about_itself_is_among_the_bundled_conversations():
    talks = CustomJSON(quickstart.TALKS)
    assert len(talks) == 66 and all(len(talks[i]["messages"]) == 2 for i in range(len(talks)))
    assert {*quickstart.ABOUT_ITSELF} <= {talks[i]["messages"][0]["content"] for i in range(len(talks))}
    assert not any("spell" in message["content"] for talk in talks for message in talk["messages"])  # it learns no such


def test_an_answer_that_is_shown_is_the_same_whatever_is_shown_with_it_and_compiles_nothing_anew(toured, capsys):
    folder, _ = toured
    config, params, _ = find.load_params(find.find_model("rl", base=folder))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, folder)
        evaluator = Evaluator(config, tokenizer, make_mesh("data=1"), slots=quickstart.PROBLEMS)
        tour = Tour(Console(file=sys.stdout, width=120), folder, 3)
        tour.show_answers(evaluator, params, quickstart.ABOUT_ITSELF)
        both, compiled = capsys.readouterr().out, evaluator.engine.compiles
        tour.show_answers(evaluator, params, quickstart.ABOUT_ITSELF[:1])
        one = capsys.readouterr().out
        tour.show_answers(evaluator, params, [])
    assert both.startswith(one) and "What can you do?" in both[len(one) :] and not capsys.readouterr().out
    assert evaluator.engine.compiles == compiled


def test_the_flags_are_such_as_a_user_can_type():
    for kind, flags in (
        (quickstart.base.BaseConfig, quickstart.BASE),
        (quickstart.sft.SFTConfig, quickstart.SFT),
        (rl.RLConfig, quickstart.RL),
    ):
        cfg = parse(kind, [*flags, "--seed=1"])
        settings.check_bounds(cfg)
    rl.check(cfg)


def test_output_goes_to_the_log_and_whole_lines_to_the_bar(tmp_path):
    lines = []
    with open(tmp_path / "log", "w") as log:
        tee = Tee(log, lines.append)
        print("step 1", end="", file=tee)
        assert lines == []
        print("0/20\nand", file=tee, end="")
    assert lines == ["step 10/20"] and (tmp_path / "log").read_text() == "step 10/20\nand"


def test_a_curve_runs_from_its_lowest_to_its_highest_mean():
    assert sparkline([0.0, 1.0], 30) == "▁█" and sparkline([0.0, 2.0, 4.0, 6.0], 2) == "▁█"
    assert sparkline([0.5, 0.5], 30) == "▁▁" and sparkline([float("nan")], 30) == ""
    assert len(sparkline(list(range(100)), 30)) == 30


def test_of_rl_the_bar_shows_the_smoothed_reward():
    bar = StepBar(Console(file=io.StringIO()))
    bar.line("step 00002/00004 | reward 0.500 (smoothed 0.250) | rewarded 50.0% | signal 100%")
    assert bar.last == "2 steps, reward 0.250"


def test_off_a_terminal_a_few_short_lines_tell_how_it_goes(capsys):
    with StepBar(Console(file=sys.stdout, force_terminal=False)) as bar:
        for step in range(1, 21):
            bar.line(f"step {step:05d}/00020 | loss {1 / step:.4f} | lrm 1.000 | 5 tok/s")
        bar.line("step 00020 | val_bpb 1.0")
    assert capsys.readouterr().out.splitlines() == [f"step {s} of 20: loss {1 / s:.4f}" for s in (4, 8, 12, 16)]
    assert bar.last == "20 steps, loss 0.0500"
