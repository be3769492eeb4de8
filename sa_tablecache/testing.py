"""What an application needs to test itself with its cache.

In: the application's cache, and the connection of a test whose transaction is rolled back at its
end. Out: a cache that sees that transaction, and nothing of it afterwards (:func:`bound`); and
assertions about reads (:func:`assert_hits`, :func:`assert_statements`).

In the usual set-up for tests, sessions are joined to one connection by savepoints, and what they
call a commit releases a savepoint. A cache left to itself would be right, and of no use: to it the
whole test is one transaction that writes and never commits. So a bound cache

* reads through that connection, one read at a time: no other would see the rows;
* takes it for a commit when the outermost savepoint is released, and what is written outside of any
  for committed at once;
* gives up everything when the transaction ends;
* answers only sessions on that connection: others do not see these rows.

While a savepoint is open that wrote tables of a view, the database answers, as it does for any open
transaction: so no refresh reads what may yet be rolled back. An explicit load in such a moment may;
then what the savepoint wrote is marked however it ends.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final, overload

from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from .asyncio import AsyncTableCache
from .cache import BaseTableCache
from .changes import ChangeSet
from .commits import KEY, Transaction, transaction_of
from .drivers import TAINTED, in_transaction
from .events import all_subscribers, root_of
from .exc import TableCacheError
from .figures import Reason
from .loading import Snapshots
from .returning import WRITES
from .session import TableCache
from .table import CachedTable
from .turns import Turn
from .view import CachedView

ELSEWHERE: Final = Reason(
    "bind", "the cache is bound to the connection of a test, and the session is not"
)
OVER: Final = Reason("bind", "the transaction that the cache is bound to has ended")

_NOW: Final = 2**63
"""Later than any :func:`.events.tick`: see :meth:`_Binding.guard`."""


# -- a transaction for each test ------------------------------------------------------------------


@contextmanager
def bound(
    cache: TableCache | AsyncTableCache, connection: Connection | AsyncConnection
) -> Iterator[None]:
    """Have a cache live inside the transaction of one connection, for a block.

    ::

        with engine.connect() as connection, connection.begin() as transaction:
            with bound(cache, connection):
                Session.configure(bind=connection, join_transaction_mode="create_savepoint")
                ...
            transaction.rollback()

    All views are empty at the beginning and at the end. Emits no SQL by itself; on SQLite, whose
    driver begins transactions late, it emits BEGIN before the first savepoint. On PostgreSQL loads
    and refreshes run in savepoints, so that one that fails does not end the test's transaction.

    The upkeep does not run in the background meanwhile, because it would use the connection beside
    the test: see :func:`run_upkeep`. If it runs in the end, it goes on in the background; that of
    an :class:`.AsyncTableCache` is stopped.

    :param cache: bound to the engine of the connection.
    :param connection: with a transaction that has begun.
    :raises TableCacheError: if one of these is not so.
    """
    inner: Any = getattr(cache, "sync_cache", cache)
    raw: Any = connection
    if isinstance(connection, AsyncConnection):
        raw = connection.sync_connection
    if not isinstance(raw, Connection):
        raise TableCacheError(
            f"a cache is bound to a Connection that is open, not to {connection!r}"
        )
    binding = _Binding(inner, raw)
    try:
        yield
    finally:
        binding.end()


_SAVEPOINT: Final = re.compile(
    r"\s*(SAVEPOINT|RELEASE(?:\s+SAVEPOINT)?|ROLLBACK(?:\s+\w+)?\s+TO(?:\s+SAVEPOINT)?)\s+(\S+)",
    re.IGNORECASE,
)
_EVENTS: Final = ("savepoint", "before_cursor_execute", "rollback", "commit")
"""Those of the connection, which come before those of its engine."""


class _Borrowed(Snapshots):
    """Reads through the connection of a test."""

    def __init__(self, binding: _Binding, original: Snapshots) -> None:
        self.application = original.application
        self.dialect = original.dialect
        self.original = original
        self._binding = binding
        self._turn = Turn(in_task=bool(original.dialect.is_async))

    @property
    def engine(self) -> Engine:
        return self.original.engine

    @contextmanager
    def open(self) -> Iterator[Connection]:
        with self._turn:
            connection = self._binding.connection
            if connection.closed or not connection.in_transaction():
                raise TableCacheError(
                    "the cache is bound to the connection of a test, whose transaction has ended: "
                    "load and read before that, or leave the block of bound()"
                )
            self._binding.reads += 1
            with self._binding.own_read():
                if self.dialect.name == "postgresql":
                    with self._binding.own_savepoint():
                        yield connection
                else:
                    yield connection

    def close(self) -> None:
        """Leave the connection to the test."""


class _Binding:
    """A cache that lives in the transaction of one connection."""

    def __init__(self, cache: BaseTableCache, connection: Connection) -> None:
        if root_of(connection.engine) is not root_of(cache.engine):
            raise TableCacheError(
                f"the connection is one of {connection.engine!r}, and the cache is bound to "
                f"{cache.engine!r}"
            )
        original = cache._snapshots
        assert original is not None
        if isinstance(original, _Borrowed):
            raise TableCacheError("the cache is bound to the connection of a test already")
        if not connection.in_transaction():
            raise TableCacheError("begin a transaction first, which the test ends: begin()")
        self.cache = cache
        self.connection = connection
        self.reads = 0
        """How often the cache has read."""
        self._reads_before = 0
        """How often when the outermost savepoint began."""
        self._savepoints: list[str] = []
        self._own = False
        """Whether a savepoint that begins or ends is the cache's own."""
        self._committed = ChangeSet()
        """What counts as committed: so it will be for others, if the test commits after all."""
        self._original = original
        self._borrowed = _Borrowed(self, original)
        self._set_snapshots(self._borrowed)
        for table in self._tables():
            table.guards = (self.guard, *table.guards)
        self._run_upkeep(in_background=False)
        for name in _EVENTS:
            event.listen(connection, name, getattr(self, name))
        self._commit()
        self._drop()

    def _tables(self) -> list[CachedTable]:
        return list(self.cache._tables.values())

    def _set_snapshots(self, snapshots: Snapshots) -> None:
        self.cache._snapshots = snapshots
        for table in self._tables():
            table._snapshots = snapshots

    def _run_upkeep(self, *, in_background: bool) -> None:
        """Have the upkeep run beside the test or not; it goes on if it runs."""
        upkeep = self.cache.upkeep
        running = upkeep.running
        upkeep.stop()
        upkeep.in_background = in_background
        if running and not (in_background and self.cache.engine.dialect.is_async):
            # A task belongs to an event loop, and that of the test may be gone by now.
            upkeep.start()

    def _drop(self) -> None:
        """Give up everything that was read."""
        for table in self._tables():
            if table.layout is not None:
                table.clear()

    def end(self) -> None:
        """Have the cache be what it was before, and empty."""
        for name in _EVENTS:
            event.remove(self.connection, name, getattr(self, name))
        self._run_upkeep(in_background=True)
        self._drop()
        for table in self._tables():
            table.guards = tuple(guard for guard in table.guards if guard != self.guard)
        self._set_snapshots(self._original)
        if self.cache.closed:
            self._original.close()

    # -- what counts as a commit ----------------------------------------------------------------

    def _commit(self) -> None:
        """Mark what was written so far."""
        changes = self._take()
        if changes:
            self.cache.publish(changes, None)

    def _take(self) -> ChangeSet:
        """Return what was written so far, which is the open transaction's own no longer."""
        transaction: Transaction | None = self.connection.info.get(KEY)
        if transaction is None:
            return ChangeSet()
        transaction.settle()
        changes, transaction.changes = transaction.changes, ChangeSet()
        self._committed.update(changes)
        return changes

    def savepoint(self, connection: Connection, _: Any) -> None:
        """Begin the transaction where SQLite's driver has not: RELEASE would be a COMMIT."""
        if connection.dialect.name == "sqlite" and not in_transaction(connection):
            connection.exec_driver_sql("BEGIN")

    def before_cursor_execute(self, _: Connection, __: Any, statement: str, *___: Any) -> None:
        """Follow savepoints; the names are in the statements alone."""
        said = None if self._own else _SAVEPOINT.match(statement)
        if said is None:
            return
        what, name = said[1].upper(), said[2]
        if what == "SAVEPOINT":
            if not self._savepoints:
                self._commit()
                self._reads_before = self.reads
            self._savepoints.append(name)
            return
        if name in self._savepoints:
            del self._savepoints[self._savepoints.index(name) :]
        if self._savepoints:
            return
        if what.startswith("RELEASE") or self.reads != self._reads_before:
            self._commit()
        else:
            self._take()  # the cache cannot have read what is undone

    @contextmanager
    def own_read(self) -> Iterator[None]:
        """Have what the cache asks not count as what the test may have written or SET."""
        connection = self.connection
        options, tainted = connection._execution_options, connection.info.get(TAINTED)
        connection.execution_options(**{WRITES: ()})
        try:
            yield
        finally:
            connection._execution_options = options
            if not tainted and not connection.closed:
                connection.info.pop(TAINTED, None)

    @contextmanager
    def own_savepoint(self) -> Iterator[None]:
        """Run something in a savepoint that says nothing about the test."""
        self._own = True
        try:
            nested = self.connection.begin_nested()
        finally:
            self._own = False
        try:
            yield
        except BaseException:
            self._own = True
            try:
                nested.rollback()
            finally:
                self._own = False
            raise
        self._own = True
        try:
            nested.commit()
        finally:
            self._own = False

    def rollback(self, _: Connection) -> None:
        """Give up everything: it was never there."""
        self._savepoints.clear()
        self._committed = ChangeSet()
        self._drop()

    def commit(self, connection: Connection) -> None:
        """Have others told of all that the transaction wrote."""
        self._savepoints.clear()
        transaction = transaction_of(connection.info)
        transaction.changes.update(self._committed)
        self._committed = ChangeSet()

    # -- reads ----------------------------------------------------------------------------------

    def guard(self, session: Session, table: CachedTable, statement: Any, _: bool) -> str | None:
        """Return why a session may not read from the cache; mark what was written before that."""
        try:
            bind = session.get_bind(clause=select(table.view) if statement is None else statement)
        except Exception:
            return ELSEWHERE
        if bind is not self.connection:
            return ELSEWHERE
        if self.connection.closed or not self.connection.in_transaction():
            return OVER
        # Where transactions have snapshots, what a view was read from may not be newer than the
        # reader's. Here it is the reader's own.
        transaction_of(self.connection.info).began = _NOW
        if not self._savepoints:
            self._commit()
        return None


