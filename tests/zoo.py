"""Models that the tests share, and one cached view of every kind that can be declared.

The models come in five families; the tables of a family refer to each other only. A `Kind` says of
each view what a test has to know to use it without knowing it: its family, its key, which of its
columns may be used to load only a part of it, and whether only view-level invalidation is possible.
"""

import enum
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, TypeVar

from sqlalchemy import (
    CHAR,
    JSON,
    Column,
    DateTime,
    Double,
    Enum,
    ForeignKey,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    Select,
    String,
    Table,
    TypeDecorator,
    and_,
    exists,
    func,
    literal,
    or_,
    select,
    union,
    union_all,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    aliased,
    mapped_column,
    relationship,
    with_polymorphic,
)

from sa_tablecache import CachedView, ScoreIndex

V = TypeVar("V", bound=type[CachedView])

DEPOT = f"depot_{os.getpid()}"
"""The schema of the odd names: a schema on PostgreSQL, an attached file on SQLite, a database on
MariaDB, where processes that test at once need one each."""


class Base(DeclarativeBase):
    """The declarative base of all families."""

    metadata = MetaData()
    type_annotation_map = {str: String().with_variant(String(40), "mysql", "mariadb")}


# --- sky: text keys, a composite key, foreign keys with every kind of action ----------------------


class Airline(Base):
    """A text key that other tables follow when it changes or goes."""

    __tablename__ = "airlines"

    carrier: Mapped[str] = mapped_column(String(2), primary_key=True)
    name: Mapped[str]


class Plane(Base):
    """The optional side of most joins."""

    __tablename__ = "planes"

    tailnum: Mapped[str] = mapped_column(String(10), primary_key=True)
    model: Mapped[str | None]
    year: Mapped[int | None]


class Airport(Base):
    """The table that is joined twice."""

    __tablename__ = "airports"

    faa: Mapped[str] = mapped_column(String(3), primary_key=True)
    name: Mapped[str]


class Flight(Base):
    """The anchor of most joins."""

    __tablename__ = "flights"

    id: Mapped[int] = mapped_column(primary_key=True)
    hour: Mapped[datetime] = mapped_column(index=True)
    carrier: Mapped[str] = mapped_column(
        ForeignKey("airlines.carrier", ondelete="CASCADE", onupdate="CASCADE")
    )
    tailnum: Mapped[str | None] = mapped_column(ForeignKey("planes.tailnum", ondelete="SET NULL"))
    origin: Mapped[str] = mapped_column(ForeignKey("airports.faa", ondelete="CASCADE"))
    dest: Mapped[str] = mapped_column(ForeignKey("airports.faa", ondelete="CASCADE"))
    delay: Mapped[float | None] = mapped_column(Double)

    airline: Mapped[Airline] = relationship()
    plane: Mapped[Plane | None] = relationship()


class Weather(Base):
    """A composite key, joined without a foreign key."""

    __tablename__ = "weather"

    origin: Mapped[str] = mapped_column(String(3), primary_key=True)
    hour: Mapped[datetime] = mapped_column(primary_key=True)
    temp: Mapped[float | None] = mapped_column(Double)


# --- staff: inheritance, a self-reference, many-to-many -------------------------------------------

person_tag = Table(
    "person_tag",
    Base.metadata,
    Column("person_id", ForeignKey("person.id", ondelete="CASCADE"), primary_key=True),
    Column("tag_id", ForeignKey("tag.id", ondelete="CASCADE"), primary_key=True),
)


class Tag(Base):
    """The far side of the many-to-many relationship."""

    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(unique=True)


class Person(Base):
    """The root of the hierarchy, with a boss of its own kind."""

    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    boss_id: Mapped[int | None] = mapped_column(ForeignKey("person.id", ondelete="SET NULL"))

    boss: Mapped["Person | None"] = relationship(remote_side=[id], post_update=True)
    tags: Mapped[list[Tag]] = relationship(secondary=person_tag, passive_deletes=True)

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}


class Manager(Person):
    """Joined inheritance: a table of its own."""

    __tablename__ = "manager"

    id: Mapped[int] = mapped_column(ForeignKey("person.id", ondelete="CASCADE"), primary_key=True)
    budget: Mapped[int | None]

    __mapper_args__ = {"polymorphic_identity": "manager"}


class Contractor(Person):
    """Single-table inheritance: a criterion on the parent's table."""

    rate: Mapped[int | None] = mapped_column(nullable=True)

    __mapper_args__ = {"polymorphic_identity": "contractor"}


