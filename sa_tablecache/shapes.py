"""What a SELECT of a view asks, its parameters left open.

In: a ``select()``. Out: a :class:`Shape`, memoised by the statement's cache key, and the parameters
of this very statement. What is not understood completely raises :class:`.Inexact`, which callers
take as "ask the database", with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Select
from sqlalchemy.sql import operators as sql
from sqlalchemy.sql.elements import (
    BindParameter,
    ColumnClause,
    Grouping,
    Label,
    TextClause,
    Tuple,
    UnaryExpression,
)
from sqlalchemy.sql.functions import count as count_function
from sqlalchemy.sql.selectable import Exists, ScalarSelect, SelectStatementGrouping
from sqlalchemy.sql.sqltypes import INTEGERTYPE
from sqlalchemy.types import TypeEngine

from . import criteria
from .analysis import ViewPlan, plan_of
from .comparison import Inexact
from .criteria import And, Node
from .exc import CriteriaError
from .options import CacheOption
from .orders import Record
from .view import CachedView, ViewTable


@dataclass(frozen=True, slots=True)
class Ordering:
    """One ORDER BY term."""

    column: str
    descending: bool


@dataclass(frozen=True, eq=False)
class Shape:
    """What a statement asks, its parameters left open."""

    view: type[CachedView]
    plan: ViewPlan
    where: Node
    orderings: tuple[Ordering, ...]
    limit: int | None
    offset: int | None
    projection: tuple[str, ...] | None
    """The selected columns; ``None`` for whole records."""
    count: bool
    """Whether it asks for the number of records."""
    exists: bool
    """Whether it asks if that is more than none."""
    options: tuple[CacheOption, ...]
    is_of_records: bool = field(init=False)
    """Whether it asks for whole records."""
    conjuncts: tuple[Node, ...] = field(init=False)
    """The conditions that all have to be true."""
    about: tuple[frozenset[str], ...] = field(init=False)
    """The columns of each condition."""
    used: frozenset[str] = field(init=False)
    """The columns of all conditions."""
    filters: dict[Any, Callable[..., list[Record]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """The functions generated for the shape, see ``answering.py``."""

    def __post_init__(self) -> None:
        conjuncts = tuple(criteria.conjuncts(self.where))
        about = tuple(map(criteria.columns_of, conjuncts))
        object.__setattr__(self, "is_of_records", self.projection is None and not self.count)
        object.__setattr__(self, "conjuncts", conjuncts)
        object.__setattr__(self, "about", about)
        object.__setattr__(self, "used", frozenset().union(*about))


class Number(NamedTuple):
    """A LIMIT or OFFSET of which no parameter was made."""

    value: int
    type: TypeEngine[Any] = INTEGERTYPE
    required: bool = False
    callable: None = None
    effective_value: None = None


Asked: TypeAlias = tuple[Shape, Sequence[BindParameter[Any] | Number]]
"""What a statement asks: its shape, and its parameters in the order of their numbers."""


#: Attributes of a Select that are understood here. Any other that is set means that the statement
#: has a feature this module does not know, present or future, and is left to the database. The last
#: three a legacy Query leaves behind; they say how entities are loaded.
_KNOWN: Final = frozenset(
    """_propagate_attrs _raw_columns _label_style _where_criteria _order_by_clauses _limit_clause
    _offset_clause _with_options _execution_options _from_obj _fetch_clause _fetch_clause_options
    _memoized_keys _all_selected_columns _generate_cache_key _for_update_arg
    _is_clone_of dispatch load_options _compile_options""".split()
)

#: Execution options that change nothing about which rows are right.
HARMLESS_OPTIONS: Final = frozenset(
    """yield_per stream_results max_row_buffer populate_existing compiled_cache
    logging_token preserve_rowcount prebuffer_rows""".split()
)

_by_statement: WeakKeyDictionary[Any, tuple[Shape | Inexact, list[BindParameter[Any]]]] = (
    WeakKeyDictionary()
)
_by_key: dict[Any, Shape | Inexact] = {}


def view_of(statement: Any) -> type[CachedView] | None:
    """Return the view that a statement selects from, if it is a SELECT of one view's columns."""
    if not isinstance(statement, Select):
        return None
    for raw in statement._raw_columns:
        if type(raw) is ViewTable:
            return raw.view
        table = getattr(raw, "table", None)
        if type(table) is ViewTable:
            return table.view
    for source in statement._from_obj:
        if type(source) is ViewTable:
            return source.view
    for raw in statement._raw_columns:
        if isinstance(raw, ColumnClause) and raw.table is not None:
            continue  # looked at above
        for source in raw._from_objects:
            if type(source) is ViewTable:
                return source.view
    # The types are looked at here, because this is asked of statements that touch no view, too.
    columns: Any = statement._raw_columns
    if len(columns) == 1 and type(columns[0]) in (Exists, Label):
        inner = in_exists(statement)
        return None if inner is None else _only_view(inner)
    return None


