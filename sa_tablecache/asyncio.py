"""The cache for ``asyncio``: thin proxies, as ``sqlalchemy.ext.asyncio`` is one of the ORM.

There is one implementation, the synchronous one. What may ask the database runs in a greenlet
(:func:`~sqlalchemy.util.greenlet_spawn`); what memory alone can answer is answered inline.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement
from sqlalchemy.util import greenlet_spawn

from . import ranges
from .exc import TableCacheError, Unbound
from .explaining import Explanation
from .feed import ChangeFeed
from .figures import Estimate, LastRead, Stats
from .following import AnswerFreshness
from .health import Health
from .keeping import Clock
from .loading import Progress
from .policies import Policy
from .problems import Problem
from .quick import range_of, record_of
from .ranges import RangeRead
from .reading import Answer
from .results import result_of, scalars_of
from .scopes import Scope, is_filtered, overrides
from .session import CacheSession, TableCache, _check_range
from .transactions import AsyncDecorator, TransactionOptions, decorator
from .view import CachedView, ViewIndex, ViewMeta
from .why import Why

V = TypeVar("V", bound=CachedView)
Criterion = ColumnElement[bool] | bool


class AsyncTableCache:
    """A :class:`.TableCache` for an :class:`~sqlalchemy.ext.asyncio.AsyncEngine`.

    It has the methods of :class:`.TableCache`. Those that may ask the database are awaited;
    those that only look at memory are not.

    ::

        cache = AsyncTableCache(async_engine, views=[FlightBoard])
        await cache.load(FlightBoard)
        Session = cache.sessionmaker()
    """

    def __init__(
        self,
        engine: AsyncEngine | None = None,
        *,
        views: Iterable[type[CachedView]] = (),
        load_engine: AsyncEngine | None = None,
        feed: ChangeFeed | None = None,
        exclusive_writer: bool = False,
        verify: float = 0.0,
        memory_limit: int | None = None,
        load_slots: int | None = None,
        slot_timeout: float = 300.0,
    ) -> None:
        self._engine: AsyncEngine | None = None
        self.sync_cache = TableCache(
            load_engine=load_engine.sync_engine if load_engine is not None else None,
            feed=feed,
            exclusive_writer=exclusive_writer,
            verify=verify,
            memory_limit=memory_limit,
            load_slots=load_slots,
            slot_timeout=slot_timeout,
        )
        """The cache that this one is a proxy of."""
        if engine is not None:
            self.bind(engine)
        for view in views:
            self.add(view)

    def bind(self, engine: AsyncEngine) -> None:
        """See :meth:`.TableCache.bind`."""
        if not isinstance(engine, AsyncEngine):
            raise TableCacheError(
                f"an AsyncTableCache is bound to an AsyncEngine, not to a {type(engine).__name__}"
            )
        self.sync_cache.bind(engine.sync_engine)
        self._engine = engine

    @property
    def engine(self) -> AsyncEngine:
        """The engine that the cache is bound to."""
        if self._engine is None:
            raise Unbound("this cache is not bound to an engine yet: call cache.bind(engine)")
        return self._engine

    def add(self, view: type[CachedView], *, policy: Policy | None = None) -> None:
        """See :meth:`.TableCache.add`."""
        self.sync_cache.add(view, policy=policy)

    @property
    def clock(self) -> Clock:
        """Says what time it is for windows and ages; see :attr:`.TableCache.clock`."""
        return self.sync_cache.clock

    @clock.setter
    def clock(self, clock: Clock) -> None:
        self.sync_cache.clock = clock

    async def step(self, view: type[CachedView]) -> None:
        """See :meth:`.TableCache.step`."""
        await greenlet_spawn(self.sync_cache.step, view)

    @property
    def views(self) -> tuple[type[CachedView], ...]:
        """The views that were added."""
        return self.sync_cache.views

    async def load(
        self,
        view: type[CachedView],
        *criteria: Criterion,
        progress: Progress | None = None,
        chunk: int | None = None,
    ) -> None:
        """See :meth:`.TableCache.load`."""
        load = self.sync_cache.load
        await greenlet_spawn(load, view, *criteria, progress=progress, chunk=chunk)

    async def extend(
        self,
        view: type[CachedView],
        *criteria: Criterion,
        progress: Progress | None = None,
        chunk: int | None = None,
    ) -> None:
        """See :meth:`.TableCache.extend`."""
        extend = self.sync_cache.extend
        await greenlet_spawn(extend, view, *criteria, progress=progress, chunk=chunk)

    async def evict(self, view: type[CachedView], *criteria: Criterion) -> None:
        """See :meth:`.TableCache.evict`."""
        await greenlet_spawn(self.sync_cache.evict, view, *criteria)

    async def clear(self, view: type[CachedView]) -> None:
        """See :meth:`.TableCache.clear`."""
        await greenlet_spawn(self.sync_cache.clear, view)

    async def covers(self, view: type[CachedView], *criteria: Criterion) -> bool:
        """See :meth:`.TableCache.covers`."""
        return await greenlet_spawn(self.sync_cache.covers, view, *criteria)

    def ready(self, view: type[CachedView]) -> bool:
        """See :meth:`.TableCache.ready`."""
        return self.sync_cache.ready(view)

    async def wait_ready(self, view: type[CachedView], timeout: float | None = None) -> bool:
        """See :meth:`.TableCache.wait_ready`."""
        return await greenlet_spawn(self.sync_cache.wait_ready, view, timeout)

    async def estimate(self, view: type[CachedView], *criteria: Criterion) -> Estimate:
        """See :meth:`.TableCache.estimate`."""
        return await greenlet_spawn(self.sync_cache.estimate, view, *criteria)

    def invalidate(self, target: Any, *what: Any) -> None:
        """See :meth:`.TableCache.invalidate`."""
        self.sync_cache.invalidate(target, *what)

    def side_effects(self, source: Any, *, writes: Iterable[Any]) -> None:
        """See :meth:`.TableCache.side_effects`."""
        self.sync_cache.side_effects(source, writes=writes)

    async def refresh(self, view: type[CachedView]) -> None:
        """See :meth:`.TableCache.refresh`."""
        await greenlet_spawn(self.sync_cache.refresh, view)

    def stats(self, view: type[CachedView]) -> Stats:
        """See :meth:`.TableCache.stats`."""
        return self.sync_cache.stats(view)

    async def barrier(self) -> None:
        """See :meth:`.TableCache.barrier`."""
        await greenlet_spawn(self.sync_cache.barrier)

    async def commit_token(self) -> str:
        """See :meth:`.TableCache.commit_token`."""
        return await greenlet_spawn(self.sync_cache.commit_token)

    async def wait_for(self, token: str, timeout: float | None = None) -> bool:
        """See :meth:`.TableCache.wait_for`."""
        return await greenlet_spawn(self.sync_cache.wait_for, token, timeout)

    async def install_feed(self) -> int:
        """See :meth:`.TableCache.install_feed`."""
        return await greenlet_spawn(self.sync_cache.install_feed)

    async def uninstall_feed(self) -> None:
        """See :meth:`.TableCache.uninstall_feed`."""
        await greenlet_spawn(self.sync_cache.uninstall_feed)

    async def check(self) -> list[Problem]:
        """See :meth:`.TableCache.check`."""
        return await greenlet_spawn(self.sync_cache.check)

    def why(self, view: type[CachedView], key: Any) -> Why:
        """See :meth:`.TableCache.why`."""
        return self.sync_cache.why(view, key)

    async def explain(self, statement: Any) -> Explanation:
        """See :meth:`.TableCache.explain`."""
        return await greenlet_spawn(self.sync_cache.explain, statement)

    def sessionmaker(
        self,
        *,
        scope: Scope | None = None,
        freshness: AnswerFreshness = "feed",
        **options: Any,
    ) -> async_sessionmaker[AsyncCacheSession]:
        """Return a factory of async sessions that read from the cache, bound to its engine.

        :param scope: see :meth:`attach`.
        :param freshness: see :meth:`attach`.
        """
        sync_class: type[CacheSession] = options.pop("sync_session_class", CacheSession)
        sync_class = type(sync_class.__name__, (sync_class,), {"cache": self.sync_cache})
        self.sync_cache._listen(sync_class, scope, freshness)
        options.setdefault("bind", self.engine)
        options.setdefault("class_", AsyncCacheSession)
        return async_sessionmaker(sync_session_class=sync_class, **options)

    def in_transaction(
        self, **options: Unpack[TransactionOptions]
    ) -> AsyncDecorator[AsyncCacheSession]:
        """See :meth:`.TableCache.in_transaction`; for ``async def`` functions."""
        return decorator(self._new_session, True, **options)  # type: ignore[no-any-return]

    def _new_session(self) -> AsyncCacheSession:
        return self._sessions()

    @cached_property
    def _sessions(self) -> async_sessionmaker[AsyncCacheSession]:
        return self.sessionmaker()

    def attach(
        self,
        target: Any,
        *,
        scope: Scope | None = None,
        freshness: AnswerFreshness = "feed",
    ) -> None:
        """Have an application's own engine or sessions work with the cache.

        :param target: an ``AsyncEngine``, an ``async_sessionmaker`` or an ``AsyncSession``, or
            what :meth:`.TableCache.attach` takes.
        :param scope: see :meth:`.TableCache.attach`; it is given the synchronous session, which has
            the ``info`` of the asynchronous one.
        :param freshness: see :meth:`.TableCache.attach`.
        """
        if isinstance(target, AsyncEngine):
            self.sync_cache.attach(target.sync_engine)
        elif isinstance(target, AsyncSession):
            self.sync_cache.attach(target.sync_session, scope=scope, freshness=freshness)
        elif isinstance(target, async_sessionmaker):
            # All async sessions share Session as their sync class, so this factory gets its own.
            base = target.kw.get("sync_session_class") or target.class_.sync_session_class
            sync_class = type(base.__name__, (base,), {"__module__": base.__module__})
            target.configure(sync_session_class=sync_class)
            bind = target.kw.get("bind")
            if isinstance(bind, AsyncEngine):
                self.sync_cache.attach(bind.sync_engine)
            self.sync_cache.attach(sync_class, scope=scope, freshness=freshness)
        elif isinstance(target, type) and issubclass(target, AsyncSession):
            raise TableCacheError(
                f"attach an async_sessionmaker of {target.__name__}, or an AsyncSession: all "
                "classes of async sessions share one Session class"
            )
        else:
            self.sync_cache.attach(target, scope=scope, freshness=freshness)

    def set_mode(self, view: type[CachedView], mode: str) -> None:
        """See :meth:`.TableCache.set_mode`."""
        self.sync_cache.set_mode(view, mode)

    def mode(self, view: type[CachedView]) -> str:
        """See :meth:`.TableCache.mode`."""
        return self.sync_cache.mode(view)

    def start(self) -> None:
        """See :meth:`.TableCache.start`; the jobs are tasks of the running event loop."""
        self.sync_cache.start()

    def health(self) -> Health:
        """See :meth:`.TableCache.health`."""
        return self.sync_cache.health()

    def disabled(self) -> AbstractContextManager[None]:
        """See :meth:`.TableCache.disabled`; a synchronous context manager, for ``with``."""
        return self.sync_cache.disabled()

    async def close(self) -> None:
        """See :meth:`.TableCache.close`; steps that are under way are cancelled."""
        await greenlet_spawn(self.sync_cache.close)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        await self.close()

    def _check(self) -> None:
        """Assert the invariants of all views."""
        self.sync_cache._check()


class AsyncCacheSession(AsyncSession):
    """An :class:`~sqlalchemy.ext.asyncio.AsyncSession` that reads cached views from a cache.

    Made by :meth:`AsyncTableCache.sessionmaker`. A hit is answered inline, without a greenlet.
    """

    sync_session_class: type[Session] = CacheSession

    def _at_once(self, statement: Any) -> Answer | None:
        """Answer a statement from memory alone; ``None`` sends it on its usual way."""
        session = self.sync_session
        return None if overrides(session) else session._from_cache(statement)

    def _executes_otherwise(self) -> bool:
        """Whether the application's class does something to what is executed."""
        return type(self).execute is not AsyncCacheSession.execute

    if TYPE_CHECKING:
        sync_session: CacheSession
    else:

        async def execute(self, statement, params=None, **kwargs):
            """Execute a statement; see :meth:`sqlalchemy.ext.asyncio.AsyncSession.execute`."""
            if params is None and not kwargs:
                answer = self._at_once(statement)
                if answer is not None:
                    return result_of(answer, statement)
            return await super().execute(statement, params, **kwargs)

        async def scalars(self, statement, params=None, **kwargs):
            """Execute a statement; see :meth:`sqlalchemy.ext.asyncio.AsyncSession.scalars`."""
            if params is None and not kwargs and not self._executes_otherwise():
                answer = self._at_once(statement)
                if answer is not None:
                    return scalars_of(answer, statement)
            return await super().scalars(statement, params, **kwargs)

        async def scalar(self, statement, params=None, **kwargs):
            """Execute a statement; see :meth:`sqlalchemy.ext.asyncio.AsyncSession.scalar`."""
            if params is None and not kwargs:
                answer = self._at_once(statement)
                if answer is not None:
                    return result_of(answer, statement).scalar()
            return await super().scalar(statement, params, **kwargs)

        async def get(self, entity, ident, **kwargs):
            """Return a record or an instance by primary key; see :meth:`.CacheSession.get`."""
            if isinstance(entity, ViewMeta):
                found = record_of(self.sync_session, entity, ident)
                if found is not None:
                    return found
                found = self.sync_session._get_stored(entity, ident, fetch=False)
                if found is not None:
                    return found
                return await greenlet_spawn(self.sync_session.get, entity, ident)
            return await super().get(entity, ident, **kwargs)

    async def range(
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
        """Return the records of a range of an index; see :meth:`.CacheSession.range`."""
        session = self.sync_session
        if (
            limit is None
            and after is None
            and type(index) is ViewIndex
            and not self._executes_otherwise()
        ):
            found = range_of(session, index, prefix, ge, gt, le, lt)
            if found is not None:
                if descending:
                    found.reverse()
                return found
        _check_range(index, len(prefix), (ge, gt, le, lt), limit)
        read = RangeRead(index, prefix, ge, gt, le, lt, descending, limit, after)
        scoped = index.view.__scope__ is not None
        if scoped or overrides(session) or self._executes_otherwise():
            table = session.cache.table(index.view)
            if after is None:
                statement = ranges.range_statement(session, table, read)
            else:  # where the page begins may have to be asked
                statement = await greenlet_spawn(ranges.range_statement, session, table, read)
            return list((await self.execute(statement)).scalars())
        if not is_filtered(session):
            records = ranges.range_from_cache(session.cache, session, read, fetch=False)
            if records is not None:
                return records
        return await greenlet_spawn(
            session.range, index, *prefix, ge=ge, gt=gt, le=le, lt=lt,
            descending=descending, limit=limit, after=after,
        )  # fmt: skip

    @property
    def commit_token(self) -> Awaitable[str | None]:
        """See :attr:`.CacheSession.commit_token`; ``await session.commit_token``."""
        return greenlet_spawn(getattr, self.sync_session, "commit_token")

    @property
    def last_read(self) -> LastRead | None:
        """How the last read of a view was answered."""
        return self.sync_session.last_read
