"""How many Python functions a hit calls: budgets that a change has to keep, or to change.

Time depends on the machine; the number of calls does not. Functions in C are not counted.
The budgets are those of Python 3.11, where comprehensions are functions, and of the SQLAlchemy that
needs more; on others a read is to need no more than that.
"""

import asyncio
import gc
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from sa_tablecache import AsyncTableCache, ChangeFeed
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour, insert_flights
from tests.zoo import Flight, OuterBoard

BETWEEN = (OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
PREBUILT = select(OuterBoard).where(*BETWEEN).order_by(OuterBoard.hour)
COLUMNS = select(OuterBoard.id, OuterBoard.hour).where(*BETWEEN)
COUNT = select(func.count()).select_from(OuterBoard).where(*BETWEEN)
RESIDUAL = PREBUILT.where(OuterBoard.delay > 0)
LIMITED = PREBUILT.limit(2)

READS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "range": (14, lambda s: s.range(OuterBoard.by_hour, ge=hour(1), lt=hour(3))),
    "range of a prefix": (24, lambda s: s.range(OuterBoard.by_plane, "N1", ge=hour(0))),
    "range with a limit": (20, lambda s: s.range(OuterBoard.by_hour, limit=2)),
    "get": (10, lambda s: s.get(OuterBoard, 2)),
    "all": (28, lambda s: s.scalars(PREBUILT).all()),
    "first": (29, lambda s: s.scalars(PREBUILT).first()),
    "limit": (29, lambda s: s.scalars(LIMITED).all()),
    "residual": (37, lambda s: s.scalars(RESIDUAL).all()),
    "columns": (46, lambda s: s.execute(COLUMNS).all()),
    "query": (28, lambda s: s.query(OuterBoard).filter(*BETWEEN).order_by(OuterBoard.hour).all()),
    "query with a limit": (30, lambda s: s.query(OuterBoard).filter(*BETWEEN).limit(2).all()),
    "query first": (35, lambda s: s.query(OuterBoard).filter(*BETWEEN).first()),
    "query count": (30, lambda s: s.query(OuterBoard).filter(*BETWEEN).count()),
    "count": (47, lambda s: s.scalar(COUNT)),
}
"""The calls that are allowed for each read, two of them of the helpers here; and the read."""

FEED = 6
"""The calls that a change feed may cost beside that, if a poll is not due."""
AWAITED = 3
"""The calls that an asynchronous session may cost."""


def calls(run: Callable[[], Any]) -> int:
    """Count the Python functions that are called, once everything is remembered."""
    for _ in range(3):
        run()
    names: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    # What tests before left behind may be collected at any time, and weak dictionaries are told of
    # it by functions that would be counted here.
    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return len(names)


def blocks(run: Callable[[], Any]) -> int:
    """Count the blocks of memory that the caller of a read holds more than before it."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):  # collecting empties the interpreter's own lists of free blocks, too
            run()
        results = [None]
        before = sys.getallocatedblocks()
        results[0] = run()
        return sys.getallocatedblocks() - before
    finally:
        gc.enable()


def check(read: str, measured: int, allowed: int) -> None:
    """Compare with the budget, and say what was measured."""
    assert measured <= allowed, (
        f"{read} calls {measured} Python functions, and {allowed} are allowed: see what it does "
        "more than before, or change the budget if that is worth it"
    )


@pytest.fixture
def world(sqlite: Database) -> Any:
    """Six flights, all of them cached."""
    with flights_world(sqlite) as world:
        world.cache.load(OuterBoard)
        yield world


@pytest.mark.parametrize("read", READS)
def test_a_hit_keeps_to_its_budget(world: World, read: str) -> None:
    """Each kind of hit calls no more functions than it is known to need."""
    allowed, run = READS[read]
    with world.Session() as session:
        measured = calls(lambda: run(session))
        assert session.last_read.kind == "hit"
        assert not session.in_transaction()
    check(read, measured, allowed)


ALLOCATED = 3
"""The blocks of memory that a hit may leave: a list, its pointers, and the number of a counter."""


@pytest.mark.parametrize("until", [1, 2, 4])
def test_a_range_allocates_the_same_for_few_and_many_records(world: World, until: int) -> None:
    """A hit makes a list; the records in it are those of the cache."""
    start, end = hour(0), hour(until)
    with world.Session() as session:
        measured = blocks(lambda: session.range(OuterBoard.by_hour, ge=start, lt=end))
        assert session.last_read.kind == "hit"
        assert blocks(lambda: session.get(OuterBoard, 2)) <= ALLOCATED
    assert measured <= ALLOCATED


@pytest.mark.parametrize("read", READS)
def test_a_hit_with_a_feed_keeps_to_its_budget(sqlite: Database, read: str) -> None:
    """A change feed whose last poll is young enough costs a few calls, and the same for all."""
    allowed, run = READS[read]
    feed = ChangeFeed(poll_interval=60.0, max_lag=timedelta(hours=1))
    with flights_world(sqlite, feed=feed) as world:
        world.cache.install_feed()
        world.cache.load(OuterBoard)
        with world.Session() as session:
            measured = calls(lambda: run(session))
            assert session.last_read.kind == "hit", session.last_read
    check(f"{read} with a feed", measured, allowed + FEED)


@pytest.mark.parametrize("read", ["range", "get", "all", "first"])
def test_an_asynchronous_hit_keeps_to_its_budget(sqlite: Database, read: str) -> None:
    """A hit of an asynchronous session is that of a synchronous one, without a greenlet."""
    allowed, _ = READS[read]

    async def range_(session: Any) -> Any:
        return await session.range(OuterBoard.by_hour, ge=hour(1), lt=hour(3))

    async def get(session: Any) -> Any:
        return await session.get(OuterBoard, 2)

    async def all_(session: Any) -> Any:
        return (await session.scalars(PREBUILT)).all()

    async def first(session: Any) -> Any:
        return (await session.scalars(PREBUILT)).first()

    run = {"range": range_, "get": get, "all": all_, "first": first}[read]

    async def measure() -> int:
        engine = sqlite.async_engine()
        async with engine.begin() as connection:
            await connection.run_sync(insert_flights)
        async with AsyncTableCache(engine, views=[OuterBoard]) as cache:
            await cache.load(OuterBoard)
            async with cache.sessionmaker()() as session:
                await run(session)

                def step() -> None:
                    # A hit does not wait for anything, so that its coroutine ends at once.
                    coroutine = run(session)
                    try:
                        coroutine.send(None)
                    except StopIteration:
                        return
                    raise AssertionError("it waited for something")

                measured = calls(step)
                assert session.last_read.kind == "hit"
        await engine.dispose()
        return measured

    check(f"{read}, awaited", asyncio.run(measure()), allowed + AWAITED)


def test_a_statement_without_views_costs_little_more_than_in_a_plain_session(
    world: World,
) -> None:
    """What touches no view is on its way to the database after a few calls."""
    statement = select(Flight.id).where(Flight.id == 2)
    with world.Session() as session, Session(world.engine) as plain:
        session.scalars(statement).all()
        plain.scalars(statement).all()
        more = calls(lambda: session.scalars(statement).all()) - calls(
            lambda: plain.scalars(statement).all()
        )
    check("what a statement without views costs beside a plain session, it", more, 16)
