"""What `in_transaction` makes of a function, and what it refuses to be put on."""

import inspect
import sqlite3
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sa_tablecache import (
    AsyncTableCache,
    TableCache,
    Transaction,
    TransactionError,
    Unbound,
    in_transaction,
)
from sa_tablecache.attempts import is_conflict

Sync = sessionmaker()
Async = async_sessionmaker()


class DriverError(Exception):
    """An error as drivers have them."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args)
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("error", "conflict"),
    [
        (DriverError("serialization", sqlstate="40001"), True),
        (DriverError("deadlock", pgcode="40P01"), True),
        (DriverError("unique", sqlstate="23505"), False),
        (DriverError("aborted", sqlstate="25P02"), False),
        (DriverError(1213, "deadlock"), True),
        (DriverError(1205, "lock wait timeout"), True),
        (DriverError(1020, "changed since last read"), True),
        (DriverError(1062, "duplicate"), False),
        (DriverError("deadlock", errno=1213, sqlstate="40001"), True),
        (DriverError("lock wait", errno=1205, sqlstate="HY000"), True),
        (DriverError("busy", sqlite_errorcode=sqlite3.SQLITE_BUSY), True),
        (DriverError("snapshot", sqlite_errorcode=sqlite3.SQLITE_BUSY_SNAPSHOT), True),
        (DriverError("constraint", sqlite_errorcode=sqlite3.SQLITE_CONSTRAINT), False),
        (DriverError("a number that is no code", 1213), False),
        (DriverError(), False),
    ],
    ids=str,
)
def test_what_a_conflict_is(error: Exception, conflict: bool):
    """The driver's code says so; with a lost connection, and outside of SQLAlchemy, none is."""
    assert is_conflict(OperationalError("SELECT", {}, error)) is conflict
    assert not is_conflict(error)
    lost = DBAPIError("SELECT", {}, error, connection_invalidated=True)
    assert not is_conflict(lost)
    assert not is_conflict(IntegrityError("INSERT", {}, DriverError("duplicate")))


def test_a_function_keeps_its_name_and_signature_but_for_the_session():
    """Tools see the function that callers see."""

    @in_transaction(Sync)
    def transfer(session: Session, source: str, *, amount: int = 1) -> bool:
        """Move money."""

    assert transfer.__name__ == "transfer"
    assert transfer.__doc__ == "Move money."
    assert str(inspect.signature(transfer)) == "(source: str, *, amount: int = 1) -> bool"

    @in_transaction(Async)
    async def later(session: AsyncSession, source: str) -> None: ...

    assert inspect.iscoroutinefunction(later)
    assert str(inspect.signature(later)) == "(source: str) -> None"


def test_methods_take_the_session_after_self(tmp_path):
    """Methods, class methods and static methods are called as ever, whoever looks them up."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.sqlite'}")
    factory = sessionmaker(engine)

    class Bank:
        @in_transaction(factory)
        def method(self, session: Session, *args: int, **kwargs: int) -> Any:
            return self, session, args, kwargs

        @classmethod
        @in_transaction(factory)
        def of_class(cls, session: Session, value: int) -> Any:
            return cls, session, value

        @staticmethod
        @in_transaction(factory)
        def of_nobody(session: Session, value: int) -> Any:
            return session, value

    bank = Bank()
    for me, session, args, kwargs in (bank.method(1, b=2), Bank.method(bank, 1, b=2)):
        assert me is bank
        assert isinstance(session, Session)
        assert (args, kwargs) == ((1,), {"b": 2})
    assert str(inspect.signature(bank.method)) == "(*args: int, **kwargs: int) -> Any"
    for of_class in (bank.of_class, Bank.of_class):
        cls, session, value = of_class(3)
        assert (cls, type(session).__mro__[1], value) == (Bank, Session, 3)
    for of_nobody in (bank.of_nobody, Bank.of_nobody):
        session, value = of_nobody(value=4)
        assert isinstance(session, Session)
        assert value == 4
    engine.dispose()


def generator(session):
    yield session


async def async_generator(session):
    yield session


async def async_function(session): ...


def function(session): ...


def without_session(): ...


def by_keyword(*, session): ...


@pytest.mark.parametrize(
    ("factory", "put_on", "why"),
    [
        (Sync, generator, "generator is a generator"),
        (Async, async_generator, "async_generator is a generator"),
        (Sync, async_function, "async_function is async, and its factory makes synchronous"),
        (Session, async_function, "an async_sessionmaker"),
        (Async, function, "function is not async, and its factory makes asynchronous"),
        (AsyncSession, function, "a sessionmaker"),
        (Sync, without_session, "without_session takes no session"),
        (Sync, by_keyword, "by_keyword takes no session"),
        (Sync, staticmethod(function), "below @staticmethod"),
        (Sync, classmethod(function), "below @classmethod"),
        (Sync, 17, "decorates functions"),
    ],
)
def test_what_it_cannot_be_put_on(factory: Any, put_on: Any, why: str):
    """The error names the culprit, when the function is defined."""
    with pytest.raises(TransactionError, match=why):
        in_transaction(factory)(put_on)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tries": 0}, "tries=0"),
        ({"tries": True}, "tries=True"),
        ({"tries": 1.5}, r"tries=1\.5"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"on_retry": async_function}, "on_retry"),
    ],
)
def test_options_that_make_no_sense(options: Any, why: str):
    """The error names the option, when it is given."""
    with pytest.raises(TransactionError, match=why):
        in_transaction(Sync, **options)


def test_what_makes_no_sessions():
    """A session is not a factory, and an engine is not one either."""
    with Session() as session, pytest.raises(TransactionError, match="makes no sessions"):
        in_transaction(session)  # type: ignore
    with pytest.raises(TransactionError, match="makes no sessions"):
        Transaction(create_engine("sqlite://"))  # type: ignore


async def test_sessions_of_the_wrong_kind():
    """If only a call tells what a factory makes, the call is refused."""

    def asynchronous() -> AsyncSession:
        return AsyncSession()

    def synchronous() -> Session:
        return Session()

    with pytest.raises(TransactionError, match="returned a AsyncSession"):
        in_transaction(asynchronous)(function)()  # type: ignore
    with pytest.raises(TransactionError, match="returned a Session"):
        await in_transaction(synchronous)(async_function)()  # type: ignore
    with pytest.raises(TransactionError, match="returned a Session"):
        async with Transaction(synchronous):
            pass
    with pytest.raises(TransactionError, match="returned a AsyncSession"), Transaction(Async):
        pass


def test_a_database_of_which_conflicts_are_not_known(tmp_path):
    """Nothing runs on one."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.sqlite'}")
    engine.dialect.name = "oracle"
    with pytest.raises(TransactionError, match="not known what a conflict is on oracle"):
        in_transaction(sessionmaker(engine))(function)()


async def test_the_short_form_of_a_cache_is_there_before_its_engine():
    """Functions are decorated while modules are imported; the cache is bound later."""
    cache = TableCache()
    decorated = cache.in_transaction(tries=2)(function)
    with pytest.raises(Unbound):
        decorated()
    decorated = AsyncTableCache().in_transaction()(async_function)
    with pytest.raises(Unbound):
        await decorated()
    with pytest.raises(TransactionError, match="is async"):
        cache.in_transaction()(async_function)
