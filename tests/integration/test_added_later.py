"""What an application adds after the first use of a view, or beside what it declares, counts."""

import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, time, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import DDL, URL, DateTime, Engine, Time, create_engine, event, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sa_tablecache import CachedView, ReadThrough, ScoreIndex, TableCache


class Base(DeclarativeBase):
    """The models of this module."""


class Entry(Base):
    """A row with a number."""

    __tablename__ = "later_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Opening(Base):
    """A row with times of day, and what a zone makes of a column that has none."""

    __tablename__ = "later_opening"

    id: Mapped[int] = mapped_column(primary_key=True)
    opens: Mapped[time] = mapped_column(Time(timezone=True))
    since: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class Entries(CachedView):
    """All of them."""

    __select__ = select(Entry.id, Entry.number)

    by_number = ScoreIndex("number")


class Openings(CachedView):
    """All of them."""

    __select__ = select(Opening.id, Opening.opens, Opening.since)

    by_id = ScoreIndex("id")


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """An engine, and a hundred entries."""
    engine = create_engine(database_url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Entry), [{"id": n, "number": n} for n in range(1, 101)])
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


def there(cache: TableCache, number: int) -> list[int]:
    """Return the identifiers of the entries with a number, as a session of the cache reads them."""
    with cache.sessionmaker()() as session:
        found = session.scalars(select(Entries).where(Entries.number == number)).all()
        assert session.last_read is not None
        assert session.last_read.kind == "hit"
        return [entry.id for entry in found]


def test_a_trigger_that_was_made_later_is_known(sqlite_url: URL) -> None:
    """What a statement says of the key of its row is not trusted where a trigger may change it."""
    engine = create_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with TableCache(engine, views=[Entries], exclusive_writer=True) as cache:
        cache.load(Entries)
        with engine.begin() as connection:
            connection.execute(
                DDL(
                    "CREATE TRIGGER later AFTER INSERT ON later_entry BEGIN "
                    "UPDATE later_entry SET id = NEW.id + 1000 WHERE id = NEW.id; END"
                )
            )
        assert there(cache, 700) == []
        with engine.begin() as connection:
            connection.execute(insert(Entry.__table__).values(id=700, number=700))
        assert there(cache, 700) == [1700]
    engine.dispose()


def test_what_a_later_listener_to_commit_writes_is_seen(engine: Engine) -> None:
    """The application may listen to commits after the cache, and write in them."""
    with TableCache(engine, views=[Entries], exclusive_writer=True) as cache:
        cache.load(Entries)

        @event.listens_for(engine, "commit")
        def audit(connection: Any) -> None:
            connection.execute(insert(Entry.__table__).values(id=900, number=900))

        with engine.begin() as connection:
            connection.execute(select(1))
        event.remove(engine, "commit", audit)
        assert there(cache, 900) == [900]
        assert cache.stats(Entries).leases == 0


@pytest.mark.parametrize("first", [False, True], ids=["alone", "after others"])
def test_what_a_later_listener_to_commit_writes_is_leased(engine: Engine, first: bool) -> None:
    """While the COMMIT is under way, and if nobody learns how it ended, it may land at any time."""
    leased: list[frozenset[Any]] = []
    send = engine.dialect.do_commit

    def do_commit(connection: Any) -> None:
        leased.append(frozenset(mark.key for mark in table._freshness.leased))
        send(connection)

    engine.dialect.do_commit = do_commit  # type: ignore[method-assign]
    with TableCache(engine, views=[Entries], exclusive_writer=True) as cache:
        cache.load(Entries)
        table: Any = cache.table(Entries)

        @event.listens_for(engine, "commit")
        def audit(connection: Any) -> None:
            connection.execute(insert(Entry.__table__).values(id=900, number=900))

        leased.clear()
        with engine.begin() as connection:
            if first:
                connection.execute(insert(Entry.__table__).values(id=800, number=800))
        event.remove(engine, "commit", audit)
        assert leased == [frozenset({(800,), (900,)} if first else {(900,)})]
        assert there(cache, 900) == [900]
        assert there(cache, 800) == ([800] if first else [])
        assert cache.stats(Entries).leases == 0


def test_exists_loads_no_whole_range(engine: Engine) -> None:
    """Whether there is any is less to the database than what would have to be read."""
    with TableCache(engine, exclusive_writer=True) as cache:
        cache.add(Entries, policy=ReadThrough(max_records=1_000))
        with cache.sessionmaker()() as session:
            assert session.scalar(select(select(Entries).where(Entries.number >= 1).exists()))
        assert cache.stats(Entries).records == 0


def test_columns_of_exists_are_found_by_name_and_by_label(engine: Engine) -> None:
    """A row of a hit has the keys that the row of the database has."""
    anonymous = select(Entries).where(Entries.id == 1).exists().label(None)
    labelled = select(Entries).where(Entries.id == 1).exists().label("found")
    with TableCache(engine, views=[Entries], exclusive_writer=True) as cache:
        rows = []
        for load in (False, True):
            if load:
                cache.load(Entries)
            with cache.sessionmaker()() as session:
                result = session.execute(select(anonymous))
                row = session.execute(select(labelled)).one()
                rows.append((tuple(result.keys()), row._mapping[labelled], row.found))
                assert session.last_read is not None
                assert (session.last_read.kind == "hit") is load
        assert rows[0] == rows[1]


def test_the_class_of_a_query_makes_queries(engine: Engine) -> None:
    """As SQLAlchemy's own does."""
    with TableCache(engine, views=[Entries], exclusive_writer=True) as cache:
        cache.load(Entries)
        with cache.sessionmaker()() as session:
            query: Any = session.query(Entries)
            assert len(type(query)([Entries], session).all()) == 100
            assert len(query.__class__(Entry, session=session).all()) == 100


def test_threads_may_derive_queries_from_one(engine: Engine) -> None:
    """What a query becomes it becomes once."""
    errors: list[BaseException] = []
    interval = sys.getswitchinterval()
    with TableCache(engine, views=[Entries], exclusive_writer=True) as cache:
        session = cache.sessionmaker()()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(200):
                query = session.query(Entries)
                start = threading.Barrier(2)

                def derive(query: Any = query, start: Any = start) -> None:
                    start.wait()
                    try:
                        query.with_session(session)
                    except BaseException as error:
                        errors.append(error)

                threads = [threading.Thread(target=derive) for _ in range(2)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            sys.setswitchinterval(interval)
            session.close()
    assert not errors


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_times_that_are_equal_in_other_zones_stay_what_they_are(engine: Engine) -> None:
    """Python takes noon in UTC and one o'clock an hour east for the same; PostgreSQL does not."""
    east = timezone(timedelta(hours=1))
    opens = [time(12, tzinfo=UTC), time(13, tzinfo=east)]
    with engine.begin() as connection:
        connection.execute(
            insert(Opening),
            [
                {"id": n, "opens": opens[n % 2], "since": datetime(2024, 1, 1 + n % 3, tzinfo=UTC)}
                for n in range(300)
            ],
        )
    with TableCache(engine, views=[Openings], exclusive_writer=True) as cache:
        cache.load(Openings)
        with cache.sessionmaker()() as session:
            found = session.range(Openings.by_id)
        assert [record.opens.utcoffset() for record in found] == [
            opens[record.id % 2].utcoffset() for record in found
        ]
        assert len({id(record.since) for record in found}) == 3
