"""The flights board for ``tablecache`` 4.3, as its documentation asks: the indexes by hand.

As in its own example of ranges of time, without what a read there costs beside: the bounds come as
times and not as text, are not looked at, and everything is covered once it is loaded.

Three indexes as the view of this package has them. Scores are numbers there: seconds since the
epoch; for aircraft and time a number per aircraft, far apart; the delay in minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import tablecache as tc
from tablecache.local import LocalStorageTable
from tablecache.postgres import PostgresAccess

STRIDE = 10**11
"""More seconds than any flight is away from the epoch."""


def seconds(when: datetime) -> float:
    """Return a time without zone, which is UTC, as a number."""
    return when.replace(tzinfo=UTC).timestamp()


class FlightIndexes(tc.Indexes[Any, int]):
    """Everything is loaded, so that all intervals are covered."""

    class IndexSpec(tc.Indexes[Any, int].IndexSpec):
        """An interval of time, or everything."""

        def __init__(
            self, index_name: str, *, ge: datetime | None = None, lt: datetime | None = None
        ) -> None:
            super().__init__(index_name)
            self.ge, self.lt = ge, lt

    def __init__(self, sql: Callable[[str], str]) -> None:
        self._sql = sql
        self._numbers: dict[Any, int] = {}
        self._loaded = False

    @property
    def index_names(self) -> frozenset[str]:
        """The names of the indexes."""
        return frozenset(("time", "plane", "delay"))

    def score(self, index_name: str, record: Any) -> float:
        """Return a record's place in an index."""
        if index_name == "time":
            return seconds(record["time_hour"])
        if index_name == "delay":
            return record["dep_delay"] or 0
        number = self._numbers.setdefault(record["tailnum"], len(self._numbers))
        return number * STRIDE + seconds(record["time_hour"])

    def primary_key(self, record: Any) -> int:
        """Return what a record is known by."""
        key: int = record["id"]
        return key

    def _interval(self, spec: Any) -> tc.Interval:
        if spec.ge is None:
            return tc.Interval.everything()
        return tc.Interval(seconds(spec.ge), seconds(spec.lt))

    def storage_records_spec(self, spec: Any) -> tc.StorageRecordsSpec[Any]:
        """Say which records in storage an interval has."""
        return tc.StorageRecordsSpec(spec.index_name, [self._interval(spec)])

    def db_records_spec(self, spec: Any) -> tc.DbRecordsSpec:
        """Say which records of the database an interval has."""
        if spec.ge is None:
            return tc.QueryArgsDbRecordsSpec(self._sql(""), ())
        condition = "WHERE flights.time_hour >= $1 AND flights.time_hour < $2"
        return tc.QueryArgsDbRecordsSpec(self._sql(condition), (spec.ge, spec.lt))

    def prepare_adjustment(self, spec: Any) -> tc.Adjustment[Any]:
        """Load what a spec says."""
        return tc.Adjustment(None, self.db_records_spec(spec))

    def commit_adjustment(self, adjustment: tc.Adjustment[Any]) -> None:
        """Note that everything is there."""
        self._loaded = True

    def covers(self, spec: Any) -> bool:
        """Whether an interval is in storage."""
        return self._loaded


async def open_table(sql: Callable[[str], str], **connection: Any) -> Any:
    """Return a table that is loaded."""
    indexes = FlightIndexes(sql)
    access = PostgresAccess(**connection)
    await access.__aenter__()
    table = tc.CachedTable(indexes, access, LocalStorageTable(indexes))
    await table.load("time")
    return table
