"""Random rows of the models of the zoo.

The values come from small pools, so that writes meet each other's rows, scores and groups.
"""

import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from random import Random
from typing import Any

from sqlalchemy import Column, Connection, Table, select
from sqlalchemy.orm import Mapper, class_mapper

from tests.zoo import (
    FAMILIES,
    Airline,
    Airport,
    Badge,
    Bin,
    Code,
    Contractor,
    Crate,
    Customer,
    DayPlan,
    DepotCrate,
    Flight,
    Item,
    Manager,
    Mood,
    Order,
    Person,
    Plane,
    Sample,
    Tag,
    Weather,
    person_tag,
)

HOURS = [datetime(2024, 3, 1, 8) + timedelta(hours=hour) for hour in range(8)]
DAYS = [date(2024, 2, 27) + timedelta(days=day) for day in range(8)]
WORDS = ["ada", "Ada", "AA", "bob", "Émile", "", "z z", "zz", "o'hare", "ünder"]
NUMBERS = [None, -3, 0, 1, 2, 7, 40]
DELAYS = [None, -5.0, 0.0, 10.0, 10.5, 30.0]
NAN = float("nan")
CUSTOMERS = [uuid.UUID(int=(number * 977 % 251) << 120 | number) for number in range(1, 9)]

Values = dict[str, Any]


class Rows:
    """A source of random values for one connection at a time.

    :param dialect: the name of the dialect: types that a database lacks get simpler values.
    """

    def __init__(self, rng: Random, dialect: str) -> None:
        self.rng = rng
        self.dialect = dialect
        self.serial = 0

    def key(self, connection: Connection, model: type[Any]) -> tuple[Any, ...] | None:
        """Return the primary key of some row that the connection sees, or None."""
        mapper = class_mapper(model)
        statement = select(*mapper.primary_key)
        if mapper.single:
            statement = statement.where(
                mapper.polymorphic_on == mapper.polymorphic_identity  # type: ignore[arg-type]
            )
        elif mapper.inherits:
            table = mapper.local_table
            statement = select(*table.primary_key)
        keys = sorted(map(tuple, connection.execute(statement)), key=repr)
        return self.rng.choice(keys) if keys else None

    def one(self, connection: Connection, model: type[Any]) -> Any:
        """Return the key of some row of a model with a key of one column, or None."""
        key = self.key(connection, model)
        return key and key[0]

    def row(self, connection: Connection, model: type[Any]) -> Values | None:
        """Return the attributes of a row whose key is new, or None if none was found."""
        values = self.values(connection, model)
        for _ in range(8):
            row = {**self.new_key(connection, model), **values}
            if _is_new(connection, model, row):
                return row
        return None

    def values(self, connection: Connection, model: type[Any]) -> Values:
        """Return new values for what is no part of the key; impossible ones are left out."""
        columns = class_mapper(model).columns
        return {
            name: value
            for name, value in _VALUES[model](self, connection).items()
            if value is not None or columns[name].nullable
        }

    def some(self, connection: Connection, model: type[Any]) -> Values:
        """Return one or two of the new values."""
        values = self.values(connection, model)
        names = sorted(values)
        return {
            name: values[name]
            for name in self.rng.sample(names, k=min(len(names), self.rng.choice([1, 1, 2])))
        }

    def new_key(self, connection: Connection, model: type[Any]) -> Values:
        """Return the attributes of some key, which a row may or may not have."""
        return _KEYS[model](self, connection)

    def pick(self, values: Iterable[Any]) -> Any:
        """Return one of the values."""
        return self.rng.choice(list(values))

    def unique(self, prefix: str) -> str:
        """Return a text that no row has yet."""
        self.serial += 1
        return f"{prefix}{self.serial}"


def columns_by_table(
    model: type[Any], values: Values
) -> list[tuple[Table, dict[Column[Any], Any]]]:
    """Split the attributes of a row over the tables of its model, parents first."""
    mapper: Mapper[Any] = class_mapper(model)
    if mapper.polymorphic_on is not None:
        values = {**values, "kind": mapper.polymorphic_identity}
    return [
        (
            table,
            {
                column: values[attribute.key]
                for attribute in mapper.column_attrs
                for column in attribute.columns
                if column.table is table and attribute.key in values
            },
        )
        for table in mapper.tables
    ]


