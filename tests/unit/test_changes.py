"""What a transaction wrote, and what of a view that marks."""

import pytest

from sa_tablecache import changes as changes_module
from sa_tablecache.analysis import TableName, plan_of
from sa_tablecache.changes import ChangeSet, Marks, marks_of
from tests.zoo import FlownPlanes, OuterBoard

FLIGHTS: TableName = (None, "flights")
PLANES: TableName = (None, "planes")
AIRLINES: TableName = (None, "airlines")
ELSEWHERE: TableName = ("archive", "planes")
PLAN = plan_of(OuterBoard)
FOLLOWED = frozenset({FLIGHTS, PLANES, AIRLINES})


def test_rows_of_a_followed_table_mark_rows() -> None:
    """A row whose records can be found marks those, and no more."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",), ("N2",)])
    changes.add_rows(FLIGHTS, [(7,)])
    marks = marks_of(PLAN.tables, changes, FOLLOWED)
    assert marks == Marks(False, frozenset({(PLANES, ("N1",)), (PLANES, ("N2",)), (FLIGHTS, (7,))}))
    assert marks


def test_other_tables_mark_nothing() -> None:
    """A table that the view does not read marks nothing; its schema counts."""
    changes = ChangeSet()
    changes.add_rows(ELSEWHERE, [("N1",)])
    changes.add_table((None, "airports"))
    assert changes
    assert not changes.touches(PLAN.tables)
    assert not marks_of(PLAN.tables, changes, FOLLOWED)


def test_unknown_rows_mark_the_view() -> None:
    """A table of which any row may have changed marks the view, and so does everything."""
    table, everything = ChangeSet(), ChangeSet()
    table.add_table(AIRLINES)
    everything.add_everything()
    for changes in (table, everything):
        assert changes.touches(PLAN.tables)
        assert marks_of(PLAN.tables, changes, FOLLOWED) == Marks(True)


def test_rows_that_cannot_be_followed_mark_the_view() -> None:
    """Known rows are of no use where nothing leads from them to records."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",)])
    assert marks_of(PLAN.tables, changes, FOLLOWED - {PLANES}) == Marks(True)
    assert marks_of(plan_of(FlownPlanes).tables, changes, frozenset()) == Marks(True)


def test_a_table_swallows_its_rows() -> None:
    """Once any row of a table may have changed, single rows say nothing more."""
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",)])
    changes.add_table(PLANES)
    changes.add_rows(PLANES, [("N2",)])
    assert changes.tables == {PLANES}
    assert not changes.rows


def test_too_many_rows_are_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond some number of rows it costs less to read the view again."""
    monkeypatch.setattr(changes_module, "MOST_KEYS", 3)
    changes = ChangeSet()
    changes.add_rows(PLANES, [("N1",), ("N2",)])
    changes.add_rows(PLANES, [("N2",), ("N3",)])
    assert changes.rows[PLANES] == {("N1",), ("N2",), ("N3",)}
    changes.add_rows(PLANES, [("N4",)])
    assert changes.tables == {PLANES}


def test_change_sets_add_up() -> None:
    """What two sets know is known by their union, the less exact of both."""
    one, other = ChangeSet(), ChangeSet()
    one.add_rows(PLANES, [("N1",)])
    one.add_rows(FLIGHTS, [(1,)])
    other.add_rows(PLANES, [("N2",)])
    other.add_table(FLIGHTS)
    one.update(other)
    assert one.rows == {PLANES: {("N1",), ("N2",)}}
    assert one.tables == {FLIGHTS}
    assert not one.everything
    other.add_everything()
    one.update(other)
    assert one.everything
    assert one.touches([AIRLINES])


def test_no_change_is_false() -> None:
    """An empty set of changes marks nothing."""
    assert not ChangeSet()
    assert not ChangeSet().touches(PLAN.tables)
    assert not marks_of(PLAN.tables, ChangeSet(), FOLLOWED)
