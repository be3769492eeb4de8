"""From a changed row to the groups that it touches: which columns lead there, what is marked."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    DateTime,
    Integer,
    MetaData,
    String,
    Table,
    and_,
    create_engine,
    func,
    or_,
    select,
)

from sa_tablecache.analysis import TableName, ViewPlan, plan_of, rendered_columns
from sa_tablecache.catalog import Catalog
from sa_tablecache.changes import VIEW, ChangeSet, Concern, GroupMark, Mark, Written, marks_of
from sa_tablecache.comparison import comparison
from sa_tablecache.groups import GroupPath
from sa_tablecache.layout import Layout
from tests.unit.test_analysis import plan
from tests.zoo import Airport, BusyRoutes, CarrierTotals, Contractor, InnerBoard, Teams

metadata = MetaData()
p = Table(
    "p",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("x", Integer),
    Column("name", String),
    Column("at", DateTime),
)
c = Table(
    "c",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("p_id", Integer),
    Column("x", Integer),
)
d = Table(
    "d",
    metadata,
    Column("c_id", Integer, primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("x", Integer),
)
N = func.count().label("n")
P: TableName = (None, "p")
C: TableName = (None, "c")
D: TableName = (None, "d")
LEFT = p.outerjoin(c, c.c.p_id == p.c.id)


def paths(found: ViewPlan) -> dict[str, list[Any]]:
    """For each table, the columns that lead from a row of it to groups, by group column.

    Those that are NULL where the row is not joined any more are in brackets.
    """
    result: dict[str, list[Any]] = {}
    for path in found.paths:
        ways = zip(path.names, path.columns, path.vanishing, strict=True)
        result.setdefault(path.table[1], []).append(
            {f"({name})" if gone else name: column.key for name, column, gone in ways}
        )
    return result


# -- which columns lead to groups --------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (select(p.c.x, N).group_by(p.c.x), {"p": [{"x": "x"}]}),
        (select(p.c.id, p.c.x, N).group_by(p.c.id, p.c.x), {"p": [{"id": "id"}]}),
        (select(p.c.x, p.c.name, N).group_by(p.c.x, p.c.name), {"p": [{"x": "x", "name": "name"}]}),
        (
            select(p.c.id, N).select_from(LEFT).group_by(p.c.id),
            {"p": [{"id": "id"}], "c": [{"id": "p_id"}]},
        ),
        (
            select(c.c.p_id, N).select_from(LEFT).group_by(c.c.p_id),
            {"c": [{"(p_id)": "p_id"}]},
        ),
        (
            select(c.c.p_id, N).join(p, c.c.p_id == p.c.id).group_by(c.c.p_id),
            {"c": [{"p_id": "p_id"}], "p": [{"p_id": "id"}]},
        ),
        (
            select(p.c.id, c.c.x, N).select_from(LEFT).group_by(p.c.id, c.c.x),
            {"p": [{"id": "id"}], "c": [{"id": "p_id", "(x)": "x"}]},
        ),
        (
            select(p.c.id, c.c.x, N)
            .select_from(p.outerjoin(c.join(d, d.c.c_id == c.c.id), c.c.p_id == p.c.id))
            .group_by(p.c.id, c.c.x),
            {"p": [{"id": "id"}], "c": [{"id": "p_id", "(x)": "x"}]},
        ),
        (
            select(p.c.id, c.c.x, N)
            .select_from(p.outerjoin(c.outerjoin(d, d.c.x == c.c.x), d.c.line == p.c.id))
            .group_by(p.c.id, c.c.x),
            {"p": [{"id": "id"}], "c": [{"(x)": "x"}], "d": [{"id": "line"}]},
        ),
        (
            select(p.c.id, N).where(p.c.id == c.c.p_id, c.c.x > 1).group_by(p.c.id),
            {"p": [{"id": "id"}], "c": [{"id": "p_id"}]},
        ),
        (
            select(d.c.c_id, N).join(c, d.c.c_id == c.c.id).group_by(d.c.c_id),
            {"d": [{"c_id": "c_id"}], "c": [{"c_id": "id"}]},
        ),
        (
            select(p.c.id, N).select_from(p.join(c, or_(c.c.p_id == p.c.id))).group_by(p.c.id),
            {"p": [{"id": "id"}], "c": [{"id": "p_id"}]},
        ),
        (
            select(p.c.x, N).group_by(p.c.x).having(func.count() > 1),
            {"p": [{"x": "x"}]},
        ),
    ],
    ids=lambda value: " ".join(str(value).split())[:90],
)
def test_a_row_leads_to_the_groups_with_its_values(statement: Any, expected: Any) -> None:
    """By its own columns and by those that joins equate with them; its key is enough, if it is."""
    found = plan(statement)
    assert paths(found) == expected
    assert set(found.coarse) == {table for table in found.tables if table[1] not in expected}
    assert all("no group key follows from a row of" in why for why in found.coarse.values())
    assert found.grouped
    assert found.anchor is None


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (select((p.c.x + 1).label("y"), N).group_by(p.c.x + 1), "a group that is no plain column"),
        (select(p.c.x, N).group_by(p.c.x).limit(3), "LIMIT"),
        (select(p.c.x, N).group_by(p.c.x).distinct(), "DISTINCT"),
        (select(func.count().label("n")).select_from(p), "aggregate"),
        (
            select(p.c.x, func.row_number().over(order_by=p.c.x).label("r")).group_by(p.c.x),
            "window function",
        ),
        (select(p.c.x, N).where(p.c.id.in_(select(c.c.p_id))).group_by(p.c.x), "subquery"),
        (
            select(p.c.x, N).group_by(p.c.x).having(func.count() > select(N).scalar_subquery()),
            "subquery",
        ),
        (
            select(p.c.x, N).join(c, c.c.p_id == p.c.id, full=True).group_by(p.c.x),
            "FULL JOIN",
        ),
        (
            select(p.c.x, N)
            .join(select(c.c.p_id).group_by(c.c.p_id).subquery("s"), p.c.x > 1)
            .group_by(p.c.x),
            "GROUP BY",
        ),
    ],
    ids=lambda value: " ".join(str(value).split())[:60],
)
def test_groups_that_nothing_leads_to(statement: Any, reason: str) -> None:
    """Where a group is not a plain value of a joined row, any change marks the whole view."""
    found = plan(statement, __primary_key__=(next(iter(statement.selected_columns.keys())),))
    assert set(found.coarse) == found.tables
    assert all(reason in why for why in found.coarse.values())
    assert not found.paths
    assert not found.grouped


def test_a_group_that_is_not_shown_leads_nowhere() -> None:
    """Stored groups are found by columns of the view's key."""
    found = plan(select(func.max(p.c.id).label("id"), N).group_by(p.c.x), __primary_key__=("id",))
    assert paths(found) == {}
    assert set(found.coarse) == {P}
    shown = plan(
        select(p.c.x, func.max(p.c.id).label("id")).group_by(p.c.x), __primary_key__=("id",)
    )
    assert paths(shown) == {}


