"""The changelog of MariaDB 10.6 and MySQL 8: row triggers, and numbers of which none is forgotten.

In: connections. Out: what :mod:`.contract` says. Each changed row is one entry with an
AUTO_INCREMENT id. Ids become visible in any order, and those of what is rolled back never do. So a
position is the last id that was seen, and the *gaps* before it: ids of which no entry was.

What becomes of a gap is decided by the primary key. Either its entry becomes visible; or there is
none, for those either who read uncommitted rows, and then a reader *takes* the id, by an entry of
its own that says nothing. There cannot be both: a writer that had got the id, and was not so far
yet, finds it taken, in the trigger, and gets another one. Then the gap is closed like any other.
No long transaction keeps it open, no clock is asked, no privilege is needed to see what others
do, and a prepared XA transaction is what it looks like: under way.

A gap is left alone until a second poll finds it: most transactions are committed by then. Now and
then a reader notes its position in the database, so that who needs that of now does not have to
look for gaps in the whole changelog.

A reader stays on one server, as long as that runs. By the incarnation of the changelog, the name
and the number of the server, and the second in which it was started, it notices that it is on
another one, or on another history. Replicas are refused, and so is what several servers write:
Galera, and circular replication (``auto_increment_increment`` is not 1). Nobody but
:meth:`MySQLChangelog.trim` may delete entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from sa_tablecache.drivers import autocommits
from sa_tablecache.exc import TableCacheError

from .contract import VERSION, Changelog, Installation, Poll, Position, Relation, Watch
from .mysql_catalog import error_code, look, propose, resolve
from .mysql_entries import Entries
from .mysql_positions import Gaps, MySQLPosition, without
from .mysql_server import (
    META,
    NOT_INSTALLED,
    Server,
    available,
    check_primary,
    check_version,
    is_mariadb,
    variables,
)
from .mysql_triggers import (
    LOG,
    PREFIX,
    dump,
    full_name,
    literal,
    load,
    query,
    quoted,
    statements,
    trigger_names,
    triggers,
)

_OWNED: Final = (LOG, META, f"{PREFIX}watched")

_MOST_RANGES: Final = 100
"""So many gaps a poll looks into one by one; of more it reads all that lies between."""
_MOST_TAKEN: Final = 1_000
"""So many ids a poll takes."""
_NOTED_STEP: Final = 500
"""So many ids further somebody notes where it stands."""
_TRIMMED_AT_ONCE: Final = 2_000

_EXPECTED: Final = (1062, 1205, 1213)
"""Another reader was faster, or the id is in use by now."""

_NOTES_OFF: Final = "SET @sa_tablecache_notes = @@SESSION.sql_notes, SESSION sql_notes = 0"
"""Drivers may warn of each IF EXISTS that nothing was to be done."""
_NOTES_BACK: Final = "SET SESSION sql_notes = @sa_tablecache_notes"

_SQL_MODE: Final = (
    "SET @sa_tablecache_sql_mode = @@SESSION.sql_mode, "
    "SESSION sql_mode = 'STRICT_TRANS_TABLES,NO_ENGINE_SUBSTITUTION'"
)
"""A trigger keeps the mode in which it was made."""
_SQL_MODE_BACK: Final = "SET SESSION sql_mode = @sa_tablecache_sql_mode"


class MySQLChangelog(Changelog):
    """The changelog of MariaDB and MySQL, in the database of the connection.

    Tables of other databases can be watched as well; each database has one changelog at most. The
    account that watches a table keeps to exist: the triggers have its rights.
    """

    finds_anything: ClassVar[bool] = True

    # -- installing -----------------------------------------------------------------------------

    def create(self) -> Sequence[str]:
        """Return the statements of ``create.sql``."""
        return [_NOTES_OFF, *statements("create", version=VERSION), _NOTES_BACK]

    def drop(self, watched: Iterable[Relation] = ()) -> Sequence[str]:
        """Return the statements that remove the changelog.

        They fail, and remove nothing else, while a table is watched that was not named: its
        triggers would fail without a changelog, and so would every write.
        """
        relations = sorted(watched)
        schemas = sorted({relation.schema for relation in relations} - {""})
        return [
            _NOTES_OFF,
            *(sql for relation in relations for sql in _drop_triggers(relation)),
            *(f"DROP VIEW IF EXISTS {full_name(Relation(schema, LOG))}" for schema in schemas),
            *statements("drop"),
            _NOTES_BACK,
        ]

    def watch(self, watch: Watch) -> Sequence[str]:
        """Return the statements that watch a table, or watch it otherwise than before.

        The first one fails if the table or a column is missing. Writes between the statements are
        not lost: the last one logs a change of any row. Each is a transaction of its own.
        """
        relation = watch.relation
        schema, name = map(literal, relation)
        columns = ", ".join(map(quoted, (*watch.key, *watch.ranges))) or "1"
        elsewhere = (
            statements("elsewhere", schema=schema, quoted_schema=literal(quoted(relation.schema)))
            if relation.schema
            else ()
        )
        return [
            f"SELECT {columns} FROM {full_name(relation)} LIMIT 0",
            *elsewhere,
            _NOTES_OFF,
            *_drop_triggers(relation),
            _NOTES_BACK,
            (
                f"REPLACE INTO {PREFIX}watched (table_schema, table_name, definition) "
                f"VALUES ({schema}, {name}, {literal(dump(watch))})"
            ),
            _SQL_MODE,
            *(trigger.sql for trigger in triggers(watch)),
            _SQL_MODE_BACK,
            *self.invalidate(relation),
        ]

    def unwatch(self, relation: Relation) -> Sequence[str]:
        """Return the statements that no longer watch a table."""
        schema, name = map(literal, relation)
        return [
            _NOTES_OFF,
            *_drop_triggers(relation),
            _NOTES_BACK,
            f"DELETE FROM {PREFIX}watched WHERE table_schema = {schema} AND table_name = {name}",
        ]

    def invalidate(self, relation: Relation) -> Sequence[str]:
        """Return the statement that logs a change of any row of a table."""
        schema, name = map(literal, relation)
        return [
            (
                f"INSERT INTO {LOG} (at, writer, table_schema, table_name, operation) "
                f"VALUES (UTC_TIMESTAMP(), CONNECTION_ID(), {schema}, {name}, 'T')"
            )
        ]

    # -- asking the catalog ---------------------------------------------------------------------

    def installed(self, connection: Connection) -> Installation:
        """Return what is installed: three statements, and some for each watched table."""
        try:
            version = connection.exec_driver_sql(
                f"SELECT version FROM {META} WHERE one = 1"
            ).scalar_one_or_none()
        except DBAPIError as error:
            if error_code(error) in NOT_INSTALLED:
                return Installation(None)
            raise
        registry = {
            Relation(schema, name): load(Relation(schema, name), definition)
            for schema, name, definition in connection.exec_driver_sql(
                f"SELECT table_schema, table_name, definition FROM {PREFIX}watched"
            )
        }
        _, outdated = look(connection, registry, None)
        watched = {}
        for relation, known in registry.items():
            watched[relation] = watch = known.watch
            problem = None
            try:
                now = propose(connection, relation, watch.ranges, watch.key)
            except TableCacheError as error:
                problem = str(error)
            else:
                if replace(now, limit=watch.limit) != watch:
                    problem = "columns or foreign keys are not those that it was watched with"
            if {(t.table, t.name, t.digest) for t in triggers(watch)} != known.triggers:
                problem = problem or f"its triggers are of version {known.version}"
            if problem is not None:
                outdated.setdefault(relation, problem)
        return Installation(version, watched, outdated)

    def resolve(
        self, connection: Connection, names: Iterable[tuple[str | None, str]]
    ) -> Mapping[tuple[str | None, str], Relation]:
        """Return the relations that names mean; 1 statement for each."""
        return dict(resolve(connection, names))

    def propose(
        self,
        connection: Connection,
        relation: Relation,
        ranges: Sequence[str] = (),
        key: Sequence[str] = (),
    ) -> Watch:
        """Return how a table is best watched: four statements, and one for each that cascades.

        :raises TableCacheError: if a column is missing, or triggers cannot see its changes.
        """
        return propose(connection, relation, ranges, key)

    def owned(self) -> frozenset[Relation]:
        """Return the changelog's own tables."""
        return frozenset(Relation("", name) for name in _OWNED)

    # -- reading --------------------------------------------------------------------------------

    def position(self, connection: Connection) -> MySQLPosition:
        """Return the position of now: 2 statements, the second from where somebody stood lately."""
        with available():
            head = connection.exec_driver_sql(
                query("position", server=variables(connection))
            ).one_or_none()
            check_version(None if head is None else head.version)
            assert head is not None
            era = Server.read(head.server).era(head.incarnation)
            noted = None if head.position is None else MySQLPosition.parse(head.position)
            if noted is None or noted.era != era:
                noted = MySQLPosition(era, 0)
            noted = noted.beyond(head.trimmed)
            numbers = connection.exec_driver_sql(
                f"SELECT id FROM {LOG} WHERE {_behind(noted)} ORDER BY id"
            ).scalars()
            return noted.having_seen(map(int, numbers))

    def parse(self, token: str) -> MySQLPosition:
        """Return the position that a token says."""
        return MySQLPosition.parse(token)

    def poll(
        self, connection: Connection, position: Position, relations: frozenset[Relation]
    ) -> Poll:
        """Return what has become visible since a position: 3 statements.

        One more for a position that is none of a poll; and up to 7 where an old gap is to be
        closed, and 1 to note what is settled, after some thousand entries: both in autocommit.

        :param connection: in autocommit, or at the begin of a transaction.
        :param relations: those that are looked at; changes of others are left out.
        """
        if not isinstance(position, MySQLPosition):
            raise TypeError(f"{position!r} is no position of a changelog of MySQL")
        if not position.primary:
            check_primary(connection)
        entries = Entries(relations, position)
        statement = query("poll", server=variables(connection), behind=_behind(position))
        head: Any = None
        with (
            available(),
            # All of one moment, and not all in memory at once.
            connection.exec_driver_sql(
                statement, execution_options={"stream_results": True}
            ) as result,
        ):
            for kind, number, writer, *said in result:
                if kind == 2:
                    entries.add(int(number), int(writer), *said)
                elif kind == 1:
                    entries.note(Relation(said[0], said[1]), said[3])
                else:
                    head = number, writer, *said
        check_version(None if head is None else int(head[4]))
        trimmed, noted, database, incarnation, _, said, _ = head
        server = Server.read(said)
        era = server.era(incarnation)
        # After the changelog: what was not logged, because a trigger was missing, is noticed.
        watched = {relation: entries.watched.get(relation) for relation in sorted(relations)}
        fingerprints, untrusted = look(connection, watched, database)
        gap = _gap(position, era, int(trimmed), server.last)
        if gap is not None:
            now = replace(self.position(connection), primary=True)
            return Poll(now, (), gap, fingerprints, untrusted)
        now = replace(position.having_seen(entries.numbers), primary=True)
        if autocommits(connection):
            with available():
                if old := without(position.gaps, sorted(entries.numbers)):
                    _take(connection, old)
                if now.last >= int(noted) + _NOTED_STEP:
                    connection.exec_driver_sql(
                        f"UPDATE {META} SET last = {now.last}, position = '{now}' "
                        f"WHERE last < {now.last} AND incarnation = '{incarnation}'"
                    )
        return Poll(now, tuple(entries.changes(era)), None, fingerprints, untrusted)

    def trim(self, connection: Connection, keep: float) -> int:
        """Delete what is older than some seconds, in transactions of some thousand entries.

        Only entries before the first gap, and not the newest one: so nothing is locked that a
        writer could need, under each isolation level. Old gaps are closed. Four statements, and
        six for each transaction.

        :param connection: in autocommit, or at the begin of a transaction, which it ends.
        """
        lock = f"CONCAT('{PREFIX}', LEFT(MD5(DATABASE()), 16))"
        with available():
            if connection.exec_driver_sql(f"SELECT GET_LOCK({lock}, 0)").scalar() != 1:
                return -1
            try:
                _renew_after_strays(connection)
                deleted = 0
                while batch := _trim(connection, keep):
                    deleted += batch
                return deleted
            finally:
                connection.exec_driver_sql(f"DO RELEASE_LOCK({lock})")

    def notify(self, connection: Connection) -> None:
        """Do nothing: MariaDB and MySQL tell nobody of a commit."""


