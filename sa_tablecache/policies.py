"""Policies: which records of a view are kept, and by whom.

A policy is declared on the view, as ``__policy__``, or given to :meth:`.TableCache.add`. It is only
a description; what it does for one view of one cache is done by the upkeep of the cache, in the
background once that is started, and by :meth:`.TableCache.step` when you say so.
"""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from .analysis import ViewPlan
from .exc import MemoryLimitExceeded, TableCacheError
from .keeping import Clock, Keeper, age_clock
from .readthrough import ReadRanges
from .scores import EVERYTHING
from .table import CachedTable, Guard
from .upkeep import Step
from .windows import Span, Window, index_for

REFUSED_SECONDS = 300.0
"""How long :class:`Everything` does not try again what passed the memory limit."""

Clocked: TypeAlias = Callable[[], Clock]
"""Gives the clock of a cache, which may be exchanged."""


class Kept(NamedTuple):
    """What a policy does for one view of one cache."""

    step: Step | None = None
    """What the upkeep runs."""
    keeper: Keeper | None = None
    guard: Guard | None = None
    rereads: bool = True


class Policy:
    """Base class of the policies."""

    def check(self, plan: ViewPlan) -> None:
        """Refuse a view that the policy cannot keep.

        :raises NotExpressible: if no index of the view serves.
        """

    def keep(self, table: CachedTable, clock: Clocked) -> Kept:
        """Return what is to be done for one view of one cache."""
        return Kept()


@dataclass(frozen=True)
class Manual(Policy):
    """Keep what :meth:`.TableCache.load` and the like say: the default."""


