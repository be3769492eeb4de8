"""Notifications of PostgreSQL: heard soon, heard again after a loss, and no more than a hint."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import greenlet_spawn

from sa_tablecache import TableCacheError
from sa_tablecache import upkeep as upkeep_module
from sa_tablecache.feed.postgresql import PostgreSQLChangelog
from sa_tablecache.feed.wakeup import Listener
from sa_tablecache.upkeep import Upkeep

SECONDS = 20.0
"""How long something may take that comes at once on a machine that has nothing else to do."""

LISTENERS = """
    SELECT pid, state, xact_start FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND query IN ('LISTEN sa_tablecache', 'LISTEN "sa_tablecache"', 'LISTEN sa_tablecache;', 'SELECT 1')
    """  # noqa: E501


@pytest.fixture
def writer(postgres_module_url: URL) -> Iterator[Connection]:
    """A connection that notifies."""
    engine = create_engine(postgres_module_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def listeners(writer: Connection, count: int) -> list[Any]:
    """Return what the server says of the connections that listen, once there are so many."""
    found: list[Any] = []
    for _ in range(3000):
        found = list(writer.exec_driver_sql(LISTENERS).all())
        if len(found) == count:
            break
    assert len(found) == count
    return found


def kill(writer: Connection) -> None:
    """End the connection that listens."""
    ((pid, _, _),) = listeners(writer, 1)
    writer.exec_driver_sql(f"SELECT pg_terminate_backend({pid})")


def notify(writer: Connection) -> None:
    """Notify, as a cache does after a commit."""
    PostgreSQLChangelog().notify(writer)


# --- in a thread ----------------------------------------------------------------------------------


@pytest.fixture(params=["psycopg", "psycopg2"])
def engine(request: pytest.FixtureRequest, postgres_module_url: URL) -> Iterator[Engine]:
    """An engine with a pool of one connection."""
    pytest.importorskip(request.param)
    url = postgres_module_url.set(drivername=f"postgresql+{request.param}")
    engine = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=SECONDS)
    yield engine
    engine.dispose()


class Thread:
    """A listener in the thread of an upkeep, and what it has heard."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.heard: SimpleQueue[None] = SimpleQueue()
        self.listener = Listener(engine, lambda: self.heard.put(None), **options)
        self.upkeep = Upkeep()
        self.upkeep.add("listen", self.listener.step)
        self.upkeep.start()
        self.heard.get(timeout=SECONDS)  # when it has connected

    def stop(self) -> None:
        """Stop in the order in which a cache does."""
        self.listener.stop()
        self.upkeep.stop()


@pytest.fixture
def start(engine: Engine) -> Iterator[Callable[..., Thread]]:
    """Start listeners, and stop them in the end."""
    started: list[Thread] = []

    def start(**options: Any) -> Thread:
        started.append(Thread(engine, **options))
        return started[-1]

    yield start
    for thread in started:
        thread.stop()


def test_a_thread_hears(engine: Engine, start: Callable[..., Thread], writer: Connection) -> None:
    """Each notification is heard, outside of any transaction and beside the pool."""
    thread = start()
    for _ in range(3):
        notify(writer)
        thread.heard.get(timeout=SECONDS)
    ((_, state, transaction),) = listeners(writer, 1)
    assert (state, transaction) == ("idle", None)
    with engine.connect():  # the only one of the pool
        assert thread.listener.listening
    writer.exec_driver_sql("NOTIFY other")
    notify(writer)
    thread.heard.get(timeout=SECONDS)
    assert thread.heard.empty()


