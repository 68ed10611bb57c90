"""The page about runs, read back as a browser would: as a tree of elements.

Run: python -m pytest tests/reports/test_page.py
"""

import itertools
import random
import re
import xml.etree.ElementTree as ET

from nanochat_jax.reports.charts import MARKS
from nanochat_jax.reports.page import page
from nanochat_jax.reports.runs import find_runs
from tests.reports.folders import RL, Elements, answer, checkpoint, write
from tools.check import hostile_inputs


def long_run(steps=400):
    return [{"step": k, "loss": 5 / k, "smoothed_loss": 6 / k, "grad_norm": 1 / k} for k in range(1, steps + 1)]


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    shown = page([write(tmp_path / "a/b", RL)])
    links = Elements(shown).links
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"https?:|url\(|@import|//\w", shown)


def test_what_a_model_wrote_is_text_and_never_markup(tmp_path):
    evil = "<script>alert(1)</script></pre>&amp;"
    found = Elements(page([write(tmp_path / "a/b", RL, [answer(0, 1.0, evil)])]))
    assert found.count("script") == 1  # the page's own
    assert any(evil in text for text in found.texts)


def test_a_browser_is_told_to_run_no_other_script(tmp_path):
    policy = next(a["content"] for tag, a in Elements(page([write(tmp_path / "a", RL)])).tags if "content" in a)
    assert policy.startswith("default-src 'none'; ") and re.search(r"script-src 'sha256-[\w+/]{43}='$", policy)


def test_runs_of_a_stage_share_their_charts_and_have_one_colour_everywhere(tmp_path):
    base = [write(tmp_path / f"base_checkpoints/{tag}", long_run()) for tag in ("d2", "d4")]
    rl = write(tmp_path / "chatrl_checkpoints/d2", RL)
    shown = page([rl, *base])
    found = Elements(shown)
    assert [a["id"] for tag, a in found.tags if tag == "section"] == ["base_checkpoints", "chatrl_checkpoints"]
    (loss,) = re.findall(r"aria-label='loss'.*?</svg>", shown.partition("<section id='chatrl")[0])
    assert re.findall(r"class='(run\d \w+)", loss) == ["run0 faint", "run1 faint", "run0 curve", "run1 curve"]
    assert [a["id"] for tag, a in found.tags if tag == "input"] == ["show0", "show1", "show2"]
    for n, name in enumerate(("d2", "d4", "d2")):
        assert shown.count(f"<span class='run{n} swatch'></span>{name}<") == 2  # in the overview and in the legend


def test_24_runs_are_told_apart_by_colour_and_mark_on_their_curves_and_in_the_legend(tmp_path):
    shown = page([write(tmp_path / f"{n:02}", long_run(40 if n else 3)) for n in range(24)])
    looks = re.findall(r"\.run\d+\{--run:var\((--colour\d)\);--mark:var\((--mark\d)\)\}", shown)
    assert len(looks) == len({*looks}) == 24
    assert all(f"{name}:" in shown for look in looks for name in look)  # in the style sheet
    assert ".swatch" in shown and "clip-path: var(--mark)" in shown
    (loss,) = re.findall(r"aria-label='loss'.*?</svg>", shown)
    marks = dict(re.findall(r"class='run(\d+) marks' d='M\d+ \d+(\D[^M]*)M", loss))
    assert [*map(int, marks)] == [*range(8, 24)]
    assert {marks[f"{n}"] for n in range(8, 16)} == {MARKS[1]} and {marks[f"{n}"] for n in range(16, 24)} == {MARKS[2]}


def test_what_the_run_does_not_smooth_the_page_does(tmp_path):
    shown = page([write(tmp_path / "a", long_run())])
    (norm,) = re.findall(r"aria-label='gradient norm'.*?</figure>", shown)
    assert re.findall(r"class='run0 (\w+)", norm) == ["faint", "curve"] and "mean of 5 steps" in norm
    (loss,) = re.findall(r"aria-label='loss'.*?</figure>", shown)
    assert re.findall(r"class='run0 (\w+)", loss) == ["faint", "curve"] and "mean of" not in loss


def test_several_metrics_of_a_chart_have_their_own_strokes(tmp_path):
    shown = page([write(tmp_path / "a", [{"step": 1, "pass@2": 0.2, "pass@8": 0.4}])])
    assert re.findall(r"class='curve (style\d)' d='M0 4H24'/></svg>([^<]*)<", shown) == [
        *(("style0", "pass@2"), ("style2", "pass@8"))
    ]
    assert "class='run0 curve style2'" in shown


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write(tmp_path / f"{base}/chatrl_checkpoints/d2", RL) for base in ("one", "two")]
    texts = Elements(page(folders)).texts
    assert {"one/chatrl_checkpoints/d2", "two/chatrl_checkpoints/d2"} <= {*texts}


def test_chatcores_tasks_have_a_chart_each(tmp_path):
    shown = page([write(tmp_path / "a", [{"step": 1, "chatcore/GSM8K": 0.5, "chatcore/<b>": 0.5}])])
    captions = re.findall("<figcaption>(.*?)</figcaption>", shown)
    assert captions == ["GSM8K, accuracy", "&lt;b&gt;, accuracy"]


def test_hostile_lines_and_files_give_a_page_that_is_well_formed(tmp_path):
    """As tools/check/hostile_inputs.py makes them: values of any type and size, nesting, damage."""
    rng = random.Random(0)
    lines, texts = hostile_inputs.metrics_lines(rng), hostile_inputs.json_texts(rng)
    for n in range(20):
        folder = tmp_path / f"chatrl_checkpoints/{n}<b>"
        folder.mkdir(parents=True)
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            (folder / name).write_bytes(b"".join(itertools.islice(lines, 40)))
        checkpoint(folder, 3)
        for name in ("a.json", "3/meta/data.json"):
            (folder / name).write_bytes(next(texts))
    whole = page(find_runs(tmp_path)).encode("utf-8", "replace").decode()
    found = Elements(whole)
    assert found.count("script") == 1 and found.count("b") == 0
    for chart in re.findall(r"<svg.*?</svg>", whole):
        ET.fromstring(chart.replace(" data-log", " data-log='1'"))
    assert found.count("figure") > 0


def test_the_same_numbers_give_the_same_page(tmp_path):
    folder = write(tmp_path / "a/b", RL)
    assert page([folder]) == page([folder])


def test_a_run_that_measured_nothing_yet_has_a_page(tmp_path):
    assert "nothing measured yet" in page([write(tmp_path / "a/b", [{"event": "start"}])])
