"""Conditions mean in Python what they mean in SQL: SQLite itself is asked, NULLs and all."""

import itertools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    and_,
    bindparam,
    create_engine,
    false,
    func,
    literal,
    not_,
    null,
    or_,
    select,
    true,
    tuple_,
)

from sa_tablecache import criteria
from sa_tablecache.comparison import Comparison, Inexact
from sa_tablecache.criteria import And, Compare, Const, IsNull, Or, Reader

VALUES = [None, 0, 1, 2]
FLAGS = [None, False, True]

table = Table(
    "t",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("a", Integer),
    Column("b", Integer),
    Column("flag", Boolean),
)
c = table.c
ROWS = [
    SimpleNamespace(id=number, a=a, b=b, flag=flag)
    for number, (a, b, flag) in enumerate(itertools.product(VALUES, VALUES, FLAGS))
]
INTEGER = Comparison(True, True, (int,))
COMPARISONS = {
    "id": INTEGER,
    "a": INTEGER,
    "b": INTEGER,
    "flag": Comparison(True, False, (bool,)),
}


@pytest.fixture(scope="module")
def database() -> Iterator[Connection]:
    """An SQLite database with every combination of values and NULLs."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        table.create(connection)
        connection.execute(table.insert(), [vars(row) for row in ROWS])
        yield connection
    engine.dispose()


def read(condition: Any) -> tuple[criteria.Node, list[Any]]:
    """Read a condition into a node and its parameters."""
    parameters: list[Any] = []

    def position(parameter: Any) -> int:
        parameters.append(parameter)
        return len(parameters) - 1

    def resolve(element: Any) -> str | None:
        return element.name if getattr(element, "table", None) is table else None

    node = Reader(resolve, position).read(condition)
    return node, parameters


def evaluated(condition: Any, comparisons: dict[str, Comparison] = COMPARISONS) -> list[int]:
    """The rows for which Python says that a condition is true."""
    node, parameters = read(condition)
    bound: list[Any] = [False] * len(parameters)
    raw = [parameter.effective_value for parameter in parameters]
    criteria.bind(node, raw, bound, comparisons, [parameter.type for parameter in parameters])
    source = criteria.predicate_source(node, bound, comparisons, lambda name: name != "id")
    names = ", ".join(["r", *(f"p{at}" for at in range(len(bound)))])
    keep: Callable[..., bool] = eval(f"lambda {names}: {source}")
    return [row.id for row in ROWS if keep(row, *bound)]


def answered(connection: Connection, condition: Any) -> list[int]:
    """The rows for which the database says so."""
    return list(connection.scalars(select(c.id).where(condition).order_by(c.id)))


def bound(value: Any) -> Any:
    """A parameter, NULL included, which SQLAlchemy does not turn into IS NULL."""
    return bindparam(None, value, type_=Integer)


COMPARING: list[Callable[[Any, Any], Any]] = [
    lambda x, y: x == y,
    lambda x, y: x != y,
    lambda x, y: x < y,
    lambda x, y: x <= y,
    lambda x, y: x > y,
    lambda x, y: x >= y,
]
LISTS = [[], [1], [0, 2], [None], [1, None]]
PAIRS = [[], [(1, 1)], [(0, 2), (2, 0)], [(1, None)], [(1, None), (2, 2)]]


def leaves() -> list[Any]:
    """Every condition that is read, with every kind of parameter."""
    found: list[Any] = []
    for compare in COMPARING:
        found += [compare(c.a, bound(value)) for value in VALUES]
        found += [compare(bound(value), c.a) for value in (None, 1)]
        found += [compare(c.a, c.b)]
        found += [
            compare(tuple_(c.a, c.b), tuple_(bound(x), bound(y)))
            for x, y in itertools.product(VALUES, VALUES)
        ]
        found += [compare(tuple_(c.a, c.b, c.id), tuple_(bound(1), bound(1), bound(20)))]
    for values in LISTS:
        found += [c.a.in_(values), c.a.not_in(values)]
    found += [tuple_(c.a, c.b).in_(pairs) for pairs in PAIRS]
    for low, high in itertools.product(VALUES, VALUES):
        found += [
            c.a.between(bound(low), bound(high)),
            ~c.a.between(bound(low), bound(high)),
        ]
    found += [c.a.is_(None), c.a.is_not(None), c.a == None, c.a != None]  # noqa: E711
    found += [c.a == null(), c.id.is_(None), c.id.is_not(None)]
    found += [c.flag, ~c.flag, c.flag.is_(True), c.flag.is_(False)]
    found += [c.flag.is_not(True), c.flag.is_not(False), c.flag == true(), c.flag == false()]
    found += [c.flag != true(), c.flag != false(), c.flag.is_(None)]
    found += [c.flag == bindparam(None, value, type_=Boolean) for value in FLAGS]
    found += [c.flag != bindparam(None, value, type_=Boolean) for value in FLAGS]
    found += [true(), false()]
    return found


LEAVES = leaves()


@pytest.mark.parametrize("condition", LEAVES, ids=lambda condition: str(condition)[:60])
@pytest.mark.parametrize("negated", [False, True], ids=["is", "is not"])
def test_every_operator_means_what_sqlite_means(
    database: Connection, condition: Any, negated: bool
) -> None:
    """A row is kept if the condition is true of it, and not if it is false or unknown."""
    if negated:
        condition = not_(condition)
    try:
        found = evaluated(condition)
    except Inexact:
        assert negated
        with pytest.raises(Inexact, match="NOT IN over row values"):
            read(condition)
        return
    assert found == answered(database, condition)


def as_condition(drawn: Any) -> ColumnElement[bool]:
    """A condition as SQL has it, from what was drawn."""
    match drawn:
        case int():
            return LEAVES[drawn]  # type: ignore[no-any-return]
        case ("not", inner):
            return not_(as_condition(inner))
        case (word, *inner):
            join = and_ if word == "and" else or_
            return join(*map(as_condition, inner))
    raise AssertionError(drawn)


trees = st.recursive(
    st.integers(0, len(LEAVES) - 1),
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner),
        st.tuples(st.just("and"), inner, inner),
        st.tuples(st.just("or"), inner, inner),
        st.tuples(st.just("or"), inner, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=250)
@given(trees)
def test_trees_of_conditions_mean_what_sqlite_means(database: Connection, drawn: Any) -> None:
    """AND, OR and NOT keep to three-valued logic, however they are nested."""
    condition = as_condition(drawn)
    try:
        found = evaluated(condition)
    except Inexact as reason:
        # SQLAlchemy folds ``x AND false`` into a constant of another form, which is left alone.
        assert re.match("NOT IN over row values|(True|False)_ is left", str(reason))  # noqa: PT017
        return
    assert found == answered(database, condition)


def test_small_trees_exhaustively(database: Connection) -> None:
    """Every pair of simple conditions, under AND and OR and NOT, means what SQLite means."""
    simple = [c.a == 1, c.a != bound(None), c.b < 2, c.a.not_in([1, None]), c.b.is_(None), c.flag]
    for one, other in itertools.product(simple, simple):
        for condition in (
            and_(one, other),
            or_(one, other),
            not_(and_(one, other)),
            not_(or_(one, not_(other))),
            and_(not_(one), or_(other, one)),
        ):
            assert evaluated(condition) == answered(database, condition), str(condition)


def test_not_is_pushed_down_to_the_comparisons() -> None:
    """The tree has no NOT: it is in negation normal form."""
    node, parameters = read(not_(and_(c.a < 1, or_(c.b == 2, c.b.is_(None)))))
    assert node == Or((Compare("a", ">=", 0), And((Compare("b", "!=", 1), IsNull("b", False)))))
    assert [parameter.value for parameter in parameters] == [1, 2]
    assert read(not_(true()))[0] == Const(False)


def test_what_a_condition_is_about() -> None:
    """A condition knows its columns, and the conditions that all have to be true."""
    node, _ = read(and_(c.a == 1, and_(c.b == c.a, or_(c.flag, c.a.in_([1])))))
    assert criteria.columns_of(node) == {"a", "b", "flag"}
    assert len(list(criteria.conjuncts(node))) == 3
    assert list(criteria.conjuncts(And((Const(True),)))) == []
    row, _ = read(tuple_(c.a, c.b) > tuple_(literal(1), literal(2)))
    assert criteria.columns_of(row) == {"a", "b"}


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (c.a.op("&")(1) == 1, "left to the database"),
        (c.a.is_distinct_from(1), "is_distinct_from is left to the database"),
        (func.abs(c.a) == 1, "abs is left to the database|left to the database"),
        (c.a + 1 == 2, "left to the database"),
        (c.a.between(0, 1, symmetric=True), "SYMMETRIC"),
        (tuple_(c.a, c.b).not_in([(1, 2)]), "NOT IN over row values"),
        (c.a.in_(select(c.b)), "left to the database"),
        (select(c.b).exists(), "left to the database"),
        (c.a == select(c.b).scalar_subquery(), "left to the database"),
        (Column("elsewhere", Integer) == 1, "left to the database"),
        (func.lower(c.a).like("a%"), "left to the database"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_left_to_the_database(condition: Any, reason: str) -> None:
    """Nothing is guessed: an unknown construct is no condition that Python evaluates."""
    with pytest.raises(Inexact, match=reason):
        read(condition)


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (c.a == "1", "str is not what this column holds"),
        (c.a == 1.5, "float is not what this column holds"),
        (c.a.in_([1, "2"]), "str"),
        (tuple_(c.a, c.b).in_([(1, "2")]), "str"),
        (tuple_(c.a, c.b) < tuple_(literal(1), literal("2", String)), "str"),
        (c.flag < bindparam(None, True, type_=Boolean), "flag"),
        (c.a == c.flag, "different types"),
        (c.a.is_(true()), "no truth value"),
    ],
    ids=str,
)
def test_parameters_that_compare_otherwise_are_left_to_the_database(
    condition: Any, reason: str
) -> None:
    """A value of another type, or an order that Python does not know, is the database's."""
    with pytest.raises(Inexact, match=reason):
        evaluated(condition)


