"""The page in a real browser, where Chromium is installed: Debian's package chromium, or Google's.

Run: python -m pytest tests/reports/test_browser.py
"""

import json
import threading

import pytest

from nanochat_jax.reports.page import page
from nanochat_jax.reports.watch import LivePage, Server
from tests.reports.folders import RL, answer, checkpoint, result, write
from tests.support import browser

pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason="Chromium is not installed")
LONG = "a-rather-long-name-of-a-run-" * 4 + "<b>"


@pytest.fixture(scope="module")
def tab():
    with browser.opened() as opened:
        yield opened


def runs(folder):
    """Two runs of a stage, with all that a page shows; the second one is still short, and has a long name."""
    long = [{"step": k, "loss": 5 / k, "smoothed_loss": 6 / k, "grad_norm": 1 / k} for k in range(1, 1001)]
    first = write(folder / "chatrl_checkpoints/d2", long, [answer(n, n, "x" * 300) for n in range(4)])
    second = write(folder / f"chatrl_checkpoints/{LONG}", [*RL, {"step": 1, "samples": ["<b>" * 200]}])
    for run, rate in ((first, 0.1), (second, 0.2)):
        checkpoint(run, 3, matrix_lr=rate, task="/data/" + "y" * 200)
        (run / "all.json").write_text(json.dumps(result(3, **{f"Task-{n}" * 5: 0.5 for n in range(9)})))
    return [first, second]


def all_of(selector, number):
    """A JavaScript array of a number of each element."""
    return f"[...document.querySelectorAll('{selector}')].map(e => {number})"


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_nothing_complains_and_nothing_is_fetched(tab, tmp_path, width):
    file = tmp_path / "report.html"
    file.write_text(page(runs(tmp_path)), encoding="utf-8")
    tab.width(width)
    tab.open(file.as_uri())
    tab.run(all_of("details", "e.open = true"))
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert max(tab.run(all_of("main, section, figure, pre", "e.scrollWidth - e.clientWidth"))) <= 1
    assert min(tab.run(all_of("figure svg text", "e.getBoundingClientRect().height"))) > 9  # pixels
    assert tab.requests() == [file.as_uri()]
    assert tab.complaints() == []


def test_a_run_is_hidden_by_its_entry_in_the_legend_and_values_are_shown_under_the_pointer(tab, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page(runs(tmp_path)), encoding="utf-8")
    tab.width(1280)
    tab.open(file.as_uri())
    hidden = all_of("figure svg g .run1", "getComputedStyle(e).display")
    assert {*tab.run(hidden)} == {"inline"}
    tab.run("document.getElementById('show1').click()")
    assert {*tab.run(hidden)} == {"none"}
    tab.run("document.querySelector('figure > svg').scrollIntoView({block: 'center'})")
    left, top, width, height = tab.run(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('figure > svg').getBoundingClientRect())"
    )
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + 0.97 * width, y=top + height / 2)
    tab.wait("document.querySelector('.values') != null")
    assert tab.run("document.querySelector('.values').innerText").split() == ["step", "1,000", "d2", "0.006"]
    assert tab.complaints() == []


def mouse(tab, kind, x, y, clicks=0):
    button = {"button": "left", "buttons": 1, "clickCount": clicks} if clicks else {}
    tab.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **button)


def drag(tab, first, last):
    """Over the first chart, between two shares of its width -> a place in its middle."""
    tab.run("document.querySelector('figure > svg').scrollIntoView({block: 'center'})")
    left, top, width, height = tab.run(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('figure > svg').getBoundingClientRect())"
    )
    for kind, share in (("Pressed", first), ("Moved", (first + last) / 2), ("Moved", last), ("Released", last)):
        mouse(tab, kind, left + share * width, top + height / 2, 1)
    return left + width / 2, top + height / 2


def shown_steps(tab):
    """The ends of the first stage's axes of steps, rounded, each once."""
    found = tab.run(all_of("section:first-of-type figure > svg", "e.dataset.x.split(' ').map(x => Math.round(x))"))
    return [list(ends) for ends in dict.fromkeys(map(tuple, found))]


