"""The changelog of SQLite: row triggers, and a log of which the order is that of the commits.

In: connections. Out: what :mod:`.contract` says. SQLite has one writer at a time, so that numbers
of AUTOINCREMENT are given in the order of the commits, and a position is one number. A trigger
reaches only tables of its own database file, so that each attached database that has watched tables
has a changelog of its own, and a position is one number for each.

A position carries, beside the number of the last entry, the time at which that entry was written
and the identity of the file. A file that was restored from a copy has another entry there, or none,
also if it has grown since.

``PRAGMA data_version`` is not used: it tells of others' commits only on a connection that never
writes, and is read no faster than the last number.

What triggers do not see: writes to ``sqlite_master`` with ``PRAGMA writable_schema``, incremental
blob I/O (``Connection.blobopen``), and what is written on a connection on which
SQLITE_DBCONFIG_ENABLE_TRIGGER is off, or which has a TEMP trigger that raises IGNORE.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, NamedTuple
from urllib.parse import quote, unquote

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from sa_tablecache.exc import FeedUnavailable, TableCacheError

from .contract import (
    MOST_KEYS,
    VERSION,
    Change,
    Changelog,
    Installation,
    Poll,
    Position,
    Relation,
    Watch,
)
from .sqlite_catalog import (
    catalog_row,
    databases_of,
    describe,
    looked_at,
    one_moment,
    problem_of,
    registry_of,
    version_of,
)
from .sqlite_conflicts import conflicts, folded, quoted
from .sqlite_entries import Entry, changes_between
from .sqlite_triggers import (
    PREFIX,
    drop_triggers,
    dump,
    full_name,
    literal,
    schema_of,
    statements,
    triggers,
)

_OWNED: Final = tuple(f"{PREFIX}{name}" for name in ("changelog", "meta", "watched"))
_TRIMMED_AT_ONCE: Final = 5_000
"""Entries that one statement deletes: each holds the lock of the writers for some milliseconds."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What was found of one database file at one schema version."""

    version: int = -1
    watched: Mapping[Relation, tuple[Watch | None, str | None]] = field(default_factory=dict)
    """Of each relation, how it is watched, and why its changes are not all logged."""


@dataclass(frozen=True, slots=True)
class SQLitePosition(Position):
    """The last entry of the changelog of each database of a connection, by schema name."""

    entries: Mapping[str, Entry]
    looks: Mapping[str, _Look] = field(default_factory=dict, compare=False, repr=False)
    """What the catalog said: asked again only when its version has changed."""

    def sees(self, change: Change) -> bool:
        """Whether a change is not behind the last entry of its database."""
        schema, incarnation, seq = change.at
        mine = self.entries.get(schema)
        return mine is not None and mine.incarnation == incarnation and seq <= mine.seq

    def includes(self, other: Position) -> bool:
        """Whether no last entry of another position is behind this one's."""
        if not isinstance(other, SQLitePosition):
            return False
        for schema, entry in other.entries.items():
            mine = self.entries.get(schema)
            if mine is None or mine.incarnation != entry.incarnation:
                return False
            if (mine.seq, mine.at) != (entry.seq, entry.at) and mine.seq <= entry.seq:
                return False
        return True

    def __str__(self) -> str:
        return "~".join(
            f"{quote(schema, safe='').replace('~', '%7E')}.{'.'.join(map(str, entry))}"
            for schema, entry in sorted(self.entries.items())
        )


