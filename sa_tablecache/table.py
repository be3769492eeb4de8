"""One view's records in one cache: load, mark, refresh.

The stages meet here. What readers see is one immutable :class:`State` (records and coverage
together), replaced as a whole; they take no lock. ``_current`` is that state, with the records that
may be stale if there are some, and ``None`` while marks or leases could concern any answer, so that
one attribute read decides whether the cache may answer.

The protocol that keeps answers right, under any interleaving:

* Before a COMMIT, what it will mark is leased; after it, one critical section adds the marks and
  ends the lease. From the moment a change is visible in the database until it is in the records,
  it is therefore marked or leased, and readers that it could concern refresh or ask the database.
* A mark or lease that moves records concerns all readers. One *in place* (an UPDATE of columns
  that decide nothing about which records there are, nor where) concerns only answers with the
  records of its row. While no moving mark or lease is there, records, their places and their
  lineage in storage are those of the database, so that storage itself says which these are.
* Marks carry sequence numbers. A load or refresh notes the sequence (its token) *before* it opens
  its snapshot, so that the snapshot contains every change marked up to the token, and clears no
  mark that is newer.
* When it is applied, every mark newer than its token is pending (again), whatever happened
  meanwhile, with a number newer than that of any refresh under way: what it read may lack that
  change. Records that are touched by a pending mark are found by their lineage as stored *and* by
  what the database joins now, so that refreshing a mark mends whatever an older snapshot brought.
* Where a change feed tells of the commits of others, each snapshot begins with a poll, so that
  nothing in storage is newer than what the feed has told: records that are not marked are those
  of one moment. Marks of what a load or refresh has found in its own snapshot it may clear.
* One refresh runs at a time; readers that need one wait for it, and go on by themselves if it
  fails. A load runs beside refreshes. One that fails or is cancelled leaves no trace.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeAlias

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from .analysis import TableName, ViewPlan, table_label
from .catalog import Catalog, probe
from .changes import UNREAD, VIEW, AnyMark, Mark
from .coverage import Coverage
from .deltas import Delta, read_coverage, read_touched
from .figures import Stats, stored_bytes
from .layout import Layout
from .loading import Progress, Snapshots
from .misses import Misses
from .replacing import loaded, refreshed
from .scores import Interval, IntervalSet
from .state import State, ViewState
from .triggers import Automatic, automatic
from .turns import Turn, new_future, wait_for
from .usage import base_tables

log = logging.getLogger(__name__)

Timer = Callable[["CachedTable", str, float], object]
"""Told of each ``"load"`` and ``"refresh"`` of a view, and how many seconds it took."""

RECENT = 100
"""So many reads that were no plain hits are remembered, with their reasons."""

Guard: TypeAlias = Callable[[Session, "CachedTable", Any, bool], str | None]
"""Says why a session has to read the database now, or ``None``.

