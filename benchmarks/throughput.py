"""Reads at once: by several threads of a process, and by several processes.

``python -m benchmarks.throughput URL`` is one such process. A thread reads the same range again and
again with a session of its own, for a fixed time. With an interpreter lock, threads share one core,
and the question is what they lose by taking turns; processes, and threads without that lock, share
nothing but the memory's bandwidth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from statistics import median
from threading import Barrier, Thread
from time import perf_counter
from typing import Any

from sqlalchemy import URL, create_engine

from benchmarks.harness import Result
from benchmarks.processes import Process, answer_all
from benchmarks.ranges import intervals
from examples.flights_models import FlightBoard
from sa_tablecache import TableCache

THREADS = 8
PROCESSES = 2
SECONDS = 0.4
"""How long the readers read for one sample."""
BATCH = 16
"""So many reads between two looks at the clock."""


def run(url: URL, *, quick: bool) -> list[Result]:
    """Count the reads of an hour and of a day."""
    rendered = url.render_as_string(hide_password=False)
    rounds, seconds = (2, 0.05) if quick else (7, SECONDS)
    results: list[Result] = []
    with ExitStack() as stack:
        processes = []
        for _ in range(PROCESSES):
            processes.append(Process(__name__, rendered))
            stack.callback(processes[-1].close)
        lock = "with" if processes[0].ready["gil"] else "without"
        ways: list[tuple[str, list[Process], int]] = [
            ("1 thread", processes[:1], 1),
            (f"{THREADS} threads, {lock} the interpreter lock", processes[:1], THREADS),
            (f"{PROCESSES} processes", processes, 1),
        ]
        for interval in intervals(quick=quick)[:2]:
            asked = {"interval": [each.isoformat() for each in interval], "seconds": seconds}
            rates: dict[str, list[float]] = {name: [] for name, _, _ in ways}
            for turn in range(rounds):
                for name, readers, threads in (*ways[turn % 3 :], *ways[: turn % 3]):
                    for reader in readers:
                        reader.tell({**asked, "threads": threads})
                    answers = [reader.answer() for reader in readers]
                    rates[name].append(sum(answer["rate"] for answer in answers))
            results += _results(f"reads of {answers[0]['records']:,} records, at once", rates)
    return results


def _results(benchmark: str, rates: dict[str, list[float]]) -> list[Result]:
    first, alone = next(iter(rates.items()))
    return [
        Result(
            benchmark=benchmark,
            case=name,
            value=median(mine),
            unit="reads/s",
            ratio=median(one / other for one, other in zip(mine, alone, strict=True)),
            over=first if name != first else None,
            spread=(min(mine), max(mine)),
            rounds=len(mine),
        )
        for name, mine in rates.items()
    ]


def _reading(cache: TableCache, asked: dict[str, Any]) -> dict[str, Any]:
    """Read with so many threads for so long; return how many reads a second that were."""
    Session = cache.sessionmaker()
    start, end = map(datetime.fromisoformat, asked["interval"])
    seconds: float = asked["seconds"]
    together = Barrier(asked["threads"])
    # The rate is that of all of them from the first read to the last: one that has to wait for its
    # turn does not get its own time.
    told: list[tuple[int, float, float]] = []

    def read() -> None:
        with Session() as session:
            run: Callable[[], Any] = lambda: session.range(  # noqa: E731
                FlightBoard.by_time, ge=start, lt=end
            )
            run()
            together.wait()
            count, begun = 0, perf_counter()
            while (now := perf_counter()) - begun < seconds:
                for _ in range(BATCH):
                    run()
                count += BATCH
            told.append((count, begun, now))

    threads = [Thread(target=read) for _ in range(asked["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Session() as session:
        records = len(session.range(FlightBoard.by_time, ge=start, lt=end))
    counts, begun, ended = zip(*told, strict=True)
    return {"rate": sum(counts) / (max(ended) - min(begun)), "records": records}


def main(url: str) -> None:
    """Load everything, say so, and read as asked."""
    with TableCache(create_engine(url), views=[FlightBoard], exclusive_writer=True) as cache:
        cache.load(FlightBoard)
        gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        answer_all(lambda asked: _reading(cache, asked), {"gil": gil})


if __name__ == "__main__":
    main(sys.argv[1])
