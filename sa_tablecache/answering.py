"""What storage says to a question: choosing an index, slicing, filtering, sorting.

In: a :class:`.Question` and a state that readers may be answered from. Out: rows. Pure: whether the
cache may be asked at all is decided in ``reading.py``, and no SQL is run.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, cast

from . import criteria
from .comparison import Inexact
from .criteria import And
from .layout import Layout
from .orders import NAN, Record
from .planner import Question
from .prepared import Candidate, Columns
from .scores import EVERYTHING, NULLS_FIRST, NULLS_LAST, Extreme, Interval, IntervalSet
from .shapes import Ordering, Shape
from .state import State


def covered_candidate(question: Question, state: State) -> Candidate | None:
    """Return the index with the fewest records in range, of those that are covered."""
    coverage = state.coverage
    usable: list[Candidate] = []
    unbounded: list[Candidate] = []
    for candidate in question.candidates:
        if candidate.testable and (
            coverage.everything or coverage.covers(candidate.index, candidate.intervals)
        ):
            (unbounded if candidate.intervals is EVERYTHING else usable).append(candidate)
    if not usable and unbounded:
        return next((each for each in unbounded if each.direction is not None), unbounded[0])
    if len(usable) > 1:
        orders = state.storage.orders

        def cost(candidate: Candidate) -> tuple[int, int]:
            # Of two indexes with as many records, the one that leaves less to test is better.
            size = sum(map(orders[candidate.index].count, candidate.intervals))
            return size, len(candidate.residual)

        return min(usable, key=cost)
    return usable[0] if usable else None


def limited_candidate(question: Question, state: State) -> Candidate | None:
    """Return an index that covers the first records of its range, if the limit asks for no more."""
    if question.limit is None:
        return None
    for candidate in question.candidates:
        if candidate.residual or len(candidate.intervals) != 1:
            continue
        direction = candidate.direction
        if direction is not None and holds_first(
            state,
            candidate.index,
            candidate.intervals.intervals[0],
            question.offset + question.limit,
            from_end=direction,
        ):
            return candidate
    return None


def holds_first(
    state: State, index: str, interval: Interval, count: int, *, from_end: bool = False
) -> bool:
    """Whether storage is known to hold the first (last) so many records of an interval."""
    found = state.coverage.of(index).overlapping(interval)
    if not found:
        return False
    if from_end:
        inner = Interval(max(found[-1].lower, interval.lower), interval.upper)
        begins = found[-1].upper >= interval.upper
    else:
        inner = Interval(interval.lower, min(found[0].upper, interval.upper))
        begins = found[0].lower <= interval.lower
    return begins and state.storage.orders[index].count(inner) >= count


def loadable_candidate(
    layout: Layout, question: Question
) -> tuple[Candidate, int | None, bool] | None:
    """Return the index along which a question would best be loaded, if it should be.

    :returns: the index with its intervals; how many records are enough, ``None`` for all; and
        whether from the end.
    :raises Inexact: if storage could not give the answer even then.
    """
    best: tuple[Any, Candidate, int | None, bool | None] | None = None
    for candidate in question.candidates:
        if not candidate.testable or not layout.is_expressible(
            candidate.index, candidate.intervals
        ):
            continue
        direction = candidate.direction
        most = None
        if (
            question.limit is not None
            and direction is not None
            and not candidate.residual
            and len(candidate.intervals) == 1
        ):
            most = question.offset + question.limit
        is_open = any(map(_is_open, candidate.intervals))
        few = question.limit is not None or question.shape.exists
        if is_open and most is None and (candidate.residual or few):
            continue  # the database needs less for its answer than would have to be read
        rank = (most is None, is_open, len(candidate.residual), -len(candidate.fixed))
        if best is None or rank < best[0]:
            best = rank, candidate, most, direction
    if best is None:
        return None
    _, candidate, most, direction = best
    if direction is None:
        check_sortable(question.shape.orderings, layout.columns)
    return candidate, most, bool(direction)


def _is_open(interval: Interval) -> bool:
    """Whether an interval has no bound on one side, NULLs aside."""
    return any(all(isinstance(value, Extreme) for value in cut) for cut in interval)


def partial_candidate(
    layout: Layout, question: Question, state: State
) -> tuple[Candidate, IntervalSet] | None:
    """Return the index of which storage holds most of the answer, and what is missing."""
    best: tuple[Candidate, IntervalSet] | None = None
    most = 0
    if question.shape.exists or not all(map(layout.knows_zone, question.shape.projection or ())):
        return None
    for candidate in question.candidates:
        missing = state.coverage.missing(candidate.index, candidate.intervals)
        present = candidate.intervals - missing
        if (
            not present
            or not layout.is_expressible(candidate.index, missing)
            or not candidate.testable
        ):
            continue
        order = state.storage.orders[candidate.index]
        size = sum(map(order.count, present))
        if size > most:
            best, most = (candidate, missing), size
    return best


def records_in(
    state: State, index: str, intervals: Iterable[Any], *, descending: bool = False
) -> list[Record]:
    """Return the stored records of intervals of an index, in its order."""
    order = state.storage.orders[index]
    result: list[Record] = []
    for interval in intervals:
        part = order.between(interval)
        result = result + part if result else part
    if descending:
        result.reverse()
    return result


def from_state(
    layout: Layout, question: Question, state: State, candidate: Candidate
) -> Sequence[Any]:
    """Return the rows of a question that storage covers."""
    shape, columns = question.shape, layout.columns
    if shape.count and not candidate.residual:
        order = state.storage.orders[candidate.index]
        number = sum(map(order.count, candidate.intervals))
        return [(number > 0 if shape.exists else number,)]
    direction = candidate.direction
    if direction is None:
        check_sortable(shape.orderings, columns)
    if (
        question.limit is not None
        and direction is not None
        and not candidate.residual
        and len(candidate.intervals) == 1
    ):
        few = state.storage.orders[candidate.index].some(
            candidate.intervals.intervals[0],
            question.offset + question.limit,
            from_end=direction,
        )
        return finished(layout, question, few, ordered=True)
    records: Sequence[Record] = records_in(
        state, candidate.index, candidate.intervals.intervals, descending=bool(direction)
    )
    if candidate.residual:
        records = filter_records(shape, candidate.residual, question, columns, records)
    return finished(layout, question, records, ordered=direction is not None)


def finished(
    layout: Layout, question: Question, records: Sequence[Record], *, ordered: bool
) -> Sequence[Any]:
    """Apply order, offset, limit and projection."""
    shape, columns = question.shape, layout.columns
    if shape.count:
        return [(len(records) > 0 if shape.exists else len(records),)]
    if not ordered:
        records = sort(records, shape.orderings, columns)
    if question.limit is not None:
        records = records[question.offset : question.offset + question.limit]
    elif question.offset:
        records = records[question.offset :]
    records = records if isinstance(records, list) else list(records)
    if layout.loader.mutable:
        records = layout.given(records)
    if shape.projection is None:
        return records
    values = attrgetter(*shape.projection)
    rows: list[Any]
    if len(shape.projection) == 1:
        rows = [(values(record),) for record in records]
    else:
        rows = list(map(values, records))
    # Records have datetimes in UTC, but a column has them as the driver gives them.
    zones = [layout.loader.zones.get(name) for name in shape.projection]
    if not all(zone is None or zone is dt.UTC for zone in zones):
        rows = [
            tuple(
                value if zone is None or value is None else value.astimezone(zone)
                for value, zone in zip(row, zones, strict=True)
            )
            for row in rows
        ]
    return rows


# -- order -------------------------------------------------------------------------------------


def check_sortable(orderings: Sequence[Ordering], columns: Columns) -> None:
    """Raise :class:`.Inexact` unless Python sorts by these columns as the database does."""
    for ordering in orderings:
        how = columns.comparisons.get(ordering.column)
        if how is None or not how.order:
            why = how.reason if how is not None else ""
            raise Inexact(f"ORDER BY {ordering.column}: {why or 'no order that Python knows'}")


def sort(
    records: Sequence[Record], orderings: Sequence[Ordering], columns: Columns
) -> list[Record]:
    """Return records in an order that no index gives; O(n log n) for each change of direction."""
    check_sortable(orderings, columns)
    result = list(records)
    null = NULLS_FIRST if columns.nulls_first else NULLS_LAST
    for ordering in reversed(orderings):
        name = ordering.column
        if name not in columns.public:
            raise Inexact(f"ORDER BY {name}, which is computed by the database")
        key: Callable[[Any], Any] = attrgetter(name)
        nan = columns.comparisons[name].nan_is_greatest
        if columns.plan.column(name).nullable or nan:
            key = _null_safe(key, null, nan=nan)
        result.sort(key=key, reverse=ordering.descending)
    return result


def _null_safe(get: Callable[[Any], Any], null: Any, *, nan: bool) -> Callable[[Any], Any]:
    def key(record: Any) -> Any:
        value = get(record)
        if value is None:
            return null
        return NAN if nan and value != value else value  # noqa: PLR0124

    return key


# -- residual conditions ------------------------------------------------------------------------


def check_residual(shape: Shape, residual: tuple[int, ...], columns: Columns) -> None:
    """Raise :class:`.Inexact` if a remaining condition is about what records do not have."""
    for number in residual:
        for name in criteria.columns_of(shape.conjuncts[number]):
            if name not in columns.public:
                raise Inexact(f"{name} is computed by the database")


def filter_records(
    shape: Shape,
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
    function = shape.filters.get(key)
    if function is None:
        check_residual(shape, residual, columns)
        source = criteria.predicate_source(
            And(tuple(shape.conjuncts[i] for i in residual)),
            bound,
            columns.comparisons,
            lambda name: shape.plan.column(name).nullable,
        )
        names = ", ".join(f"p{at}" for at in range(len(bound)))
        scope: dict[str, Any] = {}
        exec(  # noqa: S102 - built from column names and operators only
            f"def keep(records, {names}):\n    return [r for r in records if {source}]", scope
        )
        if len(shape.filters) > 64:
            shape.filters.clear()
        function = shape.filters[key] = cast("Callable[..., list[Record]]", scope["keep"])
    return function(records, *bound)
