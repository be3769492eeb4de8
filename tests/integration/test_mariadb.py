"""What is MariaDB's own: implicit commits, engines without transactions, keys that it changes.

Each test is an attack: it writes in a way that only MariaDB has, and then asks the cache and the
database the same. ``agrees`` reads through a new session, and the truth through a connection that
nothing is attached to.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache as remembered
from typing import Any, Self

import pytest
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    ForeignKey,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    insert,
    literal_column,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from sa_tablecache import (
    AsyncTableCache,
    CachedView,
    ScoreIndex,
    TableCache,
    TableCacheError,
    ViewDefinitionError,
)
from tests.conftest import asynchronous
from tests.integration.checking import counting
from tests.mariadb import Mariadb, disconnect_all


class Base(DeclarativeBase):
    """Models of these tests."""


class Shelf(Base):
    """A text key that books follow."""

    __tablename__ = "shelf"
    code: Mapped[str] = mapped_column(String(4), primary_key=True)
    title: Mapped[str] = mapped_column(String(40))


class Book(Base):
    """A key that the database gives."""

    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(40))
    shelf_code: Mapped[str | None] = mapped_column(
        ForeignKey(Shelf.code, ondelete="CASCADE", onupdate="CASCADE")
    )


class Event(Base):
    """A time as a key."""

    __tablename__ = "event"
    at: Mapped[datetime] = mapped_column(primary_key=True)
    what: Mapped[str] = mapped_column(String(40))


class Books(CachedView):
    """Books and their shelves."""

    __select__ = select(Book.id, Book.title, Book.shelf_code, Shelf.title.label("shelf")).outerjoin(
        Shelf, Book.shelf_code == Shelf.code
    )
    by_id = ScoreIndex("id")
    by_title = ScoreIndex("title")


class Events(CachedView):
    """Events by their time."""

    __select__ = select(Event.at, Event.what)
    by_time = ScoreIndex("at")


VIEWS = (Books, Events)


@pytest.fixture(scope="module")
def module_url(mariadb: Mariadb) -> Iterator[URL]:
    """A database for all tests of this module."""
    with mariadb.database() as url:
        yield url


@pytest.fixture
def url(module_url: URL) -> URL:
    """A database with two shelves and three books, and nothing else."""
    with outside(module_url) as connection:
        _empty(connection)
        Base.metadata.create_all(connection)
        connection.execute(
            insert(Shelf), [{"code": "A", "title": "Art"}, {"code": "B", "title": "Birds"}]
        )
        connection.execute(
            insert(Book),
            [
                {"id": 1, "title": "one", "shelf_code": "A"},
                {"id": 2, "title": "two", "shelf_code": "B"},
                {"id": 3, "title": "three", "shelf_code": None},
            ],
        )
    return module_url


def _empty(connection: Connection) -> None:
    """Drop all that a test has left, whoever is still connected."""
    database = str(connection.engine.url.database)
    disconnect_all(connection, database)
    connection.exec_driver_sql("SET foreign_key_checks = 0")
    for kind, name in connection.execute(
        text(
            "SELECT if(table_type = 'VIEW', 'VIEW', 'TABLE'), table_name"
            " FROM information_schema.tables WHERE table_schema = database() UNION"
            " SELECT routine_type, routine_name FROM information_schema.routines"
            " WHERE routine_schema = database()"
        )
    ).all():
        connection.exec_driver_sql(f"DROP {kind} {name}")
    connection.exec_driver_sql("SET foreign_key_checks = 1")


@contextmanager
def outside(url: URL) -> Iterator[Connection]:
    """Lend a connection that nothing is attached to, in AUTOCOMMIT mode."""
    with _bystander(url).connect() as connection:
        yield connection


@remembered
def _bystander(url: URL) -> Engine:
    return create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)


@pytest.fixture
def engine(url: URL) -> Iterator[Engine]:
    """The application's engine."""
    engine = create_engine(url)
    yield engine
    engine.dispose()


@contextmanager
def loaded(engine: Engine, *views: Any) -> Iterator[TableCache]:
    """Lend a cache with all of some views."""
    with TableCache(engine, views=views or VIEWS) as cache:
        for view in cache.views:
            cache.load(view)
        yield cache


