"""The user's ``select()``: as plain Core, and whether what it uses can be cached at all.

In: the statement of a view. Out: the same select without its ORM parts (relationship joins,
inheritance and many-to-many aliases resolved by the ORM's own compiler), the functions that it
calls, and the reasons why a row of it is not one row of a join. What could not be right is refused,
with the culprit and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from sqlalchemy import DateTime, Select, select
from sqlalchemy.sql import visitors
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import BindParameter, Cast, ColumnClause, Extract, Over, TextClause
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
from .view import ViewTable

GROUPING = ("GROUP BY", "HAVING", "aggregate")
"""The obstacles that are none where all of GROUP BY is plain columns."""


def plain(statement: Any) -> Any:
    """Return an ORM select as a plain Core select."""
    if statement._propagate_attrs.get("compile_state_plugin") != "orm":
        return statement
    state = statement._compile_state_factory(statement, statement._default_compiler())
    return cast("Any", state).statement


def obstacles(statement: Any, leaves: Sequence[Any] = ()) -> Iterator[str]:
    """Yield the reasons why a row of a select is not one row of a join.

    :param leaves: elements of FROM that are no obstacle, whatever is inside of them.
    """
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
            yield clause
    todo: list[Any] = [
        *statement._raw_columns,
        *statement._where_criteria,
        *statement._having_criteria,
        *statement.get_final_froms(),
    ]
    while todo:
        element = todo.pop()
        if any(element is leaf for leaf in leaves):
            continue
        if isinstance(element, Exists):
            yield "EXISTS"
        elif isinstance(element, ScalarSelect | SelectBase):
            yield "subquery"
        elif isinstance(element, Over):
            yield "window function"
        elif (
            isinstance(element, FunctionElement)
            and str(getattr(element, "name", "")).lower() in AGGREGATE_FUNCTIONS
        ):
            yield "aggregate"
        todo += element.get_children()


class Expressions:
    """The select of one view, read expression by expression."""

    def __init__(self, view: Any) -> None:
        self.view = view
        self.names: list[str] = list(view.__table__.c.keys())
        self.reasons: list[str] = []
        """Why the select as a whole has no row lineage."""
        self.statement = self._freeze(view.__statement__)

    def refuse(self, culprit: str, way_out: str) -> ViewDefinitionError:
        """Return the error to raise: the culprit, and what to do instead."""
        return ViewDefinitionError(f"view {self.view.__name__}: {culprit}; {way_out}")

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
        statement = plain(statement)
        raw = statement._raw_columns
        if not isinstance(statement, Select) or len(raw) != len(self.names):
            raise self.refuse(
                "its select has loader options that change what it selects",
                "select plain columns, without options()",
            )
        return self.labelled(statement)

    def labelled(self, statement: Any) -> Any:
        """Return a select with the view's names on its columns."""
        raw = statement._raw_columns
        statement = statement._generate()
        statement._raw_columns = [
            getattr(c, "element", c).label(n) if type(c).__name__ == "Label" else c.label(n)
            for n, c in zip(self.names, raw, strict=True)
        ]
        for memoized in ("_all_selected_columns", "_memoized_keys"):
            statement.__dict__.pop(memoized, None)
        return statement

    def check_select(self) -> frozenset[str]:
        """Refuse what cannot be right; return the functions used."""
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
        return frozenset(functions)

    def check(self, expression: Any, where: str) -> None:
        """Refuse what cannot be right in an expression; note what has no lineage."""
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
