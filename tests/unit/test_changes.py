"""What a transaction wrote, and what of a view that marks."""

from dataclasses import replace

import pytest

from sa_tablecache import changes as changes_module
from sa_tablecache.analysis import TableName, plan_of
from sa_tablecache.changes import (
    MOST_RANGES,
    UNKNOWN,
    UNREAD,
    VIEW,
    ChangeSet,
    Concern,
    GroupMark,
    Mark,
    RangeMark,
    Written,
    marks_of,
)
from sa_tablecache.scores import MAX, MIN, Interval
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


# -- change feeds -------------------------------------------------------------------------------


def told(changes: ChangeSet, **concerns: Concern) -> set[object]:
    """Return the marks where a change feed tells which rows changed."""
    known = {**CONCERNS, **{(None, name): concern for name, concern in concerns.items()}}
    return set(marks_of(PLAN.tables, known, changes, unread=True))


def test_unknown_rows_that_a_feed_tells_of_are_unread() -> None:
    """What marks a view for want of rows is left to the feed, if rows could be followed at all."""
    anywhere, everything, both = ChangeSet(), ChangeSet(), ChangeSet()
    anywhere.add_table(PLANES)
    everything.add_everything()
    both.add_rows(PLANES, [("N1",)])
    both.add_table(FLIGHTS)
    for changes in (anywhere, everything, both):
        assert told(changes) == {UNREAD}
    lost = replace(CONCERNS[PLANES], followed=False)
    assert told(anywhere, planes=lost) == {VIEW}
    assert told(everything, planes=lost) == {UNREAD}
    rows = ChangeSet()
    rows.add_rows(PLANES, [("N1",)])
    assert told(rows) == {Mark(PLANES, ("N1",))}
    elsewhere = ChangeSet()
    elsewhere.add_table(ELSEWHERE)
    assert not told(elsewhere)


def test_ranges_mark_an_interval_of_the_index_that_they_lead() -> None:
    """A range of a leading score marks an interval; one of another column, the view."""
    interval = Interval((1, MIN), (2, MAX))
    leading = replace(
        CONCERNS[FLIGHTS],
        scores=(("hour", "by_hour"),),
        interval=lambda *asked: interval if asked == ("by_hour", 1, 2) else None,
    )
    for ranges, expected in (
        ({"hour": (1, 2)}, RangeMark("by_hour", interval)),
        ({"delay": (1, 2), "hour": (1, 2)}, RangeMark("by_hour", interval)),
        ({"hour": (1, 3)}, VIEW),
        ({"delay": (1, 2)}, VIEW),
        ({}, VIEW),
    ):
        changes = ChangeSet()
        changes.add_ranges(FLIGHTS, ranges)
        assert changes
        assert changes.touches([FLIGHTS])
        assert changes.sets_off(FLIGHTS, None)
        merged = ChangeSet()
        merged.update(changes)
        for one in (changes, merged):
            assert set(marks_of(PLAN.tables, {**CONCERNS, FLIGHTS: leading}, one)) == {expected}
    changes = ChangeSet()
    for _ in range(MOST_RANGES + 1):
        changes.add_ranges(FLIGHTS, {"hour": (1, 2)})
    assert changes.tables == {FLIGHTS}
    assert not changes.ranges


def test_what_a_feed_logged_is_true_of_tables_with_triggers() -> None:
    """What a row was before is what was logged, even where UPDATEs change more than they name."""
    carrier = LoggedGroups()
    concern = replace(CONCERNS[FLIGHTS], opaque=True, by_key=False, paths=(carrier,))  # type: ignore[arg-type]
    row = ({"carrier": "AA"},)
    for written, expected in (
        (Written(before=row, logged=True), GroupMark(("carrier",), ("AA",))),
        (Written(before=row), VIEW),
    ):
        changes = ChangeSet()
        changes.add_rows(FLIGHTS, [(1,)], written)
        assert set(marks_of(PLAN.tables, {**CONCERNS, FLIGHTS: concern}, changes)) == {expected}


class LoggedGroups:
    """A path to groups by the carrier, as marks_of() uses it."""

    names = ("carrier",)
    follows_from_key = False

    def before(self, columns: object, rows: tuple[dict[str, str], ...] | None) -> object:
        """Return the groups of rows."""
        return None if rows is None else [(row["carrier"],) for row in rows]
