"""The errors of sa_tablecache, one tree.

::

    TableCacheError                    everything raised by this package
     ├── ViewDefinitionError           a view that cannot be right: culprit and way out
     ├── CriteriaError                 criteria that make no sense for the view
     │    └── NotExpressible           load criteria that no score index of the view can express
     ├── UnknownView                   a view that this cache does not hold
     ├── UnscopedRead                  a view with __scope__, read by somebody who has none
     ├── CacheUnavailable              the cache cannot be used now
     │    ├── Unbound                  used before bind()
     │    ├── Closed                   used after close()
     │    ├── LoadSlotTimeout          a load that got none of the load slots in time
     │    └── FeedUnavailable          no change feed that can be read
     ├── MemoryLimitExceeded           a load that would take more memory than the cache may have
     ├── UnsuitableEngine              an engine through which no consistent snapshot can be read
     ├── TransactionError              a transaction that cannot be what was asked for
     │    └── TransactionConflict      other transactions kept it from being committed
     └── DuplicateKey                  two rows of a view share its primary key

An error of the database reaches the caller as SQLAlchemy raised it; the cache wraps none.
"""

from __future__ import annotations

from sqlalchemy.exc import DontWrapMixin


class TableCacheError(Exception):
    """Base class of all errors of this package."""


class ViewDefinitionError(TableCacheError):
    """The declaration of a view cannot be right; the message names the culprit and the way out."""


class CriteriaError(TableCacheError):
    """Criteria use something that does not belong to the view, such as a base table's column."""


class NotExpressible(CriteriaError):
    """Load criteria that no score index of the view can express as a range."""


class UnknownView(TableCacheError):
    """The view was not added to this cache."""


class UnscopedRead(TableCacheError, DontWrapMixin):
    """A view that says ``__scope__`` was read by somebody of whom no scope is known."""


class CacheUnavailable(TableCacheError):
    """The cache cannot be used now."""


class Unbound(CacheUnavailable):
    """The cache was used before it was bound to an engine."""


class Closed(CacheUnavailable):
    """The cache was used after it had been closed."""


class LoadSlotTimeout(CacheUnavailable):
    """A load got none of the ``load_slots``: other processes were loading all the time."""


class FeedUnavailable(CacheUnavailable):
    """The database has no change feed that can be read: none, or one of another version."""


class MemoryLimitExceeded(TableCacheError):
    """A load would take more memory than the cache may have; nothing of it was kept.

    The figures are in bytes: ``estimate`` of what was read when it was given up, ``limit``, and
    ``held`` by everything else.
    """

    def __init__(self, message: str, *, estimate: int = 0, limit: int = 0, held: int = 0) -> None:
        super().__init__(message)
        self.estimate = estimate
        self.limit = limit
        self.held = held


class UnsuitableEngine(TableCacheError):
    """No consistent, committed snapshot can be read through this engine."""


class DuplicateKey(TableCacheError):
    """Two rows of a view share a primary key: ``__primary_key__`` is no key of the view."""


class TransactionError(TableCacheError):
    """A transaction that cannot be what was asked for: by its engine, its function or its place."""


class TransactionConflict(TransactionError):
    """Other transactions kept this one from being committed; nothing of it was."""


def one_line(error: BaseException) -> str:
    """Return the class and the message of an error, in one line, without a statement's values."""
    message = str(getattr(error, "orig", None) or error).strip()
    first = message.partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
