"""What each way to write marks: rows where they can be known, else as few tables as can be proven.

A mark is written as ``book 1``, in place as ``book 1 (in place)``, of the whole view as ``all``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    String,
    Table,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    sessionmaker,
)

from sa_tablecache import CachedView, CriteriaError, ScoreIndex, TableCache
from tests.integration.checking import counting


class Base(DeclarativeBase):
    """Models of these tests."""


book_tag = Table(
    "exact_book_tag",
    Base.metadata,
    Column("book_id", ForeignKey("exact_book.id", ondelete="CASCADE"), primary_key=True),
    Column("tag_id", ForeignKey("exact_tag.id"), primary_key=True),
)


class Tag(Base):
    """What books are many-to-many with."""

    __tablename__ = "exact_tag"
    id: Mapped[int] = mapped_column(primary_key=True)
    word: Mapped[str] = mapped_column(String(20))


class Author(Base):
    """A parent; its favourite is a book that is written after it: post_update."""

    __tablename__ = "exact_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    born: Mapped[int | None]
    favourite_id: Mapped[int | None] = mapped_column(
        ForeignKey("exact_book.id", use_alter=True, name="exact_favourite")
    )
    books: Mapped[list["Book"]] = relationship(
        back_populates="author", foreign_keys="Book.author_id", passive_deletes=True
    )
    favourite: Mapped["Book | None"] = relationship(post_update=True, foreign_keys=[favourite_id])


class Book(Base):
    """A child, deleted with its author."""

    __tablename__ = "exact_book"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20), default="book")
    title: Mapped[str] = mapped_column(String(20), default="")
    pages: Mapped[int] = mapped_column(default=0)
    shelf: Mapped[int] = mapped_column(default=0)
    code: Mapped[str | None] = mapped_column(String(20), unique=True)
    author_id: Mapped[int | None] = mapped_column(
        ForeignKey("exact_author.id", ondelete="CASCADE", onupdate="CASCADE")
    )
    author: Mapped[Author | None] = relationship(back_populates="books", foreign_keys=[author_id])
    tags: Mapped[list[Tag]] = relationship(secondary=book_tag, passive_deletes=True)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "book"}


class Atlas(Book):
    """A book with a further table: joined inheritance."""

    __tablename__ = "exact_atlas"
    id: Mapped[int] = mapped_column(ForeignKey(Book.id, ondelete="CASCADE"), primary_key=True)
    maps: Mapped[int] = mapped_column(default=0)
    __mapper_args__ = {"polymorphic_identity": "atlas"}


class Shelf(CachedView):
    """Books with their authors, tags and maps."""

    __select__ = (
        select(
            Book.id,
            Book.title,
            Book.pages,
            Author.name.label("author"),
            Tag.id.label("tag"),
            Tag.word,
            Atlas.__table__.c.maps,
        )
        .outerjoin(Author, Book.author_id == Author.id)
        .outerjoin(book_tag, book_tag.c.book_id == Book.id)
        .outerjoin(Tag, Tag.id == book_tag.c.tag_id)
        .outerjoin(Atlas.__table__, Atlas.__table__.c.id == Book.id)
    )
    __primary_key__ = ("id", "tag")
    by_pages = ScoreIndex("pages")


books: Any = Book.__table__
authors: Any = Author.__table__


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """A database with two authors, five books and two tags."""
    engine = create_engine(database_url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def connect(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA journal_mode = WAL")

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Author(id=n, name=f"author {n}") for n in (1, 2)])
        session.add_all([Tag(id=n, word=f"tag {n}") for n in (1, 2)])
        session.flush()
        session.add_all([Book(id=n, pages=n, code=f"c{n}", author_id=1) for n in (1, 2, 3, 4)])
        session.add(Atlas(id=5, pages=5, maps=7, author_id=2))
        session.commit()
        if engine.dialect.name == "postgresql":  # keys above those that were given
            session.execute(text("ALTER SEQUENCE exact_book_id_seq RESTART WITH 6"))
        session.commit()
    yield engine
    engine.dispose()


@pytest.fixture
def cache(engine: Engine) -> Iterator[TableCache]:
    """A cache with all books."""
    with TableCache(engine, views=[Shelf]) as cache:
        cache.load(Shelf)
        yield cache
        cache._check()


def marks(cache: TableCache) -> set[str]:
    """Return what is marked, and check that the next read is right."""
    found = set()
    for mark in cache.table(Shelf)._freshness.pending:
        name = (mark.table[1] or "all").removeprefix("exact_")
        label = " ".join([name, *map(str, mark.key)])
        found.add(label if mark.moves else f"{label} (in place)")
    with cache.sessionmaker()() as session:
        cached = {(r.id, r.tag): r for r in session.scalars(select(Shelf))}
        assert session.last_read is not None
        assert session.last_read.kind == "hit"
    with Session(cache.engine) as session:
        stored = {(r.id, r.tag): tuple(r) for r in session.execute(Shelf.__select__)}
    assert {key: tuple(r._asdict().values()) for key, r in cached.items()} == stored
    return found


def _pages(n: int) -> Any:
    return update(Book).where(Book.pages > n).values(pages=Book.pages + 10)


def flush_insert(session: Session) -> None:
    """A new object."""
    session.add(Book(title="new"))


def flush_inserts(session: Session) -> None:
    """New objects, whose keys the database makes."""
    session.add_all([Book(title="new"), Book(title="newer")])


def flush_placing(session: Session) -> None:
    """An object that changes its score."""
    session.get_one(Book, 1).pages = 100


def flush_shown(session: Session) -> None:
    """An object that changes what is only shown."""
    session.get_one(Book, 1).title = "x"


def flush_unused(session: Session) -> None:
    """An object that changes what the view does not use."""
    session.get_one(Author, 1).born = 1900


def flush_delete(session: Session) -> None:
    """A deleted object."""
    session.delete(session.get_one(Book, 3))


def expired_foreign_key(session: Session) -> None:
    """A foreign key set on an object that does not know the old one."""
    book = session.get_one(Book, 1)
    session.expire(book)
    book.author_id = 2


def merged(session: Session) -> None:
    """An object merged over a stored one."""
    session.merge(Book(id=2, title="merged", pages=2))


def post_update(session: Session) -> None:
    """A foreign key that is updated after the rows are there."""
    session.get_one(Author, 1).favourite = session.get_one(Book, 1)


def link_added(session: Session) -> None:
    """A row of a many-to-many table."""
    book = session.get_one(Book, 1)
    book.tags.append(session.get_one(Tag, 2))


def inherited_column(session: Session) -> None:
    """A column of the table of a subclass."""
    session.get_one(Atlas, 5).maps = 8


def parents_column(session: Session) -> None:
    """A column of the parent's table, set on an object of the subclass."""
    session.get_one(Atlas, 5).title = "Europe"


