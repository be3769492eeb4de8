"""GROUP BY: what a select groups by, and subqueries that group.

In: a plain Core select and its FROM clause. Out: the columns that it groups by, if they are plain
columns of the tables that it joins, and the *paths* from a changed row of one of these tables to
the groups that it may touch: those with the values that it had and has (see
:meth:`.Joins.determined`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Column, Select, Table
from sqlalchemy.sql.elements import Grouping, Label
from sqlalchemy.sql.selectable import CTE, Subquery

from .comparison import Comparison, Inexact
from .expressions import GROUPING, obstacles, plain
from .joins import Grouped, Joins, LeafColumn


@dataclass(frozen=True, slots=True)
class GroupPath:
    """How a changed row of one table leads to groups: by values that it shares with them.

    In each case all groups with these values are read again, whatever other columns they have.
    """

    table: tuple[str | None, str]
    primary_key: tuple[Column[Any], ...]
    columns: tuple[Column[Any], ...]
    """The table's columns with the values."""
    names: tuple[str, ...]
    """The columns of the rendered view that show them for each group."""
    stored: tuple[str, ...]
    """The columns by which records with them are found in storage: visible ones, if there are."""
    leaf: int | None
    """The number of the subquery among the leaves of the view; ``None`` if the view groups."""
    vanishing: tuple[bool, ...]
    """Whether each is NULL in the row that takes the place of one that an outer join loses."""
    comparisons: tuple[Comparison, ...] = ()
    """How each compares in one database."""

    def only(self, comparisons: Sequence[Comparison | None]) -> GroupPath:
        """Return the path by those of its columns that compare in Python: more groups, at most."""
        at = [at for at, how in enumerate(comparisons) if how is not None]
        return replace(
            self,
            columns=tuple(self.columns[i] for i in at),
            names=tuple(self.names[i] for i in at),
            stored=tuple(self.stored[i] for i in at),
            vanishing=tuple(self.vanishing[i] for i in at),
            comparisons=tuple(how for how in comparisons if how is not None),
        )

    @property
    def follows_from_key(self) -> bool:
        """Whether the primary key of a row has all the values, so that they never change."""
        return all(column.primary_key for column in self.columns)

    def of_key(self, key: Sequence[Any]) -> list[tuple[Any, ...]] | None:
        """Return :meth:`values` of the row with a primary key, which has to have them all."""
        return self.values(dict(zip((c.name for c in self.primary_key), key, strict=True)))

    def before(
        self, columns: frozenset[str] | None, rows: Iterable[Mapping[str, Any]] | None
    ) -> list[tuple[Any, ...]] | None:
        """Return :meth:`values` of what a changed row was before; ``None`` if they are not known.

        Nothing, if they are what they are now: the row itself leads to them.

        :param columns: the names of all columns that may be others now, if they are known.
        :param rows: what the row was before, as far as that is known.
        """
        if columns is not None and columns.isdisjoint(column.name for column in self.columns):
            return []
        if rows is None:
            return None
        found: list[tuple[Any, ...]] = []
        for row in rows:
            values = self.values(row)
            if values is None:
                return None
            found += values
        return found

    def values(self, row: Mapping[str, Any]) -> list[tuple[Any, ...]] | None:
        """Return the values of the groups that a row is part of, or may leave to others.

        :param row: values by the names of the table's columns.
        :returns: ``None`` if they are not known, or not as they compare.
        """
        try:
            found = tuple(
                None if row[column.name] is None else how.parameter(row[column.name])
                for column, how in zip(self.columns, self.comparisons, strict=True)
            )
        except (KeyError, Inexact):
            return None
        if not any(self.vanishing):
            return [found]
        extended = (
            None if vanishes else value
            for value, vanishes in zip(found, self.vanishing, strict=True)
        )
        return [found, tuple(extended)]


def grouped_by(statement: Any, joins: Joins) -> tuple[LeafColumn, ...] | None:
    """Return what a select groups by; ``None`` if some of it is not a plain column."""
    columns = [column_of(clause, joins) for clause in statement._group_by_clauses]
    return None if None in columns else tuple(c for c in columns if c is not None)


def column_of(element: Any, joins: Joins) -> LeafColumn | None:
    """Return the column that an expression is nothing but."""
    while isinstance(element, Grouping):
        element = element.element
    return joins.leaf_column(element) if hasattr(element, "table") else None


def read_grouped(selectable: Any) -> Grouped | None:
    """Read a subquery or a CTE that groups plain columns of a join, and selects them all."""
    if not isinstance(selectable, Subquery | CTE) or not isinstance(selectable.element, Select):
        return None
    statement = plain(selectable.element)
    if not statement._group_by_clauses or len(statement._raw_columns) != len(selectable.c):
        return None
    joins = Joins()
    for element in statement.get_final_froms():
        joins.read_from(element)
    if (
        joins.others
        or any(join.full for join, _, _ in joins.joins)
        or set(obstacles(statement)) - set(GROUPING)
    ):
        return None
    joins.read_dependencies(statement._where_criteria)
    by = grouped_by(statement, joins)
    if by is None:
        return None
    columns: dict[str, Any] = {}
    shown: dict[LeafColumn, str] = {}
    for (key, column), element in zip(selectable.c.items(), statement._raw_columns, strict=True):
        at = column_of(element.element if isinstance(element, Label) else element, joins)
        columns[key] = column if at is None else joins.leaves[at.leaf].columns[at.name]
        if at is not None:
            if columns[key] not in column.base_columns:
                return None  # the columns are not in the order in which they are selected
            shown.setdefault(at, key)
    if not all(column in shown for column in by):
        return None
    return Grouped(joins, by, tuple(shown[column] for column in by), columns)


def paths_to(
    joins: Joins,
    by: Sequence[LeafColumn],
    shown: Sequence[tuple[str, str | None] | None],
    number: int | None = None,
) -> Iterator[tuple[tuple[str | None, str], GroupPath | None]]:
    """Yield for each leaf its table, and how a changed row of it leads to groups if it does.

    :param shown: for each column of GROUP BY, the column of the rendered view that shows it, and
        one of the view itself that does, if there are.
    :param number: that of the subquery, if it is one that groups.
    """
    for leaf in joins.leaves:
        table = leaf.source
        assert isinstance(table, Table)
        found = [(d, shown[d.at]) for d in joins.determined(leaf.number, by)]
        known = [(d, names) for d, names in found if names is not None]
        path = GroupPath(
            (table.schema, table.name),
            tuple(table.primary_key.columns),
            columns=tuple(d.column for d, _ in known),
            names=tuple(name for _, (name, _) in known),
            stored=tuple(visible or name for _, (name, visible) in known),
            leaf=number,
            vanishing=tuple(d.vanishes for d, _ in known),
        )
        yield path.table, path if known else None
