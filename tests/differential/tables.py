"""A fixed set of tables and views for random questions: every type, every kind of join.

Columns are nullable wherever SQL lets them be. `name` has the collation of the database, `code`,
`region` and `label` one that compares bytes.
"""

import enum
from datetime import date
from typing import Any

from sqlalchemy import (
    JSON,
    REAL,
    Boolean,
    Column,
    Date,
    DateTime,
    Double,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    String,
    Table,
    Text,
    Time,
    TypeDecorator,
    Uuid,
    and_,
    case,
    func,
    select,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.types import CHAR, BigInteger

from sa_tablecache import CachedView, ScoreIndex


class Mood(enum.Enum):
    """An enumeration whose order by name, by value and by declaration differ."""

    GOOD = "b"
    BAD = "c"
    WORSE = "a"


class Folded(TypeDecorator[str]):
    """A type that changes what it stores."""

    impl = String(40)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        """Fold case."""
        return value.lower() if isinstance(value, str) else value


def bytewise(length: int = 40) -> Any:
    """Return the type of text that compares by bytes on every database."""
    return (
        String(length)
        .with_variant(String(length, collation="C"), "postgresql")
        .with_variant(String(length, collation="utf8mb4_nopad_bin"), "mysql", "mariadb")
    )


def moment() -> Any:
    """Return the type of a naive datetime with microseconds on every database."""
    return DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


metadata = MetaData()

owner = Table(
    "owner",
    metadata,
    Column("region", bytewise(), primary_key=True),
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("name", String(40)),
    Column("number", Integer),
    Column("day", Date),
)

item = Table(
    "item",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("small", SmallInteger),
    Column("number", Integer),
    Column("big", BigInteger),
    Column("flag", Boolean),
    Column("ratio", Double),
    Column("other_ratio", Double),
    Column("single", Float),
    Column("real", REAL),
    Column("price", Numeric(14, 4)),
    Column("amount", Numeric().with_variant(Numeric(30, 10), "mysql", "mariadb")),
    Column("plain_price", Numeric(14, 4, asdecimal=False)),
    Column("name", String(40)),
    Column(
        "title",
        Text()
        .with_variant(Text(collation="C"), "postgresql")
        .with_variant(Text(collation="utf8mb4_nopad_bin"), "mysql", "mariadb"),
    ),
    Column("code", bytewise(), nullable=False),
    Column("word", CHAR(8)),
    Column("folded", Folded),
    Column("data", LargeBinary),
    Column("day", Date),
    Column("at", moment()),
    Column("seen", DateTime(timezone=True)),
    Column("clock", Time),
    Column("uid", Uuid),
    Column("mood", Enum(Mood)),
    Column("state", Enum("on", "off", name="state")),
    Column("span", Interval),
    Column("document", JSON),
    Column("parent_id", Integer),
    Column("region", bytewise()),
    Column("place", Integer),
)

part = Table(
    "part",
    metadata,
    Column("item_id", Integer, primary_key=True, autoincrement=False),
    Column("n", SmallInteger, primary_key=True, autoincrement=False),
    Column("label", bytewise()),
    Column("weight", Double),
    Column("number", Integer),
    Column("at", moment()),
)

parent = item.alias("parent")
i, o, p = item.c, owner.c, part.c


class Plain(CachedView):
    """One table with every type."""

    __select__ = select(item)

    by_number = ScoreIndex("number")
    by_name = ScoreIndex("name")
    by_code = ScoreIndex("code", "number")
    by_ratio = ScoreIndex("ratio", "at")
    by_price = ScoreIndex("price")
    by_amount = ScoreIndex("amount")
    by_data = ScoreIndex("data")
    by_at = ScoreIndex("at")
    by_seen = ScoreIndex("seen")
    by_flag = ScoreIndex("flag", "day")
    by_title = ScoreIndex("title")
    by_uid = ScoreIndex("uid")
    by_region = ScoreIndex("region", "place", "small")


class Owned(CachedView):
    """An outer join over a composite key, part of which is text."""

    __select__ = select(
        i.id, i.number, i.code, i.day, i.ratio, i.region, i.place, i.mood,
        o.name.label("owner_name"), o.number.label("owner_number"), o.day.label("owner_day"),
        o.region.label("owner_region"),
    ).select_from(
        item.outerjoin(owner, and_(i.region == o.region, i.place == o.place))
    )  # fmt: skip

    by_owner = ScoreIndex("owner_region", "owner_number")
    by_owner_day = ScoreIndex("owner_day")
    by_ratio = ScoreIndex("ratio")
    by_number = ScoreIndex("number", "owner_number")


class Parts(CachedView):
    """An inner join that repeats its first table, with a key of two numbers."""

    __select__ = select(
        i.id, p.n, p.label, p.weight, p.at.label("part_at"), i.at, i.seen, i.flag, i.uid, i.big,
        p.number.label("part_number"),
    ).select_from(item.join(part, i.id == p.item_id))  # fmt: skip

    by_label = ScoreIndex("label")
    by_weight = ScoreIndex("weight")
    by_flag = ScoreIndex("flag", "part_at")
    by_big = ScoreIndex("big")


class Tree(CachedView):
    """A self join."""

    __select__ = select(
        i.id, i.parent_id, i.number, i.price, i.code,
        parent.c.number.label("parent_number"), parent.c.at.label("parent_at"),
        parent.c.price.label("parent_price"), parent.c.code.label("parent_code"),
        parent.c.flag.label("parent_flag"),
    ).select_from(item.outerjoin(parent, i.parent_id == parent.c.id))  # fmt: skip

    by_parent = ScoreIndex("parent_id", "number")
    by_parent_at = ScoreIndex("parent_at")
    by_parent_price = ScoreIndex("parent_price")


class Full(CachedView):
    """A join in which either side may be missing."""

    __select__ = select(
        i.id, i.number, o.region, o.place, o.name, o.number.label("owner_number"), o.day,
    ).select_from(
        item.outerjoin(owner, and_(i.region == o.region, i.place == o.place), full=True)
    )  # fmt: skip
    __primary_key__ = ("id", "region", "place")

    by_number = ScoreIndex("number")
    by_owner = ScoreIndex("owner_number", "day")


class Computed(CachedView):
    """Columns and indexes that the database computes."""

    __select__ = select(
        i.id, i.number, i.ratio, i.single, i.day,
        func.coalesce(i.number, 0).label("some_number"),
        (i.small + i.place).label("moved"),
        (i.number > 1).label("is_many"),
        func.coalesce(i.ratio, 0).label("some_ratio"),
        func.coalesce(i.single, 0).label("some_single"),
        (i.price * 2).label("twice"),
        func.lower(i.name, type_=String()).label("lower_name"),
        func.coalesce(i.day, date(2024, 10, 27)).label("any_day"),
        case((i.number > 1, i.at), else_=None).label("late"),
    )  # fmt: skip

    by_some = ScoreIndex(func.coalesce(i.number, 0))
    by_ratio = ScoreIndex(func.abs(i.ratio, type_=Double()), "number")
    by_lower = ScoreIndex(func.lower(i.name, type_=String()))
    by_late = ScoreIndex("late")
    by_some_ratio = ScoreIndex("some_ratio")


class Grouped(CachedView):
    """Groups, counted."""

    __select__ = select(
        i.region,
        i.place,
        func.count().label("items"),
        func.max(i.number).label("most"),
        func.max(i.at).label("last"),
        func.sum(i.small).label("total"),
    ).group_by(i.region, i.place)

    by_items = ScoreIndex("items")
    by_most = ScoreIndex("most")


class Different(CachedView):
    """Rows without repetition."""

    __select__ = select(i.flag, i.number, i.day).distinct()

    by_number = ScoreIndex("number")
    by_day = ScoreIndex("day")


VIEWS: tuple[type[CachedView], ...] = (
    Plain, Owned, Parts, Tree, Full, Computed, Grouped, Different,
)  # fmt: skip
