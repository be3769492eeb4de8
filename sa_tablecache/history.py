"""What happened to the records of a view, and when: loads and refreshes of late.

In: what loads and refreshes have applied. Out: when a record was loaded, and what has refreshed it,
as far as that is remembered. Nothing is kept for each record: what a load covered and what a
refresh was about say which records they concerned. Whoever calls it holds the table's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Final, NamedTuple

from .changes import AnyMark
from .coverage import Coverage

MOST_LOADS: Final = 100
MOST_REFRESHES: Final = 200
MOST_MARKS: Final = 100
"""A refresh of more marks than this is remembered without them."""


class Loaded(NamedTuple):
    """A load, or what gave records up."""

    at: datetime
    coverage: Coverage
    """What was covered from then on."""


class Refreshed(NamedTuple):
    """A refresh."""

    at: datetime
    marks: tuple[AnyMark, ...] | None
    """What it was about; ``None`` if that was too much to be remembered."""


class History:
    """The last loads and refreshes of one view."""

    def __init__(self) -> None:
        self.loads: deque[Loaded] = deque(maxlen=MOST_LOADS)
        self.refreshes: deque[Refreshed] = deque(maxlen=MOST_REFRESHES)

    def applied(self, coverage: Coverage, marks: Collection[AnyMark], *, refreshed: bool) -> None:
        """Note what was applied."""
        now = datetime.now(UTC)
        if refreshed:
            some = tuple(marks) if len(marks) <= MOST_MARKS else None
            self.refreshes.append(Refreshed(now, some))
        elif not self.loads or self.loads[-1].coverage is not coverage:
            self.loads.append(Loaded(now, coverage))
