"""What a transaction wrote, and what of a view that marks."""

from dataclasses import replace

import pytest

from sa_tablecache import changes as changes_module
from sa_tablecache.analysis import TableName, plan_of
from sa_tablecache.changes import (
    UNKNOWN,
    VIEW,
    ChangeSet,
    Concern,
    Mark,
    Written,
    marks_of,
)
from sa_tablecache.usage import placing_columns, used_columns
from tests.zoo import FlownPlanes, OuterBoard

FLIGHTS: TableName = (None, "flights")
PLANES: TableName = (None, "planes")
AIRLINES: TableName = (None, "airlines")
ELSEWHERE: TableName = ("archive", "planes")
PLAN = plan_of(OuterBoard)
CONCERNS = {
    table: Concern(frozenset({"seats", "tailnum"}), frozenset({"tailnum"}))
    for table in (FLIGHTS, PLANES, AIRLINES)
}
SEATS = Written(columns=frozenset({"seats"}))


def marks(changes: ChangeSet, concerns: dict[TableName, Concern] | None = None) -> set[Mark]:
    return set(marks_of(PLAN.tables, CONCERNS if concerns is None else concerns, changes))


def test_rows_of_a_followed_table_mark_rows() -> None:
    """A row whose records can be found marks those, and no more."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",), ("N2",)])
    changes.add_rows(FLIGHTS, [(7,)])
    assert marks(changes) == {Mark(PLANES, ("N1",)), Mark(PLANES, ("N2",)), Mark(FLIGHTS, (7,))}


def test_other_tables_mark_nothing() -> None:
    """A table that the view does not read marks nothing; its schema counts."""
    changes = ChangeSet()
    changes.add_rows(ELSEWHERE, [("N1",)])
    changes.add_table((None, "airports"))
    assert changes
    assert not changes.touches(PLAN.tables)
    assert not marks(changes)


def test_unknown_rows_mark_the_view() -> None:
    """A table of which any row may have changed marks the view, and so does everything."""
    table, everything = ChangeSet(), ChangeSet()
    table.add_table(AIRLINES)
    everything.add_everything()
    for changes in (table, everything):
        assert changes.touches(PLAN.tables)
        assert marks(changes) == {VIEW}


def test_rows_that_cannot_be_followed_mark_the_view() -> None:
    """Known rows are of no use where nothing leads from them to records."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",)])
    coarse = {**CONCERNS, PLANES: replace(CONCERNS[PLANES], followed=False)}
    assert marks(changes, coarse) == {VIEW}
    assert marks(changes, {}) == {VIEW}
    assert marks_of(plan_of(FlownPlanes).tables, {}, changes) == {VIEW}


def test_columns_that_a_view_does_not_use_mark_nothing() -> None:
    """An UPDATE of other columns is none of the view's business, followed or not."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",)], Written(columns=frozenset({"engines"})))
    coarse = {**CONCERNS, PLANES: replace(CONCERNS[PLANES], followed=False)}
    assert not marks(changes)
    assert not marks(changes, coarse)
    opaque = {**CONCERNS, PLANES: replace(CONCERNS[PLANES], opaque=True)}
    assert marks(changes, opaque) == {Mark(PLANES, ("N1",))}


def test_columns_that_place_no_record_mark_in_place() -> None:
    """An UPDATE of columns that are only shown leaves the records where they are."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",)], SEATS)
    changes.add_rows(PLANES, [("N2",)], Written(columns=frozenset({"seats", "tailnum"})))
    changes.add_rows(PLANES, [("N3",)])
    assert marks(changes) == {
        Mark(PLANES, ("N1",), moves=False),
        Mark(PLANES, ("N2",), moves=True),
        Mark(PLANES, ("N3",), moves=True),
    }
    changes.add_rows(PLANES, [("N1",)])
    assert Mark(PLANES, ("N1",), moves=True) in marks(changes)


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (UNKNOWN, SEATS, UNKNOWN),
        (SEATS, UNKNOWN, UNKNOWN),
        (SEATS, SEATS, SEATS),
        (SEATS, Written(frozenset({"model"})), Written(frozenset({"seats", "model"}))),
        (Written(before=()), SEATS, Written(before=())),
        (Written(before=({"a": 1},)), Written(before=()), Written(before=({"a": 1},))),
        (SEATS, Written(before=({"a": 1, "seats": 2},)), Written(before=({"a": 1},))),
        (UNKNOWN, Written(before=({"a": 1},)), UNKNOWN),
    ],
)
def test_what_a_row_was_is_what_it_was_at_first(
    first: Written, second: Written, both: Written
) -> None:
    """Of two writes of a row, the first one tells what it was before the transaction."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",)], first)
    changes.add_rows(PLANES, [("N1",)], second)
    assert changes.rows == {PLANES: {("N1",): both}}


def test_after_a_rollback_to_a_savepoint_nobody_knows_what_was_before() -> None:
    """What was undone may be written by others, whose rows this transaction changes then."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",)], Written(before=()))
    changes.add_rows(PLANES, [("N2",)], SEATS)
    changes.forget_before()
    assert changes.rows == {PLANES: {("N1",): UNKNOWN, ("N2",): SEATS}}


def test_a_table_swallows_its_rows() -> None:
    """Once any row of a table may have changed, single rows say nothing more."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",)])
    changes.add_table(PLANES)
    changes.add_rows(PLANES, [("N2",)])
    assert changes.rows == {}
    assert changes.tables == {PLANES}


def test_no_rows_are_no_change() -> None:
    """A statement that wrote no row leaves the change set empty."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [])
    assert not changes
    assert not changes.touches(PLAN.tables)


def test_many_rows_become_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a delta query should name are a table."""
    monkeypatch.setattr(changes_module, "MOST_KEYS", 2)
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",), ("N2",)])
    assert changes.rows[PLANES].keys() == {("N1",), ("N2",)}
    changes.add_rows(PLANES, [("N3",)])
    assert changes.rows == {}
    assert changes.tables == {PLANES}


def test_a_view_uses_the_columns_that_its_statement_names() -> None:
    """Joins, criteria, keys and scores place records; other columns are only shown."""
    used, placing = used_columns(PLAN), placing_columns(PLAN)
    assert used.keys() == PLAN.tables
    for table, columns in placing.items():
        assert columns <= used[table]
    assert "tailnum" in placing[FLIGHTS]
    assert "tailnum" in placing[PLANES]
    assert "model" in used[PLANES] - placing[PLANES]
    assert "origin" not in used[FLIGHTS]
