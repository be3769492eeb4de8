"""Why a record is what it is: when it was loaded, marked and refreshed, and because of what.

In: a view and a primary key. Out: a :class:`Why`. Asks nobody but memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from .analysis import table_label
from .changes import UNREAD, VIEW, AnyMark, GroupMark, Mark
from .comparison import Inexact
from .exc import CriteriaError
from .history import MOST_LOADS
from .layout import Layout
from .orders import Hidden, Record
from .redaction import is_redacted, shown_key
from .scores import IntervalSet
from .settings import REDACTED
from .storage import Storage
from .table import CachedTable


@dataclass(frozen=True, slots=True)
class Why:
    """What is known of one record of a view. Times are aware, in UTC."""

    view: str
    key: str
    record: Any = None
    """The record as it is stored, marked or not; ``None`` if it is not."""
    covered: bool = False
    """Whether it is covered: then it does not exist if it is not stored, unless it is marked."""
    loaded: datetime | None = None
    """When it was loaded; ``None`` if it is not stored, or that is not remembered any more."""
    marked: datetime | None = None
    """From when the oldest mark counts that concerns it, or may bring it."""
    marks: tuple[str, ...] = ()
    """What made these marks: base rows that were written, groups, or the whole view."""
    refreshed: datetime | None = None
    """When it, or what may have been it, was read again last."""
    because: tuple[str, ...] = ()
    """What had been marked then, of what concerns it."""

    def __str__(self) -> str:
        lines = [f"{self.view} {self.key}"]
        if self.record is not None:
            lines.append(f"  stored     {self.record!r}")
        else:
            lines.append("  stored     no, " + ("and covered" if self.covered else "not covered"))
        if self.record is not None:
            lines.append(f"  loaded     {self.loaded or 'longer ago than is remembered'}")
        if self.marked is not None:
            lines.append(f"  marked     {self.marked}, by {', '.join(self.marks)}")
        if self.refreshed is not None:
            lines.append(f"  refreshed  {self.refreshed}, after {', '.join(self.because)}")
        return "\n".join(lines)


MOST_SHOWN = 10


def why(table: CachedTable, key: Any) -> Why:
    """Return what is known of the record with a primary key.

    :raises CriteriaError: for what is no key of the view.
    """
    plan, layout = table.plan, table.layout
    values = key if isinstance(key, tuple) and len(plan.key) > 1 else (key,)
    if len(values) != len(plan.key):
        raise CriteriaError(
            f"a key of {len(values)} value(s) is no primary key of {table.view.__name__}, which is "
            f"({', '.join(plan.key)})"
        )
    shown = shown_key(plan, plan.key, values)
    if layout is None:
        return Why(table.view.__name__, shown)
    comparisons = layout.columns.comparisons
    try:
        exact = tuple(
            v if v is None else comparisons[n].parameter(v)
            for n, v in zip(plan.key, values, strict=True)
        )
    except Inexact as reason:
        raise CriteriaError(f"{shown} is no key of {table.view.__name__}: {reason}") from None
    with table._lock:
        state = table.state
        pending = {m: table._freshness.since(m) for m in table._freshness.pending}
        loads, refreshes = list(table.history.loads), list(table.history.refreshes)
    found = state.storage.get(exact)
    subject = _Subject(layout, state.storage, found)
    marks = {m: since for m, since in pending.items() if subject.is_concerned(m)}
    oldest = min((s for s in marks.values() if s is not None), default=None)
    last = next((r for r in reversed(refreshes) if subject.was_read(r.marks)), None)
    return Why(
        table.view.__name__,
        shown,
        record=None if found is None else layout.given([found[0]])[0],
        covered=found is not None
        or state.coverage.covers("", IntervalSet([layout.orders[""].prefix(exact)])),
        loaded=subject.loaded(loads),
        marked=None
        if oldest is None
        else datetime.now(UTC) - timedelta(seconds=time.monotonic() - oldest),
        marks=_told(layout, marks),
        refreshed=None if last is None else last.at,
        because=()
        if last is None
        else ("more than is remembered",)
        if last.marks is None
        else _told(layout, filter(subject.is_concerned, last.marks)),
    )


class _Subject:
    """A record, or one that is not stored."""

    def __init__(
        self, layout: Layout, storage: Storage, found: tuple[Record, Hidden | None] | None
    ) -> None:
        self._layout = layout
        self._storage = storage
        self._found = found

    def is_concerned(self, mark: AnyMark) -> bool:
        """Whether a mark is about the record, or may be about one that is not stored."""
        if mark in (VIEW, UNREAD):
            return True
        if self._found is None:
            return mark.moves
        record, hidden = self._found
        if isinstance(mark, Mark):
            layout = self._layout
            return any(
                any(r is record for r in layout.records_of(self._storage, leaf, [mark.key]))
                for leaf in layout.plan.leaves
                if leaf.table == mark.table
            )
        if isinstance(mark, GroupMark):
            named = zip(mark.names, mark.values, strict=True)
            return all(getattr(record, name, value) == value for name, value in named)
        key = self._layout.orders[mark.index].key_of(record, hidden)
        return key in IntervalSet([mark.interval])

    def was_read(self, marks: Iterable[AnyMark] | None) -> bool:
        """Whether a refresh of marks has read the record again."""
        return marks is None or any(map(self.is_concerned, marks))

    def loaded(self, loads: list[Any]) -> datetime | None:
        """Return when the record came to be covered, and has been since."""
        when = None
        for at, coverage in reversed(loads):
            if self._found is None or not self._layout.is_covered(coverage, *self._found):
                return when
            when = at
        # The load that covered it first may be forgotten, if some are.
        return when if len(loads) < MOST_LOADS else None


def _told(layout: Layout, marks: Iterable[AnyMark]) -> tuple[str, ...]:
    """Return what marks are about, as it may be shown."""
    told = []
    for number, mark in enumerate(marks):
        if number == MOST_SHOWN:
            told.append("others")
            break
        told.append(_shown(layout, mark))
    return tuple(told)


def _shown(layout: Layout, mark: AnyMark) -> str:
    plan = layout.plan
    if mark == VIEW:
        return "a mark of the whole view"
    if mark == UNREAD:
        return "what the change feed has not told yet"
    if isinstance(mark, Mark):
        leaves = [leaf for leaf in plan.leaves if leaf.table == mark.table]
        names = [name for leaf in leaves for name in (*(leaf.visible or ()), *leaf.hidden)]
        key = REDACTED if is_redacted(plan, names) else repr(mark.key)
        return f"{table_label(mark.table)} {key}"
    if isinstance(mark, GroupMark):
        return f"the group {shown_key(plan, mark.names, mark.values)}"
    return f"a range of {mark.index or 'the primary key'}"
