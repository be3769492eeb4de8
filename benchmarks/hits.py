"""Hits that are no ranges: what each costs beside what it could least cost.

All cases of one comparison take turns in one process. Where a goal is a difference, in
microseconds, the medians of the rounds are subtracted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from sqlalchemy import URL, create_engine, exists, func, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from benchmarks.harness import Case, Result, compare
from benchmarks.ranges import intervals
from examples.flights_models import Flight, FlightBoard
from sa_tablecache import AsyncTableCache, CacheSession, TableCache

RECORDS = 10_000
"""Over so many a residual condition is tested."""


def run(url: URL, *, quick: bool) -> list[Result]:
    """Load everything from SQLite, then measure hits of synchronous and asynchronous sessions."""
    engine = create_engine(url)
    rounds = 5 if quick else 25
    with TableCache(engine, views=[FlightBoard], exclusive_writer=True) as cache:
        cache.load(FlightBoard)
        with cache.sessionmaker()() as session, Session(engine) as plain:
            results = _by_key(session, plain, rounds)
            results += _new_query(session, rounds, *intervals(quick=quick)[1])
            results += _residual(session, rounds)
            results += _counts(session, rounds, intervals(quick=quick))
            results += _without_views(session, plain, rounds)
    engine.dispose()
    results += asyncio.run(_awaited(url, rounds, *intervals(quick=quick)[0]))
    return [result if not quick else _without_goal(result) for result in results]


def _without_goal(result: Result) -> Result:
    return Result(**{**vars(result), "goal": None})


def _more(case: str, results: list[Result], goal: float) -> list[Result]:
    """Add by how many microseconds the second of two cases takes longer."""
    base, other = results
    more = (other.value - base.value) * 1e6
    return [*results, Result(benchmark=base.benchmark, case=case, value=more, unit="us", goal=goal)]


def _by_key(session: CacheSession, plain: Session, rounds: int) -> list[Result]:
    key = session.range(FlightBoard.by_time, limit=1)[0].id
    held = plain.get(Flight, key)  # the identity map is weak
    cases = [
        Case("plain Session, identity map", lambda: plain.get(Flight, key)),
        Case("session.get", lambda: session.get(FlightBoard, key), goal=0.5),
    ]
    results = compare("a record by its key", cases, rounds=rounds)
    assert held is not None
    return results


def _new_query(session: CacheSession, rounds: int, start: datetime, end: datetime) -> list[Result]:
    first, last = FlightBoard.time_hour >= start, FlightBoard.time_hour < end

    def built() -> Any:
        board = FlightBoard
        return (
            select(board)
            .where(board.time_hour >= start, board.time_hour < end)
            .order_by(board.time_hour)
            .limit(50)
        )

    def query() -> Any:
        board = FlightBoard
        return (
            session.query(board)
            .filter(board.time_hour >= start, board.time_hour < end)
            .order_by(board.time_hour)
            .limit(50)
            .all()
        )

    prebuilt = select(FlightBoard).where(first, last).order_by(FlightBoard.time_hour).limit(50)
    assert query() == session.scalars(prebuilt).all() == session.scalars(built()).all()
    cases = [
        Case("building the select() alone", built),
        Case("session.query(...).all(), built anew", query, goal=1.0),
        Case(
            "session.scalars(select(...)).all(), built anew", lambda: session.scalars(built()).all()
        ),
        Case("session.scalars(prebuilt).all()", lambda: session.scalars(prebuilt).all()),
    ]
    return compare("50 records, the query built anew", cases, rounds=rounds)


def _residual(session: CacheSession, rounds: int) -> list[Result]:
    records = session.range(FlightBoard.by_time, limit=RECORDS)
    end = records[-1].time_hour
    records = session.range(FlightBoard.by_time, lt=end)
    statement = (
        select(FlightBoard)
        .where(FlightBoard.time_hour < end, FlightBoard.dep_delay > 30)
        .order_by(FlightBoard.time_hour)
    )

    def by_hand() -> list[Any]:
        return [r for r in records if r.dep_delay is not None and r.dep_delay > 30]

    assert by_hand() == session.scalars(statement).all()
    cases = [
        Case("list comprehension", by_hand),
        Case("session.scalars", lambda: session.scalars(statement).all(), goal=1.3),
    ]
    return compare(f"a residual condition over {len(records):,} records", cases, rounds=rounds)


def _counts(
    session: CacheSession, rounds: int, ranges: list[tuple[datetime, datetime]]
) -> list[Result]:
    def counting(start: datetime, end: datetime) -> Callable[[], Any]:
        statement = (
            select(func.count())
            .select_from(FlightBoard)
            .where(FlightBoard.time_hour >= start, FlightBoard.time_hour < end)
        )
        return lambda: session.scalar(statement)

    def existing(start: datetime, end: datetime) -> Callable[[], Any]:
        statement = select(
            exists().where(FlightBoard.time_hour >= start, FlightBoard.time_hour < end)
        )
        return lambda: session.scalar(statement)

    sizes = [counting(*interval)() for interval in ranges]
    results: list[Result] = []
    for name, made in (("count()", counting), ("exists()", existing)):
        runs = [made(*interval) for interval in ranges]
        assert all(each() for each in runs)
        cases = [
            Case(f"of {size:,} records", each, goal=None if number == 0 else 1.2)
            for number, (size, each) in enumerate(zip(sizes, runs, strict=True))
        ]
        results += compare(name, cases, rounds=rounds)
    return results


def _without_views(session: CacheSession, plain: Session, rounds: int) -> list[Result]:
    statement = select(Flight.id).where(Flight.id == 17)
    cases = [
        Case("plain Session", lambda: plain.scalars(statement).all()),
        Case("CacheSession", lambda: session.scalars(statement).all()),
    ]
    results = compare("a statement that touches no view", cases, rounds=rounds)
    return _more("more by", results, goal=2.0)


async def _awaited(url: URL, rounds: int, start: datetime, end: datetime) -> list[Result]:
    engine = create_async_engine(url.set(drivername="sqlite+aiosqlite"))
    results: list[Result] = []
    async with AsyncTableCache(engine, views=[FlightBoard], exclusive_writer=True) as cache:
        await cache.load(FlightBoard)
        async with cache.sessionmaker()() as session:
            sync = session.sync_session

            def awaiting(read: Callable[[], Awaitable[Any]]) -> Callable[[], Any]:
                # A hit waits for nothing, so that its first step is all of it.
                def step() -> Any:
                    coroutine: Any = read()
                    try:
                        coroutine.send(None)
                    except StopIteration as done:
                        return done.value
                    raise AssertionError("no hit")

                return step

            reads: dict[str, tuple[Callable[[], Any], Callable[[], Awaitable[Any]]]] = {
                "range": (
                    lambda: sync.range(FlightBoard.by_time, ge=start, lt=end),
                    lambda: session.range(FlightBoard.by_time, ge=start, lt=end),
                ),
                "get": (
                    lambda: sync.get(FlightBoard, 17),
                    lambda: session.get(FlightBoard, 17),
                ),
            }
            for name, (synchronous, asynchronous) in reads.items():
                run = awaiting(asynchronous)
                assert run() == synchronous()
                cases = [Case("CacheSession", synchronous), Case("AsyncCacheSession", run)]
                found = compare(f"{name}, awaited", cases, rounds=rounds)
                results += _more("more by", found, goal=2.0)
    await engine.dispose()
    return results