def bulk_update(session: Session) -> None:
    """update(Model)."""
    session.execute(_pages(3))


def bulk_update_unsynchronized(session: Session) -> None:
    """update(Model) that looks at no object."""
    session.execute(_pages(3), execution_options={"synchronize_session": False})


def bulk_update_fetch(session: Session) -> None:
    """update(Model) that fetches its rows for the session."""
    session.execute(_pages(3), execution_options={"synchronize_session": "fetch"})


def bulk_update_shown(session: Session) -> None:
    """update(Model) of what is only shown."""
    session.execute(update(Author).where(Author.name.like("%2")).values(name="x"))


def bulk_update_returning(session: Session) -> None:
    """update(Model) with a RETURNING of its own that has the key."""
    rows = session.execute(_pages(3).returning(Book.title, Book.id)).all()
    assert sorted(row.id for row in rows) == [4, 5]


def bulk_update_of_nothing(session: Session) -> None:
    """update(Model) that meets no row."""
    session.execute(_pages(1_000))


def query_update(session: Session) -> None:
    """Query.update()."""
    assert session.query(Book).filter(Book.pages > 3).update({"shelf": 1, "pages": 9}) == 2


def bulk_delete(session: Session) -> None:
    """delete(Model)."""
    assert session.execute(delete(Tag).where(Tag.word == "tag 2")).rowcount == 1


def bulk_insert(session: Session) -> None:
    """insert(Model) of many rows."""
    session.execute(insert(Book), [{"title": "a"}, {"title": "b"}])


