"""A small, fixed set of flights, for tests that say what they expect in numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, insert
from sqlalchemy.orm import Session, sessionmaker

from sa_tablecache import CacheSession, TableCache
from tests.integration.databases import Database
from tests.zoo import Airline, Airport, Flight, OuterBoard, Plane

EIGHT = datetime(2024, 3, 1, 8)


def hour(number: float) -> datetime:
    """Return the time so many hours after eight o'clock."""
    return EIGHT + timedelta(hours=number)


FLIGHTS = [
    # id, hour, carrier, tailnum, delay
    (1, 0, "AA", "N1", None),
    (2, 1, "AA", "N2", 5.0),
    (3, 1, "UA", None, 30.0),
    (4, 2, "UA", "N1", -3.0),
    (5, 3, "AA", "N3", 0.0),
    (6, 4, "UA", None, None),
]


def insert_flights(connection: Connection) -> None:
    """Insert six flights, three planes, two airlines and two airports."""
    connection.execute(insert(Airline), [{"carrier": "AA", "name": "American"}])
    connection.execute(insert(Airline), [{"carrier": "UA", "name": "United"}])
    planes = [("N1", "A320", 1999), ("N2", None, 2010), ("N3", "B737", None)]
    keys = ("tailnum", "model", "year")
    connection.execute(insert(Plane), [dict(zip(keys, plane, strict=True)) for plane in planes])
    connection.execute(
        insert(Airport), [{"faa": "JFK", "name": "Kennedy"}, {"faa": "LGA", "name": "La Guardia"}]
    )
    connection.execute(insert(Flight), [flight(*values) for values in FLIGHTS])


def flight(
    number: int, after: float, carrier: str = "AA", tailnum: str | None = None, delay: Any = None
) -> dict[str, Any]:
    """Return the values of a flight."""
    return {
        "id": number,
        "hour": hour(after),
        "carrier": carrier,
        "tailnum": tailnum,
        "delay": delay,
        "origin": "JFK",
        "dest": "LGA",
    }


@dataclass(frozen=True)
class World:
    """A database with six flights, and a cache over it."""

    database: Database
    engine: Engine
    cache: TableCache
    Session: sessionmaker[CacheSession]

    def ids(self, *criteria: Any) -> list[int]:
        """Return the ids of the flights that meet the criteria, as a new session sees them."""
        with self.Session() as session:
            return ids(session.query(OuterBoard).filter(*criteria))

    @contextmanager
    def outside(self) -> Iterator[Session]:
        """Lend a session that nothing is attached to: an application without the cache."""
        with self.database.lent_engine() as engine, Session(engine) as session:
            yield session


def ids(records: Any) -> list[int]:
    """Return the ids of records in order of the ids."""
    return sorted(record.id for record in records)


@contextmanager
def flights_world(database: Database, *views: Any, **options: Any) -> Iterator[World]:
    """Lend a world whose views are not loaded yet."""
    with database.lent_engine() as engine:
        with engine.begin() as connection:
            insert_flights(connection)
        with TableCache(engine, views=views or [OuterBoard], **options) as cache:
            yield World(database, engine, cache, cache.sessionmaker())
