"""Which stored records may be stale, by their place in each index.

In: marks that leave records in their places, and the storage. Out: whether an answer has one of
those records among the intervals that it comes from.

It grows as marks are made, and is made anew when the storage is replaced or a mark goes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from .changes import Mark
from .layout import Layout
from .orders import Hidden, Record
from .scores import Interval, Key, place_of
from .storage import Storage
from .turns import Section


class StaleRecords:
    """The records in one storage that some marks may have made stale.

    Adding a mark costs O(1), asking O(log of the records) for each interval and, once for each
    mark, O(log n) for each record of its row.
    """

    def __init__(self, layout: Layout, storage: Storage, marks: Iterable[Mark]) -> None:
        self._layout = layout
        self._storage = storage
        self._lock = Section()
        self._marks: dict[Mark, None] = dict.fromkeys(marks)
        self._unread: list[Mark] = list(self._marks)
        self._pairs: list[tuple[Record, Hidden | None]] = []
        self._keys: dict[str, tuple[int, list[Key]]] = {}
        """For each index asked for, how many of the records are in, and their sorted places."""

    def add(self, marks: Iterable[Mark]) -> None:
        """Add marks."""
        with self._lock:
            for mark in marks:
                if mark not in self._marks:
                    self._marks[mark] = None
                    self._unread.append(mark)

    @property
    def marks(self) -> frozenset[Mark]:
        """The marks."""
        with self._lock:
            return frozenset(self._marks)

    def touch(self, index: str, intervals: Iterable[Interval]) -> bool:
        """Whether one of the records is in one of the intervals of an index."""
        with self._lock:
            keys = self._sorted_keys(index)
        if not keys:
            return False
        for lower, upper in intervals:
            at = bisect_left(keys, lower)
            if at < len(keys) and keys[at] < upper:
                return True
        return False

    def _sorted_keys(self, index: str) -> list[Key]:
        layout, storage = self._layout, self._storage
        for mark in self._unread:
            for leaf in layout.plan.leaves:
                if leaf.table == mark.table:
                    found = layout.records_of(storage, leaf, [mark.key])
                    self._pairs += storage.with_hidden(found)
        self._unread.clear()
        count, keys = self._keys.get(index, (0, []))
        if count < len(self._pairs):
            key_of = layout.orders[index].key_of
            # Others may be looking at the old list.
            keys = sorted([*keys, *(place_of(key_of(r, h)) for r, h in self._pairs[count:])])
            self._keys[index] = len(self._pairs), keys
        return keys
