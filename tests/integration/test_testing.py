"""A cache that lives in the transaction of one test answers as that transaction would."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from sqlalchemy import Connection, delete, insert, literal, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import sessionmaker

from sa_tablecache import (
    AsyncTableCache,
    CachedView,
    CacheSession,
    ChangeFeed,
    Manual,
    ReadThrough,
    SlidingWindow,
    TableCache,
    TableCacheError,
    bypass_cache,
)
from sa_tablecache.policies import Policy
from sa_tablecache.testing import Clock, assert_hits, assert_statements, bound, run_upkeep
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world, hour, ids
from tests.zoo import Flight, InnerBoard, OuterBoard, Plane

every_database = pytest.mark.every_database


@contextmanager
def joined(
    cache: TableCache, sessions: sessionmaker[CacheSession], mode: Any = "create_savepoint"
) -> Iterator[Connection]:
    """Lend a connection to which a cache is bound, and on which sessions are from now on."""
    with cache.engine.connect() as connection:
        transaction = connection.begin()
        with bound(cache, connection):
            sessions.configure(bind=connection, join_transaction_mode=mode)
            try:
                yield connection
            finally:
                if transaction.is_active:
                    transaction.rollback()
    sessions.configure(bind=cache.engine)


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights; nothing of them is loaded."""
    with flights_world(database) as world:
        yield world


def kind(world: World, *criteria: Any) -> tuple[list[int], str]:
    """Return the ids that a new session reads, and how it was answered."""
    with world.Session() as session:
        found = ids(session.scalars(select(OuterBoard).where(*criteria)))
        assert session.last_read is not None
        return found, session.last_read.kind


# -- savepoints as commits -------------------------------------------------------------------------


@every_database
def test_what_a_test_commits_is_in_the_cache_until_it_ends(world: World):
    """Commits of sessions in savepoints invalidate; the rollback leaves nothing, and no rows."""
    with joined(world.cache, world.Session):
        world.cache.load(OuterBoard)
        with world.Session() as session:
            session.add(Flight(**flight(7, 0)))
            assert ids(session.range(OuterBoard.by_hour)) == [1, 2, 3, 4, 5, 6, 7]
            assert session.last_read.reason == "the transaction wrote a table of the view"
            session.commit()
            assert 7 in ids(session.range(OuterBoard.by_hour))
            assert session.last_read.kind == "hit"
        with assert_statements(0):
            assert kind(world) == ([1, 2, 3, 4, 5, 6, 7], "hit")
        assert world.cache.stats(OuterBoard).records == 7
    assert world.cache.stats(OuterBoard).records == 0
    assert kind(world)[1] == "miss"
    world.cache.load(OuterBoard)
    assert kind(world) == ([1, 2, 3, 4, 5, 6], "hit")


@every_database
def test_what_a_savepoint_wrote_is_gone_with_it(world: World):
    """A session's rollback leaves no mark, and one after a load in between leaves no row."""
    with joined(world.cache, world.Session):
        world.cache.load(OuterBoard)
        with world.Session() as session:
            session.add(Flight(**flight(7, 0)))
            session.flush()
            session.rollback()
            assert world.cache.stats(OuterBoard).pending_marks == 0
            with assert_statements(0):
                assert 7 not in ids(session.range(OuterBoard.by_hour))
            session.add(Flight(**flight(8, 0)))
            session.flush()
            world.cache.clear(OuterBoard)
            world.cache.load(OuterBoard)
            assert world.cache.stats(OuterBoard).records == 7
            session.rollback()
            assert 8 not in ids(session.range(OuterBoard.by_hour))
            assert session.last_read.kind == "hit"


@every_database
def test_an_inner_savepoint_is_no_commit(world: World):
    """Only the outermost one counts, whatever sessions the others belong to."""
    with joined(world.cache, world.Session):
        world.cache.load(OuterBoard)
        with world.Session() as session:
            with session.begin_nested():
                session.add(Flight(**flight(7, 0)))
            with world.Session.begin() as other:
                other.add(Flight(**flight(8, 0)))
            assert kind(world) == ([1, 2, 3, 4, 5, 6, 7, 8], "bypass")
            session.rollback()
        assert kind(world)[0] == [1, 2, 3, 4, 5, 6]


