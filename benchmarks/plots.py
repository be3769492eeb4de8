"""Plots of growth, as SVG: one for each benchmark that has it, both axes logarithmic.

In: results with a :class:`.Growth`. Out: the text of a file for each benchmark. A case is a line
with its name at the end; the dashed line of the same colour is how it should grow from where it
begins. Text stays text, so that a page can be searched for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from benchmarks.harness import Result, shown

EXPECTED: dict[str, tuple[str, Callable[[float], float]]] = {
    "1": ("O(1)", lambda _: 1.0),
    "log n": ("O(log n)", math.log),
    "n": ("O(n)", float),
}
"""How something may grow: its name, and the function."""

WIDTH, HEIGHT = 790, 380
LEFT, RIGHT, TOP, BOTTOM = 76, 500, 52, 324
"""Where the axes are; the names of the lines stand right of them."""
COLOURS = ("#0072b2", "#d55e00", "#00795c", "#a3508a")
"""Told apart by all eyes, and dark enough for text."""
GREY, LIGHT = "#555555", "#e4e4e4"
LABEL = 36
"""The height that the name of a line takes."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One case: how it was measured, and how it should have been."""

    name: str
    points: tuple[Point, ...]
    expected: str
    shown: tuple[str, str]
    """The first and the last value."""

    @property
    def ideal(self) -> list[Point]:
        """The expected growth from the first point."""
        grows = EXPECTED[self.expected][1]
        (first, value) = self.points[0]
        return [(size, value * grows(size) / grows(first)) for size, _ in self.points]


@dataclass(frozen=True)
class Plot:
    """A drawn benchmark."""

    title: str
    file: str
    svg: str
    text: str
    """What it shows, for those who do not see it."""


def plots(results: Iterable[Result]) -> list[Plot]:
    """Draw all benchmarks that have growth, in their order."""
    growing = [result for result in results if result.growth is not None]
    names = dict.fromkeys(result.benchmark for result in growing)
    return [_plot(name, [r for r in growing if r.benchmark == name]) for name in names]


def _plot(title: str, results: Sequence[Result]) -> Plot:
    lines = [
        _line(name, list(cases))
        for name, cases in groupby(results, lambda result: result.case.rpartition(": ")[0])
    ]
    assert results[0].growth is not None
    text = "; ".join(f"{line.name}: {' to '.join(line.shown)}" for line in lines)
    file = re.sub(r"[^a-z0-9]+", "-", title.lower()) + ".svg"
    svg = draw(title, lines, of=results[0].growth.of, unit=results[0].unit)
    return Plot(title, file, svg, text)


def _line(name: str, cases: Sequence[Result]) -> Line:
    growths = [case.growth for case in cases if case.growth is not None]
    points = [(growth.size, case.value) for growth, case in zip(growths, cases, strict=True)]
    return Line(name, tuple(points), growths[0].expected, (cases[0].shown, cases[-1].shown))


def draw(title: str, lines: Sequence[Line], *, of: str, unit: str) -> str:
    """Return a plot as SVG.

    :param of: what is along the horizontal axis.
    :param unit: of the values: ``"s"`` or another.
    """
    sizes = sorted({size for line in lines for size, _ in line.points})
    values = [value for line in lines for _, value in (*line.points, *line.ideal)]
    ticks = _ticks(min(values), max(values))
    across = _scale(sizes[0], sizes[-1], LEFT, RIGHT)
    up = _scale(ticks[0], ticks[-1], BOTTOM, TOP)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="13">'
    )
    parts = [
        head,
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 28, title[0].upper() + title[1:], "#111111", size=16, weight="bold"),
    ]
    for tick in ticks:
        y = up(tick)
        parts.append(_path([(LEFT, y), (RIGHT, y)], LIGHT))
        parts.append(_text(LEFT - 8, y + 4, shown(tick, unit), GREY, anchor="end"))
    for size in sizes:
        x = across(size)
        parts.append(_path([(x, BOTTOM), (x, BOTTOM + 5)], GREY))
        parts.append(_text(x, BOTTOM + 20, f"{size:,}", GREY, anchor="middle"))
    parts.append(_path([(LEFT, BOTTOM), (RIGHT, BOTTOM)], GREY))
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 42, of, GREY, anchor="middle"))
    places = _spread([up(line.points[-1][1]) for line in lines])
    for line, place, colour in zip(lines, places, COLOURS, strict=False):
        measured = [(across(size), up(value)) for size, value in line.points]
        ideal = [(across(size), up(value)) for size, value in line.ideal]
        parts.append(_path(ideal, colour, width=1.3, dashes="5 4"))
        parts.append(_path(measured, colour, width=2))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in measured]
        x, y = measured[-1]
        parts.append(_path([(x + 4, y), (RIGHT + 18, place)], colour, width=0.6))
        told = f"{' to '.join(line.shown)}; dashed: {EXPECTED[line.expected][0]}"
        parts.append(_text(RIGHT + 22, place - 2, line.name, colour))
        parts.append(_text(RIGHT + 22, place + 13, told, GREY, size=11))
    return "\n".join([*parts, "</svg>", ""])


def _ticks(least: float, greatest: float) -> list[float]:
    """Return values for the lines of the vertical axis, from below all values to above them.

    Over less than two decades, 1, 2 and 5 of each; else the decades.
    """
    steps = (1, 2, 5) if greatest < 100 * least else (1,)
    first, last = math.floor(math.log10(least)) - 1, math.ceil(math.log10(greatest)) + 1
    # As text, because 2 * 10 ** -6 is not 2e-6.
    candidates = [float(f"{s}e{power}") for power in range(first, last + 1) for s in steps]
    below = max(tick for tick in candidates if tick <= least * 0.95)
    above = min(tick for tick in candidates if tick >= greatest * 1.05)
    return [tick for tick in candidates if below <= tick <= above]


def _scale(least: float, greatest: float, start: float, end: float) -> Callable[[float], float]:
    low, high = math.log(least), math.log(greatest)
    span = (high - low) or 1.0
    return lambda value: start + (math.log(value) - low) / span * (end - start)


def _spread(wanted: Sequence[float]) -> list[float]:
    """Return heights near the wanted ones, far enough from each other."""
    places = list(wanted)
    order = sorted(range(len(places)), key=places.__getitem__)
    for above, at in pairwise(order):
        places[at] = max(places[at], places[above] + LABEL)
    excess = max(0.0, max(places) - (BOTTOM - 14))
    if excess:  # the lowest go up again, and push those above them
        limit = BOTTOM - 14.0
        for at in reversed(order):
            places[at] = min(places[at], limit)
            limit = places[at] - LABEL
    return places


def _path(points: Sequence[Point], colour: str, *, width: float = 1, dashes: str = "") -> str:
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    colour: str,
    *,
    anchor: str = "start",
    size: int = 13,
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" '
        f'font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )
