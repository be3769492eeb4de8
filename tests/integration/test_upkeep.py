"""The upkeep of a cache: from when to when it runs, and what it survives on real servers."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, text, update

from sa_tablecache import AsyncTableCache, Closed, TableCache, Unbound, upkeep
from sa_tablecache.exc import TableCacheError
from tests.integration.databases import Database
from tests.integration.flights import flights_world, insert_flights
from tests.integration.test_feed import followed
from tests.postgres import Postgres
from tests.zoo import OuterBoard, Plane

SOON = 20.0


def until(happens: Any) -> None:
    """Wait until something is so."""
    end = time.monotonic() + SOON
    while not happens():
        assert time.monotonic() < end, "it never happened"
        threading.Event().wait(0.002)


def threads() -> list[str]:
    """Return the names of the threads of upkeeps."""
    return [t.name for t in threading.enumerate() if t.name.startswith("sa_tablecache")]


def test_entering_a_cache_starts_its_upkeep(database: Database) -> None:
    """It runs from there until the cache is closed, and is started once."""
    with database.lent_engine() as engine:
        cache = TableCache(engine, views=[OuterBoard], exclusive_writer=True)
        cache.upkeep.add("job", lambda: None)
        assert not cache.health().running
        with cache:
            assert threads() == ["sa_tablecache job"]
            until(lambda: cache.health().ok)
            with pytest.raises(TableCacheError, match="is running already: start it once"):
                cache.start()
        assert cache.closed
        assert threads() == []
        with pytest.raises(Closed):
            cache.start()


def test_a_cache_is_started_when_it_is_bound() -> None:
    """Before that nobody knows whether jobs are threads or tasks."""
    cache = TableCache(views=[OuterBoard], exclusive_writer=True)
    with pytest.raises(Unbound, match="not bound to an engine yet"):
        cache.start()
    with pytest.raises(Unbound), cache:
        pass
    assert not cache.health().running


async def test_entering_an_asynchronous_cache_starts_tasks(database: Database) -> None:
    """They are tasks of the loop in which it is entered; outside of one nothing can be started."""
    engine = database.async_engine()
    cache = AsyncTableCache(engine, views=[OuterBoard], exclusive_writer=True)
    cache.sync_cache.upkeep.add("job", lambda: None)
    with pytest.raises(TableCacheError, match="no event loop is running"):
        await asyncio.to_thread(cache.start)
    async with cache:
        assert cache.health().running
        assert "sa_tablecache job" in {t.get_name() for t in asyncio.all_tasks()}
        with pytest.raises(TableCacheError, match="is running already"):
            cache.start()
    assert "sa_tablecache job" not in {t.get_name() for t in asyncio.all_tasks()}
    assert threads() == []
    await engine.dispose()


@pytest.fixture
def administrator(postgres: Postgres) -> Iterator[Any]:
    """A connection to another database of the server, with all rights."""
    with postgres.database() as url:
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            yield connection
        engine.dispose()


def test_jobs_survive_an_outage_of_the_server(
    postgresql: Database,
    administrator: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Connections are cut and refused, and come back: one line at each end, and all goes on."""
    monkeypatch.setattr(upkeep, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(upkeep, "LONGEST_PAUSE", 0.02)
    caplog.set_level(logging.INFO, "sa_tablecache.upkeep")
    name = postgresql.url.database
    with followed(postgresql, poll_interval=0.01, max_lag=timedelta(seconds=60)) as world:
        world.cache.start()
        until(lambda: world.cache.health().ok)
        administrator.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        administrator.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
            {"name": name},
        )
        try:
            until(lambda: (world.cache.health().jobs["change feed"].failing or 0) > 0.1)
            failing = world.cache.health()
        finally:
            administrator.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        until(lambda: world.cache.health().ok)
        job = failing.jobs["change feed"]
        assert not failing.ok
        assert job.running
        assert "Error" in str(job.error)
        lines = [r.getMessage() for r in caplog.records if r.name == "sa_tablecache.upkeep"]
        mine = [line.split(",")[0] for line in lines if line.startswith("upkeep: change feed ")]
        assert mine == ["upkeep: change feed fails", "upkeep: change feed works again"]
        with world.outside() as session:
            session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
            session.commit()
        world.engine.dispose()  # what the application's pool has is cut, too

        def model() -> str:
            with world.Session() as session:
                return str(session.get(OuterBoard, 1).model)

        until(lambda: model() == "A380")


def test_closing_waits_for_no_step_that_hangs(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that waits for a lock of the database is left behind, and does no harm afterwards."""
    monkeypatch.setattr(upkeep.Upkeep.stop, "__defaults__", (0.05,))
    with flights_world(postgresql) as world:
        world.cache.load(OuterBoard)
        hanging = threading.Event()

        def hang() -> None:
            with world.cache.load_engine.connect() as connection:
                connection.detach()  # from a pool that will be gone
                hanging.set()
                connection.execute(text("SELECT pg_advisory_lock(4711)"))

        with postgresql.bystander() as bystander:
            bystander.execute(text("SELECT pg_advisory_lock(4711)"))
            world.cache.upkeep.add("hangs", hang)
            assert hanging.wait(SOON)
            started = time.monotonic()
            world.cache.close()
            assert time.monotonic() - started < SOON / 2
            assert "left behind: hangs" in caplog.text
            bystander.execute(text("SELECT pg_advisory_unlock(4711)"))
        until(lambda: threads() == [])


async def test_closing_cancels_a_task_that_hangs(postgresql: Database) -> None:
    """A task that waits for a lock of the database is cancelled, and its connection given back."""
    engine = postgresql.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    hanging = asyncio.Event()
    async with AsyncTableCache(engine, views=[OuterBoard], exclusive_writer=True) as cache:

        def hang() -> None:
            with cache.sync_cache.load_engine.connect() as connection:
                hanging.set()
                connection.execute(text("SELECT pg_advisory_lock(4712)"))

        async with engine.connect() as holder:
            await holder.execute(text("SELECT pg_advisory_lock(4712)"))
            cache.sync_cache.upkeep.add("hangs", hang)
            await asyncio.wait_for(hanging.wait(), SOON)
            await asyncio.wait_for(cache.close(), SOON)
            assert not cache.health().jobs["hangs"].running
    await engine.dispose()


def test_a_feed_is_followed_from_the_start(database: Database) -> None:
    """What others commit is seen by the jobs alone, without any reader."""
    with followed(database, poll_interval=0.01) as world:
        world.cache.start()
        with world.outside() as session:
            session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
            session.commit()
        until(lambda: world.cache.stats(OuterBoard).pending_marks)
        assert world.cache.health().feed is not None
