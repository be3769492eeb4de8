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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    Column,
    DateTime,
    Select,
    Table,
    UniqueConstraint,
    select,
)
from sqlalchemy.engine.default import StrCompileDialect
from sqlalchemy.exc import CompileError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ColumnElement, operators, visitors
from sqlalchemy.sql.compiler import StrSQLCompiler
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Cast,
    ColumnClause,
    Extract,
    Grouping,
    Over,
    TextClause,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import (
    Alias,
    CompoundSelect,
    Exists,
    FromGrouping,
    Join,
    ScalarSelect,
    SelectBase,
    TableSample,
    TextualSelect,
)

from . import view as view_module
from .exc import ViewDefinitionError
from .view import CachedView, ViewTable

#: A base table by name, resolved: what a change and a leaf are matched by.
TableName = tuple[str | None, str]

#: Functions whose result depends on the time, the session, or nothing at all.
VOLATILE_FUNCTIONS = frozenset(
    """now random rand uuid gen_random_uuid uuid_generate_v1 uuid_generate_v4 uuidv4 uuidv7
    current_timestamp current_date current_time localtimestamp localtime clock_timestamp
    statement_timestamp transaction_timestamp timeofday sysdate getdate curdate curtime
    utc_timestamp utc_date unix_timestamp current_user session_user user current_role
    current_setting current_schema current_database database connection_id last_insert_id
    last_insert_rowid changes total_changes nextval currval lastval next_value setval to_char
    to_timestamp to_date age txid_current pg_backend_pid randomblob pg_sleep sleep rand_uuid
    inet_client_addr set_config""".split()
)

AGGREGATE_FUNCTIONS = frozenset(
    """count sum avg min max array_agg string_agg group_concat json_agg jsonb_agg json_object_agg
    json_group_array json_group_object bool_and bool_or every bit_and bit_or stddev stddev_pop
    stddev_samp variance var_pop var_samp aggregate_strings total mode percentile_cont
    percentile_disc""".split()
)

#: Functions whose result depends on their arguments alone, on every supported database.
IMMUTABLE_FUNCTIONS = AGGREGATE_FUNCTIONS | frozenset(
    """coalesce ifnull nullif greatest least abs ceil ceiling floor round trunc sign mod power pow
    sqrt exp ln log log10 sin cos tan asin acos atan atan2 pi degrees radians lower upper length
    char_length character_length octet_length substr substring trim ltrim rtrim btrim lpad rpad
    replace concat concat_ws reverse repeat left right position strpos instr initcap md5 ascii chr
    char hex unhex translate split_part timezone iif typeof json_extract json_array_length
    jsonb_array_length json_object json_array jsonb_build_object json_build_object cardinality
    array_length unnest row_number rank dense_rank percent_rank cume_dist ntile lag lead
    first_value last_value nth_value cast bit_length make_date make_time div width_bucket""".split()
)


class LeafColumn(NamedTuple):
    """A column of one occurrence of a base table in the view's FROM."""

    leaf: int
    name: str


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


view_module.analyse = analyse


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


def _conjuncts(element: Any) -> Iterator[Any]:
    if isinstance(element, BooleanClauseList) and element.operator is operators.and_:
        for clause in element.clauses:
            yield from _conjuncts(clause)
    elif isinstance(element, Grouping):
        yield from _conjuncts(element.element)
    elif element is not None:
        yield element


def _is_column(element: Any) -> bool:
    return isinstance(element, Column) and element.table is not None