@overload
def run_upkeep(cache: TableCache) -> None: ...
@overload
def run_upkeep(cache: AsyncTableCache) -> Awaitable[None]: ...
def run_upkeep(cache: TableCache | AsyncTableCache) -> Awaitable[None] | None:
    """Do now what the cache does in the background: slide windows, trim, refresh; once each.

    Of an :class:`.AsyncTableCache` it is awaited. What a job raises is raised. ::

        clock.advance(days=1)
        run_upkeep(cache)
        assert cache.covers(FlightBoard, FlightBoard.time_hour >= yesterday)
    """
    if isinstance(cache, AsyncTableCache):
        return greenlet_spawn(cache.sync_cache.upkeep.run_once)
    cache.upkeep.run_once()
    return None


class Clock:
    """A clock that stands still until it is told otherwise: ``cache.clock = Clock(...)``.

    >>> from datetime import UTC
    >>> clock = Clock(datetime(2013, 1, 1, 12, tzinfo=UTC))
    >>> clock.advance(hours=1, minutes=30)
    >>> clock().isoformat()
    '2013-01-01T13:30:00+00:00'

    :param now: what it says, with a time zone.
    """

    def __init__(self, now: datetime) -> None:
        if now.tzinfo is None:
            raise TableCacheError(f"{now!r} says no time zone: Clock(datetime(..., tzinfo=UTC))")
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, by: timedelta = timedelta(0), **units: float) -> None:
        """Go forward, by a timedelta or by what would make one: ``advance(days=1)``."""
        self.now += by + timedelta(**units)


