"""Pages about runs, read back as a browser would: as a tree of elements."""

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from nanochat_jax import report
from nanochat_jax.report import PANELS, Panel, ReportConfig, draw, find_runs, main, page, values


def write(folder, records, rollouts=()):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if rollouts:
        (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    return folder


def answer(number, reward, text="4", step=3, example=7):
    record = {"step": step, "example": example, "sample": number, "reward": reward, "advantage": reward - 0.5}
    return record | {"prompt": "2+2?", "text": text}


RL = [{"step": k, "loss": -0.1 * k, "reward": k / 10, "smoothed_reward": k / 20, "seconds": 60.0} for k in range(1, 6)]


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_every_run_of_the_base_directory_is_on_the_page_with_a_chart_for_what_it_measured(
    tmp_path, monkeypatch, capsys
):
    write(tmp_path / "chatrl_checkpoints/d2", RL)
    write(tmp_path / "base_checkpoints/d2", [{"step": 0, "val_bpb": 3.0}, {"step": 1, "loss": 6.0, "val_bpb": 2.5}])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert main(ReportConfig()) == 0
    assert capsys.readouterr().out == f"2 runs -> {tmp_path / 'report.html'}\n"
    found = Elements((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert found.tags.count("svg") == 2 + 2  # loss and bits per byte; loss and reward
    assert [t for t in found.texts if t.startswith(("base_", "chatrl_"))] == [
        *("base_checkpoints/d2", "chatrl_checkpoints/d2"),
        *("base_checkpoints/d2", "chatrl_checkpoints/d2"),
    ]
    assert "1 steps, 0.0 min, val bpb 2.5" in found.texts
    assert "5 steps, 5.0 min, smoothed reward 0.25" in found.texts


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    links = Elements(page([write(tmp_path / "a/b", RL)])).links
    assert links
    assert all(link.startswith("#") for link in links)


def test_what_a_model_wrote_is_text_and_never_markup(tmp_path):
    evil = "<script>alert(1)</script></pre>&amp;"
    found = Elements(page([write(tmp_path / "a/b", RL, [answer(0, 1.0, evil)])]))
    assert "script" not in found.tags
    assert any(evil in text for text in found.texts)


def test_the_best_and_the_worst_answers_to_the_last_problem_are_shown(tmp_path):
    earlier = [answer(i, 1.0, "earlier", step=2) for i in range(4)]
    last = [answer(i, float(i), f"answer {i}") for i in range(10)]
    found = Elements(page([write(tmp_path / "a/b", RL, earlier + last)]))
    shown = [text for text in found.texts if "reward" in text and "advantage" in text]
    assert [text.split("\n")[0] for text in shown] == ["answer 9", "answer 6", "answer 3", "answer 0"]


def test_a_log_that_a_kill_cut_off_is_drawn_as_far_as_it_goes(tmp_path):
    folder = write(tmp_path / "a/b", RL, [answer(0, 1.0), answer(1, 0.0)])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 6, "rew')
    assert "Step 3: 2 of 2 answers" in page([folder])


def test_what_a_resumed_run_took_back_is_not_drawn(tmp_path):
    records = [*RL, {"event": "resume", "step": 2}, {"step": 3, "reward": 0.9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert values(report.read_metrics(tmp_path / "metrics.jsonl"), "reward") == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_values_that_are_not_finite_numbers_are_left_out():
    records = [{"step": 1, "mfu": "nan"}, {"step": 2, "mfu": None}, {"step": 3, "mfu": True}, {"step": 4, "mfu": 0.5}]
    assert values(records, "mfu") == [(4, 0.5)]


def test_a_chart_has_the_measured_points_and_the_interval_of_the_first_curve():
    found = [{"step": 10, "pass@1": 0.5, "pass@1_low": 0.4, "pass@1_high": 0.6, "pass@8": 0.8}]
    found += [{"step": 20, "pass@1": 0.7, "pass@1_low": 0.6, "pass@1_high": 0.8, "pass@8": 0.9}]
    (axes,) = draw(Panel("solved", ("pass@1", "pass@2", "pass@8")), found).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[10, 0.5], [20, 0.7]], [[10, 0.8], [20, 0.9]]]
    assert len(axes.collections) == 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pass@1", "pass@8"]
    assert draw(Panel("other", ("nothing",)), found) is None


@pytest.mark.parametrize(("lowest", "scale"), [(1e-9, "log"), (0.0, "linear")])
def test_an_axis_is_logarithmic_only_where_all_values_are_above_zero(lowest, scale):
    (axes,) = draw(Panel("d", ("d",), log=True), [{"step": 1, "d": 1.0}, {"step": 2, "d": lowest}]).axes
    assert axes.get_yscale() == scale


def test_charts_are_well_formed_and_the_same_numbers_give_the_same_page(tmp_path):
    folder = write(tmp_path / "a/b", RL)
    ET.fromstring(report.svg(draw(PANELS[2], RL)))
    assert page([folder]) == page([folder])


def test_a_run_that_measured_nothing_yet_has_a_page(tmp_path):
    assert "nothing measured yet" in page([write(tmp_path / "a/b", [{"event": "start"}])])


def test_a_folder_without_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert find_runs(tmp_path) == []
    with pytest.raises(ValueError, match=r"has no run with a metrics\.jsonl"):
        main(ReportConfig())
    with pytest.raises(ValueError, match="must be the folder of a run"):
        main(ReportConfig(folders=(tmp_path,)))


@pytest.mark.parametrize(
    "change", [{"step": "<script>alert(1)</script>"}, {"reward": "1"}, {"text": None}, {"example": []}]
)
def test_an_answer_of_another_form_is_left_out(tmp_path, change):
    shown = page([write(tmp_path / "a/b", RL, [answer(0, 1.0), answer(1, 1.0) | change])])
    assert "script" not in Elements(shown).tags and "Step 3: 1 of 1 answers" in shown


def test_a_number_that_cannot_be_drawn_is_left_out():
    assert values([{"step": 1, "loss": 10**400}, {"step": 2, "loss": 2.0}], "loss") == [(2, 2.0)]


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, capsys):
    good, bad = write(tmp_path / "a/good", [*RL, {"step": "x"}], [answer(0, 1.0), {"step": 3}]), tmp_path / "a/bad"
    (bad / "metrics.jsonl").mkdir(parents=True)
    other = write(tmp_path / "a/other", RL)
    (other / "rollouts.jsonl").mkdir()
    assert main(ReportConfig(folders=(good, bad, other), output=tmp_path / "page.html")) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"WARNING: left out: {good / 'metrics.jsonl'}: 1 line is no record of a step",
        f"WARNING: left out: {good / 'rollouts.jsonl'}: 1 line is no answer of a rollout",
        f"WARNING: left out: {bad / 'metrics.jsonl'}: Is a directory",
        f"WARNING: left out: {other / 'rollouts.jsonl'}: Is a directory",
        f"3 runs -> {tmp_path / 'page.html'}",
    ]
    assert "cannot be read: Is a directory" in (tmp_path / "page.html").read_text()
