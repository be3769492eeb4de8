"""Views that group, and views that join what groups: small refreshes, and attacks on them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    CheckConstraint,
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from sa_tablecache import CachedView, ScoreIndex, TableCache
from tests.integration.checking import Statements, counting
from tests.integration.test_attacks import agrees
from tests.integration.test_protocol import Held, Running


class Base(DeclarativeBase):
    """Models of these tests."""


class Parent(Base):
    """The one side."""

    __tablename__ = "groups_parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    children: Mapped[list["Child"]] = relationship(back_populates="parent", passive_deletes=True)


class Child(Base):
    """The many side, with another value to group by."""

    __tablename__ = "groups_child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey(Parent.id, ondelete="CASCADE"))
    kind: Mapped[int | None]
    size: Mapped[int]
    parent: Mapped[Parent | None] = relationship(back_populates="children")

    __table_args__ = (CheckConstraint("size < 1000"),)


class Families(CachedView):
    """Each parent with its number of children, those without any too."""

    __select__ = (
        select(
            Parent.id,
            func.count(Child.id).label("n"),
            func.sum(Child.size, type_=Integer).label("size"),
        )
        .outerjoin(Child, Child.parent_id == Parent.id)
        .group_by(Parent.id)
    )

    by_id = ScoreIndex("id")
    by_n = ScoreIndex("n", "id")


class Kinds(CachedView):
    """Kinds of children; NULL is the kind of parents without children, and of some children."""

    __select__ = (
        select(Child.kind, func.count().label("n"), func.count(Child.id).label("children"))
        .select_from(Parent)
        .outerjoin(Child, Child.parent_id == Parent.id)
        .group_by(Child.kind)
    )

    by_kind = ScoreIndex("kind")
    by_n = ScoreIndex("n", "kind")


class Large(CachedView):
    """Groups of two columns, if they are large enough."""

    __select__ = (
        select(Child.parent_id, Child.kind, func.sum(Child.size, type_=Integer).label("size"))
        .group_by(Child.parent_id, Child.kind)
        .having(func.sum(Child.size) > 10)
    )

    by_size = ScoreIndex("size", "parent_id", "kind")


def _totals() -> Any:
    totals = (
        select(Child.parent_id, func.count().label("n"), func.max(Child.size).label("largest"))
        .group_by(Child.parent_id)
        .subquery()
    )
    return select(Parent.id, Parent.name, totals.c.n, totals.c.largest).outerjoin(
        totals, totals.c.parent_id == Parent.id
    )


class Totals(CachedView):
    """Each parent beside what a subquery says of its children."""

    __select__ = _totals()

    by_id = ScoreIndex("id")
    by_n = ScoreIndex("n", "id")


VIEWS = [Families, Kinds, Large, Totals]


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """A database with twenty parents, of which the last has no child, and three children each."""
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    fill(engine)
    yield engine
    engine.dispose()


def fill(engine: Engine) -> None:
    """Make the tables as they are at the start."""
    with Session(engine) as session:
        session.execute(delete(Child))
        session.execute(delete(Parent))
        session.add_all(Parent(id=number, name=f"p{number}") for number in range(1, 21))
        session.flush()
        session.add_all(
            Child(id=10 * parent + at, parent_id=parent, kind=at if at < 2 else None, size=4 * at)
            for parent in range(1, 20)
            for at in range(3)
        )
        session.commit()


@pytest.fixture
def cache(engine: Engine) -> Iterator[TableCache]:
    """A cache with all of each view."""
    with TableCache(engine, views=VIEWS) as cache:
        for view in VIEWS:
            cache.load(view)
        yield cache


def refreshing(cache: TableCache, view: Any) -> Statements:
    """Refresh a view; return the SELECTs that it took."""
    with counting() as statements:
        cache.refresh(view)
    return Statements(s for s in statements if s.lstrip().startswith(("SELECT", "WITH")))


def assert_small(statements: Statements, most: int) -> None:
    """Assert that a refresh read no more than a few groups."""
    assert 1 <= len(statements) <= most
    for statement in statements:
        where = statement.rpartition("WHERE")[2]
        assert " IN " in where or "IS NULL" in where, statement


# -- small refreshes ---------------------------------------------------------------------------


def inserted(session: Session) -> None:
    session.add(Child(id=999, parent_id=3, kind=1, size=7))


def deleted(session: Session) -> None:
    session.delete(session.get_one(Child, 31))


def deleted_in_bulk(session: Session) -> None:
    session.execute(delete(Child).where(Child.size == 4, Child.parent_id < 4))


def updated(session: Session) -> None:
    session.get_one(Child, 31).size = 15


def updated_in_bulk(session: Session) -> None:
    session.execute(update(Child).where(Child.parent_id == 5).values(size=Child.size + 1))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("write", [inserted, deleted, deleted_in_bulk, updated, updated_in_bulk])
def test_a_changed_row_has_its_groups_read_again(
    cache: TableCache, view: Any, write: Callable[[Session], None]
) -> None:
    """It takes a SELECT for the groups that rows are in now, and one for these and those left."""
    with cache.sessionmaker()() as session:
        write(session)
        session.commit()
    statements = refreshing(cache, view)
    if view is Kinds and write in (updated, updated_in_bulk):
        assert not statements, "sizes are in none of its aggregates"
    else:
        assert_small(statements, 2 if view is not Totals else 3)
    agrees(cache, view)


def test_the_key_of_a_group_is_enough(cache: TableCache) -> None:
    """A parent is its own group: nobody asks which one it is in."""
    with cache.sessionmaker()() as session:
        session.add(Parent(id=77, name="new"))
        session.commit()
    assert_small(refreshing(cache, Families), 1)
    agrees(cache, Families)


def test_a_column_that_is_not_used_leaves_the_view_as_it_is(cache: TableCache) -> None:
    """The name of a parent is in no group of its own, and in no aggregate."""
    with cache.sessionmaker()() as session:
        session.get_one(Parent, 3).name = "renamed"
        session.commit()
    assert not refreshing(cache, Families)
    assert refreshing(cache, Totals)
    agrees(cache, Totals)


def test_what_a_row_was_and_nobody_knows_has_the_view_read_again(cache: TableCache) -> None:
    """An UPDATE of a group's column does not tell which group the row has left."""
    with cache.sessionmaker()() as session:
        session.get_one(Child, 31).parent_id = 4
        session.commit()
    [statement] = refreshing(cache, Families)
    assert " IN " not in statement
    agrees(cache, Families)