@every_database
@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only", "control_fully"])
def test_what_is_written_outside_of_savepoints_counts_at_once(world: World, mode: str):
    """Inserts on the connection itself, and sessions that are joined without savepoints."""
    with joined(world.cache, world.Session, mode) as connection:
        world.cache.load(OuterBoard)
        connection.execute(insert(Flight).values(**flight(7, 0)))
        assert kind(world) == ([1, 2, 3, 4, 5, 6, 7], "hit")
        connection.exec_driver_sql("DELETE FROM flights WHERE id = 7")
        assert kind(world) == ([1, 2, 3, 4, 5, 6], "hit")
        with world.Session() as session:
            session.add(Flight(**flight(8, 0)))
            assert 8 in ids(session.range(OuterBoard.by_hour))
            assert session.get(OuterBoard, 8) is not None
            session.delete(session.get_one(Flight, 8))
            assert session.get(OuterBoard, 8) is None


def test_rows_from_before_the_cache_was_bound_are_seen(world: World):
    """What the transaction had written before is as good as committed."""
    with world.engine.connect() as connection, connection.begin() as transaction:
        connection.execute(insert(Flight).values(**flight(7, 0)))
        with bound(world.cache, connection):
            world.Session.configure(bind=connection, join_transaction_mode="create_savepoint")
            world.cache.load(OuterBoard)
            assert kind(world) == ([1, 2, 3, 4, 5, 6, 7], "hit")
        transaction.rollback()
    world.Session.configure(bind=world.engine)


def test_other_sessions_do_not_see_the_test(world: World):
    """A session on a connection of its own is answered by the database: without the test's rows."""
    with joined(world.cache, world.Session) as connection:
        world.cache.load(OuterBoard)
        with world.Session.begin() as session:
            session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
        with world.Session(bind=world.engine) as other:
            board = select(OuterBoard).where(OuterBoard.tailnum == "N1")
            assert {flight.model for flight in other.scalars(board)} == {"A320"}
            assert other.last_read.kind == "bypass"
            assert "connection of a test" in other.last_read.reason
            other.range(OuterBoard.by_hour)
            assert other.last_read.kind == "bypass"
            assert other.get(OuterBoard, 1).model == "A320"
        with world.Session(bind=connection) as session:
            assert {flight.model for flight in session.scalars(board)} == {"A380"}
            assert session.last_read.kind == "hit"


@every_database
@pytest.mark.parametrize(
    "policy", [Manual(), ReadThrough(max_records=5)], ids=["manual", "through"]
)
def test_random_tests_are_answered_as_by_the_database(world: World, policy: Policy):
    """Whatever sessions do on the connection, and the cache meanwhile, answers are the same."""
    kinds: dict[str, int] = {}
    world.cache.add(OuterBoard, policy=policy)
    for seed in range(5):
        with joined(world.cache, world.Session) as connection:
            play(Random(seed), world, connection, kinds)
    assert kinds["hit"] > 10
    assert kinds["bypass"] > 10


def play(random: Random, world: World, connection: Connection, kinds: dict[str, int]) -> None:
    """Do random things on one connection, sessions inside of each other; compare after each."""
    cache = world.cache
    cache.load(OuterBoard)

    def write(where: Any, number: int) -> None:
        where.execute(
            random.choice(
                [
                    insert(Flight).values(**flight(number, random.random() * 5, tailnum="N2")),
                    delete(Flight).where(Flight.id == random.choice([2, 4, 6, number - 9])),
                    update(Flight).where(Flight.id == 3).values(hour=hour(random.randrange(6))),
                    update(Plane).where(Plane.tailnum == "N2").values(model=f"M{number}"),
                ]
            )
        )

    def read(session: CacheSession) -> None:
        statement = select(OuterBoard).where(OuterBoard.hour < hour(random.randrange(1, 6)))
        found = session.scalars(statement).all()
        assert session.last_read is not None
        how = session.last_read.kind
        kinds[how] = kinds.get(how, 0) + 1
        truth = session.scalars(statement.options(bypass_cache())).all()
        assert sorted(found, key=by_id) == sorted(truth, key=by_id), how
        cache._check()

    with world.Session() as session:
        for number in range(100, 140):
            match random.randrange(12):
                case 0 | 1:
                    write(session, number)
                case 2:
                    session.add(Flight(**flight(number, 1, tailnum="N3")))
                case 3:
                    write(connection, number)
                case 4 | 5:
                    session.commit()
                case 6:
                    session.rollback()
                case 7:
                    session.begin_nested()
                case 8 if (nested := session.get_nested_transaction()) is not None:
                    random.choice([nested.commit, nested.rollback])()
                case 9:
                    with world.Session() as inner:
                        write(inner, number)
                        read(inner)
                        random.choice([inner.commit, inner.rollback, inner.close])()
                        read(inner)
                case 10:
                    cache.refresh(OuterBoard)
                case 11:
                    limit = hour(random.randrange(5))
                    cache.load(OuterBoard, *random.choice([(), (OuterBoard.hour < limit,)]))
            read(session)


