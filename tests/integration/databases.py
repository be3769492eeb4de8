"""Databases with the tables of the zoo, to be emptied and used again by one test after another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tests.conftest import asynchronous
from tests.mariadb import disconnect_all
from tests.zoo import DEPOT, Base


@dataclass
class Database:
    """A database that has the tables of the zoo.

    Engines are lent, disposed of, and lent again: what they compiled is most of what a test costs.
    """

    url: URL
    original: Path | None = None
    """For SQLite: a file with empty tables."""
    _free: dict[Any, list[Engine]] = field(default_factory=dict, repr=False)

    @property
    def dialect(self) -> str:
        """The name of the dialect: `sqlite`, `postgresql` or `mysql`."""
        return self.url.get_backend_name()

    def engine(self, **options: Any) -> Engine:
        """Return a new engine with a connection pool of its own."""
        engine = create_engine(self.url, **options)
        self._prepare(engine)
        return engine

    @contextmanager
    def lent_engine(self, **options: Any) -> Iterator[Engine]:
        """Lend an engine that nobody else uses now."""
        free = self._free.setdefault(tuple(sorted(options.items())), [])
        engine = free.pop() if free else self.engine(**options)
        try:
            yield engine
        finally:
            engine.dispose()
            free.append(engine)

    @contextmanager
    def bystander(self) -> Iterator[Connection]:
        """Lend a connection that nothing is attached to, in AUTOCOMMIT mode."""
        with (
            self.lent_engine(isolation_level="AUTOCOMMIT") as engine,
            engine.connect() as connection,
        ):
            yield connection

    def async_engine(self, **options: Any) -> AsyncEngine:
        """Return a new asynchronous engine."""
        engine = create_async_engine(asynchronous(self.url), **options)
        self._prepare(engine.sync_engine)
        return engine

    def create(self) -> None:
        """Create the tables."""
        engine = self.engine(poolclass=NullPool)
        with engine.begin() as connection:
            if self.dialect == "postgresql":
                connection.execute(text(f"CREATE SCHEMA {DEPOT}"))
            Base.metadata.create_all(connection)

    def empty(self) -> None:
        """Delete all rows, whatever connections a failed test left behind."""
        if self.original is not None:
            path = Path(str(self.url.database))
            for suffix in (".sqlite", ".depot"):
                fresh = path.with_suffix(".fresh")
                fresh.write_bytes(self.original.with_suffix(suffix).read_bytes())
                fresh.replace(path.with_suffix(suffix))
            return
        with self.bystander() as connection:
            if self.dialect == "mysql":
                disconnect_all(connection, str(self.url.database))
            else:
                connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE"
                        " datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(table.delete())

    def _prepare(self, engine: Engine) -> None:
        if self.dialect == "sqlite":
            event.listen(engine, "connect", _sqlite_connect(str(self.url.database)))


def _sqlite_connect(database: str) -> Callable[..., None]:
    depot = str(Path(database).with_suffix(".depot"))

    def connect(dbapi_connection: Any, _record: Any) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA synchronous = OFF")
        cursor.execute(f"ATTACH DATABASE '{depot}' AS {DEPOT}")
        cursor.close()

    return connect
