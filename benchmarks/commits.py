"""Writing: what a commit costs on an engine that caches watch, and what it leaves to readers.

Two engines take turns, each of which writes tables of its own: those of one are in a view of a
loaded cache, and nobody watches the other. There is no change feed; ``feed.py`` measures that.
Sessions are new for each transaction and select nothing, so that nothing hides what a commit costs.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Any

from sqlalchemy import (
    URL,
    Engine,
    ForeignKey,
    MetaData,
    bindparam,
    create_engine,
    insert,
    select,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from benchmarks.harness import Case, Result, compare
from examples.flights_data import tune_sqlite
from sa_tablecache import CachedView, ScoreIndex, TableCache

GOALS = {"postgresql": 1.08, "sqlite": 1.15}
ITEMS = 2_000
RATES = {50: 99, 500: 95, 2_000: 90}
"""Commits in a second, and the percentage of hits that is the goal beside them."""
SECONDS = 3.0


class Tables:
    """Two tables that are joined, a third, and a view of the first two."""

    def __init__(self, prefix: str) -> None:
        class Base(DeclarativeBase):
            metadata = MetaData()

        class Kind(Base):
            __tablename__ = f"{prefix}_kinds"

            id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
            name: Mapped[str]

        class Item(Base):
            __tablename__ = f"{prefix}_items"

            id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
            kind: Mapped[int] = mapped_column(ForeignKey(Kind.id))
            place: Mapped[int] = mapped_column(index=True)
            amount: Mapped[int]
            note: Mapped[str]

        class Other(Base):
            __tablename__ = f"{prefix}_others"

            id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
            kind: Mapped[int]
            place: Mapped[int]
            amount: Mapped[int]
            note: Mapped[str]

        class ItemBoard(CachedView):
            __select__ = select(
                Item.id, Item.place, Item.amount, Item.note, Kind.name.label("kind")
            ).join(Kind, Item.kind == Kind.id)
            by_place = ScoreIndex("place")

        self.base, self.kind, self.item, self.other = Base, Kind, Item, Other
        self.view: Any = ItemBoard

    def fill(self, engine: Engine) -> None:
        """Make the tables anew, with some rows."""
        self.base.metadata.drop_all(engine)
        self.base.metadata.create_all(engine)
        with Session(engine) as session, session.begin():
            session.add_all(self.kind(id=n, name=f"kind {n}") for n in range(10))
            session.flush()
            for model in (self.item, self.other):
                session.add_all(row(model, n) for n in range(ITEMS))


PLAIN, WATCHED = Tables("plain"), Tables("watched")


def row(model: Any, number: int) -> Any:
    """Return a new row of a table."""
    return model(id=number, kind=number % 10, place=number, amount=0, note=f"note {number}")


def run(url: URL, *, quick: bool) -> list[Result]:
    """Measure on PostgreSQL and on SQLite."""
    server = url.set(drivername="postgresql+psycopg")
    with engines(server, server) as (plain, watched, cache):
        found = _writes("PostgreSQL", plain, watched, quick=quick)
        found += _readers("PostgreSQL", watched, cache, quick=quick)
    with tempfile.TemporaryDirectory() as directory:
        files = [
            URL.create("sqlite", database=str(Path(directory) / f"{name}.sqlite"))
            for name in ("plain", "watched")
        ]
        with engines(*files) as (plain, watched, _):
            found += _writes("SQLite", plain, watched, quick=quick)
        with engines(*files, tuned=True) as (plain, watched, cache):
            # The harder case: a commit there waits for no disk.
            found += _writes("SQLite, WAL", plain, watched, quick=quick)
            found += _readers("SQLite, WAL", watched, cache, quick=quick)
    return found


@contextmanager
def engines(
    plain_url: URL, watched_url: URL, *, tuned: bool = False
) -> Iterator[tuple[Engine, Engine, TableCache]]:
    """Yield an engine that nobody watches, one that a cache watches, and the cache."""
    plain, watched = create_engine(plain_url), create_engine(watched_url)
    for engine, tables in ((plain, PLAIN), (watched, WATCHED)):
        if tuned:
            tune_sqlite(engine)
        tables.fill(engine)
    with TableCache(watched, views=[WATCHED.view], exclusive_writer=True) as cache:
        cache.load(WATCHED.view)
        yield plain, watched, cache
    for engine, tables in ((plain, PLAIN), (watched, WATCHED)):
        tables.base.metadata.drop_all(engine)
        engine.dispose()


# -- what a commit costs -----------------------------------------------------------------------


def transactions(factory: Any, tables: Tables) -> dict[str, Callable[[], None]]:
    """Return transactions of one engine, by what they do."""
    numbers = count(10 * ITEMS)
    rows: dict[Any, deque[Any]] = {tables.item: deque(), tables.other: deque()}

    def three(model: Any) -> Callable[[], None]:
        mine = rows[model]

        def write() -> None:
            with factory() as session:
                new = row(model, next(numbers))
                session.add(new)
                if len(mine) == 2:
                    gone, old = mine
                    session.add_all((gone, old))
                    session.delete(gone)
                    old.amount += 1
                    mine.popleft()
                session.commit()
                mine.append(new)

        return write

    with factory() as session:
        many = session.scalars(select(tables.item).where(tables.item.id < 100)).all()
        one = session.get(tables.item, 500)
    assert one is not None

    def update() -> None:
        with factory() as session:
            session.add(one)
            one.amount += 1
            session.commit()

    def insert() -> None:
        with factory() as session:
            session.add(row(tables.item, next(numbers)))
            session.commit()

    def hundred() -> None:
        with factory() as session:
            session.add_all(many)
            for item in many:
                item.amount += 1
            session.commit()

    def hundred_new() -> None:
        with factory() as session:
            session.add_all([row(tables.item, next(numbers)) for _ in range(100)])
            session.commit()

    wanted = select(tables.other.id, tables.other.amount).where(tables.other.id == 7)

    def read() -> None:
        with factory() as session:
            session.execute(wanted).all()
            session.commit()

    return {
        "an UPDATE": update,
        "an INSERT": insert,
        "INSERT, UPDATE and DELETE": three(tables.item),
        "100 rows, updated": hundred,
        "100 rows, inserted": hundred_new,
        "a table of no view": three(tables.other),
        "only reading": read,
    }


def _writes(name: str, plain: Engine, watched: Engine, *, quick: bool) -> list[Result]:
    goal = None if quick else GOALS[plain.dialect.name]
    found = []
    theirs, mine = (
        transactions(sessionmaker(engine, expire_on_commit=False), tables)
        for engine, tables in ((plain, PLAIN), (watched, WATCHED))
    )
    for what, run in theirs.items():
        cases = [
            Case("nobody watches", run),
            Case("a cache watches", mine[what], goal=goal),
        ]
        found += compare(f"flush and commit, {name}: {what}", cases, rounds=3 if quick else 41)
    return found


# -- what it leaves to readers -----------------------------------------------------------------


def _readers(name: str, engine: Engine, cache: TableCache, *, quick: bool) -> list[Result]:
    return [
        result
        for inserts in (False, True)
        for rate in RATES
        for result in _hits(name, engine, cache, rate, inserts=inserts, quick=quick)
    ]


def _hits(
    name: str, engine: Engine, cache: TableCache, rate: int, *, inserts: bool, quick: bool
) -> list[Result]:
    """Count the hits of a reader of some places while another thread writes others."""
    what = "inserts" if inserts else "updates in place"
    benchmark = f"hits beside {what} elsewhere, {name}"
    stop, commits = Event(), [0]
    writer = Thread(target=_write, args=(engine, rate, stop, commits), kwargs={"inserts": inserts})
    place = WATCHED.view.by_place
    with cache.sessionmaker()() as session:
        session.range(place, ge=0, lt=50)
        hits, reads = int(session.last_read.kind == "hit"), 1
        writer.start()
        start = perf_counter()
        while perf_counter() - start < (SECONDS / 10 if quick else SECONDS):
            session.range(place, ge=0, lt=50)
            hits += session.last_read.kind == "hit"
            reads += 1
            if session.in_transaction():
                session.rollback()
            sleep(0.0005)  # or the writer would wait for the interpreter, and not be measured
        seconds = perf_counter() - start
    stop.set()
    writer.join()
    return [
        Result(
            benchmark=benchmark,
            case=f"{rate:,} commits/s",
            value=100 * hits / reads,
            unit="%",
            goal=None if quick else RATES[rate],
            at_least=True,
        ),
        Result(
            benchmark=benchmark,
            case=f"{rate:,} commits/s, reached",
            value=commits[0] / seconds,
            unit="/s",
        ),
    ]


_numbers = count(1_000_000)


def _write(engine: Engine, rate: int, stop: Event, commits: list[int], *, inserts: bool) -> None:
    """Commit one row after the other, so many in a second, far from what is read."""
    item = WATCHED.item.__table__
    change = update(item).where(item.c.id == bindparam("key")).values(amount=item.c.amount + 1)
    with engine.connect() as connection:
        start = perf_counter()
        while not stop.is_set():
            if inserts:
                number = next(_numbers)
                values = {"id": number, "kind": 1, "place": number, "amount": 0, "note": "new"}
                connection.execute(insert(item), values)
            else:
                connection.execute(change, {"key": 1_000 + commits[0] % 1_000})
            connection.commit()
            commits[0] += 1
            sleep(max(0.0, start + commits[0] / rate - perf_counter()))