def test_dragging_over_a_chart_zooms_those_of_its_stage_and_a_double_click_shows_all_steps_again(tab, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page(runs(tmp_path)), encoding="utf-8")
    tab.width(1280)
    tab.open(file.as_uri())
    before = tab.run(all_of("figure", "e.innerHTML"))
    x, y = drag(tab, 0.6, 0.5)  # in either direction
    [[first, last]] = shown_steps(tab)
    assert 480 < first < 510 and 580 < last < 630
    mouse(tab, "Moved", x, y)
    step = int(tab.run("document.querySelector('.values caption').textContent").removeprefix("step "))
    shown = [row.split() for row in tab.run("document.querySelector('.values table').innerText").splitlines()[1:]]
    assert first <= step <= last and float(shown[0][-1]) == pytest.approx(6 / step, rel=1e-3)
    labels = [
        float(text) for text in tab.run(all_of("figure:first-child text[text-anchor=end]:not(.unit)", "e.textContent"))
    ]
    assert len(labels) >= 2 and all(6 / last * 0.5 < value < 6 / first * 1.5 for value in labels)
    for clicks in (1, 2):
        mouse(tab, "Pressed", x, y, clicks)
        mouse(tab, "Released", x, y, clicks)
    mouse(tab, "Moved", 0, 0)
    assert tab.run(all_of("figure", "e.innerHTML")) == before and tab.complaints() == []


def test_keys_zoom_move_and_go_back(tab, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page(runs(tmp_path)), encoding="utf-8")
    tab.open(file.as_uri())
    tab.run("document.querySelector('figure > svg').focus()")
    found = []
    for key in ("+", "+", "ArrowRight", "ArrowLeft", "ArrowLeft", "-", "Escape"):
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key=key)
        found.append(shown_steps(tab)[0])
    assert found == [[250, 750], [375, 625], [438, 688], [375, 625], [313, 563], [188, 688], [0, 1000]]
    assert tab.run("document.activeElement == document.querySelector('figure > svg')") and tab.complaints() == []


def test_the_axis_of_values_fits_the_runs_that_are_shown_in_a_zoomed_chart(tab, tmp_path):
    flat = [write(tmp_path / f"{n}", [{"step": k, "mfu": n / 10 + k / 1e5} for k in range(100)]) for n in (1, 5)]
    file = tmp_path / "report.html"
    file.write_text(page(flat), encoding="utf-8")
    tab.open(file.as_uri())
    drag(tab, 0.4, 0.6)
    ends = "document.querySelector('figure > svg').dataset.y.split(' ').map(Number)"
    low, high = tab.run(ends)
    assert low < 0.1005 and high > 0.5004
    tab.run("document.getElementById('show0').click()")
    low, high = tab.run(ends)
    assert 0.5 < low < high < 0.501 and tab.complaints() == []


def test_a_served_page_follows_the_run_and_keeps_what_was_opened_hidden_and_scrolled_to(tab, tmp_path):
    folders = runs(tmp_path)
    with Server(0, LivePage(lambda: folders, print)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_address[1]}/"
        try:
            tab.width(390)
            tab.open(url)
            version = tab.run("document.documentElement.dataset.version")
            tab.run("document.querySelectorAll('details').forEach((one, n) => { one.open = n > 0; })")
            drag(tab, 0.3, 0.6)
            zoomed = shown_steps(tab)
            tab.run("document.getElementById('show1').click(), scrollTo(0, 700)")
            with (folders[0] / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 1001, "loss": 0.001, "mfu": 0.5}) + "\n")
            tab.wait(f"document.documentElement.dataset.version != '{version}'")
            assert "model FLOPs utilisation" in tab.run(all_of("figcaption", "e.textContent"))
            opened = tab.run(all_of("details", "e.open"))
            assert opened == [False] + [True] * (len(opened) - 1)
            assert tab.run(all_of(".legend input", "e.checked")) == [True, False]
            assert tab.run("scrollY") == 700
            assert zoomed != [[0, 1000]] and shown_steps(tab) == zoomed
            assert {*tab.requests()} == {url} and tab.complaints() == []
        finally:
            server.shutdown()
    tab.wait("document.documentElement.classList.contains('ended')")
