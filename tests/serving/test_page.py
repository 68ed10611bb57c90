"""The page in a browser: a chat by keyboard, streaming, stopping, calculator calls, the key, both widths and colours.

Run: python -m pytest tests/serving/test_page.py
"""

import base64
import os
import re
from importlib.resources import files
from pathlib import Path

import pytest

from tests.support import browser
from tests.support.serving import ScriptedWorker, call, said, serving

pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason="Chromium is not installed")
EVIL = "<img src=x onerror=alert(1)> "
SCRIPT = said("Twelve times 3.5:\n", False) + call("12*3.5", "42.0") + said("that is 42. " + EVIL)
SHOTS = os.environ.get("NANOCHAT_SCREENSHOTS")  # a folder for pictures of the page, for who wants to look


@pytest.fixture(scope="module")
def page():
    with browser.opened() as page:
        yield page


@pytest.fixture
def worker():
    return ScriptedWorker(SCRIPT, step=3)


@pytest.fixture
def opened(page, worker):
    with serving(worker) as url:
        page.width(900)
        page.open(url)
        page.wait("document.title === 'tiny'")
        yield page
        page.open("about:blank")


def key(page, name, text=""):
    for kind in ("keyDown", "keyUp"):
        codes = {"Enter": 13, "Escape": 27}
        more = {"text": text} if text and kind == "keyDown" else {}
        page.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=codes[name], **more)


def ask(page, text):
    page.call("Input.insertText", text=text)  # where the focus is
    key(page, "Enter", "\r")


def answers(page):
    return page.run("[...document.querySelectorAll('.assistant > div:not(.tools)')].map(x => x.innerText)")


def shoot(page, name):
    if SHOTS:
        picture = base64.b64decode(page.call("Page.captureScreenshot")["data"])
        (Path(SHOTS) / f"{name}.png").write_bytes(picture)


DONE = "document.querySelector('#status').textContent === 'The answer is complete'"


def test_a_chat_by_keyboard_shows_answers_calls_and_sends_them_back(opened, worker):
    ask(opened, "How much is 12 * 3.5?")
    opened.wait(DONE)
    calls = opened.run("[...document.querySelectorAll('.call')].map(x => x.textContent)")
    assert calls == ["12*3.5 = 42.0"]
    assert opened.run("document.querySelectorAll('img').length") == 0  # what a model writes is text
    assert EVIL.strip() in answers(opened)[0]
    ask(opened, "And now?")
    opened.wait("document.querySelectorAll('.assistant').length === 2 && " + DONE)
    sent = worker.jobs[-1].ids.tolist()
    first = [token for token, _ in SCRIPT]
    assert any(sent[at : at + len(first)] == first for at in range(len(sent)))
    assert opened.complaints() == []
    for width, height in ((900, 700), (380, 750)):
        opened.width(width, height)
        assert opened.run("document.documentElement.scrollWidth <= innerWidth")
        for colours in ("light", "dark"):
            opened.run(f"document.documentElement.dataset.theme !== '{colours}' && $('theme').click()")
            shoot(opened, f"chat-{width}-{colours}")


def test_escape_stops_an_answer_and_it_may_be_made_again(opened, worker):
    worker.pause = 0.2
    ask(opened, "Hi")
    opened.wait("document.querySelector('.assistant .text')?.textContent.length > 3")
    assert opened.run("document.querySelector('#send').textContent") == "Stop"
    shoot(opened, "streaming")
    key(opened, "Escape")
    opened.wait("document.querySelector('#status').textContent === 'stopped'")
    opened.wait("!document.querySelector('.again').disabled")
    assert worker.jobs[-1] in worker.cancelled or worker.open_jobs == 0
    worker.pause = 0
    opened.run("document.querySelector('.again').click()")
    opened.wait(DONE)
    assert len(answers(opened)) == 1 and "that is 42." in answers(opened)[0] and len(worker.jobs) == 2
    opened.run("$('clear').click()")
    assert answers(opened) == [] and opened.run("document.activeElement.id") == "message"


def test_temperature_and_top_k_are_sent(opened, worker):
    assert opened.run("[$('temperature').value, $('top_k').value]") == ["0.8", "50"]
    opened.run("$('temperature').value = 0.3; $('top_k').value = 7")
    ask(opened, "Hi")
    opened.wait(DONE)
    assert (worker.jobs[-1].sampling.temperature, worker.jobs[-1].sampling.top_k) == (0.3, 7)
    opened.run("$('temperature').value = 5")
    ask(opened, "Hi")
    opened.wait("document.querySelector('[role=alert]') !== null")
    assert "temperature must be a number from 0 to 2" in opened.run(
        "document.querySelector('[role=alert]').textContent"
    )
    shoot(opened, "error")


def test_the_key_is_asked_for_and_then_sent(page, worker):
    with serving(worker, api_key="sesame") as url:
        page.open(url)
        page.wait("!$('keyed').hidden && document.activeElement.id === 'key'")
        ask(page, "sesame")
        page.run("$('key').dispatchEvent(new Event('change'))")
        page.wait("document.title === 'tiny'")
        page.run("$('message').focus()")
        ask(page, "Hi")
        page.wait(DONE)
        page.open("about:blank")


def test_the_page_asks_nobody_else_and_names_its_parts(opened):
    assert all(re.match(r"http://127\.0\.0\.1|data:", url) for url in opened.requests())
    tree = opened.call("Accessibility.getFullAXTree")["nodes"]
    named = {(n["role"]["value"], n.get("name", {}).get("value", "").strip()) for n in tree if not n["ignored"]}
    for part in (
        ("log", "Conversation"),
        ("textbox", "Message"),
        ("button", "Send"),
        ("button", "New chat"),
        ("spinbutton", "Temperature"),
        ("spinbutton", "Top-k"),
        ("heading", "tiny"),
    ):
        assert part in named, sorted(named)


def test_the_source_names_no_other_place():
    source = files("nanochat_jax.serving").joinpath("page.html").read_text()
    assert not re.search(r"https?:|@import|url\(|innerHTML|eval\(", source)
