"""Bad input gets a clear error, a database that is down its own, and nothing is lost."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Table,
    create_engine,
    event,
    func,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Mapped, Session
from sqlalchemy.pool import NullPool

from sa_tablecache import (
    AsyncTableCache,
    CachedView,
    Closed,
    CriteriaError,
    ScoreIndex,
    TableCache,
    TableCacheError,
    Unbound,
    UnknownView,
    ViewDefinitionError,
    bypass_cache,
)
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour, insert_flights
from tests.postgres import Postgres
from tests.zoo import Airline, Flight, InnerBoard, OuterBoard, Plane, Tag, WeatherHours


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights, all of them cached."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        yield world


# --- declarations ---------------------------------------------------------------------------------


def test_a_view_without_a_select_is_refused():
    """The error names the class and what it lacks."""
    with pytest.raises(ViewDefinitionError, match=r"NoSelect.*__select__"):

        class NoSelect(CachedView):
            by_id = ScoreIndex("id")


def test_a_select_that_is_none_is_refused():
    """Text is no select."""
    with pytest.raises(ViewDefinitionError, match="NotASelect"):

        class NotASelect(CachedView):
            __select__ = text("SELECT 1")


def test_an_annotation_that_names_no_column_is_refused():
    """The error names the annotation, and the columns that there are."""
    with pytest.raises(ViewDefinitionError, match=r"Annotated\.nmae.*name"):

        class Annotated(CachedView):
            __select__ = select(Airline.carrier, Airline.name)

            carrier: Mapped[str]
            nmae: Mapped[str]


def test_an_index_that_names_no_column_is_refused():
    """The error names the index, the column it wants and those that there are."""
    with pytest.raises(ViewDefinitionError, match=r"Indexed\.by_nmae.*nmae.*name"):

        class Indexed(CachedView):
            __select__ = select(Airline.carrier, Airline.name)

            by_nmae = ScoreIndex("nmae")


def test_two_columns_of_one_name_are_refused():
    """The error says to label one of them."""
    with pytest.raises(ViewDefinitionError, match=r"Twice.*'name'.*label"):

        class Twice(CachedView):
            __select__ = select(Airline.carrier, Airline.name, Plane.model.label("name"))


def test_a_key_that_names_no_column_is_refused():
    """`__primary_key__` can only name columns of the select."""
    with pytest.raises(ViewDefinitionError, match=r"Keyed.*nmae"):

        class Keyed(CachedView):
            __select__ = select(Airline.carrier, Airline.name)
            __primary_key__ = ("nmae",)


def test_a_view_whose_key_cannot_be_derived_is_refused():
    """The error says how to name a key."""

    class Keyless(CachedView):
        __select__ = union_all(select(Airline.name), select(Plane.model))

    class Partial(CachedView):
        __select__ = select(Flight.hour, Airline.name).join(Flight.airline)

    class Grouped(CachedView):
        __select__ = select(func.count(Flight.id).label("n")).group_by(Flight.carrier)

    for view in (Keyless, Partial, Grouped):
        with pytest.raises(ViewDefinitionError, match=f"{view.__name__}.*__primary_key__"):
            TableCache(views=[view])


@pytest.mark.parametrize("function", [func.now(), func.random(), func.current_user()])
def test_values_that_change_by_themselves_are_refused(database: Database, function: Any):
    """A function of the time, of chance or of the session has no place in a cached row."""

    class Volatile(CachedView):
        __select__ = select(Airline.carrier, function.label("value"))

    with pytest.raises(ViewDefinitionError, match="Volatile"):
        cache = TableCache(database.engine(), views=[Volatile])
        cache.load(Volatile)


def test_database_views_are_refused(database: Database):
    """Nobody tells the cache when what a database view shows has changed."""
    shown = Table("shown", MetaData(), Column("id", Integer, primary_key=True))

    class Shown(CachedView):
        __select__ = select(shown)

    with database.lent_engine() as engine, TableCache(engine, views=[Shown]) as cache:
        with engine.begin() as connection:
            connection.execute(text("CREATE VIEW shown AS SELECT id FROM flights"))
        try:
            with pytest.raises(ViewDefinitionError, match="shown"):
                cache.load(Shown)
        finally:
            with engine.begin() as connection:
                connection.execute(text("DROP VIEW shown"))


# --- reads ----------------------------------------------------------------------------------------


def test_a_view_that_the_cache_does_not_have_is_unknown(world: World):
    """The error names the view and says how to add it."""
    calls: list[Callable[[], Any]] = [
        lambda: world.cache.load(InnerBoard),
        lambda: world.cache.covers(InnerBoard),
        lambda: world.cache.ready(InnerBoard),
        lambda: world.cache.stats(InnerBoard),
        lambda: world.cache.clear(InnerBoard),
        lambda: world.cache.refresh(InnerBoard),
        lambda: world.cache.invalidate(InnerBoard),
        lambda: world.cache.explain(select(InnerBoard)),
        lambda: world.Session().get(InnerBoard, 1),
        lambda: world.Session().range(InnerBoard.by_hour),
        lambda: world.Session().scalars(select(InnerBoard)).all(),
        lambda: world.Session().query(InnerBoard).all(),
    ]
    for call in calls:
        with pytest.raises(UnknownView, match=r"InnerBoard.*cache\.add"):
            call()


def test_criteria_of_something_else_are_no_cartesian_product(world: World):
    """A column of another view or of a base table is an error that names it."""
    foreign = [
        InnerBoard.id == 1,
        Flight.id == 1,
        OuterBoard.id == Flight.id,
        Plane.model == "A320",
        Tag.id == 1,
    ]
    for criterion in foreign:
        with world.Session() as session:
            reads: list[Callable[[], Any]] = [
                lambda c=criterion, s=session: s.scalars(select(OuterBoard).where(c)).all(),
                lambda c=criterion, s=session: s.query(OuterBoard).filter(c).all(),
                lambda c=criterion: world.cache.load(OuterBoard, c),
                lambda c=criterion: world.cache.covers(OuterBoard, c),
            ]
            for read in reads:
                with pytest.raises(CriteriaError, match=r"OuterBoard|outer_board"):
                    read()
    assert world.cache.stats(OuterBoard).records == 6


def test_order_by_something_else_is_no_cartesian_product(world: World):
    """Nor does a base table's column belong into ORDER BY: an error, by whomever."""
    with world.Session() as session, pytest.raises((CriteriaError, DBAPIError)):
        session.scalars(select(OuterBoard).order_by(Flight.delay)).all()


