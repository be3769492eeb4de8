"""Random questions about a view, as data: they print, and they can be asked of anything.

A question is asked twice: of the view's columns, which a cache may answer, and of the columns of
the view's own select in a subquery, which only the database can.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from operator import eq, ge, gt, le, lt, ne
from typing import Any, Final

from hypothesis import strategies as st
from sqlalchemy import (
    Float,
    Integer,
    LargeBinary,
    Numeric,
    String,
    and_,
    asc,
    case,
    cast,
    desc,
    false,
    func,
    literal,
    not_,
    or_,
    true,
    tuple_,
)

from sa_tablecache import CachedView
from tests.differential.values import ODD, TYPES, values_of

Columns = Mapping[str, Any]
Criterion = tuple[Any, ...]

COMPARE: Final[dict[str, Callable[..., Any]]] = {
    "==": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge,
}  # fmt: skip

#: Operators that Python never evaluates, whatever they are applied to.
INEXACT: Final = frozenset({"distinct", "like", "arithmetic", "function", "case", "cast"})


@dataclass(frozen=True)
class Question:
    """One SELECT, in words; or one `get` or `range`."""

    view: type[CachedView]
    kind: str
    where: tuple[Criterion, ...] = ()
    order: tuple[tuple[str, bool, str], ...] = ()
    """Columns, whether descending, and where NULLs go ("", "first" or "last")."""
    limit: int | None = None
    offset: int | None = None
    columns: tuple[str, ...] = ()
    key: tuple[Any, ...] = ()
    index: str = ""
    prefix: tuple[Any, ...] = ()
    bounds: tuple[tuple[str, Any], ...] = ()

    @property
    def is_inexact(self) -> bool:
        """Whether it has an operator that Python never evaluates."""
        kinds = {kind for criterion in self.where for kind in _kinds(criterion)}
        # SQLAlchemy leaves out what stands beside a constant: ``or_(true(), ...)`` is true.
        return bool(kinds & INEXACT) and "const" not in kinds


def _kinds(criterion: Criterion) -> Iterator[str]:
    yield criterion[0]
    if criterion[0] in ("not", "and", "or"):
        for inner in criterion[1:]:
            yield from _kinds(inner)


# -- criteria as SQL ---------------------------------------------------------------------------


def _parameter(value: Any, type_: Any) -> Any:
    return value if type_ is None else literal(value, type_)


def clause(criterion: Criterion, c: Columns) -> Any:
    """Return a criterion as SQL over some columns."""
    match criterion:
        case ("const", value):
            return true() if value else false()
        case ("not", inner):
            return not_(clause(inner, c))
        case ("and", *inner):
            return and_(*(clause(one, c) for one in inner))
        case ("or", *inner):
            return or_(*(clause(one, c) for one in inner))
        case ("compare", name, op, value, type_):
            return COMPARE[op](c[name], _parameter(value, type_))
        case ("reverse", name, op, value):
            return COMPARE[op](literal(value, c[name].type), c[name])
        case ("columns", left, op, right):
            return COMPARE[op](c[left], c[right])
        case ("null", name, wanted):
            return c[name].is_(None) if wanted else c[name].is_not(None)
        case ("truth", name, wanted, negated):
            return c[name].is_not(wanted) if negated else c[name].is_(wanted)
        case ("bare", name):
            return c[name]
        case ("distinct", name, value, negated):
            return (c[name].is_not_distinct_from if negated else c[name].is_distinct_from)(value)
        case ("between", name, low, high, negated):
            between = c[name].between(low, high)
            return not_(between) if negated else between
        case ("in", name, values, negated):
            return c[name].not_in(list(values)) if negated else c[name].in_(list(values))
        case ("row", names, op, values):
            return COMPARE[op](tuple_(*(c[n] for n in names)), tuple_(*map(literal, values)))
        case ("rows", names, rows, negated):
            row = tuple_(*(c[n] for n in names))
            return row.not_in(list(rows)) if negated else row.in_(list(rows))
        case ("like", name, how, pattern):
            return getattr(c[name], how)(pattern)
        case ("arithmetic", name, how, number, op, value):
            term = {"+": c[name] + number, "-": c[name] - number, "*": c[name] * number}[how]
            return COMPARE[op](term, value)
        case ("function", name, how, op, value):
            return COMPARE[op](getattr(func, how)(c[name]), value)
        case ("case", inner, name, op, value):
            return COMPARE[op](case((clause(inner, c), c[name]), else_=None), value)
        case ("cast", name, type_, op, value):
            return COMPARE[op](cast(c[name], type_), value)
    raise AssertionError(criterion)


# -- strategies --------------------------------------------------------------------------------


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Have a strategy made once: hypothesis validates each, which costs more than the questions."""
    return cache(make)