def in_exists(statement: Select[Any]) -> Select[Any] | None:
    """Return what is in the EXISTS, if a statement selects that and nothing else."""
    raw: Any = statement._raw_columns
    if len(raw) != 1:
        return None
    element = raw[0].element if type(raw[0]) is Label else raw[0]
    if type(element) is not Exists or statement._from_obj or statement._where_criteria:
        return None
    inner: Any = element.element
    while isinstance(inner, ScalarSelect | Grouping | SelectStatementGrouping):
        inner = inner.element
    return inner if type(inner) is Select else None


def _only_view(inner: Select[Any]) -> type[CachedView] | None:
    """Return the view that the SELECT in an EXISTS is from, if it is from no more than that.

    Not one that is read by scope: what scopes add to a statement would be added outside.
    """
    tables = {
        source
        for clause in (*inner._raw_columns, *inner._where_criteria)
        for source in clause._from_objects
    }.union(inner._from_obj)
    if len(tables) != 1:
        return None
    table: Any = tables.pop()
    return table.view if type(table) is ViewTable and table.view.__scope__ is None else None


def shape_of(statement: Select[Any]) -> tuple[Shape, list[BindParameter[Any]]]:
    """Return what a SELECT of a view asks, and its parameters in the order of their numbers.

    :raises Inexact: if the database has to answer.
    :raises CriteriaError: if it uses a table that it does not join.
    """
    known = _by_statement.get(statement)
    if known is None:
        check_features(statement)
        inner = in_exists(statement)
        if inner is not None:
            check_features(inner)
        cache_key = statement._generate_cache_key()
        if cache_key is None:
            raise Inexact("a construct without cache key")
        parameters = list(cache_key.bindparams)
        shape = _by_key.get(cache_key.key)
        if shape is None:
            try:
                shape = _read(statement, parameters)
            except Inexact as reason:
                shape = reason
            if len(_by_key) > 1_000:
                _by_key.clear()
            _by_key[cache_key.key] = shape
        known = _by_statement[statement] = (shape, parameters)
    if isinstance(known[0], Inexact):
        raise Inexact(str(known[0]))
    return known[0], known[1]


def check_features(statement: Select[Any]) -> None:
    """Raise :class:`.Inexact` for what is not (or may not be) part of a statement's cache key."""
    for name, value in statement.__dict__.items():
        # Only empty collections, None and False say that a feature is not used.
        unset = value is None or value is False or (isinstance(value, Collection) and not value)
        if name not in _KNOWN and not unset:
            raise Inexact(f"{name.strip('_')} is left to the database")
    for name in statement._execution_options:
        if name not in HARMLESS_OPTIONS:
            raise Inexact(f"execution option {name} is left to the database")


