"""The FROM clause of a view: which tables it joins, and what equals or determines what.

In: the FROM elements and criteria of a frozen select. Out: the *leaves* (each occurrence of a base
table, and whether an outer join can NULL-extend it), functional dependencies between their columns,
and equalities that hold wherever a leaf is not NULL-extended. From these follow the view's primary
key, whether an anchor has one row at most, and which columns of the view show a lineage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Column, String, Table, UniqueConstraint
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    ColumnClause,
    Grouping,
)
from sqlalchemy.sql.selectable import Alias, FromGrouping, Join


class LeafColumn(NamedTuple):
    """A column of one occurrence of a base table in the view's FROM."""

    leaf: int
    name: str


def conjuncts(element: Any) -> Iterator[Any]:
    """Return the conditions that all have to be true."""
    if isinstance(element, BooleanClauseList) and element.operator is operators.and_:
        for clause in element.clauses:
            yield from conjuncts(clause)
    elif isinstance(element, Grouping):
        yield from conjuncts(element.element)
    elif element is not None:
        yield element


def is_column(element: Any) -> bool:
    """Whether an expression is nothing but a base table's column."""
    return isinstance(element, Column) and element.table is not None


def closure(
    start: Iterable[LeafColumn],
    dependencies: list[tuple[frozenset[LeafColumn], frozenset[LeafColumn]]],
) -> set[LeafColumn]:
    """Return all columns that the given ones determine."""
    known = set(start)
    grew = True
    while grew:
        grew = False
        for determinant, dependents in dependencies:
            if determinant <= known and not dependents <= known:
                known |= dependents
                grew = True
    return known


_COMPARISONS = (operators.eq, operators.ne, operators.lt, operators.le, operators.gt, operators.ge)


def _rejects_null(condition: Any) -> bool:
    """Whether a condition is a comparison, of plain columns and values, that no NULL meets."""
    return (
        isinstance(condition, BinaryExpression)
        and condition.operator in _COMPARISONS
        and all(
            is_column(side) or isinstance(side, BindParameter)
            for side in (condition.left, condition.right)
        )
    )


@dataclass
class Occurrence:
    """A leaf while the FROM clause is being read."""

    number: int
    selectable: Any
    table: Table
    depth: int
    """How many outer joins have it on a side that they NULL-extend."""

    @property
    def nullable(self) -> bool:
        """Whether an outer join can NULL-extend it."""
        return self.depth > 0


