"""Functions in transactions: isolated, retried, and committed whole or not at all."""

import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from sa_tablecache import (
    TableCache,
    Transaction,
    TransactionConflict,
    TransactionError,
    UnsuitableEngine,
    attempts,
    in_transaction,
    transactions,
)
from tests.integration.accounts import (
    Account,
    AccountBoard,
    Meeting,
    Tag,
    add,
    balances,
    bank,
    in_threads,
    provoke_conflict,
)

pytestmark = pytest.mark.every_database

Pauses = list[float]


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> URL:
    """A database of each kind in turn; PostgreSQL takes its time to create one, and keeps it."""
    name = {"postgresql": "postgres_module"}.get(request.param, request.param)
    url: URL = request.getfixturevalue(f"{name}_url")
    return url


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """Accounts 1 and 2, each with 100."""
    with bank(database_url) as engine:
        yield engine


@pytest.fixture
def other(engine: Engine) -> Iterator[Engine]:
    """Another application on the same database."""
    other = create_engine(engine.url)
    yield other
    other.dispose()


@pytest.fixture
def factory(engine: Engine) -> "sessionmaker[Session]":
    """What makes the sessions of the application."""
    return sessionmaker(engine)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    """The pauses that were asked for; they take no time."""
    pauses: Pauses = []
    monkeypatch.setattr(transactions, "_sleep", pauses.append)
    monkeypatch.setattr(transactions, "_random", lambda: 1.0)
    return pauses


def meeting(engine: Engine, *, relaxed: bool = False) -> Meeting:
    """Return what has two transactions meet, where two can be under way at all."""
    return Meeting(1 if engine.dialect.name == "sqlite" and not relaxed else 2)


# -- what concurrent transactions come to ------------------------------------------------------


def test_no_update_is_lost(engine: Engine, factory: Any):
    """Two that read the same balance and write it back both count."""
    together = meeting(engine)

    @in_transaction(factory)
    def add_in_python(session: Session, amount: int) -> None:
        account = session.get_one(Account, 1)
        together.wait()
        account.balance += amount

    assert in_threads(lambda: add_in_python(1), lambda: add_in_python(10)) == [None, None]
    assert balances(engine) == [111, 100]


def test_no_decision_is_overtaken(engine: Engine, factory: Any):
    """Of two that may each take 150 of 200 in all, from two accounts, one does: write skew."""
    together = meeting(engine)

    @in_transaction(factory)
    def withdraw(session: Session, account: int) -> bool:
        total = session.scalar(select(func.sum(Account.balance)))
        together.wait()
        if total < 150:
            return False
        add(session, account, -150)
        return True

    assert sorted(in_threads(lambda: withdraw(1), lambda: withdraw(2))) == [False, True]
    assert sum(balances(engine)) == 50


def get_or_create(session: Session, name: str, between: Callable[[], None] | None = None) -> int:
    """Return the id of a tag, which is made if it is not there."""
    found = session.scalars(select(Tag.id).where(Tag.name == name)).first()
    if between is not None:
        between()
    if found is None:
        tag = Tag(name=name)
        session.add(tag)
        session.flush()
        found = tag.id
    return found


def test_many_that_get_or_create_make_one(engine: Engine, factory: Any):
    """Of 50 callers that look for a row and insert it if it is not there, one inserts."""
    create = in_transaction(factory, tries=200)(get_or_create)
    found = in_threads(*[lambda: create("new")] * 50)
    assert len(set(found)) == 1
    with factory() as session:
        assert session.scalars(select(Tag.id)).all() == [found[0]]


def test_relaxed_ones_may_make_two(engine: Engine, factory: Any):
    """Two relaxed callers can both find nothing and insert; on SQLite the second one is retried."""
    together = meeting(engine, relaxed=True)
    create = in_transaction(factory, relaxed=True)(get_or_create)
    in_threads(*[lambda: create("new", together.wait)] * 2)
    with factory() as session:
        rows = session.scalar(select(func.count()).select_from(Tag))
    assert rows == (1 if engine.dialect.name == "sqlite" else 2)