def bulk_insert_values(session: Session) -> None:
    """insert(Model) with several VALUES."""
    session.execute(insert(Book).values([{"title": "a"}, {"title": "b"}]))


def bulk_insert_returning(session: Session) -> None:
    """insert(Model) that returns objects."""
    found = session.scalars(insert(Book).returning(Book), [{"title": "a"}, {"title": "b"}]).all()
    assert sorted(book.title for book in found) == ["a", "b"]


def bulk_insert_subclass(session: Session) -> None:
    """insert(Subclass)."""
    session.execute(insert(Atlas), [{"id": 21, "maps": 1}, {"id": 22, "maps": 2}])


def bulk_update_by_key(session: Session) -> None:
    """update(Model) of a list of rows with their keys."""
    session.execute(update(Book), [{"id": 1, "pages": 7}, {"id": 2, "pages": 8}])


def insert_mappings(session: Session) -> None:
    """bulk_insert_mappings()."""
    session.bulk_insert_mappings(Book, [{"title": "a"}, {"title": "b"}])


def update_mappings(session: Session) -> None:
    """bulk_update_mappings()."""
    session.bulk_update_mappings(Book, [{"id": 1, "title": "a"}, {"id": 2, "title": "b"}])


def save_objects(session: Session) -> None:
    """bulk_save_objects()."""
    session.bulk_save_objects([Book(title="a"), Book(title="b")])


def core_update(session: Session) -> None:
    """table.update()."""
    session.connection().execute(books.update().where(books.c.pages > 3).values(pages=9))


def core_insert_from_select(session: Session) -> None:
    """INSERT .. SELECT."""
    rows = select(books.c.title, books.c.pages, books.c.kind, books.c.shelf).where(books.c.id < 3)
    session.execute(books.insert().from_select(["title", "pages", "kind", "shelf"], rows))


def core_update_many(session: Session) -> None:
    """UPDATE of many parameters, by another column than the key."""
    statement = books.update().where(books.c.code == bindparam("of")).values(pages=bindparam("n"))
    session.connection().execute(statement, [{"of": "c1", "n": 5}, {"of": "c2", "n": 6}])


def core_update_key(session: Session) -> None:
    """UPDATE of a primary key."""
    session.execute(authors.update().where(authors.c.id == 2).values(id=9))


def upsert(session: Session) -> None:
    """ON CONFLICT with another key than the primary one."""
    insert_ = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[session.bind.dialect.name]
    session.execute(
        insert_(books)
        .values(code="c2", kind="book", title="", pages=0, shelf=0)
        .on_conflict_do_update(index_elements=["code"], set_={"title": "upserted"})
    )


def upsert_nothing(session: Session) -> None:
    """ON CONFLICT DO NOTHING, and nothing is done."""
    insert_ = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[session.bind.dialect.name]
    session.execute(
        insert_(books)
        .values(code="c2", kind="book", title="", pages=0, shelf=0)
        .on_conflict_do_nothing()
    )


def driver_text(session: Session) -> None:
    """Text that names one table."""
    session.connection().exec_driver_sql("UPDATE exact_tag SET word = 'x' WHERE id = 1")


def text_of_nothing(session: Session) -> None:
    """Text that meets no row."""
    session.execute(text("UPDATE exact_book SET title = 'x' WHERE id = -1"))


def text_elsewhere(session: Session) -> None:
    """Text whose rows are declared to be none of a view."""
    session.execute(text("UPDATE exact_book SET shelf = 1").execution_options(writes=[]))


def text_declared(session: Session) -> None:
    """Text whose table is declared."""
    session.execute(text("UPDATE exact_tag SET word = 'x'"), execution_options={"writes": [Tag]})


def only_reads(session: Session) -> None:
    """Statements that read, and some that write no row."""
    session.execute(text("SELECT count(*) FROM exact_book"))
    rows = select(books.c.id).where(books.c.id < 3).cte("some")
    session.execute(select(func.count()).select_from(rows))
    session.execute(text("WITH x AS (SELECT 1) SELECT * FROM x"))
    if session.bind.dialect.name == "postgresql":
        session.execute(text("SET LOCAL application_name = 'x'"))
        session.execute(text("SHOW application_name"))
        session.execute(text("LOCK TABLE exact_book IN SHARE MODE"))


