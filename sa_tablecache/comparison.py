"""Which comparisons of Python are those of the database: the table behind "same answer".

In: a column's type, the dialect, and what the catalog says of the stored column.
Out: a :class:`Comparison`. What is not proven here to mean the same on both sides is never
evaluated in Python: text order under a collation that is not bytewise, floats beside decimals,
padded, folded or JSON values, types that nobody described. ``docs/guarantees.md`` has the table.
"""

from __future__ import annotations

import datetime as dt
import enum
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    collation: str | None = None
    """The name of the collation of text: databases refuse to compare text of two."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How values of one column may be compared in Python."""

    equality: bool
    order: bool
    accepts: tuple[type, ...] = ()
    """The exact types of parameters for which that is true."""
    reason: str = ""
    bounds: tuple[float, float] | None = None
    """Of numbers: what the column can hold. Other parameters are the database's to refuse."""
    nan_is_greatest: bool = False
    normalise: Callable[[Any], Any] | None = None
    """Applied to stored values and to parameters alike."""
    collation: str | None = None
    """For text: the name of its collation."""
    alone: bool = False
    """Whether row values that it is a part of are left to the database."""
    none_is_null: bool = True
    """Whether ``None`` in Python is NULL in the database, and the other way round."""
    type: types.TypeEngine[Any] | None = field(default=None, compare=False)
    """The type of the column."""

    def parameter(self, value: Any, type_: types.TypeEngine[Any] | None = None) -> Any:
        """Return a parameter in the form in which it compares, or raise :class:`Inexact`.

        :param type_: as what type the parameter is sent; ``None`` for the column's own.
        """
        kind = type(value)
        if type_ is not None and type_ is not self.type:
            self._check_sent_as(type_, value)
        if value is None:
            return None
        if kind is int and float in self.accepts and abs(value) <= EXACT_FLOATS:
            return float(value)
        if kind is int and Decimal in self.accepts:
            return Decimal(value)
        if kind not in self.accepts:
            raise Inexact(f"a {kind.__name__} is not what this column holds")
        if kind is float or kind is Decimal:
            # A signalling NaN cannot even be compared with itself.
            if value.is_nan() if kind is Decimal else value != value:  # noqa: PLR0124
                raise Inexact("NaN")
        if self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:
            raise Inexact("the number is out of the column's range")
        if kind is dt.datetime and (value.tzinfo is None) is not (self.normalise is None):
            raise Inexact("a time zone on one side only")
        if kind is str and not _is_storable(value):
            raise Inexact("a character that databases refuse")
        return value if self.normalise is None else self.normalise(value)

    def _check_sent_as(self, type_: types.TypeEngine[Any], value: Any) -> None:
        """Raise :class:`Inexact` if the database gets the value as of another type.

        ``Float.in_([1, 2.5])`` says that both are integers, and PostgreSQL casts what it gets.
        """
        mine = self.type
        if mine is None or type_._static_cache_key == mine._static_cache_key:
            return
        if isinstance(mine, types.Integer) and isinstance(type_, types.Integer):
            low, high = _integer_bounds(type_)
            if type(value) is int and low <= value <= high:
                return
        elif isinstance(mine, types.Numeric | types.Float) and type(type_) is types.Integer:
            if type(value) is int and abs(value) < 2**31:
                return
        elif type(type_) in _SENT_ALIKE.get(_kind(mine), ()) and not type_._variant_mapping:
            # A collation is sent along, and outranks that of the column.
            if getattr(type_, "collation", None) in (None, self.collation):
                return
        raise Inexact(f"a parameter of type {type_!r}")

    def compares_with(self, other: Comparison) -> bool:
        """Whether values of two columns compare with each other as among themselves."""
        return (
            self.accepts == other.accepts
            and self.normalise is other.normalise
            and self.collation == other.collation
            # One may be a type of the database's own, and the other text.
            and not isinstance(self.type, types.Enum)
        )


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\x00" not in text


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


def _integer_bounds(type_: Any) -> tuple[int, int]:
    return next(bounds for base, bounds in _INTEGERS.items() if isinstance(type_, base))


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

#: The same for MariaDB and MySQL. FLOAT is compared in single precision, CHAR is padded, and what
#: TIMESTAMP shows depends on the session's time zone.
_MYSQL_NAMES: Final[dict[type, tuple[str, ...]]] = {
    types.Boolean: ("tinyint", "int", "bigint"),  # the latter two are what comparisons give
    types.Integer: ("tinyint", "smallint", "mediumint", "int", "bigint"),
    types.Float: ("double",),
    types.String: ("varchar", "tinytext", "text", "mediumtext", "longtext"),
    types.DateTime: ("datetime",),
    types.Date: ("date",),
    types.Uuid: ("uuid", "char"),
    types.LargeBinary: ("varbinary", "tinyblob", "blob", "mediumblob", "longblob"),
    types.VARBINARY: ("varbinary", "tinyblob", "blob", "mediumblob", "longblob"),
}

#: Python types whose values sort among themselves.
_SORTABLE: Final = (int, float, str, bytes, dt.date, dt.time, dt.timedelta, uuid.UUID, Decimal)

