"""Sessions that read views from a cache, and do everything else as ever.

In: what applications call. Out: what SQLAlchemy would have given them. A :class:`CacheSession` *is*
a :class:`sqlalchemy.orm.Session`. Two ways lead to the cache, both to ``reading.py``:

* ``do_orm_execute``, for any attached session, however a statement gets there;
* overridden ``execute``, ``scalars`` and ``scalar`` of :class:`CacheSession`, which save the event
  on a hit, and :meth:`CacheSession.range` and :meth:`CacheSession.get`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import Connection, Engine, Select, event, func, select
from sqlalchemy.engine.result import IteratorResult, Result, SimpleResultMetaData
from sqlalchemy.orm import ORMExecuteState, Query, Session, sessionmaker
from sqlalchemy.orm.scoping import scoped_session
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.elements import Tuple
from sqlalchemy.sql.operators import desc_op
from sqlalchemy.sql.selectable import Alias, FromClause

from . import reading
from .cache import BaseTableCache
from .comparison import Inexact
from .exc import CriteriaError, TableCacheError
from .explaining import Explanation
from .orders import Record
from .reading import SKIP, Answer, LastRead, RangeRead
from .scopes import CONNECTIONS, database_reason
from .shapes import HARMLESS_OPTIONS, view_of
from .view import CachedView, ViewIndex, ViewMeta, ViewTable

V = TypeVar("V", bound=CachedView)

OTHER_LISTENERS = "the application listens to do_orm_execute, and may add criteria"


# -- results -----------------------------------------------------------------------------------


def _result(answer: Answer, statement: Select[Any]) -> Result[Any]:
    """Wrap what the cache answered as SQLAlchemy wraps what the database answers."""
    shape = answer.shape
    if shape.projection is None and not shape.count:
        return _records_result(shape.view, iter(answer.rows))
    names = shape.projection or tuple(statement.selected_columns.keys())
    return IteratorResult(SimpleResultMetaData(names), iter(answer.rows))


def _records_result(
    view: type[CachedView], records: Iterator[Record], raw: Any = None
) -> Result[Any]:
    """Wrap records as a result of one entity; closing it closes ``raw``, where they come from."""
    result: Result[Any] = IteratorResult(
        SimpleResultMetaData([view.__name__]), records, raw=raw, _source_supports_scalars=True
    )
    # Where the ORM marks a result of one entity; Query reads it.
    result._attributes = result._attributes.union({"is_single_entity": True})
    return result


def _with_records(statement: Any, result: Result[Any], dialect_name: str) -> Result[Any]:
    """Have rows of the database carry records in the places of whole views."""
    raw = statement._raw_columns
    makers: list[tuple[int, Callable[..., Any] | None]] = []
    names: list[str] = []
    for element in raw:
        base: Any = element.element if isinstance(element, Alias) else element
        if type(base) is ViewTable:
            make = reading.record_maker(base.view, dialect_name)
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
        return _records_result(view_of_raw(raw[0]), (only(*row) for row in result), result)

    def rows() -> Iterator[tuple[Any, ...]]:
        for row in result:
            values, at = [], 0
            for width, make in makers:
                part = row[at : at + width]
                values.append(part[0] if make is None else make(*part))
                at += width
            yield tuple(values)

    return IteratorResult(SimpleResultMetaData(names), rows(), raw=cast("Any", result))


def view_of_raw(element: Any) -> type[CachedView]:
    """Return the view of a selected view or alias of one."""
    base: Any = element.element if isinstance(element, Alias) else element
    return cast("type[CachedView]", base.view)


def _without_row_order(statement: Select[Any]) -> Select[Any]:
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


def _selects_views(statement: Any) -> bool:
    """Whether a statement selects a whole view (and not only columns of it)."""
    return isinstance(statement, Select) and any(
        type(raw) is ViewTable or (isinstance(raw, Alias) and type(raw.element) is ViewTable)
        for raw in statement._raw_columns
    )


# -- listening ---------------------------------------------------------------------------------


def listen(cache: BaseTableCache, target: Any) -> None:
    """Have sessions answered by the cache: a Session class, a Session, or a factory of them."""

    def do_orm_execute(state: ORMExecuteState) -> Result[Any] | None:
        if state.local_execution_options.get(SKIP):
            return None
        if cache.closed and not isinstance(state.session, CacheSession):
            return None
        statement = state.statement
        if not isinstance(statement, Select):
            return None
        view = view_of(statement)
        if view is not None and (view in cache.views or isinstance(state.session, CacheSession)):
            if _others_follow(state.session, do_orm_execute):
                reading.remember(state.session, cache.table(view), "bypass", OTHER_LISTENERS)
            elif (
                not state.parameters
                and "bind" not in state.bind_arguments
                and _plain(state.local_execution_options)
            ):
                answer = reading.answer(cache, state.session, statement)
                if answer is not None:
                    return _result(answer, statement)
            else:
                reading.remember(
                    state.session,
                    cache.table(view),
                    "bypass",
                    "parameters or execution options of the call",
                )
        if view is not None:
            state.statement = statement = _without_row_order(statement)
        if _selects_views(statement):
            result = state.invoke_statement(execution_options={SKIP: True})
            bind = state.session.get_bind(**state.bind_arguments)
            return _with_records(statement, result, bind.dialect.name)
        return None

    def after_begin(session: Session, _: Any, connection: Connection) -> None:
        known = session.info.setdefault(CONNECTIONS, [])
        known[:] = [c for c in known if not c.closed and c is not connection]
        known.append(connection)

    do_orm_execute._sa_tablecache = True  # type: ignore[attr-defined]
    event.listen(target, "do_orm_execute", do_orm_execute)
    event.listen(target, "after_begin", after_begin)
    if isinstance(target, Session) and target.in_transaction():
        # Its transaction began before anybody listened: its own writes could be missed.
        transaction = target.get_transaction()
        assert transaction is not None
        known = target.info.setdefault(CONNECTIONS, [])
        known += [entry[0] for entry in transaction._connections.values()]


def _others_follow(session: Session, mine: Any) -> bool:
    """Whether listeners of the application, which may add criteria, run after this one."""
    listeners = list(session.dispatch.do_orm_execute)
    return mine in listeners and not all(
        getattr(other, "_sa_tablecache", False) for other in listeners[listeners.index(mine) :]
    )


def _plain(options: Any) -> bool:
    """Whether the execution options of a call change nothing about which rows are right."""
    return not options or all(
        name in HARMLESS_OPTIONS or name.startswith(("_sa_orm_", "_result_")) for name in options
    )


# -- the session -------------------------------------------------------------------------------


class CachedQuery(Query[Any]):
    """A :class:`~sqlalchemy.orm.Query` that counts views in the cache and explains itself."""

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

    def explain(self) -> Explanation:
        """Say how the query would be answered, and why; runs nothing."""
        return _cache_of(self.session).explain(self.statement)


class CacheSession(Session):
    """A :class:`sqlalchemy.orm.Session` that reads cached views from a cache.

    Made by :meth:`.TableCache.sessionmaker`. Reads of a view look like any read, by ``scalars``,
    ``execute``, ``query`` and ``get``; :meth:`range` is the fast path. After a read of a view,
    :attr:`last_read` says how it was answered.
    """

    cache: BaseTableCache
    last_read: LastRead | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("query_cls", CachedQuery)
        super().__init__(*args, **kwargs)

    def get_bind(self, mapper: Any = None, **kwargs: Any) -> Any:
        """Return the bind for a statement; that of a view is the cache's engine."""
        clause = kwargs.get("clause")
        if self.bind is None and clause is not None and view_of(clause) is not None:
            return _cache_of(self).engine
        return super().get_bind(mapper, **kwargs)

    # The signatures are those of Session; what they return is typed there.

    if not TYPE_CHECKING:

        def execute(self, statement, params=None, **kwargs):
            """Execute a statement; see :meth:`sqlalchemy.orm.Session.execute`."""
            if params is None and not kwargs:
                answer = self._from_cache(statement)
                if answer is not None:
                    return _result(answer, statement)
            return super().execute(statement, params, **kwargs)

        def scalars(self, statement, params=None, **kwargs):
            """Execute a statement; see :meth:`sqlalchemy.orm.Session.scalars`."""
            if params is None and not kwargs:
                answer = self._from_cache(statement)
                if answer is not None:
                    return _result(answer, statement).scalars()
            return super().scalars(statement, params, **kwargs)

        def scalar(self, statement, params=None, **kwargs):
            """Execute a statement; see :meth:`sqlalchemy.orm.Session.scalar`."""
            if params is None and not kwargs:
                answer = self._from_cache(statement)
                if answer is not None:
                    return _result(answer, statement).scalar()
            return super().scalar(statement, params, **kwargs)

    def _is_filtered(self) -> bool:
        """Whether the application listens to what is executed, and may add criteria to it."""
        for listener in self.dispatch.do_orm_execute:
            if not getattr(listener, "_sa_tablecache", False):
                return True
        return False

    def _from_cache(self, statement: Any) -> Answer | None:
        """Answer a statement from memory alone; ``None`` sends it on its usual way."""
        if type(statement) is not Select or view_of(statement) is None:
            return None
        if self._is_filtered():
            return None
        return reading.answer(_cache_of(self), self, statement, fetch=False)

    if not TYPE_CHECKING:  # typed by Session

        def get(self, entity, ident, **kwargs):
            """Return the record with a primary key (a tuple, if it has several columns), or None.

            No SQL if the key is covered, else one SELECT. For mapped classes see
            :meth:`sqlalchemy.orm.Session.get`.
            """
            if isinstance(entity, ViewMeta):
                return self._get_record(entity, ident)
            return super().get(entity, ident, **kwargs)

    def _get_record(self, view: Any, ident: Any) -> Any:
        table = _cache_of(self).table(view)
        names = table.plan.key
        key = ident if isinstance(ident, tuple) and len(names) > 1 else (ident,)
        if len(key) != len(names):
            raise CriteriaError(
                f"{ident!r} is no primary key of {view.__name__}, which is ({', '.join(names)})"
            )
        found = self._get_stored(table, key)
        if found is not None:
            return found
        columns = view.__table__.c
        statement = select(view).where(
            *(
                columns[name].is_(None) if value is None else columns[name] == value
                for name, value in zip(names, key, strict=True)
            )
        )
        return self.scalars(statement).first()

    def _get_stored(self, table: Any, key: tuple[Any, ...]) -> Any:
        """Return a stored record, if the cache may be used: it was read whole by any index."""
        layout = table.layout
        if table.current is None or layout is None or self._is_filtered():
            return None
        comparisons = layout.columns.comparisons
        try:
            exact = tuple(
                value if value is None else comparisons[name].parameter(value)
                for name, value in zip(table.plan.key, key, strict=True)
            )
        except Inexact:
            return None
        if not all(comparisons[name].equality for name in table.plan.key):
            return None
        if database_reason(self, _cache_of(self), table) is not None:
            return None
        state = table.current
        if state is None:
            return None
        found = state.storage.get(exact)
        if found is None or state.is_stale("", (layout.orders[""].prefix(exact),)):
            return None
        reading.remember(self, table, "hit")
        return layout.given([found[0]])[0]

    def range(
        self,
        index: ViewIndex[V],
        *prefix: Any,
        ge: Any = None,
        gt: Any = None,
        le: Any = None,
        lt: Any = None,
        descending: bool = False,
        limit: int | None = None,
        after: V | None = None,
    ) -> list[V]:
        """Return the records of a range of an index, in its order: the fastest read.

        ::

            session.range(FlightBoard.by_time, ge=start, lt=end)
            session.range(FlightBoard.by_plane, "N14228", ge=start, descending=True, limit=10)

        :param index: such as ``FlightBoard.by_time``.
        :param prefix: values of the first scores of an index of several; ``None`` for NULL.
        :param ge: the next score is at least this; without any bound, NULL scores are included.
        :param gt: it is more than this.
        :param le: it is at most this.
        :param lt: it is less than this.
        :param descending: whether to read from the end.
        :param limit: at most so many records.
        :param after: go on after this record, the last of the page before.
        :returns: a new list. Records of equal scores are sorted by primary key.
        :raises CriteriaError: if there are more values than the index has scores.

        From memory in O(log n + records) and without SQL if the range is covered; else one SELECT.
        """
        _check_range(index, len(prefix), (ge, gt, le, lt), limit)
        read = RangeRead(index, prefix, ge, gt, le, lt, descending, limit, after)
        cache = _cache_of(self)
        records = None
        if self._is_filtered():
            reading.remember(self, cache.table(index.view), "bypass", OTHER_LISTENERS)
        else:
            records = reading.range_from_cache(cache, self, read)
        if records is None:
            table = cache.table(index.view)
            statement = reading.range_statement(self, table, read)
            records = reading.fetch_records(self, index.view, statement)
        return records


