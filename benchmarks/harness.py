"""Measuring: cases that take turns, medians of their rounds, ratios to a baseline.

A benchmark is a list of cases that do the same work in different ways; the first is the baseline.
Every round runs each case once, in an order that rotates. A case is a function that takes a number
of repetitions and returns the seconds they took, so that asynchronous cases fit as well.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

SAMPLE = 0.01
"""Seconds that one sample of a fast case should take at least."""


@dataclass(frozen=True)
class Growth:
    """Of what there was how much when something was measured, so that its growth can be drawn."""

    of: str
    """What grows: records, views, indexes."""
    size: int
    expected: str
    """How the measured should grow: a key of ``plots.EXPECTED``."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured number: the median of its rounds, and its ratio to the baseline.

    The goal is the greatest ratio that the project allows itself; of the value, without a ratio.
    """

    benchmark: str
    case: str
    value: float
    unit: str
    ratio: float | None = None
    over: str | None = None
    """The case, of the same benchmark, to which the ratio is."""
    goal: float | None = None
    at_least: bool = False
    """Whether the goal is the least ratio: how many times a peer is slower."""
    spread: tuple[float, float] | None = None
    rounds: int = 1
    growth: Growth | None = None
    part: str = ""
    """The part that measured it, see ``__main__.py``."""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        measured = self.value if self.ratio is None else self.ratio
        return measured >= self.goal if self.at_least else measured <= self.goal

    @property
    def shown(self) -> str:
        """The value with its unit, in three digits or whole."""
        return self.at(self.value)

    def at(self, value: float) -> str:
        """Another value of the same unit."""
        return shown(value, self.unit)


def shown(value: float, unit: str) -> str:
    """Return a value with its unit; seconds in the unit that fits."""
    if unit != "s":
        return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    for name, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size or name == "us":
            break
    return f"{value / size:.3g} {name}"


@dataclass
class Case:
    """One way to do the work of a benchmark.

    :param run: does the work once; a coroutine function where the benchmark is asynchronous.
    :param prepare: called before each run, and not measured.
    """

    name: str
    run: Callable[[], Any]
    goal: float | None = None
    prepare: Callable[[], Any] | None = None
    samples: list[float] = field(default_factory=list)


def compare(benchmark: str, cases: Sequence[Case], *, rounds: int) -> list[Result]:
    """Measure fast cases: each sample repeats a case for at least :data:`SAMPLE` seconds.

    The garbage collector is off, as in ``timeit``: what it costs depends on the rest of a process.
    """
    repeats = {case.name: repeats_of(case.run) for case in cases}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for case in _rotated(cases, number):
                case.samples.append(sample(case.run, repeats[case.name]))
    finally:
        gc.enable()
    return results(benchmark, cases)


async def compare_async(benchmark: str, cases: Sequence[Case], *, rounds: int) -> list[Result]:
    """Measure slow asynchronous cases: each sample is one run, after ``prepare``.

    The result of a run is dropped, and the garbage collected, before the next one begins.
    """
    for number in range(rounds):
        for case in _rotated(cases, number):
            if case.prepare is not None:
                await _awaited(case.prepare())
            gc.collect()
            start = perf_counter()
            result = await _awaited(case.run())
            case.samples.append(perf_counter() - start)
            del result
    return results(benchmark, cases)


def results(benchmark: str, cases: Sequence[Case]) -> list[Result]:
    """Return the medians of the cases' samples, and the medians of their ratios per round."""
    baseline = cases[0]
    return [
        Result(
            benchmark=benchmark,
            case=case.name,
            value=median(case.samples),
            unit="s",
            ratio=median(
                mine / theirs for mine, theirs in zip(case.samples, baseline.samples, strict=True)
            ),
            over=baseline.name if case is not baseline else None,
            goal=case.goal,
            spread=(min(case.samples), max(case.samples)),
            rounds=len(case.samples),
        )
        for case in cases
    ]


def _rotated(cases: Sequence[Case], number: int) -> list[Case]:
    start = number % len(cases)
    return [*cases[start:], *cases[:start]]


def sample(run: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of one run, of so many."""
    turns = range(repeats)
    start = perf_counter()
    for _ in turns:
        run()
    return (perf_counter() - start) / repeats


def repeats_of(run: Callable[[], Any]) -> int:
    """Return how many runs take at least :data:`SAMPLE` seconds."""
    repeats = 1
    while (seconds := sample(run, repeats) * repeats) < SAMPLE:
        repeats = max(repeats * 2, int(repeats * SAMPLE / max(seconds, 1e-9)))
    return repeats


async def _awaited(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value
