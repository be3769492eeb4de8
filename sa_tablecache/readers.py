"""Who reads a view that says ``__scope__``: the value that its rows have to have.

In: who is reading, said around each execution. Out: the value of the view's scope column that the
rendered view is compared to.

The condition is part of what a view renders, so that it is there however deep the view stands in a
statement: in a join, an alias, a subquery, an UPDATE, a mapped property. The value is asked for
when the statement is executed. Where nobody said who is reading, that is refused: what nobody has
thought of shows nothing. (Adding criteria to statements, as ``with_loader_criteria`` does, would
have to find every place where a view can stand.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeAlias

from sqlalchemy import bindparam, select
from sqlalchemy.orm.interfaces import ORMOption
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.cache_key import HasCacheKey
from sqlalchemy.sql.selectable import FromClause, SelectBase
from sqlalchemy.sql.visitors import InternalTraversal

from .exc import UnscopedRead
from .view import CachedView

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


def scoped(view: type[CachedView], rendered: SelectBase, statement: Any) -> SelectBase:
    """Return what a view renders as part of a statement, kept to the scope of who executes it."""
    if view.__scope__ is None:
        return rendered
    for option in getattr(statement, "_with_options", ()):
        if isinstance(option, EveryScope) and option.view is view:
            return rendered
    every = rendered.subquery()
    return select(every).where(in_scope(view, every, callable_=lambda: _reader.get()(view)))
