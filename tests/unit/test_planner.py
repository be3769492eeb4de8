"""From statements to intervals: what an index can express, what remains, what the database does."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    Boolean,
    Connection,
    Integer,
    and_,
    bindparam,
    create_engine,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, joinedload, mapped_column

from sa_tablecache import CachedView, CriteriaError, ScoreIndex, bypass_cache, criteria
from sa_tablecache.analysis import plan_of
from sa_tablecache.catalog import Catalog
from sa_tablecache.comparison import Inexact
from sa_tablecache.layout import Layout
from sa_tablecache.planner import MOST_POINTS, Question, ask, candidate_of
from sa_tablecache.prepared import Candidate, Columns
from sa_tablecache.scores import (
    EVERYTHING,
    MAX,
    MIN,
    NULLS_FIRST,
    NULLS_LAST,
    Interval,
    IntervalSet,
)
from sa_tablecache.shapes import Ordering, Shape, shape_of, view_of


class Base(DeclarativeBase):
    """The models of these tests."""


class Row(Base):
    """A table with NULLs in everything but its key."""

    __tablename__ = "row"

    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[int | None]
    b: Mapped[int | None]
    n: Mapped[int]
    flag: Mapped[bool | None]
    word: Mapped[str | None]


class View(CachedView):
    """The view of these tests."""

    __select__ = select(Row.id, Row.a, Row.b, Row.n, Row.flag, Row.word)

    id: Mapped[int]
    a: Mapped[int | None]
    b: Mapped[int | None]
    n: Mapped[int]
    flag: Mapped[bool | None]
    word: Mapped[str | None]

    by_a = ScoreIndex("a")
    by_ab = ScoreIndex("a", "b")
    by_na = ScoreIndex("n", "a")
    by_sum = ScoreIndex(Row.a + Row.b)


VALUES = [None, 0, 1, 2]
ROWS: list[Any] = [
    {"id": at, "a": a, "b": b, "n": n, "flag": flag, "word": None}
    for at, (a, b, n, flag) in enumerate(
        itertools.product(VALUES, VALUES, [0, 1, 2], [None, True, False])
    )
]


def columns(dialect: Any = None) -> Columns:
    """What is known of the view on a dialect, when the catalog says nothing."""
    return Layout(plan_of(View), dialect or sqlite.dialect(), Catalog(), {}).columns


COLUMNS = columns()


def question(statement: Any, known: Columns = COLUMNS) -> Question:
    """The question that a statement asks."""
    shape, parameters = shape_of(statement)
    return ask(shape, parameters, known)


def candidate(statement: Any, index: str, known: Columns = COLUMNS) -> Candidate:
    """What one index makes of a statement."""
    return next(c for c in question(statement, known).candidates if c.index == index)


def where(*conditions: Any) -> Any:
    """A SELECT of the view."""
    return select(View).where(*conditions)


# -- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "view"),
    [
        (select(View), View),
        (select(View.a, View.id), View),
        (select(func.count()).select_from(View), View),
        (select(func.max(View.a)), View),
        (select(Row), None),
        (select(literal(1)), None),
        (insert(Row), None),
        ("SELECT 1", None),
    ],
    ids=str,
)
def test_a_select_of_a_view_is_recognised(statement: Any, view: Any) -> None:
    """By what it selects or selects from."""
    assert view_of(statement) is view


def test_a_shape_is_what_a_statement_asks() -> None:
    """Columns, conditions, order and limits, with the parameters left open."""
    statement = (
        select(View.id, View.n)
        .where(View.a >= 5, View.n.in_([1, 2]))
        .order_by(View.a.desc(), View.id)
        .limit(3)
        .offset(1)
    )
    shape, parameters = shape_of(statement)
    assert shape.projection == ("id", "n")
    assert not shape.count
    assert shape.orderings == (Ordering("a", True), Ordering("id", False))
    assert len(shape.conjuncts) == 2
    assert len(parameters) == 4
    asked = question(statement)
    assert (asked.limit, asked.offset) == (3, 1)


def test_an_index_orders_by_all_of_its_columns() -> None:
    """``order_by(View.by_ab.desc())`` is the order of its columns, each descending."""
    shape, _ = shape_of(select(View).order_by(View.by_ab.desc(), View.by_sum))  # type: ignore
    assert shape.orderings == (
        Ordering("a", True),
        Ordering("b", True),
        Ordering("_score_by_sum", False),
    )


def test_counting_is_a_shape() -> None:
    """``count()`` of a view's rows is understood; of a column, or of a part, it is not."""
    shape, _ = shape_of(select(func.count()).select_from(View).where(View.a == 1))
    assert shape.count
    with pytest.raises(Inexact):
        shape_of(select(func.count(View.a)))
    with pytest.raises(Inexact, match="count"):
        shape_of(select(func.count()).select_from(View).limit(2))


