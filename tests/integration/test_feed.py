"""The change feed: what others write becomes visible, exactly, once, and never too late.

Others are connections that no cache watches; where it matters, processes of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, delete, event, insert, select, text, update

from sa_tablecache import ChangeFeed, TableCache
from tests.integration.databases import Database
from tests.integration.flights import World, flight, hour, insert_flights
from tests.zoo import Airline, Flight, OuterBoard, Plane

pytestmark = pytest.mark.every_database


HOUR = timedelta(hours=1)


@contextmanager
def followed(database: Database, *views: Any, **options: Any) -> Iterator[World]:
    """Lend a world whose cache follows the database; nobody polls but readers who have to."""
    feed = ChangeFeed(**{"max_lag": HOUR, **options})
    with database.lent_engine() as engine:
        with engine.begin() as connection:
            insert_flights(connection)
        cache = TableCache(engine, views=views or [OuterBoard], feed=feed)
        try:
            cache.install_feed()
            for view in cache.views:
                cache.load(view)
                cache.refresh(view)
            yield World(database, engine, cache, cache.sessionmaker())
            cache._check()
        finally:
            cache.uninstall_feed()
            cache.close()


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """A cache that follows the database."""
    with followed(database) as world:
        yield world


@contextmanager
def statements(*engines: Engine) -> Iterator[list[str]]:
    """Collect the statements of engines."""
    seen: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        seen.append(statement)

    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", note)


def test_a_write_elsewhere_is_seen_behind_a_barrier(world: World) -> None:
    """What another connection has committed is visible after a barrier, and marked exactly."""
    assert world.ids() == [1, 2, 3, 4, 5, 6]
    with world.outside() as session:
        session.execute(insert(Flight), [flight(7, 9)])
        session.execute(delete(Flight).where(Flight.id == 1))
        session.commit()
    world.cache.barrier()
    assert world.ids() == [2, 3, 4, 5, 6, 7]
    with world.Session() as session:
        session.scalars(select(OuterBoard)).all()
        assert session.last_read.kind == "hit"
    assert world.cache.consumer.counts["invalidations"] == 1
    world.cache._check()


WRITES: dict[str, Any] = {
    "an UPDATE of some rows": update(Flight).where(Flight.carrier == "AA").values(delay=7.0),
    "a DELETE of some rows": delete(Flight).where(Flight.hour > hour(2)),
    "an INSERT FROM SELECT": insert(Flight).from_select(
        ["id", "hour", "carrier", "tailnum", "origin", "dest", "delay"],
        select(
            Flight.id + 100,
            Flight.hour,
            Flight.carrier,
            Flight.tailnum,
            Flight.origin,
            Flight.dest,
            Flight.delay,
        ),
    ),
    "text": text("UPDATE flights SET delay = 8 WHERE carrier = 'UA'"),
    "text that names several tables": text(
        "UPDATE flights SET delay = 9 WHERE tailnum IN (SELECT tailnum FROM planes)"
    ),
    "a cascade": delete(Plane).where(Plane.model.is_(None)),
    "a key that moves": update(Airline).where(Airline.carrier == "UA").values(carrier="XX"),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_local_write_of_unknown_rows_becomes_exact(world: World, write: str) -> None:
    """After a local write that names no rows, the first read polls once and refreshes exactly."""
    cache = world.cache
    with world.Session() as session:
        session.execute(WRITES[write].execution_options(synchronize_session=False))
        session.commit()
    with world.Session() as session:
        cached = session.scalars(select(OuterBoard).order_by(OuterBoard.id)).all()
        assert session.last_read.kind == "hit"
    with world.outside() as session:
        assert cached == session.scalars(select(OuterBoard).order_by(OuterBoard.id)).all()
    cache.barrier()
    print(cache.stats(OuterBoard).marks, cache.consumer.counts)
    assert cache.consumer.counts["invalidations"] == 1
