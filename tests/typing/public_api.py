"""What type checkers say about the public API: checked by mypy and pyright, never run.

`assert_type` pins what an expression is; a comment that ignores an error pins that there is one,
because unused ignores are errors of both checkers. The types that differ between versions of
SQLAlchemy are pinned in the neighbouring files.
"""

# pyright: basic, reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, assert_type

from sqlalchemy import Engine, ForeignKey, create_engine, event, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    InstrumentedAttribute,
    Mapped,
    Session,
    mapped_column,
    sessionmaker,
)

from sa_tablecache import (
    AsyncCacheSession,
    AsyncTableCache,
    CachedView,
    CacheSession,
    ChangeFeed,
    Everything,
    Manual,
    ReadThrough,
    ScoreIndex,
    SlidingWindow,
    TableCache,
    Transaction,
    bypass_cache,
    in_transaction,
    max_staleness,
    no_store,
)
from sa_tablecache.metrics import export
from sa_tablecache.testing import Clock, assert_hits, assert_statements, bound, run_upkeep


class Base(DeclarativeBase):
    pass


class Plane(Base):
    __tablename__ = "planes"
    tailnum: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str | None]


class Flight(Base):
    __tablename__ = "flights"
    id: Mapped[int] = mapped_column(primary_key=True)
    time_hour: Mapped[datetime]
    tailnum: Mapped[str | None] = mapped_column(ForeignKey("planes.tailnum"))
    dep_delay: Mapped[float | None]


class FlightBoard(CachedView):
    __select__ = select(
        Flight.id,
        Flight.time_hour,
        Flight.tailnum,
        Flight.dep_delay,
        Plane.model.label("plane_model"),
    ).outerjoin(Plane, Flight.tailnum == Plane.tailnum)

    id: Mapped[int]
    time_hour: Mapped[datetime]
    plane_model: Mapped[str | None]

    by_time = ScoreIndex("time_hour")
    by_plane = ScoreIndex("tailnum", "time_hour")
    by_delay = ScoreIndex(func.coalesce(Flight.dep_delay, 0))

    @property
    def title(self) -> str:
        return f"{self.id}: {self.plane_model or '?'}"


since = datetime(2013, 1, 1)


def a_view_is_a_source_of_sql_on_the_class_and_of_values_on_records() -> None:
    assert_type(FlightBoard.id, InstrumentedAttribute[int])
    assert_type(FlightBoard.plane_model, InstrumentedAttribute[str | None])
    record = FlightBoard(id=1, time_hour=since, plane_model=None)
    assert_type(record, FlightBoard)
    assert_type(record.id, int)
    assert_type(record.time_hour, datetime)
    assert_type(record.plane_model, str | None)
    assert_type(record.title, str)
    assert_type(record._asdict(), dict[str, Any])


