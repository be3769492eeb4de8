"""Records in chunks, and how many are taken out of them or put into them at once; pure.

In: sorted chunks, with what stands beside each record; records that go and others that come. Out:
sorted chunks again. Those in which nothing changes are the same: they need no memory of their own,
and who compares two versions can pass over them.
"""

from __future__ import annotations

import gc
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

from .orders import Order, Record
from .sorting import Get, Pause, itself, joined, no_pause

Chunks: TypeAlias = list[tuple[Any, ...]]
"""Tuples, not lists: of tuples that hold nothing to be collected, as records are, the garbage
collector loses track. It would look at a million records in a quarter of a second, in lists.
"""
Bisect: TypeAlias = Callable[..., int]

CHUNK = 512
"""Records in a chunk after a bulk load; one that grows to twice as many is split.

Changing a record copies one chunk and the list of chunks, so that the square root of the number of
records would be best.
"""


MANY = 64
"""After making so many chunks the garbage collector is asked to look at them."""


def forget() -> None:
    """Have the garbage collector lose track of chunks that were made just now.

    It would do so by itself, when there are two thousand of them: that is a pause of its own, and
    all of their records have left the CPU's cache.
    """
    if gc.isenabled():
        gc.collect(0)


def chunked(items: Sequence[Any], pause: Pause = no_pause) -> Chunks:
    """Return the items in chunks."""
    chunks = []
    for at in range(0, len(items), CHUNK):
        chunks.append(tuple(items[at : at + CHUNK]))
        if len(chunks) % MANY == 0:
            forget()
        pause()
    return chunks


def place_in(
    order: Order,
    records: Sequence[Record],
    values: Sequence[Any] | None,
    record: Record,
    value: Any,
    bisect: Bisect,
    start: int = 0,
) -> int:
    """Return the place of a record among sorted ones, to the left or right of its equals.

    :param values: what stands beside the records.
    :param value: the record's scores, if those are what stands there.
    """
    if not order.stored or values is None:
        get = order.prefixes[-1] or itself
        return bisect(records, get(record), start, len(records), key=get)
    rest = order.rests[-1]
    if rest is None:
        return bisect(values, value, start, len(values))
    start = bisect_left(values, value, start)
    stop = bisect_right(values, value, start)
    return bisect(records, rest(record), start, stop, key=rest)


def pair_key(order: Order) -> Get:
    """Return what gives the key of a record and what stands beside it."""
    get, rest = order.prefixes[-1] or itself, order.rests[-1]
    if not order.stored:
        return lambda pair: get(pair[0])
    return itemgetter(1) if rest is None else lambda pair: (pair[1], rest(pair[0]))


def merged(
    order: Order,
    chunks: Chunks,
    beside: Chunks | None,
    added: Chunks,
    added_beside: Chunks | None,
    gone: set[int],
    pause: Pause,
) -> tuple[Chunks, Chunks | None]:
    """Return chunks without the records of some ids, and with those of other chunks: O(all)."""
    if not chunks or not (gone or added):
        return (chunks, beside) if chunks else (added, added_beside)
    more = joined(added, pause)
    values = None if added_beside is None else joined(added_beside, pause)
    by, by_pair = order.prefixes[-1], pair_key(order)

    def before(at: int, position: int, start: int) -> int:
        value = None if beside is None else beside[at][position]
        return place_in(order, more, values, chunks[at][position], value, bisect_left, start)

    result = _Growing([], None if beside is None else [])
    begin = 0
    for at, chunk in enumerate(chunks):
        inside = before(at, -1, begin)
        if inside == begin and gone.isdisjoint(map(id, chunk)):
            result.share(chunk, None if beside is None else beside[at])
        elif beside is None or values is None:
            kept = [record for record in chunk if id(record) not in gone]
            if begin < inside:
                kept += more[begin:inside]
                kept.sort(key=by)
            result.grow(kept, ())
        else:
            pairs = [p for p in zip(chunk, beside[at], strict=True) if id(p[0]) not in gone]
            if begin < inside:
                pairs += zip(more[begin:inside], values[begin:inside], strict=True)
                pairs.sort(key=by_pair)
            result.grow([record for record, _ in pairs], [value for _, value in pairs])
        end = len(more)
        if at + 1 < len(chunks):
            end = before(at + 1, 0, inside)
        for begin in range(inside, end, CHUNK):  # what comes between this chunk and the next
            stop = min(begin + CHUNK, end)
            result.grow(more[begin:stop], () if values is None else values[begin:stop])
            pause()
        begin = end
        pause()
    result.end()
    return result.chunks, result.beside


class _Growing:
    """Chunks that grow at the end: none of them is too long, and few are short."""

    def __init__(self, chunks: Chunks, beside: Chunks | None) -> None:
        self.chunks = chunks
        self.beside = beside
        self._records: list[Record] = []
        self._values: list[Any] = []

    def grow(self, records: Sequence[Record], values: Any) -> None:
        """Add some records."""
        self._records += records
        self._values += values
        while len(self._records) >= 2 * CHUNK:
            self._cut(CHUNK)

    def share(self, records: tuple[Record, ...], values: tuple[Any, ...] | None) -> None:
        """Add a chunk, as it is if what is before it is long enough."""
        if 0 < len(self._records) < CHUNK // 2:
            self.grow(records, values or ())
            return
        self.end()
        self.chunks.append(records)
        if self.beside is not None and values is not None:
            self.beside.append(values)

    def end(self) -> None:
        """Make a chunk of the rest."""
        if self._records:
            self._cut(len(self._records))

    def _cut(self, size: int) -> None:
        self.chunks.append(tuple(self._records[:size]))
        if len(self.chunks) % MANY == 0:
            forget()
        del self._records[:size]
        if self.beside is not None:
            self.beside.append(tuple(self._values[:size]))
            del self._values[:size]


def let_go(parts: list[Any], pause: Pause) -> None:
    """Drop what nobody may need any more: to free many records at once would be one long call."""
    parts.reverse()  # the order of the primary key comes last: with it, the records go
    while parts:
        parts.pop()
        pause()


def settled(
    order: Order,
    chunks: list[Any],
    beside: list[Any] | None,
    heads: list[Any],
    firsts: list[Any] | None,
    touched: set[int],
) -> tuple[list[Any], list[Any] | None]:
    """Make chunks of lists that were changed, in place, and return the heads of all chunks.

    A million records have two thousand heads: looking at their chunks would take longer than all
    else that is done to change one of them. So would computing the first score of each anew.
    """
    leading, get = beside if order.stored and beside is not None else chunks, order.prefixes[1]
    heads = heads.copy()
    firsts = None if firsts is None or get is None else firsts.copy()
    for at in sorted(touched, reverse=True):
        for lists in (chunks,) if beside is None else (chunks, beside):
            small = 0 < len(lists[at]) <= 2 * CHUNK
            pieces = [tuple(lists[at])] if small else chunked(lists[at])
            lists[at : at + 1] = pieces
            if lists is leading:
                new = [piece[0] for piece in pieces]
                heads[at : at + 1] = new
                if firsts is not None and get is not None:
                    firsts[at : at + 1] = map(get, new)
    return heads, firsts
