"""What a session's connection was told, by whomever: the tenant, the role, the search path."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    Connection,
    Engine,
    event,
    func,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from sa_tablecache import (
    AsyncTableCache,
    CacheSession,
    TableCache,
    harmless,
)
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, insert_flights
from tests.zoo import Flight, OuterBoard, Plane

ELSEWHERE = "SET LOCAL search_path TO elsewhere, public"
"""Under this setting the table of planes is another one, and it is empty."""


@pytest.fixture
def elsewhere(postgresql: Database) -> Iterator[None]:
    """A schema with a table of planes that is empty."""
    with postgresql.bystander() as connection:
        connection.execute(text("CREATE SCHEMA elsewhere"))
        connection.execute(text("CREATE TABLE elsewhere.planes (LIKE public.planes)"))
        try:
            yield
        finally:
            connection.execute(text("DROP SCHEMA elsewhere CASCADE"))


@pytest.fixture
def world(postgresql: Database, elsewhere: None) -> Iterator[World]:
    """Six flights on PostgreSQL, all of them cached."""
    with flights_world(postgresql) as world:
        world.cache.load(OuterBoard)
        yield world


def models(session: Any) -> set[str | None]:
    """Return the models of the planes, read in all ways, which agree."""
    found = {record.model for record in session.scalars(select(OuterBoard))}
    assert {record.model for record in session.query(OuterBoard)} == found
    assert set(session.scalars(select(OuterBoard.model))) == found
    if isinstance(session, CacheSession):
        assert {record.model for record in session.range(OuterBoard.by_hour)} == found
        assert {session.get(OuterBoard, key).model for key in range(1, 7)} == found
    return found


NONE = {None}
ALL = {None, "A320", "B737"}


# --- settings ran by the session ------------------------------------------------------------------

BY_SQL: dict[str, Callable[[Session], Any]] = {
    "text": lambda s: s.execute(text(ELSEWHERE)),
    "for the session": lambda s: s.execute(text("SET search_path TO elsewhere, public")),
    "driver": lambda s: s.connection().exec_driver_sql(ELSEWHERE),
    "driver with a comment": lambda s: s.connection().exec_driver_sql(f"/* tenant */ {ELSEWHERE}"),
    "function": lambda s: s.execute(
        select(func.set_config("search_path", "elsewhere, public", True))
    ),
    "function in text": lambda s: s.execute(
        text("SELECT set_config('search_path', 'elsewhere, public', true)")
    ),
    "function in a CTE": lambda s: s.execute(
        text("WITH x AS (SELECT set_config('search_path', 'elsewhere, public', true)) TABLE x")
    ),
    "two statements": lambda s: s.connection().exec_driver_sql(f"SELECT 1; {ELSEWHERE}"),
    "anonymous block": lambda s: s.execute(
        text("DO $$ BEGIN PERFORM set_config('search_path', 'elsewhere, public', true); END $$")
    ),
    "function of the application": lambda s: s.execute(select(func.public.go_elsewhere())),
    "procedure of the application": lambda s: s.execute(text("SELECT public.go_elsewhere()")),
    "in a savepoint": lambda s: s.begin_nested() and s.execute(text(ELSEWHERE)),
    "before a savepoint": lambda s: s.execute(text(ELSEWHERE)) and s.begin_nested(),
}


@pytest.fixture
def go_elsewhere(world: World) -> Iterator[None]:
    """A function of the application that sets the search path."""
    with world.database.bystander() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION public.go_elsewhere() RETURNS text LANGUAGE sql AS"
                " $$ SELECT set_config('search_path', 'elsewhere, public', true) $$"
            )
        )
        try:
            yield
        finally:
            connection.execute(text("DROP FUNCTION public.go_elsewhere()"))


@pytest.mark.parametrize("setting", BY_SQL.values(), ids=BY_SQL.keys())
def test_whatever_sets_is_heeded(
    world: World, go_elsewhere: None, setting: Callable[[Session], Any]
):
    """On a connection that ran SET, in whatever disguise, names may mean other tables."""
    for factory in (world.Session, attached(world)):
        with factory() as session:
            setting(session)
            assert models(session) == NONE
            session.connection().invalidate()
        with factory() as session:
            assert models(session) == ALL


def attached(world: World) -> sessionmaker[Session]:
    """Return a factory of plain sessions that the cache is attached to."""
    factory = sessionmaker(world.engine)
    world.cache.attach(factory)
    return factory


def test_a_setting_that_a_savepoint_undid(world: World):
    """After a rollback to a savepoint the database answers as before, and so does the cache."""
    with world.Session() as session:
        savepoint = session.begin_nested()
        session.execute(text(ELSEWHERE))
        assert models(session) == NONE
        savepoint.rollback()
        assert models(session) == ALL


def test_a_setting_stays_with_its_connection(postgresql: Database, elsewhere: None):
    """SET for the session outlives the transaction, and the stay in the pool."""
    with (
        postgresql.lent_engine(pool_size=1, max_overflow=0) as engine,
        TableCache(engine, views=[OuterBoard]) as cache,
    ):
        cache.load(OuterBoard)
        with cache.sessionmaker()() as session:
            session.execute(text("SET search_path TO elsewhere, public"))
            session.commit()
            session.execute(select(Flight.id))
            assert session.scalars(select(OuterBoard)).all() == []
            assert session.last_read.kind == "bypass"
        with cache.sessionmaker()() as session:
            session.execute(select(Flight.id))
            session.scalars(select(OuterBoard)).all()
            assert session.last_read.kind == "bypass"
            session.execute(text("RESET search_path"))
            session.connection().invalidate()
        with cache.sessionmaker()() as session:
            session.execute(select(Flight.id))
            session.scalars(select(OuterBoard)).all()
            assert session.last_read.kind == "hit"


def test_a_raw_connection_may_have_set_anything(postgresql: Database, elsewhere: None):
    """A connection that was lent as a raw one is not trusted afterwards."""
    with (
        postgresql.lent_engine(pool_size=1, max_overflow=0) as engine,
        TableCache(engine, views=[OuterBoard]) as cache,
        flights(engine),
    ):
        cache.load(OuterBoard)
        raw = engine.raw_connection()
        raw.cursor().execute("SET search_path TO elsewhere, public")
        raw.commit()
        raw.close()
        with cache.sessionmaker()() as session:
            session.execute(select(Flight.id))
            assert models(session) == NONE
            session.connection().invalidate()


@contextmanager
def flights(engine: Engine) -> Iterator[None]:
    """Lend the six flights to a database."""
    with engine.begin() as connection:
        insert_flights(connection)
    yield


def test_statements_that_set_nothing_leave_hits(world: World):
    """Text that writes, and DDL, do not keep a connection from the cache once they are done."""
    with world.Session() as session:
        for statement in (
            "INSERT INTO airports (faa, name) VALUES ('EWR', upper('newark'))",
            "UPDATE airports SET name = 'x' WHERE faa IN ('EWR', 'LGA')",
            "DELETE FROM airports WHERE faa = 'EWR'",
            "CREATE TABLE things (id int, name varchar(10))",
            "DROP TABLE things",
            "SELECT count(*) FROM airports",
        ):
            session.execute(text(statement))
        session.commit()
        session.execute(select(Flight.id))
        assert models(session) == ALL
        assert session.last_read.kind == "hit"


@pytest.mark.parametrize("role", ["SET ROLE nobody", "SET SESSION AUTHORIZATION nobody"])
def test_another_role_may_not_see_it(world: World, role: str):
    """What a role must not read, the cache does not tell it."""
    with world.database.bystander() as connection:
        connection.execute(text("CREATE ROLE nobody"))
        try:
            with world.Session() as session:
                session.execute(text(role))
                with pytest.raises(Exception, match="permission denied"):
                    session.scalars(select(OuterBoard)).all()
                session.rollback()
                session.connection().invalidate()
        finally:
            connection.execute(text("DROP ROLE nobody"))


# --- settings by listeners ------------------------------------------------------------------------


def on_after_begin(_session: Any, _transaction: Any, connection: Connection) -> None:
    """Set where a session begins its transaction."""
    connection.execute(text(ELSEWHERE))


def on_begin(connection: Connection) -> None:
    """Set where a connection begins its transaction."""
    connection.exec_driver_sql(ELSEWHERE)


def on_engine_connect(connection: Connection) -> None:
    """Set where a connection is taken."""
    with connection.begin():
        connection.exec_driver_sql("SET search_path TO elsewhere, public")


LISTENERS: dict[str, Any] = {
    "after_begin": on_after_begin,
    "begin": on_begin,
    "engine_connect": on_engine_connect,
}


@pytest.mark.parametrize("first", [False, True], ids=["after the cache", "before the cache"])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("after_begin", "class"),
        ("after_begin", "factory"),
        ("after_begin", "session"),
        ("after_begin", "all sessions"),
        ("begin", "engine"),
        ("engine_connect", "engine"),
        ("begin", "all engines"),
    ],
)
def test_what_listeners_set_counts_in_a_session_that_has_not_begun(
    postgresql: Database, elsewhere: None, name: str, where: str, first: bool
):
    """A hit would run none of them: so there is none, from the first read on."""

    class Own(CacheSession):
        """A class of sessions of the application."""

    listener = LISTENERS[name]
    with postgresql.lent_engine() as engine, flights(engine):
        targets = {
            "class": Own, "all sessions": Session, "engine": engine, "all engines": Engine
        }  # fmt: skip
        target = targets.get(where)
        early = first and target is not None and target is not Engine
        if early:
            event.listen(target, name, listener)
        with TableCache(engine, views=[OuterBoard]) as cache:
            cache.load(OuterBoard)
            factory = cache.sessionmaker(class_=Own)
            session = factory()
            if not early:
                target = target or {"factory": factory, "session": session}[where]
                event.listen(target, name, listener)
            try:
                with session:
                    assert models(session) == NONE
                    assert session.last_read.kind == "bypass"
                    assert name in session.last_read.reason
                with factory() as other:
                    assert models(other) == (ALL if where == "session" else NONE)
            finally:
                event.remove(target, name, listener)


def test_listeners_count_in_attached_sessions(world: World):
    """The same for plain sessions that are attached."""
    factory = attached(world)
    event.listen(factory, "after_begin", on_after_begin)
    with factory() as session:
        assert models(session) == NONE


async def test_listeners_count_in_async_sessions(postgresql: Database, elsewhere: None):
    """The same for async sessions, whose hits are answered without a greenlet."""
    with postgresql.lent_engine() as engine, flights(engine):
        async_engine = postgresql.async_engine()
        async with AsyncTableCache(async_engine, views=[OuterBoard]) as cache:
            await cache.load(OuterBoard)
            factory = cache.sessionmaker()
            async with factory() as session:
                assert {r.model for r in await session.range(OuterBoard.by_hour)} == ALL
            event.listen(factory.kw["sync_session_class"], "after_begin", on_after_begin)
            async with factory() as session:
                assert isinstance(session, AsyncSession)
                for _ in range(2):
                    assert {r.model for r in await session.range(OuterBoard.by_hour)} == NONE
                    assert {r.model for r in await session.scalars(select(OuterBoard))} == NONE
                    assert (await session.get(OuterBoard, 1)).model is None
        await async_engine.dispose()


def test_listeners_that_are_harmless_leave_hits(world: World):
    """A listener that only watches says so."""
    begun = []

    @harmless
    def watch(*_: Any) -> None:
        begun.append(1)

    event.listen(world.Session, "after_begin", watch)
    event.listen(world.engine, "begin", watch)
    with world.Session() as session:
        with counting() as statements:
            assert models(session) == ALL
        assert (statements, begun) == ([], [])
        session.execute(select(Plane.tailnum))
        assert begun == [1, 1]
    event.remove(world.engine, "begin", watch)


def test_a_class_of_sessions_that_sets_when_it_is_made(world: World):
    """What a constructor runs is seen as any statement is."""

    class Elsewhere(CacheSession):
        """A session of another search path."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.execute(text(ELSEWHERE))

    with world.cache.sessionmaker(class_=Elsewhere)() as session:
        assert models(session) == NONE
