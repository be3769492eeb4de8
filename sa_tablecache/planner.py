"""Which intervals of which index contain the answer to a question.

In: a :class:`.Shape`, its parameters, and what is known of the view's columns and indexes. Out: a
:class:`Question`: for each index the intervals that contain the answer, and the conditions that
remain to be tested record by record.

Pure: no SQL is run and no record is looked at. Whatever Python would not compare as the database
does raises :class:`.Inexact`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.types import TypeDecorator

from . import criteria
from .analysis import ViewPlan
from .comparison import Inexact
from .criteria import And, Compare, Const, In, IsNull, Node, Or, RowCompare, Truth, columns_of
from .exc import NotExpressible
from .orders import Order
from .prepared import Candidate, Columns, prepared_for
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
from .shapes import Number, Shape

MOST_POINTS: Final = 1_000
"""So many intervals at most are made from IN lists; longer ones are filtered."""


class Question(NamedTuple):
    """A shape with its parameters."""

    shape: Shape
    bound: tuple[Any, ...]
    lists: tuple[Any, ...]
    """What of IN lists decides how they are tested."""
    limit: int | None
    offset: int
    candidates: tuple[Candidate, ...]


# -- questions ---------------------------------------------------------------------------------


def ask(
    shape: Shape, parameters: Sequence[BindParameter[Any] | Number], columns: Columns
) -> Question:
    """Return the question that a shape and its parameters ask of a database.

    :raises Inexact: if Python would not give the database's answer.
    """
    prepared = columns.prepared.get(shape) or prepared_for(shape, columns)
    raw = []
    for parameter in parameters:
        if parameter.required:
            raise Inexact("a parameter without a value")
        if isinstance(parameter.type, TypeDecorator):
            raise Inexact("a parameter that its type changes")
        raw.append(parameter.value if parameter.callable is None else parameter.effective_value)
    bound: list[Any] = [False] * len(raw)
    lists: tuple[Any, ...] = ()
    if prepared.compared is not None:
        for at, how in prepared.compared:
            bound[at] = how.parameter(raw[at], parameters[at].type)
    else:
        types = [parameter.type for parameter in parameters]
        criteria.bind(shape.where, raw, bound, columns.comparisons, types)
        lists = tuple(v[1:] for v in bound if type(v) is tuple)
    limit = None if shape.limit is None else _row_count(raw[shape.limit])
    offset = 0 if shape.offset is None else _row_count(raw[shape.offset])
    candidates: list[Any] = list(prepared.candidates)
    for number, order, way in prepared.ways:
        candidate = None if way is None else way.candidate(bound)
        candidates[number] = candidate or candidate_of(order, shape, bound, columns)
    # Not Question(...), a function that would be called for each hit.
    new: Any = tuple.__new__
    question: Question = new(
        Question, (shape, tuple(bound), lists, limit, offset, tuple(candidates))
    )
    return question


def _row_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise Inexact("a LIMIT that is no number of rows is left to the database")
    return value


def candidate_of(order: Order, shape: Shape, bound: Sequence[Any], columns: Columns) -> Candidate:
    """Return the intervals of one index that contain all records meeting the conditions."""
    conjuncts, about = shape.conjuncts, shape.about
    prefixes: list[tuple[Any, ...]] = [()]
    used: set[int] = set()
    fixed: set[str] = set()
    intervals: IntervalSet | None = None
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
        if not exact or len(values) * len(prefixes) > MOST_POINTS:
            break
        used.update(exact)
        points = _points(values)
        if points is None:
            intervals = IntervalSet(
                Interval(prefix + i.lower, prefix + i.upper) for prefix in prefixes for i in values
            )
            break
        prefixes = [(*prefix, point) for prefix in prefixes for point in points]
        if len(points) == 1:
            fixed.add(part.name)
    if intervals is None:
        intervals = IntervalSet(Interval((*p, MIN), (*p, MAX)) for p in prefixes)
    residual = tuple(number for number in range(len(conjuncts)) if number not in used)
    return columns.candidate(order, shape, intervals, residual, frozenset(fixed))


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


# -- loads -------------------------------------------------------------------------------------


def load_target(
    shape: Shape, parameters: Sequence[BindParameter[Any]], columns: Columns
) -> tuple[str, IntervalSet]:
    """Return the index and the intervals that the criteria of a load say.

    :raises NotExpressible: if no index can express all of them; it says which one would.
    """
    try:
        question = ask(shape, parameters, columns)
    except Inexact as reason:
        raise no_range(shape.plan, str(reason)) from None
    for candidate in question.candidates:
        if not candidate.residual:
            return candidate.index, candidate.intervals
    raise NotExpressible(
        f"view {shape.plan.name}: no index can express these criteria as a range of scores; "
        f"{_suggestion(shape)}"
    )


def no_range(plan: ViewPlan, reason: str) -> NotExpressible:
    """Return the error for criteria that are no ranges at all."""
    return NotExpressible(f"view {plan.name}: the criteria cannot be a range of scores ({reason})")


def _suggestion(shape: Shape) -> str:
    """Say which index would express the criteria: single values first, then at most one range."""
    single: list[str] = []
    ranged: list[str] = []
    for node in shape.conjuncts:
        fixed = isinstance(node, In | IsNull) or (isinstance(node, Compare) and node.op == "==")
        for name in sorted(columns_of(node)):
            kind = single if fixed else ranged
            if name not in single + ranged:
                kind.append(name)
    if len(ranged) > 1 or any(len(columns_of(node)) > 1 for node in shape.conjuncts):
        return (
            "a ScoreIndex can be a range of one column, below single values of others, and these "
            f"are about {', '.join(single + ranged)}"
        )
    names = ", ".join(f'"{name}"' for name in single + ranged)
    return f"ScoreIndex({names}) would"
