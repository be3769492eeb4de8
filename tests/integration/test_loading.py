"""Loading, extending, evicting and clearing: what is covered, and what each call costs."""

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, event, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from sa_tablecache import (
    AsyncTableCache,
    CachedView,
    Closed,
    DuplicateKey,
    NotExpressible,
    ScoreIndex,
    TableCache,
    UnsuitableEngine,
)
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world, hour, ids, insert_flights
from tests.integration.rows import DAYS
from tests.zoo import (
    Airline,
    DayPlan,
    Flight,
    InnerBoard,
    OuterBoard,
    Plane,
    PlaneEntity,
    Plans,
    Routes,
    Weather,
    WeatherHours,
)


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights, none of them cached."""
    with flights_world(database) as world:
        yield world


def records(world: World) -> int:
    """Return the number of records in storage."""
    return world.cache.stats(OuterBoard).records


def is_hit(world: World, *criteria: Any) -> bool:
    """Whether a read of what meets the criteria is answered without a statement."""
    with counting() as statements:
        world.ids(*criteria)
    return not statements


# --- what is covered ------------------------------------------------------------------------------


def test_nothing_is_covered_at_first(world: World):
    """A view that was added and not loaded is read from the database."""
    assert not world.cache.ready(OuterBoard)
    assert not world.cache.covers(OuterBoard)
    assert records(world) == 0
    assert world.ids() == [1, 2, 3, 4, 5, 6]
    assert records(world) == 0


def test_a_load_without_criteria_covers_everything(world: World):
    """After `load(View)` every question that Python can answer is answered from memory."""
    world.cache.load(OuterBoard)
    assert world.cache.ready(OuterBoard)
    assert world.cache.covers(OuterBoard)
    assert world.cache.covers(OuterBoard, OuterBoard.hour > hour(-100))
    assert world.cache.covers(OuterBoard, OuterBoard.tailnum == "N1")
    assert records(world) == 6
    assert is_hit(world)
    assert is_hit(world, OuterBoard.tailnum == "N1", OuterBoard.delay > 0)


def test_a_load_of_a_range_covers_exactly_it(world: World):
    """`load(View, criteria)` covers that range, and nothing beside it."""
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
    assert records(world) == 3
    assert world.cache.covers(OuterBoard, OuterBoard.hour == hour(1))
    assert world.cache.covers(OuterBoard, OuterBoard.hour.between(hour(1), hour(2)))
    assert world.cache.covers(OuterBoard, OuterBoard.hour == hour(2), OuterBoard.delay > 0)
    assert not world.cache.covers(OuterBoard)
    assert not world.cache.covers(OuterBoard, OuterBoard.hour == hour(3))
    assert not world.cache.covers(OuterBoard, OuterBoard.hour.between(hour(1), hour(3)))
    assert not world.cache.covers(OuterBoard, OuterBoard.hour < hour(1))
    assert is_hit(world, OuterBoard.hour == hour(1))
    assert not is_hit(world, OuterBoard.hour == hour(3))


def test_a_load_moves_only_the_difference(world: World):
    """Sliding the coverage keeps what is in both ranges, fetches the new, expires the old."""
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(0), OuterBoard.hour < hour(2))
    assert records(world) == 3
    before = world.cache.stats(OuterBoard)
    with counting() as statements:
        world.cache.load(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4))
    after = world.cache.stats(OuterBoard)
    assert len([statement for statement in statements if "flights" in statement]) == 1
    assert records(world) == 4
    assert after.records_loaded - before.records_loaded == 2
    assert after.records_expired - before.records_expired == 1
    assert world.ids(OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4)) == [2, 3, 4, 5]
    assert not world.cache.covers(OuterBoard, OuterBoard.hour == hour(0))


def test_a_load_of_what_is_covered_reads_nothing(world: World):
    """A narrower range, or the same one again, costs no read of the view."""
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(0), OuterBoard.hour < hour(4))
    with counting() as statements:
        world.cache.load(OuterBoard, OuterBoard.hour >= hour(0), OuterBoard.hour < hour(4))
        world.cache.load(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
    assert not [statement for statement in statements if "flights" in statement]
    assert records(world) == 3


def test_a_load_by_a_prefix_of_a_composite_index(world: World):
    """One group of a composite index, or a range within it, can be loaded."""
    world.cache.load(OuterBoard, OuterBoard.tailnum == "N1", OuterBoard.hour > hour(0))
    assert records(world) == 1
    assert is_hit(world, OuterBoard.tailnum == "N1", OuterBoard.hour == hour(2))
    assert not is_hit(world, OuterBoard.tailnum == "N1")
    world.cache.load(OuterBoard, OuterBoard.tailnum.in_(["N1", "N2"]))
    assert records(world) == 3
    assert is_hit(world, OuterBoard.tailnum == "N2")
    assert not is_hit(world, OuterBoard.tailnum == "N3")


def test_a_load_by_an_expression(world: World):
    """What the database computes can say what is loaded."""
    world.cache.load(OuterBoard, OuterBoard.by_delay >= 1)
    assert records(world) == 2
    with world.Session() as session, counting() as statements:
        assert ids(session.range(OuterBoard.by_delay, gt=3)) == [2, 3]
    assert statements == []


def test_records_without_a_score_are_outside_every_range(world: World):
    """NULL belongs to no range, to the whole view, and to `IS NULL`."""
    world.cache.load(OuterBoard, OuterBoard.year > 0)
    assert records(world) == 3
    assert world.ids(OuterBoard.year.is_(None)) == [3, 5, 6]
    world.cache.load(OuterBoard, OuterBoard.year.is_(None))
    assert records(world) == 3
    assert is_hit(world, OuterBoard.year.is_(None))
    assert not is_hit(world, OuterBoard.year > 0)
    assert world.ids(OuterBoard.year > 0) == [1, 2, 4]


def test_extend_adds_to_the_coverage(world: World):
    """`extend` expires nothing, fetches only what is new, and joins ranges that meet."""
    world.cache.load(OuterBoard, OuterBoard.hour < hour(1))
    world.cache.extend(OuterBoard, OuterBoard.hour >= hour(3))
    assert records(world) == 3
    assert not world.cache.covers(OuterBoard, OuterBoard.hour >= hour(0))
    world.cache.extend(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
    assert records(world) == 6
    assert world.cache.covers(OuterBoard, OuterBoard.hour >= hour(0))
    assert is_hit(world, OuterBoard.hour.between(hour(0), hour(4)))


def test_extend_by_another_index_is_covered_too(world: World):
    """Coverage is a set of ranges for each index; a record may be needed by several."""
    world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
    world.cache.extend(OuterBoard, OuterBoard.tailnum == "N1")
    assert records(world) == 4
    assert is_hit(world, OuterBoard.tailnum == "N1")
    assert is_hit(world, OuterBoard.hour < hour(2))
    assert not is_hit(world, OuterBoard.hour == hour(2))
    world.cache.evict(OuterBoard, OuterBoard.hour < hour(2))
    assert records(world) == 2
    assert is_hit(world, OuterBoard.tailnum == "N1")


def test_evict_takes_a_range_away(world: World):
    """`evict` runs no statement; what it takes is read from the database again."""
    world.cache.load(OuterBoard)
    with counting() as statements:
        world.cache.evict(OuterBoard, OuterBoard.hour < hour(2))
    assert statements == []
    assert records(world) == 3
    assert not world.cache.covers(OuterBoard)
    assert is_hit(world, OuterBoard.hour >= hour(2))
    assert world.ids() == [1, 2, 3, 4, 5, 6]
    world.cache.evict(OuterBoard)
    assert records(world) == 0


def test_clear_gives_everything_up(world: World):
    """`clear` runs no statement and leaves a view that can be loaded again."""
    world.cache.load(OuterBoard)
    with counting() as statements:
        world.cache.clear(OuterBoard)
    assert statements == []
    assert records(world) == 0
    assert not world.cache.covers(OuterBoard)
    assert world.ids() == [1, 2, 3, 4, 5, 6]
    world.cache.load(OuterBoard)
    assert is_hit(world)


def test_rows_enter_and_leave_the_coverage(world: World):
    """A commit may move a record into the covered range, out of it, or past it."""
    covered = (OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
    world.cache.load(OuterBoard, *covered)
    for moves, inside in [({1: 1.5}, [1, 2, 3, 4]), ({2: 9}, [1, 3, 4]), ({2: 2, 1: 0}, [2, 3, 4])]:
        with world.Session() as session:
            for number, after in moves.items():
                session.get_one(Flight, number).hour = hour(after)
            session.commit()
        assert world.ids(*covered) == inside
        assert is_hit(world, *covered)
        assert records(world) == len(inside)
    with world.Session() as session:
        session.add(Flight(**flight(7, 2.5)))
        session.add(Flight(**flight(8, 3.5)))
        session.execute(delete(Flight).where(Flight.id == 4))
        session.commit()
    assert world.ids(*covered) == [2, 3, 7]
    assert world.ids() == [1, 2, 3, 5, 6, 7, 8]


# --- criteria that cannot be loaded ---------------------------------------------------------------


def test_criteria_that_no_index_expresses_are_refused(world: World):
    """The error says which `ScoreIndex` would do, if one could; nothing changes."""
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(2))
    for criteria, named in [
        ((OuterBoard.airline == "United",), r"ScoreIndex\(.airline.\)"),
        ((OuterBoard.airline == "United", OuterBoard.year > 1), r"ScoreIndex\(.airline., .year.\)"),
        ((OuterBoard.hour >= hour(1), OuterBoard.delay > 3), "about hour, delay|about delay, hour"),
    ]:
        for call in (world.cache.load, world.cache.extend, world.cache.evict):
            with pytest.raises(NotExpressible, match=named):
                call(OuterBoard, *criteria)
    for criterion in (OuterBoard.model.like("A%"), OuterBoard.by_delay + 1 > 2):
        with pytest.raises(NotExpressible):
            world.cache.load(OuterBoard, criterion)
    assert records(world) == 3
    assert is_hit(world, OuterBoard.hour >= hour(2))


# --- readiness, estimates, figures ----------------------------------------------------------------


def test_wait_ready_waits_for_the_first_load(world: World):
    """`wait_ready` returns once a load has ended, and says whether it has."""
    assert world.cache.wait_ready(OuterBoard, timeout=0.01) is False
    reading, go_on, seen = Event(), Event(), []

    def hold(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "flights" in statement:
            reading.set()
            go_on.wait(10)

    event.listen(world.cache.load_engine, "before_cursor_execute", hold)
    loader = Thread(target=lambda: world.cache.load(OuterBoard))
    waiter = Thread(target=lambda: seen.append(world.cache.wait_ready(OuterBoard, timeout=10)))
    loader.start()
    assert reading.wait(10)
    waiter.start()
    assert not world.cache.ready(OuterBoard)
    assert world.ids() == [1, 2, 3, 4, 5, 6]  # readers go on meanwhile
    go_on.set()
    loader.join()
    waiter.join()
    assert seen == [True]
    assert world.cache.ready(OuterBoard)


def test_an_estimate_tells_what_a_load_would_cost(world: World):
    """`estimate` counts rows without loading any."""
    estimate = world.cache.estimate(OuterBoard)
    assert estimate.rows == 6
    assert estimate.bytes > 0
    assert estimate.seconds >= 0
    assert world.cache.estimate(OuterBoard, OuterBoard.hour >= hour(2)).rows == 3
    assert records(world) == 0
    assert not world.cache.ready(OuterBoard)


def test_the_figures_of_a_view(world: World):
    """`stats` counts loads, reads by their kind, refreshes and marks."""
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(1))
    with world.Session() as session:
        session.range(OuterBoard.by_hour, ge=hour(1))
        session.range(OuterBoard.by_hour, ge=hour(0))
        session.range(OuterBoard.by_hour, lt=hour(1))
        session.scalars(select(OuterBoard).where(OuterBoard.model.like("%"))).all()
        session.get_one(Flight, 5).delay = 9.0
        session.commit()
    stats = world.cache.stats(OuterBoard)
    assert (stats.hits, stats.partial_hits, stats.misses, stats.bypasses) == (1, 1, 1, 1)
    assert (stats.records, stats.loads, stats.refreshes) == (5, 1, 0)
    assert stats.pending_marks == 1
    assert "hour" in str(stats.coverage)
    with counting() as statements:
        assert world.cache.stats(OuterBoard).pending_marks == 1
    assert statements == []
    assert world.ids(OuterBoard.delay == 9) == [5]
    stats = world.cache.stats(OuterBoard)
    assert (stats.refreshes, stats.pending_marks) == (1, 0)
    with pytest.raises(AttributeError):
        stats.hits = 0


def test_check_names_coarse_tables_and_idle_indexes(linguistic: Database):
    """`check` tells which tables are coarse, and which indexes a collation keeps from ranges."""
    views = (OuterBoard, Routes, PlaneEntity)
    with flights_world(linguistic, *views) as world:
        problems = [str(problem) for problem in world.cache.check()]
        assert any("Routes" in p and "flights" in p and "DISTINCT" in p for p in problems)
        assert any("PlaneEntity" in problem and "by_model" in problem for problem in problems)
        idle = [problem for problem in problems if "serves" in problem]
        assert not any("by_hour" in problem or "by_year" in problem for problem in idle)


# --- marks by hand --------------------------------------------------------------------------------


def _change_behind_the_back(world: World) -> None:
    with world.outside() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A321"))
        session.execute(update(Flight).where(Flight.id == 3).values(delay=31.0))
        session.commit()


def test_invalidate_has_the_next_read_see_what_others_wrote(world: World):
    """A view, a table or one row can be marked; what is not marked stays as it was."""
    world.cache.load(OuterBoard)
    _change_behind_the_back(world)
    assert world.ids(OuterBoard.delay == 31) == []
    world.cache.invalidate(Plane, "N1")
    assert world.ids(OuterBoard.model == "A321") == [1, 4]
    assert world.ids(OuterBoard.delay == 31) == []
    world.cache.invalidate(Flight)
    assert world.ids(OuterBoard.delay == 31) == [3]


def test_invalidate_by_view(world: World):
    """`invalidate(View)` marks all of its records, criteria those that meet them."""
    world.cache.load(OuterBoard)
    _change_behind_the_back(world)
    world.cache.invalidate(OuterBoard, OuterBoard.tailnum == "N1")
    assert world.ids(OuterBoard.model == "A321") == [1, 4]
    world.cache.invalidate(OuterBoard)
    assert world.ids(OuterBoard.delay == 31) == [3]


def test_invalidate_takes_keys_of_several_columns(database: Database):
    """A composite key is a tuple, and may name a row that did not exist."""
    with flights_world(database, WeatherHours) as world:
        world.cache.load(WeatherHours)
        with world.outside() as session:
            session.add(Weather(origin="JFK", hour=hour(1), temp=1.5))
            session.commit()
        world.cache.invalidate(Weather, ("JFK", hour(1)))
        with world.Session() as session:
            assert [record.temp for record in session.scalars(select(WeatherHours))] == [1.5]


def test_refresh_reads_what_is_marked_at_once(world: World):
    """After `refresh` the next read is a hit; without marks it reads nothing."""
    world.cache.load(OuterBoard)
    with world.Session() as session:
        session.get_one(Flight, 1).delay = 44.0
        session.commit()
    world.cache.refresh(OuterBoard)
    assert is_hit(world, OuterBoard.delay == 44)
    assert world.ids(OuterBoard.delay == 44) == [1]
    with counting() as statements:
        world.cache.refresh(OuterBoard)
    assert statements == []


def test_what_does_not_concern_a_view_marks_nothing(database: Database):
    """Writes of tables that a view does not have leave hits hits."""
    with flights_world(database, PlaneEntity) as world:
        world.cache.load(PlaneEntity)
        with world.Session() as session:
            session.get_one(Airline, "AA").name = "x"
            session.execute(update(Flight).values(delay=1.0))
            session.commit()
        with world.Session() as session, counting() as statements:
            assert len(session.scalars(select(PlaneEntity)).all()) == 3
        assert statements == []


# --- loads that fail ------------------------------------------------------------------------------


def test_a_load_that_its_callback_stops_leaves_the_state_before(world: World):
    """An error of the progress callback, in the middle of a load, is the caller's."""
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(2))
    with world.engine.begin() as connection:
        connection.execute(insert(Flight), [flight(n, -n) for n in range(100, 12_100)])
    assert world.ids(OuterBoard.hour >= hour(2)) == [4, 5, 6]
    calls: list[int] = []

    def stop(rows: int) -> None:
        calls.append(rows)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.cache.load(OuterBoard, progress=stop)
    assert calls == [1_000]
    assert records(world) == 3
    assert is_hit(world, OuterBoard.hour >= hour(2))
    assert not world.cache.covers(OuterBoard)
    world.cache._check()
    calls.clear()
    world.cache.load(OuterBoard, progress=calls.append)
    assert records(world) == 12_006
    assert calls[0] == 1_000
    assert calls == sorted(calls)