It is given the session, the table, the statement (``None`` for range reads and reads by key), and
whether it may ask the database itself; if it would have to and may not, it gives a reason.
"""


class Feed(Protocol):
    """What loads and refreshes ask of a change feed."""

    def seed(self) -> None:
        """Begin to follow the view, before anything of it is read; do nothing if that fails."""

    def catch_up(self) -> None:
        """Read, and publish, all that was committed before this call."""

    def snapshot(self, table: CachedTable, reader: object) -> AbstractContextManager[Connection]:
        """Open a snapshot, after publishing all changes up to it.

        :param reader: what reads in it, for :meth:`.ViewState.deliver` to the table.
        """

    def tell(self) -> None:
        """Tell the listeners of all views what polls in snapshots have marked."""


RESTARTS = 3
"""How often a refresh starts again because the coverage changed under it."""


class CachedTable(ViewState):
    """The records of one view, and everything that happens to them.

    :param plan: the view's plan.
    :param snapshots: where to read from.
    """

    def __init__(self, plan: ViewPlan, snapshots: Snapshots) -> None:
        super().__init__(plan)
        self.view = plan.view
        self.base_tables = base_tables(plan)
        self._snapshots = snapshots
        self._in_task = bool(snapshots.dialect.is_async)
        self._ready: Future[Any] = new_future()
        self._take_turns()
        self.doubtful = False
        """Whether DDL ran, or what may have been, since the catalog was asked."""
        self.timers: list[Timer] = []
        """Those of the cache: one list for all of its tables."""
        self.recent: deque[Any] = deque(maxlen=RECENT)
        """The last reads that were no plain hits, as sessions remember them."""
        self.guards: tuple[Guard, ...] = ()
        """Asked at each read, before anything else."""
        self.misses = Misses(plan.view)
        self.feed: Feed | None = None

    def guarded(self, session: Session, statement: Any = None, *, fetch: bool = True) -> str | None:
        """Return why one of the guards sends a read to the database, or ``None``."""
        for guard in self.guards:
            reason = guard(session, self, statement, fetch)
            if reason is not None:
                return reason
        return None

    def _take_turns(self) -> None:
        self._loading, self._refreshing, self._setting_up = (
            Turn(in_task=self._in_task) for _ in range(3)
        )

    def after_fork(self, *, keep: bool) -> bool:
        """See :meth:`.ViewState.after_fork`."""
        if self._setting_up.taken:
            # Another thread was changing it, or about to.
            keep, self.layout = False, None
        self._take_turns()
        self.misses.after_fork()
        self.recent.clear()
        keep = super().after_fork(keep=keep)
        ready = keep and self._ready.done()
        self._ready = new_future()
        if ready:
            self._ready.set_result(None)
        return keep

    # -- setting up -----------------------------------------------------------------------------

    def set_up(self) -> Layout:
        """Ask the database, once, what it stores; see :func:`.catalog.probe`."""
        if self.layout is None:
            with self._setting_up:
                if self.layout is None:
                    layout = Layout(self.plan, self._snapshots.dialect, *self._probed())
                    with self._lock:
                        self._set_state(State(layout.empty(), Coverage()))
                        self.layout = layout
        return self.layout

    def _renewed(self) -> Layout:
        """Ask again, before reading, if what is stored may have been defined otherwise."""
        layout = self.set_up()
        if self.doubtful:
            with self._setting_up:
                if self.doubtful:
                    try:
                        layout.renew(*self._probed())
                    except BaseException:
                        self.doubtful = True
                        raise
        return layout

    def _probed(self) -> tuple[Catalog, dict[TableName, Automatic]]:
        self.doubtful = False  # before: DDL that ends meanwhile is another doubt
        with self._snapshots.open() as connection:
            return probe(connection, self.plan), automatic(connection, self.plan)

    @property
    def coarse(self) -> dict[TableName, str]:
        """Tables of which any change marks the whole view, and why."""
        return self.plan.coarse if self.layout is None else self.layout.coarse

    # -- loading --------------------------------------------------------------------------------

    def load(
        self,
        index: str,
        target: IntervalSet,
        *,
        extend: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Make the coverage the target (or, with ``extend``, include it): one SELECT at most.

        Only the difference is fetched and expired. A load that fails leaves everything as it was.
        """
        if self.feed is not None:
            self.feed.seed()
        layout = self._renewed()
        started = time.monotonic()
        with self._loading:
            reader = object()
            token = self._begin()
            try:
                before = self._state
                missing = before.coverage.missing(index, target)
                rows = layout.no_rows()
                if missing:
                    with self._opened(reader) as connection:
                        rows = layout.loader.read(
                            connection, layout.where(index, missing), stream=True, progress=progress
                        )
                    self._pause("loaded")
                    rows = layout.only(rows, index, missing)
                expired = 0
                while True:
                    state = self._state
                    coverage = (
                        state.coverage.plus(index, target) if extend else Coverage({index: target})
                    )
                    storage, expired = loaded(
                        layout, state.storage, rows, index, target, extend=extend
                    )
                    with self._lock:
                        if self._is_still(state):
                            # Where all was read in this snapshot, what it has found is no news.
                            found = {} if before.coverage else self._freshness.found_by(reader)
                            self._apply(token, State(storage, coverage), found, reader)
                            if not self._ready.done():
                                self._ready.set_result(None)
                            break
            finally:
                self._end(token)
            seconds = time.monotonic() - started
            self.counts.loads += 1
            self.counts.load_seconds += seconds
            self.counts.records_loaded += len(rows.records)
            self.counts.records_expired += expired
            log.info(
                "view %s: loaded %d and expired %d records in %.3f s", self.plan.name,
                len(rows.records), expired, seconds,
            )  # fmt: skip
        self._tell_timers("load", seconds)
        self._tell()

    def evict(self, index: str, intervals: IntervalSet) -> None:
        """Give up records; those that the coverage of another index needs stay."""
        layout = self.set_up()
        with self._loading:
            token = self._begin()
            try:
                while True:
                    state = self._state
                    coverage = state.coverage.minus(index, intervals)
                    order = state.storage.orders[index]
                    inside = [r for interval in intervals for r in order.between(interval)]
                    gone = [
                        (record, hidden)
                        for record, hidden in state.storage.with_hidden(inside)
                        if not layout.is_covered(coverage, record, hidden)
                    ]
                    storage = state.storage.replace(gone, [])
                    with self._lock:
                        if self._is_still(state):
                            self._apply(token, State(storage, coverage), {})
                            break
            finally:
                self._end(token)
            self.counts.records_expired += len(gone)
        self.observers.tell()

    def clear(self) -> None:
        """Give up all records."""
        layout = self.set_up()
        with self._loading, self._lock:
            empty = layout.empty()
            if not self._freshness.underway:
                self._freshness.forget()
            self.observers.stored(self._state.storage, empty, refreshed=False)
            self._set_state(State(empty, Coverage()))
            if self._ready.done():
                self._ready = new_future()
        self.observers.tell()

    def wait_for_load(self) -> bool:
        """Wait for the load that is under way; say whether there was one."""
        return self._loading.wait()

    def wait_ready(self, timeout: float | None) -> bool:
        """Wait for the first load to end."""
        return wait_for(self._ready, timeout, in_task=self._in_task)

    @property
    def ready(self) -> bool:
        """Whether a load has ended since the start, or since :meth:`clear`."""
        return self._ready.done()

    # -- refreshing -----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read again what is marked, unless somebody just did: see the module's docstring.

        It emits one SELECT for each base table that has marks, and one for the touched anchors
        that those did not return (or for the touched groups); or one SELECT of all that is covered
        if the view is marked. Before these, in the same snapshot, it polls the change feed.
        Where loads change the coverage again and again meanwhile, it gives up; the marks stay.
        """
        if not self._freshness.pending:
            return
        with self._refreshing:
            if self._freshness.pending:
                self._refresh()
        self._tell()

    def _tell(self) -> None:
        """Tell listeners what happened: to other views too, if the change feed was polled."""
        self.observers.tell()
        if self.feed is not None:
            self.feed.tell()

    def _refresh(self) -> None:
        started = time.monotonic()
        layout = self._renewed()
        reader = object()
        token = self._begin()
        try:
            for _ in range(RESTARTS):
                state, marks, delta = self._read_marked(layout, reader)
                if not marks:
                    return
                if self._replace(layout, token, state.coverage, marks, delta, reader):
                    break
            else:
                return
        finally:
            self._end(token)
        seconds = time.monotonic() - started
        self.counts.refreshes += 1
        self.counts.refresh_seconds += seconds
        log.info(
            "view %s: refreshed %d marks, %d records in %.3f s", self.plan.name, len(marks),
            len(delta.rows.records), seconds,
        )  # fmt: skip
        self._tell_timers("refresh", seconds)

    def _read_marked(
        self, layout: Layout, reader: object
    ) -> tuple[State, dict[AnyMark, int], Delta]:
        """Read what the marks touch, and what it is now, in one snapshot."""
        if not self._state.coverage:
            return *self._noted(), Delta(None, layout.no_rows())
        with self._opened(reader) as connection:
            state, marks = self._noted()
            self._pause("snapshot")
            if VIEW in marks:
                delta = Delta(None, read_coverage(layout, connection, state.coverage))
            elif marks and state.coverage:
                delta = read_touched(layout, connection, state.storage, state.coverage, marks)
            else:
                delta = Delta(None, layout.no_rows())
        self._pause("read")
        return state, marks, delta

    def _noted(self) -> tuple[State, dict[AnyMark, int]]:
        """Return the state, and the marks that a refresh is to clear."""
        with self._lock:
            marks = dict(self._freshness.pending)
            marks.pop(UNREAD, None)  # the feed knows what it stands for
            return self._state, marks

    @contextmanager
    def _opened(self, reader: object) -> Iterator[Connection]:
        """Open a snapshot, in which a change feed has told of all changes up to it."""
        if self.feed is None:
            with self._snapshots.open() as connection:
                yield connection
        else:
            with self.feed.snapshot(self, reader) as connection:
                yield connection

    def may_merge(self, state: State, index: str, intervals: Iterable[Interval]) -> bool:
        """Whether what a reader has just fetched goes with what a state holds in intervals.

        Together they are of one moment if nothing of the latter has changed: here, or elsewhere,
        as a poll of the change feed tells.
        """
        if self.feed is not None:
            try:
                self.feed.catch_up()
            except Exception:
                return False
        return self.still_answers(state, index, intervals)

    def _replace(
        self,
        layout: Layout,
        token: int,
        coverage: Coverage,
        marks: dict[AnyMark, int],
        delta: Delta,
        reader: object,
    ) -> bool:
        """Put what a refresh read into storage; say no if the coverage is another by now."""
        while True:
            state = self._state
            if state.coverage is not coverage:
                # What it read is not all that would have to be replaced.
                return False
            pairs = [
                (record, hidden)
                for record, hidden in delta.rows.pairs()
                if layout.is_covered(coverage, record, hidden)
            ]
            storage = refreshed(layout, state.storage, delta.touched, pairs)
            with self._lock:
                if self._is_still(state):
                    self._apply(token, State(storage, coverage), marks, reader, refreshed=True)
                    return True

    def _tell_timers(self, what: str, seconds: float) -> None:
        for timer in self.timers:
            try:
                timer(self, what, seconds)
            except Exception:
                log.exception("view %s: a timer failed", self.plan.name)

    def _pause(self, point: str) -> None:
        """Do nothing; tests stop a refresh here."""

    # -- figures --------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return the figures of the view."""
        counts = self.counts
        with self._lock:
            state = self._state
            oldest = self._freshness.oldest
            pending, leases = len(self._freshness.pending), self._freshness.leases
        return Stats(
            records=len(state.storage) if self.layout is not None else 0,
            bytes=stored_bytes(state.storage),
            coverage=repr(state.coverage),
            hits=counts.hits + counts.reads_of("hit"),
            hits_with_refresh=counts.reads["hit", "refresh"],
            partial_hits=counts.reads_of("partial"),
            misses=counts.reads_of("miss"),
            bypasses=counts.reads_of("bypass"),
            reasons=counts.reasons,
            mismatches=counts.mismatches,
            comparisons=counts.comparisons,
            comparisons_skipped=counts.comparisons_skipped,
            loads=counts.loads,
            load_seconds=counts.load_seconds,
            refreshes=counts.refreshes,
            refresh_seconds=counts.refresh_seconds,
            records_loaded=counts.records_loaded,
            records_expired=counts.records_expired,
            marks=dict(counts.marks),
            pending_marks=pending,
            oldest_mark=0.0 if oldest is None else time.monotonic() - oldest,
            leases=leases,
            coarse={table_label(table): why for table, why in self.coarse.items()},
        )

    def _check(self) -> None:
        """Assert the invariants of records, coverage and marks."""
        with self._lock:
            state = self._state
            freshness = self._freshness
            freshness._check()
            assert (self._current is None) == (
                freshness.blocked or (self.layout is None and not freshness.clean)
            )
            assert self._current is None or self._current is state
            stale = frozenset[Mark]() if state.stale is None else state.stale.marks
            assert self._current is None or stale == freshness.in_place()
        layout = self.layout
        if layout is None:
            return
        state.coverage._check()
        state.storage._check()
        for record, hidden in state.storage.pairs():
            assert layout.is_covered(state.coverage, record, hidden), record