class SQLiteChangelog(Changelog):
    """The changelog of an SQLite database, and of those that are attached to it."""

    finds_anything: ClassVar[bool] = True

    # -- installing -----------------------------------------------------------------------------

    def create(self, schema: str = "main") -> Sequence[str]:
        """Return the statements that install the changelog of one database file.

        :param schema: the name of an attached database; :meth:`watch` gives it by itself.
        """
        return statements("create", schema=quoted(schema), version=VERSION)

    def drop(self, watched: Iterable[Relation] = ()) -> Sequence[str]:
        """Return the statements that remove the changelog.

        They fail, and remove nothing else, while a table is watched that was not named: its
        triggers would fail without a changelog, and so would every write.
        """
        relations = sorted(watched)
        schemas = {schema_of(relation) for relation in relations} | {"main"}
        return [
            *(sql for relation in relations for sql in drop_triggers(relation)),
            *(sql for name in sorted(schemas) for sql in statements("drop", schema=quoted(name))),
        ]

    def watch(self, watch: Watch) -> Sequence[str]:
        """Return the statements that watch a table, or watch it otherwise than before.

        The first one fails if the table or a column is missing. Writes between the statements are
        not lost: the last one logs a change of any row.
        """
        relation, schema = watch.relation, schema_of(watch.relation)
        used = [f"t.{quoted(name)}" for name in (*watch.key, *watch.ranges)]
        log, name = f"{quoted(schema)}.{PREFIX}watched", literal(relation.name)
        return [
            f"SELECT {', '.join(used) or '1'} FROM {full_name(relation)} AS t LIMIT 0",
            *(self.create(schema) if schema != "main" else ()),
            *drop_triggers(relation),
            f"INSERT OR REPLACE INTO {log} VALUES ({name}, {literal(dump(watch))})",
            *triggers(watch).values(),
            *self.invalidate(relation),
        ]

    def unwatch(self, relation: Relation) -> Sequence[str]:
        """Return the statements that no longer watch a table."""
        log = f"{quoted(schema_of(relation))}.{PREFIX}watched"
        return [
            *drop_triggers(relation),
            f"DELETE FROM {log} WHERE name = {literal(relation.name)}",
        ]

    def invalidate(self, relation: Relation) -> Sequence[str]:
        """Return the statement that logs a change of any row of a table."""
        log = f"{quoted(schema_of(relation))}.{PREFIX}changelog"
        return [
            f"INSERT INTO {log} (relation, operation) VALUES ({literal(relation.name)}, 'T')",
        ]

    # -- asking the catalog ---------------------------------------------------------------------

    def installed(self, connection: Connection) -> Installation:
        """Return what is installed: five statements, and some for each watched table."""
        watched: dict[Relation, Watch] = {}
        outdated: dict[Relation, str] = {}
        hindered: dict[Relation, str] = {}
        versions = []
        with one_moment(connection):
            for schema in databases_of(connection):
                version = version_of(connection, schema)
                if version is None:
                    continue
                versions.append(version)
                for watch in registry_of(connection, schema).values():
                    relation = Relation(schema, watch.relation.name)
                    watched[relation] = watch
                    problem = problem_of(connection, relation, watch)
                    if problem is not None:
                        (outdated if problem.outdated else hindered)[relation] = problem.why
        return Installation(min(versions, default=None), watched, outdated, hindered)

    def resolve(
        self, connection: Connection, names: Iterable[tuple[str | None, str]]
    ) -> Mapping[tuple[str | None, str], Relation]:
        """Return the relations that names mean: SQLite looks into each database in turn."""
        # Tables of TEMP come first, and are nothing that a changelog could have.
        databases = ["temp", *databases_of(connection)]
        found = {}
        for schema, name in names:
            for database in databases if schema is None else [schema]:
                spelling = next((d for d in databases if folded(d) == folded(database)), None)
                if spelling is not None:
                    row = catalog_row(connection, Relation(spelling, name))
                    if row is not None:
                        found[schema, name] = Relation(spelling, row.name)
                        break
        return found

    def propose(
        self,
        connection: Connection,
        relation: Relation,
        ranges: Sequence[str] = (),
        key: Sequence[str] = (),
    ) -> Watch:
        """Return how a table is best watched: four statements, and one for each index.

        :raises TableCacheError: if it is missing, or can have no triggers that see its changes.
        """
        table, problem = describe(connection, relation)
        if table is None:
            raise TableCacheError(f"{relation} cannot be watched: {problem}")
        schema = schema_of(relation)
        columns = connection.exec_driver_sql(
            f"PRAGMA {quoted(schema)}.table_xinfo({quoted(table.name)})"
        ).all()
        names = {folded(column[1]) for column in columns}
        missing = {name for name in (*ranges, *key) if folded(name) not in names}
        if missing:
            raise TableCacheError(f"{relation} has no column {', '.join(sorted(missing))}")
        watched = Relation(schema, table.name)
        logged = tuple(key) or tuple(c[1] for c in sorted(columns, key=lambda c: int(c[5])) if c[5])
        replaced = tuple(conflicts(connection, watched, table.sql, logged))
        return Watch(watched, logged, tuple(ranges), MOST_KEYS, replaced)

    def owned(self) -> frozenset[Relation]:
        """Return the changelog's own tables."""
        return frozenset(Relation("", name) for name in _OWNED)

    # -- reading --------------------------------------------------------------------------------

    def position(self, connection: Connection) -> SQLitePosition:
        """Return the position of now: one statement, and one for each database file."""
        with one_moment(connection):
            return SQLitePosition(
                {name: head.last for name, head in _heads(connection, {}).items()}
            )

    def parse(self, token: str) -> SQLitePosition:
        """Return the position that a token says."""
        entries = {}
        for part in token.split("~"):
            match = re.fullmatch(r"([\w.%-]+)\.([0-9a-f]+-[0-9a-f]+)\.([0-9]+)\.([0-9]+)", part)
            if match is None:
                raise ValueError(f"{token!r} is no position of a changelog of SQLite")
            entries[unquote(match[1])] = Entry(match[2], int(match[3]), int(match[4]))
        return SQLitePosition(entries)

    def poll(
        self, connection: Connection, position: Position, relations: frozenset[Relation]
    ) -> Poll:
        """Return what was committed since a position.

        Two statements and two for each database file; one more where it has new entries, and some
        for each relation when its schema has changed.

        :param connection: in autocommit, or at the begin of a transaction.
        :param relations: those that are looked at; changes of others are left out.
        """
        if not isinstance(position, SQLitePosition):
            raise TypeError(f"{position!r} is no position of a changelog of SQLite")
        before = position.entries
        gaps: list[str] = []
        changes: list[Change] = []
        entries, looks = {}, {}
        fingerprints, untrusted = {}, {}
        by_schema: dict[str, list[Relation]] = {}
        for relation in relations:
            by_schema.setdefault(schema_of(relation), []).append(relation)
        with one_moment(connection):
            for schema, head in _heads(connection, before).items():
                asked = by_schema.pop(schema, ())
                entries[schema] = head.last
                gap = head.gap
                look = position.looks.get(schema, _Look())
                if (
                    gap
                    or look.version != head.schema_version
                    or not look.watched.keys() >= set(asked)
                ):
                    look = _Look(head.schema_version, dict(looked_at(connection, schema, asked)))
                looks[schema] = look
                for relation in asked:
                    fingerprints[relation] = f"{head.last.incarnation}.{head.schema_version}"
                    if (why := look.watched[relation][1]) is not None:
                        untrusted[relation] = why
                if gap and asked:
                    gaps.append(gap)
                elif asked and head.last.seq > before[schema].seq:
                    watched = {r: look.watched[r][0] for r in asked}
                    changes += changes_between(
                        connection, schema, before[schema].seq, head.last, watched
                    )
        for schema, left in by_schema.items():
            for relation in left:
                fingerprints[relation] = ""
                untrusted[relation] = f"there is no changelog in the database {schema}"
        return Poll(
            SQLitePosition(entries, looks),
            tuple(changes),
            "; ".join(gaps) or None,
            fingerprints,
            untrusted,
        )

    def trim(self, connection: Connection, keep: float) -> int:
        """Delete what is older than some seconds, some thousand entries in one statement.

        :param connection: in autocommit, so that other writers get their turn between statements.
        :returns: the number of deleted entries; -1 if there was none because somebody else writes.
        """
        deleted = 0
        try:
            for schema in databases_of(connection):
                if version_of(connection, schema) is not None:
                    for count in _trimmed(connection, f"{quoted(schema)}.{PREFIX}changelog", keep):
                        deleted += count
        except OperationalError as error:
            if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            return deleted or -1  # others write: there is a next time
        return deleted

    def notify(self, connection: Connection) -> None:
        """Do nothing: SQLite tells nobody of a commit."""


