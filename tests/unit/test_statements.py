"""What a statement writes, read from what SQLAlchemy really compiles and executes on SQLite."""

import datetime as dt
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import (
    CHAR,
    Column,
    Connection,
    Date,
    DateTime,
    Engine,
    Enum,
    ForeignKey,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    Uuid,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.schema import CreateTable

from sa_tablecache.cascades import cascades
from sa_tablecache.statements import (
    ANYTHING,
    NOTHING,
    Writes,
    exact_value,
    inserted_rows,
    rows_of,
    writes_of,
)


class Base(DeclarativeBase):
    """The models of these tests."""


class Author(Base):
    """A parent with children that the database itself deletes and changes."""

    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    code: Mapped[str | None] = mapped_column(unique=True)
    books: Mapped[list["Book"]] = relationship(
        back_populates="author", passive_deletes=True, foreign_keys="Book.author_id"
    )


class Book(Base):
    """A child, deleted with its parent; its code follows the parent's."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    author_id: Mapped[int | None] = mapped_column(ForeignKey("author.id", ondelete="CASCADE"))
    author_code: Mapped[str | None] = mapped_column(
        ForeignKey("author.code", onupdate="CASCADE", ondelete="SET NULL")
    )
    author: Mapped[Author | None] = relationship(back_populates="books", foreign_keys=[author_id])


pairs = Table(
    "pair",
    Base.metadata,
    Column("left part", Integer, primary_key=True, key="left"),
    Column("right", String, primary_key=True),
    Column("note", String),
)
keyless = Table("keyless", Base.metadata, Column("note", String))
authors: Any = Author.__table__
books: Any = Book.__table__

AUTHOR, BOOK, PAIR, KEYLESS = (None, "author"), (None, "book"), (None, "pair"), (None, "keyless")


class Log:
    """What each statement wrote, in order."""

    def __init__(self, engine: Engine) -> None:
        self.seen: list[tuple[Writes, list[Any] | None]] = []
        self.inserted: list[list[Any] | None] = []
        event.listen(engine, "before_cursor_execute", self.before)
        event.listen(engine, "after_execute", self.after)

    def before(
        self, connection: Connection, _c: Any, statement: str, _p: Any, context: Any, _m: Any
    ) -> None:
        """Note what a statement is about to write."""
        writes = writes_of(context, statement)
        self.seen.append((writes, rows_of(writes, context) if context.compiled else None))

    def after(self, _: Any, clause: Any, __: Any, ___: Any, ____: Any, result: Any) -> None:
        """Note the keys that an INSERT gave."""
        context = getattr(result, "context", None)
        writes = NOTHING if context is None else writes_of(context, "")
        if writes.kind == "insert":
            self.inserted.append(inserted_rows(writes, context))

    def take(self) -> list[tuple[Writes, list[Any] | None]]:
        """Return what was noted since the last time."""
        seen, self.seen = self.seen, []
        self.inserted = []
        return seen


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An SQLite database in memory with the tables of these tests."""
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def log(engine: Engine) -> Log:
    """What is written through the engine."""
    return Log(engine)


def one(log: Log, connection: Connection, statement: Any, *parameters: Any) -> Any:
    """Execute a statement and return what it was seen to write."""
    log.take()
    connection.execute(statement, *parameters)
    [found] = log.take()
    return found


# -- the unit of work --------------------------------------------------------------------------


def test_a_unit_of_work_names_its_rows(engine: Engine, log: Log) -> None:
    """INSERT, UPDATE and DELETE of a flush are known row by row."""
    with Session(engine) as session:
        author = Author(id=1, name="Ada")
        session.add_all([author, Author(id=2, name="Bob")])
        session.flush()
        [(writes, rows)] = log.take()
        assert (writes.table, writes.kind, writes.tables) == (AUTHOR, "insert", frozenset())
        assert rows == [(1,), (2,)]
        author.name = "Ann"
        session.flush()
        [(writes, rows)] = log.take()
        assert (writes.table, rows, writes.tables) == (AUTHOR, [(1,)], frozenset())
        assert writes.columns == {"name"}
        session.delete(author)
        session.flush()
        deleted = [seen for seen in log.take() if seen[0]]
        assert [rows for _, rows in deleted] == [[(1,)]]
        assert (deleted[0][0].kind, deleted[0][0].columns) == ("delete", None)
        assert deleted[0][0].further == {BOOK}


def test_keys_made_by_the_database_are_known_after_the_insert(engine: Engine, log: Log) -> None:
    """An INSERT without keys has them when it is done, also for many rows at once."""
    with Session(engine) as session:
        session.add_all([Author(name=name) for name in "abc"])
        session.flush()
        assert log.seen[0][0].kind == "insert"
        assert log.seen[0][1] is None
        assert sorted(key for keys in log.inserted for key in keys or ()) == [(1,), (2,), (3,)]


# -- statements --------------------------------------------------------------------------------


def test_an_insert_with_its_key_names_its_row(engine: Engine, log: Log) -> None:
    """The key is found among the parameters, of every row of an executemany."""
    with engine.begin() as connection:
        assert one(log, connection, insert(authors).values(id=5))[1] == [(5,)]
        many = [{"id": 6, "name": None}, {"id": 7, "name": "x"}]
        assert one(log, connection, insert(authors), many)[1] == [(6,), (7,)]
        found = one(log, connection, insert(pairs).values(left=1, right="r"))
        assert (found[0].table, found[1]) == (PAIR, [(1, "r")])
        many = [{"left": 2, "right": "r"}, {"left": 3, "right": "s"}]
        assert one(log, connection, insert(pairs), many)[1] == [(2, "r"), (3, "s")]


def test_an_update_or_delete_by_key_names_its_row(engine: Engine, log: Log) -> None:
    """A WHERE that pins the whole primary key says which row; more conditions do no harm."""
    with engine.begin() as connection:
        for statement, parameters, keys in (
            (authors.update().where(authors.c.id == 5).values(name="x"), [], [(5,)]),
            (authors.delete().where(authors.c.id == 5, authors.c.name == "x"), [], [(5,)]),
            (
                pairs.update().where(pairs.c.right == "r", pairs.c.left == 1).values(note="n"),
                [],
                [(1, "r")],
            ),
            (
                authors.update().where(authors.c.id == bindparam("key")),
                [[{"key": 5, "name": "x"}, {"key": 6, "name": "y"}]],
                [(5,), (6,)],
            ),
        ):
            writes, rows = one(log, connection, statement, *parameters)
            assert rows == keys
            assert writes.table in (AUTHOR, PAIR)


def test_an_update_of_the_key_names_the_old_and_the_new_row(engine: Engine, log: Log) -> None:
    """A row that changes its key is two rows."""
    with engine.begin() as connection:
        statement = authors.update().where(authors.c.id == 5).values(id=6)
        assert set(one(log, connection, statement)[1]) == {(5,), (6,)}
        statement = pairs.update().where(pairs.c.left == 1, pairs.c.right == "r").values(right="s")
        assert set(one(log, connection, statement)[1]) == {(1, "r"), (1, "s")}
        statement = authors.update().where(authors.c.id == 5).values(id=authors.c.id + 1)
        assert one(log, connection, statement)[1] is None


@pytest.mark.parametrize(
    "statement",
    [
        authors.update().values(name="x"),
        authors.update().where(authors.c.name == "x").values(name="y"),
        authors.update().where(authors.c.id > 5).values(name="y"),
        authors.update().where(authors.c.id.in_([5])).values(name="y"),
        authors.update().where((authors.c.id == 5) | (authors.c.name == "x")).values(name="y"),
        authors.update().where(authors.c.id == authors.c.name).values(name="y"),
        authors.update().where(authors.c.id == books.c.id, books.c.id == 5).values(name="y"),
        authors.delete(),
        insert(authors).values([{"id": 1}, {"id": 2}]),
        insert(authors).from_select(["id"], select(books.c.id)),
        insert(authors).values(id=1).prefix_with("OR REPLACE"),
        sqlite.insert(authors).values(id=1).on_conflict_do_nothing(),
        sqlite.insert(authors).values(id=1).on_conflict_do_update(set_={"name": "x"}),
    ],
    ids=lambda statement: " ".join(str(statement.compile(dialect=sqlite.dialect())).split())[:70],
)
def test_a_bulk_statement_writes_its_table(engine: Engine, log: Log, statement: Any) -> None:
    """Where no single row is named any row of the table may have changed."""
    with engine.begin() as connection:
        writes, rows = one(log, connection, statement)
    assert rows is None
    assert writes.table == AUTHOR
    assert not writes.anything
    assert not writes.opaque


def test_a_table_without_key_is_written_as_a_whole(engine: Engine, log: Log) -> None:
    """There is nothing to name a row by."""
    with engine.begin() as connection:
        for statement in (
            insert(keyless).values(note="x"),
            keyless.update().where(keyless.c.note == "x").values(note="y"),
            keyless.delete(),
        ):
            writes, rows = one(log, connection, statement)
            assert (writes.table, writes.further, rows) == (KEYLESS, frozenset(), None)


def test_orm_enabled_statements_are_like_their_tables(engine: Engine, log: Log) -> None:
    """``update(Model)`` and ``insert(Model)`` are seen through to the table."""
    with Session(engine) as session:
        session.execute(insert(Author), [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
        assert [rows for _, rows in log.take()] == [[(1,), (2,)]]
        session.query(Author).filter(Author.id == 2).update({"name": "c"})
        assert [(2,)] in [rows for _, rows in log.take()]
        session.query(Author).filter(Author.name == "c").delete()
        assert any(writes.table == AUTHOR for writes, _ in log.take())


def test_writing_inside_a_statement_is_seen() -> None:
    """A CTE that writes is a write, in a SELECT and in another write."""
    gone = books.delete().where(books.c.id == 1).returning(books.c.id).cte("gone")
    for statement in (
        select(gone.c.id),
        select(authors.c.id).add_cte(gone),
        authors.update().where(authors.c.id.in_(select(gone.c.id))).values(name="x"),
        insert(authors).from_select(["id"], select(gone.c.id)),
    ):
        compiled = statement.compile(dialect=sqlite.dialect())
        writes = writes_of(Context(compiled), str(compiled))
        assert writes.anything or BOOK in writes.tables, str(compiled)


class Context:
    """What `writes_of` needs of an execution context."""

    is_crud = False

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (select(authors), NOTHING),
        (select(func.count()).select_from(authors), NOTHING),
        (select(func.coalesce(authors.c.name, "")), NOTHING),
        (select(func.write_something(1)), ANYTHING),
        (select(authors).where(text("name = 'x'")), NOTHING),
        (select(authors).where(text("write_something(name)")), ANYTHING),
        (select(literal_column("write_something(1)")), ANYTHING),
        (select(text("1")), NOTHING),
        (text("SELECT 1").columns(Column("x", Integer)), NOTHING),
        (text("DELETE FROM book RETURNING id").columns(Column("id", Integer)), ANYTHING),
        (authors.update().values(name=func.write_something(1)), ANYTHING),
        (insert(authors).values(id=func.write_something(1)), ANYTHING),
        (CreateTable(authors), ANYTHING),
    ],
    ids=lambda value: " ".join(str(value).split())[:60],
)
def test_what_may_write_anything(statement: Any, expected: Writes) -> None:
    """A function nobody knows may write; so may DDL; what is known to read writes nothing."""
    compiled = statement.compile(dialect=sqlite.dialect())
    found = writes_of(Context(compiled), str(compiled))
    assert (bool(found), found.anything) == (bool(expected), expected.anything)


def test_savepoints_write_nothing(engine: Engine, log: Log) -> None:
    """SAVEPOINT, RELEASE and ROLLBACK TO are seen and mean nothing."""
    with engine.begin() as connection:
        with connection.begin_nested():
            pass
        with connection.begin_nested() as inner:
            inner.rollback()
    assert all(not writes for writes, _ in log.take())


def test_a_compiled_statement_is_read_once(engine: Engine, log: Log) -> None:
    """The answer is kept with the compiled statement, and only keys differ between executions."""
    with engine.begin() as connection:
        first = one(log, connection, insert(authors).values(id=1))
        second = one(log, connection, insert(authors).values(id=2))
    assert first[0] is second[0]
    assert (first[1], second[1]) == ([(1,)], [(2,)])


# -- values ------------------------------------------------------------------------------------

NOW = dt.datetime(2013, 1, 1, 12)
AWARE = NOW.replace(tzinfo=dt.timezone(dt.timedelta(hours=1)))


@pytest.mark.parametrize(
    ("type_", "value", "exact"),
    [
        (Integer(), 1, 1),
        (Integer(), "1", None),
        (Integer(), True, None),
        (Integer(), None, None),
        (String(), "x", "x"),
        (String(), 1, None),
        (CHAR(3), "x", None),
        (Enum("x"), "x", None),
        (Uuid(), uuid.UUID(int=1), uuid.UUID(int=1)),
        (Uuid(), uuid.UUID(int=1).hex, None),
        (Date(), NOW.date(), NOW.date()),
        (Date(), NOW, None),
        (DateTime(), NOW, NOW),
        (DateTime(), AWARE, None),
        (DateTime(timezone=True), AWARE, AWARE),
        (DateTime(timezone=True), NOW, None),
        (Numeric(), 1, None),
    ],
)
def test_a_key_counts_only_as_the_database_gives_it_back(
    type_: Any, value: Any, exact: Any
) -> None:
    """What a type may fold, pad or convert is no known key: its table is marked instead."""
    found = exact_value(Column("key", type_), value)
    assert found == exact
    assert type(found) is type(exact)


def test_keys_in_time_zones_are_in_utc() -> None:
    """Equal points in time are equal keys, whatever zone they are written in."""
    found = exact_value(Column("key", DateTime(timezone=True)), AWARE)
    assert found.tzinfo is dt.UTC


def test_a_key_of_the_wrong_type_is_not_known(engine: Engine, log: Log) -> None:
    """``"17"`` is not 17: the whole table counts as written."""
    with engine.begin() as connection:
        statement = authors.update().where(authors.c.id == "17").values(name="x")
        assert one(log, connection, statement)[1] is None


# -- cascades ----------------------------------------------------------------------------------


def names(tables: frozenset[Any]) -> set[str]:
    """The names of tables."""
    return {name for _, name in tables}


def family(*links: tuple[str, str, str | None, str | None]) -> dict[str, Table]:
    """Tables with an id each, and foreign keys (child, parent, ondelete, onupdate)."""
    metadata = MetaData()
    tables: dict[str, Table] = {}
    for name in sorted({name for link in links for name in link[:2]}):
        tables[name] = Table(name, metadata, Column("id", Integer, primary_key=True))
    for number, (child, parent, ondelete, onupdate) in enumerate(links):
        key = ForeignKey(f"{parent}.id", ondelete=ondelete, onupdate=onupdate)
        tables[child].append_column(Column(f"fk{number}", Integer, key))
    return tables


def test_a_delete_cascades_as_far_as_the_database_goes() -> None:
    """ON DELETE CASCADE goes on from child to grandchild; SET NULL changes the child only."""
    tables = family(
        ("b", "a", "CASCADE", None),
        ("c", "b", "SET NULL", None),
        ("d", "c", "CASCADE", None),
        ("e", "a", None, None),
        ("f", "a", "RESTRICT", None),
        ("g", "b", "SET DEFAULT", None),
    )
    assert names(cascades(tables["a"], deleted=True, columns=None)) == {"b", "c", "g"}
    assert names(cascades(tables["c"], deleted=True, columns=None)) == {"d"}
    assert names(cascades(tables["e"], deleted=True, columns=None)) == set()


def test_an_update_cascades_from_the_columns_it_sets() -> None:
    """ON UPDATE CASCADE follows an UPDATE of the referred column, and of no other."""
    tables = family(("b", "a", None, "CASCADE"), ("c", "b", None, "CASCADE"))
    assert names(cascades(tables["a"], deleted=False, columns=frozenset({"id"}))) == {"b"}
    assert names(cascades(tables["a"], deleted=False, columns=frozenset({"other"}))) == set()
    assert names(cascades(tables["a"], deleted=False, columns=None)) == {"b"}
    assert names(cascades(tables["a"], deleted=True, columns=None)) == set()


def test_a_chain_of_keys_cascades_updates_all_the_way() -> None:
    """Where the foreign key is part of the child's key its own children follow."""
    metadata = MetaData()
    a = Table("a", metadata, Column("id", Integer, primary_key=True))
    for child, parent in (("b", "a"), ("c", "b")):
        key = ForeignKey(f"{parent}.id", onupdate="CASCADE")
        Table(child, metadata, Column("id", Integer, key, primary_key=True))
    assert names(cascades(a, deleted=False, columns=frozenset({"id"}))) == {"b", "c"}


def test_a_table_reached_in_two_ways_cascades_in_both() -> None:
    """A child whose reference is set to NULL on one way may be deleted on another."""
    tables = family(
        ("c", "a", "SET NULL", None),
        ("b", "a", "CASCADE", None),
        ("c", "b", "CASCADE", None),
        ("d", "c", "CASCADE", None),
    )
    assert names(cascades(tables["a"], deleted=True, columns=None)) == {"b", "c", "d"}
    mirrored = family(
        ("c", "b", "CASCADE", None),
        ("b", "a", "CASCADE", None),
        ("c", "a", "SET NULL", None),
        ("d", "c", "CASCADE", None),
    )
    assert names(cascades(mirrored["a"], deleted=True, columns=None)) == {"b", "c", "d"}


def test_a_table_that_refers_to_itself_cascades_to_itself() -> None:
    """Deleting one row may delete others of the same table, and ends."""
    tables = family(("a", "a", "CASCADE", None), ("b", "a", "CASCADE", None))
    assert names(cascades(tables["a"], deleted=True, columns=None)) == {"a", "b"}


def test_references_declared_later_are_known() -> None:
    """A table that is declared after the first question is in the next answer."""
    tables = family(("b", "a", "CASCADE", None))
    assert names(cascades(tables["a"], deleted=True, columns=None)) == {"b"}
    key = ForeignKey("a.id", ondelete="CASCADE")
    Table("late", tables["a"].metadata, Column("id", Integer, key, primary_key=True))
    assert names(cascades(tables["a"], deleted=True, columns=None)) == {"b", "late"}


def test_writes_bring_their_cascades(engine: Engine, log: Log) -> None:
    """A DELETE by key names its row, and the tables that the database changes along with it."""
    with engine.begin() as connection:
        writes, rows = one(log, connection, authors.delete().where(authors.c.id == 1))
        assert (rows, writes.further) == ([(1,)], {BOOK})
        statement = authors.update().where(authors.c.id == 1)
        assert one(log, connection, statement.values(name="x"))[0].further == set()
        assert one(log, connection, statement.values(code="x"))[0].further == {BOOK}
        assert one(log, connection, statement, {"code": "y"})[0].further == {BOOK}


# -- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM author",
        "  (SELECT 1)",
        "select 'insert into author', \"delete\", `update` from author",
        "SELECT 1 -- ; DELETE FROM author",
        "SELECT /* delete */ 1;",
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "SELECT * FROM author FOR UPDATE",
        "SELECT * FROM author FOR NO KEY UPDATE",
        "SELECT replace(name, 'a', 'b') FROM author",
        "SELECT count(*), max(id) FROM author WHERE name IN ('a') AND EXISTS (SELECT 1)",
        "VALUES (1)",
        "EXPLAIN SELECT 1",
        "SHOW search_path",
        "PRAGMA foreign_keys = ON",
        "SAVEPOINT x",
        "ANALYZE author",
        "LOCK TABLE author IN SHARE MODE",
        "SET search_path = x",
        "SELECT set_config('a', 'b', true)",
        "SELECT $$delete from x$$",
    ],
)
def test_text_that_can_be_seen_to_read(statement: str) -> None:
    """Words inside quotes and comments are not statements; reading marks nothing."""
    found = writes_of(None, statement)
    assert not found
    assert not found.opaque


