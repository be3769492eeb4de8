"""What `cache.why()` tells of a record, and that redacted values are told nowhere."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select, text, update

from sa_tablecache import AsyncTableCache, CachedView, ScoreIndex
from sa_tablecache.exc import CriteriaError, DuplicateKey, TableCacheError
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour, insert_flights
from tests.zoo import Flight, OuterBoard, Plane

SECRET = "N1"


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights; nothing is loaded."""
    with flights_world(database) as world:
        yield world


def test_a_record_was_loaded_marked_and_refreshed(world: World) -> None:
    """It tells when, and by which base rows."""
    cache, start = world.cache, datetime.now(UTC)
    assert str(cache.why(OuterBoard, 1)) == "OuterBoard 1\n  stored     no, not covered"
    cache.load(OuterBoard, OuterBoard.hour < hour(1))
    cache.load(OuterBoard)
    first = cache.why(OuterBoard, 1)
    assert first.record.model == "A320"
    assert first.loaded is not None
    assert start <= first.loaded <= datetime.now(UTC)
    later = cache.why(OuterBoard, 4).loaded
    assert later is not None
    assert later > first.loaded
    assert (first.marked, first.marks, first.refreshed, first.because) == (None, (), None, ())
    with world.Session() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
        session.commit()
    why = cache.why(OuterBoard, 1)
    assert why.marked is not None
    assert why.marked >= first.loaded
    assert why.marks == ("planes ('N1',)",)
    assert cache.why(OuterBoard, 2).marks == ()
    cache.refresh(OuterBoard)
    why = cache.why(OuterBoard, 1)
    assert (why.record.model, why.marks) == ("A380", ())
    assert why.refreshed is not None
    assert why.because == ("planes ('N1',)",)
    assert why.loaded == first.loaded
    assert cache.why(OuterBoard, 2).refreshed is None
    cache.invalidate(OuterBoard)
    assert cache.why(OuterBoard, 2).marks == ("a mark of the whole view",)
    shown = str(cache.why(OuterBoard, 1))
    assert "refreshed  " in shown
    assert "after planes ('N1',)" in shown
    assert "by a mark of the whole view" in shown


def test_a_record_that_is_not_stored(world: World) -> None:
    """It tells whether it is known not to exist, and what may bring it."""
    world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
    assert not world.cache.why(OuterBoard, 6).covered
    assert not world.cache.why(OuterBoard, 99).covered
    world.cache.load(OuterBoard)
    why = world.cache.why(OuterBoard, 99)
    assert (why.record, why.covered, why.loaded) == (None, True, None)
    with world.Session() as session:
        session.execute(update(Flight).where(Flight.id == 6).values(id=99))
        session.commit()
    assert world.cache.why(OuterBoard, 99).marks != ()
    world.cache.clear(OuterBoard)
    assert not world.cache.why(OuterBoard, 1).covered


def test_what_was_evicted_was_loaded_when_it_came_back(world: World) -> None:
    """A record counts as loaded from when it has been covered without a break."""
    world.cache.load(OuterBoard)
    first = world.cache.why(OuterBoard, 1).loaded
    world.cache.evict(OuterBoard, OuterBoard.hour < hour(1))
    world.cache.extend(OuterBoard, OuterBoard.hour < hour(1))
    again = world.cache.why(OuterBoard, 1).loaded
    assert first is not None
    assert again is not None
    assert again > first
    assert world.cache.why(OuterBoard, 2).loaded == first


def test_what_is_long_ago_is_not_remembered(world: World) -> None:
    """After a hundred loads the first is forgotten, and nothing else is said in its place."""
    world.cache.load(OuterBoard)
    for _ in range(50):
        world.cache.evict(OuterBoard, OuterBoard.hour > hour(3))
        world.cache.extend(OuterBoard, OuterBoard.hour > hour(3))
    why = world.cache.why(OuterBoard, 1)
    assert why.record is not None
    assert why.loaded is None
    assert "longer ago than is remembered" in str(why)


@pytest.mark.parametrize("key", [(1, 2), ()])
def test_a_key_is_a_key(world: World, key: Any) -> None:
    """What cannot be a key of the view is an error."""
    world.cache.load(OuterBoard)

    class Pairs(OuterBoard):
        __primary_key__ = ("id", "tailnum")

    world.cache.add(Pairs)
    with pytest.raises(CriteriaError, match="is no primary key of Pairs, which is"):
        world.cache.why(Pairs, (1, 2, 3))
    with pytest.raises(CriteriaError, match="is no key of OuterBoard"):
        world.cache.why(OuterBoard, key)


