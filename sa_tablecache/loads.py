"""Loads of one view: what becomes stored, and what is given up.

In: intervals of an index. Out: another state, swapped in as a whole when it is complete; see
``table.py`` for the protocol that loads follow together with refreshes. Loads take turns. Fills, by
which reads load what they missed, run beside each other and beside loads: each adds exactly what it
has read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol
from weakref import ref

from sqlalchemy import Connection

from .analysis import TableName, ViewPlan
from .catalog import Catalog, probe
from .chunks import read_first
from .coverage import Coverage
from .figures import stored_bytes
from .keeping import Keeper
from .layout import Layout
from .limits import MemoryLimit
from .loading import Check, Progress, Snapshots
from .merging import let_go
from .replacing import loaded
from .rows import Rows
from .scores import IntervalSet
from .slots import LoadSlots
from .sorting import Pause, no_pause, steps
from .state import State, ViewState
from .storage import Storage, dropped
from .triggers import Automatic, automatic
from .turns import Turn, new_future, pauses, wait_for

log = logging.getLogger(__name__)


class Feed(Protocol):
    """What loads and refreshes ask of a change feed."""

    def seed(self) -> None:
        """Begin to follow the view, before anything of it is read; do nothing if that fails."""

    def catch_up(self) -> None:
        """Read, and publish, all that was committed before this call."""

    def snapshot(self, table: Loads, reader: object) -> AbstractContextManager[Connection]:
        """Open a snapshot, after publishing all changes up to it.

        :param reader: what reads in it, for :meth:`.ViewState.deliver` to the table.
        """

    def tell(self) -> None:
        """Tell the listeners of all views what polls in snapshots have marked."""


def evicted(
    layout: Layout,
    state: State,
    intervals: Mapping[str, IntervalSet],
    pause: Pause = no_pause,
) -> tuple[State, int]:
    """Return the state without intervals of some indexes, and how many records that are less.

    Records that what remains of the coverage needs stay.
    """
    coverage = state.coverage
    inside: dict[int, Any] = {}
    for index, gone in intervals.items():
        coverage = coverage.minus(index, gone)
        order = state.storage.orders[index]
        for interval in gone:
            for some in steps(order.between(interval)):
                inside.update(zip(map(id, some), some, strict=True))
                pause()
    if not coverage and len(inside) == len(state.storage):
        return State(layout.empty(), coverage), len(inside)
    pairs = []
    for some in steps(state.storage.with_hidden(list(inside.values()), pause)):
        pairs += [pair for pair in some if not layout.is_covered(coverage, *pair)]
        pause()
    return State(state.storage.replace(pairs, [], pause), coverage), len(pairs)


class Loads(ViewState):
    """The state of one view, and its loads.

    :param plan: the view's plan.
    :param snapshots: where to read from.
    """

    def __init__(self, plan: ViewPlan, snapshots: Snapshots) -> None:
        super().__init__(plan)
        self._snapshots = snapshots
        self._in_task = bool(snapshots.dialect.is_async)
        self._ready: Future[Any] = new_future()
        self._take_turns()
        self.doubtful = False
        """Whether DDL ran, or what may have been, since the catalog was asked."""
        self.timers: list[Callable[[Any, str, float], object]] = []
        """Those of the cache: one list for all of its tables."""
        self.feed: Feed | None = None
        self.keeper: Keeper | None = None
        """What the policy does about reads, if anything."""
        self.slots: LoadSlots | None = None
        self.memory: MemoryLimit | None = None
        self._measured: tuple[ref[Storage] | None, int] = None, 0

    def _take_turns(self) -> None:
        self._loading, self._refreshing, self._setting_up = (
            Turn(in_task=self._in_task) for _ in range(3)
        )

    def after_fork(self, *, keep: bool) -> bool:
        """See :meth:`.ViewState.after_fork`."""
        if self._setting_up.taken:
            # Another thread was changing it, or about to.
            keep, self.layout = False, None
        if self.keeper is not None:
            self.keeper.after_fork(intact=not self._refreshing.taken)
        if self.memory is not None:
            self.memory.after_fork()
        self._take_turns()
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
        most: int | None = None,
    ) -> bool:
        """Make the coverage the target (or, with ``extend``, include it): one SELECT at most.

        Only the difference is fetched and expired. A load that fails leaves everything as it was.

        :param most: extend the coverage by so many records of the target at most, in the order of
            the index.
        :returns: whether all of the target is covered.
        :raises MemoryLimitExceeded: if there is a limit that it would pass.
        """
        if self.feed is not None:
            self.feed.seed()
        layout = self._renewed()
        started = time.monotonic()
        extend = extend or most is not None
        pause = pauses(in_task=self._in_task)
        with self._loading, self._limited(index, target, extend=extend) as check:
            reader = object()
            token = self._begin()
            try:
                missing = self._state.coverage.missing(index, target)
                rows = layout.no_rows()
                if missing:
                    with self._snapshot(reader) as connection:
                        if most is None:
                            where = layout.where(index, missing)
                            rows = layout.loader.read(
                                connection, where, stream=True, progress=progress, check=check
                            )
                        else:
                            rows, part = read_first(
                                layout, connection, index, missing, most, progress, check
                            )
                            missing = part
                    if check is not None:
                        check(rows, True)
                    self._pause("loaded")
                    rows = layout.only(rows, index, missing, pause)
                applied = self._swap_in(token, reader, rows, index, target, missing, extend, pause)
                if applied is None:
                    # Refreshes have changed the records. They would not let it end.
                    with self._refreshing:
                        while applied is None:
                            applied = self._swap_in(
                                token, reader, rows, index, target, missing, extend, pause
                            )
                complete, expired, gone = applied
                if complete and most is None and not self._ready.done():
                    self._ready.set_result(None)
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
        let_go(gone, pause)
        return complete

    def _swap_in(
        self,
        token: int,
        reader: object,
        rows: Rows,
        index: str,
        target: IntervalSet,
        missing: IntervalSet,
        extend: bool,
        pause: Pause,
    ) -> tuple[bool, int, list[Any]] | None:
        """Put what a load has read into storage; ``None`` if others have changed it meanwhile.

        :returns: whether all of the target is covered, how many records expired, and what may be
            let go.
        """
        assert self.layout is not None
        layout, state = self.layout, self._state
        # What was there when the load began may have been given up meanwhile.
        coverage = state.coverage.plus(index, missing)
        complete = coverage.covers(index, target)
        keep = extend or not complete
        storage, expired = loaded(
            layout, state.storage, rows, index, target, extend=keep, pause=pause
        )
        coverage = coverage if keep else Coverage({index: target})
        with self._lock:
            if not self._is_still(state):
                return None
            # Where all was read in this snapshot, what it has found is no news.
            found = {} if state.coverage else self._freshness.found_by(reader)
            self._apply(token, State(storage, coverage), found, reader)
        return complete, expired, dropped(state.storage, expired + len(rows.records))

    def load_chunks(
        self,
        index: str,
        target: IntervalSet,
        chunk: int | None,
        *,
        extend: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Do what :meth:`load` does, so many records at a time; ``None`` for all at once.

        Each chunk extends the coverage, and stays if a later one fails.

        :raises NotExpressible: if the index does not sort in Python as in the database.
        """
        done = 0

        def so_far(records: int) -> None:
            if progress is not None:
                progress(done + records)

        while chunk is not None:
            before = self.counts.records_loaded
            if self.load(index, target, most=chunk, progress=so_far):
                break
            done += self.counts.records_loaded - before
        while not self.load(index, target, extend=extend, progress=so_far if progress else None):
            pass  # a policy has given up what was there

    def _snapshot(self, reader: object) -> AbstractContextManager[Connection]:
        """Open a snapshot for a load, holding one of the load slots if there are some."""
        if self.slots is None:
            return self._opened(reader)
        return self.slots.open(self._snapshots, lambda: self._opened(reader), in_task=self._in_task)

    def _opened(self, reader: object) -> AbstractContextManager[Connection]:
        """Open a snapshot, in which a change feed has told of all changes up to it."""
        return self._snapshots.open() if self.feed is None else self.feed.snapshot(self, reader)

    def _tell(self) -> None:
        """Tell listeners what happened: to other views too, if the change feed was polled."""
        self.observers.tell()
        if self.feed is not None:
            self.feed.tell()

    def _limited(
        self, index: str, target: IntervalSet, *, extend: bool
    ) -> AbstractContextManager[Check | None]:
        """Give what a load has to call with what it has read, if there is a memory limit."""
        if self.memory is None:
            return nullcontext()
        assert self.layout is not None
        storage, kept = self._state.storage, 1.0
        if len(storage) and not extend:
            kept = sum(map(storage.orders[index].count, target)) / len(storage)
        return self.memory.loading(self, self.layout, kept)

    def fill(
        self,
        index: str,
        missing: IntervalSet,
        store: Callable[[Rows, IntervalSet, Callable[[Callable[[State], State]], None]], None],
        check: Check,
        *,
        most: int | None = None,
        descending: bool = False,
    ) -> None:
        """Read records for the storage, beside other fills and beside loads: one SELECT.

        Like a load, it leaves no trace if it fails.

        :param store: is given the rows, the intervals of which these are all, and what replaces
            the state by one that a function makes of it.
        :param check: called with what was read so far; it may raise to end it.
        :param most: read the first so many records only, or with ``descending`` the last.
        """
        if self.feed is not None:
            self.feed.seed()
        layout = self._renewed()
        reader = object()
        token = self._begin()
        try:
            with self._opened(reader) as connection:
                if most is None:
                    where = layout.where(index, missing)
                    rows = layout.loader.read(connection, where, stream=True, check=check)
                else:
                    rows, missing = read_first(
                        layout, connection, index, missing, most, check=check, descending=descending
                    )
            self._pause("loaded")
            # A refresh starts again if the coverage changes under it: fills would not let it end.
            with self._refreshing:
                store(rows, missing, lambda make: self._change(token, make, reader))
                self.counts.fills += 1
                self.counts.records_loaded += len(rows.records)
        finally:
            self._end(token)
        self._tell()

    def _change(self, token: int, make: Callable[[State], State], reader: object = None) -> None:
        """Replace records and coverage by what is made of them, whatever others do meanwhile."""
        while True:
            state = self._state
            made = make(state)
            with self._lock:
                if self._is_still(state):
                    self._apply(token, made, {}, reader)
                    return

    def evict(self, index: str, intervals: IntervalSet) -> None:
        """Give up records; those that the coverage of another index needs stay."""
        layout = self.set_up()
        pause = pauses(in_task=self._in_task)
        attempts = iter([pause])  # a second one is not to be interrupted: it would never end
        with self._loading:
            before = self._state.storage
            self.give_up(
                lambda state: evicted(layout, state, {index: intervals}, next(attempts, no_pause))
            )
            gone = dropped(before, len(before) - len(self._state.storage))
            del before
        self.observers.tell()
        let_go(gone, pause)

    def give_up(self, make: Callable[[State], tuple[State, int]]) -> None:
        """Replace the state by one that has less.

        :param make: returns it, and how many records it has less.
        """
        count = 0

        def less(state: State) -> State:
            nonlocal count
            made, count = make(state)
            return made

        token = self._begin()
        try:
            self._change(token, less)
        finally:
            self._end(token)
        self.counts.records_expired += count

    def clear(self) -> None:
        """Give up all records."""
        layout = self.set_up()
        with self._loading, self._lock:
            empty = layout.empty()
            gone = dropped(self._state.storage, len(self._state.storage))
            if not self._freshness.underway:
                self._freshness.forget()
            self.observers.stored(self._state.storage, empty, refreshed=False)
            self.history.applied(Coverage(), (), refreshed=False)
            self._set_state(State(empty, Coverage()))
            if self._ready.done():
                self._ready = new_future()
        self.observers.tell()
        let_go(gone, pauses(in_task=self._in_task))

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

    # -- figures --------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name of the view."""
        return self.plan.name

    @property
    def held_bytes(self) -> int:
        """What is held, in bytes: estimated, once for each storage."""
        storage = self._state.storage
        measured, size = self._measured
        if measured is None or measured() is not storage:
            size = stored_bytes(storage)
            self._measured = ref(storage), size  # not the storage: it would keep all records
        return size

    def yield_bytes(self, wanted: int, *, wait: bool) -> bool:
        """Give up what would be loaded again when it is needed."""
        return self.keeper is None or self.keeper.yield_bytes(wanted, wait=wait)

    def _tell_timers(self, what: str, seconds: float) -> None:
        for timer in self.timers:
            try:
                timer(self, what, seconds)
            except Exception:
                log.exception("view %s: a timer failed", self.plan.name)

    def _pause(self, point: str) -> None:
        """Do nothing; tests stop a refresh here."""
