"""Which columns of its base tables a view uses, and for what.

In: a view's plan. Out: for each base table, the columns that its statement uses at all, and those
that decide which records there are and where in an index: by joins, criteria, keys and scores. An
UPDATE of the others leaves every record in its place; one of columns that are not used at all
leaves the view as it is.

Pure. Nothing is hidden from it: views with ``text()`` are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Column, Select, Table
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ColumnClause
from sqlalchemy.sql.selectable import Alias

from .analysis import TableName, ViewPlan, rendered_columns, table_name

Usage = dict[TableName, frozenset[str]]
"""For each base table, names of columns."""


def base_tables(plan: ViewPlan) -> frozenset[Table]:
    """Return the tables that a view's statement reads."""
    return frozenset(e for e in visitors.iterate(plan.statement) if isinstance(e, Table))


def used_columns(plan: ViewPlan) -> Usage:
    """Return the columns that a view's statement uses in any way."""
    return rendered_columns(plan.statement)


def placing_columns(plan: ViewPlan) -> Usage:
    """Return the columns that decide which records there are, and where in an index.

    For a view of which base rows can be followed to records: a plain join.
    """
    statement: Any = plan.statement
    if not isinstance(statement, Select):
        return used_columns(plan)
    placing = {*plan.key, *(column.name for column in plan.hidden)}
    for index in plan.view.__indexes__.values():
        placing.update(index.column_names)
    for leaf in plan.leaves:
        placing.update(leaf.visible or ())
    shown = {column.name for column in plan.columns} - placing
    columns = [c for c in statement._raw_columns if getattr(c, "name", None) not in shown]
    return _columns_in([*columns, *statement._where_criteria, *statement.get_final_froms()])


def score_columns(plan: ViewPlan) -> dict[TableName, tuple[tuple[Column[Any], str], ...]]:
    """Return the columns by whose values all records with a row of a table are found in an index.

    They lead the index, and the table is in each record exactly once: every record that some rows
    are part of, before or after they changed, is then between the smallest and the largest of
    these values. Each with the name of the index.
    """
    once = Counter([leaf.table for leaf in plan.leaves] + [path.table for path in plan.paths])
    found: dict[TableName, list[tuple[Column[Any], str]]] = {}
    for index in plan.view.__indexes__.values():
        name = index.column_names[0]
        source = plan.column(name).source
        leads: list[tuple[TableName, Column[Any]]] = []
        if plan.grouped:
            leads = [
                (path.table, column)
                for path in plan.paths
                for column, shown, vanishes in zip(
                    path.columns, path.stored, path.vanishing, strict=True
                )
                if shown == name and not vanishes
            ]
        elif source is not None and isinstance(source.table, Table):
            table = table_name(source.table)
            leads = [(table, source) for v in plan.leaves if v.table == table and not v.nullable]
        for table, column in leads:
            if once[table] == 1 and table not in plan.coarse:
                found.setdefault(table, []).append((column, index.name))
    return {table: tuple(leads) for table, leads in found.items()}


def _columns_in(elements: Iterable[Any]) -> Usage:
    found: dict[TableName, set[str]] = {}
    for root in elements:
        for element in visitors.iterate(root):
            if not isinstance(element, ColumnClause) or element.table is None:
                continue
            base: Any = element.table
            while isinstance(base, Alias):
                base = base.element
            if isinstance(base, Table):
                found.setdefault(table_name(base), set()).add(element.name)
    return {table: frozenset(names) for table, names in found.items()}
