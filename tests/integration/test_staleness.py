"""Answers beside marks, for who allows it; refreshes behind them and right after commits."""

import asyncio
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, event, insert, select, update

from sa_tablecache import AsyncTableCache, CachedView, freshness, max_staleness
from sa_tablecache.changes import ChangeSet
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world, hour, ids, insert_flights
from tests.integration.test_protocol import Running
from tests.integration.test_reading import READS as READS_OF_THE_BOARD
from tests.zoo import Flight, OuterBoard, Plane

SOON = 20.0


class Lenient(OuterBoard):
    """The board for readers who may see it as it was an hour ago."""

    __max_staleness__ = timedelta(hours=1)


class Frozen(OuterBoard):
    """The board as it was when it was loaded."""

    __max_staleness__ = timedelta.max


class Eager(OuterBoard):
    """The board, read again right after commits."""

    __refresh__ = "eager"


VIEWS = [OuterBoard, Lenient, Frozen, Eager]


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights in four views, all of them cached; the upkeep does not run."""
    with flights_world(database, *VIEWS) as world:
        world.cache.upkeep.stop()
        for view in VIEWS:
            world.cache.load(view)
        yield world


class Clock:
    """The clock by which marks age."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(freshness, "time", self)

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still unless it is set."""
    return Clock(monkeypatch)


def paint(world: World, model: str = "A380") -> None:
    """Change what is only shown of flights 1 and 4."""
    with world.Session() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model=model))
        session.commit()


def models(session: Any, view: Any, *options: Any) -> set[str]:
    """Return the models that a session sees of plane N1."""
    statement = select(view.model).where(view.tailnum == "N1").options(*options)
    return set(session.scalars(statement))


class Refreshed:
    """What `after_refresh` tells of one view, to be waited for."""

    def __init__(self, view: Any) -> None:
        self.view = view
        self._happened = threading.Semaphore(0)

    def __enter__(self) -> "Refreshed":
        event.listen(self.view, "after_refresh", self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(self.view, "after_refresh", self._tell)

    def _tell(self, view: Any, added: Any, changed: Any, removed: Any) -> None:
        self._happened.release()

    def wait(self) -> None:
        """Wait for one more refresh that changed something."""
        assert self._happened.acquire(timeout=SOON)


READS = {
    name: read for name, read in READS_OF_THE_BOARD.items() if name not in ("query", "get nothing")
}


@pytest.mark.parametrize("moves", [False, True])
def test_marked_records_are_given_while_the_marks_are_young(world: World, moves: bool) -> None:
    """A view that says how stale it may be is answered from memory beside marks."""
    if moves:
        with world.Session() as session:
            session.execute(insert(Flight), [flight(7, 0.5, "AA", "N1")])
            session.execute(delete(Flight).where(Flight.id == 1))
            session.commit()
    else:
        paint(world)
    with world.Session() as session, counting() as statements:
        assert models(session, Lenient) == {"A320"}
        assert session.last_read.kind == "hit"
        assert session.last_read.reason.startswith("beside marks that are 0.")
        assert ids(session.range(Lenient.by_plane, "N1")) == [1, 4]
        assert session.last_read.reason.startswith("beside marks")
        assert session.get(Lenient, 1).model == "A320"
        assert session.query(Lenient).count() == 6
    assert statements == []
    stats = world.cache.stats(Lenient)
    assert stats.reasons["stale"] == 4
    assert stats.hits_with_refresh == 0
    with world.Session() as session:
        assert models(session, OuterBoard) == ({"A320"} if moves else {"A380"})
        assert ids(session.range(OuterBoard.by_plane, "N1")) == ([4, 7] if moves else [1, 4])
        assert session.last_read.reason in ("", "after a refresh of what was marked")


def test_a_session_that_wants_a_barrier_is_given_nothing_stale(world: World) -> None:
    """What a session asks for outranks what the view allows, and is outranked by the statement."""
    paint(world)
    with world.cache.sessionmaker(freshness="barrier")() as session:
        assert models(session, Lenient, max_staleness(timedelta(hours=1))) == {"A320"}
        assert models(session, Lenient) == {"A380"}
    paint(world, "A390")
    with world.cache.sessionmaker(freshness="barrier")() as session:
        assert session.range(Lenient.by_plane, "N1")[0].model == "A390"


def test_marks_that_are_too_old_are_read_again(world: World, clock: Clock) -> None:
    """The first reader who finds a mark older than it allows refreshes."""
    paint(world)
    clock.now += 3599
    with world.Session() as session:
        assert models(session, Lenient) == {"A320"}
        clock.now += 1
        assert models(session, Lenient) == {"A380"}
        assert session.last_read.reason == "after a refresh of what was marked"


def test_the_oldest_mark_counts(world: World, clock: Clock) -> None:
    """Marks that come later do not make the first younger, nor is it taken for them when gone."""
    paint(world, "A1")
    clock.now += 3000
    paint(world, "A2")
    with world.Session() as session:
        clock.now += 500
        assert models(session, Lenient) == {"A320"}
        clock.now += 100
        assert models(session, Lenient) == {"A2"}
        paint(world, "A3")
        clock.now += 3500
        assert models(session, Lenient) == {"A2"}


def test_a_statement_says_how_stale_it_may_be(world: World, clock: Clock) -> None:
    """`max_staleness()` says it for one statement, and outranks the view's word."""
    paint(world)
    clock.now += 10
    with world.Session() as session:
        seconds = [max_staleness(timedelta(seconds=s)) for s in (0, 9, 11)]
        assert models(session, OuterBoard, seconds[2]) == {"A320"}
        assert models(session, OuterBoard, seconds[1]) == {"A380"}
        assert models(session, OuterBoard, seconds[2]) == {"A380"}
        assert session.last_read.reason == ""
        assert models(session, Lenient) == {"A320"}
        assert models(session, Lenient, seconds[0]) == {"A380"}