def test_a_deadlock_is_retried(engine: Engine, factory: Any):
    """Two that lock the same rows in different orders both get through."""
    together = meeting(engine)

    @in_transaction(factory)
    def move(session: Session, source: int, target: int) -> None:
        add(session, source, -5)
        together.wait()
        add(session, target, 5)

    assert in_threads(lambda: move(1, 2), lambda: move(2, 1)) == [None, None]
    assert balances(engine) == [100, 100]


def test_money_is_moved_and_never_made(database_url: URL):
    """16 writers move money while readers add it up in the cache: each sum is of one commit."""
    with (
        bank(database_url, [100] * 8, pool_size=10) as engine,
        TableCache(engine, views=[AccountBoard]) as cache,
    ):
        cache.load(AccountBoard)
        readers = cache.sessionmaker()
        done = threading.Event()
        answers: set[str] = set()

        @cache.in_transaction(tries=100)
        def move(session: Any, source: int, target: int, amount: int) -> None:
            session.get_one(Account, source).balance -= amount
            session.get_one(Account, target).balance += amount

        def write(seed: int) -> None:
            for turn in range(3):
                source, target = (seed + turn) % 8 + 1, (seed * 3 + turn) % 8 + 1
                move(source, target, 1 + turn)
                with readers() as session:
                    assert sum(a.balance for a in session.range(AccountBoard.by_id)) == 800

        def read() -> None:
            while not done.is_set():
                with readers() as session:
                    found = session.range(AccountBoard.by_id)
                    answers.add(session.last_read.kind)
                assert sum(account.balance for account in found) == 800

        def write_all() -> None:
            try:
                failed = in_threads(*[lambda n=n: write(n) for n in range(16)])
            finally:
                done.set()
            assert failed == [None] * 16

        assert in_threads(write_all, read) == [None] * 2
        assert "hit" in answers
        cache._check()
        with readers() as session:
            cached = [a.balance for a in session.range(AccountBoard.by_id)]
        assert cached == balances(engine)
        assert sum(cached) == 800


# -- retries -----------------------------------------------------------------------------------


def test_a_conflict_runs_the_whole_function_again(
    engine: Engine, other: Engine, factory: Any, pauses: Pauses
):
    """Each try has a session of its own; what the failed one wrote is gone; it is told of."""
    sessions: list[Session] = []
    told: list[Any] = []

    @in_transaction(factory, relaxed=True, on_retry=lambda *told_of: told.append(told_of))
    def change(session: Session) -> str:
        sessions.append(session)
        if len(sessions) == 1:
            provoke_conflict(session, other)
        add(session, 2, 7)
        return "done"

    assert change() == "done"
    assert balances(engine) == [101, 107]
    assert sessions[0] is not sessions[1]
    assert len(sessions) == 2
    ((number, error),) = told
    assert number == 1
    assert attempts.is_conflict(error)
    assert pauses == [transactions.FIRST_PAUSE]


def test_the_last_conflict_is_an_error(engine: Engine, other: Engine, factory: Any, pauses: Pauses):
    """After so many tries it is a TransactionConflict, from the error of the database."""
    runs: list[Session] = []

    @in_transaction(factory, relaxed=True, tries=3)
    def change(session: Session) -> None:
        runs.append(session)
        provoke_conflict(session, other)

    with pytest.raises(TransactionConflict, match=r"change.* 3 until tries=3") as raised:
        change()
    assert attempts.is_conflict(raised.value.__cause__)
    assert len(runs) == 3
    assert pauses == [0.01, 0.02]
    assert balances(engine) == [103, 100]
    assert engine.pool.checkedout() == 0