EXACT: list[tuple[Callable[[Session], None], set[str]]] = [
    (flush_insert, {"book 6"}),
    (flush_inserts, {"book 6", "book 7"}),
    (flush_placing, {"book 1"}),
    (flush_shown, {"book 1 (in place)"}),
    (flush_unused, set()),
    (expired_foreign_key, {"book 1"}),
    (merged, {"book 2 (in place)"}),
    (post_update, set()),
    (link_added, {"book_tag 1 2"}),
    (inherited_column, {"atlas 5 (in place)"}),
    (parents_column, {"book 5 (in place)"}),
    (bulk_update, {"book 4", "book 5"}),
    (bulk_update_unsynchronized, {"book 4", "book 5"}),
    (bulk_update_fetch, {"book 4", "book 5"}),
    (bulk_update_shown, {"author 2 (in place)"}),
    (bulk_update_returning, {"book 4", "book 5"}),
    (bulk_update_of_nothing, set()),
    (query_update, {"book 4", "book 5"}),
    (bulk_delete, {"tag 2"}),
    (bulk_insert, {"book 6", "book 7"}),
    (bulk_insert_values, {"book 6", "book 7"}),
    (bulk_insert_returning, {"book 6", "book 7"}),
    (bulk_insert_subclass, {"book 21", "book 22", "atlas 21", "atlas 22"}),
    (bulk_update_by_key, {"book 1", "book 2"}),
    (insert_mappings, {"book 6", "book 7"}),
    (update_mappings, {"book 1 (in place)", "book 2 (in place)"}),
    (save_objects, {"book 6", "book 7"}),
    (core_update, {"book 4", "book 5"}),
    (core_insert_from_select, {"book 6", "book 7"}),
    (upsert, {"book 2"}),
    (upsert_nothing, set()),
    (text_of_nothing, set()),
    (text_elsewhere, set()),
    (only_reads, set()),
]
COARSE: list[Callable[[Session], None]] = [
    flush_delete,  # its links and maps are deleted by cascades
    core_update_many,
    core_update_key,  # cascades to books
    driver_text,
    text_declared,
]


@pytest.mark.parametrize(("write", "expected"), EXACT, ids=[write.__name__ for write, _ in EXACT])
def test_rows_are_marked_where_they_can_be_known(
    cache: TableCache, write: Callable[[Session], None], expected: set[str]
) -> None:
    """One row changed is one row marked, whichever way it was written."""
    with cache.sessionmaker()() as session:
        write(session)
        session.commit()
    assert marks(cache) == expected


@pytest.mark.parametrize("write", COARSE, ids=lambda write: write.__name__)
def test_the_view_is_marked_where_rows_cannot_be_known(
    cache: TableCache, write: Callable[[Session], None]
) -> None:
    """What the database does by itself, and what no statement can tell, marks tables."""
    with cache.sessionmaker()() as session:
        write(session)
        session.commit()
    assert marks(cache) == {"all"}


WRITES = [*(write for write, expected in EXACT if expected), *COARSE]


def test_what_is_rolled_back_marks_nothing(cache: TableCache) -> None:
    """A rollback leaves the cache as it was."""
    for write in WRITES:
        with cache.sessionmaker()() as session:
            write(session)
            session.flush()
            session.rollback()
        assert marks(cache) == set(), write.__name__


def test_who_writes_reads_its_own_writes(cache: TableCache) -> None:
    """Inside the transaction the view is the database's, for others it is as before."""
    factory = cache.sessionmaker()
    for write in WRITES:
        with factory() as session, factory() as other:
            write(session)
            session.flush()
            mine = {tuple(r._asdict().values()) for r in session.scalars(select(Shelf))}
            assert session.last_read is not None
            assert session.last_read.kind == "bypass", write.__name__
            assert mine == {tuple(row) for row in session.connection().execute(Shelf.__select__)}
            other.scalars(select(Shelf)).all()
            assert other.last_read is not None
            assert other.last_read.kind == "hit", write.__name__


