"""Statement options: what a single read asks of the cache.

``select(View).options(bypass_cache())``
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy.orm.interfaces import UserDefinedOption
from sqlalchemy.sql.cache_key import HasCacheKey
from sqlalchemy.sql.visitors import InternalTraversal

from .exc import CriteriaError
from .settings import NO_AGE, is_age


class CacheOption(HasCacheKey, UserDefinedOption):
    """Base class of the cache's statement options.

    They are part of a statement's cache key: statements are known by it, with their options.
    """

    propagate_to_loaders = False
    _is_has_cache_key = True
    _cache_key_traversal = [("payload", InternalTraversal.dp_plain_obj)]  # noqa: RUF012

    def _clone(self, **_: object) -> CacheOption:
        # An option does not change. SQLAlchemy 2.0 would copy it without its payload, where a
        # statement is copied with all that is in it, as by params().
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class BypassCache(CacheOption):
    """See :func:`bypass_cache`."""

    inherit_cache = True


class NoStore(CacheOption):
    """See :func:`no_store`."""

    inherit_cache = True


class MaxStaleness(CacheOption):
    """See :func:`max_staleness`."""

    inherit_cache = True
    payload: timedelta


def bypass_cache() -> BypassCache:
    """Have a statement answered by the database, as if its view were not cached.

    ::

        session.scalars(select(FlightBoard).options(bypass_cache())).all()
    """
    return BypassCache()


def no_store() -> NoStore:
    """Have what a statement fetches from the database left out of the cache.

    The cache is still read. Only policies that fill the cache from reads store anything; the
    default policy keeps exactly what was loaded.
    """
    return NoStore()


def max_staleness(age: timedelta) -> MaxStaleness:
    """Have a statement answered from memory even beside marks, if these are younger than an age.

    ::

        session.scalars(select(FlightBoard).options(max_staleness(timedelta(seconds=5)))).all()

    The records are then those of at most so long ago; they are read again behind the answer if the
    upkeep runs, and else by the first read that finds a mark too old. A commit that is under way
    counts from its beginning. ``timedelta.max`` has the records as they are until
    ``cache.refresh(View)``; ``timedelta(0)`` has none that are marked, whatever
    ``__max_staleness__`` of the view allows. What sends a session to the database for its own sake
    (what it wrote, its isolation level) does so all the same.

    :raises CriteriaError: for anything but a timedelta, or a negative one.
    """
    if not is_age(age):
        raise CriteriaError(f"max_staleness({age!r}): {NO_AGE}")
    return MaxStaleness(age)
