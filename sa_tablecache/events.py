"""Listening to an engine: which transaction wrote what, and when it has ended.

In: SQLAlchemy's engine and pool events. Out: calls of two methods of each subscriber (a cache):

``lease(changes)``
    a COMMIT that will publish these changes is about to be sent: answers that they could touch
    come from the database until it is over;
``publish(changes, lease)``
    it is over: mark what changed and end the lease, in one step.

Engine events see every statement of every session and connection, so nothing is missed whichever
way it was written. SQLAlchemy's ``commit`` event fires *before* COMMIT and nothing fires after it
for certain (not when the task is cancelled, say): so the dialect's ``do_commit`` is wrapped, once,
by a function that looks for subscribers. It is never unwrapped, because others may have wrapped it
since.

The state of a transaction hangs on the pooled connection (``info``), where savepoints, several
sessions on one connection, and outer transactions need no code at all: what counts is when the
connection commits. Savepoints that are rolled back leave superfluous marks; that is harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Protocol, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event

from .analysis import TableName
from .changes import ChangeSet
from .loading import READER
from .statements import Writes, inserted_rows, rows_of, writes_of

log = logging.getLogger(__name__)

KEY: Final = "sa_tablecache.transaction"
RAW: Final = "sa_tablecache.raw"
TAINTED: Final = "sa_tablecache.tainted"
"""In the connection's info: SET or the like ran, so that it may see what others do not.

It stays when the connection returns to its pool: a reset of the pool ends transactions, and not
what was set for the session.
"""
_ticks = count(1)


def tick() -> int:
    """Return a number that is larger than all before, to order events of this process by."""
    return next(_ticks)


class Subscriber(Protocol):
    """What a cache does when an engine that it watches commits."""

    def lease(self, changes: ChangeSet) -> Any:
        """Take a lease on what the changes could touch."""

    def publish(self, changes: ChangeSet, lease: Any) -> None:
        """Mark what changed, and end the lease."""

    def orphan(self, lease: Any, backend: Backend | None) -> None:
        """Keep a lease of which nobody knows how its COMMIT ended."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The server process of a connection, as PostgreSQL and MariaDB number them."""

    pid: int


@dataclass(slots=True)
class Transaction:
    """What the open transaction of one connection has written so far."""

    changes: ChangeSet = field(default_factory=ChangeSet)
    inserting: dict[int, TableName] = field(default_factory=dict)
    """Tables of INSERTs under way, whose keys are known when they are done."""
    leases: list[tuple[Subscriber, Any]] | None = None
    began: int = 0
    watcher: Watcher | None = None
    backend: Backend | None = None
    opaque: bool = False

    def touches(self, tables: frozenset[TableName]) -> bool:
        """Whether it wrote one of the tables."""
        return self.changes.touches(tables) or not tables.isdisjoint(self.inserting.values())

    def settle(self) -> None:
        """Count INSERTs whose keys never became known as writes of any row."""
        for table in self.inserting.values():
            self.changes.add_table(table)
        self.inserting.clear()


def transaction_of(info: dict[Any, Any]) -> Transaction:
    """Return the state of a connection's transaction."""
    transaction: Transaction | None = info.get(KEY)
    if transaction is None:
        transaction = info[KEY] = Transaction()
    return transaction


