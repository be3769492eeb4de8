"""Statement options: what a single read asks of the cache.

``select(View).options(bypass_cache())``
"""

from __future__ import annotations

from sqlalchemy.orm.interfaces import UserDefinedOption


class CacheOption(UserDefinedOption):
    """Base class of the cache's statement options."""

    inherit_cache = True
    propagate_to_loaders = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class BypassCache(CacheOption):
    """See :func:`bypass_cache`."""

    inherit_cache = True


class NoStore(CacheOption):
    """See :func:`no_store`."""

    inherit_cache = True


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