#: Types of parameters that drivers send alike.
_SENT_ALIKE: Final[dict[type, tuple[type, ...]]] = {
    types.Float: (types.Float, types.Double, types.FLOAT, types.DOUBLE),
    types.Numeric: (types.Numeric, types.NUMERIC, types.DECIMAL),
    types.String: (types.String, types.Text, types.VARCHAR, types.TEXT),
    types.Boolean: (types.Boolean, types.BOOLEAN),
    types.Date: (types.Date, types.DATE),
    types.Time: (types.Time, types.TIME),
    types.LargeBinary: (types.LargeBinary, types.BLOB, types.VARBINARY),
    types.VARBINARY: (types.LargeBinary, types.BLOB, types.VARBINARY),
}


def _kind(type_: types.TypeEngine[Any]) -> type:
    """Return the base class of a type, as a key of the tables above."""
    if isinstance(type_, types.Enum | types.CHAR):
        return type(type_)
    return next((base for base in _SENT_ALIKE if isinstance(type_, base)), type(type_))


EXACT_FLOATS: Final = 2**53
"""Integers up to this are doubles without rounding."""

_UNKNOWN: Final = Comparison(False, False, reason="of a type that is not known to be exact")


#: Types of which ``None`` is NULL: not JSON, which has a null of its own, nor what one's own
#: TypeDecorator makes of values.
_NULLABLE: Final = (
    types.Boolean, types.Integer, types.Numeric, types.Float, types.String, types.Date,
    types.DateTime, types.Time, types.Interval, types.LargeBinary, types.VARBINARY, types.Uuid,
    types.ARRAY,
)  # fmt: skip


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
    given, type_ = type_, type_._variant_mapping.get(dialect.name, type_)
    if not isinstance(type_, _NULLABLE):
        return Comparison(False, False, reason=_UNKNOWN.reason, none_is_null=False)
    if name not in ("postgresql", "sqlite", "mysql") or isinstance(type_, types.TypeDecorator):
        return _UNKNOWN
    stored_name = stored.type_name if stored is not None else None
    stored_names = {"postgresql": _POSTGRESQL_NAMES, "mysql": _MYSQL_NAMES}.get(name, {})
    if stored_name is not None:
        for base, names in stored_names.items():
            if isinstance(type_, base):
                if stored_name not in names and not isinstance(type_, types.Enum):
                    return Comparison(False, False, reason=f"stored as {stored_name}")
                break
    return replace(_by_type(type_, name, stored), type=given)


def _by_type(type_: types.TypeEngine[Any], dialect: str, stored: StoredColumn | None) -> Comparison:
    match type_:
        case types.Boolean():
            return Comparison(True, False, (bool,), "a truth value")
        case types.Integer():
            # PostgreSQL casts a parameter to the type that the model says, whatever is stored.
            bounds = _integer_bounds(type_)
            if dialect == "sqlite":
                bounds = _INTEGERS[types.BigInteger]
            elif stored is not None and stored.type_name == "int2":
                bounds = _INTEGERS[types.SmallInteger]
            return Comparison(True, True, (int,), bounds=bounds)
        case types.REAL():
            return Comparison(False, False, reason="REAL is compared in single precision")
        case types.Float(asdecimal=True):
            return _UNKNOWN
        case types.Float():
            if stored is None and dialect == "mysql":
                return Comparison(False, False, reason="a number of a precision nobody knows")
            finite = (-sys.float_info.max, sys.float_info.max) if dialect == "mysql" else None
            return Comparison(
                True, True, (float,), bounds=finite, nan_is_greatest=dialect == "postgresql"
            )
        case types.Numeric(asdecimal=True) if dialect == "postgresql":
            return Comparison(True, True, (Decimal,), nan_is_greatest=True)
        case types.Numeric():
            return Comparison(False, False, reason="a decimal that is not compared as one")
        case types.Enum():
            kind: type | None = type_.enum_class
            if stored is not None and stored.deterministic is False:
                return Comparison(False, False, reason="an Enum under a collation that folds")
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
        case types.LargeBinary() | types.VARBINARY():
            return Comparison(True, True, (bytes,))
    return _UNKNOWN


def _text(type_: types.String, dialect: str, stored: StoredColumn | None) -> Comparison:
    if isinstance(type_, types.CHAR | CITEXT):
        return Comparison(False, False, reason=f"{type(type_).__name__} pads or folds its values")
    if stored is None or stored.deterministic is None:
        return Comparison(False, False, reason="text under a collation that was not looked up")
    if type_.collation is not None and stored.collation not in (None, type_.collation):
        # PostgreSQL gets the model's collation with each parameter, and it outranks the column's.
        why = f"declared with collation {type_.collation}, and stored with {stored.collation}"
        return Comparison(False, False, reason=why)
    name = f"collation {stored.collation}" if stored.collation else "a collation"
    way_out = _WAYS_OUT[dialect]
    if not stored.deterministic:
        how = "folds or pads" if dialect == "mysql" else "folds"
        return Comparison(False, False, reason=f"text under {name}, which {how} ({way_out})")
    if not stored.bytewise:
        return Comparison(
            True,
            False,
            (str,),
            f"text under {name}, which is not bytewise ({way_out})",
            collation=stored.collation,
        )
    return Comparison(True, True, (str,), collation=stored.collation)


#: How a column is declared so that its text compares as in Python.
_WAYS_OUT: Final = {
    "postgresql": 'declare the column with collation="C"',
    "sqlite": "declare the table without COLLATE",
    "mysql": 'declare the column with collation="utf8mb4_nopad_bin"',
}