def _text_key(letter: str, count: int) -> Callable[[Rows, Connection], Any]:
    return lambda rows, _: rows.pick(f"{letter}{number}" for number in range(1, count))


def _number(count: int) -> Callable[[Rows, Connection], Values]:
    return lambda rows, _: {"id": rows.rng.randint(1, count)}


_KEYS: dict[type[Any], Callable[[Rows, Connection], Values]] = {
    Airline: lambda rows, _: {"carrier": rows.pick(["AA", "UA", "DL", "B6", "aa", "WN"])},
    Plane: lambda rows, c: {"tailnum": _text_key("N", 9)(rows, c)},
    Airport: lambda rows, _: {"faa": rows.pick(["JFK", "LGA", "EWR", "LAX", "SFO"])},
    Flight: _number(60),
    Weather: lambda rows, _: {
        "origin": rows.pick(["JFK", "LGA", "EWR", "XXX"]),
        "hour": rows.pick(HOURS),
    },
    Tag: _number(9),
    Person: _number(40),
    Manager: _number(40),
    Contractor: _number(40),
    Customer: lambda rows, _: {"id": rows.pick(CUSTOMERS)},
    Order: _number(30),
    Item: lambda rows, c: {"order_id": rows.one(c, Order), "line": rows.rng.randint(1, 4)},
    DayPlan: lambda rows, _: {"day": rows.pick(DAYS)},
    Bin: lambda rows, _: {"the_key": rows.rng.randint(1, 9)},
    DepotCrate: _number(20),
    Crate: _number(20),
    Sample: _number(25),
    Code: lambda rows, _: {"code": rows.pick(["A", "AB", "ab", "ABC", "abc", "B", "b"])},
    Badge: lambda rows, _: {"badge": rows.pick(["gold", "Gold", "tin", "TIN", "ore"])},
}


def _sample(rows: Rows, _: Connection) -> Values:
    pick, sqlite, mariadb = rows.pick, rows.dialect == "sqlite", rows.dialect == "mysql"
    amounts = [None, "1.50", "-2.25", "0.00", "100.10"]
    amount = pick(amounts)
    moment = pick([None, *(datetime(2024, 3, 30, 22) + timedelta(hours=h) for h in range(6))])
    zone = UTC if rows.rng.random() < 0.5 else timezone(timedelta(hours=5, minutes=30))
    floats = [None, 0.0, -0.0, 1.0, 1.5]
    if not mariadb:
        floats += [float("inf")] if sqlite else [float("inf"), NAN]
    return {
        "flag": pick([None, True, False]),
        "ratio": pick(floats),
        "amount": amount and (float(amount) if sqlite else Decimal(amount)),
        "word": pick([None, *WORDS]),
        "padded": pick([None, "ab", "AB", "a", "b", "ab  ", ""]),
        "blob": pick([None, b"", b"\x00", b"\xff", b"ab"]),
        "token": pick([None, *CUSTOMERS]),
        "day": pick([None, *DAYS]),
        "clock": pick([None, time(0), time(12, 30, 1), time(23, 59, 59, 999)]),
        "moment": moment and (moment if sqlite or mariadb else moment.replace(tzinfo=zone)),
        "span": pick([None, timedelta(0), timedelta(hours=30), timedelta(days=2, seconds=1)]),
        "mood": pick([None, *Mood]),
        "document": pick([None, {"a": [1, 2, {"b": None}]}, [1, 1.0, True], "text", 0, {}]),
    }


