"""One transaction of one fresh session, really isolated, and what a conflict is.

In: a session that has done nothing yet. Out: its transaction, which is committed or has an error.

* The level is set before BEGIN by SQLAlchemy, which restores it when the connection returns to its
  pool, and the server is asked for it once for each connection. SQLite has no levels, and
  the transactions that its drivers begin by themselves begin late: BEGIN is sent here.
* Errors are noted as the engine sees them, because a function may swallow them: after a conflict
  there is nothing left that could be committed, whatever the function says.
* The session's events refuse a commit half-way, a second transaction, and a second database.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction

from .exc import TransactionError
from .loading import check_separate_connections
from .wording import MYSQL

L = TypeVar("L", bound=Callable[..., Any])

ATTEMPT: Final = "sa_tablecache.attempt"
"""In ``Session.info``: the :class:`Attempt` that the session is made for."""
_VERIFIED: Final = "sa_tablecache.verified_levels"
"""In the connection's info: the levels at which the server was seen to be."""


# -- what a conflict is ------------------------------------------------------------------------

_MYSQL_CONFLICTS: Final = (1213, 1205, 1020)  # deadlock, lock wait timeout, changed since read
_POSTGRESQL_CONFLICTS: Final = ("40001", "40P01")  # serialization failure, deadlock
_SQLITE_BUSY: Final = 5


def is_conflict(error: BaseException | None) -> bool:
    """Whether the database gave up a transaction because of another one, and it may be run again.

    A violated constraint is none, and neither is a lost connection: what it had sent may be done.
    """
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return False
    driver: Any = error.orig
    code = getattr(driver, "sqlite_errorcode", None)
    if code is not None:
        return bool(code & 0xFF == _SQLITE_BUSY)
    state = getattr(driver, "sqlstate", None) or getattr(driver, "pgcode", None)
    if state in _POSTGRESQL_CONFLICTS:
        return True
    number = getattr(driver, "errno", None) or next(iter(driver.args), None)
    return type(number) is int and number in _MYSQL_CONFLICTS


_watched: WeakKeyDictionary[Connection, Attempt] = WeakKeyDictionary()


def _note_error(context: Any) -> None:
    """Note an error of the database, whoever swallows it; a listener of the engine."""
    connection, error = context.connection, context.sqlalchemy_exception
    attempt = None if connection is None else _watched.get(connection)
    if attempt is None or not isinstance(error, DBAPIError) or context.is_disconnect:
        return
    attempt.errors.append(error)
    if attempt.dialect == "sqlite" and not _driver_in_transaction(connection):
        attempt.lost = attempt.lost or error  # OR ROLLBACK, or the disk is full


def _driver_in_transaction(connection: Connection) -> bool:
    return bool(cast("Any", connection.connection.driver_connection).in_transaction)


# -- one attempt -------------------------------------------------------------------------------