# -- subqueries that group ---------------------------------------------------------------------

TOTALS = select(c.c.p_id, N).group_by(c.c.p_id)


@pytest.mark.parametrize(
    "make", [lambda s: s.subquery(), lambda s: s.cte(), lambda s: s.cte().alias()]
)
def test_a_subquery_that_groups_is_a_table_whose_key_is_its_groups(
    make: Callable[[Any], Any],
) -> None:
    """It has a row for each group, which the columns of the outer join lead from to the anchor."""
    totals = make(TOTALS)
    found = plan(select(p.c.id, totals.c.n).outerjoin(totals, totals.c.p_id == p.c.id))
    assert found.key == ("id",)
    assert found.key_is_derived
    assert str(found.anchor) == "p"
    assert found.one_row_per_anchor
    assert found.coarse == {}
    [path] = found.paths
    assert (path.table, path.stored, path.names) == (C, ("id",), ("_key1_p_id",))


def test_a_row_inside_leads_to_several_rows_of_a_subquery() -> None:
    """If it determines only some of the groups' columns, all with these values are touched."""
    totals = (
        select(c.c.p_id, d.c.line, N)
        .join(d, d.c.c_id == c.c.id)
        .group_by(c.c.p_id, d.c.line)
        .subquery()
    )
    found = plan(select(p.c.id, totals.c.line, totals.c.n).join(totals, totals.c.p_id == p.c.id))
    assert found.key == ("id", "line")
    assert not found.one_row_per_anchor
    assert paths(found) == {"c": [{"_key1_p_id": "p_id"}], "d": [{"_key1_line": "line"}]}


