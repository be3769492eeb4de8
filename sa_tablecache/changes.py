"""What was written, and what of a view it may have made stale.

In: a :class:`ChangeSet`, the tables and rows that one transaction wrote. Out: :class:`Marks`, for
one view. Completeness comes before exactness: what has no exact keys marks whole tables, and a
superfluous mark costs one query, while a missing one would be a wrong answer.

Pure: no SQL, no SQLAlchemy events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from .analysis import TableName

RowKey: TypeAlias = tuple[object, ...]

MOST_KEYS = 5_000
"""More changed rows of one table than this mark the table."""


@dataclass(slots=True)
class ChangeSet:
    """The rows that a transaction wrote; a table without known rows was written somewhere."""

    rows: dict[TableName, set[RowKey]] = field(default_factory=dict)
    tables: set[TableName] = field(default_factory=set)
    everything: bool = False

    def add_rows(self, table: TableName, keys: Iterable[RowKey]) -> None:
        """Note rows by primary key."""
        if table in self.tables:
            return
        known = self.rows.setdefault(table, set())
        known.update(keys)
        if len(known) > MOST_KEYS:
            self.add_table(table)

    def add_table(self, table: TableName) -> None:
        """Note a table of which any row may have changed."""
        self.tables.add(table)
        self.rows.pop(table, None)

    def add_everything(self) -> None:
        """Note that any row of any table may have changed."""
        self.everything = True

    def update(self, other: ChangeSet) -> None:
        """Note all that another change set has."""
        self.everything = self.everything or other.everything
        for table in other.tables:
            self.add_table(table)
        for table, keys in other.rows.items():
            self.add_rows(table, keys)

    def touches(self, tables: Iterable[TableName]) -> bool:
        """Whether one of the tables was written."""
        return self.everything or any(t in self.tables or t in self.rows for t in tables)

    def __bool__(self) -> bool:
        return self.everything or bool(self.tables) or bool(self.rows)


@dataclass(frozen=True, slots=True)
class Marks:
    """What of one view may be stale: all of it, or the records with these rows in them."""

    view: bool
    rows: frozenset[tuple[TableName, RowKey]] = frozenset()

    def __bool__(self) -> bool:
        return self.view or bool(self.rows)


def marks_of(
    tables: frozenset[TableName], changes: ChangeSet, followed: frozenset[TableName]
) -> Marks:
    """Return what changes mark of a view.

    :param tables: the tables that concern the view.
    :param followed: the tables whose rows can be followed to the view's records by key.
    """
    if not changes.touches(tables):
        return Marks(False)
    if changes.everything or not changes.tables.isdisjoint(tables):
        return Marks(True)
    rows: set[tuple[TableName, RowKey]] = set()
    for table, keys in changes.rows.items():
        if table in tables:
            if table not in followed:
                return Marks(True)
            rows.update((table, key) for key in keys)
    return Marks(False, frozenset(rows))