def _check_range(index: Any, prefix: int, bounds: tuple[Any, ...], limit: int | None) -> None:
    """Refuse arguments of ``range()`` that an index cannot mean."""
    if not isinstance(index, ViewIndex):
        raise CriteriaError(
            f"range() reads an index, such as View.by_time, and {index!r} is none; use "
            "select() with where() for other criteria"
        )
    scores = len(index.declared.parts)
    bounded = bounds != _UNBOUNDED
    if prefix + bounded > scores:
        raise CriteriaError(
            f"{index!r} has {scores} score(s), {', '.join(index.column_names)}, but "
            f"{prefix} value(s){' and a bound' if bounded else ''} were given"
        )
    if limit is not None and limit < 0:
        raise CriteriaError(f"limit={limit} is negative")


_UNBOUNDED = (None, None, None, None)


def _cache_of(session: Any) -> BaseTableCache:
    cache: BaseTableCache | None = getattr(session, "cache", None)
    if cache is None:
        raise TableCacheError(
            "this CacheSession belongs to no cache: make it with cache.sessionmaker()"
        )
    return cache


# -- the cache, with its sessions ---------------------------------------------------------------


class TableCache(BaseTableCache):
    """Caches views of one database.

    :param engine: the application's engine; ``None`` to :meth:`bind` one later.
    :param views: views to :meth:`add`.
    :param load_engine: an engine for the cache's own reads, instead of a small pool of its own with
        the connection settings of ``engine``.

    ::

        cache = TableCache(engine, views=[FlightBoard])
        cache.load(FlightBoard, FlightBoard.time_hour >= since)
        Session = cache.sessionmaker()

    Every commit through the engine is noticed, whatever wrote it. Threads may share a cache. It is
    a context manager that closes it.

    :raises UnsuitableEngine: if all connections of the engine's pool are one.
    """

    def sessionmaker(self, **options: Any) -> sessionmaker[CacheSession]:
        """Return a factory of sessions that read from the cache, bound to its engine.

        :param options: as for :class:`sqlalchemy.orm.sessionmaker`; ``class_`` has to be a
            subclass of :class:`CacheSession`.
        """
        class_: type[CacheSession] = options.pop("class_", CacheSession)
        class_ = type(class_.__name__, (class_,), {"cache": self, "__module__": class_.__module__})
        options.setdefault("bind", self.engine)
        factory = sessionmaker(class_=class_, **options)
        listen(self, factory)
        return factory

    def attach(self, target: Any) -> None:
        """Have an application's own engine or sessions work with the cache.

        :param target: an :class:`~sqlalchemy.Engine`, whose commits invalidate from now on; or a
            ``sessionmaker``, ``scoped_session``, ``Session`` class or ``Session``, whose
            ``select(View)`` is answered by the cache, and whose bound engine is attached.
        :raises TableCacheError: for anything else.
        """
        if isinstance(target, Engine):
            self._watch(target)
            return
        if isinstance(target, scoped_session):
            target = target.session_factory
        bind: Any = None
        if isinstance(target, sessionmaker):
            bind = target.kw.get("bind")
        elif isinstance(target, Session):
            bind = target.bind
        elif not (isinstance(target, type) and issubclass(target, Session)):
            raise TableCacheError(
                f"cannot attach a {type(target).__name__}: give an Engine, a sessionmaker, a "
                "scoped_session, a Session class or a Session"
            )
        if bind is not None:
            self._watch(bind.engine)
        listen(self, target)
