"""Accounts with money, for tests of transactions: on each database, sync and async."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Engine, String, create_engine, event, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sa_tablecache import CachedView, ScoreIndex
from tests.conftest import asynchronous


class Base(DeclarativeBase):
    """The tables of these tests."""


class Account(Base):
    """Somebody's money."""

    __tablename__ = "txn_account"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    balance: Mapped[int]


class Tag(Base):
    """A name that is to be there once, without a constraint that says so."""

    __tablename__ = "txn_tag"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


class AccountBoard(CachedView):
    """All accounts, cached."""

    __select__ = select(Account.id, Account.balance)

    id: Mapped[int]
    balance: Mapped[int]

    by_id = ScoreIndex("id")


def _prepare(engine: Engine, busy: float) -> None:
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def connect(dbapi_connection: Any, _: Any) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = OFF")
        cursor.execute(f"PRAGMA busy_timeout = {int(busy * 1000)}")
        cursor.close()


@contextmanager
def bank(
    url: URL, balances: Sequence[int] = (100, 100), *, busy: float = 5, **options: Any
) -> Iterator[Engine]:
    """Lend an engine of a database with accounts 1, 2 and so on.

    :param busy: for SQLite: how long its driver waits for other writers, in seconds.
    """
    engine = create_engine(url, **options)
    _prepare(engine, busy)
    with Session(engine) as session:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        if engine.dialect.name == "postgresql":  # rather than waiting for what a failed test left
            session.execute(text("SET LOCAL lock_timeout = '5s'"))
        Base.metadata.drop_all(session.connection())
        Base.metadata.create_all(session.connection())
        session.execute(
            insert(Account), [{"id": n, "balance": b} for n, b in enumerate(balances, 1)]
        )
        session.commit()
    try:
        yield engine
    finally:
        engine.dispose()


def async_twin(url: URL, *, busy: float = 5, **options: Any) -> AsyncEngine:
    """Return an asynchronous engine of the same database."""
    engine = create_async_engine(asynchronous(url), **options)
    _prepare(engine.sync_engine, busy)
    return engine


def balances(engine: Engine) -> list[int]:
    """Return all balances, as committed."""
    with Session(engine) as session:
        return list(session.scalars(select(Account.balance).order_by(Account.id)))


class Meeting:
    """Has transactions meet: the first time each comes to a point, it waits for the others there.

    A retry does not wait again: the one that it met may be gone.
    """

    def __init__(self, parties: int = 2) -> None:
        self._barrier = threading.Barrier(parties)
        self._met = threading.local()

    def wait(self) -> None:
        """Wait for the others, in the first try of this thread."""
        if not getattr(self._met, "yet", False):
            self._met.yet = True
            self._barrier.wait(20)


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Call functions at the same time, and return their results, or what they raised."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures: list[Future[Any]] = [pool.submit(function) for function in functions]
        return [future.exception(60) or future.result() for future in futures]


def add(session: Session, number: int, amount: int) -> None:
    """Add to a balance, in the database."""
    session.execute(
        update(Account).where(Account.id == number).values(balance=Account.balance + amount),
        execution_options={"synchronize_session": False},
    )


def provoke_conflict(session: Session, other: Engine) -> None:
    """Have a statement of a session fail by a conflict with another transaction that commits.

    The other one adds 1 to account 1. The session must not have done anything; for SQLite it has
    to be a relaxed one, since the other could write nothing while a strict one is open.
    """
    if session.get_bind().dialect.name != "mysql":
        session.scalar(select(Account.balance))
        with Session(other) as disturbing:
            add(disturbing, 1, 1)
            disturbing.commit()
        add(session, 1, 10)
        return
    # A deadlock, in whatever order the two arrive; the victim is who has written less.
    with Session(other) as disturbing, ThreadPoolExecutor(1) as pool:
        disturbing.execute(insert(Tag), [{"name": "weight"}] * 20)
        add(disturbing, 2, 0)
        add(session, 1, 10)

        def close_the_cycle() -> None:
            add(disturbing, 1, 1)
            disturbing.commit()

        closing = pool.submit(close_the_cycle)
        try:
            add(session, 2, 10)
        finally:
            closing.result(20)