# --- shop: one-to-many chains, UUID, date and composite keys --------------------------------------


class Customer(Base):
    """A UUID key, and the one side of a chain of two one-to-many joins."""

    __tablename__ = "customers"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    city: Mapped[str | None]

    orders: Mapped[list["Order"]] = relationship(
        back_populates="customer", cascade="all", passive_deletes=True
    )


class Order(Base):
    """The middle of the chain; it has a second unique key beside its primary key."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[str] = mapped_column(String(8), unique=True)
    customer_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("customers.id", ondelete="CASCADE"))
    day: Mapped[date]
    status: Mapped[str]
    extra: Mapped[Any | None] = mapped_column(JSON(none_as_null=True))

    customer: Mapped[Customer] = relationship(back_populates="orders")
    items: Mapped[list["Item"]] = relationship(
        back_populates="order", cascade="all, delete-orphan", passive_deletes=True
    )


class Item(Base):
    """The many side, with a composite key that contains a foreign key."""

    __tablename__ = "items"

    order_id: Mapped[int] = mapped_column(
        ForeignKey("orders.id", ondelete="CASCADE"), primary_key=True
    )
    line: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]
    qty: Mapped[int | None]
    price: Mapped[int]
    gift: Mapped[bool | None]

    order: Mapped[Order] = relationship(back_populates="items")


class DayPlan(Base):
    """A date key, joined without a foreign key."""

    __tablename__ = "day_plans"

    day: Mapped[date] = mapped_column(primary_key=True)
    headcount: Mapped[int | None]


# --- depot: names that need a schema or quotes, and one table name in two schemas -----------------


class Bin(Base):
    """Quoted table and column names in a schema."""

    __tablename__ = "Odd Bin"
    __table_args__ = {"schema": DEPOT}

    the_key: Mapped[int] = mapped_column("the key", primary_key=True)
    select_: Mapped[str] = mapped_column("select")
    mixed: Mapped[int | None] = mapped_column("Mixed:Case %")


class DepotCrate(Base):
    """A table whose name exists in two schemas: the one in the depot."""

    __tablename__ = "crates"
    __table_args__ = {"schema": DEPOT}

    id: Mapped[int] = mapped_column(primary_key=True)
    bin_key: Mapped[int | None] = mapped_column(
        ForeignKey(Bin.__table__.c["the key"], ondelete="SET NULL")
    )
    weight: Mapped[int | None]


class Crate(Base):
    """A table whose name exists in two schemas: the one in the default schema."""

    __tablename__ = "crates"

    id: Mapped[int] = mapped_column(primary_key=True)
    weight: Mapped[int | None]


# --- types: one column of every type --------------------------------------------------------------


class Mood(enum.Enum):
    """An enumeration whose order is neither that of its names nor that of its values."""

    SUNNY = "b"
    GREY = "c"
    AWFUL = "a"


class Sample(Base):
    """One column of every type whose meaning could differ between Python and a database."""

    __tablename__ = "samples"

    id: Mapped[int] = mapped_column(primary_key=True)
    flag: Mapped[bool | None]
    ratio: Mapped[float | None] = mapped_column(Double)
    amount: Mapped[Decimal | None] = mapped_column(
        Numeric(8, 2).with_variant(Numeric(8, 2, asdecimal=False), "sqlite")
    )
    word: Mapped[str | None]
    padded: Mapped[str | None] = mapped_column(CHAR(4).with_variant(String(4, "NOCASE"), "sqlite"))
    blob: Mapped[bytes | None] = mapped_column(LargeBinary)
    token: Mapped[uuid.UUID | None]
    day: Mapped[date | None]
    clock: Mapped[time | None]
    moment: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    span: Mapped[timedelta | None] = mapped_column(Interval)
    mood: Mapped[Mood | None] = mapped_column(Enum(Mood))
    document: Mapped[Any | None] = mapped_column(JSON(none_as_null=True))


class Folded(TypeDecorator[str]):
    """Text that is stored in lower case, so that `"AB"` and `"ab"` are one value."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, _dialect: Any) -> str | None:
        """Fold what is sent."""
        return None if value is None else value.lower()


class Code(Base):
    """A key that the database pads (PostgreSQL) or compares without case (SQLite)."""

    __tablename__ = "codes"

    code: Mapped[str] = mapped_column(
        CHAR(5).with_variant(String(5, "NOCASE"), "sqlite"), primary_key=True
    )
    sample_id: Mapped[int] = mapped_column(ForeignKey("samples.id", ondelete="CASCADE"))
    note: Mapped[str | None]


