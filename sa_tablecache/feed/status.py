"""How a cache follows the changes of its database: for health checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FeedHealth:
    """How a cache follows the changes of its database."""

    state: str
    """``unseeded``, ``following``, ``lagging`` (older than ``max_lag``) or ``cut off``."""
    lag: float | None
    """How many seconds ago the last poll began that succeeded."""
    error: str | None
    """Why the last poll failed."""
    untrusted: Mapping[str, str]
    """Tables of the views whose changes are not seen, and why."""
    polls: int
    changes: int
    """How many were delivered."""
    invalidations: int
    """How often everything may have changed: when the feed was seeded, or had a gap."""

    @property
    def complaints(self) -> tuple[str, ...]:
        """What there is to complain about, in words."""
        said = [f"changes of {table} are not seen: {why}" for table, why in self.untrusted.items()]
        if self.state == "cut off":
            said.append(f"the change feed cannot be read: {self.error}")
        elif self.state != "following":
            said.append(f"the change feed is {self.state}")
        return tuple(said)
