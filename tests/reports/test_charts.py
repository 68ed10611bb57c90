"""Charts, read back from their SVG: the numbers stand where the axes say, and none that matters is lost.

Run: python -m pytest tests/reports/test_charts.py
"""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.reports.charts import MARKED, Axis, Curve, axis_of, chart, labelled, smoothed, spread, thinned, ticks

FINITE = st.floats(-1e299, 1e299)
STEPS = st.integers(0, 2**53 - 1)


def drawn(svg):
    """The curves of a chart as (class, [(step, value)]), by its axes."""
    root = ET.fromstring(svg.replace(" data-log", " data-log='1'"))
    ends = {name: [float(end) for end in root.get(f"data-{name}").split()] for name in ("x", "y", "size")}
    for path in root.find("g"):
        first, others = re.fullmatch(r"M(-?\d+ -?\d+)(?:l(.*?))?z?", path.get("d")).groups() or ("", "")
        across, down, points = 0, 0, []
        numbers = [int(n) for n in re.findall(r"-?\d+", f"{first} {others or ''}")]
        for dx, dy in zip(numbers[::2], numbers[1::2]):
            across, down = across + dx, down + dy
            (left, right), (low, high) = ends["x"], ends["y"]
            value = low + (1 - down / ends["size"][1]) * (high - low)
            points.append(
                (left + across / ends["size"][0] * (right - left), 10**value if root.get("data-log") else value)
            )
        yield path.get("class"), points


def curves(svg):
    return dict(drawn(re.sub(r"<path class='[^']*dots'[^>]*>", "", svg)))


def test_a_curve_has_the_measured_points_and_its_interval():
    interval = [(10, 0.4, 0.6), (20, 0.6, 0.8)]
    found = curves(chart("solved", [Curve(3, "pass@1", [(10, 0.5), (20, 0.7)], 0, False, interval)]))
    assert found["run3 curve style0"] == [pytest.approx((10, 0.5), rel=1e-4), pytest.approx((20, 0.7), rel=1e-4)]
    around = [(10, 0.6), (20, 0.8), (20, 0.6), (10, 0.4)]
    assert found["run3 interval"] == [pytest.approx(corner, rel=1e-4) for corner in around]


@pytest.mark.parametrize(("lowest", "log"), [(1e-9, True), (0.0, False)])
def test_an_axis_is_logarithmic_only_where_all_values_are_above_zero(lowest, log):
    svg = chart("d", [Curve(0, "d", [(1, 1.0), (2, lowest)])], log=True)
    assert (" data-log" in svg) == log
    assert curves(svg)["run0 curve style0"][1] == pytest.approx((2, lowest), rel=1e-3, abs=1e-6 if not log else 0)


def test_raw_values_are_drawn_under_the_smoothed_ones_of_all_runs():
    svg = chart("loss", [Curve(n, "loss", [(1, 2.0), (2, n)], faint=faint) for n in (0, 1) for faint in (False, True)])
    kinds = [kind for kind in re.findall(r"class='(run[^']*)'", svg) if "dots" not in kind]
    assert kinds == ["run0 faint", "run1 faint", "run0 curve style0", "run1 curve style0"]


def test_a_curve_of_few_points_shows_each_of_them_and_a_long_one_does_not():
    assert "dots" in chart("a", [Curve(0, "a", [(5, 1.0)])])
    assert "dots" not in chart("a", [Curve(0, "a", [(n, 1.0) for n in range(100)])])


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 400])
def test_marks_are_on_points_of_the_curve_and_on_others_of_a_neighbouring_run(length):
    points = [(n, n * n) for n in range(length)]
    found = [spread(points, run) for run in range(4)]
    assert all(len({*marked}) == len(marked) == min(MARKED, length) and {*marked} <= {*points} for marked in found)
    assert length < 400 or len({point for marked in found for point in marked}) == 4 * MARKED


@given(st.lists(st.tuples(STEPS, FINITE), min_size=1, max_size=30, unique_by=lambda point: point[0]), st.booleans())
def test_any_numbers_give_a_chart_that_is_well_formed_and_has_all_points_inside(points, log):
    points = [(step, abs(value) if log else value) for step, value in points]
    svg = chart("<'&\">", [Curve(0, "<'&\">", sorted(points), interval=[(s, v, v) for s, v in points])], log)
    root = ET.fromstring(svg.replace(" data-log", " data-log='1'"))
    width, height = map(float, root.get("data-size").split())
    numbers = [int(n) for n in re.findall(r"-?\d+", root.find("g")[1].get("d"))]
    across, down = (sum(numbers[:n]) for n in (1, 1))
    assert 0 <= across <= width + 1 and down == numbers[0]
    assert "nan" not in svg and "inf" not in svg and height > 0
    assert 1 <= len(ticks(axis_of([v for _, v in points], log=log))) <= 12


@given(st.lists(FINITE, min_size=1, max_size=60), st.integers(1, 20))
def test_a_thinned_curve_keeps_its_ends_and_the_extremes_of_every_column(values, count):
    points = list(enumerate(values))
    kept = thinned(points, count)
    assert kept == sorted({*kept}) and {*kept} <= {*points} and len(kept) <= 2 * count + 2
    columns = {step * count // len(points) for step in range(len(points))}
    for column in columns if len(points) > 2 * count else ():
        inside = [v for step, v in points if step * count // len(points) == column]
        assert {min(inside), max(inside)} <= {v for step, v in kept if step * count // len(points) == column}
    assert {points[0], points[-1]} <= {*kept}
    assert {min(v for _, v in kept), max(v for _, v in kept)} == {min(values), max(values)}


def test_steps_have_whole_numbers_on_their_axis():
    assert ticks(Axis(0, 2), whole=True) == [0, 1, 2]
    assert ticks(Axis(1, 5000), whole=True) == [1000, 2000, 3000, 4000, 5000]
    assert ticks(axis_of([7], margin=0), whole=True) == [4, 6, 8, 10]


def test_ticks_are_round():
    assert ticks(Axis(0.13, 1.02)) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(Axis(-7.5, -3.2, log=True)) == [pytest.approx(10.0**n) for n in (-7, -6, -5, -4)]
    assert ticks(Axis(0.1, 1.2, log=True)) == [2, 5, 10]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 2000, 4000], ["0", "2000", "4000"]),
        ([0, 50_000, 100_000], ["0", "50k", "100k"]),
        ([1.01e6, 1.02e6], ["1.01M", "1.02M"]),
        ([0.2, 0.30000000000000004], ["0.2", "0.3"]),
        ([1e-7, 1e-6], ["1e-07", "1e-06"]),
    ],
)
def test_labels_are_short(values, texts):
    assert [text for _, text in labelled(values)] == texts


def test_a_smoothed_curve_has_the_mean_of_the_steps_around_each():
    assert smoothed([(1, 3.0), (2, 0.0), (3, 6.0), (4, 3.0)], 3) == [(1, 1.5), (2, 3.0), (3, 3.0), (4, 4.5)]
    assert smoothed([(5, 1.5)], 7) == [(5, 1.5)]