class Badge(Base):
    """A key that its type folds."""

    __tablename__ = "badges"

    badge: Mapped[str] = mapped_column(Folded(40), primary_key=True)
    sample_id: Mapped[int] = mapped_column(ForeignKey("samples.id", ondelete="CASCADE"))
    note: Mapped[str | None]


FAMILIES: dict[str, tuple[type[Base], ...]] = {
    "sky": (Airline, Plane, Airport, Flight, Weather),
    "staff": (Tag, Person, Manager, Contractor),
    "shop": (Customer, Order, Item, DayPlan),
    "depot": (Bin, DepotCrate, Crate),
    "types": (Sample, Code, Badge),
}
"""The models of each family, parents before children."""


# --- the kinds ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a test has to know of a view to use it without knowing it."""

    view: type[Any]
    family: str
    key: tuple[str, ...]
    parts: tuple[str, ...] = ()
    """Columns that lead an index and whose order is the same in Python: they can load a part."""
    coarse: bool = False

    def statement(self) -> Any:
        """Return the select that the view was declared with."""
        declared = self.view.__dict__["__select__"]
        return self.view.__select__() if isinstance(declared, classmethod) else declared


KINDS: dict[str, Kind] = {}
"""Every view of the zoo by its name."""


def kind(
    family: str, *key: str, parts: tuple[str, ...] = (), coarse: bool = False
) -> Callable[[V], V]:
    """Return a decorator that registers a view."""

    def register(view: V) -> V:
        KINDS[view.__name__] = Kind(view, family, key, parts, coarse)
        return view

    return register


# Joins of the sky.


@kind("sky", "id", parts=("hour", "delay"))
class InnerBoard(CachedView):
    """An inner join."""

    __select__ = select(
        Flight.id, Flight.hour, Flight.carrier, Flight.delay, Airline.name.label("airline")
    ).join(Airline, Flight.carrier == Airline.carrier)

    id: Mapped[int]
    hour: Mapped[datetime]
    carrier: Mapped[str]
    delay: Mapped[float | None]
    airline: Mapped[str]

    by_hour = ScoreIndex("hour")
    by_carrier = ScoreIndex("carrier", "hour")
    by_delay = ScoreIndex("delay")


@kind("sky", "id", parts=("hour", "year"))
class OuterBoard(CachedView):
    """An inner and an outer join; nullable score columns; an expression as a score."""

    __select__ = (
        select(
            Flight.id,
            Flight.hour,
            Flight.tailnum,
            Flight.delay,
            Airline.name.label("airline"),
            Plane.model,
            Plane.year,
        )
        .join(Airline, Flight.carrier == Airline.carrier)
        .outerjoin(Plane, Flight.tailnum == Plane.tailnum)
    )

    by_hour = ScoreIndex("hour")
    by_plane = ScoreIndex("tailnum", "hour")
    by_year = ScoreIndex("year", "hour")
    by_delay = ScoreIndex(func.coalesce(Flight.delay, 0))


def _five_tables() -> Select[Any]:
    origin, dest = aliased(Airport, name="origin"), aliased(Airport, name="dest")
    return (
        select(
            Flight.id,
            Flight.hour,
            Airline.name.label("airline"),
            origin.name.label("origin_name"),
            dest.name.label("dest_name"),
            Plane.model,
            Weather.temp,
        )
        .join(Airline, Flight.carrier == Airline.carrier)
        .join(origin, Flight.origin == origin.faa)
        .join(dest, Flight.dest == dest.faa)
        .outerjoin(Plane, Flight.tailnum == Plane.tailnum)
        .outerjoin(Weather, and_(Flight.origin == Weather.origin, Flight.hour == Weather.hour))
    )


@kind("sky", "id", parts=("hour", "temp"))
class FiveTables(CachedView):
    """A five-table join with one table twice and a composite key on the outer side."""

    __select__ = _five_tables()

    by_hour = ScoreIndex("hour", "id")
    by_temp = ScoreIndex("temp")


@kind("sky", "id", parts=("hour",))
class ByRelationship(CachedView):
    """Joins along relationships."""

    __select__ = (
        select(Flight.id, Flight.hour, Airline.name.label("airline"), Plane.model)
        .join(Flight.airline)
        .outerjoin(Flight.plane)
    )

    by_hour = ScoreIndex("hour")


@kind("sky", "tailnum", parts=("year",))
class IdlePlanes(CachedView):
    """WHERE on the nullable side: the planes that no flight uses."""

    __select__ = (
        select(Plane.tailnum, Plane.model, Plane.year)
        .outerjoin(Flight, Flight.tailnum == Plane.tailnum)
        .where(Flight.id.is_(None))
    )
    __primary_key__ = ("tailnum",)

    by_year = ScoreIndex("year")


