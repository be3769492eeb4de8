"""Sessions that read views from a cache, and do everything else as ever.

In: what applications call. Out: what SQLAlchemy would have given them. A :class:`CacheSession` *is*
a :class:`sqlalchemy.orm.Session`. Two ways lead to the cache, both to ``reading.py``:

* ``do_orm_execute`` (``listening.py``), for any attached session;
* overridden ``execute``, ``scalars`` and ``scalar`` of :class:`CacheSession`, which save the event
  on a hit, and :meth:`CacheSession.range` and :meth:`CacheSession.get`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from sqlalchemy import Engine, Select, select
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.orm.scoping import scoped_session

from . import ranges, reading
from .cache import BaseTableCache
from .comparison import Inexact
from .exc import CriteriaError, TableCacheError
from .figures import LastRead
from .following import AnswerFreshness
from .listening import COMMITTED, OTHER_LISTENERS, listen
from .misses import is_wanting
from .queries import CachedQuery, light_query
from .quick import range_of, record_of
from .ranges import RangeRead
from .reading import Answer
from .results import result_of, scalars_of
from .scopes import (
    Scope,
    cache_of,
    check_freshness,
    database_reason,
    flush_pending,
    freshness_of,
    is_filtered,
    is_plain,
    overrides,
    scope_of,
)
from .shadow import compared_range, is_to_compare
from .shapes import view_of
from .transactions import SyncDecorator, TransactionOptions, decorator
from .view import CachedView, ViewIndex, ViewMeta

V = TypeVar("V", bound=CachedView)

# -- the session -------------------------------------------------------------------------------


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
        try:
            return super().get_bind(mapper, **kwargs)
        except UnboundExecutionError:
            if view_of(kwargs.get("clause")) is None:
                raise
            return cache_of(self).engine

    # The signatures are those of Session; what they return is typed there.

    if not TYPE_CHECKING:

        def execute(self, statement, params=None, **kwargs):
            """Execute a statement; see :meth:`sqlalchemy.orm.Session.execute`."""
            if params is None and not kwargs:
                answer = self._from_cache(statement)
                if answer is not None:
                    return result_of(answer, statement)
            return super().execute(statement, params, **kwargs)

        def scalars(self, statement, params=None, **kwargs):
            """Execute a statement; see :meth:`sqlalchemy.orm.Session.scalars`."""
            if params is None and not kwargs:
                answer = self._from_cache(statement)
                if answer is not None:
                    return scalars_of(answer, statement)
            return super().scalars(statement, params, **kwargs)

        def scalar(self, statement, params=None, **kwargs):
            """Execute a statement; see :meth:`sqlalchemy.orm.Session.scalar`."""
            if params is None and not kwargs:
                answer = self._from_cache(statement)
                if answer is not None:
                    return result_of(answer, statement).scalar()
            return super().scalar(statement, params, **kwargs)

        def query(self, *entities, **kwargs):
            """Return a query; see :meth:`sqlalchemy.orm.Session.query`."""
            if (
                len(entities) == 1
                and type(entities[0]) is ViewMeta
                and not entities[0].__abstract__
                and not kwargs
                and self._query_cls is CachedQuery
            ):
                return light_query(entities[0], self)
            return super().query(*entities, **kwargs)

    def _from_cache(self, statement: Any) -> Answer | None:
        """Answer a statement from memory alone; ``None`` sends it on its usual way."""
        if type(statement) is not Select:
            return None
        view = view_of(statement)
        if view is None:
            return None
        cache = cache_of(self)
        free = self._transaction is None and is_plain(self, cache._engine)
        if not free and is_filtered(self):
            return None
        return reading.answer(cache, self, statement, view=view, fetch=False, free=free)

    if not TYPE_CHECKING:  # typed by Session

        def get(self, entity, ident, **kwargs):
            """Return the record with a primary key (a tuple, if it has several columns), or None.

            No SQL if the key is covered, else one SELECT. For mapped classes see
            :meth:`sqlalchemy.orm.Session.get`.
            """
            if isinstance(entity, ViewMeta):
                found = record_of(self, entity, ident)
                if found is not None:
                    return found
                found = self._get_stored(entity, ident)
                return self._get_selected(entity, ident) if found is None else found
            return super().get(entity, ident, **kwargs)

    def _get_selected(self, view: Any, ident: Any) -> Any:
        """Return the record with a primary key, by a SELECT that the cache may answer."""
        names = cache_of(self).table(view).plan.key
        columns = view.__table__.c
        statement = select(view).where(
            *(
                columns[name].is_(None) if value is None else columns[name] == value
                for name, value in zip(names, _key(view, names, ident), strict=True)
            )
        )
        return self.scalars(statement).first()

    def _get_stored(self, view: Any, ident: Any, *, fetch: bool = True) -> Any:
        """Return a stored record, if the cache may be used: it was read whole by any index.

        :param fetch: whether the database may be asked what that needs: to flush, or to poll.
        """
        cache = cache_of(self)
        table = cache.table(view)
        layout = table.layout
        names = table.plan.key
        key = (ident,) if len(names) == 1 else _key(view, names, ident)
        if layout is None or is_filtered(self) or overrides(self):
            return None
        comparisons = layout.columns.comparisons
        exact = []
        try:
            for name, value in zip(names, key, strict=True):
                how = comparisons[name]
                if not how.equality:
                    return None
                exact.append(None if value is None else how.parameter(value))
        except Inexact:
            return None
        if table.guards and table.guarded(self, fetch=fetch) is not None:
            return None
        if not flush_pending(self, flush=fetch):
            return None
        if database_reason(self, cache, table) is not None:
            return None
        state = table.current
        if state is None:
            return None
        found = state.storage.get(tuple(exact))
        if found is None or not (view.__scope__ is None or self._may_see(table, found[0])):
            return None
        if state.stale is not None and state.is_stale("", (layout.orders[""].prefix(exact),)):
            return None
        reading.remember_hit(self, table)
        if table.keeper is not None:
            table.keeper.used("", (layout.orders[""].prefix(exact),))
        return layout.given([found[0]])[0]

    def _may_see(self, table: Any, record: Any) -> bool:
        """Whether a stored record is known to be in the session's scope."""
        name = table.view.__scope__
        if name is None:
            return True
        how = table.layout.columns.comparisons[name]
        try:
            value = how.parameter(scope_of(self, table.view))
        except Inexact:
            return False
        return bool(how.equality and getattr(record, name) == value)

    @property
    def commit_token(self) -> str | None:
        """A token of what the session committed last, for :meth:`.TableCache.wait_for` elsewhere.

        ::

            session.commit()
            response.headers["X-Commit-Token"] = session.commit_token

        ``None`` before the first commit. One SELECT when it is asked for the first time after a
        commit, on a connection of the cache; none if it is not.

        :raises TableCacheError: if the cache has no change feed.
        """
        if COMMITTED not in self.info:
            return None
        token: str | None = self.info[COMMITTED]
        if token is None:
            token = self.info[COMMITTED] = cache_of(self).commit_token()
        return token

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
        :raises UnscopedRead: if the view is read by scope, and the session has none.

        From memory in O(log n + records) and without SQL if the range is covered; else one SELECT.
        """
        if limit is None and after is None and type(index) is ViewIndex:
            found = range_of(self, index, prefix, ge, gt, le, lt)
            if found is not None:
                if descending:
                    found.reverse()
                return found
        if prefix or limit is not None or type(index) is not ViewIndex:
            _check_range(index, len(prefix), (ge, gt, le, lt), limit)
        # Not RangeRead(...), a function that would be called for each hit.
        read = tuple.__new__(RangeRead, (index, prefix, ge, gt, le, lt, descending, limit, after))
        cache = cache_of(self)
        if index.view.__scope__ is not None or overrides(self):  # both add to a SELECT
            statement = ranges.range_statement(self, cache.table(index.view), read)
            return list(self.execute(statement).scalars())
        records = None
        if is_filtered(self):
            reading.remember(self, cache.table(index.view), "bypass", OTHER_LISTENERS)
        else:
            records = ranges.range_from_cache(cache, self, read)
        if records is None:
            table = cache.table(index.view)

            def run() -> list[Any]:
                statement = ranges.range_statement(self, table, read)
                return reading.fetch_records(self, index.view, statement)

            if table.guards and is_to_compare(self):
                return compared_range(cache, self, read, run)
            if index.view.__max_misses__ is None or not is_wanting(self):
                return run()
            with table.misses.slot():
                return run()
        return records


def _key(view: Any, names: tuple[str, ...], ident: Any) -> tuple[Any, ...]:
    """Return what is given as a primary key as the tuple of its values."""
    key = ident if isinstance(ident, tuple) and len(names) > 1 else (ident,)
    if len(key) != len(names):
        raise CriteriaError(
            f"{ident!r} is no primary key of {view.__name__}, which is ({', '.join(names)})"
        )
    return key


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


# -- the cache, with its sessions ---------------------------------------------------------------


class TableCache(BaseTableCache):
    """Caches views of one database.

    :param engine: the application's engine; ``None`` to :meth:`bind` one later.
    :param views: views to :meth:`add`.
    :param load_engine: an engine for the cache's own reads, instead of a small pool of its own with
        the connection settings of ``engine``.
    :param verify: the part of the reads, 0 to 1, that the database answers so that what the cache
        would have said can be compared with it, see :meth:`set_mode`.
    :param memory_limit: how many bytes the records of all views may take, estimated. A load that
        would pass it is refused; :class:`.ReadThrough` gives up what was used least recently.
    :param load_slots: how many loads may run at a time, over all processes that load from this
        database, so that a deploy of eight workers does not run the same joins eight times at once.
        A load holds one of so many locks of the database while it reads.
    :param slot_timeout: how many seconds a load waits for one of them.

    ::

        cache = TableCache(engine, views=[FlightBoard])
        cache.load(FlightBoard, FlightBoard.time_hour >= since)
        Session = cache.sessionmaker()

    Every commit through the engine is noticed, whatever wrote it. Threads may share a cache. It is
    a context manager that starts its upkeep and closes it.

    :raises UnsuitableEngine: if all connections of the engine's pool are one.
    :raises TableCacheError: if ``SA_TABLECACHE_MODE`` names a mode that there is not.
    """

    def sessionmaker(
        self,
        *,
        scope: Scope | None = None,
        freshness: AnswerFreshness = "feed",
        **options: Any,
    ) -> sessionmaker[CacheSession]:
        """Return a factory of sessions that read from the cache, bound to its engine.

        :param scope: see :meth:`attach`.
        :param freshness: see :meth:`attach`.
        :param options: as for :class:`sqlalchemy.orm.sessionmaker`; ``class_`` has to be a
            subclass of :class:`CacheSession`.
        """
        class_: type[CacheSession] = options.pop("class_", CacheSession)
        class_ = type(class_.__name__, (class_,), {"cache": self, "__module__": class_.__module__})
        options.setdefault("bind", self.engine)
        factory = sessionmaker(class_=class_, **options)
        self._listen(factory, scope, freshness)
        return factory

    def in_transaction(self, **options: Unpack[TransactionOptions]) -> SyncDecorator[CacheSession]:
        """Have a function run in a transaction of its own; see :func:`.in_transaction`.

        The sessions are those of :meth:`sessionmaker`; they read the views from the database. The
        cache may be bound later than the function is decorated.

        ::

            @cache.in_transaction()
            def delay(session, flight, minutes):
                session.get_one(Flight, flight).dep_delay = minutes
        """
        return decorator(self._new_session, False, **options)  # type: ignore[no-any-return]

    def _new_session(self) -> CacheSession:
        session: CacheSession = self._sessions()
        return session

    @cached_property
    def _sessions(self) -> Any:  # the name of its type is that of a method here
        return self.sessionmaker()

    def _listen(self, target: Any, scope: Scope | None, freshness: AnswerFreshness) -> None:
        check_freshness(freshness)
        self._fresher = self._fresher or freshness != "feed"
        listen(self, target, scope, freshness)

    def _freshness_of(self, session: Any) -> AnswerFreshness:
        return freshness_of(session, self)

    def attach(
        self,
        target: Any,
        *,
        scope: Scope | None = None,
        freshness: AnswerFreshness = "feed",
    ) -> None:
        """Have an application's own engine or sessions work with the cache.

        :param target: an :class:`~sqlalchemy.Engine`, whose commits invalidate from now on; or a
            ``sessionmaker``, ``scoped_session``, ``Session`` class or ``Session``, whose
            ``select(View)`` is answered by the cache, and whose bound engine is attached.
        :param scope: for views with ``__scope__``: a function that takes a session and returns the
            value of that column in the records that the session may see. It is asked at each read,
            and is not to ask the database itself; ``None`` or a ``LookupError`` say that there is
            none, and the read is an :class:`.UnscopedRead`.
        :param freshness: of a cache with a change feed. ``"feed"``: what others committed may be
            unseen for the feed's ``max_lag``. A ``timedelta`` instead of that. ``"barrier"``: each
            read polls first, and sees whatever was committed anywhere before it.
        :raises TableCacheError: for anything else.

        ::

            cache.attach(Session, scope=lambda session: session.info["tenant_id"])
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
        self._listen(target, scope, freshness)