@pytest.mark.parametrize(
    ("statement", "target"),
    [
        ("INSERT INTO author VALUES (1)", AUTHOR),
        ("insert into author (id, name) select id, title from book", AUTHOR),
        ("INSERT INTO author (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET name = 'x'", AUTHOR),
        ("INSERT INTO author DEFAULT VALUES", AUTHOR),
        ("INSERT IGNORE INTO author VALUES (1)", AUTHOR),
        ("update author set name = 'delete from book'", AUTHOR),
        ("UPDATE ONLY author AS a SET name = coalesce(name, 'x') WHERE a.id IN (1, 2)", AUTHOR),
        ("UPDATE author SET name = 'x' FROM book WHERE book.author_id = author.id", AUTHOR),
        ("DELETE FROM author", AUTHOR),
        ("  DELETE FROM author a WHERE a.id = 1 RETURNING a.id;", AUTHOR),
        ("DELETE FROM archive.author", ("archive", "author")),
    ],
)
def test_text_that_can_be_seen_to_write_one_table(statement: str, target: Any) -> None:
    """A plain INSERT, UPDATE or DELETE names its table, and cannot end the transaction."""
    found = writes_of(None, statement)
    assert (found.kind, found.table, found.anything, found.opaque) == ("text", target, False, False)


