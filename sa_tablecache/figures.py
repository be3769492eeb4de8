"""Figures about views: what they hold, and what a load would cost."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, func, select

from .layout import Layout
from .readers import EveryScope
from .scores import IntervalSet
from .storage import Storage

SAMPLE = 1_000
"""Rows that an estimate looks at."""


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
    partial_hits: int
    misses: int
    bypasses: int
    loads: int
    refreshes: int
    records_loaded: int
    records_expired: int
    pending_marks: int
    oldest_mark: float
    leases: int
    coarse: dict[str, str] = field(default_factory=dict)


def stored_bytes(storage: Storage) -> int:
    """Estimate the memory of all records and orders from a chunk in the middle."""
    primary = storage.orders.get("")
    if primary is None or not primary.chunks:
        return 0
    middle = len(primary.chunks) // 2
    sample = primary.chunks[middle]
    seen: set[int] = set()
    size = 0
    for record in sample:
        size += sys.getsizeof(record)
        for name in record.__struct_fields__:
            value = getattr(record, name)
            if id(value) not in seen:
                seen.add(id(value))
                size += sys.getsizeof(value)
    for records in storage.orders.values():
        size += 8 * len(sample)
        if records.beside is not None:
            size += len(sample) * (8 + sys.getsizeof(records.beside[0][0]))
    return size * len(primary) // len(sample)


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
