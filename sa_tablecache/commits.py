"""The open transaction of a connection: what it has written, and how its COMMIT ends.

In: what statements write, as ``events.py`` reads them. Out: calls of three methods of each
subscriber (a cache):

``lease(changes)``
    a COMMIT that will publish these changes is about to be sent: answers that they could touch
    come from the database until it is over;
``publish(changes, lease)``
    it is over: mark what changed and end the lease, in one step;
``orphan(lease, backend)``
    nobody knows how it ended: keep the lease until the server has ended that transaction.

SQLAlchemy's ``commit`` event fires *before* COMMIT and nothing fires after it for certain (not when
the task is cancelled, say): so the dialect's ``do_commit`` is wrapped, once, by a function that
looks for a transaction's state. It is never unwrapped, because others may have wrapped it since.

The state hangs on the pooled connection (``info``), where savepoints, several sessions on one
connection, and outer transactions need no code at all: what counts is when the connection commits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from sqlalchemy import Connection, Table

from .analysis import TableName
from .changes import ChangeSet, RowKey, Written
from .interests import Interest
from .returning import Rows
from .statements import Writes

log = logging.getLogger(__name__)

KEY: Final = "sa_tablecache.transaction"
"""In the connection's info: its :class:`Transaction`."""


class Subscriber(Protocol):
    """What a cache does when an engine that it watches commits."""

    def interest(self) -> Interest:
        """Return what it asks of written tables: the same object while that is the same."""

    def tables_named(self, name: str) -> Iterable[Table]:
        """Return the tables of the views' metadata with a name, in any schema and case."""

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


class Underway(NamedTuple):
    """A statement that is being executed."""

    context: Any
    writes: Writes
    names: Mapping[TableName, Iterable[TableName]]
    """For each table that it writes, the names under which a view may know it."""
    acts: bool
    """Whether the database may write something even if it wrote no row."""
    keys: list[RowKey] | None
    """The rows that it names, if it names them."""
    asks: bool
    """Whether the rows are known when it has a result."""
    suffixed: bool = False
    """Whether RETURNING was written behind it."""


@dataclass(slots=True)
class Transaction:
    """What the open transaction of one connection has written so far."""

    changes: ChangeSet = field(default_factory=ChangeSet)
    settled: ChangeSet | None = None
    """What it wrote before that, and caches that live in it take for committed: see binding.py."""
    underway: dict[int, Underway] = field(default_factory=dict)
    """Statements that are being executed, by the identity of their contexts."""
    leases: list[tuple[Subscriber, Any]] | None = None
    unleased: bool = False
    """Whether it wrote anything since these were taken."""
    began: int = 0
    subscribers: list[Subscriber] | None = None
    """Those to tell of its end who had no lease: a list that may grow."""
    backend: Backend | None = None
    opaque: bool = False
    ending: bool = False
    """Whether SQLAlchemy itself is sending the statements that end it."""
    locks: bool = False
    """Whether others may have to wait for what it has locked."""

    @property
    def written(self) -> ChangeSet:
        """All that its COMMIT would make visible."""
        if self.settled is None:
            return self.changes
        everything = ChangeSet()
        everything.update(self.settled)
        everything.update(self.changes)
        return everything

    def forget(self) -> None:
        """Forget what it wrote: it was published, and is committed."""
        self.changes, self.settled = ChangeSet(), None

    def touches(self, tables: frozenset[TableName], *, settled: bool = True) -> bool:
        """Whether it wrote one of the tables.

        :param settled: whether what caches that live in it take for committed counts.
        """
        if settled and self.settled is not None and self.settled.touches(tables):
            return True
        return self.changes.touches(tables) or any(
            statement.writes.anything
            or any(not tables.isdisjoint(names) for names in statement.names.values())
            for statement in self.underway.values()
        )

    def wrote(self, statement: Underway, rows: Rows | None, *, any_row: bool = True) -> None:
        """Note what a statement wrote, now that it is over.

        :param rows: the rows of its table; ``None`` if they are not known.
        :param any_row: whether it wrote a row of its table at all.
        """
        self.underway.pop(id(statement.context), None)
        self.unleased = True
        writes, changes = statement.writes, self.changes
        changes.unlogged = changes.unlogged or writes.replaces
        if writes.anything:
            changes.add_everything()
            return
        for table in writes.tables:
            for name in statement.names[table]:
                changes.add_table(name)
        if writes.table is None or not any_row:
            return
        for table in writes.further:
            for name in statement.names[table]:
                changes.add_table(name)
        for name in statement.names[writes.table]:
            if rows is None:
                changes.add_table(name)
            elif rows.before is not None:
                for key, before in zip(rows.keys, rows.before, strict=True):
                    changes.add_rows(name, [key], Written(before=(before,)))
            else:
                new = () if writes.kind == "insert" else None
                changes.add_rows(name, rows.keys, Written(writes.columns, new))

    def settle(self) -> None:
        """Count statements of whose end nobody heard as if they had written what they could."""
        for statement in list(self.underway.values()):
            keys = statement.keys
            self.underway.pop(id(statement.context))
            writes = statement.writes
            if keys is not None and writes.table is not None and not writes.anything:
                for name in statement.names[writes.table]:
                    self.changes.add_rows(name, keys)
                keys = []
            self.wrote(statement, None if keys is None else Rows([]))


