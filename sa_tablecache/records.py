"""Records in the order of one index: immutable, so that readers need no lock.

In: records (and, where a view has index expressions or lineage that its columns do not show, the
hidden values of each). Out: the records between two cuts of an index, by bisection and slicing.

A :class:`SortedRecords` is a list of chunks of about a thousand records. Changing some gives a new
one that shares all chunks that did not change; a reader keeps whatever it started with. That a
reader can never see half of a refresh, and that a failed one leaves no trace, follows from this
alone.

Keys are not stored: bisection computes the dozen or so that it looks at from the records. That
saves a tuple and a pointer for each record and index. (``sortedcontainers.SortedKeyList``, which
stores them, took 176 bytes more for each record of the flights view with three indexes, cannot be
shared between a reader and a writer without a lock, and removes a record from among equal scores
in linear time.) Only where a score cannot be computed from the record, because an index sorts by an
expression, is it kept beside it, and equal ones are one object.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from .exc import TableCacheError
from .merging import CHUNK, Bisect, Chunks, chunked, merged, pair_key, place_in, settled
from .orders import Hidden, Order, Record
from .scores import MAX, MIN, Cut, Interval
from .sorting import Pause, along, no_pause, sort, sort_by_scores, sort_by_values, steps


class SortedRecords:
    """An immutable sequence of records in the order of one index.

    Finding a place costs O(log n), a slice O(log n + its length), a change of m records
    O(m (log n + chunk) + n / chunk).
    """

    __slots__ = ("_count", "_firsts", "_heads", "_offsets", "beside", "chunks", "order")

    def __init__(
        self,
        order: Order,
        chunks: Chunks,
        beside: Chunks | None,
        heads: list[Any] | None = None,
        count: int | None = None,
    ) -> None:
        self.order = order
        self.chunks = chunks
        self.beside = beside
        """Beside each record: its scores if the order stores them, else its hidden values."""
        items = beside if order.stored and beside else chunks
        self._heads = [chunk[0] for chunk in items] if heads is None else heads
        self._firsts: list[Any] | None = None
        """The first score of each of these: most ranges are of that one."""
        self._offsets: list[int] | None = None
        self._count = sum(map(len, chunks)) if count is None else count

    @classmethod
    def build(
        cls,
        order: Order,
        records: list[Record],
        hidden: list[Hidden] | None,
        pause: Pause = no_pause,
        *,
        scores_only: bool = False,
    ) -> SortedRecords:
        """Sort records into a new sequence; ``hidden`` runs beside ``records``.

        :param scores_only: the records come in the order of the primary key.
        """
        try:
            if order.stored and hidden is not None:
                values: list[Any] = []
                for some, beside in zip(steps(records), steps(hidden), strict=True):
                    values += map(order.score_of, some, beside)
                    pause()
                items, values = sort_by_values(records, values, pause)
                return cls(order, chunked(items, pause), chunked(values, pause))
            if scores_only:
                get = order.prefixes[order.depth]
                items = sort_by_scores(records, order.getters, get, pause)
            else:
                items = sort(records, order.prefixes[-1], pause)
        except TypeError as error:
            names = ", ".join(part.name for part in order.parts)
            raise TableCacheError(
                f"the values of {names} cannot be sorted ({error}): the stored values are of "
                "more than one type, or NULL in a column that the model declares NOT NULL"
            ) from error
        if hidden is None:
            return cls(order, chunked(items, pause), None)
        values = along(hidden, records, items, pause)
        return cls(order, chunked(items, pause), chunked(values, pause))

    @property
    def offsets(self) -> list[int]:
        """The number of records before each chunk, and in all."""
        if self._offsets is None:
            self._offsets = [0, *accumulate(map(len, self.chunks))]
        return self._offsets

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        for chunk in self.chunks:
            yield from chunk

    def find(self, cut: Cut) -> tuple[int, int]:
        """Return the place of a cut: the chunk and the position in it."""
        length = len(cut) - 1
        if not self.chunks:
            return 0, 0
        if not length:
            return (0, 0) if cut[0] is MIN else (len(self.chunks) - 1, len(self.chunks[-1]))
        prefix = cut[0] if length == 1 else cut[:-1]
        if self.order.stored and length > self.order.depth:
            return self._find_whole(cut)
        getter = self.order.prefixes[length]
        bisect = bisect_left if cut[-1] is MIN else bisect_right
        if length == 1:
            firsts = self._firsts
            if firsts is None:
                firsts = self._firsts = (
                    self._heads if getter is None else [*map(getter, self._heads)]
                )
            at = bisect(firsts, prefix) - 1
        else:
            at = bisect(self._heads, prefix, key=getter) - 1
        if at < 0:
            return 0, 0
        items = self.beside if self.order.stored and self.beside is not None else self.chunks
        return at, bisect(items[at], prefix, key=getter)

    def _find_whole(self, cut: Cut) -> tuple[int, int]:
        """Return the place of a cut that is longer than the scores that are stored."""
        chunks, beside = self.chunks, self.beside
        assert beside is not None
        depth, get = self.order.depth, self.order.rests[len(cut) - 1 - self.order.depth]
        assert get is not None
        value = cut[0] if depth == 1 else cut[:depth]
        rest = cut[depth] if len(cut) == depth + 2 else cut[depth:-1]
        bisect = bisect_left if cut[-1] is MIN else bisect_right
        start = bisect_left(self._heads, value)
        stop = bisect_right(self._heads, value, start)
        at = bisect(chunks, rest, start, stop, key=lambda chunk: get(chunk[0])) - 1
        if at < 0:
            return 0, 0
        start = bisect_left(beside[at], value)
        stop = bisect_right(beside[at], value, start)
        return at, bisect(chunks[at], rest, start, stop, key=get)

    def rank(self, cut: Cut) -> int:
        """Return the number of records before a cut."""
        chunk, at = self.find(cut)
        return self.offsets[chunk] + at

    def between(self, interval: tuple[Cut, Cut]) -> list[Record]:
        """Return a list of the records of an interval, in order."""
        chunks = self.chunks
        if not chunks:
            return []
        first, start = self.find(interval[0])
        last, stop = self.find(interval[1])
        if first == last:
            return list(chunks[first][start:stop])
        if first > last:
            return []
        result = list(chunks[first][start:])
        for chunk in chunks[first + 1 : last]:
            result += chunk
        result += chunks[last][:stop]
        return result

    def some(self, interval: Interval, limit: int, *, from_end: bool = False) -> list[Record]:
        """Return the first records of an interval, or its last ones, the very last first."""
        first, start = self.find(interval[0]) if self.chunks else (0, 0)
        last, stop = self.find(interval[1]) if self.chunks else (0, 0)
        result: list[Record] = []
        if not self.chunks or (first, start) >= (last, stop):
            return result
        step = -1 if from_end else 1
        at, end = (last, first) if from_end else (first, last)
        while len(result) < limit:
            chunk = self.chunks[at][start if at == first else None : stop if at == last else None]
            result += chunk[::-1] if from_end else chunk
            if at == end:
                break
            at += step
        return result[:limit]

    def count(self, interval: Interval) -> int:
        """Return the number of records of an interval."""
        return max(0, self.rank(interval[1]) - self.rank(interval[0]))

    def replace(
        self,
        removed: Sequence[tuple[Record, Hidden | None]],
        added: Sequence[tuple[Record, Hidden | None]],
        pause: Pause = no_pause,
    ) -> SortedRecords:
        """Return a new sequence without some records and with others."""
        order, key_of = self.order, self.order.key_of
        chunks: list[Any] = self.chunks.copy()
        beside: list[Any] | None = None if self.beside is None else self.beside.copy()
        touched: set[int] = set()

        def own(at: int) -> None:
            if at not in touched:
                touched.add(at)
                chunks[at] = list(chunks[at])
                if beside is not None:
                    beside[at] = list(beside[at])

        def place(at: int, record: Record, hidden: Hidden | None, bisect: Bisect) -> int:
            value = None if not order.stored else order.score_of(record, hidden)
            return place_in(order, chunks[at], beside and beside[at], record, value, bisect)

        for record, hidden in removed:
            at = self.find((*key_of(record, hidden), MAX))[0]
            while True:
                # Only where keys are hashes can equal ones be many, and span chunks.
                own(at)
                items = chunks[at]
                position = place(at, record, hidden, bisect_left)
                while position < len(items) and items[position] is not record:
                    position += 1
                if position < len(items):
                    break
                at -= 1
                assert at >= 0, f"{record!r} is not stored"
            del chunks[at][position]
            if beside is not None:
                del beside[at][position]
            pause()
        for record, hidden in added:
            at = self.find((*key_of(record, hidden), MAX))[0]
            own(at)
            position = place(at, record, hidden, bisect_right)
            chunks[at].insert(position, record)
            if beside is not None:
                value = order.score_of(record, hidden) if order.stored else hidden
                beside[at].insert(position, value)
            pause()
        heads, firsts = settled(order, chunks, beside, self._heads, self._firsts, touched)
        count = len(self) + len(added) - len(removed)
        result = SortedRecords(order, chunks, beside, heads, count)
        result._firsts = firsts
        return result

    def merged(self, gone: set[int], added: SortedRecords, pause: Pause) -> SortedRecords:
        """Return a new sequence without the records of some ids and with others: O(all).

        Chunks in which nothing changes are shared.
        """
        chunks, beside = merged(
            self.order, self.chunks, self.beside, added.chunks, added.beside, gone, pause
        )
        return SortedRecords(self.order, chunks, beside)

    def _check(self) -> None:
        """Assert the invariants: keys ascend over all chunks, none of which is empty."""
        items = self.beside if self.order.stored and self.beside is not None else self.chunks
        by = pair_key(self.order)
        both = zip(self.chunks, self.beside or self.chunks, strict=True)
        keys = [by(pair) for lists in both for pair in zip(*lists, strict=True)]
        hashed = any(part.hashed for part in self.order.parts)
        for left, right in pairwise(keys):
            assert left < right or (hashed and left == right), (self.order.name, left, right)
        assert all(self.chunks), "an empty chunk"
        assert all(len(chunk) <= 2 * CHUNK for chunk in self.chunks), "a chunk that is too long"
        if self.beside is not None:
            assert list(map(len, self.chunks)) == list(map(len, self.beside))
        assert self._heads == [chunk[0] for chunk in items]
        assert self._count == self.offsets[-1]
        get = self.order.prefixes[1]
        firsts = self._heads if get is None else [*map(get, self._heads)]
        assert self._firsts is None or self._firsts == firsts
