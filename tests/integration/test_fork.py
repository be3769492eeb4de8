"""Forked processes: what a child makes of an inherited cache, and that it harms no parent."""

import asyncio
import os
import pickle
import select as polling
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, timedelta
from typing import Any
from weakref import WeakSet

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.util import greenlet_spawn

from sa_tablecache import (
    AsyncTableCache,
    Everything,
    ReadThrough,
    SlidingWindow,
    TableCache,
    forks,
)
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour, ids, insert_flights
from tests.integration.pausing import Held, Running
from tests.integration.test_feed import followed as followed_world
from tests.zoo import InnerBoard, OuterBoard, Plane

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no forks")

SOON = 20.0


class Child:
    """A forked process that runs a function; commands go to it, results come from it."""

    def __init__(self, work: Callable[["Child"], Any]) -> None:
        self._results, results = os.pipe()
        commands, self._commands = os.pipe()
        with warnings.catch_warnings():
            # That other threads run is what these tests are about.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            try:
                self._results, self._commands = results, commands
                outcome: Any = (True, work(self))
            except BaseException:
                outcome = (False, traceback.format_exc())
            with os.fdopen(results, "wb") as pipe:
                pickle.dump(outcome, pipe)
            os._exit(0)
        os.close(results)
        os.close(commands)

    def say(self) -> None:
        """In the child: tell the parent to go on."""
        os.write(self._results, b"+")

    def listen(self) -> None:
        """In the child: wait until the parent says so."""
        assert polling.select([self._commands], [], [], SOON)[0], "the parent says nothing"
        os.read(self._commands, 1)

    def wait(self) -> None:
        """In the parent: wait until the child says so."""
        assert polling.select([self._results], [], [], SOON)[0], "the child says nothing"
        assert os.read(self._results, 1) == b"+"

    def go_on(self) -> None:
        """In the parent: tell the child to go on."""
        os.write(self._commands, b"+")

    def result(self) -> Any:
        """Wait for the end of the child, and return what its function returned."""
        with os.fdopen(self._results, "rb") as pipe:
            deadline = time.monotonic() + SOON
            if not polling.select([pipe], [], [], deadline - time.monotonic())[0]:
                os.kill(self.pid, 9)
            data = pipe.read()
        os.close(self._commands)
        _, status = os.waitpid(self.pid, 0)
        assert data, f"the child ended with {status} and said nothing"
        done, outcome = pickle.loads(data)
        if not done:
            pytest.fail(f"in the child:\n{outcome}")
        return outcome


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights, all of them cached, and a pool of the cache with a connection in it."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        yield world


def as_a_child(world: World) -> None:
    """Do what an application has to do in a forked child for its own engine."""
    world.engine.dispose(close=False)


def read(world: World) -> tuple[list[int], str]:
    """Return what a new session sees, and how it was answered."""
    with world.Session() as session:
        return ids(session.query(OuterBoard)), session.last_read.kind


def backend(world: World) -> Any:
    """Return what identifies the connection in the cache's own pool."""
    with world.cache.load_engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            return connection.scalar(text("SELECT pg_backend_pid()"))
        return id(connection.connection.driver_connection)


def commit_model(world: World, model: str) -> None:
    """Change what is shown of flights 1 and 4."""
    with world.Session() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model=model))
        session.commit()


def model_of(world: World) -> tuple[str, str]:
    """Return the model of flight 1, and how it was read."""
    with world.Session() as session:
        record = session.query(OuterBoard).filter(OuterBoard.id == 1).one()
        return record.model, session.last_read.kind


class Proving(TableCache):
    """A cache that could prove what it has inherited."""

    goes_on = True


# --- without a feed -------------------------------------------------------------------------------


