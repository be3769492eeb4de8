"""What the database says, and random questions to ask it and the cache alike.

The truth never comes from the package: it is the view's own select, as it was declared, in a
subquery, read through an engine that nothing is attached to (or through a connection whose open
transaction is to be seen).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from random import Random
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    ColumnElement,
    Connection,
    Enum,
    String,
    and_,
    func,
    not_,
    or_,
    select,
    tuple_,
)

from tests.zoo import Kind

Columns = Mapping[str, ColumnElement[Any]]
Criterion = Callable[[Columns], ColumnElement[bool]]


def plain(value: Any) -> Any:
    """Return a value in a form that compares by type and content."""
    if isinstance(value, datetime) and value.tzinfo is not None:
        value = value.astimezone(UTC)
    if isinstance(value, Mapping):
        return tuple(sorted((key, plain(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return f"{type(value).__name__} {value!r}"


def plain_rows(rows: Iterable[Sequence[Any]]) -> list[Any]:
    """Return rows in a form that compares by type and content."""
    return [tuple(map(plain, row)) for row in rows]


class Truth:
    """The rows of a view, as the database has them.

    :param connection: through which they are read, in AUTOCOMMIT mode: each statement sees what is
        committed then.
    """

    def __init__(self, kind: Kind, connection: Connection) -> None:
        self.kind = kind
        self.connection = connection
        self.source = kind.statement().subquery()
        self.columns: Columns = dict(self.source.c)
        self.names = list(self.columns)

    def rows(
        self,
        *criteria: Criterion,
        order: Sequence[ColumnElement[Any]] = (),
        limit: int | None = None,
        offset: int | None = None,
        connection: Connection | None = None,
    ) -> list[Any]:
        """Return the rows that meet the criteria."""
        statement = select(self.source).where(*(make(self.columns) for make in criteria))
        if order:
            statement = statement.order_by(*order)
        if limit is not None:
            statement = statement.limit(limit)
        if offset is not None:
            statement = statement.offset(offset)
        return plain_rows(self.run(statement, connection))

    def run(self, statement: Any, connection: Connection | None = None) -> Sequence[Any]:
        """Run any statement."""
        return (connection or self.connection).execute(statement).all()

    def of(self, records: Iterable[Any]) -> list[Any]:
        """Return records of the view in the form in which rows are compared."""
        return plain_rows([getattr(record, name) for name in self.names] for record in records)


def same(records: list[Any], rows: list[Any]) -> bool:
    """Whether two lists of plain rows are the same in any order."""
    return Counter(records) == Counter(rows)


class Questions:
    """A source of random criteria for one view.

    :param pool: per column, values that occur in it.
    """

    def __init__(self, rng: Random, truth: Truth) -> None:
        self.rng = rng
        self.truth = truth
        self.types = {name: column.type for name, column in truth.columns.items()}
        self.pool: dict[str, list[Any]] = {name: [] for name in truth.names}

    def learn(self) -> None:
        """Take note of the values that the columns have now; older ones are kept too."""
        for row in self.truth.run(select(self.truth.source)):
            for name, value in zip(self.truth.names, row, strict=True):
                if value not in self.pool[name] and value is not None:
                    self.pool[name].append(value)

    def value(self, name: str) -> Any:
        """Return a value that the column has or had; None if it never had one."""
        return self.rng.choice(self.pool[name]) if self.pool[name] else None

    def criterion(self, depth: int = 2) -> tuple[str, Criterion]:
        """Return a random criterion, with a description of it."""
        rng = self.rng
        if depth and rng.random() < 0.5:
            (left, one), (right, other) = self.criterion(depth - 1), self.criterion(depth - 1)
            match rng.choice(["and", "or", "not"]):
                case "and":
                    return f"({left} and {right})", lambda c: and_(one(c), other(c))
                case "or":
                    return f"({left} or {right})", lambda c: or_(one(c), other(c))
                case _:
                    return f"not {left}", lambda c: not_(one(c))
        if rng.random() < 0.1 and len(self._ordered()) > 1:
            return self._row_values()
        return self._leaf(rng.choice(self.truth.names))

    def _ordered(self) -> list[str]:
        return [
            name
            for name, type_ in self.types.items()
            if not isinstance(type_, JSON | Boolean | Enum) and self.pool[name]
        ]

    def _row_values(self) -> tuple[str, Criterion]:
        rng = self.rng
        names = rng.sample(self._ordered(), k=2)
        values = [tuple(self.value(name) for name in names) for _ in range(2)]
        operator = rng.choice(["<", ">=", "==", "in"])
        described = f"{names} {operator} {values}"
        pair = values[0]

        def make(c: Columns) -> ColumnElement[bool]:
            row = tuple_(*(c[name] for name in names))
            match operator:
                case "<":
                    return row < pair
                case ">=":
                    return row >= pair
                case "==":
                    return row == pair
                case _:
                    return row.in_(values)

        return described, make

    def _leaf(self, name: str) -> tuple[str, Criterion]:
        rng, type_ = self.rng, self.types[name]
        value, other = self.value(name), self.value(name)
        operators = ["is null", "is not null"]
        if value is not None and not isinstance(type_, JSON):
            operators += ["==", "!=", "in", "not in", "in none", "not in none", "distinct"]
        if value is not None and not isinstance(type_, JSON | Boolean | Enum):
            operators += ["<", "<=", ">", ">=", "between", "not between"] * 2
        if value is not None and isinstance(type_, Boolean):
            operators += ["is true", "is not true", "itself"]
        if value is not None and isinstance(type_, String) and not isinstance(type_, Enum):
            operators += ["like", "startswith", "lower", "concat"]
        operator = rng.choice(operators)
        twins = [n for n, t in self.types.items() if type(t) is type(type_) and n != name]
        if twins and not isinstance(type_, JSON | Boolean | Enum) and rng.random() < 0.15:
            twin, less = rng.choice(twins), rng.random() < 0.5
            return (
                f"{name} {'<' if less else '='} {twin}",
                lambda c: c[name] < c[twin] if less else c[name] == c[twin],
            )
        several = [value, other, *([] if rng.random() < 0.7 else [value])]

        def make(c: Columns) -> ColumnElement[bool]:
            column: Any = c[name]
            match operator:
                case "is null":
                    return column.is_(None)
                case "is not null":
                    return column.is_not(None)
                case "==":
                    return column == value
                case "!=":
                    return column != value
                case "<":
                    return column < value
                case "<=":
                    return column <= value
                case ">":
                    return column > value
                case ">=":
                    return column >= value
                case "between":
                    return column.between(value, other)
                case "not between":
                    return ~column.between(value, other)
                case "in":
                    return column.in_(several)
                case "not in":
                    return column.not_in(several)
                case "in none":
                    return column.in_([*several, None])
                case "not in none":
                    return column.not_in([*several, None])
                case "distinct":
                    return column.is_distinct_from(value)
                case "is true":
                    return column.is_(True)
                case "is not true":
                    return column.is_not(True)
                case "itself":
                    return column
                case "like":
                    return column.like(f"%{value[:1]}%")
                case "startswith":
                    return column.startswith(value[:1])
                case "lower":
                    return func.lower(column) == value.lower()
                case _:
                    return column + "!" != value

        return f"{name} {operator} {value!r} {other!r}", make
