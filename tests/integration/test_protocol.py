"""Every race that the protocol is made for, stopped at the place where it hurts.

Refreshes and loads run in a thread of their own and are held at a pause point, between opening
their snapshot, reading, and being applied; meanwhile the test commits, reads or evicts.
"""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Engine,
    ForeignKey,
    String,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from sa_tablecache import AsyncTableCache, CachedView, ScoreIndex, TableCache, bypass_cache
from tests.integration.pausing import Held, Running

pytestmark = pytest.mark.every_database


class Base(DeclarativeBase):
    """Models of these tests."""


class Parent(Base):
    """The preserved side of the join."""

    __tablename__ = "protocol_parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


class Child(Base):
    """The side that an outer join NULL-extends."""

    __tablename__ = "protocol_child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey(Parent.id))
    value: Mapped[int]


class Family(CachedView):
    """Parents with their children, those without any too."""

    __select__ = select(Parent.id, Parent.name, Child.id.label("child"), Child.value).outerjoin(
        Child, Child.parent_id == Parent.id
    )

    by_id = ScoreIndex("id")


class Parents(CachedView):
    """Parents alone, whose key is one column and a score."""

    __select__ = select(Parent.id, Parent.name)

    by_id = ScoreIndex("id")


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """A database with two parents, of which the first has a child."""
    engine = create_engine(database_url)
    if database_url.get_backend_name() == "sqlite":
        # Readers of a rollback journal would keep writers from committing.
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Parent(id=n, name=f"parent {n}") for n in (1, 2, 3)])
        session.flush()
        session.add(Child(id=10, parent_id=1, value=0))
        session.commit()
    yield engine
    engine.dispose()


@pytest.fixture
def cache(engine: Engine) -> Iterator[TableCache]:
    """A cache with all of the view."""
    with TableCache(engine, views=[Family]) as cache:
        cache.load(Family)
        yield cache


def rows(records: Any) -> list[tuple[Any, ...]]:
    """Return records as sorted tuples."""
    values = [(r.id, r.name, r.child, r.value) for r in records]
    return sorted(values, key=repr)


def read(cache: TableCache) -> tuple[list[tuple[Any, ...]], str]:
    """Read all of the view in a session of its own; return it and how it was answered."""
    with cache.sessionmaker()() as session:
        result = rows(session.scalars(select(Family)).all())
        assert session.last_read is not None
        return result, session.last_read.kind


def truth(cache: TableCache) -> list[tuple[Any, ...]]:
    """Return what the database says."""
    with cache.sessionmaker()() as session:
        return rows(session.scalars(select(Family).options(bypass_cache())).all())


def write(engine: Engine, *statements: Any) -> None:
    """Commit statements."""
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(statement)


def settled(cache: TableCache) -> None:
    """Assert that the cache answers by itself, and what the database says."""
    answer, _ = read(cache)
    assert answer == truth(cache)
    answer, kind = read(cache)
    assert kind == "hit"
    assert answer == truth(cache)
    cache._check()


def move(child: int, parent: int | None) -> Any:
    """Return the statement that gives a child another parent."""
    return update(Child).where(Child.id == child).values(parent_id=parent)


def give(child: int, value: int) -> Any:
    """Return the statement that gives a child another value."""
    return update(Child).where(Child.id == child).values(value=value)


def test_a_change_in_place_is_seen_by_who_asks_for_just_that_record(engine: Engine) -> None:
    """The interval of an answer may be no wider than the key of the only record in it."""
    with TableCache(engine, views=[Parents]) as cache:
        cache.load(Parents)
        criteria = [Parents.id == 1, Parents.id.in_([1]), Parents.id.between(1, 1), Parents.id <= 1]
        with cache.sessionmaker()() as session:
            for number, criterion in enumerate(criteria):
                write(engine, update(Parent).where(Parent.id == 1).values(name=f"new {number}"))
                records = session.scalars(select(Parents).where(criterion)).all()
                assert [record.name for record in records] == [f"new {number}"]
            write(engine, update(Parent).where(Parent.id == 1).values(name="by range"))
            (record,) = session.range(Parents.by_id, 1)
            assert record.name == "by range"
            write(engine, update(Parent).where(Parent.id == 1).values(name="by key"))
            assert session.get(Parents, 1).name == "by key"  # type: ignore[union-attr]