@kind("sky", "id", parts=("hour",))
class LateFlights(CachedView):
    """A WHERE that rows enter and leave."""

    __select__ = select(Flight.id, Flight.hour, Flight.delay, Flight.tailnum).where(
        Flight.delay > 10, Flight.origin != "JFK"
    )

    by_hour = ScoreIndex("hour")


@kind("sky", "id", parts=("hour",))
class OldOrUnknownPlanes(CachedView):
    """A WHERE that keeps some of the NULL-extended rows."""

    __select__ = (
        select(Flight.id, Flight.hour, Plane.year)
        .outerjoin(Flight.plane)
        .where(or_(Plane.year < 2000, Plane.tailnum.is_(None)))
    )

    by_hour = ScoreIndex("hour")


@kind("sky", "tailnum", parts=("year",))
class PlaneEntity(CachedView):
    """A whole entity."""

    __select__ = select(Plane)

    by_year = ScoreIndex("year")
    by_model = ScoreIndex("model", "year")


@kind("sky", "id", parts=("hour",))
class DelayRank(CachedView):
    """Expressions as scores, one of which is NULL at times and one in a composite index."""

    __select__ = select(Flight.id, Flight.hour, Flight.delay, Flight.carrier)

    by_hour = ScoreIndex("hour")
    by_doubled = ScoreIndex(Flight.delay * 2)
    by_early = ScoreIndex("carrier", func.coalesce(Flight.delay, -1.0))


@kind("sky", "origin", "hour", parts=("hour", "temp"))
class WeatherHours(CachedView):
    """A composite key."""

    __select__ = select(Weather.origin, Weather.hour, Weather.temp)

    by_hour = ScoreIndex("hour", "origin")
    by_temp = ScoreIndex("temp")


@kind("sky", "faa", "hour", "id", parts=("hour", "temp"))
class AirportChain(CachedView):
    """Two one-to-many joins beside each other, both outer."""

    __select__ = (
        select(Airport.faa, Airport.name, Weather.hour, Weather.temp, Flight.id, Flight.delay)
        .outerjoin(Weather, Weather.origin == Airport.faa)
        .outerjoin(Flight, and_(Flight.origin == Weather.origin, Flight.hour == Weather.hour))
    )
    __primary_key__ = ("faa", "hour", "id")

    by_hour = ScoreIndex("hour")
    by_temp = ScoreIndex("temp", "hour")


# Set operations, aggregates and the like, of the sky; most of them are coarse.


@kind("sky", "code", coarse=True)
class Names(CachedView):
    """UNION."""

    __select__ = union(
        select(Airline.carrier.label("code"), Airline.name),
        select(Airport.faa.label("code"), Airport.name),
    )
    __primary_key__ = ("code",)

    by_name = ScoreIndex("name")


@kind("sky", "source", "code", parts=("number",), coarse=True)
class NameLog(CachedView):
    """UNION ALL."""

    __select__ = union_all(
        select(
            literal("airline").label("source"),
            Airline.carrier.label("code"),
            func.length(Airline.name, type_=Integer).label("number"),
        ),
        select(literal("plane"), Plane.tailnum, Plane.year),
    )
    __primary_key__ = ("source", "code")

    by_number = ScoreIndex("number")


def _busy() -> Select[Any]:
    busy = select(Flight.carrier, func.count().label("n")).group_by(Flight.carrier).cte("busy")
    return select(Airline.carrier, Airline.name, busy.c.n).outerjoin(
        busy, busy.c.carrier == Airline.carrier
    )


@kind("sky", "carrier", parts=("n",))
class BusyAirlines(CachedView):
    """A CTE."""

    __select__ = _busy()
    __primary_key__ = ("carrier",)

    by_n = ScoreIndex("n")


def _last_flight() -> Select[Any]:
    last = (
        select(Flight.tailnum, func.max(Flight.hour).label("hour"))
        .group_by(Flight.tailnum)
        .subquery()
    )
    return select(Plane.tailnum, Plane.model, last.c.hour).outerjoin(
        last, last.c.tailnum == Plane.tailnum
    )


@kind("sky", "tailnum", parts=("hour",))
class LastFlights(CachedView):
    """A subquery in FROM."""

    __select__ = _last_flight()
    __primary_key__ = ("tailnum",)

    by_hour = ScoreIndex("hour")