def test_a_row_that_cannot_be_read_leaves_the_state_before(sqlite: Database):
    """A value that the type cannot read fails the load, not what is there."""
    with flights_world(sqlite) as world:
        world.cache.load(OuterBoard, OuterBoard.hour >= hour(2))
        with world.engine.begin() as connection:
            connection.execute(text("UPDATE flights SET hour = 'at noon' WHERE id = 1"))
        with pytest.raises(ValueError, match="at noon"):
            world.cache.load(OuterBoard)
        assert records(world) == 3
        with world.engine.begin() as connection:
            connection.execute(update(Flight).where(Flight.id == 1).values(hour=hour(0)))
        world.cache.load(OuterBoard)
        assert world.ids() == [1, 2, 3, 4, 5, 6]


class Divided(CachedView):
    """A column that the database cannot compute for every row."""

    __select__ = select(Flight.id, Flight.hour, (100 / Flight.delay).label("part"))

    by_hour = ScoreIndex("hour")


def test_a_statement_that_fails_on_a_row_leaves_the_state_before(postgresql: Database):
    """The database's own error of a load reaches the caller; so does that of a refresh."""
    with flights_world(postgresql, Divided) as world:
        world.cache.load(Divided, Divided.hour < hour(3))
        with pytest.raises(DBAPIError, match="division by zero"):
            world.cache.load(Divided)
        assert world.cache.stats(Divided).records == 4
        assert not world.cache.covers(Divided)
        with world.Session() as session, counting() as statements:
            assert len(session.range(Divided.by_hour, lt=hour(3))) == 4
        assert statements == []
        with world.Session() as session:
            session.get_one(Flight, 4).delay = 0.0
            session.commit()
        with world.Session() as session, pytest.raises(DBAPIError, match="division by zero"):
            session.range(Divided.by_hour, lt=hour(3))
        with world.Session() as session:
            session.get_one(Flight, 4).delay = 50.0
            session.commit()
        with world.Session() as session:
            found = session.range(Divided.by_hour, lt=hour(3))
            assert [record.part for record in found if record.id == 4] == [2.0]


