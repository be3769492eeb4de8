"""Refreshing: the next read after commits, and a window that slides, beside what they cannot avoid.

By hand is the SELECT of the refresh, made anew and run on a connection of the pool that the cache
reads through, in the same kind of transaction: the ratio is what marks, records and storage cost on
top. Commits are made before the clock starts. It has a database of its own, of a million flights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from itertools import count
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, func, select, update

from benchmarks import database
from benchmarks.harness import Case, Result, compare, compare_async
from examples.flights_models import Flight, FlightBoard
from sa_tablecache import CachedView, LastRead, ScoreIndex, TableCache
from sa_tablecache.records import SortedRecords

READ_GOAL = 1.5
SLIDE_GOAL = 1.3
SCORES_GOAL = 2.0
SIZES = (10_000, 100_000, 1_000_000)
COMMITS = 1_000
MARKS = 5_000
BESIDE_GOAL = 1.5
"""What a range costs beside marks elsewhere: some bisections more, and no refresh."""
QUICK_DAYS = 14


class ByOrigin(CachedView):
    """Flights: three origins, and as many identifiers as flights."""

    __select__ = select(Flight.id, Flight.origin, Flight.arr_delay)

    by_origin = ScoreIndex("origin")
    by_id = ScoreIndex("id")


def run(*, quick: bool) -> list[Result]:
    """Load from PostgreSQL; commit and read, replace records, slide."""
    found: list[Result] = []
    days, records = (QUICK_DAYS, 0) if quick else (None, SIZES[-1])
    with database.postgres(days, records=records) as url:
        engine = create_engine(url.set(drivername="postgresql+psycopg"))
        for size in (2_000,) if quick else SIZES:
            with TableCache(engine, views=[FlightBoard], exclusive_writer=True) as cache:
                cache.load(FlightBoard, FlightBoard.id <= size)
                found += _next_read(cache, size, quick=quick)
                if size == SIZES[1] or quick:
                    found.append(_many_commits(cache, 20 if quick else COMMITS))
        found += _beside_marks(url, quick=quick)
        found += _few_scores(engine, quick=quick)
        found += _slide(engine, quick=quick)
        engine.dispose()
    return found


def _compare(name: str, cases: Sequence[Case], rounds: int) -> list[Result]:
    return asyncio.run(compare_async(name, cases, rounds=rounds))


def _write(cache: TableCache, flight: int, delay: int) -> None:
    with cache.sessionmaker()() as session:
        session.execute(update(Flight).where(Flight.id == flight).values(dep_delay=delay))
        session.commit()


def _next_read(cache: TableCache, size: int, *, quick: bool) -> list[Result]:
    """A flight is written, which moves it in an index, and read."""
    table = cache.table(FlightBoard)
    layout = table.set_up()
    assert layout.plan.anchor is not None
    [key] = [layout.plan.column(name).clause for name in layout.plan.anchor.hidden]
    flight = size // 2
    delays = count()

    def by_hand() -> Any:
        covered = layout.coverage_clause(table.state.coverage)
        with cache.snapshots.open() as connection:
            return connection.execute(layout.loader.statement(key == flight, *covered)).all()

    def read_next() -> Any:
        refreshes = table.counts.refreshes
        with cache.sessionmaker()() as session:
            found = session.get(FlightBoard, flight)
        assert table.counts.refreshes == refreshes + 1
        return found

    cases = [
        Case("its SELECT by hand", by_hand),
        Case(
            "the next read", read_next, goal=None if quick else READ_GOAL,
            prepare=lambda: _write(cache, flight, next(delays) % 100),
        ),
    ]  # fmt: skip
    _write(cache, flight, -1)
    read_next()
    return _compare(f"next read after a commit, {size:,} records", cases, 5 if quick else 51)


def _many_commits(cache: TableCache, commits: int) -> Result:
    """So many flights are written in as many commits; counts what the next read sends."""
    for flight in range(1, commits + 1):
        _write(cache, flight, flight % 100)
    statements: list[str] = []

    def sent(_: Any, __: Any, statement: str, *___: Any) -> None:
        statements.append(statement)

    event.listen(cache.snapshots.engine, "before_cursor_execute", sent)
    with cache.sessionmaker()() as session:
        session.get(FlightBoard, 1)
    event.remove(cache.snapshots.engine, "before_cursor_execute", sent)
    return Result(
        benchmark=f"next read after {commits:,} commits of a row", case="statements",
        value=len(statements), unit="statements", goal=1,
    )  # fmt: skip


def _beside_marks(url: URL, *, quick: bool) -> list[Result]:
    """A range is read while records elsewhere are marked, and where none is."""
    marks = 100 if quick else MARKS
    size = 10 * marks
    engines = [create_engine(url.set(drivername="postgresql+psycopg")) for _ in range(2)]
    with ExitStack() as stack:
        runs: list[Callable[[], Any]] = []
        for engine in engines:
            cache = stack.enter_context(
                TableCache(engine, views=[FlightBoard], exclusive_writer=True)
            )
            with engine.connect() as connection:
                end = connection.scalar(select(Flight.time_hour).where(Flight.id == size))
            cache.load(FlightBoard, FlightBoard.time_hour < end)
            session = stack.enter_context(cache.sessionmaker()())
            start = end - timedelta(hours=1)
            runs.append(
                lambda session=session, start=start, end=end: session.range(
                    FlightBoard.by_time, ge=start, lt=end
                )
            )
        with cache.sessionmaker()() as writer:
            writer.execute(
                update(Flight).where(Flight.id <= marks).values(arr_delay=Flight.arr_delay)
            )
            writer.commit()
        assert cache.stats(FlightBoard).pending_marks == marks
        assert runs[0]() == runs[1]() != []
        results = compare(
            f"a range beside {marks:,} marks elsewhere",
            [
                Case("nothing is marked", runs[0]),
                Case("they are", runs[1], goal=None if quick else BESIDE_GOAL),
            ],
            rounds=5 if quick else 25,
        )
        assert session.last_read == LastRead("hit", "", FlightBoard)
        assert cache.stats(FlightBoard).pending_marks == marks  # no read has refreshed them
    for engine in engines:
        engine.dispose()
    return results


def _few_scores(engine: Engine, *, quick: bool) -> list[Result]:
    """A record is replaced, under an index with three scores and under one of unique ones."""
    with TableCache(engine, views=[ByOrigin], exclusive_writer=True) as cache:
        cache.load(ByOrigin, ByOrigin.id <= 300_000)
        storage = cache.table(ByOrigin).state.storage
        pairs = list(storage.pairs())[len(storage) // 2 :][:1]
        unique, few = storage.orders["by_id"], storage.orders["by_origin"]

        def changed(order: SortedRecords) -> Callable[[], Any]:
            def change() -> None:
                for _ in range(100):
                    order.replace(pairs, pairs)

            return change

        cases = [
            Case("unique scores", changed(unique)),
            Case("3 distinct scores", changed(few), goal=None if quick else SCORES_GOAL),
        ]
        return _compare("a record changed 100 times", cases, 5 if quick else 25)


def _slide(engine: Engine, *, quick: bool) -> list[Result]:
    """A window slides by a tenth of itself, beside loading that tenth alone."""
    time = FlightBoard.time_hour
    with engine.connect() as connection:
        start = connection.scalar(select(func.min(Flight.time_hour)))
    width = timedelta(days=10 if quick else 300)
    tenth = width / 10
    end = start + width
    with (
        TableCache(engine, views=[FlightBoard], exclusive_writer=True) as sliding,
        TableCache(engine, views=[FlightBoard], exclusive_writer=True) as alone,
    ):
        cases = [
            Case(
                "loading the tenth alone",
                lambda: alone.load(FlightBoard, time >= end, time < end + tenth),
                prepare=lambda: alone.clear(FlightBoard),
            ),
            Case(
                "sliding by a tenth",
                lambda: sliding.load(FlightBoard, time >= start + tenth, time < end + tenth),
                goal=None if quick else SLIDE_GOAL,
                prepare=lambda: sliding.load(FlightBoard, time >= start, time < end),
            ),
        ]
        return _compare("a window slides", cases, 3 if quick else 7)
