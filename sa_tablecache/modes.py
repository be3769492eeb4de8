"""Modes: whether reads of a view are answered by the cache, compared with it, or neither.

In: :meth:`.TableCache.set_mode`, the environment variable ``SA_TABLECACHE_MODE``, and a rate at
which hits are verified. Out: a guard of the view's table, which sends reads to the database and
notes for ``shadow.py`` which of them are to be compared.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy.orm import Session

from .exc import TableCacheError
from .figures import Reason
from .table import CachedTable
from .view import CachedView

log = logging.getLogger(__name__)

MODES: Final = ("on", "shadow", "off")
VARIABLE: Final = "SA_TABLECACHE_MODE"

COMPARE: Final = "sa_tablecache.compare"
"""In ``Session.info``: the next read is to be compared with what the cache would have said."""
COMPARING: Final = "sa_tablecache.comparing"
"""In ``Session.info``: the cache is asked what it would have said."""

OFF: Final = Reason("off", "the mode of the view is off")
SHADOW: Final = Reason("shadow", "the mode of the view is shadow")
VERIFIED: Final = Reason("verified", "the cache is verified with this read")


def check_mode(mode: Any, where: str) -> str:
    """Return a mode.

    :raises TableCacheError: if it is none.
    """
    if mode not in MODES:
        raise TableCacheError(f"{where}: {mode!r} is no mode; there are {', '.join(MODES)}")
    return str(mode)


def check_rate(rate: Any) -> float:
    """Return the part of reads that are to be verified.

    :raises TableCacheError: if it is none.
    """
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise TableCacheError(f"verify={rate!r} is no part of reads: give a number from 0 to 1")
    return float(rate)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The modes that the environment asks for."""

    default: str = "on"
    views: Mapping[str, str] = field(default_factory=dict)

    def of(self, view: str) -> str:
        """Return the mode of a view."""
        return self.views.get(view, self.default)

    def warn_of_unknown(self) -> None:
        """Log names that no view has; not those of views that other caches have, or none yet."""
        for name in sorted(self.views.keys() - set(_names(CachedView))):
            log.warning("%s names %s, and no view is called so", VARIABLE, name)


def _names(view: type[CachedView]) -> Iterator[str]:
    for subclass in view.__subclasses__():
        yield subclass.__name__
        yield from _names(subclass)


def wanted_modes(text: str | None = None) -> Wanted:
    """Read modes such as ``shadow`` or ``off,FlightBoard=on``; by default from the environment.

    :raises TableCacheError: for a mode that there is not.
    """
    text = os.environ.get(VARIABLE, "") if text is None else text
    default, views = "on", {}
    for word in filter(None, map(str.strip, text.split(","))):
        view, named, mode = map(str.strip, word.rpartition("="))
        check_mode(mode, f"{VARIABLE}={text}")
        if named:
            views[view] = mode
        else:
            default = mode
    return Wanted(default, views)


class Mode:
    """The mode of one view: a guard of its table while it is not plainly on.

    :param verify: the part of reads that are compared while it is on.
    """

    def __init__(self, table: CachedTable, verify: float) -> None:
        self._table = table
        self._verify = verify
        self._name = "on"

    @property
    def name(self) -> str:
        """``on``, ``shadow`` or ``off``."""
        return self._name

    def set(self, name: str) -> None:
        """Change it; reads that have begun are answered as they were about to be."""
        self._name = name
        others = tuple(guard for guard in self._table.guards if guard is not self)
        asked = name != "on" or self._verify > 0
        # First of all: what is off does not ask a change feed, say.
        self._table.guards = (self, *others) if asked else others

    def __call__(self, session: Session, _: CachedTable, __: Any, ___: bool) -> str | None:
        info = session.info
        if COMPARING in info:
            return None
        name = self._name
        if name == "off":
            return OFF
        if name == "shadow":
            info[COMPARE] = True
            return SHADOW
        # A read may be asked about more than once before the database answers it.
        if COMPARE in info or random.random() < self._verify:  # noqa: S311 - a sample, no secret
            info[COMPARE] = True
            return VERIFIED
        return None