class Ask:
    """Makes strategies of questions about the columns of one view, each of them once.

    :param types: the type of each column that criteria may use, hidden scores included.
    :param public: the columns that records have.
    """

    def __init__(
        self, view: type[CachedView], types: Mapping[str, Any], public: list[str], dialect: str
    ) -> None:
        self.view = view
        self.types = types
        self.public = public
        self.dialect = dialect
        self.names = st.sampled_from(list(types))
        self.key = view.__plan__.key  # type: ignore[attr-defined]
        self.sortable = [name for name in public if not _is_unordered(types[name])]

    @once
    def value(self, name: str) -> st.SearchStrategy[Any]:
        """A value for a column: mostly one that it may hold, at times something else."""
        own = self.plain_value(name)
        odd = ODD
        if isinstance(self.types[name], LargeBinary):  # bytes(2**31) is two gigabytes
            odd = [value for value in ODD if not isinstance(value, int)]
        none, other = st.none(), st.sampled_from(odd)
        return st.integers(0, 19).flatmap(lambda n: own if n < 17 else none if n == 17 else other)

    @once
    def plain_value(self, name: str) -> st.SearchStrategy[Any]:
        """A value that a column may hold."""
        return st.sampled_from([*values_of(self.types[name], self.dialect)])

    @once
    def criterion(self, depth: int = 2) -> st.SearchStrategy[Criterion]:
        """A condition of any kind."""
        leaf = st.integers(0, 99).flatmap(self._leaf)
        if not depth:
            return leaf
        inner = st.deferred(lambda: self.criterion(depth - 1))
        several = st.lists(inner, min_size=1, max_size=3)
        grouped = st.tuples(st.sampled_from(["and", "or"]), several).map(lambda g: (g[0], *g[1]))
        # SQLAlchemy itself turns NOT over a comparison round, but not NOT over AND and OR.
        return st.integers(0, 9).flatmap(
            lambda n: (
                leaf if n < 5
                else inner.map(lambda one: ("not", one)) if n == 5
                else grouped if n < 8
                else grouped.map(lambda group: ("not", group))
            )
        )  # fmt: skip

    @once
    def _leaf(self, number: int) -> st.SearchStrategy[Criterion]:
        make = once(_LEAVES[number])
        return self.names.flatmap(lambda name: make(self, name))

    def _pairs(self) -> st.SearchStrategy[tuple[str, ...]]:
        return st.lists(self.names, min_size=1, max_size=3, unique=True).map(tuple)

    @once
    def order(self) -> st.SearchStrategy[tuple[tuple[str, bool, str], ...]]:
        """Terms of ORDER BY, made total by the key."""
        directions = st.booleans()
        nulls = st.sampled_from([""] * 12 + ["first", "last"])
        indexes = [
            index.column_names
            for index in self.view.__indexes__.values()
            if set(index.column_names) <= set(self.sortable)
        ]
        leading = st.one_of(
            st.just(()),
            st.sampled_from([(), *indexes]),
            st.lists(st.sampled_from(self.sortable), max_size=2, unique=True).map(tuple),
        )

        def complete(drawn: tuple[Any, ...]) -> tuple[tuple[str, bool, str], ...]:
            names, same, flips, where = drawn
            names = [*names, *(n for n in self.key if n not in names)]
            return tuple(
                (name, same if same is not None else flip, where if not at else "")
                for at, (name, flip) in enumerate(zip(names, flips, strict=False))
            )

        flips = st.lists(directions, min_size=8, max_size=8)
        return st.tuples(leading, st.sampled_from([True, False, None]), flips, nulls).map(complete)

    @once
    def question(self) -> st.SearchStrategy[Question]:
        """A question of any kind."""
        return st.integers(0, 99).flatmap(self._question)

    @once
    def _question(self, number: int) -> st.SearchStrategy[Question]:
        where = st.lists(self.criterion(), max_size=2).map(tuple)
        few = st.sampled_from([None, None, None, 0, 1, 2, 5, 100])
        if number < 45 or 60 <= number < 65:
            kind = "records" if number < 45 else "query"
            return st.builds(
                Question,
                st.just(self.view), st.just(kind), where, st.one_of(st.just(()), self.order()),
                few, few,
            ).map(_with_order)  # fmt: skip
        if number < 55:
            columns = st.lists(st.sampled_from(self.public), min_size=1, max_size=4).map(tuple)
            return st.builds(
                Question,
                st.just(self.view),
                st.sampled_from(["columns", "columns", "columns", "distinct"]),
                where, self.order(), few, few, columns,
            )  # fmt: skip
        if number < 60:
            kinds = st.sampled_from(["count", "query count", "exists", "first"])
            return st.builds(Question, st.just(self.view), kinds, where)
        if number < 75:
            key = st.tuples(*(self.value(name) for name in self.key))
            return st.builds(
                lambda key: Question(self.view, "get", key=key),
                key,
            )
        return st.sampled_from(sorted(self.view.__indexes__)).flatmap(self._range)

    @once
    def _range(self, index: str) -> st.SearchStrategy[Question]:
        names = self.view.__indexes__[index].column_names

        @once
        def bounded(depth: int) -> st.SearchStrategy[Question]:
            prefix = st.tuples(*(self.value(name) for name in names[:depth]))
            bounds: st.SearchStrategy[Any] = st.just(())
            if depth < len(names):
                value = self.value(names[depth])
                low = st.tuples(st.sampled_from(["ge", "gt"]), value)
                high = st.tuples(st.sampled_from(["le", "lt"]), value)
                bounds = st.one_of(
                    st.just(()), st.tuples(low), st.tuples(high), st.tuples(low, high)
                )
            return st.builds(
                lambda prefix, bounds, descending, limit: Question(
                    self.view, "range", index=index, prefix=prefix, bounds=bounds, limit=limit,
                    order=tuple(
                        (n, descending, "")
                        for n in (*names[depth:], *(k for k in self.key if k not in names))
                    ),
                ),
                prefix, bounds, st.booleans(), st.sampled_from([None, None, 1, 3]),
            )  # fmt: skip

        return st.integers(0, len(names)).flatmap(bounded)

    @once
    def coverage(self) -> st.SearchStrategy[list[tuple[str, Criterion | None]]]:
        """What is loaded, and then extended and evicted: all, or ranges of some index."""
        names = sorted({index.column_names[0] for index in self.view.__indexes__.values()})

        @once
        def ranged(name: str) -> st.SearchStrategy[Criterion]:
            value = self.plain_value(name)
            # SQLAlchemy compares no truth values with < and >.
            ops = ["=="] if type(self.types[name]).__name__ == "Boolean" else [*COMPARE]
            compare = st.tuples(
                st.just("compare"), st.just(name), st.sampled_from(ops), value, st.none()
            )
            between = st.tuples(st.just("between"), st.just(name), value, value, st.just(False))
            several = st.lists(value, min_size=1, max_size=3).map(tuple)
            among = st.tuples(st.just("in"), st.just(name), several, st.just(False))
            null = st.tuples(st.just("null"), st.just(name), st.just(True))
            return st.one_of(compare, between, compare, among, null)

        some = st.sampled_from(names).flatmap(ranged)
        first = st.tuples(st.just("load"), st.one_of(st.none(), some))
        further = st.tuples(st.sampled_from(["extend", "extend", "evict"]), some)
        return st.tuples(first, st.lists(further, max_size=2)).map(lambda t: [t[0], *t[1]])