@pytest.mark.parametrize("point", ["snapshot", "read"])
def test_a_change_during_a_refresh_is_not_lost(
    engine: Engine, cache: TableCache, point: str
) -> None:
    """A mark that arrives while a refresh is under way survives it, for the same row."""
    write(engine, give(10, 1))
    held = Held(cache.table(Family), point)
    refresh = Running(lambda: cache.refresh(Family))
    assert held.reached.wait(20)
    write(engine, give(10, 2))
    held.let_go()
    refresh.result()
    assert (1, "parent 1", 10, 2) in read(cache)[0]
    settled(cache)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1)])
def test_a_child_moves_while_an_older_refresh_of_a_parent_is_in_flight(
    engine: Engine, cache: TableCache, old: int, new: int
) -> None:
    """Neither parent keeps or loses the child because of rows that were read before it moved."""
    write(engine, move(10, old))
    settled(cache)
    write(engine, update(Parent).where(Parent.id.in_([1, 2])).values(name="renamed"))
    cache.invalidate(Parent, 1)
    held = Held(cache.table(Family), "read")
    refresh = Running(lambda: cache.refresh(Family))
    assert held.reached.wait(20)
    write(engine, move(10, new))
    held.let_go()
    refresh.result()
    settled(cache)


def test_a_parent_is_evicted_while_its_refresh_is_in_flight(
    engine: Engine, cache: TableCache
) -> None:
    """What was evicted stays out, and what was loaded again is not replaced by older rows."""
    write(engine, give(10, 1))
    held = Held(cache.table(Family), "read")
    refresh = Running(lambda: cache.refresh(Family))
    assert held.reached.wait(20)
    cache.evict(Family, Family.id == 1)
    write(engine, move(10, 2))
    cache.extend(Family, Family.id == 1)
    held.let_go()
    refresh.result()
    settled(cache)
    cache.evict(Family, Family.id == 1)
    assert not cache.covers(Family, Family.id == 1)
    cache._check()


def test_a_change_during_the_first_load(engine: Engine) -> None:
    """A load shows what was committed while it was reading."""
    with TableCache(engine, views=[Family]) as cache:
        held = Held(cache.table(Family), "loaded")
        load = Running(lambda: cache.load(Family))
        assert held.reached.wait(20)
        write(engine, give(10, 5))
        held.let_go()
        load.result()
        assert (1, "parent 1", 10, 5) in read(cache)[0]
        settled(cache)


def test_a_change_that_a_refresh_clears_while_a_load_is_in_flight(engine: Engine) -> None:
    """A load makes marks pending again that a refresh of other records has cleared meanwhile."""
    with TableCache(engine, views=[Family]) as cache:
        cache.load(Family, Family.id == 1)
        held = Held(cache.table(Family), "loaded")
        load = Running(lambda: cache.extend(Family, Family.id == 2))
        assert held.reached.wait(20)
        write(engine, move(10, 2))
        with cache.sessionmaker()() as session:
            assert rows(session.range(Family.by_id, ge=1, le=1)) == [(1, "parent 1", None, None)]
            assert session.last_read is not None
            assert session.last_read.kind == "hit", "a load keeps nobody from refreshing"
        held.let_go()
        load.result()
        with cache.sessionmaker()() as session:
            assert rows(session.range(Family.by_id, ge=2, le=2)) == [(2, "parent 2", 10, 0)]
        cache._check()


def test_a_load_during_a_refresh(engine: Engine) -> None:
    """A refresh does not take away what was loaded after it had read."""
    with TableCache(engine, views=[Family]) as cache:
        cache.load(Family, Family.id == 1)
        for change in (give(10, 7), text("UPDATE protocol_child SET value = 8")):
            write(engine, change)
            held = Held(cache.table(Family), "read")
            refresh = Running(lambda: cache.refresh(Family))
            assert held.reached.wait(20)
            cache.load(Family)
            held.let_go()
            refresh.result()
            settled(cache)
            cache.load(Family, Family.id == 1)


def test_the_last_child_goes_and_comes_back(engine: Engine, cache: TableCache) -> None:
    """The NULL-extended row of an outer join appears and vanishes."""
    write(engine, delete(Child).where(Child.id == 10))
    assert (1, "parent 1", None, None) in read(cache)[0]
    settled(cache)
    with Session(engine) as session:
        session.add(Child(id=11, parent_id=1, value=3))
        session.commit()
    answer, _ = read(cache)
    assert (1, "parent 1", 11, 3) in answer
    assert (1, "parent 1", None, None) not in answer
    settled(cache)