@pytest.fixture
def cache(engine: Engine) -> Iterator[TableCache]:
    """A cache with all of the views."""
    with loaded(engine) as cache:
        yield cache


def agrees(cache: TableCache, *views: Any) -> None:
    """Assert that cache and database say the same about all of some views."""
    for view in views or cache.views:
        with outside(cache.engine.url) as connection:
            truth = sorted(map(tuple, connection.execute(select(view))), key=repr)
        with cache.sessionmaker()() as session:
            found = [tuple(r._asdict().values()) for r in session.scalars(select(view))]
            assert sorted(found, key=repr) == truth, session.last_read
    cache._check()


RENAME = update(Book).where(Book.id == 1).values(title="renamed")


# --- what ends a transaction ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "end"),
    [
        ("CREATE TABLE other (id int)", "commit"),
        ("CREATE TABLE other (id int)", "rollback"),
        ("CREATE TABLE other (id int)", "close"),
        ("ALTER TABLE event ADD COLUMN note int", "rollback"),
        ("START TRANSACTION", "rollback"),
        ("BEGIN", "close"),
        ("SET autocommit = 1", "close"),
        ("LOCK TABLES shelf READ", "rollback"),
        ("ANALYZE TABLE shelf", "commit"),
        ("COMMIT", "rollback"),
    ],
)
def test_what_commits_implicitly_is_seen_at_once(
    engine: Engine, cache: TableCache, ending: str, end: str
):
    """Statements that end a transaction make it visible, whatever ends the next one."""
    with engine.connect() as connection:
        connection.execute(RENAME)
        agrees(cache)
        connection.execute(text(ending))
        agrees(cache)
        if not ending.startswith("LOCK"):
            connection.execute(update(Book).where(Book.id == 2).values(title="later"))
            agrees(cache)
        if ending.startswith("SET"):
            connection.invalidate()
        elif end != "close":
            getattr(connection, end)()
        if ending.startswith("LOCK"):
            connection.execute(text("UNLOCK TABLES"))
    agrees(cache)


def test_ddl_of_sqlalchemy_commits(engine: Engine, cache: TableCache):
    """A table that is created in the middle of a transaction commits what was written before."""
    other = Table("other", MetaData(), Book.__table__.c.id._copy())
    with cache.sessionmaker()() as session:
        session.get_one(Book, 1).title = "renamed"
        session.flush()
        other.create(session.connection())
        agrees(cache)
        session.rollback()
        agrees(cache)