class Attempt:
    """One transaction of one fresh session."""

    def __init__(self, session: Session, relaxed: bool) -> None:
        self.session = session
        self.relaxed = relaxed
        self.errors: list[DBAPIError] = []
        self.lost: DBAPIError | None = None
        self.dialect = ""
        self.connection: Connection | None = None
        self.transaction: SessionTransaction | None = None
        self.ending = False

    # -- beginning ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin the transaction, at the level that is asked for.

        :raises TransactionError: if this session cannot have such a transaction.
        """
        session = self.session
        engine = self._engine()
        self.dialect = engine.dialect.name
        levels = _LEVELS.get(self.dialect)
        if levels is None:
            raise TransactionError(
                f"it is not known what a conflict is on {self.dialect}: in_transaction and "
                "Transaction are for PostgreSQL, MariaDB, MySQL and SQLite"
            )
        check_separate_connections(
            engine, "transactions on it are not apart from each other", "make an engine of its own"
        )
        for target, name, listener in (
            (engine, "handle_error", _note_error),
            (type(session), "after_begin", _check_begin),
            (type(session), "before_commit", _check_commit),
        ):
            if not event.contains(target, name, listener):
                event.listen(target, name, listener)
        session.info[ATTEMPT] = self
        session.expire_on_commit = False  # it is closed then: what was expired could not be loaded
        level = levels[self.relaxed]
        options: Any = {"isolation_level": level}
        if self.dialect == "sqlite" and not _asks_for_another_level(session, engine):
            options = {}  # it would undo what the application's own `connect` listener has set
        connection = session.connection(execution_options=options)
        if getattr(engine.dialect, "_on_connect_isolation_level", None) == "AUTOCOMMIT":
            _restore_level_below_autocommit(connection)
        self.transaction = session.get_transaction()
        if self.dialect == "sqlite":
            if _driver_in_transaction(connection):
                # Begun by a listener, too weakly; or a session's whose COMMIT was refused as busy,
                # and with whose writes SQLAlchemy returned the connection to the pool.
                connection.dialect.do_rollback(connection.connection)
            if not _driver_in_transaction(connection):  # it is with sqlite3's autocommit=False
                connection.exec_driver_sql("BEGIN" if self.relaxed else "BEGIN IMMEDIATE")
        else:
            _verify(connection, level)

    def _engine(self) -> Engine:
        try:
            bind = self.session.get_bind()
        except UnboundExecutionError as error:
            raise TransactionError(
                "the session has no bind of its own, so that its transaction could be one of "
                "several databases: make it with bind=engine"
            ) from error
        if isinstance(bind, Connection):
            raise TransactionError(
                f"the session is bound to a Connection ({bind!r}), whose transaction is somebody "
                "else's: bind it to an Engine"
            )
        return bind

    def began(self, transaction: SessionTransaction, connection: Connection) -> None:
        """Check that what begins in the session is still this transaction.

        :raises TransactionError: if not.
        """
        if self.connection is None:
            self.connection = connection
            _watched[connection] = self
        elif connection is not self.connection:
            if connection.engine is self.connection.engine:
                self._ended()
            raise TransactionError(
                f"the transaction is one of {self.connection.engine!r}, and cannot include "
                f"{connection.engine!r}"
            )

    # -- ending ---------------------------------------------------------------------------------

    @property
    def conflict(self) -> DBAPIError | None:
        """The first conflict that it met."""
        return next(filter(is_conflict, self.errors), None)

    def commit(self) -> None:
        """Commit, unless nothing is left to commit.

        :raises TransactionError: if the transaction has been ended already.
        :raises DBAPIError: of the database, also one that was swallowed.
        """
        session, connection = self.session, self.connection
        conflict = self.conflict or self.lost
        if conflict is not None:
            raise conflict
        if connection is None or session.get_transaction() is not self.transaction:
            self._ended()
        if session.get_nested_transaction() is not None:
            raise TransactionError(
                "a savepoint is still open: use `with session.begin_nested():`, or end it"
            )
        if self.dialect == "sqlite" and not _driver_in_transaction(connection):
            self._ended()
        session.flush()
        if self.errors and self.dialect == "postgresql":
            # COMMIT of a transaction that an error has aborted is a ROLLBACK, and no error.
            try:
                connection.exec_driver_sql("SELECT 1")
            except DBAPIError:
                raise self.errors[0] from None
        self.ending = True
        try:
            session.commit()
        except DBAPIError as error:
            # SQLAlchemy takes a transaction for ended whose COMMIT has failed, and returns the
            # connection as it is. SQLite's is still open then, with all that it has written.
            if not error.connection_invalidated:
                connection._rollback_impl()
            raise

    def _ended(self) -> NoReturn:
        raise TransactionError(
            "the transaction was ended by the function itself (commit, rollback, close, or such "
            "SQL): what it does is committed when it returns, and discarded when it raises; use "
            "session.begin_nested() for what may fail"
        )


def _asks_for_another_level(session: Session, engine: Engine) -> bool:
    """Whether an SQLite session would get AUTOCOMMIT, say, by the options of its engine."""
    own = getattr(session, "execution_options", None) or {}
    asked = own.get("isolation_level") or engine.get_execution_options().get("isolation_level")
    asked = asked or getattr(engine.dialect, "_on_connect_isolation_level", None)
    return asked not in (None, "SERIALIZABLE")


def _restore_level_below_autocommit(connection: Connection) -> None:
    """Have MariaDB's level restored, too: of an AUTOCOMMIT engine SQLAlchemy resets only that."""
    dialect: Any = connection.dialect
    if dialect.name in MYSQL:
        record: Any = cast("Any", connection.connection)._connection_record
        # The last one added is called first; then SQLAlchemy's own.
        record.finalize_callback.append(
            lambda dbapi: dialect.set_isolation_level(dbapi, dialect.default_isolation_level)
        )


