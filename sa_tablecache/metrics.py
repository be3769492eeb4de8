"""The figures of caches as metrics of Prometheus, through ``prometheus_client``.

In: caches, and names to tell them apart by. Out: the metrics of :func:`export` in a registry.

Nothing is added to reads: what has happened to a view is counted anyway (:class:`.Counts`), and the
counters here are brought up to those numbers when they are scraped. Loads and refreshes are
observed as they happen, in histograms.

A custom collector that made metrics of the numbers would be simpler, but in multiprocess mode
(``PROMETHEUS_MULTIPROC_DIR``) there are none: one process answers a scrape, from files into which
the others have written their counters. So these are real counters. In that mode the upkeep of each
cache brings them up to date every few seconds.
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Iterator
from threading import Lock
from typing import Any, Final
from weakref import WeakKeyDictionary

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.metrics import MetricWrapperBase
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "sa_tablecache.metrics needs prometheus_client: pip install 'sa-tablecache[metrics]'"
    ) from error

from .cache import BaseTableCache
from .exc import TableCacheError
from .table import CachedTable

UPDATE_SECONDS: Final = 5.0
"""How old the figures of another process may be, in multiprocess mode."""

SECONDS: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    300,
)
"""The buckets of loads and refreshes: from one row by its key to a join of hours of growth."""

_JOB: Final = "metrics"


def export(cache: Any, *, registry: CollectorRegistry | None = None, name: str = "") -> None:
    """Make the figures of a cache metrics of a registry; call it once, when the cache is made.

    ::

        from sa_tablecache.metrics import export

        export(cache)

    Views that are added later are included. A closed cache keeps its counters, and loses its
    gauges. The labels are ``cache`` (the name given here), ``view``, and what the metric has of its
    own; ``type`` and ``reason`` have few values, and none comes from a statement or a row.

    In multiprocess mode, counters and gauges of a process are at most five seconds old while the
    upkeep of its cache runs (:meth:`.TableCache.start`), and what it has counted last is written
    when it exits. It takes no SQL.

    :param cache: a :class:`.TableCache` or :class:`.AsyncTableCache`.
    :param registry: of ``prometheus_client``; the default is its default. In multiprocess mode all
        processes write into files, and the registry does not matter.
    :param name: the value of the label ``cache``, to tell several caches of a process apart.
    :raises TableCacheError: if the cache is exported already, or another one by that name.
    """
    exporter = _exporter(REGISTRY if registry is None else registry)
    exporter.add(getattr(cache, "sync_cache", cache), name)


_exporters: Final[WeakKeyDictionary[CollectorRegistry, Exporter]] = WeakKeyDictionary()
_lock = Lock()


def _exporter(registry: CollectorRegistry) -> Exporter:
    with _lock:
        if _multiprocess() and _exporters:
            # Counters of the same name share one place in a file, and would overwrite each other.
            return next(iter(_exporters.values()))
        exporter = _exporters.get(registry)
        if exporter is None:
            exporter = Exporter()
            registry.register(exporter)
            _exporters[registry] = exporter
        return exporter


def _multiprocess() -> bool:
    return bool(
        os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ.get("prometheus_multiproc_dir")  # noqa: SIM112
    )


class Exporter(Collector):
    """The metrics of all caches that are exported to one registry."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._sources: list[_Source] = []

        def counter(name: str, words: str, *labels: str) -> Counter:
            # In no registry by itself: this collector brings it up to date first.
            return Counter(_full(name), words, ("cache", "view", *labels), registry=None)

        def gauge(name: str, words: str, how: Any, *labels: str) -> Gauge:
            labels = ("cache", *labels)
            return Gauge(_full(name), words, labels, registry=None, multiprocess_mode=how)

        def histogram(name: str, words: str) -> Histogram:
            labels = ("cache", "view")
            return Histogram(_full(name), words, labels, registry=None, buckets=SECONDS)

        self.reads = counter(
            "reads", "Reads of a view, by how they were answered and why.", "type", "reason"
        )
        self.refreshes = counter("refreshes", "Refreshes of marked records.")
        self.loads = counter("loads", "Loads and extensions of the coverage.")
        self.fills = counter("fills", "Loads of what reads missed, by a ReadThrough.")
        self.evicted = counter("ranges_evicted", "Ranges that a ReadThrough gave up.")
        self.loaded = counter("records_loaded", "Records that loads have read.")
        self.expired = counter("records_expired", "Records that were given up.")
        self.marks = counter("marks", "Notes that records may be stale, by kind.", "kind")
        self.comparisons = counter("comparisons", "Answers that were compared with the database's.")
        self.skipped = counter(
            "comparisons_skipped", "Answers that were to be compared, and could not."
        )
        self.mismatches = counter("mismatches", "Answers that were not those of the database.")
        self.records = gauge("records", "Records in memory.", "livesum", "view")
        self.bytes = gauge("bytes", "Memory of the records, estimated.", "livesum", "view")
        self.pending = gauge(
            "pending_marks", "Marks that no refresh has cleared yet.", "livesum", "view"
        )
        self.oldest = gauge(
            "oldest_mark_seconds", "Age of the oldest pending mark.", "livemax", "view"
        )
        self.lag = gauge(
            "feed_lag_seconds", "Time since the last poll of the change feed began.", "livemax"
        )
        self.trusted = gauge(
            "feed_trusted", "1 if the change feed sees all changes in time, else 0.", "livemin"
        )
        self.seconds = {
            "load": histogram("load_seconds", "Seconds that a load took."),
            "refresh": histogram("refresh_seconds", "Seconds that a refresh took."),
        }

    @property
    def metrics(self) -> list[MetricWrapperBase]:
        """All of them."""
        own = (*vars(self).values(), *self.seconds.values())
        return [metric for metric in own if isinstance(metric, MetricWrapperBase)]

    def add(self, cache: BaseTableCache, name: str) -> None:
        """Have the figures of a cache in the metrics."""
        with self._lock:
            for source in self._sources:
                if source.cache is cache:
                    raise TableCacheError("the figures of this cache are exported already")
                if source.name == name:
                    raise TableCacheError(
                        f"another cache is exported under the name {name!r}: give each a name of "
                        "its own, export(cache, name=...)"
                    )
            self._sources.append(_Source(self, cache, name))
        cache.closing.append(lambda: self._closed(cache))

    def _closed(self, cache: BaseTableCache) -> None:
        with self._lock:
            for source in [source for source in self._sources if source.cache is cache]:
                source.update()
                source.end()
                self._sources.remove(source)

    def describe(self) -> Iterator[Metric]:
        """Return the names of the metrics, for the registry."""
        for metric in self.metrics:
            yield from metric.describe()

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now."""
        self.update()
        for metric in self.metrics:
            yield from metric.collect()

    def update(self) -> None:
        """Bring counters and gauges up to date."""
        with self._lock:
            for source in self._sources:
                source.update()

    def after_fork(self) -> None:
        """What the parent had counted before the fork, it reports itself."""
        self._lock = Lock()
        for source in self._sources:
            source.rebase()


def _full(name: str) -> str:
    return f"sa_tablecache_{name}"


def _after_fork() -> None:
    global _lock
    _lock = Lock()
    for exporter in _exporters.values():
        exporter.after_fork()


def _at_exit() -> None:
    if _multiprocess():
        for exporter in _exporters.values():
            exporter.update()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


class _Source:
    """One cache, and up to where its numbers are in the metrics."""

    def __init__(self, exporter: Exporter, cache: BaseTableCache, name: str) -> None:
        self.cache = cache
        self.name = name
        self._exporter = exporter
        self._known: dict[CachedTable, dict[Any, float]] = {}
        cache.timers.append(self._observe)
        if _multiprocess():
            cache.upkeep.add(_JOB, self._step)

    def _observe(self, table: CachedTable, what: str, seconds: float) -> None:
        self._exporter.seconds[what].labels(self.name, table.plan.name).observe(seconds)

    def _step(self) -> float:
        self._exporter.update()
        return UPDATE_SECONDS

    def update(self) -> None:
        for table, known in self._numbers():
            for metric, labels, number in self._counted(table):
                key = (id(metric), labels)
                # A view whose reads were never of a kind has that counter all the same, at 0.
                metric.labels(self.name, table.plan.name, *labels).inc(number - known.get(key, 0))
                known[key] = number
            self._update_gauges(table)
        consumer = self.cache.consumer
        if consumer is not None:
            feed = consumer.health()
            lag = math.inf if feed.lag is None else feed.lag
            self._exporter.lag.labels(self.name).set(lag)
            self._exporter.trusted.labels(self.name).set(not feed.complaints)

    def _numbers(self) -> list[tuple[CachedTable, dict[Any, float]]]:
        """Return the tables of the cache, each with the numbers that are in the metrics."""
        return [
            (table, self._known.setdefault(table, {}))
            for table in list(self.cache._tables.values())
        ]

    def rebase(self) -> None:
        """Take what was counted so far as reported."""
        for table, known in self._numbers():
            for metric, labels, number in self._counted(table):
                known[id(metric), labels] = number

    def _counted(self, table: CachedTable) -> Iterator[tuple[Counter, tuple[str, ...], float]]:
        """Yield what has happened to a view so far, as the counters have it."""
        exporter, counts = self._exporter, table.counts
        yield exporter.reads, ("hit", ""), counts.hits
        for (kind, category), number in counts.reads.copy().items():
            refreshed = (kind, category) == ("hit", "refresh")
            yield exporter.reads, ("hit_with_refresh" if refreshed else kind, category), number
        for kind, number in counts.marks.copy().items():
            yield exporter.marks, (kind,), number
        yield exporter.refreshes, (), counts.refreshes
        yield exporter.loads, (), counts.loads
        yield exporter.fills, (), counts.fills
        yield exporter.evicted, (), counts.ranges_evicted
        yield exporter.loaded, (), counts.records_loaded
        yield exporter.expired, (), counts.records_expired
        yield exporter.comparisons, (), counts.comparisons
        yield exporter.skipped, (), counts.comparisons_skipped
        yield exporter.mismatches, (), counts.mismatches

    def _update_gauges(self, table: CachedTable) -> None:
        stats = table.stats()
        now = (stats.records, stats.bytes, stats.pending_marks, stats.oldest_mark)
        for gauge, value in zip(self._gauges(), now, strict=True):
            gauge.labels(self.name, table.plan.name).set(value)

    def _gauges(self) -> tuple[Gauge, ...]:
        exporter = self._exporter
        return exporter.records, exporter.bytes, exporter.pending, exporter.oldest

    def end(self) -> None:
        """The cache is being closed: it holds nothing any more."""
        self.cache.timers.remove(self._observe)
        for table, _ in self._numbers():
            for gauge in self._gauges():
                if _multiprocess():  # what is in the file stays there
                    gauge.labels(self.name, table.plan.name).set(0)
                else:
                    gauge.remove(self.name, table.plan.name)
        if self.cache.consumer is not None:
            for gauge in (self._exporter.lag, self._exporter.trusted):
                if _multiprocess():
                    gauge.labels(self.name).set(0 if gauge is self._exporter.lag else 1)
                else:
                    gauge.remove(self.name)
