"""What listeners of the application are told of the records of a view, when, and in which order."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from sqlalchemy import delete, event, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from sa_tablecache import AsyncTableCache, CachedView, observers
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world, hour, ids, insert_flights
from tests.integration.test_protocol import Held, Running
from tests.zoo import Flight, InnerBoard, OuterBoard, Plane, Sample, Samples

EVENTS = ("after_load", "after_refresh", "invalidated")


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights; nothing is loaded."""
    with flights_world(database, OuterBoard, InnerBoard) as world:
        yield world


class Told:
    """What listeners were told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.events.append((name, *arguments))

    def take(self) -> list[tuple[Any, ...]]:
        """Return what was told since the last call: the event, and ids of records."""
        told, self.events = self.events, []
        return [(name, *map(_brief, arguments)) for name, _, *arguments in told]


def _brief(argument: Any) -> Any:
    """Show records by their ids, and pairs of records by the id and the models."""
    if not isinstance(argument, list):
        return argument
    return sorted(
        (item[1].id, item[0].model, item[1].model) if isinstance(item, tuple) else item.id
        for item in argument
    )


@contextmanager
def listening(target: Any, names: tuple[str, ...] = EVENTS) -> Iterator[Told]:
    """Listen to events of a view for the time of a block."""
    told = Told()
    functions = {name: getattr(told, name) for name in names}
    with ExitStack() as stack:
        for name, function in functions.items():
            event.listen(target, name, function)
            stack.callback(event.remove, target, name, function)
        yield told


def test_loads_tell_what_came_and_went(world: World) -> None:
    """Load, extend, evict and clear tell the difference that they made."""
    cache = world.cache
    with listening(OuterBoard) as told:
        cache.load(OuterBoard, OuterBoard.hour < hour(2))
        assert told.take() == [("after_load", [1, 2, 3], [])]
        cache.load(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
        assert told.take() == [("after_load", [4], [1])]
        cache.extend(OuterBoard, OuterBoard.hour >= hour(3))
        assert told.take() == [("after_load", [5, 6], [])]
        cache.load(OuterBoard, OuterBoard.hour >= hour(1))
        assert told.take() == []
        cache.evict(OuterBoard, OuterBoard.hour >= hour(4))
        assert told.take() == [("after_load", [], [6])]
        cache.clear(OuterBoard)
        assert told.take() == [("after_load", [], [2, 3, 4, 5])]
        cache.clear(OuterBoard)
        cache.load(InnerBoard)
        assert told.take() == []


def test_commits_tell_which_rows_and_refreshes_what_became_of_them(world: World) -> None:
    """A commit tells the rows that it wrote, the refresh what became of their records."""
    world.cache.load(OuterBoard)
    with listening(OuterBoard) as told, world.Session() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
        session.execute(insert(Flight), [flight(7, 0.5, "AA", "N2")])
        session.execute(delete(Flight).where(Flight.id == 6))
        session.commit()
        rows = {"planes": frozenset({("N1",)}), "flights": frozenset({(6,), (7,)})}
        assert told.take() == [("invalidated", rows)]
        assert ids(session.query(OuterBoard)) == [1, 2, 3, 4, 5, 7]
        changed = [(1, "A320", "A380"), (4, "A320", "A380")]
        assert told.take() == [("after_refresh", [7], changed, [6])]
        session.rollback()
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
        session.commit()
        assert told.take() == [("invalidated", {"planes": frozenset({("N1",)})})]
        world.cache.refresh(OuterBoard)
        assert told.take() == []


def test_a_refresh_of_everything_tells_the_difference(world: World) -> None:
    """When the whole view is read again, only what is different is told."""
    world.cache.load(OuterBoard)
    with world.outside() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N3").values(model="A380"))
        session.execute(delete(Flight).where(Flight.id == 1))
        session.commit()
    with listening(OuterBoard) as told:
        world.cache.invalidate(OuterBoard)
        world.cache.invalidate(Plane)
        world.cache.refresh(OuterBoard)
        assert told.take() == [
            ("invalidated", None),
            ("invalidated", None),
            ("after_refresh", [], [(5, "B737", "A380")], [1]),
        ]


def test_a_rolled_back_transaction_tells_nothing(world: World) -> None:
    """What was never committed concerns nobody."""
    world.cache.load(OuterBoard)
    with listening(OuterBoard) as told, world.Session() as session:
        session.execute(update(Plane).values(model="A380"))
        session.rollback()
        assert told.take() == []


def test_a_listener_reads_what_it_is_told(world: World) -> None:
    """When it is called the change is there, no lock is held, and the cache can be used."""
    seen = []

    def look(view: Any, *_: Any) -> None:
        with world.Session() as session:
            seen.append((ids(session.query(view)), session.last_read.kind))

    def load_more(view: Any, *_: Any) -> None:
        if len(seen) == 1:
            world.cache.load(view)

    event.listen(OuterBoard, "after_load", look)
    event.listen(OuterBoard, "after_load", load_more)
    try:
        world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
    finally:
        event.remove(OuterBoard, "after_load", look)
        event.remove(OuterBoard, "after_load", load_more)
    assert seen == [([1, 2, 3, 4, 5, 6], "partial"), ([1, 2, 3, 4, 5, 6], "hit")]


def test_a_listener_that_raises_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It harms neither who loads, commits and reads, nor the listeners after it."""

    def fail(view: Any, *_: Any) -> None:
        raise RuntimeError("no such socket")

    for name in EVENTS:
        event.listen(OuterBoard, name, fail)
    try:
        with listening(OuterBoard) as told:
            world.cache.load(OuterBoard)
            with world.Session() as session:
                session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
                session.commit()
                assert session.get(OuterBoard, 1).model == "A380"
            assert [name for name, *_ in told.take()] == [
                "after_load",
                "invalidated",
                "after_refresh",
            ]
    finally:
        for name in EVENTS:
            event.remove(OuterBoard, name, fail)
    errors = [r for r in caplog.records if r.name == "sa_tablecache.observers"]
    assert len(errors) == 3
    assert "view OuterBoard: a listener to after_load failed" in errors[0].getMessage()
    assert "no such socket" in caplog.text
    world.cache._check()


