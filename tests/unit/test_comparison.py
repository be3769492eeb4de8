"""Which comparisons Python may make for the database, type by type and dialect by dialect."""

import datetime as dt
import enum
import uuid
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Dialect, TypeDecorator, types
from sqlalchemy.dialects import mysql, oracle, postgresql, sqlite

from sa_tablecache.comparison import (
    Comparison,
    Inexact,
    StoredColumn,
    comparison,
    is_sortable,
    to_utc,
)

DIALECTS: dict[str, Dialect] = {
    "sqlite": sqlite.dialect(),
    "postgresql": postgresql.dialect(),
    "mysql": mysql.dialect(),
}
BYTEWISE = StoredColumn(deterministic=True, bytewise=True)
LINGUISTIC = StoredColumn(deterministic=True, bytewise=False)
FOLDING = StoredColumn(deterministic=False, bytewise=False)
UNKNOWN = StoredColumn()


class Mood(enum.Enum):
    """An enumeration with a class."""

    GOOD = 1
    BAD = 2


class Folded(TypeDecorator[str]):
    """A type of which nobody knows what it does to values."""

    impl = types.String
    cache_ok = True


NEITHER, EQUALITY, BOTH = "neither", "equality", "both"

# Type, what the catalog says, then what may be compared on SQLite, PostgreSQL and MySQL.
TABLE: list[tuple[types.TypeEngine[Any], StoredColumn | None, str, str, str]] = [
    (types.Integer(), UNKNOWN, BOTH, BOTH, BOTH),
    (types.SmallInteger(), None, BOTH, BOTH, BOTH),
    (types.BigInteger(), UNKNOWN, BOTH, BOTH, BOTH),
    (types.Boolean(), UNKNOWN, EQUALITY, EQUALITY, EQUALITY),
    (types.Double(), UNKNOWN, BOTH, BOTH, BOTH),
    (types.Double(), None, BOTH, BOTH, NEITHER),
    (types.Double().with_variant(types.JSON(), "mysql"), UNKNOWN, BOTH, BOTH, NEITHER),
    (types.Float(), UNKNOWN, BOTH, BOTH, BOTH),
    (types.Float(asdecimal=True), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.REAL(), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.Numeric(8, 2), UNKNOWN, NEITHER, BOTH, NEITHER),
    (types.Numeric(8, 2, asdecimal=False), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.Enum(Mood), UNKNOWN, EQUALITY, EQUALITY, NEITHER),
    (types.Enum(Mood), FOLDING, NEITHER, NEITHER, NEITHER),
    (types.Enum("good", "bad"), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.String(), BYTEWISE, BOTH, BOTH, BOTH),
    (types.String(), LINGUISTIC, EQUALITY, EQUALITY, EQUALITY),
    (types.String(), FOLDING, NEITHER, NEITHER, NEITHER),
    (types.String(), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.String(), None, NEITHER, NEITHER, NEITHER),
    (types.String(collation="C"), BYTEWISE, BOTH, BOTH, BOTH),
    (types.String(collation="C"), None, NEITHER, NEITHER, NEITHER),
    (types.Text(), BYTEWISE, BOTH, BOTH, BOTH),
    (types.CHAR(4), BYTEWISE, NEITHER, NEITHER, NEITHER),
    (postgresql.CITEXT(), BYTEWISE, NEITHER, NEITHER, NEITHER),
    (types.LargeBinary(), UNKNOWN, BOTH, BOTH, BOTH),
    (types.Date(), UNKNOWN, BOTH, BOTH, BOTH),
    (types.Time(), UNKNOWN, BOTH, BOTH, NEITHER),
    (types.Time(timezone=True), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.DateTime(), UNKNOWN, BOTH, BOTH, BOTH),
    (types.DateTime(timezone=True), UNKNOWN, BOTH, BOTH, BOTH),
    (types.Uuid(), UNKNOWN, BOTH, BOTH, EQUALITY),
    (types.Uuid(as_uuid=False), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.Interval(), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.JSON(), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.PickleType(), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.ARRAY(types.Integer()), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (types.NullType(), UNKNOWN, NEITHER, NEITHER, NEITHER),
    (Folded(), BYTEWISE, NEITHER, NEITHER, NEITHER),
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("type_", "stored", "on_sqlite", "on_postgresql", "on_mysql"),
    TABLE,
    ids=[f"{row[0]!r}-{number}" for number, row in enumerate(TABLE)],
)
def test_what_is_compared_in_python(
    type_: Any,
    stored: StoredColumn | None,
    on_sqlite: str,
    on_postgresql: str,
    on_mysql: str,
    dialect: str,
) -> None:
    """A type is compared in Python only where that is known to mean what the database means."""
    wanted = {"sqlite": on_sqlite, "postgresql": on_postgresql, "mysql": on_mysql}[dialect]
    found = comparison(type_, DIALECTS[dialect], stored)
    assert (found.equality, found.order) == {
        NEITHER: (False, False),
        EQUALITY: (True, False),
        BOTH: (True, True),
    }[wanted]
    assert wanted != NEITHER or found.reason, "what is not exact says why"
    assert wanted == NEITHER or found.accepts


@pytest.mark.parametrize("type_", [types.Integer(), types.DateTime(), types.LargeBinary()])
def test_nothing_is_known_of_other_databases(type_: Any) -> None:
    """On a dialect that nobody looked at, no comparison is made in Python."""
    found = comparison(type_, oracle.dialect(), UNKNOWN)
    assert not found.equality
    assert not found.order


@pytest.mark.parametrize(
    ("type_", "dialect", "stored_name"),
    [
        (types.Integer(), "postgresql", "numeric"),
        (types.String(), "postgresql", "citext"),
        (types.String(), "postgresql", "bpchar"),
        (types.Float(), "postgresql", "float4"),
        (types.DateTime(), "postgresql", "date"),
        (types.Uuid(), "postgresql", "text"),
        (types.Numeric(), "postgresql", "money"),
        (types.Float(), "mysql", "float"),
        (types.DateTime(), "mysql", "timestamp"),
        (types.String(), "mysql", "char"),
        (types.LargeBinary(), "mysql", "binary"),
        (types.Integer(), "mysql", "decimal"),
    ],
)
def test_what_the_catalog_says_outranks_the_model(
    type_: Any, dialect: str, stored_name: str
) -> None:
    """A column that is stored as something else than the model says is left to the database."""
    stored = StoredColumn(stored_name, deterministic=True, bytewise=True)
    found = comparison(type_, DIALECTS[dialect], stored)
    assert not found.equality
    assert stored_name in found.reason


@pytest.mark.parametrize(
    ("type_", "stored", "dialect", "largest"),
    [
        (types.Integer(), UNKNOWN, "postgresql", 2**31 - 1),
        (types.SmallInteger(), UNKNOWN, "postgresql", 2**15 - 1),
        (types.Integer(), StoredColumn("int8"), "postgresql", 2**31 - 1),
        (types.BigInteger(), StoredColumn("int2"), "postgresql", 2**15 - 1),
        (types.Integer(), None, "postgresql", 2**31 - 1),
        (types.SmallInteger(), UNKNOWN, "sqlite", 2**63 - 1),
    ],
)
def test_integers_have_the_range_of_their_column(
    type_: Any, stored: StoredColumn | None, dialect: str, largest: int
) -> None:
    """A number that the column cannot hold is the database's to refuse, or its type's to cast."""
    how = comparison(type_, DIALECTS[dialect], stored)
    for number in (largest, -largest - 1, 0):
        assert how.parameter(number) == number
    for number in (largest + 1, -largest - 2):
        with pytest.raises(Inexact, match="out of the column's range"):
            how.parameter(number)


WARSAW = dt.timezone(dt.timedelta(hours=2))
NAIVE = dt.datetime(2013, 1, 1, 12)
AWARE = dt.datetime(2013, 1, 1, 12, tzinfo=WARSAW)


class Text(str):
    """A subclass of str, whose equality could be anything."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("type_", "good", "bad"),
    [
        (types.Integer(), [1, -1], [True, 1.0, "1", Decimal(1), Mood.GOOD]),
        (types.Boolean(), [True, False], [1, 0, "true"]),
        (types.Double(), [1.5, float("inf"), 7], [float("nan"), Decimal("1.5"), 2**60, True]),
        (types.Numeric(8, 2), [Decimal("1.50"), 1], [1.5, True, Decimal("NaN")]),
        (types.String(), ["a", ""], [b"a", 1, "a\x00b", "\ud800", Text("a")]),
        (types.LargeBinary(), [b"a"], ["a", bytearray(b"a")]),
        (types.Date(), [NAIVE.date()], [NAIVE, "2013-01-01"]),
        (types.DateTime(), [NAIVE], [AWARE, NAIVE.date(), "2013-01-01"]),
        (types.DateTime(timezone=True), [AWARE], [NAIVE, NAIVE.date()]),
        (types.Time(), [dt.time(1)], [NAIVE, "01:00"]),
        (types.Uuid(), [uuid.UUID(int=7)], [uuid.UUID(int=7).hex, 7]),
        (types.Enum(Mood), [Mood.GOOD], ["GOOD", 1]),
    ],
)
def test_parameters_of_another_type_are_refused(
    type_: Any, good: list[Any], bad: list[Any]
) -> None:
    """A parameter is compared in Python only if it is exactly of the type the column gives."""
    how = comparison(type_, DIALECTS["postgresql"], BYTEWISE)
    for value in good:
        assert how.parameter(value) == value
    for value in bad:
        with pytest.raises(Inexact):
            how.parameter(value)


@pytest.mark.parametrize(
    ("type_", "sent_as", "value"),
    [
        (types.Double(), types.Integer(), 2.5),  # what in_([1, 2.5]) is sent as
        (types.Double(), types.Integer(), 2**31),
        (types.Double(), types.Numeric(), 2.5),
        (types.Double(), types.REAL(), 0.1),
        (types.Integer(), types.String(), 1),
        (types.Integer(), types.SmallInteger(), 2**15),
        (types.Integer(), types.NullType(), 1),
        (types.String(), types.CHAR(3), "a"),
        (types.String(), types.Enum("a"), "a"),
        (types.DateTime(), types.Date(), NAIVE),
        (types.DateTime(), types.DateTime(timezone=True), NAIVE),
        (types.DateTime(timezone=True), types.DateTime(), AWARE),
        (types.Date(), types.DateTime(), NAIVE.date()),
        (types.Uuid(), types.String(), uuid.UUID(int=1)),
        (types.Boolean(), types.Integer(), True),
        (types.LargeBinary(), types.String(), b"a"),
        (types.String(), types.String(collation="other"), "a"),
        (types.DateTime(), types.BigInteger(), None),  # NULL has a type, too
    ],
)
def test_what_a_parameter_is_sent_as_matters(type_: Any, sent_as: Any, value: Any) -> None:
    """A parameter that the database gets as of another type is its to convert."""
    how = comparison(type_, DIALECTS["postgresql"], BYTEWISE)
    with pytest.raises(Inexact):
        how.parameter(value, sent_as)


@pytest.mark.parametrize(
    ("type_", "sent_as", "value"),
    [
        (types.Double(), types.Integer(), 2),
        (types.Double(), types.Float(), 0.1),
        (types.Numeric(8, 2), types.Integer(), 2),
        (types.Integer(), types.BigInteger(), 1),
        (types.BigInteger(), types.Integer(), 1),
        (types.Numeric(8, 2), types.Numeric(), Decimal("1.5")),
        (types.String(10), types.String(), "a"),
        (types.Text(), types.String(), "a"),
        (types.Text(), types.String(), None),
    ],
)
def test_types_that_are_sent_alike(type_: Any, sent_as: Any, value: Any) -> None:
    """A literal of its own type is as good as one of the column's."""
    how = comparison(type_, DIALECTS["postgresql"], BYTEWISE)
    assert how.parameter(value, sent_as) == value


@pytest.mark.parametrize("value", [Decimal("sNaN"), Decimal("NaN"), Decimal("-NaN")])
def test_no_nan_is_compared(value: Decimal) -> None:
    """A NaN is left to the database, even one that Python cannot compare with itself."""
    with pytest.raises(Inexact):
        comparison(types.Numeric(), DIALECTS["postgresql"], UNKNOWN).parameter(value)


@pytest.mark.parametrize(
    ("type_", "is_null"),
    [
        (types.Integer(), True),
        (types.REAL(), True),
        (types.Interval(), True),
        (types.CHAR(3), True),
        (types.JSON(), False),
        (types.PickleType(), False),
        (Folded(), False),
        (types.NullType(), False),
    ],
)
def test_none_is_not_always_null(type_: Any, is_null: bool) -> None:
    """JSON has a null of its own, and a TypeDecorator may make None of anything."""
    for dialect in DIALECTS.values():
        assert comparison(type_, dialect, UNKNOWN).none_is_null is is_null


def test_infinity_is_refused_by_mysql() -> None:
    """Drivers of MariaDB refuse infinity, so that a cache does not answer for it either."""
    with pytest.raises(Inexact):
        comparison(types.Double(), DIALECTS["mysql"], UNKNOWN).parameter(float("inf"))
    how = comparison(types.Double(), DIALECTS["sqlite"], UNKNOWN)
    assert how.parameter(float("inf")) == float("inf")


def test_columns_of_two_collations_do_not_compare() -> None:
    """PostgreSQL refuses to compare columns of two collations; so does MariaDB."""
    columns = [
        comparison(
            types.String(),
            DIALECTS["postgresql"],
            StoredColumn("text", deterministic=True, bytewise=True, collation=name),
        )
        for name in ("C", "C", "default")
    ]
    assert columns[0].compares_with(columns[1])
    assert not columns[0].compares_with(columns[2])


def test_a_collation_that_the_model_has_wrong() -> None:
    """The model's collation is sent with each parameter: it has to be that of the column."""
    stored = StoredColumn("text", deterministic=True, bytewise=True, collation="C")
    right, wrong = types.String(collation="C"), types.String(collation="en_US")
    assert comparison(right, DIALECTS["postgresql"], stored).order
    found = comparison(wrong, DIALECTS["postgresql"], stored)
    assert not found.equality
    assert "declared with collation en_US" in found.reason


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_collation_names_its_way_out(dialect: str) -> None:
    """What keeps text from being compared says how to declare the column instead."""
    stored = StoredColumn(deterministic=False, bytewise=False, collation="some_ci")
    reason = comparison(types.String(), DIALECTS[dialect], stored).reason
    assert "some_ci" in reason
    assert "declare" in reason


def test_integers_become_floats_beside_floats() -> None:
    """An integer without rounding is the float that the database makes of it."""
    how = comparison(types.Double(), DIALECTS["sqlite"], UNKNOWN)
    assert type(how.parameter(7)) is float
    assert how.parameter(2**53) == 2.0**53


def test_points_in_time_compare_in_utc() -> None:
    """Aware datetimes of one zone would compare by wall clock: all are brought to UTC."""
    how = comparison(types.DateTime(timezone=True), DIALECTS["postgresql"], UNKNOWN)
    found = how.parameter(AWARE)
    assert found.tzinfo is dt.UTC
    assert found == AWARE
    assert to_utc(None) is None
    assert to_utc(found) is found


def test_time_zones_are_not_kept_by_sqlite() -> None:
    """SQLite gives datetimes back without a zone, so that an aware parameter is its to judge."""
    how = comparison(types.DateTime(timezone=True), DIALECTS["sqlite"], UNKNOWN)
    assert how.parameter(NAIVE) == NAIVE
    with pytest.raises(Inexact):
        how.parameter(AWARE)


def test_a_storage_format_of_ones_own_is_left_to_sqlite() -> None:
    """Datetimes that are stored as other text may sort differently."""
    own = sqlite.DATETIME(storage_format="%(day)02d.%(month)02d.%(year)04d")
    plain = sqlite.DATETIME()
    found = comparison(own, DIALECTS["sqlite"], UNKNOWN)
    assert not found.equality or comparison(plain, DIALECTS["sqlite"], UNKNOWN).equality is False


def test_nan_sorts_after_all_numbers_on_postgresql_only() -> None:
    """SQLite stores NaN as NULL; PostgreSQL sorts it last, and equal to itself."""
    for type_ in (types.Double(), types.Float()):
        assert comparison(type_, DIALECTS["postgresql"], UNKNOWN).nan_is_greatest
        assert not comparison(type_, DIALECTS["sqlite"], UNKNOWN).nan_is_greatest


@pytest.mark.parametrize(
    ("type_", "sorts"),
    [
        (types.Integer(), True),
        (types.String(), True),
        (types.DateTime(), True),
        (types.Interval(), False),
        (types.JSON(), False),
        (types.Enum(Mood), False),
        (types.NullType(), False),
        (Folded(), False),
    ],
)
def test_which_types_python_can_sort(type_: Any, sorts: bool) -> None:
    """Storage sorts only by values that have an order in Python at all."""
    assert is_sortable(type_) is sorts


def test_the_table_is_of_values() -> None:
    """A comparison is a frozen value: equal types compare alike."""
    assert comparison(types.Integer(), DIALECTS["sqlite"], None) == comparison(
        types.Integer(), DIALECTS["sqlite"], None
    )
    with pytest.raises(AttributeError):
        Comparison(True, True).order = False  # type: ignore[misc]
