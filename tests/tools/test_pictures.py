"""README's pictures: drawn from what a run left, whole in themselves, and without a path of the machine that ran it.

Run: python -m pytest tests/tools/test_pictures.py
"""

import importlib.util
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from nanochat_jax.evals.intervals import Share
from nanochat_jax.quickstart import StepBar, Tour
from tools.pictures import pictures as tool

ROOT = Path(__file__).parents[2]
PICTURES = ("training", "stages", "quickstart", "preflight")
PREFLIGHT = "NOTE: there is no tokenizer in /a/b: 1 is assumed\nUsing a=1\nAttention: splash\n\n  total  6.187: fits\n"


def said(picture):
    """Every text of an SVG that can be parsed, and everything that it refers to."""
    root = ET.fromstring(picture)
    names = ("href", "{http://www.w3.org/1999/xlink}href", "src")
    links = [element.get(name) for element in root.iter() for name in names if element.get(name)]
    links += re.findall(r"url\(([^)]*)\)", picture) + re.findall(r"@(?:import|font-face)", picture)
    return ["".join(element.itertext()).replace("\xa0", " ") for element in root.iter() if element.text], links


def finished(folder):
    """What a quickstart leaves, of two steps a stage; what it prints is in screen.txt, as on a terminal."""
    for stage, name in (("base", "loss"), ("chatsft", "loss"), ("chatrl", "reward")):
        run = folder / f"{stage}_checkpoints/d2"
        run.mkdir(parents=True)
        records = [{"step": k, name: 0.25 * k, f"smoothed_{name}": 0.25 * k} for k in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = io.StringIO()
    tour = Tour(
        Console(file=file, force_terminal=True, width=100, highlight=False, no_color=False, color_system="standard"),
        folder,
        0,
    )
    tour.say("making .venv")
    shares = {}
    for number, name in enumerate(("base model", "after SFT", "after RL"), start=2):
        shares[name] = [Share(0.5, 0.4, 0.6), Share(number / 5, number / 5 - 0.1, number / 5 + 0.1)]
        tour.heading(f"{number}. {name}", "because")
        tour.say(tour.command("base", ("--depth=2",)), "dim")
        with StepBar(tour.console) as bar:
            bar.line("step 00001/00002 | loss 1.5")
            bar.line(f"step 00002/00002 | reward {number}.25")
        tour.say(f"2 steps, reward {number}.25")
        tour.say(f"right on {number} of 5")
        tour.say("Who are you?")
        tour.say("  an answer of this stage", "green")
    tour.heading("5. What it can do", "now")
    for name in ("first", "second"):
        tour.say(f"{name} question?")
        tour.say(f"  {name} <answer> & so on\n  #### 4", "green")
    tour.show_shares(shares)
    tour.say(f"Talk to it:  {tour.command('chat', ())}")
    (folder / "screen.txt").write_bytes(file.getvalue().encode())
    (folder / "shares.json").write_text(json.dumps(shares))
    (folder / "preflight.txt").write_text(PREFLIGHT)
    return folder


def test_a_finished_quickstart_is_drawn_to_the_same_bytes_each_time(tmp_path, capsys):
    run = finished(tmp_path / "run")
    for output in ("a", "b"):
        assert tool.main(tool.Pictures(run=run, output=tmp_path / output)) == 0
    pictures = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "a").iterdir()}
    assert sorted(pictures) == sorted(PICTURES)
    assert all((tmp_path / f"b/{name}.svg").read_text(encoding="utf-8") == pictures[name] for name in PICTURES)
    for picture in pictures.values():
        texts, links = said(picture)
        assert not [link for link in links if not link.startswith("#")]
        assert not [text for text in texts if str(tmp_path) in text]
    preflight = "\n".join(said(pictures["preflight"])[0])
    assert "--preflight v5e-8" in preflight and "  total  6.187: fits" in preflight
    assert "tokenizer" not in preflight and "Using" not in preflight


def test_curves_and_shares_are_those_of_the_run(tmp_path):
    texts, _ = said(tool.training(finished(tmp_path)))
    assert {"SFT: loss", "RL: mean reward", "base model", "after SFT", "after RL"} <= set(texts)
    assert {"40.0 %", "60.0 %", "80.0 %"} <= set(texts)  # those drawn at temperature 1


def test_of_the_screen_bars_are_kept_as_they_ended_and_commands_and_further_answers_are_cut(tmp_path):
    shown = tool.shortened((finished(tmp_path) / "screen.txt").read_bytes().decode()).plain.split("\n")
    shown = [line.rstrip() for line in shown]
    assert shown[0] == "2. base model: because."
    bars = [line for line in shown if "2/2" in line]
    assert [line.split()[3:] for line in bars] == [["reward", f"{n}.25", "▁█"] for n in (2, 3, 4)]
    assert not [line for line in shown if "1/2" in line or "NANOCHAT" in line or "steps" in line or "stage." in line]
    last = shown.index("5. What it can do: now.")
    assert shown[last + 1 : last + 4] == ["first question?", "  first <answer> & so on", "  #### 4"]
    assert shown[-1].startswith("└") and "│ after RL   │ 50.0 % (40 to 60)  │ 80.0 % (70 to 90)      │" in shown
    assert not {"second question?", "Who are you?", "making .venv"} & set(shown)


def test_what_a_model_wrote_is_text_and_never_markup():
    evil = "<script>alert(1)</script> &amp; ]]>"
    texts, _ = said(tool.terminal("a", ("x", "<y>"), Text(evil)))
    assert evil in texts and "x <y>" in texts


def test_a_run_without_its_screen_is_drawn_as_far_as_it_goes(tmp_path, capsys):
    run = finished(tmp_path / "run")
    (run / "screen.txt").unlink()
    assert tool.main(tool.Pictures(run=run, output=tmp_path / "out")) == 0
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["preflight", "stages", "training"]
    assert "screen.txt is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("chatsft_checkpoints/d2/metrics.jsonl", "it has no loss of sft to draw"),
        ("chatrl_checkpoints/d2/metrics.jsonl", "it has no reward of rl to draw"),
        ("shares.json", "shares.json has no share of: "),
    ],
)
def test_a_folder_that_is_no_finished_quickstart_is_refused_in_a_sentence(tmp_path, lost, sentence):
    run = finished(tmp_path / "run")
    (run / lost).unlink()
    with pytest.raises(ValueError, match=re.escape(f"--run {run} must be a finished quickstart: {sentence}")):
        tool.main(tool.Pictures(run=run, output=tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_a_screen_that_ends_before_the_last_stage_is_refused():
    with pytest.raises(ValueError, match="it has no stage 5"):
        tool.shortened("\x1b[1m2. Base model: why.\x1b[0m\n")


def test_a_command_that_fails_is_named_with_its_exit_code():
    with pytest.raises(ValueError, match="sh -c exit 3 must succeed, it ended with exit code 3"):
        tool.recorded(["sh", "-c", "exit 3"], {})


def test_every_command_of_the_stages_is_a_module():
    names = [name for name, *_ in (*tool.STAGES, *tool.READERS)]
    assert all(importlib.util.find_spec(f"nanochat_jax.{name}") for name in names)
    assert set(names) <= set(said(tool.stages())[0])


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_that_are_there_are_small_and_whole_in_themselves(name):
    picture = (ROOT / f"tools/pictures/{name}.svg").read_text(encoding="utf-8")
    texts, links = said(picture)
    assert len(picture.encode()) < 60_000
    assert not [link for link in links if not link.startswith("#")]
    assert not [text for text in texts if re.search(r"(?<![\w.)~:/-])/[\w.-]+/", text)]  # an absolute path
