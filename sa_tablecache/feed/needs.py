"""What of the database has to be watched for some views, by their plans alone. Pure.

In: plans of views. Out: for each table whose rows they read, the key by which the views follow its
rows, and the columns of which a big statement should log the smallest and the largest value: then
it marks an interval of an index rather than the whole view.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Date, DateTime, Enum, Integer, Numeric, String, Time

from sa_tablecache.analysis import TableName, ViewPlan, table_name
from sa_tablecache.usage import base_tables


@dataclass(frozen=True, slots=True)
class Need:
    """How views need one table to be watched."""

    key: tuple[str, ...]
    """The columns of its primary key in the models; empty if these disagree, or have none."""
    ranges: tuple[str, ...] = ()
    """Columns that decide by themselves where in an index the records of a row are."""


def needs_of(plans: Iterable[ViewPlan]) -> dict[TableName, Need]:
    """Return the tables that views read, and how these have to be watched."""
    keys: dict[TableName, set[tuple[str, ...]]] = {}
    ranges: dict[TableName, dict[str, None]] = {}
    for plan in plans:
        for name in plan.tables:
            keys.setdefault(name, set())
            ranges.setdefault(name, {})
        for table in base_tables(plan):
            key = tuple(column.name for column in table.primary_key.columns)
            keys.setdefault(table_name(table), set()).add(key)
        for name, column in _ranges(plan):
            ranges[name][column] = None
    return {
        name: Need(next(iter(keys[name])) if len(keys[name]) == 1 else (), tuple(ranges[name]))
        for name in sorted(keys, key=lambda name: (name[0] or "", name[1]))
    }


def _ranges(plan: ViewPlan) -> Iterator[tuple[TableName, str]]:
    """Yield the columns whose values are the leading score of each record of a row.

    The table stands once in the view, where no outer join NULL-extends it: a record that a row of
    it is part of is then where the row's own value says, before and after the change.
    """
    times = Counter([leaf.table for leaf in plan.leaves] + [path.table for path in plan.paths])
    for index in plan.view.__indexes__.values():
        name = index.column_names[0]
        source = plan.column(name).source
        found: list[tuple[TableName, Any]] = []
        if source is not None:
            found = [
                (leaf.table, source)
                for leaf in plan.leaves
                if leaf.table == table_name(source.table) and not leaf.nullable
            ]
        if plan.grouped:
            found = [
                (path.table, column)
                for path in plan.paths
                for column, shown, vanishes in zip(
                    path.columns, path.names, path.vanishing, strict=True
                )
                if shown == name and not vanishes
            ]
        for table, column in found:
            if times[table] == 1 and table not in plan.coarse and _has_extremes(column.type):
                yield table, column.name


def _has_extremes(type_: Any) -> bool:
    """Whether each database has MIN and MAX of a type, and JSON a form of it that has its order."""
    ordered = isinstance(type_, Integer | Numeric | Date | DateTime | Time | String)
    return ordered and not isinstance(type_, Enum)