def test_statements_of_one_shape_differ_in_parameters_only() -> None:
    """A shape is worked out once; each statement brings its own values."""
    one, other = where(View.a == 1), where(View.a == 2)
    assert shape_of(one)[0] is shape_of(other)[0]
    assert question(one).bound == (1,)
    assert question(other).bound == (2,)
    assert question(one).bound == (1,)


def different() -> list[Any]:
    """Statements of which no two are the same question."""
    return [
        where(View.a == 1),
        where(View.a != 1),
        where(View.b == 1),
        where(View.a.is_(None)),
        where(View.a.is_not(None)),
        where(View.a.in_([1])),
        where(View.a.not_in([1])),
        where(View.a == 1).limit(1),
        where(View.a == 1).offset(1),
        where(View.a == 1).order_by(View.a),
        where(View.a == 1).order_by(View.a.desc()),
        where(View.a == 1).order_by(View.b),
        where(or_(View.a == 1, View.b == 1)),
        where(and_(View.a == 1, View.b == 1)),
        select(View.a).where(View.a == 1),
        select(View.b).where(View.a == 1),
        where(View.a == View.b),
        where(View.a < View.b),
        where(View.a == 1).options(bypass_cache()),
    ]


def test_memoised_shapes_are_never_mixed_up() -> None:
    """What differs in more than values has a shape of its own, asked in any order."""
    first = [shape_of(statement)[0] for statement in different()]
    again = [shape_of(statement)[0] for statement in reversed(different())][::-1]
    assert all(x is y for x, y in zip(first, again, strict=True))
    for one, other in itertools.combinations(first, 2):
        assert one is not other
        assert one != other


def test_views_of_one_name_have_their_own_shapes() -> None:
    """Equal names and columns do not make two views one."""

    def declare() -> Any:
        return type(CachedView)("Twin", (CachedView,), {"__select__": select(Row.id, Row.a)})

    one, other = declare(), declare()
    assert shape_of(select(one).where(one.a == 1))[0].view is one
    assert shape_of(select(other).where(other.a == 1))[0].view is other


def test_one_parameter_may_be_used_twice() -> None:
    """A named parameter that stands in two places has its value in both."""
    same = bindparam("same", 1, type_=Integer)
    asked = question(where(View.a == same, View.b > same))
    assert list(asked.bound).count(1) >= 1
    found = candidate(where(View.a == same, View.b > same), "by_ab")
    assert found.residual == ()


# -- what is left to the database --------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (select(View).with_for_update(), "FOR UPDATE"),
        (select(View).distinct(), "distinct"),
        (select(View.a).group_by(View.a), "group_by"),
        (select(View).join(Row, Row.id == View.id), "left to the database"),
        (select(View, Row).join(Row, Row.id == View.id), "left to the database"),
        (select(View).prefix_with("/* x */"), "prefixes"),
        (select(View).with_hint(View, "x"), "hints|left to the database"),
        (select(View).fetch(3), "FETCH"),
        (select(View).limit(literal(1) + 1), "computed LIMIT"),
        (select(View).order_by(View.a.nulls_first()), "NULLS FIRST"),
        (select(View).order_by(View.a + 1), "expression in ORDER BY"),
        (select(View).order_by(func.random()), "expression in ORDER BY"),
        (select(View.a + 1), "expression among the selected"),
        (select(func.max(View.a)), "expression among the selected"),
        (select(View.a, func.count()), "expression among the selected"),
        (select(View).options(joinedload("*")), "options of others"),
        (select(View).execution_options(frob=1), "execution option frob"),
        (where(View.word.like("a%")), "left to the database"),
        (where(func.abs(View.a) == 1), "left to the database"),
        (where(View.a.in_(select(Row.a))), "left to the database"),
    ],
    ids=lambda value: " ".join(str(value).split())[-60:],
)
def test_what_is_not_understood_is_left_to_the_database(statement: Any, reason: str) -> None:
    """Any feature of a Select that is not known raises, with the reason, every time."""
    for _ in range(2):
        with pytest.raises(Inexact, match=reason):
            shape_of(statement)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (where(View.a == bindparam(None, "1", type_=Integer)), "str is not what this column holds"),
        (where(View.word == "x"), "word: text under a collation"),
        (where(View.a == 2**70), "out of the column's range"),
        (select(View).limit(-1), "no number of rows"),
        (where(View.flag < bindparam(None, True, type_=Boolean)), "flag"),
    ],
    ids=lambda value: " ".join(str(value).split())[-60:],
)
def test_values_that_compare_otherwise_are_left_to_the_database(
    statement: Any, reason: str
) -> None:
    """The shape may be understood and the values not."""
    shape_of(statement)
    with pytest.raises(Inexact, match=reason):
        question(statement)


