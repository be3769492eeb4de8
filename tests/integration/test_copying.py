"""No lock is held while records are copied: a reader that is stopped in the midst stops nobody.

The reader has a trace function that stops it where storage returns a list of records, before
anything else sees it; whatever of the cache is locked then stays locked until it is let go. Others
have to be able to do everything meanwhile, and the reader has to get what was there when it began.
"""

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import select, update

import sa_tablecache.records
from sa_tablecache import CacheSession
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world, hour, ids
from tests.integration.pausing import Running
from tests.zoo import Flight, OuterBoard


class Copying:
    """A reader in a thread of its own, which is stopped with its records in its hands."""

    def __init__(self, world: World, read: Callable[[CacheSession], Any]) -> None:
        self._copied, self._go = threading.Event(), threading.Event()

        def run() -> list[int]:
            with world.Session() as session:
                sys.settrace(self._trace)
                try:
                    records = read(session)
                finally:
                    sys.settrace(None)
                return ids(records)

        self._running = Running(run)
        assert self._copied.wait(20), "storage never returned a list of records"

    def _trace(self, frame: FrameType, event: str, value: Any) -> Any:
        if frame.f_code.co_filename != sa_tablecache.records.__file__:
            return None
        if event == "return" and isinstance(value, list) and value and not self._copied.is_set():
            self._copied.set()
            assert self._go.wait(30), "never let go"
        return self._trace

    def result(self) -> Any:
        """Let the reader go on, and return the ids that it has read."""
        self._go.set()
        return self._running.result()


READS: dict[str, Callable[[CacheSession], Any]] = {
    "range": lambda session: session.range(OuterBoard.by_hour, ge=hour(1), lt=hour(4)),
    "page": lambda session: session.range(OuterBoard.by_hour, ge=hour(1), lt=hour(4), limit=9),
    "select": lambda session: session.scalars(
        select(OuterBoard).where(OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4))
    ).all(),
    "residual": lambda session: session.scalars(
        select(OuterBoard).where(
            OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4), OuterBoard.id > 0
        )
    ).all(),
    "query": lambda session: (
        session.query(OuterBoard)
        .filter(OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4))
        .order_by(OuterBoard.hour)
        .all()
    ),
}
"""Ways to read the flights 2 to 5."""


def _commit(world: World) -> None:
    """Move a flight that is being read away, which marks it, and add one."""
    with world.Session() as session:
        session.execute(update(Flight).where(Flight.id == 4).values(hour=hour(5)))
        session.add(Flight(**flight(7, 2)))
        session.commit()


def _read(world: World) -> None:
    assert world.ids(OuterBoard.hour >= hour(3), OuterBoard.hour < hour(4)) == [5]


def _refresh(world: World) -> None:
    _commit(world)
    world.cache.refresh(OuterBoard)
    assert world.cache.stats(OuterBoard).pending_marks == 0


def _read_after_a_commit(world: World) -> None:
    _commit(world)
    assert world.ids(OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4)) == [2, 3, 5, 7]


def _slide(world: World) -> None:
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(2))
    assert world.cache.stats(OuterBoard).records == 3


def _load_anew(world: World) -> None:
    world.cache.clear(OuterBoard)
    world.cache.load(OuterBoard)
    assert world.cache.stats(OuterBoard).records == 6


def _evict(world: World) -> None:
    world.cache.evict(OuterBoard, OuterBoard.hour >= hour(3))
    assert world.cache.stats(OuterBoard).records == 4


def _invalidate(world: World) -> None:
    world.cache.invalidate(OuterBoard)
    world.cache.refresh(OuterBoard)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize(
    "meanwhile",
    [_read, _commit, _refresh, _read_after_a_commit, _slide, _load_anew, _evict, _invalidate],
)
def test_nobody_waits_for_a_reader_that_copies(
    database: Database,
    read: Callable[[CacheSession], Any],
    meanwhile: Callable[[World], None],
) -> None:
    """All of it ends while the reader stands still, who gets the records of when it began."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        reader = Copying(world, read)
        Running(lambda: meanwhile(world)).result()
        assert reader.result() == [2, 3, 4, 5]


def test_a_reader_that_copies_holds_no_lock_of_another_reader(database: Database) -> None:
    """Several readers that all stand still in the midst of the same records."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        readers = [Copying(world, read) for read in READS.values()]
        assert [reader.result() for reader in readers] == [[2, 3, 4, 5]] * len(readers)