def _drop_triggers(relation: Relation) -> list[str]:
    return [
        f"DROP TRIGGER IF EXISTS {full_name(Relation(relation.schema, name))}"
        for name in trigger_names(relation)
    ]


def _gap(position: MySQLPosition, era: str, trimmed: int, last: int) -> str | None:
    """Return why entries may be missing that a position has not seen."""
    if position.era != era:
        return (
            "the server was started since the last poll, is another one, or the changelog was "
            "installed anew"
        )
    if last < position.last:  # the newest entry is never trimmed
        return "ids of the changelog went back: it was emptied, or the server was restored"
    if position.floor < trimmed:
        return "the changelog was trimmed past the last poll; keep changes for longer"
    return None


# -- gaps ---------------------------------------------------------------------------------------


def _behind(position: MySQLPosition) -> str:
    """Return a condition for the entries behind a position; others may meet it if gaps are many."""
    gaps = position.gaps
    if len(gaps) > _MOST_RANGES:
        gaps = (*gaps[:_MOST_RANGES], (gaps[_MOST_RANGES][0], position.last))
    return f"id > {position.last}" + "".join(f" OR id BETWEEN {a} AND {b}" for a, b in gaps)


def _take(connection: Connection, gaps: Gaps) -> None:
    """Take those of the first ids of gaps that nobody uses."""
    asked = list[tuple[int, int]]()
    left = _MOST_TAKEN
    for low, high in gaps[:_MOST_RANGES]:
        if left:
            asked.append((low, min(high, low + left - 1)))
            left -= asked[-1][1] - low + 1
    check_primary(connection)
    connection.exec_driver_sql("COMMIT")
    condition = " OR ".join(f"id BETWEEN {low} AND {high}" for low, high in asked)
    try:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED")
        rows = connection.exec_driver_sql(f"SELECT id FROM {LOG} WHERE {condition}").all()
    finally:
        connection.exec_driver_sql("COMMIT")  # the level was for this transaction alone
    used = {int(row[0]) for row in rows}
    free = [n for low, high in asked for n in range(low, high + 1) if n not in used]
    if not free:
        return
    values = ", ".join(f"({number}, UTC_TIMESTAMP(), 0, '', '', 'X')" for number in free)
    insert = (
        f"INSERT INTO {LOG} (id, at, writer, table_schema, table_name, operation) VALUES {values}"
    )
    # One of them may be in use by now. Who waited for it would keep the others locked meanwhile.
    limit = "innodb_lock_wait_timeout"
    if is_mariadb(connection):
        before, after = f"SET STATEMENT {limit} = 0 FOR ", None
    else:
        before, after = "", f"SET SESSION {limit} = @sa_tablecache_wait"
        connection.exec_driver_sql(
            f"SET @sa_tablecache_wait = @@SESSION.{limit}, SESSION {limit} = 1"
        )
    try:
        connection.exec_driver_sql(before + insert)
        connection.exec_driver_sql("COMMIT")
    except DBAPIError as error:
        if error_code(error) not in _EXPECTED:
            raise
        connection.exec_driver_sql("ROLLBACK")  # they are tried again
    finally:
        if after is not None:
            connection.exec_driver_sql(after)


