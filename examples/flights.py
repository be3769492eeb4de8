"""The flights of New York in 2013, from the database and from the cache, side by side.

``python -m examples.flights`` takes SQLite in a temporary file and the synchronous API,
``python -m examples.flights --postgres`` an embedded PostgreSQL and the asynchronous one, through
asyncpg. The story is told once, for both: what the asynchronous API awaits, the synchronous one
returns at once, and :func:`done` takes either.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, timedelta
from inspect import isawaitable
from operator import attrgetter
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import URL, Engine, Select, create_engine, event, select
from sqlalchemy.ext.asyncio import create_async_engine

from examples.flights_data import FIRST_DAY, ROWS, fill, tune_sqlite
from examples.flights_models import FlightBoard, Plane
from examples.postgres import embedded_postgres
from sa_tablecache import AsyncTableCache, SlidingWindow, TableCache, bypass_cache

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
WEEK = timedelta(days=7)


async def done(value: Any) -> Any:
    """Return what a call of either API gives: the value itself, or what awaiting it gives."""
    return await value if isawaitable(value) else value


@dataclass
class Demo:
    """A database, its cache, and a console that shows what they take."""

    console: Console
    cache: Any
    days: int | None
    statements: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        """Open a session of either API."""
        session = self.cache.sessionmaker()()
        try:
            yield session
        finally:
            await done(session.close())

    def title(self, text: str) -> None:
        """Begin a section."""
        self.console.print(f"\n[bold]{text}[/]")
        self.console.print(
            f"  [dim]{'':<26}{'records':>9}{'time':>11}{'SQL':>5}  answered by[/]", highlight=False
        )

    def note(self, text: str) -> None:
        """Print a line that explains."""
        self.console.print(f"  {text}", highlight=False, markup=False, style="dim", soft_wrap=True)

    def row(self, what: str, records: int, seconds: float, statements: int, how: str = "") -> None:
        """Print one measured step."""
        self.console.print(
            f"  {what:<26}{records:>9,}{duration(seconds):>11}{statements:>5}  {how}",
            highlight=False,
            soft_wrap=True,
        )

    async def step(self, what: str, run: Callable[[], Any]) -> None:
        """Do something to the cache; print the records it holds then, and what that took."""
        before = self.cache.stats(FlightBoard)
        self.statements.clear()
        start = perf_counter()
        await done(run())
        seconds = perf_counter() - start
        after = self.cache.stats(FlightBoard)
        came = after.records_loaded - before.records_loaded
        went = after.records_expired - before.records_expired
        self.row(what, after.records, seconds, len(self.statements), f"{came:+,} {-went:+,}")

    async def read(
        self,
        what: str,
        session: Any,
        run: Callable[[], Any],
        *,
        times: int = 1,
        show: Callable[[list[Any]], str] = lambda _: "",
    ) -> tuple[list[Any], float]:
        """Read ``times`` times; print and return the records and the median of the seconds."""
        samples = []
        self.statements.clear()
        for _ in range(times):
            start = perf_counter()
            result = await done(run())
            records = result if isinstance(result, list) else result.all()
            samples.append(perf_counter() - start)
        seconds = median(samples)
        statements = len(self.statements) // times
        how = f"{session.last_read.kind:<9}{show(records)}".rstrip()
        self.row(what, len(records), seconds, statements, how)
        return records, seconds

    async def compare(self, statement: Select[Any], ranged: Callable[[Any], Any]) -> list[Any]:
        """Read the same from the database and from the cache; print how much sooner it came."""
        from_database = statement.options(bypass_cache())
        async with self.session() as session:
            slow, seconds = await self.read(
                "database", session, lambda: session.scalars(from_database), times=5
            )
            fast, _ = await self.read(
                "cache, the same select", session, lambda: session.scalars(statement), times=200
            )
            best, faster = await self.read(
                "cache, session.range", session, lambda: ranged(session), times=200
            )
        by_id = attrgetter("id")
        assert sorted(slow, key=by_id) == sorted(fast, key=by_id) == sorted(best, key=by_id)
        self.note(f"the same records, {seconds / faster:,.0f} times sooner")
        return best


def duration(seconds: float) -> str:
    """Return a time with its unit, three digits of it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