@dataclass(frozen=True)
class Everything(Policy):
    """Keep all records of the view: loaded when the upkeep starts, and again after ``clear()``.

    ::

        cache.add(Airports, policy=Everything())

    One SELECT; with ``chunk`` one for so many records, see :meth:`.TableCache.load`.

    :param chunk: how many records to load at a time; ``None`` for all at once.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        check_number("chunk", self.chunk)

    def keep(self, table: CachedTable, clock: Clocked) -> Kept:
        """Load all of the view."""
        refused: tuple[float, MemoryLimitExceeded] | None = None

        def step() -> None:
            nonlocal refused
            if table.state.coverage.everything:
                return
            if refused is not None and time.monotonic() < refused[0]:
                raise refused[1]  # it is not read again just to find that out
            try:
                table.load_chunks("", EVERYTHING, self.chunk)
            except MemoryLimitExceeded as error:
                refused = time.monotonic() + REFUSED_SECONDS, error
                raise
            refused = None

        return Kept(step)


@dataclass(frozen=True)
class SlidingWindow(Policy):
    """Keep the records around now, by time.

    Each step loads what came in since the last one and expires what fell out: one SELECT for what
    came in, none for the rest. Reads up to *now* between two steps have what is missing fetched and
    merged (a partial hit); with ``staleness`` they do without it.

    ::

        cache.add(FlightBoard, policy=SlidingWindow("time_hour", past=timedelta(days=7)))

    The clock (``cache.clock``, UTC) becomes a score by the type of the column: a datetime with time
    zone is compared as it is, one without is taken to be in UTC, a date to be of UTC, and a number
    to count seconds since 1970. For anything else say ``now``, which makes a score of an aware
    datetime; ``past`` and ``future`` are then what can be subtracted from it and added to it::

        def in_berlin(utc):
            return utc.astimezone(ZoneInfo("Europe/Berlin")).replace(tzinfo=None)

        SlidingWindow("local_time", past=timedelta(hours=8), now=in_berlin)
        SlidingWindow("epoch_ms", past=86_400_000, now=lambda utc: int(utc.timestamp() * 1000))

    The window is what is covered: what was loaded otherwise is expired by the next step.

    :param by: an index of the view or its name, or a column (or its name) with which an index
        begins.
    :param past: how far the window reaches back. ``timedelta.max``: to the beginning.
    :param future: how far it reaches ahead. ``timedelta.max``: no end, which is what reads
        without an upper bound need.
    :param every: from one step to the next; by default a hundredth of the window, between one
        second and one minute.
    :param staleness: for how long after a step reads do without records that came in since.
    :param now: makes a score of the time.
    :raises TableCacheError: if a duration is negative, or the window is empty.
    """

    by: Any
    past: Span = dt.timedelta()
    future: Span = dt.timedelta()
    every: dt.timedelta | None = None
    staleness: dt.timedelta | None = None
    now: Callable[[dt.datetime], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("past", "future"):
            span: Any = getattr(self, name)
            if not isinstance(span, dt.timedelta | int | float) or isinstance(span, bool):
                raise TableCacheError(
                    f"SlidingWindow: {name}={span!r} is no length of time: give a timedelta"
                )
            negative = span < dt.timedelta() if isinstance(span, dt.timedelta) else not span >= 0
            if negative:  # or a NaN
                raise TableCacheError(
                    f"SlidingWindow: {name}={span!r} is negative: past reaches back from now, and "
                    "future ahead of it, each as a positive length"
                )
        if not self.past and not self.future:
            raise TableCacheError(
                "SlidingWindow: past and future are both zero, so that the window holds nothing: "
                "give one of them, such as past=timedelta(days=7)"
            )
        check_time("SlidingWindow: every", self.every)
        check_time("SlidingWindow: staleness", self.staleness)

    @property
    def seconds(self) -> float:
        """How long to wait between two steps."""
        if self.every is not None:
            return self.every.total_seconds()
        width = 0.0
        for span in (self.past, self.future):
            if self.now is not None or span in (dt.timedelta.max, math.inf):
                width = math.inf
            else:
                width += span.total_seconds() if isinstance(span, dt.timedelta) else span
        return min(60.0, max(1.0, width / 100))

    def check(self, plan: ViewPlan) -> None:
        """Refuse a view without an index for the window."""
        index_for(plan, self.by)

    def keep(self, table: CachedTable, clock: Clocked) -> Kept:
        """Slide along the index."""
        window = Window(
            table,
            clock,
            index_for(table.plan, self.by),
            past=self.past,
            future=self.future,
            every=self.seconds,
            staleness=None if self.staleness is None else self.staleness.total_seconds(),
            now=self.now,
        )
        return Kept(window.step, None if self.staleness is None else window)


@dataclass(frozen=True)
class ReadThrough(Policy):
    """Keep what was read, as long as there is room.

    A read that is not covered loads what is missing of the range of the index that it uses, with
    one SELECT, however many ask for the same at once; from then on it is covered, like anything
    that was loaded. Reads by key, or by equality on an index, are remembered as well, and so is
    that there was nothing. A read with a LIMIT in the order of an index loads no more than that.

    ::

        cache.add(FlightBoard, policy=ReadThrough(max_records=100_000))

    Where there is no room, the ranges that were used least recently leave. A read of more than fits
    is answered by the database and not stored, and so is one that says :func:`.no_store`, one that
    no index serves, and one that has to be answered by the database anyway. While ranges leave
    without ever being used again, only what is missed twice is loaded. What a mark of the whole
    view concerns is given up instead of being read again.

    :param max_records: how many records to keep; as many ranges, too.
    :param max_bytes: how many bytes to keep, estimated; ``memory_limit`` of the cache holds, too.
    :param ttl: how long a range is kept after it was loaded.
    :raises TableCacheError: if a limit is not positive.
    """

    max_records: int | None = None
    max_bytes: int | None = None
    ttl: dt.timedelta | None = None

    def __post_init__(self) -> None:
        check_number("ReadThrough: max_records", self.max_records)
        check_number("ReadThrough: max_bytes", self.max_bytes)
        check_time("ReadThrough: ttl", self.ttl)

    def keep(self, table: CachedTable, clock: Clocked) -> Kept:
        """Keep ranges."""
        ranges = ReadRanges(
            table,
            lambda: age_clock(clock()),
            max_records=self.max_records,
            max_bytes=self.max_bytes,
            ttl=None if self.ttl is None else self.ttl.total_seconds(),
        )
        guard = None if self.ttl is None else ranges.guard
        return Kept(ranges.step, ranges, guard, rereads=False)


def policy_of(plan: ViewPlan, given: Any) -> Policy:
    """Return the policy of a view: what was given, what it declares, or :class:`Manual`.

    :raises TableCacheError: if that is none, or cannot keep the view.
    """
    policy = given if given is not None else plan.view.__policy__
    if policy is None:
        return Manual()
    if not isinstance(policy, Policy):
        hint = f"{policy.__name__}()" if isinstance(policy, type) else "Everything() or the like"
        raise TableCacheError(f"view {plan.name}: {policy!r} is no policy: give {hint}")
    policy.check(plan)
    return policy


def check_number(name: str, value: Any) -> None:
    """Refuse what is no positive number.

    :raises TableCacheError: for that.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise TableCacheError(f"{name}={value!r} is no positive number")


def check_time(name: str, value: Any) -> None:
    """Refuse what is no positive length of time.

    :raises TableCacheError: for that.
    """
    if value is not None and not (isinstance(value, dt.timedelta) and value > dt.timedelta()):
        raise TableCacheError(f"{name}={value!r} is no positive timedelta")
