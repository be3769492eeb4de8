"""A cache that follows what others write: its change feed, if it has one.

In: what the application says of its feed. Out: guards, which send readers to the database while the
feed cannot be trusted; jobs of the upkeep, which poll, trim and wake up others; tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Final, TypeAlias

from .analysis import plan_of
from .changes import ChangeSet
from .exc import TableCacheError, Unbound
from .feed import ChangeFeed, Consumer
from .feed.dialects import changelog_for
from .feed.installing import install, uninstall
from .feed.wakeup import Listener
from .figures import Reason
from .invalidation import Invalidation, Lease
from .loading import Snapshots
from .table import CachedTable
from .upkeep import Upkeep
from .view import CachedView

log = logging.getLogger(__name__)

AnswerFreshness: TypeAlias = str | timedelta
"""How fresh a session wants its answers: ``"feed"``, ``"barrier"``, or at most so old."""

POLL: Final = "change feed"
TRIM: Final = "change feed, trimming"
NOTIFY: Final = "change feed, waking up others"
LISTEN: Final = "change feed, listening"

TRIM_SECONDS: Final = 30.0

_LEFT_TO_PARENTS: Final[list[Listener]] = []

_COMMITTED: ContextVar[set[Following] | None] = ContextVar("sa_tablecache.committed", default=None)


@contextmanager
def noting_commits() -> Iterator[set[Following]]:
    """Collect the caches on whose engines something is committed meanwhile, in this context.

    In threads and tasks that began with a copy of it, too: all of them have the same set.
    """
    known = _COMMITTED.get()
    if known is not None:
        yield known
        return
    found = set[Following]()
    before = _COMMITTED.set(found)
    try:
        yield found
    finally:
        _COMMITTED.reset(before)


class Following(Invalidation):
    """The change feed of a cache."""

    def __init__(self, feed: ChangeFeed | None, *, exclusive_writer: bool) -> None:
        super().__init__()
        if feed is not None and exclusive_writer:
            raise TableCacheError(
                "exclusive_writer=True says that nobody else writes the tables of the views, and "
                "feed= that others do: give one of them"
            )
        self._feed = feed
        self._exclusive_writer = exclusive_writer
        self._warned = False
        self._fresher = False
        """Whether some sessions were attached that want their answers fresher, or less so."""
        self._listener: Listener | None = None
        self.upkeep = Upkeep()
        """The jobs that run in the background once the cache is started."""

    def _follow(self, snapshots: Snapshots) -> None:
        """Follow the database that the cache is bound to from now on. Emits no SQL."""
        feed = self._feed
        if feed is None:
            return
        consumer = self.consumer = Consumer(
            feed, snapshots, lambda: list(self._tables.values()), self._side_effects
        )
        self.upkeep.add(POLL, self._poll)
        self.upkeep.add(TRIM, self._trim)
        if consumer.changelog.wakes:
            self.upkeep.add(NOTIFY, self._notify)
            self.upkeep.add(LISTEN, self._hear, self._stop_hearing)

    def _follow_view(self, table: CachedTable) -> None:
        """Have a view guarded by the feed."""
        if self.consumer is not None:
            table.feed = self.consumer
            table.guards = (*table.guards, self._guard)
        elif not (self._exclusive_writer or self._warned):
            self._warned = True
            log.warning(
                "writes by other processes are invisible to this cache, and its answers miss them: "
                "give it feed=ChangeFeed(), or say exclusive_writer=True if there are none"
            )

    @property
    def _followed(self) -> Consumer:
        if self.consumer is None:
            raise TableCacheError(
                "this cache has no change feed: give it feed=ChangeFeed()"
                if self._feed is None
                else "this cache is not bound to an engine yet: call cache.bind(engine)"
            )
        return self.consumer

    # -- reading --------------------------------------------------------------------------------

    def _freshness_of(self, session: Any) -> AnswerFreshness:
        """Return how fresh a session wants its answers."""
        return "feed"

    def is_strict(self, session: Any) -> bool:
        """Whether a session wants all that was committed anywhere before it reads."""
        return self._fresher and self._freshness_of(session) == "barrier"

    def _guard(self, session: Any, table: CachedTable, _: Any, fetch: bool) -> str | None:
        """Say why a view cannot be answered from memory, of what the feed tells."""
        consumer = self._followed
        wanted = self._freshness_of(session) if self._fresher else "feed"
        if isinstance(wanted, timedelta):
            reason = consumer.reason(table, bound=wanted.total_seconds(), fetch=fetch)
        elif wanted == "barrier":
            reason = consumer.reason(table, bound=-1.0, fetch=fetch)
        else:
            reason = consumer.reason(table, fetch=fetch)
        return None if reason is None else Reason("feed", reason)

    def barrier(self) -> None:
        """Have everything visible that was committed anywhere before this call: one poll.

        ::

            cache.barrier()
            session.scalars(select(FlightBoard))  # sees what any process had committed

        Calls at the same time share a poll. Without a feed, and with ``exclusive_writer=True``,
        everything is visible already.

        :raises TableCacheError: if the cache has no feed, and others may write.
        """
        if not self._exclusive_writer:
            self._followed.catch_up()

    def commit_token(self) -> str:
        """Return a token of all that was committed until now: one SELECT.

        It is a short string of printable ASCII, for a header or a cookie. Another process gives it
        to :meth:`wait_for`. :attr:`.CacheSession.commit_token` asks for it after a commit.

        :raises TableCacheError: if the cache has no feed.
        """
        return self._followed.token()

    def wait_for(self, token: str, timeout: float | None = None) -> bool:
        """Have what a token stands for visible: no SQL if it is so already, else one poll.

        ::

            if token := request.headers.get("X-Commit-Token"):
                cache.wait_for(token, timeout=1)

        :param token: from :attr:`.CacheSession.commit_token` or :meth:`commit_token`, here or in
            another process.
        :param timeout: for how many seconds a poll that fails is tried again; ``None``: its error
            is raised.
        :returns: whether it is visible.
        :raises ValueError: if the token is none.
        :raises TableCacheError: if the cache has no feed.
        """
        return self._followed.wait_for(token, timeout)

    # -- forks ----------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        """Whether a forked child is told what happens to the records that it inherits.

        It goes on from the position to which its parent has read the feed.
        """
        return self.consumer is not None

    def after_fork(self) -> None:
        """In a forked child: nobody polls, and nobody's commits are under way."""
        super().after_fork()
        if self._listener is not None:
            # The parent listens on its connection, which must not be closed here.
            _LEFT_TO_PARENTS.append(self._listener)
            self._listener = None
        if self.consumer is not None:
            self.consumer.after_fork()

    # -- jobs -----------------------------------------------------------------------------------

    def publish(self, changes: ChangeSet, lease: Lease | None) -> None:
        """Mark what a commit changed, end its lease, and have others woken up."""
        super().publish(changes, lease)
        committed = _COMMITTED.get()
        if committed is not None and changes:
            committed.add(self)
        consumer = self.consumer
        if consumer is not None and consumer.changelog.wakes and consumer.concerns(changes):
            self.upkeep.wake(NOTIFY)

    def _poll(self) -> float:
        consumer = self._followed
        # Reads do that, too, but not while a guard sends them all to the database.
        self.settle_orphans()
        consumer.catch_up()
        return consumer.feed.poll_interval

    def _trim(self) -> float:
        consumer = self._followed
        with consumer.connect() as connection:
            consumer.changelog.trim(connection, consumer.feed.keep.total_seconds())
        return min(TRIM_SECONDS, consumer.feed.keep.total_seconds())

    def _hear(self) -> float | None:
        listener = self._listener
        if listener is None:
            consumer = self._followed
            engine = consumer.feed.listen_engine or self._bound.engine
            listener = self._listener = Listener(
                getattr(engine, "sync_engine", engine), lambda: self.upkeep.wake(POLL)
            )
        return listener.step()

    def _stop_hearing(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def _notify(self) -> None:
        consumer = self._followed
        with consumer.connect() as connection:
            consumer.changelog.notify(connection)

    # -- installing -----------------------------------------------------------------------------

    def install_feed(self) -> int:
        """Install the changelog in the database, and triggers on all tables of the views.

        For projects without Alembic, and for tests; it needs the privilege to create triggers on
        these tables. Harmless where all is installed. It emits a few statements for each table, in
        one transaction of the cache's own.

        :returns: how many tables were not watched before, or not as these views need it.
        :raises FeedUnavailable: if the dialect has no change feed.
        """
        snapshots = self._bound
        changelog = changelog_for(snapshots.dialect.name)
        with snapshots.connect() as connection, connection.begin():
            return len(install(connection, changelog, [plan_of(view) for view in self._tables]))

    def uninstall_feed(self) -> None:
        """Remove the changelog from the database, with all triggers: for all who use it.

        Views of caches with a feed are answered by the database from then on.

        :raises FeedUnavailable: if the dialect has no change feed.
        """
        snapshots = self._bound
        changelog = changelog_for(snapshots.dialect.name)
        with snapshots.connect() as connection, connection.begin():
            uninstall(connection, changelog)

    @property
    def snapshots(self) -> Snapshots:
        """Where the cache itself reads."""
        return self._bound

    @property
    def _bound(self) -> Snapshots:
        if self._snapshots is None:
            raise Unbound("this cache is not bound to an engine yet: call cache.bind(engine)")
        return self._snapshots

    def feed_problems(self) -> dict[type[CachedView], str]:
        """Return of which views changes are not seen, and why: one poll."""
        consumer = self.consumer
        if consumer is None:
            return {}
        found = {}
        for view, table in list(self._tables.items()):
            reason = consumer.reason(table, bound=0.0)
            if reason is not None:
                found[view] = reason
        return found
