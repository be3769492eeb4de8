"""Score intervals as SQL criteria.

In: intervals of an index. Out: the WHERE clause that selects exactly the rows whose scores are in
them, NULLs included, compared column by column as an index sorts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, false, literal, or_, true
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.elements import ColumnClause

from .scores import MAX, MIN, NULLS_FIRST, NULLS_LAST, Extreme, Interval, IntervalSet


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """A column that an index sorts by, as SQL."""

    clause: ColumnClause[Any]
    nullable: bool
    nulls_first: bool


def intervals_clause(columns: Sequence[ScoreColumn], intervals: IntervalSet) -> ColumnElement[bool]:
    """Return the criteria that select exactly the rows whose scores are in the intervals."""
    return or_(false(), *(_interval_clause(columns, i) for i in intervals))


def _interval_clause(columns: Sequence[ScoreColumn], interval: Interval) -> ColumnElement[bool]:
    lower, upper = interval
    clauses: list[ColumnElement[bool]] = [true()]
    at = 0
    while at < min(len(lower), len(upper)) - 1 and lower[at] == upper[at]:
        clauses.append(_equals(columns[at].clause, lower[at]))
        at += 1
    columns, lower, upper = columns[at:], lower[at:], upper[at:]
    # "All but NULL" is said by any comparison with a value.
    if upper == (NULLS_LAST, MIN) and len(lower) > 1:
        columns = (ScoreColumn(columns[0].clause, False, False), *columns[1:])
    elif lower == (NULLS_FIRST, MAX) and len(upper) > 1:
        columns = (ScoreColumn(columns[0].clause, False, True), *columns[1:])
        clauses.append(_beyond(columns, upper, above=False))
        return and_(*clauses)
    else:
        clauses.append(_beyond(columns, upper, above=False))
    clauses.append(_beyond(columns, lower, above=True))
    return and_(*clauses)


def _equals(column: ColumnClause[Any], value: Any) -> ColumnElement[bool]:
    if value is NULLS_FIRST or value is NULLS_LAST:
        return column.is_(None)
    return column == _literal(value, column)


def _literal(value: Any, column: ColumnClause[Any]) -> ColumnElement[Any]:
    """Return a score as SQL; that of a NaN stands in keys for where the database sorts it."""
    return literal(float("nan") if isinstance(value, Extreme) else value, column.type)


def _beyond(
    columns: Sequence[ScoreColumn], cut: tuple[Any, ...], *, above: bool
) -> ColumnElement[bool]:
    """Return "the scores are after (before) the cut", compared column by column."""
    value = cut[0]
    if len(cut) == 1:
        return true() if (value is MIN) is above else false()
    column = columns[0].clause
    nulls_beyond = columns[0].nullable and columns[0].nulls_first is not above
    inclusive = len(cut) == 2 and (cut[1] is MIN) is above
    whole = len(cut) == 2 and cut[1] in (MIN, MAX)
    if value is NULLS_FIRST or value is NULLS_LAST:
        strictly: ColumnElement[bool] = (
            false() if (value is NULLS_LAST) is above else column.is_not(None)
        )
        if whole:
            return or_(strictly, column.is_(None)) if inclusive else strictly
    else:
        bound = _literal(value, column)
        compare = (
            (column >= bound if above else column <= bound)
            if whole and inclusive
            else (column > bound if above else column < bound)
        )
        strictly = or_(compare, column.is_(None)) if nulls_beyond else compare
        if whole:
            return strictly
    return or_(strictly, and_(_equals(column, value), _beyond(columns[1:], cut[1:], above=above)))
