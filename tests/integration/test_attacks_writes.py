"""Ways of writing that could leave a wrong answer behind, each of which once did."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import (
    ARRAY,
    URL,
    Column,
    DateTime,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sa_tablecache import CachedView, ScoreIndex, TableCache


class Base(DeclarativeBase):
    """Models of these tests."""


class City(Base):
    """A row with a second unique column."""

    __tablename__ = "aw_city"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(unique=True)
    size: Mapped[int] = mapped_column(default=0)


class Country(Base):
    """A row whose key others follow."""

    __tablename__ = "aw_country"
    code: Mapped[str] = mapped_column(String(10), primary_key=True)
    label: Mapped[str | None]


class Region(Base):
    """A row that follows the key of another."""

    __tablename__ = "aw_region"
    id: Mapped[int] = mapped_column(primary_key=True)
    country: Mapped[str | None] = mapped_column(ForeignKey(Country.code, onupdate="CASCADE"))


class Cities(CachedView):
    """One table."""

    __select__ = select(City.id, City.name, City.size)
    by_size = ScoreIndex("size")


class Regions(CachedView):
    """The table whose foreign key the database changes."""

    __select__ = select(Region.id, Region.country)


class Countries(CachedView):
    """A table with text as its key."""

    __select__ = select(Country.code, Country.label)


Engines = Callable[[URL], Engine]


@pytest.fixture
def engines() -> Iterator[Engines]:
    """What makes engines, and disposes of them when the test is over."""
    with ExitStack() as stack:

        def make(url: URL) -> Engine:
            engine = create_engine(url)
            stack.callback(engine.dispose)
            return engine

        yield make


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """A database with a few rows."""
    engine = create_engine(database_url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda c, _: c.execute("PRAGMA foreign_keys=ON"))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([City(id=n, name=f"n{n}", size=n) for n in range(1, 6)])
        session.add_all([Country(code="A"), Country(code="B")])
        session.flush()
        session.add_all([Region(id=1, country="A"), Region(id=2, country="B")])
        session.commit()
    yield engine
    engine.dispose()


def agrees(cache: TableCache, view: Any) -> None:
    """Assert that cache and database say the same about all of a view."""
    with cache.engine.connect() as connection:
        truth = sorted(map(tuple, connection.execute(select(view))), key=repr)
    with cache.sessionmaker()() as session:
        found = session.scalars(select(view)).all()
        assert session.last_read.kind == "hit", session.last_read
    assert sorted((tuple(r._asdict().values()) for r in found), key=repr) == truth
    cache._check()


def upsert(engine: Engine) -> Any:
    """Return the ``insert`` of a dialect."""
    return (sqlite if engine.dialect.name == "sqlite" else postgresql).insert


def test_an_upsert_that_changes_the_key(engine: Engine) -> None:
    """The record under the old key is gone."""
    with TableCache(engine, views=[Cities]) as cache:
        cache.load(Cities)
        statement = upsert(engine)(City).values(id=99, name="n3", size=7)
        statement = statement.on_conflict_do_update(index_elements=["name"], set_={"id": 99})
        with engine.begin() as connection:
            connection.execute(statement)
        agrees(cache, Cities)


@pytest.mark.parametrize("returning", [False, True])
def test_an_update_of_the_key_that_returns_it(engine: Engine, returning: bool) -> None:
    """It returns the new key, and the old one is gone."""
    with TableCache(engine, views=[Cities]) as cache:
        cache.load(Cities)
        statement = update(City).where(City.name == "n3").values(id=City.id + 100)
        if returning:
            with engine.begin() as connection:
                connection.execute(statement.returning(City.id)).all()
        else:
            with Session(engine) as session:
                session.execute(statement, execution_options={"synchronize_session": "fetch"})
                session.commit()
        agrees(cache, Cities)


def test_text_that_updates_a_key_that_others_follow(engine: Engine) -> None:
    """ON UPDATE CASCADE changes the tables that refer to it."""
    with TableCache(engine, views=[Regions]) as cache:
        cache.load(Regions)
        with engine.begin() as connection:
            connection.execute(text("UPDATE aw_country SET code = 'Z' WHERE code = 'A'"))
        agrees(cache, Regions)


def test_a_cte_that_updates_a_key_that_others_follow(engines: Engines, postgres_url: URL) -> None:
    """ON UPDATE CASCADE changes the tables that refer to it."""
    engine = engines(postgres_url)
    Base.metadata.create_all(engine)
    with engine.begin() as c:
        c.execute(insert(Country), [{"code": "A"}])
        c.execute(insert(Region), [{"id": 1, "country": "A"}])
    with TableCache(engine, views=[Regions]) as cache:
        cache.load(Regions)
        cte = update(Country).values(code="Z").returning(Country.code).cte()
        with engine.begin() as connection:
            connection.execute(select(cte)).all()
        agrees(cache, Regions)


def test_update_or_replace(engines: Engines, sqlite_url: URL) -> None:
    """It deletes the row that is in its way."""
    engine = engines(sqlite_url)
    Base.metadata.create_all(engine)
    with engine.begin() as c:
        c.execute(insert(City), [{"id": n, "name": f"n{n}", "size": n} for n in range(1, 6)])
    with TableCache(engine, views=[Cities]) as cache:
        cache.load(Cities)
        with engine.begin() as connection:
            connection.execute(
                update(City).prefix_with("OR REPLACE").where(City.id == 1).values(name="n2")
            )
        agrees(cache, Cities)


def test_a_constraint_that_replaces(engines: Engines, sqlite_url: URL) -> None:
    """An UPDATE deletes the row that is in its way."""
    metadata = MetaData()
    t = Table(
        "t",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("n", Integer),
        UniqueConstraint("n", sqlite_on_conflict="REPLACE"),
    )

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.id, t.c.n)

    engine = engines(sqlite_url)
    metadata.create_all(engine)
    with engine.begin() as c:
        c.execute(insert(t), [{"id": n, "n": n} for n in range(1, 6)])
    with TableCache(engine, views=[V]) as cache:
        cache.load(V)
        with engine.begin() as connection:
            connection.execute(update(t).where(t.c.id == 1).values(n=2))
        agrees(cache, V)


def test_a_trigger_that_redirects_an_insert(engines: Engines, postgres_url: URL) -> None:
    """The statement counts no row, and yet there is one: old style partitions."""
    metadata = MetaData()
    t = Table("t", metadata, Column("id", Integer, primary_key=True), Column("n", Integer))

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.id, t.c.n)

    engine = engines(postgres_url)
    metadata.create_all(engine)
    with engine.begin() as c:
        c.exec_driver_sql("CREATE TABLE t1 () INHERITS (t)")
        c.exec_driver_sql(
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN INSERT INTO t1 VALUES (NEW.id, NEW.n); RETURN NULL; END $$"
        )
        c.exec_driver_sql("CREATE TRIGGER x BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()")
    with TableCache(engine, views=[V]) as cache:
        cache.load(V)
        with engine.begin() as connection:
            connection.execute(insert(t).values(id=1, n=2))
        agrees(cache, V)


def test_a_statement_trigger_fires_for_no_row(engines: Engines, postgres_url: URL) -> None:
    """It writes all the same what the application said that it writes."""
    metadata = MetaData()
    t = Table("t", metadata, Column("id", Integer, primary_key=True), Column("n", Integer))
    u = Table("u", metadata, Column("id", Integer, primary_key=True), Column("n", Integer))

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.id, t.c.n)

    engine = engines(postgres_url)
    metadata.create_all(engine)
    with engine.begin() as c:
        c.execute(insert(t).values(id=1, n=2))
        c.exec_driver_sql(
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN UPDATE t SET n = n + 1; RETURN NULL; END $$"
        )
        c.exec_driver_sql(
            "CREATE TRIGGER x AFTER UPDATE ON u FOR EACH STATEMENT EXECUTE FUNCTION f()"
        )
    with TableCache(engine, views=[V]) as cache:
        cache.side_effects(u, writes=[t])
        cache.load(V)
        with engine.begin() as connection:
            connection.execute(update(u).values(n=2))
        agrees(cache, V)


def test_a_rule_does_not_mind(engines: Engines, postgres_url: URL) -> None:
    """A rule that softens a DELETE has no RETURNING to give."""
    metadata = MetaData()
    t = Table("t", metadata, Column("id", Integer, primary_key=True), Column("n", Integer))

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.id, t.c.n)

    engine = engines(postgres_url)
    metadata.create_all(engine)
    with engine.begin() as c:
        c.execute(insert(t), [{"id": 1, "n": 2}])
        c.exec_driver_sql(
            "CREATE RULE soft AS ON DELETE TO t DO INSTEAD UPDATE t SET n = -1 WHERE id = OLD.id"
        )
    with TableCache(engine, views=[V]) as cache:
        cache.load(V)
        with engine.begin() as connection:
            connection.execute(delete(t).where(t.c.n == 2))
        agrees(cache, V)
        with engine.begin() as connection:
            connection.execute(update(t).where(t.c.id == 1).values(n=5))
        with engine.begin() as connection:
            connection.execute(delete(t).where(t.c.id == 1))
        agrees(cache, V)


def test_schema_translate_map_of_one_statement(engines: Engines, postgres_url: URL) -> None:
    """The table that was written is the translated one."""
    metadata = MetaData()
    t = Table(
        "t",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("n", Integer),
        schema="tenant",
    )
    plain = Table(
        "t", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer), schema="any"
    )

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.id, t.c.n)

    engine = engines(postgres_url)
    with engine.begin() as c:
        c.exec_driver_sql("CREATE SCHEMA tenant")
    metadata.create_all(engine)
    with TableCache(engine, views=[V]) as cache:
        cache.load(V)
        with engine.begin() as connection:
            connection.execute(
                insert(plain).values(id=1, n=1),
                execution_options={"schema_translate_map": {"any": "tenant"}},
            )
        agrees(cache, V)


def test_another_table_object_with_other_column_keys(engine: Engine) -> None:
    """Columns are the database's, whatever models call them."""
    t = Table(
        "k", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer, key="number")
    )
    u = Table("k", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer))

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.id, t.c.number)

    t.create(engine)
    with engine.begin() as c:
        c.execute(insert(u), [{"id": 1, "n": 2}])
    with TableCache(engine, views=[V]) as cache:
        cache.load(V)
        with engine.begin() as connection:
            connection.execute(update(u).where(u.c.id == 1).values(n=5))
        agrees(cache, V)


