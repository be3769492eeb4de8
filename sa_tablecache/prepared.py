"""What of a question depends on the statement's shape alone: worked out once, not at each read.

In: a :class:`.Shape`, and what is known of the view's columns and indexes. Out: which comparison
each parameter is for; and for each index a :class:`Way`, which makes a :class:`Candidate` of the
parameters' values. Pure.

Only conditions that compare one column with one value have ways: ``==`` of the first scores of an
index, and one range of the next. ``planner.py`` can do all others, and is asked for them; where
there is a way, it gives what the planner would have given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

from .analysis import ViewPlan
from .comparison import Comparison
from .criteria import And, Compare, Node, RowCompare
from .orders import Order
from .scores import (
    EVERYTHING,
    MAX,
    MIN,
    NULLS_FIRST,
    NULLS_LAST,
    Extreme,
    Interval,
    IntervalSet,
)
from .shapes import Ordering, Shape

MOST_PREPARED: Final = 1_000
"""So many shapes are remembered for each view and database."""


class Candidate(NamedTuple):
    """One index and the intervals of it that contain the answer."""

    index: str  # type: ignore[assignment]  # hides tuple.index(), for which nobody looks here
    intervals: IntervalSet
    residual: tuple[int, ...]
    """The conditions, by number, that the intervals do not express."""
    fixed: frozenset[str]
    """The columns that have one value throughout."""
    testable: bool
    """Whether what remains is about columns that records have."""
    direction: bool | None
    """Whether the index gives the wanted order: ``False``, or ``True`` if read backwards; ``None``
    if the records have to be sorted."""


@dataclass(frozen=True, eq=False)
class Columns:
    """What is known, for one database, of the columns and indexes of a view."""

    plan: ViewPlan
    comparisons: Mapping[str, Comparison]
    orders: Mapping[str, Order]
    nulls_first: bool
    prepared: dict[Shape, Prepared] = field(default_factory=dict, init=False, repr=False)
    """What was worked out of shapes; here, so that it goes with the cache."""

    @cached_property
    def public(self) -> frozenset[str]:
        """The columns that records have."""
        return frozenset(c.name for c in self.plan.columns)

    def candidate(
        self,
        order: Order,
        shape: Shape,
        intervals: IntervalSet,
        residual: tuple[int, ...],
        fixed: frozenset[str],
    ) -> Candidate:
        """Return a candidate, with what follows for it from the shape."""
        return Candidate(
            order.name,
            intervals,
            residual,
            fixed,
            all(shape.about[number] <= self.public for number in residual),
            index_direction(order, fixed, shape.orderings, self.comparisons),
        )


def index_direction(
    order: Order,
    fixed: frozenset[str],
    orderings: Sequence[Ordering],
    comparisons: Mapping[str, Comparison],
) -> bool | None:
    """Return :attr:`Candidate.direction` of an index, some columns having one value throughout."""
    wanted = [o for o in orderings if o.column not in fixed]
    if not wanted:
        return False
    # A column that has one value throughout does not influence the order of the keys.
    parts = [part for part in order.parts if part.name not in fixed]
    if len({o.descending for o in wanted}) > 1 or len(wanted) > len(parts):
        return None
    for part, ordering in zip(parts, wanted, strict=False):
        if part.name != ordering.column or part.hashed:
            return None
        if not comparisons[part.name].order:
            return None
    return wanted[0].descending


#: Makes a named tuple without a call of the function that would do it, at each read.
_tuple: Final[Any] = tuple.__new__


class Bound(NamedTuple):
    """One end of a range: which parameter it is, and on which side of its value it lies."""

    parameter: int
    side: Extreme


@dataclass(frozen=True, slots=True)
class Way:
    """How one index answers a shape: single values of its first scores, then a range of one."""

    points: tuple[int, ...]
    """The parameters that are the values of the first scores."""
    first: Bound | None
    last: Bound | None
    null: Extreme | None
    """The place of NULL among the values of the range, which it is never in."""
    model: Candidate
    """The candidate that it gives, but for the intervals."""

    def candidate(self, bound: Sequence[Any]) -> Candidate | None:
        """Return the candidate for some values; ``None`` if the planner has to be asked."""
        prefix = tuple([bound[at] for at in self.points]) if self.points else ()
        if None in prefix:
            return None
        low = high = None
        lower, upper = (*prefix, MIN), (*prefix, MAX)
        if self.first is not None:
            at, side = self.first
            low = bound[at]
            if low is None:
                return None
            lower = (*prefix, low, side)
        if self.last is not None:
            at, side = self.last
            high = bound[at]
            # Below a single value there may be a range of the next score, and below none anything.
            if high is None or not (low is None or low < high):
                return None
            upper = (*prefix, high, side)
        if self.null is None or (high if self.null is NULLS_LAST else low) is not None:
            intervals = IntervalSet.of(_tuple(Interval, (lower, upper)))
        else:
            cuts = (*prefix, self.null, MIN), (*prefix, self.null, MAX)
            intervals = IntervalSet.of(Interval(lower, cuts[0]), Interval(cuts[1], upper))
        index, _, residual, fixed, testable, direction = self.model
        result: Candidate = _tuple(
            Candidate, (index, intervals, residual, fixed, testable, direction)
        )
        return result


class Prepared(NamedTuple):
    """What is known of a shape before its parameters are."""

    compared: tuple[tuple[int, Comparison], ...] | None
    """With what each parameter is compared; ``None`` if the criteria say more than that."""
    candidates: tuple[Candidate | None, ...]
    """For each index the candidate, if it is the same for all parameters."""
    ways: tuple[tuple[int, Order, Way | None], ...]
    """For each other its number and a way; ``None`` if the planner has to be asked."""


def prepared_for(shape: Shape, columns: Columns) -> Prepared:
    """Return what is known of a shape."""
    known = columns.prepared.get(shape)
    if known is None:
        if len(columns.prepared) >= MOST_PREPARED:
            columns.prepared.clear()
        orders = list(columns.orders.values())
        found = [_way(order, shape, columns) for order in orders]
        known = columns.prepared[shape] = Prepared(
            _compared(shape, columns),
            tuple(way if isinstance(way, Candidate) else None for way in found),
            tuple(
                (number, order, way)
                for number, (order, way) in enumerate(zip(orders, found, strict=True))
                if not isinstance(way, Candidate)
            ),
        )
    return known


def _compared(shape: Shape, columns: Columns) -> tuple[tuple[int, Comparison], ...] | None:
    """Return with what each parameter is compared, if that and no more is to be looked at."""
    if not _is_conjunction(shape.where):
        return None
    compared = []
    for node in shape.conjuncts:
        how = columns.comparisons.get(node.column) if isinstance(node, Compare) else None
        if how is None or not isinstance(node, Compare):
            return None
        if not (how.equality if node.op in ("==", "!=") else how.order):
            return None
        compared.append((node.parameter, how))
    return tuple(compared)


def _is_conjunction(node: Node) -> bool:
    """Whether a condition is comparisons that all have to be true, none of them of row values."""
    if isinstance(node, And):
        return not node.row and all(map(_is_conjunction, node.nodes))
    return isinstance(node, Compare)


def _way(order: Order, shape: Shape, columns: Columns) -> Way | Candidate | None:
    conjuncts = shape.conjuncts
    if order.parts[0].name not in shape.used:
        everything = tuple(range(len(conjuncts)))
        return columns.candidate(order, shape, EVERYTHING, everything, frozenset())
    if any(isinstance(node, RowCompare) for node in conjuncts):
        return None
    used: list[int] = []
    points: list[int] = []
    fixed: set[str] = set()
    first = last = None
    null = None
    for part in order.parts:
        numbers = [n for n, about in enumerate(shape.about) if about == {part.name}]
        found = [conjuncts[number] for number in numbers]
        if part.hashed or not found:
            break
        if not all(isinstance(node, Compare) for node in found):
            return None
        nodes = [node for node in found if isinstance(node, Compare)]
        used += numbers
        if [node.op for node in nodes] == ["=="]:
            points.append(nodes[0].parameter)
            fixed.add(part.name)
            continue
        below = [Bound(n.parameter, _SIDES[n.op]) for n in nodes if n.op in (">", ">=")]
        above = [Bound(n.parameter, _SIDES[n.op]) for n in nodes if n.op in ("<", "<=")]
        if (
            len(below) + len(above) < len(nodes)
            or max(len(below), len(above)) > 1
            or not columns.comparisons[part.name].order
        ):
            return None
        first, last = below[0] if below else None, above[0] if above else None
        if part.nullable:
            null = NULLS_FIRST if columns.nulls_first else NULLS_LAST
        break
    if not used:
        return None
    residual = tuple(n for n in range(len(conjuncts)) if n not in used)
    model = columns.candidate(order, shape, EVERYTHING, residual, frozenset(fixed))
    return Way(tuple(points), first, last, null, model)


#: On which side of its value the end of a range lies.
_SIDES: Final = {">": MAX, ">=": MIN, "<": MIN, "<=": MAX}
