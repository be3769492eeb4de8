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
  NULL-extended rows appear and vanish by themselves and old foreign key values are never needed.

Nothing here runs SQL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

from sqlalchemy import Column
from sqlalchemy.engine.default import StrCompileDialect
from sqlalchemy.exc import CompileError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.compiler import StrSQLCompiler
from sqlalchemy.sql.elements import ColumnClause, Grouping
from sqlalchemy.sql.selectable import CompoundSelect, SelectBase

from .expressions import Expressions
from .joins import Joins, LeafColumn, closure, is_column
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


@compiles(ViewTable)
def _render(element: ViewTable, compiler: Any, *, asfrom: bool = False, **kwargs: Any) -> str:
    """Render a view in a FROM clause as its select, under its name."""
    if not asfrom:
        return cast("str", compiler.visit_table(element, asfrom=asfrom, **kwargs))
    linter = kwargs.pop("from_linter", None)
    if linter is not None:
        linter.froms[element] = element.name
    alias = kwargs.pop("enclosing_alias", None)
    statement = plan_of(element.view).statement
    inner = cast("str", compiler.process(statement.self_group(), asfrom=True))
    if alias is not None and alias.element is element:
        return inner
    return f"{inner} AS {compiler.preparer.quote(element.name)}"


class _TableCollector(StrSQLCompiler):
    """Collects the tables that a statement really renders: nothing else knows them all."""

    found: set[TableName]

    def visit_table(self, table: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("asfrom") and not isinstance(table, ViewTable):
            self.found.add(table_name(table))
        return cast("Any", super()).visit_table(table, *args, **kwargs)


class _TableCollectingDialect(StrCompileDialect):
    supports_statement_cache = False
    statement_compiler = _TableCollector


def rendered_tables(statement: Any) -> frozenset[TableName]:
    """Return every table that a statement reads, those inside subqueries and views included."""
    found: set[TableName] = set()
    collector: Any = type("_Collector", (_TableCollector,), {"found": found})
    dialect = _TableCollectingDialect()
    dialect.statement_compiler = collector
    statement.compile(dialect=dialect)
    return frozenset(found)


class _Analysis:
    """One run of the analysis of one view."""

    def __init__(self, view: Any) -> None:
        self.view = view
        self.visible: dict[LeafColumn, str] = {}
        """The name of each base column that the view shows."""
        self.table: ViewTable = view.__table__
        self.expressions = Expressions(view)
        self.names = self.expressions.names
        self.statement = self.expressions.statement
        self.reasons = self.expressions.reasons
        self.joins = Joins()

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
        self.expressions.note_clauses()
        froms = self.statement.get_final_froms()
        for selectable in froms:
            self.joins.read_from(selectable)
        self.reasons += self.joins.others
        occurrences = self.joins.leaves
        for occurrence in occurrences:
            if not occurrence.table.primary_key.columns:
                self.reasons.append(f"table {occurrence.table.fullname} has no primary key")
        if any(join.full for join, _, _ in self.joins.joins):
            self.reasons.append("FULL JOIN")
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

        columns, leaves, anchor, one_row = self._lineage(hidden, extra)
        if extra:
            statement = statement.add_columns(*extra)
        derived = self.view.__primary_key__ is None
        key = (
            derived_key(self.expressions, self.joins, self.visible)
            if derived
            else tuple(self.view.__primary_key__)
        )
        return ViewPlan(
            view=self.view,
            statement=statement,
            columns=columns,
            hidden=tuple(hidden),
            key=key,
            key_is_derived=derived,
            leaves=leaves,
            anchor=anchor,
            one_row_per_anchor=one_row,
            tables=tables,
            coarse=self._coarse(tables, leaves),
            compared_text=tuple(
                self.joins.leaves[c.leaf].table.c[c.name] for c in sorted(self.joins.text)
            ),
            functions=functions,
        )

    # -- lineage and keys -----------------------------------------------------------------------

    def _lineage(
        self, hidden: list[ViewColumn], extra: list[Any]
    ) -> tuple[tuple[ViewColumn, ...], tuple[Leaf, ...], Leaf | None, bool]:
        sources = [self._source(label) for label in self.statement._raw_columns]
        self.joins.read_dependencies(self.statement._where_criteria)
        columns = tuple(
            ViewColumn(
                name,
                self.table.c[name],
                self._is_nullable(source),
                source[1] if source is not None else None,
            )
            for name, source in zip(self.names, sources, strict=True)
        )
        self.visible = {
            LeafColumn(source[0], source[1].key): name
            for name, source in reversed(list(zip(self.names, sources, strict=True)))
            if source is not None
        }
        if self.reasons:
            return columns, (), None, False
        leaves = []
        for occurrence in self.joins.leaves:
            names, visible = [], []
            for column in occurrence.table.primary_key.columns:
                name = f"_key{occurrence.number}_{column.key}"
                clause = self.table.hidden(name, column.type)
                extra.append(occurrence.selectable.c[column.key].label(name))
                hidden.append(ViewColumn(name, clause, occurrence.nullable, column))
                names.append(name)
                visible.append(
                    self.joins.visible_equal(
                        LeafColumn(occurrence.number, column.key), self.visible
                    )
                )
            leaves.append(
                Leaf(
                    number=occurrence.number,
                    table=table_name(occurrence.table),
                    primary_key=tuple(occurrence.table.primary_key.columns),
                    nullable=occurrence.nullable,
                    hidden=tuple(names),
                    visible=None if None in visible else cast("tuple[str, ...]", tuple(visible)),
                )
            )
        all_keys = {LeafColumn(leaf.number, c.key) for leaf in leaves for c in leaf.primary_key}
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
        return columns, tuple(leaves), anchor, one_row

    def _source(self, label: Any) -> tuple[int, Column[Any]] | None:
        element = label.element
        while isinstance(element, Grouping):
            element = element.element
        if not isinstance(element, ColumnElement) or not hasattr(element, "table"):
            return None
        at = self.joins.leaf_column(element)
        if at is None:
            return None
        return at.leaf, self.joins.leaves[at.leaf].table.c[at.name]

    def _is_nullable(self, source: tuple[int, Column[Any]] | None) -> bool:
        if source is None or self.reasons:
            return True
        return self.joins.leaves[source[0]].nullable or bool(source[1].nullable)

    def _coarse(
        self, tables: frozenset[TableName], leaves: tuple[Leaf, ...]
    ) -> dict[TableName, str]:
        if self.reasons:
            why = ", ".join(dict.fromkeys(self.reasons))
            return dict.fromkeys(tables, why)
        coarse = dict.fromkeys(tables - {leaf.table for leaf in leaves}, "read by a subquery")
        if self.joins.filtered(self.statement._where_criteria):
            for leaf in leaves:
                if leaf.nullable:
                    coarse[leaf.table] = "a condition on the nullable side of an outer join"
        return coarse
