"""Views that say `__scope__`: each session reads the records of its own tenant, whichever way."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Engine,
    ForeignKey,
    create_engine,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    column_property,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from sa_tablecache import (
    AsyncTableCache,
    CachedView,
    CriteriaError,
    ScoreIndex,
    TableCache,
    UnscopedRead,
    ViewDefinitionError,
    bypass_cache,
)
from tests.conftest import asynchronous
from tests.integration.checking import counting


class Base(DeclarativeBase):
    """Models of these tests."""


class Author(Base):
    """Somebody who writes for several tenants."""

    __tablename__ = "tenant_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Note(Base):
    """A row that belongs to one tenant, or to none."""

    __tablename__ = "tenant_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int | None]
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    stars: Mapped[int | None]


class Notes(CachedView):
    """The view that is kept to tenants."""

    __select__ = select(Note.id, Note.tenant_id, Note.stars, Author.name.label("author")).join(
        Author, Note.author_id == Author.id
    )
    __scope__ = "tenant_id"
    by_stars = ScoreIndex("stars")
    by_tenant = ScoreIndex("tenant_id", "stars")
    by_half = ScoreIndex(Note.stars / 2)


class Shelf(Base):
    """A mapped class with a property that reads the view."""

    __tablename__ = "tenant_shelf"
    id: Mapped[int] = mapped_column(primary_key=True)
    note_count: Mapped[int] = column_property(
        select(func.count()).select_from(Notes).scalar_subquery()
    )


ROWS = [(1, 1, 1, 10), (2, 1, 2, 20), (3, 2, 1, 10), (4, 2, 2, None), (5, None, 1, 10)]
"""id, tenant, author, stars: tenant 1 has 1 and 2, tenant 2 has 3 and 4, nobody has 5."""

MINE = {1: [1, 2], 2: [3, 4], 3: []}


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """A database with the notes of two tenants."""
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    names = ("id", "tenant_id", "author_id", "stars")
    with engine.begin() as connection:
        connection.execute(insert(Author), [{"id": 1, "name": "ada"}, {"id": 2, "name": "bob"}])
        connection.execute(insert(Note), [dict(zip(names, row, strict=True)) for row in ROWS])
        connection.execute(text("INSERT INTO tenant_shelf VALUES (1)"))
    yield engine
    engine.dispose()


def tenant_of(session: Session) -> Any:
    """Return the tenant that a test has put into the session's info."""
    return session.info["tenant_id"]


def nothing(_cache: TableCache) -> None:
    """Load nothing."""


def everything(cache: TableCache) -> None:
    """Load all of the view."""
    cache.load(Notes)


def a_part(cache: TableCache) -> None:
    """Load a part of an index that does not lead with the tenant."""
    cache.load(Notes, Notes.stars >= 15)


def one_tenant(cache: TableCache) -> None:
    """Load one tenant's records."""
    cache.load(Notes, Notes.tenant_id == 1)


def stale(cache: TableCache) -> None:
    """Load all, and mark it."""
    cache.load(Notes)
    cache.invalidate(Note, 1)


