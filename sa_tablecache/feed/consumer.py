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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection

from sa_tablecache.analysis import TableName, table_label, table_name
from sa_tablecache.changes import UNKNOWN, ChangeSet, RowKey, Written
from sa_tablecache.loading import Snapshots
from sa_tablecache.table import CachedTable
from sa_tablecache.turns import Turn, new_future, wait_for

from .contract import Change, Poll, Position, Relation
from .dialects import changelog_for
from .keys import LoggedTable, Unexact, one_key
from .settings import ChangeFeed

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 0.2
"""So long after a poll that failed, readers do not try again."""


@dataclass(frozen=True, slots=True)
class FeedHealth:
    """How a cache follows the changes of its database."""

    state: str
    """``unseeded``, ``following``, ``lagging`` (older than ``max_lag``) or ``cut off``."""
    lag: float | None
    """How many seconds ago the last poll began that succeeded."""
    error: str | None
    """Why the last poll failed."""
    untrusted: Mapping[str, str]
    """Tables of the views whose changes are not seen, and why."""
    polls: int
    changes: int
    """How many were delivered."""
    invalidations: int
    """How often everything may have changed: when the feed was seeded, or had a gap."""

    @property
    def complaints(self) -> tuple[str, ...]:
        """What there is to complain about, in words."""
        said = [f"changes of {table} are not seen: {why}" for table, why in self.untrusted.items()]
        if self.state == "cut off":
            said.append(f"the change feed cannot be read: {self.error}")
        elif self.state != "following":
            said.append(f"the change feed is {self.state}")
        return tuple(said)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the last poll left: replaced as a whole."""

    position: Position | None = None
    began: float = 0.0
    """When the poll began, by the monotonic clock."""
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
            self._began += 1
            number = self._began
            try:
                self._poll()
            except Exception as error:
                if self._failed is None:
                    log.warning("the change feed cannot be read: %s", error)
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

    def _poll(self) -> None:
        tables = list(self._tables())
        until = {table: table.sequence for table in tables}
        began = time.monotonic()
        before = self._known
        with self.connect() as connection:
            names = self._names(connection, tables)
            position = before.position
            if position is None:
                position = self.changelog.position(connection)
            poll = self.changelog.poll(connection, position, frozenset(names.values()))
            prints = {relation: poll.fingerprints.get(relation) for relation in names.values()}
            moved = {
                relation
                for relation, fingerprint in prints.items()
                if relation not in before.fingerprints
                or before.fingerprints[relation] != fingerprint
            }
            logged = self._logged(connection, tables, names, moved)
        self._pause("polled")
        # From here on nothing waits, so that nothing can be half done.
        untrusted = {n: poll.untrusted[r] for n, r in names.items() if r in poll.untrusted}
        back = before.untrusted.keys() - untrusted.keys()
        self._deliver(
            poll,
            _Found(
                names, logged, moved, frozenset(back), untrusted, seeded=before.position is None
            ),
            until,
        )
        for name in untrusted.keys() - before.untrusted.keys():
            log.warning("changes of %s are not seen: %s", table_label(name), untrusted[name])
        for name in back & names.keys():
            log.info("changes of %s are seen again", table_label(name))
        self._known = _Known(
            poll.position,
            began,
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
        known = {n: how for n, how in self._known.logged.items() if names.get(n) not in moved}
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

    def _deliver(self, poll: Poll, found: _Found, until: Mapping[CachedTable, int]) -> None:
        """Mark what a poll found, in all views: those too that were added meanwhile."""
        everything = found.seeded or poll.gap is not None
        wholly = ChangeSet(everything=everything)
        called: dict[Relation, list[TableName]] = {}
        for name, relation in found.names.items():
            if relation in found.moved or name in found.back:
                wholly.add_table(name)
            else:
                called.setdefault(relation, []).append(name)
        changes = [change for change in poll.changes if change.relation in called]
        self._add_filled(wholly, found)
        together = ChangeSet()
        if not everything:
            together = self._read(changes, called, found)
            together.update(wholly)
        for table in list(self._tables()):
            known = table in until or table.plan.tables <= found.names.keys()
            unknown = everything or not known
            if unknown:
                marks = table.marks_of(ChangeSet(everything=True))
            elif table.echoes.silent:
                marks = table.marks_of(together)
            else:
                marks = table.marks_of(wholly).union(
                    *(
                        table.echoes.new(
                            table.marks_of(self._read([change], called, found)), change
                        )
                        for change in changes
                    )
                )
            if unknown or wholly.touches(table.plan.tables):
                table.doubtful = True
            table.deliver(marks, until.get(table, -1), None if everything else poll.position)
        self.counts["polls"] += 1
        self.counts["changes"] += len(changes)
        if everything:
            self.counts["invalidations"] += 1
            log.info("everything may have changed: %s", poll.gap or "the change feed begins here")

    def _read(
        self,
        changes: Iterable[Change],
        called: Mapping[Relation, list[TableName]],
        found: _Found,
    ) -> ChangeSet:
        """Return changes of the changelog as changes of the models' tables."""
        result = ChangeSet()
        rows: dict[TableName, dict[RowKey, list[dict[str, Any]]]] = {}
        for change in changes:
            for name in called[change.relation]:
                how = found.logged[name]
                if how is None or (change.keys is None and change.ranges is None):
                    result.add_table(name)
                elif change.keys is None:
                    result.add_ranges(name, how.ranges(change.ranges or {}))
                else:
                    known = rows.setdefault(name, {})
                    try:
                        for values in change.keys:
                            key, beside = how.row(values)
                            befores = known.setdefault(key, [])
                            if beside and beside not in befores:
                                befores.append(beside)
                    except Unexact as why:
                        log.debug("a change of %s is not known exactly: %s", name, why)
                        result.add_table(name)
        for name, known in rows.items():
            for key, befores in known.items():
                written = Written(before=tuple(befores), logged=True) if befores else UNKNOWN
                result.add_rows(name, [key], written)
        self._add_filled(result, found)
        return result

    def _add_filled(self, changes: ChangeSet, found: _Found) -> None:
        """Add tables that cannot be watched, where what fills them has changed."""
        added = bool(self._fills)
        while added:
            added = False
            for source, targets in list(self._fills.items()):
                unseen = {t for t in targets if t in found.untrusted or t not in found.names}
                if not unseen <= changes.tables and changes.touches([source]):
                    for table in unseen:
                        changes.add_table(table)
                    added = True

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
                return f"changes of {table_label(name)} are not seen: {why}"
            todo |= sources
        return None

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
        """Whether changes are of a table of the views."""
        return changes.touches(self._known.names)

    @property
    def lag(self) -> float | None:
        """How many seconds ago the last poll began that succeeded."""
        known = self._known
        return None if known.position is None else time.monotonic() - known.began

    def reason(
        self, table: CachedTable, *, bound: float | None = None, fetch: bool = True
    ) -> str | None:
        """Return why a view cannot be answered from memory now, or ``None``.

        A reader who finds the last poll too old polls, if that is allowed.

        :param bound: how old it may be, in seconds; ``None`` for the feed's ``max_lag``.
        """
        bound = self._max_lag if bound is None else bound
        known = self._known
        now = time.monotonic()
        if table not in known.reasons or now - known.began > bound:
            if not fetch:
                return "the change feed has to be read first"
            failed = self._failed
            if failed is not None and now - failed[1] < RETRY_SECONDS:
                return f"the change feed cannot be read: {failed[2]}"
            try:
                self.catch_up()
            except Exception as error:
                return f"the change feed cannot be read: {error}"
            known = self._known
        return known.reasons.get(table, "the change feed does not follow the view yet")

    # -- others ---------------------------------------------------------------------------------

    def position(self, connection: Connection) -> Position:
        """Return the position of a snapshot in the changelog: one SELECT."""
        return self.changelog.position(connection)

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
            error=None if failed is None else str(failed[2]),
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


@dataclass(frozen=True, slots=True)
class _Found:
    """What a poll found beside changes."""

    names: Mapping[TableName, Relation]
    logged: Mapping[TableName, LoggedTable | None]
    moved: set[Relation]
    """Those that are new, or whose fingerprint is another."""
    back: frozenset[TableName]
    """Tables that can be trusted again."""
    untrusted: Mapping[TableName, str]
    seeded: bool
