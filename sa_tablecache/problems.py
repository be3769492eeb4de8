"""What the owner of a cache should know of its views, before readers find out.

In: the table of a view. Out: problems, in words. A problem makes answers slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from .analysis import TableName, table_label
from .exc import TableCacheError
from .table import CachedTable
from .triggers import unexplained


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about a cache that its owner should know."""

    view: str
    what: str

    def __str__(self) -> str:
        return f"{self.view}: {self.what}"


def problems_of(table: CachedTable, explained: Container[TableName]) -> list[Problem]:
    """Return what keeps a view from being served exactly: coarse tables, unordered indexes.

    Asks the catalog if the view was not used yet. What keeps it from being used at all is a problem
    too, and not raised here.

    :param explained: tables of which the application has said what they write by themselves.
    """
    try:
        layout = table.set_up()
    except TableCacheError as error:
        return [Problem(table.plan.name, str(error))]
    said = [
        f"any change of {table_label(name)} marks the whole view: {why}"
        for name, why in sorted(table.coarse.items(), key=lambda item: item[0][1])
    ]
    said += unexplained(layout.automatic, explained)
    for index in table.view.__indexes__.values():
        for name in index.column_names:
            how = layout.columns.comparisons[name]
            if not how.order:
                serves = "single values only" if how.equality else "nothing"
                said.append(
                    f"{index.name} serves {serves} of {name}: "
                    f"{how.reason or 'no order that Python knows'}"
                )
    return [Problem(table.plan.name, what) for what in said]
