"""EXISTS of a view: answered by the cache where it asks for no more than that."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Select, bindparam, exists, func, literal, or_, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sa_tablecache import bypass_cache
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour
from tests.zoo import Flight, OuterBoard

View: Any = OuterBoard
CRITERIA: dict[str, Any] = {
    "none": (),
    "one": (View.id == 3,),
    "no such": (View.id == 99,),
    "range": (View.hour >= hour(1), View.hour < hour(2)),
    "empty range": (View.hour >= hour(8),),
    "residual": (View.hour >= hour(1), View.delay > 10),
    "residual of none": (View.hour >= hour(2), View.delay > 10),
    "null": (View.tailnum.is_(None), View.hour > hour(3)),
    "compared with null": (View.delay > bindparam("d", None),),
    "or": (or_(View.id == 99, View.delay == 5),),
    "in nothing": (View.id.in_([]),),
}
FORMS: dict[str, Callable[..., Select[Any]]] = {
    "exists(select())": lambda *c: select(exists(select(View).where(*c))),
    "exists().where()": lambda *c: select(exists().where(*c)),
    "exists().select_from()": lambda *c: select(exists().select_from(View).where(*c)),
    "exists(column)": lambda *c: select(exists(View.id).where(*c)),
    "select().exists()": lambda *c: select(select(View).where(*c).exists()),
    "select columns": lambda *c: select(select(View.hour, View.id).where(*c).exists()),
    "select 1": lambda *c: select(select(1).select_from(View).where(*c).exists()),
    "select literal": lambda *c: select(exists(select(literal(1)).select_from(View).where(*c))),
    "select text": lambda *c: select(exists(select(text("1")).select_from(View).where(*c))),
    "ordered": lambda *c: select(exists(select(View).where(*c).order_by(View.hour, View.id))),
    "labelled": lambda *c: select(exists(select(View).where(*c)).label("any_there")),
}


@pytest.fixture
def world(sqlite: Database) -> Iterator[World]:
    """Six flights, all of them cached."""
    with flights_world(sqlite, exclusive_writer=True) as world:
        world.cache.load(OuterBoard)
        yield world


@pytest.mark.every_database
@pytest.mark.parametrize("form", FORMS)
def test_exists_is_answered_by_the_cache(database: Database, form: str) -> None:
    """However it is written, without a statement, as the database would, with the same names."""
    with flights_world(database, exclusive_writer=True) as world:
        world.cache.load(OuterBoard)
        for name, criteria in CRITERIA.items():
            if form == "exists().where()" and not criteria:
                continue
            statement = FORMS[form](*criteria)
            with world.Session() as session:
                asked = session.execute(statement.options(bypass_cache()))
                keys, expected = list(asked.keys()), asked.all()
            with world.Session() as session, counting() as statements:
                result = session.execute(statement)
                assert (list(result.keys()), result.all()) == (keys, expected), name
                assert session.last_read.kind == "hit", (name, session.last_read)
                value = session.scalar(statement)
                assert value is expected[0][0], name
                assert session.scalars(statement).all() == [value]
            assert statements == [], name


@pytest.mark.parametrize("name", CRITERIA)
def test_exists_of_a_query_is_answered_by_the_cache(world: World, name: str) -> None:
    """`session.query(query.exists()).scalar()` is SQLAlchemy's way to ask."""
    with world.Session() as session:
        query = session.query(OuterBoard).filter(*CRITERIA[name])
        expected = len(query.all()) > 0
    with world.Session() as session, counting() as statements:
        query = session.query(OuterBoard).filter(*CRITERIA[name])
        assert session.query(query.exists()).scalar() is expected
        assert session.query(query.order_by(OuterBoard.hour).exists()).one() == (expected,)
        assert session.scalar(select(query.exists())) is expected
        assert session.scalar(query.exists().select()) is expected
    assert statements == []


