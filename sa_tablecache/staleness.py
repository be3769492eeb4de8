"""Answers beside marks: how stale a reader may be answered, and what happens behind.

In: what a view and a statement allow, and for how long something has been marked. Out: a reason to
answer from storage as it is; and the jobs of the upkeep that read again what is marked, behind such
answers or right after commits.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from .figures import Reason
from .options import CacheOption, MaxStaleness
from .table import CachedTable
from .upkeep import Upkeep


def tolerated(
    table: CachedTable, options: Iterable[CacheOption] = (), *, strict: bool = False
) -> Reason | None:
    """Return why a reader whom marks or leases concern is answered beside them, if it may be.

    What is marked or leased for less than the reader allows: it may then miss what was committed
    since the first of that, and nothing older.

    :param strict: whether the session wants all that was committed before, whatever the view says;
        only a statement may say otherwise then.
    """
    allowed = allowed_staleness(table, options, strict=strict)
    if not allowed:
        return None
    age = table.age
    if age is None or (allowed != timedelta.max and age >= allowed.total_seconds()):
        return None
    return Reason("stale", f"beside marks that are {age:.3f} s old, of {allowed} that are allowed")


def allowed_staleness(
    table: CachedTable, options: Iterable[CacheOption] = (), *, strict: bool = False
) -> timedelta | None:
    """Return how old marks may be: what the statement says, or else the view."""
    for option in options:
        if isinstance(option, MaxStaleness):
            return option.payload
    return None if strict else table.view.__max_staleness__


class Refreshing:
    """Reads again what is marked, in the background: one job of the upkeep for each view."""

    def __init__(self, upkeep: Upkeep) -> None:
        self._upkeep = upkeep
        self._jobs: dict[CachedTable, str] = {}

    def watch(self, table: CachedTable) -> None:
        """Have the upkeep refresh a view whose marks are to be read at once."""
        if table.view.__refresh__ == "eager":
            name = self._ensure(table)
            table.when_marked = lambda: self._upkeep.wake(name)

    def behind(self, table: CachedTable, options: Iterable[CacheOption] = ()) -> None:
        """Have the upkeep, if it runs, refresh a view of which a stale answer was given."""
        if (
            self._upkeep.running
            and table.refresh_needed
            and allowed_staleness(table, options) != timedelta.max
        ):
            self._upkeep.wake(self._ensure(table))

    def _ensure(self, table: CachedTable) -> str:
        name = self._jobs.get(table)
        if name is None:
            view = table.view
            name = f"refresh of {view.__name__}"
            if name in self._jobs.values():  # another view of that name, whose name in SQL differs
                name = f"refresh of {view.__module__}.{view.__qualname__} ({view.__table__.name})"
            self._jobs[table] = name
        self._upkeep.ensure(name, table.refresh)
        return name