def test_a_reader_between_flush_and_commit(engine: Engine, cache: TableCache) -> None:
    """Flushed changes are seen by their own session, and by no other."""
    with cache.sessionmaker()() as writer:
        child = writer.get(Child, 10)
        assert child is not None
        child.value = 9
        writer.flush()
        own = rows(writer.scalars(select(Family)).all())
        assert (1, "parent 1", 10, 9) in own
        assert writer.last_read is not None
        assert writer.last_read.kind == "bypass"
        answer, kind = read(cache)
        assert (1, "parent 1", 10, 0) in answer
        assert kind == "hit"
        writer.rollback()
        assert (1, "parent 1", 10, 0) in rows(writer.scalars(select(Family)).all())
    settled(cache)


def test_a_reader_between_commit_and_its_end(engine: Engine) -> None:
    """What the database has committed is read, though the writer's commit() has not returned."""
    committed, go = threading.Event(), threading.Event()
    do_commit = engine.dialect.do_commit
    slow = threading.Event()

    def commit(connection: Any) -> None:
        do_commit(connection)
        if slow.is_set():
            slow.clear()
            committed.set()
            assert go.wait(20)

    engine.dialect.do_commit = commit  # type: ignore[method-assign]
    with TableCache(engine, views=[Family]) as cache:
        cache.load(Family)
        slow.set()
        writer = Running(lambda: write(engine, give(10, 4)))
        assert committed.wait(20)
        answer, kind = read(cache)
        assert (1, "parent 1", 10, 4) in answer
        assert kind == "bypass"
        go.set()
        writer.result()
        settled(cache)


def test_readers_that_hold_all_connections_of_the_pool_are_refreshed(database_url: URL) -> None:
    """A refresh needs no connection of the application's pool."""
    small = create_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    Base.metadata.create_all(small)
    with TableCache(small, views=[Family]) as cache:
        write(small, Parent.__table__.insert().values(id=1, name="one"))  # type: ignore[attr-defined]
        cache.load(Family)
        cache.invalidate(Parent, 1)
        with small.connect():
            answer, kind = read(cache)
        assert answer == [(1, "one", None, None)]
        assert kind == "hit"
    small.dispose()


def test_a_failed_refresh_leaves_no_trace(engine: Engine, cache: TableCache) -> None:
    """The database answers, marks stay, and the next read refreshes."""
    fail = True

    @event.listens_for(cache.load_engine, "before_cursor_execute")
    def refuse(*_: Any) -> None:
        if fail:
            msg = "the cache's connections are down"
            raise OperationalError(msg, None, Exception(msg))

    before = cache.stats(Family).records
    write(engine, give(10, 6))
    answer, kind = read(cache)
    assert (1, "parent 1", 10, 6) in answer
    assert kind == "bypass"
    stats = cache.stats(Family)
    assert stats.records == before
    assert stats.pending_marks == 1
    fail = False
    settled(cache)


def test_a_load_that_fails_half_way_leaves_the_coverage_whole(
    engine: Engine, cache: TableCache
) -> None:
    """What was loaded stays, and answers, as if the load had never begun."""
    cache.load(Family, Family.id == 1)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.load(Family, progress=stop)
    with cache.sessionmaker()() as session:
        assert len(session.range(Family.by_id, ge=1, le=1)) == 1
        assert session.last_read is not None
        assert session.last_read.kind == "hit"
    assert not cache.covers(Family, Family.id == 2)
    cache._check()
    cache.load(Family)
    settled(cache)


def test_one_refresh_serves_many_readers(engine: Engine, cache: TableCache) -> None:
    """Readers that need the same refresh wait for it, and there is one."""
    write(engine, give(10, 3))
    held = Held(cache.table(Family), "read")
    readers = [Running(lambda: read(cache)) for _ in range(8)]
    assert held.reached.wait(20)
    held.let_go()
    for reader in readers:
        answer, kind = reader.result()
        assert (1, "parent 1", 10, 3) in answer
        assert kind == "hit"
    assert cache.stats(Family).refreshes == 1