def test_another_table_object_with_another_key(engine: Engine) -> None:
    """A key is a key of the view's table, in its order."""
    t = Table(
        "k",
        MetaData(),
        Column("a", Integer, primary_key=True),
        Column("b", Integer, primary_key=True),
        Column("n", Integer),
    )
    u = Table(
        "k",
        MetaData(),
        Column("b", Integer, primary_key=True),
        Column("a", Integer, primary_key=True),
        Column("n", Integer),
    )

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.a, t.c.b, t.c.n)

    t.create(engine)
    with engine.begin() as c:
        c.execute(insert(u), [{"a": 1, "b": 2, "n": 3}])
    with TableCache(engine, views=[V]) as cache:
        cache.load(V)
        with engine.begin() as connection:
            connection.execute(update(u).where(u.c.a == 1, u.c.b == 2).values(n=5))
        agrees(cache, V)


def test_the_driver_commits_by_itself(engine: Engine) -> None:
    """A COMMIT that the application sends through the driver ends the transaction."""
    with TableCache(engine, views=[Cities]) as cache:
        cache.load(Cities)
        with engine.connect() as connection:
            connection.execute(update(City).where(City.id == 1).values(size=50))
            connection.connection.driver_connection.commit()
        agrees(cache, Cities)


def test_a_cursor_of_the_driver(engine: Engine) -> None:
    """What a cursor of a connection writes is committed with it."""
    with TableCache(engine, views=[Cities]) as cache:
        cache.load(Cities)
        with engine.begin() as connection:
            cursor = connection.connection.cursor()
            cursor.execute("UPDATE aw_city SET size = 50 WHERE id = 1")
            cursor.close()
        agrees(cache, Cities)


