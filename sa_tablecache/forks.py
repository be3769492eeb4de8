"""Forks: what a child process makes of the caches that it inherits.

In: ``os.fork()``, by whoever calls it: a server with preloaded workers, ``multiprocessing``. Out:
caches whose locks, connections and threads are the child's own. A fork copies all memory but only
one thread: what others were in the middle of is never finished in the child.
"""

from __future__ import annotations

import logging
import os
from typing import Final, Protocol
from weakref import WeakSet

from sqlalchemy import Pool

log = logging.getLogger(__name__)

_abandoned: Final[list[Pool]] = []


class Forked(Protocol):
    """What wants to know that this is a forked child by now."""

    def after_fork(self) -> None:
        """Make locks anew and drop what was another process's; nobody else runs yet."""


_watching: Final[WeakSet[Forked]] = WeakSet()


def watch_forks(thing: Forked) -> None:
    """Call a thing's ``after_fork()`` in the children of this process, as long as it lives."""
    _watching.add(thing)


def abandon(pool: Pool) -> None:
    """Keep an inherited pool for ever, untouched.

    Its connections are the parent's. A driver that closes one when it is collected says goodbye to
    the server in the parent's name, and SQLite may delete a file that the parent still needs.
    """
    _abandoned.append(pool)


def _after_fork() -> None:
    for thing in list(_watching):
        try:
            thing.after_fork()
        except Exception:
            log.exception("a forked process cannot go on with %r", thing)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_after_fork)