_SERVER_LEVELS: Final = ("SERIALIZABLE", "REPEATABLE READ")
_LEVELS: Final = {
    # By whether it is relaxed.
    "postgresql": _SERVER_LEVELS,
    "mysql": _SERVER_LEVELS,
    "mariadb": _SERVER_LEVELS,
    "sqlite": ("SERIALIZABLE", "SERIALIZABLE"),
}


def _verify(connection: Connection, level: str) -> None:
    """Ask the server for the level of the transaction, once for each of its connections."""
    verified = connection.info.setdefault(_VERIFIED, set())
    if level in verified:
        return
    dialect: Any = connection.dialect
    if dialect.name == "postgresql":
        question = "SHOW transaction_isolation"
    elif dialect.is_mariadb:
        question = "SELECT @@tx_isolation"
    else:
        question = "SELECT @@transaction_isolation"
    found = str(connection.exec_driver_sql(question).scalar_one()).upper().replace("-", " ")
    if found != level:
        raise TransactionError(
            f"{level} was asked for, and the server says {found}: something between the "
            "application and the server, or a listener, sets another isolation level"
        )
    verified.add(level)


def _harmless(listener: L) -> L:
    # `scopes.harmless`, which stands to the right: memory may answer although these are there.
    listener._sa_tablecache_harmless = True  # type: ignore[attr-defined]
    return listener


@_harmless
def _check_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    attempt: Attempt | None = session.info.get(ATTEMPT)
    if attempt is not None:
        attempt.began(transaction, connection)


@_harmless
def _check_commit(session: Session) -> None:
    attempt: Attempt | None = session.info.get(ATTEMPT)
    if attempt is not None and not attempt.ending and session.get_nested_transaction() is None:
        raise TransactionError(
            "the function is to leave the commit to in_transaction or Transaction, which commits "
            "when it returns; use session.begin_nested() for what may fail"
        )


# -- who is in a transaction -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Active:
    """A transaction that is under way, and whose it is."""

    factory: Any
    session: Any
    relaxed: bool
    owner: tuple[int, Any]


_active: ContextVar[tuple[Active, ...]] = ContextVar("sa_tablecache.transactions", default=())


def _owner() -> tuple[int, Any]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


def enter(factory: Any, session: Any, relaxed: bool) -> Active:
    """Note that the caller is in a transaction now."""
    mine = Active(factory, session, relaxed, _owner())
    _active.set((*_active.get(), mine))
    return mine


def leave(mine: Active) -> None:
    """Note that the caller is not in a transaction any more."""
    # No token: fixtures and frameworks may leave a block in another context than they entered it.
    _active.set(tuple(active for active in _active.get() if active is not mine))


def outer_transaction(factory: Any) -> Active | None:
    """Return the transaction of the same factory that the caller is in.

    A child task or another thread is not in it, though it has a copy of its context: two at once
    cannot use one session.
    """
    owner = _owner()
    for active in reversed(_active.get()):
        if active.factory == factory and active.owner == owner:
            return active
    return None