class Watcher:
    """Watches one engine for any number of subscribers."""

    def __init__(self, engine: Engine) -> None:
        self.subscribers: list[Subscriber] = []
        for name in (
            "before_cursor_execute", "after_cursor_execute", "after_execute", "handle_error",
            "begin", "begin_twophase", "commit", "rollback", "commit_twophase", "rollback_twophase",
            "engine_connect", "checkout", "checkin",
        ):  # fmt: skip
            event.listen(engine, name, getattr(self, name))
        _wrap_commit(engine.dialect)

    # -- statements -----------------------------------------------------------------------------

    def before_cursor_execute(
        self, connection: Connection, cursor: Any, statement: str, _: Any, context: Any, many: Any
    ) -> None:
        """Note what a statement is about to write."""
        writes = writes_of(context, statement)
        if writes.sets:
            connection.info[TAINTED] = True
        if not writes and not writes.opaque:
            return
        transaction = transaction_of(connection.info)
        _note(transaction, writes, context, connection)
        if _autocommits(connection):
            _take_leases(self, transaction, connection)

    def after_cursor_execute(
        self, connection: Connection, cursor: Any, statement: str, _: Any, context: Any, many: Any
    ) -> None:
        """Publish at once what no COMMIT will follow: AUTOCOMMIT, and what text may have ended."""
        transaction: Transaction | None = connection.info.get(KEY)
        if transaction is None or not (transaction.changes or transaction.inserting):
            return
        if _autocommits(connection) or (
            connection.dialect.name == "sqlite" and not _in_transaction(connection)
        ):
            transaction.settle()
            _publish(self, transaction)
            transaction.changes = ChangeSet()
        elif writes_of(context, statement).opaque:
            transaction.settle()
            for subscriber in self.subscribers:
                subscriber.publish(transaction.changes, None)

    def after_execute(
        self, connection: Connection, _: Any, __: Any, ___: Any, ____: Any, result: Any
    ) -> None:
        """Note the keys that an INSERT gave its rows."""
        transaction: Transaction | None = connection.info.get(KEY)
        if transaction is None or not transaction.inserting:
            return
        context = getattr(result, "context", None)
        if context is None or id(context) not in transaction.inserting:
            return
        table = transaction.inserting.pop(id(context))
        keys = inserted_rows(writes_of(context, ""), context)
        if keys is None:
            transaction.changes.add_table(table)
        else:
            transaction.changes.add_rows(table, keys)

    def handle_error(self, context: Any) -> None:
        """Publish what a failed statement may have written where each statement commits."""
        connection = context.connection
        if connection is None or connection.invalidated or connection.closed:
            return
        transaction: Transaction | None = connection.info.get(KEY)
        if transaction is not None and transaction.leases is not None:
            transaction.settle()
            if not context.is_disconnect:
                _publish(self, transaction)
            else:
                # Where each statement commits, this one may do so yet.
                for subscriber, lease in transaction.leases:
                    subscriber.orphan(lease, transaction.backend)
                transaction.leases = None
                connection.info.pop(KEY, None)

    # -- transactions ---------------------------------------------------------------------------

    def begin(self, connection: Connection) -> None:
        """Note when a transaction began."""
        transaction_of(connection.info).began = tick()

    def begin_twophase(self, connection: Connection, _xid: Any) -> None:
        """Note when a transaction began."""
        self.begin(connection)

    def commit(self, connection: Connection) -> None:
        """Lease what COMMIT is about to make visible."""
        transaction = transaction_of(connection.info)
        if not transaction.began:  # it began before anybody watched
            transaction.changes.add_everything()
        transaction.settle()
        if transaction.changes:
            _take_leases(self, transaction, connection)

    def commit_twophase(self, connection: Connection, _xid: Any, _prepared: Any) -> None:
        """Lease what COMMIT PREPARED is about to make visible."""
        self.commit(connection)

    def rollback(self, connection: Connection) -> None:
        """Forget what is rolled back, unless it may have become durable all the same."""
        if connection.closed or connection.invalidated:
            return  # its info is gone; the checkin has published what it had written
        transaction: Transaction | None = connection.info.pop(KEY, None)
        if transaction is None:
            return
        transaction.settle()
        if transaction.changes and (
            transaction.opaque or connection.dialect.name in ("mysql", "mariadb")
        ):
            _publish(self, transaction)
        else:
            _release(transaction)  # taken for a COMMIT that was never sent

    def rollback_twophase(self, connection: Connection, _xid: Any, _prepared: Any) -> None:
        """Forget what is rolled back."""
        self.rollback(connection)

    # -- connections ----------------------------------------------------------------------------

    def checkout(self, _dbapi: Any, record: Any, _proxy: Any) -> None:
        """Take a connection for a raw one until an engine Connection claims it."""
        record.info[RAW] = True

    def engine_connect(self, connection: Connection) -> None:
        """Note that the connection's statements will be seen."""
        connection.info[RAW] = False

    def checkin(self, _dbapi: Any, record: Any) -> None:
        """Publish what was written unseen: by a raw connection, or with its end unknown."""
        if READER in record.info:
            return
        transaction: Transaction | None = record.info.pop(KEY, None)
        if record.info.get(RAW):
            for subscriber in list(self.subscribers):
                subscriber.publish(ChangeSet(everything=True), None)
        elif transaction is not None:
            transaction.settle()
            if transaction.changes or transaction.leases is not None:
                _publish(self, transaction)