@pytest.mark.parametrize("running", [False, True])
def test_what_is_frozen_is_read_again_on_demand_alone(
    world: World, clock: Clock, running: bool
) -> None:
    """`timedelta.max` has the records as they are until `cache.refresh()`."""
    if running:
        world.cache.start()
    paint(world)
    clock.now += 10**9
    with world.Session() as session:
        assert models(session, Frozen) == {"A320"}
        assert models(session, OuterBoard, max_staleness(timedelta.max)) == {"A320"}
        assert not any("Frozen" in name for name in world.cache.health().jobs)
        world.cache.refresh(Frozen)
        assert models(session, Frozen) == {"A380"}
    assert world.cache.health().ok == running  # eager views want an upkeep that runs


def test_own_writes_are_seen(world: World) -> None:
    """Who has written, and not committed, is answered by the database."""
    paint(world, "A350")
    with world.Session() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="B787"))
        assert models(session, Lenient) == {"B787"}
        assert session.last_read.reason == "the transaction wrote a table of the view"
        session.rollback()
        assert models(session, Lenient) == {"A320"}


def test_a_commit_under_way_counts_from_its_lease(world: World, clock: Clock) -> None:
    """From when a COMMIT was sent others may have seen what it changes."""
    changes = ChangeSet()
    changes.add_table((None, "flight"))
    tables = world.cache.table(Lenient).tables
    changes.tables = set(tables)
    lease = world.cache.lease(changes)
    with world.Session() as session, counting() as statements:
        clock.now += 3599
        assert models(session, Lenient) == {"A320"}
        assert statements == []
        world.cache.publish(changes, lease)
        clock.now += 1
        models(session, Lenient)
        assert session.last_read.reason == "after a refresh of what was marked"
        lease = world.cache.lease(changes)
        clock.now += 3600
        models(session, Lenient)
        assert session.last_read.reason == "a commit is under way"
    world.cache.publish(changes, lease)


def test_gaps_are_not_merged_with_stale_records(world: World) -> None:
    """An answer of which a part is fetched has no other part that is stale."""
    world.cache.load(Lenient, Lenient.hour < hour(2))
    paint(world)
    with world.Session() as session:
        assert models(session, Lenient) == {"A380"}
        assert session.last_read.kind == "partial"
        session.rollback()
        paint(world, "A390")
        assert {
            r.model for r in session.range(Lenient.by_hour, lt=hour(3)) if r.tailnum == "N1"
        } == {"A390"}
        assert session.last_read.kind == "partial"


def test_a_stale_answer_is_refreshed_behind(world: World) -> None:
    """Where the upkeep runs, it reads again what a reader was given beside marks."""
    world.cache.start()
    with Refreshed(Lenient) as refreshed, world.Session() as session:
        for earlier, later in [("A320", "A330"), ("A330", "A340")]:
            paint(world, later)
            assert models(session, Lenient) == {earlier}
            refreshed.wait()
            session.rollback()
            with counting() as statements:
                assert models(session, Lenient) == {later}
                assert session.last_read == ("hit", "", Lenient)
            assert statements == []
    assert world.cache.health().ok


def test_an_explanation_tells_of_it(world: World) -> None:
    """`explain()` says how old the marks are, and wakes nobody."""
    paint(world)
    told = world.cache.explain(select(Lenient))
    assert told.kind == "hit"
    assert told.reason.startswith("beside marks that are")
    told = world.cache.explain(select(OuterBoard))
    assert told.reason == "after a refresh of what is marked"


@pytest.mark.parametrize("name", READS)
def test_every_read_may_be_stale(world: World, name: str) -> None:
    """Whatever the call, a view that says so is answered beside marks, without a statement."""
    with world.Session() as session:
        before = repr(READS[name](session))
        paint(world)
        world.cache.invalidate(OuterBoard)
    patched = OuterBoard.__max_staleness__
    OuterBoard.__max_staleness__ = timedelta(hours=1)
    try:
        with world.Session() as session, counting() as statements:
            assert repr(READS[name](session)) == before
            assert session.last_read.kind == "hit"
            assert statements == []
    finally:
        OuterBoard.__max_staleness__ = patched


