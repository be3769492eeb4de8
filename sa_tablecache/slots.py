"""Load slots: at most so many loads at a time, over all processes that share a database.

A deploy that starts eight workers would otherwise run the same join eight times at once. A load
holds one of N locks of the database while it reads:

==================== =========================================================================
PostgreSQL           ``pg_try_advisory_xact_lock(730146011, slot)`` in the transaction of the load
                     itself, so that it works through poolers that lend a connection for one
                     transaction, and ends with it
MariaDB, MySQL       ``GET_LOCK('sa_tablecache.<database>.<slot>', 0)`` on the load's connection
SQLite               an exclusive transaction on a file of its own, ``<database>-load-slot-<slot>``
                     beside the database, which stays empty
==================== =========================================================================

All of them go when the process or its connection does, whatever happens. Whoever finds no slot free
waits a moment, holding nothing, and tries again: moments of equal length for all who wait, so that
none is preferred.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final

from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.exc import DBAPIError

from .exc import LoadSlotTimeout, TableCacheError
from .loading import Snapshots
from .turns import sleep

log = logging.getLogger(__name__)

CLASS: Final = 730_146_011
"""The first of the two numbers by which PostgreSQL knows the locks; the other is the slot's."""

MOMENT: Final = 0.1
"""Seconds on average between two tries."""


class LoadSlots:
    """N slots for loads, shared with all processes that load from the database.

    :param number: how many; all processes should say the same.
    :param timeout: how many seconds a load waits for one.
    """

    def __init__(self, number: int, timeout: float = 300.0) -> None:
        if type(number) is not int or number < 1:
            raise TableCacheError(
                f"load_slots={number!r} is no number of slots: give a positive integer, or None "
                "for as many loads at once as there are"
            )
        self.number = number
        self.timeout = timeout

    @contextmanager
    def open(
        self,
        snapshots: Snapshots,
        opened: Callable[[], AbstractContextManager[Connection]] | None = None,
        *,
        in_task: bool,
    ) -> Iterator[Connection]:
        """Open a snapshot while holding a slot.

        It emits one statement for each slot that is tried.

        :param opened: opens a snapshot in another way than ``snapshots.open()``: a new one for each
            try, since one that waits goes stale.

        :raises LoadSlotTimeout: if none becomes free in time.
        """
        take = _TAKE.get(snapshots.dialect.name)
        if take is None:
            raise TableCacheError(
                f"load_slots= is not available on {snapshots.dialect.name}: give no load_slots"
            )
        started = time.monotonic()
        waiting = False
        while True:
            with (opened or snapshots.open)() as connection:
                # Not all begin with the same one: that would be two statements for the second.
                first = random.randrange(self.number)  # noqa: S311
                for at in range(self.number):
                    release = take(connection, (first + at) % self.number)
                    if release is not None:
                        break
                if release is not None:
                    if waiting:
                        log.info("got a load slot after %.1f s", time.monotonic() - started)
                    try:
                        yield connection
                    finally:
                        release()
                    return
            waited = time.monotonic() - started
            if waited >= self.timeout:
                raise LoadSlotTimeout(
                    f"none of the {self.number} load slot(s) of {_shown(snapshots.engine)} became "
                    f"free in {waited:.0f} s: other processes are loading; raise load_slots= or "
                    "slot_timeout=, or end them"
                )
            if not waiting:
                log.info("all %d load slots are taken: waiting for one", self.number)
                waiting = True
            sleep(min(MOMENT * random.uniform(0.5, 1.5), self.timeout), in_task=in_task)  # noqa: S311


def _shown(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=True)


Release = Callable[[], object]


def _nothing() -> None:
    """Do nothing: the end of the transaction releases the lock."""


def _postgresql(connection: Connection, slot: int) -> Release | None:
    lock = select(func.pg_try_advisory_xact_lock(CLASS, slot))
    taken = connection.scalar(lock)
    return _nothing if taken else None


def _mysql(connection: Connection, slot: int) -> Release | None:
    # The names of locks are those of the whole server, and short.
    database = str(connection.scalar(text("SELECT database()")))
    name = f"sa_tablecache.{hashlib.sha1(database.encode()).hexdigest()}.{slot}"  # noqa: S324
    names = {"name": name}
    take = text("SELECT GET_LOCK(:name, 0)")
    if not connection.scalar(take, names):
        return None

    def release() -> None:
        # A connection that is broken has lost its locks already.
        with suppress(DBAPIError):
            give = text("SELECT RELEASE_LOCK(:name)")
            connection.scalar(give, names)

    return release


def _sqlite(connection: Connection, slot: int) -> Release | None:
    rows: Any = connection.exec_driver_sql("PRAGMA database_list").all()
    path = next(row[2] for row in rows if row[1] == "main")
    # SQLite's own locks work wherever the database does, and end with the process.
    lock = sqlite3.connect(
        f"{path}-load-slot-{slot}", timeout=0, isolation_level=None, check_same_thread=False
    )
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            return None
        raise TableCacheError(
            f"cannot open {path}-load-slot-{slot}, whose lock is a load slot: {error}; let the "
            "application write beside its database, or give no load_slots"
        ) from error
    return lock.close


_TAKE: Final[dict[str, Callable[[Connection, int], Release | None]]] = {
    "postgresql": _postgresql,
    "mysql": _mysql,
    "mariadb": _mysql,
    "sqlite": _sqlite,
}