class Joins:
    """The leaves of a FROM clause, and what is known of their columns."""

    def __init__(self) -> None:
        self.leaves: list[Occurrence] = []
        self.joins: list[tuple[Join, range, int]] = []
        """Every join with the numbers of the leaves on its right side, and its own depth."""
        self.others: list[str] = []
        """What else there is in FROM: subqueries and the like."""
        self.dependencies: list[tuple[frozenset[LeafColumn], frozenset[LeafColumn]]] = []
        self.text: set[LeafColumn] = set()
        """Text columns that are compared by ``=``: equal text need not be the same text."""
        self.equal: dict[LeafColumn, set[LeafColumn]] = {}
        """For a leaf's column, the columns equal to it wherever the leaf is not NULL-extended."""

    def read_from(self, selectable: Any, depth: int = 0) -> None:
        """Read one FROM element: its leaves, and which of them outer joins NULL-extend."""
        if isinstance(selectable, FromGrouping):
            self.read_from(selectable.element, depth)
            return
        if isinstance(selectable, Join):
            self.read_from(selectable.left, depth + selectable.full)
            first = len(self.leaves)
            self.read_from(selectable.right, depth + (selectable.isouter or selectable.full))
            self.joins.append((selectable, range(first, len(self.leaves)), depth))
            return
        base = selectable
        while isinstance(base, Alias):
            base = base.element
        base = base._deannotate() if hasattr(base, "_deannotate") else base
        if not isinstance(base, Table):
            self.others.append(f"{type(selectable).__name__.lower()} in FROM")
            return
        self.leaves.append(Occurrence(len(self.leaves), selectable, base, depth))

    def filtered(self, criteria: Sequence[Any]) -> bool:
        """Whether a criterion may drop rows in which an outer join found a match.

        Such a row leaves no trace in the cache, so that nothing would lead from its change to the
        NULL-extended row that takes its place. A comparison that is not true of NULL drops that one
        as well, and does not count.
        """
        conditions = [(c, 0) for criterion in criteria for c in conjuncts(criterion)]
        for join, _, depth in self.joins:
            # The ON of an outer join drops rows of its right side only.
            conditions += [(c, depth + join.isouter) for c in conjuncts(join.onclause)]
        for condition, depth in conditions:
            if _rejects_null(condition):
                continue
            for element in visitors.iterate(condition):
                if isinstance(element, ColumnClause) and element.table is not None:
                    at = self.leaf_column(element)
                    if at is not None and self.leaves[at.leaf].depth > depth:
                        return True
        return False

    # -- dependencies ---------------------------------------------------------------------------

    def read_dependencies(self, criteria: Sequence[Any]) -> None:
        """Collect functional dependencies and equalities from keys, joins and criteria."""
        for occurrence in self.leaves:
            columns = frozenset(
                LeafColumn(occurrence.number, c.key) for c in occurrence.table.columns
            )
            unique = [tuple(occurrence.table.primary_key.columns)]
            unique += [
                tuple(constraint.columns)
                for constraint in occurrence.table.constraints
                if isinstance(constraint, UniqueConstraint)
            ]
            unique += [(c,) for c in occurrence.table.columns if c.unique]
            for determinant in unique:
                if determinant and not any(c.nullable for c in determinant):
                    self.dependencies.append(
                        (
                            frozenset(LeafColumn(occurrence.number, c.key) for c in determinant),
                            columns,
                        )
                    )
        for criterion in criteria:
            for conjunct in conjuncts(criterion):
                self._read_equality(conjunct, frozenset())
        for join, right, _ in self.joins:
            if join.full:
                continue
            for conjunct in conjuncts(join.onclause):
                self._read_equality(conjunct, frozenset(right) if join.isouter else frozenset())
            if join.isouter:
                self._read_outer_join(join, frozenset(right))

    def _read_equality(self, conjunct: Any, right_of_outer: frozenset[int]) -> None:
        """Read ``a = b``: an equality of all rows, or (outer join) of rows not NULL-extended."""
        if not (isinstance(conjunct, BinaryExpression) and conjunct.operator is operators.eq):
            return
        sides = [
            self.leaf_column(side) if hasattr(side, "table") else None
            for side in (conjunct.left, conjunct.right)
        ]
        for side in sides:
            if side is not None and isinstance(self._type_of(side), String):
                self.text.add(side)
        if sides[0] is None or sides[1] is None:
            if sides[0] is not None and isinstance(conjunct.right, BindParameter):
                if not right_of_outer:
                    self.dependencies.append((frozenset(), frozenset({sides[0]})))
            return
        for one, other in ((sides[0], sides[1]), (sides[1], sides[0])):
            if not right_of_outer:
                self.dependencies.append((frozenset({one}), frozenset({other})))
                self.equal.setdefault(one, set()).add(other)
            elif one.leaf in right_of_outer:
                # Wherever the right side is there, its column equals the left one.
                self.equal.setdefault(one, set()).add(other)

    def _read_outer_join(self, join: Join, right: frozenset[int]) -> None:
        """``a LEFT JOIN b``: if the ON clause pins a key of b, what it uses of a determines b."""
        left_used: set[LeafColumn] = set()
        pinned: set[LeafColumn] = set()
        for conjunct in conjuncts(join.onclause):
            for element in visitors.iterate(conjunct):
                if isinstance(element, ColumnClause):
                    at = self.leaf_column(element) if element.table is not None else None
                    if at is None:
                        return
                    if at.leaf not in right:
                        left_used.add(at)
            if isinstance(conjunct, BinaryExpression) and conjunct.operator is operators.eq:
                for one, other in (
                    (conjunct.left, conjunct.right),
                    (conjunct.right, conjunct.left),
                ):
                    a = self.leaf_column(one) if is_column(one) else None
                    b = self.leaf_column(other) if is_column(other) else None
                    if a and b and a.leaf not in right and b.leaf in right:
                        pinned.add(b)
        inside = [d for d in self.dependencies if all(c.leaf in right for c in d[0] | d[1])]
        keys = frozenset(
            LeafColumn(number, c.key)
            for number in right
            for c in self.leaves[number].table.primary_key.columns
        )
        if keys <= closure(pinned, inside):
            self.dependencies.append((frozenset(left_used), keys))

    def leaf_column(self, element: Any) -> LeafColumn | None:
        """Return the leaf and name of a base table's column, or ``None`` for anything else."""
        for occurrence in self.leaves:
            # Annotated copies of a selectable are equal to it, and not identical.
            if element.table == occurrence.selectable:
                for column in occurrence.table.columns:
                    if column.name == element.name:
                        return LeafColumn(occurrence.number, column.key)
        return None

    def visible_equal(self, column: LeafColumn, visible: Mapping[LeafColumn, str]) -> str | None:
        """Return a view column that equals the given one wherever its leaf is not NULL-extended."""
        if column in visible:
            return visible[column]
        kind = self._type_of(column)
        seen, todo = {column}, [column]
        while todo:
            current = todo.pop()
            for other in sorted(self.equal.get(current, ())):
                if other in seen or type(self._type_of(other)) is not type(kind):
                    continue
                seen.add(other)
                if other in visible:
                    return visible[other]
                todo.append(other)
        return None

    def _type_of(self, column: LeafColumn) -> Any:
        return self.leaves[column.leaf].table.c[column.name].type
