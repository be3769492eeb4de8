"""The shortest way asks all that the long one asks, at each read: nothing is taken for granted."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, text, update
from sqlalchemy.orm import Session, sessionmaker

import sa_tablecache.session as sessions
from sa_tablecache import CacheSession, TableCache, TableCacheError
from sa_tablecache.scopes import harmless
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour
from tests.zoo import DelayRank, Flight, InnerBoard, OuterBoard

READS: dict[str, Callable[[Any], Any]] = {
    "range": lambda s: s.range(OuterBoard.by_hour, ge=hour(1), lt=hour(3)),
    "get": lambda s: s.get(OuterBoard, 2),
}


@pytest.fixture
def world(sqlite: Database) -> Iterator[World]:
    """Six flights, all of them cached."""
    with flights_world(sqlite) as world:
        world.cache.load(OuterBoard)
        yield world


@contextmanager
def listening(target: Any, name: str, listener: Callable[..., Any]) -> Iterator[None]:
    """Listen in a block."""
    event.listen(target, name, listener)
    try:
        yield
    finally:
        event.remove(target, name, listener)


def kind(session: Any, read: str) -> str:
    """Read, and return how that was answered; the transaction, if there was one, is over."""
    READS[read](session)
    found: str = session.last_read.kind
    session.rollback()
    return found


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", ["do_orm_execute", "after_begin"])
@pytest.mark.parametrize("where", ["session", "sessionmaker", "class", "base class"])
def test_listeners_of_sessions_are_looked_for_at_each_read(
    world: World, read: str, name: str, where: str
) -> None:
    """Whoever begins to listen after hits has the next read sent to the database."""
    with world.Session() as session:
        targets: dict[str, Any] = {
            "session": session,
            "sessionmaker": world.Session,
            "class": CacheSession,
            "base class": Session,
        }
        for _ in range(2):
            assert kind(session, read) == "hit"
            with listening(targets[where], name, lambda *_: None):
                assert kind(session, read) == "bypass"
            with listening(targets[where], name, harmless(lambda *_: None)):
                assert kind(session, read) == "hit"
        assert kind(session, read) == "hit"


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", ["begin", "engine_connect"])
@pytest.mark.parametrize("where", ["engine", "class"])
def test_listeners_of_engines_are_looked_for_at_each_read(
    world: World, read: str, name: str, where: str
) -> None:
    """Whoever begins to listen to the engine, or to all engines, has reads sent to the database."""
    with world.Session() as session:
        for _ in range(2):
            assert kind(session, read) == "hit"
            with listening(world.engine if where == "engine" else Engine, name, lambda *_: None):
                assert kind(session, read) == "bypass"
        assert kind(session, read) == "hit"


@pytest.mark.parametrize("read", READS)
def test_an_isolation_level_asked_for_later_is_noticed(world: World, read: str) -> None:
    """The execution options of an engine may be replaced after hits."""
    engine = world.database.engine()  # for this test alone: nothing takes options back
    with TableCache(engine, views=[OuterBoard], exclusive_writer=True) as cache:
        cache.load(OuterBoard)
        with cache.sessionmaker()() as session:
            assert [kind(session, read) for _ in range(2)] == ["hit", "hit"]
            engine.update_execution_options(isolation_level="SERIALIZABLE")
            assert kind(session, read) == "bypass"
            engine.update_execution_options(isolation_level="AUTOCOMMIT")
            assert kind(session, read) == "hit"  # each statement sees what is committed
    engine.dispose()


@pytest.mark.parametrize("read", READS)
def test_a_bind_given_later_is_noticed(world: World, read: str) -> None:
    """A session, and what it binds, may be bound elsewhere after hits."""
    with world.Session() as session:
        assert [kind(session, read) for _ in range(2)] == ["hit", "hit"]
        other = world.engine.execution_options(schema_translate_map={None: "main"})
        session.bind = other
        assert kind(session, read) == "bypass"
        session.bind = world.engine
        assert kind(session, read) == "hit"
        session.bind = world.engine.execution_options(isolation_level="SERIALIZABLE")
        assert kind(session, read) == "bypass"


@pytest.mark.parametrize("read", READS)
def test_a_class_that_executes_otherwise_is_noticed(world: World, read: str) -> None:
    """A class of sessions derived from one that had hits is looked at by itself."""
    with world.Session() as session:
        assert [kind(session, read) for _ in range(2)] == ["hit", "hit"]
        called = []

        class Otherwise(type(session)):  # type: ignore[misc]
            def execute(self, *args: Any, **kwargs: Any) -> Any:
                called.append(args)
                return super().execute(*args, **kwargs)

            def scalars(self, *args: Any, **kwargs: Any) -> Any:
                called.append(args)
                return super().scalars(*args, **kwargs)

    with sessionmaker(class_=Otherwise, bind=world.engine)() as other:
        for times in (1, 2):
            READS[read](other)
            assert len(called) == times


@pytest.mark.parametrize("read", READS)
def test_a_session_of_no_cache_says_so(world: World, read: str) -> None:
    """A session that was made by hand has nothing to read from."""
    with (
        CacheSession(world.engine) as session,
        pytest.raises(TableCacheError, match="belongs to no cache"),
    ):
        READS[read](session)


# -- the two ways ------------------------------------------------------------------------------

VALUES: dict[str, list[Any]] = {
    "hour": [hour(n / 2) for n in range(10)],
    "carrier": ["AA", "UA", "ZZ", None],
    "tailnum": ["N1", "N2", "N9", None],
    "year": [1999, 2010, 2011, None],
    "delay": [-3.0, 0, 5, 30.0, math.nan, None, "late"],
}
"""What ranges are asked with: values that are there, that are not, and that are none at all."""


def some_range(chance: random.Random, view: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return an index, a prefix, and bounds."""
    index = chance.choice(list(view.__indexes__.values()))
    names = index.column_names
    values = [VALUES.get(name, VALUES["delay"]) for name in names]
    prefix = tuple(chance.choice(v) for v in values[: chance.randint(0, len(names))])
    bounds: dict[str, Any] = {"descending": chance.random() < 0.3}
    if len(prefix) < len(names):
        for bound in chance.sample(["ge", "gt", "le", "lt"], chance.randint(0, 3)):
            bounds[bound] = chance.choice(values[len(prefix)])
    return index, prefix, bounds


