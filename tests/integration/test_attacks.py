"""Ways in which a cached answer could have been wrong, each of which once was."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Column,
    DateTime,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sa_tablecache import AsyncTableCache, CachedView, ScoreIndex, TableCache
from tests.conftest import asynchronous


class Base(DeclarativeBase):
    """Models of these tests."""


class A(Base):
    """A row at the start of a chain of joins."""

    __tablename__ = "attack_a"
    id: Mapped[int] = mapped_column(primary_key=True)
    x: Mapped[int | None]


class B(Base):
    """A row that an outer join may not find."""

    __tablename__ = "attack_b"
    id: Mapped[int] = mapped_column(primary_key=True)
    a_id: Mapped[int | None] = mapped_column(ForeignKey(A.id))
    x: Mapped[int | None]


class C(Base):
    """A row joined by what the outer join found or not."""

    __tablename__ = "attack_c"
    id: Mapped[int] = mapped_column(primary_key=True)
    x: Mapped[int | None]


class Rows(CachedView):
    """One table."""

    __select__ = select(A.id, A.x)
    by_x = ScoreIndex("x")


class Chain(CachedView):
    """An inner join whose condition a NULL-extended row can meet."""

    __select__ = (
        select(A.id, B.id.label("b"), C.id.label("c"))
        .select_from(A)
        .outerjoin(B, B.a_id == A.id)
        .join(C, C.x == func.coalesce(B.x, 0))
    )
    __primary_key__ = ("id", "b", "c")


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """A database with a few rows."""
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([A(id=1, x=5), A(id=2, x=None), C(id=1, x=0)])
        session.flush()
        session.add(B(id=1, a_id=1, x=99))
        session.commit()
    yield engine
    engine.dispose()


def agrees(cache: TableCache, view: Any) -> None:
    """Assert that cache and database say the same about all of a view."""
    key = view.__plan__.key_of
    with cache.engine.connect() as connection:
        truth = sorted(map(tuple, connection.execute(select(view))), key=repr)
    with cache.sessionmaker()() as session:
        found = session.scalars(select(view)).all()
    assert sorted((tuple(r._asdict().values()) for r in found), key=repr) == truth
    assert len({key(r) for r in found}) == len(found)
    cache._check()


def test_a_null_extended_row_that_an_inner_join_lets_through(engine: Engine) -> None:
    """It takes the place of a row that the join had dropped, which is gone now."""
    with TableCache(engine, views=[Chain]) as cache:
        cache.load(Chain)
        agrees(cache, Chain)
        with engine.begin() as connection:
            connection.execute(delete(B))
        agrees(cache, Chain)


def test_coverage_by_the_primary_key_survives_a_refresh(engine: Engine) -> None:
    """A bound of a whole key is between the keys, and does not cut off the key itself."""
    with TableCache(engine, views=[Rows]) as cache:
        cache.load(Rows, Rows.id >= 1)
        with engine.begin() as connection:
            connection.execute(update(A).where(A.id == 1).values(x=6))
        with cache.sessionmaker()() as session:
            assert [r.x for r in session.scalars(select(Rows).where(Rows.id == 1))] == [6]
        cache._check()


def test_a_transaction_by_hand_in_autocommit(engine: Engine) -> None:
    """BEGIN and COMMIT sent as text are noticed when they commit."""
    with TableCache(engine, views=[Rows]) as cache:
        cache.load(Rows)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("BEGIN"))
            connection.execute(update(A).where(A.id == 1).values(x=7))
            agrees_old = cache.sessionmaker()
            with agrees_old() as session:
                assert session.range(Rows.by_x, ge=1)[0].x == 5
            connection.execute(text("COMMIT"))
        agrees(cache, Rows)


def test_a_transaction_that_began_before_the_cache(engine: Engine) -> None:
    """What it wrote unseen marks everything when it commits."""
    with engine.connect() as connection:
        connection.execute(update(A).where(A.id == 1).values(x=8))
        with TableCache(engine, views=[Rows]) as cache:
            cache.load(Rows)
            connection.commit()
            agrees(cache, Rows)


def test_a_literal_column_may_call_what_writes(engine: Engine) -> None:
    """A SELECT of something opaque counts as writing anything."""
    with TableCache(engine, views=[Rows]) as cache:
        cache.load(Rows)
        name = "upper('x')" if engine.dialect.name == "sqlite" else "pg_notify('a', 'b')"
        with engine.begin() as connection:
            connection.execute(select(literal_column(name)))
        marks = cache.stats(Rows).pending_marks
        assert marks == (0 if engine.dialect.name == "sqlite" else 1)


def test_filters_of_the_application_are_heard(engine: Engine) -> None:
    """A listener that may add criteria has the database answer."""
    with TableCache(engine, views=[Rows]) as cache:
        cache.load(Rows)
        factory = cache.sessionmaker()

        @event.listens_for(factory, "do_orm_execute")
        def only_one(state: Any) -> None:
            state.statement = state.statement.where(Rows.id == 1)

        with factory() as session:
            assert [r.id for r in session.scalars(select(Rows))] == [1]
            assert [r.id for r in session.range(Rows.by_x)] == [1]
            assert session.get(Rows, 2) is None


def test_the_bind_of_a_call(engine: Engine, tmp_path: Any) -> None:
    """A read that names another engine is answered by that one."""
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    Base.metadata.create_all(other)
    with TableCache(engine, views=[Rows]) as cache, cache.sessionmaker()() as session:
        cache.load(Rows)
        found = session.scalars(select(Rows), bind_arguments={"bind": other}).all()
        assert found == []
    other.dispose()


def test_a_session_attached_in_the_middle_of_its_transaction(engine: Engine) -> None:
    """It sees what it has written."""
    with TableCache(engine, views=[Rows]) as cache, Session(engine) as session:
        cache.load(Rows)
        session.execute(insert(A).values(id=3, x=1))
        cache.attach(session)
        assert [r.id for r in session.scalars(select(Rows).where(Rows.id == 3))] == [3]


def test_a_table_under_two_names(engine: Engine) -> None:
    """With the default schema said or not, a table is the same."""
    default = engine.dialect.default_schema_name
    same = Table("attack_a", MetaData(), Column("id", Integer, primary_key=True),
                 Column("x", Integer), schema=default)  # fmt: skip
    with TableCache(engine, views=[Rows]) as cache:
        cache.load(Rows)
        with engine.begin() as connection:
            connection.execute(update(same).where(same.c.id == 1).values(x=11))
        agrees(cache, Rows)


def test_a_partition_is_written(postgres_url: URL) -> None:
    """Writes to a partition, or through a view, change the table that a view selects."""
    engine = create_engine(postgres_url)
    metadata = MetaData()
    whole = Table("whole", metadata, Column("id", Integer, primary_key=True), Column("x", Integer))
    part = Table("part", metadata, Column("id", Integer, primary_key=True), Column("x", Integer))
    window = Table("window_on", metadata, Column("id", Integer, primary_key=True),
                   Column("x", Integer))  # fmt: skip
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE whole (id int PRIMARY KEY, x int) PARTITION BY RANGE (id)")
        )
        connection.execute(
            text("CREATE TABLE part PARTITION OF whole FOR VALUES FROM (0) TO (100)")
        )
        connection.execute(text("CREATE VIEW window_on AS SELECT id, x FROM whole"))
        connection.execute(insert(whole).values(id=1, x=1))

    class Partitioned(CachedView):
        __select__ = select(whole.c.id, whole.c.x)

    with TableCache(engine, views=[Partitioned]) as cache:
        cache.load(Partitioned)
        for table in (part, window):
            with engine.begin() as connection:
                connection.execute(update(table).values(x=table.c.x + 1))
            agrees(cache, Partitioned)
    engine.dispose()


@pytest.mark.parametrize(
    "written",
    [
        "INSERT INTO whole VALUES (11, 1)",
        "UPDATE whole SET x = x + 1",
        "DELETE FROM whole WHERE id = 1",
        "TRUNCATE whole",
        "INSERT INTO middle VALUES (12, 1)",
        "UPDATE window_on SET x = 7",
        "UPDATE apart.base SET x = 8",
        "DELETE FROM apart.base",
        "INSERT INTO apart.ruled VALUES (13)",
    ],
)
def test_a_partition_is_written_by_its_parents(postgres_module_url: URL, written: str) -> None:
    """What is written by way of a parent of any depth, or a view of one, is in the part."""
    engine = create_engine(postgres_module_url)
    with engine.begin() as connection:
        for statement in (
            "DROP SCHEMA IF EXISTS apart CASCADE",
            "DROP TABLE IF EXISTS whole, child CASCADE",
            "CREATE SCHEMA apart",
            "CREATE TABLE whole (id int PRIMARY KEY, x int) PARTITION BY RANGE (id)",
            (
                "CREATE TABLE middle PARTITION OF whole FOR VALUES FROM (0) TO (100) "
                "PARTITION BY RANGE (id)"
            ),
            'CREATE TABLE apart."a%b" PARTITION OF middle FOR VALUES FROM (0) TO (50)',
            "CREATE VIEW window_on AS SELECT id, x FROM whole",
            "CREATE TABLE apart.ruled (id int)",
            (
                "CREATE RULE r AS ON INSERT TO apart.ruled "
                "DO INSTEAD INSERT INTO whole VALUES (NEW.id, 0)"
            ),
            "CREATE TABLE apart.base (x int)",
            "CREATE TABLE apart.other (id int PRIMARY KEY, x int)",
            "CREATE TABLE child () INHERITS (apart.other, apart.base)",
            "INSERT INTO whole VALUES (1, 1), (2, 2)",
            "INSERT INTO child VALUES (1, 1), (2, 2)",
        ):
            connection.execute(text(statement))
    metadata = MetaData(schema="apart")
    part, other = (
        Table(name, metadata, Column("id", Integer, primary_key=True), Column("x", Integer))
        for name in ("a%b", "other")
    )

    class Part(CachedView):
        __select__ = select(part.c.id, part.c.x)

    class Other(CachedView):
        __select__ = select(other.c.id, other.c.x)

    with TableCache(engine, views=[Part, Other]) as cache:
        cache.load(Part)
        cache.load(Other)
        with engine.begin() as connection:
            connection.execute(text(written))
        agrees(cache, Part)
        agrees(cache, Other)
        models = MetaData()
        words = written.split()
        name = next(w for w in words if w.startswith(("whole", "middle", "window", "apart.")))
        schema, _, name = name.rpartition(".")
        columns = [Column("id" if name == "ruled" else "x", Integer)]
        table = Table(name, models, *columns, schema=schema or None)
        if name != "ruled":
            with engine.begin() as connection:
                connection.execute(update(table).values(x=table.c.x + 100))
            agrees(cache, Part)
            agrees(cache, Other)
    engine.dispose()


@pytest.mark.parametrize("written", ["whole", "part", "base", "shown"])
def test_a_foreign_key_to_a_part_is_set_off_by_its_parents(
    postgres_module_url: URL, written: str
) -> None:
    """A key that no model declares acts when a parent of what it refers to is written."""
    engine = create_engine(postgres_module_url)
    with engine.begin() as connection:
        for statement in (
            "DROP TABLE IF EXISTS whole, base, keeper CASCADE",
            "CREATE TABLE whole (id int PRIMARY KEY) PARTITION BY RANGE (id)",
            "CREATE TABLE part PARTITION OF whole FOR VALUES FROM (0) TO (100)",
            "CREATE TABLE base (id int)",
            "CREATE TABLE derived (PRIMARY KEY (id)) INHERITS (base)",
            "CREATE VIEW shown AS SELECT * FROM base",
            "CREATE TABLE keeper (id int PRIMARY KEY)",
            (
                "CREATE TABLE kept (PRIMARY KEY (id), "
                "part_id int REFERENCES part ON DELETE CASCADE, "
                "base_id int REFERENCES derived ON DELETE CASCADE) INHERITS (keeper)"
            ),
            "INSERT INTO whole VALUES (1)",
            "INSERT INTO derived VALUES (1)",
            "INSERT INTO kept VALUES (1, 1, 1)",
        ):
            connection.exec_driver_sql(statement)
    metadata = MetaData()
    keeper, source = (
        Table(name, metadata, Column("id", Integer, primary_key=True))
        for name in ("keeper", written)
    )

    class Keeper(CachedView):
        __select__ = select(keeper.c.id)

    with TableCache(engine, views=[Keeper]) as cache:
        cache.load(Keeper)
        with engine.begin() as connection:
            connection.execute(delete(source))
        agrees(cache, Keeper)
    engine.dispose()


@pytest.fixture
def percents(database_url: URL) -> Iterator[tuple[URL, Table, Table | None]]:
    """A table whose name has a percent sign, with a trigger; and a database view of it."""
    engine = create_engine(database_url)
    metadata = MetaData()
    columns = ("x", "y")
    table, window = (
        Table(name, metadata, Column("id", Integer, primary_key=True),
              *(Column(c, Integer) for c in columns))
        for name in ("a%b", "c%d")
    )  # fmt: skip
    body = {
        "sqlite": 'CREATE TRIGGER "p%q" AFTER UPDATE OF x ON "a%b" '
        'BEGIN UPDATE "a%b" SET y = NEW.x WHERE id = NEW.id; END',
        "postgresql": 'CREATE TRIGGER "p%q" BEFORE UPDATE OF x ON "a%b" '
        "FOR EACH ROW EXECUTE FUNCTION follow()",
        "mysql": "CREATE TRIGGER `p%q` BEFORE UPDATE ON `a%b` FOR EACH ROW SET NEW.y = NEW.x",
    }
    dialect = engine.dialect.name
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(insert(table), [{"id": 1, "x": 1, "y": 1}, {"id": 2, "x": 2, "y": 2}])
        if dialect == "postgresql":
            connection.execute(
                text(
                    "CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql "
                    "AS 'BEGIN NEW.y = NEW.x; RETURN NEW; END'"
                )
            )
        connection.execute(text(body[dialect]))
        if dialect != "sqlite":
            quote = '"' if dialect == "postgresql" else "`"
            shown = "CREATE VIEW 'c%d' AS SELECT id, x, y FROM 'a%b'".replace("'", quote)
            connection.execute(text(shown))
    yield database_url, table, None if dialect == "sqlite" else window
    engine.dispose()


def percent_view(table: Table) -> type[CachedView]:
    """A view that does not show what statements set."""

    class Percent(CachedView):
        __select__ = select(table.c.id, table.c.y)
        by_y = ScoreIndex("y")

    return Percent


@pytest.mark.every_database
def test_a_percent_sign_in_a_name(percents: tuple[URL, Table, Table | None]) -> None:
    """Triggers and database views of such a table are found in the catalog."""
    url, table, window = percents
    engine = create_engine(url)
    view = percent_view(table)
    with TableCache(engine, views=[view]) as cache:
        cache.load(view)
        for written in filter(lambda t: t is not None, (table, window)):
            assert written is not None
            with engine.begin() as connection:
                connection.execute(update(written).values(x=written.c.x + 100))
            agrees(cache, view)
        assert any("p%q" in str(problem) for problem in cache.check())
    engine.dispose()


@pytest.mark.every_database
async def test_a_percent_sign_in_a_name_by_asynchronous_drivers(
    percents: tuple[URL, Table, Table | None],
) -> None:
    """Drivers differ in whether they format statements."""
    url, table, window = percents
    engine = create_async_engine(asynchronous(url))
    view = percent_view(table)
    cache = AsyncTableCache(engine, views=[view])
    await cache.load(view)
    for written in (table, window):
        if written is not None:
            async with engine.begin() as connection:
                await connection.execute(update(written).values(x=written.c.x + 100))
            async with cache.sessionmaker()() as session, engine.connect() as connection:
                said = sorted((r.id, r.y) for r in await session.scalars(select(view)))
                truth = await connection.execute(select(table.c.id, table.c.y))
                assert said == sorted(map(tuple, truth))
    await cache.close()
    await engine.dispose()


def test_text_that_is_equal_and_not_the_same(sqlite_url: URL) -> None:
    """Under a collation that folds, a join finds more than one row, and nothing is followed."""
    engine = create_engine(sqlite_url)
    metadata = MetaData()
    left = Table("left_", metadata, Column("id", Integer, primary_key=True),
                 Column("code", String(collation="NOCASE")))  # fmt: skip
    right = Table("right_", metadata, Column("code", String, primary_key=True),
                  Column("x", Integer))  # fmt: skip
    metadata.create_all(engine)

    class Folded(CachedView):
        __select__ = select(left.c.id, right.c.x).join(right, left.c.code == right.c.code)
        __primary_key__ = ("id", "x")

    with engine.begin() as connection:
        connection.execute(insert(left).values(id=1, code="a"))
        connection.execute(insert(right), [{"code": "a", "x": 1}, {"code": "A", "x": 2}])
    with TableCache(engine, views=[Folded]) as cache:
        cache.load(Folded)
        agrees(cache, Folded)
        with engine.begin() as connection:
            connection.execute(update(right).where(right.c.code == "A").values(x=3))
        agrees(cache, Folded)
    engine.dispose()


def test_timestamps_that_the_database_writes_in_its_own_format(sqlite_url: URL) -> None:
    """SQLite compares them as text, and so they are left to it."""
    engine = create_engine(sqlite_url)
    metadata = MetaData()
    stamped = Table("stamped", metadata, Column("id", Integer, primary_key=True),
                    Column("at", DateTime, server_default=func.current_timestamp()))  # fmt: skip
    metadata.create_all(engine)

    class Stamped(CachedView):
        __select__ = select(stamped.c.id, stamped.c.at)

    with engine.begin() as connection:
        connection.execute(text("INSERT INTO stamped VALUES (1, '2024-01-01 00:00:00')"))
    with TableCache(engine, views=[Stamped]) as cache, cache.sessionmaker()() as session:
        cache.load(Stamped)
        statement = select(Stamped).where(Stamped.at >= datetime(2024, 1, 1))
        with engine.connect() as connection:
            truth = len(connection.execute(statement).all())
        assert len(session.scalars(statement).all()) == truth
    engine.dispose()


def test_a_view_of_one_row(engine: Engine) -> None:
    """Its key is any column."""

    class One(CachedView):
        __select__ = select(A.x).where(A.id == 1)

    with TableCache(engine, views=[One]) as cache:
        cache.load(One)
        with engine.begin() as connection:
            connection.execute(update(A).values(x=4))
        agrees(cache, One)