_VALUES: dict[type[Any], Callable[[Rows, Connection], Values]] = {
    Airline: lambda rows, _: {"name": rows.pick(WORDS)},
    Plane: lambda rows, _: {
        "model": rows.pick([None, *WORDS]),
        "year": rows.pick([None, 1985, 1999, 2000, 2004, 2013]),
    },
    Airport: lambda rows, _: {"name": rows.pick(WORDS)},
    Flight: lambda rows, c: {
        "hour": rows.pick(HOURS),
        "carrier": rows.one(c, Airline),
        "tailnum": rows.pick([None, rows.one(c, Plane), rows.one(c, Plane)]),
        "origin": rows.one(c, Airport),
        "dest": rows.one(c, Airport),
        "delay": rows.pick(DELAYS),
    },
    Weather: lambda rows, _: {"temp": rows.pick(DELAYS)},
    Tag: lambda rows, _: {"label": rows.unique("tag ")},
    Person: lambda rows, c: {"name": rows.pick(WORDS), "boss_id": rows.one(c, Person)},
    Manager: lambda rows, c: {
        "name": rows.pick(WORDS),
        "boss_id": rows.one(c, Manager),
        "budget": rows.pick(NUMBERS),
    },
    Contractor: lambda rows, c: {
        "name": rows.pick(WORDS),
        "boss_id": rows.one(c, Manager),
        "rate": rows.pick(NUMBERS),
    },
    Customer: lambda rows, _: {"name": rows.pick(WORDS), "city": rows.pick([None, *WORDS])},
    Order: lambda rows, c: {
        "number": rows.unique("N"),
        "customer_id": rows.one(c, Customer),
        "day": rows.pick(DAYS),
        "status": rows.pick(["open", "shipped", "Open", "lost"]),
        "extra": rows.pick([None, {"gift": [1, 2]}, {"gift": [1, 2.0]}, [], "x"]),
    },
    Item: lambda rows, _: {
        "sku": rows.pick(WORDS),
        "qty": rows.pick(NUMBERS),
        "price": rows.pick([1, 2, 3, 10]),
        "gift": rows.pick([None, True, False]),
    },
    DayPlan: lambda rows, _: {"headcount": rows.pick(NUMBERS)},
    Bin: lambda rows, _: {"select_": rows.pick(WORDS), "mixed": rows.pick(NUMBERS)},
    DepotCrate: lambda rows, c: {
        "bin_key": rows.pick([None, rows.one(c, Bin), rows.one(c, Bin)]),
        "weight": rows.pick(NUMBERS),
    },
    Crate: lambda rows, _: {"weight": rows.pick(NUMBERS)},
    Sample: _sample,
    Code: lambda rows, c: {"sample_id": rows.one(c, Sample), "note": rows.pick([None, *WORDS])},
    Badge: lambda rows, c: {"sample_id": rows.one(c, Sample), "note": rows.pick([None, *WORDS])},
}

COUNTS = {Flight: 25, Weather: 12, Person: 8, Order: 14, Item: 20, Sample: 12}
"""How many rows to start with, where five are too few."""


def fill(connection: Connection, family: str, seed: int) -> None:
    """Insert the rows that a test starts with; there are three variations of them."""
    # Which keys are different is a question of the database's collation, too.
    known = family, connection.engine.url, seed % 3
    if known not in _filled:
        _filled[known] = _first_rows(connection, family, connection.dialect.name, seed % 3)
        return
    for table, several in _filled[known]:
        connection.execute(table.insert(), several)


_filled: dict[Any, list[tuple[Table, list[Values]]]] = {}


def _first_rows(
    connection: Connection, family: str, dialect: str, seed: int
) -> list[tuple[Table, list[Values]]]:
    """Insert rows one by one, which know each other's keys, and return them."""
    rows = Rows(Random(seed), dialect)
    inserted: dict[Table, list[Values]] = {}

    def insert(table: Table, columns: dict[Column[Any], Any]) -> None:
        values = {column.key: columns.get(column) for column in table.columns}
        connection.execute(table.insert().values(values))
        inserted.setdefault(table, []).append(values)

    for model in FAMILIES[family]:
        for _ in range(COUNTS.get(model, 5)):
            values = rows.row(connection, model)
            for table, columns in columns_by_table(model, values) if values else []:
                insert(table, columns)
    if family == "staff":
        links = {(rows.one(connection, Person), rows.one(connection, Tag)) for _ in range(12)}
        for person, tag in sorted(links):
            insert(person_tag, {person_tag.c.person_id: person, person_tag.c.tag_id: tag})
    return list(inserted.items())


def _is_new(connection: Connection, model: type[Any], values: Values) -> bool:
    mapper = class_mapper(model)
    if not all(
        attribute.key in values
        for attribute in mapper.column_attrs
        if not all(c.nullable or c.key == "kind" for c in attribute.columns)
    ):
        return False
    table, columns = columns_by_table(model, values)[0]
    key = [(column, columns[column]) for column in table.primary_key]
    if any(value is None for _, value in key):
        return False
    criteria = [column == value for column, value in key]
    return connection.execute(select(1).select_from(table).where(*criteria)).first() is None