def test_one_row_costs_one_statement(cache: TableCache) -> None:
    """A bulk UPDATE of one row is read again by one SELECT of its records."""
    with cache.sessionmaker()() as session:
        session.execute(update(Book).where(Book.title == "", Book.pages == 4).values(pages=44))
        session.commit()
    with cache.sessionmaker()() as session, counting() as statements:
        assert [r.pages for r in session.range(Shelf.by_pages, ge=40)] == [44]
    reading = [s for s in statements if "exact_book" in s]
    assert len(reading) == 1
    assert "IN (" in reading[0]


def test_autocommit_marks_after_each_statement(cache: TableCache) -> None:
    """Where each statement commits, each marks its rows, and none if it met none."""
    with cache.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(books.update().where(books.c.pages > 3).values(pages=books.c.pages + 1))
        assert marks(cache) == {"book 4", "book 5"}
        connection.execute(books.update().where(books.c.pages > 999).values(pages=0))
        assert marks(cache) == set()
        connection.execute(books.insert(), [{"title": "a"}, {"title": "b"}])
        assert marks(cache) == {"book 6", "book 7"}
        connection.exec_driver_sql("DELETE FROM exact_book_tag")
        assert marks(cache) == set()


def test_dml_in_a_cte_marks_its_table(postgres_url: URL) -> None:
    """A SELECT whose CTE deletes is a write of that table."""
    engine = create_engine(postgres_url)
    Base.metadata.create_all(engine)
    with TableCache(engine, views=[Shelf]) as cache:
        with Session(engine) as session:
            session.add_all([Tag(id=1, word="a"), Book(id=1, tags=[])])
            session.commit()
        cache.load(Shelf)
        gone = delete(Tag).where(Tag.id == 1).returning(Tag.id).cte("gone")
        with Session(engine) as session:
            assert session.execute(select(gone.c.id)).all() == [(1,)]
            session.commit()
        assert marks(cache) == {"all"}
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE elsewhere (id int)"))
        cache.refresh(Shelf)
        with engine.begin() as connection:
            connection.execute(
                text(
                    "MERGE INTO elsewhere USING exact_book ON true WHEN NOT MATCHED THEN DO NOTHING"
                )
            )
        assert marks(cache) == {"all"}  # MERGE is not understood
    engine.dispose()


TRIGGERS = {
    "sqlite": """
        CREATE TRIGGER counted AFTER INSERT ON exact_book_tag BEGIN
        UPDATE exact_tag SET word = 'used' WHERE id = new.tag_id; END
    """,
    "postgresql": """
        CREATE FUNCTION counted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE exact_tag SET word = 'used' WHERE id = new.tag_id; RETURN new; END $$;
        CREATE TRIGGER counted AFTER INSERT ON exact_book_tag
        FOR EACH ROW EXECUTE FUNCTION counted()
    """,
}


def test_what_triggers_write_is_declared(engine: Engine) -> None:
    """check() asks what a trigger writes; side_effects() answers, and own writes count too."""
    with engine.begin() as connection:
        connection.exec_driver_sql(TRIGGERS[engine.dialect.name])
    with TableCache(engine, views=[Shelf]) as cache:
        cache.load(Shelf)
        [problem] = [p for p in cache.check() if "counted" in p.what]
        assert "cache.side_effects(" in problem.what
        cache.side_effects(book_tag, writes=[Tag])
        assert not [p for p in cache.check() if "counted" in p.what]
        with cache.sessionmaker()() as session:
            book = session.get_one(Book, 1)
            book.tags.append(session.get_one(Tag, 1))
            session.flush()
            assert session.get(Shelf, (1, 1)).word == "used"
            session.commit()
        assert marks(cache) == {"all"}
        with cache.sessionmaker()() as session:
            assert session.get(Shelf, (1, 1)).word == "used"


