"""A cache that runs: its upkeep, started, forked, and asked how it is doing.

In: the beginning of the application, forks, health checks. Out: jobs in the background, in this
process; records that a forked child can go on with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .exc import Closed
from .feed import ChangeFeed
from .figures import Reason
from .following import Following
from .forks import watch_forks
from .health import Health, health
from .staleness import Refreshing
from .upkeep import has_running_loop

log = logging.getLogger(__name__)


class Running(Following):
    """The upkeep of a cache."""

    def __init__(self, feed: ChangeFeed | None, *, exclusive_writer: bool) -> None:
        super().__init__(feed, exclusive_writer=exclusive_writer)
        self.refreshing = Refreshing(self.upkeep)
        self._closed = False
        self._resumes = False
        """Whether the upkeep ran in the parent, and is to run in this child when it is used."""
        watch_forks(self)

    def start(self) -> None:
        """Start the upkeep: what the cache does in the background. Entering the cache does it, too.

        Each job has a daemon thread (of an :class:`.AsyncTableCache`: a task of the running event
        loop). One that fails is tried again, after 0.5 s and then less and less often, down to
        every 30 s; :meth:`health` tells. A cache that was started lives until it is closed. After a
        fork the child's upkeep starts by itself.

        :raises TableCacheError: if it was started already.
        """
        self._resumes = False
        if self._closed:
            raise Closed("this cache was closed")
        self.upkeep.start(in_task=bool(self._bound.dialect.is_async))

    # -- forks ----------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In a forked child: go on with what is the child's own. The cache is told of a fork.

        Connections are left to the parent. Records are kept if a change feed goes on from the
        position to which the parent has read it, else dropped: then each process sees its own
        commits alone. The upkeep starts again, if it ran, when the cache is used.
        """
        if self._closed:
            return
        super().after_fork()
        keep = self.goes_on
        if self._snapshots is not None:
            self._snapshots.after_fork()
        had = [table for table in self._tables.values() if table.state.coverage]
        kept = [t for t in self._tables.values() if t.after_fork(keep=keep)]
        dropped = ", ".join(table.plan.name for table in had if table not in kept)
        if dropped:
            log.warning(
                "this process was forked, and drops the records that it inherited of %s: %s",
                dropped,
                "they were being changed"
                if keep
                else "without a change feed it does not see what its parent commits, nor its "
                "parent what it does; give the cache feed=ChangeFeed(), or load it after the fork",
            )
        self._resumes = self.upkeep.after_fork()
        if self._resumes:
            for table in self._tables.values():
                table.guards = (self._resume, *table.guards)

    def _resume(self, *_: Any) -> None:
        """Start the upkeep of a forked child: a guard, which goes when it was asked.

        Not in the hook of the fork: other libraries may not have got over it yet, and a child that
        goes on to execute another program, or never reads, needs no threads.
        """
        if self._bound.dialect.is_async and not has_running_loop():
            return
        for table in self._tables.values():
            table.guards = tuple(guard for guard in table.guards if guard != self._resume)
        with self._lock:
            resumes, self._resumes = self._resumes, False
        if resumes:
            self.start()

    def health(self) -> Health:
        """Return how the cache is doing: its upkeep, and whether something keeps failing.

        Emits no SQL. ::

            health = cache.health()
            return JSONResponse(health.reasons, status_code=200 if health.ok else 503)
        """
        if self._resumes:
            self._resume()
        feed = None if self.consumer is None else self.consumer.health()
        return health(self.upkeep, feed, () if feed is None else feed.complaints)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Have the database answer all reads of a block, in whatever thread or task they are.

        ::

            with cache.disabled():
                slow = measure(report)

        What is loaded stays, and commits are noticed as ever. Emits no SQL.
        """
        reason = Reason("disabled", "the cache is disabled")

        def guard(*_: Any) -> str:
            return reason

        tables = list(self._tables.values())
        for table in tables:
            table.guards = (guard, *table.guards)
        try:
            yield
        finally:
            for table in tables:
                table.guards = tuple(each for each in table.guards if each is not guard)
