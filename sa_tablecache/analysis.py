"""What a view is made of: from its ``select()`` to a frozen :class:`ViewPlan`.

In: the statement, columns and indexes that ``view.py`` read from a class body.
Out: the plan, from which everything else works:

* the base tables, and for each whether a changed row of it can be followed to the records that it
  touches (*lineage*) or whether it marks the whole view (*coarse*, with the reason);
* the statement that the view renders: the user's select with hidden columns for the primary key of
  every joined table (lineage) and for index expressions;
* the view's primary key, by functional dependencies;
* the *anchor*: the joined table that outer joins never NULL-extend and that is part of the key.
  When something changed, all records of the touched anchors are read again and replaced, so that
  NULL-extended rows appear and vanish by themselves and old foreign key values are never needed;
* where the select or a subquery in FROM groups, the *paths* from a changed row to groups: those of
  the values that it had and has.

Nothing here runs SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

from sqlalchemy import Column, Table
from sqlalchemy.engine.default import StrCompileDialect
from sqlalchemy.exc import CompileError
from sqlalchemy.sql.compiler import StrSQLCompiler
from sqlalchemy.sql.elements import ColumnClause
from sqlalchemy.sql.selectable import Alias, CompoundSelect, SelectBase

from .expressions import GROUPING, Expressions, obstacles
from .groups import GroupPath, column_of, grouped_by, paths_to, read_grouped
from .joins import Grouped, Joins, LeafColumn, closure, is_column, is_stored
from .keys import derived_key
from .view import Analysis, CachedView, ViewTable

#: A base table by name, resolved: what a change and a leaf are matched by.
TableName = tuple[str | None, str]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One occurrence of a base table in the FROM of a view."""

    number: int
    table: TableName
    primary_key: tuple[Column[Any], ...]
    nullable: bool
    """Whether an outer join can NULL-extend it."""
    hidden: tuple[str, ...]
    """The hidden columns of the rendered view that hold its primary key."""
    visible: tuple[str, ...] | None
    """Columns of the view that hold the same values wherever the leaf is not NULL-extended."""

    def __str__(self) -> str:
        return table_label(self.table)


@dataclass(frozen=True, slots=True)
class ViewColumn:
    """A column of the rendered view, hidden ones included."""

    name: str
    clause: ColumnClause[Any]
    nullable: bool
    source: Column[Any] | None
    """The base table's column, if that is all that the expression is."""


@dataclass(frozen=True)
class ViewPlan:
    """Everything known about a view without asking a database."""

    view: type[CachedView]
    statement: SelectBase
    """What the view renders: its select with the hidden columns."""
    declared: SelectBase
    """The same before the ORM has resolved it, without lineage: loader criteria apply to it."""
    columns: tuple[ViewColumn, ...]
    """The public columns, in the order of the record's fields."""
    hidden: tuple[ViewColumn, ...]
    """Index expressions and lineage."""
    key: tuple[str, ...]
    key_is_derived: bool
    leaves: tuple[Leaf, ...]
    anchor: Leaf | None
    one_row_per_anchor: bool
    tables: frozenset[TableName]
    coarse: dict[TableName, str]
    """Tables of which any change marks the whole view, and why."""
    extensions: dict[int, tuple[frozenset[str], frozenset[str]]] = field(default_factory=dict)
    """For each leaf that an outer join can NULL-extend, by number: of the row that takes the place
    of one with the leaf, the columns that surely stay what they are, and those that surely are
    NULL."""
    grouped: bool = False
    """Whether its records are groups: they have no anchor, and are replaced by their values."""
    paths: tuple[GroupPath, ...] = ()
    """How changed rows of tables lead to the groups of the view, or of subqueries in it."""
    compared_text: tuple[Column[Any], ...] = ()
    """Text columns by whose equality the tables are joined."""
    functions: frozenset[str] = frozenset()
    key_of: Callable[[Any], Any] = field(init=False, repr=False)
    """The primary key of a record: a value, or a tuple if it has several columns."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_of", attrgetter(*self.key))

    def key_tuple(self, record: Any) -> tuple[Any, ...]:
        """Return the primary key of a record as a tuple, whatever its number of columns."""
        key = self.key_of(record)
        return (key,) if len(self.key) == 1 else key

    def key_without(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the columns of the primary key that are not among the names."""
        return tuple(name for name in self.key if name not in names)

    def hidden_among(self, names: tuple[str, ...]) -> list[str]:
        """Return the names that are those of hidden columns."""
        hidden = {column.name for column in self.hidden}
        return [name for name in names if name in hidden]

    @property
    def name(self) -> str:
        """The name of the view."""
        return self.view.__name__

    def column(self, name: str) -> ViewColumn:
        """Return a column by name, hidden ones included."""
        return self.by_name[name]

    @property
    def by_name(self) -> dict[str, ViewColumn]:
        """All columns by name."""
        cached = self.__dict__.get("_by_name")
        if cached is None:
            cached = {c.name: c for c in self.columns + self.hidden}
            self.__dict__["_by_name"] = cached
        return cast("dict[str, ViewColumn]", cached)


