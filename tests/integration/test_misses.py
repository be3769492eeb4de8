"""Reads that the cache cannot answer: by whom they are, and how many at a time."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event, select, update
from sqlalchemy.orm import sessionmaker

from sa_tablecache import AsyncTableCache, CacheUnavailable, bypass_cache
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour, ids, insert_flights
from tests.integration.test_protocol import Held, Running
from tests.zoo import OuterBoard, Plane

SOON = 20.0


class Strict(OuterBoard):
    """The board from memory, or not at all."""

    __on_miss__ = "raise"


class Patient(OuterBoard):
    """The board, for readers who wait for a load."""

    __on_miss__ = "wait"


class Bounded(OuterBoard):
    """The board, of which the database answers one read at a time."""

    __max_misses__ = 1


VIEWS = [OuterBoard, Strict, Patient, Bounded]
READS: dict[str, Any] = {
    "select": lambda s, v: s.scalars(select(v)).all(),
    "columns": lambda s, v: s.execute(select(v.id)).all(),
    "range": lambda s, v: s.range(v.by_hour),
    "get": lambda s, v: s.get(v, 3),
    "query": lambda s, v: s.query(v).all(),
}


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights; nothing is loaded."""
    with flights_world(database, *VIEWS) as world:
        yield world


@pytest.mark.parametrize("name", READS)
def test_a_view_may_refuse_what_it_does_not_hold(world: World, name: str) -> None:
    """With `__on_miss__ = "raise"` what the coverage lacks is an error that says the way out."""
    read = READS[name]
    with world.Session() as session:
        with pytest.raises(CacheUnavailable, match=r"Strict says __on_miss__ = 'raise'.* nothing"):
            read(session, Strict)
        assert session.last_read.kind == "miss"
        world.cache.load(Strict)
        session.rollback()
        read(session, Strict)
        assert session.last_read.kind == "hit"
    assert world.cache.stats(Strict).misses == 1


def test_what_is_the_databases_by_rule_is_not_refused(world: World) -> None:
    """Who asks for the database, or has written, is answered by it; gaps are fetched."""
    with world.Session() as session:
        assert len(session.scalars(select(Strict).options(bypass_cache())).all()) == 6
        world.cache.load(Strict, Strict.hour < hour(2))
        session.rollback()
        assert len(session.scalars(select(Strict)).all()) == 6
        assert session.last_read.kind == "partial"
        session.execute(update(Plane).values(model="X"))
        assert len(session.scalars(select(Strict)).all()) == 6
        assert session.last_read.kind == "bypass"
        session.rollback()
        with pytest.raises(CacheUnavailable, match="the coverage is"):
            session.scalars(select(Strict).where(Strict.hour > hour(2))).all()


@pytest.mark.parametrize("name", READS)
def test_a_reader_waits_for_a_load(world: World, name: str) -> None:
    """With `__on_miss__ = "wait"` a load that is under way answers, not the database."""
    held = Held(world.cache.table(Patient), "loaded")
    loading = Running(lambda: world.cache.load(Patient))
    assert held.reached.wait(SOON)
    waiting = threading.Event()
    table = world.cache.table(Patient)
    original = table.wait_for_load

    def wait_for_load() -> bool:
        waiting.set()
        return original()

    table.wait_for_load = wait_for_load  # type: ignore[method-assign]
    kinds = []

    def read() -> Any:
        with world.Session() as session:
            result = READS[name](session, Patient)
            kinds.append(session.last_read.kind)
            return result

    reading = Running(read)
    assert waiting.wait(SOON)
    assert kinds == []
    held.let_go()
    loading.result()
    assert reading.result()
    assert kinds == ["hit"]


def test_who_waits_in_vain_is_answered_by_the_database(world: World) -> None:
    """No load, one that fails, or one of something else: the database answers."""
    with world.Session() as session:
        assert len(session.scalars(select(Patient)).all()) == 6
        assert session.last_read.reason == "nothing is loaded"
    table = world.cache.table(Patient)
    reached, go = threading.Event(), threading.Event()

    def pause(point: str) -> None:
        reached.set()
        assert go.wait(SOON)
        raise ConnectionError("the load fails")

    table._pause = pause  # type: ignore[method-assign]
    loading = Running(lambda: world.cache.load(Patient))
    assert reached.wait(SOON)
    kinds = []

    def read() -> list[int]:
        with world.Session() as session:
            found = ids(session.query(Patient))
            kinds.append(session.last_read.kind)
            return found

    reading = Running(read)
    go.set()
    with pytest.raises(ConnectionError):
        loading.result()
    assert reading.result() == [1, 2, 3, 4, 5, 6]
    assert kinds == ["miss"]


# --- how many -------------------------------------------------------------------------------------