@pytest.mark.parametrize(
    "statement",
    [
        select(c.c.p_id, N).group_by(c.c.p_id).limit(2),
        select(c.c.p_id).distinct(),
        select(func.max(c.c.p_id).label("p_id"), N).group_by(c.c.x),
        select((c.c.p_id + 1).label("p_id"), N).group_by(c.c.p_id + 1),
        select(c.c.p_id, c.c.x),
        select(func.max(c.c.p_id).label("p_id")),
        TOTALS.where(c.c.x.in_(select(d.c.x))),
    ],
    ids=lambda value: " ".join(str(value).split())[:60],
)
def test_other_subqueries_are_coarse(statement: Any) -> None:
    """Any change of any table marks the whole view where a subquery is more than its groups."""
    sub = statement.subquery()
    found = plan(
        select(p.c.id, sub.c.p_id).outerjoin(sub, sub.c.p_id == p.c.id), __primary_key__=("id",)
    )
    assert set(found.coarse) == found.tables
    assert all("subquery" in why for why in found.coarse.values())


def test_text_that_a_subquery_computes_does_not_tell_rows_apart() -> None:
    """Nobody knows its collation, so that what it equals need not be the same."""
    names = select(p.c.x, func.max(p.c.name).label("top")).group_by(p.c.x).subquery()
    joined = select(p.c.id, names.c.x.label("of")).join(names, names.c.top == p.c.name)
    found = plan(joined)
    assert set(found.coarse) == {P}
    assert "a join by text that a subquery computes" in found.coarse[P]
    assert not found.key_is_derived


def test_a_condition_on_a_subquery_makes_its_tables_coarse() -> None:
    """A NULL-extended row that a condition lets through may take the place of one it drops."""
    totals = TOTALS.subquery()
    joined = select(p.c.id, totals.c.n).outerjoin(totals, totals.c.p_id == p.c.id)
    found = plan(joined.where(func.coalesce(totals.c.n, 0) < 2))
    assert set(found.coarse) == {C}
    assert "nullable side" in found.coarse[C]
    assert not plan(joined.where(totals.c.p_id < 2)).coarse


def test_a_row_without_its_leaf_has_what_stays_and_what_vanishes() -> None:
    """Of a NULL-extended row the left side stays, the right side is NULL, the rest is unknown."""
    found = plan(
        select(p.c.id, c.c.id.label("c_id"), d.c.c_id.label("d_c"), d.c.line).select_from(
            p.outerjoin(c, c.c.p_id == p.c.id).outerjoin(d, d.c.c_id == c.c.id)
        )
    )
    assert found.extensions[1] == ({"id", "_key0_id"}, {"c_id", "_key1_id"})
    assert found.extensions[2][0] == {"id", "_key0_id", "c_id", "_key1_id"}
    assert found.extensions[2][1] == {"d_c", "line", "_key2_c_id", "_key2_line"}
    assert 0 not in found.extensions


# -- what a change marks -----------------------------------------------------------------------


def concern(view: Any, table: str) -> Concern:
    """Return what a view has to do with a table, on SQLite."""
    layout = Layout(plan_of(view), create_engine("sqlite://").dialect, Catalog(), {})
    return layout.concerns[None, table]


def path(*columns: Any, vanishing: tuple[bool, ...] = ()) -> GroupPath:
    """Return a path by columns of one table, for PostgreSQL."""
    dialect: Any = type("Dialect", (), {"name": "postgresql"})()
    return GroupPath(
        (None, columns[0].table.name),
        tuple(columns[0].table.primary_key.columns),
        columns,
        names=tuple(f"g_{column.key}" for column in columns),
        stored=tuple(f"g_{column.key}" for column in columns),
        leaf=None,
        vanishing=vanishing or (False,) * len(columns),
        comparisons=tuple(comparison(column.type, dialect, None) for column in columns),
    )


def marks(written: Written, *paths: GroupPath, **options: Any) -> Any:
    """Return what a change of the row 7 of a table marks, by some paths."""
    table = paths[0].table
    keys = frozenset(column.key for column in (p if table == P else c).columns)
    changes = ChangeSet()
    changes.add_rows(table, [(7,)], written)
    how = Concern(keys, keys, paths=paths, **options)
    return marks_of(frozenset({table}), {table: how}, changes)


def test_the_groups_of_before_and_the_row_are_marked() -> None:
    """What the row was leads to the groups that it has left, the row to those that it is in now."""
    found = marks(Written(None, ({"id": 7, "p_id": 1, "x": None},)), path(c.c.p_id, c.c.x))
    assert found == {GroupMark(("g_p_id", "g_x"), (1, None)), Mark(C, (7,))}
    assert all(mark.moves for mark in found)


