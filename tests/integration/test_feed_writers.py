"""A cache with a change feed on PostgreSQL, while processes of others write in every way.

What the changelog itself promises is in ``test_feed_postgresql.py``; here it is the answers of a
cache that count, and that nothing was invalidated wholly without need.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, ForeignKey, create_engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from sa_tablecache import CachedView, ChangeFeed, ScoreIndex, TableCache, bypass_cache
from sa_tablecache.feed import Consumer
from tests.integration.feed_writer import TABLES, committed, writing
from tests.postgres import own_postgres


class Base(DeclarativeBase):
    """The base of the models here."""


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    v: Mapped[int]


class Part(Base):
    __tablename__ = "part"

    id: Mapped[int] = mapped_column(primary_key=True)
    v: Mapped[int]


class Parent(Base):
    __tablename__ = "parent"

    id: Mapped[int] = mapped_column(primary_key=True)
    v: Mapped[int]


class Child(Base):
    __tablename__ = "child"

    id: Mapped[int] = mapped_column(primary_key=True)
    v: Mapped[int]
    parent_id: Mapped[int] = mapped_column(ForeignKey(Parent.id))


class WrittenItems(CachedView):
    """Items beside the rows of a partitioned table that have their keys."""

    __select__ = select(Item.id, Item.v, Part.v.label("part")).outerjoin(Part, Item.id == Part.id)

    by_value = ScoreIndex("v")


class WrittenParts(CachedView):
    """A partitioned table."""

    __select__ = select(Part.id, Part.v)

    by_value = ScoreIndex("v")


class WrittenFamilies(CachedView):
    """Children, whom the keys of their parents reach by ON UPDATE and ON DELETE CASCADE."""

    __select__ = select(
        Child.id, Child.v, Parent.id.label("parent"), Parent.v.label("parent_value")
    ).join(Parent, Child.parent_id == Parent.id)

    by_parent = ScoreIndex("parent")


VIEWS: list[Any] = [WrittenItems, WrittenParts, WrittenFamilies]


class Followed:
    """A cache over these views, and a connection of somebody else."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.engine = create_engine(url)
        self.elsewhere = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with self.elsewhere.connect() as connection:
            for statement in TABLES:
                connection.exec_driver_sql(statement)
        feed = ChangeFeed(max_lag=timedelta(hours=1))
        self.cache = TableCache(self.engine, views=VIEWS, feed=feed)
        self.cache.install_feed()
        for view in VIEWS:
            self.cache.load(view)
        self.Session = self.cache.sessionmaker()
        self.Strict = self.cache.sessionmaker(freshness="barrier")

    @property
    def consumer(self) -> Consumer:
        """What follows the database."""
        assert self.cache.consumer is not None
        return self.cache.consumer

    def write(self, *statements: str) -> None:
        """Write elsewhere, each statement a transaction."""
        with self.elsewhere.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def check(self, kind: str = "hit") -> None:
        """Compare all views with the database, after a poll."""
        with self.Strict() as session:
            for view in VIEWS:
                statement = select(view).order_by(view.id)
                cached = session.scalars(statement).all()
                assert session.last_read is not None
                assert session.last_read.kind == kind, session.last_read
                assert cached == session.scalars(statement.options(bypass_cache())).all()
        self.cache._check()

    def marks(self) -> Counter[str]:
        """Return how many marks were made so far, by kind."""
        return sum((Counter(self.cache.stats(view).marks) for view in VIEWS), Counter[str]())

    @contextmanager
    def marked(self, **kinds: int) -> Iterator[None]:
        """Check how many marks are made meanwhile, and that everything is marked never."""
        before, invalidations = self.marks(), self.consumer.counts["invalidations"]
        yield
        assert self.marks() - before == Counter(kinds)
        assert self.consumer.counts["invalidations"] == invalidations

    def close(self) -> None:
        """Give back all connections."""
        self.cache.close()
        self.engine.dispose()


@pytest.fixture
def followed(postgres_url: URL) -> Iterator[Followed]:
    """A cache that follows an empty family of tables."""
    followed = Followed(postgres_url)
    yield followed
    followed.close()


