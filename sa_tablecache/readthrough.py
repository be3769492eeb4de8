"""Ranges that reads have filled: what :class:`.ReadThrough` keeps, and for how long.

In: reads that storage could not answer, and those that it could. Out: fills of what they asked for,
one for all who ask for the same at once; and, where there is no room, the least recently used
ranges given up.

The coverage of the table says what is in storage, and nothing here does: ranges only remember when
each part of it was loaded and used. Where others have changed the coverage (a load, an eviction, a
mark of the whole view), the ranges are made to follow it.

A hit costs one append to a queue of bounded length, which is looked at when there is something to
give up. Ranges are kept and given up while the turn of refreshes is held: one at a time does.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeAlias

from .answering import loadable_candidate
from .coverage import Coverage
from .exc import one_line
from .figures import Reason
from .keeping import Keeper
from .layout import Layout
from .loads import evicted
from .planner import Question
from .redaction import shown_intervals
from .remembered import Range, Ranges
from .replacing import loaded
from .room import Room, by_index
from .rows import Rows
from .scores import Interval, IntervalSet
from .state import State
from .table import CachedTable
from .turns import Section, new_future, wait_for

log = logging.getLogger(__name__)

MOST_FILLS = 8
"""Fills under way at a time; further misses are left to the database alone."""

MOST_USES = 4_096
"""Hits that are remembered until something has to be given up."""

REFUSED_SECONDS = 60.0
"""How long something that was too large is not read again for the storage."""

WASTE = 64
"""Of so many ranges given up it is known whether they had been used at all."""
WASTED = 58
"""With more than this many of those in vain, only what is missed twice is loaded."""
MOST_MISSED = 4_096
"""So many misses are remembered then."""


class TooLarge(Exception):
    """What was read is more than there is room for; never leaves the package."""


Change: TypeAlias = Callable[[Callable[[State], State]], None]


class _Fill:
    """A fill under way, for those who want the same."""

    def __init__(self, index: str, intervals: IntervalSet, asked: Any, *, whole: bool) -> None:
        self.index = index
        self.intervals = intervals
        self.asked = asked
        self.whole = whole
        """Whether all of the intervals will be there; else the first records of them."""
        self.done: Future[bool | None] = new_future()
        """Whether it was stored; ``None`` if the one who read was cancelled."""


class ReadRanges(Keeper):
    """Keeps the ranges of one view that were read.

    :param clock: says the age of ranges, in seconds.
    :param ttl: in seconds.
    """

    fills = True

    def __init__(
        self,
        table: CachedTable,
        clock: Callable[[], float],
        *,
        max_records: int | None,
        max_bytes: int | None,
        ttl: float | None,
    ) -> None:
        self._table = table
        self._clock = clock
        self._room = Room(table, max_records, max_bytes)
        self._ttl = ttl
        self._lock = Section()
        self._fills: list[_Fill] = []
        self._refused: OrderedDict[Any, float] = OrderedDict()
        self._uses: deque[tuple[str, Iterable[Interval]]] = deque(maxlen=MOST_USES)
        self._ranges = Ranges()
        self._seen = Coverage()
        """The coverage that the ranges are those of."""
        self._due: float | None = None
        """When the oldest range becomes too old."""
        self._wasted: deque[bool] = deque(maxlen=WASTE)
        self._thrashing = False
        self._missed: OrderedDict[Any, None] = OrderedDict()

    # -- reads ----------------------------------------------------------------------------------

    def used(self, index: str, intervals: Iterable[Interval]) -> None:
        """Note that a read was answered from intervals of an index: O(1)."""
        self._uses.append((index, intervals))

    def fill_for(self, layout: Layout, question: Question, state: State) -> bool:
        """Load what a question needs, by the index that needs the least; see :meth:`fill`.

        :raises Inexact: if storage could not give the answer even then.
        """
        best = loadable_candidate(layout, question)
        if best is None:
            return False
        candidate, most, descending = best
        return self.fill(candidate.index, candidate.intervals, most=most, descending=descending)

    def fill(
        self,
        index: str,
        intervals: IntervalSet,
        *,
        most: int | None = None,
        descending: bool = False,
    ) -> bool:
        """Load what is missing of intervals; say whether it is worth asking storage again.

        One SELECT, and none by those who ask for the same meanwhile: they wait for it.
        """
        if most == 0:
            return False
        asked = index, intervals, most, descending
        missing = self._table.state.coverage.missing(index, intervals)
        if not missing:
            return True
        if self._is_unbounded(index, intervals, most) or self._is_refused(asked):
            return False
        with self._lock:
            others = []
            for fill in self._fills:
                if fill.index != index:
                    continue
                if fill.asked == asked:
                    others, missing = [fill], IntervalSet()
                    break
                if fill.whole and most is None and missing & fill.intervals:
                    others.append(fill)
                    missing -= fill.intervals
            mine = None
            if missing:
                if len(self._fills) >= MOST_FILLS or self._is_skipped(asked):
                    return False
                mine = _Fill(index, missing, asked, whole=most is None)
                self._fills.append(mine)
        stored = mine is None or self._load(mine, most, descending)
        for fill in others:
            wait_for(fill.done, in_task=self._table._in_task)
            stored = fill.done.result() is not False and stored
        return stored

    def _is_unbounded(self, index: str, intervals: IntervalSet, most: int | None) -> bool:
        """Whether all of the view would be loaded, and nothing says how much that may be."""
        return intervals.is_everything and most is None and not self._room.is_limited

    def _is_refused(self, asked: Any) -> bool:
        """Whether the same was found to be too large a short time ago."""
        with self._lock:
            until = self._refused.get(asked)
        return until is not None and time.monotonic() < until

    def _is_skipped(self, asked: Any) -> bool:
        """Whether a miss is not loaded because it would be in vain, as the last ones were."""
        if not self._thrashing:
            return False
        if asked in self._missed:
            del self._missed[asked]
            return False
        self._missed[asked] = None
        if len(self._missed) > MOST_MISSED:
            self._missed.popitem(last=False)
        return True

    def _load(self, fill: _Fill, most: int | None, descending: bool) -> bool:
        """Load a fill and store it; say whether it is stored."""
        began = self._clock()
        stored: bool | None = None

        def check(rows: Rows, _: bool) -> None:
            if len(rows.records) > self._room.allowed(rows):
                raise TooLarge

        def store(rows: Rows, part: IntervalSet, change: Change) -> None:
            self._store(fill.index, part, rows, change, began)

        try:
            self._table.fill(
                fill.index, fill.intervals, store, check, most=most, descending=descending
            )
            stored = True
        except TooLarge:
            stored = False
            with self._lock:
                self._refused[fill.asked] = time.monotonic() + REFUSED_SECONDS
                while len(self._refused) > 256:
                    self._refused.popitem(last=False)
            log.debug(
                "view %s: a read of %s is larger than what may be stored",
                self._table.name, shown_intervals(self._table.plan, fill.index, fill.intervals),
            )  # fmt: skip
        except Exception as error:
            stored = False
            log.warning(
                "view %s: what a read missed was not loaded: %s", self._table.name, one_line(error)
            )
        finally:
            with self._lock:
                self._fills.remove(fill)
            fill.done.set_result(stored)
        return stored

    # -- room ------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Put the ranges into the order in which they were used."""
        while True:
            try:
                index, intervals = self._uses.popleft()
            except IndexError:
                return
            for interval in intervals:
                self._ranges.use(index, interval)

    def _follow(self, coverage: Coverage) -> None:
        if coverage is not self._seen:
            self._ranges.follow(coverage, self._clock())
            self._seen = coverage
            self._note_due()

    def _note_due(self) -> None:
        if self._ttl is not None:
            oldest = self._ranges.oldest()
            self._due = None if oldest is None else oldest + self._ttl

    def _store(
        self, index: str, part: IntervalSet, rows: Rows, change: Change, began: float
    ) -> None:
        """Store what was read, in the place of what was used least recently."""
        layout = self._table.layout
        assert layout is not None
        self._room.measure(len(self._ranges))
        victims: list[Range] = []
        made: State | None = None
        new = IntervalSet()

        def replaced(state: State) -> State:
            nonlocal victims, made, new
            self._follow(state.coverage)
            self._drain()
            records, allowed = len(rows.records), self._room.allowed(rows)
            if records > allowed:
                raise TooLarge
            smaller, victims = self._room.make(
                layout, state, self._ranges, allowed=allowed, records=records, new=len(part)
            )
            storage, _ = loaded(layout, smaller.storage, rows, index, part, extend=True)
            new = smaller.coverage.missing(index, part)
            made = State(storage, smaller.coverage.plus(index, part))
            return made

        change(replaced)
        assert made is not None
        self._gave_up(victims)
        if made.coverage.everything:  # whatever had been loaded by other indexes
            self._ranges.follow(made.coverage, began)
        else:
            self._ranges.add(index, new, began)
        self._seen = made.coverage
        self._note_due()

    def _gave_up(self, victims: Iterable[Range]) -> None:
        """Forget ranges that had to go, and notice if they were there in vain."""
        for victim in victims:
            self._ranges.remove(victim)
            self._wasted.append(not victim.used)
            self._table.counts.ranges_evicted += 1
        thrashing = len(self._wasted) == WASTE and sum(self._wasted) > WASTED
        if thrashing and not self._thrashing:
            log.warning(
                "view %s: of the last %d ranges that ReadThrough gave up, %d had never been used "
                "again; until that changes, what is missed is loaded the second time: raise "
                "max_records or max_bytes, or have what is read only once say no_store()",
                self._table.name, WASTE, sum(self._wasted),
            )  # fmt: skip
        self._thrashing = thrashing

    def _give_up(
        self,
        choose: Callable[[State], tuple[State, list[Range]]],
        *,
        counts: bool = False,
        wait: bool = True,
    ) -> bool:
        """Give up some ranges; say whether that was possible now.

        :param counts: whether it is for want of room.
        :param wait: whether to wait for a refresh that is under way.
        """
        table = self._table
        if wait:
            table._refreshing.__enter__()
        elif not table._refreshing.try_enter():
            return False
        victims: list[Range] = []
        made: State | None = None

        def less(state: State) -> tuple[State, int]:
            nonlocal victims, made
            self._follow(state.coverage)
            self._drain()
            made, victims = choose(state)
            return made, len(state.storage) - len(made.storage)

        try:
            table.give_up(less)
            assert made is not None
            if counts:
                self._gave_up(victims)
            else:
                for victim in victims:
                    self._ranges.remove(victim)
            self._seen = made.coverage
            self._note_due()
        finally:
            table._refreshing.leave()
        table.observers.tell()
        return True

    def trim(self) -> None:
        """Give up what is more than the limits allow, after records were inserted, say."""
        layout = self._table.layout
        if layout is None or len(self._table.state.storage) <= self._room.allowed():
            return
        self._room.measure(len(self._ranges))
        allowed = self._room.allowed()
        self._give_up(
            lambda state: self._room.make(layout, state, self._ranges, allowed=allowed), counts=True
        )

    def yield_bytes(self, wanted: int, *, wait: bool) -> bool:
        """Give up so many bytes, least recently used first."""
        layout = self._table.layout
        if layout is None or not len(self._table.state.storage):
            return True
        self._room.measure(len(self._ranges))
        fewer = len(self._table.state.storage) - self._room.records_in(wanted) - 1
        return self._give_up(
            lambda state: self._room.make(layout, state, self._ranges, allowed=max(0, fewer)),
            wait=wait,
        )

    # -- age ------------------------------------------------------------------------------------

    def guard(self, _: Any, __: Any, ___: Any, fetch: bool) -> str | None:
        """Give up what is too old, before a read; a guard of the table."""
        if self._due is None or self._clock() < self._due:
            return None
        if not fetch:
            return Reason("coverage", "ranges are older than their ttl")
        self.expire()
        return None

    def expire(self) -> None:
        """Give up what is older than the ttl."""
        layout, ttl = self._table.layout, self._ttl
        if layout is None or ttl is None:
            return

        def younger(state: State) -> tuple[State, list[Range]]:
            victims = self._ranges.older(self._clock() - ttl)
            return evicted(layout, state, by_index(victims))[0], victims

        self._give_up(younger)

    def step(self) -> float | None:
        """Give up what is too old or too much; return the seconds until something will be."""
        if self._ttl is not None:
            self.expire()
        self.trim()
        if self._due is None:
            return 60.0
        return min(60.0, max(0.1, self._due - self._clock()))

    def after_fork(self, *, intact: bool) -> None:
        """In a forked child: forget what the parent's threads were reading."""
        self._lock = Section()
        self._fills = []
        self._uses = deque(maxlen=MOST_USES)
        if not intact:
            self._ranges, self._seen, self._due = Ranges(), Coverage(), None

    def _check(self) -> None:
        """Assert the invariants of the ranges, and that they are those of the coverage."""
        with self._table._refreshing:
            self._ranges._check()
            for index, intervals in self._seen.sets.items():
                assert self._ranges.of(index) == intervals, index
            assert {r.index for r in self._ranges} <= set(self._seen.sets)
        with self._lock:
            assert all(not fill.done.done() for fill in self._fills)