def a_record_is_built_by_keyword_and_never_changed(record: FlightBoard) -> None:
    FlightBoard(1, since, None)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    FlightBoard(id="1", time_hour=since, plane_model=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    record.id = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def a_range_is_a_list_of_records(session: CacheSession, last: FlightBoard) -> None:
    assert_type(session.range(FlightBoard.by_time), list[FlightBoard])
    assert_type(
        session.range(FlightBoard.by_time, ge=since, lt=since + timedelta(days=1)),
        list[FlightBoard],
    )
    assert_type(
        session.range(
            FlightBoard.by_plane,
            "N14228",
            gt=since,
            le=since,
            descending=True,
            limit=10,
            after=last,
        ),
        list[FlightBoard],
    )


def a_select_of_a_view_gives_records(session: CacheSession) -> None:
    statement = select(FlightBoard).where(FlightBoard.time_hour >= since)
    statement = statement.order_by(FlightBoard.time_hour.desc()).limit(10)
    assert_type(session.scalars(statement).all(), Sequence[FlightBoard])
    assert_type(session.scalars(statement).first(), FlightBoard | None)
    assert_type(session.scalars(statement).one(), FlightBoard)
    assert_type(session.scalar(statement), FlightBoard | None)
    assert_type(session.execute(statement).scalars().all(), Sequence[FlightBoard])
    assert_type(session.scalars(statement.options(bypass_cache())).all(), Sequence[FlightBoard])
    assert_type(session.scalars(statement.options(no_store())).all(), Sequence[FlightBoard])


def a_select_of_columns_gives_values(session: CacheSession) -> None:
    assert_type(session.scalars(select(FlightBoard.time_hour)).all(), Sequence[datetime])
    assert_type(session.scalars(select(FlightBoard.plane_model)).all(), Sequence[str | None])


def a_query_of_a_view_gives_records(session: CacheSession) -> None:
    query = session.query(FlightBoard).filter(FlightBoard.time_hour >= since)
    assert_type(query.order_by(FlightBoard.time_hour).limit(10).all(), list[FlightBoard])
    assert_type(query.first(), FlightBoard | None)
    assert_type(query.one(), FlightBoard)
    assert_type(query.one_or_none(), FlightBoard | None)
    assert_type(query.count(), int)
    for record in query:
        assert_type(record, FlightBoard)


def a_record_is_found_by_its_key(session: CacheSession) -> None:
    assert_type(session.get(FlightBoard, 17), FlightBoard | None)


def an_index_serves_as_an_expression(session: CacheSession) -> None:
    statement = select(FlightBoard).where(FlightBoard.by_delay >= 60)
    assert_type(
        session.scalars(statement.order_by(FlightBoard.by_delay)).all(), Sequence[FlightBoard]
    )


def a_cache_session_is_a_session(session: CacheSession) -> Session:
    assert_type(session.scalars(select(Flight)).all(), Sequence[Flight])
    assert_type(session.get(Plane, "N14228"), Plane | None)
    return session


def a_cache_makes_sessions() -> None:
    with TableCache(create_engine("sqlite:///board.db"), views=[FlightBoard]) as cache:
        assert_type(cache, TableCache)
        cache.add(FlightBoard)
        cache.load(FlightBoard, FlightBoard.time_hour >= since)
        cache.extend(FlightBoard, FlightBoard.time_hour >= since)
        cache.evict(FlightBoard, FlightBoard.time_hour >= since)
        cache.invalidate(Plane, "N14228")
        cache.refresh(FlightBoard)
        cache.clear(FlightBoard)
        assert_type(cache.ready(FlightBoard), bool)
        assert_type(cache.covers(FlightBoard, FlightBoard.time_hour >= since), bool)
        Session = cache.sessionmaker(scope=lambda session: session.info["tenant"])
        with Session() as session:
            assert_type(session, CacheSession)


async def the_asynchronous_twin_has_the_same_types() -> None:
    cache = AsyncTableCache(create_async_engine("sqlite+aiosqlite:///board.db"))
    cache.add(FlightBoard)
    await cache.load(FlightBoard, FlightBoard.time_hour >= since)
    await cache.refresh(FlightBoard)
    assert_type(cache.ready(FlightBoard), bool)
    Session = cache.sessionmaker()
    async with Session() as session:
        assert_type(session, AsyncCacheSession)
        assert_type(await session.range(FlightBoard.by_time, ge=since), list[FlightBoard])
        statement = select(FlightBoard)
        found = await session.scalars(statement)
        assert_type(found.all(), Sequence[FlightBoard])
        assert_type(await session.scalar(statement), FlightBoard | None)
        assert_type(await session.get(FlightBoard, 17), FlightBoard | None)
        plain: AsyncSession = session
        await plain.close()
    await cache.close()


Sessions = sessionmaker(create_engine("sqlite:///board.db"))
AsyncSessions = async_sessionmaker(create_async_engine("sqlite+aiosqlite:///board.db"))


@in_transaction(Sessions, relaxed=True, tries=3, timeout=1.5)
def rename(session: Session, tailnum: str, *, model: str = "") -> Plane:
    return session.get_one(Plane, tailnum)


@in_transaction(AsyncSessions)
async def rename_later(session: AsyncSession, tailnum: str) -> Plane:
    return await session.get_one(Plane, tailnum)


class Hangar:
    @in_transaction(Sessions)
    def park(self, session: Session, tailnum: str) -> int:
        return len(tailnum)

    @in_transaction(AsyncSessions)
    async def park_later(self, session: AsyncSession, tailnum: str) -> int:
        return len(tailnum)


async def a_function_in_a_transaction_is_called_without_the_session() -> None:
    assert_type(rename("N14228", model="737"), Plane)
    rename("N14228", modle="737")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    rename(17)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert_type(await rename_later("N14228"), Plane)
    assert_type(Hangar().park("N14228"), int)
    Hangar().park(17)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert_type(await Hangar().park_later("N14228"), int)


async def a_block_has_the_session_of_its_factory(cache: TableCache) -> None:
    with Transaction(Sessions) as txn:
        assert_type(txn.session, Session)
    with Transaction(cache.sessionmaker(), relaxed=True) as cached:
        assert_type(cached.session, CacheSession)
    async with Transaction(AsyncSessions) as later:
        assert_type(later.session, AsyncSession)


def a_cache_has_a_short_form(cache: TableCache) -> None:
    @cache.in_transaction(tries=2)
    def delays(session: CacheSession, since: datetime) -> list[FlightBoard]:
        return session.range(FlightBoard.by_time, ge=since)

    assert_type(delays(since), list[FlightBoard])


async def a_cache_is_tested_in_either_world(cache: TableCache, later: AsyncTableCache) -> None:
    with cache.engine.connect() as connection, bound(cache, connection):
        run_upkeep(cache)
    async with later.engine.connect() as other:
        with bound(later, other), assert_hits(FlightBoard), cache.disabled():
            await run_upkeep(later)
    with assert_statements(0, engine=later.engine) as statements:
        assert_type(statements, list[str])
    clock = Clock(since)
    clock.advance(days=1)
    cache.clock = later.clock = clock
    export(later, name="later")


def policies_are_given_with_their_views(cache: TableCache) -> None:
    limited = TableCache(memory_limit=2**30, load_slots=2, slot_timeout=60.0)
    limited.add(FlightBoard, policy=Everything(chunk=10_000))
    cache.add(FlightBoard, policy=Manual())
    cache.add(FlightBoard, policy=ReadThrough(max_records=10, ttl=timedelta(hours=1)))
    cache.add(
        FlightBoard,
        policy=SlidingWindow(
            FlightBoard.by_time,
            past=timedelta(days=7),
            future=timedelta(days=1),
            every=timedelta(minutes=1),
            staleness=timedelta(seconds=10),
            now=lambda utc: utc.replace(tzinfo=None),
        ),
    )
    cache.add(FlightBoard, policy=ReadThrough)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    cache.load(FlightBoard, chunk=1_000)
    cache.step(FlightBoard)
    assert_type(cache.clock(), datetime)
    cache.clock = lambda: datetime(2024, 1, 1)


async def windows_are_stepped_in_tasks_too(cache: AsyncTableCache) -> None:
    cache.add(FlightBoard, policy=SlidingWindow("time_hour", past=timedelta(days=7)))
    await cache.step(FlightBoard)
    await cache.extend(FlightBoard, FlightBoard.time_hour >= datetime(2024, 1, 1), chunk=1_000)
    cache.clock = lambda: datetime(2024, 1, 1)


class Lenient(FlightBoard):
    __max_staleness__ = timedelta(seconds=5)
    __refresh__ = "eager"
    __on_miss__ = "wait"
    __max_misses__ = 10
    __redact__ = ("plane_model",)


def a_view_says_how_old_how_eager_and_how_discreet(session: CacheSession) -> None:
    assert_type(session.range(Lenient.by_time), list[Lenient])
    statement = select(Lenient).options(max_staleness(timedelta.max))
    assert_type(session.scalars(statement).all(), Sequence[Lenient])
    max_staleness(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def a_cache_has_modes_and_tells(cache: TableCache, other: AsyncTableCache) -> None:
    TableCache(views=[FlightBoard], verify=0.001)
    cache.set_mode(FlightBoard, "shadow")
    assert_type(cache.mode(FlightBoard), str)
    assert_type(cache.why(FlightBoard, 1).marks, tuple[str, ...])
    assert_type(other.why(FlightBoard, 1).loaded, datetime | None)
    assert_type(cache.health().ok, bool)
    assert_type(other.health().reasons, tuple[str, ...])
    cache.start()
    other.start()


@event.listens_for(FlightBoard, "after_refresh")
def a_function_listens(
    view: type[FlightBoard],
    added: list[FlightBoard],
    changed: list[tuple[FlightBoard, FlightBoard]],
    removed: list[FlightBoard],
) -> None:
    assert_type(added[0].id, int)


def a_cache_follows_what_others_write(engine: Engine) -> None:
    feed = ChangeFeed(poll_interval=0.2, max_lag=timedelta(seconds=2), keep=timedelta(hours=1))
    cache = TableCache(engine, views=[FlightBoard], feed=feed)
    assert_type(cache.install_feed(), int)
    cache.barrier()
    with cache.sessionmaker(freshness="barrier")() as session:
        assert_type(session.commit_token, str | None)
    assert_type(cache.wait_for(cache.commit_token(), timeout=1), bool)
    cache.attach(engine, freshness=timedelta(seconds=10))
    TableCache(engine, exclusive_writer=True)


async def so_does_an_asynchronous_one(cache: AsyncTableCache) -> None:
    await cache.barrier()
    async with cache.sessionmaker(freshness=timedelta(0))() as session:
        assert_type(await session.commit_token, str | None)
    assert_type(await cache.wait_for(await cache.commit_token()), bool)
