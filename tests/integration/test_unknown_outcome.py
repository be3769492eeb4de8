"""COMMITs of which nobody hears how they end: the cache converges to whatever became of them.

A deferred trigger holds COMMIT in the server, on a lock that the test lets go: deterministically.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import URL, Connection, create_engine, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sa_tablecache import AsyncTableCache, CachedView, ScoreIndex, TableCache
from tests.conftest import asynchronous
from tests.integration.test_protocol import Running

LOCK = 4711


class Base(DeclarativeBase):
    """Models of these tests."""


class Account(Base):
    """A row whose COMMIT can be held."""

    __tablename__ = "outcome_account"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Balances(CachedView):
    """All accounts."""

    __select__ = select(Account.id, Account.balance)
    by_balance = ScoreIndex("balance")


TRIGGER = f"""
    CREATE FUNCTION outcome_wait() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_advisory_xact_lock_shared({LOCK}); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER outcome_wait AFTER UPDATE ON outcome_account
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION outcome_wait();
"""
PAY = update(Account).where(Account.id == 1).values(balance=100)


@pytest.fixture
def url(postgres_url: URL) -> URL:
    """A database with two accounts."""
    engine = create_engine(postgres_url)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(Account.__table__.insert(), [{"id": n, "balance": n} for n in (1, 2)])
        connection.exec_driver_sql(TRIGGER)
    engine.dispose()
    return postgres_url


class Gate:
    """Holds COMMITs of accounts in the server until it is opened."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        connection.execute(text(f"SELECT pg_advisory_lock({LOCK})"))

    def wait_for_commit(self) -> None:
        """Wait until a COMMIT is held."""
        self._until("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted", 1)

    def open(self) -> None:
        """Let COMMITs go on, and wait until the server has ended them."""
        self._connection.execute(text(f"SELECT pg_advisory_unlock({LOCK})"))
        self._until(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND query LIKE 'COMMIT%' AND state = 'active'",
            0,
        )

    def _until(self, query: str, wanted: int) -> None:
        end = time.monotonic() + 20
        while self._connection.execute(text(query)).scalar_one() != wanted:
            assert time.monotonic() < end, query
            time.sleep(0.01)