def _note(transaction: Transaction, writes: Writes, context: Any, connection: Connection) -> None:
    transaction.opaque = transaction.opaque or writes.opaque
    if writes.anything:
        transaction.changes.add_everything()
        return
    for table in writes.tables:
        for name in _names(table, connection):
            transaction.changes.add_table(name)
    if writes.table is None:
        return
    names = _names(writes.table, connection)
    keys = rows_of(writes, context)
    if keys is not None:
        for name in names:
            transaction.changes.add_rows(name, keys)
    elif len(names) > 1:
        for name in names:
            transaction.changes.add_table(name)
    elif writes.inserts:
        transaction.inserting[id(context)] = writes.table
    else:
        transaction.changes.add_table(writes.table)


def _names(table: TableName, connection: Connection) -> list[TableName]:
    """Return all names under which a view may know a written table."""
    schema, name = table
    translate = connection.get_execution_options().get("schema_translate_map") or {}
    schemas = {schema, translate.get(schema, schema)}
    default = "main" if connection.dialect.name == "sqlite" else None
    default = default or connection.dialect.default_schema_name
    if default in schemas:
        schemas.add(None)
    elif None in schemas and schema is not None:
        schemas.add(default)
    return [(s, name) for s in schemas]


def _take_leases(watcher: Watcher, transaction: Transaction, connection: Connection) -> None:
    if transaction.leases is None:
        transaction.leases = []
        transaction.backend = _backend_of(connection.connection)
    transaction.watcher = watcher
    transaction.settle()
    for subscriber in list(watcher.subscribers):
        transaction.leases.append((subscriber, subscriber.lease(transaction.changes)))


def _publish(watcher: Watcher | None, transaction: Transaction) -> None:
    """Mark what a transaction changed, and end its leases."""
    leases, transaction.leases = transaction.leases, None
    told = set()
    for subscriber, lease in leases or ():
        subscriber.publish(transaction.changes, lease)
        told.add(id(subscriber))
    for subscriber in list(watcher.subscribers) if watcher is not None else ():
        if id(subscriber) not in told:
            subscriber.publish(transaction.changes, None)


def _autocommits(connection: Connection) -> bool:
    """Whether each statement of a connection commits by itself."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name == "sqlite":
        return driver.isolation_level is None and not driver.in_transaction
    if connection._is_autocommit_isolation():
        return not _began_by_hand(driver)
    return getattr(connection.connection.dbapi_connection, "autocommit", False) is True


def _began_by_hand(driver: Any) -> bool:
    """Whether BEGIN was sent as text on a connection in AUTOCOMMIT."""
    if hasattr(driver, "is_in_transaction"):  # asyncpg
        return bool(driver.is_in_transaction())
    if hasattr(driver, "get_transaction_status"):  # psycopg2
        return driver.get_transaction_status() in (1, 2, 3)
    status = getattr(getattr(driver, "info", None), "transaction_status", 0)  # psycopg
    return int(status) in (1, 2, 3)


def _in_transaction(connection: Connection) -> bool:
    return bool(cast("Any", connection.connection.driver_connection).in_transaction)


# -- COMMIT ------------------------------------------------------------------------------------


def _wrap_commit(dialect: Any) -> None:
    """Have a dialect's COMMITs end leases, however they end themselves."""
    if getattr(dialect.do_commit, "_sa_tablecache", False):
        return
    do_commit, do_commit_twophase = dialect.do_commit, dialect.do_commit_twophase

    def commit(dbapi_connection: Any) -> None:
        info = getattr(dbapi_connection, "info", None)
        transaction = info.get(KEY) if isinstance(info, dict) else None
        if not isinstance(info, dict) or transaction is None:
            do_commit(dbapi_connection)
        else:
            _commit(
                dialect, transaction, info, dbapi_connection, lambda: do_commit(dbapi_connection)
            )

    def commit_twophase(connection: Connection, *args: Any, **kwargs: Any) -> None:
        transaction = connection.info.get(KEY)
        if transaction is None:
            do_commit_twophase(connection, *args, **kwargs)
        else:
            _commit(
                dialect,
                transaction,
                connection.info,
                connection.connection,
                lambda: do_commit_twophase(connection, *args, **kwargs),
            )

    commit._sa_tablecache = True  # type: ignore[attr-defined]
    dialect.do_commit = commit
    dialect.do_commit_twophase = commit_twophase