async def test_an_asynchronous_cache_tells_at_once(database: Database) -> None:
    """It only looks at memory, and is not awaited."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    async with AsyncTableCache(engine, views=[OuterBoard]) as cache:
        await cache.load(OuterBoard)
        assert cache.why(OuterBoard, 3).record.airline == "United"
    await engine.dispose()


# --- redaction ------------------------------------------------------------------------------------


class Discreet(OuterBoard):
    """The board, of which tail numbers and models are nobody's business."""

    __redact__ = ("tailnum", "model", "hour")


def test_reasons_and_explanations_redact(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the coverage in a reason, nor statistics, nor explanations show a value."""
    caplog.set_level(logging.DEBUG, "sa_tablecache")
    with flights_world(database, Discreet) as world:
        cache, told = world.cache, []
        cache.load(Discreet, Discreet.hour < hour(2))
        with world.Session() as session:
            session.scalars(select(Discreet).where(Discreet.tailnum == "N3")).all()
            told.append(session.last_read.reason)
            session.scalars(select(Discreet).where(Discreet.hour < hour(3))).all()
            told.append(session.last_read.reason)
            session.rollback()
            session.range(Discreet.by_hour, ge=hour(1), lt=hour(3))
            told.append(session.last_read.reason)
            session.range(Discreet.by_plane, "N3")
            told.append(session.last_read.reason)
        told.append(cache.stats(Discreet).coverage)
        told += [
            str(cache.explain(select(Discreet).where(Discreet.hour < hour(number))))
            for number in (1, 3)
        ]
        told.append(str(cache.explain(select(Discreet).where(Discreet.tailnum == "N3"))))
        with world.Session() as session:
            session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
            session.commit()
        told.append(str(cache.why(Discreet, 1)))
        told.append(repr(cache.why(Discreet, 1)))
    assert "<redacted>" in told[0]
    for words in (*told, caplog.text):
        for value in ("N1", "N3", "2024", "A320", "A380"):
            assert value not in words, words


def test_errors_of_duplicate_keys_redact(database: Database) -> None:
    """That a key is none is told without the key."""

    class Bare(CachedView):
        __select__ = select(Flight.id, Flight.carrier)
        __primary_key__ = ("carrier",)
        __redact__ = ("carrier",)

    with (
        flights_world(database, Bare) as world,
        pytest.raises(DuplicateKey, match="two rows have carrier = <redacted>, so that is no"),
    ):
        world.cache.load(Bare)


def test_odd_values_are_redacted(sqlite: Database, caplog: pytest.LogCaptureFixture) -> None:
    """What is stored in another form than it should be is not shown either."""

    class Hours(CachedView):
        __select__ = select(Flight.id, Flight.hour, Flight.delay)
        __redact__ = ("hour", "delay")
        by_hour = ScoreIndex("hour")

    class ByHour(CachedView):
        __select__ = select(Flight.id, Flight.hour)
        __primary_key__ = ("hour",)
        __redact__ = ("hour",)

    with flights_world(sqlite, Hours, ByHour) as world:
        with world.engine.begin() as connection:
            connection.execute(text("UPDATE flights SET hour = '2024-03-01 08:00' WHERE id = 1"))
            connection.execute(text("UPDATE flights SET delay = 'secret' WHERE id = 2"))
        world.cache.load(Hours)
        with pytest.raises(TableCacheError, match="hour identifies rows, but it holds <redacted>"):
            world.cache.load(ByHour)
    assert "is left to the database: it holds <redacted>" in caplog.text
    assert "secret" not in caplog.text
    assert "08:00" not in caplog.text


def test_errors_of_the_database_show_no_parameters(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A refresh that fails is logged with the driver's words, without statement and values."""
    world.cache.load(OuterBoard)
    with world.Session() as session:
        session.execute(update(Flight).where(Flight.id == 4).values(delay=1.0, tailnum="N3"))
        session.commit()
    with world.outside() as session:
        session.execute(text("ALTER TABLE airlines RENAME TO airlines_"))
        session.commit()
    try:
        with world.Session() as session, pytest.raises(Exception, match="airlines"):
            session.scalars(select(OuterBoard)).all()
    finally:
        with world.outside() as session:
            session.execute(text("ALTER TABLE airlines_ RENAME TO airlines"))
            session.commit()
    (line,) = (r.getMessage() for r in caplog.records if "refresh failed" in r.getMessage())
    assert "airlines" in line
    assert "parameters" not in line
    assert "SELECT" not in line
