"""Misses: reads that the database has to answer because the cache cannot.

In: what a view says of them, ``__on_miss__`` and ``__max_misses__``. Out: a bound on how many there
are at a time, so that a cache which cannot be used (not loaded yet, its feed cut off) does not have
all readers at once run the expensive join that it was there to save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Final

from .exc import CacheUnavailable
from .figures import category_of
from .view import CachedView

WANTING: Final = frozenset(
    """not_loaded coverage changed commit refresh_failed overrun feed memory""".split()
)
"""Categories of reads that the cache would have answered, had it been able to. All others are the
database's by rule: nobody could do without them."""


class Misses:
    """The misses of one view in this process."""

    def __init__(self, view: type[CachedView]) -> None:
        self._view = view
        self.after_fork()

    def after_fork(self) -> None:
        """Those of the parent process are not ours."""
        self._lock = Lock()
        self._underway = 0

    def refuse(self, reason: str) -> None:
        """Refuse a read of what the coverage lacks, if the view says so.

        :raises CacheUnavailable: if ``__on_miss__`` is ``"raise"``.
        """
        if self._view.__on_miss__ == "raise":
            name = self._view.__name__
            raise CacheUnavailable(
                f"{name} says __on_miss__ = 'raise', and the cache cannot answer: {reason}; load "
                "what is read, or read it with bypass_cache()"
            )

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Have the database answer one read, unless it is answering too many.

        :raises CacheUnavailable: if ``__max_misses__`` are under way.
        """
        most = self._view.__max_misses__
        if most is None:
            yield
            return
        with self._lock:
            if self._underway >= most:
                raise CacheUnavailable(
                    f"the database is answering {self._underway} reads of {self._view.__name__} "
                    f"that the cache cannot answer, and __max_misses__ is {most}: try again later"
                )
            self._underway += 1
        try:
            yield
        finally:
            with self._lock:
                self._underway -= 1


def is_wanting(session: Any) -> bool:
    """Whether the last read was left to the database for want of the cache, and by no rule."""
    last = session.last_read
    return last.kind in ("miss", "bypass") and category_of(last.reason) in WANTING
