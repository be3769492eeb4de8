"""Which comparisons of Python are those of the database: the table behind "same answer".

In: a column's type, the dialect, and what the catalog says of the stored column.
Out: a :class:`Comparison`. What is not proven here to mean the same on both sides is never
evaluated in Python: text order under a collation that is not bytewise, floats beside decimals,
padded, folded or JSON values, types that nobody described. ``docs/guarantees.md`` has the table.
"""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import types
from sqlalchemy.dialects.postgresql import CITEXT
from sqlalchemy.engine import Dialect


@dataclass(frozen=True, slots=True)
class StoredColumn:
    """What the catalog says of a stored column; ``None`` where it was not asked."""

    type_name: str | None = None
    deterministic: bool | None = None
    """Whether equal text is bytewise equal text."""
    bytewise: bool | None = None
    """Whether text sorts by code points."""
    by_database: bool = False
    """Whether SQLite itself may have written values, in a format of its own."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How values of one column may be compared in Python."""

    equality: bool
    order: bool
    accepts: tuple[type, ...] = ()
    """The exact types of parameters for which that is true."""
    reason: str = ""
    bounds: tuple[int, int] | None = None
    """For integers: what the column can hold. Other parameters are the database's to refuse."""
    nan_is_greatest: bool = False
    normalise: Callable[[Any], Any] | None = None
    """Applied to stored values and to parameters alike."""

    def parameter(self, value: Any) -> Any:
        """Return a parameter in the form in which it compares, or raise :class:`Inexact`."""
        kind = type(value)
        if kind is int and float in self.accepts and abs(value) <= EXACT_FLOATS:
            return float(value)
        if kind not in self.accepts:
            raise Inexact(f"a {kind.__name__} is not what this column holds")
        if self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:
            raise Inexact("the number is out of the column's range")
        if value != value:  # noqa: PLR0124 - only NaN differs from itself
            raise Inexact("NaN")
        if kind is dt.datetime and (value.tzinfo is None) is not (self.normalise is None):
            raise Inexact("a time zone on one side only")
        if kind is str and "\x00" in value:
            raise Inexact("a NUL character")
        return value if self.normalise is None else self.normalise(value)


class Inexact(Exception):
    """Python could not compare this as the database does; never leaves the package."""


def to_utc(value: Any) -> Any:
    """Return an aware datetime in UTC: aware datetimes of one zone compare by wall clock."""
    if value is None or value.tzinfo is dt.UTC:
        return value
    return value.astimezone(dt.UTC)


_INTEGERS: Final = {
    types.SmallInteger: (-(2**15), 2**15 - 1),
    types.BigInteger: (-(2**63), 2**63 - 1),
    types.Integer: (-(2**31), 2**31 - 1),
}

#: PostgreSQL's names of the types whose values compare as described below.
_POSTGRESQL_NAMES: Final[dict[type, tuple[str, ...]]] = {
    types.Integer: ("int2", "int4", "int8"),
    types.Float: ("float8",),
    types.Numeric: ("numeric",),
    types.String: ("text", "varchar"),
    types.Boolean: ("bool",),
    types.DateTime: ("timestamp", "timestamptz"),
    types.Date: ("date",),
    types.Time: ("time",),
    types.Uuid: ("uuid",),
    types.LargeBinary: ("bytea",),
}

#: Python types whose values sort among themselves.
_SORTABLE: Final = (int, float, str, bytes, dt.date, dt.time, dt.timedelta, uuid.UUID, Decimal)

EXACT_FLOATS: Final = 2**53
"""Integers up to this are doubles without rounding."""

_UNKNOWN: Final = Comparison(False, False, reason="of a type that is not known to be exact")


def is_sortable(type_: types.TypeEngine[Any]) -> bool:
    """Whether Python can sort the values of a type at all, in whatever order."""
    if isinstance(type_, types.TypeDecorator | types.NullType):
        return False
    try:
        return issubclass(type_.python_type, _SORTABLE)
    except NotImplementedError:
        return False


