"""Policies: everything, and windows that slide with a clock that the test moves."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import (
    URL,
    BigInteger,
    DateTime,
    Double,
    Engine,
    String,
    create_engine,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sa_tablecache import (
    AsyncTableCache,
    CachedView,
    Everything,
    Manual,
    MemoryLimitExceeded,
    NotExpressible,
    ReadThrough,
    ScoreIndex,
    SlidingWindow,
    TableCache,
    TableCacheError,
)
from sa_tablecache.policies import Policy
from tests.conftest import asynchronous
from tests.integration.checking import counting

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")


class Base(DeclarativeBase):
    """Models of these tests."""


class Event(Base):
    """Something that happens, said in every way to say when."""

    __tablename__ = "policy_event"

    id: Mapped[int] = mapped_column(primary_key=True)
    naive: Mapped[datetime]
    aware: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    day: Mapped[date]
    epoch: Mapped[int] = mapped_column(BigInteger)
    stamp: Mapped[float] = mapped_column(Double)
    word: Mapped[str] = mapped_column(String(20))


class Events(CachedView):
    """Events, sorted by each of their times."""

    __select__ = select(
        Event.id, Event.naive, Event.aware, Event.day, Event.epoch, Event.stamp, Event.word
    )

    by_naive = ScoreIndex("naive")
    by_aware = ScoreIndex("aware")
    by_day = ScoreIndex("day", "naive")
    by_epoch = ScoreIndex("epoch")
    by_stamp = ScoreIndex("stamp")
    by_word = ScoreIndex("word")


class Declared(CachedView):
    """A view that says itself what is kept of it."""

    __select__ = select(Event.id, Event.naive)

    by_naive = ScoreIndex("naive")

    __policy__ = SlidingWindow(by_naive, past=HOUR)


class Unsorted(CachedView):
    """A view that is sorted by something else."""

    __select__ = select(Event.id, Event.naive, Event.word)

    by_word = ScoreIndex("word", "naive")


def event(number: int, moment: datetime) -> dict[str, Any]:
    """Return the values of an event."""
    return {
        "id": number,
        "naive": moment.replace(tzinfo=None),
        "aware": moment,
        "day": moment.date(),
        "epoch": int(moment.timestamp()),
        "stamp": moment.timestamp(),
        "word": f"w{number}",
    }


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        """Return the time."""
        return self.now


def filled(url: URL) -> Engine:
    """Return an engine to a database with an event in every hour of three days around noon."""
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Event), [event(36 + n, NOON + n * HOUR) for n in range(-36, 37)])
    return engine


@pytest.fixture
def engine(sqlite_url: URL) -> Iterator[Engine]:
    """A database with events, in a file."""
    engine = filled(sqlite_url)
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    """A clock that shows noon."""
    return Clock()


@pytest.fixture
def cache(database_url: URL, clock: Clock) -> Iterator[TableCache]:
    """A cache of the events of a database of each kind, not started."""
    engine = filled(database_url)
    cache = TableCache(engine, views=[Events])
    cache.clock = clock
    yield cache
    cache._check()
    cache.close()
    engine.dispose()


@pytest.fixture
def lite(engine: Engine, clock: Clock) -> Iterator[TableCache]:
    """A cache of the events in a file, not started."""
    cache = TableCache(engine, views=[Events])
    cache.clock = clock
    yield cache
    cache._check()
    cache.close()


def stored(cache: Any, view: Any = Events) -> list[int]:
    """Return the ids of the records in storage."""
    return sorted(record.id for record in cache.table(view).state.storage)


def read(cache: TableCache, *criteria: Any) -> tuple[list[int], str]:
    """Return the ids of the events that meet the criteria, and how that was answered."""
    with cache.sessionmaker()() as session:
        found = session.scalars(select(Events).where(*criteria)).all()
        assert session.last_read is not None
        return sorted(record.id for record in found), session.last_read.kind


def selects(statements: list[str]) -> int:
    """Return how many SELECTs there were."""
    return sum("SELECT" in statement for statement in statements)


# -- windows -------------------------------------------------------------------------------------


def test_a_step_costs_only_the_difference(cache: TableCache, clock: Clock) -> None:
    """One SELECT for what came in, none for what fell out or if nothing moved."""
    cache.add(Events, policy=SlidingWindow("naive", past=3 * HOUR, future=HOUR))
    cache.table(Events).set_up()
    with counting() as statements:
        cache.step(Events)
    assert selects(statements) == 1
    assert stored(cache) == [33, 34, 35, 36, 37]
    with counting() as statements:
        cache.step(Events)
    assert not statements
    clock.now += HOUR
    with counting() as statements:
        cache.step(Events)
    assert selects(statements) == 1
    assert stored(cache) == [34, 35, 36, 37, 38]
    assert cache.stats(Events).records_loaded == 6
    assert cache.stats(Events).records_expired == 1
    clock.now -= 2 * HOUR
    cache.step(Events)
    assert stored(cache) == [32, 33, 34, 35, 36]


def test_a_window_that_only_narrows_asks_nothing(lite: TableCache, clock: Clock) -> None:
    """Expiring emits no SQL."""
    lite.add(Events, policy=SlidingWindow("naive", past=3 * HOUR))
    lite.step(Events)
    lite.add(Events, policy=SlidingWindow("naive", past=HOUR))
    with counting() as statements:
        lite.step(Events)
    assert not statements
    assert stored(lite) == [35, 36]


def test_reads_up_to_now_fetch_what_came_in_since_the_step(lite: TableCache, clock: Clock) -> None:
    """Between two steps such a read is a partial hit, and right."""
    lite.add(Events, policy=SlidingWindow("naive", past=3 * HOUR))
    lite.step(Events)
    clock.now += 2 * HOUR
    recent = Events.naive >= datetime(2024, 3, 1, 10), Events.naive <= datetime(2024, 3, 1, 14)
    assert read(lite, *recent) == ([34, 35, 36, 37, 38], "partial")
    lite.step(Events)
    assert read(lite, *recent[1:], Events.naive >= datetime(2024, 3, 1, 11)) == (
        [35, 36, 37, 38],
        "hit",
    )


def test_with_staleness_reads_do_without_what_came_in(cache: TableCache, clock: Clock) -> None:
    """As long as the last step is young enough, by select() and by range(); nothing is fetched."""
    policy = SlidingWindow("naive", past=3 * HOUR, staleness=2 * HOUR)
    cache.add(Events, policy=policy)
    cache.step(Events)
    start = datetime(2024, 3, 1, 10)
    for minutes, expected in (
        (60, ([34, 35, 36], "hit")),
        (120, ([34, 35, 36], "hit")),
        (121, ([34, 35, 36, 37, 38], "partial")),
    ):
        clock.now = NOON + minutes * MINUTE
        now = clock.now.replace(tzinfo=None)
        with counting() as statements:
            assert read(cache, Events.naive >= start, Events.naive <= now) == expected
        assert bool(statements) == (expected[1] == "partial")
        with cache.sessionmaker()() as session:
            found = session.range(Events.by_naive, ge=start, le=now)
            assert session.last_read is not None
            assert ([r.id for r in found], session.last_read.kind) == expected
    clock.now = NOON + HOUR
    beyond = datetime(2024, 3, 1, 15)
    assert read(cache, Events.naive >= start, Events.naive <= beyond)[1] == "partial"
    before = datetime(2024, 3, 1, 8)
    assert read(cache, Events.naive >= before, Events.naive <= NOON.replace(tzinfo=None)) == (
        [32, 33, 34, 35, 36],
        "partial",
    )
    assert cache.stats(Events).reasons["staleness"] == 4


def test_a_commit_into_the_window_is_seen(cache: TableCache, clock: Clock) -> None:
    """Rows that come, move or go inside of the window are fresh, as in any coverage."""
    cache.add(Events, policy=SlidingWindow("naive", past=3 * HOUR))
    cache.step(Events)
    assert cache.engine is not None
    with cache.engine.begin() as connection:
        connection.execute(insert(Event).values(event(900, NOON - HOUR)))
        connection.execute(delete(Event).where(Event.id == 34))
        connection.execute(
            update(Event).where(Event.id == 1).values(naive=datetime(2024, 3, 1, 11))
        )
    inside = Events.naive >= datetime(2024, 3, 1, 9), Events.naive <= datetime(2024, 3, 1, 12)
    assert read(cache, *inside) == ([1, 33, 35, 36, 900], "hit")


def test_every_kind_of_column_has_its_now(cache: TableCache, clock: Clock) -> None:
    """Naive datetimes are in UTC, dates of UTC, numbers count seconds; both ends are included."""
    clock.now = (NOON + 30 * MINUTE).astimezone(BERLIN)
    for by, expected in (
        ("naive", [35, 36]),
        ("epoch", [35, 36]),
        ("stamp", [35, 36]),
        (Events.by_naive, [35, 36]),
        (Events.naive, [35, 36]),
        ("by_epoch", [35, 36]),
        ("day", list(range(24, 48))),
    ):
        cache.add(Events, policy=SlidingWindow(by, past=2 * HOUR - 30 * MINUTE))
        cache.step(Events)
        assert stored(cache) == expected, by
        cache._check()
    cache.add(Events, policy=SlidingWindow("epoch", past=3600))
    cache.step(Events)
    assert stored(cache) == [36]


def test_aware_datetimes_compare_as_moments(cache: TableCache, clock: Clock) -> None:
    """Where the database keeps no zone it says why there is no such window."""
    clock.now = NOON.astimezone(BERLIN)
    cache.add(Events, policy=SlidingWindow("aware", past=HOUR))
    if cache.engine.dialect.name == "sqlite":
        with pytest.raises(NotExpressible, match="over aware"):
            cache.step(Events)
    else:
        cache.step(Events)
        assert stored(cache) == [35, 36]


def test_dates_take_the_days_that_the_window_touches(lite: TableCache, clock: Clock) -> None:
    """Thirteen hours before noon is the day before, in UTC."""
    lite.add(Events, policy=SlidingWindow("day", past=13 * HOUR))
    lite.step(Events)
    assert stored(lite) == list(range(48))


def test_local_time_and_other_units_are_said_by_now(lite: TableCache, clock: Clock) -> None:
    """now= makes a score of the time where the type does not tell, across a change of the clock."""

    def in_berlin(utc: datetime) -> datetime:
        return utc.astimezone(BERLIN).replace(tzinfo=None)

    lite.add(Events, policy=SlidingWindow("naive", past=HOUR, now=in_berlin))
    lite.step(Events)
    assert stored(lite) == [36, 37]  # noon in UTC is one o'clock there
    clock.now = datetime(2024, 3, 31, 0, 59, tzinfo=UTC)
    lite.step(Events)
    clock.now = datetime(2024, 3, 31, 1, 1, tzinfo=UTC)  # summer time began
    lite.step(Events)
    coverage = lite.stats(Events).coverage
    assert "2024, 3, 31, 3, 1)" in coverage
    assert "2024, 3, 31, 2, 1)" in coverage
    clock.now = NOON
    by_word = SlidingWindow("word", past=1, future=1, now=lambda _: "w40")
    lite.add(Events, policy=by_word)
    with pytest.raises(NotExpressible, match="over word"):
        lite.step(Events)
    numbers = SlidingWindow("epoch", past=7200, now=lambda utc: int(utc.timestamp()))
    lite.add(Events, policy=numbers)
    lite.step(Events)
    assert stored(lite) == [34, 35, 36]


def test_windows_without_an_end(cache: TableCache, clock: Clock) -> None:
    """timedelta.max reaches to the end; reads without a bound are then hits, fresh inserts too."""
    cache.add(Events, policy=SlidingWindow("naive", past=HOUR, future=timedelta.max))
    cache.step(Events)
    since = Events.naive >= datetime(2024, 3, 2, 22)
    assert read(cache, since) == ([70, 71, 72], "hit")
    assert cache.engine is not None
    with cache.engine.begin() as connection:
        connection.execute(insert(Event).values(event(900, NOON + 50 * DAY)))
    assert read(cache, since) == ([70, 71, 72, 900], "hit")
    cache.add(Events, policy=SlidingWindow("naive", past=timedelta(days=10**6), future=DAY))
    cache.step(Events)
    assert read(cache, Events.naive < datetime(2024, 2, 29, 2)) == ([0, 1], "hit")


def test_a_window_over_an_index_of_several_columns(lite: TableCache, clock: Clock) -> None:
    """The column has to be the first; the shortest index that begins with it is taken."""
    lite.add(Events, policy=SlidingWindow(Events.by_day, past=DAY))
    lite.step(Events)
    assert stored(lite) == list(range(48))
    assert read(lite, Events.day == date(2024, 3, 1))[1] == "hit"


def test_a_policy_declared_on_the_view(engine: Engine, clock: Clock) -> None:
    """__policy__ may name an index of the class body; add() may say otherwise."""
    with TableCache(engine) as cache:
        cache.clock = clock
        cache.add(Declared)
        cache.step(Declared)
        assert stored(cache, Declared) == [35, 36]
        cache.add(Declared, policy=Manual())
        clock.now += HOUR
        cache.step(Declared)
        assert stored(cache, Declared) == [35, 36]


def test_what_else_was_loaded_is_expired_by_the_next_step(lite: TableCache, clock: Clock) -> None:
    """The window is the coverage."""
    lite.add(Events, policy=SlidingWindow("naive", past=HOUR))
    lite.step(Events)
    lite.extend(Events, Events.epoch == int((NOON - DAY).timestamp()))
    assert stored(lite) == [12, 35, 36]
    lite.step(Events)
    assert stored(lite) == [35, 36]


# -- what cannot be ------------------------------------------------------------------------------


def test_a_window_needs_an_index_that_begins_with_its_column(lite: TableCache) -> None:
    """The error says which index to add."""
    with pytest.raises(NotExpressible, match=r'by_naive = ScoreIndex\("naive"\) to Unsorted'):
        lite.add(Unsorted, policy=SlidingWindow("naive", past=HOUR))
    assert Unsorted not in lite.views
    for by in ("nonsense", Events.by_naive, Event.naive, 3):
        with pytest.raises(NotExpressible, match="no index and no column"):
            lite.add(Unsorted, policy=SlidingWindow(by, past=HOUR))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"past": -HOUR}, "past=.* is negative"),
        ({"future": -1}, "future=-1 is negative"),
        ({"past": float("nan")}, "past=nan"),
        ({}, "both zero"),
        ({"past": "1h"}, "no length of time"),
        ({"past": HOUR, "every": timedelta(0)}, "every="),
        ({"past": HOUR, "every": 60}, "every=60"),
        ({"past": HOUR, "staleness": -HOUR}, "staleness="),
    ],
)
def test_wrong_durations_are_refused(wrong: dict[str, Any], message: str) -> None:
    """What cannot be meant is an error where it is written."""
    with pytest.raises(TableCacheError, match=message):
        SlidingWindow("naive", **wrong)


def test_numbers_are_no_times(lite: TableCache) -> None:
    """A column of datetimes needs timedeltas, unless now= says otherwise."""
    lite.add(Events, policy=SlidingWindow("naive", past=3600))
    with pytest.raises(NotExpressible, match="have to be timedeltas"):
        lite.step(Events)


def test_a_clock_has_to_say_its_zone(lite: TableCache) -> None:
    """A naive clock is refused rather than taken for UTC."""
    lite.clock = lambda: datetime(2024, 3, 1)
    lite.add(Events, policy=SlidingWindow("naive", past=HOUR))
    with pytest.raises(TableCacheError, match="no time zone"):
        lite.step(Events)


def test_what_is_no_policy_is_refused(lite: TableCache) -> None:
    """A class instead of an instance is a common mistake, and the error says so."""
    wrong: Any = Everything
    with pytest.raises(TableCacheError, match=r"give Everything\(\)"):
        lite.add(Events, policy=wrong)
    wrong = "everything"
    with pytest.raises(TableCacheError, match="is no policy"):
        lite.add(Events, policy=wrong)
    with pytest.raises(TableCacheError, match="chunk=0"):
        Everything(chunk=0)


def test_default_intervals() -> None:
    """A hundredth of the window, from a second to a minute."""
    assert SlidingWindow("x", past=7 * DAY).seconds == 60
    assert SlidingWindow("x", past=10 * MINUTE).seconds == 6
    assert SlidingWindow("x", past=MINUTE).seconds == 1
    assert SlidingWindow("x", past=MINUTE, future=timedelta.max).seconds == 60
    assert SlidingWindow("x", past=MINUTE, every=timedelta(seconds=9)).seconds == 9


# -- in the background ---------------------------------------------------------------------------


def run_until(done: threading.Event, cache: TableCache, view: Any, policy: Policy) -> None:
    """Start a cache and wait for a load that its policy makes."""

    def timer(table: Any, what: str, seconds: float) -> None:
        if table.view is view and what == "load":
            done.set()

    cache.timers.append(timer)
    cache.add(view, policy=policy)
    assert done.wait(20)
    done.clear()


def test_the_upkeep_steps(engine: Engine, clock: Clock) -> None:
    """A started cache loads by itself, whenever the view is added, and says how that goes."""
    done = threading.Event()
    cache = TableCache(engine, views=[Events])
    cache.clock = clock
    with cache:
        run_until(done, cache, Events, SlidingWindow("naive", past=HOUR))
        assert stored(cache) == [35, 36]
        clock.now += HOUR
        cache.upkeep.wake("policy of Events")
        assert done.wait(20)
        assert stored(cache) == [36, 37]
        assert list(cache.health().jobs) == ["policy of Events"]
        cache._check()


def test_everything_is_loaded_once_and_again_after_clear(engine: Engine) -> None:
    """All of a view, in chunks if wanted."""
    done = threading.Event()
    with TableCache(engine, views=[Events]) as cache:
        run_until(done, cache, Events, Everything())
        assert cache.wait_ready(Events, 20)
        assert cache.covers(Events)
        with counting() as statements:
            cache.step(Events)
        assert not statements
        cache.clear(Events)
        assert cache.wait_ready(Events, 20)
        assert cache.covers(Events)
    with TableCache(engine, views=[Events]) as cache:
        cache.add(Events, policy=Everything(chunk=20))
        assert cache.wait_ready(Events, 20)
        assert cache.stats(Events).records == 73


def test_a_step_that_fails_is_seen_in_the_health(engine: Engine) -> None:
    """A limit that does not hold all of the view is told, and nothing is kept."""
    with TableCache(engine, memory_limit=1_000) as cache:
        cache.add(Events, policy=Everything())
        with pytest.raises(MemoryLimitExceeded):
            cache.step(Events)
        assert cache.stats(Events).records == 0


async def test_windows_of_an_asynchronous_cache(database_url: URL) -> None:
    """Steps are awaited, or done by a task."""
    filled(database_url).dispose()
    async_engine = create_async_engine(asynchronous(database_url))
    clock = Clock()
    cache = AsyncTableCache(async_engine, views=[Events])
    cache.clock = clock
    assert cache.clock is clock
    cache.add(Events, policy=SlidingWindow("naive", past=2 * HOUR, staleness=DAY))
    await cache.step(Events)
    clock.now += HOUR
    start, now = datetime(2024, 3, 1, 11), datetime(2024, 3, 1, 13)
    async with cache.sessionmaker()() as session:
        found = await session.range(Events.by_naive, ge=start, le=now)
        assert [record.id for record in found] == [35, 36]
        assert session.last_read is not None
        assert session.last_read.kind == "hit"
    async with cache:
        assert cache.health().running
    await async_engine.dispose()


@pytest.mark.parametrize(
    "make",
    [lambda: ReadThrough(max_records=5), lambda: SlidingWindow("x", past=HOUR), Everything, Manual],
)
def test_policies_are_values(make: Callable[[], Policy]) -> None:
    """Two of the same kind and limits are equal, and show what they are."""
    assert make() == make()
    assert hash(make()) == hash(make())
    assert repr(make()).startswith(type(make()).__name__)
