"""Limits: of memory, of the records that are fetched at a time, and of loads at a time."""

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, literal, select, update
from sqlalchemy.exc import OperationalError

from sa_tablecache import (
    AsyncTableCache,
    LoadSlotTimeout,
    MemoryLimitExceeded,
    NotExpressible,
    ReadThrough,
    TableCache,
    TableCacheError,
)
from sa_tablecache.limits import MemoryLimit
from sa_tablecache.slots import LoadSlots
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world, hour, insert_flights
from tests.integration.pausing import Held, Running
from tests.zoo import Flight, InnerBoard, OuterBoard, PlaneEntity

MANY = 3_000


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """A few thousand flights and two views of them, none cached."""
    with flights_world(database, OuterBoard, InnerBoard) as world:
        fill(world)
        yield world


def fill(world: World) -> None:
    """Insert flights: one every tenth of an hour, three of them at a time."""
    with world.engine.begin() as connection:
        connection.execute(
            insert(Flight),
            [flight(1_000 + n, 10 + n // 3 * 0.1, tailnum="N1") for n in range(MANY)],
        )


def limit(world: World, size: int) -> MemoryLimit:
    """Give the cache another memory limit, as if it had been made with it."""
    memory = MemoryLimit(size)
    for view in world.cache.views:
        table = world.cache.table(view)
        memory.add(table)
        table.memory = memory
    return memory


def selects(statements: list[str]) -> int:
    """Return how many SELECTs of views there were."""
    return sum("_board" in statement for statement in statements)


# -- memory --------------------------------------------------------------------------------------


def test_a_load_that_would_pass_the_limit_is_refused_with_figures(world: World) -> None:
    """It says what was read, what the limit is and what is held, and leaves no trace."""
    world.cache.load(InnerBoard)
    held = world.cache.stats(InnerBoard).bytes
    limit(world, held + 100_000)
    with pytest.raises(MemoryLimitExceeded) as caught:
        world.cache.load(OuterBoard)
    error = caught.value
    assert error.limit == held + 100_000
    assert error.held == held
    assert error.estimate > 100_000
    assert "InnerBoard" in str(error)
    assert "more than" in str(error)
    assert f"memory_limit={error.limit:,}" in str(error)
    assert "cache.estimate()" in str(error)
    assert world.cache.stats(OuterBoard).records == 0
    assert not world.cache.ready(OuterBoard)
    assert world.ids(OuterBoard.hour < hour(1)) == [1]
    world.cache.load(OuterBoard, OuterBoard.hour < hour(5))
    assert world.cache.stats(OuterBoard).records == 6
    world.cache._check()


def test_what_a_load_expires_does_not_count(world: World) -> None:
    """A load may take the place of what it expires, and an extension may not."""
    half = OuterBoard.hour < hour(60)
    other = OuterBoard.hour >= hour(60)
    world.cache.load(OuterBoard, half)
    limit(world, int(world.cache.stats(OuterBoard).bytes * 1.3))
    with pytest.raises(MemoryLimitExceeded, match="itself"):
        world.cache.extend(OuterBoard, other)
    assert world.cache.covers(OuterBoard, half)
    world.cache.load(OuterBoard, other)
    assert world.cache.covers(OuterBoard, other)
    world.cache._check()


def test_loads_at_the_same_time_are_counted_together(world: World) -> None:
    """Two loads that would fit one by one do not fit together."""
    size = 0
    for view in (OuterBoard, InnerBoard):
        world.cache.load(view)
        size += world.cache.stats(view).bytes
        world.cache.clear(view)
    limit(world, int(size * 0.8))
    held = Held(world.cache.table(OuterBoard), "loaded")
    first = Running(lambda: world.cache.load(OuterBoard))
    assert held.reached.wait(20)
    with pytest.raises(MemoryLimitExceeded, match="loads under way"):
        world.cache.load(InnerBoard)
    held.let_go()
    first.result()
    assert world.cache.stats(OuterBoard).records == MANY + 6
    world.cache._check()


def test_read_through_makes_room_for_itself_and_for_loads(world: World) -> None:
    """It gives up what was used least recently, and all of it before a load is refused."""
    world.cache.add(OuterBoard, policy=ReadThrough())
    world.cache.load(InnerBoard)
    held = world.cache.stats(InnerBoard).bytes
    world.cache.clear(InnerBoard)
    memory = limit(world, held + 20_000)
    for start in range(10, 100, 5):
        assert len(world.ids(OuterBoard.hour >= hour(start), OuterBoard.hour < hour(start + 5))) > 9
        world.cache._check()
    assert 0 < world.cache.stats(OuterBoard).bytes <= memory.limit
    world.cache.load(InnerBoard)
    assert world.cache.stats(InnerBoard).bytes + world.cache.stats(OuterBoard).bytes <= memory.limit
    world.cache._check()
    memory.limit = world.cache.stats(InnerBoard).bytes
    assert len(world.ids(OuterBoard.hour >= hour(10), OuterBoard.hour < hour(15))) > 9
    assert world.cache.stats(OuterBoard).records == 0


def test_refreshes_are_never_refused(world: World) -> None:
    """What is fresh outranks how much it is."""
    world.cache.load(OuterBoard, OuterBoard.hour < hour(5))
    limit(world, 10)
    with world.engine.begin() as connection:
        connection.execute(update(Flight).where(Flight.id == 1).values(delay=4.0))
        connection.execute(insert(Flight).values(flight(99, 3)))
    assert world.ids(OuterBoard.hour < hour(5)) == [1, 2, 3, 4, 5, 6, 99]
    world.cache._check()


def test_wrong_limits_are_refused() -> None:
    """A limit is a number of bytes, slots a number of loads."""
    for wrong in (0, -1, 1.5, True, "1 GB"):
        size: Any = wrong
        with pytest.raises(TableCacheError, match="memory_limit"):
            TableCache(memory_limit=size)
        with pytest.raises(TableCacheError, match="load_slots"):
            TableCache(load_slots=size)


# -- chunks --------------------------------------------------------------------------------------


def test_a_load_in_chunks_is_the_same_load(world: World) -> None:
    """One SELECT for so many records; what is covered in the end is what was asked for."""
    counted: list[int] = []
    world.cache.table(OuterBoard).set_up()
    with counting() as statements:
        world.cache.load(OuterBoard, OuterBoard.hour >= hour(0), chunk=700, progress=counted.append)
    assert selects(statements) == 5
    assert counted == sorted(counted)
    assert counted[-1] == MANY + 6
    assert world.cache.ready(OuterBoard)
    assert world.cache.covers(OuterBoard, OuterBoard.hour >= hour(0))
    assert world.cache.stats(OuterBoard).records == MANY + 6
    world.cache.load(OuterBoard, chunk=1_000)
    assert world.cache.covers(OuterBoard)
    world.cache.load(OuterBoard, OuterBoard.hour < hour(3), chunk=2)
    assert world.cache.stats(OuterBoard).records == 4
    world.cache._check()


def test_a_chunked_load_that_fails_goes_on_where_it_was(world: World) -> None:
    """Finished chunks stay; the rest is loaded by the same call again."""
    table = world.cache.table(OuterBoard)
    table.set_up()
    number = 0

    def fail(point: str) -> None:
        nonlocal number
        number += point == "loaded"
        if number == 3:
            raise OperationalError("SELECT", {}, Exception("the server is gone"))

    table._pause = fail  # type: ignore[method-assign]
    with pytest.raises(OperationalError):
        world.cache.extend(OuterBoard, OuterBoard.hour < hour(500), chunk=500)
    assert world.cache.stats(OuterBoard).records == 1_000
    assert not world.cache.ready(OuterBoard)
    world.cache._check()
    assert world.ids(OuterBoard.hour < hour(11)) == [*range(1, 7), *range(1_000, 1_030)]
    with counting() as statements:
        world.cache.extend(OuterBoard, OuterBoard.hour < hour(500), chunk=500)
    assert selects(statements) == 5
    assert world.cache.stats(OuterBoard).records == MANY + 6
    world.cache._check()


def test_chunks_see_what_is_committed_between_them(world: World) -> None:
    """Each is a snapshot of its own: rows that move from one part to another are not lost."""
    table = world.cache.table(OuterBoard)
    table.set_up()
    moved = False

    def move(point: str) -> None:
        nonlocal moved
        if point == "loaded" and not moved and table.stats().loads == 2:
            moved = True
            with world.engine.begin() as connection:
                connection.execute(update(Flight).where(Flight.id == 3_900).values(hour=hour(2.5)))
                connection.execute(update(Flight).where(Flight.id == 2).values(hour=hour(95)))

    table._pause = move  # type: ignore[method-assign]
    world.cache.load(OuterBoard, chunk=500)
    assert moved
    assert 3_900 in world.ids(OuterBoard.hour == hour(2.5))
    assert 2 in world.ids(OuterBoard.hour == hour(95))
    assert len(world.ids()) == MANY + 6
    world.cache._check()


def test_chunks_end_before_ties_that_cannot_be_told_apart(linguistic: Database) -> None:
    """Where the key does not sort in Python as in the database, equal scores stay together."""
    with flights_world(linguistic, PlaneEntity) as world:
        with counting() as statements:
            world.cache.load(PlaneEntity, PlaneEntity.year >= 1990, chunk=1)
        assert world.cache.stats(PlaneEntity).records == 2
        assert sum("plane_entity" in statement for statement in statements) >= 3
        world.cache._check()
        with pytest.raises(NotExpressible, match="in chunks"):
            world.cache.load(PlaneEntity, chunk=1)


@pytest.mark.parametrize("chunk", [0, -1, True, 2.5])
def test_wrong_chunks_are_refused(sqlite: Database, chunk: Any) -> None:
    """A chunk is a positive number of records."""
    with flights_world(sqlite) as world, pytest.raises(TableCacheError, match="chunk="):
        world.cache.load(OuterBoard, chunk=chunk)


# -- slots ---------------------------------------------------------------------------------------

HOLD = """
    import sys
    from sqlalchemy import create_engine
    from sa_tablecache.loading import Snapshots
    from sa_tablecache.slots import LoadSlots

    for line in sys.stdin:
        url, number = line.split()
        engine = create_engine(url)
        with LoadSlots(int(number)).open(Snapshots(engine), in_task=False):
            print("held", flush=True)
            sys.stdin.readline()
        engine.dispose()
        print("free", flush=True)
"""


class Process:
    """Another process that holds a load slot when it is told to."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HOLD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._out, self._in = self._process.stdout, self._process.stdin

    def hold(self, database: Database, number: int = 1) -> None:
        """Have it take one of so many slots."""
        url = database.url.render_as_string(hide_password=False)
        self._say(f"{url} {number}", "held")

    def free(self) -> None:
        """Have it give up the slot."""
        self._say("", "free")

    def _say(self, line: str, answer: str) -> None:
        self._in.write(line + "\n")
        self._in.flush()
        assert self._out.readline() == answer + "\n"

    def kill(self) -> None:
        """End it without a chance to give anything up."""
        self._process.kill()
        self._process.wait(20)
        self._in.close()
        self._out.close()


@pytest.fixture(scope="module")
def other() -> Iterator[Process]:
    """Another process."""
    process = Process()
    yield process
    process.kill()


@pytest.fixture
def slots(database: Database) -> Iterator[World]:
    """Six flights, and a cache that shares one load slot with other processes."""
    with flights_world(database, load_slots=1, slot_timeout=20.0) as world:
        yield world


@pytest.mark.every_database
def test_a_load_waits_for_another_process(slots: World, other: Process) -> None:
    """While another process holds the only slot the load waits; it goes on when that ends."""
    other.hold(slots.database)
    started = Running(lambda: slots.cache.load(OuterBoard))
    slots.cache.add(InnerBoard)
    slots.cache.table(InnerBoard).slots = LoadSlots(1, timeout=0.05)
    with pytest.raises(LoadSlotTimeout, match="slot_timeout"):
        slots.cache.load(InnerBoard)
    assert not slots.cache.ready(OuterBoard)
    other.free()
    started.result()
    assert slots.cache.stats(OuterBoard).records == 6
    slots.cache._check()


@pytest.mark.every_database
def test_a_slot_is_free_when_its_process_dies(slots: World) -> None:
    """A killed process holds nothing."""
    doomed = Process()
    doomed.hold(slots.database)
    doomed.kill()
    slots.cache.load(OuterBoard)
    assert slots.cache.stats(OuterBoard).records == 6


@pytest.mark.every_database
def test_as_many_loads_as_slots_run_at_a_time(slots: World, other: Process) -> None:
    """With two slots there is room for another process and for this one."""
    other.hold(slots.database, 2)
    slots.cache.table(OuterBoard).slots = LoadSlots(2, timeout=20.0)
    slots.cache.load(OuterBoard)
    assert slots.cache.stats(OuterBoard).records == 6
    other.free()


def test_a_slot_is_given_back_after_each_load(slots: World) -> None:
    """Loads one after another take one slot each time, failed ones too."""
    table = slots.cache.table(OuterBoard)

    def fail(point: str) -> None:
        raise RuntimeError("in the middle")

    slots.cache.load(OuterBoard, OuterBoard.hour < hour(1))
    table._pause = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="in the middle"):
        slots.cache.load(OuterBoard)
    del table._pause  # type: ignore[method-assign]
    slots.cache.load(OuterBoard, chunk=2)
    assert slots.cache.stats(OuterBoard).records == 6


@pytest.mark.every_database
def test_what_the_cache_asks_marks_nothing(database: Database) -> None:
    """Where the application's engine loads, the cache's own questions are not taken for writes."""
    with (
        database.lent_engine(pool_size=1, max_overflow=0) as engine,
        flights_world(database, load_engine=engine, load_slots=1) as world,
    ):
        cache = world.cache
        cache.attach(engine)
        cache.add(InnerBoard)
        cache.load(OuterBoard)
        cache.load(InnerBoard)  # whose catalog is asked when the other view has its records
        cache.refresh(OuterBoard)
        cache.estimate(OuterBoard)
        cache.check()
        for view in (OuterBoard, InnerBoard):
            stats = cache.stats(view)
            assert (stats.pending_marks, stats.marks) == (0, {}), view
        with cache.sessionmaker()() as session:
            session.execute(select(literal(1)))  # on the connection that the cache has used
            assert len(session.scalars(select(OuterBoard)).all()) == 6
            assert session.last_read.kind == "hit", session.last_read


async def test_tasks_wait_without_holding_up_the_loop(database: Database, other: Process) -> None:
    """A task that waits for a slot can be cancelled, and holds nothing then."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    cache = AsyncTableCache(engine, views=[OuterBoard], load_slots=1)
    other.hold(database)
    waiting = asyncio.create_task(cache.load(OuterBoard))
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    waiting = asyncio.create_task(cache.load(OuterBoard))
    await asyncio.sleep(0)
    other.free()
    await asyncio.wait_for(waiting, 20)
    assert cache.stats(OuterBoard).records == 6
    await cache.close()
    await engine.dispose()


def test_a_database_without_locks_is_refused(sqlite: Database) -> None:
    """Where nothing is known that could be a slot the error says so."""
    with flights_world(sqlite, load_slots=1) as world:
        table = world.cache.table(OuterBoard)
        table.set_up()
        snapshots: Any = table._snapshots
        original = snapshots.dialect

        class Other:
            name = "oracle"

        snapshots.dialect = Other()
        try:
            with pytest.raises(TableCacheError, match="not available on oracle"):
                world.cache.load(OuterBoard)
        finally:
            snapshots.dialect = original


def test_slots_are_locks_of_one_transaction(postgresql: Database) -> None:
    """On PostgreSQL the lock is held by the transaction that loads, as poolers need it."""
    held: list[tuple[int, int]] = []

    def look(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "outer_board" in statement:
            with postgresql.bystander() as other:
                held.extend(
                    other.exec_driver_sql(
                        "SELECT l.objid, count(*) FROM pg_locks l JOIN pg_stat_activity a USING"
                        " (pid) WHERE l.locktype = 'advisory' AND l.classid = 730146011"
                        " AND a.xact_start IS NOT NULL GROUP BY 1"
                    ).all()
                )

    with flights_world(postgresql, load_slots=1) as world:
        world.cache.table(OuterBoard).set_up()
        event.listen(Engine, "before_cursor_execute", look)
        try:
            world.cache.load(OuterBoard)
        finally:
            event.remove(Engine, "before_cursor_execute", look)
        with postgresql.bystander() as other:
            left = other.exec_driver_sql(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            ).scalar()
    assert held == [(0, 1)]
    assert left == 0
