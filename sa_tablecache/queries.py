"""Queries of the legacy API, ``session.query(View)``, that know of the cache.

In: a :class:`~sqlalchemy.orm.Query` of a :class:`.CacheSession`. Out: what that gives, from memory
where it can be.

Making a Query, and a statement of it, and a cache key of that, takes several times as long as all
else that a hit needs. So ``session.query(View)`` begins as a :class:`LightQuery`, which only notes
what is asked for as long as that is simple, and becomes the :class:`CachedQuery` that it stands for
when anything else is asked of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from threading import RLock
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Exists, Select, exists, func, literal, select
from sqlalchemy.orm import Query, Session
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    ColumnClause,
    UnaryExpression,
)

from .comparison import Inexact
from .explaining import Explanation
from .reading import Answer, answer
from .results import result_of, scalars_of
from .scopes import cache_of, in_own_scope, is_filtered, is_plain, overrides
from .shapes import Asked, Number, Shape, check_features, shape_of, view_of
from .view import CachedView, ViewIndex, ViewTable


class CachedQuery(Query[Any]):
    """A :class:`~sqlalchemy.orm.Query` that counts views in the cache and explains itself."""

    def _iter(self) -> Any:
        """Execute the query, without the way through the ORM if memory alone can answer.

        All of ``all``, ``first``, ``one`` and iteration go through this method of SQLAlchemy, whose
        own would make an event of it first, twice as long as all that a hit needs. Were it renamed,
        queries would take that way again.
        """
        session: Any = self.session
        if (
            hasattr(session, "_from_cache")
            and not self._params
            and "load_options" not in self.__dict__  # nothing was asked of the ORM
            and not self.dispatch.before_compile
            and not overrides(session)
        ):
            statement: Any = self._statement_20()
            answer = session._from_cache(statement)
            if answer is not None:
                if answer.shape.is_of_records:
                    return scalars_of(answer, statement)
                return result_of(answer, statement)
        return super()._iter()

    def count(self) -> int:
        """Return the number of rows; from the cache in O(log n) if no condition remains."""
        statement = self.statement
        # What load_options say, autoflush(False) for one, only SQLAlchemy's own count() heeds.
        if (
            isinstance(statement, Select)
            and _is_whole(statement)
            and not self._params
            and "load_options" not in self.__dict__
        ):
            return int(self.session.execute(_counted(statement)).scalar_one())
        return super().count()

    def exists(self) -> Exists:
        """Return ``EXISTS (SELECT 1 FROM ...)``, a clause."""
        statement = self.statement
        if view_of(statement) is None or not isinstance(statement, Select):
            return super().exists()
        # Of a query that selects no entity, SQLAlchemy would lose the FROM: always true.
        return exists(statement.with_only_columns(literal(1), maintain_column_froms=True))

    def explain(self) -> Explanation:
        """Say how the query would be answered, and why; runs nothing."""
        statement: Any = self.statement
        view = view_of(statement)
        if view is not None:
            statement = in_own_scope(self.session, statement, view)
        return cache_of(self.session).explain(statement)


def _is_whole(statement: Select[Any]) -> bool:
    """Whether a SELECT gives all records of a view that meet its WHERE clause, and no more."""
    try:
        check_features(statement)  # joins, DISTINCT and whatever else there is
    except Inexact:
        return False
    return (
        len(statement._raw_columns) == 1
        and type(statement._raw_columns[0]) is ViewTable
        and not statement._from_obj
        and statement._for_update_arg is None
        and statement._fetch_clause is None
        and statement._limit_clause is None
        and statement._offset_clause is None
    )


def _counted(statement: Select[Any]) -> Select[Any]:
    """Return the SELECT of how many records a SELECT of a view gives."""
    return (
        select(func.count())
        .select_from(statement._raw_columns[0])
        .where(*statement._where_criteria)
        .options(*statement._with_options)
        .execution_options(**statement._execution_options)
    )


# -- queries that were not made yet -------------------------------------------------------------


_making = RLock()


def _made_of(query: CachedQuery) -> Any:
    """Have a query become the one that SQLAlchemy would have made, and return it.

    One at a time: threads may share a query that they only derive theirs from.
    """
    with _making:
        if type(query) is LightQuery:
            query._make()
    return query


class LightQuery(CachedQuery):
    """A query of one view that was not made yet: a note of what it is asked for.

    It takes comparisons of a column with a value, orders, LIMIT and OFFSET; the columns and
    expressions are SQLAlchemy's own, so that nothing has to be imitated. Asked for, or told,
    anything else (:class:`_Made`), the object becomes the query that SQLAlchemy would have made of
    the same calls, and goes on as that. What it takes cannot fail, so that no error comes later
    than it would have.
    """

    _statement = None  # as of any query without from_statement()

    _light_view: type[CachedView]
    _light_table: ViewTable
    _light_where: tuple[BinaryExpression[Any], ...] = ()
    _light_said: tuple[tuple[str, Any], ...] = ()
    """Of each comparison the column and the operator."""
    _light_orders: tuple[Any, ...] = ()
    _light_ordered: tuple[tuple[Any, str], ...] = ()
    """Of each order the modifier and the column."""
    _light_limit: int | None = None
    _light_offset: int | None = None

    def __init__(self, entities: Any, session: Any = None) -> None:
        # Of whoever calls type(query)(...): light ones are made by light_query().
        self.__class__ = CachedQuery  # type: ignore[assignment]
        CachedQuery.__init__(self, entities, session)

    def _make(self) -> None:
        """Become the query that SQLAlchemy would have made; see :func:`_made_of`."""
        made: Any = CachedQuery((self._light_view,), self.session)
        if self._light_where:
            made = made.filter(*self._light_where)
        if self._light_orders:
            made = made.order_by(*self._light_orders)
        if self._light_limit is not None:
            made = made.limit(self._light_limit)
        if self._light_offset is not None:
            made = made.offset(self._light_offset)
        others = {name: value for name, value in self.__dict__.items() if name[:7] != "_light_"}
        self.__dict__ = {**made.__dict__, **others}
        self.__class__ = CachedQuery  # type: ignore[assignment]  # both have nothing but a dict

    # Each method makes its copy itself, with what the application has put on the query: one that
    # does it for all would cost more than all else that they do.

    if not TYPE_CHECKING:  # the signatures are those of Query

        def filter(self, *criterion):
            """See :meth:`sqlalchemy.orm.Query.filter`."""
            if type(self) is not LightQuery:  # a method that was kept, of a query made since
                return self.filter(*criterion)
            if self._light_limit is not None or self._light_offset is not None:
                return _made_of(self).filter(*criterion)
            table = self._light_table
            said = []
            for each in criterion:
                if type(each) is not BinaryExpression:
                    return _made_of(self).filter(*criterion)
                column, value = each.left, each.right
                if (
                    type(column) is not ColumnClause
                    or column.table is not table
                    or type(value) is not BindParameter
                    or not value.unique
                    or value.expanding
                ):
                    return _made_of(self).filter(*criterion)
                said.append((column.name, each.operator))
            query = _new(LightQuery)
            query.__dict__ = {
                **self.__dict__,
                "_light_where": self._light_where + criterion,
                "_light_said": (*self._light_said, *said),
            }
            return query

        def filter_by(self, **kwargs):
            """See :meth:`sqlalchemy.orm.Query.filter_by`."""
            if type(self) is not LightQuery:  # a method that was kept, of a query made since
                return self.filter_by(**kwargs)
            columns = self._light_table.c
            for name in kwargs:
                if name not in columns:
                    return _made_of(self).filter_by(**kwargs)
            return self.filter(*(columns[name] == value for name, value in kwargs.items()))

        def order_by(self, *clauses):
            """See :meth:`sqlalchemy.orm.Query.order_by`."""
            if type(self) is not LightQuery:  # a method that was kept, of a query made since
                return self.order_by(*clauses)
            if self._light_limit is not None or self._light_offset is not None:
                return _made_of(self).order_by(*clauses)
            ordered = []
            for each in clauses:
                column, modifier = each, None
                if type(each) is ViewIndex:
                    if each.view is not self._light_view:
                        return _made_of(self).order_by(*clauses)
                    ordered.append((ViewIndex, each.name))
                    continue
                if type(each) is UnaryExpression:
                    column, modifier = each.element, each.modifier
                    if each.operator is not None:
                        return _made_of(self).order_by(*clauses)
                if type(column) is not ColumnClause or column.table is not self._light_table:
                    return _made_of(self).order_by(*clauses)
                ordered.append((modifier, column.name))
            query = _new(LightQuery)
            query.__dict__ = {
                **self.__dict__,
                "_light_orders": self._light_orders + clauses,
                "_light_ordered": (*self._light_ordered, *ordered),
            }
            return query

        def limit(self, limit):
            """See :meth:`sqlalchemy.orm.Query.limit`."""
            if type(self) is not LightQuery:  # a method that was kept, of a query made since
                return self.limit(limit)
            if type(limit) is not int:
                return _made_of(self).limit(limit)
            query = _new(LightQuery)
            query.__dict__ = {**self.__dict__, "_light_limit": limit}
            return query

        def offset(self, offset):
            """See :meth:`sqlalchemy.orm.Query.offset`."""
            if type(self) is not LightQuery:  # a method that was kept, of a query made since
                return self.offset(offset)
            if type(offset) is not int:
                return _made_of(self).offset(offset)
            query = _new(LightQuery)
            query.__dict__ = {**self.__dict__, "_light_offset": offset}
            return query

        def _iter(self):
            if type(self) is not LightQuery:
                return self._iter()
            answer = self._from_memory()
            if answer is None:
                return Query._iter(_made_of(self))  # memory was asked
            return scalars_of(answer, None)

        def all(self):
            """See :meth:`sqlalchemy.orm.Query.all`."""
            if type(self) is not LightQuery:
                return self.all()
            answer = self._from_memory()
            return Query._iter(_made_of(self)).all() if answer is None else answer.rows

    def count(self) -> int:
        """See :meth:`CachedQuery.count`."""
        if type(self) is not LightQuery:
            return self.count()
        if self._light_limit is None and self._light_offset is None:
            counted = self._from_memory(count=True)
            if counted is not None:
                return int(counted.rows[0][0])
        result: int = _made_of(self).count()
        return result

    def _from_memory(self, *, count: bool = False) -> Answer | None:
        """Answer what is asked for, or the number of it, from memory alone."""
        session: Any = self.session
        view = self._light_view
        cache = getattr(session, "cache", None)
        if (
            cache is None
            or view.__scope__ is not None
            or _listened.before_compile
            or "dispatch" in self.__dict__  # listeners of its own
        ):
            return None
        free = session._transaction is None and is_plain(session, cache._engine)
        if not free and (is_filtered(session) or overrides(session)):
            return None
        asked = self._asked(count=count)
        if asked is None:
            return None
        return answer(cache, session, None, view=view, asked=asked, fetch=False, free=free)

    def _asked(self, *, count: bool) -> Asked | None:
        """Return what is asked for, without the statement if its like was asked before."""
        limit, offset = self._light_limit, self._light_offset
        key = (
            self._light_view,
            self._light_said,
            count or self._light_ordered,
            limit is None,
            offset is None,
        )
        values: list[Any] = [each.right for each in self._light_where]
        shape = _shapes.get(key)
        if shape is None:
            shape = self._shape(values, count=count)
            if shape is None:
                return None
            if len(_shapes) >= MOST_SHAPES:
                _shapes.clear()
            _shapes[key] = shape
        if limit is not None:
            values.append(Number(limit))
        if offset is not None:
            values.append(Number(offset))
        return shape, values

    def _shape(self, values: Sequence[Any], *, count: bool) -> Shape | None:
        """Return the shape of the statement, if its parameters are the ones that are noted."""
        made = _made_of(copy(self))
        statement = _counted(made.statement) if count else made._statement_20()
        try:
            shape, parameters = shape_of(statement)
        except Inexact:
            return None
        numbers = [
            clause
            for clause in (statement._limit_clause, statement._offset_clause)
            if clause is not None
        ]
        noted = [*values, *numbers]
        if len(noted) != len(parameters) or any(
            a is not b for a, b in zip(noted, parameters, strict=True)
        ):
            return None
        return shape


_new: Final[Any] = object.__new__

MOST_SHAPES: Final = 1_000
"""So many shapes of light queries are remembered."""

_shapes: Final[dict[Any, Shape]] = {}


class _Made:
    """An attribute that a light query has not: asked for or set, the query is made first."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, query: Any, owner: Any = None) -> Any:
        return getattr(CachedQuery if query is None else _made_of(query), self.name)

    def __set__(self, query: Any, value: Any) -> None:
        setattr(_made_of(query), self.name, value)


#: What a light query answers itself, and what is written in terms of that.
_LIGHT: Final = frozenset(
    """filter filter_by where order_by limit offset all first one one_or_none scalar count
    exists explain dispatch _iter _statement __iter__""".split()
)

# Every other attribute, whichever there are: what SQLAlchemy adds to Query later is there at once.
# Some, such as _raw_columns, only the objects have.
for _name in {*dir(CachedQuery), *vars(CachedQuery((literal(1),)))} - {"session"}:
    if (_name not in _LIGHT and not _name.startswith("__")) or _name in (
        "__str__",
        "__getitem__",
        "__clause_element__",
    ):
        setattr(LightQuery, _name, _Made(_name))

#: Who listens to queries, now: asked of each query, an object would be made for the answer.
_listened: Final[Any] = _new(LightQuery).dispatch


def light_query(view: type[CachedView], session: Session) -> LightQuery:
    """Return a query of a view that was not made yet."""
    query: LightQuery = _new(LightQuery)
    query.__dict__ = {
        "session": session,
        "_light_view": view,
        "_light_table": view.__table__,
    }
    return query
