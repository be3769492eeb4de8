"""What a connection is in the middle of: as its driver and its server see it.

In: a connection. Out: whether each statement commits by itself, whether a transaction is open,
whether a cursor was used that the engine knows nothing of (for COPY, say), whether what it stores
is what it was given.
"""

from __future__ import annotations

import sqlite3
from typing import Any, Final

from sqlalchemy import Connection

from .commits import transaction_of

TAINTED: Final = "sa_tablecache.tainted"
"""In the connection's info: SET or the like ran, so that it may see what others do not.

It stays when the connection returns to its pool: a reset of the pool ends transactions, and not
what was set for the session.
"""
CURSOR: Final = "sa_tablecache.cursor"
"""In the connection's info: its newest cursor, until the engine executes it."""


def watch_cursors(connection: Connection) -> None:
    """Notice the cursors that are not the engine's own: it tells of each when it executes it."""
    fairy: Any = connection.connection
    info, make = fairy.info, fairy.dbapi_connection.cursor  # no reference to the fairy itself

    def cursor(*args: Any, **kwargs: Any) -> Any:
        if CURSOR in info:
            count_unknown(info)
        made = info[CURSOR] = make(*args, **kwargs)
        return made

    fairy.cursor = cursor


def count_unknown(info: dict[Any, Any]) -> None:
    """Have a cursor that the engine did not execute count as one that wrote anything."""
    if info.pop(CURSOR, None) is not None:
        transaction_of(info).changes.add_everything()


def autocommits(connection: Connection) -> bool:
    """Whether each statement of a connection commits by itself."""
    if connection.dialect.name == "sqlite":
        file = _sqlite_connection(connection)
        return file.isolation_level is None and not file.in_transaction
    driver: Any = connection.connection.driver_connection
    status = _server_status(driver)
    if status is not None:
        return status & _IN_TRANSACTION_OR_AUTOCOMMIT == _AUTOCOMMIT
    if connection._is_autocommit_isolation():
        return not _began_by_hand(driver)
    return getattr(connection.connection.dbapi_connection, "autocommit", False) is True


_AUTOCOMMIT: Final = 2
_IN_TRANSACTION_OR_AUTOCOMMIT: Final = 3


def _server_status(driver: Any) -> int | None:
    """Return what a MariaDB server said last of its session, where the driver keeps it.

    Only statements without rows bring it up to date. Those that begin a transaction, end it, or
    set ``autocommit`` are such.
    """
    status = getattr(driver, "server_status", None)
    return status if isinstance(status, int) else None


def knows_transactions(connection: Connection) -> bool:
    """Whether it is known if a transaction was begun by hand on a connection in AUTOCOMMIT."""
    return connection.dialect.name not in ("mysql", "mariadb") or (
        _server_status(connection.connection.driver_connection) is not None
    )


def keeps_keys(connection: Connection) -> bool:
    """Whether keys are stored as they are written: no SET has changed ``sql_mode``, say."""
    return connection.dialect.name not in ("mysql", "mariadb") or TAINTED not in connection.info


def _began_by_hand(driver: Any) -> bool:
    """Whether a transaction is open, by the driver: BEGIN as text on one in AUTOCOMMIT, say."""
    if hasattr(driver, "is_in_transaction"):  # asyncpg
        return bool(driver.is_in_transaction())
    if hasattr(driver, "get_transaction_status"):  # psycopg2
        return driver.get_transaction_status() in (1, 2, 3)
    status = getattr(getattr(driver, "info", None), "transaction_status", 0)  # psycopg
    return int(status) in (1, 2, 3)


def is_open(connection: Connection) -> bool:
    """Whether the server still has a transaction, and was not told by the driver to commit."""
    if connection.dialect.name == "sqlite":
        return in_transaction(connection)
    return _began_by_hand(connection.connection.driver_connection)


def in_transaction(connection: Connection) -> bool:
    """Whether a transaction is open on a connection of SQLite."""
    return bool(_sqlite_connection(connection).in_transaction)


def _sqlite_connection(connection: Connection) -> Any:
    """Return what the driver calls a connection; SQLAlchemy is only asked where it adapts it."""
    fairy: Any = connection.connection
    made = fairy.dbapi_connection
    return made if type(made) is sqlite3.Connection else fairy.driver_connection
