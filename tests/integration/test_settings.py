"""What a session's connection was told, by whomever: the tenant, the role, the search path."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from sa_tablecache import (
    AsyncTableCache,
    CachedView,
    CacheSession,
    ScoreIndex,
    TableCache,
    ViewDefinitionError,
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
            "CREATE TEMPORARY TABLE things (id int, name varchar(10))",
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


# --- row-level security ---------------------------------------------------------------------------


class Seats(CachedView):
    """A view over a table that may come under row-level security."""

    __select__ = select(Plane.tailnum, Plane.model, Plane.year)
    by_year = ScoreIndex("year")


class PublicSeats(CachedView):
    """The same, which everybody may see."""

    __select__ = select(Plane.tailnum, Plane.model)
    __row_security__ = "ignore"
    by_tailnum = ScoreIndex("tailnum")


@pytest.fixture
def reader(world: World) -> Iterator[Engine]:
    """An engine of a role that may see the planes after 2000 only, once the policy applies."""
    with world.database.bystander() as connection:
        for statement in (
            "CREATE ROLE reader LOGIN",
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader",
            "CREATE POLICY recent ON planes USING (year > 2000)",
        ):
            connection.execute(text(statement))
        engine = create_engine(world.database.url.set(username="reader"))
        try:
            yield engine
        finally:
            engine.dispose()
            for statement in (
                "DROP POLICY recent ON planes",
                "ALTER TABLE planes DISABLE ROW LEVEL SECURITY",
                "ALTER TABLE planes NO FORCE ROW LEVEL SECURITY",
                "REVOKE ALL ON ALL TABLES IN SCHEMA public FROM reader",
                "DROP ROLE reader",
            ):
                connection.execute(text(statement))


def enable(engine: Engine, *, force: bool = False) -> None:
    """Put the planes under row-level security."""
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE planes ENABLE ROW LEVEL SECURITY"))
        if force:
            connection.execute(text("ALTER TABLE planes FORCE ROW LEVEL SECURITY"))


@pytest.mark.parametrize("force", [False, True])
def test_row_security_is_refused_of_every_table(world: World, reader: Engine, force: bool):
    """A joined table counts as the first one does, forced or not, whoever loads."""
    enable(world.engine, force=force)
    with TableCache(world.engine, views=[Seats, OuterBoard, PublicSeats]) as cache:
        for view in (Seats, OuterBoard):
            with pytest.raises(ViewDefinitionError, match="planes is under row-level security"):
                cache.load(view)
        cache.load(PublicSeats)
        with cache.sessionmaker()() as session:
            assert len(session.range(PublicSeats.by_tailnum)) == 3
            assert session.last_read.kind == "hit"


@pytest.mark.parametrize("force", [False, True])
def test_row_security_that_comes_later(world: World, reader: Engine, force: bool):
    """From the ALTER TABLE on, the database answers, for the role that asks."""
    admin = create_engine(world.database.url)
    for own in (world.engine, reader):
        with TableCache(own, views=[Seats], load_engine=world.engine) as cache:
            cache.attach(admin)
            cache.load(Seats)
            with cache.sessionmaker()() as session:
                assert len(session.scalars(select(Seats)).all()) == 3
            enable(admin, force=force)
            with cache.sessionmaker()() as session:
                expected = ["N2"] if own is reader else ["N1", "N2", "N3"]
                for _ in range(2):
                    found = session.scalars(select(Seats)).all()
                    assert sorted(r.tailnum for r in found) == expected
                    assert sorted(r.tailnum for r in session.range(Seats.by_year)) == expected
                    assert (session.get(Seats, "N1") is None) == (own is reader)
                    assert session.last_read.kind in ("bypass", "miss")
                assert session.query(Seats).count() == len(expected)
            with pytest.raises(ViewDefinitionError, match="row-level security"):
                cache.load(Seats)
            with pytest.raises(ViewDefinitionError, match="row-level security"):
                cache.refresh(Seats)
            with admin.begin() as connection:
                connection.execute(text("ALTER TABLE planes DISABLE ROW LEVEL SECURITY"))
            with cache.sessionmaker()() as session:
                assert len(session.scalars(select(Seats)).all()) == 3
                assert session.last_read.kind == "hit"
    admin.dispose()


def test_row_security_that_comes_before_the_first_load(world: World, reader: Engine):
    """It is seen although the catalog was asked before."""
    with TableCache(world.engine, views=[Seats]) as cache:
        assert cache.check() == []
        enable(world.engine)
        with pytest.raises(ViewDefinitionError, match="row-level security"):
            cache.load(Seats)


def test_a_partition_that_comes_later(postgresql: Database):
    """After DDL a new partition is known; its own row security does not concern its parent."""
    engine = postgresql.engine()
    whole = Table("events", MetaData(), Column("id", Integer, primary_key=True))
    part = Table("events_2", MetaData(), Column("id", Integer, primary_key=True))

    class Events(CachedView):
        __select__ = select(whole.c.id)

    def run(*statements: str) -> None:
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    run(
        "CREATE TABLE events (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (100)",
    )
    try:
        with TableCache(engine, views=[Events]) as cache, cache.sessionmaker()() as session:
            cache.load(Events)
            run("CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (100) TO (200)")
            assert session.scalars(select(Events)).all() == []
            for number in (100, 101):
                with engine.begin() as connection:
                    connection.execute(insert(part).values(id=number))
                assert len(session.scalars(select(Events)).all()) == number - 99
            run("ALTER TABLE events_2 ENABLE ROW LEVEL SECURITY")
            run("ALTER TABLE events_2 FORCE ROW LEVEL SECURITY")
            assert len(session.scalars(select(Events)).all()) == 2
    finally:
        run("DROP TABLE events")
        engine.dispose()


def test_a_column_that_is_stored_otherwise_later(postgresql: Database):
    """After DDL that changes how text compares, the database answers."""
    engine = postgresql.engine()
    words = Table(
        "words", MetaData(), Column("id", Integer, primary_key=True), Column("word", String)
    )

    class Words(CachedView):
        __select__ = select(words.c.id, words.c.word)
        by_word = ScoreIndex("word")

    def run(*statements: str) -> None:
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    run("CREATE TABLE words (id int PRIMARY KEY, word text)", "INSERT INTO words VALUES (1, 'a')")
    try:
        with TableCache(engine, views=[Words]) as cache, cache.sessionmaker()() as session:
            cache.load(Words)
            assert len(session.scalars(select(Words).where(Words.word == "a ")).all()) == 0
            run("ALTER TABLE words ALTER word TYPE char(3)")
            found = session.scalars(select(Words).where(Words.word == "a ")).all()
            assert [record.word for record in found] == ["a  "]
            with pytest.raises(ViewDefinitionError, match="stored otherwise"):
                cache.load(Words)
    finally:
        run("DROP TABLE words")
        engine.dispose()
