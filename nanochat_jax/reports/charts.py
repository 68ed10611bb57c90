"""Charts as SVG: curves of several runs over their steps.

A drawing library takes seconds for what these few shapes need. Colours and widths are left to the page's style sheet,
where the class run<number> has the colour of a run; text stays text, and the same numbers give the same bytes.
"""

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 208  # of a chart, in the units of its text, whose size is 11
TOP, RIGHT, BOTTOM = 8, 14, 34  # around the plot; on the left there is room for the longest label
LETTER = 6.2  # width of a letter of a label, at most
FINE = 1000  # a curve's coordinates are whole numbers, so many to a unit: short, and a value can be read back
DETAIL = 3  # a long curve has points for so many times the plot's width, as a part of it can be looked at alone
DOTS = 30  # a curve with so few points shows each of them
TINY = 1e-300  # smaller values are drawn as 0
STYLES = 4  # strokes that tell a run's metrics apart
MARKS = (  # shapes around points of a curve, which tell runs of one colour apart; in the style sheet --mark<n>
    "",
    "m-2600 0a2600 2600 0 1 0 5200 0a2600 2600 0 1 0-5200 0z",
    "m0-3400l3200 5600h-6400z",
    "m0-3400l3400 3400-3400 3400-3400-3400z",
)
MARKED = 6  # points of a curve that have one

Points = Sequence[tuple[int, float]]


class Curve(NamedTuple):
    """A metric of a run."""

    run: int  # whose colour it has
    name: str
    points: Points  # (step, value), in the order of the steps
    style: int = 0  # stroke: 0 solid, others dashed
    faint: bool = False  # the background of another curve
    interval: Sequence[tuple[int, float, float]] = ()  # (step, low, high), shaded
    mark: int = 0  # index in MARKS


class Axis(NamedTuple):
    """What an axis shows: from `low` to `high`, of the values' logarithms to base 10 where it is logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value stands: 0 at the axis's beginning, 1 at its end."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)


def chart(title: str, curves: Sequence[Curve], log: bool = False) -> str:
    """An SVG element with these curves, at least one; log: the values' axis is logarithmic where all are above 0."""
    heights = [height for curve in curves for _, height in curve.points]
    heights += [end for curve in curves for _, *ends in curve.interval for end in ends]
    steps = [step for curve in curves for step in (curve.points[0][0], curve.points[-1][0])]
    x, y = axis_of([*steps, 0] if min(steps) <= 0.05 * max(steps) else steps, margin=0), axis_of(heights, log=log)
    marks = [(y.place(tick), label) for tick, label in labelled(ticks(y))]
    left = 12 + LETTER * max((len(label) for _, label in marks), default=0)
    width, height = WIDTH - left - RIGHT, HEIGHT - TOP - BOTTOM
    bottom = TOP + height

    drawn = ""
    for place, label in marks:
        line = bottom - place * height
        drawn += f"<path class='grid' d='M{left:.1f} {line:.1f}H{WIDTH - RIGHT}'/>"
        drawn += f"<text x='{left - 5:.1f}' y='{line + 4:.1f}' text-anchor='end'>{label}</text>"
    for tick, label in labelled(ticks(x, whole=True)):
        line = left + x.place(tick) * width
        drawn += f"<path class='grid' d='M{line:.1f} {TOP}V{bottom}'/>"
        drawn += f"<text x='{line:.1f}' y='{bottom + 15}' text-anchor='middle'>{label}</text>"
    drawn += f"<text class='unit' x='{WIDTH - RIGHT}' y='{HEIGHT - 4}' text-anchor='end'>step</text>"

    def at(step: int, value: float) -> tuple[int, int]:
        return round(x.place(step) * width * FINE), round((1 - y.place(value)) * height * FINE)

    shapes = ["", "", ""]  # from the background to the foreground
    columns = DETAIL * round(width)
    for curve in curves:
        if curve.interval:
            upper = [at(step, high) for step, _, high in curve.interval]
            lower = [at(step, low) for step, low, _ in reversed(curve.interval)]
            shapes[0] += f"<path class='run{curve.run} interval' d='{path([*upper, *lower])}z'/>"
        kind = f"run{curve.run} {'faint' if curve.faint else f'curve style{curve.style}'}"
        points = [at(*point) for point in thinned(curve.points, columns)]
        name = html.escape(curve.name)
        shapes[1 if curve.faint else 2] += f"<path class='{kind}' data-name='{name}' d='{path(points)}'/>"
        if len(points) <= DOTS:
            dots = "".join(f"M{across} {down}h0" for across, down in points)
            shapes[1 if curve.faint else 2] += f"<path class='{kind} dots' d='{dots}'/>"
        if curve.mark and not curve.faint:
            marks = "".join(f"M{across} {down}{MARKS[curve.mark]}" for across, down in spread(points, curve.run))
            shapes[2] += f"<path class='run{curve.run} marks' d='{marks}'/>"
    scale = f"translate({left:.1f} {TOP}) scale({1 / FINE})"
    axes = f"data-x='{x.low} {x.high}' data-y='{y.low} {y.high}' data-size='{width * FINE:.0f} {height * FINE}'"
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' tabindex='0' aria-label='{html.escape(title)}' {axes}"
        f"{' data-log' * y.log}>{drawn}<g transform='{scale}'>{''.join(shapes)}</g></svg>"
    )