def test_a_listener_that_is_interrupted_loses_nothing(world: World) -> None:
    """What ends a thread or task goes on to the caller; the next events are told."""

    def interrupt(view: Any, *_: Any) -> None:
        raise KeyboardInterrupt

    event.listen(OuterBoard, "after_load", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
    finally:
        event.remove(OuterBoard, "after_load", interrupt)
    assert world.cache.stats(OuterBoard).records == 3
    with listening(OuterBoard) as told:
        world.cache.load(OuterBoard)
        assert told.take() == [("after_load", [4, 5, 6], [])]


def test_a_commit_ends_its_leases_before_listeners_are_called(world: World) -> None:
    """A listener that is interrupted in a commit leaves no view waiting for the commit."""

    def interrupt(view: Any, rows: Any) -> None:
        raise KeyboardInterrupt

    world.cache.load(OuterBoard)
    world.cache.load(InnerBoard)
    event.listen(CachedView, "invalidated", interrupt)
    try:
        with world.Session() as session:
            session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
            with pytest.raises(KeyboardInterrupt):
                session.commit()
    finally:
        event.remove(CachedView, "invalidated", interrupt)
    assert [world.cache.stats(view).leases for view in (OuterBoard, InnerBoard)] == [0, 0]


def test_events_are_told_in_order(world: World) -> None:
    """A thread that comes while another is telling leaves its events to that one."""
    world.cache.load(OuterBoard, OuterBoard.hour < hour(1))
    began, go_on = threading.Event(), threading.Event()
    order = []

    def slow(view: Any, loaded: Any, expired: Any) -> None:
        order.append(("load", threading.get_ident()))
        began.set()
        assert go_on.wait(20)

    def refreshed(view: Any, *_: Any) -> None:
        order.append(("refresh", threading.get_ident()))

    event.listen(OuterBoard, "after_load", slow)
    event.listen(OuterBoard, "after_refresh", refreshed)
    try:
        loading = Running(lambda: world.cache.load(OuterBoard))
        assert began.wait(20)
        with world.Session() as session:
            session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
            session.commit()
            assert session.get(OuterBoard, 1).model == "A380"
        assert [name for name, _ in order] == ["load"]
        go_on.set()
        loading.result()
    finally:
        event.remove(OuterBoard, "after_load", slow)
        event.remove(OuterBoard, "after_refresh", refreshed)
    assert [name for name, _ in order] == ["load", "refresh"]
    assert order[0][1] == order[1][1]


def test_what_is_told_is_what_is_stored(world: World) -> None:
    """Who keeps the books of a load beside which refreshes were applied has the records."""
    table = world.cache.table(OuterBoard)
    books: dict[int, Any] = {}

    def after_load(view: Any, loaded: Any, expired: Any) -> None:
        books.update({record.id: record for record in loaded})
        for record in expired:
            assert books.pop(record.id) == record

    def after_refresh(view: Any, added: Any, changed: Any, removed: Any) -> None:
        assert all(books[before.id] == before != after for before, after in changed)
        books.update({record.id: record for record in [*added, *(new for _, new in changed)]})
        for record in removed:
            assert books.pop(record.id) == record

    event.listen(OuterBoard, "after_load", after_load)
    event.listen(OuterBoard, "after_refresh", after_refresh)
    try:
        world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
        held = Held(table, "loaded")
        loading = Running(lambda: world.cache.load(OuterBoard))
        assert held.reached.wait(20)
        with world.Session() as session:
            session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
            session.execute(delete(Flight).where(Flight.id == 2))
            session.commit()
            assert session.get(OuterBoard, 1).model == "A380"
        assert books == {record.id: record for record in table.state.storage}
        held.let_go()
        loading.result()
        assert books == {record.id: record for record in table.state.storage}
        assert world.ids() == [1, 3, 4, 5, 6]
        assert books == {record.id: record for record in table.state.storage}
        assert books[4].model == "A380"
        world.cache.clear(OuterBoard)
        assert books == {}
    finally:
        event.remove(OuterBoard, "after_load", after_load)
        event.remove(OuterBoard, "after_refresh", after_refresh)


def test_nothing_is_worked_out_for_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a listener no difference is looked for, and no event is kept."""

    def fail(*_: Any) -> Any:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(observers, "_different", fail)
    monkeypatch.setattr(observers, "rows_of", fail)
    with listening(OuterBoard, ("invalidated",)), listening(InnerBoard):
        pass
    world.cache.load(OuterBoard)
    with world.Session() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
        session.commit()
        session.query(OuterBoard).all()
    assert not world.cache.table(OuterBoard).observers._noted


def test_what_did_not_change_is_not_looked_at(database: Database) -> None:
    """A refresh of one row compares the records near it, not all."""
    with flights_world(database) as world:
        with world.engine.begin() as connection:
            connection.execute(insert(Flight), [flight(n, n % 9) for n in range(1000, 3000)])
        world.cache.load(OuterBoard)
        looked: list[int] = []
        original = observers._different

        def different(before: Any, after: Any, key_of: Any) -> Any:
            old, new = original(before, after, key_of)
            looked.append(len(old) + len(new))
            return old, new

        observers._different = different
        try:
            with listening(OuterBoard) as told:
                with world.Session() as session:
                    session.execute(update(Flight).where(Flight.id == 1500).values(tailnum="N3"))
                    session.commit()
                world.cache.refresh(OuterBoard)
                assert told.take()[1] == ("after_refresh", [], [(1500, None, "B737")], [])
        finally:
            observers._different = original
        assert looked[0] < 1100


# --- who listens to what --------------------------------------------------------------------------


class Night(OuterBoard):
    """A view that is derived from another."""


def test_listeners_of_a_base_class_hear_of_derived_views(database: Database) -> None:
    """Those of CachedView hear of all views, those of a view of it and what is derived from it."""
    with (
        flights_world(database, OuterBoard, Night, InnerBoard) as world,
        listening(CachedView) as of_all,
        listening(OuterBoard) as of_outer,
        listening(Night) as of_night,
    ):
        for view in (InnerBoard, OuterBoard, Night):
            world.cache.load(view)
        views = [[view for _, view, *_ in told.events] for told in (of_all, of_outer, of_night)]
        assert views == [[InnerBoard, OuterBoard, Night], [OuterBoard, Night], [Night]]


def test_the_usual_ways_to_listen_work(world: World) -> None:
    """Decorators, `named=True`, `once=True`, `event.contains` and `event.remove`."""
    told = Told()

    @event.listens_for(OuterBoard, "after_load", named=True)
    def by_name(**arguments: Any) -> None:
        told.by_name(*sorted(arguments))

    @event.listens_for(OuterBoard, "after_load", once=True)
    def only_once(view: Any, loaded: Any, expired: Any) -> None:
        told.only_once(view)

    assert event.contains(OuterBoard, "after_load", by_name)
    world.cache.load(OuterBoard)
    world.cache.clear(OuterBoard)
    event.remove(OuterBoard, "after_load", by_name)
    world.cache.load(OuterBoard)
    assert told.events == [
        ("by_name", "expired", "loaded", "view"),
        ("only_once", OuterBoard),
        ("by_name", "expired", "loaded", "view"),
    ]


@pytest.mark.parametrize("name", ["after_flush", "loaded"])
def test_other_events_are_no_events_of_views(name: str) -> None:
    """What a view does not tell is refused, as SQLAlchemy does."""
    with pytest.raises(Exception, match="No such event"):
        event.listen(OuterBoard, name, lambda *_: None)


def test_mutable_values_are_the_listeners_own(database: Database) -> None:
    """What a listener does to a JSON value is not seen by readers."""
    with flights_world(database, Samples) as world:
        with world.engine.begin() as connection:
            connection.execute(insert(Sample), [{"id": 1, "document": {"a": 1}}])
        told = Told()

        def spoil(view: Any, loaded: Any, expired: Any) -> None:
            for record in loaded:
                record.document["a"] = 2
                told.spoilt()

        event.listen(Samples, "after_load", spoil)
        try:
            world.cache.load(Samples)
        finally:
            event.remove(Samples, "after_load", spoil)
        assert told.events == [("spoilt",)]
        with world.Session() as session:
            assert session.scalars(select(Samples)).one().document == {"a": 1}


async def test_an_asynchronous_cache_tells_as_well(database: Database) -> None:
    """Listeners of an AsyncTableCache are plain functions, called in the event loop's thread."""
    engine: AsyncEngine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    threads = []

    def note(view: Any, *_: Any) -> None:
        threads.append(threading.get_ident())

    with listening(OuterBoard) as told:
        event.listen(OuterBoard, "after_load", note)
        async with AsyncTableCache(engine, views=[OuterBoard]) as cache:
            await cache.load(OuterBoard)
            async with cache.sessionmaker()() as session:
                await session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="X"))
                await session.commit()
                assert (await session.get(OuterBoard, 1)).model == "X"
        assert [name for name, *_ in told.take()] == ["after_load", "invalidated", "after_refresh"]
    event.remove(OuterBoard, "after_load", note)
    assert threads == [threading.get_ident()]
    await engine.dispose()


def test_listening_costs_no_statement(world: World) -> None:
    """What is told was read anyway."""
    world.cache.load(OuterBoard)
    counts = []
    for target in (OuterBoard, None):
        world.cache.clear(OuterBoard)
        with ExitStack() as stack:
            if target is not None:
                told = stack.enter_context(listening(target))
            statements = stack.enter_context(counting())
            world.cache.load(OuterBoard)
            world.cache.invalidate(Plane, "N1")
            world.cache.refresh(OuterBoard)
            counts.append(len(statements))
    assert [name for name, *_ in told.take()] == ["after_load", "invalidated"]
    assert counts[0] == counts[1]
