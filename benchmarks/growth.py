"""How what the cache does grows: with the records that it holds, its views, and their indexes.

Each size is a process of its own, so that its memory can be measured, and all of them take turns;
``python -m benchmarks.growth ASKED`` is one of them. What grows with the number of views fits into
one process. Everything is read from SQLite files: what grows here is the cache, and the database is
the same for all sizes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from itertools import count, cycle
from statistics import median
from time import perf_counter
from types import new_class
from typing import Any

from sqlalchemy import create_engine, func, make_url, select
from sqlalchemy.orm import Session

from benchmarks import database
from benchmarks.harness import Growth, Result, repeats_of, sample
from benchmarks.memory import resident
from benchmarks.processes import Process, answer_all
from benchmarks.ranges import intervals
from examples.flights_data import FIRST_DAY
from examples.flights_models import Flight, FlightBoard
from sa_tablecache import CachedView, ChangeFeed, ScoreIndex, TableCache

RECORDS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)
FEW_RECORDS = (2_000, 10_000)
VIEWS = (1, 2, 4, 8, 16)
INDEXES = range(1, 9)
INDEXED = 100_000
"""So many records has a view whose indexes grow."""
A_FORTNIGHT = 14
DAY = timedelta(days=1)

_ORDERS: dict[str, tuple[Any, ...]] = {
    "by_time": ("time_hour",),
    "by_plane": ("tailnum", "time_hour"),
    "by_delay": (func.coalesce(Flight.dep_delay, 0),),
    "by_origin": ("origin", "time_hour"),
    "by_dest": ("dest", "time_hour"),
    "by_flight": ("flight", "time_hour"),
    "by_distance": ("distance", "time_hour"),
    "by_schedule": ("sched_dep_time", "time_hour"),
}

GROWS = {
    "an hour": ("range reads and get", "session.range of an hour", "log n"),
    "a day": ("range reads and get", "session.range of a day", "log n"),
    "get": ("range reads and get", "session.get", "log n"),
    "commit": ("changes", "next read after a commit of one row", "1"),
    "adjust": ("changes", "cache.load, the range a day later", "1"),
}
"""What is asked of every size: the benchmark, the case, and how it should grow."""


def boards(number: int, *, indexes: int = 3) -> list[Any]:
    """Return so many views of the flights, each with so many indexes."""
    orders = list(_ORDERS.items())[:indexes]

    def body(namespace: dict[str, Any]) -> None:
        namespace["__select__"] = FlightBoard.__select__
        namespace.update((name, ScoreIndex(*parts)) for name, parts in orders)

    return [new_class(f"Board{n}", (CachedView,), exec_body=body) for n in range(number)]


def run(*, quick: bool) -> list[Result]:
    """Measure the growth with the records, with the indexes and with the views."""
    rounds = 2 if quick else 7
    sizes = FEW_RECORDS if quick else RECORDS
    results: list[Result] = []
    with database.sqlite(A_FORTNIGHT if quick else None, records=sizes[-1] + 2_000) as url:
        rendered = url.render_as_string(hide_password=False)
        hour, day = _in_the_middle(url, quick=quick)
        asked = [
            {"url": rendered, "records": size, "indexes": 3, "hour": hour, "day": day}
            for size in sizes
        ]
        results += _with_records(asked, sizes, rounds)
        numbers = (1, 3) if quick else INDEXES
        size = FEW_RECORDS[-1] if quick else INDEXED
        asked = [{**asked[0], "records": size, "indexes": number} for number in numbers]
        results += _with_indexes(asked, numbers, size, rounds)
    return results + _with_views((1, 3) if quick else VIEWS, rounds)


def _in_the_middle(url: Any, *, quick: bool) -> list[tuple[str, str]]:
    """Return the hour and the day of the other benchmarks, in the year in the middle."""
    engine = create_engine(url)
    with engine.connect() as connection:
        end = connection.scalar(select(func.max(Flight.time_hour)))
    engine.dispose()
    assert end is not None
    later = database.YEAR * ((end - FIRST_DAY) // database.YEAR // 2)
    return [
        ((start + later).isoformat(), (end + later).isoformat())
        for start, end in intervals(quick=quick)[:2]
    ]


class Held:
    """A view in this process, with so many records around the day that is read."""

    def __init__(self, asked: dict[str, Any]) -> None:
        engine = create_engine(make_url(asked["url"]))
        self.hour, self.day = (
            (datetime.fromisoformat(start), datetime.fromisoformat(end))
            for start, end in (asked["hour"], asked["day"])
        )
        (self.view,) = boards(1, indexes=asked["indexes"])
        # The others of these processes write as well, but no answer that is looked at needs it.
        self.cache = TableCache(engine, views=[self.view], exclusive_writer=True)
        self.Session = self.cache.sessionmaker()
        with Session(engine) as session:
            self.start, self.end = self._around(session, asked["records"])
        view = self.view
        self.cache.load(view, view.time_hour >= self.day[0], view.time_hour < self.day[1])
        self.cache.clear(view)
        before = resident()
        begun = perf_counter()
        self._load(self.start, self.end)
        self.loaded = {
            "seconds": perf_counter() - begun,
            "records": self.cache.stats(view).records,
            "bytes": resident() - before,
        }
        self.session = self.Session()
        records = self.session.range(view.by_time, ge=self.hour[0], lt=self.hour[1])
        self.keys = cycle([record.id for record in records])
        self.key = next(self.keys)
        # None that another of these processes has written: that would be no change, and no commit.
        self.delays = count(os.getpid() * 1_000)
        self.repeats: dict[str, int] = {}

    def _around(self, session: Session, records: int) -> tuple[datetime, datetime]:
        """Return the times between which there are so many, and a day more behind them."""
        times = select(Flight.time_hour).order_by(Flight.time_hour)
        before = [
            session.scalar(select(func.count()).where(Flight.time_hour < end)) or 0
            for end in self.day
        ]
        first = max(0, (sum(before) - records) // 2)
        start = session.scalar(times.offset(first).limit(1))
        end = session.scalar(times.offset(first + records).limit(1))
        assert start is not None
        assert end is not None
        assert start <= self.day[0] < self.day[1] <= end
        return start, end

    def _load(self, start: datetime, end: datetime) -> None:
        column = self.view.time_hour
        self.cache.load(self.view, column >= start, column < end)

    def read(self, interval: tuple[datetime, datetime]) -> list[Any]:
        """Return the records of an interval."""
        found: list[Any] = self.session.range(self.view.by_time, ge=interval[0], lt=interval[1])
        return found

    def answer(self, what: str) -> float:
        """Do what is asked, and return the seconds that it took."""
        match what:
            case "an hour":
                return self._repeated(what, lambda: self.read(self.hour))
            case "a day":
                return self._repeated(what, lambda: self.read(self.day))
            case "get":
                return self._repeated(what, lambda: self.session.get(self.view, self.key))
            case "commit":
                return median(self._after_a_commit() for _ in range(9))
            case _:
                begun = perf_counter()
                self._load(self.start + DAY, self.end + DAY)
                self._load(self.start, self.end)
                return (perf_counter() - begun) / 2

    def _repeated(self, what: str, run: Callable[[], Any]) -> float:
        if what not in self.repeats:
            self.repeats[what] = repeats_of(run)
        return sample(run, self.repeats[what])

    def _after_a_commit(self) -> float:
        key, delay = next(self.keys), next(self.delays)
        with self.Session() as session:
            flight = session.get(Flight, key)
            assert flight is not None
            flight.dep_delay = delay
            session.commit()
        begun = perf_counter()
        records = self.read(self.hour)
        taken = perf_counter() - begun
        assert [record.dep_delay for record in records if record.id == key] == [delay]
        return taken


@contextmanager
def _started(asked: Iterable[dict[str, Any]]) -> Iterator[list[Process]]:
    with ExitStack() as stack:
        processes = []
        for each in asked:
            process = Process(__name__, json.dumps(each))
            stack.callback(process.close)
            processes.append(process)
        yield processes


def _in_turns(
    processes: Sequence[Process], questions: Iterable[str], rounds: int
) -> dict[str, list[list[float]]]:
    """Return, for each question, what the processes answered in each round."""
    return {
        question: [_turn(processes, question, number) for number in range(rounds)]
        for question in questions
    }


def _turn(processes: Sequence[Process], question: str, number: int) -> list[float]:
    first = number % len(processes)
    at = [*range(first, len(processes)), *range(first)]
    answers = {n: processes[n].ask(question) for n in at}
    return [answers[n] for n in range(len(processes))]


def _grown(
    benchmark: str, case: str, growths: Sequence[Growth], rounds: Sequence[Sequence[float]],
    unit: str = "s",
) -> list[Result]:  # fmt: skip
    """Return the results of all sizes, each beside the smallest."""
    smallest = f"{growths[0].size:,}"
    return [
        Result(
            benchmark=benchmark,
            case=f"{case}: {growth.size:,}",
            value=median(samples),
            unit=unit,
            ratio=median(mine / first[0] for mine, first in zip(samples, rounds, strict=True)),
            over=f"{case}: {smallest}",
            spread=(min(samples), max(samples)),
            rounds=len(rounds),
            growth=growth,
        )
        for growth, samples in zip(growths, zip(*rounds, strict=True), strict=True)
    ]


def _with_records(
    asked: Sequence[dict[str, Any]], sizes: Sequence[int], rounds: int
) -> list[Result]:
    with _started(asked) as processes:
        loaded = [process.ready for process in processes]
        measured = _in_turns(processes, GROWS, rounds)
    results: list[Result] = []

    def growths(expected: str) -> list[Growth]:
        return [Growth("records", size, expected) for size in sizes]

    for what, samples in measured.items():
        benchmark, case, expected = GROWS[what]
        results += _grown(f"{benchmark}, by records", case, growths(expected), samples)
    seconds = [each["seconds"] for each in loaded]
    results += _grown("a load, by records", "cache.load", growths("n"), [seconds])
    size = [each["bytes"] / each["records"] for each in loaded]
    results += _grown(
        "memory of a record, by records", "bytes per record", growths("1"), [size], "B"
    )
    return results


def _with_indexes(
    asked: Sequence[dict[str, Any]], numbers: Sequence[int], size: int, rounds: int
) -> list[Result]:
    with _started(asked) as processes:
        loaded = [process.ready for process in processes]
        (measured,) = _in_turns(processes, ["commit"], rounds).values()
    growths = [Growth("indexes", number, "n") for number in numbers]
    seconds = [each["seconds"] for each in loaded]
    size_of = [each["bytes"] / each["records"] for each in loaded]
    of = f"{size:,} records, by indexes"
    return [
        *_grown(f"times of {of}", "cache.load", growths, [seconds]),
        *_grown(f"times of {of}", GROWS["commit"][1], growths, measured),
        *_grown(f"memory of {of}", "bytes per record", growths, [size_of], "B"),
    ]


def _with_views(numbers: Sequence[int], rounds: int) -> list[Result]:
    """Measure a hit, a commit and a poll of caches of so many views of the same tables."""
    hour = intervals(quick=True)[0]
    with ExitStack() as stack:
        runs: dict[str, list[Callable[[], Any]]] = {"hit": [], "commit": [], "poll": []}
        for number in numbers:
            url = stack.enter_context(database.sqlite(A_FORTNIGHT))
            engine = create_engine(url)
            stack.callback(engine.dispose)
            views = boards(number)
            cache = TableCache(engine, views=views, feed=ChangeFeed(max_lag=timedelta(hours=1)))
            stack.callback(cache.close)
            cache.install_feed()
            for view in views:
                cache.load(view)
            for what, run in _of_views(cache, views, hour).items():
                runs[what].append(run)
        results: list[Result] = []
        for each, (case, expected) in zip(
            runs.values(),
            [("session.range of an hour", "1"), ("a commit of one row", "n"), ("a poll", "1")],
            strict=True,
        ):
            repeats = [repeats_of(run) for run in each]
            samples = [
                [sample(run, repeat) for run, repeat in zip(each, repeats, strict=True)]
                for _ in range(rounds)
            ]
            growths = [Growth("views", number, expected) for number in numbers]
            results += _grown("hits, commits and polls, by views", case, growths, samples)
    return results


def _of_views(
    cache: TableCache, views: Sequence[Any], hour: tuple[datetime, datetime]
) -> dict[str, Callable[[], Any]]:
    Session, view = cache.sessionmaker(), views[0]
    session = Session()
    (key, *_) = (record.id for record in session.range(view.by_time, ge=hour[0], lt=hour[1]))
    delays = count()

    def commit() -> None:
        with Session() as writer:
            flight = writer.get(Flight, key)
            assert flight is not None
            flight.dep_delay = next(delays)
            writer.commit()

    return {
        "hit": lambda: session.range(view.by_time, ge=hour[0], lt=hour[1]),
        "commit": commit,
        "poll": cache.barrier,
    }


if __name__ == "__main__":
    held = Held(json.loads(sys.argv[1]))
    answer_all(held.answer, held.loaded)