def comparison(
    type_: types.TypeEngine[Any], dialect: Dialect, stored: StoredColumn | None
) -> Comparison:
    """Return how values of a column compare.

    :param type_: the type of the column or expression.
    :param stored: what the catalog says of the column; ``None`` for an expression.
    """
    name = dialect.name if dialect.name != "mariadb" else "mysql"
    if name not in ("postgresql", "sqlite", "mysql") or isinstance(type_, types.TypeDecorator):
        return _UNKNOWN
    stored_name = stored.type_name if stored is not None else None
    if name == "postgresql" and stored_name is not None:
        for base, names in _POSTGRESQL_NAMES.items():
            if isinstance(type_, base) and not (
                base is types.Numeric and isinstance(type_, types.Float)
            ):
                if stored_name not in names and not isinstance(type_, types.Enum):
                    return Comparison(False, False, reason=f"stored as {stored_name}")
                break
    return _by_type(type_, name, stored)


def _by_type(type_: types.TypeEngine[Any], dialect: str, stored: StoredColumn | None) -> Comparison:
    details: Any = type_  # the match narrows type_ to more than is true of subclasses
    match type_:
        case types.Boolean():
            return Comparison(True, False, (bool,), "a truth value")
        case types.Integer():
            bounds = next(b for base, b in _INTEGERS.items() if isinstance(details, base))
            if stored is None or dialect == "sqlite":
                bounds = _INTEGERS[types.BigInteger]
            elif stored.type_name is not None:
                bounds = {
                    "int2": _INTEGERS[types.SmallInteger],
                    "int8": _INTEGERS[types.BigInteger],
                }.get(stored.type_name, bounds)
            return Comparison(True, True, (int,), bounds=bounds)
        case types.REAL():
            return Comparison(False, False, reason="REAL is compared in single precision")
        case types.Float(asdecimal=True):
            return _UNKNOWN
        case types.Float():
            return Comparison(True, True, (float,), nan_is_greatest=dialect == "postgresql")
        case types.Numeric(asdecimal=True) if dialect == "postgresql":
            return Comparison(True, True, (Decimal,), nan_is_greatest=True)
        case types.Numeric():
            return Comparison(False, False, reason="a decimal that is not compared as one")
        case types.Enum():
            kind: type | None = type_.enum_class
            if kind is None or not issubclass(kind, enum.Enum) or dialect == "mysql":
                return Comparison(False, False, reason="an Enum of strings")
            return Comparison(True, False, (kind,), "an Enum, sorted by the database's own order")
        case types.String():
            return _text(type_, dialect, stored)
        case types.DateTime():
            if type_.timezone and dialect == "postgresql":
                return Comparison(True, True, (dt.datetime,), normalise=to_utc)
            if dialect == "sqlite" and getattr(type_, "_storage_format", None) is not None:
                return Comparison(False, False, reason="a storage_format of its own")
            if stored is not None and stored.by_database:
                return Comparison(False, False, reason="a server default writes another format")
            return Comparison(True, True, (dt.datetime,))
        case types.Date():
            return Comparison(True, True, (dt.date,))
        case types.Time():
            if type_.timezone or dialect == "mysql":
                return _UNKNOWN
            return Comparison(True, True, (dt.time,))
        case types.Uuid():
            if not type_.as_uuid:
                return Comparison(False, False, reason="a UUID read as text")
            return Comparison(True, dialect != "mysql", (uuid.UUID,))
        case types.LargeBinary():
            return Comparison(True, True, (bytes,))
    return _UNKNOWN


def _text(type_: types.String, dialect: str, stored: StoredColumn | None) -> Comparison:
    if isinstance(type_, types.CHAR | CITEXT):
        return Comparison(False, False, reason=f"{type(type_).__name__} pads or folds its values")
    if type_.collation is not None or stored is None:
        return Comparison(False, False, reason="text under a collation that was not looked up")
    if dialect == "mysql":
        return Comparison(False, False, reason="text under a collation that folds or pads")
    if not stored.deterministic:
        return Comparison(False, False, reason="text under a collation that folds")
    if not stored.bytewise:
        return Comparison(True, False, (str,), "text under a collation that is not bytewise")
    return Comparison(True, True, (str,))
