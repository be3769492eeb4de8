"""From a select to a plan: keys, anchors, lineage, coarse tables, and what is refused."""

from typing import Any

import pytest
from sqlalchemy import (
    Boolean,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    and_,
    bindparam,
    cast,
    exists,
    func,
    insert,
    lateral,
    literal_column,
    or_,
    select,
    tablesample,
    text,
    type_coerce,
    union,
    union_all,
)
from sqlalchemy.orm import aliased, joinedload

from sa_tablecache import CachedView, ScoreIndex, ViewDefinitionError
from sa_tablecache.analysis import ViewPlan, plan_of, rendered_tables, table_label
from tests import zoo
from tests.zoo import KINDS, Airline, Airport, Flight, Order, Person, Plane, Weather

metadata = MetaData()
a = Table("a", metadata, Column("id", Integer, primary_key=True), Column("x", Integer))
b = Table(
    "b",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("a_id", ForeignKey("a.id")),
    Column("x", Integer),
    Column("code", String, unique=True, nullable=False),
    Column("maybe", String, unique=True),
    Column("p", Integer, nullable=False),
    Column("q", Integer, nullable=False),
    Column("flag", Boolean),
    Column("moment", DateTime(timezone=True)),
    UniqueConstraint("p", "q"),
)
c = Table(
    "c",
    metadata,
    Column("b_id", ForeignKey("b.id"), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("x", Integer),
)
keyless = Table("keyless", metadata, Column("x", Integer))
elsewhere = Table("a", metadata, Column("id", Integer, primary_key=True), schema="other")


def view_of(statement: Any, **namespace: Any) -> Any:
    """Declare a view."""
    return type(CachedView)("Board", (CachedView,), {"__select__": statement, **namespace})


def plan(statement: Any, **namespace: Any) -> ViewPlan:
    """The plan of a view of a select."""
    return plan_of(view_of(statement, **namespace))


# -- every kind of view ------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_view_has_a_plan(name: str) -> None:
    """Key and coarseness of every view of the zoo are as they should be."""
    kind = KINDS[name]
    found = plan_of(kind.view)
    assert set(found.key) == set(kind.key)
    assert bool(found.leaves or found.paths) is not kind.coarse
    if kind.coarse:
        assert set(found.coarse) == set(found.tables)
        assert found.anchor is None
    assert found is plan_of(kind.view)


def test_columns_of_plain_tables_make_a_view() -> None:
    """A view of a Core table needs no labels: its columns have names."""
    view = view_of(select(a.c.id, a.c.x))
    assert view.__record__(1, 2)._asdict() == {"id": 1, "x": 2}


# -- keys --------------------------------------------------------------------------------------

AB = select(a.c.id, b.c.id.label("b_id")).select_from(a)


@pytest.mark.parametrize(
    ("statement", "key"),
    [
        (select(a.c.id, a.c.x), {"id"}),
        (select(a.c.x, a.c.id), {"id"}),
        (AB.join(b, b.c.a_id == a.c.id), {"b_id"}),
        (AB.join(b, a.c.x == b.c.x), {"id", "b_id"}),
        (AB.outerjoin(b, b.c.a_id == a.c.id), {"id", "b_id"}),
        (select(b.c.id).outerjoin(a, b.c.a_id == a.c.id), {"id"}),
        (select(b.c.code, a.c.x).join(a, b.c.a_id == a.c.id), {"code"}),
        (select(b.c.p, b.c.q, b.c.x), {"p", "q"}),
        (select(c.c.b_id, c.c.line), {"b_id", "line"}),
        (select(c.c.line, c.c.x).where(c.c.b_id == 5), {"line"}),
        (select(a.c.id, b.c.code).join(b, and_(b.c.a_id == a.c.id, b.c.p == a.c.x)), {"code"}),
        (select(a.c.id).join(b, and_(b.c.p == a.c.id, b.c.q == a.c.x)), {"id"}),
        (select(a.c.id).outerjoin(b, and_(b.c.p == a.c.id, b.c.q == a.c.x)), {"id"}),
        (select(a.c.x).where(a.c.id == 1), set()),
    ],
    ids=lambda value: " ".join(
        str(sorted(value) if isinstance(value, set) else value).split()
    ).lower(),
)
def test_the_key_follows_from_keys_and_joins(statement: Any, key: set[str]) -> None:
    """It is the smallest set of selected columns that tells all rows apart."""
    if not key:
        return  # at most one row: any key does
    found = plan(statement)
    assert set(found.key) == key
    assert found.key_is_derived


@pytest.mark.parametrize(
    ("statement", "missing"),
    [
        (select(a.c.x), "a.id is missing"),
        (AB.with_only_columns(a.c.id).join(b, b.c.a_id == a.c.id), "b.id is missing"),
        (select(b.c.maybe), "b.id is missing"),
        (select(b.c.p), "b.id is missing"),
        (select(c.c.b_id), "c.line is missing"),
        (select(a.c.id, func.lower(b.c.code).label("low")).join(b, b.c.a_id == a.c.id), "b.id"),
        (select(keyless.c.x), "without primary key"),
        (select(a.c.id).join(b, b.c.a_id == a.c.id, full=True), "FULL JOIN"),
        (select(a.c.id).join(select(b.c.a_id).subquery()), "subquery in FROM"),
        (union_all(select(a.c.id), select(b.c.id)), "the same row twice"),
        (select(func.count().label("n")).select_from(a).group_by(a.c.x), "GROUP BY"),
    ],
    ids=lambda value: " ".join(str(value).split()),
)
def test_a_key_that_cannot_be_derived_is_asked_for(statement: Any, missing: str) -> None:
    """The error says what is missing, and that ``__primary_key__`` is the way out."""
    with pytest.raises(ViewDefinitionError, match=rf"(?s)view Board: .*{missing}.*__primary_key__"):
        plan(statement)


def test_a_key_that_was_given_is_taken() -> None:
    """``__primary_key__`` overrides the derived key, and is known to be the user's word."""
    found = plan(select(b.c.maybe, b.c.x), __primary_key__=("maybe",))
    assert found.key == ("maybe",)
    assert not found.key_is_derived


def test_the_key_of_sets_and_groups() -> None:
    """Rows of a set operation and of DISTINCT are all of their columns; groups are what groups."""
    assert plan(union(select(a.c.id, a.c.x), select(b.c.id, b.c.x))).key == ("id", "x")
    assert plan(select(a.c.x, a.c.id).distinct()).key == ("x", "id")
    grouped = select(a.c.x, func.count().label("n")).group_by(a.c.x)
    assert plan(grouped).key == ("x",)


def test_a_key_is_taken_from_records() -> None:
    """``key_of`` gives the value that ``session.get`` takes; ``key_tuple`` is always a tuple."""
    found = plan(select(c.c.line, c.c.b_id))
    record = found.view.__record__(1, 2)
    assert found.key_of(record) == found.key_tuple(record)
    single = plan(select(a.c.id, a.c.x))
    record = single.view.__record__(1, 2)
    assert (single.key_of(record), single.key_tuple(record)) == (1, (1,))
    assert single.key_without(("id",)) == ()


# -- leaves and anchors ------------------------------------------------------------------------


def leaves(found: ViewPlan) -> list[tuple[str, bool]]:
    """The tables of a plan, and whether they may be NULL-extended."""
    return [(str(leaf), leaf.nullable) for leaf in found.leaves]


def test_outer_joins_extend_their_right_side() -> None:
    """Everything on the right of a LEFT JOIN may be missing, a nested join as a whole."""
    every = (a.c.id, b.c.id.label("b_id"), c.c.b_id.label("of"), c.c.line)
    chain = select(*every).select_from(
        a.outerjoin(b, b.c.a_id == a.c.id).outerjoin(c, c.c.b_id == b.c.id)
    )
    assert leaves(plan(chain)) == [("a", False), ("b", True), ("c", True)]
    nested = select(*every).select_from(
        a.outerjoin(b.join(c, c.c.b_id == b.c.id), b.c.a_id == a.c.id)
    )
    assert leaves(plan(nested)) == [("a", False), ("b", True), ("c", True)]
    upwards = select(*every).select_from(
        c.join(b, c.c.b_id == b.c.id).outerjoin(a, b.c.a_id == a.c.id)
    )
    assert leaves(plan(upwards)) == [("c", False), ("b", False), ("a", True)]


def test_the_anchor_is_never_missing() -> None:
    """It is a table that no outer join leaves out; one whose key determines the row, if any."""
    up = plan(
        select(c.c.b_id, c.c.line, a.c.x)
        .join(b, c.c.b_id == b.c.id)
        .outerjoin(a, b.c.a_id == a.c.id)
    )
    assert (str(up.anchor), up.one_row_per_anchor) == ("c", True)
    down = plan(AB.outerjoin(b, b.c.a_id == a.c.id))
    assert (str(down.anchor), down.one_row_per_anchor) == ("a", False)
    many = plan(select(c.c.b_id, c.c.line).select_from(a).join(b, b.c.a_id == a.c.id).join(c))
    assert (str(many.anchor), many.one_row_per_anchor) == ("c", True)


def test_one_table_may_be_joined_more_than_once() -> None:
    """Each occurrence is a leaf of its own, with hidden columns of its own."""
    boss = aliased(Person, name="boss")
    found = plan(select(Person.id, boss.name).outerjoin(boss, Person.boss_id == boss.id))
    assert leaves(found) == [("person", False), ("person", True)]
    assert found.leaves[0].hidden != found.leaves[1].hidden
    assert found.tables == {(None, "person")}


def test_lineage_is_seen_in_columns_that_equal_it() -> None:
    """A key that a joined column shows needs no hidden value."""
    found = plan_of(zoo.OuterBoard)
    visible = {str(leaf): leaf.visible for leaf in found.leaves}
    assert visible == {"flights": ("id",), "airlines": None, "planes": ("tailnum",)}
    inner = {str(leaf): leaf.visible for leaf in plan_of(zoo.InnerBoard).leaves}
    assert inner == {"flights": ("id",), "airlines": ("carrier",)}


def test_a_nullable_column_does_not_show_the_key_of_the_preserved_side() -> None:
    """``b.a_id`` equals ``a.id`` only where b is there: it does not show which a a row has."""
    statement = (
        select(b.c.id.label("b_id"), b.c.a_id, a.c.x)
        .select_from(a)
        .outerjoin(b, b.c.a_id == a.c.id)
    )
    found = plan(statement, __primary_key__=("b_id",))
    [preserved, extended] = found.leaves
    assert preserved.visible is None
    assert extended.visible == ("b_id",)


def test_hidden_columns_are_rendered_and_not_selected() -> None:
    """The rendered view has the keys of all its tables and its index expressions."""
    found = plan(AB.join(b, b.c.a_id == a.c.id), by_sum=ScoreIndex(a.c.x + b.c.x))
    names = [column.name for column in found.hidden]
    assert names[0] == "_score_by_sum"
    assert len(names) == 3
    rendered = str(select(found.view))
    assert all(name in rendered for name in names)
    outer = rendered.partition("FROM")[0]
    assert not any(name in outer for name in names)
    assert found.hidden_among(("id", *names)) == names
    assert [column.name for column in found.columns] == ["id", "b_id"]
    assert found.column("_score_by_sum").name == "_score_by_sum"


def test_columns_know_whether_they_may_be_null() -> None:
    """NULL may come from the column itself, from an outer join, or from an expression."""
    found = plan(
        select(a.c.id, a.c.x, b.c.id.label("b_id"), (b.c.p + 1).label("sum")).outerjoin(
            b, b.c.a_id == a.c.id
        )
    )
    assert {column.name: column.nullable for column in found.columns} == {
        "id": False, "x": True, "b_id": True, "sum": True,
    }  # fmt: skip


# -- coarse tables -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (select(a.c.id).distinct(), "DISTINCT"),
        (select(a.c.id).limit(5), "LIMIT"),
        (select(a.c.id).offset(5), "LIMIT"),
        (select((a.c.x + 1).label("y"), func.count().label("n")).group_by(a.c.x + 1), "GROUP BY"),
        (union(select(a.c.id), select(b.c.id)), "set operation"),
        (select(a.c.id).where(exists().where(b.c.a_id == a.c.id)), "EXISTS"),
        (select(a.c.id).where(a.c.id.in_(select(b.c.a_id))), "subquery"),
        (select(a.c.id, func.row_number().over(order_by=a.c.x).label("n")), "window function"),
        (select(a.c.id, select(func.max(b.c.x)).scalar_subquery().label("m")), "subquery"),
    ],
    ids=lambda value: " ".join(str(value).split())[:60],
)
def test_what_has_no_lineage_is_coarse(statement: Any, reason: str) -> None:
    """Where a row of the view is not one row of a join, any change marks all of it."""
    found = plan(statement)
    assert set(found.coarse) == set(found.tables)
    assert all(reason in why for why in found.coarse.values())
    assert not found.leaves