def test_a_chain_of_side_effects_is_followed(engine: Engine) -> None:
    """What is written by the side effect of a side effect is marked, and seen as an own write."""
    with TableCache(engine, views=[Shelf]) as cache:
        cache.load(Shelf)
        far = Table("far", Base.metadata.__class__(), Column("id", Integer, primary_key=True))
        far.create(engine)
        cache.side_effects(far, writes=[Atlas])
        cache.refresh(Shelf)
        assert cache.affecting(frozenset({(None, "exact_tag")})) == {(None, "exact_tag")}
        cache.side_effects(Author, writes=[Tag])
        assert cache.affecting(frozenset({(None, "exact_tag")})) == {
            (None, "exact_tag"),
            (None, "exact_author"),
        }
        with cache.sessionmaker()() as session, engine.connect() as connection:
            session.execute(far.insert().values(id=1))
            session.scalars(select(Shelf)).all()
            assert session.last_read.kind == "bypass"
            connection.rollback()
            session.commit()
        assert marks(cache) == {"all"}
        with pytest.raises(CriteriaError, match="neither a mapped class nor a Table"):
            cache.side_effects("far", writes=[])
        wrong = text("SELECT 1").execution_options(writes=["tags"])
        with engine.begin() as connection, pytest.raises(CriteriaError, match="'tags' is neither"):
            connection.execute(wrong)


def test_an_update_under_a_trigger_may_set_any_column(engine: Engine) -> None:
    """Where a trigger of the table may set what the statement does not, nothing is in place."""
    trigger = {
        "sqlite": """
            CREATE TRIGGER moved AFTER UPDATE OF shelf ON exact_book BEGIN
            UPDATE exact_book SET pages = 99 WHERE id = new.id; END
        """,
        "postgresql": """
            CREATE FUNCTION moved() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN new.pages = 99; RETURN new; END $$;
            CREATE TRIGGER moved BEFORE UPDATE ON exact_book
            FOR EACH ROW EXECUTE FUNCTION moved()
        """,
    }
    with engine.begin() as connection:
        connection.exec_driver_sql(trigger[engine.dialect.name])
    with TableCache(engine, views=[Shelf]) as cache:
        cache.load(Shelf)
        with sessionmaker(engine)() as session:
            session.get_one(Book, 1).shelf = 5
            session.commit()
        assert marks(cache) == {"book 1"}


def test_savepoints_in_any_nesting_keep_what_they_wrote(cache: TableCache) -> None:
    """A savepoint that is rolled back leaves at most superfluous marks; others leave theirs."""
    with cache.sessionmaker()() as session:
        session.get_one(Book, 1).title = "outer"
        with session.begin_nested() as first:
            session.execute(_pages(4))
            with session.begin_nested():
                session.get_one(Book, 2).title = "inner"
            first.rollback()
        session.execute(update(Book).where(Book.id == 3).values(title="last"))
        session.commit()
    found = marks(cache)
    assert {"book 1 (in place)", "book 3 (in place)"} <= found
    assert "all" not in found


def test_a_transaction_outside_of_the_session_marks_when_it_commits(cache: TableCache) -> None:
    """Sessions joined to a connection publish nothing; the connection's commit does."""
    with cache.engine.connect() as connection:
        outer = connection.begin()
        if connection.dialect.name == "sqlite":  # whose driver begins too late for savepoints
            connection.exec_driver_sql("BEGIN")
        for number in (1, 2):
            with Session(connection, join_transaction_mode="create_savepoint") as session:
                session.get_one(Book, number).title = "x"
                session.commit()
        assert not cache.table(Shelf)._freshness.pending
        outer.commit()
    assert marks(cache) == {"book 1 (in place)", "book 2 (in place)"}


def _prepared(connection: Connection) -> Any:
    transaction = connection.begin_twophase("exact 1")
    connection.execute(books.update().where(books.c.pages > 3).values(pages=9))
    transaction.prepare()
    return transaction


def test_two_phase_commits_mark_whoever_commits_them(postgres_url: URL) -> None:
    """COMMIT PREPARED publishes, on the connection that prepared or on another; ROLLBACK not."""
    engine = create_engine(postgres_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Book(id=n, pages=n) for n in (1, 4)])
        session.commit()
    with TableCache(engine, views=[Shelf]) as cache:
        cache.load(Shelf)
        with engine.connect() as connection:
            transaction = _prepared(connection)
            assert marks(cache) == set()
            transaction.commit()
        assert marks(cache) == {"book 4"}
        with engine.connect() as connection:
            _prepared(connection).rollback()
        assert marks(cache) == set()
        with engine.connect() as connection, engine.connect() as other:
            _prepared(connection)
            connection.invalidate()
            other.commit_prepared("exact 1", recover=True)
        assert marks(cache) == {"book 4"}
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            connection.exec_driver_sql("UPDATE exact_book SET pages = 17 WHERE id = 1")
            connection.exec_driver_sql("PREPARE TRANSACTION 'exact 2'")
            connection.rollback()
        with engine.connect() as connection:
            connection.commit_prepared("exact 2", recover=True)
        assert marks(cache) == {"all"}
    engine.dispose()


