"""A cache that lives in the transaction of one connection: that of a test.

In: a cache, and a connection whose transaction is rolled back in the end. Out: a cache that sees
that transaction, and nothing of it afterwards. See :func:`.testing.bound`.

In the usual set-up for tests, sessions are joined to one connection by savepoints, and what they
call a commit releases a savepoint. A cache left to itself would be right, and of no use: to it the
whole test is one transaction that writes and never commits. So a bound cache

* reads through that connection, one read at a time: no other would see the rows;
* takes it for a commit when the outermost savepoint is released, and what is written outside of any
  for committed at once;
* gives up everything when the transaction ends;
* answers only sessions on that connection: others do not see these rows;
* follows no change feed, which tells of what is committed.

While a savepoint is open that wrote tables of a view, the database answers, as it does for any open
transaction: so no refresh reads what may yet be rolled back. An explicit load in such a moment may;
then what the savepoint wrote is marked however it ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.orm import Session

from .cache import BaseTableCache
from .changes import ChangeSet
from .commits import KEY, Transaction
from .drivers import TAINTED, in_transaction
from .events import root_of
from .exc import TableCacheError
from .feed.consumer import Consumer
from .figures import Reason
from .following import LISTEN, NOTIFY, POLL, TRIM
from .loading import Snapshots
from .returning import WRITES
from .table import CachedTable
from .turns import Turn
from .upkeep import Step

ELSEWHERE: Final = Reason(
    "bind", "the cache is bound to the connection of a test, and the session is not"
)
OVER: Final = Reason("bind", "the transaction that the cache is bound to has ended")


_BINDINGS: Final = "sa_tablecache.bindings"
"""In the connection's info: the bindings to it."""
_SAVEPOINT: Final = re.compile(
    r"\s*(SAVEPOINT|RELEASE(?:\s+SAVEPOINT)?|ROLLBACK(?:\s+\w+)?\s+TO(?:\s+SAVEPOINT)?)\s+(\S+)",
    re.IGNORECASE,
)
_EVENTS: Final = ("savepoint", "before_cursor_execute", "rollback")
"""Those of the connection, which come before those of its engine."""


class _Unheard:
    """A consumer of a change feed that answers what it is asked, and on which nobody relies."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def trusts(self, _: CachedTable) -> bool:
        """Say that it does not tell of changes."""
        return False

    def concerns(self, _: ChangeSet) -> bool:
        """Say that nobody has to be told of changes."""
        return False


class _Borrowed(Snapshots):
    """Reads through the connection of a test."""

    def __init__(self, binding: Binding, original: Snapshots) -> None:
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


class Binding:
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
        self._all: list[Binding] = connection.info.setdefault(_BINDINGS, [])
        """Those of the connection: what is settled is settled for all of them."""
        self._original = original
        self._borrowed = _Borrowed(self, original)
        self._set_snapshots(self._borrowed)
        self._consumer = cache.consumer
        self._jobs = self._without_feed()
        for table in self._tables():
            table.guards = (self.guard, *table.guards)
        self._run_upkeep(in_background=False)
        for name in _EVENTS:
            event.listen(connection, name, getattr(self, name))
        self._all.append(self)
        cache.lives_in = connection
        self._commit()
        self._drop()

    def _tables(self) -> list[CachedTable]:
        return list(self.cache._tables.values())

    def _set_snapshots(self, snapshots: Snapshots) -> None:
        self.cache._snapshots = snapshots
        for table in self._tables():
            table._snapshots = snapshots

    def _without_feed(self) -> dict[str, Step]:
        """Have no change feed: it tells others of what is committed, and that is nothing here."""
        cache = self.cache
        if self._consumer is None:
            return {}
        cache.consumer = cast("Any", _Unheard(self._consumer))
        for table in self._tables():
            table.feed = None
            table.guards = tuple(guard for guard in table.guards if guard != cache._guard)
        jobs = {name: cache.upkeep.remove(name) for name in (POLL, TRIM, NOTIFY, LISTEN)}
        return {name: run for name, run in jobs.items() if run is not None}

    def _with_feed(self) -> None:
        """Have the change feed again."""
        self.cache.consumer = self._consumer
        if self._consumer is not None and not self.cache.closed:
            for table in self._tables():
                self.cache._follow_view(table)
            for name, run in self._jobs.items():
                self.cache.upkeep.add(name, run)

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
        self._all.remove(self)
        self.cache.lives_in = None
        self._run_upkeep(in_background=True)
        self._drop()
        for table in self._tables():
            table.guards = tuple(guard for guard in table.guards if guard != self.guard)
        self._set_snapshots(self._original)
        self._with_feed()
        if self.cache.closed:
            self._original.close()

    # -- what counts as a commit ----------------------------------------------------------------

    def _commit(self) -> None:
        """Mark what was written so far, for all caches that live in the transaction."""
        changes = self._settle()
        if changes:
            for binding in self._all:
                binding.cache.publish(changes, None)

    def _settle(self) -> ChangeSet:
        """Return what was written so far, and count it as committed for caches that live here.

        To others it stays what an open transaction has written.
        """
        transaction: Transaction | None = self.connection.info.get(KEY)
        if transaction is None:
            return ChangeSet()
        transaction.settle()
        changes, transaction.changes = transaction.changes, ChangeSet()
        if transaction.settled is None:
            transaction.settled = ChangeSet()
        transaction.settled.update(changes)
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
        if what.startswith("RELEASE") or any(b.reads != b._reads_before for b in self._all):
            self._commit()
        else:
            self._settle()  # no cache can have read what is undone

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
        self._drop()

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
        if not self._savepoints:
            self._commit()
        return None