def test_a_table_that_is_not_joined_is_an_error() -> None:
    """A base table's column in the criteria would be a cartesian product: it is refused."""
    for statement in (where(Row.a == 1), where(View.a == Row.a), where(View.a == 1, Row.id == 2)):
        for _ in range(2):
            with pytest.raises(CriteriaError, match="use the columns of View, or join row"):
                shape_of(statement)


def shown(found: Candidate) -> str:
    """The intervals of a candidate, without those beyond NULL, where no key can be."""
    void = [Interval((MIN,), (NULLS_FIRST, MIN)), Interval((NULLS_LAST, MAX), (MAX,))]
    return repr(IntervalSet(i for i in found.intervals if i not in void))


# -- candidates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "index", "intervals", "residual"),
    [
        (where(View.a == 1), "by_a", "{[1 .. after 1)}", 0),
        (where(View.a >= 1, View.a < 3), "by_a", "{[1 .. 3)}", 0),
        (where(View.a > 1), "by_a", "{[after 1 .. +inf)}", 0),
        (where(View.a < 1), "by_a", "{[after NULL .. 1)}", 0),
        (where(View.a.between(1, 2)), "by_a", "{[1 .. after 2)}", 0),
        (where(View.a != 1), "by_a", "{[after NULL .. 1), [after 1 .. +inf)}", 0),
        (where(View.a.is_(None)), "by_a", "{[NULL .. after NULL)}", 0),
        (where(View.a.is_not(None)), "by_a", "{[after NULL .. +inf)}", 0),
        (where(View.a.in_([2, 1])), "by_a", "{[1 .. after 1), [2 .. after 2)}", 0),
        (where(View.a.in_([])), "by_a", "{}", 0),
        (where(or_(View.a == 1, View.a > 2)), "by_a", "{[1 .. after 1), [after 2 .. +inf)}", 0),
        (where(View.a >= 3, View.a < 1), "by_a", "{}", 0),
        (where(View.a == bindparam(None, None, type_=Integer)), "by_a", "{}", 0),
        (where(false()), "by_a", "{[-inf .. +inf)}", 1),
        (where(View.a == 1, View.b > 2), "by_ab", "{[after 1, 2 .. after 1)}", 0),
        (where(View.a == 1, View.n == 2), "by_ab", "{[1 .. after 1)}", 1),
        (where(View.a > 1, View.b == 2), "by_ab", "{[after 1 .. +inf)}", 1),
        (where(View.b == 2), "by_ab", "{[-inf .. +inf)}", 1),
        (
            where(View.n.in_([0, 1]), View.a == 2),
            "by_na",
            "{[0, 2 .. after 0, 2), [1, 2 .. after 1, 2)}",
            0,
        ),
        (where(tuple_(View.n, View.id) > (1, 7)), "by_na", "{[-inf .. +inf)}", 1),
        (where(View.id > 7), "", "{[after 7 .. +inf)}", 0),
        (where(View.by_sum >= 4), "by_sum", "{[4 .. +inf)}", 0),  # type: ignore[operator]
    ],
    ids=lambda value: " ".join(str(value).split())[-50:],
)
def test_an_index_says_what_it_can(
    statement: Any, index: str, intervals: str, residual: int
) -> None:
    """Conditions on the leading scores become intervals; the others remain."""
    found = candidate(statement, index)
    assert shown(found) == intervals
    assert len(found.residual) == residual


def test_values_that_are_single_are_known() -> None:
    """A score that has one value throughout says nothing about order."""
    assert candidate(where(View.a == 1, View.b > 0), "by_ab").fixed == {"a"}
    assert candidate(where(View.a.in_([1, 2])), "by_ab").fixed == set()