OTHERS: dict[str, Any] = {
    "not": lambda: select(~exists(select(View).where(View.id == 99))),
    "limit": lambda: select(exists(select(View).limit(0))),
    "offset": lambda: select(exists(select(View).offset(6))),
    "distinct": lambda: select(exists(select(View.hour).distinct())),
    "group_by": lambda: select(exists(select(View.hour).group_by(View.hour))),
    "having": lambda: select(
        exists(select(View.hour).group_by(View.hour).having(View.hour > hour(9)))
    ),
    "aggregate": lambda: select(exists(select(func.count()).where(View.id == 99))),
    "maximum": lambda: select(exists(select(func.max(View.id)).where(View.id == 99))),
    "like": lambda: select(exists().where(View.airline.like("%nited"))),
    "two tables": lambda: select(exists().where(View.id == Flight.id, Flight.delay > 10)),
    "two of them": lambda: select(exists().where(View.id == 1), exists().where(View.id == 99)),
    "of a limit": lambda: select(exists().where(View.id == 1)).limit(1),
    "for update": lambda: select(exists(select(View).with_for_update())),
    "where": lambda: select(exists().where(View.id == 1)).where(literal(True)),
    "from": lambda: select(exists().where(View.id == 1)).select_from(Flight).limit(1),
    "correlated": lambda: select(exists(select(View).where(View.id == 1).correlate(Flight))),
    "of a table": lambda: select(exists().where(Flight.id == 1)),
    "inner option": lambda: select(exists(select(View).options(bypass_cache()))),
    "union": lambda: select(exists(select(View.id).union(select(View.id)))),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_says_more_is_left_to_the_database(world: World, other: str) -> None:
    """Anything that is not understood has the database's answer."""
    statement = OTHERS[other]()
    with Session(world.engine) as plain:
        expected = plain.execute(statement).all()
    with world.Session() as session:
        assert session.execute(statement).all() == expected
        assert getattr(session.last_read, "kind", "bypass") == "bypass"


def test_exists_sees_what_was_written(world: World) -> None:
    """Own writes at once, those of others when they are committed."""
    statement = select(exists().where(View.delay == 99))

    def query(session: Any) -> Any:
        found = session.query(OuterBoard).filter(View.delay == 99)
        return session.query(found.exists()).scalar()

    with world.Session() as session, world.Session() as other:
        assert (session.scalar(statement), query(session)) == (False, False)
        session.get_one(Flight, 1).delay = 99.0
        assert (session.scalar(statement), query(session)) == (True, True)
        assert (other.scalar(statement), query(other)) == (False, False)
        other.rollback()
        session.commit()
        assert (other.scalar(statement), query(other)) == (True, True)


def test_exists_of_what_is_covered_in_part_is_a_miss(world: World) -> None:
    """What lies outside of the coverage could be all there is."""
    world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
    with world.Session() as session:
        assert session.scalar(select(exists().where(View.hour >= hour(3)))) is True
        assert session.last_read.kind == "miss"
        assert session.scalar(select(exists().where(View.hour >= hour(0)))) is True
        assert session.last_read.kind == "miss"
        assert session.scalar(select(exists().where(View.hour < hour(1)))) is True
        assert session.last_read.kind == "hit"


def test_exists_can_be_compared_and_explained(world: World) -> None:
    """In shadow mode the database answers, and says the same."""
    statement = select(exists().where(View.id == 3))
    assert world.cache.explain(statement).kind == "hit"
    world.cache.set_mode(OuterBoard, "shadow")
    with world.Session() as session:
        assert session.scalar(statement) is True
    assert world.cache.stats(OuterBoard).mismatches == 0


def test_a_select_of_nothing_has_the_error_of_sqlalchemy(world: World) -> None:
    """A statement without columns is looked at, too."""
    statement: Any = select()
    with world.Session() as session, Session(world.engine) as plain:
        for each in (plain, session):
            with pytest.raises(DBAPIError):
                each.execute(statement)
