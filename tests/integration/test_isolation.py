"""Transactions for which a snapshot was asked for read from the database, from one snapshot."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, select, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from sa_tablecache import TableCache
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, insert_flights
from tests.zoo import Flight, OuterBoard


@pytest.fixture
def world(postgresql: Database) -> Iterator[World]:
    """Six flights on PostgreSQL, all of them cached."""
    with flights_world(postgresql) as world:
        world.cache.load(OuterBoard)
        yield world


def delays(session: Any) -> set[float | None]:
    """Return the delay of the first flight, read in all ways, which agree."""
    statement = select(OuterBoard).where(OuterBoard.id == 1)
    found = [
        session.get(OuterBoard, 1).delay,
        session.scalars(statement).one().delay,
        session.scalars(select(OuterBoard.delay).where(OuterBoard.id == 1)).one(),
        session.query(OuterBoard).filter(OuterBoard.id == 1).one().delay,
        *(r.delay for r in session.range(OuterBoard.by_hour) if r.id == 1),
    ]
    assert len(found) == 5
    return set(found)


def commit(cache: TableCache, delay: float) -> None:
    """Change the delay of the first flight."""
    with cache.sessionmaker()() as session:
        session.connection(execution_options={"isolation_level": "READ COMMITTED"})
        session.get_one(Flight, 1).delay = delay
        session.commit()


def keeps_its_snapshot(session: Session, cache: TableCache) -> None:
    """Assert that a session whose snapshot is open sees nothing newer, and its successor does."""
    for number in (50.0, 60.0):
        commit(cache, number)
        assert delays(session) == {None}
    session.commit()
    # The next transaction may have asked again, and then reads its own snapshot.
    assert delays(session) == {60.0}


LEVELS = ("REPEATABLE READ", "SERIALIZABLE")

ASKING: dict[str, Callable[[Session, str], Any]] = {
    "connection": lambda s, level: s.connection(execution_options={"isolation_level": level}),
    "SET TRANSACTION": lambda s, level: s.execute(text(f"SET TRANSACTION ISOLATION LEVEL {level}")),
    "setting": lambda s, level: (
        s.execute(text(f"SET default_transaction_isolation = '{level.lower()}'")),
        s.commit(),
    ),
    "function": lambda s, level: (
        s.execute(text(f"SELECT set_config('default_transaction_isolation', '{level}', false)")),
        s.commit(),
    ),
    "SESSION CHARACTERISTICS": lambda s, level: (
        s.execute(text(f"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {level}")),
        s.commit(),
    ),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING.keys())
def test_a_session_that_asks(postgresql: Database, ask: Callable[[Session, str], Any], level: str):
    """By an option or by SQL, a transaction with a snapshot keeps to it."""
    with (
        postgresql.lent_engine(pool_size=1, max_overflow=0) as engine,
        postgresql.lent_engine() as other,
        TableCache(engine, views=[OuterBoard]) as cache,
        TableCache(other) as writing,
    ):
        cache.attach(other)
        with other.begin() as connection:
            insert_flights(connection)
        cache.load(OuterBoard)
        with cache.sessionmaker()() as session:
            ask(session, level)
            session.execute(select(Flight.id))
            keeps_its_snapshot(session, writing)
            session.connection().invalidate()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("where", ["engine", "option engine", "session's engine", "outer"])
def test_an_engine_that_asks(world: World, level: str, where: str):
    """The level of an engine counts for the cache's own, for an option of it, and for a joined
    connection.
    """
    option = world.engine.execution_options(isolation_level=level)
    own = world.database.engine(isolation_level=level)
    engine = {"engine": own, "option engine": option}.get(where, world.engine)
    with TableCache(engine, views=[OuterBoard]) as cache:
        cache.attach(world.engine)
        cache.load(OuterBoard)
        if where == "outer":
            with option.connect() as connection, connection.begin():
                connection.execute(select(Flight.id))
                with cache.sessionmaker(bind=connection)() as session:
                    for number in (50.0, 60.0):
                        commit(world.cache, number)
                        assert delays(session) == {None}
            return
        options = {"bind": option} if where == "session's engine" else {}
        with cache.sessionmaker(**options)() as session:
            session.execute(select(Flight.id))
            keeps_its_snapshot(session, world.cache)
    own.dispose()


@pytest.mark.parametrize("who", ["database", "role", "role in the database", "server"])
def test_a_default_of_the_server_asks(postgres_url: URL, who: str):
    """A default of the database or of the role was set by somebody who meant it."""
    Database(postgres_url).create()
    name = postgres_url.database
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    role = f"isolated_{name}"
    setting = "default_transaction_isolation"
    with admin.connect() as connection:

        def run(*statements: str) -> None:
            for statement in statements:
                connection.execute(text(statement))

        run(f"CREATE ROLE {role} LOGIN SUPERUSER")
        target = {
            "database": f"DATABASE {name}",
            "role": f"ROLE {role}",
            "role in the database": f"ROLE {role} IN DATABASE {name}",
            "server": "SYSTEM",
        }[who]
        try:
            run(f"ALTER {target} SET {setting} TO 'repeatable read'", "SELECT pg_reload_conf()")
            database = Database(postgres_url.set(username=role))
            for _ in range(100):
                with database.bystander() as probe:
                    if probe.scalar(text(f"SHOW {setting}")) == "repeatable read":
                        break
            else:
                pytest.fail("the server does not heed its setting")
            with flights_world(database) as world:
                world.cache.load(OuterBoard)
                with world.Session() as session:
                    session.execute(select(Flight.id))
                    keeps_its_snapshot(session, world.cache)
        finally:
            run(f"ALTER {target} RESET {setting}", "SELECT pg_reload_conf()")
            run(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_a_level_that_is_no_snapshot_leaves_hits(world: World):
    """READ COMMITTED, asked for or not, sees each commit, and the cache answers."""
    for ask in (
        lambda session: session.connection(execution_options={"isolation_level": "READ COMMITTED"}),
        lambda session: session.execute(select(Flight.id)),
    ):
        with world.Session() as session:
            ask(session)
            commit(world.cache, 50.0)
            assert delays(session) == {50.0}
            assert session.last_read.kind == "hit"


def test_a_transaction_on_sqlite_keeps_what_it_has_read(sqlite: Database):
    """There a snapshot is the default: one that was open before the commit is left as it is."""
    with sqlite.lent_engine() as engine, engine.connect() as pragma:
        pragma.exec_driver_sql("PRAGMA journal_mode = WAL")
        pragma.commit()
        with engine.begin() as connection:
            insert_flights(connection)
        with TableCache(engine, views=[OuterBoard]) as cache:
            cache.load(OuterBoard)
            with cache.sessionmaker()() as session, cache.sessionmaker()() as fresh:
                session.connection().exec_driver_sql("BEGIN")
                session.execute(select(Flight.id)).all()
                assert delays(session) == {None}
                with cache.sessionmaker()() as writer:
                    writer.get_one(Flight, 1).delay = 50.0
                    writer.commit()
                assert delays(session) == {None}
                assert delays(fresh) == {50.0}
                session.rollback()
                assert delays(session) == {50.0}