def path(points: Iterable[tuple[int, int]]) -> str:
    """Lines from point to point as SVG's path data: from the first on each is relative to the one before."""
    (across, down), *others = points
    data = [f"M{across} {down}"]
    for n, (next_across, next_down) in enumerate(others):
        data.append(f"{' ' if n else 'l'}{next_across - across} {next_down - down}")
        across, down = next_across, next_down
    return "".join(data)


def spread(points: Sequence[tuple[int, int]], run: int) -> list[tuple[int, int]]:
    """Those of a curve's points that are marked, evenly; of neighbouring runs others, as their curves may be close."""
    first, count = 0.25 * (run % 4), min(MARKED, len(points))
    return [points[int((n + first) * len(points) / count)] for n in range(count)]


def thinned(points: Points, columns: int) -> Points:
    """Of a long curve the ends, and the lowest and the highest point of each of so many columns: it looks the same."""
    if len(points) <= 2 * columns:
        return points
    first, span = points[0][0], points[-1][0] - points[0][0] + 1
    found: dict[int, list[tuple[int, float]]] = {}
    for point in points:
        extremes = found.setdefault((point[0] - first) * columns // span, [point, point])
        if point[1] < extremes[0][1]:
            extremes[0] = point
        elif point[1] > extremes[1][1]:
            extremes[1] = point
    kept = {point for extremes in found.values() for point in extremes} | {points[0], points[-1]}
    return sorted(kept)


def smoothed(points: Points, window: int) -> Points:
    """Each point with the mean of so many values around it, an odd number; at the ends of those that are there."""
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    half, means = window // 2, []
    for n, (step, _) in enumerate(points):
        first, end = max(0, n - half), min(len(points), n + half + 1)
        means.append((step, (sums[end] - sums[first]) / (end - first)))
    return means


# --------------------------------------------------------------------------------------------------------------- axes
def axis_of(values: Sequence[float], *, log: bool = False, margin: float = 0.04) -> Axis:
    """An axis on which all values have their place, and a margin, as a share of it, on both sides. log: it is
    logarithmic where all values are above 0."""
    low, high = min(values), max(values)
    if log := log and low > TINY:
        low, high = math.log10(low), math.log10(high)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), TINY):  # one value in the middle
        around = 0.5 if log or abs(high) <= TINY else 0.5 * abs(high)
        return Axis(low - around, high + around, log)
    more = margin * (high - low)
    return Axis(low - more, high + more, log)


def ticks(axis: Axis, *, most: int = 5, whole: bool = False) -> list[float]:
    """Round values on an axis, about `most` of them; whole: steps, of which there are no fractions."""
    if not axis.log:
        return round_values(axis.low, axis.high, most, whole)
    first, last = max(-307, math.ceil(axis.low)), min(307, math.floor(axis.high))
    if last - first >= 2:
        return [10.0**power for power in range(first, last + 1, 1 + (last - first) // most)]
    between = [m * 10.0**power for power in range(first - 1, last + 1) for m in (1, 2, 5)]
    between = [value for value in between if axis.low <= math.log10(value) <= axis.high]
    return between if len(between) >= 3 else round_values(10**axis.low, 10**axis.high, most)


def round_values(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten from `low` to `high`, at most `most` or one more."""
    wanted = (high - low) / most
    power = math.floor(math.log10(wanted))
    unit = next(m for m in (1, 2, 5, 10) if m * 10.0**power >= wanted * (1 - 1e-9)) * 10.0**power
    if whole and unit < 1:
        unit, power = 1.0, 0
    multiples = range(math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9) + 1)
    return [round(n * unit, max(0, -power)) for n in multiples if not whole or n >= 0]


def labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Each value with its text, which are of one kind: thousands as k, millions as M, billions as G."""
    largest = max(map(abs, values), default=0.0)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size * (10 if letter == "k" else 1) <= largest < 1e13:
            return [(value, f"{value / size:.9g}{letter}" if value else "0") for value in values]
    return [(value, f"{value:.9g}") for value in values]