def test_a_child_drops_what_it_cannot_prove(world: World) -> None:
    """Without a feed the child asks the database until it has loaded something itself."""
    before = backend(world)

    def work(child: Child) -> Any:
        as_a_child(world)
        reads = [read(world), world.cache.ready(OuterBoard)]
        commit_model(world, "B787")
        reads.append(model_of(world))
        world.cache.load(OuterBoard)
        reads += [read(world), model_of(world)]
        commit_model(world, "B797")
        reads += [model_of(world), world.cache.ready(OuterBoard)]
        world.cache._check()
        world.cache.close()
        return reads

    everything = [1, 2, 3, 4, 5, 6]
    assert Child(work).result() == [
        (everything, "miss"),
        False,
        ("B787", "miss"),
        (everything, "hit"),
        ("B787", "hit"),
        ("B797", "hit"),
        True,
    ]
    assert backend(world) == before, "the child has closed its parent's connection"
    with counting() as statements:
        assert read(world) == (everything, "hit")
    assert statements == []
    world.cache.invalidate(OuterBoard)
    assert model_of(world) == ("B797", "hit")
    world.cache._check()


def test_a_child_says_what_it_drops(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of the child names the views, and the way out."""
    # Caches of other tests may be alive still.
    monkeypatch.setattr(forks, "_watching", WeakSet([world.cache]))

    def work(child: Child) -> Any:
        return [r.getMessage() for r in caplog.records if r.name == "sa_tablecache.running"]

    (line,) = Child(work).result()
    assert line.startswith(
        "this process was forked, and drops the records that it inherited of Out"
    )
    assert "feed=ChangeFeed()" in line
    world.cache.clear(OuterBoard)
    caplog.clear()
    assert Child(work).result() == [], "there was nothing to drop"


def test_a_closed_cache_is_left_alone(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was closed before the fork is closed after it."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
    monkeypatch.setattr(forks, "_watching", WeakSet([world.cache]))
    caplog.clear()
    assert Child(lambda _: (world.cache.closed, len(caplog.records))).result() == (True, 0)


def test_a_pool_that_was_given_is_the_givers(database: Database) -> None:
    """The application disposes of its own engines in the child, `load_engine=` included."""
    with (
        database.lent_engine(pool_size=2) as load_engine,
        flights_world(database, load_engine=load_engine) as world,
    ):
        world.cache.load(OuterBoard)
        pool = load_engine.pool

        def work(child: Child) -> Any:
            untouched = load_engine.pool is pool
            as_a_child(world)
            load_engine.dispose(close=False)
            world.cache.load(OuterBoard)
            return untouched, read(world)

        assert Child(work).result() == (True, ([1, 2, 3, 4, 5, 6], "hit"))


# --- locks and what was under way -----------------------------------------------------------------


def held_lock(world: World) -> Callable[[], None]:
    """Have a thread hold the lock of a table; return how to let it go."""
    table = world.cache.table(OuterBoard)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with table._lock, world.cache._lock:
            held.set()
            assert go.wait(SOON)

    running = Running(hold)
    assert held.wait(SOON)

    def let_go() -> None:
        go.set()
        running.result()

    return let_go


def held_load(world: World) -> Callable[[], None]:
    """Have a thread load, and wait in the middle of it."""
    held = Held(world.cache.table(OuterBoard), "loaded")
    world.cache.evict(OuterBoard, OuterBoard.id == 3)
    running = Running(lambda: world.cache.load(OuterBoard))
    assert held.reached.wait(SOON)

    def let_go() -> None:
        held.let_go()
        running.result()

    return let_go


def held_refresh(world: World) -> Callable[[], None]:
    """Have a thread refresh, and wait in its snapshot."""
    held = Held(world.cache.table(OuterBoard), "snapshot")
    commit_model(world, "A380")
    running = Running(lambda: world.cache.refresh(OuterBoard))
    assert held.reached.wait(SOON)

    def let_go() -> None:
        held.let_go()
        running.result()

    return let_go


def held_set_up(world: World) -> Callable[[], None]:
    """Have a thread ask the catalog, and wait in the middle of it."""
    table = world.cache.table(OuterBoard)
    reached, go = threading.Event(), threading.Event()
    original = table._probed

    def probed() -> Any:
        found = original()
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert go.wait(SOON)
        return found

    table._probed = probed  # type: ignore[method-assign]
    table.doubtful = True
    running = Running(table._renewed)
    assert reached.wait(SOON)

    def let_go() -> None:
        go.set()
        running.result()

    return let_go


def held_commit(world: World) -> Callable[[], None]:
    """Leave a commit under way."""
    from sa_tablecache.changes import ChangeSet

    changes = ChangeSet(everything=True)
    lease = world.cache.lease(changes)
    return lambda: world.cache.publish(changes, lease)


def held_observer(world: World) -> Callable[[], None]:
    """Have a thread in the middle of telling listeners something."""
    observers = world.cache.table(OuterBoard).observers
    observers._telling.acquire()
    return observers._telling.release


WAYS = [held_lock, held_load, held_refresh, held_set_up, held_commit, held_observer]


@pytest.mark.parametrize("proven", [False, True])
@pytest.mark.parametrize("hold", WAYS)
def test_what_other_threads_were_doing_ends_in_the_parent(
    world: World, hold: Callable[[World], Callable[[], None]], proven: bool
) -> None:
    """No lock, turn, lease or load of a thread that the child lacks is waited for there."""
    let_go = hold(world)
    if proven:
        world.cache.__class__ = Proving

    def work(child: Child) -> Any:
        as_a_child(world)
        reads = [read(world)[0]]
        world.cache.load(OuterBoard)
        reads.append(read(world))
        commit_model(world, "B797")
        reads.append(model_of(world))
        world.cache._check()
        return reads

    everything = [1, 2, 3, 4, 5, 6]
    expected = [everything, (everything, "hit"), ("B797", "hit")]
    assert Child(work).result() == expected
    let_go()
    world.cache.invalidate(OuterBoard)
    world.cache.load(OuterBoard)
    assert read(world) == (everything, "hit")
    assert model_of(world)[0] == "B797"
    world.cache._check()


def test_a_child_does_not_wait_for_what_its_parent_was_reading(world: World) -> None:
    """Ranges that reads fill, and who is about to fill one, are the child's own in the child."""
    world.cache.clear(OuterBoard)
    world.cache.add(OuterBoard, policy=ReadThrough(max_records=4))
    early, late = OuterBoard.hour < hour(2), OuterBoard.hour >= hour(3)
    assert world.ids(early) == [1, 2, 3]
    held = Held(world.cache.table(OuterBoard), "loaded")
    reading = Running(lambda: world.ids(OuterBoard.id == 5))
    assert held.reached.wait(SOON)

    def work(child: Child) -> Any:
        as_a_child(world)
        del world.cache.table(OuterBoard)._pause
        reads = []
        for _ in range(2):
            with world.Session() as session:
                found = ids(session.query(OuterBoard).filter(OuterBoard.id == 5))
                reads.append((found, session.last_read.kind))
        reads.append(world.ids(late, OuterBoard.hour < hour(9)))
        world.cache._check()
        return reads

    assert Child(work).result() == [([5], "miss"), ([5], "hit"), [5, 6]]
    held.let_go()
    assert reading.result() == [5]
    world.cache._check()


def test_what_is_proven_is_kept(world: World) -> None:
    """Records, marks and readiness are kept if something tells the child of later changes."""
    world.cache.__class__ = Proving
    commit_model(world, "A380")

    def work(child: Child) -> Any:
        as_a_child(world)
        stats = world.cache.stats(OuterBoard)
        reads = [stats.records, stats.pending_marks, world.cache.ready(OuterBoard)]
        with world.Session() as session, counting() as statements:
            reads += [session.get(OuterBoard, 3).airline, len(statements)]
        return [*reads, model_of(world), world.cache.stats(OuterBoard).loads]

    assert Child(work).result() == [6, 1, True, "United", 0, ("A380", "hit"), 0]


# --- the upkeep -----------------------------------------------------------------------------------


def threads() -> list[str]:
    """Return the names of the threads of the upkeep."""
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("sa_tablecache"))