def test_a_range_takes_no_more_values_than_its_index_has(world: World):
    """Too many values, a negative limit, or something that is no index say so."""
    with world.Session() as session:
        for call in (
            lambda: session.range(OuterBoard.by_hour, hour(1), hour(2)),
            lambda: session.range(OuterBoard.by_hour, hour(1), ge=hour(2)),
            lambda: session.range(OuterBoard.hour, ge=hour(2)),
            lambda: session.range(OuterBoard.by_hour, limit=-1),
        ):
            with pytest.raises(TableCacheError):
                call()


def test_a_key_of_the_wrong_length_says_so(database: Database):
    """The error names the columns of the key."""
    with flights_world(database, WeatherHours) as world, world.Session() as session:
        for key in ("JFK", ("JFK",), ("JFK", hour(1), 1)):
            with pytest.raises(TableCacheError, match=r"origin.*hour"):
                session.get(WeatherHours, key)


def test_a_range_that_ends_before_it_begins_is_empty(world: World):
    """`ge > lt` is an empty answer for `range`, criteria and loads."""
    with world.Session() as session:
        assert session.range(OuterBoard.by_hour, ge=hour(3), lt=hour(1)) == []
        nothing = select(OuterBoard).where(OuterBoard.hour > hour(3), OuterBoard.hour < hour(1))
        assert session.scalars(nothing).all() == []
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(3), OuterBoard.hour < hour(1))
    assert world.cache.stats(OuterBoard).records == 0
    assert world.ids() == [1, 2, 3, 4, 5, 6]