# -- reading ------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """Where the changelog of a database file stands."""

    last: Entry
    gap: str | None
    schema_version: int


def _heads(connection: Connection, before: Mapping[str, Entry]) -> dict[str, _Head]:
    """Return where the changelogs stand, and whether entries after a position may be missing."""
    heads = {}
    for schema, file in databases_of(connection).items():
        known = before.get(schema)
        log = f"{quoted(schema)}.{PREFIX}changelog"
        meta = f"{quoted(schema)}.{PREFIX}meta"
        try:
            row = connection.exec_driver_sql(
                f"SELECT (SELECT value FROM {meta} WHERE name = 'version'), "
                f"(SELECT value FROM {meta} WHERE name = 'incarnation'), "
                f"(SELECT at FROM {log} WHERE seq = ?), max(seq), "
                f"(SELECT at FROM {log} ORDER BY seq DESC LIMIT 1) FROM {log}",
                (known.seq if known else None,),
            ).one()
        except OperationalError as error:
            if "no such table" in str(error.orig):
                continue
            raise
        version, incarnation, then, seq, at = row
        if version not in (VERSION, VERSION - 1):
            raise FeedUnavailable(
                f"the changelog of the database {schema} has version {version}, and this program "
                f"reads {VERSION}: install the change feed with the newest one"
            )
        try:
            inode = Path(file).stat().st_ino if file else 0
        except FileNotFoundError:
            raise FeedUnavailable(f"the file of the database {schema} is gone: {file}") from None
        incarnation = f"{incarnation}-{inode:x}"
        gap = None
        if seq is None:
            gap, seq, at = f"the changelog of {schema} was emptied", -1, -1
        elif known is None:
            gap = f"the database {schema} was attached since"
        elif known.incarnation != incarnation:
            gap = f"the database {schema} is another file, or its changelog was installed anew"
            # Of an old file that was replaced, the pool may have more connections.
            connection.connection.invalidate(soft=True)
        elif then is None and seq > known.seq:
            gap = f"the changelog of {schema} was trimmed past entry {known.seq}"
        elif then != known.at:
            gap = f"the database {schema} was restored to a state without entry {known.seq}"
        schema_version = connection.exec_driver_sql(f"PRAGMA {quoted(schema)}.schema_version")
        heads[schema] = _Head(Entry(incarnation, seq, at), gap, schema_version.scalar_one())
    if not heads:
        raise FeedUnavailable(
            "no change feed is installed in this database: install it with a migration, with "
            "cache.install_feed() or with `python -m sa_tablecache feed install`"
        )
    return heads


def _trimmed(connection: Connection, log: str, keep: float) -> Iterator[int]:
    """Delete old entries of a changelog; yield how many, after each statement."""
    # The clock may have been set back: what is deleted is all before the first young one, but for
    # the one before it, where readers stand that have not seen that one.
    young = connection.exec_driver_sql(
        f"SELECT seq FROM {log} WHERE at >= (julianday('now') - 2440587.5) * 86400000 - ? "
        "ORDER BY seq LIMIT 1",
        (keep * 1000,),
    ).scalar()
    bound = connection.exec_driver_sql(
        f"SELECT max(seq) FROM {log} WHERE seq < coalesce(?, 9e18)", (young,)
    ).scalar()
    count = _TRIMMED_AT_ONCE
    while count == _TRIMMED_AT_ONCE:
        count = connection.exec_driver_sql(
            f"DELETE FROM {log} WHERE seq IN (SELECT seq FROM {log} WHERE seq < ? "
            f"ORDER BY seq LIMIT {_TRIMMED_AT_ONCE})",
            (bound,),
        ).rowcount
        yield count
