"""Rows: records as they were read, in any order, with what is kept of them beside; pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from .sorting import STEP, Pause


@dataclass(slots=True)
class Rows:
    """Records, and beside each its hidden values if the view keeps any."""

    records: list[Any] = field(default_factory=list)
    hidden: list[tuple[Any, ...]] | None = None

    def pairs(self) -> list[tuple[Any, tuple[Any, ...] | None]]:
        """Return the records with their hidden values."""
        if self.hidden is None:
            return [(record, None) for record in self.records]
        return list(zip(self.records, self.hidden, strict=True))

    def only(self, test: Callable[[Any, Any], bool], pause: Pause) -> Rows:
        """Return those that pass a test of the record and its hidden values."""
        result = Rows(hidden=None if self.hidden is None else [])
        for at in range(0, len(self.records), STEP):
            records = self.records[at : at + STEP]
            if self.hidden is None or result.hidden is None:
                result.records += [record for record in records if test(record, None)]
            else:
                hidden = self.hidden[at : at + STEP]
                passed = [test(*pair) for pair in zip(records, hidden, strict=True)]
                result.records += compress(records, passed)
                result.hidden += compress(hidden, passed)
            pause()
        return result

    def first(self, count: int) -> Rows:
        """Return the first so many."""
        return Rows(self.records[:count], None if self.hidden is None else self.hidden[:count])
