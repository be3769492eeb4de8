"""Values that are known to make trouble, for columns of every type and every database."""

import datetime as dt
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final
from zoneinfo import ZoneInfo

from sqlalchemy import types

from tests.differential.tables import Folded, Mood

NEW_YORK = ZoneInfo("America/New_York")
BERLIN = ZoneInfo("Europe/Berlin")
INFINITY, NAN = float("inf"), float("nan")


class Str(str):
    """A string that is no `str`, quite."""

    __slots__ = ()


class Int(int):
    """An integer that is no `int`, quite."""


TEXT: Final = ["", "a", "A", "b", "B", "a ", " a", "aa", "é", "e\u0301", "ß", "ss", "😀", "Z",
               "%", "_", "a%", "10", "9", "ﬀ", "\x1f"]  # fmt: skip
_MOMENTS: Final = [
    dt.datetime(2024, 3, 31, 1, 59, 59),
    dt.datetime(2024, 3, 31, 2, 30),  # does not exist in Berlin
    dt.datetime(2024, 3, 31, 3, 0),
    dt.datetime(2024, 10, 27, 2, 30),  # exists twice in Berlin
    dt.datetime(2024, 10, 27, 2, 30, 0, 1),
    dt.datetime(2024, 10, 27, 2, 30, 0, 500_000),
    dt.datetime(1970, 1, 1),
    dt.datetime(2024, 10, 27, 0, 0),
]
_AWARE: Final = [
    dt.datetime(2024, 3, 31, 1, 0, tzinfo=dt.UTC),
    dt.datetime(2024, 3, 31, 3, 0, tzinfo=BERLIN),
    dt.datetime(2024, 10, 27, 0, 30, tzinfo=dt.UTC),
    dt.datetime(2024, 10, 27, 1, 15, tzinfo=dt.UTC),
    dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),
    dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1),
    dt.datetime(2024, 10, 26, 20, 30, 0, 1, tzinfo=NEW_YORK),
    dt.datetime(1970, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30))),
]
_UUIDS: Final = [uuid.UUID(int=n) for n in (0, 1, 2**64, 2**127, 2**128 - 1)]
_UUIDS.append(uuid.UUID("a0000000-0000-1000-8000-00000000000b"))


def _decimals(numbers: str) -> list[Decimal]:
    return [Decimal(number) for number in numbers.split()]


#: Per type, values that its columns can hold everywhere.
_VALUES: Final[list[tuple[type, list[Any]]]] = [
    (types.Boolean, [True, False]),
    (types.SmallInteger, [0, 1, 2, -1, 2**15 - 1, -(2**15)]),
    (types.BigInteger, [0, 1, 2**31, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)]),
    (types.Integer, [0, 1, 2, 3, -1, 10, 2**31 - 1, -(2**31)]),
    (types.REAL, [0.0, 0.1, 0.5, -1.5]),
    (types.Double, [0.0, -0.0, 0.1, 0.1 + 0.2, 0.3, 1.0, 1.5, -1.5, 2.0**53, 2.0**53 + 2, 1e308,
                    5e-324]),
    (types.Float, [0.0, -0.0, 0.1, 0.5, 1.0, -1.5, 16777217.0]),
    (types.Numeric, _decimals("0 1.10 1.1 -1.5 0.1 0.3 1234567.8901 100")),
    (types.Enum, []),
    (types.CHAR, ["", "a", "A", "b", "é", "10"]),
    (types.String, TEXT),
    (types.Interval, [dt.timedelta(0), dt.timedelta(days=1), dt.timedelta(microseconds=1000)]),
    (types.DateTime, _MOMENTS),
    (types.Date, [dt.date(2024, 3, 31), dt.date(2024, 10, 27), dt.date(1970, 1, 1),
                  dt.date(2000, 2, 29), dt.date(9999, 12, 31)]),
    (types.Time, [dt.time(0), dt.time(2, 30), dt.time(23, 59, 59), dt.time(12, 0, 0, 1)]),
    (types.Uuid, _UUIDS),
    (types.LargeBinary, [b"", b"\x00", b"a", b"A", b"a\x00", b"a ", b"\xff", b"\x80"]),
    (types.JSON, [{"a": 1}, [1, 2], "text", 1, None]),
]  # fmt: skip

#: Values of any type, for columns of any other.
ODD: Final[list[Any]] = [
    None, True, False, 0, 1, 2, 2**15, 2**31, 2**53 + 1, 2**63, 2**70, Int(1),
    0.0, -0.0, 0.5, 0.1, 1.0, 2.0**53, INFINITY, -INFINITY, NAN,
    *_decimals("0 1.0 0.1 1.10 NaN Infinity"),
    "", "a", "A", "1", "10", "GOOD", "b", "on", Str("a"), "a\x00", "\ud800",
    b"a", b"", bytearray(b"a"),
    dt.date(2024, 10, 27), dt.datetime(2024, 10, 27), dt.datetime(2024, 10, 27, 2, 30),
    dt.datetime(2024, 10, 27, 0, 30, tzinfo=dt.UTC), dt.time(2, 30), dt.timedelta(days=1),
    uuid.UUID(int=1), Mood.GOOD, "2024-10-27", "2024-10-27 02:30:00",
]  # fmt: skip

#: Types that a parameter may be said to have.
TYPES: Final[list[Any]] = [
    types.Integer(), types.SmallInteger(), types.BigInteger(), types.Double(), types.Numeric(),
    types.String(), types.Text(), types.Date(), types.DateTime(), types.DateTime(timezone=True),
    types.Boolean(), types.Uuid(), types.NullType(),
]  # fmt: skip


def values_of(type_: types.TypeEngine[Any], dialect: str) -> Sequence[Any]:
    """Return values that a column of a type may hold, as the database takes them."""
    if isinstance(type_, Folded):
        return ["a", "b", "ab", ""]
    if isinstance(type_, types.Enum):
        return list(type_.enum_class) if type_.enum_class else list(type_.enums)
    found = list(next(values for kind, values in _VALUES if isinstance(type_, kind)))
    if isinstance(type_, types.DateTime) and type_.timezone:
        found = list(_AWARE)
    elif isinstance(type_, types.Numeric) and not isinstance(type_, types.Float):
        if not type_.asdecimal:
            found = [float(value) for value in found]
        elif type_.precision is None and dialect == "postgresql":
            found += _decimals("NaN Infinity 1.100 1e-20 0.00 1e20")
    elif isinstance(type_, types.Double) and dialect != "mysql":
        found += [INFINITY, -INFINITY]
        found += [NAN] if dialect == "postgresql" else []
    elif isinstance(type_, types.String) and not isinstance(type_, types.CHAR):
        if dialect == "sqlite" or (dialect == "mysql" and isinstance(type_, types.Text)):
            found += ["a\x00", "a\x00b"]
        if isinstance(type_, types.Text):
            found += ["x" * 1100 + "a", "x" * 1100 + "b"]
    elif isinstance(type_, types.Time) and dialect == "mysql":
        found = [value.replace(microsecond=0) for value in found]
    return found