def test_a_detached_raw_connection(engine: Engine) -> None:
    """It writes unseen, too."""
    with TableCache(engine, views=[Cities]) as cache:
        cache.load(Cities)
        raw = engine.raw_connection()
        raw.detach()
        raw.cursor().execute("UPDATE aw_city SET size = 50 WHERE id = 1")
        raw.commit()
        raw.close()
        agrees(cache, Cities)


def test_a_key_that_is_an_array(engines: Engines, postgres_url: URL) -> None:
    """A statement that returns such keys is not disturbed."""
    metadata = MetaData()
    t = Table("t", metadata, Column("id", ARRAY(Integer), primary_key=True), Column("n", Integer))
    engine = engines(postgres_url)
    metadata.create_all(engine)
    with TableCache(engine, views=[Cities]), engine.begin() as connection:
        connection.execute(insert(t).values(id=[1], n=1).returning(t.c.id)).all()
        connection.execute(update(t).values(n=2).returning(t.c.id)).all()


def test_a_key_that_the_database_rounds(engines: Engines, postgres_url: URL) -> None:
    """A timestamp without fractions is stored as another than was given; so is long text."""
    metadata = MetaData()
    t = Table("t", metadata, Column("at", postgresql.TIMESTAMP(precision=0), primary_key=True))
    s = Table("s", metadata, Column("code", String(3), primary_key=True))

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.at)

    class S(CachedView):
        """Another."""

        __select__ = select(s.c.code)

    engine = engines(postgres_url)
    metadata.create_all(engine)
    with TableCache(engine, views=[V, S]) as cache:
        cache.load(V)
        cache.load(S)
        with engine.begin() as connection:
            connection.execute(insert(t).values(at=datetime(2020, 1, 1, 0, 0, 0, 400000)))
            connection.execute(insert(s).values(code="abc   "))
        agrees(cache, V)
        agrees(cache, S)


