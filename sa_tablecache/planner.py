"""How a SELECT of a view can be answered from memory, or why the database has to.

In: a ``select()`` and, for its parameters, what is known of the view's columns and indexes.
Out, in two steps: a :class:`Shape` (what the statement asks, memoised by its cache key, parameters
left open), then a :class:`Question` (for given parameters: for each index the intervals that
contain the answer, and the conditions that remain).

Pure: no SQL is run and no record is looked at. Whatever is not understood completely raises
:class:`.Inexact`, which the caller takes as "ask the database", with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Select
from sqlalchemy.sql import operators as sql
from sqlalchemy.sql.elements import BindParameter, ColumnClause, Label, Tuple, UnaryExpression
from sqlalchemy.sql.functions import count as count_function

from . import criteria
from .analysis import ViewPlan, plan_of
from .comparison import Comparison, Inexact
from .criteria import And, Compare, Const, In, IsNull, Node, Or, RowCompare, Truth
from .exc import CriteriaError
from .options import CacheOption
from .scores import (
    EVERYTHING,
    MAX,
    MIN,
    NOTHING,
    NULLS_FIRST,
    NULLS_LAST,
    Interval,
    IntervalSet,
)
from .storage import Order, Record
from .view import CachedView, ViewTable

MOST_POINTS: Final = 1_000
"""So many intervals at most are made from IN lists; longer ones are filtered."""


@dataclass(frozen=True, slots=True)
class Ordering:
    """One ORDER BY term."""

    column: str
    descending: bool


@dataclass(frozen=True)
class Shape:
    """What a statement asks, its parameters left open."""

    view: type[CachedView]
    plan: ViewPlan
    where: Node
    orderings: tuple[Ordering, ...]
    limit: int | None
    offset: int | None
    projection: tuple[str, ...] | None
    """The selected columns; ``None`` for whole records."""
    count: bool
    options: tuple[CacheOption, ...]
    conjuncts: tuple[Node, ...] = field(init=False)
    _filters: dict[Any, Callable[..., list[Record]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "conjuncts", tuple(criteria.conjuncts(self.where)))

    def check_residual(self, residual: tuple[int, ...], columns: Columns) -> None:
        """Raise :class:`.Inexact` if a remaining condition is about what records do not have."""
        for number in residual:
            for name in criteria.columns_of(self.conjuncts[number]):
                if name not in columns.public:
                    raise Inexact(f"{name} is computed by the database")

    def filter(
        self,
        residual: tuple[int, ...],
        question: Question,
        columns: Columns,
        records: Sequence[Record],
    ) -> Sequence[Record]:
        """Return the records that meet the remaining conditions, by one generated function."""
        if not residual:
            return records
        bound = question.bound
        key = (columns, residual, tuple(value is None for value in bound), question.lists)
        function = self._filters.get(key)
        if function is None:
            self.check_residual(residual, columns)
            source = criteria.predicate_source(
                And(tuple(self.conjuncts[i] for i in residual)),
                bound,
                columns.comparisons,
                lambda name: self.plan.column(name).nullable,
            )
            names = ", ".join(f"p{at}" for at in range(len(bound)))
            scope: dict[str, Any] = {}
            exec(  # noqa: S102 - built from column names and operators only
                f"def keep(records, {names}):\n    return [r for r in records if {source}]", scope
            )
            if len(self._filters) > 64:
                self._filters.clear()
            function = self._filters[key] = cast("Callable[..., list[Record]]", scope["keep"])
        return function(records, *bound)


@dataclass(frozen=True, eq=False)
class Columns:
    """What is known, for one database, of the columns and indexes of a view."""

    plan: ViewPlan
    comparisons: Mapping[str, Comparison]
    orders: Mapping[str, Order]
    nulls_first: bool

    @property
    def public(self) -> frozenset[str]:
        """The columns that records have."""
        return frozenset(c.name for c in self.plan.columns)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One index and the intervals of it that contain the answer."""

    index: str
    intervals: IntervalSet
    residual: tuple[int, ...]
    """The conditions, by number, that the intervals do not express."""
    fixed: frozenset[str]
    """The columns that have one value throughout."""


@dataclass(frozen=True, slots=True)
class Question:
    """A shape with its parameters."""

    shape: Shape
    bound: tuple[Any, ...]
    lists: tuple[Any, ...]
    """What of IN lists decides how they are tested."""
    limit: int | None
    offset: int
    candidates: tuple[Candidate, ...]


