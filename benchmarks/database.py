"""The database that a benchmark reads: the flights example, in SQLite or in PostgreSQL."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from examples.flights_data import fill, tune_sqlite
from examples.postgres import embedded_postgres


@contextmanager
def sqlite(days: int | None) -> Iterator[URL]:
    """Fill a temporary SQLite file, and yield its URL."""
    with tempfile.TemporaryDirectory() as directory:
        url = URL.create("sqlite", database=str(Path(directory) / "flights.sqlite"))
        engine = create_engine(url)
        tune_sqlite(engine)
        with engine.begin() as connection:
            fill(connection, days=days)
        engine.dispose()
        yield url


@contextmanager
def postgres(days: int | None) -> Iterator[URL]:
    """Fill an embedded PostgreSQL, and yield its URL for asyncpg."""

    async def prepare(url: URL) -> None:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(fill, days=days)
        await engine.dispose()

    with embedded_postgres() as url:
        asyncio.run(prepare(url))
        yield url
