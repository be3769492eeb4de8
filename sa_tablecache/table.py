"""One view's records in one cache: load, mark, refresh.

The stages meet here. What readers see is one immutable :class:`State` (records and coverage
together), replaced as a whole; they take no lock. ``_current`` is that state while it is *clean*,
and ``None`` while anything is leased or marked, so that one attribute read decides whether the
cache may answer.

The protocol that keeps answers right, under any interleaving:

* Before a COMMIT, what it will mark is leased; after it, one critical section adds the marks and
  ends the lease. From the moment a change is visible in the database until it is in the records,
  the table is therefore not clean, and readers refresh or ask the database.
* Marks carry sequence numbers. A load or refresh notes the sequence (its token) *before* it opens
  its snapshot, so that the snapshot contains every change marked up to the token, and clears no
  mark that is newer.
* When it is applied, every mark newer than its token is pending (again), whatever happened
  meanwhile, with a number newer than that of any refresh under way: what it read may lack that
  change. Records that are touched by a pending mark are found by their lineage as stored *and* by
  what the database joins now, so that refreshing a mark mends whatever an older snapshot brought.
* One refresh runs at a time; readers that need one wait for it, and go on by themselves if it
  fails. A load runs beside refreshes. One that fails or is cancelled leaves no trace.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from concurrent.futures import Future
from threading import Lock
from typing import Any, NamedTuple, TypeAlias, cast

from .analysis import TableName, ViewPlan, table_label
from .catalog import probe
from .changes import ChangeSet, Marks, RowKey, marks_of
from .coverage import Coverage
from .deltas import read_coverage, read_touched
from .events import tick
from .exc import DuplicateKey
from .figures import Stats, stored_bytes
from .layout import Layout
from .loading import Progress, Rows, Snapshots
from .orders import Hidden, Record
from .scores import IntervalSet
from .storage import Storage
from .turns import Turn, new_future, wait_for

log = logging.getLogger(__name__)

Mark: TypeAlias = tuple[TableName, RowKey] | None
"""A base row whose records may be stale; ``None`` marks the whole view."""

SAMPLE = 1_000
"""Rows that an estimate looks at."""


class State(NamedTuple):
    """What readers see: records and what is known to be among them."""

    storage: Storage
    coverage: Coverage


class CachedTable:
    """The records of one view, and everything that happens to them.

    :param plan: the view's plan.
    :param snapshots: where to read from.
    """

    def __init__(self, plan: ViewPlan, snapshots: Snapshots) -> None:
        self.plan = plan
        self.view = plan.view
        self._snapshots = snapshots
        self._in_task = bool(snapshots.dialect.is_async)
        self._lock = Lock()
        self._loading = Turn(in_task=self._in_task)
        self._refreshing = Turn(in_task=self._in_task)
        self._ready: Future[Any] = new_future()
        self._setting_up = Turn(in_task=self._in_task)
        self.layout: Layout | None = None
        """How records lie in memory; ``None`` until the database was asked."""

        self._state = State(Storage({}, {}), Coverage())
        self._current: State | None = self._state
        self.changed_at = 0
        """When records, marks or leases changed last, as an :func:`.events.tick`."""
        self._sequence = 0
        self._pending: dict[Mark, int] = {}
        self._oldest: float | None = None
        self._leases = 0
        self._log: list[tuple[int, Mark]] = []
        """Marks made while loads or refreshes are under way, for when they are applied."""
        self._underway: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()

    # -- setting up -----------------------------------------------------------------------------

    def set_up(self) -> Layout:
        """Ask the database, once, what it stores; see :func:`.catalog.probe`."""
        if self.layout is None:
            with self._setting_up:
                if self.layout is None:
                    with self._snapshots.open() as connection:
                        catalog = probe(connection, self.plan)
                    layout = Layout(self.plan, catalog, self._snapshots.dialect)
                    with self._lock:
                        self._set_state(State(layout.build(layout.no_rows()), Coverage()))
                        self.layout = layout
        return self.layout

    @property
    def _key_is_proven(self) -> bool:
        return self.layout is not None and self.layout.key_is_proven

    @property
    def tables(self) -> frozenset[TableName]:
        """The tables of which a change concerns the view."""
        return self.plan.tables if self.layout is None else self.layout.tables

    @property
    def coarse(self) -> dict[TableName, str]:
        """Tables of which any change marks the whole view, and why."""
        return self.plan.coarse if self.layout is None else self.layout.coarse

    # -- state ----------------------------------------------------------------------------------

    def _set_state(self, state: State) -> None:
        """Publish what readers see; only under the lock."""
        self._state = state
        self.changed_at = tick()
        clean = not self._leases and not self._pending
        self._current = state if clean else None
        if not self._pending:
            self._oldest = None

    @property
    def current(self) -> State | None:
        """What readers may be answered from; ``None`` while anything is leased or marked."""
        return self._current

    @property
    def state(self) -> State:
        """Records and coverage, fresh or not."""
        return self._state

    @property
    def leased(self) -> bool:
        """Whether a commit that touches the view is under way."""
        return self._leases > 0

    def lease(self, changes: ChangeSet) -> bool:
        """Have readers ask the database until :meth:`publish`; say whether it is concerned."""
        if not changes.touches(self.tables):
            return False
        with self._lock:
            self._leases += 1
            self._set_state(self._state)
        return True

    def publish(self, changes: ChangeSet, *, leased: bool) -> None:
        """Mark what changed and end the lease, in one critical section."""
        followed = self.layout.followed if self.layout is not None else frozenset()
        marks = marks_of(self.tables, changes, followed)
        if not marks and not leased:
            return
        with self._lock:
            self._mark(marks)
            if leased:
                self._leases -= 1
            self._set_state(self._state)

    def mark(self, marks: Marks) -> None:
        """Mark records as possibly stale."""
        with self._lock:
            self._mark(marks)
            self._set_state(self._state)

    def _mark(self, marks: Marks) -> None:
        if marks and self._oldest is None:
            self._oldest = time.monotonic()
        for mark in [None] if marks.view else marks.rows:
            self._sequence += 1
            self._pending[mark] = self._sequence
            if self._underway:
                self._log.append((self._sequence, mark))
        if not self._state.coverage and not self._underway:
            self._pending.clear()  # nothing is stored that could be stale

    def _begin(self) -> int:
        with self._lock:
            token = self._sequence
            self._underway[token] += 1
            return token

    def _end(self, token: int) -> None:
        with self._lock:
            self._underway[token] -= 1
            if not self._underway[token]:
                del self._underway[token]
            oldest = min(self._underway, default=self._sequence)
            self._log = [entry for entry in self._log if entry[0] > oldest]
            if not self._state.coverage and not self._underway and self._pending:
                self._pending.clear()
                self._set_state(self._state)

    def _apply(self, token: int, state: State, cleared: dict[Mark, int]) -> None:
        """Publish what a load or refresh made; only under the lock."""
        for mark, sequence in cleared.items():
            if self._pending.get(mark) == sequence:
                del self._pending[mark]
        for mark in {mark for sequence, mark in self._log if sequence > token}:
            self._sequence += 1
            self._pending[mark] = self._sequence
            # Those that began meanwhile must find it again when they are applied.
            self._log.append((self._sequence, mark))
        if self._pending and self._oldest is None:
            self._oldest = time.monotonic()
        self._set_state(state)

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
        layout = self.set_up()
        started = time.monotonic()
        with self._loading:
            token = self._begin()
            try:
                before = self._state
                missing = before.coverage.missing(index, target)
                rows = layout.no_rows()
                if missing:
                    with self._snapshots.open() as connection:
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
                    storage, expired = self._moved(
                        layout, state, rows, index, target, extend=extend
                    )
                    with self._lock:
                        if self._state is state:
                            self._apply(token, State(storage, coverage), {})
                            if not self._ready.done():
                                self._ready.set_result(None)
                            break
            finally:
                self._end(token)
            self.counts["loads"] += 1
            self.counts["records_loaded"] += len(rows.records)
            self.counts["records_expired"] += expired
            log.info(
                "view %s: loaded %d and expired %d records in %.3f s", self.plan.name,
                len(rows.records), expired, time.monotonic() - started,
            )  # fmt: skip

    def _moved(
        self,
        layout: Layout,
        state: State,
        rows: Rows,
        index: str,
        target: IntervalSet,
        *,
        extend: bool,
    ) -> tuple[Storage, int]:
        """Return the storage with loaded rows, without what is no longer covered."""
        storage = state.storage
        outside: list[Record] = []
        if not extend:
            for interval in ~target:
                outside += storage.orders[index].between(interval)
        if len(outside) == len(storage):
            storage = layout.build(rows)
            self._check_unique(storage)
            return storage, len(outside)
        removed = storage.with_hidden(outside)
        gone = {id(record) for record in outside}
        # What another index had covered is there already, and so may be a stale record of a row
        # whose score has moved.
        removed += [p for p in storage.same_keys(rows.records) if id(p[0]) not in gone]
        storage = storage.replace(removed, rows.pairs())
        self._check_unique(storage)
        return storage, len(outside)

    def _check_unique(self, storage: Storage) -> None:
        """Refuse rows that share a primary key, where the user said what the key is."""
        if self._key_is_proven:
            return
        primary = storage.orders[""]
        key_of = self.plan.key_of
        previous: Any = object()
        for record in primary:
            key = key_of(record)
            if key == previous:
                raise DuplicateKey(
                    f"view {self.plan.name}: two rows have {', '.join(self.plan.key)} = {key!r}, "
                    "so that is no key; correct __primary_key__"
                )
            previous = key

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
                        if self._state is state:
                            self._apply(token, State(storage, coverage), {})
                            break
            finally:
                self._end(token)
            self.counts["records_expired"] += len(gone)

    def clear(self) -> None:
        """Give up all records."""
        layout = self.set_up()
        with self._loading, self._lock:
            empty = layout.build(layout.no_rows())
            if not self._underway:
                self._pending.clear()
            self._set_state(State(empty, Coverage()))
            if self._ready.done():
                self._ready = new_future()

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
        that those did not return; or one SELECT of all that is covered if the view is marked.
        """
        if not self._pending:
            return
        with self._refreshing:
            if self._pending:
                self._refresh()

    def _refresh(self) -> None:
        started = time.monotonic()
        layout = self.set_up()
        token = self._begin()
        try:
            while True:
                with self._lock:
                    marks = dict(self._pending)
                    state = self._state
                anchors, read = self._read_marked(layout, state, marks)
                if self._replace(layout, token, state.coverage, marks, anchors, read):
                    break
        finally:
            self._end(token)
        self.counts["refreshes"] += 1
        log.debug(
            "view %s: refreshed %d marks, %d records in %.3f s", self.plan.name, len(marks),
            len(read.records), time.monotonic() - started,
        )  # fmt: skip

    def _read_marked(
        self, layout: Layout, state: State, marks: dict[Mark, int]
    ) -> tuple[set[RowKey] | None, Rows]:
        """Read what the marks touch: its anchors (``None``: all of them), and their records."""
        if not state.coverage:
            return None, layout.no_rows()
        with self._snapshots.open() as connection:
            self._pause("snapshot")
            if None in marks:
                result = None, read_coverage(layout, connection, state.coverage)
            else:
                result = read_touched(  # type: ignore[assignment]
                    layout, connection, state.storage, state.coverage,
                    cast("dict[tuple[TableName, RowKey], int]", marks),
                )  # fmt: skip
        self._pause("read")
        return result

    def _replace(
        self,
        layout: Layout,
        token: int,
        coverage: Coverage,
        marks: dict[Mark, int],
        anchors: set[RowKey] | None,
        read: Rows,
    ) -> bool:
        """Put what a refresh read into storage; say no if the coverage is another by now."""
        while True:
            state = self._state
            if state.coverage is not coverage:
                # What it read is not all that would have to be replaced.
                return False
            pairs = [
                (record, hidden)
                for record, hidden in read.pairs()
                if layout.is_covered(coverage, record, hidden)
            ]
            storage = self._refreshed(layout, state.storage, anchors, pairs)
            with self._lock:
                if self._state is state:
                    self._apply(token, State(storage, coverage), marks)
                    return True

    def _pause(self, point: str) -> None:
        """Do nothing; tests stop a refresh here."""

    def _refreshed(
        self,
        layout: Layout,
        storage: Storage,
        anchors: set[RowKey] | None,
        pairs: list[tuple[Record, Hidden | None]],
    ) -> Storage:
        """Return the storage with all records of some anchors (or all) replaced."""
        if anchors is None:
            rows = layout.no_rows()
            rows.records += [record for record, _ in pairs]
            if rows.hidden is not None:
                rows.hidden += [cast("Hidden", hidden) for _, hidden in pairs]
            result = layout.build(rows)
            self._check_unique(result)
            return result
        assert self.plan.anchor is not None
        removed = storage.with_hidden(layout.records_of(storage, self.plan.anchor, anchors))
        result = storage.replace(removed, pairs)
        if not self._key_is_proven:
            primary = result.orders[""]
            for record, _ in pairs:
                if primary.count(primary.order.prefix(self.plan.key_tuple(record))) > 1:
                    self._check_unique(result)
        return result

    # -- figures --------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return the figures of the view."""
        with self._lock:
            state = self._state
            oldest = self._oldest
            pending, leases = len(self._pending), self._leases
        return Stats(
            records=len(state.storage) if self.layout is not None else 0,
            bytes=stored_bytes(state.storage),
            coverage=repr(state.coverage),
            hits=self.counts["hit"],
            partial_hits=self.counts["partial"],
            misses=self.counts["miss"],
            bypasses=self.counts["bypass"],
            loads=self.counts["loads"],
            refreshes=self.counts["refreshes"],
            records_loaded=self.counts["records_loaded"],
            records_expired=self.counts["records_expired"],
            pending_marks=pending,
            oldest_mark=0.0 if oldest is None else time.monotonic() - oldest,
            leases=leases,
            coarse={table_label(table): why for table, why in self.coarse.items()},
        )

    def _check(self) -> None:
        """Assert the invariants of records, coverage and marks."""
        with self._lock:
            state = self._state
            assert (self._current is state) == (not self._leases and not self._pending)
            assert self._leases >= 0
            assert all(s <= self._sequence for s in self._pending.values())
            assert self._underway or not self._log
        layout = self.layout
        if layout is None:
            return
        state.coverage._check()
        state.storage._check()
        for record, hidden in state.storage.pairs():
            assert layout.is_covered(state.coverage, record, hidden), record
