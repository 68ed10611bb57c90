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
            tab.run("document.getElementById('show1').click(), scrollTo(0, 700)")
            with (folders[0] / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 1001, "loss": 0.001, "mfu": 0.5}) + "\n")
            tab.wait(f"document.documentElement.dataset.version != '{version}'")
            assert "model FLOPs utilisation" in tab.run(all_of("figcaption", "e.textContent"))
            opened = tab.run(all_of("details", "e.open"))
            assert opened == [False] + [True] * (len(opened) - 1)
            assert tab.run(all_of(".legend input", "e.checked")) == [True, False]
            assert tab.run("scrollY") == 700
            assert {*tab.requests()} == {url} and tab.complaints() == []
        finally:
            server.shutdown()
    tab.wait("document.documentElement.classList.contains('ended')")