def test_the_upkeep_of_the_parent_runs_in_the_child_that_reads(world: World) -> None:
    """It starts at the first read, once, and the parent's goes on."""
    ran = threading.Event()

    def step() -> float:
        ran.set()
        return 1000.0

    world.cache.upkeep.add("job", step)
    assert ran.wait(SOON)

    def work(child: Child) -> Any:
        as_a_child(world)
        ran.clear()
        seen = [threads(), world.cache.upkeep.running]
        read(world)
        seen += [threads(), ran.wait(SOON), world.cache.health().running]
        read(world)
        seen += [threads(), len(world.cache.table(OuterBoard).guards)]
        world.cache.close()
        return [*seen, threads()]

    name = "sa_tablecache job"
    assert Child(work).result() == [[], False, [name], True, True, [name], 0, []]
    ran.clear()
    world.cache.upkeep.wake("job")
    assert ran.wait(SOON)
    assert threads() == [name]


def test_a_health_check_starts_it_too(world: World) -> None:
    """A child whose readiness decides whether it is asked anything does not wait to be asked."""
    world.cache.upkeep.add("job", lambda: None)

    def work(child: Child) -> Any:
        health = world.cache.health()
        return health.running, threads(), [r for r in health.reasons if "call cache.start" in r]

    assert Child(work).result() == (True, ["sa_tablecache job"], [])