async def test_a_cancelled_refresh_does_not_poison_the_others(async_database_url: URL) -> None:
    """A task that is cancelled in the middle of a refresh leaves it to the next one."""
    engine = create_async_engine(async_database_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session:
        session.add(Parent(id=1, name="one"))
        await session.commit()
    cache = AsyncTableCache(engine, views=[Family])
    await cache.load(Family)
    factory = cache.sessionmaker()
    cache.invalidate(Parent, 1)
    started = asyncio.Event()

    @event.listens_for(cache.sync_cache.load_engine, "before_cursor_execute")
    def noted(*_: Any) -> None:
        started.set()

    async def reading() -> list[tuple[Any, ...]]:
        async with factory() as session:
            return rows(await session.range(Family.by_id))

    first = asyncio.create_task(reading())
    second = asyncio.create_task(reading())
    await started.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == [(1, "one", None, None)]
    assert await reading() == [(1, "one", None, None)]
    cache._check()
    await cache.close()
    await engine.dispose()


def test_a_savepoint_whose_release_commits_is_leased_while_it_does(sqlite_url: URL) -> None:
    """On SQLite the outermost RELEASE commits, and is seen before the cache hears of its end."""
    engine = create_engine(sqlite_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    seen: list[Any] = []

    # It is told of the end of a statement before the cache is.
    @event.listens_for(engine, "after_cursor_execute")
    def read_now(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("RELEASE"):
            seen.append(read(cache)[0])

    Base.metadata.create_all(engine)
    write(engine, insert(Parent).values(id=1, name="one"))
    with TableCache(engine, views=[Family]) as cache:
        cache.load(Family)
        with engine.connect() as connection, connection.begin_nested():
            connection.execute(update(Parent).where(Parent.id == 1).values(name="two"))
        assert seen == [[(1, "two", None, None)]]
        settled(cache)
        with engine.begin() as connection:
            connection.execute(update(Parent).where(Parent.id == 1).values(name="three"))
            with connection.begin_nested():
                connection.execute(update(Parent).where(Parent.id == 1).values(name="four"))
            assert cache.stats(Family).leases == 0, "it did not commit"
        assert seen[1:] == [[(1, "two", None, None)]]
        settled(cache)
    engine.dispose()


@pytest.mark.parametrize("attached", [True, False])
def test_statements_of_the_engine_are_noticed_whoever_sends_them(
    engine: Engine, cache: TableCache, *, attached: bool
) -> None:
    """A plain session on the engine invalidates, attached to the cache or not."""
    factory = sessionmaker(engine)
    if attached:
        cache.attach(factory)
    with factory() as session:
        session.execute(give(10, 12))
        session.commit()
    settled(cache)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(give(10, 13))
        assert (1, "parent 1", 10, 13) in read(cache)[0]
    raw = engine.raw_connection()
    raw.cursor().execute("UPDATE protocol_child SET value = 14")
    raw.commit()
    raw.close()
    assert (1, "parent 1", 10, 14) in read(cache)[0]
    with engine.connect() as connection:
        connection.execute(text("UPDATE protocol_child SET value = 15"))
        connection.execute(text("COMMIT"))
        assert (1, "parent 1", 10, 15) in read(cache)[0]
    settled(cache)


def test_many_threads(engine: Engine, cache: TableCache) -> None:
    """Each writer reads its own commits back, readers only see what was true at some time."""
    stop = threading.Event()
    factory = cache.sessionmaker()

    def writer(number: int) -> int:
        for version in range(1, 26):
            with factory() as session:
                child = session.get(Child, number)
                if child is None:
                    session.add(Child(id=number, parent_id=1 + version % 3, value=version))
                else:
                    child.value, child.parent_id = version, 1 + version % 3
                session.commit()
                mine = [r for r in session.scalars(select(Family)) if r.child == number]
                assert [(r.id, r.value) for r in mine] == [(1 + version % 3, version)]
        return version

    def reader() -> int:
        seen: dict[int, int] = {}
        while not stop.is_set():
            with factory() as session:
                for record in session.scalars(select(Family)):
                    if record.child is not None:
                        assert record.value >= seen.get(record.child, 0)
                        seen[record.child] = record.value
        return len(seen)

    def mover() -> None:
        while not stop.is_set():
            cache.load(Family, Family.id <= 2)
            cache.load(Family)

    with Session(engine) as session:
        session.execute(delete(Child))
        session.commit()
    writers = [Running(lambda n=n: writer(n)) for n in (20, 21, 22)]  # type: ignore[misc]
    others = [Running(reader), Running(reader), Running(mover)]
    try:
        assert [w.result() for w in writers] == [25, 25, 25]
    finally:
        stop.set()
    for other in others:
        other.result()
    settled(cache)
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(Child)) == 3