# --- eager ----------------------------------------------------------------------------------------


def test_an_eager_view_is_refreshed_after_the_commit(world: World) -> None:
    """The upkeep reads again what a commit marked before any reader comes."""
    world.cache.start()
    with Refreshed(Eager) as refreshed, world.Session() as session:
        for model in ("A330", "A340"):
            paint(world, model)
            refreshed.wait()
            with counting() as statements:
                assert models(session, Eager) == {model}
                assert session.last_read == ("hit", "", Eager)
            assert statements == []
            session.rollback()
    with Refreshed(Eager) as refreshed:
        with world.Session() as session:
            session.execute(insert(Flight), [flight(7, 0.5, "AA", "N1")])
            session.commit()
        refreshed.wait()


def test_an_eager_view_without_upkeep_is_lazy(world: World) -> None:
    """Nobody refreshes but the first reader; the health says that something is to be started."""
    paint(world)
    assert world.cache.stats(Eager).pending_marks == 1
    with world.Session() as session:
        assert models(session, Eager) == {"A380"}
    (reason,) = world.cache.health().reasons
    assert reason.startswith("nothing runs refresh of Eager")


def test_an_eager_view_survives_an_outage(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refresh that fails is tried again by the upkeep, and logged once."""
    from sa_tablecache import upkeep

    monkeypatch.setattr(upkeep, "FIRST_PAUSE", 0.01)
    world.cache.start()
    engine = world.cache.load_engine
    failures = []

    def fail(*_: Any) -> None:
        failures.append(1)
        if len(failures) < 4:
            raise ConnectionError("no route to host")
        event.remove(engine, "engine_connect", fail)

    with Refreshed(Eager) as refreshed:
        event.listen(engine, "engine_connect", fail)
        paint(world)
        refreshed.wait()
    while not world.cache.health().ok:  # until the step is over
        threading.Event().wait(0.001)
    assert len(failures) == 4
    warnings = [r.getMessage() for r in caplog.records if r.name == "sa_tablecache.upkeep"]
    assert len(warnings) == 2
    assert "ConnectionError: no route to host" in warnings[0]


async def test_tasks_refresh_too(database: Database) -> None:
    """Behind stale answers and after commits, an asynchronous cache refreshes in tasks."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    loop = asyncio.get_running_loop()
    happened: dict[Any, asyncio.Event] = {Lenient: asyncio.Event(), Eager: asyncio.Event()}

    def tell(view: type[CachedView], *_: Any) -> None:
        loop.call_soon(happened[view].set)

    async with AsyncTableCache(engine, views=[Lenient, Eager]) as cache:
        for view in happened:
            await cache.load(view)
            event.listen(view, "after_refresh", tell)
        try:
            async with cache.sessionmaker()() as session:
                await session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="X"))
                await session.commit()
                await asyncio.wait_for(happened[Eager].wait(), SOON)
                with counting() as statements:
                    stale = await session.scalars(select(Lenient.model).where(Lenient.id == 1))
                    assert stale.all() == ["A320"]
                    assert await session.range(Lenient.by_hour, lt=hour(1))
                    assert session.last_read.reason.startswith("beside marks")
                assert statements == []
                await asyncio.wait_for(happened[Lenient].wait(), SOON)
                fresh = await session.scalars(select(Lenient.model).where(Lenient.id == 1))
                assert fresh.all() == ["X"]
            assert cache.health().ok
        finally:
            for view in happened:
                event.remove(view, "after_refresh", tell)
    await engine.dispose()


# --- many at once ---------------------------------------------------------------------------------


class Counted(OuterBoard):
    """The board for readers who may see it as it was a moment ago."""

    __max_staleness__ = timedelta(milliseconds=15)


@pytest.mark.parametrize("running", [False, True])
def test_no_answer_is_older_than_allowed(postgresql: Database, running: bool) -> None:
    """Under load a reader misses no commit that had ended longer ago than it allows."""
    allowed = 0.015
    with flights_world(postgresql, Counted) as world:
        if not running:
            world.cache.upkeep.stop()
        world.cache.load(Counted)
        ended: list[float] = []
        over = threading.Event()

        def write() -> None:
            with world.Session() as session:
                for number in range(80):
                    session.execute(
                        update(Plane).where(Plane.tailnum == "N1").values(year=3000 + number)
                    )
                    session.commit()
                    ended.append(time.monotonic())
            over.set()

        def read() -> int:
            stale = 0
            with world.Session() as session:
                while not over.is_set():
                    started = time.monotonic()
                    known = bisect_left(ended, started - allowed)
                    year = session.get(Counted, 1).year
                    stale += "beside marks" in session.last_read.reason
                    session.rollback()
                    assert known == 0 or year >= 2999 + known
            return stale

        writer = Running(write)
        readers = [Running(read) for _ in range(2)]
        writer.result()
        assert sum(reader.result() for reader in readers) > 0
        world.cache._check()