class NotUnique(CachedView):
    """A key that is none."""

    __select__ = select(Flight.carrier, Flight.hour)
    __primary_key__ = ("carrier",)

    by_hour = ScoreIndex("hour")


def test_a_key_that_is_none_is_found_out(database: Database):
    """Two rows with one `__primary_key__` fail the load, and are no reason to lose the rest."""
    with flights_world(database, NotUnique) as world:
        world.cache.load(NotUnique, NotUnique.hour < hour(1))
        with pytest.raises(DuplicateKey, match="NotUnique"):
            world.cache.load(NotUnique)
        assert world.cache.stats(NotUnique).records == 1
        with world.Session() as session:
            assert len(session.scalars(select(NotUnique)).all()) == 6


# --- engines and pools ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda url: create_engine("sqlite://"),
        lambda url: create_engine("sqlite:///:memory:"),
        lambda url: create_engine(url, poolclass=StaticPool),
    ],
    ids=["memory", "memory by name", "static pool"],
)
def test_pools_that_share_a_connection_are_refused(sqlite: Database, make: Any):
    """A load through the application's own connection would end its transaction."""
    engine = make(sqlite.url)
    with pytest.raises(UnsuitableEngine, match="load_engine"):
        TableCache(engine, views=[OuterBoard])
    cache = TableCache(views=[OuterBoard])
    with pytest.raises(UnsuitableEngine):
        cache.bind(engine)
    engine.dispose()


