"""Cached views of SQLAlchemy joins: see README.md."""

from .asyncio import AsyncCacheSession, AsyncTableCache
from .exc import (
    CacheUnavailable,
    Closed,
    CriteriaError,
    DuplicateKey,
    FeedUnavailable,
    LoadSlotTimeout,
    MemoryLimitExceeded,
    NotExpressible,
    TableCacheError,
    TransactionConflict,
    TransactionError,
    Unbound,
    UnknownView,
    UnscopedRead,
    UnsuitableEngine,
    ViewDefinitionError,
)
from .explaining import Explanation
from .feed import ChangeFeed, FeedHealth
from .figures import Estimate, LastRead, Stats
from .options import bypass_cache, max_staleness, no_store
from .policies import Everything, Manual, ReadThrough, SlidingWindow
from .problems import Problem
from .scopes import harmless
from .session import CacheSession, TableCache
from .transactions import Transaction, in_transaction
from .view import CachedView, ScoreIndex

__version__ = "0.1.0.dev0"

__all__ = [
    "AsyncCacheSession",
    "AsyncTableCache",
    "CacheSession",
    "CacheUnavailable",
    "CachedView",
    "ChangeFeed",
    "Closed",
    "CriteriaError",
    "DuplicateKey",
    "Estimate",
    "Everything",
    "Explanation",
    "FeedHealth",
    "FeedUnavailable",
    "LastRead",
    "LoadSlotTimeout",
    "Manual",
    "MemoryLimitExceeded",
    "NotExpressible",
    "Problem",
    "ReadThrough",
    "ScoreIndex",
    "SlidingWindow",
    "Stats",
    "TableCache",
    "TableCacheError",
    "Transaction",
    "TransactionConflict",
    "TransactionError",
    "Unbound",
    "UnknownView",
    "UnscopedRead",
    "UnsuitableEngine",
    "ViewDefinitionError",
    "bypass_cache",
    "harmless",
    "in_transaction",
    "max_staleness",
    "no_store",
]
