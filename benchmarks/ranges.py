"""Reading ranges: ``session.range`` against a slice of a bare ``SortedKeyList``.

The list holds the very same record objects under the same key, so that the ratio is what
sessions, coverage, freshness and intervals cost on top of finding and copying the records. The
other ways to read are shown beside it, without a goal.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any

from sortedcontainers import SortedKeyList
from sqlalchemy import URL, create_engine, select

from benchmarks.harness import Case, Result, compare
from examples.flights_models import FlightBoard
from sa_tablecache import CacheSession, TableCache, bypass_cache

GOALS = (3.0, 1.5, 1.15)
"""For an hour, a day and a month: what a call costs beside the slice weighs less and less."""
SCALARS_GOAL = 2.5
"""For a day."""

Interval = tuple[datetime, datetime]


def intervals(*, quick: bool) -> list[Interval]:
    """Return an hour with 49 flights, a day with 988 and a month with 28,231.

    A quick run, which has only the first fortnight, takes its own hour and day, and all of it.
    """
    hour, day, month = (
        (datetime(2013, 1, 3, 18), datetime(2013, 1, 3), datetime(2013, 1, 1))
        if quick
        else (datetime(2013, 6, 3, 14), datetime(2013, 6, 3), datetime(2013, 6, 1))
    )
    return [
        (hour, hour + timedelta(hours=1)),
        (day, day + timedelta(days=1)),
        (month, month + timedelta(days=30)),
    ]


def run(url: URL, *, quick: bool) -> list[Result]:
    """Load everything from SQLite, then measure three ranges."""
    engine = create_engine(url)
    results: list[Result] = []
    with TableCache(engine, views=[FlightBoard], exclusive_writer=True) as cache:
        cache.load(FlightBoard)
        with cache.sessionmaker()() as session, cache.sessionmaker()() as busy:
            busy.connection()  # with the transaction that reads of the database begin
            records = SortedKeyList(session.range(FlightBoard.by_time), key=attrgetter("time_hour"))
            for number, interval in enumerate(intervals(quick=quick)):
                goals = None if quick else GOALS[number], None
                if number == 1 and not quick:
                    goals = GOALS[number], SCALARS_GOAL
                cases = _cases(session, busy, records, goals, *interval)
                expected = len(cases[0].run())
                for case in cases:
                    assert len(case.run()) == expected, case.name
                results += compare(
                    f"range of {expected:,} records", cases, rounds=5 if quick else 25
                )
    engine.dispose()
    return results


def _cases(
    session: CacheSession,
    busy: CacheSession,
    records: SortedKeyList,
    goals: tuple[float | None, float | None],
    start: datetime,
    end: datetime,
) -> list[Case]:
    prebuilt = _statement(start, end)
    from_database = prebuilt.options(bypass_cache())

    def sliced() -> Any:
        return records[records.bisect_key_left(start) : records.bisect_key_left(end)]

    def ranged(session: CacheSession) -> list[FlightBoard]:
        return session.range(FlightBoard.by_time, ge=start, lt=end)

    def scalars(statement: Callable[[], Any], session: CacheSession = session) -> Callable[[], Any]:
        return lambda: session.scalars(statement()).all()

    return [
        Case("SortedKeyList slice", sliced),
        Case("session.range", lambda: ranged(session), goal=goals[0]),
        Case("session.range, in an open transaction", lambda: ranged(busy)),
        Case("session.scalars, prebuilt select", scalars(lambda: prebuilt), goal=goals[1]),
        Case("session.scalars, new select", scalars(lambda: _statement(start, end))),
        Case("the database (SQLite)", scalars(lambda: from_database, busy)),
    ]


def _statement(start: datetime, end: datetime) -> Any:
    return (
        select(FlightBoard)
        .where(FlightBoard.time_hour >= start, FlightBoard.time_hour < end)
        .order_by(FlightBoard.time_hour)
    )
