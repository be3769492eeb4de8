"""What a view may say about itself beside its select and its indexes.

In: attributes of the class with two underscores on each side. Out: the same, checked: what cannot
be meant is refused when the class is created, and names of columns when these are known.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Any, ClassVar

from .exc import ViewDefinitionError

REDACTED = "<redacted>"
"""What is shown in the place of a value of a column in ``__redact__``."""

_CHOICES = {"__refresh__": ("lazy", "eager"), "__on_miss__": ("database", "wait", "raise")}


class Settings:
    """The optional settings of a :class:`.CachedView`."""

    __slots__ = ()

    __primary_key__: ClassVar[tuple[str, ...] | None] = None
    """The names of the columns that identify a record, where the key that follows from the tables'
    own keys is not wanted or cannot be derived. It is verified while loading."""
    __immutable_functions__: ClassVar[tuple[str, ...]] = ()
    """Names of SQL functions in the select, not known to sa_tablecache, whose result depends on
    their arguments alone."""
    __scope__: ClassVar[str | None] = None
    """The name of a column that says whose a record is. Every read through a session is kept to the
    records of the session's own scope, see :meth:`.TableCache.attach`."""
    __row_security__: ClassVar[str | None] = None
    """``"ignore"`` if every reader may see every row of tables under row-level security."""
    __policy__: ClassVar[Any] = None
    """Which records to keep, such as ``ReadThrough(max_records=100_000)``; see
    :meth:`.TableCache.add`."""
    __max_staleness__: ClassVar[timedelta | None] = None
    """How old marks may be beside which reads are answered from memory; ``None``: not at all.
    See :func:`.max_staleness`."""
    __refresh__: ClassVar[str] = "lazy"
    """``"lazy"``: what is marked is read again before the first answer that it could affect.
    ``"eager"``: by the upkeep, right after the commit."""
    __on_miss__: ClassVar[str] = "database"
    """Who answers a read of what the coverage lacks. ``"database"``; ``"wait"``: the cache, if the
    loads under way bring it, else the database; ``"raise"``: nobody, it is a
    :class:`.CacheUnavailable`."""
    __max_misses__: ClassVar[int | None] = None
    """How many reads at a time the database answers for want of the cache, in this process; those
    beyond are a :class:`.CacheUnavailable`. Reads that are the database's by rule do not count."""
    __redact__: ClassVar[tuple[str, ...]] = ()
    """Names of columns whose values are kept out of logs, errors and the ``repr()`` of records."""


def check_settings(view: Any) -> None:
    """Refuse settings that cannot be meant.

    :raises ViewDefinitionError: for them.
    """
    name = view.__name__
    for setting, choices in _CHOICES.items():
        value = getattr(view, setting)
        if value not in choices:
            known = ", ".join(map(repr, choices))
            raise ViewDefinitionError(f"{name}.{setting} is {value!r}: it has to be one of {known}")
    staleness = view.__max_staleness__
    if staleness is not None and not is_age(staleness):
        raise ViewDefinitionError(f"{name}.__max_staleness__ is {staleness!r}: {NO_AGE}")
    most = view.__max_misses__
    if most is not None and (type(most) is not int or most < 0):
        raise ViewDefinitionError(
            f"{name}.__max_misses__ is {most!r}: it has to be a number of reads, or None"
        )


NO_AGE = "it has to be a timedelta that is not negative"


def is_age(value: Any) -> bool:
    """Whether a value says how old something may be."""
    return isinstance(value, timedelta) and value >= timedelta(0)


def check_columns(view: Any, names: Collection[str]) -> None:
    """Refuse settings that name columns which the select does not have.

    :raises ViewDefinitionError: for them.
    """
    known = f"the select has no column of that name; it has: {', '.join(names)}"
    for setting in ("__primary_key__", "__redact__"):
        value = getattr(view, setting)
        if value is None or (not value and setting == "__redact__"):
            continue
        if isinstance(value, str) or not value:
            raise ViewDefinitionError(
                f"{view.__name__}.{setting} has to be a tuple of column names"
            )
        for name in value:
            if name not in names:
                raise ViewDefinitionError(f"{view.__name__}.{setting} names {name!r}, but {known}")
    if view.__scope__ is not None and view.__scope__ not in names:
        raise ViewDefinitionError(f"{view.__name__}.__scope__ is {view.__scope__!r}, but {known}")