def by_id(record: Any) -> int:
    """Return the id of a record."""
    return int(record.id)


def test_two_caches_live_in_one_test(world: World):
    """Both are told of what counts as committed, whichever notices it."""
    with (
        TableCache(world.engine, views=[OuterBoard]) as other,
        joined(world.cache, world.Session) as connection,
        bound(other, connection),
    ):
        sessions = (world.Session, other.sessionmaker(bind=connection))
        for cache in (world.cache, other):
            cache.load(OuterBoard)
        for number, write in ((7, world.Session), (8, world.Session)):
            with write.begin() as session:
                session.add(Flight(**flight(number, 0)))
            for Session in sessions:
                with Session() as session:
                    assert number in ids(session.range(OuterBoard.by_hour))
                    assert session.last_read.kind == "hit"
        with world.Session() as session:
            session.add(Flight(**flight(9, 0)))
            session.flush()
            other.load(OuterBoard, OuterBoard.hour < hour(2))
            session.rollback()
        for Session in sessions:
            with Session() as session:
                assert 9 not in ids(session.range(OuterBoard.by_hour, lt=hour(2)))


def test_a_cache_that_is_not_bound_does_not_answer_the_test(world: World):
    """It holds what is committed, and the test's connection sees something else."""
    with TableCache(world.engine, views=[OuterBoard]) as other:
        other.load(OuterBoard)
        with joined(world.cache, world.Session) as connection:
            with world.Session.begin() as session:
                session.add(Flight(**flight(7, 0)))
            connection.execute(delete(Flight).where(Flight.id == 1))
            assert 1 not in kind(world)[0]
            with other.sessionmaker(bind=connection)() as session:
                assert ids(session.range(OuterBoard.by_hour)) == [2, 3, 4, 5, 6, 7]
                assert session.last_read.reason == "the transaction wrote a table of the view"
        with other.sessionmaker()() as session:
            assert ids(session.range(OuterBoard.by_hour)) == [1, 2, 3, 4, 5, 6]


def test_attached_sessions_live_in_the_test_as_well(world: World):
    """A factory of plain sessions is answered by the cache that it is attached to."""
    plain = sessionmaker(world.engine)
    world.cache.attach(plain)
    with joined(world.cache, plain):
        world.cache.load(OuterBoard)
        with plain.begin() as session:
            session.add(Flight(**flight(7, 0)))
        with plain() as session, assert_hits(OuterBoard):
            assert 7 in ids(session.scalars(select(OuterBoard)))


# -- the end of the transaction --------------------------------------------------------------------


def test_a_test_that_commits_after_all_tells_everybody(world: World):
    """Another cache of the engine hears of all that the transaction wrote, when it commits."""
    with TableCache(world.engine, views=[OuterBoard]) as other:
        other.load(OuterBoard)
        with world.engine.connect() as connection:
            transaction = connection.begin()
            with bound(world.cache, connection):
                world.Session.configure(bind=connection, join_transaction_mode="create_savepoint")
                with world.Session.begin() as session:
                    session.add(Flight(**flight(7, 0)))
                assert other.stats(OuterBoard).pending_marks == 0
                transaction.commit()
                assert other.stats(OuterBoard).pending_marks == 1
        world.Session.configure(bind=world.engine)
        with other.sessionmaker()() as session:
            assert 7 in ids(session.range(OuterBoard.by_hour))
            assert session.last_read.kind == "hit"


def test_after_the_transaction_loads_are_refused(world: World):
    """There is nothing to read from any more; the error says so."""
    with joined(world.cache, world.Session) as connection:
        world.cache.load(OuterBoard)
        connection.get_transaction().rollback()
        assert world.cache.stats(OuterBoard).records == 0
        with pytest.raises(TableCacheError, match="whose transaction has ended"):
            world.cache.load(OuterBoard)
        with world.Session() as session:
            assert len(session.range(OuterBoard.by_hour)) == 6
            assert (
                session.last_read.reason == "the transaction that the cache is bound to has ended"
            )


class Inverses(CachedView):
    """What PostgreSQL cannot compute for each flight."""

    __select__ = select(Flight.id, (100 / Flight.delay).label("inverse"))


def test_a_read_that_fails_does_not_end_the_test(postgresql: Database):
    """A load that divides by zero fails, and the transaction of the test goes on."""
    with (
        flights_world(postgresql, OuterBoard, Inverses) as world,
        joined(world.cache, world.Session),
    ):
        with world.Session.begin() as session:
            session.add(Flight(**flight(7, 0)))
            with pytest.raises(DBAPIError, match="division by zero"):
                world.cache.load(Inverses)
        world.cache.load(OuterBoard)
        assert kind(world) == ([1, 2, 3, 4, 5, 6, 7], "hit")