# -- statements --------------------------------------------------------------------------------

#: Attributes of a Select that are understood here. Any other that is set means that the statement
#: has a feature this module does not know, present or future, and is left to the database. The last
#: three a legacy Query leaves behind; they say how entities are loaded.
_KNOWN: Final = frozenset(
    """_propagate_attrs _raw_columns _label_style _where_criteria _order_by_clauses _limit_clause
    _offset_clause _with_options _execution_options _from_obj _fetch_clause _fetch_clause_options
    _memoized_keys _all_selected_columns _generate_cache_key _for_update_arg
    dispatch load_options _compile_options""".split()
)

#: Execution options that change nothing about which rows are right.
HARMLESS_OPTIONS: Final = frozenset(
    """yield_per stream_results max_row_buffer populate_existing autoflush compiled_cache
    logging_token preserve_rowcount prebuffer_rows""".split()
)

_by_statement: WeakKeyDictionary[Any, tuple[Shape | Inexact, list[BindParameter[Any]]]] = (
    WeakKeyDictionary()
)
_by_key: dict[Any, Shape | Inexact] = {}


def view_of(statement: Any) -> type[CachedView] | None:
    """Return the view that a statement selects from, if it is a SELECT of one view's columns."""
    if not isinstance(statement, Select):
        return None
    for raw in statement._raw_columns:
        if type(raw) is ViewTable:
            return raw.view
        table = getattr(raw, "table", None)
        if type(table) is ViewTable:
            return table.view
    for source in statement._from_obj:
        if type(source) is ViewTable:
            return source.view
    for raw in statement._raw_columns:
        for source in raw._from_objects:
            if type(source) is ViewTable:
                return source.view
    return None


def shape_of(statement: Select[Any]) -> tuple[Shape, list[BindParameter[Any]]]:
    """Return what a SELECT of a view asks, and its parameters in the order of their numbers.

    :raises Inexact: if the database has to answer.
    :raises CriteriaError: if it uses a table that it does not join.
    """
    known = _by_statement.get(statement)
    if known is None:
        _check_features(statement)
        cache_key = statement._generate_cache_key()
        if cache_key is None:
            raise Inexact("a construct without cache key")
        parameters = list(cache_key.bindparams)
        shape = _by_key.get(cache_key.key)
        if shape is None:
            try:
                shape = _read(statement, parameters)
            except Inexact as reason:
                shape = reason
            if len(_by_key) > 1_000:
                _by_key.clear()
            _by_key[cache_key.key] = shape
        known = _by_statement[statement] = (shape, parameters)
    if isinstance(known[0], Inexact):
        raise Inexact(str(known[0]))
    return known[0], known[1]


def _check_features(statement: Select[Any]) -> None:
    """Raise :class:`.Inexact` for what is not (or may not be) part of a statement's cache key."""
    for name, value in statement.__dict__.items():
        if name not in _KNOWN and value:
            raise Inexact(f"{name.strip('_')} is left to the database")
    for name in statement._execution_options:
        if name not in HARMLESS_OPTIONS:
            raise Inexact(f"execution option {name} is left to the database")


def _read(statement: Select[Any], parameters: list[BindParameter[Any]]) -> Shape:
    view = view_of(statement)
    assert view is not None
    table = view.__table__
    plan = plan_of(view)
    if statement._for_update_arg is not None:
        raise Inexact("FOR UPDATE is left to the database")
    if statement._fetch_clause is not None:
        raise Inexact("FETCH is left to the database")
    options = tuple(o for o in statement._with_options if isinstance(o, CacheOption))
    if len(options) < len(statement._with_options):
        raise Inexact("options of others than the cache are left to the database")
    if any(source is not table for source in statement._from_obj):
        raise Inexact("a join is left to the database")
    positions = {id(parameter): at for at, parameter in enumerate(parameters)}

    def position(parameter: BindParameter[Any]) -> int:
        if id(parameter) not in positions:
            raise Inexact("a parameter that cannot be told apart")
        return positions[id(parameter)]

    def resolve(element: Any) -> str | None:
        if isinstance(element, ColumnClause) and element.table is table:
            return element.name if element.name in plan.by_name else None
        return None

    projection, count = _selected(statement, table, resolve)
    for criterion in statement._where_criteria:
        for source in criterion._from_objects:
            if source is not table:
                raise CriteriaError(
                    f"the criteria of a SELECT from {plan.name} use {source}, which it does not "
                    f"join: use the columns of {plan.name}, or join {source} explicitly"
                )
    reader = criteria.Reader(resolve, position)
    where = And(tuple(reader.read(criterion) for criterion in statement._where_criteria))
    orderings: list[Ordering] = []
    for clause in statement._order_by_clauses:
        orderings += _ordering(clause, resolve)
    if count and (
        orderings or statement._limit_clause is not None or statement._offset_clause is not None
    ):
        raise Inexact("count() of a part is left to the database")
    limit, offset = (
        None if clause is None else _limit(clause, position)
        for clause in (statement._limit_clause, statement._offset_clause)
    )
    return Shape(view, plan, where, tuple(orderings), limit, offset, projection, count, options)