async def tell(demo: Demo) -> None:
    """Show everything, in the order in which a reader would ask."""
    day = FIRST_DAY + ((153 if demo.days is None else demo.days // 2) * DAY)

    await load(demo)
    board = await one_day(demo, day)
    aircraft = Counter(flight.tailnum for flight in board if flight.plane_model)
    tailnum = max(aircraft, key=lambda each: aircraft[each])
    await one_aircraft(demo, tailnum, day - 3 * DAY)
    await write(demo, tailnum, day - 3 * DAY)
    await slide(demo, day)
    await follow(demo, day)


async def load(demo: Demo) -> None:
    """Load the whole view, with a progress bar."""
    estimate = await done(demo.cache.estimate(FlightBoard))
    with _progress(demo.console) as progress:
        bar = progress.add_task("joining, into memory", total=estimate.rows)
        await done(
            demo.cache.load(
                FlightBoard, progress=lambda records: progress.update(bar, completed=records)
            )
        )
        records = demo.cache.stats(FlightBoard).records
        progress.update(bar, completed=records, total=records)
    demo.note(
        f"cache.estimate() had said: {estimate.rows:,} records, {estimate.bytes / 2**20:,.0f} MiB,"
        f" {duration(estimate.seconds)}"
    )


async def one_day(demo: Demo, day: Any) -> list[Any]:
    """Read all departures of one day."""
    demo.title(f"The departures of {day.day} {day:%B}")
    statement = (
        select(FlightBoard)
        .where(FlightBoard.time_hour >= day, FlightBoard.time_hour < day + DAY)
        .order_by(FlightBoard.time_hour)
    )
    return await demo.compare(
        statement, lambda session: session.range(FlightBoard.by_time, ge=day, lt=day + DAY)
    )


async def one_aircraft(demo: Demo, tailnum: str, start: Any) -> None:
    """Read one aircraft's week, through the index of two columns."""
    demo.title(f"The week of {tailnum} from {start.day} {start:%B}")
    statement = (
        select(FlightBoard)
        .where(
            FlightBoard.tailnum == tailnum,
            FlightBoard.time_hour >= start,
            FlightBoard.time_hour < start + WEEK,
        )
        .order_by(FlightBoard.time_hour)
    )
    flights = await demo.compare(
        statement,
        lambda session: session.range(FlightBoard.by_plane, tailnum, ge=start, lt=start + WEEK),
    )
    for flight in flights[:3]:
        demo.note(
            f"{flight.time_hour:%a %H:%M}  {flight.origin}-{flight.dest}  {flight.airline:<24.24}"
            f" {flight.dest_name or flight.dest:<20.20} {flight.plane_model}"
        )


async def write(demo: Demo, tailnum: str, start: Any) -> None:
    """Change an aircraft's model, commit, and read; change it again, roll back, and read."""
    demo.title("A commit, and what the next read sees")

    async def week(what: str, session: Any) -> None:
        await demo.read(
            what,
            session,
            lambda: session.range(FlightBoard.by_plane, tailnum, ge=start, lt=start + WEEK),
            show=lambda records: "model " + ", ".join({record.plane_model for record in records}),
        )

    async with demo.session() as session:
        await week("before", session)
        plane = await done(session.get(Plane, tailnum))
        plane.model += "-X"
        await done(session.commit())
        await week("after the commit", session)
        await week("once more", session)

        plane = await done(session.get(Plane, tailnum))
        plane.model = "never"
        await done(session.flush())
        async with demo.session() as other:
            await week("another's open transaction", other)
        await week("one's own", session)
        await done(session.rollback())
        await week("after the rollback", session)


async def follow(demo: Demo, day: Any) -> None:
    """Keep the last three days, while a clock of our own runs through the next one."""
    now = day.replace(tzinfo=UTC)
    demo.cache.clock = lambda: now
    demo.cache.add(FlightBoard, policy=SlidingWindow("time_hour", past=3 * DAY))

    def last_hours(session: Any) -> Any:
        until = now.replace(tzinfo=None)
        return session.range(FlightBoard.by_time, ge=until - 6 * HOUR, le=until)

    demo.title("The last three days, by a clock that runs fast")
    for _ in range(5):
        await demo.step(f"{now:%a %d %b, %H:%M}", lambda: demo.cache.step(FlightBoard))
        now += 6 * HOUR
    async with demo.session() as session:
        await demo.read("six hours, before a step", session, lambda: last_hours(session))
    await demo.step(f"{now:%a %d %b, %H:%M}", lambda: demo.cache.step(FlightBoard))
    async with demo.session() as session:
        await demo.read("six hours, after it", session, lambda: last_hours(session))
    demo.note("cache.step() does here what a started cache does in the background")


async def slide(demo: Demo, day: Any) -> None:
    """Keep a few weeks only, and read across their edge and outside of them."""
    weeks = 4 if demo.days is None else 2
    start = day - WEEK
    end = start + weeks * WEEK
    hour = FlightBoard.time_hour

    demo.title(f"Keeping {weeks} weeks")
    await demo.step(
        f"from {start.day} {start:%B}",
        lambda: demo.cache.load(FlightBoard, hour >= start, hour < end),
    )
    async with demo.session() as session:
        for what, since in (
            ("a day of them", start),
            ("a day across the edge", start - DAY / 2),
            ("a day before them", start - 2 * DAY),
        ):
            statement = select(FlightBoard).where(hour >= since, hour < since + DAY)
            await demo.read(what, session, lambda: session.scalars(statement))  # noqa: B023
    inside = select(FlightBoard).where(
        hour >= start, hour < start + DAY, FlightBoard.origin == "JFK"
    )
    for what, asked in (("a hit", inside), ("a miss", statement)):
        demo.console.print(f"\n[bold]explain() of {what}[/]")
        for line in str(await done(demo.cache.explain(asked))).splitlines():
            demo.note(line)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def _filling(console: Console, days: int | None) -> Iterator[Callable[[str, int], None]]:
    with _progress(console) as progress:
        bar = progress.add_task(
            "filling the database", total=sum(ROWS.values()) if days is None else None
        )
        yield lambda _, rows: progress.update(bar, advance=rows)


async def main_postgres(console: Console, days: int | None) -> None:
    """Tell the story on PostgreSQL, with the asynchronous API."""
    with embedded_postgres() as url:
        engine = create_async_engine(url)
        with _filling(console, days) as progress:
            async with engine.begin() as connection:
                await connection.run_sync(fill, days=days, progress=progress)
        cache = AsyncTableCache(engine, views=[FlightBoard], exclusive_writer=True)
        with _counting(Demo(console, cache, days)) as demo:
            await tell(demo)
        await cache.close()
        await engine.dispose()


async def main_sqlite(console: Console, days: int | None) -> None:
    """Tell the story on SQLite, with the synchronous API."""
    with tempfile.TemporaryDirectory() as directory:
        engine = create_engine(URL.create("sqlite", database=str(Path(directory) / "flights")))
        tune_sqlite(engine)
        with _filling(console, days) as progress, engine.begin() as connection:
            fill(connection, days=days, progress=progress)
        cache = TableCache(engine, views=[FlightBoard], exclusive_writer=True)
        with closing(cache), _counting(Demo(console, cache, days)) as demo:
            await tell(demo)
        engine.dispose()


@contextmanager
def _counting(demo: Demo) -> Iterator[Demo]:
    """Have the demo note the queries and writes of all engines, the cache's own too."""

    def noted(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            demo.statements.append(statement)

    event.listen(Engine, "before_cursor_execute", noted)
    try:
        yield demo
    finally:
        event.remove(Engine, "before_cursor_execute", noted)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.flights", description=__doc__)
    parser.add_argument("--postgres", action="store_true", help="embedded PostgreSQL, asyncpg")
    parser.add_argument("--days", type=int, help="only so many days, 21 at least")
    options = parser.parse_args()
    if options.days is not None and options.days < 21:
        parser.error("--days must be 21 or more: the demo looks at weeks")
    console = Console(highlight=False)
    name = "PostgreSQL, asynchronous API" if options.postgres else "SQLite, synchronous API"
    console.print(f"[bold]The flights of New York, 2013[/], five tables joined ({name})")
    asyncio.run((main_postgres if options.postgres else main_sqlite)(console, options.days))


if __name__ == "__main__":
    main()