def test_a_transaction_begun_by_hand_in_autocommit_mode(engine: Engine, cache: TableCache):
    """Statements between BEGIN and COMMIT are visible after COMMIT, and not before."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(RENAME)
        agrees(cache)
        connection.execute(text("BEGIN"))
        connection.execute(update(Book).where(Book.id == 2).values(title="both"))
        agrees(cache)
        connection.execute(text("COMMIT"))
        agrees(cache)
        connection.execute(update(Book).where(Book.id == 3).values(title="third"))
        agrees(cache)


async def test_an_asynchronous_transaction_begun_by_hand(url: URL):
    """The asynchronous driver tells as well whether a transaction is open."""
    engine = create_async_engine(asynchronous(url))
    cache = AsyncTableCache(engine, views=[Books])
    await cache.load(Books)

    async def titles() -> list[str]:
        async with cache.sessionmaker()() as session:
            return [r.title for r in await session.range(Books.by_id)]

    async with engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(RENAME)
        assert await titles() == ["renamed", "two", "three"]
        await connection.execute(text("BEGIN"))
        await connection.execute(RENAME.values(title="again"))
        assert await titles() == ["renamed", "two", "three"]
        await connection.execute(text("COMMIT"))
        assert await titles() == ["again", "two", "three"]
    await cache.close()
    await engine.dispose()


@pytest.mark.parametrize(
    ("kind", "end"), [("MyISAM", "commit"), ("MyISAM", "rollback"), ("Aria", "close")]
)
def test_tables_without_transactions(url: URL, engine: Engine, kind: str, end: str):
    """What is written there is visible at once, and no rollback takes it back."""
    with outside(url) as connection:
        connection.execute(text(f"ALTER TABLE event ENGINE = {kind}"))
    with loaded(engine) as cache, cache.sessionmaker()() as session:
        session.add(Event(at=datetime(2024, 1, 1), what="first"))
        session.get_one(Book, 1).title = "renamed"
        session.flush()
        agrees(cache)
        session.execute(update(Event).values(what="second"))
        agrees(cache)
        getattr(session, end)()
        agrees(cache)


def test_two_phases(engine: Engine, cache: TableCache):
    """A prepared transaction is visible when it is committed, whoever commits it."""
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(RENAME)
        agrees(cache)
        transaction.prepare()
        agrees(cache)
        transaction.commit()
        agrees(cache)
        assert cache.stats(Events).pending_marks == 0
        transaction = connection.begin_twophase()
        connection.execute(RENAME.values(title="undone"))
        transaction.prepare()
        transaction.rollback()
        agrees(cache)


def test_a_prepared_transaction_is_recovered(mariadb: Mariadb, engine: Engine, cache: TableCache):
    """Who commits what somebody else has prepared does not know what it wrote."""
    number = f"survivor of {engine.url.database}"
    with engine.connect() as connection:
        pid = connection.scalar(text("SELECT connection_id()"))
        connection.rollback()
        transaction = connection.begin_twophase(number)
        connection.execute(RENAME)
        transaction.prepare()
        connection.invalidate()
    with mariadb.administration() as admin:
        gone = text("SELECT count(*) = 0 FROM information_schema.processlist WHERE id = :pid")
        while not admin.scalar(gone, {"pid": pid}):
            threading.Event().wait(0.01)
    try:
        agrees(cache)
        # Elsewhere than in AUTOCOMMIT mode MariaDB takes it for a part of another transaction.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            assert number.encode() in connection.recover_twophase()
            connection.commit_prepared(number, recover=True)
            agrees(cache)
    finally:
        with mariadb.administration() as admin:
            if number.encode() in admin.recover_twophase():
                admin.rollback_prepared(number, recover=True)


def test_xa_by_hand(engine: Engine, cache: TableCache):
    """XA statements as text are the ends of a transaction, too."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in ("XA START 'x'", RENAME, "XA END 'x'", "XA PREPARE 'x'", "XA COMMIT 'x'"):
            connection.execute(text(statement) if isinstance(statement, str) else statement)
            agrees(cache)


# --- statements -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        text("REPLACE INTO book VALUES (1, 'replaced', 'B')"),
        insert(Book).prefix_with("IGNORE").values(id=9, title="new", shelf_code="A"),
        mysql.insert(Book).values(id=1, title="x").on_duplicate_key_update(title="changed"),
        mysql.insert(Shelf).values(code="A", title="x").on_duplicate_key_update(code="Z"),
        mysql.insert(Book)
        .values(title="x")
        .on_duplicate_key_update(id=literal_column("last_insert_id(id)")),
        update(Book).where(Book.shelf_code == Shelf.code).values({Shelf.title: "joined"}),
        update(Book)
        .where(Book.shelf_code == Shelf.code, Book.id == 1)
        .values({Book.title: "b", Shelf.title: "s"}),
        update(Book)
        .where(Book.shelf_code == Shelf.code, Book.id == 1)
        .ordered_values((Book.title, "b"), (Shelf.title, "s")),
        update(Book).where(Book.shelf_code == Shelf.code, Book.id == 3).values(title="none"),
        delete(Book).where(Book.shelf_code == Shelf.code, Shelf.title == "Art"),
        text("DELETE book, shelf FROM book JOIN shelf ON shelf_code = code"),
        text("ANALYZE UPDATE book SET title = 'analysed'"),
        text("ANALYZE FORMAT=JSON DELETE FROM book WHERE id = 3"),
        text("SET STATEMENT max_statement_time = 9 FOR UPDATE book SET title = 'set'"),
        text("BEGIN NOT ATOMIC UPDATE book SET title = 'block'; END"),
        text("EXECUTE IMMEDIATE concat('UPDATE book SET title = ', quote('executed'))"),
        text("DO bump()"),
        text("SELECT 1--1, bump()"),
        text("SELECT 1 # '\n , bump() # '"),
        text("SELECT 1 /*M! , bump() */"),
        text("SELECT 1 /*!50000 , bump() */"),
        text("CALL rename_all()"),
        text("TRUNCATE TABLE book"),
        text("RENAME TABLE book TO gone, spare TO book"),
    ],
    ids=lambda statement: str(statement.compile(dialect=mysql.dialect()))[:60],
)
def test_statements_that_only_mariadb_has(url: URL, engine: Engine, statement: Any):
    """However it is said, what is written is read."""
    with outside(url) as connection:
        for ddl in (
            """CREATE FUNCTION bump() RETURNS int MODIFIES SQL DATA
            BEGIN UPDATE book SET title = concat(title, '!'); RETURN 1; END""",
            "CREATE PROCEDURE rename_all() UPDATE book SET title = 'all'",
            "CREATE TABLE spare LIKE book",
        ):
            connection.exec_driver_sql(ddl)
    with loaded(engine, Books) as cache, engine.connect() as connection:
        connection.execute(statement)
        connection.commit()
        agrees(cache)