def _selected(
    statement: Select[Any], table: ViewTable, resolve: Callable[[Any], str | None]
) -> tuple[tuple[str, ...] | None, bool]:
    raw = statement._raw_columns
    if len(raw) == 1:
        element: Any = raw[0]
        if element is table:
            return None, False
        element = element.element if isinstance(element, Label) else element
        if isinstance(element, count_function):
            arguments = list(element.clauses)
            if not arguments or getattr(arguments[0], "name", None) == "*":
                return None, True
    names = [resolve(element) for element in raw]
    if any(name is None or name not in table.c for name in names):
        raise Inexact("an expression among the selected columns is left to the database")
    return cast("tuple[str, ...]", tuple(names)), False


def _ordering(clause: Any, resolve: Callable[[Any], str | None]) -> list[Ordering]:
    descending = False
    if isinstance(clause, UnaryExpression):
        if clause.modifier not in (sql.desc_op, sql.asc_op):
            raise Inexact("NULLS FIRST and NULLS LAST are left to the database")
        descending = clause.modifier is sql.desc_op
        clause = clause.element
    while type(clause).__name__ in ("Grouping", "_label_reference"):
        clause = clause.element
    if isinstance(clause, UnaryExpression):
        return _ordering(clause, resolve)
    result = []
    for element in clause.clauses if isinstance(clause, Tuple) else [clause]:
        name = resolve(element)
        if name is None:
            raise Inexact("an expression in ORDER BY is left to the database")
        result.append(Ordering(name, descending))
    return result


def _limit(clause: Any, position: Callable[[BindParameter[Any]], int]) -> int:
    if not isinstance(clause, BindParameter):
        raise Inexact("a computed LIMIT is left to the database")
    return position(clause)


# -- questions ---------------------------------------------------------------------------------


def ask(shape: Shape, parameters: Sequence[BindParameter[Any]], columns: Columns) -> Question:
    """Return the question that a shape and its parameters ask of a database.

    :raises Inexact: if Python would not give the database's answer.
    """
    raw = [parameter.effective_value for parameter in parameters]
    bound: list[Any] = [False] * len(raw)
    criteria.bind(shape.where, raw, bound, columns.comparisons)
    limit = offset = None
    if shape.limit is not None:
        limit = _row_count(raw[shape.limit])
    if shape.offset is not None:
        offset = _row_count(raw[shape.offset])
    candidates = tuple(
        candidate_of(order, shape.conjuncts, bound, columns) for order in columns.orders.values()
    )
    lists = tuple(v[1:] for v in bound if type(v) is tuple)
    return Question(shape, tuple(bound), lists, limit, offset or 0, candidates)


def _row_count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise Inexact("a LIMIT that is no natural number is left to the database")
    return value


