"""From what triggers log to keys, groups and ranges, as records and models have them."""

import datetime as dt
import enum
import uuid
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import (
    CHAR,
    JSON,
    REAL,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Double,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Time,
    Uuid,
)
from sqlalchemy.dialects import postgresql, sqlite

from sa_tablecache.analysis import TableName, plan_of
from sa_tablecache.changes import ChangeSet, Written
from sa_tablecache.feed.contract import Change, Poll, Position, Relation
from sa_tablecache.feed.findings import Findings
from sa_tablecache.feed.keys import LoggedTable, Unexact, from_json, one_key
from sa_tablecache.feed.needs import needs_of
from tests.zoo import CarrierTotals, Flight, OuterBoard

POSTGRESQL = postgresql.dialect()
SQLITE = sqlite.dialect()


class Colour(enum.Enum):
    """An enum as models have them."""

    RED = 1


NOON = dt.datetime(2024, 3, 1, 12, tzinfo=dt.UTC)
ONE = uuid.UUID(int=1)

VALUES: list[tuple[Any, Any, Any]] = [
    (Integer(), 7, 7),
    (BigInteger(), 2**62, 2**62),
    (Integer(), None, None),
    (Boolean(), True, True),
    (Boolean(), 0, False),
    (Double(), 1, 1.0),
    (Double(), 0.1, 0.1),
    (Numeric(), "1.50", Decimal("1.5")),
    (Numeric(), 3, Decimal(3)),
    (String(), "N1 ", "N1 "),
    (Enum(Colour), "RED", Colour.RED),
    (DateTime(), "2024-03-01T12:00:00", dt.datetime(2024, 3, 1, 12)),
    (DateTime(), "2024-03-01 12:00:00.000001", dt.datetime(2024, 3, 1, 12, 0, 0, 1)),
    (DateTime(timezone=True), "2024-03-01T13:00:00+01:00", NOON),
    (Date(), "2024-03-01", dt.date(2024, 3, 1)),
    (Time(), "12:30:00", dt.time(12, 30)),
    (Uuid(), str(ONE), ONE),
    (Uuid(), ONE.hex, ONE),
    (LargeBinary(), "00ff", b"\x00\xff"),
]


@pytest.mark.parametrize(("type_", "logged", "value"), VALUES)
def test_a_logged_value_is_what_the_driver_would_have_given(type_: Any, logged: Any, value: Any):
    """JSON becomes the value of the column's own Python type."""
    for dialect in (POSTGRESQL, SQLITE):
        found = from_json(type_, logged, dialect)
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("type_", "logged"),
    [
        (Integer(), True),
        (Integer(), "7"),
        (Integer(), 7.0),
        (Boolean(), 2),
        (Double(), "NaN"),
        (REAL(), 0.1),
        (Numeric(), 1.5),
        (Numeric(), "much"),
        (CHAR(3), "AA "),
        (String(), 7),
        (Enum(Colour), "BLUE"),
        (DateTime(), "2024-03-01T13:00:00+01:00"),
        (DateTime(timezone=True), "2024-03-01T13:00:00"),
        (DateTime(), "yesterday"),
        (Date(), 3),
        (Uuid(), "1"),
        (Uuid(as_uuid=False), str(ONE)),
        (LargeBinary(), "0"),
        (JSON(), {}),
    ],
)
def test_a_value_that_is_not_known_for_sure_is_none(type_: Any, logged: Any) -> None:
    """What could be another value for the database marks the table instead."""
    with pytest.raises(Unexact):
        from_json(type_, logged, POSTGRESQL)


def table(**columns: Any) -> Table:
    """Return a table whose first column is the key."""
    made = [Column(n, t, primary_key=not at) for at, (n, t) in enumerate(columns.items())]
    return Table("t", MetaData(), *made)


def test_rows_are_read_in_the_order_in_which_they_are_logged() -> None:
    """The key is found among the logged columns, wherever it is; the others are told beside."""
    t = table(id=Integer(), day=Date(), odd=JSON())
    how = LoggedTable.of(t, tuple(t.primary_key), ("day", "id", "gone", "odd"), POSTGRESQL)
    assert how is not None
    key, beside = how.row(["2024-03-01", 7, "x", "y"])
    assert key == (7,)
    assert beside == {"id": 7, "day": dt.date(2024, 3, 1)}
    for wrong in (["2024-03-01", 7], ["2024-03-01", None, 1, 1], ["2024-03-01", "7", 1, 1]):
        with pytest.raises(Unexact):
            how.row(wrong)
    assert LoggedTable.of(t, tuple(t.primary_key), ("day",), POSTGRESQL) is None
    alone = LoggedTable.of(t, tuple(t.primary_key), ("id",), POSTGRESQL)
    assert alone is not None
    assert alone.row([7]) == ((7,), {})


def test_ranges_are_those_whose_ends_are_known() -> None:
    """A range of which one end is not known, or of a column that is not there, is none."""
    t = table(id=Integer(), day=Date())
    how = LoggedTable.of(t, tuple(t.primary_key), ("id",), POSTGRESQL)
    assert how is not None
    logged = {"id": (1, 9), "day": ("2024-03-01", "never"), "gone": (1, 2)}
    assert how.ranges(logged) == {"id": (1, 9)}
    assert how.ranges({"day": (None, None), "id": (None, 3)}) == {"day": (None, None)}