def test_no_try_begins_after_the_timeout(
    engine: Engine, other: Engine, factory: Any, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
):
    """The timeout counts from the first try, and the pause that would go past it is not made."""
    now = 0.0
    monkeypatch.setattr(transactions, "_now", lambda: now)

    @in_transaction(factory, relaxed=True, tries=9, timeout=25)
    def change(session: Session) -> None:
        nonlocal now
        now += 10
        provoke_conflict(session, other)

    with pytest.raises(TransactionConflict, match="3 until timeout=25"):
        change()
    assert len(pauses) == 2


def test_pauses_grow_and_are_bounded(engine: Engine, other: Engine, pauses: Pauses):
    """The longest pauses double from 10 ms on, up to a second."""

    def refuse() -> Session:
        return Session(engine)

    @in_transaction(refuse, relaxed=True, tries=10)
    def change(session: Session) -> None:
        provoke_conflict(session, other)

    with pytest.raises(TransactionConflict):
        change()
    assert pauses == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0]


def test_a_swallowed_conflict_is_retried(
    engine: Engine, other: Engine, factory: Any, pauses: Pauses
):
    """A function that catches the conflict and returns has nothing to commit: it runs again."""
    runs: list[Session] = []

    @in_transaction(factory, relaxed=True)
    def change(session: Session) -> int:
        runs.append(session)
        if len(runs) == 1:
            with pytest.raises(DBAPIError):
                provoke_conflict(session, other)
            if engine.dialect.name != "postgresql":
                add(session, 2, 1000)
        return len(runs)

    assert change() == 2
    assert balances(engine) == [101, 100]


def test_what_follows_a_swallowed_conflict_is_that_conflict(
    engine: Engine, other: Engine, factory: Any, pauses: Pauses
):
    """Errors of the database that only follow from it do not hide it; others propagate."""
    runs: list[Session] = []

    def change(session: Session, error: type[Exception] | None) -> None:
        runs.append(session)
        if len(runs) == 1:
            with pytest.raises(DBAPIError):
                provoke_conflict(session, other)
            if error is not None:
                raise error
            session.execute(text("SELECT * FROM no_such_table"))

    in_transaction(factory, relaxed=True)(change)(None)
    assert len(runs) == 2
    runs.clear()
    with pytest.raises(LookupError):
        in_transaction(factory, relaxed=True)(change)(LookupError)
    assert len(runs) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, IntegrityError])
def test_an_exception_discards_everything(engine: Engine, factory: Any, error: Any):
    """Whatever the function raises propagates as it is, and is not retried."""
    runs = []

    @in_transaction(factory)
    def change(session: Session) -> None:
        runs.append(session)
        add(session, 1, 5)
        if error is IntegrityError:
            session.execute(insert(Account).values(id=1, balance=1))
        raise error

    with pytest.raises(error):
        change()
    assert len(runs) == 1
    assert balances(engine) == [100, 100]
    assert engine.pool.checkedout() == 0