def test_a_shared_connection_is_fine_with_an_engine_for_loads(sqlite: Database):
    """`load_engine=` is the way out: a second engine on the same file."""
    shared = create_engine(sqlite.url, poolclass=StaticPool)
    with sqlite.lent_engine() as loads:
        with shared.begin() as connection:
            insert_flights(connection)
        with TableCache(shared, views=[OuterBoard], load_engine=loads) as cache:
            cache.load(OuterBoard)
            with cache.sessionmaker()() as session:
                session.get_one(Flight, 1).delay = 12.5
                session.commit()
                assert session.get(OuterBoard, 1).delay == 12.5
    shared.dispose()


@pytest.mark.parametrize("poolclass", [NullPool, QueuePool])
def test_loads_do_not_need_the_applications_pool(database: Database, poolclass: Any):
    """The cache reads through connections of its own, even if the application's are all taken."""
    options = {} if poolclass is NullPool else {"pool_size": 1, "max_overflow": 0}
    with database.lent_engine(poolclass=poolclass, **options) as engine:
        with engine.begin() as connection:
            insert_flights(connection)
        with TableCache(engine, views=[OuterBoard]) as cache, engine.connect() as connection:
            connection.execute(select(Flight)).all()
            cache.load(OuterBoard)
            cache.invalidate(OuterBoard)
            cache.refresh(OuterBoard)
            with cache.sessionmaker()() as session:
                assert len(session.range(OuterBoard.by_hour)) == 6


