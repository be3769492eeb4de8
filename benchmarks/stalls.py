"""How long others have to wait for their turn while many records are loaded, moved or dropped.

In an event loop a task that sleeps for no time, again and again, notes the longest time from one of
its turns to the next. So does a thread that sleeps for a millisecond beside another that loads. And
a full collection of garbage is timed with and without the records.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from statistics import median
from time import perf_counter

from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.harness import Result
from examples.flights_data import FIRST_DAY
from examples.flights_models import FlightBoard
from sa_tablecache import AsyncTableCache, TableCache

GOAL = 0.020
"""Seconds that nobody is to wait longer."""

PART = timedelta(days=30)


async def run(url: URL, *, quick: bool) -> list[Result]:
    """Measure in the event loop, with asyncpg."""
    days = timedelta(days=14 if quick else 365)
    part = timedelta(days=1) if quick else PART
    time = FlightBoard.time_hour
    start, end = FIRST_DAY, FIRST_DAY + days - part
    engine = create_async_engine(url)
    waits: dict[str, list[float]] = {}
    async with AsyncTableCache(engine, views=[FlightBoard], exclusive_writer=True) as cache:
        work: dict[str, Callable[[], Awaitable[object]]] = {
            "load of everything": lambda: cache.load(FlightBoard),
            "load of all that is there": lambda: _reload(cache),
            "clear": lambda: cache.clear(FlightBoard),
            "load of a window": lambda: cache.load(FlightBoard, time >= start, time < end),
            "sliding the window": lambda: cache.load(
                FlightBoard, time >= start + part, time < end + part
            ),
            "extending the window": lambda: cache.extend(FlightBoard, time < end + part),
            "evicting a part": lambda: cache.evict(FlightBoard, time < start + part),
        }
        await cache.load(FlightBoard, time < start + part)  # what is done once
        await cache.clear(FlightBoard)
        records = 0
        for _ in range(1 if quick else 3):
            for name, run in work.items():
                gc.collect()
                waits.setdefault(name, []).append(await _longest(run))
                records = max(records, cache.stats(FlightBoard).records)
    await engine.dispose()
    return _results(f"longest stall of the event loop, {records:,} records", waits, quick=quick)


async def _reload(cache: AsyncTableCache) -> None:
    cache.invalidate(FlightBoard)
    await cache.refresh(FlightBoard)


async def _longest(run: Callable[[], Awaitable[object]]) -> float:
    """Return the longest time from one turn of another task to the next."""
    longest = 0.0

    async def others() -> None:
        nonlocal longest
        before = perf_counter()
        while True:
            await asyncio.sleep(0)
            now = perf_counter()
            longest = max(longest, now - before)
            before = now

    task = asyncio.create_task(others())
    await asyncio.sleep(0)
    await run()
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return longest


def run_threads(url: URL, *, quick: bool) -> list[Result]:
    """Measure with threads, on SQLite."""
    days = timedelta(days=14 if quick else 365)
    part = timedelta(days=1) if quick else PART
    time = FlightBoard.time_hour
    start, end = FIRST_DAY, FIRST_DAY + days - part
    engine = create_engine(url)
    waits: dict[str, list[float]] = {}
    with TableCache(engine, views=[FlightBoard], exclusive_writer=True) as cache:
        work: dict[str, Callable[[], object]] = {
            "load of everything": lambda: cache.load(FlightBoard),
            "load of a window": lambda: cache.load(FlightBoard, time >= start, time < end),
            "sliding the window": lambda: cache.load(
                FlightBoard, time >= start + part, time < end + part
            ),
        }
        cache.load(FlightBoard, time < start + part)
        cache.clear(FlightBoard)
        records = 0
        for _ in range(1 if quick else 3):
            for name, run in work.items():
                gc.collect()
                waits.setdefault(name, []).append(_longest_beside(run))
                records = max(records, cache.stats(FlightBoard).records)
        cache.load(FlightBoard)
        pauses = [_collecting() for _ in range(3 if quick else 7)]
        cache.clear(FlightBoard)
        without = [_collecting() for _ in range(3 if quick else 7)]
    engine.dispose()
    results = _results(f"longest stall of a thread, {records:,} records", waits, quick=quick)
    million = 1_000_000 / records
    collecting = {"by 1,000,000 of them": [(median(pauses) - median(without)) * million]}
    name = f"a full garbage collection is made longer, measured with {records:,} records"
    return results + _results(name, collecting, quick=quick)


def _longest_beside(run: Callable[[], object]) -> float:
    """Return the longest time that a thread waited for its turn while another one worked."""
    done = threading.Event()
    longest = 0.0

    def others() -> None:
        nonlocal longest
        before = perf_counter()
        while not done.is_set():
            done.wait(0.001)
            now = perf_counter()
            longest = max(longest, now - before - 0.001)
            before = now

    thread = threading.Thread(target=others)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return longest


def _collecting() -> float:
    start = perf_counter()
    gc.collect()
    return perf_counter() - start


def _results(name: str, waits: dict[str, list[float]], *, quick: bool) -> list[Result]:
    return [
        Result(
            benchmark=name,
            case=case,
            value=median(seconds),
            unit="s",
            goal=None if quick else GOAL,
            spread=(min(seconds), max(seconds)),
            rounds=len(seconds),
        )
        for case, seconds in waits.items()
    ]