def table_name(table: Any) -> TableName:
    """Return the name by which a table is matched."""
    return table.schema, table.name


def table_label(name: TableName) -> str:
    """Return a table's name as a reader expects it."""
    return ".".join(part for part in name if part)


def plan_of(view: type[CachedView]) -> ViewPlan:
    """Return the plan of a view, worked out once.

    :raises ViewDefinitionError: if the view cannot be right.
    """
    return cast("ViewPlan", cast("Any", view).__plan__)


def analyse(view: type[CachedView]) -> ViewPlan:
    """Work out the plan of a view.

    :raises ViewDefinitionError: if the view cannot be right.
    """
    return _Analysis(view).plan()


Analysis.run = analyse


class _Collector(StrSQLCompiler):
    """Collects the tables that a statement really renders, and their columns.

    Nothing else knows them all: criteria of inheritance appear when an ORM select is compiled, and
    views inside of it when they are rendered.
    """

    found: dict[TableName, set[str]]

    def visit_table(self, table: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("asfrom") and not isinstance(table, ViewTable):
            self.found.setdefault(table_name(table), set())
        return cast("Any", super()).visit_table(table, *args, **kwargs)

    def visit_column(self, column: Any, *args: Any, **kwargs: Any) -> Any:
        self._use(column.table, column.name)
        return cast("Any", super()).visit_column(column, *args, **kwargs)

    def visit_table_valued_column(self, element: Any, *args: Any, **kwargs: Any) -> Any:
        self._use(element.scalar_alias, None)
        return cast("Any", super()).visit_table_valued_column(element, *args, **kwargs)

    def _use(self, table: Any, name: str | None) -> None:
        while isinstance(table, Alias):
            table = table.element
        if isinstance(table, Table):
            names = [c.name for c in table.columns if name in (None, c.name)]
            self.found.setdefault(table_name(table), set()).update(names)


class _CollectingDialect(StrCompileDialect):
    supports_statement_cache = False


def rendered_columns(statement: Any) -> dict[TableName, frozenset[str]]:
    """Return every table that a statement reads, with the names of the columns that it uses.

    Those inside subqueries and views are included.
    """
    found: dict[TableName, set[str]] = {}
    dialect: Any = _CollectingDialect()
    dialect.statement_compiler = type("_Collecting", (_Collector,), {"found": found})
    statement.compile(dialect=dialect)
    return {table: frozenset(columns) for table, columns in found.items()}


def rendered_tables(statement: Any) -> frozenset[TableName]:
    """Return every table that a statement reads."""
    return frozenset(rendered_columns(statement))


class _Analysis:
    """One run of the analysis of one view."""

    def __init__(self, view: Any) -> None:
        self.view = view
        self.visible: dict[LeafColumn, str] = {}
        """The name of each base column that the view shows."""
        self.lineage: dict[str, LeafColumn] = {}
        """The base column of each hidden column that is one."""
        self.table: ViewTable = view.__table__
        self.expressions = Expressions(view)
        self.names = self.expressions.names
        self.statement = self.expressions.statement
        self.reasons = self.expressions.reasons
        self.joins = Joins(read_grouped)
        self.by: tuple[LeafColumn, ...] | None = None
        """What the select groups by, if a changed row can be followed to its groups."""

    # -- reading the statement ------------------------------------------------------------------

    def plan(self) -> ViewPlan:
        try:
            tables = rendered_tables(self.statement)
        except CompileError as error:
            raise self.expressions.refuse(
                f"its select cannot be compiled ({error})", "correct the select"
            ) from error
        functions = self.expressions.check_select()
        compound = isinstance(self.view.__statement__, CompoundSelect)
        if compound:
            self.reasons.append(f"set operation ({self.view.__statement__.keyword.name})")
        self._read_from()
        if not tables:
            raise self.expressions.refuse("its select reads no table", "select from one")

        statement = self.statement
        hidden: list[ViewColumn] = []
        extra: list[Any] = []
        for index in self.view.__indexes__.values():
            for at, part in enumerate(index.declared.parts):
                if isinstance(part, str):
                    continue
                if compound or self.statement._distinct or self.statement._distinct_on:
                    raise self.expressions.refuse(
                        f"index {index.name} is an expression, which cannot be added to a "
                        "select with DISTINCT or a set operation",
                        "select the expression as a column and name that in the ScoreIndex",
                    )
                clause = cast("ColumnClause[Any]", index.columns[at])
                self.expressions.check(part, f"index {index.name}")
                extra.append(part.label(clause.name))
                source = part if is_column(part) else None
                hidden.append(ViewColumn(clause.name, clause, True, source))
        if extra and rendered_tables(statement.add_columns(*extra)) != tables:
            raise self.expressions.refuse(
                "an index expression uses a table that the select does not read",
                "join that table in __select__",
            )

        declared = statement if compound else self.expressions.labelled(self.view.__statement__)
        declared = declared.add_columns(*extra)
        columns = self._columns()
        leaves, anchor, one_row = self._lineage(hidden, extra)
        derived = self.view.__primary_key__ is None
        key = (
            derived_key(self.expressions, self.joins, self.visible)
            if derived
            else tuple(self.view.__primary_key__)
        )
        paths, coarse = self._paths(key, hidden, extra)
        if extra:
            statement = statement.add_columns(*extra)
        return ViewPlan(
            view=self.view,
            statement=statement,
            declared=declared,
            columns=columns,
            hidden=tuple(hidden),
            key=key,
            key_is_derived=derived and all(map(is_stored, self._compared_text())),
            leaves=leaves,
            anchor=anchor,
            one_row_per_anchor=one_row,
            tables=tables,
            coarse=self._coarse(tables, leaves, paths) | coarse,
            extensions=self._extensions(),
            grouped=self.by is not None,
            paths=paths,
            compared_text=tuple(column for column in self._compared_text() if is_stored(column)),
            functions=functions,
        )

    def _read_from(self) -> None:
        """Read the FROM clause, and note why a row of the view is not one row of a join."""
        for selectable in self.statement.get_final_froms():
            self.joins.read_from(selectable)
        self.joins.read_dependencies(self.statement._where_criteria)
        subqueries = [self.joins.leaves[number].selectable for number, _ in self._subqueries()]
        reasons = [*obstacles(self.statement, subqueries), *self.joins.others]
        reasons += [
            f"table {leaf.name} has no primary key" for leaf in self.joins.leaves if not leaf.key
        ]
        if any(join.full for join, _, _ in self.joins.joins):
            reasons.append("FULL JOIN")
        if not all(map(is_stored, self._compared_text())):
            # Under which collation it compares is not known, nor whether equal is the same.
            reasons.append("a join by text that a subquery computes")
        if self.statement._group_by_clauses:
            by = grouped_by(self.statement, self.joins)
            if by is None:
                reasons.append("a group that is no plain column")
            elif not subqueries and not self.reasons and not set(reasons) - set(GROUPING):
                self.by = by
                return
        self.reasons += reasons

    def _compared_text(self) -> list[Any]:
        return [
            joins.leaves[c.leaf].columns[c.name]
            for joins in (self.joins, *(grouped.joins for _, grouped in self._subqueries()))
            for c in sorted(joins.text)
        ]

    def _subqueries(self) -> list[tuple[int, Grouped]]:
        """Return the subqueries with GROUP BY among the leaves, with their numbers."""
        return [
            (leaf.number, leaf.source)
            for leaf in self.joins.leaves
            if isinstance(leaf.source, Grouped)
        ]

    # -- lineage and keys -----------------------------------------------------------------------

    def _columns(self) -> tuple[ViewColumn, ...]:
        sources = [column_of(label.element, self.joins) for label in self.statement._raw_columns]
        self.visible = {
            at: name
            for name, at in reversed(list(zip(self.names, sources, strict=True)))
            if at is not None
        }
        columns = []
        for name, at in zip(self.names, sources, strict=True):
            source = None if at is None else self._source(at)
            nullable = source is None or at is None or bool(self.reasons) or self._is_nullable(at)
            columns.append(ViewColumn(name, self.table.c[name], nullable, source))
        return tuple(columns)

    def _source(self, at: LeafColumn) -> Column[Any] | None:
        """Return the base table's column that a leaf's column is."""
        column = self.joins.leaves[at.leaf].columns[at.name]
        return column if is_stored(column) else None

    def _is_nullable(self, at: LeafColumn) -> bool:
        leaf = self.joins.leaves[at.leaf]
        return leaf.nullable or isinstance(leaf.source, Grouped) or leaf.columns[at.name].nullable

    def _hidden(
        self, at: LeafColumn, hidden: list[ViewColumn], extra: list[Any]
    ) -> tuple[str, str | None]:
        """Add a leaf's column to the rendered view; return its name, and one that shows it."""
        leaf = self.joins.leaves[at.leaf]
        name = f"_key{at.leaf}_{at.name}"
        self.lineage[name] = at
        clause = self.table.hidden(name, leaf.columns[at.name].type)
        extra.append(leaf.selectable.c[at.name].label(name))
        hidden.append(ViewColumn(name, clause, self._is_nullable(at), self._source(at)))
        return name, self.joins.visible_equal(at, self.visible)

    def _lineage(
        self, hidden: list[ViewColumn], extra: list[Any]
    ) -> tuple[tuple[Leaf, ...], Leaf | None, bool]:
        if self.reasons or self.by is not None:
            return (), None, False
        leaves = []
        for occurrence in self.joins.leaves:
            if isinstance(occurrence.source, Grouped):
                continue
            names, visible = [], []
            for key in occurrence.key:
                name, shown = self._hidden(LeafColumn(occurrence.number, key), hidden, extra)
                names.append(name)
                visible.append(shown)
            leaves.append(
                Leaf(
                    number=occurrence.number,
                    table=table_name(occurrence.source),
                    primary_key=tuple(occurrence.source.primary_key.columns),
                    nullable=occurrence.nullable,
                    hidden=tuple(names),
                    visible=None if None in visible else cast("tuple[str, ...]", tuple(visible)),
                )
            )
        all_keys = {LeafColumn(leaf.number, key) for leaf in self.joins.leaves for key in leaf.key}
        anchor, one_row = None, False
        for leaf in leaves:
            if leaf.nullable:
                continue
            own = {LeafColumn(leaf.number, c.key) for c in leaf.primary_key}
            if all_keys <= closure(own, self.joins.dependencies):
                anchor, one_row = leaf, True
                break
            # Of several preserved leaves the later one is on the many side of a chain of joins.
            anchor = leaf
        return tuple(leaves), anchor, one_row

    def _extensions(self) -> dict[int, tuple[frozenset[str], frozenset[str]]]:
        names = {**{name: at for at, name in self.visible.items()}, **self.lineage}
        result = {}
        for leaf in self.joins.leaves:
            if leaf.nullable and not self.reasons:
                stay, vanish = self.joins.extension(leaf.number)
                result[leaf.number] = (
                    frozenset(name for name, at in names.items() if at.leaf in stay),
                    frozenset(name for name, at in names.items() if at.leaf in vanish),
                )
        return result

    def _paths(
        self, key: tuple[str, ...], hidden: list[ViewColumn], extra: list[Any]
    ) -> tuple[tuple[GroupPath, ...], dict[TableName, str]]:
        """Return how changed rows lead to groups, and the tables of which they do not."""
        if self.by is not None:
            # Of the key, so that no group can have moved away from a record with the same key.
            names = [self.visible.get(column) for column in self.by]
            shown = [(n, n) if n is not None and n in key else None for n in names]
            ways = list(paths_to(self.joins, self.by, shown))
        else:
            ways = [
                way
                for number, grouped in self._subqueries()
                if not self.reasons
                for way in paths_to(
                    grouped.joins,
                    grouped.by,
                    [self._hidden(LeafColumn(number, key), hidden, extra) for key in grouped.key],
                    number,
                )
            ]
        coarse = {
            table: f"no group key follows from a row of {table_label(table)}"
            for table, path in ways
            if path is None
        }
        return tuple(path for _, path in ways if path is not None), coarse

    def _coarse(
        self,
        tables: frozenset[TableName],
        leaves: Iterable[Leaf],
        paths: Iterable[GroupPath],
    ) -> dict[TableName, str]:
        if self.reasons:
            why = ", ".join(dict.fromkeys(self.reasons))
            return dict.fromkeys(tables, why)
        known = {leaf.table for leaf in leaves} | {path.table for path in paths}
        coarse = dict.fromkeys(tables - known, "read by a subquery")
        if self.by is None and self.joins.filtered(self.statement._where_criteria):
            for leaf in self.joins.leaves:
                if not leaf.nullable:
                    continue
                within = leaf.source.joins.leaves if isinstance(leaf.source, Grouped) else [leaf]
                for inner in within:
                    coarse[table_name(inner.source)] = (
                        "a condition on the nullable side of an outer join"
                    )
        return coarse
