"""Which parts of the coverage were loaded when, and used when last; pure.

In: intervals that were loaded, used and given up. Out: the order in which they should leave.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise

from .coverage import Coverage
from .scores import Cut, Interval, IntervalSet


class Range:
    """A part of the coverage: when it was loaded, and whether it was used since."""

    __slots__ = ("alive", "index", "interval", "loaded_at", "used")

    def __init__(self, index: str, interval: Interval, loaded_at: float) -> None:
        self.index = index
        self.interval = interval
        self.loaded_at = loaded_at
        self.used = False
        self.alive = True


class Ranges:
    """Disjoint ranges of several indexes, in the order of their last use."""

    def __init__(self) -> None:
        self._lowers: dict[str, list[Cut]] = {}
        self._sorted: dict[str, list[Range]] = {}
        self._by_use: OrderedDict[Range, None] = OrderedDict()
        self._by_age: list[tuple[float, int, Range]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._by_use)

    def __iter__(self) -> Iterator[Range]:
        """Iterate from the least recently used to the most recently used."""
        return iter(self._by_use)

    def add(self, index: str, intervals: IntervalSet, loaded_at: float) -> None:
        """Add ranges, none of which may overlap what is there."""
        lowers = self._lowers.setdefault(index, [])
        ranges = self._sorted.setdefault(index, [])
        for interval in intervals:
            at = bisect_left(lowers, interval.lower)
            made = Range(index, interval, loaded_at)
            lowers.insert(at, interval.lower)
            ranges.insert(at, made)
            self._by_use[made] = None
            self._count += 1
            heappush(self._by_age, (loaded_at, self._count, made))
        if len(self._by_age) > 2 * len(self) + 64:
            self._by_age = [entry for entry in self._by_age if entry[2].alive]
            heapify(self._by_age)

    def remove(self, gone: Range) -> None:
        """Forget a range."""
        lowers = self._lowers[gone.index]
        at = bisect_left(lowers, gone.interval.lower)
        del lowers[at]
        del self._sorted[gone.index][at]
        del self._by_use[gone]
        gone.alive = False

    def use(self, index: str, interval: Interval) -> None:
        """Note that an interval was used: the ranges that it touches are the latest."""
        lowers = self._lowers.get(index)
        if not lowers:
            return
        at = max(0, bisect_right(lowers, interval.lower) - 1)
        for found in self._sorted[index][at : bisect_left(lowers, interval.upper)]:
            if found.interval.upper > interval.lower:
                found.used = True
                self._by_use.move_to_end(found)

    def of(self, index: str) -> IntervalSet:
        """Return the intervals of all ranges of an index."""
        return IntervalSet(found.interval for found in self._sorted.get(index, ()))

    def follow(self, coverage: Coverage, now: float) -> None:
        """Become what the coverage is: O(all)."""
        for index in {*self._sorted, *coverage.sets}:
            covered = coverage.sets.get(index, IntervalSet())
            for found in list(self._sorted.get(index, ())):
                one = IntervalSet([found.interval])
                left = one & covered
                if left != one:
                    self.remove(found)
                    self.add(index, left, found.loaded_at)
            self.add(index, covered - self.of(index), now)

    def older(self, than: float) -> list[Range]:
        """Return the ranges that were loaded until some time."""
        return [found for found in self._by_use if found.loaded_at <= than]

    def oldest(self) -> float | None:
        """Return when the oldest range was loaded."""
        while self._by_age and not self._by_age[0][2].alive:
            heappop(self._by_age)
        return self._by_age[0][0] if self._by_age else None

    def _check(self) -> None:
        """Assert the invariants: sorted, disjoint, and the same in each order."""
        everything = [found for ranges in self._sorted.values() for found in ranges]
        assert set(everything) == set(self._by_use)
        assert {entry[2] for entry in self._by_age if entry[2].alive} == set(everything)
        for index, ranges in self._sorted.items():
            assert self._lowers[index] == [found.interval.lower for found in ranges]
            for left, right in pairwise(ranges):
                assert left.interval.upper <= right.interval.lower, (left, right)
            assert all(r.interval.lower < r.interval.upper and r.index == index for r in ranges)
