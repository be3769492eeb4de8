"""From the JSON of a changelog to the values that records have.

In: the arrays that triggers logged of changed rows, and the columns of the models. Out: primary
keys, as lineage holds them, and what else was logged of a row. What cannot be told exactly raises
:class:`Unexact`, and then its table is marked.

Pure. How the values are logged is said in ``contract.py``: text that depends on no setting of a
session, numbers without loss. So a value is here what the driver would have given: the stored one.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from sqlalchemy import Column, Dialect, Table, types

from sa_tablecache.changes import Ranges, RowKey
from sa_tablecache.comparison import to_utc


class Unexact(Exception):
    """A value whose form in Python is not known for sure; never leaves the package."""


def from_json(type_: types.TypeEngine[Any], value: Any, dialect: Dialect) -> Any:
    """Return a logged value of a column as SQLAlchemy would have read it.

    :raises Unexact: if that is not known.
    """
    if value is None:
        return None
    type_ = type_._variant_mapping.get(dialect.name, type_)
    try:
        return _converted(type_, value, dialect)
    except (ValueError, LookupError, InvalidOperation) as error:
        raise Unexact(f"{value!r} is not how {type_!r} is logged") from error


def _converted(type_: types.TypeEngine[Any], value: Any, dialect: Dialect) -> Any:
    kind = type(value)
    match type_:
        case types.Boolean():
            if kind is bool or (kind is int and value in (0, 1)):
                return bool(value)
        case types.Integer():
            if kind is int:
                return value
        case types.REAL() | types.Float(asdecimal=True) | types.CHAR():
            pass
        case types.Float():
            if kind is int or kind is float:
                return float(value)
        case types.Numeric(asdecimal=True):
            if kind is int or kind is str:
                return Decimal(value)
        case types.Enum():
            read: Any = type_.dialect_impl(dialect).result_processor(dialect, None)
            if kind is str and read is not None:
                return read(value)
        case types.String():
            if kind is str:
                return value
        case types.DateTime():
            if kind is str:
                found = dt.datetime.fromisoformat(value)
                if (found.tzinfo is not None) is type_.timezone:
                    return to_utc(found) if type_.timezone else found
        case types.Date():
            if kind is str:
                return dt.date.fromisoformat(value)
        case types.Time(timezone=False):
            if kind is str:
                return dt.time.fromisoformat(value)
        case types.Uuid(as_uuid=True):
            if kind is str:
                return uuid.UUID(value)
        case types.BINARY():
            pass
        case types.LargeBinary() | types.VARBINARY():
            if kind is str:
                return bytes.fromhex(value)
    raise ValueError


@dataclass(frozen=True, slots=True)
class LoggedTable:
    """How the changelog logs the rows of one table, as one model describes it."""

    logged: tuple[Column[Any] | None, ...]
    """The columns whose values are logged, as the model has them, in that order."""
    columns: Mapping[str, Column[Any]]
    """All columns of the table, by name."""
    key: tuple[int, ...]
    """Which of them are the primary key by which views follow the rows."""
    beside: tuple[int, ...]
    """Which others are: they lead to groups."""
    dialect: Dialect

    @classmethod
    def of(
        cls,
        table: Table,
        primary_key: Sequence[Column[Any]],
        names: Sequence[str],
        dialect: Dialect,
    ) -> LoggedTable | None:
        """Return how the columns with some names are logged; ``None`` if the key is not there."""
        columns = {column.name: column for column in table.columns}
        positions = {name: at for at, name in enumerate(names)}
        if not primary_key or not all(column.name in positions for column in primary_key):
            return None
        key = tuple(positions[column.name] for column in primary_key)
        rest = tuple(at for at, n in enumerate(names) if at not in key and n in columns)
        return cls(tuple(columns.get(name) for name in names), columns, key, rest, dialect)

    def row(self, values: Sequence[Any]) -> tuple[RowKey, dict[str, Any]]:
        """Return the key of a logged row, and what else is known of it.

        :raises Unexact: if the key is not known.
        """
        if len(values) != len(self.logged):
            raise Unexact(f"{len(values)} values were logged of {len(self.logged)} columns")
        key = tuple(self._value(at, values[at]) for at in self.key)
        if None in key:
            raise Unexact("a key with NULL")
        beside = {}
        for at in (*self.key, *self.beside) if self.beside else ():
            column = self.logged[at]
            assert column is not None
            try:
                beside[column.name] = self._value(at, values[at])
            except Unexact:
                continue  # a group that it leads to is not known, then
        return key, beside

    def ranges(self, logged: Mapping[str, tuple[Any, Any]]) -> Ranges:
        """Return those of the logged ranges of values that are known exactly."""
        found = {}
        for name, (low, high) in logged.items():
            column = self.columns.get(name)
            if column is not None and (low is None) is (high is None):
                try:
                    found[name] = (
                        from_json(column.type, low, self.dialect),
                        from_json(column.type, high, self.dialect),
                    )
                except Unexact:
                    continue
        return found

    def _value(self, at: int, value: Any) -> Any:
        column = self.logged[at]
        assert column is not None
        return from_json(column.type, value, self.dialect)


def one_key(keys: Iterable[tuple[Column[Any], ...]]) -> tuple[Column[Any], ...] | None:
    """Return the primary key of a table by which all views follow it; ``None`` if they differ."""
    first: tuple[Column[Any], ...] | None = None
    for key in keys:
        if first is not None and (
            [c.name for c in key] != [c.name for c in first]
            or [c.type._static_cache_key for c in key] != [c.type._static_cache_key for c in first]
        ):
            return None
        first = key
    return first
