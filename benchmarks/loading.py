"""Loading everything from PostgreSQL: ``cache.load`` against asyncpg's own fetch.

asyncpg fetches the very same statement, hidden columns and all, into its own records, so that the
ratio is what SQLAlchemy, the sharing of values and three sorted indexes cost on top of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Engine, event
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.harness import Case, Result, compare_async
from examples.flights_models import FlightBoard
from sa_tablecache import AsyncTableCache

GOAL = 1.8


async def run(url: URL, *, quick: bool) -> list[Result]:
    """Load and fetch in turns."""
    engine = create_async_engine(url)
    async with (
        AsyncTableCache(engine, views=[FlightBoard]) as cache,
        engine.connect() as connection,
    ):
        with _noting() as statements:
            await cache.load(FlightBoard)
        records = cache.stats(FlightBoard).records
        # Questions to the catalog are longer.
        first = f"SELECT {FlightBoard.__table__.name}.id"
        sql, parameters = next(each for each in statements if each[0].startswith(first))
        driver: Any = (await connection.get_raw_connection()).driver_connection
        cases = [
            Case("asyncpg fetch", lambda: driver.fetch(sql, *parameters)),
            Case("cache.load", lambda: cache.load(FlightBoard), None if quick else GOAL),
        ]
        for case in cases:
            case.prepare = lambda: cache.clear(FlightBoard)
        results = await compare_async(
            f"load of {records:,} records from PostgreSQL", cases, rounds=3 if quick else 7
        )
    await engine.dispose()
    return results


@contextmanager
def _noting() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Note what all engines execute: the text of each statement, and its parameters."""
    statements: list[tuple[str, tuple[Any, ...]]] = []

    def noted(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", noted)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", noted)
