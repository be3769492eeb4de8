"""Commits keep from storage only the readers whom they could concern, under way and after.

A commit is held after the database has committed and before the cache knows: the worst moment.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Engine,
    ForeignKey,
    create_engine,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sa_tablecache import CachedView, ChangeFeed, ScoreIndex, TableCache
from sa_tablecache.changes import ChangeSet
from sa_tablecache.following import POLL
from tests.integration.checking import counting
from tests.integration.test_protocol import Held, Running
from tests.integration.test_upkeep import until


class Base(DeclarativeBase):
    """Models of these tests."""


class Room(Base):
    """A parent with a score and something that is only shown."""

    __tablename__ = "lease_room"
    id: Mapped[int] = mapped_column(primary_key=True)
    floor: Mapped[int]
    colour: Mapped[str]


class Guest(Base):
    """A child, of which a room may have several."""

    __tablename__ = "lease_guest"
    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int | None] = mapped_column(ForeignKey(Room.id))
    name: Mapped[str]


class Hotel(CachedView):
    """Rooms with their guests, the empty ones too."""

    __select__ = select(
        Room.id, Room.floor, Room.colour, Guest.id.label("guest"), Guest.name
    ).outerjoin(Guest, Guest.room_id == Room.id)

    by_floor = ScoreIndex("floor")
    by_id = ScoreIndex("id")


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """Nine rooms on three floors, each with the guest of its number but the ninth."""
    engine = create_engine(database_url)
    if database_url.get_backend_name() == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            insert(Room),
            [{"id": n, "floor": (n - 1) // 3 + 1, "colour": "red"} for n in range(1, 10)],
        )
        connection.execute(
            insert(Guest), [{"id": n, "room_id": n, "name": f"guest {n}"} for n in range(1, 9)]
        )
    yield engine
    engine.dispose()


@pytest.fixture
def cache(engine: Engine) -> Iterator[TableCache]:
    """A cache of the whole hotel."""
    with TableCache(engine, views=[Hotel]) as cache:
        cache.load(Hotel)
        yield cache
        cache._check()


PAINT = update(Room).where(Room.id == 1).values(colour="blue")
"""In place: only the record of the first room may be stale."""
RENAME = update(Guest).where(Guest.id == 1).values(name="someone")
LIFT = update(Room).where(Room.id == 1).values(floor=3)
MOVE = update(Guest).where(Guest.id == 1).values(room_id=9)
ARRIVE = insert(Guest).values(id=99, room_id=9, name="new")
LEAVE = delete(Guest).where(Guest.id == 1)


def floor(cache: TableCache, number: int) -> tuple[list[Any], str]:
    """Read a floor by its index; return (room, colour, guest's name) and how it was answered."""
    with cache.sessionmaker()() as session:
        records = session.range(Hotel.by_floor, number)
        assert session.last_read is not None
        return sorted((r.id, r.colour, r.name) for r in records), session.last_read.kind


def ask(cache: TableCache, statement: Any) -> tuple[list[Any], str]:
    """Return the rows of a statement, and how they were answered."""
    with cache.sessionmaker()() as session:
        rows = sorted(session.execute(statement).all(), key=repr)
        assert session.last_read is not None
        return rows, session.last_read.kind


@contextmanager
def committing(engine: Engine, *statements: Any) -> Iterator[None]:
    """Hold a commit after COMMIT, before the cache can know that it is over."""
    committed, go = threading.Event(), threading.Event()
    wrapped = engine.dialect.do_commit
    [inner] = [
        c.cell_contents
        for c in wrapped.__closure__
        if getattr(c.cell_contents, "__name__", "") == "do_commit"
    ]
    own = threading.local()

    def commit(connection: Any) -> None:
        inner(connection)
        if getattr(own, "held", False):
            committed.set()
            assert go.wait(20), "never let go"

    def write() -> None:
        own.held = True
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(statement)

    cell = next(c for c in wrapped.__closure__ if c.cell_contents is inner)
    cell.cell_contents = commit
    try:
        writer = Running(write)
        assert committed.wait(20)
        yield
        go.set()
        writer.result()
    finally:
        go.set()
        cell.cell_contents = inner


@pytest.mark.parametrize("statement", [PAINT, RENAME], ids=["room", "guest"])
def test_a_commit_in_place_concerns_the_answers_with_its_records(
    engine: Engine, cache: TableCache, statement: Any
) -> None:
    """While it is under way other floors are hits, and its own is the database's."""
    other = floor(cache, 2)
    with committing(engine, statement):
        assert floor(cache, 2) == other
        rows, kind = floor(cache, 1)
        assert kind == "bypass"
        assert (1, "blue", "guest 1") in rows or (1, "red", "someone") in rows
        with cache.sessionmaker()() as session:
            assert session.get(Hotel, (2, 2)).name == "guest 2"
            assert session.last_read.kind == "hit"
            assert session.get(Hotel, (1, 1)) in session.scalars(select(Hotel)).all()
            assert session.last_read.kind == "bypass"
    with counting() as statements:
        assert floor(cache, 2) == other
    assert not statements
    assert floor(cache, 1) == (rows, "hit")
    assert cache.stats(Hotel).pending_marks == 0


@pytest.mark.parametrize(
    "statement", [LIFT, MOVE, ARRIVE, LEAVE], ids=["score", "join", "insert", "delete"]
)
def test_a_commit_that_moves_records_concerns_every_answer(
    engine: Engine, cache: TableCache, statement: Any
) -> None:
    """Records may come to any floor while it is under way, so all are the database's."""
    with committing(engine, statement):
        answers = [floor(cache, number) for number in (1, 2, 3)]
        assert [kind for _, kind in answers] == ["bypass"] * 3
    assert [floor(cache, number) for number in (1, 2, 3)] == [(rows, "hit") for rows, _ in answers]


def test_a_condition_on_what_is_only_shown_is_tested_on_fresh_records(
    engine: Engine, cache: TableCache
) -> None:
    """A change in place can bring a record into an answer that it was not in."""
    blue = select(Hotel.id).where(Hotel.floor <= 2, Hotel.colour == "blue")
    elsewhere = select(Hotel.id).where(Hotel.floor == 3, Hotel.colour == "blue")
    assert ask(cache, blue) == ([], "hit")
    with committing(engine, PAINT):
        assert ask(cache, blue) == ([(1,)], "bypass")
        assert ask(cache, elsewhere) == ([], "hit")
    assert ask(cache, elsewhere) == ([], "hit")
    assert cache.stats(Hotel).pending_marks == 1
    assert ask(cache, blue) == ([(1,)], "hit")
    assert cache.stats(Hotel).pending_marks == 0


def test_marks_in_place_gather_until_an_answer_needs_them(
    engine: Engine, cache: TableCache
) -> None:
    """Commits elsewhere cost readers nothing; one refresh then reads all that they changed."""
    for number in range(1, 7):
        with engine.begin() as connection:
            connection.execute(update(Room).where(Room.id == number).values(colour=f"c{number}"))
            connection.execute(update(Guest).where(Guest.id == number).values(name="x"))
        assert floor(cache, 3)[1] == "hit"
    assert cache.stats(Hotel).pending_marks == 12
    cache._check()
    with counting() as statements:
        assert floor(cache, 1)[0] == [(n, f"c{n}", "x") for n in (1, 2, 3)]
    assert len([s for s in statements if "lease_room" in s]) == 2  # by guests, then by rooms
    with counting() as statements:
        assert floor(cache, 2) == ([(n, f"c{n}", "x") for n in (4, 5, 6)], "hit")
    assert not statements


def test_a_load_leaves_marks_in_place_where_they_were(engine: Engine, cache: TableCache) -> None:
    """What is changed in place while a load is under way is stale in what the load brings."""
    cache.clear(Hotel)
    held = Held(cache.table(Hotel), "loaded")
    loading = Running(lambda: cache.load(Hotel))
    assert held.reached.wait(20)
    with engine.begin() as connection:
        connection.execute(PAINT)
    held.let_go()
    loading.result()
    assert floor(cache, 2)[1] == "hit"
    assert cache.stats(Hotel).pending_marks == 1
    assert (1, "blue", "guest 1") in floor(cache, 1)[0]


def test_a_refresh_does_not_clear_what_is_changed_in_place_meanwhile(
    engine: Engine, cache: TableCache
) -> None:
    """Its snapshot is from before: the mark survives it, in place as it was."""
    with engine.begin() as connection:
        connection.execute(RENAME)
    held = Held(cache.table(Hotel), "read")
    refreshing = Running(lambda: cache.refresh(Hotel))
    assert held.reached.wait(20)
    with engine.begin() as connection:
        connection.execute(PAINT)
    held.let_go()
    refreshing.result()
    assert floor(cache, 2)[1] == "hit"
    assert cache.stats(Hotel).pending_marks >= 1
    assert (1, "blue", "someone") in floor(cache, 1)[0]


def test_gaps_are_not_merged_with_stale_records(engine: Engine, cache: TableCache) -> None:
    """A partly covered range is refreshed first if what is stored of it is stale."""
    cache.load(Hotel, Hotel.floor < 2)
    with engine.begin() as connection:
        connection.execute(PAINT)
        connection.execute(update(Room).where(Room.id == 4).values(colour="green"))
    both = select(Hotel.id, Hotel.colour).where(Hotel.floor <= 2)
    rows, kind = ask(cache, both)
    assert kind == "partial"
    assert {(1, "blue"), (4, "green")} <= set(map(tuple, rows))


def test_a_change_between_the_halves_of_a_partial_answer(
    engine: Engine, cache: TableCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that changes both halves between their reads is seen as a whole or not at all."""
    from sa_tablecache import reading

    cache.load(Hotel, Hotel.floor < 2)
    fetch = reading.fetch_records

    def and_then(*args: Any) -> Any:
        with engine.begin() as connection:
            connection.execute(update(Room).values(colour="grey"))
        return fetch(*args)

    monkeypatch.setattr(reading, "fetch_records", and_then)
    rows, kind = ask(cache, select(Hotel.id, Hotel.colour).where(Hotel.floor <= 2))
    assert kind == "miss"
    assert {row.colour for row in rows} == {"grey"}


def test_a_commit_that_fails_ends_its_lease(postgres_url: URL) -> None:
    """A constraint that is checked at COMMIT undoes the transaction: nothing stays leased."""
    engine = create_engine(postgres_url)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Room), [{"id": n, "floor": 1, "colour": "red"} for n in (1, 2)])
        connection.execute(
            text("ALTER TABLE lease_room ADD UNIQUE (colour, id) DEFERRABLE INITIALLY DEFERRED")
        )
        connection.execute(
            text(
                "ALTER TABLE lease_guest ALTER CONSTRAINT lease_guest_room_id_fkey "
                "DEFERRABLE INITIALLY DEFERRED"
            )
        )
    with TableCache(engine, views=[Hotel]) as cache:
        cache.load(Hotel)
        with pytest.raises(DBAPIError), Session(engine) as session:
            session.execute(PAINT)
            session.execute(insert(Guest).values(id=1, room_id=77, name="nobody's"))
            session.commit()
        assert cache.stats(Hotel).leases == 0
        assert floor(cache, 1)[0] == [(1, "red", None), (2, "red", None)]
        assert floor(cache, 1)[1] == "hit"
        cache._check()
    engine.dispose()


def test_columns_that_are_not_used_concern_nobody(engine: Engine) -> None:
    """A view without the changed column keeps answering, under way and after."""

    class Floors(CachedView):
        __select__ = select(Room.id, Room.floor)
        by_floor = ScoreIndex("floor")

    with TableCache(engine, views=[Hotel, Floors]) as cache:
        cache.load(Floors)
        everything = select(func.count()).select_from(Floors.__table__)
        with committing(engine, PAINT):
            assert ask(cache, everything) == ([(9,)], "hit")
        assert ask(cache, everything) == ([(9,)], "hit")
        assert cache.stats(Floors).pending_marks == 0


def test_a_commit_that_is_text_is_leased_while_it_is_under_way(
    engine: Engine, cache: TableCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SQL itself commits is kept from storage from before it is sent until it is marked."""
    seen: list[tuple[list[Any], str]] = []
    execute = engine.dialect.do_execute

    def and_then(cursor: Any, statement: str, *arguments: Any) -> None:
        execute(cursor, statement, *arguments)
        if statement == "COMMIT":
            seen.append(floor(cache, 1))

    monkeypatch.setattr(engine.dialect, "do_execute", and_then)
    with engine.connect() as connection:
        connection.execute(PAINT)
        rows, kind = floor(cache, 1)
        assert (rows[0], kind) == ((1, "red", "guest 1"), "hit")
        connection.exec_driver_sql("COMMIT")
    [(rows, kind)] = seen
    assert (rows[0], kind) == ((1, "blue", "guest 1"), "bypass")
    assert floor(cache, 1) == (rows, "hit")


def test_an_opaque_statement_that_fails_leaves_what_was_written_before_it(
    postgres_url: URL,
) -> None:
    """After a rollback to a savepoint before it the transaction commits the rest."""
    engine = create_engine(postgres_url)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Room), [{"id": 1, "floor": 1, "colour": "red"}])
    with TableCache(engine, views=[Hotel]) as cache:
        cache.load(Hotel)
        with engine.begin() as connection:
            connection.execute(PAINT)
            savepoint = connection.begin_nested()
            with pytest.raises(DBAPIError):
                connection.exec_driver_sql("DO $$ BEGIN RAISE EXCEPTION 'no'; END $$")
            savepoint.rollback()
        assert cache.stats(Hotel).leases == 0
        assert floor(cache, 1) == ([(1, "blue", None)], "hit")
        cache._check()
    engine.dispose()


def test_a_lost_commit_is_settled_though_no_read_gets_that_far(sqlite_url: URL) -> None:
    """Where a guard sends all reads to the database, the poll of the feed ends a lost lease."""
    engine = create_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with TableCache(engine, views=[Hotel], feed=ChangeFeed(poll_interval=60.0)) as cache:
        cache.install_feed()
        cache.load(Hotel)
        changes = ChangeSet()
        changes.add_rows((None, "lease_room"), [(1,)])
        cache.orphan(cache.lease(changes), None)
        assert cache.stats(Hotel).leases == 1
        cache.upkeep.wake(POLL)
        until(lambda: cache.stats(Hotel).leases == 0)
    engine.dispose()