@pytest.fixture(params=[nothing, everything, a_part, one_tenant, stale], ids=lambda f: f.__name__)
def factory(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Sessions with scopes, over a cache with all, some or nothing of the view in it."""
    with TableCache(engine, views=[Notes]) as cache:
        request.param(cache)
        yield cache.sessionmaker(scope=tenant_of)


def ids(records: Any) -> list[int]:
    """Return the ids of records in their order."""
    return sorted(record.id for record in records)


other = aliased(Notes.__table__)
total = func.count()


READS: dict[str, Callable[[Any], list[int]]] = {
    "select": lambda s: ids(s.scalars(select(Notes))),
    "execute": lambda s: [row[0].id for row in s.execute(select(Notes).order_by(Notes.id))],
    "columns": lambda s: list(s.scalars(select(Notes.id).order_by(Notes.id))),
    "ordered by an index": lambda s: ids(s.scalars(select(Notes).order_by(Notes.by_half))),
    "criteria of all tenants": lambda s: ids(
        s.scalars(select(Notes).where((Notes.tenant_id == 1) | (Notes.tenant_id != 1)))
    ),
    "query": lambda s: ids(s.query(Notes).all()),
    "iteration": lambda s: ids(iter(s.query(Notes))),
    "filter_by": lambda s: ids(s.query(Notes).filter(Notes.id > 0)),
    "bypass": lambda s: ids(s.scalars(select(Notes).options(bypass_cache()))),
    "alias": lambda s: sorted(s.scalars(select(other.c.id))),
    "alias as a whole": lambda s: ids(s.scalars(select(other))),
    "join with a table": lambda s: sorted(
        s.scalars(select(Note.id).join(Notes.__table__, Notes.id == Note.id))
    ),
    "join with itself": lambda s: sorted(
        s.scalars(select(Notes.id).join(other, other.c.id == Notes.id))
    ),
    "outer join": lambda s: sorted(
        s.scalars(
            select(Note.id)
            .outerjoin(Notes.__table__, Notes.id == Note.id)
            .where(Notes.id.is_not(None))
        )
    ),
    "subquery": lambda s: sorted(s.scalars(select(select(Notes.id).subquery().c.id))),
    "cte": lambda s: sorted(s.scalars(select(select(Notes.id).cte().c.id))),
    "in": lambda s: sorted(s.scalars(select(Note.id).where(Note.id.in_(select(Notes.id))))),
    "exists": lambda s: sorted(
        s.scalars(select(Note.id).where(exists().where(Notes.id == Note.id)))
    ),
    "union": lambda s: sorted(
        s.scalars(union_all(select(Notes.id), select(Notes.id).where(literal(False))))
    ),
    "grouped": lambda s: sorted(s.scalars(select(Notes.id).group_by(Notes.id))),
    "limit": lambda s: ids(s.scalars(select(Notes).order_by(Notes.id).limit(10))),
    "offset": lambda s: ids(s.scalars(select(Notes).order_by(Notes.id).offset(0))),
    "get": lambda s: [n for n in range(1, 6) if s.get(Notes, n) is not None],
    "range": lambda s: ids(s.range(Notes.by_stars)),
    "range by tenant": lambda s: ids(s.range(Notes.by_tenant)),
    "range of each tenant": lambda s: ids(
        [r for tenant in (1, 2, 3, None) for r in s.range(Notes.by_tenant, tenant)]
    ),
    "range of all tenants": lambda s: ids(s.range(Notes.by_tenant, ge=0)),
    "range by an expression": lambda s: ids(s.range(Notes.by_half)),
    "range backwards": lambda s: ids(s.range(Notes.by_stars, descending=True)),
    "pages": lambda s: ids(pages(s, Notes.by_stars)),
    "pages backwards": lambda s: ids(pages(s, Notes.by_half, descending=True)),
    "entity from a statement": lambda s: ids(
        s.scalars(
            select(Note).from_statement(
                select(
                    Notes.id,
                    literal(1).label("tenant_id"),
                    literal(1).label("author_id"),
                    literal(1).label("stars"),
                )
            )
        )
    ),
}


def pages(session: Any, index: Any, **options: Any) -> list[Any]:
    """Read an index page by page."""
    found: list[Any] = []
    while page := session.range(index, limit=1, after=found[-1] if found else None, **options):
        found += page
    return found


def test_every_read_is_kept_to_the_tenant(factory: Any):
    """However a view is read and whatever answers, it shows the records of one tenant."""
    for name, read in READS.items():
        for tenant, mine in (*MINE.items(), *MINE.items()):
            with factory(info={"tenant_id": tenant}) as session:
                assert read(session) == mine, (name, tenant)


COUNTS: dict[str, Callable[[Any], int]] = {
    "count": lambda s: s.scalar(select(total).select_from(Notes)),
    "count of a query": lambda s: s.query(Notes).count(),
    "count of a part": lambda s: s.query(Notes).limit(100).count(),
    "count of a column": lambda s: s.scalar(select(func.count(Notes.id))),
    "scalar subquery": lambda s: s.scalar(select(select(func.count(Notes.id)).scalar_subquery())),
    "sum over a query": lambda s: len(s.query(Notes.id, Notes.stars).all()),
    "exists": lambda s: 2 * int(s.query(s.query(Notes).exists()).scalar()),
    "mapped property": lambda s: s.get_one(Shelf, 1).note_count,
    "refreshed property": lambda s: (s.refresh(shelf := s.get_one(Shelf, 1)), shelf.note_count)[1],
    "query of a property": lambda s: s.query(Shelf.note_count).scalar(),
}


def test_every_count_is_kept_to_the_tenant(factory: Any):
    """Numbers tell nothing of other tenants either."""
    for name, count in COUNTS.items():
        for tenant, mine in MINE.items():
            with factory(info={"tenant_id": tenant}) as session:
                assert count(session) == len(mine), (name, tenant)


def test_a_read_without_a_scope_is_refused(factory: Any):
    """Nobody's session shows nothing, whichever way it is asked."""
    for read in (*READS.values(), *COUNTS.values()):
        for info in ({}, {"tenant_id": None}):
            with factory(info=info) as session, pytest.raises(UnscopedRead, match="tenant_id"):
                read(session)


WRITES: dict[str, Callable[[], Any]] = {
    "update": lambda: update(Note).where(Note.id.in_(select(Notes.id))).values(stars=99),
    "delete": lambda: delete(Note).where(Note.id.in_(select(Notes.id))),
    "insert": lambda: insert(Note).from_select(
        ["id", "tenant_id", "author_id", "stars"],
        select(Notes.id + 100, Notes.tenant_id, literal(1), literal(99)),
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_statements_that_write_are_kept_to_the_tenant(
    factory: Any, engine: Engine, write: Callable[[], Any]
):
    """An UPDATE by a subquery of a view writes the rows of one tenant."""
    with engine.connect() as connection:
        before = set(connection.execute(select(Note.__table__)))
    with factory(info={"tenant_id": 2}) as session:
        session.execute(write(), execution_options={"synchronize_session": False})
        session.commit()
        read = ids(session.scalars(select(Notes)))
    with engine.connect() as connection:
        after = set(connection.execute(select(Note.__table__)))
    assert {row.tenant_id for row in before ^ after} == {2}
    assert read == sorted(row.id for row in after if row.tenant_id == 2)
    with factory() as session, pytest.raises(UnscopedRead):
        session.execute(write(), execution_options={"synchronize_session": False})


def test_a_tenants_records_are_served_from_memory(engine: Engine):
    """What is covered needs no SQL, also by an index that does not lead with the tenant."""
    with TableCache(engine, views=[Notes]) as cache:
        cache.load(Notes)
        with cache.sessionmaker(scope=tenant_of)(info={"tenant_id": 2}) as session:
            with counting() as statements:
                assert ids(session.scalars(select(Notes))) == [3, 4]
                assert ids(session.range(Notes.by_stars, ge=1)) == [3]
                assert ids(session.range(Notes.by_tenant, 2)) == [3, 4]
                assert session.get(Notes, 3).author == "ada"
                assert session.query(Notes).count() == 2
                assert "tenant" not in session.query(Notes).explain().reason
            assert statements == []
            assert session.get(Notes, 1) is None


def test_other_statements_run_as_ever(engine: Engine):
    """What has nothing to do with views is executed in a scoped session as in any."""
    with TableCache(engine, views=[Notes]) as cache:
        cache.load(Notes)
        with cache.sessionmaker(scope=tenant_of)() as session:
            row = {"tenant_id": 1, "author_id": 1, "stars": 5}
            found = session.scalars(
                insert(Note).returning(Note), [{**row, "id": 6}, {**row, "id": 7}]
            )
            assert sorted(note.id for note in found) == [6, 7]
            session.execute(insert(Note), [{**row, "id": 8}])
            session.execute(update(Note).where(Note.id == 8).values(stars=6))
            session.execute(update(Note), [{"id": 7, "stars": 7}])
            session.execute(text("DELETE FROM tenant_note WHERE id = :id"), {"id": 6})
            session.bulk_save_objects([Note(id=9, **row)])
            note = session.get_one(Note, 7)
            assert (note.stars, session.scalar(select(func.count(Note.id)))) == (7, 8)
            session.refresh(note)
            session.delete(note)
            session.commit()
            session.info["tenant_id"] = 1
            assert ids(session.scalars(select(Notes))) == [1, 2, 8, 9]


def test_an_own_write_is_read_within_the_scope(engine: Engine):
    """A transaction that wrote sees its own rows, and of them those of its tenant."""
    with TableCache(engine, views=[Notes]) as cache:
        cache.load(Notes)
        factory = cache.sessionmaker(scope=tenant_of)
        with factory(info={"tenant_id": 2}) as session:
            session.add(Note(id=6, tenant_id=2, author_id=1, stars=1))
            session.add(Note(id=7, tenant_id=1, author_id=1, stars=1))
            assert ids(session.scalars(select(Notes))) == [3, 4, 6]
            assert ids(session.range(Notes.by_stars)) == [3, 4, 6]
            session.get_one(Note, 3).tenant_id = 1
            session.commit()
            assert ids(session.range(Notes.by_stars)) == [4, 6]
        with factory(info={"tenant_id": 1}) as session:
            assert ids(session.range(Notes.by_stars)) == [1, 2, 3, 7]


def test_the_scope_is_asked_at_each_read(engine: Engine):
    """A session whose tenant changes reads as the new one; a statement is no tenant's."""
    with TableCache(engine, views=[Notes]) as cache:
        cache.load(Notes)
        statement = select(Notes)
        with cache.sessionmaker(scope=tenant_of)() as session:
            for tenant, mine in (*MINE.items(), *MINE.items()):
                session.info["tenant_id"] = tenant
                assert ids(session.scalars(statement)) == mine
                assert ids(session.query(Notes)) == mine


def test_a_scope_of_another_type_is_no_way_around(factory: Any):
    """What is not the column's type is compared by the database, or refused by it."""
    for value in ("2", 2.0, "1 OR 1=1", [1, 2], object()):
        with factory(info={"tenant_id": value}) as session:
            try:
                found = ids(session.scalars(select(Notes)))
            except DBAPIError:
                session.rollback()
            except StatementError:
                pass
            else:
                assert found in (MINE[2], []), value


# --- whose sessions -------------------------------------------------------------------------------


@contextmanager
def attached(cache: TableCache, target: Any, **options: Any) -> Iterator[Session]:
    """Lend a session of a target that is attached to a cache."""
    cache.attach(target, **options)
    session = target if isinstance(target, Session) else target()
    with session:
        yield session


def test_attached_factories_have_scopes(engine: Engine):
    """A plain Session that is attached with a scope is kept to it like any."""
    with TableCache(engine, views=[Notes]) as cache:
        cache.load(Notes)
        for target in (sessionmaker(engine), Session(engine), scoped_session(sessionmaker(engine))):
            with attached(cache, target, scope=tenant_of) as session:
                session.info["tenant_id"] = 1
                assert ids(session.scalars(select(Notes))) == [1, 2]
                assert sorted(session.scalars(select(other.c.id))) == [1, 2]


@pytest.mark.parametrize("loaded", [False, True])
def test_who_has_no_scope_reads_nothing(engine: Engine, loaded: bool):
    """Sessions attached without one, others, and connections are refused."""
    with TableCache(engine, views=[Notes]) as cache:
        if loaded:
            cache.load(Notes)
        with cache.sessionmaker()() as session:
            for read in (*READS.values(), *COUNTS.values()):
                with pytest.raises(UnscopedRead):
                    read(session)
        with attached(cache, sessionmaker(engine)) as session, pytest.raises(UnscopedRead):
            session.scalars(select(Notes)).all()
        with Session(engine) as session, pytest.raises(UnscopedRead):
            session.scalars(select(Notes)).all()
        with cache.sessionmaker(scope=tenant_of)(info={"tenant_id": 1}) as session:
            with pytest.raises(UnscopedRead):
                session.connection().execute(select(Notes))
            assert ids(session.scalars(select(Notes))) == [1, 2]
        with engine.connect() as connection, pytest.raises(UnscopedRead):
            connection.execute(select(Notes))
        with engine.connect() as connection:
            assert len(connection.execute(Notes.__select__).all()) == 5


def test_a_page_does_not_go_on_after_a_foreign_record(engine: Engine):
    """Where the record of another tenant stands is not told."""
    with TableCache(engine, views=[Notes]) as cache:
        factory = cache.sessionmaker(scope=tenant_of)
        with factory(info={"tenant_id": 1}) as session:
            record = session.get(Notes, 1)
        with factory(info={"tenant_id": 2}) as session, pytest.raises(CriteriaError):
            session.range(Notes.by_half, limit=1, after=record)


def test_the_owner_loads_and_counts_all(engine: Engine):
    """What the cache itself does is nobody's read."""
    with TableCache(engine, views=[Notes]) as cache:
        assert cache.estimate(Notes).rows == 5
        cache.load(Notes)
        assert cache.stats(Notes).records == 5
        with engine.begin() as connection:
            connection.execute(update(Author).where(Author.id == 1).values(name="eve"))
        cache.refresh(Notes)
        assert cache.stats(Notes).records == 5
        assert cache.covers(Notes)
        cache.extend(Notes, Notes.stars > 1)
        cache.evict(Notes, Notes.tenant_id == 1)
        cache._check()


def test_a_scope_has_to_be_a_column():
    """A view that names no column of its own is refused, and so is a view over one with scopes."""
    with pytest.raises(ViewDefinitionError, match="tenant_id, stars"):

        class Wrong(CachedView):
            __select__ = select(Note.id, Note.tenant_id, Note.stars)
            __scope__ = "tenant"

    class Over(CachedView):
        __select__ = select(Notes.id, Notes.stars)
        __primary_key__ = ("id",)

    with pytest.raises(ViewDefinitionError, match="Notes"):
        Over.__plan__


async def test_sessions_of_tasks_have_scopes(async_database_url: URL, engine: Engine):
    """Async sessions are kept to their tenants, many at a time."""
    async_engine = create_async_engine(asynchronous(engine.url))
    async with AsyncTableCache(async_engine, views=[Notes]) as cache:
        plain = async_sessionmaker(async_engine)
        cache.attach(plain, scope=tenant_of)

        async def read(tenant: int, factory: Any) -> None:
            async with factory(info={"tenant_id": tenant}) as session:
                for _ in range(3):
                    assert ids((await session.scalars(select(Notes))).all()) == MINE[tenant]
                    found = (await session.execute(select(other.c.id))).scalars()
                    assert sorted(found) == MINE[tenant]
                    stream = await session.stream_scalars(select(Notes))
                    assert ids(await stream.all()) == MINE[tenant]
                    if not isinstance(session.sync_session, Session) or factory is plain:
                        continue
                    assert ids(await session.range(Notes.by_stars)) == MINE[tenant]
                    assert ids(await async_pages(session)) == MINE[tenant]
                    for key in range(1, 6):
                        record = await session.get(Notes, key)
                        assert (record is not None) == (key in MINE[tenant])

        async def async_pages(session: Any) -> list[Any]:
            found: list[Any] = []
            while page := await session.range(
                Notes.by_half, limit=1, after=found[-1] if found else None
            ):
                found += page
            return found

        factories = [cache.sessionmaker(scope=tenant_of), plain]
        for load in (False, True):
            if load:
                await cache.load(Notes)
            await asyncio.gather(*(read(t, f) for t in MINE for f in factories for _ in range(4)))
        async with cache.sessionmaker()() as session:
            with pytest.raises(UnscopedRead):
                await session.scalars(select(Notes))
            with pytest.raises(UnscopedRead):
                await session.range(Notes.by_stars)
            with pytest.raises(UnscopedRead):
                await session.get(Notes, 1)
        async with AsyncSession(async_engine) as session:
            with pytest.raises(UnscopedRead):
                await session.execute(select(Notes))
    await async_engine.dispose()
