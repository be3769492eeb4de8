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

Nothing here runs SQL. The statement is frozen once (relationship joins, inheritance and
many-to-many aliases resolved) by the ORM's own compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

from sqlalchemy import Column, DateTime, Select, select
from sqlalchemy.engine.default import StrCompileDialect
from sqlalchemy.exc import CompileError
from sqlalchemy.sql import ColumnElement, visitors
from sqlalchemy.sql.compiler import StrSQLCompiler
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import (
    BindParameter,
    Cast,
    ColumnClause,
    Extract,
    Grouping,
    Over,
    TextClause,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import (
    CompoundSelect,
    Exists,
    ScalarSelect,
    SelectBase,
    TableSample,
    TextualSelect,
)

from .exc import ViewDefinitionError
from .functions import AGGREGATE_FUNCTIONS, IMMUTABLE_FUNCTIONS, VOLATILE_FUNCTIONS, function_name
from .joins import Joins, LeafColumn, closure, is_column
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
        self.name = view.__name__
        self.table: ViewTable = view.__table__
        self.names: list[str] = list(self.table.c.keys())
        self.statement = self._freeze(view.__statement__)
        self.reasons: list[str] = []
        """Why the select as a whole has no row lineage."""
        self.joins = Joins()

    # -- reading the statement ------------------------------------------------------------------

    def refuse(self, culprit: str, way_out: str) -> ViewDefinitionError:
        return ViewDefinitionError(f"view {self.name}: {culprit}; {way_out}")

    def _freeze(self, statement: Any) -> Any:
        """Return an ORM select as a plain Core select, its columns labelled with our names."""
        if isinstance(statement, TextualSelect):
            raise self.refuse(
                "its select is text(), so nobody can know which tables it reads",
                "write it with select()",
            )
        if not isinstance(statement, Select):
            if not isinstance(statement, CompoundSelect):
                raise self.refuse(
                    f"its select is a {type(statement).__name__}", "write it with select()"
                )
            rows = statement.subquery("rows")
            return select(
                *(c.label(n) for n, c in zip(self.names, rows.c, strict=True))
            ).select_from(rows)
        if statement._for_update_arg is not None:
            raise self.refuse("FOR UPDATE has no meaning in a view", "leave it out")
        if statement._propagate_attrs.get("compile_state_plugin") == "orm":
            state = statement._compile_state_factory(statement, statement._default_compiler())
            statement = cast("Any", state).statement
        raw = statement._raw_columns
        if not isinstance(statement, Select) or len(raw) != len(self.names):
            raise self.refuse(
                "its select has loader options that change what it selects",
                "select plain columns, without options()",
            )
        return self._labelled(statement)

    def _labelled(self, statement: Any) -> Any:
        """Return a select with our names on its columns."""
        raw = statement._raw_columns
        statement = statement._generate()
        statement._raw_columns = [
            getattr(c, "element", c).label(n) if type(c).__name__ == "Label" else c.label(n)
            for n, c in zip(self.names, raw, strict=True)
        ]
        for memoized in ("_all_selected_columns", "_memoized_keys"):
            statement.__dict__.pop(memoized, None)
        return statement

    def plan(self) -> ViewPlan:
        try:
            tables = rendered_tables(self.statement)
        except CompileError as error:
            raise self.refuse(
                f"its select cannot be compiled ({error})", "correct the select"
            ) from error
        functions = self._check_expressions()
        compound = isinstance(self.view.__statement__, CompoundSelect)
        if compound:
            self.reasons.append(f"set operation ({self.view.__statement__.keyword.name})")
        self._check_clauses()
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
            raise self.refuse("its select reads no table", "select from one")

        statement = self.statement
        hidden: list[ViewColumn] = []
        extra: list[Any] = []
        for index in self.view.__indexes__.values():
            for at, part in enumerate(index.declared.parts):
                if isinstance(part, str):
                    continue
                if compound or self.statement._distinct or self.statement._distinct_on:
                    raise self.refuse(
                        f"index {index.name} is an expression, which cannot be added to a "
                        "select with DISTINCT or a set operation",
                        "select the expression as a column and name that in the ScoreIndex",
                    )
                clause = cast("ColumnClause[Any]", index.columns[at])
                self._check_expression(part, f"index {index.name}")
                extra.append(part.label(clause.name))
                source = part if is_column(part) else None
                hidden.append(ViewColumn(clause.name, clause, True, source))
        if extra and rendered_tables(statement.add_columns(*extra)) != tables:
            raise self.refuse(
                "an index expression uses a table that the select does not read",
                "join that table in __select__",
            )

        declared = statement if compound else self._labelled(self.view.__statement__)
        declared = declared.add_columns(*extra)
        columns, leaves, anchor, one_row = self._lineage(hidden, extra)
        if extra:
            statement = statement.add_columns(*extra)
        derived = self.view.__primary_key__ is None
        key = self._derived_key(columns) if derived else tuple(self.view.__primary_key__)
        return ViewPlan(
            view=self.view,
            statement=statement,
            declared=declared,
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

    def _check_clauses(self) -> None:
        """Note the clauses after which a row of the view is not one row of a join."""
        statement = self.statement
        for clause, present in (
            ("DISTINCT", statement._distinct or statement._distinct_on),
            ("GROUP BY", statement._group_by_clauses),
            ("HAVING", statement._having_criteria),
            (
                "LIMIT",
                statement._limit_clause is not None
                or statement._offset_clause is not None
                or statement._fetch_clause is not None,
            ),
            ("CTE", statement._independent_ctes),
            ("prefix or suffix", statement._prefixes or statement._suffixes),
        ):
            if present:
                self.reasons.append(clause)

    def _check_expressions(self) -> frozenset[str]:
        """Refuse what cannot be right; note what has no lineage; return the functions used."""
        functions: set[str] = set()
        for element in visitors.iterate(self.statement):
            if isinstance(element, UpdateBase):
                raise self.refuse("its select writes", "a view only reads")
            if isinstance(element, TextClause):
                raise self.refuse(
                    f"text({element.text[:60]!r}) hides which tables and functions it uses",
                    "write it as a SQLAlchemy expression",
                )
            if isinstance(element, TableSample):
                raise self.refuse("TABLESAMPLE gives other rows each time", "leave it out")
            if isinstance(element, FunctionElement):
                functions.add(function_name(element))
            self._check_element(element, "its select")
        top: list[Any] = [
            *self.statement._raw_columns,
            *self.statement._where_criteria,
            *self.statement.get_final_froms(),
        ]
        for root in top:
            for element in visitors.iterate(root):
                if isinstance(element, Exists):
                    self.reasons.append("EXISTS")
                elif isinstance(element, ScalarSelect | SelectBase):
                    self.reasons.append("subquery")
                elif isinstance(element, Over):
                    self.reasons.append("window function")
                elif (
                    isinstance(element, FunctionElement)
                    and str(getattr(element, "name", "")).lower() in AGGREGATE_FUNCTIONS
                ):
                    self.reasons.append("aggregate")
        return frozenset(functions)

    def _check_expression(self, expression: Any, where: str) -> None:
        for element in visitors.iterate(expression):
            self._check_element(element, where)
            if isinstance(element, SelectBase | ScalarSelect | Exists):
                self.reasons.append(f"subquery in {where}")
            elif isinstance(element, Over):
                self.reasons.append(f"window function in {where}")

    def _check_element(self, element: Any, where: str) -> None:
        if isinstance(element, ViewTable) and element.view.__scope__ is not None:
            raise self.refuse(
                f"{element.view.__name__} in {where} is read by its scope, and the cache by all",
                "select from the tables behind it, with a __scope__ of its own",
            )
        if isinstance(element, FunctionElement):
            name = function_name(element)
            if name in VOLATILE_FUNCTIONS:
                raise self.refuse(
                    f"{name}() in {where} depends on the time, the session or chance, so that no "
                    "cached answer could be right",
                    "select the plain column and compute at the reader's, or filter in the query",
                )
            if name not in IMMUTABLE_FUNCTIONS and name not in self.view.__immutable_functions__:
                raise self.refuse(
                    f"function {name}() in {where} is not known to depend on its arguments alone",
                    f'if it does, say __immutable_functions__ = ("{name}",)',
                )
        elif isinstance(element, Cast | Extract):
            inner = element.clause if isinstance(element, Cast) else element.expr
            type_ = inner.type
            if isinstance(type_, DateTime) and type_.timezone:
                raise self.refuse(
                    f"{type(element).__name__.upper()} of a timestamp with time zone in {where} "
                    "depends on the session's TimeZone",
                    "convert it first with func.timezone('UTC', column)",
                )
        elif isinstance(element, ColumnClause) and element.is_literal:
            text = element.name
            if not (text.isdigit() or text in ("*", "NULL", "true", "false")):
                raise self.refuse(
                    f"literal_column({text!r}) in {where} hides what it uses",
                    "write it as a SQLAlchemy expression, or literal(...) for a value",
                )
        elif isinstance(element, BindParameter) and element.required:
            raise self.refuse(
                f"bindparam({element.key!r}) in {where} has no value",
                "a view has no parameters: filter in the query",
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

    def _derived_key(self, columns: tuple[ViewColumn, ...]) -> tuple[str, ...]:
        """Return the smallest set of visible columns, by greedy removal, that identifies a row."""
        statement = self.view.__statement__
        if isinstance(statement, CompoundSelect):
            if statement.keyword.name.endswith("ALL"):
                raise self.refuse(
                    f"{statement.keyword.value} can give the same row twice, so it has no key",
                    "use a set operation that removes duplicates, or name the key with "
                    "__primary_key__",
                )
            return tuple(self.names)
        if self.statement._distinct:
            return tuple(self.names)
        if self.statement._group_by_clauses:
            return self._grouping_key()
        if not self.joins.leaves or any(r.endswith("in FROM") for r in self.reasons):
            raise self.refuse(
                "no primary key can be derived from a subquery in FROM",
                "name the columns that identify a row with __primary_key__",
            )
        if any(j.full for j, _, _ in self.joins.joins) or any(
            not o.table.primary_key.columns for o in self.joins.leaves
        ):
            raise self.refuse(
                "no primary key can be derived over a FULL JOIN or a table without primary key",
                "name the columns that identify a row with __primary_key__",
            )
        wanted = {
            LeafColumn(o.number, c.key)
            for o in self.joins.leaves
            for c in o.table.primary_key.columns
        }
        candidates = list(self.visible)
        if not wanted <= closure(candidates, self.joins.dependencies):
            key = sorted(wanted)
            for column in sorted(wanted, reverse=True):
                rest = [c for c in key if c != column]
                if wanted <= closure(rest, self.joins.dependencies):
                    key = rest
            missing = ", ".join(
                f"{self.joins.leaves[c.leaf].table.name}.{c.name}"
                for c in key
                if c not in self.visible
            )
            raise self.refuse(
                f"no primary key can be derived from the selected columns: {missing} is missing",
                "add it to the select, or name the columns that identify a row with "
                "__primary_key__",
            )
        position = {name: at for at, name in enumerate(self.names)}
        for column in sorted(
            candidates,
            key=lambda c: (c not in wanted, c.leaf, position[self.visible[c]]),
            reverse=True,
        ):
            rest = [c for c in candidates if c != column]
            if wanted <= closure(rest, self.joins.dependencies):
                candidates = rest
        names = tuple(sorted((self.visible[c] for c in candidates), key=position.__getitem__))
        return names or (self.names[0],)  # of a view of one row at most, any column is a key

    def _grouping_key(self) -> tuple[str, ...]:
        key: list[str] = []
        elements = {
            name: label.element
            for name, label in zip(self.names, self.statement._raw_columns, strict=True)
        }
        for clause in self.statement._group_by_clauses:
            plain = clause._deannotate()
            for name, element in elements.items():
                if element is plain or element._deannotate().compare(plain):
                    key.append(name)
                    break
            else:
                raise self.refuse(
                    f"GROUP BY {clause} is not among the selected columns, so no primary key "
                    "can be derived",
                    "select it, or name the columns that identify a row with __primary_key__",
                )
        return tuple(dict.fromkeys(key))

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
