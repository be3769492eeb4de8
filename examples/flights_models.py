"""The tables of the flights example, and the view that joins them.

Five tables as a database designer would keep them, and one board as a reader wants to see it: a
flight with the names of its airline and airports, the model of its aircraft and the weather at
departure. No index of the database spans that join; a score index of the view does.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Index, String, and_, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column

from sa_tablecache import CachedView, ScoreIndex


def code(length: int) -> String:
    """Return a type for short identifiers, compared byte by byte by every database.

    Byte order is the order of Python too, so that a cache may compare such values by itself. SQLite
    does it by default; PostgreSQL is asked to.
    """
    return String(length).with_variant(String(length, collation="C"), "postgresql")


class Base(DeclarativeBase):
    """The declarative base of the example."""


class Airline(Base):
    """A carrier, by its two-letter code."""

    __tablename__ = "airlines"

    carrier: Mapped[str] = mapped_column(code(2), primary_key=True)
    name: Mapped[str]


class Airport(Base):
    """An airport, by its FAA code."""

    __tablename__ = "airports"

    faa: Mapped[str] = mapped_column(code(3), primary_key=True)
    name: Mapped[str]
    lat: Mapped[float]
    lon: Mapped[float]
    alt: Mapped[int]
    tzone: Mapped[str | None]


class Plane(Base):
    """An aircraft, by its tail number."""

    __tablename__ = "planes"

    tailnum: Mapped[str] = mapped_column(code(6), primary_key=True)
    year: Mapped[int | None]
    type: Mapped[str]
    manufacturer: Mapped[str]
    model: Mapped[str]
    engines: Mapped[int]
    seats: Mapped[int]
    engine: Mapped[str]


class Weather(Base):
    """The weather at one airport in one hour (UTC)."""

    __tablename__ = "weather"

    origin: Mapped[str] = mapped_column(code(3), ForeignKey(Airport.faa), primary_key=True)
    time_hour: Mapped[datetime] = mapped_column(primary_key=True)
    temp: Mapped[float | None]
    dewp: Mapped[float | None]
    humid: Mapped[float | None]
    wind_dir: Mapped[int | None]
    wind_speed: Mapped[float | None]
    precip: Mapped[float]
    pressure: Mapped[float | None]
    visib: Mapped[float]


class Flight(Base):
    """One departure from New York; ``time_hour`` is its scheduled hour (UTC).

    ``tailnum`` and ``dest`` are no foreign keys: 50,094 flights name an aircraft, and 7,602 a
    destination, that the other tables do not have.
    """

    __tablename__ = "flights"
    __table_args__ = (
        Index("flights_tailnum_time_hour", "tailnum", "time_hour"),
        Index("flights_origin_time_hour", "origin", "time_hour"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    time_hour: Mapped[datetime] = mapped_column(index=True)
    carrier: Mapped[str] = mapped_column(code(2), ForeignKey(Airline.carrier), index=True)
    flight: Mapped[int]
    tailnum: Mapped[str | None] = mapped_column(code(6))
    origin: Mapped[str] = mapped_column(code(3), ForeignKey(Airport.faa))
    dest: Mapped[str] = mapped_column(code(3), index=True)
    distance: Mapped[int]
    sched_dep_time: Mapped[int]
    dep_delay: Mapped[int | None]
    arr_delay: Mapped[int | None]
    air_time: Mapped[int | None]


Origin = aliased(Airport, name="origin_airport")
Destination = aliased(Airport, name="destination_airport")


class FlightBoard(CachedView):
    """A departure with everything that a board shows about it: 17 columns of 5 tables."""

    __select__ = (
        select(
            Flight.id,
            Flight.time_hour,
            Flight.flight,
            Flight.tailnum,
            Flight.origin,
            Flight.dest,
            Flight.distance,
            Flight.sched_dep_time,
            Flight.dep_delay,
            Flight.arr_delay,
            Airline.name.label("airline"),
            Origin.name.label("origin_name"),
            Destination.name.label("dest_name"),
            Plane.model.label("plane_model"),
            Plane.year.label("plane_year"),
            Weather.temp.label("temperature"),
            Weather.wind_speed.label("wind_speed"),
        )
        .join(Airline, Flight.carrier == Airline.carrier)
        .join(Origin, Flight.origin == Origin.faa)
        .outerjoin(Destination, Flight.dest == Destination.faa)
        .outerjoin(Plane, Flight.tailnum == Plane.tailnum)
        .outerjoin(
            Weather,
            and_(Flight.origin == Weather.origin, Flight.time_hour == Weather.time_hour),
        )
    )

    id: Mapped[int]
    time_hour: Mapped[datetime]
    flight: Mapped[int]
    tailnum: Mapped[str | None]
    origin: Mapped[str]
    dest: Mapped[str]
    distance: Mapped[int]
    sched_dep_time: Mapped[int]
    dep_delay: Mapped[int | None]
    arr_delay: Mapped[int | None]
    airline: Mapped[str]
    origin_name: Mapped[str]
    dest_name: Mapped[str | None]
    plane_model: Mapped[str | None]
    plane_year: Mapped[int | None]
    temperature: Mapped[float | None]
    wind_speed: Mapped[float | None]

    by_time = ScoreIndex("time_hour")
    by_plane = ScoreIndex("tailnum", "time_hour")
    by_delay = ScoreIndex(func.coalesce(Flight.dep_delay, 0))
