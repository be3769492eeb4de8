"""Whether a cache works as it should: for health checks and readiness routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .upkeep import JobHealth, Upkeep


@dataclass(frozen=True, slots=True)
class Health:
    """How a cache is doing. Reads are right in any case: without it they are slower."""

    ok: bool
    """Whether there is nothing to complain about."""
    reasons: tuple[str, ...] = ()
    """What there is to complain about, in words."""
    running: bool = False
    """Whether the upkeep was started."""
    jobs: Mapping[str, JobHealth] = field(default_factory=dict)
    """The jobs of the upkeep, by name."""
    feed: Any = None
    """What the change feed says of itself; ``None`` without one."""


def health(upkeep: Upkeep, feed: Any = None, complaints: tuple[str, ...] = ()) -> Health:
    """Return how a cache is doing.

    :param complaints: what else there is to complain about, of the feed.
    """
    jobs = upkeep.health()
    reasons = list(complaints)
    if jobs and not upkeep.running:
        reasons.append(f"nothing runs {', '.join(jobs)}: call cache.start()")
    for name, job in jobs.items():
        if not upkeep.running:
            break
        if not job.running:
            reasons.append(f"{name} is no longer run: {job.error or 'its event loop is closed'}")
        elif job.failing is not None:
            reasons.append(f"{name} has failed for {job.failing:.1f} s: {job.error}")
        elif job.last_success is None:
            reasons.append(f"{name} has not ended its first step yet")
    return Health(not reasons, tuple(reasons), upkeep.running, jobs, feed)
