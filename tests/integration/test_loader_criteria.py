"""Criteria that the application adds to its reads apply to the tables of a view, too."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Engine,
    ForeignKey,
    create_engine,
    event,
    exists,
    func,
    select,
    union_all,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    aliased,
    mapped_column,
    relationship,
    sessionmaker,
    with_loader_criteria,
)

from sa_tablecache import (
    AsyncCacheSession,
    AsyncTableCache,
    CachedView,
    CacheSession,
    ScoreIndex,
    TableCache,
    harmless,
)
from tests.conftest import asynchronous
from tests.integration.checking import counting


class Base(DeclarativeBase):
    """Models of these tests."""


class Owned:
    """A mixin for all tables whose rows belong to somebody."""

    owner: Mapped[int] = mapped_column()


class B(Owned, Base):
    """The row that others refer to."""

    __tablename__ = "criteria_b"
    id: Mapped[int] = mapped_column(primary_key=True)
    x: Mapped[int]


class A(Owned, Base):
    """A row that may refer to another."""

    __tablename__ = "criteria_a"
    id: Mapped[int] = mapped_column(primary_key=True)
    b_id: Mapped[int | None] = mapped_column(ForeignKey(B.id))
    b: Mapped[B | None] = relationship()


a, b, numbers = aliased(A), aliased(B), select(A.id).cte()

SELECTS: dict[str, Any] = {
    "columns": select(A.id, A.owner.label("whose")),
    "join": select(A.id, B.x).join(B, A.b_id == B.id),
    "outer join": select(A.id, B.x).outerjoin(B, A.b_id == B.id),
    "relationship": select(A.id, B.x).join(A.b),
    "outer relationship": select(A.id, B.x).outerjoin(A.b),
    "alias": select(a.id, b.x).join(b, a.b_id == b.id),
    "alias of a relationship": select(a.id, b.x).outerjoin(a.b.of_type(b)),
    "entity": select(A),
    "subquery": select(A.id).where(A.b_id.in_(select(B.id))),
    "groups": select(A.b_id.label("id"), func.count(A.id).label("n")).group_by(A.b_id),
    "union": union_all(select(A.id), select(B.id + 10)),
    "cte": select(numbers.c.id),
    "exists": select(A.id).where(exists().where(B.id == A.b_id)),
}

CRITERIA: dict[str, Callable[[], Any]] = {
    "class": lambda: with_loader_criteria(A, A.owner == 1),
    "joined class": lambda: with_loader_criteria(B, B.owner == 1),
    "mixin": lambda: with_loader_criteria(Owned, lambda c: c.owner == 1, include_aliases=True),
    "not loaders": lambda: with_loader_criteria(
        Owned, lambda c: c.owner == 1, propagate_to_loaders=False
    ),
}

VIEWS: dict[str, Any] = {
    name: type(
        "Criteria" + name.title().replace(" ", ""),
        (CachedView,),
        {"__select__": statement, "__primary_key__": ("id",), "by_id": ScoreIndex("id")},
    )
    for name, statement in SELECTS.items()
}


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """Rows of two owners, some of which refer to the other's."""
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([B(id=1, x=1, owner=1), B(id=2, x=2, owner=2)])
        session.flush()
        rows = [(1, 1, 1), (2, 2, 1), (3, 1, 2), (4, None, 1)]
        session.add_all([A(id=i, b_id=b_id, owner=owner) for i, b_id, owner in rows])
        session.commit()
    yield engine
    engine.dispose()


def values(records: Any) -> list[tuple[Any, ...]]:
    """Return the values of records, sorted."""
    return sorted((tuple(record._asdict().values()) for record in records), key=repr)


def truth(engine: Engine, name: str, *options: Any) -> list[tuple[Any, ...]]:
    """Return what a view's own select gives with the criteria."""
    view, statement = VIEWS[name], SELECTS[name].options(*options)
    names = [column.name for column in view.__table__.c]
    with Session(engine) as session:
        if name == "entity":
            found = [tuple(getattr(r, n) for n in names) for r in session.scalars(statement)]
        else:
            found = [tuple(row) for row in session.execute(statement)]
    return sorted(found, key=repr)


@pytest.mark.parametrize("loaded", [False, True])
def test_an_option_applies_to_every_kind_of_view(engine: Engine, loaded: bool):
    """`with_loader_criteria` hides the rows of a view as it hides those of its select."""
    changed = 0
    with TableCache(engine, views=VIEWS.values()) as cache, cache.sessionmaker()() as session:
        for name, view in VIEWS.items():
            if loaded:
                cache.load(view)
            for which, option in CRITERIA.items():
                expected = truth(engine, name, option())
                statement = select(view).options(option())
                assert values(session.scalars(statement)) == expected, (name, which)
                assert values(session.query(view).options(option())) == expected, (name, which)
                assert session.query(view).options(option()).count() == len(expected)
                changed += expected != truth(engine, name)
            assert values(session.scalars(select(view))) == truth(engine, name), name
    assert changed > len(VIEWS)


def only_mine(state: ORMExecuteState) -> None:
    """Add criteria to every SELECT, as SQLAlchemy's manual has it."""
    if state.is_select and not state.is_column_load and not state.is_relationship_load:
        option = with_loader_criteria(Owned, lambda c: c.owner == 1, include_aliases=True)
        state.statement = state.statement.options(option)


