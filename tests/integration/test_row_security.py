"""Tables under row-level security, and other DDL that comes after a view was first used."""

from collections.abc import Iterator

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    select,
    text,
)

from sa_tablecache import CachedView, ScoreIndex, TableCache, ViewDefinitionError
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world
from tests.zoo import OuterBoard, Plane


@pytest.fixture
def world(postgresql: Database) -> Iterator[World]:
    """Six flights on PostgreSQL."""
    with flights_world(postgresql) as world:
        yield world


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
        assert all("has no index" in str(problem) for problem in cache.check())
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