def test_where_on_the_nullable_side_makes_that_side_coarse() -> None:
    """A row that such a criterion drops leaves no trace that could be followed."""
    found = plan(select(a.c.id).outerjoin(b, b.c.id == a.c.x).where(b.c.id.is_(None)))
    assert set(found.coarse) == {(None, "b")}
    assert "nullable side" in found.coarse[(None, "b")]
    preserved = plan(select(a.c.id).outerjoin(b, b.c.id == a.c.x).where(a.c.x > 1))
    assert not preserved.coarse


def test_an_inner_join_over_a_nullable_table_makes_it_coarse() -> None:
    """An inner join that uses a NULL-extended table may drop rows just as a WHERE does."""
    statement = (
        select(a.c.id, c.c.b_id, c.c.line)
        .select_from(a)
        .outerjoin(b, b.c.a_id == a.c.id)
        .join(c, c.c.x == func.coalesce(b.c.x, 0))
    )
    found = plan(statement, __primary_key__=("id", "b_id", "line"))
    assert (None, "b") in found.coarse


def test_plain_joins_are_followed() -> None:
    """No table of a chain of joins is coarse, whatever stands in ON."""
    found = plan(
        AB.outerjoin(b, and_(b.c.a_id == a.c.id, or_(b.c.flag, b.c.x > a.c.x))).where(a.c.x == 1)
    )
    assert found.coarse == {}
    assert found.tables == {(None, "a"), (None, "b")}


