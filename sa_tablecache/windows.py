"""Windows that slide with time: what :class:`.SlidingWindow` does to its view.

In: a clock. Out: loads of the difference between the last window and this one. What the clock says
becomes a score by the type of the column; see :class:`.SlidingWindow`.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable
from typing import Any, TypeAlias

from sqlalchemy import Date, DateTime, Float, Integer, Numeric

from .analysis import ViewPlan
from .comparison import Inexact
from .exc import NotExpressible
from .keeping import Clock, Keeper, age_clock, read_clock
from .scores import MAX, MIN, Cut, Interval, IntervalSet
from .state import State
from .table import CachedTable
from .view import ScoreIndex, ViewIndex

Span: TypeAlias = dt.timedelta | float
"""A length of time; or, of numbers, as many as that."""


def index_for(plan: ViewPlan, by: Any) -> str:
    """Return the name of the index along which a window slides.

    :param by: an index of the view, or a column with which one begins.
    :raises NotExpressible: if there is none; it says which one would do.
    """
    view = plan.view
    indexes = view.__indexes__
    if isinstance(by, ViewIndex) and by.view is view:
        return by.name
    if isinstance(by, ScoreIndex):
        for name, index in indexes.items():
            if index.declared is by:
                return name
    if isinstance(by, str) and by in indexes:
        return by
    column = by if isinstance(by, str) else None
    if getattr(by, "table", None) is view.__table__:
        column = by.name
    if column is None or column not in plan.by_name:
        raise NotExpressible(
            f"view {plan.name}: a SlidingWindow over {by!r}, which is no index and no column of "
            f"it; its indexes are {', '.join(indexes) or 'none'}"
        )
    leading = [i for i in indexes.values() if i.column_names[0] == column]
    if leading:
        return min(leading, key=lambda index: len(index.column_names)).name
    if plan.key[0] == column:
        return ""
    raise NotExpressible(
        f"view {plan.name}: a SlidingWindow over {column}, with which no index begins; add "
        f'by_{column} = ScoreIndex("{column}") to {view.__name__}'
    )


class Window(Keeper):
    """Keeps one view to a window.

    :param index: the name of the index.
    :param past: how far the window reaches back; infinite if it has no beginning.
    :param future: how far it reaches ahead; infinite if it has no end.
    :param every: seconds from one step to the next.
    :param staleness: seconds for which reads do without what came in since the last step.
    :param now: makes a score of the time, where the column's type does not say how.
    """

    def __init__(
        self,
        table: CachedTable,
        clock: Callable[[], Clock],
        index: str,
        *,
        past: Span,
        future: Span,
        every: float,
        staleness: float | None,
        now: Callable[[dt.datetime], Any] | None,
    ) -> None:
        self._table = table
        self._clock = clock
        self._index = index
        self._past = past
        self._future = future
        self._every = every
        self._staleness = staleness
        self._now = now
        self._stepped: tuple[Cut, float] | None = None
        """Where the last window ended, and when it was loaded."""

    def step(self) -> float:
        """Load what came in and expire what fell out; return the seconds until the next step.

        One SELECT for what came in, none if nothing did.
        """
        self._table.set_up()
        started = age_clock(self._clock())
        window = self.interval(read_clock(self._clock()))
        self._table.load(self._index, IntervalSet([window]))
        self._stepped = window.upper, started
        return self._every

    def lent(self, state: State) -> State:
        """Return the state with what came in since the last step counted as covered."""
        if self._staleness is None or self._stepped is None:
            return state
        ended, at = self._stepped
        clock = self._clock()
        if age_clock(clock) - at > self._staleness or not state.coverage:
            return state
        sliver = Interval(ended, self.interval(read_clock(clock)).upper)
        covered = state.coverage.of(self._index)
        if not sliver.lower < sliver.upper or not any(i.upper == ended for i in covered):
            return state
        coverage = state.coverage.plus(self._index, IntervalSet([sliver]))
        return State(state.storage, coverage, state.stale)

    def interval(self, now: dt.datetime) -> Interval:
        """Return the window of a time: from ``now - past`` to ``now + future``, both included.

        :raises NotExpressible: if the column cannot be compared with a time.
        """
        lower = self._cut(now, self._past, -1)
        upper = self._cut(now, self._future, 1)
        return Interval(
            (MIN,) if lower is None else (lower, MIN), (MAX,) if upper is None else (upper, MAX)
        )

    def _cut(self, now: dt.datetime, span: Span, sign: int) -> Any:
        """Return the score at one end of the window, ``None`` for no end."""
        if span in (dt.timedelta.max, math.inf):
            return None
        layout = self._table.set_up()
        part = layout.orders[self._index].parts[0]
        how = layout.columns.comparisons[part.name]
        plan = layout.plan
        type_ = plan.column(part.name).clause.type
        if not how.order or part.hashed:
            raise NotExpressible(
                f"view {plan.name}: a SlidingWindow over {part.name}: "
                f"{how.reason or 'no order that Python knows'}"
            )
        try:
            if self._now is not None:
                score = self._now(now)
                score = score + sign * span if span else score
            elif isinstance(type_, DateTime):
                moment = now if type_.timezone else now.replace(tzinfo=None)
                score = moment + sign * _time(span)
            elif isinstance(type_, Date):
                score = (now + sign * _time(span)).date()
            elif isinstance(type_, Integer | Float | Numeric):
                seconds = span.total_seconds() if isinstance(span, dt.timedelta) else span
                stamp = now.timestamp() + sign * seconds
                score = stamp if isinstance(type_, Float) else math.floor(stamp)
            else:
                raise TypeError(f"a time is no {type_!r}: say now=, which makes a score of it")
            return how.parameter(score)
        except OverflowError:
            return None  # beyond the first or the last day of the calendar
        except (TypeError, Inexact) as error:
            raise NotExpressible(
                f"view {plan.name}: a SlidingWindow over {part.name}, of type {type_!r}: {error}"
            ) from error


def _time(span: Span) -> dt.timedelta:
    """Return a length of time.

    :raises TypeError: if it is a number, and nobody knows of what.
    """
    if not isinstance(span, dt.timedelta):
        if not span:
            return dt.timedelta()
        raise TypeError(f"past and future have to be timedeltas, and {span!r} is none")
    return span
