"""The pages about rollouts: what they hold, of which lines, under which names. What a browser shows of them is in
test_rollouts_browser.py.

Run: python -m pytest tests/reports/test_rollouts.py
"""

import itertools
import json
import random
import re

import pytest

from nanochat_jax.report import ReportConfig, main
from nanochat_jax.reports import rollouts
from nanochat_jax.reports.rollouts import RolloutPage, read_rollouts, rollout_pages, rollouts_page
from tests.reports.folders import RL, Elements, answer, rollout, write
from tests.support.tiny import tokenizer
from tools.check import hostile_inputs

TOKENIZER = tokenizer()


@pytest.fixture(autouse=True)
def _no_other_base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "none"))


def run(tmp_path, lines, with_tokenizer=True):
    folder = write(tmp_path / "base/chatrl_checkpoints/d2", RL, lines)
    if with_tokenizer:
        TOKENIZER.save(tmp_path / "base/tokenizer")
    return folder


def shown(folder, log=str):
    return rollouts_page(RolloutPage(folder, "d2", "x.html"), "report.html", log)


def data(folder):
    (text,) = re.findall(r"<script type=application/json id=data>(.*?)</script>", shown(folder), re.DOTALL)
    return json.loads(text)


def answers(folder):
    return [answer for group in data(folder)["groups"] for answer in group["answers"]]


def test_answers_are_grouped_by_step_and_problem_in_the_order_of_the_steps(tmp_path):
    lines = [rollout(TOKENIZER, n, step=step, example=e) for step, e in ((2, 8), (1, 9), (1, 8)) for n in (0, 1)]
    found = data(run(tmp_path, lines))["groups"]
    assert [(g["step"], g["example"], [a["sample"] for a in g["answers"]]) for g in found] == [
        *((1, 9, [0, 1]), (1, 8, [0, 1]), (2, 8, [0, 1]))
    ]


def test_an_answer_has_its_numbers_and_each_tokens_text_stands_once(tmp_path):
    calls = [{"expression": "2+2", "result": "4"}, {"expression": "2+", "result": None, "timed_out": True}]
    folder = run(tmp_path, [rollout(TOKENIZER, 5, "444", reward=-1.0, tools=calls, forced=(1,), ended=False)])
    assert answers(folder) == [
        {
            "sample": 5,
            "reward": -1.0,
            "advantage": -1.5,
            "ended": False,
            "tokens": [52, 52, 52],
            "mask": "101",
            "tools": [{"call": "2+2", "result": "4", "late": False}, {"call": "2+", "result": None, "late": True}],
            "logprobs": [-0.5, 0.0, -0.5],
            "policy": [-0.25, 0.0, -0.25],
        }
    ]
    assert data(folder)["tokens"] == {"52": "4"}


def test_a_part_of_a_character_is_kept_as_bytes_and_special_tokens_are_known(tmp_path):
    found = data(run(tmp_path, [rollout(TOKENIZER, 0, ["é", "<|python_start|>"])]))
    assert found["tokens"]["195"] == [195] and found["tokens"]["169"] == [169]
    assert found["special"][str(TOKENIZER.special("<|python_start|>"))] == "<|python_start|>"


EVIL = ("</script><script>alert(1)</script>", "<!--<script>", "<img src=x onerror=alert(1)>", "\u2028\u2029", "\x00]]>")


@pytest.mark.parametrize("evil", [*EVIL, "\ud800", "&lt;/script&gt;"])
def test_no_text_ends_the_data_or_becomes_markup_and_all_arrive_as_they_are(tmp_path, evil):
    line = answer(0, 1.0, evil) | {"prompt": evil, "tools": [{"expression": evil, "result": evil, evil: evil}]}
    folder = run(tmp_path, [line | {"tokens": [1], evil: [evil]}])
    text = rollouts_page(RolloutPage(folder, evil, "x.html"), evil)
    text.replace("\ud800", "?").encode()  # nothing else that UTF-8 cannot hold
    found = Elements(text)
    assert found.count("script") == 2 and found.count("img") == 0
    inside = text.partition("id=data>")[2].partition("</script>")[0]
    assert inside.isascii() and "<" not in inside
    group = json.loads(inside)["groups"][0]
    assert group["answers"][0]["text"] == evil and json.loads(inside)["prompts"] == [evil]
    assert group["answers"][0]["tools"] == [{"call": evil, "result": evil, "late": False}]


