"""What commits cost on an engine that a cache watches, in calls of Python functions: budgets.

As in ``test_budgets.py``; here what counts is the difference to an engine that nobody watches. The
budgets are those of Python 3.11, and of the SQLAlchemy that needs more.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import sessionmaker

from tests.integration.databases import Database
from tests.integration.flights import flights_world
from tests.integration.test_budgets import calls, check
from tests.zoo import Flight, OuterBoard


@pytest.fixture
def factories(sqlite: Database) -> Iterator[tuple[Any, Any]]:
    """Session factories of an engine that nobody watches, and of one with a loaded cache."""
    with flights_world(sqlite) as world:
        world.cache.load(OuterBoard)
        plain = create_engine(world.engine.url)  # nothing is read that it makes stale
        yield tuple(sessionmaker(e, expire_on_commit=False) for e in (plain, world.engine))
        plain.dispose()


def reading(factory: Any) -> Callable[[], None]:
    """Read, and commit."""
    wanted = select(Flight.id).where(Flight.id == 1)

    def run() -> None:
        with factory() as session:
            session.execute(wanted).all()
            session.commit()

    return run


def updating(factory: Any) -> Callable[[], None]:
    """Update a row of a view, and commit."""
    with factory() as session:
        flight = session.get(Flight, 1)

    def run() -> None:
        with factory() as session:
            session.add(flight)
            flight.delay = (flight.delay or 0) + 1
            session.commit()

    return run


def inserting(factory: Any) -> Callable[[], None]:
    """Insert a row of a view, delete it, and commit twice."""
    with factory() as session:
        like = session.get(Flight, 1)
    values = {c.key: getattr(like, c.key) for c in Flight.__table__.columns}

    def run() -> None:
        with factory() as session:
            flight = Flight(**(values | {"id": 99}))
            session.add(flight)
            session.commit()
            session.delete(flight)
            session.commit()

    return run


WRITES: dict[str, tuple[int, Callable[[Any], Callable[[], None]]]] = {
    "only reading": (84, reading),
    "an UPDATE": (206, updating),
    "an INSERT and a DELETE": (402, inserting),
}
"""The calls that are allowed beside those of an engine that nobody watches, and the transaction.

Three fifths of those of a transaction that only reads are how SQLAlchemy calls listeners at all.
"""


@pytest.mark.parametrize("what", WRITES)
def test_a_transaction_keeps_to_its_budget(factories: Any, what: str) -> None:
    """What a cache adds to a transaction is no more than it is known to need."""
    allowed, make = WRITES[what]
    plain, watched = (calls(make(factory)) for factory in factories)
    check(f"what a cache adds to {what!r}, it", watched - plain, allowed)
