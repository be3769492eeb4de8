"""Observers: functions of the application that are told what happened to the records of a view.

In: what loads, refreshes and commits did, noted in the order in which it became visible, inside of
the sections that made it so. Out: calls of listeners, outside of all locks, in that order. They
listen as SQLAlchemy's own listeners do::

    @event.listens_for(FlightBoard, "after_refresh")
    def push(view, added, changed, removed): ...

Listeners of a base class hear of all views that are derived from it; those of :class:`.CachedView`
of all views. Nothing is worked out for events to which nobody listens.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.event.registry import EventTarget

from .analysis import ViewPlan, table_label
from .changes import AnyMark, Mark
from .storage import Storage
from .view import CachedView, ViewMeta

log = logging.getLogger(__name__)

KeyOf = Callable[[Any], tuple[Any, ...]]
Rows = Mapping[str, frozenset[tuple[Any, ...]]]
"""Primary keys of rows, by table."""


class Hub(EventTarget):
    """What carries the listeners of a view, whose class cannot have a dispatch of its own."""

    dispatch: Any


_hubs: Final[WeakKeyDictionary[type, Hub]] = WeakKeyDictionary()


class ViewEvents(event.Events[Hub]):
    """Events of cached views, for :func:`sqlalchemy.event.listen`.

    Listeners are called by whoever loaded, refreshed or committed, after the change is there to be
    read, one event after another; if two threads change a view, one of them calls them for both.
    One that raises is logged, and harms neither the cache nor the other listeners. It is called in
    the middle of other work: it is not to use that work's session, and to leave to others what
    takes long.
    """

    _target_class_doc = "FlightBoard"
    _dispatch_target = Hub

    @staticmethod
    def _accept_with(target: Any, identifier: str) -> Any:
        if isinstance(target, ViewMeta) and issubclass(target, CachedView):
            hub = _hubs.get(target)
            if hub is None:
                hub = _hubs.setdefault(target, Hub())
            return hub
        return None

    def after_load(
        self, view: type[CachedView], loaded: list[CachedView], expired: list[CachedView]
    ) -> None:
        """Records came or went because of what is to be covered: by load, extend, evict, clear.

        :param loaded: the records that came; and those that were there, and found to be others.
        :param expired: those that went.
        """

    def after_refresh(
        self,
        view: type[CachedView],
        added: list[CachedView],
        changed: list[tuple[CachedView, CachedView]],
        removed: list[CachedView],
    ) -> None:
        """What was marked has been read again, and some of it was not what it had been.

        :param added: records with primary keys that were not there before.
        :param changed: pairs of what a record was and what it is.
        :param removed: records whose primary keys are not there any more.
        """

    def invalidated(self, view: type[CachedView], rows: Rows | None) -> None:
        """Records were marked: they will be read again.

        :param rows: the primary keys of the base rows from which they were made, by table;
            ``None`` if any record may be concerned. A row may have been written that no record is
            made from.
        """


def listeners(view: type[CachedView], name: str) -> list[Callable[..., object]]:
    """Return who listens to an event of a view, those of its base classes first."""
    if not _hubs:
        return []
    hubs = (_hubs.get(base) for base in reversed(view.__mro__))
    return [f for hub in hubs if hub is not None for f in getattr(hub.dispatch, name)]


class Observers:
    """The events of one table of records that listeners have not been told of yet.

    :param given: makes of stored records those that a reader is given.
    """

    def __init__(self, plan: ViewPlan, given: Callable[[list[Any]], list[Any]]) -> None:
        self._view = plan.view
        self._given = given
        self._key_of = plan.key_tuple
        self.after_fork()

    def after_fork(self) -> None:
        """Forget what was noted in the parent process, and who was telling it."""
        self._noted: deque[tuple[str, Callable[[], tuple[Any, ...] | None]]] = deque()
        self._telling = Lock()

    # -- noting: in the section that makes it visible --------------------------------------------

    def stored(self, before: Storage, after: Storage, *, refreshed: bool) -> None:
        """Note that the records are others, if somebody listens."""
        name = "after_refresh" if refreshed else "after_load"
        if before is not after and listeners(self._view, name):
            work_out = _refreshed if refreshed else _loaded
            self._noted.append((name, lambda: work_out(before, after, self._key_of)))

    def marked(self, marks: Iterable[AnyMark]) -> None:
        """Note that records were marked, if somebody listens."""
        if marks and listeners(self._view, "invalidated"):
            self._noted.append(("invalidated", lambda: (rows_of(marks),)))

    # -- telling: outside ------------------------------------------------------------------------

    def tell(self) -> None:
        """Tell listeners what was noted, unless somebody else is just doing that."""
        while self._noted and self._telling.acquire(blocking=False):
            try:
                while self._noted:
                    self._tell(*self._noted.popleft())
            finally:
                self._telling.release()

    def _tell(self, name: str, work_out: Callable[[], tuple[Any, ...] | None]) -> None:
        arguments = work_out()
        if arguments is None:
            return
        if name != "invalidated":
            arguments = tuple(map(self._as_given, arguments))
        for listener in listeners(self._view, name):
            try:
                listener(self._view, *arguments)
            except Exception:
                log.exception(
                    "view %s: a listener to %s failed: %r", self._view.__name__, name, listener
                )

    def _as_given(self, records: list[Any]) -> list[Any]:
        if records and isinstance(records[0], tuple):
            old, new = (self._given(list(side)) for side in zip(*records, strict=True))
            return list(zip(old, new, strict=True))
        return self._given(records)


# -- what is different ---------------------------------------------------------------------------


def _loaded(before: Storage, after: Storage, key_of: KeyOf) -> tuple[list[Any], list[Any]] | None:
    old, new = _different(before, after, key_of)
    loaded = [r for key, r in new.items() if key not in old or not _same(old[key], r)]
    expired = [record for key, record in old.items() if key not in new]
    return (loaded, expired) if loaded or expired else None


def _refreshed(before: Storage, after: Storage, key_of: KeyOf) -> tuple[list[Any], ...] | None:
    old, new = _different(before, after, key_of)
    added = [record for key, record in new.items() if key not in old]
    removed = [record for key, record in old.items() if key not in new]
    changed = [
        (old[key], record)
        for key, record in new.items()
        if key in old and not _same(old[key], record)
    ]
    return (added, changed, removed) if added or changed or removed else None


def _different(
    before: Storage, after: Storage, key_of: KeyOf
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return the records of either storage, by key, but for parts that both have in common.

    One storage that was made of another shares the lists in which nothing changed.
    """
    old, new = (s.orders[""].chunks if "" in s.orders else [] for s in (before, after))
    shared = {id(chunk) for chunk in old} & {id(chunk) for chunk in new}
    records = (
        {key_of(r): r for chunk in chunks if id(chunk) not in shared for r in chunk}
        for chunks in (old, new)
    )
    return next(records), next(records)


def _same(old: Any, new: Any) -> bool:
    """Whether two records have the same values; NaN is the same as NaN."""
    if old is new or old == new:
        return True
    pairs = ((getattr(old, name), getattr(new, name)) for name in old.__struct_fields__)
    return all(a == b or (a != a and b != b) for a, b in pairs)  # noqa: PLR0124


def rows_of(marks: Iterable[AnyMark]) -> Rows | None:
    """Return the base rows from which marks were made; ``None`` if any record may be concerned."""
    rows: dict[str, set[tuple[Any, ...]]] = {}
    for mark in marks:
        if not isinstance(mark, Mark) or mark.table == (None, ""):
            return None
        rows.setdefault(table_label(mark.table), set()).add(mark.key)
    return {table: frozenset(keys) for table, keys in rows.items()}
