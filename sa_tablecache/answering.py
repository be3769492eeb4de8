"""What storage says to a question: choosing an index, slicing, filtering, sorting.

In: a :class:`.Question` and a state that readers may be answered from. Out: rows. Pure: whether the
cache may be asked at all is decided in ``reading.py``, and no SQL is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from .layout import Layout
from .planner import Candidate, Question, check_sortable, index_direction, sort
from .scores import IntervalSet
from .storage import Record
from .table import State


def covered_candidate(question: Question, state: State) -> Candidate | None:
    """Return the index with the fewest records in range, of those that are covered."""
    best: Candidate | None = None
    fewest = 0
    for candidate in question.candidates:
        if state.coverage.covers(candidate.index, candidate.intervals):
            order = state.storage.orders[candidate.index]
            size = sum(map(order.count, candidate.intervals))
            if best is None or size < fewest:
                best, fewest = candidate, size
    return best


def partial_candidate(
    layout: Layout, question: Question, state: State
) -> tuple[Candidate, IntervalSet] | None:
    """Return the index of which storage holds most of the answer, and what is missing."""
    best: tuple[Candidate, IntervalSet] | None = None
    most = 0
    for candidate in question.candidates:
        missing = state.coverage.missing(candidate.index, candidate.intervals)
        present = candidate.intervals - missing
        if not present or not layout.is_expressible(candidate.index, missing):
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
        result = part if not result else result + part
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
        return [(sum(map(order.count, candidate.intervals)),)]
    direction = index_direction(candidate, shape.orderings, columns)
    if direction is None:
        check_sortable(shape.orderings, columns)
    records: Sequence[Record] = records_in(
        state, candidate.index, candidate.intervals, descending=bool(direction)
    )
    records = shape.filter(candidate.residual, question, columns, records)
    return finished(layout, question, records, ordered=direction is not None)


def finished(
    layout: Layout, question: Question, records: Sequence[Record], *, ordered: bool
) -> Sequence[Any]:
    """Apply order, offset, limit and projection."""
    shape, columns = question.shape, layout.columns
    if shape.count:
        return [(len(records),)]
    if not ordered:
        records = sort(records, shape.orderings, columns)
    if question.limit is not None:
        records = records[question.offset : question.offset + question.limit]
    elif question.offset:
        records = records[question.offset :]
    records = layout.given(records if isinstance(records, list) else list(records))
    if shape.projection is None:
        return records
    values = attrgetter(*shape.projection)
    if len(shape.projection) == 1:
        return [(values(record),) for record in records]
    return list(map(values, records))
