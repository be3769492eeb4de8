"""Figures about views: what they hold, and what a load would cost."""

from __future__ import annotations

import random
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, Self

from sqlalchemy import Connection, func, select

from .layout import Layout
from .readers import EveryScope
from .rows import Rows
from .scores import IntervalSet
from .storage import Storage
from .view import CachedView

SAMPLE = 1_000
"""Rows that an estimate looks at."""

SAMPLE_BYTES = 512
"""Records whose values are measured."""


# -- reads ----------------------------------------------------------------------------------------

REASONS: Final[Mapping[str, str]] = {
    "refresh": "marked records were read again first",
    "loaded": "what the read missed was loaded first",
    "staleness": "the view's window may do without the latest records",
    "gaps": "what memory lacked was fetched and merged",
    "not_loaded": "nothing of the view is loaded",
    "coverage": "the coverage lacks what was asked, and no part of it could be used",
    "changed": "the view changed while gaps were fetched",
    "statement": "the statement, or a value in it, is one that only the database can answer",
    "requested": "the statement asked for the database",
    "own_writes": "the session's transaction wrote a table of the view",
    "isolation": "the session's transaction has a snapshot or locks of its own",
    "connection": "the connection ran SET or the like, or a cursor of the driver was used",
    "listener": "the application listens where it could change what is read",
    "disabled": "the cache was switched off",
    "bind": "the session is bound to another database or schema",
    "feed": "the change feed could not be read in time, or does not see the view's tables",
    "commit": "a commit that touches the view was under way",
    "refresh_failed": "the refresh failed",
    "overrun": "changes arrived faster than refreshes",
    "off": "the mode of the view is off",
    "shadow": "the mode of the view is shadow: the cache was asked, too, and compared",
    "verified": "the database was asked to verify the cache",
    "stale": "marked records were given as they were, being younger than what is allowed",
}
"""The categories by which reads that were not plain hits are counted, and what each means."""


class Reason(str):
    """Why a read was not a plain hit: in words, with the category by which it is counted.

    Words name statements, columns and the coverage; there are as many as reads. Categories are the
    few of :data:`REASONS`, which is what a metric can bear.
    """

    __slots__ = ("category",)
    category: str

    def __new__(cls, category: str, words: str) -> Self:
        reason = super().__new__(cls, words)
        reason.category = category
        return reason

    def with_more(self, words: str) -> Reason:
        """Return the reason with more words, in the same category."""
        return type(self)(self.category, f"{self}: {words}")


def category_of(reason: object) -> str:
    """Return the category of a reason; of words that came with none, that of the statement."""
    return getattr(reason, "category", "statement")


class LastRead(NamedTuple):
    """How the last read of a view was answered.

    ``kind`` is ``hit`` (from the cache), ``partial`` (gaps fetched and merged), ``miss`` (by the
    database, coverage lacking) or ``bypass`` (by the database, by rule); ``reason`` says why.
    """

    kind: str
    reason: str
    view: type[CachedView]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a load would cost: rows, bytes of memory, seconds."""

    rows: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of one view. Times are in seconds, sizes in bytes."""

    records: int
    bytes: int
    """Estimated from a sample; repeated values are shared, and counted once."""
    coverage: str
    hits: int
    hits_with_refresh: int
    """Those of the hits for which marked records had to be read again first."""
    partial_hits: int
    misses: int
    bypasses: int
    reasons: dict[str, int]
    """How many reads were no plain hits, by the categories of :data:`REASONS`."""
    mismatches: int
    """Answers of the cache that were found not to be those of the database."""
    comparisons: int
    """How many were compared with the database's, by mode or to verify the cache."""
    comparisons_skipped: int
    """How many were to be, and could not: the view changed meanwhile, say."""
    loads: int
    load_seconds: float
    refreshes: int
    refresh_seconds: float
    records_loaded: int
    records_expired: int
    marks: dict[str, int]
    """How many marks were made, by kind: ``row``, ``group``, ``view`` and the like."""
    pending_marks: int
    oldest_mark: float
    """How long the oldest of them has been pending."""
    leases: int
    coarse: dict[str, str] = field(default_factory=dict)
    fills: int = 0
    """Loads of what reads missed, by :class:`.ReadThrough`."""
    ranges_evicted: int = 0
    """Ranges that it gave up for want of room."""