def test_columns_without_an_exact_comparison_are_left_to_the_database() -> None:
    """The reason is told with the name of the column."""
    text = {**COMPARISONS, "a": Comparison(False, False, reason="text that folds")}
    with pytest.raises(Inexact, match="a: text that folds"):
        evaluated(c.a == 1, text)
    hidden = {name: how for name, how in COMPARISONS.items() if name != "a"}
    with pytest.raises(Inexact, match="a is computed by the database"):
        evaluated(c.a == 1, hidden)
    nulls = evaluated(c.a.is_(None), text)
    assert nulls == [row.id for row in ROWS if row.a is None]


def test_order_needs_more_than_equality() -> None:
    """Under a collation that is not bytewise equality is exact and order is not."""
    linguistic = {**COMPARISONS, "a": Comparison(True, False, (int,))}
    assert evaluated(c.a == 1, linguistic) == [row.id for row in ROWS if row.a == 1]
    assert evaluated(c.a.in_([0]), linguistic) == [row.id for row in ROWS if row.a == 0]
    for condition in (c.a < 1, c.a.between(0, 1), tuple_(c.a, c.b) < tuple_(bound(1), bound(1))):
        with pytest.raises(Inexact, match="no order that Python knows"):
            evaluated(condition, linguistic)


def test_nan_is_greater_than_any_number_where_the_database_says_so() -> None:
    """On PostgreSQL NaN is the greatest number: ``x > 1`` keeps it and ``x < 1`` does not."""
    number = Comparison(True, True, (float,), nan_is_greatest=True)
    nan = float("nan")
    for condition, wanted in (
        (c.a > 1, [nan, 2.0]),
        (c.a >= 1, [nan, 2.0, 1.0]),
        (c.a < 2, [1.0]),
        (c.a <= 2, [2.0, 1.0]),
        (c.a != 1, [nan, 2.0]),
        (c.a == 2, [2.0]),
    ):
        node, parameters = read(condition)
        values = [float(parameter.value) for parameter in parameters]
        source = criteria.predicate_source(node, values, {"a": number}, lambda _: True)
        keep = eval(f"lambda r, p0: {source}")
        found = [x for x in (nan, 2.0, 1.0, None) if keep(SimpleNamespace(a=x), values[0])]
        assert list(map(str, found)) == list(map(str, wanted)), str(condition)
    with pytest.raises(Inexact, match="NaN may occur"):
        evaluated(c.a < c.b, {"a": number, "b": number})
