"""What the commands of ``python -m sa_tablecache`` share: finding the application's cache.

In: ``MODULE:cache`` from a command line. Out: a cache, or a message that says what is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from sqlalchemy.util import greenlet_spawn

from .asyncio import AsyncTableCache
from .cache import BaseTableCache

T = TypeVar("T")

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

CACHE_HELP = (
    "where the cache is: MODULE:NAME, such as myapp.db:cache, or MODULE:FUNCTION() for a function "
    "without arguments that makes one"
)


class NoCache(Exception):
    """A command line names no cache; says what is there instead."""


def find_cache(named: str) -> BaseTableCache | AsyncTableCache:
    """Return the cache that a command line names, importing its module from where it stands.

    :param named: ``MODULE:NAME``; the name may have dots (``app.state.cache``), and it may end with
        ``()`` if it is a function that makes the cache.
    :raises NoCache: if there is none.
    """
    module_name, colon, path = named.partition(":")
    if not (module_name and colon and path):
        raise NoCache(f"{named!r} is not of the form MODULE:NAME, such as myapp.db:cache")
    module = _imported(module_name)
    calls = path.endswith("()")
    found: Any = module
    where = module_name
    for name in path.removesuffix("()").split("."):
        if not hasattr(found, name):
            known = [n for n, value in vars(module).items() if _is_cache(value)]
            hint = f"; it has {', '.join(known)}" if known and found is module else ""
            raise NoCache(f"{where} has no {name!r}{hint}")
        found = getattr(found, name)
        where = f"{where}.{name}"
    if calls:
        if not callable(found):
            raise NoCache(f"{named}: {where} is of type {type(found).__name__}, not a function")
        try:
            found = found()
        except Exception as error:
            traceback.print_exc()
            raise NoCache(f"{named} raised {type(error).__name__}: {error}") from error
    if not _is_cache(found):
        makes = callable(found) and not isinstance(found, type) and not calls
        hint = f"; if it makes a cache, say {named}()" if makes else ""
        raise NoCache(f"{named} is of type {type(found).__name__}, not a TableCache{hint}")
    cache: BaseTableCache | AsyncTableCache = found
    if (cache if isinstance(cache, BaseTableCache) else cache.sync_cache).closed:
        raise NoCache(f"{named} was closed")
    return cache


def _is_cache(value: object) -> bool:
    return isinstance(value, BaseTableCache | AsyncTableCache)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            where = sys.path[0] or "this directory"
            raise NoCache(
                f"there is no module {error.name!r}, neither in {where} nor installed"
            ) from None
        traceback.print_exc()
        raise NoCache(f"importing {name} failed: {error}") from error
    except Exception as error:
        traceback.print_exc()
        raise NoCache(f"importing {name} raised {type(error).__name__}: {error}") from error


def with_cache(cache: BaseTableCache | AsyncTableCache, work: Callable[[BaseTableCache], T]) -> T:
    """Do something with a cache that may ask the database, and close the cache.

    For an :class:`.AsyncTableCache` it is done in a greenlet of an event loop of its own.
    """
    if isinstance(cache, BaseTableCache):
        try:
            return work(cache)
        finally:
            cache.close()

    engine = cache._engine

    async def run() -> T:
        try:
            return await greenlet_spawn(work, cache.sync_cache)
        finally:
            await cache.close()
            if engine is not None:
                await engine.dispose()  # its connections belong to this event loop

    return asyncio.run(run())