@kind("sky", "carrier", parts=("n", "last"))
class CarrierTotals(CachedView):
    """GROUP BY over an outer join."""

    __select__ = (
        select(
            Airline.carrier,
            func.count(Flight.id).label("n"),
            func.max(Flight.hour).label("last"),
        )
        .outerjoin(Flight, Flight.carrier == Airline.carrier)
        .group_by(Airline.carrier)
    )
    __primary_key__ = ("carrier",)

    by_n = ScoreIndex("n")
    by_last = ScoreIndex("last")


@kind("sky", "year", parts=("year", "n"))
class FlightsByYear(CachedView):
    """GROUP BY of what an outer join may not find: rows move to the group of NULL."""

    __select__ = (
        select(Plane.year, func.count().label("n"), func.max(Flight.delay).label("worst"))
        .select_from(Flight)
        .outerjoin(Plane, Flight.tailnum == Plane.tailnum)
        .group_by(Plane.year)
    )

    by_year = ScoreIndex("year")
    by_n = ScoreIndex("n", "year")
    by_worst = ScoreIndex(func.coalesce(func.max(Flight.delay), -1.0))


@kind("sky", "origin", "carrier", parts=("origin", "n"))
class BusyRoutes(CachedView):
    """Groups of two columns, of which HAVING drops some."""

    __select__ = (
        select(
            Flight.origin,
            Airline.carrier,
            Airline.name,
            func.count().label("n"),
            func.count(Flight.tailnum.distinct()).label("planes"),
        )
        .join(Airline, Flight.carrier == Airline.carrier)
        .where(Flight.dest != "JFK")
        .group_by(Flight.origin, Airline.carrier, Airline.name)
        .having(func.count() > 1)
    )
    __primary_key__ = ("origin", "carrier")

    by_origin = ScoreIndex("origin", "carrier")
    by_n = ScoreIndex("n")


@kind("sky", "origin", "dest", coarse=True)
class Routes(CachedView):
    """DISTINCT."""

    __select__ = select(Flight.origin, Flight.dest).distinct()
    __primary_key__ = ("origin", "dest")

    by_route = ScoreIndex("origin", "dest")


@kind("sky", "id", parts=("hour",), coarse=True)
class LatestFlights(CachedView):
    """LIMIT."""

    __select__ = (
        select(Flight.id, Flight.hour, Flight.tailnum)
        .order_by(Flight.hour.desc(), Flight.id)
        .limit(5)
    )
    __primary_key__ = ("id",)

    by_hour = ScoreIndex("hour")


@kind("sky", "id", parts=("rank", "hour"), coarse=True)
class DayRank(CachedView):
    """A window function."""

    __select__ = select(
        Flight.id,
        Flight.hour,
        func.row_number(type_=Integer)
        .over(partition_by=Flight.carrier, order_by=(Flight.hour, Flight.id))
        .label("rank"),
    )
    __primary_key__ = ("id",)

    by_hour = ScoreIndex("hour")
    by_rank = ScoreIndex("rank", "hour")


@kind("sky", "tailnum", "id", parts=("hour", "year"), coarse=True)
class FullJoin(CachedView):
    """FULL JOIN: each side may be NULL-extended."""

    __select__ = select(Plane.tailnum, Plane.year, Flight.id, Flight.hour).join(
        Flight, Flight.tailnum == Plane.tailnum, full=True
    )
    __primary_key__ = ("tailnum", "id")

    by_hour = ScoreIndex("hour")
    by_year = ScoreIndex("year")


@kind("sky", "tailnum", parts=("year",), coarse=True)
class FlownPlanes(CachedView):
    """EXISTS."""

    __select__ = select(Plane.tailnum, Plane.year).where(
        exists().where(Flight.tailnum == Plane.tailnum, Flight.delay > 0)
    )

    by_year = ScoreIndex("year")


@kind("sky", "carrier", parts=("n",), coarse=True)
class CarrierCounts(CachedView):
    """A correlated scalar subquery."""

    __select__ = select(
        Airline.carrier,
        Airline.name,
        select(func.count(Flight.id))
        .where(Flight.carrier == Airline.carrier)
        .scalar_subquery()
        .label("n"),
    )

    by_n = ScoreIndex("n")


# Inheritance, self-joins and many-to-many.


@kind("staff", "id", "tag_id", parts=("id", "tag_id"))
class TaggedPeople(CachedView):
    """Many-to-many through a secondary table."""

    __select__ = select(Person.id, Person.name, Tag.id.label("tag_id"), Tag.label).join(Person.tags)

    by_id = ScoreIndex("id", "tag_id")
    by_tag = ScoreIndex("tag_id", "id")