def test_an_insert_and_an_update_of_other_columns_leave_no_group() -> None:
    """Then the row itself leads to all groups that it touches."""
    assert marks(Written(None, ()), path(c.c.p_id)) == {Mark(C, (7,))}
    assert marks(Written(frozenset({"x"})), path(c.c.p_id)) == {Mark(C, (7,))}


@pytest.mark.parametrize(
    "written",
    [
        Written(),
        Written(frozenset({"p_id"})),
        Written(None, ({"id": 7, "x": 1},)),
        Written(None, ({"id": 7, "p_id": "1"},)),
        Written(None, ({"id": 7, "p_id": 1}, {"id": 7})),
    ],
)
def test_an_unknown_group_of_before_marks_the_view(written: Written) -> None:
    """So does a value of another type than the column's, which may compare differently."""
    assert marks(written, path(c.c.p_id)) == {VIEW}


def test_what_the_database_changes_by_itself_is_not_known() -> None:
    """Generated columns and triggers change what no statement names."""
    assert marks(Written(frozenset({"x"})), path(c.c.p_id), opaque=True) == {VIEW}
    before = Written(None, ({"id": 7, "p_id": 1},))
    assert marks(before, path(c.c.p_id), opaque=True) == {VIEW}
    assert marks(Written(None, ()), path(c.c.p_id), opaque=True) == {Mark(C, (7,))}


def test_a_key_leads_to_its_groups_without_a_query() -> None:
    """The groups of a primary key are the same before and after, whatever was written."""
    found = marks(Written(), path(p.c.id), by_key=False)
    assert found == {GroupMark(("g_id",), (7,))}


def test_where_an_outer_join_loses_the_row_the_group_of_null_is_touched() -> None:
    """The row that takes its place has NULL for what the outer join extends."""
    way = path(c.c.p_id, c.c.x, vanishing=(False, True))
    found = marks(Written(None, ({"p_id": 1, "x": 5},)), way)
    assert found == {
        GroupMark(("g_p_id", "g_x"), (1, 5)),
        GroupMark(("g_p_id", "g_x"), (1, None)),
        Mark(C, (7,)),
    }


def test_columns_that_do_not_compare_are_left_out() -> None:
    """What remains leads to more groups, all of which are read again."""
    way = path(p.c.x, p.c.name)
    less = way.only([way.comparisons[0], None])
    assert (less.names, less.values({"x": 3})) == (("g_x",), [(3,)])
    assert replace(way, comparisons=()).only([None, None]).names == ()


def test_a_table_that_occurs_twice_touches_groups_in_both_ways() -> None:
    """A person is a member of one team and the boss of another."""
    how = concern(Teams, "person")
    assert [way.follows_from_key for way in how.paths] == [True, False]
    changes = ChangeSet()
    changes.add_rows((None, "person"), [(3,)], Written(None, ({"id": 3, "boss_id": 8},)))
    found = marks_of(frozenset({(None, "person")}), {(None, "person"): how}, changes)
    assert found == {
        GroupMark(("id",), (3,)), GroupMark(("id",), (8,)), Mark((None, "person"), (3,)),
    }  # fmt: skip


def test_groups_of_text_are_found_where_it_compares_by_bytes() -> None:
    """Text of which nothing is known leads to no group, and the log and ``check()`` say so."""
    layout = Layout(plan_of(BusyRoutes), create_engine("sqlite://").dialect, Catalog(), {})
    assert set(layout.coarse) == {(None, "flights"), (None, "airlines")}
    assert concern(CarrierTotals, "flights").followed is False


# -- which columns a statement uses ------------------------------------------------------------


def test_columns_inside_of_orm_subqueries_and_views_are_used() -> None:
    """The criterion of a subclass appears when it is compiled, a view's select when rendered."""
    criterion = Airport.name.in_(select(Contractor.name))
    used = rendered_columns(select(Airport.faa).where(criterion))
    assert used[None, "person"] == {"name", "kind"}
    board = select(Airport.faa).where(Airport.name.in_(select(InnerBoard.carrier)))
    assert rendered_columns(board)[None, "airlines"] == {"carrier", "name"}
    whole = rendered_columns(select(func.row_to_json(p.alias().table_valued())))
    assert whole[P] == {"id", "x", "name", "at"}
    both = select(p.c.id).where(and_(p.c.x > 1, c.c.p_id == p.c.id))
    assert rendered_columns(both) == {P: {"id", "x"}, C: {"p_id"}}