class Gate:
    """Holds the SELECTs of a view of all sessions until they are let go."""

    def __init__(self, world: World, name: str) -> None:
        self.reached = threading.Semaphore(0)
        self._go = threading.Event()
        self._name = name
        self._engine = world.engine

    def _hold(self, connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if self._name in statement:
            self.reached.release()
            assert self._go.wait(SOON)

    def let_go(self) -> None:
        """Let all of them go on."""
        self._go.set()

    def __enter__(self) -> "Gate":
        event.listen(self._engine, "before_cursor_execute", self._hold)
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()
        event.remove(self._engine, "before_cursor_execute", self._hold)


@pytest.mark.parametrize("name", READS)
def test_the_database_answers_so_many_misses_at_a_time(world: World, name: str) -> None:
    """One more is refused at once; when they are over the next is answered."""

    def read() -> Any:
        with world.Session() as session:
            return READS[name](session, Bounded)

    refused = pytest.raises(CacheUnavailable, match=r"answering 1 reads of Bounded .* is 1: try")
    with Gate(world, "bounded") as gate:
        first = Running(read)
        assert gate.reached.acquire(timeout=SOON)
        with refused:
            read()
        with world.Session() as session:  # other views are not concerned
            assert len(session.scalars(select(OuterBoard)).all()) == 6
        gate.let_go()
        assert first.result()
    assert read()
    world.cache.load(Bounded)
    assert read()


def test_reads_by_rule_do_not_count(world: World) -> None:
    """What nobody could do without the database is not bounded."""

    def miss() -> Any:
        with world.Session() as session:
            return session.scalars(select(Bounded)).all()

    def by_rule() -> Any:
        with world.Session() as session:
            return session.scalars(select(Bounded).options(bypass_cache())).all()

    with Gate(world, "bounded") as gate:
        misses, rule = Running(miss), Running(by_rule)
        for _ in range(2):
            assert gate.reached.acquire(timeout=SOON)
        gate.let_go()
        assert len(misses.result()) == len(rule.result()) == 6


def test_a_miss_that_fails_gives_its_place_back(world: World) -> None:
    """An error of the database ends a miss, as an answer does."""

    def fail(*_: Any) -> None:
        raise ConnectionError("gone")

    event.listen(world.engine, "before_cursor_execute", fail)
    for _ in range(3):
        with world.Session() as session, pytest.raises(ConnectionError):
            session.scalars(select(Bounded)).all()
    event.remove(world.engine, "before_cursor_execute", fail)
    with world.Session() as session:
        assert len(session.scalars(select(Bounded)).all()) == 6


def test_fetching_gaps_counts(world: World) -> None:
    """A part that is fetched is a read that the database answers, too."""
    world.cache.load(Bounded, Bounded.hour < hour(2))

    def read() -> Any:
        with world.Session() as session:
            return session.range(Bounded.by_hour), session.last_read.kind

    with Gate(world, "bounded") as gate:
        first = Running(read)
        assert gate.reached.acquire(timeout=SOON)
        with pytest.raises(CacheUnavailable):
            read()
        with world.Session() as session, pytest.raises(CacheUnavailable):
            session.scalars(select(Bounded)).all()
        gate.let_go()
        records, kind = first.result()
    assert (len(records), kind) == (6, "partial")


def test_sessions_of_the_application_are_bounded_too(world: World) -> None:
    """A plain session that is attached waits, is refused and is bounded as the cache's own are."""
    factory = sessionmaker(world.engine)
    world.cache.attach(factory)
    with factory() as session, pytest.raises(CacheUnavailable, match="Strict"):
        session.scalars(select(Strict)).all()
    with factory() as session:
        assert len(session.scalars(select(Bounded)).all()) == 6
        assert len(session.scalars(select(Patient)).all()) == 6


async def test_tasks_wait_and_are_bounded(database: Database) -> None:
    """In tasks a waiting reader blocks nobody, and a cancelled miss gives its place back."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    async with AsyncTableCache(engine, views=VIEWS) as cache:
        Session = cache.sessionmaker()
        table = cache.sync_cache.table(Patient)
        with table._loading:  # a load is under way
            async with Session() as session:
                reading = asyncio.create_task(session.scalars(select(Patient)))
                await asyncio.sleep(0.01)
                assert not reading.done()
                table._loading.__exit__(None, None, None)
                assert len((await reading).all()) == 6
            table._loading.__enter__()
        async with Session() as session:
            with pytest.raises(CacheUnavailable):
                await session.range(Strict.by_hour)
        async with Session() as session:
            reading = asyncio.create_task(session.scalars(select(Bounded)))
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        async with Session() as session:
            assert len((await session.scalars(select(Bounded))).all()) == 6
        misses = cache.sync_cache.table(Bounded).misses
        assert misses._underway == 0
        with misses.slot():
            async with Session() as session:
                with pytest.raises(CacheUnavailable):
                    await session.scalars(select(Bounded))
    await engine.dispose()
