"""Where a load spends its time: ``python -m benchmarks.profile_load [--postgres] [--days N]``.

Loads the flights board twice, once to warm up and once under cProfile, and prints the functions
that took most of it. The profile itself makes the load about twice as slow.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
from time import perf_counter

from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import database
from examples.flights_models import FlightBoard
from sa_tablecache import AsyncTableCache, TableCache


async def profile_postgres(url: URL, profile: cProfile.Profile) -> None:
    """Load through asyncpg."""
    engine = create_async_engine(url)
    async with AsyncTableCache(engine, views=[FlightBoard]) as cache:
        start = perf_counter()
        await cache.load(FlightBoard)
        print(f"loaded in {perf_counter() - start:.2f} s without the profile")
        await cache.clear(FlightBoard)
        profile.enable()
        await cache.load(FlightBoard)
        profile.disable()
    await engine.dispose()


def profile_sqlite(url: URL, profile: cProfile.Profile) -> None:
    """Load from SQLite."""
    engine = create_engine(url)
    with TableCache(engine, views=[FlightBoard]) as cache:
        start = perf_counter()
        cache.load(FlightBoard)
        print(f"loaded in {perf_counter() - start:.2f} s without the profile")
        cache.clear(FlightBoard)
        profile.enable()
        cache.load(FlightBoard)
        profile.disable()
    engine.dispose()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_load", description=__doc__)
    parser.add_argument("--postgres", action="store_true", help="PostgreSQL, not SQLite")
    parser.add_argument("--days", type=int, help="only so many days of data")
    parser.add_argument("--lines", type=int, default=25, help="how many functions to print")
    options = parser.parse_args()
    profile = cProfile.Profile()
    if options.postgres:
        with database.postgres(options.days) as url:
            asyncio.run(profile_postgres(url, profile))
    else:
        with database.sqlite(options.days) as url:
            profile_sqlite(url, profile)
    pstats.Stats(profile).sort_stats("tottime").print_stats(options.lines)


if __name__ == "__main__":
    main()
