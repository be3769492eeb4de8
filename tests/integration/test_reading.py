"""Reading a cached view: what each call returns, and how many SQL statements it takes."""

import pickle
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
from sqlalchemy import (
    alias,
    and_,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    not_,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.exc import MultipleResultsFound, NoResultFound
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sa_tablecache import AsyncTableCache, CacheSession, TableCache, bypass_cache, no_store
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world, hour, ids, insert_flights
from tests.zoo import (
    Airline,
    Flight,
    FullJoin,
    InnerBoard,
    OuterBoard,
    Plane,
    PlaneEntity,
    Sample,
    Samples,
    Weather,
    WeatherHours,
)


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights, all of them cached."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        yield world


@pytest.fixture
def part(database: Database) -> Iterator[World]:
    """Six flights, of which those from nine to eleven o'clock are cached: 2, 3 and 4."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
        yield world


READS: dict[str, Callable[[Any], Any]] = {
    "scalars": lambda s: s.scalars(select(OuterBoard).where(OuterBoard.hour == hour(1))).all(),
    "execute": lambda s: s.execute(select(OuterBoard).where(OuterBoard.id == 2)).all(),
    "scalar": lambda s: s.scalar(select(OuterBoard).where(OuterBoard.id == 2)),
    "columns": lambda s: s.execute(select(OuterBoard.id, OuterBoard.model)).all(),
    "count": lambda s: s.scalar(select(func.count()).select_from(OuterBoard)),
    "order": lambda s: s.scalars(select(OuterBoard).order_by(OuterBoard.hour, OuterBoard.id)).all(),
    "limit": lambda s: s.scalars(select(OuterBoard).order_by(OuterBoard.hour).limit(2)).all(),
    "get": lambda s: s.get(OuterBoard, 2),
    "get nothing": lambda s: s.get(OuterBoard, 99),
    "range": lambda s: s.range(OuterBoard.by_hour, ge=hour(1), lt=hour(2)),
    "range of a prefix": lambda s: s.range(OuterBoard.by_plane, "N1", ge=hour(0)),
    "query": lambda s: s.query(OuterBoard).filter(OuterBoard.delay > 1).all(),
    "query first": lambda s: s.query(OuterBoard).order_by(OuterBoard.hour).first(),
    "query one": lambda s: s.query(OuterBoard).filter_by(id=3).one(),
    "query count": lambda s: s.query(OuterBoard).filter(OuterBoard.airline == "United").count(),
    "query iteration": lambda s: list(s.query(OuterBoard)),
}


# --- how many statements --------------------------------------------------------------------------


@pytest.mark.parametrize("name", READS)
def test_a_hit_runs_no_statement(world: World, name: str):
    """Whatever the call, what the cache holds is answered without a statement."""
    with world.Session() as session, counting() as statements:
        READS[name](session)
        assert session.last_read.kind == "hit"
    assert statements == []


@pytest.mark.parametrize("name", READS)
def test_a_hit_and_a_bypass_return_the_same(world: World, name: str):
    """The same call on a view that is not loaded has the same result."""
    with world.Session() as session:
        cached = READS[name](session)
        world.cache.clear(OuterBoard)
        assert repr(READS[name](session)) == repr(cached)
        assert session.last_read.kind == "miss"


def test_a_miss_runs_one_statement(part: World):
    """What the cache holds nothing of is read from the database by one statement."""
    with part.Session() as session, counting() as statements:
        assert ids(session.scalars(select(OuterBoard).where(OuterBoard.hour < hour(1)))) == [1]
        assert session.last_read.kind == "miss"
    assert len(statements) == 1


def test_a_partial_hit_fetches_only_the_gap(part: World):
    """A range that is partly covered costs one statement, which reads what is missing."""
    with part.Session() as session:
        session.get(OuterBoard, 2)  # whatever a first use costs
    with part.Session() as session, counting() as statements:
        records = session.range(OuterBoard.by_hour, ge=hour(1), lt=hour(4))
        assert session.last_read.kind == "partial"
    assert [record.id for record in records] == [2, 3, 4, 5]
    selects = [statement for statement in statements if "FROM" in statement]
    assert len(selects) == 1


def test_a_partial_hit_on_both_sides_keeps_the_order(part: World):
    """Gaps before and after what is covered are merged in the order of the index."""
    with part.Session() as session:
        records = session.range(OuterBoard.by_hour, descending=True)
        assert [record.hour for record in records] == [hour(h) for h in (4, 3, 2, 1, 1, 0)]
        statement = select(OuterBoard).order_by(OuterBoard.hour, OuterBoard.id)
        assert [record.id for record in session.scalars(statement)] == [1, 2, 3, 4, 5, 6]


def test_a_commit_of_one_row_costs_the_next_read_a_few_statements(world: World):
    """A row changed through the unit of work is re-read with its neighbours, not the view."""
    with world.Session() as session:
        session.get_one(Plane, "N1").model = "A321"
        session.commit()
    with world.Session() as session, counting() as statements:
        records = session.scalars(select(OuterBoard).where(OuterBoard.tailnum == "N1")).all()
    assert [record.model for record in records] == ["A321", "A321"]
    selects = [statement for statement in statements if "FROM" in statement]
    assert 1 <= len(selects) <= 2
    assert all("WHERE" in statement for statement in selects)
    with world.Session() as session, counting() as statements:
        READS["scalars"](session)
    assert statements == []


def test_many_commits_cost_one_refresh(world: World):
    """A hundred changed rows are refreshed together, by the first read that needs them."""
    for number in range(100):
        with world.Session() as session:
            session.add(Flight(**flight(100 + number, 2, "AA", "N1", float(number))))
            session.commit()
    with world.Session() as session, counting() as statements:
        assert len(session.range(OuterBoard.by_plane, "N1")) == 102
    assert len([statement for statement in statements if "FROM" in statement]) <= 2


def test_a_load_reads_the_view_once(database: Database):
    """Loading runs one SELECT over the view, whatever the number of its records."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard, OuterBoard.hour < hour(1))
        with counting() as statements:
            world.cache.load(OuterBoard)
        assert len([statement for statement in statements if "flights" in statement]) == 1
        with counting() as statements:
            world.cache.load(OuterBoard)
        assert not [statement for statement in statements if "flights" in statement]


# --- sessions -------------------------------------------------------------------------------------


def test_a_cache_session_is_an_ordinary_session(world: World):
    """Everything that is not a cached view behaves as in SQLAlchemy."""
    with world.Session() as session:
        assert isinstance(session, Session)
        plane = session.get_one(Plane, "N1")
        assert session.get(Plane, "N1") is plane
        assert session.query(Plane).count() == 3
        assert session.scalar(select(func.count()).select_from(Flight)) == 6
        plane.year = 2001
        assert plane in session.dirty
        session.rollback()
        assert plane.year == 1999


def _sessionmaker(world: World) -> Session:
    factory = sessionmaker(world.engine)
    world.cache.attach(factory)
    return factory()


def _scoped_session(world: World) -> Session:
    registry = scoped_session(sessionmaker(world.engine))
    world.cache.attach(registry)
    session = registry()
    registry.registry.clear()
    return session


def _subclass(world: World) -> Session:
    class OwnSession(Session):
        pass

    world.cache.attach(OwnSession)
    return OwnSession(world.engine)


def _instance(world: World) -> Session:
    session = Session(world.engine)
    world.cache.attach(session)
    return session


@pytest.mark.parametrize("make", [_sessionmaker, _scoped_session, _subclass, _instance])
def test_an_attached_session_reads_from_the_cache(world: World, make: Callable[..., Session]):
    """Ordinary sessions get cached answers once they, their class or their factory is attached."""
    with make(world) as session, counting() as statements:
        assert ids(session.scalars(select(OuterBoard))) == [1, 2, 3, 4, 5, 6]
        assert len(session.execute(select(OuterBoard.id)).all()) == 6
        assert session.query(OuterBoard).filter(OuterBoard.id == 3).one().id == 3
    assert statements == []


def test_a_session_that_is_not_attached_reads_the_database(world: World):
    """For a plain session a view is a selectable like any other; its commits count all the same."""
    with Session(world.engine) as session, counting() as statements:
        assert len(session.execute(select(OuterBoard)).all()) == 6
        assert len(statements) == 1
        session.execute(delete(Flight).where(Flight.id == 6))
        session.commit()
    assert world.ids() == [1, 2, 3, 4, 5]


async def test_attached_async_sessions_read_from_the_cache(database: Database):
    """An `async_sessionmaker` can be attached, as can the cache's own asynchronous sessions."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    cache = AsyncTableCache(engine, views=[OuterBoard])
    await cache.load(OuterBoard)
    plain = async_sessionmaker(engine)
    cache.attach(plain)
    for factory in (plain, cache.sessionmaker()):
        async with factory() as session:
            assert isinstance(session, AsyncSession)
            with counting() as statements:
                assert ids(await session.scalars(select(OuterBoard))) == [1, 2, 3, 4, 5, 6]
                assert (await session.scalar(select(OuterBoard.airline).limit(1))) is not None
            assert statements == []
    async with plain() as session, session.begin():
        (await session.get_one(Plane, "N1")).model = "A321"
    async with cache.sessionmaker()() as session:
        record = await session.get(OuterBoard, 1)
        assert record is not None
        assert record.model == "A321"
        with counting() as statements:
            records = await session.range(OuterBoard.by_plane, "N1", gt=hour(0))
            assert ids(records) == [4]
            assert session.last_read.kind == "hit"
            result = await session.execute(select(OuterBoard.id, OuterBoard.model))
            assert len(result.all()) == 6
            assert (await session.get(OuterBoard, 99)) is None
        assert statements == []
        async for record in await session.stream_scalars(select(OuterBoard)):
            assert isinstance(record, OuterBoard)
    await cache.close()
    await engine.dispose()


# --- statements -----------------------------------------------------------------------------------


def test_columns_of_a_view_come_as_rows(world: World):
    """`select(View.a, View.b)` gives rows with these names, `scalars` the first of them."""
    with world.Session() as session:
        row = session.execute(
            select(OuterBoard.model, OuterBoard.id.label("number")).where(OuterBoard.id == 1)
        ).one()
        assert (row.model, row.number) == ("A320", 1)
        assert session.scalar(select(OuterBoard.id + 1).where(OuterBoard.id == 1)) == 2
    with world.Session() as session, counting() as statements:
        row = session.execute(
            select(OuterBoard.model, OuterBoard.id).where(OuterBoard.id == 1)
        ).one()
        assert (row.model, row.id) == ("A320", 1)
        assert session.scalars(
            select(OuterBoard.tailnum).where(OuterBoard.hour == hour(1)).order_by(OuterBoard.id)
        ).all() == ["N2", None]
    assert statements == []


def test_a_view_joins_ordinary_models(world: World):
    """A view can stand beside models in FROM; the database answers."""
    with world.Session() as session:
        rows = session.execute(
            select(OuterBoard.id, Airline)
            .join(Airline, Airline.name == OuterBoard.airline)
            .where(OuterBoard.delay > 1)
            .order_by(OuterBoard.id)
        ).all()
        assert [(row.id, row.Airline.carrier) for row in rows] == [(2, "AA"), (3, "UA")]
        assert session.last_read.kind == "bypass"
        assert session.scalars(
            select(Flight.id).join(OuterBoard, OuterBoard.id == Flight.id).order_by(Flight.id)
        ).all() == [1, 2, 3, 4, 5, 6]


def test_a_view_can_be_aliased_and_joined_with_itself(world: World):
    """An alias of a view selects records, and two of them can be joined."""
    earlier, later = alias(OuterBoard), alias(OuterBoard)
    with world.Session() as session:
        statement = (
            select(earlier.c.id, later.c.id)
            .join(later, (earlier.c.tailnum == later.c.tailnum) & (earlier.c.hour < later.c.hour))
            .order_by(earlier.c.id)
        )
        assert session.execute(statement).all() == [(1, 4)]
        found = session.scalars(select(earlier).where(earlier.c.id == 2)).one()
        assert isinstance(found, OuterBoard)
        assert found == session.get(OuterBoard, 2)


def test_aggregates_over_a_view_are_the_databases(world: World):
    """GROUP BY, functions and DISTINCT over a view are answered by the database."""
    with world.Session() as session:
        assert session.execute(
            select(OuterBoard.airline, func.count(), func.max(OuterBoard.delay))
            .group_by(OuterBoard.airline)
            .order_by(OuterBoard.airline)
        ).all() == [("American", 3, 5.0), ("United", 3, 30.0)]
        assert session.scalar(select(func.min(OuterBoard.hour))) == hour(0)
        distinct = select(OuterBoard.airline).distinct().order_by(OuterBoard.airline)
        assert session.scalars(distinct).all() == ["American", "United"]
        assert session.scalar(select(exists().where(OuterBoard.id == 3))) is True


def test_views_in_subqueries_and_set_operations_are_the_databases(world: World):
    """A view in IN (SELECT ..), in a CTE or in a UNION is rendered as its select."""
    with world.Session() as session:
        late = select(OuterBoard.tailnum).where(OuterBoard.delay >= 0)
        assert session.scalars(
            select(Plane.tailnum).where(Plane.tailnum.in_(late)).order_by(Plane.tailnum)
        ).all() == ["N2", "N3"]
        cte = select(OuterBoard).where(OuterBoard.id < 3).cte("few")
        assert session.scalar(select(func.count()).select_from(cte)) == 2
        united = select(OuterBoard.id).where(OuterBoard.id < 2).union(select(Flight.id))
        assert len(session.scalars(united).all()) == 6


def test_reads_through_core_are_the_databases(world: World):
    """A connection runs a select of a view as plain SQL."""
    with world.engine.connect() as connection:
        rows = connection.execute(select(OuterBoard).where(OuterBoard.id == 1)).all()
        assert [(row.id, row.model) for row in rows] == [(1, "A320")]


def test_for_update_and_hints_are_the_databases(world: World):
    """What a cache cannot do, such as locking rows, is left to the database."""
    with world.Session() as session:
        statement = select(OuterBoard.id).where(OuterBoard.id == 1)
        for decorated in (
            statement.prefix_with("DISTINCT"),
            statement.with_statement_hint("none", "oracle"),
            select(OuterBoard.id).where(OuterBoard.id == 1).fetch(1)
            if world.database.dialect == "postgresql"
            else statement.with_hint(OuterBoard, "none", "oracle"),
        ):
            assert session.scalars(decorated).all() == [1]
            assert session.last_read.kind == "bypass"


# --- Query ----------------------------------------------------------------------------------------


def test_a_query_has_the_methods_of_the_contract(world: World):
    """Each method of `session.query(View)` does what it does for a model, without a statement."""
    with world.Session() as session, counting() as statements:
        query = session.query(OuterBoard)
        by_hour = query.order_by(OuterBoard.hour, OuterBoard.id)
        assert [record.id for record in by_hour] == [1, 2, 3, 4, 5, 6]
        assert [r.id for r in by_hour.limit(2).offset(1)] == [2, 3]
        assert [r.id for r in by_hour.filter(OuterBoard.id > 2, OuterBoard.id < 5).all()] == [3, 4]
        assert [r.id for r in by_hour.filter_by(tailnum="N1")] == [1, 4]
        assert query.order_by(OuterBoard.hour.desc()).first().id == 6
        assert query.filter_by(id=99).first() is None
        assert query.filter_by(id=3).one().id == 3
        assert query.filter_by(id=99).one_or_none() is None
        assert query.filter_by(id=4).one_or_none().id == 4
        assert query.filter_by(id=4).scalar().id == 4
        assert query.count() == 6
        assert query.filter(OuterBoard.delay > 0).count() == 2
        assert query.filter(OuterBoard.hour >= hour(1)).count() == 5
        assert query.where(OuterBoard.id == 1).all()[0].model == "A320"
    assert statements == []
    with world.Session() as session:
        assert session.query(OuterBoard).options(bypass_cache()).count() == 6
        assert session.last_read.kind == "bypass"


def test_a_query_that_expects_one_record_says_so(world: World):
    """`one` and `one_or_none` raise SQLAlchemy's errors."""
    with world.Session() as session:
        with pytest.raises(NoResultFound):
            session.query(OuterBoard).filter_by(id=99).one()
        with pytest.raises(MultipleResultsFound):
            session.query(OuterBoard).one()
        with pytest.raises(MultipleResultsFound):
            session.query(OuterBoard).filter_by(tailnum="N1").one_or_none()
        with pytest.raises(NoResultFound):
            session.scalars(select(OuterBoard).where(OuterBoard.id == 99)).one()


def test_a_query_explains_itself(part: World):
    """`explain()` says how a query would be answered, and runs nothing of it."""
    with part.Session() as session, counting() as statements:
        query = session.query(OuterBoard)
        hit = query.filter(OuterBoard.hour == hour(1), OuterBoard.delay > 1).explain()
        assert (hit.kind, hit.index) == ("hit", "by_hour")
        assert (hit.records, hit.residual) == (2, 1)
        partial = query.filter(OuterBoard.hour >= hour(1)).explain()
        assert partial.kind == "partial"
        miss = query.filter(OuterBoard.hour < hour(1)).explain()
        assert miss.kind == "miss"
        bypass = query.filter(OuterBoard.model.like("A%")).explain()
        assert bypass.kind != "hit"
        assert "like" in str(bypass).lower()
    assert statements == []
    explained = part.cache.explain(select(OuterBoard).where(OuterBoard.hour == hour(2)))
    assert explained.kind == "hit"


def test_exists_of_a_query_is_a_clause(world: World):
    """`Query.exists()` is an SQL clause, as in SQLAlchemy."""
    with world.Session() as session:
        clause = session.query(OuterBoard).filter(OuterBoard.id == 2).exists()
        assert session.scalar(select(clause)) is True


# --- range ----------------------------------------------------------------------------------------

BOUNDS: list[tuple[dict[str, float], list[int]]] = [
    ({}, [1, 2, 3, 4, 5, 6]),
    ({"ge": 1}, [2, 3, 4, 5, 6]),
    ({"gt": 1}, [4, 5, 6]),
    ({"le": 1}, [1, 2, 3]),
    ({"lt": 1}, [1]),
    ({"ge": 1, "le": 2}, [2, 3, 4]),
    ({"ge": 1, "lt": 2}, [2, 3]),
    ({"gt": 1, "le": 3}, [4, 5]),
    ({"gt": 1, "lt": 3}, [4]),
    ({"ge": 1, "le": 1}, [2, 3]),
    ({"gt": 1, "lt": 1}, []),
    ({"ge": 1, "lt": 1}, []),
    ({"ge": 3, "lt": 1}, []),
    ({"gt": 9}, []),
    ({"lt": -9}, []),
    ({"ge": 0.5, "le": 2.5}, [2, 3, 4]),
]


@pytest.mark.parametrize(("bounds", "expected"), BOUNDS)
def test_a_range_has_the_bounds_it_was_given(world: World, bounds: Any, expected: list[int]):
    """`ge`, `gt`, `le` and `lt` include or exclude, and empty ranges are empty lists."""
    with world.Session() as session, counting() as statements:
        bounds = {name: hour(value) for name, value in bounds.items()}
        records = session.range(OuterBoard.by_hour, **bounds)
        assert [record.id for record in records] == expected
        assert isinstance(records, list)
        backwards = session.range(OuterBoard.by_hour, **bounds, descending=True)
        assert [r.hour for r in backwards] == [r.hour for r in reversed(records)]
        assert ids(backwards) == sorted(expected)
        few = session.range(OuterBoard.by_hour, **bounds, limit=2)
        assert [record.id for record in few] == expected[:2]
        assert session.range(OuterBoard.by_hour, **bounds, limit=0) == []
    assert statements == []


@pytest.mark.parametrize(("bounds", "expected"), BOUNDS)
def test_a_range_from_the_database_is_the_same(database: Database, bounds: Any, expected: Any):
    """A range of a view that is not loaded has the same bounds, order and limit."""
    with flights_world(database) as world, world.Session() as session:
        bounds = {name: hour(value) for name, value in bounds.items()}
        assert [r.id for r in session.range(OuterBoard.by_hour, **bounds)] == expected
        backwards = session.range(OuterBoard.by_hour, **bounds, descending=True, limit=2)
        hours = [record.hour for record in session.range(OuterBoard.by_hour, **bounds)]
        assert [record.hour for record in backwards] == list(reversed(hours))[:2]


def test_a_prefix_selects_one_group(world: World):
    """The leading scores of a composite index can be fixed, the next one bounded."""
    with world.Session() as session, counting() as statements:
        assert ids(session.range(OuterBoard.by_plane, "N1")) == [1, 4]
        assert ids(session.range(OuterBoard.by_plane, "N1", gt=hour(0))) == [4]
        assert ids(session.range(OuterBoard.by_plane, "N1", le=hour(0))) == [1]
        assert session.range(OuterBoard.by_plane, "N9") == []
        assert ids(session.range(OuterBoard.by_plane, "N1", hour(2))) == [4]
    assert statements == []


def test_records_without_a_score_are_in_no_bounded_range(world: World):
    """NULL is in no range with bounds, and where the database sorts it in one without."""
    with world.Session() as session:
        assert ids(session.range(OuterBoard.by_year, ge=1900)) == [1, 2, 4]
        assert ids(session.range(OuterBoard.by_year, lt=2100)) == [1, 2, 4]
        everything = [record.year for record in session.range(OuterBoard.by_year)]
        nulls = [None] * 3
        if world.database.dialect == "sqlite":
            assert everything == [*nulls, 1999, 1999, 2010]
        else:
            assert everything == [1999, 1999, 2010, *nulls]


def test_an_expression_is_an_index(world: World):
    """Records are sorted by what the database computed, and can be selected by it."""
    with world.Session() as session, counting() as statements:
        assert [r.id for r in session.range(OuterBoard.by_delay, gt=0)] == [2, 3]
        assert ids(session.range(OuterBoard.by_delay, ge=0, lt=1)) == [1, 5, 6]
        assert [r.id for r in session.range(OuterBoard.by_delay, lt=0)] == [4]
        assert [r.delay for r in session.range(OuterBoard.by_delay, gt=1, descending=True)] == [
            30.0,
            5.0,
        ]
        assert statements == []
        late = select(OuterBoard).where(OuterBoard.by_delay >= 5).order_by(OuterBoard.by_delay)
        assert [record.id for record in session.scalars(late)] == [2, 3]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_pages_follow_each_other_without_a_gap(database: Database, loaded: bool, descending: bool):
    """`after` continues behind the last record of a page, in the middle of equal scores too."""
    with flights_world(database) as world:
        with world.Session() as session:
            session.execute(insert(Flight), [flight(10 + n, n % 2) for n in range(9)])
            session.commit()
        if loaded:
            world.cache.load(OuterBoard)
        with world.Session() as session:
            whole = session.range(OuterBoard.by_hour, descending=descending)
            assert len(whole) == 15
            pages, last = [], None
            while page := session.range(
                OuterBoard.by_hour, descending=descending, limit=4, after=last
            ):
                pages.append(page)
                last = page[-1]
            assert [len(page) for page in pages] == [4, 4, 4, 3]
            assert [record.hour for page in pages for record in page] == [r.hour for r in whole]
            assert ids(record for page in pages for record in page) == ids(whole)


def test_a_page_survives_the_record_it_continues_after(world: World):
    """`after` names a place in the order, which remains when the record is gone."""
    with world.Session() as session:
        first = session.range(OuterBoard.by_hour, limit=2)
        assert ids(first) == [1, 2]
        session.execute(delete(Flight).where(Flight.id == 2))
        session.commit()
        following = session.range(OuterBoard.by_hour, limit=2, after=first[-1])
        assert [record.id for record in following] == [3, 4]


def test_a_partly_covered_range_with_limit_and_after(part: World):
    """Limits and pages are right across the border of what is covered."""
    with part.Session() as session:
        first = session.range(OuterBoard.by_hour, limit=2)
        assert [record.hour for record in first] == [hour(0), hour(1)]
        rest = session.range(OuterBoard.by_hour, after=first[-1])
        assert sorted([*ids(first), *ids(rest)]) == [1, 2, 3, 4, 5, 6]
        backwards = session.range(OuterBoard.by_hour, descending=True, limit=3)
        assert [record.id for record in backwards] == [6, 5, 4]


# --- NULL, NaN and other values -------------------------------------------------------------------

CRITERIA: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "= NULL row": (lambda: OuterBoard.tailnum == "N1", [1, 4]),
    "<> leaves NULL out": (lambda: OuterBoard.tailnum != "N1", [2, 5]),
    "NOT (a = b) leaves NULL out": (lambda: not_(OuterBoard.tailnum == "N1"), [2, 5]),
    "IN": (lambda: OuterBoard.tailnum.in_(["N1", "N2"]), [1, 2, 4]),
    "IN with NULL": (lambda: OuterBoard.tailnum.in_(["N1", None]), [1, 4]),
    "NOT IN": (lambda: OuterBoard.tailnum.not_in(["N1", "N2"]), [5]),
    "NOT IN with NULL": (lambda: OuterBoard.tailnum.not_in(["N1", None]), []),
    "IN nothing": (lambda: OuterBoard.tailnum.in_([]), []),
    "NOT IN nothing": (lambda: OuterBoard.tailnum.not_in([]), [1, 2, 3, 4, 5, 6]),
    "IS NULL": (lambda: OuterBoard.tailnum.is_(None), [3, 6]),
    "IS NOT NULL": (lambda: OuterBoard.tailnum.is_not(None), [1, 2, 4, 5]),
    "= None is IS NULL": (lambda: OuterBoard.delay == None, [1, 6]),  # noqa: E711
    "BETWEEN": (lambda: OuterBoard.delay.between(-3, 5), [2, 4, 5]),
    "NOT BETWEEN": (lambda: ~OuterBoard.delay.between(-3, 5), [3]),
    "OR with NULL": (lambda: or_(OuterBoard.delay > 1, OuterBoard.tailnum == "N1"), [1, 2, 3, 4]),
    "NOT OR with NULL": (
        lambda: not_(or_(OuterBoard.delay > 1, OuterBoard.tailnum == "N1")),
        [5],
    ),
    "NOT AND with NULL": (
        lambda: not_(and_(OuterBoard.delay > 1, OuterBoard.tailnum == "N1")),
        [2, 4, 5],
    ),
    "row values": (
        lambda: tuple_(OuterBoard.hour, OuterBoard.id) > (hour(1), 2),
        [3, 4, 5, 6],
    ),
    "row values IN": (
        lambda: tuple_(OuterBoard.id, OuterBoard.tailnum).in_([(1, "N1"), (2, "N1"), (3, "N2")]),
        [1],
    ),
    "IS DISTINCT FROM": (
        lambda: OuterBoard.tailnum.is_distinct_from("N1"),
        [2, 3, 5, 6],
    ),
    "two columns": (lambda: OuterBoard.year > OuterBoard.delay, [2, 4]),
    "LIKE": (lambda: OuterBoard.model.like("%3%"), [1, 4, 5]),
    "a function": (lambda: func.abs(OuterBoard.delay) == 3, [4]),
    "arithmetic": (lambda: OuterBoard.delay + 1 > 5, [2, 3]),
    "false": (lambda: and_(OuterBoard.id > 0, False), []),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_follow_three_valued_logic(world: World, name: str):
    """A record is in the answer where its criteria are true: not where they are NULL."""
    make, expected = CRITERIA[name]
    assert world.ids(make()) == expected
    with world.Session() as session:
        statement = select(OuterBoard).where(make()).options(bypass_cache())
        assert ids(session.scalars(statement)) == expected
        assert session.query(OuterBoard).filter(make()).count() == len(expected)


def test_parameters_of_another_type_are_the_databases(world: World):
    """A text where a number is stored means what the database says it means."""
    with world.Session() as session:
        statement = select(OuterBoard).where(OuterBoard.delay == 5)
        assert ids(session.scalars(statement)) == [2]
        statement = select(OuterBoard).where(OuterBoard.year >= 1999.5)
        assert ids(session.scalars(statement)) == [2]


def test_not_a_number_is_what_the_database_says(postgresql: Database):
    """NaN equals itself and is greater than all numbers on PostgreSQL, cached or not."""
    nan = float("nan")
    values = [nan, 1.0, None, float("inf"), -0.0, nan]
    rows = [{"id": number, "ratio": value} for number, value in enumerate(values)]
    with samples(postgresql, rows) as session:

        def found(*criteria: Any) -> list[int]:
            return ids(session.scalars(select(Samples).where(*criteria)))

        assert found(Samples.ratio > 1.0) == [0, 3, 5]
        assert found(Samples.ratio == nan) == [0, 5]
        assert found(Samples.ratio <= float("inf")) == [1, 3, 4]
        assert found(Samples.ratio == 0.0) == [4]
        assert found(Samples.ratio.in_([nan, 1.0])) == [0, 1, 5]
        order = [record.id for record in session.range(Samples.by_ratio)]
        assert order[:3] == [4, 1, 3]
        assert set(order[3:5]) == {0, 5}
        assert order[5] == 2
        assert ids(session.range(Samples.by_ratio, gt=1.0)) == [0, 3, 5]


def test_aware_datetimes_compare_as_moments(postgresql: Database):
    """The same moment in another time zone is the same value."""
    noon = datetime(2024, 3, 31, 12, tzinfo=UTC)
    rows = [{"id": n, "moment": noon + timedelta(hours=n)} for n in range(4)]
    with samples(postgresql, rows) as session:
        abroad = (noon + timedelta(hours=1)).astimezone(timezone(timedelta(hours=-7)))
        assert ids(session.range(Samples.by_moment, abroad)) == [1]
        assert ids(session.range(Samples.by_moment, ge=abroad)) == [1, 2, 3]
        assert ids(session.scalars(select(Samples).where(Samples.moment < abroad))) == [0]


@contextmanager
def samples(database: Database, rows: list[dict[str, Any]]) -> Iterator[CacheSession]:
    """Lend a session that reads these samples, all of them cached."""
    with database.lent_engine() as engine:
        with engine.begin() as connection:
            connection.execute(insert(Sample), rows)
        with TableCache(engine, views=[Samples]) as cache:
            cache.load(Samples)
            with cache.sessionmaker()() as session:
                yield session


# --- records --------------------------------------------------------------------------------------


def test_records_are_values(world: World):
    """A record from the cache and one from the database are equal, hash alike and are frozen."""
    with world.Session() as session:
        cached = session.get(OuterBoard, 1)
        read = session.scalars(
            select(OuterBoard).where(OuterBoard.id == 1).options(bypass_cache())
        ).one()
        assert cached is not None
        assert cached == read
        assert hash(cached) == hash(read)
        assert isinstance(cached, OuterBoard)
        assert pickle.loads(pickle.dumps(cached)) == cached
        assert cached._asdict()["airline"] == "American"
        with pytest.raises(AttributeError):
            cached.model = "B777"


def test_a_result_is_a_result(world: World):
    """What `execute` and `scalars` return has the methods of SQLAlchemy's results."""
    with world.Session() as session:
        statement = select(OuterBoard).order_by(OuterBoard.id)
        assert session.scalars(statement).first().id == 1
        assert len(session.scalars(statement).fetchmany(2)) == 2
        assert [len(part) for part in session.scalars(statement).partitions(4)] == [4, 2]
        assert session.execute(statement).scalars().unique().all()[0].id == 1
        assert session.execute(statement).first()[0].id == 1
        columns = select(OuterBoard.id, OuterBoard.airline).order_by(OuterBoard.id)
        assert session.execute(columns).mappings().first() == {"id": 1, "airline": "American"}
        assert session.execute(columns).columns("airline").first() == ("American",)


def test_a_key_of_several_columns_is_a_tuple(database: Database):
    """`session.get` takes a tuple in the order of the key's columns."""
    with flights_world(database, WeatherHours) as world:
        with world.Session() as session:
            session.add(Weather(origin="JFK", hour=hour(1), temp=3.5))
            session.commit()
        for _ in range(2):
            with world.Session() as session:
                record = session.get(WeatherHours, ("JFK", hour(1)))
                assert record is not None
                assert record.temp == 3.5
                assert session.get(WeatherHours, ("JFK", hour(2))) is None
            world.cache.load(WeatherHours)


# --- options --------------------------------------------------------------------------------------


def test_bypass_cache_asks_the_database(world: World):
    """`bypass_cache()` has one read answered by the database."""
    with world.Session() as session, counting() as statements:
        statement = select(OuterBoard).where(OuterBoard.id == 2).options(bypass_cache())
        assert session.scalars(statement).one().id == 2
        assert session.last_read.kind == "bypass"
        assert "bypass_cache" in session.last_read.reason
    assert len(statements) == 1


def test_no_store_reads_what_is_there(part: World):
    """`no_store()` keeps what is fetched out of the cache, and uses what is in it."""
    with part.Session() as session:
        covered = select(OuterBoard).where(OuterBoard.hour == hour(1)).options(no_store())
        with counting() as statements:
            assert ids(session.scalars(covered)) == [2, 3]
        assert statements == []
        assert ids(session.scalars(select(OuterBoard).options(no_store()))) == [1, 2, 3, 4, 5, 6]
        assert part.cache.stats(OuterBoard).records == 3


def test_the_last_read_is_told_with_its_reason(part: World):
    """`last_read` is hit, partial, miss or bypass, and says why."""
    with part.Session() as session:
        expected = [
            (OuterBoard.hour == hour(1), "hit"),
            (OuterBoard.hour >= hour(1), "partial"),
            (OuterBoard.hour == hour(0), "miss"),
            (OuterBoard.model.like("A%"), "bypass"),
        ]
        for criterion, kind in expected:
            session.scalars(select(OuterBoard).where(criterion)).all()
            assert session.last_read.kind == kind, criterion
        assert "like" in session.last_read.reason.lower()
        stats = part.cache.stats(OuterBoard)
        assert (stats.hits, stats.partial_hits, stats.misses, stats.bypasses) == (1, 1, 1, 1)


# --- own writes, isolation ------------------------------------------------------------------------


def test_uncommitted_writes_are_seen_by_their_session_alone(world: World):
    """A session reads its own writes from the database; others are answered by the cache."""
    with world.Session() as writer, world.Session() as other:
        writer.get_one(Flight, 1).delay = 99.0
        assert ids(writer.scalars(select(OuterBoard).where(OuterBoard.delay == 99))) == [1]
        assert writer.last_read.kind == "bypass"
        assert writer.get(OuterBoard, 1).delay == 99
        assert [r.id for r in writer.range(OuterBoard.by_delay, ge=90)] == [1]
        assert writer.query(OuterBoard).filter(OuterBoard.delay == 99).count() == 1
        with counting() as statements:
            assert ids(other.scalars(select(OuterBoard).where(OuterBoard.delay == 99))) == []
            assert other.get(OuterBoard, 1).delay is None
        assert statements == []
        writer.rollback()
        assert writer.get(OuterBoard, 1).delay is None
    with world.Session() as session, counting() as statements:
        assert session.get(OuterBoard, 1).delay is None
    assert statements == []


def test_pending_objects_are_flushed_before_a_read(world: World):
    """Autoflush works for views as it does for models, and `no_autoflush` switches it off."""
    with world.Session() as session:
        session.add(Flight(**flight(7, 5)))
        with session.no_autoflush:
            assert session.get(OuterBoard, 7) is None
            assert len(session.range(OuterBoard.by_hour)) == 6
        assert len(session.range(OuterBoard.by_hour)) == 7
        assert session.get(OuterBoard, 7) is not None
        session.rollback()
        assert len(session.range(OuterBoard.by_hour)) == 6


def test_pending_objects_are_flushed_before_a_read_where_each_statement_commits(
    postgresql: Database,
):
    """In AUTOCOMMIT mode the flush commits, and the read that it is made for sees it."""
    with (
        flights_world(postgresql),
        postgresql.lent_engine(isolation_level="AUTOCOMMIT") as engine,
        TableCache(engine, views=[OuterBoard]) as cache,
    ):
        cache.load(OuterBoard)
        with cache.sessionmaker()() as session:
            session.add(Flight(**flight(7, 0)))
            assert 7 in ids(session.scalars(select(OuterBoard)))
            session.add(Flight(**flight(8, 0)))
            assert 8 in ids(session.range(OuterBoard.by_hour))
            session.get_one(Flight, 8).delay = 60.0
            assert session.get(OuterBoard, 8).delay == 60.0


def test_sessions_on_one_connection_share_its_writes(world: World):
    """What one session wrote is seen by another on the same connection."""
    with world.engine.connect() as connection, connection.begin() as transaction:
        one, two = world.Session(bind=connection), world.Session(bind=connection)
        one.execute(update(Flight).where(Flight.id == 1).values(delay=77.0))
        assert two.get(OuterBoard, 1).delay == 77
        assert world.ids(OuterBoard.delay == 77) == []
        one.commit()
        assert two.get(OuterBoard, 1).delay == 77
        assert world.ids(OuterBoard.delay == 77) == []
        transaction.rollback()
    assert world.ids(OuterBoard.delay == 77) == []


def test_a_savepoint_that_is_rolled_back_leaves_nothing(world: World):
    """Writes inside the savepoint are gone; those around it are kept."""
    with world.Session() as session:
        session.add(Flight(**flight(7, 5)))
        session.flush()
        savepoint = session.begin_nested()
        session.add(Flight(**flight(8, 6)))
        assert len(session.range(OuterBoard.by_hour)) == 8
        savepoint.rollback()
        assert len(session.range(OuterBoard.by_hour)) == 7
        session.commit()
    assert world.ids() == [1, 2, 3, 4, 5, 6, 7]


def test_a_savepoint_that_is_a_transaction_is_seen(sqlite: Database):
    """Where the driver makes RELEASE of a first savepoint a commit, its writes are seen."""
    with flights_world(sqlite) as world:
        world.cache.load(OuterBoard)
        with world.Session() as session:
            with session.begin_nested():
                session.add(Flight(**flight(7, 5)))
            with world.outside() as outside:
                durable = outside.get(Flight, 7) is not None
            assert (7 in world.ids()) is durable
            session.rollback()
        with world.outside() as outside:
            durable = outside.get(Flight, 7) is not None
        assert (7 in world.ids()) is durable


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("how", ["session", "connection", "engine", "option engine"])
def test_a_snapshot_that_was_asked_for_is_kept(postgresql: Database, level: str, how: str):
    """A transaction with its own snapshot reads the database, and keeps to that snapshot."""
    with ExitStack() as stack, flights_world(postgresql) as world:
        world.cache.load(OuterBoard)
        engine = world.engine
        if how == "engine":
            engine = stack.enter_context(world.database.lent_engine(isolation_level=level))
            world.cache.attach(engine)
        elif how == "option engine":
            engine = engine.execution_options(isolation_level=level)
        with world.cache.sessionmaker()(bind=engine) as session:
            if how == "session":
                session.connection(execution_options={"isolation_level": level})
            elif how == "connection":
                session.close()
                connection = engine.connect().execution_options(isolation_level=level)
                session.bind = connection
            assert session.get(OuterBoard, 1).delay is None
            assert session.last_read.kind == "bypass"
            with world.Session() as other:
                other.get_one(Flight, 1).delay = 50.0
                other.commit()
            assert world.ids(OuterBoard.delay == 50) == [1]
            assert session.get(OuterBoard, 1).delay is None
            assert ids(session.scalars(select(OuterBoard).where(OuterBoard.delay == 50))) == []
            session.rollback()
            assert session.get(OuterBoard, 1).delay == 50
            if how == "connection":
                session.close()
                connection.close()


def test_a_transaction_sees_later_commits_where_its_isolation_says_so(world: World):
    """Under READ COMMITTED (and SQLite's short reads) a long transaction sees each commit."""
    with world.Session() as reader:
        assert reader.get(OuterBoard, 1).delay is None
        with world.Session() as writer:
            writer.get_one(Flight, 1).delay = 50.0
            writer.commit()
        assert reader.get(OuterBoard, 1).delay == 50


def test_an_sqlite_snapshot_is_kept(sqlite: Database, tmp_path: Path):
    """On SQLite, an explicit transaction that has read goes on seeing what it saw."""
    path = tmp_path / "wal.sqlite"
    path.write_bytes(Path(str(sqlite.url.database)).read_bytes())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    engine = create_engine(f"sqlite:///{path}", connect_args={"isolation_level": None})
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    with engine.begin() as connection:
        insert_flights(connection)
    with TableCache(engine, views=[OuterBoard]) as cache:
        cache.load(OuterBoard)
        factory = cache.sessionmaker()
        with factory() as reader:
            assert reader.get_one(Flight, 1).delay is None
            with factory() as writer:
                writer.get_one(Flight, 1).delay = 50.0
                writer.commit()
            with factory() as other:
                assert other.get(OuterBoard, 1).delay == 50
            assert reader.scalar(select(Flight.delay).where(Flight.id == 1)) is None
            assert reader.get(OuterBoard, 1).delay is None
            reader.rollback()
            assert reader.get(OuterBoard, 1).delay == 50
    engine.dispose()


# --- threads --------------------------------------------------------------------------------------


def _run_all(targets: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []
    barrier = Barrier(len(targets))

    def guarded(target: Callable[[], None]) -> None:
        try:
            barrier.wait()
            target()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_share_a_cache(database: Database):
    """Writers on several threads see what they committed; readers never see half of a commit."""
    writers = 1 if database.dialect == "sqlite" else 3
    with flights_world(database, OuterBoard, PlaneEntity) as world:
        world.cache.load(OuterBoard)
        world.cache.load(PlaneEntity)
        done: list[int] = []

        def write(number: int) -> None:
            try:
                for step in range(15):
                    delay = float(1000 * (number + 1) + step)
                    with world.Session() as session:
                        # Two rows of one commit, which are therefore always equal.
                        for key in (number + 1, number + 4):
                            session.get_one(Flight, key).delay = delay
                        session.commit()
                        assert session.get(OuterBoard, number + 1).delay == delay
                        found = session.range(OuterBoard.by_delay, ge=delay, le=delay)
                        assert ids(found) == [number + 1, number + 4]
            finally:
                done.append(number)

        def read() -> None:
            while len(done) < writers:
                with world.Session() as session:
                    by_id = {r.id: r for r in session.scalars(select(OuterBoard))}
                    assert len(by_id) == 6
                    for number in range(writers):
                        one, other = by_id[number + 1].delay, by_id[number + 4].delay
                        assert one == other or (one or 0) < 1000

        _run_all([*(lambda n=n: write(n) for n in range(writers)), read, read])
        world.cache._check()
        with world.Session() as session:
            cached = session.scalars(select(OuterBoard)).all()
            read_now = session.scalars(select(OuterBoard).options(bypass_cache())).all()
            assert set(cached) == set(read_now)


def test_threads_load_and_evict_under_readers(database: Database):
    """Loads and evictions on one thread never disturb what readers on others get."""
    with flights_world(database) as world:
        done: list[bool] = []

        def manage() -> None:
            try:
                for step in range(12):
                    world.cache.load(OuterBoard, OuterBoard.hour >= hour(step % 4))
                    world.cache.extend(OuterBoard, OuterBoard.hour < hour(1))
                    world.cache.evict(OuterBoard, OuterBoard.hour < hour(step % 3))
                    if step % 4 == 3:
                        world.cache.clear(OuterBoard)
            finally:
                done.append(True)

        def read() -> None:
            while not done:
                assert world.ids() == [1, 2, 3, 4, 5, 6]
                assert world.ids(OuterBoard.hour >= hour(2)) == [4, 5, 6]

        _run_all([manage, read, read])
        world.cache._check()


# --- several views and caches ---------------------------------------------------------------------


def test_views_over_the_same_tables_are_all_kept_fresh(database: Database):
    """One commit is seen in every view that has the table, in exact and coarse ones."""
    views = (OuterBoard, InnerBoard, PlaneEntity, FullJoin)
    with flights_world(database, *views) as world:
        for view in views:
            world.cache.load(view)
        with world.Session() as session:
            session.get_one(Plane, "N1").year = 1970
            session.get_one(Airline, "AA").name = "American Airlines"
            session.commit()
        with world.Session() as session:
            assert session.get(OuterBoard, 1).year == 1970
            assert session.get(InnerBoard, 1).airline == "American Airlines"
            assert session.get(PlaneEntity, "N1").year == 1970
            statement = select(FullJoin.year).where(FullJoin.id == 1)
            assert session.scalar(statement) == 1970


def test_two_caches_of_one_engine_are_both_told(database: Database):
    """Two caches over one engine, and one over an engine with options, see each commit."""
    with flights_world(database) as world:
        second = TableCache(world.engine, views=[OuterBoard])
        world.cache.load(OuterBoard)
        second.load(OuterBoard)
        option_engine = world.engine.execution_options(logging_token="other")
        with Session(option_engine) as session:
            session.execute(update(Flight).where(Flight.id == 1).values(delay=4.5))
            session.commit()
        for cache in (world.cache, second):
            with cache.sessionmaker()() as session:
                assert session.get(OuterBoard, 1).delay == 4.5
        second.close()
        with world.Session() as session:
            session.execute(text("UPDATE flights SET delay = 6.5 WHERE id = 1"))
            session.commit()
        assert world.ids(OuterBoard.delay == 6.5) == [1]


def test_commits_of_another_engine_count_once_it_is_attached(database: Database):
    """`attach(engine)` makes the commits of an engine of its own invalidate."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        other = create_engine(world.database.url)
        world.cache.attach(other)
        with other.begin() as connection:
            connection.execute(update(Flight).where(Flight.id == 1).values(delay=8.5))
        assert world.ids(OuterBoard.delay == 8.5) == [1]
        other.dispose()