@contextmanager
def gate(url: URL) -> Iterator[Gate]:
    """Lend a closed gate, on a connection that no cache watches."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield Gate(connection)
    engine.dispose()


def balance(cache: TableCache) -> tuple[int, str]:
    """Read the first account through the cache."""
    with cache.sessionmaker()() as session:
        record = session.get(Balances, 1)
        assert session.last_read is not None
        return record.balance, session.last_read.kind


def becomes_a_hit(cache: TableCache) -> int:
    """Read until the cache answers by itself again; return what it says."""
    end = time.monotonic() + 20
    while True:
        value, kind = balance(cache)
        if kind == "hit":
            cache._check()
            return value
        assert time.monotonic() < end
        time.sleep(0.02)


def _cut(session: Session) -> Callable[[], None]:
    """Return what cuts the connection of a session, while another thread waits for the server."""
    driver: Any = session.connection().connection.driver_connection
    number = driver.pgconn.socket

    def cut() -> None:
        with socket.socket(fileno=socket.dup(number)) as copy:
            copy.shutdown(socket.SHUT_RDWR)

    return cut


@pytest.mark.parametrize("lands", [True, False])
def test_a_connection_that_dies_during_commit(url: URL, lands: bool) -> None:
    """The cache asks the database until the server has ended that transaction, either way."""
    engine = create_engine(url)
    with TableCache(engine, views=[Balances]) as cache, gate(url) as held:
        cache.load(Balances)
        cutters: list[Callable[[], None]] = []
        pids: list[int] = []
        ready = threading.Event()

        def pay() -> None:
            with Session(engine) as session:
                session.execute(PAY)
                cutters.append(_cut(session))
                pids.append(session.scalar(text("SELECT pg_backend_pid()")))
                ready.set()
                session.commit()

        paying = Running(pay)
        assert ready.wait(20)
        held.wait_for_commit()
        assert balance(cache) == (1, "bypass")
        cutters[0]()
        with pytest.raises(DBAPIError):
            paying.result()
        assert balance(cache) == (1, "bypass")
        assert cache.stats(Balances).leases == 1
        if not lands:
            held._connection.execute(text(f"SELECT pg_terminate_backend({pids[0]})"))
        held.open()
        expected = 100 if lands else 1
        assert balance(cache)[0] == expected
        assert becomes_a_hit(cache) == expected
        assert cache.stats(Balances).leases == 0
    engine.dispose()


def test_other_accounts_are_not_concerned_for_long(url: URL) -> None:
    """While one outcome is unknown other commits are seen as ever."""
    engine = create_engine(url)
    with TableCache(engine, views=[Balances]) as cache, gate(url) as held:
        cache.load(Balances)
        cutters: list[Callable[[], None]] = []
        ready = threading.Event()

        def pay() -> None:
            with Session(engine) as session:
                session.execute(PAY)
                cutters.append(_cut(session))
                ready.set()
                session.commit()

        paying = Running(pay)
        assert ready.wait(20)
        held.wait_for_commit()
        cutters[0]()
        with pytest.raises(DBAPIError):
            paying.result()
        with Session(engine) as session:
            session.add(Account(id=3, balance=3))
            session.commit()
        with cache.sessionmaker()() as session:
            assert sorted(r.id for r in session.scalars(select(Balances))) == [1, 2, 3]
        held.open()
        assert becomes_a_hit(cache) == 100
    engine.dispose()


@pytest.mark.parametrize("moment", ["held", "landed"])
async def test_an_awaited_commit_that_is_cancelled(url: URL, moment: str) -> None:
    """A task cancelled inside ``await session.commit()`` leaves the cache to find out."""
    engine = create_async_engine(asynchronous(url))
    cache = AsyncTableCache(engine, views=[Balances])
    await cache.load(Balances)
    plain = create_engine(url)
    factory = cache.sessionmaker()

    async def read() -> tuple[int, str]:
        async with factory() as session:
            record = await session.get(Balances, 1)
            return record.balance, session.last_read.kind

    async def pay() -> None:
        async with factory() as session:
            await session.execute(PAY)
            await session.commit()

    with gate(url) as held:
        task = asyncio.create_task(pay())
        await asyncio.to_thread(held.wait_for_commit)
        assert await read() == (1, "bypass")
        if moment == "landed":
            held.open()  # on the event loop, which cannot hear of the end meanwhile
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if moment == "held":
            await asyncio.to_thread(held.open)
        end = time.monotonic() + 20
        while True:
            with Session(plain) as session:
                stored = session.scalar(select(Account.balance).where(Account.id == 1))
            value, kind = await read()
            if kind == "hit":
                break
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        assert value == stored
        assert moment == "held" or stored == 100
        cache._check()
    await cache.close()
    await engine.dispose()
    plain.dispose()


def test_a_statement_that_commits_itself_and_whose_connection_dies(url: URL) -> None:
    """In AUTOCOMMIT the statement is the COMMIT: it may land after its connection is gone."""
    engine = create_engine(url)
    with TableCache(engine, views=[Balances]) as cache, gate(url) as held:
        cache.load(Balances)
        cutters: list[Callable[[], None]] = []
        ready = threading.Event()

        def pay() -> None:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                with Session(connection) as session:
                    cutters.append(_cut(session))
                ready.set()
                connection.execute(PAY)

        paying = Running(pay)
        assert ready.wait(20)
        held.wait_for_commit()
        assert balance(cache) == (1, "bypass")
        cutters[0]()
        with pytest.raises(DBAPIError):
            paying.result()
        assert balance(cache) == (1, "bypass")
        held._connection.execute(text(f"SELECT pg_advisory_unlock({LOCK})"))
        held._until("SELECT balance FROM outcome_account WHERE id = 1", 100)
        assert balance(cache)[0] == 100
        assert becomes_a_hit(cache) == 100
    engine.dispose()
