"""The FROM clause of a view: which tables it joins, and what equals or determines what.

In: the FROM elements and criteria of a frozen select. Out: the *leaves* (each occurrence of a base
table, and whether an outer join can NULL-extend it), functional dependencies between their columns,
and equalities that hold wherever a leaf is not NULL-extended. From these follow the view's primary
key, whether an anchor has one row at most, which columns of the view show a lineage, and which
group columns a row of a leaf determines. A subquery with GROUP BY is a leaf, too, whose key is what
it groups by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def is_stored(element: Any) -> bool:
    """Whether a leaf's column is that of a table, rather than what a subquery computes."""
    return is_column(element) and isinstance(element.table, Table)


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
    depth: int
    """How many outer joins have it on a side that they NULL-extend."""
    source: Table | Grouped

    @property
    def columns(self) -> Mapping[str, Any]:
        """Its columns by key: those of base tables, or expressions of a subquery."""
        if isinstance(self.source, Grouped):
            return self.source.columns
        return dict(self.source.columns.items())

    @property
    def key(self) -> tuple[str, ...]:
        """The keys of the columns that tell its rows apart; empty if none do."""
        if isinstance(self.source, Grouped):
            return self.source.key
        return tuple(column.key for column in self.source.primary_key.columns)

    @property
    def name(self) -> str:
        """The name of the table, or how the subquery is called."""
        return str(self.selectable.name if isinstance(self.source, Grouped) else self.source.name)

    @property
    def nullable(self) -> bool:
        """Whether an outer join can NULL-extend it."""
        return self.depth > 0


@dataclass(frozen=True)
class Grouped:
    """A subquery with GROUP BY over plain columns, all of which it selects."""

    joins: Joins
    by: tuple[LeafColumn, ...]
    """What it groups by, among the columns of its own joins."""
    key: tuple[str, ...]
    """The keys of its columns that show these values."""
    columns: Mapping[str, Any]
    """Its columns by key: those of base tables, or expressions."""


class Determined(NamedTuple):
    """A group column whose value a row of a leaf determines by itself."""

    at: int
    """Its position among the group columns."""
    column: Column[Any]
    """The column of the leaf's table that has the same value."""
    vanishes: bool
    """Whether it is NULL where the leaf is NULL-extended; it keeps its value otherwise."""


class Joins:
    """The leaves of a FROM clause, and what is known of their columns.

    :param grouped: reads a subquery as a leaf, if it is one that groups plain columns.
    """

    def __init__(self, grouped: Callable[[Any], Grouped | None] | None = None) -> None:
        self._grouped = grouped
        self.leaves: list[Occurrence] = []
        self.joins: list[tuple[Join, range, int]] = []
        """Every join with the numbers of the leaves on its right side, and its own depth."""
        self._lefts: dict[int, range] = {}
        """By the first leaf on the right side of a join, the leaves on its left side."""
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
            before = len(self.leaves)
            self.read_from(selectable.left, depth + selectable.full)
            first = len(self.leaves)
            self._lefts[first] = range(before, first)
            self.read_from(selectable.right, depth + (selectable.isouter or selectable.full))
            self.joins.append((selectable, range(first, len(self.leaves)), depth))
            return
        base = selectable
        while isinstance(base, Alias):
            base = base.element
        base = base._deannotate() if hasattr(base, "_deannotate") else base
        source = base if isinstance(base, Table) else self._grouped and self._grouped(base)
        if source is None:
            self.others.append(f"{type(selectable).__name__.lower()} in FROM")
            return
        self.leaves.append(Occurrence(len(self.leaves), selectable, depth, source))

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
            columns = frozenset(LeafColumn(occurrence.number, key) for key in occurrence.columns)
            for determinant in _unique(occurrence.source):
                self.dependencies.append(
                    (frozenset(LeafColumn(occurrence.number, key) for key in determinant), columns)
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
            LeafColumn(number, key) for number in right for key in self.leaves[number].key
        )
        if keys <= closure(pinned, inside):
            self.dependencies.append((frozenset(left_used), keys))

    def leaf_column(self, element: Any) -> LeafColumn | None:
        """Return the leaf and name of a base table's column, or ``None`` for anything else."""
        for occurrence in self.leaves:
            # Annotated copies of a selectable are equal to it, and not identical.
            if element.table == occurrence.selectable:
                for key, column in occurrence.selectable.c.items():
                    if column.name == element.name:
                        return LeafColumn(occurrence.number, key)
        return None

    def visible_equal(self, column: LeafColumn, visible: Mapping[LeafColumn, str]) -> str | None:
        """Return a view column that equals the given one wherever its leaf is not NULL-extended."""
        return next((visible[other] for other in self._equals(column) if other in visible), None)

    def determined(self, leaf: int, by: Sequence[LeafColumn]) -> list[Determined]:
        """Return the group columns whose values a row of a leaf determines, wherever it is joined.

        When the row goes (or comes), a NULL-extended row may take its place (or make way), and move
        from one group to another. A column of a table that stays keeps its value in that; one that
        an outer join NULL-extends together with the leaf becomes NULL. One that only some of the
        outer joins around the leaf NULL-extend is left out: it could become either.
        """
        table = self.leaves[leaf].source
        assert isinstance(table, Table)
        around = self._around(leaf)
        found = []
        for at, group in enumerate(by):
            vanishes = any(group.leaf in right for right in around)
            if vanishes and group.leaf not in around[0]:
                continue
            found += [
                Determined(at, column, vanishes)
                for column in table.columns
                if group in self._equals(LeafColumn(leaf, column.key))
            ]
        # What follows from the key never changes, and needs no query.
        found = [d for d in found if d.column.primary_key] or found
        return list({d.at: d for d in found}.values())

    def _around(self, leaf: int) -> list[range]:
        """Return the right sides of the outer joins that NULL-extend a leaf, the smallest first."""
        return [right for join, right, _ in self.joins if join.isouter and leaf in right]

    def extension(self, leaf: int) -> tuple[range, range]:
        """Return what the row has that takes the place of one in which a leaf was.

        The leaves that surely stay what they are, and those that surely are NULL. Of the others
        nothing is known: what they are may depend on the leaf.
        """
        around = self._around(leaf)
        return self._lefts[around[-1].start], around[0]

    def _equals(self, column: LeafColumn) -> Iterator[LeafColumn]:
        """Yield the columns equal to one wherever its leaf is not NULL-extended; itself first."""
        kind = type(self._type_of(column))
        seen, todo = {column}, [column]
        while todo:
            current = todo.pop()
            yield current
            for other in sorted(self.equal.get(current, ())):
                if other not in seen and type(self._type_of(other)) is kind:
                    seen.add(other)
                    todo.append(other)

    def _type_of(self, column: LeafColumn) -> Any:
        return self.leaves[column.leaf].columns[column.name].type


def _unique(source: Table | Grouped) -> Iterator[tuple[str, ...]]:
    """Yield sets of columns, by key, that tell the rows of a leaf apart."""
    if isinstance(source, Grouped):
        yield source.key  # NULL is a group like any other
        return
    unique = [tuple(source.primary_key.columns)]
    unique += [tuple(c.columns) for c in source.constraints if isinstance(c, UniqueConstraint)]
    unique += [(c,) for c in source.columns if c.unique]
    for columns in unique:
        if columns and not any(column.nullable for column in columns):
            yield tuple(column.key for column in columns)
