"""One view's records in one cache: load, mark, refresh.

The stages meet here. What readers see is one immutable :class:`State` (records and coverage
together), replaced as a whole; they take no lock. ``current`` is that state, with the records that
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
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from sqlalchemy.orm import Session

from .analysis import ViewPlan, table_label
from .changes import UNREAD, VIEW, AnyMark, Mark
from .coverage import Coverage
from .deltas import Delta, read_coverage, read_touched
from .figures import LastRead, Stats
from .layout import Layout
from .loading import Snapshots
from .loads import Loads
from .merging import let_go
from .misses import Misses
from .redaction import shown_coverage
from .replacing import refreshed
from .scores import Interval
from .state import State
from .storage import dropped
from .turns import pauses
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


RESTARTS = 3
"""How often a refresh starts again because the coverage changed under it."""


class CachedTable(Loads):
    """The records of one view, and everything that happens to them.

    :param plan: the view's plan.
    :param snapshots: where to read from.
    """

    def __init__(self, plan: ViewPlan, snapshots: Snapshots) -> None:
        super().__init__(plan, snapshots)
        self.view = plan.view
        self.base_tables = base_tables(plan)
        self.hit = LastRead("hit", "", plan.view)
        """What sessions remember of plain hits."""
        self.recent: deque[Any] = deque(maxlen=RECENT)
        """The last reads that were no plain hits, as sessions remember them."""
        self.guards: tuple[Guard, ...] = ()
        """Asked at each read, before anything else."""
        self.rereads = True
        """Whether what a mark of the whole view concerns is read again; else it is given up."""
        self.misses = Misses(plan.view)

    def guarded(self, session: Session, statement: Any = None, *, fetch: bool = True) -> str | None:
        """Return why one of the guards sends a read to the database, or ``None``."""
        for guard in self.guards:
            reason = guard(session, self, statement, fetch)
            if reason is not None:
                return reason
        return None

    def after_fork(self, *, keep: bool) -> bool:
        """See :meth:`.ViewState.after_fork`."""
        self.misses.after_fork()
        self.recent.clear()
        return super().after_fork(keep=keep)

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
        gone: list[Any] = []
        with self._refreshing:
            if self._freshness.pending:
                gone = self._refresh()
        if self.keeper is not None:
            self.keeper.trim()
        self._tell()
        let_go(gone, pauses(in_task=self._in_task))

    def _refresh(self) -> list[Any]:
        """Refresh once, and return what may be let go."""
        started = time.monotonic()
        layout = self._renewed()
        reader = object()
        token = self._begin()
        try:
            for _ in range(RESTARTS):
                state, marks, delta = self._read_marked(layout, reader)
                if not marks:
                    return []
                gone = self._replace(layout, token, state.coverage, marks, delta, reader)
                if gone is not None:
                    break
            else:
                return []
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
        return gone

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
                delta = Delta(
                    None,
                    read_coverage(layout, connection, state.coverage)
                    if self.rereads
                    else layout.no_rows(),
                )
            elif marks and state.coverage:
                delta = read_touched(
                    layout, connection, state.storage, state.coverage, marks, reread=self.rereads
                )
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
    ) -> list[Any] | None:
        """Put what a refresh read into storage; ``None`` if the coverage is another by now.

        :returns: what may be let go.
        """
        pause = pauses(in_task=self._in_task)
        while True:
            state = self._state
            if state.coverage is not coverage:
                # What it read is not all that would have to be replaced.
                return None
            rows = layout.covered(delta.rows, coverage, pause)
            storage = refreshed(layout, state.storage, delta.touched, rows, pause)
            kept = self.rereads or delta.touched is not None
            with self._lock:
                if self._is_still(state):
                    after = State(storage, coverage if kept else Coverage())
                    self._apply(token, after, marks, reader, refreshed=True)
                    return dropped(state.storage, len(rows.records))

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
            bytes=self.held_bytes,
            coverage=shown_coverage(self.plan, state.coverage),
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
            fills=counts.fills,
            ranges_evicted=counts.ranges_evicted,
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
            assert (self.current is None) == (
                freshness.blocked or (self.layout is None and not freshness.clean)
            )
            assert self.current is None or self.current is state
            stale = frozenset[Mark]() if state.stale is None else state.stale.marks
            assert self.current is None or stale == freshness.in_place()
        layout = self.layout
        if layout is None:
            return
        if self.keeper is not None:
            self.keeper._check()
        state.coverage._check()
        state.storage._check()
        for record, hidden in state.storage.pairs():
            assert layout.is_covered(state.coverage, record, hidden), record