def test_more_groups_than_can_be_named_are_read_as_one(
    cache: TableCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then all that is covered is read again."""
    monkeypatch.setattr("sa_tablecache.deltas.BATCH", 2)
    with cache.sessionmaker()() as session:
        session.execute(update(Child).values(size=1))
        session.commit()
    assert " IN " not in refreshing(cache, Families)[-1]
    agrees(cache, Families)


def test_check_and_explain_say_what_is_coarse(engine: Engine) -> None:
    """A row that no group key follows from is named, with its table."""

    class Names(CachedView):
        __select__ = (
            select(Parent.name, func.count().label("n"))
            .join(Child, Child.parent_id == Parent.id)
            .group_by(Parent.name)
        )

    with TableCache(engine, views=[Names, Families]) as cache:
        [problem] = [p for p in cache.check() if "whole view" in str(p)]
        assert "no group key follows from a row of groups_child" in str(problem)
        assert "groups_child" in str(cache.explain(select(Names)))
        assert cache.stats(Families).coarse == {}
        cache.load(Names)
        with cache.sessionmaker()() as session:
            session.get_one(Child, 31).parent_id = 5
            session.get_one(Parent, 7).name = "p8"
            session.commit()
        agrees(cache, Names)


# -- attacks -----------------------------------------------------------------------------------


def moves(session: Session) -> None:
    session.get_one(Child, 31).parent_id = 20
    session.get_one(Child, 40).kind = 5
    session.get_one(Child, 50).kind = None


def last_one_goes_and_comes_back(session: Session) -> None:
    session.execute(delete(Child).where(Child.parent_id == 3))
    session.commit()
    session.add(Child(id=30, parent_id=3, kind=2, size=1))


def parent_and_children_go(session: Session) -> None:
    session.delete(session.get_one(Parent, 6))


def an_orphan(session: Session) -> None:
    session.add(Child(id=1000, parent_id=None, kind=None, size=50))


def having_passes_and_fails(session: Session) -> None:
    session.get_one(Child, 71).size = 100
    session.commit()
    session.get_one(Child, 71).size = 1


def in_and_out_again(session: Session) -> None:
    session.add(Child(id=1001, parent_id=8, kind=9, size=3))
    session.flush()
    session.execute(delete(Child).where(Child.id == 1001))


def a_savepoint_that_is_undone(session: Session) -> None:
    session.add(Child(id=1002, parent_id=9, kind=1, size=3))
    session.flush()
    with session.begin_nested() as savepoint:
        session.execute(delete(Child).where(Child.id.in_([90, 1002])))
        savepoint.rollback()


def a_savepoint_undone_and_done_otherwise(session: Session) -> None:
    with session.begin_nested() as savepoint:
        session.execute(update(Child).where(Child.id == 91).values(kind=7, parent_id=10))
        savepoint.rollback()
    session.execute(delete(Child).where(Child.id == 91))


def moved_and_then_deleted(session: Session) -> None:
    session.execute(update(Child).where(Child.id == 92).values(parent_id=11, kind=3))
    session.execute(delete(Child).where(Child.id == 92))


def deleted_and_inserted_elsewhere(session: Session) -> None:
    session.execute(delete(Child).where(Child.id == 110))
    session.execute(insert(Child).values(id=110, parent_id=12, kind=1, size=99))


def another_key(session: Session) -> None:
    session.execute(update(Child).where(Child.id == 120).values(id=1200))


def text_that_writes(session: Session) -> None:
    session.execute(text("UPDATE groups_child SET kind = 4 WHERE id = 130"))


ATTACKS = [
    moves, last_one_goes_and_comes_back, parent_and_children_go, an_orphan,
    having_passes_and_fails, in_and_out_again, a_savepoint_that_is_undone,
    a_savepoint_undone_and_done_otherwise, moved_and_then_deleted, deleted_and_inserted_elsewhere,
    another_key, text_that_writes,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_groups_are_right_after(cache: TableCache, attack: Callable[[Session], None]) -> None:
    """Rows that move between groups, groups that come and go, and changes that are undone."""
    with cache.sessionmaker()() as session:
        attack(session)
        session.commit()
    for view in VIEWS:
        agrees(cache, view)


PARTS: list[tuple[Any, Any]] = [
    (Families, Families.n >= 3),
    (Families, Families.n < 3),
    (Families, Families.id < 9),
    (Kinds, Kinds.kind.is_(None)),
    (Kinds, Kinds.n > 18),
    (Large, Large.size > 20),
    (Totals, Totals.n.is_(None)),
    (Totals, Totals.n >= 3),
    (Totals, Totals.id < 9),
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_parts_of_groups_are_right_after(engine: Engine, attack: Callable[[Session], None]) -> None:
    """Groups enter and leave what is covered by a group's key, by an aggregate, and by its lack."""
    for view, part in PARTS:
        fill(engine)
        with TableCache(engine, views=[view]) as cache, cache.sessionmaker()() as session:
            cache.load(view, part)
            attack(session)
            session.commit()
            with engine.connect() as connection:
                truth = sorted(map(tuple, connection.execute(select(view).where(part))), key=repr)
            found = session.scalars(select(view).where(part)).all()
            assert sorted((tuple(r._asdict().values()) for r in found), key=repr) == truth
            assert session.last_read.kind == "hit"
            cache._check()


# -- races -------------------------------------------------------------------------------------


def move(engine: Engine, child: int, parent: int) -> None:
    """Move a child so that the cache knows which group it has left."""
    with engine.begin() as connection:
        connection.execute(delete(Child).where(Child.id == child))
        connection.execute(insert(Child).values(id=child, parent_id=parent, kind=1, size=4))


@pytest.mark.parametrize("view", VIEWS)
def test_a_row_moves_on_while_an_older_refresh_of_its_group_is_in_flight(
    engine: Engine, cache: TableCache, view: Any
) -> None:
    """No group keeps or loses a row because of what was read before it moved."""
    move(engine, 31, 4)
    held = Held(cache.table(view), "read")
    refresh = Running(lambda: cache.refresh(view))
    assert held.reached.wait(20)
    move(engine, 31, 5)
    held.let_go()
    refresh.result()
    agrees(cache, view)


@pytest.mark.parametrize("view", [Families, Totals])
def test_a_row_moves_twice_while_an_older_load_is_in_flight(engine: Engine, view: Any) -> None:
    """What a load has read too early is read again, although refreshes had cleared its marks."""
    with TableCache(engine, views=[view]) as cache:
        cache.load(view, view.id < 4)
        held = Held(cache.table(view), "loaded")
        load = Running(lambda: cache.extend(view, view.id >= 4))
        assert held.reached.wait(20)
        for parent in (5, 6):
            move(engine, 31, parent)
            cache.refresh(view)
        held.let_go()
        load.result()
        agrees(cache, view)


def test_a_failed_write_leaves_its_groups_alone(cache: TableCache) -> None:
    """A transaction that is rolled back touches no group."""
    with cache.sessionmaker()() as session:
        session.execute(delete(Child).where(Child.id == 31))
        with pytest.raises(IntegrityError):
            session.execute(update(Child).where(Child.id == 32).values(size=2000))
        session.rollback()
    for view in VIEWS:
        assert not refreshing(cache, view)
        agrees(cache, view)


# -- what compares otherwise than it looks -----------------------------------------------------


def test_groups_of_text_that_folds_are_coarse(sqlite_url: URL) -> None:
    """Groups whose values are equal and not the same are one group to the database."""
    engine = create_engine(sqlite_url)
    metadata = MetaData()
    words = Table("words", metadata, Column("id", Integer, primary_key=True),
                  Column("word", String(collation="NOCASE")))  # fmt: skip
    metadata.create_all(engine)

    class Words(CachedView):
        __select__ = select(words.c.word, func.count().label("n")).group_by(words.c.word)

    with engine.begin() as connection:
        connection.execute(insert(words), [{"id": 1, "word": "a"}, {"id": 2, "word": "b"}])
    with TableCache(engine, views=[Words]) as cache:
        cache.load(Words)
        assert "cannot be compared" in cache.stats(Words).coarse["words"]
        with engine.begin() as connection:
            connection.execute(insert(words).values(id=3, word="A"))
        agrees(cache, Words)
    engine.dispose()


def test_an_outer_row_that_comes_into_view_when_its_match_goes(engine: Engine) -> None:
    """It was not covered as long as it had a match, so that nothing in storage leads to it."""

    class Sizes(CachedView):
        __select__ = select(Parent.id, Parent.name, Child.id.label("child"), Child.size).outerjoin(
            Child, Child.parent_id == Parent.id
        )
        by_size = ScoreIndex("size")
        by_half = ScoreIndex(func.coalesce(Child.size, 1))

    class Matched(CachedView):
        __select__ = select(Child.id, Child.parent_id, Parent.name).outerjoin(
            Parent, Child.parent_id == Parent.id
        )
        by_name = ScoreIndex("name")

    with TableCache(engine, views=[Sizes, Matched]) as cache, cache.sessionmaker()() as session:
        for part in (Sizes.size.is_(None), Sizes.by_half == 1):
            fill(engine)
            cache.load(Sizes, part)
            session.execute(delete(Child).where(Child.parent_id == 3))
            session.commit()
            assert {r.id for r in session.scalars(select(Sizes).where(part))} == {3, 20}
        cache.load(Matched, Matched.name.is_(None))
        if engine.dialect.name == "sqlite":  # which does not enforce foreign keys here
            session.execute(delete(Parent).where(Parent.id == 4))
            session.commit()
            found = session.scalars(select(Matched).where(Matched.name.is_(None))).all()
            assert {r.id for r in found} == {40, 41, 42}
