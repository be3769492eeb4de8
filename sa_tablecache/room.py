"""Room for what is read: how many records a view may keep, and which ranges have to go for more.

In: limits of records and bytes, and the memory limit of the cache. Out: states with less.
"""

from __future__ import annotations

from collections.abc import Iterable

from .figures import rows_bytes
from .layout import Layout
from .loads import evicted
from .remembered import Range, Ranges
from .rows import Rows
from .scores import Interval, IntervalSet
from .state import State
from .table import CachedTable

MOST_RANGES = 100_000
"""Ranges that are remembered where there is no limit of records."""

RANGE_BYTES = 600
"""What a range itself takes, with its place in the coverage."""


def by_index(ranges: Iterable[Range]) -> dict[str, IntervalSet]:
    """Return the intervals of ranges, by index."""
    found: dict[str, list[Interval]] = {}
    for each in ranges:
        found.setdefault(each.index, []).append(each.interval)
    return {index: IntervalSet(intervals) for index, intervals in found.items()}


class Room:
    """How much one view may keep.

    :param max_records: so many records, and so many ranges.
    :param max_bytes: so many bytes, estimated.
    """

    def __init__(self, table: CachedTable, max_records: int | None, max_bytes: int | None) -> None:
        self._table = table
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._each = 200.0
        """Bytes of a record, and for how many records that was measured."""
        self._measured = 0

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit."""
        limits = self._max_records, self._max_bytes, self._table.memory
        return any(limit is not None for limit in limits)

    def allowed(self, rows: Rows | None = None) -> int:
        """Return how many records may be stored, by all limits.

        :param rows: some of them, to measure if nothing is stored yet.
        """
        limits = [self._max_records]
        sizes = [self._max_bytes]
        if self._table.memory is not None:
            sizes.append(self._table.memory.room_for(self._table))
        given = [size for size in sizes if size is not None]
        if given:
            if rows is not None and not self._measured and rows.records:
                layout = self._table.layout
                assert layout is not None
                self._each = max(1.0, rows_bytes(layout, rows) / len(rows.records))
            limits.append(self.records_in(max(0, min(given))))
        return min((n for n in limits if n is not None), default=2**62)

    def records_in(self, size: int) -> int:
        """Return how many records so many bytes are."""
        return int(size / self._each)

    def measure(self, ranges: int) -> None:
        """Estimate the bytes of a record, each time that what is stored is other by a quarter."""
        stored = len(self._table.state.storage)
        if stored and not self._measured * 0.8 < stored < self._measured * 1.25:
            self._each = max(1.0, (self._table.held_bytes + RANGE_BYTES * ranges) / stored)
            self._measured = stored

    def make(
        self,
        layout: Layout,
        state: State,
        ranges: Ranges,
        *,
        allowed: int,
        records: int = 0,
        new: int = 0,
    ) -> tuple[State, list[Range]]:
        """Return a state with room for more records and ranges, and which ranges it has not.

        The least recently used ones go first. Where several cover the same records it may take
        more of them than their records are.
        """
        most_ranges = MOST_RANGES if self._max_records is None else self._max_records
        victims: list[Range] = []
        left = iter(ranges)
        result = state
        while True:
            excess = len(result.storage) + records - allowed
            spare = len(ranges) - len(victims) + new - max(most_ranges, new)
            if excess <= 0 and spare <= 0:
                return result, victims
            more: list[Range] = []
            freed = 0
            for victim in left:
                more.append(victim)
                freed += state.storage.orders[victim.index].count(victim.interval)
                if freed >= excess and len(more) >= spare:
                    break
            if not more:
                return result, victims
            victims += more
            result, _ = evicted(layout, result, by_index(more))
