"""Queries of the legacy API, ``session.query(View)``, that know of the cache.

In: a :class:`~sqlalchemy.orm.Query` of a :class:`.CacheSession`. Out: what that gives, from memory
where it can be.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Exists, Select, exists, func, literal, select
from sqlalchemy.orm import Query

from .explaining import Explanation
from .results import result_of, scalars_of
from .scopes import cache_of, in_own_scope, overrides
from .shapes import view_of
from .view import ViewTable


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
        if view_of(statement) is not None and isinstance(statement, Select):
            simple = (
                statement._limit_clause is None
                and statement._offset_clause is None
                and not statement._distinct
                and not statement._group_by_clauses
                and len(statement._raw_columns) == 1
                and type(statement._raw_columns[0]) is ViewTable
            )
            if simple:
                counted = (
                    select(func.count())
                    .select_from(statement._raw_columns[0])
                    .where(*statement._where_criteria)
                    .options(*statement._with_options)
                )
                return int(self.session.execute(counted).scalar_one())
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
