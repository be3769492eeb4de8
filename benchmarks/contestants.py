"""The contestants: other ways to answer the same range of the same join, each in its own process.

``python -m benchmarks.contestants NAME URL`` is one of them. It prints a line when it is ready, and
then answers each line of its standard input, an interval, with the seconds that one read of it took
and how many records it had. The process that started it, ``peers.py``, sees to it that they take
turns; what a contestant holds in memory disturbs no other.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache
from operator import attrgetter, itemgetter
from time import perf_counter
from typing import Any, ClassVar

from sqlalchemy import Select, make_url, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from benchmarks.harness import SAMPLE
from benchmarks.memory import resident
from benchmarks.processes import questions, say
from examples.flights_data import FIRST_DAY
from examples.flights_models import FlightBoard
from sa_tablecache import AsyncTableCache

COLUMNS = [column.name for column in FlightBoard.__table__.columns]


def statement() -> Select[Any]:
    """Return the join as its own tables have it: no view, no cache."""
    return FlightBoard.__select__  # type: ignore[return-value]


def time_hour() -> Any:
    """Return the column that the ranges are of."""
    return statement().selected_columns.time_hour


@cache
def sql(condition: str = "") -> str:
    """Return the text of the join for asyncpg, ordered by time."""
    text = str(statement().compile(dialect=postgresql.dialect()))
    return f"{text} {condition} ORDER BY flights.time_hour"


RANGE = "WHERE flights.time_hour >= $1 AND flights.time_hour < $2"


class Contestant(ABC):
    """One way to answer."""

    name: ClassVar[str]
    needs: ClassVar[str | None] = None
    """The module without which it cannot take part."""
    holds: ClassVar[bool] = True
    """Whether it holds all records in memory, so that its size can be measured."""

    def __init__(self, url: str) -> None:
        self.url = url

    @classmethod
    def missing(cls) -> bool:
        """Whether what it needs is not installed on this Python."""
        return cls.needs is not None and importlib.util.find_spec(cls.needs) is None

    async def warm_up(self) -> None:
        """Make what is made only once, such as modules, before the memory is looked at."""
        await (await self.connect()).close()

    @abstractmethod
    async def start(self) -> None:
        """Connect, and load what is held."""

    @abstractmethod
    async def read(self, start: datetime, end: datetime) -> Sequence[Any]:
        """Return the records of an interval in a list, by time."""

    async def connect(self) -> Any:
        """Return a connection of asyncpg."""
        import asyncpg

        url = make_url(self.url)
        host = url.host or url.query["host"]
        return await asyncpg.connect(
            host=host, port=url.port, user=url.username, password=url.password,
            database=url.database,
        )  # fmt: skip

    async def everything(self) -> list[Any]:
        """Return all records as asyncpg gives them, by time."""
        connection = await self.connect()
        try:
            return list(await connection.fetch(sql()))
        finally:
            await connection.close()


class Floor(Contestant):
    """``bisect`` and a slice of a plain list: what finding and copying cost by themselves."""

    name = "bisect and slice of a list"

    async def start(self) -> None:
        self.records = [tuple(record) for record in await self.everything()]
        self.key = itemgetter(COLUMNS.index("time_hour"))

    async def read(self, start: datetime, end: datetime) -> Sequence[Any]:
        records, key = self.records, self.key
        return records[bisect_left(records, start, key=key) : bisect_left(records, end, key=key)]


class Sorted(Contestant):
    """A slice of a bare ``SortedKeyList`` of tuples."""

    name = "SortedKeyList slice"
    needs = "sortedcontainers"

    async def warm_up(self) -> None:
        await super().warm_up()
        importlib.import_module("sortedcontainers")

    async def start(self) -> None:
        from sortedcontainers import SortedKeyList

        records = [tuple(record) for record in await self.everything()]
        self.records = SortedKeyList(records, key=itemgetter(COLUMNS.index("time_hour")))

    async def read(self, start: datetime, end: datetime) -> Sequence[Any]:
        records = self.records
        found: list[Any] = records[records.bisect_key_left(start) : records.bisect_key_left(end)]
        return found


class Cached(Contestant):
    """``session.range`` of this package, by its asynchronous session."""

    name = "sa_tablecache, session.range"

    async def warm_up(self) -> None:
        self.flights = AsyncTableCache(
            create_async_engine(self.url), views=[FlightBoard], exclusive_writer=True
        )
        await self.flights.load(FlightBoard, FlightBoard.time_hour < FIRST_DAY + timedelta(days=1))
        await self.flights.clear(FlightBoard)

    async def start(self) -> None:
        await self.flights.load(FlightBoard)
        self.session = self.flights.sessionmaker()()

    async def read(self, start: datetime, end: datetime) -> Sequence[Any]:
        return await self.session.range(FlightBoard.by_time, ge=start, lt=end)


class TableCache43(Contestant):
    """``tablecache`` with local storage: indexes by time, by aircraft and time, and by delay."""

    name = "tablecache 4.3, local storage"
    needs = "tablecache"

    async def warm_up(self) -> None:
        await super().warm_up()
        importlib.import_module("benchmarks.tablecache_indexes")

    async def start(self) -> None:
        from benchmarks.tablecache_indexes import open_table

        url = make_url(self.url)
        self.table = await open_table(
            sql, host=url.host or url.query["host"], port=url.port, user=url.username,
            password=url.password, database=url.database,
        )  # fmt: skip

    async def read(self, start: datetime, end: datetime) -> Sequence[Any]:
        return [record async for record in self.table.get_records("time", ge=start, lt=end)]


class Dogpile(Contestant):
    """``dogpile.cache``, memory backend: the result of each query under its parameters.

    It answers only the very intervals that were asked before, and knows of no change.
    """

    name = "dogpile.cache, the same query again"
    needs = "dogpile.cache"
    holds = False

    async def start(self) -> None:
        from dogpile.cache import make_region

        self.region = make_region().configure("dogpile.cache.memory")
        self.connection = await self.connect()

    async def read(self, start: datetime, end: datetime) -> Sequence[Any]:
        key = f"{start.isoformat()} {end.isoformat()}"
        found = self.region.get(key)
        if not found:  # its functions that create values do so synchronously
            found = list(await self.connection.fetch(sql(RANGE), start, end))
            self.region.set(key, found)
        return list(found)


class Asyncpg(Contestant):
    """The database, by asyncpg alone."""

    name = "asyncpg"
    holds = False

    async def start(self) -> None:
        self.connection = await self.connect()

    async def read(self, start: datetime, end: datetime) -> Sequence[Any]:
        records: list[Any] = await self.connection.fetch(sql(RANGE), start, end)
        return records


class Core(Contestant):
    """The database, by SQLAlchemy Core and asyncpg."""

    name = "SQLAlchemy Core and asyncpg"
    holds = False
    engine: AsyncEngine

    async def start(self) -> None:
        self.engine = create_async_engine(self.url)
        self.connection = await self.engine.connect()

    async def read(self, start: datetime, end: datetime) -> Sequence[Any]:
        column = time_hour()
        asked = statement().where(column >= start, column < end).order_by(column)
        return (await self.connection.execute(asked)).all()


class Orm(Contestant):
    """The database, by a Session of SQLAlchemy and asyncpg."""

    name = "SQLAlchemy ORM and asyncpg"
    holds = False

    async def start(self) -> None:
        self.session = async_sessionmaker(create_async_engine(self.url))()

    async def read(self, start: datetime, end: datetime) -> Sequence[Any]:
        asked = (
            select(FlightBoard)
            .where(FlightBoard.time_hour >= start, FlightBoard.time_hour < end)
            .order_by(FlightBoard.time_hour)
        )
        return (await self.session.execute(asked)).all()


CONTESTANTS: tuple[type[Contestant], ...] = (
    Sorted, Floor, Cached, TableCache43, Dogpile, Asyncpg, Core, Orm,
)  # fmt: skip


async def take_part(contestant: Contestant) -> None:
    """Load, say so, and read the intervals of the standard input."""
    await contestant.warm_up()
    before = resident()
    started = perf_counter()
    await contestant.start()
    seconds = perf_counter() - started
    say({"seconds": seconds, "bytes": resident() - before if contestant.holds else None})
    repeats: dict[tuple[datetime, datetime], int] = {}
    for interval in questions():
        start, end = map(datetime.fromisoformat, interval)
        if (start, end) not in repeats:
            records = await contestant.read(start, end)
            once = perf_counter()
            await contestant.read(start, end)
            repeats[start, end] = max(1, int(SAMPLE / max(perf_counter() - once, 1e-7)))
        count = range(repeats[start, end])
        begun = perf_counter()
        for _ in count:
            records = await contestant.read(start, end)
        taken = (perf_counter() - begun) / len(count)
        say({"seconds": taken, "records": len(records), "same": _digest(records)})
        del records


def _digest(records: Sequence[Any]) -> int:
    """Return the sum of the identifiers, by which answers of any form are compared."""
    if not records:
        return 0
    first = records[0]
    if isinstance(first, dict):
        return sum(record["id"] for record in records)
    return sum(map(attrgetter("id") if hasattr(first, "id") else itemgetter(0), records))


if __name__ == "__main__":
    chosen = {each.__name__: each for each in CONTESTANTS}[sys.argv[1]]
    asyncio.run(take_part(chosen(sys.argv[2])))