@kind("staff", "id", "tag_id", parts=("id", "tag_id"))
class PeopleAndTags(CachedView):
    """Many-to-many with the people who have no tag."""

    __select__ = select(Person.id, Person.kind, Tag.id.label("tag_id"), Tag.label).outerjoin(
        Person.tags
    )
    __primary_key__ = ("id", "tag_id")

    by_id = ScoreIndex("id")
    by_tag = ScoreIndex("tag_id", "id")


def _bosses() -> Select[Any]:
    boss = aliased(Person, name="boss")
    return select(
        Person.id, Person.name, boss.id.label("boss_id"), boss.name.label("boss_name")
    ).outerjoin(Person.boss.of_type(boss))


@kind("staff", "id", parts=("id", "boss_id"))
class PeopleAndBosses(CachedView):
    """A self-join through an alias and a relationship; `of_type` configures mappers."""

    @classmethod
    def __select__(cls) -> Select[Any]:
        """Join each person with the boss."""
        return _bosses()

    by_id = ScoreIndex("id")
    by_boss = ScoreIndex("boss_id", "id")


def _grand_bosses() -> Select[Any]:
    boss, grand = aliased(Person, name="boss"), aliased(Person, name="grand")
    return (
        select(Person.id, Person.name, boss.name.label("boss"), grand.name.label("grand"))
        .join(boss, Person.boss_id == boss.id)
        .outerjoin(grand, boss.boss_id == grand.id)
    )


@kind("staff", "id", parts=("id",))
class GrandBosses(CachedView):
    """One table three times."""

    __select__ = _grand_bosses()

    by_id = ScoreIndex("id")


@kind("staff", "id", parts=("budget", "id"))
class Managers(CachedView):
    """Joined inheritance."""

    __select__ = select(Manager.id, Manager.name, Manager.boss_id, Manager.budget)

    by_id = ScoreIndex("id")
    by_budget = ScoreIndex("budget")


@kind("staff", "id", parts=("rate", "id"))
class Contractors(CachedView):
    """Single-table inheritance."""

    __select__ = select(Contractor.id, Contractor.name, Contractor.rate)

    by_id = ScoreIndex("id")
    by_rate = ScoreIndex("rate")


@kind("staff", "id", parts=("budget",))
class BossBudgets(CachedView):
    """A self-join with a joined subclass through a flat alias."""

    @classmethod
    def __select__(cls) -> Select[Any]:
        """Join each person with the boss who is a manager."""
        boss = aliased(Manager, name="boss", flat=True)
        return select(Person.id, Person.name, boss.budget).outerjoin(
            boss, Person.boss_id == boss.id
        )

    by_budget = ScoreIndex("budget", "id")


@kind("staff", "id", parts=("budget", "rate"))
class Everyone(CachedView):
    """A polymorphic select over the whole hierarchy."""

    @classmethod
    def __select__(cls) -> Select[Any]:
        """Select people of every kind with what only some of them have."""
        anyone = with_polymorphic(Person, [Manager, Contractor])
        return select(
            anyone.id,
            anyone.kind,
            anyone.name,
            anyone.Manager.budget,
            anyone.Contractor.rate,
        )

    by_budget = ScoreIndex("budget")
    by_rate = ScoreIndex("rate", "id")


def _teams() -> Select[Any]:
    boss = aliased(Person, name="boss")
    return (
        select(boss.id, boss.kind, func.count(Person.id).label("n"))
        .select_from(boss)
        .outerjoin(Person, Person.boss_id == boss.id)
        .group_by(boss.id, boss.kind)
    )


@kind("staff", "id", parts=("id", "n"))
class Teams(CachedView):
    """GROUP BY over a self-join: each row is in its own group and in its boss's."""

    __select__ = _teams()
    __primary_key__ = ("id",)

    by_id = ScoreIndex("id")
    by_n = ScoreIndex("n", "id")


# Chains of one-to-many joins, other keys, several views over the same tables.


@kind("shop", "customer_id", "order_id", parts=("day", "order_id"))
class CustomersAndOrders(CachedView):
    """A one-to-many join anchored on the one side, NULL-extended."""

    __select__ = select(
        Customer.id.label("customer_id"),
        Customer.name,
        Order.id.label("order_id"),
        Order.day,
        Order.extra,
    ).outerjoin(Customer.orders)

    by_day = ScoreIndex("day", "order_id")
    by_order = ScoreIndex("order_id")
    by_customer = ScoreIndex("customer_id", "day")