def _trim(connection: Connection, keep: float) -> int:
    """Delete the oldest entries in one transaction; return how many."""
    trimmed = connection.exec_driver_sql(f"SELECT trimmed FROM {META} WHERE one = 1").scalar_one()
    # An entry dated in the future, by SET timestamp, does not keep the others.
    rows = connection.exec_driver_sql(
        "SELECT id, NOT at BETWEEN "
        f"UTC_TIMESTAMP() - INTERVAL {float(keep)!r} SECOND + INTERVAL 1 MICROSECOND "
        f"AND UTC_TIMESTAMP() + INTERVAL 1 DAY FROM {LOG} "
        f"WHERE id > {trimmed} ORDER BY id LIMIT {_TRIMMED_AT_ONCE + 1}"
    ).all()
    connection.exec_driver_sql("COMMIT")
    until = int(trimmed)
    for number, old in rows:
        if number != until + 1:
            _take(connection, ((until + 1, int(number) - 1),))
            break
        if not old:
            break
        until = int(number)
    # The last of them stays. Where a DELETE ends it locks one more entry than it deletes, and that
    # may not be one of a transaction that is under way; nor is the newest entry ever deleted.
    until -= 1
    if until <= trimmed:
        return 0
    connection.exec_driver_sql("START TRANSACTION")
    deleted = connection.exec_driver_sql(
        f"DELETE FROM {LOG} WHERE id > {trimmed} AND id <= {until}"
    ).rowcount
    connection.exec_driver_sql(f"UPDATE {META} SET trimmed = {until} WHERE one = 1")
    connection.exec_driver_sql("COMMIT")
    return deleted


def _renew_after_strays(connection: Connection) -> None:
    """Begin a new incarnation if there are entries with ids that were trimmed.

    Somebody got an id, and used it only after it had been taken and trimmed; or ids began anew.
    """
    trimmed, last = connection.exec_driver_sql(
        f"SELECT m.trimmed, (SELECT MAX(c.id) FROM {LOG} AS c) FROM {META} AS m WHERE m.one = 1"
    ).one()
    strays = connection.exec_driver_sql(
        f"SELECT id FROM {LOG} WHERE id <= {trimmed} LIMIT {_TRIMMED_AT_ONCE}"
    ).all()
    if not strays:
        return
    anew = last is not None and last <= trimmed
    if not anew:
        numbers = ", ".join(str(int(row[0])) for row in strays)
        connection.exec_driver_sql(f"DELETE FROM {LOG} WHERE id IN ({numbers})")
    connection.exec_driver_sql(
        f"UPDATE {META} SET incarnation = LEFT(MD5(CONCAT(UUID(), RAND())), 12)"
        + (", trimmed = 0, last = 0" if anew else "")
    )
    connection.exec_driver_sql("COMMIT")
