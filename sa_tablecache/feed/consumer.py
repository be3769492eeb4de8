"""Reads a changelog, and publishes what it finds to the views of one cache.

In: the changelog of a database, and the views. Out: marks, as if the commits had been made here;
whether each view may be answered from memory; tokens, and waiting for them.

* A poll notes for each view the number of its last mark, reads the changelog in one statement, and
  then, without waiting for anything, marks the views and moves the position. One that fails or is
  cancelled before that has done nothing: the next one finds the same changes. Polls take turns, so
  that each change is delivered once.
* A position is *seeded* when there is none, or when changes since it may be missing: then
  everything may have changed. So may all rows of a table that was perhaps not watched all the time
  since the last poll: one that is new, whose fingerprint has moved, or that can be trusted again.
* A view is answered from memory if the last poll found all of its tables watched, and began not
  longer ago than ``max_lag``; a reader who finds it older polls. If that fails, the database
  answers.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from sqlalchemy import Connection

from sa_tablecache.analysis import TableName, table_label, table_name
from sa_tablecache.changes import ChangeSet
from sa_tablecache.exc import one_line
from sa_tablecache.figures import Reason
from sa_tablecache.loading import Snapshots
from sa_tablecache.loads import Loads
from sa_tablecache.table import CachedTable
from sa_tablecache.turns import Turn, new_future, wait_for

from .contract import Position, Relation
from .dialects import changelog_for
from .findings import Findings
from .keys import LoggedTable, one_key
from .settings import ChangeFeed
from .status import FeedHealth

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 0.2
"""So long after a poll that failed, readers do not try again."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What the last poll left: replaced as a whole."""

    position: Position | None = None
    began: float = 0.0
    """When the poll began, by the clock of :func:`now`."""
    monotonic: float | None = None
    """The same, by the monotonic clock."""
    names: Mapping[TableName, Relation] = field(default_factory=dict)
    """The tables of the views, as the models name them."""
    renamed: bool = False
    """Whether names may mean other relations by now."""
    logged: Mapping[TableName, LoggedTable | None] = field(default_factory=dict)
    """How their rows are logged; ``None``: not so that views could follow them."""
    fingerprints: Mapping[Relation, str | None] = field(default_factory=dict)
    untrusted: Mapping[TableName, str] = field(default_factory=dict)
    reasons: Mapping[CachedTable, str | None] = field(default_factory=dict)
    """For each view, why it is not to be trusted; ``None`` if it is."""


_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Return the seconds since some moment, those included in which the machine was asleep."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class _Before(NamedTuple):
    """What is noted before a poll."""

    at: float
    """The time, by the clock of :func:`now`."""
    monotonic: float
    """The same, by the monotonic clock."""
    until: Mapping[CachedTable, int]
    """The number of the last mark of each view."""


