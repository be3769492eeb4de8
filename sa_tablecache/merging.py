"""Records in chunks, and how many are taken out of them or put into them at once; pure.

In: sorted chunks, with what stands beside each record; records that go and others that come. Out:
sorted chunks again. Those in which nothing changes are the same: they need no memory of their own,
and who compares two versions can pass over them.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import itemgetter
from typing import Any, TypeAlias

from .orders import Record
from .sorting import Get, Pause, itself, joined, no_pause

Chunks: TypeAlias = list[list[Any]]

CHUNK = 256
"""Records in a chunk after a bulk load; one that grows to twice as many is split.

Changing a record copies one chunk and the list of chunks, so that the square root of the number of
records would be best.
"""


def chunked(items: list[Any], pause: Pause = no_pause) -> Chunks:
    """Return the items in chunks."""
    chunks = []
    for at in range(0, len(items), CHUNK):
        chunks.append(items[at : at + CHUNK])
        pause()
    return chunks


def merged(
    chunks: Chunks,
    beside: Chunks | None,
    added: Chunks,
    added_beside: Chunks | None,
    gone: set[int],
    pause: Pause,
    *,
    get: Get | None,
    stored: bool,
) -> tuple[Chunks, Chunks | None]:
    """Return chunks without the records of some ids, and with those of other chunks: O(all).

    :param get: gives the key of a record; or with ``stored`` of what is beside it, which may be
        the key itself.
    """
    if not chunks or not (gone or added):
        return (chunks, beside) if chunks else (added, added_beside)
    key = get or itself
    by_pair: Get = itemgetter(1) if stored else lambda pair: key(pair[0])
    keyed = beside if stored and beside is not None else chunks
    more = joined(added, pause)
    values = None if added_beside is None else joined(added_beside, pause)
    more_keyed = values if stored and values is not None else more
    result = _Growing([], None if beside is None else [])
    begin = 0
    for at, chunk in enumerate(chunks):
        inside = bisect_left(more_keyed, key(keyed[at][-1]), begin, key=get)
        if inside == begin and not (gone and any(id(record) in gone for record in chunk)):
            result.share(chunk, None if beside is None else beside[at])
        elif beside is None or values is None:
            kept = [record for record in chunk if id(record) not in gone]
            if begin < inside:
                kept += more[begin:inside]
                kept.sort(key=get)
            result.grow(kept, ())
        else:
            pairs = [p for p in zip(chunk, beside[at], strict=True) if id(p[0]) not in gone]
            if begin < inside:
                pairs += zip(more[begin:inside], values[begin:inside], strict=True)
                pairs.sort(key=by_pair)
            result.grow([record for record, _ in pairs], [value for _, value in pairs])
        end = len(more)
        if at + 1 < len(chunks):
            end = bisect_left(more_keyed, key(keyed[at + 1][0]), inside, key=get)
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

    def grow(self, records: list[Record], values: Any) -> None:
        """Add some records."""
        self._records += records
        self._values += values
        while len(self._records) >= 2 * CHUNK:
            self._cut(CHUNK)

    def share(self, records: list[Record], values: list[Any] | None) -> None:
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
        self.chunks.append(self._records[:size])
        del self._records[:size]
        if self.beside is not None:
            self.beside.append(self._values[:size])
            del self._values[:size]