def test_tables_are_told_apart_by_schema() -> None:
    """Two tables of one name in two schemas are two tables."""
    found = plan(
        select(a.c.id, elsewhere.c.id.label("other")).join(elsewhere, elsewhere.c.id == a.c.x)
    )
    assert found.tables == {(None, "a"), ("other", "a")}
    assert sorted(map(table_label, found.tables)) == ["a", "other.a"]


def test_every_table_that_is_rendered_is_read() -> None:
    """Tables inside subqueries, CTEs and other views count."""
    cte = select(b.c.a_id).cte()
    statement = select(a.c.id).where(
        a.c.id.in_(select(c.c.b_id)), exists().where(cte.c.a_id == a.c.id)
    )
    assert rendered_tables(statement) == {(None, "a"), (None, "b"), (None, "c")}
    assert rendered_tables(select(zoo.InnerBoard)) == {(None, "flights"), (None, "airlines")}


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (select(a.c.id, func.now().label("t")), r"now\(\) in its select depends on the time"),
        (select(a.c.id).where(b.c.moment < func.now()), r"now\(\)"),
        (select(a.c.id, func.random().label("r")), r"random\(\)"),
        (select(a.c.id, func.to_char(a.c.x, "9").label("r")), r"to_char\(\)"),
        (select(a.c.id, func.frob(a.c.x).label("f")), '__immutable_functions__ = ."frob"'),
        (select(a.c.id).where(text("x > 1")), r"text\('x > 1'\) hides"),
        (select(a.c.id, literal_column("x + 1").label("y")), r"literal_column\('x \+ 1'\)"),
        (select(b.c.id, cast(b.c.moment, Date).label("day")), r"func.timezone\('UTC', column\)"),
        (select(b.c.id, func.extract("hour", b.c.moment).label("h")), "EXTRACT of a timestamp"),
        (select(a.c.id).where(a.c.x == bindparam("x")), r"bindparam\('x'\).* has no value"),
        (select(a.c.id).with_for_update(), "FOR UPDATE"),
        (select(tablesample(a, 10).c.id), "TABLESAMPLE"),
        (select(insert(a).values(id=1).returning(a.c.id).cte().c.id), "its select writes"),
        (text("SELECT id FROM a").columns(a.c.id), r"its select is text\(\)"),
        (select(func.coalesce(1, 2).label("one")), "reads no table"),
    ],
    ids=lambda value: " ".join(str(value).split())[:60],
)
def test_what_cannot_be_right_is_refused(statement: Any, message: str) -> None:
    """The error names the view, the culprit and the way out."""
    with pytest.raises(ViewDefinitionError, match=rf"(?s)view Board: .*{message}"):
        plan(statement, __primary_key__=(next(iter(statement.selected_columns.keys())),))


