"""What an application says of its change feed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sa_tablecache.exc import TableCacheError


@dataclass(frozen=True, kw_only=True)
class ChangeFeed:
    """Has a cache follow what others write, by a changelog that triggers in the database fill.

    ::

        cache = TableCache(engine, views=[FlightBoard], feed=ChangeFeed())
        cache.install_feed()  # once; or a migration does it, or the command line

    It says how; several caches may share one. A cache that was started polls in the background. One
    that was not is right as well: its readers poll when the last poll is older than ``max_lag``.

    :param poll_interval: the seconds from one poll to the next. On PostgreSQL commits of other
        caches wake it up earlier.
    :param max_lag: how old the last poll may be when a view is answered from memory. That is how
        long a commit by another process may stay invisible.
    :param listen_engine: an engine for LISTEN on PostgreSQL, where the cache's own goes through a
        pooler that gives each transaction another connection.
    :param keep: how long the changelog is kept. A process that was away for longer invalidates
        everything once.
    :raises TableCacheError: for durations that are not positive.
    """

    poll_interval: float = 0.2
    max_lag: timedelta = timedelta(seconds=2)
    listen_engine: Any = None
    keep: timedelta = timedelta(minutes=10)

    def __post_init__(self) -> None:
        for name, seconds in (
            ("poll_interval", self.poll_interval),
            ("max_lag", self.max_lag.total_seconds()),
            ("keep", self.keep.total_seconds()),
        ):
            if not seconds > 0:
                raise TableCacheError(
                    f"ChangeFeed({name}={getattr(self, name)!r}): a duration has to be positive"
                )