def test_a_load_sees_no_uncommitted_rows(world: World):
    """A load beside an open transaction reads what is committed, and leaves the transaction."""
    with world.Session() as session:
        session.execute(update(Flight).where(Flight.id == 1).values(delay=66.0))
        world.cache.load(OuterBoard)
        assert world.ids(OuterBoard.delay == 66) == []
        session.commit()
    assert world.ids(OuterBoard.delay == 66) == [1]


# --- life of a cache ------------------------------------------------------------------------------


def test_a_cache_can_be_bound_late(database: Database):
    """An application factory makes the cache first and its engine later."""
    cache = TableCache(views=[OuterBoard])
    cache.add(InnerBoard)
    with database.lent_engine() as engine:
        with engine.begin() as connection:
            insert_flights(connection)
        with counting() as statements:
            cache.bind(engine)
        assert statements == []
        with cache:
            cache.load(OuterBoard)
            cache.load(InnerBoard)
            with cache.sessionmaker()() as session:
                session.get_one(Flight, 1).delay = 2.5
                session.commit()
                assert session.get(OuterBoard, 1).delay == 2.5
                assert session.get(InnerBoard, 1).delay == 2.5


def test_views_can_be_added_at_any_time(world: World):
    """A view that is added to a cache in use follows commits from then on."""
    world.cache.load(OuterBoard)
    world.cache.add(PlaneEntity)
    world.cache.add(PlaneEntity)
    world.cache.load(PlaneEntity)
    with world.Session() as session:
        session.get_one(Plane, "N1").year = 1950
        session.commit()
        assert session.get(PlaneEntity, "N1").year == 1950
        assert session.get(OuterBoard, 1).year == 1950