def _with_order(question: Question) -> Question:
    """Without an order a part of the answer could be any: leave out the limits then."""
    if question.order:
        return question
    return Question(question.view, question.kind, question.where)


def _is_unordered(type_: Any) -> bool:
    return type(type_).__name__ == "JSON"


def _compare(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    types = st.sampled_from([None] * 30 + TYPES)
    ops = st.sampled_from(list(COMPARE))
    return st.tuples(st.just("compare"), st.just(name), ops, ask.value(name), types)


def _reverse(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    ops = st.sampled_from(list(COMPARE))
    return st.tuples(st.just("reverse"), st.just(name), ops, ask.value(name))


def _columns(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    def kind(other: str) -> Any:
        return ask.types[other]._type_affinity

    alike = [other for other in ask.types if kind(other) is kind(name)]
    others = st.one_of(st.sampled_from(alike), st.sampled_from(alike), ask.names)
    ops = st.sampled_from(list(COMPARE))
    return st.tuples(st.just("columns"), st.just(name), ops, others)


def _null(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    return st.tuples(st.just("null"), st.just(name), st.booleans())


def _truth(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    flags = [n for n, t in ask.types.items() if type(t).__name__ == "Boolean"] or [name]
    flag = st.sampled_from(flags)
    return st.one_of(
        st.tuples(st.just("truth"), flag, st.booleans(), st.booleans()),
        st.tuples(st.just("bare"), flag),
    )


def _distinct(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    return st.tuples(st.just("distinct"), st.just(name), ask.value(name), st.booleans())


def _between(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    value = ask.value(name)
    return st.tuples(st.just("between"), st.just(name), value, value, st.booleans())


def _in(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    values = st.lists(ask.value(name), max_size=4).map(tuple)
    return st.tuples(st.just("in"), st.just(name), values, st.booleans())


def _row(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    del name
    indexes = [i.column_names for i in ask.view.__indexes__.values()]
    names = st.one_of(ask._pairs(), st.sampled_from(indexes))

    @once
    def of(names: tuple[str, ...]) -> st.SearchStrategy[Criterion]:
        row = st.tuples(*map(ask.value, names))
        ops = st.sampled_from(list(COMPARE))
        rows = st.lists(row, max_size=3).map(tuple)
        return st.one_of(
            st.tuples(st.just("row"), st.just(names), ops, row),
            st.tuples(st.just("rows"), st.just(names), rows, st.booleans()),
        )

    return names.flatmap(of)


def _like(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    how = st.sampled_from(["like", "ilike", "not_like", "startswith", "endswith", "contains"])
    patterns = st.sampled_from(["a", "a%", "_", "", "%", "A"])
    return st.tuples(st.just("like"), st.just(name), how, patterns)


def _arithmetic(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    numbers = [n for n, t in ask.types.items() if isinstance(t, Integer | Numeric)]
    return st.tuples(
        st.just("arithmetic"), st.sampled_from(numbers), st.sampled_from("+-*"),
        st.sampled_from([0, 1, 2, 0.5]), st.sampled_from(list(COMPARE)),
        st.sampled_from([0, 1, 2, 1.5]),
    )  # fmt: skip


def _function(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    hows = st.sampled_from(["lower", "upper", "length", "abs", "coalesce", "trim"])
    ops = st.sampled_from(list(COMPARE))
    return st.tuples(st.just("function"), st.just(name), hows, ops, ask.value(name))


def _case(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    ops = st.sampled_from(list(COMPARE))
    return st.tuples(st.just("case"), _null(ask, name), st.just(name), ops, ask.value(name))


def _cast(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    types = st.sampled_from([Integer(), String(20), Float(), Numeric(10, 2)])
    ops = st.sampled_from(list(COMPARE))
    return st.tuples(st.just("cast"), st.just(name), types, ops, ask.value(name))


def _const(ask: Ask, name: str) -> st.SearchStrategy[Criterion]:
    return st.tuples(st.just("const"), st.booleans())


#: Kinds of conditions, each as often as its share in percent.
_LEAVES: Final[list[Callable[[Ask, str], st.SearchStrategy[Criterion]]]] = [
    *[_compare] * 34, *[_reverse] * 4, *[_columns] * 9, *[_null] * 8, *[_truth] * 7,
    *[_between] * 8, *[_in] * 11, *[_row] * 8, *[_const] * 2, *[_distinct] * 2, *[_like] * 2,
    *[_arithmetic] * 1, *[_function] * 2, *[_case] * 1, *[_cast] * 1,
]  # fmt: skip


def ordered(question: Question, c: Columns) -> list[Any]:
    """Return the ORDER BY of a question."""
    terms = []
    for name, descending, nulls in question.order:
        term = desc(c[name]) if descending else asc(c[name])
        if nulls:
            term = term.nulls_first() if nulls == "first" else term.nulls_last()
        terms.append(term)
    return terms