def test_views_are_right_whatever_processes_write(followed: Followed) -> None:
    """After COPY, MERGE, cascades, moves between partitions, savepoints, two-phase commits at once.

    Each committed change was delivered once, and nothing was invalidated wholly.
    """
    consumer = followed.consumer
    changes, invalidations = consumer.counts["changes"], consumer.counts["invalidations"]
    marks = followed.marks()
    with writing(followed.url, range(1, 4), 30) as processes:
        while any(process.poll() is None for process in processes):
            with followed.Strict() as session:
                for view in VIEWS:
                    session.scalars(select(view)).all()
            with consumer.connect() as connection:
                consumer.changelog.trim(connection, 0)
        expected = sum(1 for _ in committed(processes))
    followed.check()
    assert consumer.counts["changes"] - changes == expected > 30
    assert consumer.counts["invalidations"] == invalidations
    assert set(followed.marks() - marks) == {"row"}


def test_transactions_are_seen_when_they_commit(followed: Followed) -> None:
    """One that began first and commits last is neither seen too early nor lost."""
    with (
        followed.marked(row=2),
        create_engine(followed.url, poolclass=NullPool).connect() as first,
        create_engine(followed.url, poolclass=NullPool).connect() as second,
    ):
        first.exec_driver_sql("INSERT INTO item VALUES (1, 1)")
        second.exec_driver_sql("INSERT INTO item VALUES (2, 2)")
        followed.check()
        second.commit()
        followed.check()
        first.commit()
        followed.check()


def test_a_prepared_transaction_is_seen_when_it_is_committed(followed: Followed) -> None:
    """By whichever connection, and not before."""
    with followed.marked(row=2):  # of the two views over parts
        with followed.elsewhere.connect() as connection:
            for statement in ("BEGIN", "INSERT INTO part VALUES (1, 1)"):
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql("PREPARE TRANSACTION 'apart'")
        followed.check()
        followed.write("COMMIT PREPARED 'apart'")
        followed.check()


def test_partitions_come_and_go(followed: Followed) -> None:
    """A partition that is dropped or detached is gone at once; a new one is read by the database
    until it is watched.
    """
    followed.write("INSERT INTO part SELECT i, i FROM generate_series(1, 4000, 500) AS i")
    followed.check()
    assert followed.cache.stats(WrittenParts).records == 8
    followed.write("DROP TABLE part_odd")
    followed.check()
    followed.write("ALTER TABLE part DETACH PARTITION part_low")
    followed.check()
    followed.write("UPDATE part_low SET v = 0")
    followed.check()
    followed.write("ALTER TABLE part ATTACH PARTITION part_low FOR VALUES FROM (0) TO (2000)")
    followed.check()
    records = followed.cache.stats(WrittenParts).records
    followed.write("CREATE TABLE part_new PARTITION OF part_high FOR VALUES WITH (MODULUS 2, "
                   "REMAINDER 1)", "INSERT INTO part_new SELECT i, i FROM generate_series(2000, "
                   "2020) AS i WHERE satisfies_hash_partition('part_high'::regclass, 2, 1, i)",
                   )  # fmt: skip
    with followed.Strict() as session:
        found = session.scalars(select(WrittenParts)).all()
        assert session.last_read is not None
        assert (session.last_read.kind, "part_new" in session.last_read.reason) == ("bypass", True)
        assert len(found) > records
    followed.cache.install_feed()
    followed.check()
    followed.write("UPDATE part_new SET v = v + 1")
    followed.check()


# Connections to a server that was killed are left to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_killed_server_invalidates_everything_once() -> None:
    """While it is away reads fail as they would without a cache; then nothing stale is left."""
    with (
        tempfile.TemporaryDirectory(prefix="sa_tablecache_") as directory,
        own_postgres(Path(directory)) as server,
    ):
        followed = Followed(server.url)
        followed.write("INSERT INTO item SELECT i, i FROM generate_series(1, 9) AS i")
        followed.check()
        followed.write("CHECKPOINT", "UPDATE item SET v = v + 1 WHERE id = 1")
        invalidations = followed.consumer.counts["invalidations"]
        server.crash()
        followed.engine.dispose()  # the application's part; the cache's own pool is still dead
        with followed.Strict() as session:
            session.scalars(select(WrittenItems)).all()
            assert session.last_read is not None
            assert session.last_read.kind == "bypass"
            assert "\n" not in session.last_read.reason, "what the driver says, without the SQL"
        followed.write("UPDATE item SET v = v + 1 WHERE id = 2")
        for _ in range(3):
            with suppress(OperationalError):  # on connections that are dead
                followed.cache.barrier()
        followed.cache.barrier()
        followed.check()
        assert followed.consumer.counts["invalidations"] == invalidations + 1
        with followed.marked(row=1):
            followed.write("UPDATE item SET v = v + 1 WHERE id = 3")
            followed.check()
        followed.close()
