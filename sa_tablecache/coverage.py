"""What is in storage: for each index, the intervals of which every record is known to be there.

Coverage is the union over all indexes: a record is stored exactly if at least one index covers
its score. It is immutable; the table replaces it together with the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .scores import EVERYTHING, NOTHING, IntervalSet

if TYPE_CHECKING:
    from .scores import Key


class Coverage:
    """For each index, the set of intervals that are in storage."""

    __slots__ = ("everything", "sets")

    def __init__(self, sets: Mapping[str, IntervalSet] | None = None) -> None:
        sets = {name: intervals for name, intervals in (sets or {}).items() if intervals}
        self.everything = any(intervals.is_everything for intervals in sets.values())
        """Whether every record of the view is in storage."""
        self.sets: dict[str, IntervalSet] = {"": EVERYTHING} if self.everything else sets

    def __bool__(self) -> bool:
        return bool(self.sets)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coverage) and self.sets == other.sets

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.sets.items(), key=lambda item: item[0])))

    def __repr__(self) -> str:
        if self.everything:
            return "everything"
        return ", ".join(f"{name}: {intervals}" for name, intervals in self.sets.items()) or (
            "nothing"
        )

    def of(self, index: str) -> IntervalSet:
        """Return what of an index is covered."""
        return EVERYTHING if self.everything else self.sets.get(index, NOTHING)

    def covers(self, index: str, intervals: IntervalSet) -> bool:
        """Whether all of the intervals are covered."""
        return self.everything or self.of(index) >= intervals

    def missing(self, index: str, intervals: IntervalSet) -> IntervalSet:
        """Return the part of the intervals that is not covered."""
        return intervals - self.of(index)

    def has(self, keys: Iterable[tuple[str, Key]]) -> bool:
        """Whether a record with these keys, by index, is covered."""
        return self.everything or any(key in self.of(name) for name, key in keys)

    def plus(self, index: str, intervals: IntervalSet) -> Coverage:
        """Return the coverage with more of an index."""
        if self.everything:
            return self
        return Coverage({**self.sets, index: self.of(index) | intervals})

    def minus(self, index: str, intervals: IntervalSet) -> Coverage:
        """Return the coverage with less of an index; records that others cover stay."""
        if intervals.is_everything:
            return Coverage()
        if self.everything:
            return Coverage({index: ~intervals})
        return Coverage({**self.sets, index: self.of(index) - intervals})

    def _check(self) -> None:
        """Assert the invariants of all interval sets."""
        for name, intervals in self.sets.items():
            intervals._check()
            assert intervals, f"empty coverage of {name}"
        assert not self.everything or list(self.sets) == [""]