def test_a_key_with_a_zone_that_is_not_stored(engines: Engines, sqlite_url: URL) -> None:
    """SQLite drops the zone."""
    metadata = MetaData()
    t = Table(
        "t", metadata, Column("at", DateTime(timezone=True), primary_key=True), Column("n", Integer)
    )

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.at, t.c.n)

    engine = engines(sqlite_url)
    metadata.create_all(engine)
    zone = timezone(timedelta(hours=2))
    with engine.begin() as connection:
        connection.execute(insert(t), [{"at": datetime(2020, 1, 1, 12, tzinfo=zone), "n": 1}])
    with TableCache(engine, views=[V]) as cache:
        cache.load(V)
        with engine.begin() as connection:
            connection.execute(
                update(t).where(t.c.at == datetime(2020, 1, 1, 12, tzinfo=zone)).values(n=2)
            )
        agrees(cache, V)
        with engine.begin() as connection:
            connection.execute(insert(t), [{"at": datetime(2020, 1, 2, 12, tzinfo=zone), "n": 1}])
        agrees(cache, V)


def test_a_trigger_that_normalises_a_key(engines: Engines, postgres_url: URL) -> None:
    """The row that was inserted has another key than was given."""
    engine = engines(postgres_url)
    Base.metadata.create_all(engine)
    with engine.begin() as c:
        c.exec_driver_sql(
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN NEW.code := upper(NEW.code); RETURN NEW; END $$"
        )
        c.exec_driver_sql(
            "CREATE TRIGGER x BEFORE INSERT ON aw_country FOR EACH ROW EXECUTE FUNCTION f()"
        )
    with TableCache(engine, views=[Countries]) as cache:
        cache.load(Countries)
        with engine.begin() as connection:
            connection.execute(insert(Country).values(code="a", label="x"))
        agrees(cache, Countries)


def test_a_listener_that_adds_a_comment(engine: Engine) -> None:
    """A comment up to the end of the line does not hide RETURNING."""

    def comment(_c, _cur, statement, parameters, _ctx, _many):
        return statement + " -- by the application", parameters

    event.listen(engine, "before_cursor_execute", comment, retval=True)
    with TableCache(engine, views=[Cities]) as cache:
        cache.load(Cities)
        with engine.begin() as connection:
            connection.execute(insert(City).values([{"id": 70, "name": "x", "size": 1}]))
        agrees(cache, Cities)


def test_a_table_with_the_default_schema_by_name(engines: Engines, postgres_url: URL) -> None:
    """A table is the same with and without the name of the default schema."""
    metadata = MetaData()
    t = Table(
        "t",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("n", Integer),
        schema="public",
    )
    u = Table("t", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer))

    class V(CachedView):
        """One table."""

        __select__ = select(t.c.id, t.c.n)

    class W(CachedView):
        """The same table."""

        __select__ = select(u.c.id, u.c.n)

    engine = engines(postgres_url)
    metadata.create_all(engine)
    with TableCache(engine, views=[V, W]) as cache:
        for number, table in enumerate([t, u, t, u]):
            cache.load(V)
            cache.load(W)
            with engine.begin() as connection:
                connection.execute(insert(table).values(id=number, n=1))
            agrees(cache, V)
            agrees(cache, W)


def test_marks_that_nobody_reads_are_bounded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With very many of them one mark of the whole view takes their place."""
    monkeypatch.setattr("sa_tablecache.freshness.MOST_PENDING", 20)
    with TableCache(engine, views=[Cities]) as cache:
        cache.load(Cities)
        for number in range(100, 200):
            with engine.begin() as connection:
                connection.execute(insert(City).values(id=number, size=1))
        assert cache.stats(Cities).pending_marks <= 20
        agrees(cache, Cities)


def test_a_forgotten_connection_that_is_collected_inside_a_critical_section(
    sqlite_url: URL,
) -> None:
    """Its return to the pool marks everything, and does not wait for the thread that it is in."""
    engine = create_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with TableCache(engine, views=[Cities]) as cache:
        cache.load(Cities)
        table = cache.table(Cities)
        raw = engine.raw_connection()
        cycle: list[Any] = [raw]
        cycle.append(cycle)
        del raw, cycle

        def collect() -> None:
            with table._lock:
                gc.collect()

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it waits for itself"
        assert cache.stats(Cities).pending_marks == 1
    engine.dispose()