def test_closing_ends_everything(database: Database):
    """After `close` commits go on as ever, and the cache says that it is closed."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        world.cache.close()
        world.cache.close()
        with Session(world.engine) as session:
            session.get_one(Flight, 1).delay = 1.5
            session.commit()
            assert len(session.execute(select(OuterBoard)).all()) == 6
        with pytest.raises(Closed):
            world.cache.load(OuterBoard)
        again = TableCache(world.engine, views=[OuterBoard])
        again.load(OuterBoard)
        with again.sessionmaker()() as session:
            assert session.get(OuterBoard, 1).delay == 1.5
        again.close()


def test_a_cache_that_is_forgotten_leaves_its_engine_alone(database: Database):
    """Closing one cache does not stop another from noticing commits."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        for _ in range(3):
            with TableCache(world.engine, views=[OuterBoard]) as other:
                other.load(OuterBoard)
        with world.Session() as session:
            session.get_one(Flight, 1).delay = 1.25
            session.commit()
        assert world.ids(OuterBoard.delay == 1.25) == [1]


async def test_the_asynchronous_cache_has_the_same_methods(database: Database):
    """Each method of a cache is there for asyncio, awaited where it may ask the database."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    cache = AsyncTableCache(views=[OuterBoard])
    cache.bind(engine)
    async with cache:
        estimate = await cache.estimate(OuterBoard)
        assert estimate.rows == 6
        await cache.load(OuterBoard, OuterBoard.hour < hour(1))
        await cache.extend(OuterBoard, OuterBoard.hour >= hour(3))
        assert cache.ready(OuterBoard)
        assert await cache.wait_ready(OuterBoard, timeout=1)
        assert await cache.covers(OuterBoard, OuterBoard.hour == hour(3))
        assert cache.stats(OuterBoard).records == 3
        await cache.evict(OuterBoard, OuterBoard.hour >= hour(3))
        assert cache.stats(OuterBoard).records == 1
        await cache.load(OuterBoard)
        async with cache.sessionmaker()() as session:
            (await session.get_one(Flight, 1)).delay = 5.5
            await session.commit()
        await cache.refresh(OuterBoard)
        explained = await cache.explain(select(OuterBoard))
        assert explained.kind == "hit"
        cache.invalidate(OuterBoard)
        async with cache.sessionmaker()() as session:
            found = await session.scalars(select(OuterBoard).where(OuterBoard.delay == 5.5))
            assert ids(found) == [1]
        assert all("has no index" in str(problem) for problem in await cache.check())
        await cache.clear(OuterBoard)
        assert cache.stats(OuterBoard).records == 0
    with pytest.raises(Closed):
        await cache.load(OuterBoard)
    await engine.dispose()


def test_a_score_that_is_the_key_is_loaded_with_its_bounds(database: Database):
    """Where the score is the whole key, bounds include what they say after refreshes too."""
    with database.lent_engine() as engine, TableCache(engine, views=[Plans]) as cache:
        with engine.begin() as connection:
            connection.execute(insert(DayPlan), [{"day": day, "headcount": 1} for day in DAYS])
        cache.load(Plans, Plans.day >= DAYS[2], Plans.day <= DAYS[4])
        factory = cache.sessionmaker()
        for statement in (
            update(DayPlan).values(headcount=2),
            text("UPDATE day_plans SET headcount = 3"),
        ):
            with factory() as session:
                session.execute(statement)
                session.commit()
            with factory() as session:
                assert [record.day for record in session.range(Plans.by_day)] == DAYS
                inside = session.range(Plans.by_day, ge=DAYS[2], le=DAYS[4])
                assert [record.day for record in inside] == DAYS[2:5]
        with factory() as session:
            for day in DAYS:
                session.get_one(DayPlan, day).headcount = 4
            session.commit()
        with factory() as session:
            assert [record.headcount for record in session.range(Plans.by_day)] == [4] * len(DAYS)
        cache._check()


def test_hidden_values_that_are_equal_are_one_object(world: World):
    """What is kept beside records, such as lineage, is kept once for all records that share it."""
    with world.Session() as session, session.begin():
        session.execute(update(Flight).where(Flight.id.in_([2, 5])).values(delay=5.0))
    world.cache.load(OuterBoard)
    of = {
        record.id: hidden for record, hidden in world.cache.table(OuterBoard).state.storage.pairs()
    }
    assert of[2] is of[5]
    # 0.0 and -0.0 are equal, and not the same.
    assert of[6] == (0.0, "UA")
    assert len(set(map(id, of.values()))) == 5
