"""After any writes, by any path, a cached answer is the database's: every kind of view.

A failure names its seed. To see it again, or to search for more::

    SA_TABLECACHE_TEST_SEEDS=17 pytest tests/integration/test_random_writes.py -k WholeChain
    SA_TABLECACHE_TEST_SEEDS=100-200 SA_TABLECACHE_TEST_STEPS=60 pytest ...
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
from sqlalchemy import Connection, select
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util.concurrency import greenlet_spawn

from sa_tablecache import AsyncTableCache, CacheSession, TableCache
from tests.integration.checking import Checker, counting, part_criterion
from tests.integration.databases import Database
from tests.integration.rows import fill
from tests.integration.writer import Writer
from tests.zoo import KINDS

STEPS = int(os.environ.get("SA_TABLECACHE_TEST_STEPS", "6"))
LINGUISTIC = ("OuterBoard", "Names", "CustomerList", "WholeChain", "PlaneEntity", "LabelledSamples")
"""Kinds with text among their keys, scores and groups."""
MARIADB = (
    "AirportChain", "Backlog", "BossBudgets", "BothCrates", "CarrierTotals", "Depot", "Everyone",
    "FiveTables", "ItemTotals", "OrdersByNumber", "PeopleAndTags", "Samples", "WholeChain",
)  # fmt: skip
"""One kind of each family of joins, keys and coarse views."""
ASYNCHRONOUS = ("OuterBoard", "FullJoin", "PeopleAndTags", "WholeChain", "Depot", "Samples")


def _seeds() -> list[int]:
    first, _, last = os.environ.get("SA_TABLECACHE_TEST_SEEDS", "1").partition("-")
    return list(range(int(first), int(last or first) + 1))


SEEDS = _seeds()


@contextmanager
def replayable(writer: Writer, seed: int) -> Iterator[None]:
    """Say of a failure which writes came before it."""
    try:
        yield
    except Exception as error:
        error.add_note(f"seed {seed}; the last transactions were:")
        error.add_note("\n".join(writer.log[-12:]))
        raise


def some_part(checker: Checker) -> tuple[str, Any]:
    """Return a criterion that an index expresses, which covers a part of the view."""
    rng = checker.rng
    column = rng.choice(checker.kind.parts)
    checker.questions.learn()
    values = sorted(checker.questions.pool[column]) or [None]
    low = values[len(values) // 4] if rng.random() < 0.8 else None
    high = values[-len(values) // 4] if low is None or rng.random() < 0.5 else None
    if low is not None and high is not None and not low < high:
        high = None
    if low is None and high is None:
        return "everything", None
    return f"{low} <= {column} < {high}", part_criterion(column, low, high)(checker.columns)


class Observer:
    """Checks, inside each transaction, who sees its writes."""

    def __init__(self, checker: Checker) -> None:
        self.checker = checker

    def __call__(self, target: Session | Connection) -> None:
        checker = self.checker
        if isinstance(target, Session):
            checker.content(target, target.connection())
        else:
            with checker.factory(bind=target) as session:
                checker.content(session, target)
        with checker.factory() as other:
            checker.content(other)


def run(database: Database, name: str, seed: int, *, whole: bool) -> None:
    """Write at random and compare after each transaction."""
    kind = KINDS[name]
    rng = Random(f"{name} {database.dialect} {seed}")
    with (
        database.lent_engine() as engine,
        database.bystander() as bystander,
        TableCache(engine, views=[kind.view]) as cache,
    ):
        attached = sessionmaker(engine)
        cache.attach(attached)
        own = cache.sessionmaker()
        checker = Checker(kind, own, bystander, rng)

        def factory(**options: Any) -> Session:
            return rng.choice([own, own, attached])(**options)

        writer = Writer(engine, factory, kind.family, rng.randrange(10**9), Observer(checker))
        fill(bystander, kind.family, seed)
        described, criterion = ("everything", None) if whole else some_part(checker)
        writer.log.append(f"load {described}")
        with replayable(writer, seed), own() as reader:
            cache.load(kind.view, *([] if criterion is None else [criterion]))
            checker.check()
            for _ in range(STEPS):
                writer.step()
                checker.check()
                if database.dialect == "mysql":
                    # A transaction that has read goes on to see what it saw then.
                    checker.content(reader, reader.connection())
                    if rng.random() < 0.3:
                        reader.rollback()
                else:
                    checker.content(reader)
                cache._check()
            writer.log.append("at the end")
            statement = select(kind.view)
            if criterion is not None:
                statement = statement.where(criterion)
            with own() as session:
                expected = session.scalars(statement).all()
            with counting() as statements, own() as session:
                assert set(session.scalars(statement)) == set(expected)
            assert not statements, "the cache was of use, all the time"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_whole_view_is_the_databases_after_random_writes(
    database: Database, name: str, seed: int
):
    """A view that was loaded whole answers as the database does after each transaction."""
    run(database, name, seed, whole=True)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", sorted(name for name, kind in KINDS.items() if kind.parts))
def test_a_part_of_a_view_is_the_databases_after_random_writes(
    database: Database, name: str, seed: int
):
    """A view of which one range was loaded answers as the database does, within it and beyond."""
    run(database, name, seed, whole=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LINGUISTIC)
def test_text_under_a_natural_collation_is_the_databases(
    linguistic: Database, name: str, seed: int
):
    """Where text does not sort by bytes, answers are the database's all the same."""
    run(linguistic, name, seed, whole=True)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MARIADB)
