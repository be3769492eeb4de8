"""After any writes, here and elsewhere, a cache with a feed answers as the database: every view.

A failure names its seed, as in ``test_random_writes.py``. ``SA_TABLECACHE_TEST_FEED=all`` takes
every kind of view, not one of each family.
"""

import os
from random import Random
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from sa_tablecache import ChangeFeed, TableCache
from tests.integration.checking import Checker, counting
from tests.integration.databases import Database
from tests.integration.rows import fill
from tests.integration.test_random_writes import SEEDS, STEPS, replayable, some_part
from tests.integration.writer import Writer
from tests.zoo import KINDS

NAMES = [
    "AirportChain", "Backlog", "BossBudgets", "BothCrates", "CarrierTotals", "Everyone",
    "FullJoin", "ItemTotals", "OuterBoard", "PeopleAndTags", "Samples", "WholeChain",
]  # fmt: skip
if os.environ.get("SA_TABLECACHE_TEST_FEED") == "all":
    NAMES = sorted(KINDS)


@pytest.mark.every_database
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_view_is_the_databases_after_random_writes_here_and_elsewhere(
    database: Database, name: str, seed: int
):
    """Own writes are seen at once, those of others behind a barrier; nothing is marked in vain."""
    if name == "FullJoin" and database.dialect == "mysql":
        pytest.skip("MariaDB has no FULL JOIN")
    kind = KINDS[name]
    rng = Random(f"feed {name} {database.dialect} {seed}")
    with (
        database.lent_engine() as engine,
        database.lent_engine() as elsewhere,
        database.bystander() as bystander,
    ):
        cache = TableCache(engine, views=[kind.view], feed=ChangeFeed())
        slow = TableCache(engine, views=[kind.view], feed=ChangeFeed())
        cache.install_feed()
        own = cache.sessionmaker()
        checker = Checker(kind, own, bystander, rng)

        def others(**options: Any) -> Session:
            return sessionmaker(elsewhere)(**options)

        writers = {
            "here": Writer(engine, own, kind.family, rng.randrange(10**9)),
            "elsewhere": Writer(elsewhere, others, kind.family, rng.randrange(10**9)),
        }
        log = writers["here"].log = writers["elsewhere"].log
        fill(bystander, kind.family, seed)
        described, criterion = ("everything", None)
        if kind.parts and rng.random() < 0.5:
            described, criterion = some_part(checker)
        log.append(f"load {described}")
        try:
            with replayable(writers["here"], seed):
                cache.load(kind.view, *([] if criterion is None else [criterion]))
                slow.barrier()
                checker.check()
                for _ in range(STEPS):
                    where = rng.choice(sorted(writers))
                    log.append(f"-- {where}")
                    writers[where].step()
                    if where == "elsewhere":
                        cache.barrier()
                    checker.check()
                    cache._check()
                log.append("-- at the end")
                cache.barrier()
                statement = select(kind.view)
                if criterion is not None:
                    statement = statement.where(criterion)
                with own() as session:
                    expected = session.scalars(statement).all()
                with counting() as statements, own() as session:
                    assert set(session.scalars(statement)) == set(expected)
                    how = session.last_read
                assert not statements, f"the cache was of use, all the time, but {how}"
                assert cache.consumer is not None
                assert cache.consumer.counts["invalidations"] == 1, "only when it was seeded"
                if database.dialect == "postgresql":  # elsewhere a poll gathers the rows it finds
                    slow.barrier()
                    assert slow.consumer is not None
                    in_one = slow.consumer.counts["changes"]
                    assert cache.consumer.counts["changes"] == in_one, "each exactly once"
        finally:
            cache.uninstall_feed()
            slow.close()
            cache.close()
