"""What the commits of an engine mean for the views of a cache.

In: what transactions have written, as ``events.py`` tells it, and what the application says that
the database writes by itself. Out: leases and marks of each view's table. Leases of commits of
which nobody knows how they ended are kept here, and ended when the server has ended them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from threading import Lock
from typing import Any, Final

from sqlalchemy import Connection, Table, text

from .analysis import TableName, table_name
from .cascades import all_cascades
from .changes import ChangeSet, Marks
from .commits import Backend
from .exc import CriteriaError, one_line
from .feed import Consumer
from .interests import Interest, tables_of
from .layout import Layout
from .loading import Snapshots
from .statements import exact_value
from .table import CachedTable
from .turns import after_sections
from .view import CachedView

log = logging.getLogger(__name__)

ORPHAN_CHECK_SECONDS = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """What one commit under way will mark, for each view that it concerns."""

    marks: dict[CachedTable, Marks]
    changes: ChangeSet


_LAYOUT: Final = attrgetter("layout")
_CHANGING: Final = attrgetter("actions", "at_once", "acting")


def _interest_of(
    layouts: list[Layout], changing: list[Any], side_effects: dict[TableName, frozenset[TableName]]
) -> Interest:
    wanted: dict[str, frozenset[str]] = {}
    keys: dict[str, frozenset[tuple[str, ...]]] = {}
    for layout in layouts:
        for table, columns in layout.wanted.items():
            wanted[table] = wanted.get(table, frozenset()) | columns
        for table, known in layout.keys.items():
            keys[table] = keys.get(table, frozenset()) | known
    actions, at_once, acting = (
        (frozenset[Any]().union(*sets) for sets in zip(*changing, strict=True))
        if changing
        else (frozenset[Any](),) * 3
    )
    explained = frozenset(name for _, name in side_effects)
    return Interest(wanted, keys, acting | explained, acting - explained, at_once, actions)


@dataclass(slots=True, eq=False)
class _Orphan:
    """The lease of a COMMIT of which nobody knows how it ended."""

    lease: Lease
    backend: Backend | None
    checked: float = 0.0


class Invalidation:
    """The subscriber of an engine's commits: a cache, seen from there."""

    def __init__(self) -> None:
        self._snapshots: Snapshots | None = None
        self.lives_in: Connection | None = None
        """The connection in whose transaction the cache lives; ``None`` but in tests."""
        self._tables: dict[type[CachedView], CachedTable] = {}
        self._side_effects: dict[TableName, frozenset[TableName]] = {}
        self.consumer: Consumer | None = None
        """What follows the changes that others make."""
        self._orphans: list[_Orphan] = []
        self._lock = Lock()
        self._known: tuple[Any, Interest] = (None, Interest())
        """What the views ask, and what there was to say it."""

    # -- what the database does by itself --------------------------------------------------------

    def side_effects(self, source: Any, *, writes: Iterable[Any]) -> None:
        """Say what the database itself writes when a row of a table is written: by triggers.

        ::

            cache.side_effects(Order, writes=[Stock])

        From then on a commit that writes ``Order`` marks ``Stock`` too, all of it, and so on.
        Foreign keys with ON DELETE and ON UPDATE need no such word. Emits no SQL.

        What counts is the table that statements name. For a trigger of a partition, or of a child
        by inheritance, say it of the parent, too: a statement that writes that sets it off.

        :param source: a mapped class or a table.
        :param writes: mapped classes and tables; none of them if it writes no table of a view,
            which :meth:`check` would otherwise ask about.
        :raises CriteriaError: for anything else.
        """
        targets: set[TableName] = set()
        for model in writes:
            for table in tables_of(model):
                targets |= {table_name(table), *all_cascades(table)}
        for table in tables_of(source):
            name = table_name(table)
            self._side_effects[name] = self._side_effects.get(name, frozenset()) | targets

    def affecting(self, tables: frozenset[TableName]) -> frozenset[TableName]:
        """Return the tables of which a write reaches some tables: they, and by side effects."""
        actions = self.interest().actions
        if not self._side_effects and not actions:
            return tables
        grew = True
        while grew:
            sources = {s for s, found in self._side_effects.items() if not found.isdisjoint(tables)}
            sources |= {action.parent for action in actions if action.child in tables}
            grew = not sources <= tables
            tables |= sources
        return tables

    def _add_side_effects(self, changes: ChangeSet) -> None:
        """Add to changes what the database itself changed because of them."""
        actions = self.interest().actions
        added = bool(self._side_effects or actions)
        while added:
            added = False
            for action in actions:
                if action.child not in changes.tables and changes.sets_off(
                    action.parent, action.columns
                ):
                    changes.add_table(action.child)
                    added = True
            for source, targets in self._side_effects.items():
                if changes.touches([source]) and not targets <= changes.tables:
                    for table in targets:
                        changes.add_table(table)
                    added = True

    def after_fork(self) -> None:
        """In a forked child: the commits under way are the parent's, and end there."""
        self._lock = Lock()
        self._orphans.clear()

    # -- commits --------------------------------------------------------------------------------

    def interest(self) -> Interest:
        """Return what the views ask of written tables: the same object while that is the same."""
        layouts = list(filter(None, map(_LAYOUT, list(self._tables.values()))))
        # What DDL changes is replaced as a whole: see :meth:`.Layout.renew`.
        seen = (layouts, list(map(_CHANGING, layouts)), self._side_effects)
        known, interest = self._known
        if known != seen:
            seen = (*seen[:2], dict(self._side_effects))
            interest = _interest_of(*seen)
            self._known = seen, interest
        return interest

    def tables_named(self, name: str) -> list[Table]:
        """Return the tables of the views' metadata with a name, in any schema and case."""
        metadatas = {t.metadata for table in list(self._tables.values()) for t in table.base_tables}
        return [
            t for metadata in metadatas for t in metadata.tables.values() if t.name.lower() == name
        ]

    def lease(self, changes: ChangeSet) -> Lease:
        """Take a lease on what the changes of a commit will mark."""
        self._add_side_effects(changes)
        marks = {}
        for table in list(self._tables.values()):
            found = self._marks_of(table, changes)
            if found:
                table.lease(found)
                marks[table] = found
        return Lease(marks, changes)

    def publish(self, changes: ChangeSet, lease: Lease | None) -> None:
        """Mark what a commit changed, and end its lease."""
        if after_sections(lambda: self.publish(changes, lease)):
            return  # called by the garbage collector
        self._add_side_effects(changes)
        leased = lease.marks if lease is not None else {}
        for table in list(self._tables.values()):
            table.doubtful = table.doubtful or changes.everything
            table.publish(self._marks_of(table, changes), leased.get(table))
        self._tell_observers()

    def mark(self, changes: ChangeSet) -> None:
        """Mark what the application says has changed, whatever a change feed tells."""
        self._add_side_effects(changes)
        for table in list(self._tables.values()):
            table.publish(table.marks_of(changes))
        self._tell_observers()

    def _tell_observers(self) -> None:
        # When all leases have ended: one of them may be interrupted.
        for table in list(self._tables.values()):
            table.observers.tell()

    def _marks_of(self, table: CachedTable, changes: ChangeSet) -> Marks:
        """Return what changes mark of a view; those of unknown rows a feed may tell of."""
        consumer = self.consumer
        unread = consumer is not None and consumer.trusts(table) and consumer.will_tell_of(changes)
        return table.marks_of(changes, unread=unread)

    def orphan(self, lease: Lease, backend: Backend | None) -> None:
        """Keep a lease until the transaction of a lost connection has ended."""
        if lease.marks:
            with self._lock:
                self._orphans.append(_Orphan(lease, backend))

    def settle_orphans(self) -> None:
        """End the leases of commits that have ended by now: one SELECT for each, now and then."""
        if not self._orphans or self._snapshots is None:
            return
        now = time.monotonic()
        with self._lock:
            due = [o for o in self._orphans if now - o.checked > ORPHAN_CHECK_SECONDS]
            for orphan in due:
                orphan.checked = now
        for orphan in due:
            try:
                ended = self._has_ended(orphan)
            except Exception as error:
                log.warning("whether a COMMIT has ended cannot be found out: %s", one_line(error))
                ended = False
            if ended:
                with self._lock:
                    if orphan not in self._orphans:
                        continue
                    self._orphans.remove(orphan)
                self.publish(orphan.lease.changes, orphan.lease)

    def _has_ended(self, orphan: _Orphan) -> bool:
        assert self._snapshots is not None
        query = {
            # Whether the server process holds the lock that a writing transaction holds on itself.
            "postgresql": "SELECT count(*) FROM pg_locks WHERE pid = :pid "
            "AND locktype IN ('transactionid', 'virtualxid') AND mode = 'ExclusiveLock'",
            # Not innodb_trx: that is served from a cache, and takes a privilege.
            "mysql": "SELECT count(*) FROM information_schema.processlist WHERE id = :pid",
        }.get(self._snapshots.engine.dialect.name.replace("mariadb", "mysql"))
        if self._snapshots.dialect.name == "sqlite":
            return self._snapshots.nobody_writes()
        if orphan.backend is None or query is None:
            return False
        mine, its = (
            engine.url.username for engine in (self._snapshots.engine, self._snapshots.application)
        )
        if mine != its and "processlist" in query:
            return False  # which shows everybody their own
        with self._snapshots.open() as connection:
            return not connection.scalar(text(query), {"pid": orphan.backend.pid})


def named_changes(model: Any, keys: Iterable[Any], dialect: str) -> ChangeSet:
    """Return the change of rows of a mapped class or table; without keys, of any of its rows.

    :raises CriteriaError: for what is neither, or a key that is none.
    """
    changes = ChangeSet()
    keys = tuple(keys)
    for table in tables_of(model):
        if not keys:
            changes.add_table(table_name(table))
        columns = tuple(table.primary_key.columns)
        for key in keys:
            values = key if isinstance(key, tuple) else (key,)
            if len(values) != len(columns):
                raise CriteriaError(
                    f"a key of {len(values)} value(s) is no primary key of {table.fullname}, "
                    f"which is ({', '.join(c.name for c in columns)})"
                )
            exact = tuple(exact_value(c, v, dialect) for c, v in zip(columns, values, strict=True))
            if None in exact:
                changes.add_table(table_name(table))
            else:
                changes.add_rows(table_name(table), [exact])
    return changes