def test_a_child_may_start_it_itself(world: World) -> None:
    """A hook of the server that calls `start()` in each worker is no second start."""
    world.cache.upkeep.add("job", lambda: None)

    def work(child: Child) -> Any:
        as_a_child(world)
        world.cache.start()
        read(world)
        return threads()

    assert Child(work).result() == ["sa_tablecache job"]


def test_an_upkeep_that_did_not_run_does_not_start(world: World) -> None:
    """What the parent has not started the child does not start either."""
    world.cache.upkeep.add("job", lambda: None)
    world.cache.upkeep.stop()

    def work(child: Child) -> Any:
        as_a_child(world)
        read(world)
        return threads(), world.cache.health().running

    assert Child(work).result() == ([], False)


def test_a_grandchild_is_a_child(world: World) -> None:
    """A forked child that forks does not take what is not its own either."""
    world.cache.upkeep.add("job", lambda: None)

    def work(child: Child) -> Any:
        as_a_child(world)
        world.cache.load(OuterBoard)

        def inner(_: Child) -> Any:
            as_a_child(world)
            return read(world), threads()

        return read(world), threads(), Child(inner).result(), read(world)

    everything, name = [1, 2, 3, 4, 5, 6], ["sa_tablecache job"]
    assert Child(work).result() == (
        (everything, "hit"),
        name,
        ((everything, "miss"), name),
        (everything, "hit"),
    )


# --- asyncio --------------------------------------------------------------------------------------


def test_an_asynchronous_cache_is_forked_between_loops(database: Database) -> None:
    """A server that preloads the application forks before its workers have their event loops."""
    engine = database.async_engine()
    cache = AsyncTableCache(engine, views=[OuterBoard])
    cache.sync_cache.upkeep.add("job", lambda: None)

    async def preload() -> None:
        async with engine.begin() as connection:
            await connection.run_sync(insert_flights)
        cache.start()
        await cache.load(OuterBoard)
        # What is open belongs to this loop, which ends.
        await greenlet_spawn(cache.sync_cache.load_engine.dispose)
        await engine.dispose()

    asyncio.run(preload())

    async def serve() -> Any:
        await engine.dispose(close=False)
        async with cache.sessionmaker()() as session:
            seen = [len((await session.scalars(select(OuterBoard))).all()), session.last_read.kind]
            await session.rollback()
            await cache.load(OuterBoard)
            seen += [len((await session.scalars(select(OuterBoard))).all())]
            seen.append(session.last_read.kind)
        names = [t.get_name() for t in asyncio.all_tasks()]
        seen.append("sa_tablecache job" in names)
        await cache.close()
        await engine.dispose()
        return seen

    assert Child(lambda _: asyncio.run(serve())).result() == [6, "miss", 6, "hit", True]
    cache.sync_cache.upkeep.stop()
    cache.sync_cache.close()


# --- with a feed ----------------------------------------------------------------------------------


@pytest.fixture
def followed(database: Database) -> Iterator[World]:
    """Six flights, all of them cached and followed by a change feed."""
    with followed_world(database) as world:
        world.cache.start()
        yield world


