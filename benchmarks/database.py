"""The database that a benchmark reads: the flights example, in SQLite or in PostgreSQL.

Where more flights are asked for than there are, they are the same ones, year after year.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Interval,
    Table,
    create_engine,
    func,
    insert,
    literal,
    select,
    text,
)  # fmt: skip
from sqlalchemy.ext.asyncio import create_async_engine

from examples.flights_data import fill, tune_sqlite
from examples.flights_models import Flight, Weather
from examples.postgres import embedded_postgres

YEAR = timedelta(days=365)
"""From a flight to its copy: neither the flights nor the weather of the data span as much."""


@contextmanager
def sqlite(days: int | None, *, records: int = 0) -> Iterator[URL]:
    """Fill a temporary SQLite file, and yield its URL.

    :param days: only so many days of the data.
    :param records: at least so many flights, by :func:`repeat`.
    """
    with tempfile.TemporaryDirectory() as directory:
        url = URL.create("sqlite", database=str(Path(directory) / "flights.sqlite"))
        engine = create_engine(url)
        tune_sqlite(engine)
        with engine.begin() as connection:
            fill(connection, days=days)
            repeat(connection, records)
        engine.dispose()
        yield url


@contextmanager
def postgres(days: int | None, *, records: int = 0) -> Iterator[URL]:
    """Fill an embedded PostgreSQL as :func:`sqlite` does a file, and yield its URL for asyncpg."""

    async def prepare(url: URL) -> None:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(fill, days=days)
            await connection.run_sync(repeat, records)
        await engine.dispose()

    with embedded_postgres() as url:
        asyncio.run(prepare(url))
        yield url


def repeat(connection: Connection, records: int) -> int:
    """Copy the flights and their weather, year after year, until there are so many flights.

    A copy has the identifier of its original and so many times the number of flights more, and its
    time and so many times :data:`YEAR` more; everything else is the same, so that a day has the
    same records in every year. The last year is whole, so that there may be more in the end.

    Writes on the caller's connection, and commits nothing. Three million flights take SQLite
    20 s.

    :return: how many years there are.
    """
    flights, weather = Flight.__table__, Weather.__table__
    assert isinstance(flights, Table)
    assert isinstance(weather, Table)
    number, end = connection.execute(
        select(func.max(flights.c.id), func.max(flights.c.time_hour))
    ).one()
    if number >= records:
        return 1
    for index in flights.indexes:
        index.drop(connection)
    year = 1
    while number * year < records:
        copies = {
            column: _later(column, year, connection.dialect.name) if column.name == "time_hour"
            else column + number * year if column.name == "id"
            else column
            for table in (weather, flights)
            for column in table.columns
        }  # fmt: skip
        for table in (weather, flights):
            originals = select(*(copies[column] for column in table.columns)).where(
                table.c.time_hour <= end
            )
            connection.execute(insert(table).from_select(table.columns.keys(), originals))
        year += 1
    for index in flights.indexes:
        index.create(connection)
    connection.execute(text("ANALYZE"))
    return year


def _later(column: Any, years: int, dialect: str) -> Any:
    if dialect == "sqlite":  # which keeps times as text
        return func.strftime("%Y-%m-%d %H:%M:%S.000000", column, f"+{(YEAR * years).days} days")
    return column + literal(YEAR * years, Interval())