def test_the_page_needs_nothing_from_elsewhere_and_its_browser_is_told_so(tmp_path):
    text = shown(run(tmp_path, [rollout(TOKENIZER, 0)]))
    assert Elements(text).links == ["report.html"] and not re.search(r"https?:|url\(|@import", text)
    policy = next(a["content"] for tag, a in Elements(text).tags if "Policy" in a.get("http-equiv", ""))
    assert re.fullmatch(r"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-[\w+/]{43}='", policy)


@pytest.mark.parametrize("broken", [b'{"step": 4, "exam', b"[]", b"\xff\xfe", b"[" * 100_000, b'{"step": 1e999}'])
def test_a_line_that_is_no_answer_is_counted_and_said_and_costs_no_other(tmp_path, broken):
    folder, said = run(tmp_path, [rollout(TOKENIZER, 0)]), []
    with (folder / "rollouts.jsonl").open("ab") as file:
        file.write(broken + b"\n" + json.dumps(rollout(TOKENIZER, 1)).encode() + b"\n" + broken)
    text = shown(folder, said.append)
    assert said == [f"{folder / 'rollouts.jsonl'}: 2 lines are no answer of a rollout"]
    assert "2 lines are no answer of a rollout, and left out." in Elements(text).texts
    assert [a["sample"] for a in answers(folder)] == [0, 1]


@pytest.mark.parametrize("nothing", ["NaN", "null", "-Infinity"])
def test_numbers_that_are_none_are_null(tmp_path, nothing):
    folder = run(tmp_path, [rollout(TOKENIZER, 0, "44")])
    text = (folder / "rollouts.jsonl").read_text()
    for name in ("reward", "advantage"):
        text = re.sub(rf'"{name}": [^,]*', f'"{name}": {nothing}', text)
    text = text.replace('"logprobs": [-0.5,', f'"logprobs": [{nothing},')
    (folder / "rollouts.jsonl").write_text(text)
    (found,) = answers(folder)
    assert (found["reward"], found["advantage"], found["logprobs"]) == (None, None, [None, -0.5, -0.5])
    assert main(ReportConfig(folders=(folder,), output=tmp_path / "r.html")) == 0
    assert "reward –, advantage –" in Elements((tmp_path / "r.html").read_text()).texts


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mask": [1, 0]}, {"mask": "10?"}),
        ({"mask": "110", "logprobs": None}, {"mask": "???", "logprobs": [None] * 3}),
        ({"logprobs": ["<b>", [1], -0.5, 9, 9]}, {"logprobs": [None, None, -0.5]}),
        ({"tokens": "abc"}, {"tokens": [], "mask": "", "text": "44<|assistant_end|>"}),
        ({"tokens": [52, 10**20]}, {"tokens": [], "text": "44<|assistant_end|>"}),
        ({"tokens": [52, True]}, {"tokens": []}),
        ({"tools": [1, {"expression": 3}], "sample": "x", "ended": 1}, {"sample": None, "ended": None}),
        ({"turns": [{"a": 1}], "tools": {"a": 1}}, {"tools": []}),
    ],
)
def test_fields_of_another_form_cost_only_themselves(tmp_path, change, expected):
    (found,) = answers(run(tmp_path, [rollout(TOKENIZER, 0, "44") | change]))
    assert expected.items() <= found.items()


@pytest.mark.parametrize("text", ["5", "4 and more"])
def test_tokens_of_another_tokenizer_are_ids_beside_the_text(tmp_path, text):
    folder = run(tmp_path, [rollout(TOKENIZER, 0, text=["4"]) | {"text": text}, rollout(TOKENIZER, 1)])
    assert [a.get("text") for a in answers(folder)] == [text, None]
    assert any(said.startswith("Of 1 answers the tokens are shown as ids") for said in Elements(shown(folder)).texts)


