"""A real MariaDB server for the tests, and fresh databases on it.

The server is the one whose URL is in ``SA_TABLECACHE_TEST_MARIADB_URL``, such as
``mysql+pymysql://root@127.0.0.1:3306/test``; its role must be allowed to create databases and
users, and to see and kill all connections. Without that variable the tests that need it are
skipped: there is no embedded MariaDB. ``.ci/run`` sets it.

What is a schema elsewhere is a database here, one of the whole server. Each process of the tests
therefore has a schema with a name of its own (``DEPOT`` of the zoo).
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import URL, Connection, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

VARIABLE = "SA_TABLECACHE_TEST_MARIADB_URL"

BYTEWISE = "utf8mb4_nopad_bin"
"""A collation under which text compares as `str` does in Python."""

FOLDING = "utf8mb4_general_ci"
"""The server's default, under which `'AA'`, `'aa'` and `'aa '` are equal."""


@dataclass(frozen=True)
class Mariadb:
    """A running server.

    :param url: a database of it from which others can be created; the driver is PyMySQL.
    """

    url: URL

    def create_database(self, collation: str = BYTEWISE, name: str | None = None) -> URL:
        """Create an empty database, with a name of its own unless one is given."""
        name = name or f"sa_tablecache_{uuid.uuid4().hex[:12]}"
        with self.administration() as connection:
            connection.execute(text(f"CREATE DATABASE {name} COLLATE {collation}"))
        return self.url.set(database=name)

    def drop_database(self, url: URL) -> None:
        """Drop a database, whoever is still connected to it."""
        with self.administration() as connection:
            disconnect_all(connection, str(url.database))
            connection.execute(text(f"DROP DATABASE IF EXISTS {url.database}"))

    @contextmanager
    def database(self, collation: str = BYTEWISE, name: str | None = None) -> Iterator[URL]:
        """Lend an empty database."""
        url = self.create_database(collation, name)
        try:
            yield url
        finally:
            self.drop_database(url)

    @contextmanager
    def administration(self) -> Iterator[Connection]:
        """Lend a connection that nobody else has, in AUTOCOMMIT mode."""
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            yield connection


def disconnect_all(connection: Connection, database: str) -> None:
    """Kill all other connections to a database, rather than wait for what they hold locked."""
    others = text(
        "SELECT id FROM information_schema.processlist WHERE db = :db AND id <> connection_id()"
    )
    for number in connection.scalars(others, {"db": database}).all():
        try:
            connection.exec_driver_sql(f"KILL CONNECTION {number}")
        except OperationalError as error:  # it has ended by itself
            if error.orig is None or error.orig.args[0] != 1094:
                raise


def configured_mariadb() -> Mariadb | None:
    """Return the server that the environment names, if it names one."""
    configured = os.environ.get(VARIABLE)
    return Mariadb(make_url(configured).set(drivername="mysql+pymysql")) if configured else None