def answered(session: Any, read: Callable[[], Any]) -> tuple[Any, ...]:
    """Return what a read gives, and how it was answered; an error is an answer, too."""
    session.last_read = None
    try:
        found: Any = read()
    except Exception as error:
        session.rollback()
        return type(error), None
    last = session.last_read
    return found, None if last is None else (last.kind, last.reason)


@pytest.mark.every_database
@pytest.mark.parametrize("seed", range(6))
def test_both_ways_give_the_same(
    database: Database, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Random ranges and keys, of views that are loaded in part, in and outside of transactions."""
    chance = random.Random(seed)
    views = (OuterBoard, InnerBoard, DelayRank)
    quick = sessions.range_of, sessions.record_of
    counts = dict.fromkeys(("hit", "other"), 0)
    with flights_world(database, *views) as world:
        for view in views:
            how = chance.choice(["all", "all", "part", "none"])
            if how != "none":
                world.cache.load(view, *([view.hour < hour(2)] if how == "part" else []))
        with world.Session() as session:
            for _ in range(150):
                match chance.randint(0, 20):
                    case 0:
                        session.execute(text("SELECT 1"))
                    case 1:
                        session.execute(select(Flight.id)).all()
                    case 2:
                        session.execute(update(Flight).where(Flight.id == 4).values(origin="LGA"))
                    case 3:
                        session.commit()
                    case 4:
                        session.rollback()
                view = chance.choice(views)
                if chance.random() < 0.3:
                    key = chance.choice([1, 2, 6, 7, None, "1", 2.0, True])
                    read: Callable[[], Any] = lambda v=view, k=key: session.get(v, k)  # noqa: E731
                else:
                    index, prefix, bounds = some_range(chance, view)
                    read = lambda i=index, p=prefix, b=bounds: session.range(i, *p, **b)  # noqa: E731
                monkeypatch.setattr(sessions, "range_of", lambda *_: None)
                monkeypatch.setattr(sessions, "record_of", lambda *_: None)
                answered(session, read)  # what a first one may have to refresh, or to begin
                expected = answered(session, read)
                for name, way in zip(("range_of", "record_of"), quick, strict=True):
                    monkeypatch.setattr(sessions, name, way)
                assert answered(session, read) == expected
                kind = None if expected[1] is None else expected[1][0]
                counts["hit" if kind == "hit" else "other"] += 1
    assert min(counts.values()) > 5, counts