def test_without_a_tokenizer_there_are_ids_and_texts(tmp_path, monkeypatch):
    folder = run(tmp_path, [rollout(TOKENIZER, 0)], with_tokenizer=False)
    assert data(folder)["tokens"] == {} and answers(folder)[0]["text"] == "4<|assistant_end|>"
    TOKENIZER.save(tmp_path / "other/tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    assert "text" not in answers(folder)[0]


def test_of_a_long_file_some_steps_are_shown_evenly_spread_the_last_among_them(tmp_path, monkeypatch):
    lines = [rollout(TOKENIZER, n, step=step) for step in range(1, 10) for n in (0, 1)]
    folder = run(tmp_path, lines)
    monkeypatch.setattr(rollouts, "MOST_BYTES", (folder / "rollouts.jsonl").stat().st_size // 4 + 99)
    found = read_rollouts(folder / "rollouts.jsonl")
    assert [a["step"] for a in found.answers] == [1, 1, 5, 5, 9, 9] and found.every == 4
    assert "The file is long: of 4 steps one is here." in Elements(shown(folder)).texts


def test_hostile_lines_give_a_page_whose_data_can_be_read(tmp_path):
    """As tools/check/hostile_inputs.py makes them: values of any type and size, nesting, damage."""
    folder = run(tmp_path, [rollout(TOKENIZER, 0)])
    lines = hostile_inputs.metrics_lines(random.Random(0))
    with (folder / "rollouts.jsonl").open("ab") as file:
        file.writelines(itertools.islice(lines, 1000))
    assert len(answers(folder)) > 10 and Elements(shown(folder)).count("script") == 2


# ---- files


def test_each_run_with_rollouts_has_a_page_of_its_own_that_the_report_links_to(tmp_path, capsys):
    folders = [run(tmp_path / name, [rollout(TOKENIZER, 0)]) for name in ("one", "two")]
    folders.append(write(tmp_path / "base_checkpoints/d2", RL))
    assert main(ReportConfig(folders=tuple(folders), output=tmp_path / "out/rl.html")) == 0
    files = [f"rl-rollouts-{name}-base-chatrl_checkpoints-d2.html" for name in ("one", "two")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*files, "rl.html"])
    links = Elements((tmp_path / "out/rl.html").read_text()).links
    assert [link for link in links if not link.startswith("#")] == files
    assert capsys.readouterr().out.splitlines()[1:] == [f"rollouts -> {tmp_path / 'out' / file}" for file in files]


def test_names_of_pages_are_plain_short_and_differ_whatever_the_runs_are_called(tmp_path):
    names = ("a b", "a-b", "A-B", "<img onerror=alert(1)>", "x" * 200, "y" + "x" * 199)
    folders = [write(tmp_path / name, RL, [answer(0, 1.0)]) for name in names]
    files = [page.file for page in rollout_pages(folders, "report.html")]
    assert all(re.fullmatch(r"report-rollouts-[A-Za-z0-9._-]{1,102}\.html", file) for file in files)
    assert len({file.lower() for file in files}) == len(names)


def test_a_file_that_is_no_page_of_ours_is_not_replaced_and_nothing_is_written(tmp_path):
    folder = run(tmp_path, [rollout(TOKENIZER, 0)])
    (tmp_path / "r-rollouts-d2.html").write_text("<p>mine")
    with pytest.raises(ValueError, match=r"r-rollouts-d2\.html would be replaced .* --output"):
        main(ReportConfig(folders=(folder,), output=tmp_path / "r.html"))
    assert (tmp_path / "r-rollouts-d2.html").read_text() == "<p>mine" and not (tmp_path / "r.html").exists()
    (tmp_path / "r-rollouts-d2.html").unlink()
    for _ in range(2):  # our own is replaced
        assert main(ReportConfig(folders=(folder,), output=tmp_path / "r.html")) == 0


def test_the_same_answers_give_the_same_page(tmp_path):
    folder = run(tmp_path, [rollout(TOKENIZER, n) for n in range(3)])
    assert shown(folder) == shown(folder)