def test_what_foreign_keys_do_that_no_model_declares(database_url: URL) -> None:
    """ON DELETE and ON UPDATE of the database itself, several levels deep, are looked up."""

    class Plain(DeclarativeBase):
        """Models without the actions that the database has."""

    class Top(Plain):
        __tablename__ = "exact_top"
        id: Mapped[int] = mapped_column(primary_key=True)
        note: Mapped[int] = mapped_column(default=0)

    class Middle(Plain):
        __tablename__ = "exact_middle"
        id: Mapped[int] = mapped_column(primary_key=True)
        top_id: Mapped[int | None]

    class Leaf(Plain):
        __tablename__ = "exact_leaf"
        id: Mapped[int] = mapped_column(primary_key=True)
        middle_id: Mapped[int | None]

    class Leaves(CachedView):
        __select__ = select(Leaf.id, Leaf.middle_id)

    engine = create_engine(database_url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda c, _: c.execute("PRAGMA foreign_keys = ON"))
    tables = """
        CREATE TABLE exact_top (id int PRIMARY KEY, note int);
        CREATE TABLE exact_middle (id int PRIMARY KEY, top_id int,
            FOREIGN KEY (top_id) REFERENCES exact_top (id) ON DELETE CASCADE);
        CREATE TABLE exact_leaf (id int PRIMARY KEY, middle_id int,
            FOREIGN KEY (middle_id) REFERENCES exact_middle (id)
            ON DELETE SET NULL ON UPDATE CASCADE)
    """
    with engine.begin() as connection:
        for statement in tables.split(";"):
            connection.exec_driver_sql(statement)
    with TableCache(engine, views=[Leaves]) as cache, Session(engine) as session:

        def leaves() -> tuple[list[tuple[int, int | None]], str]:
            with cache.sessionmaker()() as reader:
                records = reader.scalars(select(Leaves)).all()
                assert reader.last_read is not None
                return sorted((r.id, r.middle_id) for r in records), reader.last_read.kind

        for number in (1, 2):
            session.add(Top(id=number))
            session.flush()
            session.add(Middle(id=number, top_id=number))
            session.flush()
            session.add(Leaf(id=number, middle_id=number))
        session.commit()
        cache.load(Leaves)
        session.get_one(Top, 1).note = 5
        session.add(Top(id=3))
        session.commit()
        assert cache.stats(Leaves).pending_marks == 0
        session.execute(update(Middle).where(Middle.id == 2).values(id=22))
        session.commit()
        assert leaves() == ([(1, 1), (2, 22)], "hit")
        session.delete(session.get_one(Top, 1))
        session.flush()
        with cache.sessionmaker()(bind=session.connection()) as own:
            assert own.get(Leaves, 1).middle_id is None
        session.commit()
        assert leaves() == ([(1, None), (2, 22)], "hit")
    engine.dispose()


def test_what_a_statement_means_is_not_remembered_for_longer_than_it_does(engine: Engine) -> None:
    """A side effect, a view and another meaning of names count for statements that ran before."""
    write = update(Tag).where(Tag.id == 1).values(word="other")
    with TableCache(engine, views=[]) as cache:

        def run(**options: Any) -> None:
            with engine.begin() as connection:
                connection.execution_options(**options).execute(write)

        run()
        run()
        cache.add(Shelf)
        cache.load(Shelf)
        run()
        assert marks(cache)
        cache.refresh(Shelf)
        run(schema_translate_map={None: None})
        assert marks(cache)
        cache.refresh(Shelf)
        run(writes=[Author])
        assert marks(cache)
        cache.refresh(Shelf)
        run()
        assert marks(cache)
        cache.refresh(Shelf)
        cache.side_effects(Tag, writes=[Author])
        run()
        assert marks(cache) == {"all"}