def sees_only_mine(session: Any, engine: Engine) -> None:
    """Assert that each way of reading has the criteria applied."""
    option = CRITERIA["mixin"]()
    for name in ("columns", "join", "outer relationship", "alias", "entity", "groups"):
        view, expected = VIEWS[name], truth(engine, name, option)
        assert values(session.scalars(select(view))) == expected
        assert values(row[0] for row in session.execute(select(view))) == expected
        assert values(session.query(view)) == expected
        assert session.scalar(select(func.count()).select_from(view)) == len(expected)
        if isinstance(session, CacheSession):
            assert values(session.range(view.by_id)) == expected
            found = (session.get(view, key) for key in range(1, 5))
            expected = [row for row in expected if row[0] is not None]
            assert values(record for record in found if record is not None) == expected


@pytest.mark.parametrize("first", [False, True], ids=["after the cache", "before the cache"])
@pytest.mark.parametrize("where", ["class", "factory", "session", "all sessions"])
def test_a_listener_applies_wherever_it_listens(engine: Engine, where: str, first: bool):
    """Criteria added in `do_orm_execute` count, whoever listened first, and on whatever."""

    class Mine(CacheSession):
        """A class of sessions of the application."""

    with TableCache(engine, views=VIEWS.values()) as cache:
        for view in VIEWS.values():
            cache.load(view)
        target: Any = {"class": Mine, "all sessions": Session}.get(where)
        if first and target is not None:
            event.listen(target, "do_orm_execute", only_mine)
        factory = cache.sessionmaker(class_=Mine)
        session = factory()
        if not (first and target is not None):
            target = target or {"factory": factory, "session": session}[where]
            event.listen(target, "do_orm_execute", only_mine)
        try:
            with session:
                sees_only_mine(session, engine)
            with factory() as other:
                if where == "session":
                    assert values(other.query(VIEWS["columns"])) == truth(engine, "columns")
                else:
                    sees_only_mine(other, engine)
        finally:
            event.remove(target, "do_orm_execute", only_mine)


@pytest.mark.parametrize("first", [False, True], ids=["after the cache", "before the cache"])
def test_a_listener_applies_to_attached_sessions(engine: Engine, first: bool):
    """The same for plain sessions that are attached."""
    with TableCache(engine, views=VIEWS.values()) as cache:
        for view in VIEWS.values():
            cache.load(view)
        factory = sessionmaker(engine)
        if first:
            event.listen(factory, "do_orm_execute", only_mine)
        cache.attach(factory)
        if not first:
            event.listen(factory, "do_orm_execute", only_mine)
        with factory() as session:
            sees_only_mine(session, engine)


def test_a_listener_that_is_harmless_does_not_send_reads_to_the_database(engine: Engine):
    """One that only watches can say so."""
    view = VIEWS["join"]
    seen = []

    @harmless
    def watch(state: ORMExecuteState) -> None:
        seen.append(state.statement)

    with TableCache(engine, views=[view]) as cache:
        cache.load(view)
        factory = cache.sessionmaker()
        event.listen(factory, "do_orm_execute", watch)
        with factory() as session, counting() as statements:
            assert len(session.scalars(select(view)).all()) == 3
            assert len(session.range(view.by_id)) == 3
            assert statements == []
            session.get(A, 1)
            assert len(seen) == 1


class Hiding(CacheSession):
    """A class of sessions that adds to what is executed."""

    def execute(self, statement: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Execute a statement with the criteria."""
        return super().execute(statement.options(CRITERIA["mixin"]()), *args, **kwargs)

    def scalars(self, statement: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Execute a statement with the criteria."""
        return super().scalars(statement.options(CRITERIA["mixin"]()), *args, **kwargs)

    def scalar(self, statement: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Execute a statement with the criteria."""
        return super().scalar(statement.options(CRITERIA["mixin"]()), *args, **kwargs)


def test_a_class_of_sessions_that_adds_criteria(engine: Engine):
    """What it does in `execute` and `scalars` happens to each read, `range()` and `get()` too."""
    with TableCache(engine, views=VIEWS.values()) as cache:
        for view in VIEWS.values():
            cache.load(view)
        with cache.sessionmaker(class_=Hiding)() as session:
            sees_only_mine(session, engine)


class AsyncHiding(AsyncCacheSession):
    """A class of async sessions that adds to what is executed."""

    async def execute(self, statement: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Execute a statement with the criteria."""
        return await super().execute(statement.options(CRITERIA["mixin"]()), *args, **kwargs)


@pytest.mark.parametrize(
    "options", [{"class_": AsyncHiding}, {"sync_session_class": Hiding}], ids=["async", "sync"]
)
async def test_classes_of_async_sessions_that_add_criteria(engine: Engine, options: Any):
    """What they do in `execute` happens to what is answered at once, too."""
    view, expected = VIEWS["join"], truth(engine, "join", CRITERIA["mixin"]())
    async_engine = create_async_engine(asynchronous(engine.url))
    async with AsyncTableCache(async_engine, views=[view]) as cache:
        await cache.load(view)
        async with cache.sessionmaker(**options)() as session:
            assert values((await session.execute(select(view))).scalars()) == expected
            assert values(await session.scalars(select(view))) == expected
            assert values(await session.range(view.by_id)) == expected
        async with cache.sessionmaker()() as session:
            assert values(await session.range(view.by_id)) == truth(engine, "join")
    await async_engine.dispose()