def _closure(
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


@dataclass
class _Occurrence:
    """A leaf while the FROM clause is being read."""

    number: int
    selectable: Any
    table: Table
    nullable: bool


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
        self.occurrences: list[_Occurrence] = []
        self.joins: list[tuple[Join, range]] = []
        """Every join with the numbers of the leaves on its right side."""
        self.dependencies: list[tuple[frozenset[LeafColumn], frozenset[LeafColumn]]] = []
        self.equal: dict[LeafColumn, set[LeafColumn]] = {}
        """For a leaf's column, the columns equal to it wherever the leaf is not NULL-extended."""

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
            self._read_from(selectable, nullable=False)
        occurrences = self.occurrences
        for occurrence in occurrences:
            if not occurrence.table.primary_key.columns:
                self.reasons.append(f"table {occurrence.table.fullname} has no primary key")
        if occurrences and all(o.nullable for o in occurrences):
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
                source = part if _is_column(part) else None
                hidden.append(ViewColumn(clause.name, clause, True, source))
        if extra and rendered_tables(statement.add_columns(*extra)) != tables:
            raise self.refuse(
                "an index expression uses a table that the select does not read",
                "join that table in __select__",
            )

        columns, leaves, anchor, one_row = self._lineage(hidden, extra)
        if extra:
            statement = statement.add_columns(*extra)
        derived = self.view.__primary_key__ is None
        key = self._derived_key(columns) if derived else tuple(self.view.__primary_key__)
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
                functions.add(str(getattr(element, "name", "")).lower())
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

    def _check_element(self, element: Any, where: str) -> None:
        if isinstance(element, FunctionElement):
            name = str(getattr(element, "name", "")).lower()
            if name in VOLATILE_FUNCTIONS:
                raise self.refuse(
                    f"{name}() in {where} depends on the time, the session or chance, so that no "
                    "cached answer could be right",
                    "select the plain column and compute at the reader's, or filter in the query",
                )
            if (
                name
                and name not in IMMUTABLE_FUNCTIONS
                and name not in self.view.__immutable_functions__
            ):
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

    def _read_from(self, selectable: Any, *, nullable: bool) -> None:
        """Read one FROM element: its leaves, and which of them outer joins NULL-extend."""
        if isinstance(selectable, FromGrouping):
            self._read_from(selectable.element, nullable=nullable)
            return
        if isinstance(selectable, Join):
            self._read_from(selectable.left, nullable=nullable or selectable.full)
            first = len(self.occurrences)
            self._read_from(
                selectable.right, nullable=nullable or selectable.isouter or selectable.full
            )
            self.joins.append((selectable, range(first, len(self.occurrences))))
            return
        base = selectable
        while isinstance(base, Alias):
            base = base.element
        base = base._deannotate() if hasattr(base, "_deannotate") else base
        if not isinstance(base, Table):
            self.reasons.append(f"{type(selectable).__name__.lower()} in FROM")
            return
        self.occurrences.append(_Occurrence(len(self.occurrences), selectable, base, nullable))

    # -- lineage and keys -----------------------------------------------------------------------

    def _lineage(
        self, hidden: list[ViewColumn], extra: list[Any]
    ) -> tuple[tuple[ViewColumn, ...], tuple[Leaf, ...], Leaf | None, bool]:
        sources = [self._source(label) for label in self.statement._raw_columns]
        self._read_dependencies()
        columns = tuple(
            ViewColumn(
                name,
                self.table.c[name],
                self._is_nullable(source),
                source[1] if source is not None and not self.reasons else None,
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
        for occurrence in self.occurrences:
            names, visible = [], []
            for column in occurrence.table.primary_key.columns:
                name = f"_key{occurrence.number}_{column.key}"
                clause = self.table.hidden(name, column.type)
                extra.append(occurrence.selectable.c[column.key].label(name))
                hidden.append(ViewColumn(name, clause, occurrence.nullable, column))
                names.append(name)
                visible.append(self._visible_equal(LeafColumn(occurrence.number, column.key)))
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
            if all_keys <= _closure(own, self.dependencies):
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
        at = self._leaf_column(element)
        if at is None:
            return None
        return at.leaf, self.occurrences[at.leaf].table.c[at.name]

    def _leaf_column(self, element: Any) -> LeafColumn | None:
        for occurrence in self.occurrences:
            # Annotated copies of a selectable are equal to it, and not identical.
            if element.table == occurrence.selectable:
                for column in occurrence.table.columns:
                    if column.name == element.name:
                        return LeafColumn(occurrence.number, column.key)
        return None

    def _is_nullable(self, source: tuple[int, Column[Any]] | None) -> bool:
        if source is None or self.reasons:
            return True
        return self.occurrences[source[0]].nullable or bool(source[1].nullable)

    def _read_dependencies(self) -> None:
        """Collect functional dependencies and equalities from keys, joins and criteria."""
        for occurrence in self.occurrences:
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
        for criterion in self.statement._where_criteria:
            for conjunct in _conjuncts(criterion):
                self._read_equality(conjunct, frozenset())
        for join, right in self.joins:
            if join.full:
                continue
            for conjunct in _conjuncts(join.onclause):
                self._read_equality(conjunct, frozenset(right) if join.isouter else frozenset())
            if join.isouter:
                self._read_outer_join(join, frozenset(right))

    def _read_equality(self, conjunct: Any, right_of_outer: frozenset[int]) -> None:
        """Read ``a = b``: an equality of all rows, or (outer join) of rows not NULL-extended."""
        if not (isinstance(conjunct, BinaryExpression) and conjunct.operator is operators.eq):
            return
        sides = [
            self._leaf_column(side) if hasattr(side, "table") else None
            for side in (conjunct.left, conjunct.right)
        ]
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
        for conjunct in _conjuncts(join.onclause):
            for element in visitors.iterate(conjunct):
                if isinstance(element, ColumnClause):
                    at = self._leaf_column(element) if element.table is not None else None
                    if at is None:
                        return
                    if at.leaf not in right:
                        left_used.add(at)
            if isinstance(conjunct, BinaryExpression) and conjunct.operator is operators.eq:
                for one, other in (
                    (conjunct.left, conjunct.right),
                    (conjunct.right, conjunct.left),
                ):
                    a = self._leaf_column(one) if _is_column(one) else None
                    b = self._leaf_column(other) if _is_column(other) else None
                    if a and b and a.leaf not in right and b.leaf in right:
                        pinned.add(b)
        inside = [d for d in self.dependencies if all(c.leaf in right for c in d[0] | d[1])]
        keys = frozenset(
            LeafColumn(number, c.key)
            for number in right
            for c in self.occurrences[number].table.primary_key.columns
        )
        if keys <= _closure(pinned, inside):
            self.dependencies.append((frozenset(left_used), keys))

    def _visible_equal(self, column: LeafColumn) -> str | None:
        """Return a view column that equals the given one wherever its leaf is not NULL-extended."""
        if column in self.visible:
            return self.visible[column]
        kind = self._type_of(column)
        seen, todo = {column}, [column]
        while todo:
            current = todo.pop()
            for other in sorted(self.equal.get(current, ())):
                if other in seen or type(self._type_of(other)) is not type(kind):
                    continue
                seen.add(other)
                if other in self.visible:
                    return self.visible[other]
                todo.append(other)
        return None

    def _type_of(self, column: LeafColumn) -> Any:
        return self.occurrences[column.leaf].table.c[column.name].type

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
        if not self.occurrences or any(r.endswith("in FROM") for r in self.reasons):
            raise self.refuse(
                "no primary key can be derived from a subquery in FROM",
                "name the columns that identify a row with __primary_key__",
            )
        if any(j.full for j, _ in self.joins) or any(
            not o.table.primary_key.columns for o in self.occurrences
        ):
            raise self.refuse(
                "no primary key can be derived over a FULL JOIN or a table without primary key",
                "name the columns that identify a row with __primary_key__",
            )
        wanted = {
            LeafColumn(o.number, c.key)
            for o in self.occurrences
            for c in o.table.primary_key.columns
        }
        candidates = list(self.visible)
        if not wanted <= _closure(candidates, self.dependencies):
            key = sorted(wanted)
            for column in sorted(wanted, reverse=True):
                rest = [c for c in key if c != column]
                if wanted <= _closure(rest, self.dependencies):
                    key = rest
            missing = ", ".join(
                f"{self.occurrences[c.leaf].table.name}.{c.name}"
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
            if wanted <= _closure(rest, self.dependencies):
                candidates = rest
        return tuple(sorted((self.visible[c] for c in candidates), key=position.__getitem__))

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
        filtered = set()
        for criterion in self.statement._where_criteria:
            for element in visitors.iterate(criterion):
                if isinstance(element, ColumnClause) and element.table is not None:
                    at = self._leaf_column(element)
                    if at is not None and self.occurrences[at.leaf].nullable:
                        filtered.add(at.leaf)
        if filtered:
            # A row that such a criterion drops leaves no trace in the cache, so that nothing
            # would lead from its change to the NULL-extended row that takes its place.
            for leaf in leaves:
                if leaf.nullable:
                    coarse[leaf.table] = "WHERE on the nullable side of an outer join"
        return coarse