def test_models_that_disagree_about_the_key_have_none() -> None:
    """Keys by other columns, or of other types, cannot be told apart in a log."""
    first, second = table(id=Integer(), x=Integer()), table(id=String(), x=Integer())
    third = table(x=Integer(), id=Integer())
    keys = [tuple(t.primary_key) for t in (first, second, third)]
    assert one_key(keys[:1] * 2) == keys[0]
    assert one_key(keys[:2]) is None
    assert one_key([keys[0], keys[2]]) is None


def test_views_need_their_keys_groups_and_leading_scores() -> None:
    """What is watched of a table: its key, what views group by, what leads an index."""
    needs = needs_of([plan_of(OuterBoard), plan_of(CarrierTotals)])
    flights = needs[None, "flights"]
    assert flights.key[0] == "id"
    assert "carrier" in flights.key
    assert set(flights.ranges) == {"hour", "tailnum"}
    assert needs[None, "planes"].ranges == (), "an outer join can NULL-extend it"


# -- findings -----------------------------------------------------------------------------------

FLIGHTS: TableName = (None, "flights")
RELATION = Relation("public", "flights")
LOGGED = LoggedTable.of(
    Flight.__table__,  # type: ignore[arg-type]
    tuple(Flight.__table__.primary_key),
    ("id", "carrier"),
    POSTGRESQL,
)


class Nowhere(Position):
    """A position of no changelog."""

    def sees(self, change: Change) -> bool:
        return False

    def includes(self, other: Position) -> bool:
        return False

    def __str__(self) -> str:
        return ""


def findings(*changes: Change, **options: Any) -> Findings:
    """Return what a poll found."""
    poll = Poll(Nowhere(), changes, options.pop("gap", None))
    known: dict[str, Any] = {
        "names": {FLIGHTS: RELATION},
        "logged": {FLIGHTS: LOGGED},
        "moved": set(),
        "untrusted": {},
        "back": frozenset(),
        "fills": {},
        "seeded": False,
        **options,
    }
    return Findings(poll, **known)


def changed(*keys: Any, **options: Any) -> Change:
    """Return a change of flights."""
    return Change(RELATION, "U", keys or None, **options)


def read(found: Findings) -> ChangeSet:
    """Return the changes that were found."""
    result = found.changes(found.news())
    result.update(found.wholly())
    return result


def test_rows_are_told_with_all_groups_that_they_were_in() -> None:
    """A row that changed twice in a poll was in three groups: each may have been read meanwhile."""
    found = read(findings(changed((1, "AA"), (1, "UA")), changed((1, "UA"), (1, "DL"))))
    written = found.rows[FLIGHTS][1,]
    assert written.logged
    assert written.before is not None
    assert [row["carrier"] for row in written.before] == ["AA", "UA", "DL"]
    alone = LoggedTable.of(
        Flight.__table__,  # type: ignore[arg-type]
        tuple(Flight.__table__.primary_key),
        ("id",),
        POSTGRESQL,
    )
    found = read(findings(changed((1,)), logged={FLIGHTS: alone}))
    assert found.rows[FLIGHTS][1,] == Written()


def test_what_is_not_known_exactly_is_any_row() -> None:
    """Keys that do not fit, and no keys at all, are of any row; ranges are of rows in a range."""
    assert read(findings(changed(("x", "AA")))).tables == {FLIGHTS}
    assert read(findings(changed())).tables == {FLIGHTS}
    assert read(findings(changed((1, "AA")), logged={FLIGHTS: None})).tables == {FLIGHTS}
    found = read(findings(changed(ranges={"hour": ("2024-03-01T08:00:00", "2024-03-01T09:00:00")})))
    assert not found.tables
    assert found.ranges[FLIGHTS] == [
        {"hour": (dt.datetime(2024, 3, 1, 8), dt.datetime(2024, 3, 1, 9))}
    ]
    assert read(findings(changed(ranges={"hour": (1, 2)}))).tables == {FLIGHTS}


def test_a_table_that_was_not_watched_all_the_time_may_have_changed_wholly() -> None:
    """One that moved or is trusted again is any row, whatever was logged; so is all in a gap."""
    for options in ({"moved": {RELATION}}, {"back": frozenset({FLIGHTS})}):
        found = findings(changed((1, "AA")), **options)
        assert not found.news()
        assert read(found).tables == {FLIGHTS}
    assert read(findings(gap="trimmed")).everything
    assert read(findings(seeded=True)).everything


def test_what_cannot_be_watched_changes_with_what_fills_it() -> None:
    """A table that is not watched has changed where one that the application says fills it has."""
    totals: TableName = (None, "totals")
    fills = {FLIGHTS: frozenset({totals})}
    assert read(findings(changed((1, "AA")), fills=fills)).tables == {totals}
    watched = {FLIGHTS: RELATION, totals: Relation("public", "totals")}
    logged = {FLIGHTS: LOGGED, totals: None}
    found = read(findings(changed((1, "AA")), fills=fills, names=watched, logged=logged))
    assert not found.tables
    assert not read(findings(fills=fills)).tables
