"""Loads in parts, along an index: the first so many records of what is missing, and where they end.

In: intervals of an index, and how many records to read. Out: rows, and the part of the intervals of
which they are all. What a chunked load has read it keeps: one that failed goes on where it was.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.sql import ColumnElement

from .exc import NotExpressible
from .layout import Layout
from .loading import Check, Progress
from .rows import Rows
from .scores import MAX, MIN, Interval, IntervalSet


def sorted_columns(layout: Layout, index: str) -> list[ColumnElement[Any]]:
    """Return what to sort by, so that the database gives the keys of an index in its order.

    Only the first columns, where others have an order that Python does not know.
    """
    clauses: list[ColumnElement[Any]] = []
    for part in layout.orders[index].parts:
        if part.hashed or not layout.columns.comparisons[part.name].order:
            break
        clauses.append(layout.plan.column(part.name).clause)
    return clauses


def read_first(
    layout: Layout,
    connection: Connection,
    index: str,
    missing: IntervalSet,
    most: int,
    progress: Progress | None = None,
    check: Check | None = None,
    *,
    descending: bool = False,
) -> tuple[Rows, IntervalSet]:
    """Read about the first ``most`` records of intervals; return them and what they are all of.

    :param descending: the last ones instead.

    One SELECT with ORDER BY and LIMIT; more only where more records than that have equal scores and
    keys that cannot be sorted in Python.

    :raises NotExpressible: if the index does not sort in Python as in the database.
    """
    columns = sorted_columns(layout, index)
    if not columns or not layout.is_expressible(index, missing):
        part = layout.orders[index].parts[0].name
        raise NotExpressible(
            f"view {layout.plan.name}: {index or 'its primary key'} cannot be loaded in chunks: "
            f"{part}: {layout.columns.comparisons[part].reason or 'no order that Python knows'}; "
            "load it without chunk="
        )
    where = layout.where(index, missing)
    while True:
        rows = layout.loader.read(
            connection,
            where,
            stream=True,
            progress=progress,
            check=check,
            order_by=[column.desc() for column in columns] if descending else columns,
            limit=most,
        )
        if len(rows.records) < most:
            return rows, missing
        rows, part_read = _complete(layout, rows, index, missing, len(columns), descending)
        if rows.records:
            return rows, part_read
        most *= 2


def _complete(
    layout: Layout, rows: Rows, index: str, missing: IntervalSet, depth: int, descending: bool
) -> tuple[Rows, IntervalSet]:
    """Return the rows up to a cut that follows from the last one, and what of the intervals is."""
    order = layout.orders[index]
    pairs = rows.pairs()
    last = order.key_of(*pairs[-1])
    # Where others have these scores, too, who knows in which order they come.
    exact = depth == len(order.parts)
    cut = (*last[:depth], MIN if exact is descending else MAX)
    if not exact:
        count = len(pairs)
        while count and order.key_of(*pairs[count - 1])[:depth] == last[:depth]:
            count -= 1
        rows = rows.first(count)
    inside = Interval(cut, (MAX,)) if descending else Interval((MIN,), cut)
    return rows, missing & IntervalSet([inside])