# -- assertions -----------------------------------------------------------------------------------


@contextmanager
def assert_hits(view: type[CachedView]) -> Iterator[None]:
    """Assert that the cache answered all reads of a view in a block, and that there were any.

    ::

        with assert_hits(FlightBoard):
            client.get("/departures")

    Reads count in whatever thread, task or session they are, for all caches of the process that
    have the view. A read that had to refresh marked records first is a hit as well.

    :raises AssertionError: otherwise; it says how the others were answered, and why.
    """
    __tracebackhide__ = True
    tables = [
        subscriber._tables[view]
        for subscriber in all_subscribers()
        if isinstance(subscriber, BaseTableCache) and view in subscriber._tables
    ]
    if not tables:
        raise TableCacheError(f"{view.__name__} is in no cache that is bound to an engine")
    before = [(table.counts.hits, table.counts.reads.copy()) for table in tables]
    yield
    hits = 0
    others: Counter[str] = Counter()
    for table, (plain, reads) in zip(tables, before, strict=True):
        hits += table.counts.hits - plain
        new = table.counts.reads - reads
        hits += new["hit", "refresh"]
        told = list(table.recent)[-new.total() :] if new else []
        others.update(f"{read.kind}: {read.reason}" for read in told if read.kind != "hit")
    if others:
        lines = [f"  {number} x {what}" for what, number in others.most_common()]
        raise AssertionError(
            f"{others.total()} of {hits + others.total()} reads of {view.__name__} were no hits:\n"
            + "\n".join(lines)
        )
    if not hits:
        raise AssertionError(f"nothing read {view.__name__}")


_CONTROL: Final = re.compile(
    r"\s*(BEGIN|START TRANSACTION|COMMIT|ROLLBACK|SAVEPOINT|RELEASE)\b", re.IGNORECASE
)


@contextmanager
def assert_statements(
    number: int, *, engine: Engine | AsyncEngine | None = None
) -> Iterator[list[str]]:
    """Assert how many SQL statements a block sends to the database.

    ::

        with assert_statements(0):
            session.range(FlightBoard.by_time, ge=start, lt=end)

    BEGIN, COMMIT, savepoints and their like do not count; an executemany counts as one.

    :param number: of statements.
    :param engine: whose; the default is all of the process, with those by which caches read.
    :returns: a list of the statements, as it grows.
    :raises AssertionError: if there were more or fewer; it shows them.
    """
    __tracebackhide__ = True
    target: Any = engine.sync_engine if isinstance(engine, AsyncEngine) else engine or Engine
    statements: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if not _CONTROL.match(statement):
            statements.append(statement)

    event.listen(target, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(target, "before_cursor_execute", note)
    if len(statements) != number:
        shown = "".join(f"\n  {' '.join(statement.split())}" for statement in statements)
        raise AssertionError(
            f"expected {number} statements, counted {len(statements)}{shown and ':'}{shown}"
        )
