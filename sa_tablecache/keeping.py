"""Where a policy meets the reads of its view: the seam between them.

In: reads that were answered from storage, or could not be. Out: what a policy does about that. A
view whose policy wants to know of no read has no :class:`Keeper`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TypeAlias

from .exc import TableCacheError
from .layout import Layout
from .planner import Question
from .scores import Interval, IntervalSet
from .state import State

Clock: TypeAlias = Callable[[], datetime]
"""Says what time it is, with a time zone."""


def utc_now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


def read_clock(clock: Clock) -> datetime:
    """Return the time of a clock in UTC.

    :raises TableCacheError: if it does not say in which zone.
    """
    now = clock()
    if now.tzinfo is None:
        raise TableCacheError(
            f"cache.clock returned {now!r}, which says no time zone: return datetime.now(UTC) or "
            "the like"
        )
    return now.astimezone(UTC)


def age_clock(clock: Clock) -> float:
    """Return a time in seconds, from which ages are made: that of a given clock, else monotonic."""
    return time.monotonic() if clock is utc_now else read_clock(clock).timestamp()


class Keeper:
    """What a policy does about reads; this one does nothing."""

    fills = False
    """Whether misses are loaded."""

    def lent(self, state: State) -> State:
        """Return the state with what readers may do without counted as covered."""
        return state

    def used(self, index: str, intervals: Iterable[Interval]) -> None:
        """Note that a read was answered from intervals of an index."""

    def fill(
        self,
        index: str,
        intervals: IntervalSet,
        *,
        most: int | None = None,
        descending: bool = False,
    ) -> bool:
        """Load what is missing of intervals; say whether it is worth asking storage again.

        :param most: load the first so many records only.
        :param descending: the last ones instead.
        """
        return False

    def fill_for(self, layout: Layout, question: Question, state: State) -> bool:
        """Load what a question needs; say whether it is worth asking storage again."""
        return False

    def trim(self) -> None:
        """Give up what is more than the policy allows."""

    def yield_bytes(self, wanted: int, *, wait: bool) -> bool:
        """Give up so many bytes, if what is given up would be loaded again when it is needed.

        :param wait: whether to wait for a refresh that is under way.
        :returns: whether there was nothing to wait for.
        """
        return True

    def after_fork(self, *, intact: bool) -> None:
        """In a forked child: forget what the parent's threads were doing.

        :param intact: whether none of them was changing the records.
        """

    def _check(self) -> None:
        """Assert the invariants."""
