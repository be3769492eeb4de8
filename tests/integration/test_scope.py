"""What a reader's own SQL would show, and nothing else: criteria, settings, isolation, values."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pydantic
import pytest
from sqlalchemy import (
    bindparam,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.orm import Session

from sa_tablecache import CacheSession, TableCache
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour, ids, insert_flights
from tests.integration.rows import CUSTOMERS, DAYS
from tests.zoo import (
    Base,
    Crate,
    Customer,
    CustomersAndOrders,
    Flight,
    LocalCrates,
    Order,
    OuterBoard,
    Plane,
)

pytestmark = pytest.mark.every_database


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights, all of them cached."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        yield world


@pytest.fixture
def postgres_world(postgresql: Database) -> Iterator[World]:
    """Six flights on PostgreSQL, all of them cached."""
    with flights_world(postgresql) as world:
        world.cache.load(OuterBoard)
        yield world


# --- statements -----------------------------------------------------------------------------------


def test_parameters_may_be_given_with_the_call(world: World):
    """`bindparam` in a statement gets its value from the call, each time anew."""
    statement = select(OuterBoard).where(OuterBoard.id == bindparam("number"))
    with world.Session() as session:
        for number in (1, 2, 99):
            found = session.scalars(statement, {"number": number}).all()
            assert ids(found) == ([number] if number < 99 else [])
        # The same text with other values in it is another question.
        for number in (3, 4):
            again = select(OuterBoard).where(OuterBoard.id == number)
            assert ids(session.scalars(again)) == [number]
        prepared = statement.params(number=5)
        assert ids(session.scalars(prepared)) == [5]
        assert ids(session.scalars(statement.params(number=6))) == [6]
        assert ids(session.scalars(prepared)) == [5]


def test_text_and_literal_columns_in_criteria_are_the_databases(world: World):
    """SQL that nobody understands is passed on."""
    with world.Session() as session:
        assert ids(session.scalars(select(OuterBoard).where(text("delay > 1")))) == [2, 3]
        assert ids(session.scalars(select(OuterBoard).where(literal_column("id") == 4))) == [4]
        nested = select(func.max(Flight.id)).scalar_subquery()
        assert ids(session.scalars(select(OuterBoard).where(OuterBoard.id == nested))) == [6]
        several = select(Flight.id).where(Flight.delay > 1)
        assert ids(session.scalars(select(OuterBoard).where(OuterBoard.id.in_(several)))) == [2, 3]


def test_execution_options_of_results_are_understood(world: World):
    """`yield_per` and streaming give the same records."""
    with world.Session() as session:
        statement = select(OuterBoard).order_by(OuterBoard.id)
        found = session.scalars(statement.execution_options(yield_per=2))
        assert [r.id for part in found.partitions() for r in part] == [1, 2, 3, 4, 5, 6]
        streamed = session.execute(statement, execution_options={"stream_results": True})
        assert [row[0].id for row in streamed] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("loaded", [False, True])
def test_a_composite_index_is_an_expression(database: Database, loaded: bool):
    """An index of several scores stands in WHERE as a row value, in ORDER BY as its columns."""
    with flights_world(database) as world:
        if loaded:
            world.cache.load(OuterBoard)
        with world.Session() as session:

            def found(statement: Any) -> list[int]:
                return [record.id for record in session.scalars(statement)]

            known = select(OuterBoard).where(OuterBoard.tailnum.is_not(None))
            assert found(known.order_by(OuterBoard.by_plane)) == [1, 4, 2, 5]
            assert found(known.order_by(OuterBoard.by_plane.desc())) == [5, 2, 4, 1]
            assert found(known.order_by(OuterBoard.by_plane).limit(2)) == [1, 4]
            later = select(OuterBoard).where(OuterBoard.by_plane > ("N1", hour(0)))
            assert sorted(found(later)) == [2, 4, 5]
            equal = select(OuterBoard).where(OuterBoard.by_plane == ("N1", hour(2)))
            assert found(equal) == [4]
            among = OuterBoard.by_plane.in_([("N1", hour(0)), ("N2", hour(1)), ("N3", hour(0))])
            assert sorted(found(select(OuterBoard).where(among))) == [1, 2]


def test_a_prefix_of_null_is_the_group_without_a_value(world: World):
    """`range(index, None)` reads the records whose first score is NULL."""
    with world.Session() as session, counting() as statements:
        assert [r.id for r in session.range(OuterBoard.by_plane, None)] == [3, 6]
        assert ids(session.range(OuterBoard.by_plane, None, gt=hour(1))) == [6]
    assert statements == []


def test_a_schema_translate_map_leads_elsewhere(postgres_world: World):
    """A statement for the tables of another schema is not answered from the first one's."""
    with postgres_world.engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA IF NOT EXISTS tenant"))
        there = connection.execution_options(schema_translate_map={None: "tenant"})
        Base.metadata.create_all(there, tables=[Crate.__table__])
        connection.execute(text("INSERT INTO tenant.crates VALUES (7, 70)"))
        connection.execute(text("INSERT INTO crates VALUES (1, 10)"))
    try:
        postgres_world.cache.add(LocalCrates)
        postgres_world.cache.load(LocalCrates)
        translated = {"schema_translate_map": {None: "tenant"}}
        with postgres_world.Session() as session:
            assert [r.id for r in session.scalars(select(LocalCrates))] == [1]
            options = select(LocalCrates).execution_options(**translated)
            assert [r.id for r in session.scalars(options)] == [7]
            found = session.scalars(select(LocalCrates), execution_options=translated)
            assert [r.id for r in found] == [7]
        with postgres_world.Session() as session:
            session.connection(execution_options=translated)
            assert [r.id for r in session.scalars(select(LocalCrates))] == [7]
            assert session.get(LocalCrates, 1) is None
            assert [r.id for r in session.range(LocalCrates.by_weight)] == [7]
        if hasattr(Session, "execution_options"):  # SQLAlchemy 2.1
            with postgres_world.cache.sessionmaker(execution_options=translated)() as session:
                assert [r.id for r in session.scalars(select(LocalCrates))] == [7]
                assert [r.id for r in session.query(LocalCrates)] == [7]
                assert session.get(LocalCrates, 1) is None
                assert [r.id for r in session.range(LocalCrates.by_weight)] == [7]
                assert session.last_read.kind == "bypass"
        tenant_engine = postgres_world.engine.execution_options(**translated)
        with postgres_world.cache.sessionmaker(bind=tenant_engine)() as session:
            assert [r.id for r in session.range(LocalCrates.by_weight)] == [7]
            session.add(Crate(id=8, weight=80))
            session.commit()
            assert [r.id for r in session.range(LocalCrates.by_weight)] == [7, 8]
        with postgres_world.Session() as session:
            assert [r.id for r in session.scalars(select(LocalCrates))] == [1]
    finally:
        with postgres_world.engine.begin() as connection:
            connection.execute(text("DROP SCHEMA tenant CASCADE"))