def test_views_on_mariadb_are_the_databases_after_random_writes(
    mariadb_zoo: Database, name: str, seed: int
):
    """MariaDB, whose statements, types and transactions are its own, gives the same answers."""
    run(mariadb_zoo, name, seed, whole=len(name) % 2 == 0 or not KINDS[name].parts)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LINGUISTIC)
def test_text_that_mariadb_folds_is_the_databases(folding: Database, name: str, seed: int):
    """Where `'AA' = 'aa '`, answers are the database's all the same."""
    run(folding, name, seed, whole=True)


@pytest.mark.every_database
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ASYNCHRONOUS)
async def test_asynchronous_answers_are_the_databases(database: Database, name: str, seed: int):
    """The asynchronous API gives the same answers after writes through asynchronous drivers."""
    if name == "FullJoin" and database.dialect == "mysql":
        pytest.skip("MariaDB has no FULL JOIN")
    kind = KINDS[name]
    rng = Random(f"async {name} {database.dialect} {seed}")
    engine = database.async_engine()
    cache = AsyncTableCache(engine, views=[kind.view])
    factory = cache.sessionmaker()
    with database.bystander() as bystander:

        def sync_factory(**options: Any) -> Session:
            """Make the sessions inside asynchronous ones; those on a connection are plain."""
            return Session(**options) if options.get("bind") else factory(**options).sync_session

        checker = Checker(kind, sync_factory, bystander, rng)

        def observe(target: Session | Connection) -> None:
            if isinstance(target, CacheSession):
                checker.content(target, target.connection())

        engine_ = engine.sync_engine
        writer = Writer(engine_, sync_factory, kind.family, rng.randrange(10**9), observe)
        fill(bystander, kind.family, seed)
        with replayable(writer, seed):
            await cache.load(kind.view)
            for _ in range(STEPS):
                await greenlet_spawn(writer.step)
                await greenlet_spawn(checker.check)
                expected = sorted(checker.truth.rows())
                async with factory() as session:
                    records = (await session.scalars(select(kind.view))).all()
                    assert sorted(checker.truth.of(records)) == expected
                    ranged = await session.range(getattr(kind.view, checker.indexes[0]))
                    assert sorted(checker.truth.of(ranged)) == expected
            with counting() as statements:
                async with factory() as session:
                    await session.scalars(select(kind.view))
            assert not statements, "the cache was of use, all the time"
    await cache.close()
    await engine.dispose()


def test_the_random_writer_is_replayable(sqlite: Database):
    """The same seed writes the same rows by the same paths."""
    logs = []
    for _ in range(2):
        sqlite.empty()
        with sqlite.lent_engine() as engine:
            writer = Writer(engine, sessionmaker(engine), "shop", seed=5)
            with engine.begin() as connection:
                fill(connection, "shop", seed=5)
            for _ in range(20):
                writer.step()
            logs.append(writer.log)
    assert logs[0] == logs[1]
    assert len(logs[0]) > 40