@kind("shop", "customer_id", "order_id", "line", parts=("day", "qty"))
class WholeChain(CachedView):
    """A chain of two outer one-to-many joins."""

    __select__ = (
        select(
            Customer.id.label("customer_id"),
            Customer.city,
            Order.id.label("order_id"),
            Order.day,
            Item.line,
            Item.sku,
            Item.qty,
        )
        .outerjoin(Order, Order.customer_id == Customer.id)
        .outerjoin(Item, Item.order_id == Order.id)
    )
    __primary_key__ = ("customer_id", "order_id", "line")

    by_day = ScoreIndex("day", "line")
    by_qty = ScoreIndex("qty")


@kind("shop", "order_id", "line", parts=("day", "qty"))
class ItemsUpwards(CachedView):
    """The same chain anchored on the many side."""

    __select__ = (
        select(
            Item.order_id, Item.line, Item.qty, Item.gift, Order.day, Customer.name, Customer.city
        )
        .join(Item.order)
        .join(Order.customer)
    )

    by_day = ScoreIndex("day")
    by_qty = ScoreIndex("qty", "day")


@kind("shop", "order_id", "line", parts=("total",))
class ItemTotals(CachedView):
    """A computed column as a score, and an expression beside it; a composite key."""

    __select__ = select(Item.order_id, Item.line, (Item.qty * Item.price).label("total"), Item.gift)

    by_total = ScoreIndex("total")
    by_parity = ScoreIndex(Item.price % 2, "order_id")


@kind("shop", "id", parts=("id",))
class CustomerList(CachedView):
    """A UUID key, as a score too."""

    __select__ = select(Customer.id, Customer.name, Customer.city)

    by_id = ScoreIndex("id")
    by_city = ScoreIndex("city", "name")


@kind("shop", "day", parts=("day", "headcount"))
class Plans(CachedView):
    """A date key."""

    __select__ = select(DayPlan.day, DayPlan.headcount)

    by_day = ScoreIndex("day")
    by_headcount = ScoreIndex("headcount", "day")


@kind("shop", "number", parts=("day",))
class OrdersByNumber(CachedView):
    """A key of the user's choice."""

    __select__ = select(Order.number, Order.day, Order.status, DayPlan.headcount).outerjoin(
        DayPlan, DayPlan.day == Order.day
    )
    __primary_key__ = ("number",)

    by_day = ScoreIndex("day", "number")


@kind("shop", "id", parts=("day",))
class OpenOrders(CachedView):
    """One of two views with disjoint WHERE over the same tables."""

    __select__ = (
        select(Order.id, Order.day, Customer.name)
        .join(Order.customer)
        .where(Order.status == "open")
    )

    by_day = ScoreIndex("day")


@kind("shop", "id", parts=("day",))
class ShippedOrders(CachedView):
    """The other one of the two."""

    __select__ = (
        select(Order.id, Order.day, Customer.name)
        .join(Order.customer)
        .where(Order.status == "shipped")
    )

    by_day = ScoreIndex("day")


@kind("shop", "customer_id", "order_id", parts=("day",))
class OpenPerCustomer(CachedView):
    """An outer join whose ON has a criterion that rows enter and leave."""

    __select__ = select(
        Customer.id.label("customer_id"), Customer.name, Order.id.label("order_id"), Order.day
    ).outerjoin(Order, and_(Order.customer_id == Customer.id, Order.status == "open"))

    by_day = ScoreIndex("day")


@kind("shop", "id", parts=("id",))
class CustomersWithout(CachedView):
    """WHERE on the nullable side of a one-to-many join: the customers without an order."""

    __select__ = (
        select(Customer.id, Customer.name).outerjoin(Customer.orders).where(Order.id.is_(None))
    )
    __primary_key__ = ("id",)

    by_id = ScoreIndex("id")


@kind("shop", "day", "id", parts=("day", "id"))
class Backlog(CachedView):
    """A join on an inequality: each order and all later days."""

    __select__ = select(DayPlan.day, DayPlan.headcount, Order.id, Order.day.label("ordered")).join(
        Order, Order.day < DayPlan.day
    )

    by_day = ScoreIndex("day", "id")
    by_order = ScoreIndex("id")


@kind("shop", "order_id", "line", parts=("headcount",))
class CommaJoin(CachedView):
    """Three tables in FROM, joined by WHERE."""

    __select__ = select(Item.order_id, Item.line, Order.day, DayPlan.headcount).where(
        Item.order_id == Order.id, Order.day == DayPlan.day
    )

    by_headcount = ScoreIndex("headcount")