@pytest.mark.parametrize(
    "statement",
    [
        "REPLACE INTO author VALUES (1)",
        "INSERT INTO author VALUES (write_something(1))",
        "UPDATE author, book SET title = 'x'",
        "UPDATE author JOIN book ON true SET title = 'x'",
        "UPDATE author SET name = 'x' RETURNING write_something(id)",
        "UPDATE \"Author\" SET name = 'x'",
        "DELETE author, book FROM author JOIN book ON true",
        "DELETE FROM author; DELETE FROM book",
        "DELETE FROM author USING write_something(1) AS x",
        "MERGE INTO author USING book ON true WHEN MATCHED THEN DELETE",
        "WITH gone AS (DELETE FROM author RETURNING id) SELECT * FROM gone",
        "SELECT * INTO backup FROM author",
        "SELECT 1; DELETE FROM author",
        "SET x = 1; DELETE FROM author",
        "SELECT write_something(1)",
        "EXPLAIN ANALYZE DELETE FROM author",
        "EXPLAIN ANALYZE SELECT write_something(1)",
        "CALL write_something()",
        "DO $$ BEGIN DELETE FROM author; END $$",
        "COPY author FROM STDIN",
        "CREATE TABLE x (y int)",
        "DROP TABLE author",
        "TRUNCATE author",
        "SELECT /*!50000 write_something() */ 1",
        "SELECT 'it\\' ; DELETE FROM author; --'",
        "",
        "frobnicate",
    ],
)
def test_text_that_may_write(statement: str) -> None:
    """Whatever writes, or calls a function nobody knows, or is not understood, writes anything."""
    found = writes_of(None, statement)
    assert found.anything
    assert found.opaque


