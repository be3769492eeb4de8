"""The change feed of PostgreSQL 13 and newer.

In: statement triggers with transition tables, which log the keys of each statement's rows, with the
id of its transaction, into a table without WAL. Out: the changes between two snapshots. A position
is a snapshot: transactions below its ``xmax`` that were not running. What became visible since then
has a later id, or is of one that was running; so each change comes once, whatever the order in
which transactions commit, and nothing waits for the slowest.

A crash and a failover may use ids again that were never flushed. They empty unlogged tables, so
that an incarnation, which is kept in one, is gone with the changelog; and after each start of the
server a new one begins, since its files may have been put back. The SQL is in ``sql/postgresql``.

An event trigger could watch new partitions by itself, but takes a superuser; instead polls find
them, and do not trust the table until it is watched again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Final

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from sa_tablecache.exc import FeedUnavailable

from .contract import (
    VERSION,
    Change,
    Changelog,
    Installation,
    Poll,
    Position,
    Relation,
    Watch,
)
from .wakeup import CHANNEL

TRIM_BATCH: Final = 10_000

_AGAIN: Final = "; watch it again"
"""How the reasons end that watching a table again ends."""
_READABLE: Final = (VERSION, VERSION - 1)
_UNBOUNDED: Final = frozenset(
    ("NaN", "Infinity", "-Infinity", "infinity", "-infinity", "infinity+00:00", "-infinity+00:00")
)
"""Values that Python has not, or sorts elsewhere: nothing is known of such a range."""
_TOKEN: Final = re.compile(r"(?P<incarnation>[0-9a-f]*)\.(?P<xmax>[0-9a-f]{1,16})"
                           r"(?P<running>(-[0-9a-f]{1,16})*)")  # fmt: skip
_SAFE: Final = re.compile(r"[A-Za-z0-9_ .-]*")

_GRANTS: Final = (
    "the role that polls needs GRANT USAGE ON SCHEMA sa_tablecache and "
    "GRANT SELECT ON ALL TABLES IN SCHEMA sa_tablecache"
)
_UNAVAILABLE: Final = {
    "3F000": "no change feed is installed: run cache.install_feed(), or op.create_change_feed()",
    "42P01": "no change feed is installed: run cache.install_feed(), or op.create_change_feed()",
    "42883": "the change feed that is installed is of another version",
    "42703": "the change feed that is installed is of another version",
    "0A000": "the server is a standby: changes are read from the primary",
    "42501": f"the change feed may not be read: {_GRANTS}",
}

_RESOLVE: Final = text(
    """
    SELECT a.place, n.nspname AS schema, c.relname AS name
    FROM jsonb_array_elements(CAST(CAST(:names AS text) AS jsonb))
        WITH ORDINALITY AS a (name, place)
    JOIN pg_class AS c ON c.oid = to_regclass(
        concat_ws('.', quote_ident(a.name ->> 0), quote_ident(a.name ->> 1)))
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    """
)
_KEY: Final = text(
    """
    SELECT a.attname AS name
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_index AS i ON i.indrelid = c.oid AND i.indisprimary
    CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (number, place)
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = k.number
    WHERE n.nspname = :schema AND c.relname = :name ORDER BY k.place
    """
)
_POSITION: Final = text(
    """
    SELECT m.version, pg_current_snapshot()::text AS snapshot, i.incarnation
    FROM sa_tablecache.meta AS m LEFT JOIN sa_tablecache.incarnation AS i ON true
    """
)
_INSTALLED: Final = text("SELECT to_regclass('sa_tablecache.meta') IS NOT NULL")
_VERSION: Final = text("SELECT version FROM sa_tablecache.meta")
_REVIVE: Final = text("SELECT sa_tablecache.revive()")
_TRIM: Final = text("SELECT sa_tablecache.trim(CAST(:keep AS double precision), :batch)")
_NOTIFY: Final = text(f"SELECT pg_notify('{CHANNEL}', '')")


@cache
def _file(name: str) -> str:
    sql = files(__package__) / "sql" / "postgresql" / f"{name}.sql"
    return sql.read_text(encoding="utf-8")


@cache
def _query(name: str) -> TextClause:
    return text(_file(name))


@dataclass(frozen=True, slots=True)
class Snapshot(Position):
    """Which transactions of an incarnation of the server were behind a snapshot.

    :param incarnation: empty if the server has none yet, after a crash; then nothing is known.
    :param running: those that had begun before ``xmax`` and were not ended, in order.
    """

    incarnation: str
    xmax: int
    running: tuple[int, ...] = ()

    @classmethod
    def read(cls, snapshot: str, incarnation: str | None) -> Snapshot:
        """Return the position that PostgreSQL writes as ``xmin:xmax:running,...``."""
        _, xmax, running = snapshot.split(":")
        return cls(incarnation or "", int(xmax), tuple(map(int, filter(None, running.split(",")))))

    @property
    def xmin(self) -> int:
        """The first transaction that may be not behind it."""
        return self.running[0] if self.running else self.xmax

    def sees(self, change: Change) -> bool:
        """Whether the transaction of a change was behind the snapshot."""
        incarnation, xid = change.at
        return (
            bool(incarnation)
            and incarnation == self.incarnation
            and xid < self.xmax
            and xid not in self.running
        )

    def includes(self, other: Position) -> bool:
        """Whether all that is behind another snapshot is behind this one."""
        return (
            isinstance(other, Snapshot)
            and bool(self.incarnation)
            and other.incarnation == self.incarnation
            and other.xmax <= self.xmax
            and all(xid in other.running for xid in self.running if xid < other.xmax)
        )

    def __str__(self) -> str:
        """Return ``incarnation.xmax-distance-distance``: hexadecimal, of what was running."""
        running = "".join(f"-{self.xmax - xid:x}" for xid in reversed(self.running))
        return f"{self.incarnation}.{self.xmax:x}{running}"


class PostgreSQLChangelog(Changelog):
    """The changelog of PostgreSQL, in the schema ``sa_tablecache``.

    Positions are snapshots. A role that polls needs USAGE on the schema and SELECT on its tables;
    a role that watches tables owns them and the schema; roles that write them need no rights.
    """

    finds_anything: ClassVar[bool] = True
    wakes: ClassVar[bool] = True

    # -- installing -----------------------------------------------------------------------------

    def create(self) -> Sequence[str]:
        """Return the statements of ``create.sql``."""
        return tuple(part.strip() for part in _file("create").split("\n\n"))

    def drop(self, watched: Iterable[Relation] = ()) -> Sequence[str]:
        """Return the statement that drops the schema; the triggers go with their functions."""
        return ("DROP SCHEMA IF EXISTS sa_tablecache CASCADE",)

    def watch(self, watch: Watch) -> Sequence[str]:
        """Return a call of ``sa_tablecache.watch()``, which makes a function and the triggers.

        Each table that lacks a trigger is locked against writers until the transaction ends; where
        nothing is to be done, nothing is locked.
        """
        schema, name = _place(watch.relation)
        key, ranges = map(_array, (watch.key, watch.ranges))
        return (f"SELECT sa_tablecache.watch({schema}, {name}, {key}, {ranges}, {watch.limit})",)

    def unwatch(self, relation: Relation) -> Sequence[str]:
        """Return a call of ``sa_tablecache.unwatch()``."""
        schema, name = _place(relation)
        return (f"SELECT sa_tablecache.unwatch({schema}, {name})",)

    def invalidate(self, relation: Relation) -> Sequence[str]:
        """Return a call of ``sa_tablecache.invalidate()``, which a role that polls may make."""
        schema, name = _place(relation)
        return (f"SELECT sa_tablecache.invalidate({schema}, {name})",)

    # -- asking the catalog ---------------------------------------------------------------------

    def installed(self, connection: Connection) -> Installation:
        """Return what is installed; 1 or 3 statements."""
        if not connection.scalar(_INSTALLED):
            return Installation(None)
        watched, outdated, hindered = {}, {}, {}
        with _available():
            version = connection.scalar(_VERSION)
            if version not in _READABLE:
                return Installation(version)
            rows = connection.execute(_query("installed")).all()
        for schema, name, definition, problem in rows:
            found = json.loads(definition)
            relation = Relation(schema, name)
            watched[relation] = Watch(
                relation, tuple(found["key"]), tuple(found["ranges"]), found["limit"]
            )
            if problem is not None and problem.endswith(_AGAIN):
                outdated[relation] = problem
            elif found["version"] != VERSION:
                outdated[relation] = (
                    f"its triggers are of version {found['version']}, not {VERSION}"
                )
            elif problem is not None:
                hindered[relation] = problem
        return Installation(version, watched, outdated, hindered)

    def resolve(
        self, connection: Connection, names: Iterable[tuple[str | None, str]]
    ) -> Mapping[tuple[str | None, str], Relation]:
        """Return the relations that names mean to the connection; 1 statement."""
        asked = list(names)
        rows = connection.execute(_RESOLVE, {"names": json.dumps(asked)}).all()
        return {asked[place - 1]: Relation(schema, name) for place, schema, name in rows}

    def propose(
        self,
        connection: Connection,
        relation: Relation,
        ranges: Sequence[str] = (),
        key: Sequence[str] = (),
    ) -> Watch:
        """Return a watch by the primary key of a table; 1 statement, or none if a key is given."""
        if key:
            return Watch(relation, tuple(key), tuple(ranges))
        asked = {"schema": relation.schema, "name": relation.name}
        return Watch(relation, tuple(connection.execute(_KEY, asked).scalars()), tuple(ranges))

    def owned(self) -> frozenset[Relation]:
        """Return the tables of the schema ``sa_tablecache``."""
        names = ("meta", "watched", "alive", "changelog", "incarnation")
        return frozenset(Relation("sa_tablecache", name) for name in names)

    # -- reading --------------------------------------------------------------------------------

    def position(self, connection: Connection) -> Snapshot:
        """Return the snapshot of a connection; 1 statement.

        What its own transaction has written counts as behind it.
        """
        with _available():
            row = connection.execute(_POSITION).one_or_none()
        _check(None if row is None else row.version)
        assert row is not None
        return Snapshot.read(row.snapshot, row.incarnation)

    def parse(self, token: str) -> Snapshot:
        """Return the snapshot that a token says."""
        if (match := _TOKEN.fullmatch(token)) is None:
            raise ValueError(f"{token!r} is no position of a changelog of PostgreSQL")
        xmax = int(match["xmax"], 16)
        distances = [int(part, 16) for part in match["running"].split("-")[1:]]
        if distances != sorted(set(distances)) or not all(0 < d <= xmax for d in distances):
            raise ValueError(f"{token!r} is no position of a changelog of PostgreSQL")
        return Snapshot(match["incarnation"], xmax, tuple(xmax - d for d in reversed(distances)))

    def poll(
        self, connection: Connection, position: Position, relations: frozenset[Relation]
    ) -> Poll:
        """Return what has become visible since a snapshot; 1 statement.

        Another two after a crash, a failover or a restart, where a new incarnation begins. In a
        transaction that is read-only none begins: then its position knows nothing, and is a gap.
        """
        assert isinstance(position, Snapshot)
        asked = {
            "incarnation": position.incarnation,
            "xmax": str(position.xmax),
            "running": f"{{{','.join(map(str, position.running))}}}",
            "relations": json.dumps(sorted(relations)),
        }
        with _available():
            head, rows = _poll(connection, asked)
            if head[3] is None and head[5] == "off":
                connection.execute(_REVIVE)
                head, rows = _poll(connection, asked)
        now = Snapshot.read(head[2], head[3])
        gap = _gap(position, now, int(head[4] or 0))
        changes: list[Change] = []
        fingerprints: dict[Relation, str] = {}
        untrusted: dict[Relation, str] = {}
        for kind, schema, name, what, detail, ranges, xid in rows:
            relation = Relation(schema, name)
            if kind == 1 and gap is None:
                at = (now.incarnation, int(xid))
                changes.append(Change(relation, what, _keys(detail), _ranges(ranges), at))
            elif kind == 2:
                fingerprints[relation] = what
                if detail is not None:
                    untrusted[relation] = detail
        return Poll(now, tuple(changes), gap, fingerprints, untrusted)

    def trim(self, connection: Connection, keep: float) -> int:
        """Delete changes that ended at least ``keep`` seconds ago, and at most twice as long.

        A statement for each 10,000 of them; in autocommit each is a transaction. Who calls it most
        impatiently decides for all.
        """
        deleted = 0
        with _available():
            while True:
                batch = connection.scalar(_TRIM, {"keep": keep, "batch": TRIM_BATCH})
                if batch < TRIM_BATCH:
                    return deleted + max(batch, 0) if deleted or batch >= 0 else -1
                deleted += batch

    def notify(self, connection: Connection) -> None:
        """Emit ``pg_notify``; best in autocommit: its COMMIT waits for those of all others."""
        connection.execute(_NOTIFY)


def _poll(connection: Connection, asked: Mapping[str, str]) -> tuple[Any, Sequence[Any]]:
    rows = connection.execute(_query("poll"), asked).all()
    head = next((row for row in rows if row[0] == 0), None)
    _check(None if head is None else int(head[1]))
    assert head is not None
    return head, rows


def _gap(before: Snapshot, now: Snapshot, trimmed: int) -> str | None:
    if not now.incarnation or before.incarnation != now.incarnation:
        return (
            "the server was started, recovered, failed over or restored since the last poll, "
            "or the changelog was installed anew"
        )
    if now.xmax < before.xmax:
        return "transaction ids went back: the server was restored"
    if trimmed > before.xmin:
        return "the changelog was trimmed past the last poll; keep changes for longer"
    return None


def _keys(logged: str | None) -> tuple[tuple[Any, ...], ...] | None:
    found = _parsed(logged)
    # Of an UPDATE that changed some keys the old and then the new ones: the others twice.
    return None if found is None else tuple(dict.fromkeys(map(tuple, found)))


def _ranges(logged: str | None) -> dict[str, tuple[Any, Any]] | None:
    found = _parsed(logged)
    if found is None:
        return None
    return {
        name: (bounds[0], bounds[1])
        for name, bounds in found.items()
        if bounds is not None and _UNBOUNDED.isdisjoint(bounds)
    }


def _parsed(logged: str | None) -> Any:
    if logged is None:
        return None
    try:
        return json.loads(logged)
    except ValueError:  # logged by the triggers of a table whose columns have other types by now
        return None


def _check(version: int | None) -> None:
    if version not in _READABLE:
        raise FeedUnavailable(
            f"the change feed that is installed is of version {version}, and this process reads "
            f"{VERSION} and {VERSION - 1}: deploy the program that goes with it"
        )


@contextmanager
def _available() -> Iterator[None]:
    """Say what is missing where the database cannot know it."""
    try:
        yield
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        if state not in _UNAVAILABLE:
            raise
        raise FeedUnavailable(_UNAVAILABLE[state]) from error


def _place(relation: Relation) -> tuple[str, str]:
    """Return a schema and a name as SQL; without a schema, the one in which tables are created."""
    schema = _literal(relation.schema) if relation.schema else "current_schema()"
    return schema, _literal(relation.name)


def _literal(value: str) -> str:
    """Return a string as SQL, without the characters that a driver takes for parameters."""
    if _SAFE.fullmatch(value):
        return f"'{value}'"
    escaped = value.replace("'", "''")
    return "E'" + re.sub(r"[\\%:?$]", lambda match: f"\\x{ord(match[0]):02x}", escaped) + "'"


def _array(values: Iterable[str]) -> str:
    return f"ARRAY[{', '.join(map(_literal, values))}]::text[]"
