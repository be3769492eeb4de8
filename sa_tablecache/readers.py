"""What a view renders, and for whom: the value that rows of a view with ``__scope__`` have to have.

In: a view in a statement, and who is reading, said around each execution. Out: the view's select;
where it says ``__scope__``, with a condition on that column. (And where the statement has
``with_loader_criteria``, as the ORM has not resolved it yet, so that they apply.)

The condition is part of what a view renders, so that it is there however deep the view stands in a
statement: in a join, an alias, a subquery, an UPDATE, a mapped property. The value is asked for
when the statement is executed. Where nobody said who is reading, that is refused: what nobody has
thought of shows nothing. (Adding criteria to statements, as ``with_loader_criteria`` does, would
have to find every place where a view can stand.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeAlias, cast

from sqlalchemy import bindparam, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm.interfaces import ORMOption
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.cache_key import HasCacheKey
from sqlalchemy.sql.selectable import FromClause, SelectBase
from sqlalchemy.sql.visitors import InternalTraversal

from .exc import UnscopedRead
from .view import CachedView, ViewTable

Reader: TypeAlias = Callable[[type[CachedView]], Any]
"""Says the scope in which a view is read; raises :class:`.UnscopedRead` if there is none."""


def _nobody(view: type[CachedView]) -> Any:
    raise UnscopedRead(
        f"{view.__name__} is read by its scope, {view.__scope__}, and nobody said by which: read "
        "it through a session that was attached with scope=, not through a connection"
    )


_reader: Final[ContextVar[Reader]] = ContextVar("sa_tablecache_reader", default=_nobody)


@contextmanager
def reading_as(reader: Reader) -> Iterator[None]:
    """Have the views that are read in the block be read in the scope of a reader."""
    token = _reader.set(reader)
    try:
        yield
    finally:
        _reader.reset(token)


class EveryScope(HasCacheKey, ORMOption):
    """An option of the cache's own statements: they read one view in all scopes."""

    _is_has_cache_key = True
    _traverse_internals = [("view", InternalTraversal.dp_plain_obj)]  # noqa: RUF012

    def __init__(self, view: type[CachedView]) -> None:
        self.view = view


def in_scope(view: type[CachedView], source: FromClause, **value: Any) -> ColumnElement[bool]:
    """Return the criterion that rows are in a scope: ``value=``, or what ``callable_=`` says."""
    column = source.c[str(view.__scope__)]
    return column == bindparam(None, type_=column.type, unique=True, **value)


def scoped(view: type[CachedView], rendered: SelectBase, options: Iterable[Any]) -> SelectBase:
    """Return what a view renders in a statement, kept to the scope of who executes it."""
    if view.__scope__ is None:
        return rendered
    if any(isinstance(option, EveryScope) and option.view is view for option in options):
        return rendered
    every = rendered.subquery()
    return select(every).where(in_scope(view, every, callable_=lambda: _reader.get()(view)))


@compiles(ViewTable)
def _render(element: ViewTable, compiler: Any, *, asfrom: bool = False, **kwargs: Any) -> str:
    """Render a view in a FROM clause as its select, under its name."""
    if not asfrom:
        return cast("str", compiler.visit_table(element, asfrom=asfrom, **kwargs))
    linter = kwargs.pop("from_linter", None)
    if linter is not None:
        linter.froms[element] = element.name
    alias = kwargs.pop("enclosing_alias", None)
    plan = cast("Any", element.view).__plan__
    options = getattr(compiler.statement, "_with_options", ())
    filtered = any(getattr(option, "_is_criteria_option", False) for option in options)
    statement = scoped(element.view, plan.declared if filtered else plan.statement, options)
    literal = kwargs.get("literal_binds", False)
    inner = cast(
        "str", compiler.process(statement.self_group(), asfrom=True, literal_binds=literal)
    )
    if alias is not None and alias.element is element:
        return inner
    return f"{inner} AS {compiler.preparer.quote(element.name)}"
