"""Scores, and the algebra of score intervals.

A *key* is the tuple by which an index sorts one record: the scores, column by column, then the
record's primary key, which makes every key distinct. A *cut* is a place between keys: a prefix of
a key followed by :data:`MIN` (just before everything that starts with the prefix) or by
:data:`MAX` (just after it). Cuts and keys are plain tuples that compare with each other, so that
``[a, b)``, ``(a, b]`` and "all that starts with a" are all half-open intervals between two cuts::

    score >= 3        ((3, MIN), (MAX,))
    score > 3         ((3, MAX), (MAX,))
    3 <= score <= 5   ((3, MIN), (5, MAX))
    all               ((MIN,), (MAX,))

SQL sorts NULL before or after all values, depending on the database. A key carries
:data:`NULLS_FIRST` or :data:`NULLS_LAST` in the place of a NULL, which compare accordingly.

Nothing here knows of records, SQL or databases.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeAlias, cast

Key: TypeAlias = tuple[Any, ...]
Cut: TypeAlias = tuple[Any, ...]


class Extreme:
    """A value that compares as smaller (or larger) than every value of another rank."""

    __slots__ = ("_name", "_rank")

    def __init__(self, name: str, rank: int) -> None:
        self._name = name
        self._rank = rank

    def __lt__(self, other: object) -> bool:
        return self._rank < (other._rank if isinstance(other, Extreme) else 0)

    def __gt__(self, other: object) -> bool:
        return self._rank > (other._rank if isinstance(other, Extreme) else 0)

    def __le__(self, other: object) -> bool:
        return self._rank <= (other._rank if isinstance(other, Extreme) else 0)

    def __ge__(self, other: object) -> bool:
        return self._rank >= (other._rank if isinstance(other, Extreme) else 0)

    def __repr__(self) -> str:
        return self._name

    def __reduce__(self) -> str:
        return self._name


MIN: Final = Extreme("MIN", -2)
NULLS_FIRST: Final = Extreme("NULLS_FIRST", -1)
NULLS_LAST: Final = Extreme("NULLS_LAST", 1)
MAX: Final = Extreme("MAX", 2)


class Interval(NamedTuple):
    """All keys between two cuts; empty unless ``lower < upper``."""

    lower: Cut
    upper: Cut

    def __contains__(self, key: object) -> bool:
        place = place_of(cast("Key", key))
        return self.lower < place < self.upper

    def __repr__(self) -> str:
        return f"[{_cut_repr(self.lower)} .. {_cut_repr(self.upper)})"


def _cut_repr(cut: Cut) -> str:
    prefix = ", ".join("NULL" if isinstance(v, Extreme) else repr(v) for v in cut[:-1])
    if not prefix:
        return "-inf" if cut[-1] is MIN else "+inf"
    return prefix if cut[-1] is MIN else f"after {prefix}"


def place_of(key: Key) -> Key:
    """Return a key so that it lies between the cuts of which it is the whole prefix.

    ``(3,)`` sorts before ``(3, MIN)``, and so would stand outside of ``score >= 3``.
    """
    return key if key[-1] is MIN or key[-1] is MAX else (*key, 0)


FEW: Final = 8
"""A set that is smaller than another by this factor is worked into it, interval by interval."""

MOST_SHOWN: Final = 10
"""So many intervals at most are shown in messages."""


class IntervalSet:
    """An immutable, sorted set of disjoint intervals that do not touch.

    Operations on two sets of which one is small cost O(m log n) and copying the large one, others
    O(n + m) in the number of intervals; membership costs O(log n).
    """

    __slots__ = ("_lowers", "intervals")

    intervals: tuple[Interval, ...]

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
        merged: list[Interval] = []
        for interval in sorted(i for i in intervals if i[0] < i[1]):
            if merged and interval.lower <= merged[-1].upper:
                if interval.upper > merged[-1].upper:
                    merged[-1] = Interval(merged[-1].lower, interval.upper)
            else:
                merged.append(interval)
        self.intervals = tuple(merged)
        self._lowers = [i.lower for i in merged]

    @classmethod
    def of(cls, *intervals: Interval) -> IntervalSet:
        """Return the set of intervals that are sorted and disjoint, and of which none is empty."""
        result = cls.__new__(cls)
        result.intervals = intervals
        if len(intervals) == 1:
            result._lowers = [intervals[0][0]]
        else:
            result._lowers = list(map(itemgetter(0), intervals))
        return result

    def _spliced(self, other: IntervalSet, *, add: bool) -> IntervalSet:
        """Return the union or difference with a set that is much smaller."""
        merged, lowers = list(self.intervals), self._lowers.copy()
        for lower, upper in other.intervals:
            at = bisect_right(lowers, lower) - 1
            if at < 0 or (merged[at].upper < lower if add else merged[at].upper <= lower):
                at += 1
            end = (bisect_right if add else bisect_left)(lowers, upper)
            found = merged[at:end]
            if add:
                pieces = [
                    Interval(
                        min(lower, found[0].lower) if found else lower,
                        max(upper, found[-1].upper) if found else upper,
                    )
                ]
            else:
                pieces = [
                    Interval(*cuts)
                    for cuts in (
                        ((found[0].lower, lower), (upper, found[-1].upper)) if found else ()
                    )
                    if cuts[0] < cuts[1]
                ]
            merged[at:end] = pieces
            lowers[at:end] = [piece.lower for piece in pieces]
        result = IntervalSet()
        result.intervals, result._lowers = tuple(merged), lowers
        return result

    def overlapping(self, interval: Interval) -> tuple[Interval, ...]:
        """Return those of the intervals that share a key with another: O(log n + their number)."""
        at = bisect_right(self._lowers, interval.lower) - 1
        if at < 0 or self.intervals[at].upper <= interval.lower:
            at += 1
        return self.intervals[at : bisect_left(self._lowers, interval.upper)]

    def __iter__(self) -> Iterator[Interval]:
        return iter(self.intervals)

    def __len__(self) -> int:
        return len(self.intervals)

    def __bool__(self) -> bool:
        return bool(self.intervals)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntervalSet) and self.intervals == other.intervals

    def __hash__(self) -> int:
        return hash(self.intervals)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.intervals[:MOST_SHOWN]))
        more = len(self) - MOST_SHOWN
        return "{" + shown + (f" and {more} more" if more > 0 else "") + "}"

    @property
    def is_everything(self) -> bool:
        """Whether every key is in the set."""
        return self.intervals == EVERYTHING.intervals

    def __contains__(self, key: object) -> bool:
        """Whether a key (or, for a cut, the place just before or after its prefix) is inside."""
        place = place_of(cast("Key", key))
        at = bisect_right(self._lowers, place) - 1
        return at >= 0 and place < self.intervals[at].upper

    def covers(self, interval: Interval) -> bool:
        """Whether every key of the interval is in the set."""
        if not interval.lower < interval.upper:
            return True
        at = bisect_right(self._lowers, interval.lower) - 1
        return at >= 0 and interval.upper <= self.intervals[at].upper

    def __ge__(self, other: IntervalSet) -> bool:
        return all(map(self.covers, other.intervals))

    def __or__(self, other: IntervalSet) -> IntervalSet:
        small, large = (self, other) if len(self) < len(other) else (other, self)
        if len(small) * FEW < len(large):
            return large._spliced(small, add=True)
        return IntervalSet(self.intervals + other.intervals)

    def __and__(self, other: IntervalSet) -> IntervalSet:
        small, large = (self, other) if len(self) < len(other) else (other, self)
        return IntervalSet(
            Interval(max(lower, theirs.lower), min(upper, theirs.upper))
            for lower, upper in small.intervals
            for theirs in large.overlapping(Interval(lower, upper))
        )

    def __sub__(self, other: IntervalSet) -> IntervalSet:
        if len(other) * FEW < len(self):
            return self._spliced(other, add=False)
        result = []
        for lower, upper in self.intervals:
            for theirs in other.overlapping(Interval(lower, upper)):
                result.append(Interval(lower, theirs.lower))
                lower = theirs.upper
            result.append(Interval(lower, upper))
        return IntervalSet(result)

    def __invert__(self) -> IntervalSet:
        lower: Cut = (MIN,)
        result = []
        for interval in self.intervals:
            result.append(Interval(lower, interval.lower))
            lower = interval.upper
        result.append(Interval(lower, (MAX,)))
        return IntervalSet(result)

    def _check(self) -> None:
        """Assert the invariants: no interval is empty, and each ends before the next begins."""
        for interval in self.intervals:
            assert interval.lower < interval.upper, interval
            assert interval.lower[-1] in (MIN, MAX), interval
            assert interval.upper[-1] in (MIN, MAX), interval
        for left, right in pairwise(self.intervals):
            assert left.upper < right.lower, (left, right)
        assert self._lowers == [i.lower for i in self.intervals]


NOTHING: Final = IntervalSet()
EVERYTHING: Final = IntervalSet([Interval((MIN,), (MAX,))])