WRONG: dict[str, Callable[[], Any]] = {
    "text for a time": lambda: OuterBoard.hour == "nine",
    "a date as text": lambda: OuterBoard.hour >= "2024-03-01",
    "text for a number": lambda: OuterBoard.id == "2",
    "no number for a number": lambda: OuterBoard.id == "two",
    "a float for an integer": lambda: OuterBoard.id == 2.0,
    "half an integer": lambda: OuterBoard.id > 2.5,
    "a truth value for an integer": lambda: OuterBoard.year > True,
    "a decimal for a float": lambda: OuterBoard.delay > Decimal("4.5"),
    "an integer for a float": lambda: OuterBoard.delay == 5,
    "an integer for text": lambda: OuterBoard.tailnum == 5,
    "bytes for text": lambda: OuterBoard.tailnum == b"N1",
    "too large": lambda: OuterBoard.id < 2**70,
    "out of range": lambda: OuterBoard.id < 2**40,
    "text with NUL": lambda: OuterBoard.tailnum == "N\x001",
    "in": lambda: OuterBoard.id.in_([1, "2", 3.0]),
    "a list": lambda: OuterBoard.id == [1],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_the_wrong_type_means_what_the_database_says(world: World, name: str):
    """The cached answer, or the error, is the one that the database has for such a value."""

    def outcome(*options: Any) -> Any:
        with world.Session() as session:
            try:
                statement = select(OuterBoard).where(WRONG[name]()).options(*options)
                return sorted(record.id for record in session.scalars(statement))
            except (SQLAlchemyError, OverflowError) as error:
                return type(error)

    assert outcome() == outcome(bypass_cache())
    assert world.ids() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("key", ["2", 2.0, "two", None, True, 2**70])
def test_a_key_of_the_wrong_type_means_what_the_database_says(world: World, key: Any):
    """`session.get` finds what the database finds."""

    def outcome() -> Any:
        with world.Session() as session:
            try:
                record = session.get(OuterBoard, key)
            except (SQLAlchemyError, OverflowError) as error:
                return type(error)
            return record and record.id

    cached = outcome()
    world.cache.clear(OuterBoard)
    assert cached == outcome()


def test_a_bound_of_the_wrong_type_means_what_the_database_says(world: World):
    """So does a bound of `range`."""

    def outcomes() -> list[Any]:
        found: list[Any] = []
        for bound in ("nine", 5, "2024-03-01"):
            with world.Session() as session:
                try:
                    records = session.range(OuterBoard.by_hour, ge=bound)
                    found.append([record.id for record in records])
                except SQLAlchemyError as error:
                    found.append(type(error))
        return found

    cached = outcomes()
    world.cache.clear(OuterBoard)
    assert cached == outcomes()


# --- before bind, after close ---------------------------------------------------------------------


def test_a_cache_that_is_not_bound_says_so():
    """Each use before `bind` names the way out."""
    cache = TableCache(views=[OuterBoard])
    calls: list[Callable[[], Any]] = [
        lambda: cache.load(OuterBoard),
        lambda: cache.covers(OuterBoard),
        lambda: cache.refresh(OuterBoard),
        lambda: cache.invalidate(OuterBoard),
        lambda: cache.estimate(OuterBoard),
        lambda: cache.stats(OuterBoard),
        cache.sessionmaker,
    ]
    for call in calls:
        with pytest.raises(Unbound, match="bind"):
            call()


async def test_an_asynchronous_cache_that_is_not_bound_says_so():
    """The asynchronous cache says the same."""
    cache = AsyncTableCache(views=[OuterBoard])
    with pytest.raises(Unbound, match="bind"):
        await cache.load(OuterBoard)
    with pytest.raises(Unbound, match="bind"):
        cache.sessionmaker()


def test_a_cache_is_bound_once_and_to_an_engine(database: Database):
    """A second engine, or something else, is refused."""
    with database.lent_engine() as engine, TableCache(engine, views=[OuterBoard]) as cache:
        with pytest.raises(TableCacheError, match="bound"):
            cache.bind(engine)
        with pytest.raises(TableCacheError, match="Engine"):
            TableCache("sqlite://")
        for target in (object(), "x", engine.connect):
            with pytest.raises(TableCacheError, match="attach"):
                cache.attach(target)


def test_a_closed_cache_says_so(world: World):
    """Each use after `close` does, the reads of its sessions too."""
    session = world.Session()
    world.cache.close()
    calls: list[Callable[[], Any]] = [
        lambda: world.cache.load(OuterBoard),
        lambda: world.cache.covers(OuterBoard),
        lambda: world.cache.refresh(OuterBoard),
        lambda: world.cache.invalidate(OuterBoard),
        lambda: world.cache.invalidate(Flight),
        lambda: world.cache.stats(OuterBoard),
        lambda: world.cache.add(InnerBoard),
        world.cache.sessionmaker,
        lambda: session.get(OuterBoard, 1),
        lambda: session.range(OuterBoard.by_hour),
        lambda: session.scalars(select(OuterBoard)).all(),
    ]
    for call in calls:
        with pytest.raises(Closed, match="closed"):
            call()
    assert session.scalar(select(func.count()).select_from(Flight)) == 6
    session.close()


# --- a database that is down ----------------------------------------------------------------------


Outage = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def outage(database: Database, postgres: Postgres) -> Outage:
    """Takes the database down for the time of a block, for those who are connected too."""

    @contextmanager
    def postgresql() -> Iterator[None]:
        name = database.url.database
        allow = f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS"
        end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        engine = create_engine(postgres.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            connection.execute(text(f"{allow} false"))
            connection.execute(text(end))
        try:
            yield
        finally:
            with engine.connect() as connection:
                connection.execute(text(f"{allow} true"))

    @contextmanager
    def sqlite() -> Iterator[None]:
        path = str(database.url.database)
        with open(path, "r+b") as file:  # noqa: PTH123 - read and written in place
            header = file.read(100)
            file.seek(0)
            file.write(b"\xff" * 100)
        try:
            yield
        finally:
            with open(path, "r+b") as file:  # noqa: PTH123
                file.write(header)

    return sqlite if database.dialect == "sqlite" else postgresql


def recovered(read: Callable[[], Any]) -> Any:
    """Read until the pools have noticed that their connections are gone: once for each pool."""
    for _ in range(4):
        try:
            return read()
        except DBAPIError as error:
            last = error
    raise last


def test_hits_need_no_database(world: World, outage: Outage):
    """What is cached and not marked is answered while the database is down."""
    with outage(), world.Session() as session, counting() as statements:
        assert len(session.range(OuterBoard.by_hour)) == 6
        assert session.get(OuterBoard, 1).airline == "American"
    assert statements == []


def test_a_load_from_a_database_that_is_down(database: Database, outage: Outage):
    """The database's error reaches the caller; records and coverage stay as they were."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard, OuterBoard.hour >= hour(2))
        with outage():
            for _ in range(2):
                with pytest.raises(DBAPIError):
                    world.cache.load(OuterBoard)
                with pytest.raises(DBAPIError):
                    world.cache.extend(OuterBoard, OuterBoard.hour < hour(1))
            assert world.ids(OuterBoard.hour >= hour(2)) == [4, 5, 6]
            assert not world.cache.covers(OuterBoard)
            assert world.cache.stats(OuterBoard).records == 3
            world.cache._check()
        recovered(lambda: world.cache.load(OuterBoard))
        with counting() as statements:
            assert world.ids() == [1, 2, 3, 4, 5, 6]
        assert statements == []


def test_a_first_load_from_a_database_that_is_down(database: Database, outage: Outage):
    """A view that was never used has to ask the catalog first, and may fail there."""
    with flights_world(database) as world:
        with outage(), pytest.raises(DBAPIError):
            world.cache.load(OuterBoard)
        assert not world.cache.ready(OuterBoard)
        recovered(lambda: world.cache.load(OuterBoard))
        assert world.ids() == [1, 2, 3, 4, 5, 6]


def test_a_read_from_a_database_that_is_down(database: Database, outage: Outage):
    """A miss and a partial hit raise the database's error; the next read tries again."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard, OuterBoard.hour >= hour(2))
        with outage():
            for criterion in (OuterBoard.hour < hour(1), OuterBoard.hour >= hour(1)):
                with pytest.raises(DBAPIError):
                    world.ids(criterion)
        assert recovered(lambda: world.ids(OuterBoard.hour < hour(1))) == [1]
        assert recovered(lambda: world.ids(OuterBoard.hour >= hour(1))) == [2, 3, 4, 5, 6]
        world.cache._check()


def test_a_refresh_from_a_database_that_is_down(world: World, outage: Outage):
    """The error reaches the reader; marks and records are kept, and the next read is right."""
    with world.Session() as session:
        session.get_one(Flight, 1).delay = 61.0
        session.commit()
    with outage():
        for _ in range(2):
            with pytest.raises(DBAPIError):
                world.ids(OuterBoard.delay == 61)
            with pytest.raises(DBAPIError):
                world.cache.refresh(OuterBoard)
        stats = world.cache.stats(OuterBoard)
        assert (stats.records, stats.pending_marks) == (6, 1)
        assert world.cache.covers(OuterBoard)
    assert recovered(lambda: world.ids(OuterBoard.delay == 61)) == [1]
    with counting() as statements:
        assert world.ids() == [1, 2, 3, 4, 5, 6]
    assert statements == []


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_commit_to_a_database_that_is_down(world: World, outage: Outage):
    """A commit that fails raises, and the cache is right afterwards, whatever became of it."""
    with world.Session() as session:
        session.get_one(Flight, 1).delay = 62.0
        session.flush()
        with outage(), pytest.raises(DBAPIError):
            session.commit()
    with world.outside() as outside:
        expected = recovered(lambda: outside.get_one(Flight, 1).delay)
    assert recovered(lambda: world.ids(OuterBoard.delay == 62)) == ([1] if expected == 62 else [])
    with world.Session() as session:
        recovered(lambda: session.execute(update(Flight).where(Flight.id == 2).values(delay=63.0)))
        session.commit()
    assert recovered(lambda: world.ids(OuterBoard.delay == 63)) == [2]


@pytest.fixture
def flaky(database: Database) -> Iterator[tuple[World, dict[str, bool]]]:
    """Six flights, all of them cached through an engine whose connections can be made to fail."""
    state = {"down": False}
    loads = database.engine(poolclass=NullPool)

    def do_connect(dialect: Any, *_: Any) -> None:
        if state["down"]:
            raise dialect.loaded_dbapi.OperationalError("the loader's network is down")

    event.listen(loads, "do_connect", do_connect)
    with flights_world(database, load_engine=loads) as world:
        world.cache.load(OuterBoard, OuterBoard.hour < hour(3))
        yield world, state


def test_a_refresh_that_fails_alone_degrades_to_the_database(
    flaky: tuple[World, dict[str, bool]],
):
    """While only the cache's own connections fail, readers are answered by the database."""
    world, state = flaky
    state["down"] = True
    with world.Session() as session:
        session.get_one(Flight, 1).delay = 64.0
        session.commit()
    for _ in range(2):
        with world.Session() as session:
            found = session.scalars(select(OuterBoard).where(OuterBoard.delay == 64)).all()
            assert [record.id for record in found] == [1]
            assert session.last_read.kind == "bypass"
            assert session.get(OuterBoard, 1).delay == 64
    with pytest.raises(DBAPIError, match="network is down"):
        world.cache.refresh(OuterBoard)
    with pytest.raises(DBAPIError, match="network is down"):
        world.cache.load(OuterBoard)
    assert world.cache.stats(OuterBoard).pending_marks == 1
    assert world.cache.stats(OuterBoard).records == 4
    state["down"] = False
    assert world.ids(OuterBoard.delay == 64) == [1]
    with world.Session() as session, counting() as statements:
        assert session.get(OuterBoard, 1).delay == 64
        assert session.last_read.kind == "hit"
    assert statements == []


def test_a_table_that_is_gone_for_a_while(sqlite: Database):
    """A table that others renamed fails loads and refreshes until it is back."""
    with flights_world(sqlite) as world:
        world.cache.load(OuterBoard, OuterBoard.hour < hour(3))
        path = str(sqlite.url.database)
        with world.Session() as session:
            session.get_one(Plane, "N1").model = "A321"
            session.commit()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("ALTER TABLE planes RENAME TO hidden_planes")
            for call in (
                world.ids,
                lambda: world.cache.refresh(OuterBoard),
                lambda: world.cache.load(OuterBoard),
            ):
                with pytest.raises(DBAPIError, match="planes"):
                    call()
            connection.execute("ALTER TABLE hidden_planes RENAME TO planes")
        assert world.ids(OuterBoard.model == "A321") == [1, 4]


#: SQLAlchemy 2.0 passes on what asyncpg says when it cannot connect.
REFUSED = (DBAPIError, asyncpg.PostgresError)


async def test_an_asynchronous_database_that_is_down(database: Database, outage: Outage):
    """The asynchronous cache gives the same errors and recovers in the same way."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    async with AsyncTableCache(engine, views=[OuterBoard]) as cache:
        await cache.load(OuterBoard, OuterBoard.hour < hour(3))
        factory = cache.sessionmaker()
        async with factory() as session:
            (await session.get_one(Flight, 1)).delay = 65.0
            await session.commit()
        with outage():
            async with factory() as session:
                with pytest.raises(REFUSED):
                    await session.scalars(select(OuterBoard))
            with pytest.raises(REFUSED):
                await cache.load(OuterBoard)
            assert cache.stats(OuterBoard).pending_marks == 1
            assert cache.stats(OuterBoard).records == 4
        for attempt in range(4):
            async with factory() as session:
                try:
                    found = await session.scalars(select(OuterBoard).where(OuterBoard.delay == 65))
                    assert [record.id for record in found] == [1]
                    break
                except DBAPIError:
                    assert attempt < 3
    await engine.dispose()


def test_an_engine_event_that_raises_is_the_applications(world: World):
    """An error of the application's own listener at COMMIT leaves the cache right."""

    def refuse(connection: Any) -> None:
        raise RuntimeError("not today")

    with world.Session() as session:
        session.get_one(Flight, 1).delay = 66.0
        session.flush()
        event.listen(world.engine, "commit", refuse)
        try:
            with pytest.raises(RuntimeError, match="not today"):
                session.commit()
        finally:
            event.remove(world.engine, "commit", refuse)
    with world.outside() as outside:
        stored = outside.get_one(Flight, 1).delay
    assert world.ids(OuterBoard.delay == 66) == ([1] if stored == 66 else [])
    with Session(world.engine) as session:
        session.get_one(Flight, 1).delay = 67.0
        session.commit()
    assert world.ids(OuterBoard.delay == 67) == [1]