class Counts:
    """What has happened to one view since its cache was made. Numbers only grow.

    Hits are counted without a lock: with the interpreter's lock, ``counts.hits += 1`` is never
    interrupted between reading and writing, and a lock of its own would take longer than all else
    that a hit does to be counted. The rest is counted in sections that exclude each other.
    """

    def __init__(self) -> None:
        self.hits = 0
        """Plain hits: no SQL, no waiting."""
        self.reads: Counter[tuple[str, str]] = Counter()
        """All other reads, by kind and category."""
        self.marks: Counter[str] = Counter()
        """Marks by kind."""
        self.mismatches = 0
        self.comparisons = 0
        self.comparisons_skipped = 0
        self.loads = 0
        self.fills = 0
        """Loads of what reads missed."""
        self.ranges_evicted = 0
        self.load_seconds = 0.0
        self.refreshes = 0
        self.refresh_seconds = 0.0
        self.records_loaded = 0
        self.records_expired = 0

    def reads_of(self, kind: str) -> int:
        """Return how many reads were of a kind, plain hits aside."""
        return sum(number for (each, _), number in self.reads.copy().items() if each == kind)

    @property
    def reasons(self) -> dict[str, int]:
        """How many reads were no plain hits, by category."""
        totals: Counter[str] = Counter()
        for (_, category), number in self.reads.copy().items():
            totals[category] += number
        return dict(totals)


def records_bytes(
    records: Callable[[int], Any],
    count: int,
    hidden: Callable[[int], Any] | None,
    orders: int,
    *,
    stored: int = 0,
) -> int:
    """Estimate the memory of records from some of them, anywhere among them.

    :param records: gives one of them.
    :param hidden: gives what stands beside it, if anything does.
    :param orders: in how many orders they are kept.
    :param stored: in how many of these with a score beside each.
    """
    if not count:
        return 0
    at = range(count)
    if count > SAMPLE_BYTES:  # not the same that the database may have grouped by accident
        at = sorted(random.Random(count).sample(at, SAMPLE_BYTES))  # type: ignore[assignment]  # noqa: S311
    sample = [records(i) for i in at]
    pointers = orders + stored + (hidden is not None)
    size = count * (sys.getsizeof(sample[0]) + pointers * 8)
    for name in sample[0].__struct_fields__:
        size += values_bytes([getattr(record, name) for record in sample], count)
    if hidden is not None:
        beside = [hidden(i) for i in at]
        size += values_bytes(beside, count)
        for values in zip(*beside, strict=True):
            size += values_bytes(values, count)
    return size


def values_bytes(sample: Sequence[Any], count: int) -> int:
    """Estimate the memory of so many values of a column, equal ones being one object.

    Those that the sample has once and those that it has twice tell how many it does not have
    (A. Chao, 1984). If it has none twice, all are taken to be different.
    """
    sizes = {id(value): sys.getsizeof(value) for value in sample}
    times = Counter(Counter(map(id, sample)).values())
    different = len(sizes) * count / len(sample)
    if times[2] or not times[1]:
        unseen = times[1] ** 2 / (2 * times[2]) if times[1] else 0
        different = min(different, len(sizes) + unseen)
    return int(different * sum(sizes.values()) / len(sizes))


def rows_bytes(layout: Layout, rows: Rows) -> int:
    """Estimate the memory that rows will take as records of a view."""
    orders = layout.columns.orders.values()
    stored = sum(order.stored for order in orders)
    records, hidden = rows.records, rows.hidden
    beside = None if hidden is None else hidden.__getitem__
    return records_bytes(records.__getitem__, len(records), beside, len(orders), stored=stored)


def stored_bytes(storage: Storage) -> int:
    """Estimate the memory of all records and orders from some of the records."""
    primary = storage.orders.get("")
    if primary is None or not primary.chunks:
        return 0
    stored = sum(order.beside is not None for order in storage.orders.values())
    stored -= primary.beside is not None
    offsets, beside = primary.offsets, primary.beside

    def in_(chunks: Sequence[Sequence[Any]], at: int) -> Any:
        chunk = bisect_right(offsets, at) - 1
        return chunks[chunk][at - offsets[chunk]]

    return records_bytes(
        partial(in_, primary.chunks),
        len(primary),
        None if beside is None else partial(in_, beside),
        len(storage.orders),
        stored=stored,
    )


def shown_bytes(size: int) -> str:
    """Return a number of bytes as people read it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} bytes"


def estimate(
    layout: Layout, connection: Connection, index: str, intervals: IntervalSet
) -> Estimate:
    """Estimate the rows, bytes and seconds of a load, from a count and a sample."""
    where = layout.where(index, intervals)
    view = layout.plan.view
    count = select(func.count()).select_from(view.__table__).where(*where)
    total = connection.scalar(count.options(EveryScope(view))) or 0
    started = time.perf_counter()
    sample = connection.execute(layout.loader.statement(*where).limit(SAMPLE)).all()
    elapsed = time.perf_counter() - started
    if not sample:
        return Estimate(total, 0, 0.0)
    seen: set[tuple[int, Any]] = set()
    size = 0
    for row in sample:
        # A record is a header and a pointer for each field; equal values are shared.
        size += 16 + 8 * len(layout.plan.columns) + 8 * len(layout.orders)
        for at, value in enumerate(row):
            try:
                known = (at, value) in seen
                seen.add((at, value))
            except TypeError:
                known = False
            if not known:
                size += sys.getsizeof(value)
    return Estimate(total, size * total // len(sample), max(elapsed, 1e-9) * total / len(sample))
