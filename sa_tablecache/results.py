"""What the cache answers, as SQLAlchemy wraps what a database answers.

In: an :class:`.Answer`, or rows of the database. Out: a :class:`~sqlalchemy.Result` with records in
the places of views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Select
from sqlalchemy.engine.result import IteratorResult, Result, ScalarResult, SimpleResultMetaData
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.elements import Tuple
from sqlalchemy.sql.operators import desc_op
from sqlalchemy.sql.selectable import Alias, FromClause

from .orders import Record
from .reading import Answer, record_maker
from .view import CachedView, ViewTable


def result_of(answer: Answer, statement: Select[Any]) -> Result[Any]:
    """Wrap what the cache answered as SQLAlchemy wraps what the database answers."""
    shape = answer.shape
    if shape.is_of_records:
        return _records_result(shape.view, iter(answer.rows))
    if shape.exists:
        column: Any = statement._raw_columns[0]
        name = getattr(column, "name", "%(")
        names: Sequence[str] = ("anon_1" if name.startswith("%(") else name,)  # that of label(None)
        return IteratorResult(SimpleResultMetaData(names, extra=[(column,)]), iter(answer.rows))
    names = shape.projection or tuple(statement.selected_columns.keys())
    return IteratorResult(SimpleResultMetaData(names), iter(answer.rows))


def scalars_of(answer: Answer, statement: Select[Any]) -> ScalarResult[Any]:
    """Wrap what the cache answered as the ``scalars()`` of its result."""
    shape = answer.shape
    if shape.is_of_records:
        return RecordScalars(shape.view, answer.rows)
    return result_of(answer, statement).scalars()


class RecordScalars(ScalarResult[Any]):
    """Whole records as ``scalars()`` of a result.

    What is asked of most is all of them, or the one: that is given at once, and the result which
    SQLAlchemy would go through is only made for what else it can do. It is then where it would be
    by now.
    """

    __slots__ = ("_end", "_made", "_records", "_view")

    def __init__(self, view: type[CachedView], records: Sequence[Record]) -> None:
        self._view = view
        self._records = records
        self._made: Result[Any] | None = None
        self._end = ""
        """How the records were given at once: ``soft`` or ``hard``, as results are closed."""
        self._post_creational_filter = None
        self._unique_filter_state = None

    if not TYPE_CHECKING:  # slots of the base classes

        @property
        def _real_result(self):
            if self._made is None:
                self._made = _records_result(self._view, iter(self._records))
                if self._end:
                    self._made._soft_close(hard=self._end == "hard")
            return self._made

        @_real_result.setter
        def _real_result(self, result):
            self._made = result

        @property
        def _metadata(self):
            return self._real_result._metadata

    def _is_untouched(self) -> bool:
        return self._made is None and not self._end and self._unique_filter_state is None

    def all(self) -> Sequence[Any]:
        """See :meth:`sqlalchemy.engine.ScalarResult.all`."""
        if self._made is not None or self._end or self._unique_filter_state is not None:
            return super().all()
        self._end = "soft"
        return self._records

    def first(self) -> Any:
        """See :meth:`sqlalchemy.engine.ScalarResult.first`."""
        if not self._is_untouched():
            return super().first()
        self._end = "hard"
        return self._records[0] if self._records else None

    def one(self) -> Any:
        """See :meth:`sqlalchemy.engine.ScalarResult.one`."""
        if not self._is_untouched() or len(self._records) != 1:
            return super().one()
        self._end = "hard"
        return self._records[0]

    def one_or_none(self) -> Any:
        """See :meth:`sqlalchemy.engine.ScalarResult.one_or_none`."""
        if not self._is_untouched() or len(self._records) != 1:
            return super().one_or_none()
        self._end = "hard"
        return self._records[0]


def _records_result(
    view: type[CachedView], records: Iterator[Record], raw: Any = None
) -> Result[Any]:
    """Wrap records as a result of one entity; closing it closes ``raw``, where they come from."""
    result: Result[Any] = IteratorResult(
        SimpleResultMetaData([view.__name__]), records, raw=raw, _source_supports_scalars=True
    )
    # Where the ORM marks a result of one entity; Query reads it.
    result._attributes = result._attributes.union(_SINGLE)
    return result


_SINGLE: Final = {"is_single_entity": True}


def with_records(statement: Any, result: Result[Any]) -> Result[Any]:
    """Have rows of the database carry records in the places of whole views."""
    raw = statement._raw_columns
    makers: list[tuple[int, Callable[..., Any] | None]] = []
    names: list[str] = []
    for element in raw:
        base: Any = element.element if isinstance(element, Alias) else element
        if type(base) is ViewTable:
            make = record_maker(base.view)
            makers.append((len(base.c), make))
            names.append(base.view.__name__)
        elif isinstance(element, ColumnElement):
            makers.append((1, None))
            names.append(str(getattr(element, "_proxy_key", None) or f"column_{len(names)}"))
        elif (entity := element._annotations.get("parententity")) is not None:
            makers.append((1, None))
            names.append(entity.class_.__name__)
        elif isinstance(element, FromClause):
            makers += [(1, None)] * len(element.c)
            names += element.c.keys()
    if len(makers) == 1 and makers[0][1] is not None:
        only = makers[0][1]
        return _records_result(_view_of(raw[0]), (only(*row) for row in result), result)

    def rows() -> Iterator[tuple[Any, ...]]:
        for row in result:
            values, at = [], 0
            for width, make in makers:
                part = row[at : at + width]
                values.append(part[0] if make is None else make(*part))
                at += width
            yield tuple(values)

    return IteratorResult(SimpleResultMetaData(names), rows(), raw=cast("Any", result))


def _view_of(element: Any) -> type[CachedView]:
    """Return the view of a selected view or alias of one."""
    base: Any = element.element if isinstance(element, Alias) else element
    return cast("type[CachedView]", base.view)


def without_row_order(statement: Select[Any]) -> Select[Any]:
    """Have an index of several scores in ORDER BY said column by column: SQLite needs it."""
    expanded: list[Any] = []
    for clause in statement._order_by_clauses:
        element: Any = clause
        descending = False
        while not isinstance(element, Tuple) and hasattr(element, "element"):
            descending = descending or getattr(element, "modifier", None) is desc_op
            element = element.element
        if isinstance(element, Tuple):
            expanded += [c.desc() if descending else c for c in element.clauses]
        else:
            expanded.append(clause)
    if len(expanded) == len(statement._order_by_clauses):
        return statement
    return statement.order_by(None).order_by(*expanded)


def selects_views(statement: Any) -> bool:
    """Whether a statement selects a whole view (and not only columns of it)."""
    if isinstance(statement, Select):
        for raw in statement._raw_columns:
            if type(raw) is ViewTable or (
                isinstance(raw, Alias) and type(raw.element) is ViewTable
            ):
                return True
    return False
