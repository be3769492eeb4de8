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

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
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


class IntervalSet:
    """An immutable, sorted set of disjoint intervals that do not touch.

    Every operation costs O(n + m) in the number of intervals; membership costs O(log n).
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
        return "{" + ", ".join(map(repr, self.intervals)) + "}"

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
        return IntervalSet(self.intervals + other.intervals)

    def __and__(self, other: IntervalSet) -> IntervalSet:
        result = []
        mine, theirs = iter(self.intervals), iter(other.intervals)
        a, b = next(mine, None), next(theirs, None)
        while a is not None and b is not None:
            result.append(Interval(max(a.lower, b.lower), min(a.upper, b.upper)))
            if a.upper < b.upper:
                a = next(mine, None)
            else:
                b = next(theirs, None)
        return IntervalSet(result)

    def __sub__(self, other: IntervalSet) -> IntervalSet:
        return self & ~other

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