def test_long_lists_are_filtered() -> None:
    """Beyond some number of intervals an IN list is tested record by record."""
    found = candidate(where(View.a.in_(range(2_000))), "by_a")
    assert len(found.intervals) <= MOST_POINTS
    both = candidate(where(View.n.in_(range(100)), View.a.in_(range(100))), "by_na")
    assert len(both.intervals) <= MOST_POINTS


def test_no_conditions_are_everything() -> None:
    """A SELECT without WHERE is all of every index."""
    assert all(c.intervals == EVERYTHING and not c.residual for c in question(where()).candidates)


def test_null_sorts_as_the_database_does() -> None:
    """On PostgreSQL NULL comes last: ``a > 1`` ends before it."""
    found = candidate(where(View.a > 1), "by_a", columns(postgresql.dialect()))
    assert shown(found) == "{[after 1 .. NULL)}"


# -- the truth ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database() -> Iterator[Connection]:
    """An SQLite database with every combination of values and NULLs."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        Base.metadata.create_all(connection)
        with Session(connection) as session:
            session.execute(insert(Row), ROWS)
            session.flush()
            yield connection
    engine.dispose()


CONDITIONS: list[Callable[[int], Any]] = [
    lambda v: View.a == v,
    lambda v: View.a != v,
    lambda v: View.a < v,
    lambda v: View.a >= v,
    lambda v: View.b <= v,
    lambda v: View.b > v,
    lambda v: View.b == v,
    lambda v: View.n == v,
    lambda v: View.n > v,
    lambda v: View.id < 20 * v,
    lambda v: View.id >= 30 * v,
    lambda v: View.a.is_(None),
    lambda v: View.b.is_not(None),
    lambda v: View.flag.is_(True),
    lambda v: View.a.in_([v, 2]),
    lambda v: View.a.not_in([v]),
    lambda v: View.n.in_([0, v]),
    lambda v: View.a.between(v, 2),
    lambda v: tuple_(View.a, View.b) >= (v, 1),
    lambda v: tuple_(View.n, View.a) < (v, 1),
    lambda v: or_(View.a == v, View.a.is_(None)),
    lambda v: or_(View.a == v, View.b == v),
    lambda v: View.a == View.b,
]
conditions = st.tuples(st.integers(0, len(CONDITIONS) - 1), st.integers(0, 2))


def is_inside(key: tuple[Any, ...], interval: Interval) -> bool:
    """Whether a key lies between two cuts, by its prefixes."""

    def is_before(cut: tuple[Any, ...]) -> bool:
        prefix = cut[:-1]
        start = key[: len(prefix)]
        return start < prefix or (start == prefix and cut[-1] is MAX)

    return is_before(interval.upper) and not is_before(interval.lower)


def answered(shape: Shape, asked: Question, chosen: Candidate) -> list[int]:
    """The rows that an index and the remaining conditions give."""
    rest = criteria.And(tuple(shape.conjuncts[number] for number in chosen.residual))
    source = criteria.predicate_source(rest, asked.bound, COLUMNS.comparisons, lambda _: True)
    names = ", ".join(["r", *(f"p{at}" for at in range(len(asked.bound)))])
    keep = eval(f"lambda {names}: {source}")
    order = COLUMNS.orders[chosen.index]
    hidden = [part.name for part in order.parts if part.hidden is not None]
    assert not hidden
    found = []
    for values in ROWS:
        record = View(**values)
        key = order.key_of(record, None)
        if any(is_inside(key, i) for i in chosen.intervals) and keep(record, *asked.bound):
            found.append(record.id)
    return found


@settings(max_examples=150)
@given(st.lists(conditions, min_size=1, max_size=4))
def test_every_index_gives_the_answer_of_the_database(
    database: Connection, drawn: list[tuple[int, int]]
) -> None:
    """Whichever index is taken: its intervals and the residual are exactly the condition."""
    chosen = [CONDITIONS[number](value) for number, value in drawn]
    statement = select(View.id).where(*chosen).order_by(View.id)
    truth = list(database.scalars(statement))
    shape, parameters = shape_of(statement)
    asked = ask(shape, parameters, COLUMNS)
    for found in asked.candidates:
        if found.intervals is not EVERYTHING:
            assert found == candidate_of(COLUMNS.orders[found.index], shape, asked.bound, COLUMNS)
        if found.index != "by_sum":
            assert answered(shape, asked, found) == truth, found