def test_a_lost_connection_is_no_conflict(engine: Engine, other: Engine, factory: Any):
    """When the server ends the connection, the function is not run again."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no connections that others could end")
    runs = []
    pid, kill = {
        "postgresql": ("pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mysql": ("connection_id()", "KILL {}"),
    }[engine.dialect.name]

    @in_transaction(factory)
    def change(session: Session) -> None:
        runs.append(session)
        add(session, 1, 5)
        number = session.scalar(text(f"SELECT {pid}"))
        with other.connect() as connection:
            connection.execute(text(kill.format(number)))
        add(session, 1, 5)

    with pytest.raises(DBAPIError) as raised:
        change()
    assert raised.value.connection_invalidated
    assert len(runs) == 1
    assert balances(engine) == [100, 100]


# -- isolation ---------------------------------------------------------------------------------


def level(session: Session) -> str:
    """Ask the server for the level of the transaction."""
    dialect: Any = session.get_bind().dialect
    ask = "SHOW transaction_isolation" if dialect.name == "postgresql" else "SELECT @@tx_isolation"
    return str(session.scalar(text(ask))).upper().replace("-", " ")


@pytest.mark.parametrize("of_engine", [None, "AUTOCOMMIT", "READ COMMITTED"])
def test_the_level_is_on_and_goes_again(database_url: URL, of_engine: str | None):
    """The server says so, and the pooled connection then has the level of its engine again."""
    if database_url.get_backend_name() == "sqlite":
        pytest.skip("SQLite has no levels")
    options = {} if of_engine is None else {"isolation_level": of_engine}
    with (
        bank(database_url),
        create_engine(database_url, pool_size=1, max_overflow=0, **options).connect() as first,
    ):
        engine = first.engine
        usual = first.get_isolation_level()
        first.close()
        factory = sessionmaker(engine)
        for _ in range(2):
            assert in_transaction(factory)(level)() == "SERIALIZABLE"
            assert in_transaction(factory, relaxed=True)(level)() == "REPEATABLE READ"
            with Transaction(factory) as txn:
                assert level(txn.session) == "SERIALIZABLE"
            with engine.connect() as connection:
                assert connection.get_isolation_level() == usual
        engine.dispose()


def test_a_server_at_another_level_is_found_out(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """If the level does not reach the server, nothing runs."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no levels")
    monkeypatch.setattr(engine.dialect, "set_isolation_level", lambda *_: None)
    runs: list[Session] = []
    change = in_transaction(sessionmaker(engine))(runs.append)
    with pytest.raises(TransactionError, match="SERIALIZABLE was asked for, and the server says"):
        change()
    assert not runs


def test_autocommit_of_the_engine_is_overridden(engine: Engine):
    """On an engine whose statements commit by themselves, the function is still one transaction."""
    factory = sessionmaker(engine.execution_options(isolation_level="AUTOCOMMIT"))

    @in_transaction(factory)
    def change(session: Session) -> None:
        add(session, 1, 5)
        session.flush()
        raise LookupError

    with pytest.raises(LookupError):
        change()
    assert balances(engine) == [100, 100]


# -- whole or not at all -----------------------------------------------------------------------