# --- isolation ------------------------------------------------------------------------------------


def test_an_engine_in_autocommit_mode_is_read_right(database: Database):
    """Where every statement is a transaction, each is seen at once."""
    with database.lent_engine(isolation_level="AUTOCOMMIT") as engine:
        with engine.connect() as connection:
            insert_flights(connection)
        with TableCache(engine, views=[OuterBoard]) as cache:
            cache.load(OuterBoard)
            factory = cache.sessionmaker()
            with factory() as session, factory() as other:
                session.get_one(Flight, 1).delay = 50.0
                session.flush()
                assert other.get(OuterBoard, 1).delay == 50
                session.rollback()
                assert other.get(OuterBoard, 1).delay == 50
                session.execute(update(Plane).where(Plane.tailnum == "N1").values(year=1900))
                assert other.get(OuterBoard, 1).year == 1900


def test_a_transaction_that_began_before_a_commit_reads_on(world: World):
    """A session keeps reading what is committed by then, across the commits of others."""
    with world.Session() as session:
        for step in range(3):
            with world.outside() as outside:
                expected = outside.scalars(select(Flight.delay).where(Flight.id == 1)).one()
            assert session.get(OuterBoard, 1).delay == expected
            with world.Session() as other:
                other.get_one(Flight, 1).delay = 50.0 + step
                other.commit()


# --- values ---------------------------------------------------------------------------------------


def test_what_a_reader_does_to_a_value_stays_with_the_reader(database: Database):
    """JSON is mutable: each reader gets its own."""
    with database.lent_engine() as engine, TableCache(engine, views=[CustomersAndOrders]) as cache:
        with engine.begin() as connection:
            connection.execute(insert(Customer), [{"id": CUSTOMERS[0], "name": "ada"}])
            order = {"id": 1, "number": "1", "customer_id": CUSTOMERS[0], "status": "open"}
            several = [
                {**order, "id": n, "number": str(n), "day": DAYS[0], "extra": {"gifts": [1, {}]}}
                for n in (1, 2)
            ]
            connection.execute(insert(Order), several)
        cache.load(CustomersAndOrders)
        key = (CUSTOMERS[0], 1)
        factory = cache.sessionmaker()

        def reads(session: CacheSession) -> list[Any]:
            by_index = session.range(CustomersAndOrders.by_order, 1)
            statement = select(CustomersAndOrders).where(CustomersAndOrders.order_id == 1)
            columns = select(CustomersAndOrders.extra).where(CustomersAndOrders.order_id == 1)
            return [
                session.get(CustomersAndOrders, key).extra,
                by_index[0].extra,
                session.scalars(statement).one().extra,
                session.execute(columns).one()[0],
                session.query(CustomersAndOrders).filter_by(order_id=1).one().extra,
            ]

        with factory() as session:
            for value in reads(session):
                value["gifts"][1]["mine"] = True
                value["gifts"].append(2)
            assert reads(session) == [{"gifts": [1, {}]}] * 5
            neighbour = session.get(CustomersAndOrders, (CUSTOMERS[0], 2))
            assert neighbour.extra == {"gifts": [1, {}]}


def test_records_go_into_other_libraries(world: World):
    """Pydantic reads a record's attributes, msgspec encodes it."""

    class Shown(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(from_attributes=True)

        id: int
        model: str | None

    with world.Session() as session:
        record = session.get(OuterBoard, 1)
        assert record is not None
        assert Shown.model_validate(record) == Shown(id=1, model="A320")
        assert msgspec.json.decode(msgspec.json.encode(record))["airline"] == "American"
        built = OuterBoard(**record._asdict())
        assert built == record
        assert hash(built) == hash(record)


def test_sessions_without_a_cache_are_never_answered_by_one(world: World):
    """Attaching one factory does not attach all sessions of the process."""
    with Session(world.engine) as session, counting() as statements:
        rows = session.execute(select(OuterBoard).where(OuterBoard.id == 1)).all()
        assert rows[0].airline == "American"
    assert len(statements) == 1