@pytest.mark.parametrize("statement", ["COMMIT", "END", "PREPARE TRANSACTION 'x'"])
def test_text_that_ends_a_transaction_is_opaque(statement: str) -> None:
    """It writes nothing itself, and makes durable what was written before."""
    found = writes_of(None, statement)
    assert found.opaque
    assert not found


@pytest.mark.parametrize(
    ("statement", "sets"),
    [
        ("SET LOCAL app.tenant = '1'", True),
        ("RESET ALL", True),
        ("SELECT set_config('app.tenant', '1', true)", True),
        ("WITH x AS (SELECT set_config('a', 'b', false)) SELECT * FROM x", True),
        ("SELECT 'set_config'", False),
        ("SELECT 1", False),
        ("SHOW search_path", False),
    ],
)
def test_text_that_changes_what_the_connection_sees(statement: str, sets: bool) -> None:
    """SET and its kin write no row, but what the connection reads may be its own from now on."""
    found = writes_of(None, statement)
    assert not found
    assert found.sets is sets


def test_set_config_is_seen_in_expressions() -> None:
    """The function does what SET does, whether it is written as text or not."""
    compiled = select(func.set_config("app.tenant", "1", True)).compile(dialect=sqlite.dialect())
    found = writes_of(Context(compiled), str(compiled))
    assert found.sets
    assert not found


def test_text_statements_are_read_like_driver_sql(engine: Engine, log: Log) -> None:
    """``text()`` is no better known than what is sent to the driver as it is."""
    with engine.begin() as connection:
        assert one(log, connection, text("DELETE FROM author"))[0].table == AUTHOR
        assert not one(log, connection, text("SELECT * FROM author"))[0]
        log.take()
        connection.exec_driver_sql("DELETE FROM author")
        assert log.take()[0][0].table == AUTHOR
