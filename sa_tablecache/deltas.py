"""Which records a set of changed rows touches: the delta queries.

In: marks, and the storage as it is. Out: the anchors whose records have to be replaced, and those
records as they are in one snapshot.

A changed row touches the stored records with it in their lineage, and the records that the database
joins it into now. For each base table with marks one SELECT finds the latter; another reads the
anchors that it did not return whole: those that the changed row has left, for instance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from sqlalchemy import Connection, tuple_
from sqlalchemy.sql import ColumnElement

from .analysis import Leaf, TableName
from .changes import Mark
from .coverage import Coverage
from .layout import Layout, RowKey
from .loading import Rows
from .orders import Hidden, Record
from .storage import Storage

BATCH = 5_000
"""Keys in one delta query."""

MOST_ANCHORS = 20_000
"""More touched anchors than this are refreshed by reading the whole coverage again."""


def read_coverage(layout: Layout, connection: Connection, coverage: Coverage) -> Rows:
    """Read all that is covered: one SELECT."""
    return layout.loader.read(connection, layout.coverage_clause(coverage), stream=True)


def read_touched(
    layout: Layout,
    connection: Connection,
    storage: Storage,
    coverage: Coverage,
    marks: Iterable[Mark],
) -> tuple[set[RowKey] | None, Rows]:
    """Read the records that changed rows touch, now or as they are stored.

    :returns: the anchors to replace, ``None`` for all of them, and their records now.
    """
    plan = layout.plan
    anchor = plan.anchor
    assert anchor is not None
    keys: dict[TableName, set[RowKey]] = {}
    for mark in marks:
        keys.setdefault(mark.table, set()).add(mark.key)
    covered = layout.coverage_clause(coverage)
    touched: set[RowKey] = set()
    complete: dict[RowKey, tuple[Record, Hidden | None]] = {}
    for leaf in plan.leaves:
        wanted = keys.get(leaf.table)
        if wanted is None:
            continue
        if leaf is anchor:
            touched |= wanted
            continue
        stored = storage.with_hidden(layout.records_of(storage, leaf, wanted))
        touched.update(layout.anchor_key(record, hidden) for record, hidden in stored)
        for record, hidden in _delta(layout, connection, leaf, wanted, covered).pairs():
            key = layout.anchor_key(record, hidden)
            touched.add(key)
            if plan.one_row_per_anchor:
                complete[key] = record, hidden
    rest = touched - complete.keys()
    if len(rest) > MOST_ANCHORS:
        return None, read_coverage(layout, connection, coverage)
    rows = _delta(layout, connection, anchor, rest, covered) if rest else layout.no_rows()
    for record, hidden in complete.values():
        rows.records.append(record)
        if rows.hidden is not None:
            rows.hidden.append(cast("Hidden", hidden))
    return touched, rows


def _delta(
    layout: Layout,
    connection: Connection,
    leaf: Leaf,
    keys: set[RowKey],
    covered: list[ColumnElement[bool]],
) -> Rows:
    """Read the covered records that certain rows of one leaf are part of now."""
    columns = [layout.plan.column(name).clause for name in leaf.hidden]
    ordered = sorted(keys, key=repr)
    rows = layout.no_rows()
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        criterion = (
            columns[0].in_([key[0] for key in batch])
            if len(columns) == 1
            else tuple_(*columns).in_(batch)
        )
        more = layout.loader.read(connection, [criterion, *covered])
        rows.records += more.records
        if rows.hidden is not None:
            rows.hidden += more.hidden or []
    return rows
