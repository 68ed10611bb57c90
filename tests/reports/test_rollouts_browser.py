"""The pages about rollouts in a real browser, where Chromium is installed: Debian's package chromium, or Google's.

Run: python -m pytest tests/reports/test_rollouts_browser.py
"""

import html

import pytest

from nanochat_jax.reports.rollouts import RolloutPage, rollouts_page
from tests.reports.folders import RL, rollout, write
from tests.support import browser
from tests.support.tiny import tokenizer

pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason="Chromium is not installed")
TOKENIZER = tokenizer()
EVIL = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>\u202e\u2028"
CALL = ["<|python_start|>", "2+2", "<|python_end|>", "<|output_start|>", "4", "<|output_end|>"]
FAILED = [{"expression": "2+", "result": None}]


@pytest.fixture(scope="module")
def tab():
    with browser.opened() as opened:
        yield opened


@pytest.fixture
def opened(tab, tmp_path, monkeypatch):
    """Opens the page about a run with these lines, in a window of some width -> the page's file."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    TOKENIZER.save(tmp_path / "tokenizer")

    def open_page(lines, width=1200, place=""):
        folder = write(tmp_path / "chatrl_checkpoints/d2", RL, lines)
        file = tmp_path / "page.html"
        file.write_text(rollouts_page(RolloutPage(folder, "d2", file.name), "report.html"), encoding="utf-8")
        tab.width(width)
        tab.open("about:blank")
        tab.open(file.as_uri() + place)
        return file

    return open_page


def all_of(tab, selector, what="e.textContent"):
    return tab.run(f"[...document.querySelectorAll(`{selector}`)].map(e => {what})")


def choose(tab, name, value):
    tab.run(
        f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('change')); }})(document.getElementById('{name}'))"
    )


def press(tab, key):
    for kind in ("keyDown", "keyUp"):
        tab.call("Input.dispatchKeyEvent", type=kind, key=key)


def numbers(tab):
    """What is shown of a token: name -> value."""
    return dict(all_of(tab, "#numbers > span", "[e.firstChild.textContent.trim(), e.lastChild.textContent]"))


def titles(tab):
    return all_of(tab, "article h2")


@pytest.mark.parametrize("width", [390, 1200])
def test_what_a_model_wrote_is_text_nothing_is_fetched_and_nothing_is_wider_than_the_screen(tab, opened, width):
    lines = [rollout(TOKENIZER, n, [EVIL, *CALL, "x" * 500], prompt=EVIL * 5) for n in range(4)]
    lines += [rollout(TOKENIZER, 4, EVIL * 5, tools=[{"expression": EVIL, "result": EVIL}], prompt=EVIL * 5)]
    lines[-1]["tokens"] = [1]
    file = opened(lines, width)
    assert len(titles(tab)) == 5 and tab.run("typeof hacked") == "undefined" and all_of(tab, "img") == []
    assert all_of(tab, "article:first-child .token")[:9] == [*"</script>"]
    assert "··\\u{202e}··\\u{2028}" in "".join(all_of(tab, "article:first-child .token"))
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert max(all_of(tab, "main, article, pre, .tokens", "e.scrollWidth - e.clientWidth")) <= 1
    assert tab.requests() == [file.as_uri()] and tab.complaints() == []


def test_a_step_and_a_problem_are_chosen_and_the_address_leads_back_to_them(tab, opened):
    lines = [rollout(TOKENIZER, n, f"{s}{e}", step=s, example=e) for s in (1, 2, 3) for e in (7, 8) for n in (0, 1)]
    opened(lines, place="#step=2&problem=8")
    assert {*all_of(tab, ".tokens")} == {"28<|assistant_end|>"}
    choose(tab, "step", 3)
    assert {*all_of(tab, ".tokens")} == {"37<|assistant_end|>"} and tab.run("location.hash") == "#step=3&problem=7"
    tab.run("document.getElementById('before').click()")
    assert {*all_of(tab, ".tokens")} == {"28<|assistant_end|>"}
    choose(tab, "problem", 2)
    assert {*all_of(tab, ".tokens")} == {"27<|assistant_end|>"}
    opened_at = tab.run("location.href")
    tab.open("about:blank")
    tab.open(opened_at)
    assert {*all_of(tab, ".tokens")} == {"27<|assistant_end|>"} and len(titles(tab)) == 2


def test_a_tokens_numbers_are_shown_under_the_pointer_and_by_keys(tab, opened):
    opened([rollout(TOKENIZER, 0, ["a\n", *CALL], forced=(7, 8, 9), reward=1.0)])
    x, y = tab.run("(r => [r.x + 1, r.y + r.height / 2])(document.querySelector('.token').getBoundingClientRect())")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.wait("document.querySelector('#numbers b') != null")
    assert numbers(tab) == {
        "token": "1 of 11",
        "id": "97",
        "text": "a",
        "mask": "1, sampled",
        "advantage": "0.5",
        "log-probability": "−0.5 (60.65 %)",
        "the model's own": "−0.25 (77.88 %)",
    }
    tab.run("document.querySelector('.token').focus()")
    for _ in range(7):
        press(tab, "ArrowRight")
    found = numbers(tab)
    assert found["text"] == "<|output_start|>" and found["mask"] == "0, forced"
    assert found["log-probability"] == "–" and found["advantage"] == "0.5, not trained on"
    press(tab, "Home")
    press(tab, "ArrowRight")
    assert numbers(tab)["text"] == "⏎\n"
    assert all_of(tab, '.token[tabindex="0"]', "e.number") == [1]  # Tab comes back here


def test_tool_calls_and_forced_tokens_are_marked(tab, opened):
    tools = [{"expression": "2+2", "result": "4"}, *FAILED, FAILED[0] | {"timed_out": True}]
    opened([rollout(TOKENIZER, 0, ["a", *CALL, "b"], forced=(6, 7, 8), tools=tools)])
    assert all_of(tab, ".token.call") == ["<|python_start|>", "2", "+", "2", "<|python_end|>"]
    assert all_of(tab, ".token.forced") == ["<|output_start|>", "4", "<|output_end|>"]
    assert all_of(tab, "article p")[1:] == ["2+2 = 4", "2+ has no result", "2+ took too long"]


def test_tokens_are_coloured_by_log_probability_advantage_or_mask(tab, opened):
    opened([rollout(TOKENIZER, n, "ab", reward=n, forced=(1,), logprobs=[-0.1, 0.0, None]) for n in (0, 1)])

    def painted():
        return all_of(tab, "article .token", "[e.classList.contains('low') ? -1 : +e.classList.contains('high'), "
                      "+(+e.style.getPropertyValue('--weight')).toFixed(2)]")  # fmt: skip

    assert painted() == [[-1, 0.1], [0, 0], [0, 0]] * 2
    choose(tab, "colour", "advantage")
    assert painted() == [*([-1, 1], [0, 0], [-1, 1]), *([1, 1], [0, 0], [1, 1])]
    choose(tab, "colour", "mask")
    assert [sign for sign, _ in painted()] == [1, 0, 1] * 2


def test_filters_leave_the_answers_and_the_problems_that_have_such(tab, opened):
    lines = [
        rollout(TOKENIZER, 0, step=1),
        rollout(TOKENIZER, 1, step=1, reward=0.0, ended=False),
        rollout(TOKENIZER, 2, step=1, reward=0.0, tools=FAILED),
        rollout(TOKENIZER, 3, step=2),
        rollout(TOKENIZER, 4, step=2, reward=0.0),
    ]
    opened(lines)
    shown = lambda: [int(title.split()[1].rstrip(":")) for title in titles(tab)]  # noqa: E731
    assert shown() == [3, 4]
    tab.run("document.getElementById('wrong').click()")
    assert shown() == [4] and all_of(tab, "#step option") == ["1", "2"]
    tab.run("document.getElementById('cut').click()")
    assert shown() == [1] and all_of(tab, "#step option") == ["1"]
    tab.run("document.getElementById('failed').click()")
    assert shown() == [] and tab.run("document.getElementById('found').textContent") == "No answer is like that."
    tab.run("document.getElementById('cut').click()")
    assert shown() == [2] and tab.complaints() == []


def test_an_answer_is_compared_with_the_one_most_alike_of_an_earlier_step(tab, opened):
    lines = [rollout(TOKENIZER, n, text, step=1) for n, text in enumerate(("zzzz", "abcde"))]
    lines += [rollout(TOKENIZER, 0, "other problem", step=2, example=9)]
    lines += [rollout(TOKENIZER, 0, "abXdef", step=3)]
    opened(lines)
    assert all_of(tab, "#earlier option") == ["nothing", "step 1"] and all_of(tab, ".new") == ["new"]  # of the legend
    choose(tab, "earlier", 1)
    assert all_of(tab, ".token.new") == ["X", "f"] and all_of(tab, ".tokens del") == ["c"]
    assert all_of(tab, ".tokens") == ["abcXdef<|assistant_end|>"]
    assert "compared with the most alike of step 1: answer 1" in all_of(tab, "article p")


def test_a_character_of_several_tokens_stands_in_the_last_and_broken_bytes_are_numbers(tab, opened):
    opened([rollout(TOKENIZER, 0, ["é€", 0xFF, 0xE2, 0x82, "a", 0xC3], ended=False)])
    assert all_of(tab, ".token") == ["·", "é", "·", "·", "€", "\\xff", "\\xe2", "\\x82", "a", "\\xc3"]
    tab.run("document.querySelector('.token').focus()")
    assert numbers(tab)["text"] == "\\xc3"


def test_of_an_endless_answer_a_part_is_shown_until_the_rest_is_wanted(tab, opened):
    opened([rollout(TOKENIZER, 0, "x" * 20_000)])
    assert len(all_of(tab, ".token", "1")) == 4000
    tab.run("document.querySelector('article button').click()")
    assert len(all_of(tab, ".token", "1")) == 20_001


def test_a_file_without_answers_says_so(tab, opened):
    opened([{"step": 1}])
    assert tab.run("document.getElementById('found').textContent") == "The file has no answers yet."
    assert tab.complaints() == []


@pytest.mark.parametrize("sandbox", ["", "sandbox=allow-scripts"])
def test_it_works_in_a_frame_as_of_a_notebook(tab, opened, tmp_path, sandbox):
    text = opened([rollout(TOKENIZER, n, EVIL) for n in range(3)]).read_text(encoding="utf-8")
    outside = tmp_path / "notebook.html"
    outside.write_text(f'<!doctype html><iframe {sandbox} srcdoc="{html.escape(text)}"></iframe>')
    tab.open(outside.as_uri())
    assert tab.run_in_frame("document.querySelectorAll('article').length") == 3
    tab.run_in_frame("document.querySelector('.token').focus()")
    assert tab.run_in_frame("document.getElementById('numbers').textContent").startswith("token 1 of")
    assert tab.complaints() == []