@pytest.mark.parametrize(
    "statement",
    [
        RENAME,
        text("ANALYZE UPDATE book SET title = 'analysed'"),
        text("SET STATEMENT max_statement_time = 9 FOR UPDATE book SET title = 'set'"),
        mysql.insert(Book).values(id=1, title="x").on_duplicate_key_update(title="changed"),
    ],
    ids=["UPDATE", "ANALYZE", "SET STATEMENT", "ON DUPLICATE KEY"],
)
def test_each_statement_in_autocommit_mode_is_seen_at_once(
    engine: Engine, cache: TableCache, statement: Any
):
    """Nothing has to end first."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(statement)
        agrees(cache)


@pytest.mark.parametrize("text_", ["SELECT * FROM book", "SHOW TABLES", "ANALYZE TABLE book"])
def test_statements_that_write_nothing_mark_nothing(engine: Engine, cache: TableCache, text_: str):
    """Reading leaves the cache alone."""
    with engine.connect() as connection:
        connection.execute(text(text_))
        connection.commit()
    assert cache.stats(Books).pending_marks == 0


# --- keys that are not stored as they were written ------------------------------------------------


def test_a_key_of_zero_becomes_another(cache: TableCache):
    """AUTO_INCREMENT takes 0 for "the next one"."""
    with cache.sessionmaker()() as session:
        session.execute(insert(Book).values(id=0, title="zero"))
        session.commit()
        agrees(cache)
        session.execute(insert(Book), [{"id": 0, "title": "x"}, {"id": 0, "title": "y"}])
        session.commit()
        agrees(cache)


def test_a_key_that_the_database_computes(cache: TableCache):
    """The driver reports 0 as the key of a row whose key was an expression."""
    with cache.sessionmaker()() as session:
        session.execute(insert(Book).values(id=literal_column("20 + 1"), title="computed"))
        session.commit()
        agrees(cache)


def test_keys_that_the_database_gives_are_followed(cache: TableCache):
    """LAST_INSERT_ID, and the RETURNING of several rows, mark the rows alone."""
    with cache.sessionmaker()() as session:
        session.add(Book(title="four"))
        session.add_all([Book(title=f"more {n}") for n in range(5)])
        session.execute(insert(Book).values(title="core"))
        session.commit()
    assert cache.stats(Books).pending_marks == 7
    agrees(cache)


def test_a_time_loses_its_microseconds(cache: TableCache):
    """A DATETIME has no fractions unless they are asked for."""
    at = datetime(2024, 1, 1, 12, 0, 0, 700_000)
    with cache.sessionmaker()() as session:
        session.execute(insert(Event).values(at=at, what="written"))
        session.commit()
        agrees(cache)
        session.execute(update(Event).where(Event.at == at.replace(microsecond=0)).values(what="x"))
        session.commit()
        agrees(cache)
        session.execute(
            update(Event).where(Event.at == at.replace(microsecond=0)).values(at=at, what="y")
        )
        session.commit()
        agrees(cache)


def test_spaces_that_do_not_fit_are_cut_off(cache: TableCache):
    """A VARCHAR(4) stores `'C     '` as `'C   '`, and says nothing."""
    with cache.sessionmaker()() as session:
        session.execute(insert(Book).values(id=4, title="four"))
        session.commit()
        session.execute(insert(Shelf).values(code="C" + 8 * " ", title="Cut"))
        session.execute(update(Book).where(Book.id == 4).values(shelf_code="C   "))
        session.commit()
        agrees(cache)
        session.execute(update(Shelf).where(Shelf.code == "C   ").values(title="Cats"))
        session.commit()
        agrees(cache)


def test_values_that_do_not_fit_are_cut_off_without_strict_mode(url: URL):
    """Without STRICT_TRANS_TABLES a key is stored as what fits."""
    engine = create_engine(url, connect_args={"sql_mode": ""})
    with loaded(engine) as cache, cache.sessionmaker()() as session:
        session.execute(insert(Shelf).values(code="CUTTING", title="Cut"))
        session.execute(insert(Book).values(id=2**31 + 5, title="clamped", shelf_code="CUTT"))
        session.commit()
        agrees(cache)
        session.execute(delete(Book).where(Book.id == 2**31 - 1))
        session.execute(update(Book).where(Book.id == 2).values(id=2**40))
        session.commit()
        agrees(cache)
    engine.dispose()


def test_a_mode_that_a_connection_is_told_counts(engine: Engine, cache: TableCache):
    """After SET sql_mode keys are not trusted either."""
    with engine.connect() as connection:
        connection.execute(text("SET SESSION sql_mode = ''"))
        connection.execute(insert(Book).values(id=2**31 + 5, title="clamped"))
        connection.commit()
        agrees(cache)
        connection.execute(update(Book).where(Book.id == 2).values(id=-(2**40)))
        connection.commit()
        agrees(cache)
        connection.invalidate()


# --- names ----------------------------------------------------------------------------------------


def test_use_makes_names_mean_other_tables(mariadb: Mariadb, url: URL, engine: Engine):
    """After USE, a name without a schema is a table of another database."""

    class Elsewhere(CachedView):
        """The books, by the name that everybody may use."""

        __select__ = select(
            Table("book", MetaData(), Book.__table__.c.id._copy(), schema=url.database)
        )
        by_id = ScoreIndex("id")

    with mariadb.database() as other:
        there = create_engine(other)
        with loaded(there, Elsewhere) as cache:
            with there.connect() as connection:
                connection.execute(text(f"USE {url.database}"))
                connection.execute(delete(Book).where(Book.id == 1))
                connection.commit()
            agrees(cache)
        there.dispose()


def test_writing_through_a_database_view(url: URL, engine: Engine):
    """A view that can be updated is another name of its table."""
    with outside(url) as connection:
        connection.execute(text("CREATE VIEW shown AS SELECT id, title FROM book"))
        connection.execute(text("CREATE VIEW shown_again AS SELECT id, title FROM shown"))
    metadata = MetaData()
    with loaded(engine) as cache, engine.connect() as connection:
        for name in ("shown", "shown_again"):
            shown = Table(name, metadata, *(c._copy() for c in list(Book.__table__.c)[:2]))
            connection.execute(update(shown).where(shown.c.id == 1).values(title=name))
            connection.commit()
            agrees(cache)


def test_a_temporary_table_hides_the_real_one(engine: Engine, cache: TableCache):
    """On its connection, and there alone, the name means the temporary table, to the end."""
    with engine.connect() as connection:
        connection.execute(text("CREATE TEMPORARY TABLE shelf (code varchar(4), title int)"))
        connection.commit()
        agrees(cache)
        with cache.sessionmaker()(bind=connection) as session:
            assert {r.shelf for r in session.scalars(select(Books))} == {None}
            session.commit()
            assert {r.shelf for r in session.range(Books.by_id)} == {None}
        connection.invalidate()


@pytest.mark.parametrize(
    ("ddl", "refused"),
    [
        ("CREATE VIEW shelf AS SELECT 'A' AS code, 'x' AS title", "view"),
        ("CREATE TABLE shelf (code varchar(4), title varchar(40)) ENGINE = MRG_MyISAM", "MRG_My"),
        ("CREATE TABLE shelf (code varchar(4), title varchar(40)) ENGINE = MEMORY", "MEMORY"),
        ("CREATE TABLE shelf (code varchar(4), title varchar(40)) WITH SYSTEM VERSIONING", ""),
    ],
)
def test_what_is_no_plain_table_is_refused(mariadb_url: URL, ddl: str, refused: str):
    """Tables whose content may change unseen cannot be cached; versioned ones are like others."""
    with outside(mariadb_url) as connection:
        connection.execute(text(ddl))
        connection.execute(
            text("CREATE TABLE book (id int PRIMARY KEY, title varchar(40), shelf_code varchar(4))")
        )
    engine = create_engine(mariadb_url)
    with TableCache(engine, views=[Books]) as cache:
        if refused:
            with pytest.raises(ViewDefinitionError, match=refused):
                cache.load(Books)
        else:
            cache.load(Books)
            agrees(cache)
    engine.dispose()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "criterion",
    [
        tuple_(Books.title, Books.shelf) < ("zzz", "Art"),
        tuple_(Books.title, Books.shelf) == ("three", "Art"),
        tuple_(Books.title, Books.shelf) != ("three", "Art"),
        ~(tuple_(Books.title, Books.shelf) == ("one", "Art")),
        tuple_(Books.title, Books.shelf).in_([("one", "Art")]),
        ~tuple_(Books.title, Books.shelf).in_([("one", "Art")]),
        tuple_(Books.id, Books.title) < (3, "a"),
    ],
    ids=str,
)
def test_row_values_beside_null(url: URL, cache: TableCache, criterion: Any):
    """MariaDB makes an inner join of an outer one for them, as if NULL decided."""
    statement = select(Books).where(criterion)
    with outside(url) as connection:
        truth = sorted(row.id for row in connection.execute(statement))
    with cache.sessionmaker()() as session:
        assert sorted(record.id for record in session.scalars(statement)) == truth


def test_a_date_that_is_none(url: URL, engine: Engine):
    """A zero date, which no Python date is, fails a load; the database goes on to answer."""
    with loaded(engine, Events) as cache:
        with engine.begin() as connection:
            connection.execute(text("SET sql_mode = ''"))
            connection.execute(text("INSERT INTO event VALUES ('0000-00-00', 'never')"))
            connection.execute(text("INSERT INTO event VALUES ('2024-01-01', 'once')"))
        agrees(cache)
        with cache.sessionmaker()() as session:
            assert [e.what for e in session.range(Events.by_time)] == ["never", "once"]
        with pytest.raises(TableCacheError, match="at"):
            cache.clear(Events)
            cache.load(Events)
    with engine.connect() as connection:
        connection.invalidate()


# --- isolation and locks --------------------------------------------------------------------------


def test_a_snapshot_that_the_reader_has_is_kept(engine: Engine, cache: TableCache):
    """A transaction that has read sees the same again, in the cached view as in its table."""
    factory = cache.sessionmaker()
    with factory() as session:
        assert session.scalar(select(Book.title).where(Book.id == 1)) == "one"
        with engine.begin() as connection:
            connection.execute(RENAME)
        assert session.get(Books, 1).title == "one"
        agrees(cache)
        assert session.get(Books, 1).title == "one"
        session.rollback()
        assert session.get(Books, 1).title == "renamed"


def test_a_refresh_is_newer_than_the_readers_snapshot(engine: Engine, cache: TableCache):
    """What was marked before a transaction began is refreshed to a state that it must not see."""
    factory = cache.sessionmaker()
    cache.invalidate(Books)
    table = cache.table(Books)
    original = table.refresh

    def refresh() -> None:
        with engine.begin() as connection:
            connection.execute(RENAME)
        original()

    with factory() as session:
        assert session.scalar(select(Book.title).where(Book.id == 1)) == "one"
        table.refresh = refresh  # type: ignore[method-assign]
        assert session.get(Books, 1).title == "one"
        assert [r.title for r in session.range(Books.by_id)] == ["one", "two", "three"]
        table.refresh = original  # type: ignore[method-assign]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ"])
def test_isolation_that_was_asked_for_when_connecting(url: URL, level: str):
    """A driver's option asks as an engine's does; the default of all is a snapshot anyway."""
    engine = create_engine(
        url, connect_args={"init_command": f"SET SESSION TRANSACTION ISOLATION LEVEL {level}"}
    )
    with loaded(engine) as cache, cache.sessionmaker()() as session:
        assert session.get(Books, 1).title == "one"
        assert session.last_read is not None
        assert session.last_read.kind == ("bypass" if level == "SERIALIZABLE" else "hit")
    engine.dispose()


def test_loads_read_one_read_only_snapshot(engine: Engine, cache: TableCache):
    """Whatever the application's isolation is, a load sees one state, and cannot write."""
    with counting() as statements:
        cache.clear(Books)
        cache.load(Books)
    assert statements[0] == "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY"