def _read(statement: Select[Any], parameters: list[BindParameter[Any]]) -> Shape:
    view = view_of(statement)
    assert view is not None
    table = view.__table__
    plan = plan_of(view)
    options = _options_of(statement)
    inner = in_exists(statement)
    if inner is not None:
        if (
            statement._order_by_clauses
            or statement._limit_clause is not None
            or statement._offset_clause is not None
            or statement._fetch_clause is not None
            or statement._for_update_arg is not None
        ):
            raise Inexact("more than EXISTS is left to the database")
        options += _options_of(inner)
        statement = inner
    if statement._for_update_arg is not None:
        raise Inexact("FOR UPDATE is left to the database")
    if statement._fetch_clause is not None:
        raise Inexact("FETCH is left to the database")
    if any(source is not table for source in statement._from_obj):
        raise Inexact("a join is left to the database")
    positions = {id(parameter): at for at, parameter in enumerate(parameters)}

    def position(parameter: BindParameter[Any]) -> int:
        if id(parameter) not in positions:
            raise Inexact("a parameter that cannot be told apart")
        return positions[id(parameter)]

    def resolve(element: Any) -> str | None:
        if isinstance(element, ColumnClause) and element.table is table:
            return element.name if element.name in plan.by_name else None
        return None

    if inner is None:
        projection, count = _selected(statement, table, resolve)
    else:
        projection, count = None, True
        _check_constant(inner, table, resolve)
    for criterion in statement._where_criteria:
        for source in criterion._from_objects:
            if source is not table:
                raise CriteriaError(
                    f"the criteria of a SELECT from {plan.name} use {source}, which it does not "
                    f"join: use the columns of {plan.name}, or join {source} explicitly"
                )
    reader = criteria.Reader(resolve, position)
    where = And(tuple(reader.read(criterion) for criterion in statement._where_criteria))
    orderings: list[Ordering] = []
    for clause in statement._order_by_clauses:
        orderings += _ordering(clause, resolve)
    if inner is not None:
        orderings = []  # they do not matter
    if count and (
        orderings or statement._limit_clause is not None or statement._offset_clause is not None
    ):
        raise Inexact("count() of a part is left to the database")
    limit, offset = (
        None if clause is None else _limit(clause, position)
        for clause in (statement._limit_clause, statement._offset_clause)
    )
    exists = inner is not None
    return Shape(
        view, plan, where, tuple(orderings), limit, offset, projection, count, exists, options
    )


def _options_of(statement: Select[Any]) -> tuple[CacheOption, ...]:
    options = tuple(o for o in statement._with_options if isinstance(o, CacheOption))
    if len(options) < len(statement._with_options):
        raise Inexact("options of others than the cache are left to the database")
    return options


def _check_constant(
    inner: Select[Any], table: ViewTable, resolve: Callable[[Any], str | None]
) -> None:
    """Raise :class:`.Inexact` unless what is selected in an EXISTS does not matter.

    An aggregate gives a row where there is none, and an expression may fail.
    """
    for element in inner._raw_columns:
        raw: Any = element.element if isinstance(element, Label) else element
        if not (
            raw is table
            or resolve(raw) is not None
            or isinstance(raw, BindParameter)
            or (isinstance(raw, ColumnClause | TextClause) and str(raw) in ("*", "1"))
        ):
            raise Inexact("an expression selected in EXISTS is left to the database")


def _selected(
    statement: Select[Any], table: ViewTable, resolve: Callable[[Any], str | None]
) -> tuple[tuple[str, ...] | None, bool]:
    raw = statement._raw_columns
    if len(raw) == 1:
        element: Any = raw[0]
        if element is table:
            return None, False
        element = element.element if isinstance(element, Label) else element
        if isinstance(element, count_function):
            arguments = list(element.clauses)
            if not arguments or getattr(arguments[0], "name", None) == "*":
                return None, True
    names = [resolve(element) for element in raw]
    if any(name is None or name not in table.c for name in names):
        raise Inexact("an expression among the selected columns is left to the database")
    return cast("tuple[str, ...]", tuple(names)), False


def _ordering(clause: Any, resolve: Callable[[Any], str | None]) -> list[Ordering]:
    descending = False
    if isinstance(clause, UnaryExpression):
        if clause.modifier not in (sql.desc_op, sql.asc_op):
            raise Inexact("NULLS FIRST and NULLS LAST are left to the database")
        descending = clause.modifier is sql.desc_op
        clause = clause.element
    while type(clause).__name__ in ("Grouping", "_label_reference"):
        clause = clause.element
    if isinstance(clause, UnaryExpression):
        return _ordering(clause, resolve)
    result = []
    for element in clause.clauses if isinstance(clause, Tuple) else [clause]:
        name = resolve(element)
        if name is None:
            raise Inexact("an expression in ORDER BY is left to the database")
        result.append(Ordering(name, descending))
    return result


def _limit(clause: Any, position: Callable[[BindParameter[Any]], int]) -> int:
    if not isinstance(clause, BindParameter):
        raise Inexact("a computed LIMIT is left to the database")
    return position(clause)