@pytest.mark.parametrize("end", ["commit", "rollback", "close", "reset"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_function_does_not_end_the_transaction(
    engine: Engine, factory: Any, end: str, goes_on: bool
):
    """One that commits, rolls back or closes the session is told so, and nothing is committed."""

    @in_transaction(factory)
    def change(session: Session) -> None:
        add(session, 1, 5)
        getattr(session, end)()
        if goes_on:
            add(session, 2, 5)

    with pytest.raises(TransactionError, match="commit"):
        change()
    assert balances(engine) == [100, 100]
    assert engine.pool.checkedout() == 0


def test_a_session_is_of_no_use_afterwards(engine: Engine, factory: Any):
    """What would run outside of any isolated transaction is refused."""
    with Transaction(factory) as txn:
        pass
    with pytest.raises(TransactionError, match="ended"):
        txn.session.get(Account, 1)
    txn.session.close()


def test_savepoints_are_free(engine: Engine, factory: Any):
    """What may fail is tried in a savepoint, and the rest is committed."""

    @in_transaction(factory)
    def change(session: Session) -> None:
        add(session, 1, 5)
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(insert(Account).values(id=2, balance=1))
        with session.begin_nested():
            add(session, 2, 5)

    change()
    assert balances(engine) == [105, 105]


def test_an_open_savepoint_is_an_error(engine: Engine, factory: Any):
    """A savepoint that nobody ended is nobody's decision to keep."""

    @in_transaction(factory)
    def change(session: Session) -> None:
        session.begin_nested()
        add(session, 1, 5)

    with pytest.raises(TransactionError, match="savepoint"):
        change()
    assert balances(engine) == [100, 100]


def test_a_swallowed_error_that_aborted_the_transaction_is_raised(engine: Engine, factory: Any):
    """PostgreSQL answers COMMIT of an aborted transaction by a silent ROLLBACK: an error here."""

    @in_transaction(factory)
    def change(session: Session) -> None:
        add(session, 1, 5)
        with pytest.raises(IntegrityError):
            session.execute(insert(Account).values(id=2, balance=1))

    if engine.dialect.name == "postgresql":
        with pytest.raises(IntegrityError):
            change()
        assert balances(engine) == [100, 100]
    else:  # where only the statement was undone
        change()
        assert balances(engine) == [105, 100]


def test_an_error_that_rolled_back_is_raised(engine: Engine, factory: Any):
    """What runs after OR ROLLBACK on SQLite would be in a transaction that nobody began."""
    if engine.dialect.name != "sqlite":
        pytest.skip("OR ROLLBACK is SQLite's")

    @in_transaction(factory)
    def change(session: Session) -> None:
        add(session, 1, 5)
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT OR ROLLBACK INTO txn_account VALUES (2, 1)"))
        add(session, 2, 5)

    with pytest.raises(IntegrityError):
        change()
    assert balances(engine) == [100, 100]


def test_what_is_returned_stays_usable(factory: Any):
    """Objects that the function returns keep what they were loaded with."""

    @in_transaction(factory)
    def change(session: Session) -> Account:
        account = session.get_one(Account, 1)
        account.balance += 1
        return account

    assert change().balance == 101


# -- nesting -----------------------------------------------------------------------------------


def test_an_inner_one_joins(engine: Engine, factory: Any):
    """Inside a transaction of the same factory a function is a part of it, and of its end."""

    @in_transaction(factory)
    def inner(session: Session, amount: int) -> Session:
        add(session, 1, amount)
        return session

    @in_transaction(factory)
    def outer(session: Session) -> None:
        assert inner(5) is session
        assert session.scalar(select(Account.balance).where(Account.id == 1)) == 105
        raise LookupError

    with pytest.raises(LookupError):
        outer()
    assert balances(engine) == [100, 100]
    with Transaction(factory) as txn:
        assert inner(7) is txn.session
    assert balances(engine) == [107, 100]


def test_a_joined_one_is_retried_as_a_part_of_the_outer_one(
    engine: Engine, other: Engine, factory: Any, pauses: Pauses
):
    """A conflict of the inner function runs the outer one again."""
    runs = []

    @in_transaction(factory, relaxed=True)
    def inner(session: Session) -> None:
        if len(runs) == 1:
            provoke_conflict(session, other)

    @in_transaction(factory, relaxed=True)
    def outer(session: Session) -> None:
        runs.append(session)
        inner()

    outer()
    assert len(runs) == 2


def test_an_inner_one_cannot_be_stricter(factory: Any):
    """SERIALIZABLE inside of REPEATABLE READ would be a lie; the reverse is fine."""
    strict = in_transaction(factory)(lambda _session: "strict")
    relaxed = in_transaction(factory, relaxed=True)(lambda _session: "relaxed")
    with Transaction(factory, relaxed=True) as txn:
        assert relaxed() == "relaxed"
        with pytest.raises(TransactionError, match="SERIALIZABLE transaction inside a relaxed one"):
            strict()
        txn.abort()
    with Transaction(factory):
        assert relaxed() == "relaxed"


def test_a_block_does_not_join(factory: Any):
    """A block that could be aborted by itself is no part of another transaction."""
    inner = Transaction(factory)
    with Transaction(factory), pytest.raises(TransactionError, match="begin_nested"), inner:
        pass


def test_a_thread_does_not_join(engine: Engine, factory: Any):
    """Another thread has a transaction of its own, even with a copy of the context."""
    own = in_transaction(factory, relaxed=True)(lambda session: session)
    with Transaction(factory, relaxed=True) as txn:
        context = contextvars.copy_context()
        (found,) = in_threads(lambda: context.run(own))
        assert isinstance(found, Session)
        assert found is not txn.session


# -- the block ---------------------------------------------------------------------------------


def test_a_block_is_committed(engine: Engine, factory: Any):
    """What a block did is committed at its end."""
    with Transaction(factory) as txn:
        txn.session.get_one(Account, 1).balance = 1
    assert balances(engine) == [1, 100]


def test_a_block_is_aborted_quietly(engine: Engine, factory: Any):
    """abort() discards everything, passes all but BaseException, and goes on after the block."""
    with Transaction(factory) as txn:
        txn.session.get_one(Account, 1).balance = 1
        txn.session.flush()
        try:
            txn.abort()
        except Exception:  # pragma: no cover
            pytest.fail("an abort is no Exception")
    assert balances(engine) == [100, 100]
    assert engine.pool.checkedout() == 0


def test_an_exception_of_a_block_discards_everything(engine: Engine, factory: Any):
    """It propagates as it is."""
    with pytest.raises(LookupError), Transaction(factory) as txn:
        add(txn.session, 1, 5)
        raise LookupError
    assert balances(engine) == [100, 100]


def test_a_conflict_of_a_block_is_an_error(engine: Engine, other: Engine, factory: Any):
    """It is a TransactionConflict, from the error of the database; swallowed or not."""
    with pytest.raises(TransactionConflict) as raised, Transaction(factory, relaxed=True) as txn:
        provoke_conflict(txn.session, other)
    assert attempts.is_conflict(raised.value.__cause__)
    block = Transaction(factory, relaxed=True)
    with pytest.raises(TransactionConflict), block, pytest.raises(DBAPIError):
        provoke_conflict(block.session, other)
    assert balances(engine) == [102, 100]


def test_a_block_is_used_once(factory: Any):
    """A second use is an error, and not a second transaction of the first one's session."""
    txn = Transaction(factory)
    with txn:
        pass
    with pytest.raises(TransactionError, match="once"), txn:
        pass


def test_a_conflict_at_commit(postgres_url: URL):
    """Two that wrote what the other one had read: PostgreSQL tells the second one at its COMMIT."""
    with bank(postgres_url) as engine:
        factory = sessionmaker(engine)
        told: list[Any] = []
        second = Transaction(sessionmaker(engine))
        with pytest.raises(TransactionConflict) as raised, second:
            with Transaction(factory) as first:
                for session, number in ((first.session, 1), (second.session, 2)):
                    session.scalars(select(Account.balance)).all()
                    add(session, number, 5)
            told.append("the end of the block")
        assert told
        assert attempts.is_conflict(raised.value.__cause__)
        assert balances(engine) == [105, 100]


@pytest.fixture
def journal(sqlite_url: URL) -> Iterator[Engine]:
    """An SQLite file without WAL mode, where readers keep a COMMIT from being done at once."""
    with bank(sqlite_url) as first, first.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = DELETE")
    engine = create_engine(sqlite_url, pool_size=1, connect_args={"timeout": 0})
    yield engine
    engine.dispose()


@pytest.fixture
def reader(sqlite_url: URL) -> Iterator[Connection]:
    """A connection that reads."""
    engine = create_engine(sqlite_url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def start_reading(reader: Connection) -> None:
    """Read, and go on reading until rollback."""
    reader.exec_driver_sql("BEGIN")
    assert len(reader.exec_driver_sql("SELECT * FROM txn_account").all()) == 2


def test_a_commit_that_is_busy(journal: Engine, reader: Connection, pauses: Pauses):
    """It is retried, and nothing of the try that failed is left in the connection."""
    tries: list[int] = []

    @in_transaction(sessionmaker(journal), on_retry=lambda number, _: reader.rollback())
    def change(session: Session) -> None:
        tries.append(len(tries))
        add(session, 1, 5)
        if len(tries) == 1:
            start_reading(reader)

    change()
    assert tries == [0, 1]
    assert balances(journal) == [105, 100]


def test_what_a_busy_commit_of_somebody_else_left(journal: Engine, reader: Connection):
    """SQLAlchemy returns the connection of such a session with its transaction open."""
    with Session(journal) as session:
        add(session, 1, 1_000)
        start_reading(reader)
        with pytest.raises(DBAPIError, match="locked"):
            session.commit()
    reader.rollback()

    @in_transaction(sessionmaker(journal))
    def change(session: Session) -> None:
        add(session, 1, 5)

    change()
    assert balances(journal) == [105, 100]


@pytest.mark.parametrize("relaxed", [False, True])
def test_transactions_that_a_listener_begins(sqlite_url: URL, relaxed: bool):
    """The recipe of SQLAlchemy's manual, by which a listener sends BEGIN, does no harm."""
    with bank(sqlite_url) as engine:

        @event.listens_for(engine, "connect")
        def connect(dbapi_connection: Any, _: Any) -> None:
            dbapi_connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN")

        engine.dispose()
        factory = sessionmaker(engine)

        @in_transaction(factory, relaxed=relaxed)
        def change(session: Session) -> None:
            add(session, 1, 5)

        change()
        with Transaction(factory, relaxed=relaxed) as txn:
            change()
            txn.abort()
        assert balances(engine) == [105, 100]


# -- the cache ---------------------------------------------------------------------------------


def test_views_are_read_from_the_database_inside(engine: Engine, other: Engine):
    """Only what the database sees can conflict; after the commit the cache is fresh."""
    with TableCache(engine, views=[AccountBoard]) as cache:
        cache.load(AccountBoard)
        factory = cache.sessionmaker()
        with factory() as session:
            assert session.get(AccountBoard, 1).balance == 100
            assert session.last_read.kind == "hit"

        @in_transaction(factory, relaxed=True)
        def double(session: Any) -> None:
            record = session.get(AccountBoard, 1)
            assert session.last_read.kind == "bypass"
            assert "in_transaction" in session.last_read.reason
            assert [r.id for r in session.range(AccountBoard.by_id)] == [1, 2]
            assert session.last_read.kind == "bypass"
            session.get_one(Account, 1).balance = record.balance * 2

        with Session(other) as session:  # the cache does not see that commit, the transaction does
            add(session, 1, 11)
            session.commit()
        double()
        with factory() as session:
            assert session.get(AccountBoard, 1).balance == 222
            assert session.last_read.kind == "hit"
            assert session.get(AccountBoard, 2).balance == 100
            assert session.last_read.kind == "hit"


# -- what it cannot be -------------------------------------------------------------------------


def test_factories_that_cannot_do_it(engine: Engine, sqlite_url: URL):
    """What cannot have such a transaction is refused before the function runs."""
    runs: list[Any] = []
    used = Session(engine)
    used.connection()
    with engine.connect() as connection:
        for factory, why in (
            (sessionmaker(connection), "bound to a Connection"),
            (sessionmaker(), "no bind of its own"),
            (lambda: used, "in a transaction already"),
            (lambda: None, "returned a NoneType"),
        ):
            with pytest.raises(TransactionError, match=why):
                in_transaction(factory)(runs.append)()  # type: ignore
            with pytest.raises(TransactionError, match=why), Transaction(factory):  # type: ignore
                runs.append("block")
    used.close()
    for shared in (
        create_engine("sqlite://"),
        create_engine(sqlite_url, poolclass=StaticPool),
    ):
        with pytest.raises(UnsuitableEngine, match="shares one DBAPI connection"):
            in_transaction(sessionmaker(shared))(runs.append)()
        shared.dispose()
    assert not runs


def test_a_registry_stands_for_its_factory(engine: Engine, factory: Any):
    """The session of a scoped_session stays as it is: each try has a new one."""
    registry = scoped_session(factory)
    mine = registry()
    mine.get(Account, 1)
    own = in_transaction(registry, relaxed=True)(lambda session: session)
    assert own() is not mine
    assert mine.in_transaction()
    registry.remove()


def test_one_transaction_is_of_one_database(engine: Engine, other: Engine):
    """A second database could not be committed together with the first."""
    factory = sessionmaker(engine, binds={Tag: other})

    @in_transaction(factory, relaxed=True)
    def change(session: Session) -> None:
        session.get(Account, 1)
        session.scalar(select(Tag.id))

    with pytest.raises(TransactionError, match="cannot include"):
        change()