def test_a_child_goes_on_with_the_feed(followed: World) -> None:
    """It keeps what it inherits, sees what its parent commits, and is seen by it."""
    world = followed
    commit_model(world, "A330")
    assert model_of(world) == ("A330", "hit")
    commit_model(world, "A340")

    def work(child: Child) -> Any:
        as_a_child(world)
        seen: list[Any] = [world.cache.stats(OuterBoard).records]
        with world.Session() as session:
            seen += [session.get(OuterBoard, 3).airline, session.last_read.kind]
        seen.append(model_of(world))
        child.say()
        child.listen()
        world.cache.barrier()
        seen.append(model_of(world))
        commit_model(world, "A360")
        seen += [model_of(world), world.cache.stats(OuterBoard).loads]
        seen.append(world.cache.health().running)
        world.cache._check()
        world.cache.close()
        return seen

    child = Child(work)
    child.wait()
    commit_model(world, "A350")
    child.go_on()
    hits = [("A340", "hit"), ("A350", "hit"), ("A360", "hit")]
    assert child.result() == [6, "United", "hit", *hits, 0, True]
    world.cache.barrier()
    assert model_of(world) == ("A360", "hit")
    world.cache._check()


@pytest.mark.parametrize("published", [False, True])
def test_a_commit_that_was_under_way_is_told_by_the_feed(followed: World, published: bool) -> None:
    """A commit that the parent has made, and marked before or after the fork, is seen."""
    world = followed
    wrap = world.cache.publish
    forks: list[Child] = []

    def work(child: Child) -> Any:
        as_a_child(world)
        world.cache.barrier()
        return model_of(world), world.cache.stats(OuterBoard).leases

    def publish(changes: Any, lease: Any) -> None:
        if published:
            wrap(changes, lease)
        world.cache.__dict__.pop("publish")  # the child's own commits are published
        forks.append(Child(work))
        if not published:
            wrap(changes, lease)

    world.cache.publish = publish  # type: ignore[method-assign]
    commit_model(world, "A370")
    assert forks[0].result() == (("A370", "hit"), 0)
    assert model_of(world) == ("A370", "hit")


def test_the_inherited_position_may_be_trimmed_away(followed: World) -> None:
    """If what came after the position was trimmed, nothing of it is missed."""
    world = followed

    def work(child: Child) -> Any:
        as_a_child(world)
        child.say()
        child.listen()
        world.cache.barrier()
        return model_of(world)

    child = Child(work)
    child.wait()
    with world.outside() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A390"))
        session.commit()
    consumer = world.cache.consumer
    assert consumer is not None
    world.cache.barrier()
    with consumer.connect() as connection:
        consumer.changelog.trim(connection, 0.0)
    child.go_on()
    model, _ = child.result()
    assert model == "A390"


# --- policies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("proven", [False, True])
@pytest.mark.parametrize(
    "policy",
    [Everything(), ReadThrough(max_records=100), SlidingWindow("hour", past=timedelta(hours=9))],
    ids=lambda policy: type(policy).__name__,
)
def test_policies_go_on_in_a_child(database: Database, policy: Any, proven: bool) -> None:
    """What a policy knows, and was in the middle of, is not taken over; what it does is."""
    with flights_world(database, InnerBoard, memory_limit=2**30) as world:
        world.cache.clock = lambda: hour(5).replace(tzinfo=UTC)
        world.cache.upkeep.stop()
        world.cache.add(OuterBoard, policy=policy)
        read(world)
        read(world)
        table = world.cache.table(OuterBoard)
        keeper, memory = table.keeper, world.cache.memory
        assert memory is not None
        if proven:
            world.cache.__class__ = Proving
        memory._lock.__enter__()
        lock = getattr(keeper, "_lock", None)
        if lock is not None:
            lock.__enter__()

        def work(child: Child) -> Any:
            as_a_child(world)
            world.cache.start()
            while not world.cache.health().ok:
                time.sleep(0.001)
            reads = [read(world)[0], read(world)]
            commit_model(world, "B797")
            reads.append(model_of(world)[0])
            world.cache._check()
            world.cache.close()
            return reads

        try:
            everything = [1, 2, 3, 4, 5, 6]
            kind = "partial" if isinstance(policy, SlidingWindow) else "hit"
            assert Child(work).result() == [everything, (everything, kind), "B797"]
        finally:
            memory._lock.__exit__(None, None, None)
            if lock is not None:
                lock.__exit__(None, None, None)
        world.cache._check()