def test_what_cannot_be_bound_is_refused(world: World, sqlite: Database):
    """Another engine's connection, one without a transaction, the same twice."""
    cache = world.cache
    with world.engine.connect() as connection:
        with (
            pytest.raises(TableCacheError, match="begin a transaction first"),
            bound(cache, connection),
        ):
            pass
        with connection.begin(), bound(cache, connection):
            with pytest.raises(TableCacheError, match="already"), bound(cache, connection):
                pass
            assert cache.health().ok
        with (
            sqlite.lent_engine() as other,
            other.begin() as foreign,
            pytest.raises(TableCacheError, match="is bound to"),
            bound(cache, foreign),
        ):
            pass
    with (
        pytest.raises(TableCacheError, match="Connection that is open"),
        bound(cache, world.engine),
    ):
        pass


def test_a_window_slides_when_the_test_says_so(database: Database):
    """The clock stands still, and so does the window; both are moved by the test."""
    clock = Clock(hour(2).replace(tzinfo=UTC))
    with flights_world(database, load_slots=1) as world:
        world.cache.clock = clock
        world.cache.add(OuterBoard, policy=SlidingWindow("hour", past=timedelta(hours=1.5)))
        with joined(world.cache, world.Session):
            run_upkeep(world.cache)
            assert world.cache.stats(OuterBoard).records == 3
            with world.Session.begin() as session:
                session.add(Flight(**flight(7, 3.5)))
            clock.advance(hours=2)
            assert world.cache.stats(OuterBoard).records == 3
            run_upkeep(world.cache)
            assert world.cache.covers(
                OuterBoard, OuterBoard.hour >= hour(3), OuterBoard.hour < hour(4)
            )
            found = kind(world, OuterBoard.hour >= hour(3), OuterBoard.hour < hour(4))
            assert found == ([5, 7], "hit")


def test_the_upkeep_runs_when_it_is_told_to(world: World):
    """Inside of a test nothing runs beside it: one step of each job, here and now."""
    steps: list[str] = []

    def load() -> None:
        world.cache.load(OuterBoard)
        steps.append("load")

    with joined(world.cache, world.Session):
        world.cache.upkeep.add("load", load)
        assert not steps
        assert world.cache.health().running
        run_upkeep(world.cache)
        assert steps == ["load"]
        assert kind(world)[1] == "hit"
    world.cache.upkeep.remove("load")
    assert world.cache.upkeep.running


def test_a_change_feed_is_not_followed_meanwhile(database: Database):
    """Nothing is committed that it could tell of; afterwards it is followed as before."""
    with flights_world(database, feed=ChangeFeed()) as world:
        world.cache.upkeep.stop()
        world.cache.install_feed()
        world.cache.barrier()
        with joined(world.cache, world.Session):
            world.cache.load(OuterBoard)
            with world.Session.begin() as session:
                session.execute(
                    insert(Flight).from_select(
                        list(flight(7, 0)), select(*(literal(v) for v in flight(7, 0).values()))
                    )
                )
            assert kind(world) == ([1, 2, 3, 4, 5, 6, 7], "hit")
            run_upkeep(world.cache)
            assert kind(world) == ([1, 2, 3, 4, 5, 6, 7], "hit")
        world.cache.load(OuterBoard)
        assert kind(world) == ([1, 2, 3, 4, 5, 6], "hit")
        with world.outside() as session:
            session.execute(delete(Flight).where(Flight.id == 1))
            session.commit()
        world.cache.barrier()
        assert kind(world) == ([2, 3, 4, 5, 6], "hit")
        assert set(world.cache.health().jobs) >= {"change feed"}
        world.cache.uninstall_feed()


@every_database
async def test_an_asynchronous_test_is_the_same(async_world: Any):
    """An AsyncConnection binds an AsyncTableCache; loads of two views at once take turns."""
    import asyncio

    cache = async_world
    Session = cache.sessionmaker()
    async with cache.engine.connect() as connection:
        transaction = await connection.begin()
        with bound(cache, connection):
            Session.configure(bind=connection, join_transaction_mode="create_savepoint")
            await asyncio.gather(cache.load(OuterBoard), cache.load(InnerBoard))
            async with Session() as session:
                session.add(Flight(**flight(7, 0)))
                assert len(await session.range(OuterBoard.by_hour)) == 7
                assert session.last_read.kind == "bypass"
                await session.commit()
                assert len(await session.range(OuterBoard.by_hour)) == 7
                assert session.last_read.kind == "hit"
                with assert_statements(0), assert_hits(OuterBoard):
                    assert len((await session.scalars(select(OuterBoard))).all()) == 7
            ran = []
            cache.sync_cache.upkeep.add("job", lambda: ran.append(1))
            cache.start()
            await run_upkeep(cache)
            assert ran == [1]
            await transaction.rollback()
        assert cache.stats(OuterBoard).records == 0
    await cache.load(OuterBoard)
    assert cache.stats(OuterBoard).records == 6