def test_functions_can_be_declared_immutable() -> None:
    """Who knows a function to depend on its arguments alone can say so."""
    statement = select(a.c.id, func.frob(a.c.x).label("f"))
    found = plan(statement, __immutable_functions__=("frob",))
    assert found.functions == {"frob"}


@pytest.mark.parametrize(
    ("index", "statement", "message"),
    [
        (ScoreIndex(func.random()), select(a.c.id), r"random\(\) in index by"),
        (ScoreIndex(b.c.x), select(a.c.id), "an index expression uses a table"),
        (ScoreIndex(a.c.x + 1), select(a.c.id).distinct(), "index by is an expression"),
        (ScoreIndex(a.c.x + 1), union(select(a.c.id), select(b.c.id)), "index by is an expression"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused(
    index: ScoreIndex, statement: Any, message: str
) -> None:
    """Index expressions obey the rules of the select, over its tables."""
    with pytest.raises(ViewDefinitionError, match=message):
        plan(statement, by=index)


def test_loader_options_change_nothing() -> None:
    """A record has no relationships to load: eager joins stay out of the view."""
    found = plan(select(Order).options(joinedload(Order.items)))
    assert (found.key, found.tables) == (("id",), {(None, "orders")})


def test_a_refused_view_is_refused_again() -> None:
    """The error is the same each time the view is used."""
    view = view_of(select(a.c.x))
    for _ in range(2):
        with pytest.raises(ViewDefinitionError, match="id is missing"):
            plan_of(view)


def test_a_view_renders_with_and_without_an_alias() -> None:
    """The view stands in a query as its select, under its name or another."""
    view = view_of(select(a.c.id, a.c.x))
    other = view.__table__.alias("other")
    rendered = " ".join(str(select(view).join(other, other.c.id == view.x)).split())
    assert rendered.count("FROM a") == 2
    assert f"AS {view.__table__.name}" in rendered
    assert "AS other" in rendered


def test_a_type_can_be_given_to_an_index_expression() -> None:
    """``type_coerce`` says of which type a score is."""
    found = plan(select(a.c.id), by=ScoreIndex(type_coerce(func.abs(a.c.x), Integer)))
    assert isinstance(found.column("_score_by").clause.type, Integer)


def test_lateral_joins_have_no_lineage() -> None:
    """A lateral subquery is a subquery: any change marks the view."""
    latest = lateral(select(Weather.temp).where(Weather.origin == Airport.faa).limit(1))
    found = plan(
        select(Airport.faa, latest.c.temp).join(latest, latest.c.temp > 0),
        __primary_key__=("faa",),
    )
    assert set(found.coarse) == found.tables == {(None, "airports"), (None, "weather")}


def test_plans_are_the_same_however_joins_are_written() -> None:
    """A join along a relationship is the join that it stands for."""
    by_hand = plan(
        select(Flight.id, Airline.name, Plane.model)
        .join(Airline, Flight.carrier == Airline.carrier)
        .outerjoin(Plane, Flight.tailnum == Plane.tailnum)
    )
    along = plan(
        select(Flight.id, Airline.name, Plane.model).join(Flight.airline).outerjoin(Flight.plane)
    )
    assert (by_hand.key, leaves(by_hand)) == (along.key, leaves(along))
    assert str(by_hand.anchor) == str(along.anchor) == "flights"
