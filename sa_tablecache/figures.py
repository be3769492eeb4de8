"""Figures about views: what they hold, and what a load would cost."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, func, select

from .layout import Layout
from .scores import IntervalSet

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


def estimate(
    layout: Layout, connection: Connection, index: str, intervals: IntervalSet
) -> Estimate:
    """Estimate the rows, bytes and seconds of a load, from a count and a sample."""
    where = layout.where(index, intervals)
    table = layout.plan.view.__table__
    total = connection.scalar(select(func.count()).select_from(table).where(*where)) or 0
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