def _commit(
    dialect: Any,
    transaction: Transaction,
    info: dict[Any, Any],
    dbapi_connection: Any,
    send: Callable[[], None],
) -> None:
    backend = _backend_of(dbapi_connection) if transaction.leases else None
    try:
        send()
    except BaseException as error:
        if transaction.leases is None:
            raise
        if dialect.name == "sqlite" and isinstance(error, Exception):
            # The file is busy or full: nothing was committed, and the transaction is still open.
            _release(transaction)
        elif _server_refused(error):
            _publish(None, transaction)
            info.pop(KEY, None)
        else:
            # The COMMIT may land later, or never: whoever asks now must not trust the cache.
            log.warning("a COMMIT ended in %r: its outcome is unknown", error)
            for subscriber, lease in transaction.leases:
                subscriber.orphan(lease, backend)
            transaction.leases = None
            info.pop(KEY, None)
        raise
    # Those too that began to watch since the lease was taken.
    _publish(transaction.watcher, transaction)
    info.pop(KEY, None)


def _release(transaction: Transaction) -> None:
    leases, transaction.leases = transaction.leases, None
    for subscriber, lease in leases or ():
        subscriber.publish(ChangeSet(), lease)


def _server_refused(error: BaseException) -> bool:
    """Whether the server itself answered that it did not commit."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state:
        return not str(state).startswith(("08", "57P"))
    arguments: tuple[Any, ...] = error.args
    lost = (2006, 2013, 2014, 2055, 4031)
    return (
        type(error).__module__.partition(".")[0] in ("pymysql", "MySQLdb", "mysql", "mariadb")
        and bool(arguments)
        and isinstance(arguments[0], int)
        and arguments[0] not in lost
    )


def _backend_of(dbapi_connection: Any) -> Backend | None:
    """Return the number of a connection's server process, which its driver knows."""
    driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    for name in ("get_server_pid", "get_backend_pid", "thread_id"):
        ask = getattr(driver, name, None)
        if callable(ask):
            return Backend(int(ask()))
    pid = getattr(getattr(driver, "info", None), "backend_pid", None)
    return None if pid is None else Backend(int(pid))


_watchers: WeakKeyDictionary[Engine, Watcher] = WeakKeyDictionary()


def watch(engine: Engine, subscriber: Subscriber) -> None:
    """Have a subscriber told of the commits of an engine and of all its option engines."""
    root = root_of(engine)
    watcher = _watchers.get(root)
    if watcher is None:
        watcher = _watchers[root] = Watcher(root)
    if subscriber not in watcher.subscribers:
        watcher.subscribers.append(subscriber)


def unwatch(engine: Engine, subscriber: Subscriber) -> None:
    """Stop telling a subscriber."""
    watcher = _watchers.get(root_of(engine))
    if watcher is not None and subscriber in watcher.subscribers:
        watcher.subscribers.remove(subscriber)


def root_of(engine: Engine) -> Engine:
    """Return the engine that an option engine was made from; events of one reach the other."""
    while hasattr(engine, "_proxied"):
        engine = engine._proxied
    return engine
