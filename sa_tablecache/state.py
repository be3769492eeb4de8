"""What readers see of one view, and the marks and leases that say whether they may.

In: leases and marks of commits, and what loads and refreshes made. Out: one immutable
:class:`State`, replaced as a whole. No I/O: the sections under the lock are short. The protocol is
told in ``table.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .analysis import TableName, ViewPlan
from .changes import UNREAD, AnyMark, ChangeSet, Marks, RangeMark, in_place, marks_of
from .coverage import Coverage
from .events import tick
from .figures import Counts
from .freshness import Freshness
from .history import History
from .layout import Layout
from .observers import Observers
from .scores import Interval
from .stale import StaleRecords
from .storage import Storage
from .turns import Section


class State(NamedTuple):
    """What readers see: records and what is known to be among them."""

    storage: Storage
    coverage: Coverage
    stale: StaleRecords | None = None
    """Those of the records that may be stale; ``None`` if none is."""

    def is_stale(self, index: str, intervals: Iterable[Interval]) -> bool:
        """Whether one of the records in the intervals of an index may be stale."""
        return self.stale is not None and self.stale.touch(index, intervals)


class ViewState:
    """The state of one view; :class:`.CachedTable` adds what asks the database."""

    def __init__(self, plan: ViewPlan) -> None:
        self.plan = plan
        self.layout: Layout | None = None
        """How records lie in memory; ``None`` until the database was asked."""
        self._lock = Section()
        self._state = State(Storage({}, {}), Coverage())
        self.current: State | None = self._state
        """What readers may be answered from, beside its stale records; ``None`` for none."""
        self.changed_at = 0
        """When records, marks or leases changed last, as an :func:`.events.tick`."""
        self._freshness = Freshness()
        self.history = History()
        self.observers = Observers(plan, self._given)
        self.when_marked: Callable[[], object] | None = None
        """Called when marks were made; it takes no lock."""
        self.counts = Counts()
        self.shadowed = 0
        """How many reads are being compared: what the cache is asked for that is no read."""

    def _given(self, records: list[Any]) -> list[Any]:
        return records if self.layout is None else self.layout.given(records)

    def _set_state(self, state: State, added: Marks | None = None) -> None:
        """Publish what readers see; only under the lock.

        :param added: the marks and leases that came, if none went and the records are the same.
        """
        freshness, layout = self._freshness, self.layout
        stale = state.stale
        if added is None or freshness.clean:
            stale = None
        elif stale is not None:
            stale.add(in_place(added))
        blocked = freshness.blocked or (layout is None and not freshness.clean)
        if stale is None and layout is not None and not (blocked or freshness.clean):
            stale = StaleRecords(layout, state.storage, freshness.in_place())
        self._state = State(state.storage, state.coverage, stale)
        self.current = None if blocked else self._state
        self.changed_at = tick()

    def _is_still(self, state: State) -> bool:
        """Whether records and coverage are those of a state."""
        now = self._state
        return now.storage is state.storage and now.coverage is state.coverage

    def still_answers(self, state: State, index: str, intervals: Iterable[Interval]) -> bool:
        """Whether what an earlier state holds in intervals is still what readers may be given."""
        now = self.current
        return now is not None and self._is_still(state) and not now.is_stale(index, intervals)

    @property
    def state(self) -> State:
        """Records and coverage, fresh or not."""
        return self._state

    @property
    def refresh_needed(self) -> bool:
        """Whether marks are pending."""
        return bool(self._freshness.pending)

    @property
    def leased(self) -> bool:
        """Whether a commit that touches the view is under way."""
        return self._freshness.leases > 0

    @property
    def waits_for_commit(self) -> bool:
        """Whether no refresh helps any reader, because a commit is under way."""
        return self._freshness.waits_for_commit

    @property
    def age(self) -> float | None:
        """For how many seconds something has been marked or leased; ``None`` if nothing is."""
        with self._lock:
            return self._freshness.age

    @property
    def tables(self) -> frozenset[TableName]:
        """The tables of which a change concerns the view."""
        return self.plan.tables if self.layout is None else self.layout.tables

    def marks_of(self, changes: ChangeSet, *, unread: bool = False) -> Marks:
        """Return what changes mark of the view; see :func:`.changes.marks_of`."""
        concerns = {} if self.layout is None else self.layout.concerns
        return marks_of(self.tables, concerns, changes, unread=unread)

    def lease(self, marks: Marks) -> None:
        """Have readers whom these marks would concern ask the database until :meth:`publish`."""
        with self._lock:
            self._freshness.lease(marks)
            self._set_state(self._state, marks)

    def publish(self, marks: Marks, lease: Marks | None = None) -> None:
        """Mark what changed and end the lease, in one critical section."""
        if not marks and lease is None:
            return
        with self._lock:
            freshness = self._freshness
            marks = self._mark(marks)
            if lease is not None:
                freshness.release(lease)
            if marks or lease is not None:
                self._marked(marks, kept=lease is None or all(map(freshness.has, lease)))

    def _mark(self, marks: Marks, reader: object = None, first: float | None = None) -> Marks:
        """Make marks pending but for those of records of which none is stored; return the former.

        :param reader: the load or refresh that has found the changes in its snapshot.
        :param first: from when they count, if that is known.
        """
        layout, coverage = self.layout, self._state.coverage
        outside = frozenset(
            mark
            for mark in marks
            if isinstance(mark, RangeMark) and (layout is None or layout.is_outside(coverage, mark))
        )
        for mark in marks:
            self.counts.marks[mark.kind] += 1
        self._freshness.note(outside, reader)
        marks -= outside
        self._freshness.mark(marks, reader, first)
        return marks

    def _marked(self, marks: Marks, *, kept: bool) -> None:
        """Show readers what was marked.

        :param kept: whether all marks and leases that were there still are.
        """
        if not self._state.coverage and not self._freshness.underway:
            self._freshness.forget()
            kept = False
        self._set_state(self._state, marks if kept else None)
        self.observers.marked(marks)
        if self.when_marked is not None and marks:
            self.when_marked()

    # -- what a change feed tells ---------------------------------------------------------------

    @property
    def sequence(self) -> int:
        """The number of the last mark."""
        with self._lock:
            return self._freshness.sequence

    def deliver(
        self, marks: Marks, until: int, first: float | None = None, reader: object = None
    ) -> None:
        """Mark what a poll found: what was unread when it began is not any more, in one step.

        :param until: the :attr:`sequence` from before the poll began.
        :param first: when the poll before it began: changes are not older.
        :param reader: the load or refresh in whose snapshot it polled.
        """
        with self._lock:
            freshness = self._freshness
            was_unread = UNREAD in freshness.pending
            if marks:
                marks = self._mark(marks, reader, first)
            freshness.read(until)
            unread = UNREAD in freshness.pending
            if marks or was_unread != unread:
                self._marked(marks, kept=was_unread == unread)

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Have a read compared in a block."""
        with self._lock:
            self.shadowed += 1
        try:
            yield
        finally:
            with self._lock:
                self.shadowed -= 1

    def count(self, what: str) -> None:
        """Count something that happened."""
        with self._lock:
            setattr(self.counts, what, getattr(self.counts, what) + 1)

    def count_read(self, kind: str, category: str) -> None:
        """Count a read that was not a plain hit."""
        with self._lock:
            self.counts.reads[kind, category] += 1

    def after_fork(self, *, keep: bool) -> bool:
        """In a forked child: make the lock anew; say whether the records are kept.

        :param keep: whether to keep them, if no thread of the parent was about to change them.
        """
        keep = keep and self.layout is not None and not self._lock.taken
        self._lock = Section()
        self.observers.after_fork()
        self.counts = Counts()
        self.shadowed = 0
        if keep:
            self._freshness.after_fork()
            self._set_state(self._state)
        else:
            self._freshness, self.history = Freshness(), History()
            empty = Storage({}, {}) if self.layout is None else self.layout.empty()
            self._set_state(State(empty, Coverage()))
        return keep

    def _begin(self) -> int:
        with self._lock:
            return self._freshness.begin()

    def _end(self, token: int) -> None:
        with self._lock:
            freshness = self._freshness
            freshness.end(token)
            if not self._state.coverage and not freshness.underway and freshness.pending:
                freshness.forget()
                self._set_state(self._state)

    def _apply(
        self,
        token: int,
        state: State,
        cleared: dict[AnyMark, int],
        reader: object = None,
        *,
        refreshed: bool = False,
    ) -> None:
        """Publish what a load or refresh made; only under the lock."""
        self.observers.stored(self._state.storage, state.storage, refreshed=refreshed)
        self.history.applied(state.coverage, cleared, refreshed=refreshed)
        self._freshness.apply(token, cleared, reader)
        if self.layout is not None:
            self._freshness.drop(
                mark
                for mark in self._freshness.pending
                if isinstance(mark, RangeMark) and self.layout.is_outside(state.coverage, mark)
            )
        self._set_state(state)
