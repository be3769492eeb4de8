"""What of the database has to be watched for some views, by their plans alone. Pure.

In: plans of views. Out: for each table whose rows they read, the columns to log of a changed row
(the key by which the views follow it, and the columns by which they group), and those of which a
big statement should log the smallest and the largest value: then it marks an interval of an index
rather than the whole view.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CHAR, REAL, Date, DateTime, Enum, Float, Integer, Numeric, String, Time

from sa_tablecache.analysis import TableName, ViewPlan, table_name
from sa_tablecache.usage import base_tables, score_columns


@dataclass(frozen=True, slots=True)
class Need:
    """How views need one table to be watched."""

    key: tuple[str, ...]
    """The columns to log of a changed row: first the primary key of the models. Empty if these
    disagree about it, or have none."""
    ranges: tuple[str, ...] = ()
    """Columns that decide by themselves where in an index the records of a row are."""

    def and_also(self, other: Need) -> Need:
        """Return what serves two needs of one table."""
        return Need(
            tuple(dict.fromkeys((*self.key, *other.key))),
            tuple(dict.fromkeys((*self.ranges, *other.ranges))),
        )


def needs_of(plans: Iterable[ViewPlan]) -> dict[TableName, Need]:
    """Return the tables that views read, and how these have to be watched."""
    keys: dict[TableName, set[tuple[str, ...]]] = {}
    groups: dict[TableName, set[str]] = {}
    ranges: dict[TableName, dict[str, None]] = {}
    for plan in plans:
        for name in plan.tables:
            keys.setdefault(name, set())
        for table in base_tables(plan):
            key = tuple(column.name for column in table.primary_key.columns)
            keys.setdefault(table_name(table), set()).add(key)
        for path in plan.paths:
            if not path.follows_from_key:
                groups.setdefault(path.table, set()).update(column.name for column in path.columns)
        for name, leads in score_columns(plan).items():
            for column, _ in leads:
                if _has_extremes(column.type):
                    ranges.setdefault(name, {})[column.name] = None
    needs = {}
    for name in sorted(keys, key=lambda name: (name[0] or "", name[1])):
        key = next(iter(keys[name])) if len(keys[name]) == 1 else ()
        beside = sorted(groups.get(name, set()) - set(key)) if key else ()
        needs[name] = Need((*key, *beside), tuple(ranges.get(name, ())))
    return needs


def _has_extremes(type_: Any) -> bool:
    """Whether each database has MIN and MAX of a type, and JSON a form of it that has its order."""
    if isinstance(type_, Float):  # with less than double precision, JSON says more than is stored
        return not isinstance(type_, REAL) and type_.precision is None
    ordered = isinstance(type_, Integer | Numeric | Date | DateTime | Time | String)
    zoned = isinstance(type_, Time) and type_.timezone
    return ordered and not zoned and not isinstance(type_, Enum | CHAR)
