"""Hears from PostgreSQL that something was committed, so that a poll need not wait for its turn.

In: an engine. Out: calls of a function, for each notification and whenever some may have been lost.
A notification is no more than a hint: those that are sent while nobody listens are gone, and so
polls go on at their interval.

The connection is one of its own, taken out of the pool. It is in autocommit and never in a
transaction, where it would be deaf. A pooler that gives each transaction another connection cannot
be listened through: ``ChangeFeed(listen_engine=...)`` goes around it. A firewall that forgets idle
connections is found out by a statement now and then.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from threading import Event, Lock
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from sa_tablecache.exc import TableCacheError

log = logging.getLogger(__name__)

CHANNEL: Final = "sa_tablecache"
"""The channel of NOTIFY; each database has its own."""
KEEPALIVE: Final = 30.0
"""After so many seconds of silence the connection is tried."""

_DRIVERS: Final = ("psycopg", "psycopg_async", "psycopg2", "asyncpg")


class Listener:
    """Listens on a connection of its own; :meth:`step` is a job of the upkeep.

    ::

        listener = Listener(engine, lambda: upkeep.wake("feed"))
        upkeep.add("listen", listener.step)
        ...
        listener.stop()
        upkeep.stop()

    :param engine: of an asynchronous one, its ``sync_engine``; steps run in greenlets, then.
    :param heard: is called in the thread or task of the step, or by the event loop.
    :param keepalive: after so many seconds of silence the connection is tried.
    """

    def __init__(
        self, engine: Engine, heard: Callable[[], object], *, keepalive: float = KEEPALIVE
    ) -> None:
        self._engine = engine
        self._heard = heard
        self._keepalive = keepalive
        self._ear: _SocketEar | _LoopEar | None = None
        self._lock = Lock()
        self._busy = False
        """Whether a step runs: then the connection is its."""
        self._stopped = Event()
        self._told = False

    @property
    def listening(self) -> bool:
        """Whether it has a connection that listens."""
        return self._ear is not None

    def step(self) -> float | None:
        """Connect, if it is not, and wait for a notification, or until it is time to try.

        LISTEN when it connects; ``SELECT 1`` after silence. An error of the database ends the
        connection; the next step makes another.

        :raises TableCacheError: where an asynchronous engine is needed, or a synchronous one.
        """
        if self._engine.dialect.driver not in _DRIVERS:
            if not self._told:
                self._told = True
                log.warning(
                    "no notifications can be heard through the driver %s: changes are found by "
                    "polling alone; psycopg and asyncpg can listen, ChangeFeed(listen_engine=...)",
                    self._engine.dialect.driver,
                )
            return None
        if self._engine.dialect.is_async is not in_greenlet():
            kinds = ("an asynchronous", "a synchronous")
            raise TableCacheError(
                "ChangeFeed(listen_engine=...) has to be {} engine, as that of the cache is; this "
                "is {} one".format(*(kinds if in_greenlet() else kinds[::-1]))
            )
        with self._lock:
            if self._stopped.is_set():
                return None
            self._busy = True
        try:
            if self._ear is None:
                self._ear = _ear(self._engine)
                self._heard()  # what was said before, perhaps
            elif self._ear.wait(self._keepalive):
                self._heard()
            else:
                self._ear.connection.exec_driver_sql("SELECT 1")
                self._heard()  # what came meanwhile, the driver has kept to itself
        except BaseException:
            self._give_up()
            raise
        with self._lock:
            self._busy = False
            stopped = self._stopped.is_set()
        if not stopped:
            return 0.0
        self._give_up()
        return None

    def stop(self) -> None:
        """End the wait of a step, and give up the connection; any thread may call it.

        Before or after the upkeep is stopped: where a step runs, it gives up the connection itself.
        """
        with self._lock:
            self._stopped.set()
            if self._busy:
                if self._ear is not None:
                    self._ear.interrupt()
                return
        self._give_up()

    def _give_up(self) -> None:
        with self._lock:
            self._busy = False
            ear, self._ear = self._ear, None
        if ear is not None:
            ear.close()


def _ear(engine: Engine) -> _SocketEar | _LoopEar:
    connection = engine.connect()
    raw: Any = None
    try:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        raw = connection.connection.driver_connection
        connection.detach()
        connection.exec_driver_sql(f"LISTEN {CHANNEL}")
        return (_LoopEar if engine.dialect.is_async else _SocketEar)(connection, raw)
    except BaseException:
        _close(connection, raw)
        raise


def _close(connection: Connection, raw: Any) -> None:
    """Close a connection that has left its pool, without a word that could have to be awaited."""
    connection.invalidate()
    connection.close()
    if hasattr(raw, "terminate"):  # asyncpg
        raw.terminate()
    elif hasattr(raw, "pgconn"):  # psycopg
        raw.pgconn.finish()
    elif raw is not None:
        raw.close()


class _SocketEar:
    """Waits for the socket of a synchronous driver, and for who interrupts."""

    def __init__(self, connection: Connection, raw: Any) -> None:
        self.connection = connection
        self._raw = raw
        self._bell, self._button = socket.socketpair()
        self._selector = DefaultSelector()  # select() has a limit on the numbers of files
        self._selector.register(self._bell, EVENT_READ)
        self._selector.register(self._raw.fileno(), EVENT_READ)

    def wait(self, seconds: float) -> bool:
        """Return whether there was a notification."""
        readable = [key.fileobj for key, _ in self._selector.select(seconds)]
        return bool(readable) and self._bell not in readable and _notified(self._raw)

    def interrupt(self) -> None:
        """Have a wait end, also one that begins later."""
        with suppress(OSError):  # closed by the step meanwhile
            self._button.send(b"!")

    def close(self) -> None:
        """Close the connection, which may be lost."""
        _close(self.connection, self._raw)
        self._selector.close()
        self._bell.close()
        self._button.close()


class _LoopEar:
    """Waits for an event of the loop of an asynchronous driver."""

    def __init__(self, connection: Connection, raw: Any) -> None:
        self.connection = connection
        self._raw = raw
        self._asyncpg = connection.dialect.driver == "asyncpg"
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._notified = False
        if self._asyncpg:
            self._raw.add_termination_listener(lambda _: self._woken.set())
            await_only(self._raw.add_listener(CHANNEL, self._notify))

    def _notify(self, *_: Any) -> None:
        self._notified = True
        self._woken.set()

    def wait(self, seconds: float) -> bool:
        """Return whether there was a notification."""
        return bool(await_only(self._wait(seconds)))

    async def _wait(self, seconds: float) -> bool:
        # psycopg has a reader of its own on the socket while it runs a statement.
        if not self._asyncpg:
            self._loop.add_reader(self._raw.fileno(), self._woken.set)
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return False
        finally:
            if not self._asyncpg:
                self._loop.remove_reader(self._raw.fileno())
        self._woken.clear()
        if not self._asyncpg:
            return _notified(self._raw)
        notified, self._notified = self._notified, False
        return notified

    def interrupt(self) -> None:
        """Have a wait end, also one that begins later."""
        with suppress(RuntimeError):  # the loop is closed, and the wait with it
            self._loop.call_soon_threadsafe(self._woken.set)

    def close(self) -> None:
        """Close the connection, which may be lost."""
        _close(self.connection, self._raw)


def _notified(raw: Any) -> bool:
    """Read what the server has sent, and return whether a notification was among it."""
    if hasattr(raw, "pgconn"):  # psycopg
        raw.pgconn.consume_input()
        notified = False
        while raw.pgconn.notifies() is not None:
            notified = True
        return notified
    raw.poll()
    notified = bool(raw.notifies)
    raw.notifies.clear()
    return notified