@kind("shop", "day", "status", parts=("day", "items"))
class OrdersByDay(CachedView):
    """GROUP BY over a chain of outer joins from the many side's point of view."""

    __select__ = (
        select(
            Order.day,
            Order.status,
            func.count(Order.id.distinct()).label("orders"),
            func.count(Item.line).label("items"),
            func.sum(Item.price, type_=Integer).label("price"),
        )
        .outerjoin(Item, Item.order_id == Order.id)
        .group_by(Order.day, Order.status)
    )

    by_day = ScoreIndex("day", "status")
    by_items = ScoreIndex("items")


def _order_totals() -> Select[Any]:
    totals = (
        select(Item.order_id, func.count().label("lines"), func.sum(Item.price).label("price"))
        .group_by(Item.order_id)
        .subquery("totals")
    )
    return (
        select(Order.id, Order.day, Customer.name, totals.c.lines, totals.c.price)
        .join(Order.customer)
        .outerjoin(totals, totals.c.order_id == Order.id)
    )


@kind("shop", "id", parts=("day", "lines"))
class OrderTotals(CachedView):
    """An inner aggregate beside a join."""

    __select__ = _order_totals()

    by_day = ScoreIndex("day")
    by_lines = ScoreIndex("lines", "day")


def _customer_totals() -> Select[Any]:
    totals = (
        select(Order.customer_id, Order.status, func.count(Item.line).label("lines"))
        .outerjoin(Item, Item.order_id == Order.id)
        .group_by(Order.customer_id, Order.status)
        .having(func.count() < 4)
        .cte("totals")
    )
    return select(Customer.id, Customer.city, totals.c.status, totals.c.lines).outerjoin(
        totals, totals.c.customer_id == Customer.id
    )


@kind("shop", "id", "status", parts=("id", "lines"))
class CustomerTotals(CachedView):
    """An inner aggregate over a join, with several groups for each row outside."""

    __select__ = _customer_totals()
    __primary_key__ = ("id", "status")

    by_id = ScoreIndex("id", "status")
    by_lines = ScoreIndex("lines")


# Names, and one table name in two schemas.


@kind("depot", "crate", parts=("weight", "mixed"))
class Depot(CachedView):
    """Schema-qualified and quoted names."""

    __select__ = select(
        DepotCrate.id.label("crate"),
        DepotCrate.weight,
        Bin.the_key.label("bin"),
        Bin.select_.label("label"),
        Bin.mixed.label("mixed"),
    ).outerjoin(Bin, DepotCrate.bin_key == Bin.the_key)

    by_weight = ScoreIndex("weight")
    by_mixed = ScoreIndex("mixed", "crate")


@kind("depot", "id", parts=("weight",))
class LocalCrates(CachedView):
    """The table of the same name in the default schema."""

    __select__ = select(Crate.id, Crate.weight)

    by_weight = ScoreIndex("weight")


@kind("depot", "id", parts=("weight", "depot_weight"))
class BothCrates(CachedView):
    """Both tables of one name in one view."""

    __select__ = select(Crate.id, Crate.weight, DepotCrate.weight.label("depot_weight")).outerjoin(
        DepotCrate, DepotCrate.id == Crate.id
    )

    by_weight = ScoreIndex("weight")
    by_depot = ScoreIndex("depot_weight", "id")


@kind("types", "id", parts=("id", "day"))
class Samples(CachedView):
    """A column and an index of every type."""

    __select__ = select(Sample)

    by_id = ScoreIndex("id")
    by_flag = ScoreIndex("flag", "id")
    by_ratio = ScoreIndex("ratio")
    by_amount = ScoreIndex("amount")
    by_word = ScoreIndex("word")
    by_padded = ScoreIndex("padded")
    by_blob = ScoreIndex("blob")
    by_token = ScoreIndex("token")
    by_day = ScoreIndex("day")
    by_clock = ScoreIndex("clock")
    by_moment = ScoreIndex("moment", "id")


@kind("types", "id", "code", "badge", parts=("id",))
class LabelledSamples(CachedView):
    """Keys that the database stores differently from how they were written."""

    __select__ = (
        select(
            Sample.id,
            Sample.word,
            Code.code,
            Code.note.label("code_note"),
            Badge.badge,
            Badge.note.label("badge_note"),
        )
        .outerjoin(Code, Code.sample_id == Sample.id)
        .outerjoin(Badge, Badge.sample_id == Sample.id)
    )

    by_id = ScoreIndex("id")
    by_code = ScoreIndex("code")