def candidate_of(
    order: Order, conjuncts: Sequence[Node], bound: Sequence[Any], columns: Columns
) -> Candidate:
    """Return the intervals of one index that contain all records meeting the conditions."""
    prefixes: list[tuple[Any, ...]] = [()]
    used: set[int] = set()
    fixed: set[str] = set()
    intervals: IntervalSet | None = None
    about = [criteria.columns_of(node) for node in conjuncts]
    for depth, part in enumerate(order.parts):
        if len(prefixes) == 1:
            row = _row_interval(order, depth, prefixes[0], conjuncts, bound, columns)
            if row is not None:
                number, interval = row
                used.add(number)
                intervals = IntervalSet([interval])
                break
        values = EVERYTHING
        exact: list[int] = []
        for number, node in enumerate(conjuncts):
            if about[number] == {part.name} and not part.hashed:
                found = _values(node, bound, part.nullable, columns)
                if found is not None:
                    values &= found
                    exact.append(number)
        if not exact:
            break
        used.update(exact)
        points = _points(values)
        if points is not None and len(points) * len(prefixes) <= MOST_POINTS:
            prefixes = [(*prefix, point) for prefix in prefixes for point in points]
            if len(points) == 1:
                fixed.add(part.name)
            if not prefixes:
                intervals = NOTHING
                break
            continue
        intervals = IntervalSet(
            Interval(prefix + i.lower, prefix + i.upper) for prefix in prefixes for i in values
        )
        break
    if intervals is None:
        intervals = IntervalSet(Interval((*p, MIN), (*p, MAX)) for p in prefixes)
    residual = tuple(number for number in range(len(conjuncts)) if number not in used)
    return Candidate(order.name, intervals, residual, frozenset(fixed))


def _points(values: IntervalSet) -> list[Any] | None:
    """Return the single values that a set consists of, or ``None`` if it has a range."""
    points = []
    for lower, upper in values:
        if len(lower) != 2 or len(upper) != 2:
            return None
        if lower[0] is not upper[0] and lower[0] != upper[0]:
            return None
        points.append(lower[0])
    return points


def _values(
    node: Node, bound: Sequence[Any], nullable: bool, columns: Columns
) -> IntervalSet | None:
    """Return exactly the values of one column for which a condition is true.

    ``None`` if that is not a set of intervals in which the database and Python agree: under a
    collation that is not bytewise only single values are.
    """
    null = NULLS_FIRST if columns.nulls_first else NULLS_LAST
    nulls = IntervalSet([Interval((null, MIN), (null, MAX))])

    def known() -> IntervalSet:
        return EVERYTHING - nulls if nullable else EVERYTHING

    def points(values: Any) -> IntervalSet:
        return IntervalSet(Interval((v, MIN), (v, MAX)) for v in values)

    match node:
        case Const():
            return EVERYTHING if node.value else NOTHING
        case And() | Or():
            result = EVERYTHING if isinstance(node, And) else NOTHING
            for inner in node.nodes:
                values = _values(inner, bound, nullable, columns)
                if values is None:
                    return None
                result = result & values if isinstance(node, And) else result | values
            return result
        case IsNull():
            if not nullable:
                return NOTHING if node.wanted else EVERYTHING
            if node.wanted:
                return nulls
            return known() if columns.comparisons[node.column].order else None
        case Truth():
            return None if node.negated else points([node.wanted])
        case In():
            values, has_null, _ = bound[node.parameter]
            if node.negated:
                return NOTHING if has_null else None
            return points(values)
        case Compare():
            value = bound[node.parameter]
            if value is None:
                return NOTHING
            how = columns.comparisons[node.column]
            if node.op == "==":
                return points([value])
            if not how.order:
                return None
            match node.op:
                case "<":
                    interval = Interval((MIN,), (value, MIN))
                case "<=":
                    interval = Interval((MIN,), (value, MAX))
                case ">":
                    interval = Interval((value, MAX), (MAX,))
                case ">=":
                    interval = Interval((value, MIN), (MAX,))
                case _:
                    return known() - points([value])
            return known() & IntervalSet([interval])
    return None


def _row_interval(
    order: Order,
    depth: int,
    prefix: tuple[Any, ...],
    conjuncts: Sequence[Node],
    bound: Sequence[Any],
    columns: Columns,
) -> tuple[int, Interval] | None:
    """Return the interval of a row comparison over the next columns of an index, if any."""
    for number, node in enumerate(conjuncts):
        if not isinstance(node, RowCompare):
            continue
        parts = order.parts[depth : depth + len(node.columns)]
        if tuple(part.name for part in parts) != node.columns or any(
            part.nullable or part.hashed or not columns.comparisons[part.name].order
            for part in parts
        ):
            continue
        values = tuple(bound[parameter] for parameter in node.parameters)
        if None in values:
            continue
        match node.op:
            case "<":
                interval = Interval((*prefix, MIN), (*prefix, *values, MIN))
            case "<=":
                interval = Interval((*prefix, MIN), (*prefix, *values, MAX))
            case ">":
                interval = Interval((*prefix, *values, MAX), (*prefix, MAX))
            case _:
                interval = Interval((*prefix, *values, MIN), (*prefix, MAX))
        return number, interval
    return None
