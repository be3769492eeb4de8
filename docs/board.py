"""What the examples of this manual share: three tables, a view over them, and a few rows."""

from datetime import datetime

from sqlalchemy import Engine, ForeignKey, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sa_tablecache import CachedView, ScoreIndex


class Base(DeclarativeBase):
    pass


class Airline(Base):
    __tablename__ = "airlines"

    carrier: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


class Plane(Base):
    __tablename__ = "planes"

    tailnum: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]


class Flight(Base):
    __tablename__ = "flights"

    id: Mapped[int] = mapped_column(primary_key=True)
    time_hour: Mapped[datetime]
    carrier: Mapped[str] = mapped_column(ForeignKey("airlines.carrier"))
    tailnum: Mapped[str | None] = mapped_column(ForeignKey("planes.tailnum"))
    dep_delay: Mapped[int | None]


# [view]
class FlightBoard(CachedView):
    __select__ = (
        select(
            Flight.id,
            Flight.time_hour,
            Flight.tailnum,
            Flight.dep_delay,
            Airline.name.label("airline"),
            Plane.model.label("plane_model"),
        )
        .join(Airline, Flight.carrier == Airline.carrier)
        .outerjoin(Plane, Flight.tailnum == Plane.tailnum)
    )

    id: Mapped[int]
    time_hour: Mapped[datetime]
    tailnum: Mapped[str | None]
    dep_delay: Mapped[int | None]
    airline: Mapped[str]
    plane_model: Mapped[str | None]

    by_time = ScoreIndex("time_hour")
    by_plane = ScoreIndex("tailnum", "time_hour")
    by_delay = ScoreIndex(func.coalesce(Flight.dep_delay, 0))


# [rows]
def sample_database(path: str = "board.db") -> Engine:
    """Make an SQLite file with the tables and a few flights of January 2013."""
    engine = create_engine(f"sqlite:///{path}")
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    flights = [
        (1, datetime(2013, 1, 1, 5), "UA", "N14228", 2),
        (2, datetime(2013, 1, 1, 6), "AA", "N619AA", 33),
        (3, datetime(2013, 1, 1, 6), "UA", None, None),
        (4, datetime(2013, 1, 2, 9), "UA", "N14228", 4),
        (5, datetime(2013, 1, 2, 10), "AA", "N619AA", 0),
        (6, datetime(2013, 1, 3, 7), "UA", "N14228", 101),
        (7, datetime(2013, 1, 9, 8), "AA", "N619AA", -3),
    ]
    names = ("id", "time_hour", "carrier", "tailnum", "dep_delay")
    with Session(engine) as session, session.begin():
        session.add(Airline(carrier="UA", name="United Air Lines Inc."))
        session.add(Airline(carrier="AA", name="American Airlines Inc."))
        session.add(Plane(tailnum="N14228", model="737-824"))
        session.add(Plane(tailnum="N619AA", model="757-223"))
        session.flush()
        session.add_all(Flight(**dict(zip(names, row, strict=True))) for row in flights)
    return engine