def test_a_thread_that_is_cut_off_hears_again(
    start: Callable[..., Thread], writer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It connects again, and says so as if it had heard: something may have been lost meanwhile."""
    monkeypatch.setattr(upkeep_module, "FIRST_PAUSE", 0.01)
    thread = start()
    for _ in range(2):
        kill(writer)
        thread.heard.get(timeout=SECONDS)
        notify(writer)
        thread.heard.get(timeout=SECONDS)
    assert thread.upkeep.health()["listen"].failing is None


def test_silence_is_tried(start: Callable[..., Thread], writer: Connection) -> None:
    """After a while of silence a statement finds out whether the connection is still there."""
    thread = start(keepalive=0.01)
    thread.heard.get(timeout=SECONDS)
    thread.heard.get(timeout=SECONDS)
    ((_, state, transaction),) = listeners(writer, 1)
    assert transaction is None or state == "active"


def test_a_thread_stops_at_once(start: Callable[..., Thread], writer: Connection) -> None:
    """Stopping does not wait for a notification, and leaves no connection."""
    thread = start(keepalive=1000.0)
    thread.stop()
    assert not thread.listener.listening
    assert listeners(writer, 0) == []
    assert thread.listener.step() is None


def test_other_drivers_poll_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing can be heard, that is said once, and the job goes to sleep."""
    listener = Listener(create_engine("sqlite://"), list)
    with caplog.at_level(logging.WARNING):
        assert listener.step() is None
        assert listener.step() is None
    assert [r.message for r in caplog.records if "through the driver pysqlite" in r.message] != []
    assert len(caplog.records) == 1
    listener.stop()


def test_a_server_that_cannot_be_reached_is_an_error(tmp_path: Any) -> None:
    """An error of the connection reaches the upkeep, which tries again."""
    engine = create_engine(f"postgresql+psycopg://nobody@/none?host={tmp_path}")
    listener = Listener(engine, list)
    with pytest.raises(Exception, match="No such file"):
        listener.step()
    assert not listener.listening


async def test_the_engine_is_of_the_kind_of_the_cache(engine: Engine) -> None:
    """A thread cannot wait for a task, and an event loop must not wait for a socket."""
    with pytest.raises(TableCacheError, match=r"has to be an asynchronous engine.* a synchronous"):
        await greenlet_spawn(Listener(engine, list).step)
    asynchronous = create_async_engine(engine.url.set(drivername="postgresql+asyncpg"))
    with pytest.raises(TableCacheError, match=r"has to be a synchronous engine.* an asynchronous"):
        Listener(asynchronous.sync_engine, list).step()
    await asynchronous.dispose()


# --- in a task ------------------------------------------------------------------------------------


@pytest.fixture(params=["asyncpg", "psycopg"])
async def async_engine(
    request: pytest.FixtureRequest, postgres_module_url: URL
) -> AsyncIterator[AsyncEngine]:
    """An engine with a pool of one connection."""
    url = postgres_module_url.set(drivername=f"postgresql+{request.param}")
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=SECONDS)
    yield engine
    await engine.dispose()


class Task:
    """A listener in the task of an upkeep, and what it has heard."""

    def __init__(self, engine: AsyncEngine, **options: Any) -> None:
        self.heard: asyncio.Queue[None] = asyncio.Queue()
        self.listener = Listener(engine.sync_engine, lambda: self.heard.put_nowait(None), **options)
        self.upkeep = Upkeep()
        self.upkeep.add("listen", self.listener.step)

    async def __aenter__(self) -> Task:
        self.upkeep.start(in_task=True)
        await self.next()
        return self

    async def next(self) -> None:
        """Wait until it hears something."""
        await asyncio.wait_for(self.heard.get(), SECONDS)

    async def __aexit__(self, *_: Any) -> None:
        self.listener.stop()
        await greenlet_spawn(self.upkeep.stop)


async def test_a_task_hears(async_engine: AsyncEngine, writer: Connection) -> None:
    """Each notification is heard, outside of any transaction and beside the pool."""
    async with Task(async_engine, keepalive=1000.0) as task:
        for _ in range(3):
            notify(writer)
            await task.next()
        ((_, state, transaction),) = listeners(writer, 1)
        assert (state, transaction) == ("idle", None)
        async with async_engine.connect():
            assert task.listener.listening
        writer.exec_driver_sql("NOTIFY other")
        notify(writer)
        await task.next()
        assert task.heard.empty()
    assert listeners(writer, 0) == []


async def test_a_task_that_is_cut_off_hears_again(
    async_engine: AsyncEngine, writer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It connects again, and says so as if it had heard: something may have been lost meanwhile."""
    monkeypatch.setattr(upkeep_module, "FIRST_PAUSE", 0.01)
    async with Task(async_engine) as task:
        for _ in range(2):
            kill(writer)
            await task.next()
            notify(writer)
            await task.next()


async def test_silence_is_tried_in_a_task(async_engine: AsyncEngine, writer: Connection) -> None:
    """After a while of silence a statement finds out whether the connection is still there."""
    async with Task(async_engine, keepalive=0.01) as task:
        await task.next()
        await task.next()
        notify(writer)
        await task.next()


async def test_a_task_that_is_cancelled_leaves_nothing(
    async_engine: AsyncEngine, writer: Connection
) -> None:
    """Cancelled while it waits, it gives up its connection."""
    async with Task(async_engine, keepalive=1000.0) as task:
        await greenlet_spawn(task.upkeep.stop)
        await greenlet_spawn(task.listener.stop)
        assert not task.listener.listening
        assert listeners(writer, 0) == []
