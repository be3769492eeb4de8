"""How much memory the records of all views may take.

In: what the views of a cache hold, and what loads under way have read so far. Out: whether a load
may go on, or :class:`.MemoryLimitExceeded` with the figures.

Sizes are estimated from samples, see :func:`.figures.rows_bytes`: repeated values are shared
between records, so that no sum over all of them would be right either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from .exc import MemoryLimitExceeded, TableCacheError
from .figures import rows_bytes, shown_bytes
from .layout import Layout
from .rows import Rows
from .turns import Section


class Holder(Protocol):
    """What holds records: a view in a cache."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def held_bytes(self) -> int:
        """What it holds, in bytes."""

    def yield_bytes(self, wanted: int, *, wait: bool) -> bool:
        """Give up what can be had again by reading, least recently used first.

        :param wait: whether to wait for a refresh or load of its own.
        :returns: whether there was nothing to wait for.
        """


class MemoryLimit:
    """A limit for the records of all views of one cache.

    :param limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        if type(limit) is not int or limit <= 0:
            raise TableCacheError(
                f"memory_limit={limit!r} is no number of bytes: give a positive integer, such as "
                "500 * 2**20"
            )
        self.limit = limit
        self._holders: list[Holder] = []
        self._lock = Section()
        self._underway: dict[object, int] = {}
        """What loads under way have read so far."""

    def after_fork(self) -> None:
        """In a forked child: forget the loads of the parent's threads."""
        self._lock = Section()
        self._underway = {}

    def add(self, holder: Holder) -> None:
        """Count what a view holds."""
        self._holders.append(holder)

    def room_for(self, holder: Holder) -> int:
        """Return how many bytes one view may hold beside what all others do."""
        return self.limit - self._held(without=holder)

    def _held(self, *, without: Holder | None = None) -> int:
        with self._lock:
            underway = sum(self._underway.values())
        return underway + sum(h.held_bytes for h in self._holders if h is not without)

    @contextmanager
    def loading(
        self, holder: Holder, layout: Layout, kept: float
    ) -> Iterator[Callable[[Rows, bool], None]]:
        """Count a load while it is under way.

        :param kept: the part of what the view holds that stays beside what is loaded, 0 to 1.
        :returns: what to call with the rows that were read so far, and whether these are all;
            with all of them after the connection was given back.
        """
        load = object()

        def check(rows: Rows, complete: bool) -> None:
            size = rows_bytes(layout, rows)
            with self._lock:
                self._underway[load] = size
            stays = int(holder.held_bytes * kept)
            over = self._held(without=holder) + stays - self.limit
            if over <= 0:
                return
            others = [other for other in self._holders if other is not holder]
            # Before it is complete it has a connection, for which a refresh may be waiting.
            free = [other.yield_bytes(over, wait=complete) for other in others]
            held = self._held(without=holder) + stays
            if held > self.limit and (complete or all(free)):
                raise MemoryLimitExceeded(
                    self._said(holder, len(rows.records), size, stays, complete),
                    estimate=size,
                    limit=self.limit,
                    held=held - size,
                )

        try:
            yield check
        finally:
            with self._lock:
                self._underway.pop(load, None)

    def _said(self, holder: Holder, rows: int, size: int, stays: int, complete: bool) -> str:
        others = [
            f"{h.name} {shown_bytes(h.held_bytes)}"
            for h in self._holders
            if h is not holder and h.held_bytes
        ]
        with self._lock:
            underway = sum(self._underway.values()) - size
        if underway > 0:
            others.append(f"loads under way {shown_bytes(underway)}")
        if stays:
            others.insert(0, f"{holder.name} itself {shown_bytes(stays)}")
        return (
            f"view {holder.name}: a load of {'' if complete else 'more than '}{rows:,} records, "
            f"about {shown_bytes(size)}, would pass memory_limit={self.limit:,} "
            f"({shown_bytes(self.limit)}); held are: {', '.join(others) or 'nothing else'}; load "
            "less of it (cache.estimate() tells how much that is), evict() something, or raise the "
            "limit"
        )
