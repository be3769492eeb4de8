"""What an application needs to test itself with its cache.

In: the application's cache, and a connection of a test. Out: a cache that lives in the test's
transaction (:func:`bound`), and assertions about reads (:func:`assert_hits`,
:func:`assert_statements`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final, overload

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import greenlet_spawn

from .asyncio import AsyncTableCache
from .binding import Binding
from .cache import BaseTableCache
from .events import all_subscribers
from .exc import TableCacheError
from .session import TableCache
from .view import CachedView

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
    binding = Binding(inner, raw)
    try:
        yield
    finally:
        binding.end()


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
        hits += sum(number for (kind, _), number in new.items() if kind == "hit")
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