@pytest.fixture
async def async_world(database: Database):
    """An asynchronous cache of six flights."""
    with flights_world(database):
        engine = database.async_engine()
        cache = AsyncTableCache(engine, views=[OuterBoard, InnerBoard])
        yield cache
        await cache.close()
        await engine.dispose()


# -- assertions ------------------------------------------------------------------------------------


@pytest.fixture
def loaded(sqlite: Database) -> Iterator[World]:
    """Six flights, loaded until ten o'clock."""
    with flights_world(sqlite) as world:
        world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
        yield world


def test_reads_that_are_no_hits_are_told_with_their_reasons(loaded: World):
    """The message has how often each reason was given; hits after a refresh are hits."""
    with assert_hits(OuterBoard):
        loaded.ids(OuterBoard.hour < hour(1))
        loaded.cache.invalidate(OuterBoard)
        loaded.ids(OuterBoard.hour < hour(1))
    with pytest.raises(AssertionError) as raised, assert_hits(OuterBoard):
        loaded.ids(OuterBoard.hour < hour(1))
        loaded.ids(OuterBoard.hour > hour(3))
        loaded.ids(OuterBoard.hour > hour(3))
        loaded.ids(OuterBoard.tailnum.like("N%"))
    assert str(raised.value).startswith("3 of 4 reads of OuterBoard were no hits:\n  2 x miss: ")
    assert "1 x bypass: " in str(raised.value)


def test_an_assertion_about_nothing_fails(loaded: World):
    """No read, and a view that no cache has, are no success."""
    with pytest.raises(AssertionError, match="nothing read OuterBoard"), assert_hits(OuterBoard):
        pass
    with pytest.raises(TableCacheError, match="InnerBoard is in no cache"), assert_hits(InnerBoard):
        pass
    with pytest.raises(ZeroDivisionError), assert_hits(OuterBoard):
        _ = 1 / 0


def test_statements_are_counted_and_shown(loaded: World):
    """Those of the application and of the cache, without what controls transactions."""
    with assert_statements(1) as statements, loaded.Session() as session:
        session.begin_nested()
        session.scalars(select(Flight.id)).all()
        session.commit()
    assert statements[0].startswith("SELECT flights.id")
    with assert_statements(1):
        loaded.cache.load(OuterBoard)
    with assert_statements(0, engine=loaded.engine):
        loaded.cache.clear(OuterBoard)
        loaded.cache.load(OuterBoard)
    told = r"^expected 0 statements, counted 1:\n  SELECT"
    with pytest.raises(AssertionError, match=told), assert_statements(0):
        loaded.ids(OuterBoard.tailnum.like("N%"))
    told = r"^expected 2 statements, counted 0$"
    with pytest.raises(AssertionError, match=told), assert_statements(2):
        pass


def test_a_disabled_cache_asks_the_database(loaded: World):
    """Inside of the block all reads are bypasses, and the same as before after it."""
    with loaded.cache.disabled(), counting() as statements:
        assert kind_of(loaded) == ("bypass", "the cache is disabled")
        with loaded.cache.disabled():
            assert kind_of(loaded)[0] == "bypass"
        assert kind_of(loaded)[0] == "bypass"
    assert len(statements) == 3
    assert kind_of(loaded)[0] == "hit"


def kind_of(world: World) -> tuple[str, str]:
    """Return how a read of what is loaded is answered, and why."""
    with world.Session() as session:
        session.range(OuterBoard.by_hour, lt=hour(1))
        assert session.last_read is not None
        return session.last_read.kind, session.last_read.reason


def test_a_clock_says_what_it_is_told():
    """It stands still, goes forward, and has a time zone."""
    clock = Clock(datetime(2024, 3, 1, tzinfo=UTC))
    clock.advance(days=1)
    assert clock() == clock() == datetime(2024, 3, 2, tzinfo=UTC)
    with pytest.raises(TableCacheError, match="time zone"):
        Clock(datetime(2024, 3, 1))