@pytest.mark.parametrize("lock", ["LOCK TABLES book WRITE, shelf WRITE"])
def test_who_has_locked_the_tables_reads_them(engine: Engine, cache: TableCache, lock: str):
    """A refresh would wait for the reader's own locks: the reader's connection answers."""
    titles: list[str] = []

    def locked() -> None:
        with cache.sessionmaker()() as session:
            session.execute(text(lock))
            cache.invalidate(Books)
            titles.extend(r.title for r in session.query(Books).with_session(session))
            session.execute(text("UNLOCK TABLES"))
            session.connection().invalidate()

    thread = threading.Thread(target=locked, daemon=True)
    thread.start()
    thread.join(10)
    assert sorted(titles) == ["one", "three", "two"]
    agrees(cache)


# --- a COMMIT of unknown outcome ------------------------------------------------------------------


class Wire:
    """The way to the server, which can be cut in front of a COMMIT that arrives later."""

    def __init__(self, url: URL) -> None:
        self._server = str(url.host), url.port or 3306
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self.port = self._listener.getsockname()[1]
        self.cut, self.arrive, self.arrived = (threading.Event() for _ in range(3))

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                for ends in ((client, server), (server, client)):
                    thread = threading.Thread(target=self._carry, args=ends)
                    self._threads.append(thread)
                    thread.start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while packet := source.recv(65536):
                late = self.cut.is_set() and b"COMMIT" in packet
                if late:
                    self.cut.clear()
                    source.shutdown(socket.SHUT_RDWR)
                    self.arrive.wait(20)
                target.sendall(packet)
                if late:
                    self.arrived.set()
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("privileged", [True, False])
def test_a_commit_that_lands_after_its_connection_is_lost(
    mariadb: Mariadb, url: URL, *, privileged: bool
):
    """Until the server has ended the transaction, the database answers; then the cache does."""
    user = f"u{str(url.database)[-12:]}"
    through = url.set(host="127.0.0.1")
    if not privileged:
        with mariadb.administration() as connection:
            connection.exec_driver_sql(f"CREATE USER {user}@'%%'")
            connection.exec_driver_sql(f"GRANT ALL ON {url.database}.* TO {user}@'%%'")
        through = through.set(username=user, password=None)
    try:
        with Wire(url) as wire:
            engine = create_engine(through.set(port=wire.port))
            with loaded(engine) as cache:
                with cache.sessionmaker()() as session:
                    session.execute(RENAME)
                    wire.cut.set()
                    with pytest.raises(DBAPIError):
                        session.commit()
                answers(cache, "bypass", "one")
                wire.arrive.set()
                assert wire.arrived.wait(20)
                for _ in range(200):
                    answers(cache)
                    if not cache.stats(Books).leases:
                        break
                    threading.Event().wait(0.05)
                answers(cache, "hit", "renamed")
            engine.dispose()
    finally:
        if not privileged:
            with mariadb.administration() as connection:
                connection.exec_driver_sql(f"DROP USER {user}@'%%'")


def answers(cache: TableCache, kind: str | None = None, title: str | None = None) -> None:
    """Assert what the first book's title is, and how that was answered."""
    with cache.sessionmaker()() as session:
        found = session.get(Books, 1).title
        assert session.last_read is not None
        assert kind in (None, session.last_read.kind), session.last_read
    assert title in (None, found)


def test_a_connection_that_is_killed_before_its_commit(
    mariadb: Mariadb, engine: Engine, cache: TableCache
):
    """What was not committed is not seen, and the cache answers again by itself."""
    with cache.sessionmaker()() as session:
        session.execute(RENAME)
        number = session.scalar(text("SELECT connection_id()"))
        with mariadb.administration() as connection:
            connection.exec_driver_sql(f"KILL CONNECTION {number}")
        with pytest.raises(DBAPIError):
            session.commit()
    agrees(cache)
    for _ in range(100):
        with cache.sessionmaker()() as session:
            assert session.get(Books, 1).title == "one"
            if session.last_read == ("hit", "", Books):
                break
            threading.Event().wait(0.05)
    else:
        pytest.fail("the lease was never released")
