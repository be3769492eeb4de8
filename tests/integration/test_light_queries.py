"""``session.query(View)`` before SQLAlchemy makes a query of it: it is one, whatever is asked."""

import copy
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import bindparam, event, select
from sqlalchemy.orm import Query
from sqlalchemy.orm.scoping import scoped_session

from sa_tablecache import CacheSession, bypass_cache, max_staleness
from sa_tablecache.queries import CachedQuery, LightQuery
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour, ids
from tests.zoo import Flight, OuterBoard


@pytest.fixture
def world(sqlite: Database) -> Iterator[World]:
    """Six flights, all of them cached."""
    with flights_world(sqlite, exclusive_writer=True) as world:
        world.cache.load(OuterBoard)
        yield world


def test_a_query_is_not_made_where_memory_answers(world: World) -> None:
    """What is simple stays a note of what was asked for, and is a Query for everybody."""
    with world.Session() as session:
        query: Any = session.query(OuterBoard).filter(OuterBoard.hour >= hour(1))
        query = query.order_by(OuterBoard.hour).limit(2)
        assert len(query.all()) == 2
        assert query.count is not None
        assert type(query) is LightQuery
        assert isinstance(query, Query)


def test_a_query_becomes_the_one_that_sqlalchemy_makes(world: World) -> None:
    """Asked for anything else it is made, with what it was asked for and what was put on it."""
    with world.Session() as session:
        query: Any = session.query(OuterBoard)
        query.mine = "note"
        query = query.filter(OuterBoard.id > 2)
        kept, sql = query.all, str(query)
        assert type(query) is CachedQuery
        assert "outer_board.id > ?" in sql
        assert query.mine == query.limit(1).mine == "note"
        assert ids(kept()) == ids(query) == [3, 4, 5, 6]
        assert not hasattr(session.query(OuterBoard), "nothing_such")


def test_what_is_set_on_a_query_is_heeded(world: World) -> None:
    """Setting an attribute of SQLAlchemy's makes the query, too."""
    with world.Session() as session:
        query: Any = session.query(OuterBoard)
        query._where_criteria = (OuterBoard.id == 4,)
        assert ids(query) == [4]


def test_a_copy_is_a_query_of_its_own(world: World) -> None:
    """What becomes of a copy does not become of the original."""
    with world.Session() as session:
        query: Any = session.query(OuterBoard).filter(OuterBoard.id < 3)
        other = copy.copy(query)
        str(other)
        assert (type(query), type(other)) == (LightQuery, CachedQuery)
        assert ids(query) == ids(other) == [1, 2]


@pytest.mark.parametrize("class_", [Query, CachedQuery])
def test_listeners_of_queries_are_asked(world: World, class_: Any) -> None:
    """A listener that adds criteria is heard, of queries that were there before it, too."""
    with world.Session() as session:
        query = session.query(OuterBoard).filter(OuterBoard.id > 1)
        assert len(query.all()) == 5

        def narrow(query: Any) -> Any:
            return query.filter(OuterBoard.id < 4)

        event.listen(class_, "before_compile", narrow, retval=True)
        try:
            assert ids(query.all()) == ids(session.query(OuterBoard).filter(OuterBoard.id > 1))
            assert ids(query.all()) == [2, 3]
            assert session.query(OuterBoard).filter(OuterBoard.id > 1).count() == 2
        finally:
            event.remove(class_, "before_compile", narrow)
        assert len(query.all()) == 5


def test_listeners_of_one_query_are_asked(world: World) -> None:
    """SQLAlchemy lets listen to single queries."""
    with world.Session() as session:
        query = session.query(OuterBoard).filter(OuterBoard.id > 1)
        event.listen(query, "before_compile", lambda q: q.filter(OuterBoard.id < 4), retval=True)
        assert ids(query.all()) == [2, 3]


def test_a_query_class_of_the_application_is_used(world: World) -> None:
    """`query_cls` says what `session.query()` gives, as ever."""

    class Own(Query[Any]):
        pass

    class Cached(CachedQuery):
        pass

    with world.Session(query_cls=Own) as session:
        assert type(session.query(OuterBoard)) is Own
        assert len(session.query(OuterBoard).all()) == 6
    with world.Session(query_cls=Cached) as session:
        assert type(session.query(OuterBoard)) is Cached
        assert session.query(OuterBoard).count() == 6


def test_a_session_class_of_the_application_is_asked(world: World) -> None:
    """Where a session changes what is executed, its method runs."""
    seen = []

    class Own(CacheSession):
        def execute(self, statement: Any, params: Any = None, **kwargs: Any) -> Any:
            seen.append(statement)
            return super().execute(statement, params, **kwargs)

    with world.cache.sessionmaker(class_=Own)() as session:
        assert len(session.query(OuterBoard).all()) == 6
        assert session.query(OuterBoard).count() == 6
    assert len(seen) >= 2


def test_query_property_gives_light_queries(world: World) -> None:
    """So do the queries of a scoped session."""
    scoped = scoped_session(world.Session)
    assert scoped.query(OuterBoard).filter_by(id=2).one().id == 2
    scoped.remove()


def test_own_writes_are_seen(world: World) -> None:
    """A pending change is flushed, and the transaction's own rows are read."""
    with world.Session() as session:
        query = session.query(OuterBoard).filter(OuterBoard.delay > 90)
        assert (query.all(), query.count()) == ([], 0)
        session.get_one(Flight, 1).delay = 99.0
        assert query.count() == 1
        assert ids(query.all()) == [1]
        session.rollback()
        assert query.all() == []


def test_count_heeds_all_that_a_query_says(world: World) -> None:
    """Joins, HAVING, parameters and options count as they do in SQLAlchemy."""
    with world.Session() as session:
        query: Any = session.query(OuterBoard)
        assert query.join(Flight, Flight.hour == OuterBoard.hour).count() == 8
        assert query.filter(OuterBoard.id > bindparam("p")).params(p=4).count() == 2
        assert query.filter(OuterBoard.id > 1).group_by(OuterBoard.hour).count() == 4
        assert query.options(bypass_cache()).count() == 6


def test_options_survive_parameters(world: World) -> None:
    """A statement that is copied deeply, as `params()` does, keeps the options of the cache."""
    statement = select(OuterBoard).where(OuterBoard.id > bindparam("p"))
    with world.Session() as session:
        for option in (bypass_cache(), max_staleness(timedelta(seconds=5))):
            assert len(session.scalars(statement.options(option).params(p=4)).all()) == 2