def transaction_of(info: dict[Any, Any]) -> Transaction:
    """Return the state of a connection's transaction."""
    transaction: Transaction | None = info.get(KEY)
    if transaction is None:
        transaction = info[KEY] = Transaction()
    return transaction


def take_leases(subscribers: list[Subscriber], transaction: Transaction, pooled: Any) -> None:
    """Have subscribers take leases on what a transaction is about to make visible."""
    release(transaction)
    transaction.leases, transaction.unleased = [], False
    if transaction.backend is None:
        transaction.backend = backend_of(pooled)
    transaction.subscribers = subscribers
    written = transaction.written
    for subscriber in list(subscribers):
        transaction.leases.append((subscriber, subscriber.lease(written)))


def publish(subscribers: list[Subscriber] | None, transaction: Transaction) -> None:
    """Mark what a transaction changed, and end its leases."""
    leases, transaction.leases = transaction.leases, None
    told = set()
    written = transaction.written
    for subscriber, lease in leases or ():
        subscriber.publish(written, lease)
        told.add(id(subscriber))
    for subscriber in list(subscribers or ()):
        if id(subscriber) not in told:
            subscriber.publish(written, None)


def release(transaction: Transaction) -> None:
    """End leases of a COMMIT that was never sent."""
    leases, transaction.leases = transaction.leases, None
    for subscriber, lease in leases or ():
        subscriber.publish(ChangeSet(), lease)


def orphan(transaction: Transaction, backend: Backend | None) -> None:
    """Leave leases to their subscribers: nobody knows how the COMMIT ended."""
    leases, transaction.leases = transaction.leases, None
    for subscriber, lease in leases or ():
        subscriber.orphan(lease, backend)


def wrap_commit(dialect: Any) -> None:
    """Have a dialect's COMMITs end leases, however they end themselves."""
    if getattr(dialect.do_commit, "_sa_tablecache", False):
        return
    do_commit, do_commit_twophase = dialect.do_commit, dialect.do_commit_twophase

    def commit(dbapi_connection: Any) -> None:
        info = getattr(dbapi_connection, "info", None)
        transaction = info.get(KEY) if isinstance(info, dict) else None
        if not isinstance(info, dict) or transaction is None:
            do_commit(dbapi_connection)
        elif transaction.leases is None and not (
            transaction.underway
            or transaction.settled is not None
            or (changes := transaction.changes).everything
            or changes.tables
            or changes.rows
            or changes.ranges
        ):
            do_commit(dbapi_connection)
            info.pop(KEY, None)
        else:
            if transaction.subscribers is not None and (
                transaction.leases is None or transaction.underway or transaction.unleased
            ):
                # Listeners of the application that came after ours have written.
                transaction.settle()
                if transaction.written:
                    take_leases(transaction.subscribers, transaction, dbapi_connection)
            _commit(
                dialect, transaction, info, dbapi_connection, lambda: do_commit(dbapi_connection)
            )

    def commit_twophase(connection: Connection, *args: Any, **kwargs: Any) -> None:
        transaction = connection.info.get(KEY)
        if transaction is None or kwargs.get("recover"):
            # Nobody was told of it, and nobody knows what it wrote: its text says as much.
            do_commit_twophase(connection, *args, **kwargs)
        else:
            transaction.ending = True
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
    backend = transaction.backend  # known where leases were taken
    try:
        send()
    except BaseException as error:
        if transaction.leases is None:
            raise
        if dialect.name == "sqlite" and isinstance(error, Exception):
            # The file is busy or full: nothing was committed, and the transaction is still open.
            release(transaction)
        elif _server_refused(error):
            publish(None, transaction)
            info.pop(KEY, None)
        else:
            # The COMMIT may land later, or never: whoever asks now must not trust the cache.
            log.warning("a COMMIT ended in %r: its outcome is unknown", error)
            orphan(transaction, backend)
            info.pop(KEY, None)
        raise
    # Those too that began to watch since the lease was taken.
    publish(transaction.subscribers, transaction)
    info.pop(KEY, None)


def _server_refused(error: BaseException) -> bool:
    """Whether the server itself answered that it did not commit."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state:
        return not str(state).startswith(("08", "57P"))
    arguments: tuple[Any, ...] = error.args
    return (
        type(error).__module__.partition(".")[0] in _MYSQL_DRIVERS
        and bool(arguments)
        and isinstance(arguments[0], int)
        and arguments[0] > 0
        and not 2000 <= arguments[0] < 3000  # what the client says by itself
    )


_MYSQL_DRIVERS: Final = ("pymysql", "MySQLdb", "mysql", "mariadb", "asyncmy")


def backend_of(dbapi_connection: Any) -> Backend | None:
    """Return the number of a connection's server process, which its driver knows."""
    driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    for name in ("get_server_pid", "get_backend_pid", "thread_id"):
        ask = getattr(driver, name, None)
        if callable(ask):
            return Backend(int(ask()))
    pid = getattr(getattr(driver, "info", None), "backend_pid", None)
    pid = getattr(driver, "connection_id", None) if pid is None else pid
    return None if pid is None else Backend(int(pid))