class Consumer:
    """Follows one changelog for one cache.

    :param tables: returns the views of the cache.
    :param fills: which tables, as the application says, triggers or the like fill when a row of a
        table is written: some of them cannot be watched themselves.
    :raises FeedUnavailable: if the database can have no changelog.
    """

    def __init__(
        self,
        feed: ChangeFeed,
        snapshots: Snapshots,
        tables: Callable[[], Iterable[CachedTable]],
        fills: Mapping[TableName, frozenset[TableName]],
    ) -> None:
        self.feed = feed
        self.changelog = changelog_for(snapshots.dialect.name)
        self._snapshots = snapshots
        self._tables = tables
        self._fills = fills
        self._max_lag = feed.max_lag.total_seconds()
        self._in_task = bool(snapshots.dialect.is_async)
        self._turn = Turn(in_task=self._in_task)
        self._began = self._done = 0
        """The numbers of the last poll that began, and of the last that succeeded."""
        self._failed: tuple[int, float, BaseException] | None = None
        """The number of the last poll, when it failed, and why."""
        self._known = _Known()
        self._owed = 0.0
        """Somebody was promised more than what polls say that began before, by the clock."""
        self.counts: Counter[str] = Counter()

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Lend a connection in AUTOCOMMIT mode, from the cache's own small pool."""
        with self._snapshots.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    # -- polling --------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Read, and publish, all that was committed before this call: one poll.

        Who comes while one is under way waits for it and shares the next.
        """
        wanted = self._began + 1
        with self._turn:
            if self._done >= wanted:
                return
            if self._failed is not None and self._failed[0] >= wanted:
                raise self._failed[2]
            with self._numbered():
                before = self._before()
                with self.connect() as connection:
                    self._poll(connection, before)
        self.tell()

    @contextmanager
    def snapshot(self, table: Loads, reader: object) -> Iterator[Connection]:
        """Open a snapshot to read a view in, after publishing all changes up to it: a poll.

        Not where the feed has not begun to follow anything: when it does, everything is marked.
        """
        with ExitStack() as stack:
            # In turn from before the snapshot: no poll is to have read more than is in it.
            with self._turn:
                if self._known.position is None:
                    connection = stack.enter_context(self._snapshots.open())
                else:
                    with self._numbered():
                        before = self._before()
                        connection = stack.enter_context(self._snapshots.open())
                        self._poll(connection, before, (table, reader))
            yield connection

    def tell(self) -> None:
        """Tell the listeners of all views what polls have marked."""
        for table in self._tables():
            table.observers.tell()

    def _before(self) -> _Before:
        """Return what has to be noted before a poll opens its snapshot."""
        until = {table: table.sequence for table in self._tables()}
        return _Before(now(), time.monotonic(), until)

    @contextmanager
    def _numbered(self) -> Iterator[None]:
        """Note how a poll ends; only in turn."""
        self._began += 1
        number = self._began
        try:
            yield
        except Exception as error:
            if self._failed is None:
                log.warning("the change feed cannot be read: %s", one_line(error))
            self._failed = number, time.monotonic(), error
            raise
        if self._failed is not None:
            log.info("the change feed is read again")
        self._done, self._failed = number, None

    def seed(self) -> None:
        """Begin to follow views that are not followed yet; if that fails, readers hear of it."""
        if any(table not in self._known.reasons for table in self._tables()):
            with suppress(Exception):
                self.catch_up()

    def _poll(
        self,
        connection: Connection,
        start: _Before,
        reading: tuple[Loads, object] | None = None,
    ) -> None:
        tables, before = list(start.until), self._known
        names = self._names(connection, tables)
        position = before.position
        if position is None:
            position = self.changelog.position(connection)
        poll = self.changelog.poll(connection, position, frozenset(names.values()))
        prints = {relation: poll.fingerprints.get(relation) for relation in names.values()}
        moved = {
            relation
            for relation, fingerprint in prints.items()
            if relation not in before.fingerprints or before.fingerprints[relation] != fingerprint
        }
        logged = self._logged(connection, tables, names, moved)
        self._pause("polled")
        # From here on nothing waits, so that nothing can be half done.
        untrusted = {n: poll.untrusted[r] for n, r in names.items() if r in poll.untrusted}
        back = frozenset(before.untrusted.keys() - untrusted.keys())
        found = Findings(
            poll, names, logged, moved, untrusted, back, self._fills, before.position is None
        )
        self._deliver(found, start.until, reading)
        for name in untrusted.keys() - before.untrusted.keys():
            log.warning("changes of %s are not seen: %s", table_label(name), untrusted[name])
        for name in back & names.keys():
            log.info("changes of %s are seen again", table_label(name))
        self._known = _Known(
            poll.position,
            start.at,
            start.monotonic,
            names,
            bool(moved),
            logged,
            prints,
            untrusted,
            {table: self._why_not(table, names, untrusted) for table in tables},
        )

    def _pause(self, point: str) -> None:
        """Do nothing; tests stop a poll here."""

    def _names(
        self, connection: Connection, tables: Iterable[CachedTable]
    ) -> Mapping[TableName, Relation]:
        """Return the relations that the names of the views' tables mean: one SELECT, if any."""
        wanted = frozenset(name for table in tables for name in table.plan.tables)
        if wanted == self._known.names.keys() and not self._known.renamed:
            return self._known.names
        translate = connection.get_execution_options().get("schema_translate_map") or {}
        meant = {name: (translate.get(name[0], name[0]), name[1]) for name in wanted}
        found = self.changelog.resolve(connection, meant.values())
        return {name: found[which] for name, which in meant.items() if which in found}

    def _logged(
        self,
        connection: Connection,
        tables: list[CachedTable],
        names: Mapping[TableName, Relation],
        moved: set[Relation],
    ) -> Mapping[TableName, LoggedTable | None]:
        """Return how rows are logged, asked anew of tables that may be watched otherwise now."""
        # A view that is new may declare another primary key for a table that is known.
        same = self._known.reasons.keys() == set(tables)
        known = {
            n: how for n, how in self._known.logged.items() if same and names.get(n) not in moved
        }
        new = names.keys() - known.keys()
        if not new:
            return known
        watched = self.changelog.installed(connection).watched
        for name in new:
            watch = watched.get(names[name])
            declared = [b for table in tables for b in table.base_tables if table_name(b) == name]
            key = one_key(tuple(base.primary_key.columns) for base in declared)
            known[name] = (
                LoggedTable.of(declared[0], key, watch.key, self._snapshots.dialect)
                if watch is not None and key is not None
                else None
            )
        return known

    # -- publishing -----------------------------------------------------------------------------

    def _deliver(
        self,
        found: Findings,
        until: Mapping[CachedTable, int],
        reading: tuple[Loads, object] | None,
    ) -> None:
        """Mark what a poll found, in all views: those too that were added meanwhile."""
        news, wholly = found.news(), found.wholly()
        changes = found.changes(news)
        changes.update(wholly)
        for table in list(self._tables()):
            known = table in until or table.plan.tables <= found.names.keys()
            unknown = found.everything or not known
            marks = table.marks_of(ChangeSet(everything=True) if unknown else changes)
            if unknown or wholly.touches(table.plan.tables):
                table.doubtful = True
            reader = reading[1] if reading is not None and reading[0] is table else None
            table.deliver(marks, until.get(table, -1), self._known.monotonic, reader)
        self.counts["polls"] += 1
        self.counts["changes"] += len(news)
        if found.everything:
            self.counts["invalidations"] += 1
            log.info(
                "everything may have changed: %s", found.poll.gap or "the change feed begins here"
            )

    # -- trust ----------------------------------------------------------------------------------

    def _why_not(
        self,
        table: CachedTable,
        names: Mapping[TableName, Relation],
        untrusted: Mapping[TableName, str],
    ) -> str | None:
        """Return why changes of some table of a view are not seen."""
        todo, seen = set(table.plan.tables), set[TableName]()
        while todo:
            name = todo.pop()
            seen.add(name)
            why = untrusted.get(name, None if name in names else "there is no such table")
            if why is None:
                continue
            sources = {s for s, targets in self._fills.items() if name in targets} - seen
            if not sources or not sources <= names.keys():
                return Reason("feed", f"changes of {table_label(name)} are not seen: {why}")
            todo |= sources
        return None

    def distrust(self, table: CachedTable) -> str | None:
        """Return why the last poll said that a view is not to be trusted. Emits no SQL."""
        return self._known.reasons.get(table)

    def trusts(self, table: CachedTable) -> bool:
        """Whether the feed tells of all changes of a view, sooner or later."""
        return self._known.reasons.get(table, "") is None

    def will_tell_of(self, changes: ChangeSet) -> bool:
        """Whether the next poll tells of all rows that local changes may have been of."""
        log = self.changelog
        return (log.finds_anything or not changes.everything) and (
            log.finds_replaced or not changes.unlogged
        )

    def concerns(self, changes: ChangeSet) -> bool:
        """Whether changes are of a table of the views: also before the first poll."""
        return any(changes.touches(table.tables) for table in self._tables())

    @property
    def lag(self) -> float | None:
        """How many seconds ago the last poll began that succeeded."""
        known = self._known
        return None if known.position is None else now() - known.began

    def reason(
        self, table: CachedTable, *, bound: float | None = None, fetch: bool = True
    ) -> str | None:
        """Return why a view cannot be answered from memory now, or ``None``.

        A reader who finds the last poll too old polls, if that is allowed.

        :param bound: how old it may be, in seconds; ``None`` for the feed's ``max_lag``.
        """
        bound = self._max_lag if bound is None else bound
        known = self._known
        if table not in known.reasons or now() - known.began > bound or known.began < self._owed:
            if not fetch:
                return Reason("feed", "the change feed has to be read first")
            failed = self._failed
            if failed is not None and time.monotonic() - failed[1] < RETRY_SECONDS:
                return Reason("feed", f"the change feed cannot be read: {one_line(failed[2])}")
            try:
                self.catch_up()
            except Exception as error:
                return Reason("feed", f"the change feed cannot be read: {one_line(error)}")
            known = self._known
        return known.reasons.get(
            table, Reason("feed", "the change feed does not follow the view yet")
        )

    # -- others ---------------------------------------------------------------------------------

    def token(self) -> str:
        """Return a token of all that was committed until now: one SELECT."""
        with self.connect() as connection:
            return str(self.changelog.position(connection))

    def wait_for(self, token: str, timeout: float | None) -> bool:
        """Have read all that a token stands for: no SQL if that is so, else a poll.

        :param timeout: how long to try again if polls fail, in seconds; ``None``: not at all.
        :returns: whether it was read.
        :raises ValueError: if the token is none.
        """
        wanted = self.changelog.parse(token)
        position = self._known.position
        if position is not None and position.includes(wanted):
            return True
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                # What was committed before the token was made was so before this call.
                self.catch_up()
            except Exception:
                if until is None:
                    raise
                left = until - time.monotonic()
                if left <= 0:
                    # Who waited reads next: by the database, until a poll succeeds again.
                    self._owed = now()
                    return False
                wait_for(new_future(), min(left, RETRY_SECONDS), in_task=self._in_task)
            else:
                return True

    def health(self) -> FeedHealth:
        """Return how the feed is doing. Emits no SQL."""
        known, failed, lag = self._known, self._failed, self.lag
        if failed is not None:
            state = "cut off"
        elif lag is None:
            state = "unseeded"
        else:
            state = "following" if lag <= self._max_lag else "lagging"
        missing = {
            name: "there is no such table"
            for table in known.reasons
            for name in table.plan.tables - known.names.keys()
        }
        return FeedHealth(
            state=state,
            lag=lag,
            error=None if failed is None else one_line(failed[2]),
            untrusted={
                table_label(name): why for name, why in {**missing, **known.untrusted}.items()
            },
            polls=self.counts["polls"],
            changes=self.counts["changes"],
            invalidations=self.counts["invalidations"],
        )

    def after_fork(self) -> None:
        """In a forked child: nobody polls. The position is as good as it was in the parent."""
        self._turn = Turn(in_task=self._in_task)
