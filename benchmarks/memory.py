"""Memory per record: what a process grows by when it loads the view with its three indexes.

``python -m benchmarks.memory URL`` measures itself: it must be a process of its own, in which
nothing else was allocated and freed. What malloc holds without use is given back before each look.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.harness import Result
from examples.flights_data import FIRST_DAY
from examples.flights_models import FlightBoard
from sa_tablecache import AsyncTableCache

GOAL = 450


def run(url: URL, *, quick: bool) -> list[Result]:
    """Measure in a fresh process."""
    process = subprocess.run(
        [sys.executable, "-m", __name__, url.render_as_string(hide_password=False)],
        check=True,
        capture_output=True,
        text=True,
    )
    measured = json.loads(process.stdout)
    return [
        Result(
            benchmark=f"memory of {measured['records']:,} records, three indexes",
            case="bytes per record",
            value=measured["grown"] / measured["records"],
            unit="B",
            goal=None if quick else GOAL,
        ),
        Result(
            benchmark=f"memory of {measured['records']:,} records, three indexes",
            case="at the peak of the load",
            value=measured["peak"] / measured["records"],
            unit="B",
        ),
    ]


async def measure(url: str) -> dict[str, int]:
    """Load a day and drop it, for what is made once; then look, load everything, look again."""
    engine = create_async_engine(url)
    async with AsyncTableCache(engine, views=[FlightBoard]) as cache:
        await cache.load(FlightBoard, FlightBoard.time_hour < FIRST_DAY + timedelta(days=1))
        await cache.clear(FlightBoard)
        before = resident()
        await cache.load(FlightBoard)
        peak = _peak()
        after = resident()
        records = cache.stats(FlightBoard).records
    await engine.dispose()
    return {"records": records, "grown": after - before, "peak": peak - before}


def resident() -> int:
    """Return the bytes of memory that this process alone holds, after giving back what it can.

    :raises OSError: on systems without ``/proc``.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _kilobytes("/proc/self/smaps_rollup", "Private_Clean:", "Private_Dirty:") * 1024


def _peak() -> int:
    return _kilobytes("/proc/self/status", "VmHWM:") * 1024


def _kilobytes(path: str, *names: str) -> int:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return sum(int(line[1]) for line in lines if line and line[0] in names)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(sys.argv[1]))))
