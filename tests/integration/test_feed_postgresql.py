"""The changelog of PostgreSQL: each change once, whatever was written and however it was committed.

`Follower` is the judge: it keeps a copy of the tables, of which it reads again only what a poll
tells, and compares it with the database in the same snapshot.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sa_tablecache.exc import FeedUnavailable
from sa_tablecache.feed.contract import (
    MOST_KEYS,
    VERSION,
    Change,
    Installation,
    Poll,
    Position,
    Relation,
    Watch,
)
from sa_tablecache.feed.postgresql import PostgreSQLChangelog, Snapshot
from tests.conftest import asynchronous
from tests.integration.feed_writer import TABLES, Logged, committed, writing
from tests.postgres import Postgres, own_postgres

LOG = PostgreSQLChangelog()


EMPTY = """
    DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg!_%' ESCAPE '!'
        AND nspname NOT IN ('information_schema', 'sa_tablecache')
    LOOP EXECUTE concat('DROP SCHEMA ', quote_ident(name), ' CASCADE'); END LOOP;
    CREATE SCHEMA public;
    GRANT ALL ON SCHEMA public TO PUBLIC;
    IF to_regclass('sa_tablecache.watched') IS NOT NULL THEN
        PERFORM sa_tablecache.unwatch(w.schema, w.name) FROM sa_tablecache.watched AS w;
        DELETE FROM sa_tablecache.changelog;
    END IF;
    END $$
    """
"""Leaves the changelog installed: making a database for each test would take longer."""


class Feed:
    """A database with a changelog, one connection that writes, and one that polls."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.engine = create_engine(url, isolation_level="AUTOCOMMIT")
        self.connection = self.engine.connect()
        self.reader = self.engine.connect()
        self.sql(EMPTY)
        if LOG.installed(self.connection).version is None:
            self.sql(*LOG.create())
        self.relations: set[Relation] = set()
        self.position: Position = LOG.position(self.reader)

    def close(self) -> None:
        """Give back all connections."""
        self.connection.close()
        self.reader.close()
        self.engine.dispose()

    def sql(self, *statements: str) -> None:
        """Run statements, each of them a transaction."""
        for statement in statements:
            self.connection.exec_driver_sql(statement.replace("%", "%%"))

    def watch(self, name: str, schema: str = "public", **options: Any) -> Relation:
        """Watch a table by its primary key."""
        relation = Relation(schema, name)
        watch = LOG.propose(self.connection, relation, options.pop("ranges", ()))
        options = {"key": watch.key, "ranges": watch.ranges, **options}
        for statement in LOG.watch(Watch(relation, **options)):
            self.connection.exec_driver_sql(statement)
        self.relations.add(relation)
        return relation

    def again(self, name: str) -> None:
        """Watch a table as before."""
        self.sql(f"SELECT sa_tablecache.watch('public', '{name}')")

    def poll(self) -> Poll:
        """Read on from where the last poll has ended."""
        poll = LOG.poll(self.reader, self.position, frozenset(self.relations))
        self.position = poll.position
        return poll

    def changes(self) -> list[tuple[str, str, Any]]:
        """Read on, and return the table, the operation, and the keys or ranges of each change."""
        poll = self.poll()
        assert poll.gap is None
        assert not poll.untrusted
        return [brief(change) for change in poll.changes]

    def written(self, *statements: str) -> list[tuple[str, str, Any]]:
        """Run statements, and return what they have changed."""
        self.poll()
        self.sql(*statements)
        return self.changes()


def brief(change: Change) -> tuple[str, str, Any]:
    """Return the essence of a change: ``("t", "U", [1, 2])`` for a table with one key column."""
    keys: Any = change.keys
    if keys is None:
        return change.relation.name, change.operation, change.ranges and dict(change.ranges)
    return (
        change.relation.name,
        change.operation,
        [k[0] if len(k) == 1 else k for k in sorted(keys)],
    )


def feed_is(feed: Feed, version: int) -> bool:
    """Whether the server is of some version or newer."""
    info: Any = feed.connection.dialect.server_version_info
    return bool(info >= (version,))


@pytest.fixture
def feed(postgres_module_url: URL) -> Iterator[Feed]:
    """A database with a changelog and no tables."""
    feed = Feed(postgres_module_url)
    yield feed
    feed.close()


@pytest.fixture
def t(feed: Feed) -> Relation:
    """A watched table: ``t (id, v)``."""
    feed.sql("CREATE TABLE t (id integer PRIMARY KEY, v integer)")
    return feed.watch("t")


# --- what is logged -------------------------------------------------------------------------------


@pytest.mark.usefixtures("t")
@pytest.mark.parametrize(
    ("statement", "changes"),
    [
        ("INSERT INTO t VALUES (10), (11)", [("t", "I", [10, 11])]),
        ("UPDATE t SET v = 1 WHERE id < 3", [("t", "U", [1, 2])]),
        ("UPDATE t SET id = id + 100 WHERE id < 3", [("t", "U", [1, 2, 101, 102])]),
        ("DELETE FROM t WHERE id = 3", [("t", "D", [3])]),
        ("TRUNCATE t", [("t", "T", None)]),
        ("UPDATE t SET v = 1 WHERE id = 99", []),
        ("DELETE FROM t WHERE id = 99", []),
        ("INSERT INTO t SELECT * FROM t WHERE id = 99", []),
        ("INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING", []),
        (
            "INSERT INTO t VALUES (1), (10) ON CONFLICT (id) DO UPDATE SET v = 5",
            [("t", "I", [10]), ("t", "U", [1])],
        ),
        (
            "WITH x AS (DELETE FROM t WHERE id = 1 RETURNING 10) INSERT INTO t SELECT * FROM x",
            [("t", "D", [1]), ("t", "I", [10])],
        ),
        ("DO $$ BEGIN UPDATE t SET v = 0 WHERE id = 4; END $$", [("t", "U", [4])]),
        ("BEGIN; DELETE FROM t WHERE id = 1; ROLLBACK", []),
        ("COPY t FROM PROGRAM 'printf \"20\\t1\\n21\\t1\\n\"'", [("t", "I", [20, 21])]),
    ],
)
def test_a_statement_is_logged_with_its_keys(
    feed: Feed, statement: str, changes: list[Any]
) -> None:
    """Each statement that changed rows is one change, with old and new keys; others are none."""
    feed.sql("INSERT INTO t SELECT i FROM generate_series(1, 5) AS i")
    assert sorted(feed.written(statement)) == changes
    assert feed.changes() == []


@pytest.mark.usefixtures("t")
def test_merge(feed: Feed) -> None:
    """MERGE is up to three changes."""
    if not feed_is(feed, 15):
        pytest.skip("MERGE came with PostgreSQL 15")
    feed.sql("INSERT INTO t VALUES (1), (2)")
    merge = """
        MERGE INTO t USING (VALUES {}) AS s (id) ON t.id = s.id
        WHEN MATCHED AND t.id = 1 THEN DELETE WHEN MATCHED THEN UPDATE SET v = 7
        WHEN NOT MATCHED THEN INSERT VALUES (s.id)
        """
    assert feed.written(merge.format("(3)")) == [("t", "I", [3])]
    assert sorted(feed.written(merge.format("(1), (2), (4)"))) == [
        ("t", "D", [1]),
        ("t", "I", [4]),
        ("t", "U", [2]),
    ]
    # Of a partitioned table the rows of an UPDATE may be all that MERGE has written.
    feed.sql(*TABLES, "INSERT INTO part VALUES (1), (2), (2000)")
    feed.watch("part")
    found = {(op, key) for _, op, keys in feed.written(
        merge.replace("t.id", "part.id").replace("INTO t", "INTO part").format("(1), (2), (4)")
    ) for key in keys}  # fmt: skip
    assert found >= {("D", 1), ("I", 4), ("U", 2)}
    assert {key for _, key in found} == {1, 2, 4}


def test_what_follows_by_itself_is_logged(feed: Feed) -> None:
    """Cascades, deferred ones too, triggers and rules write other tables: those are logged."""
    feed.sql(
        "CREATE TABLE a (id integer PRIMARY KEY)",
        "CREATE TABLE b (id integer PRIMARY KEY, a integer REFERENCES a"
        " ON DELETE CASCADE ON UPDATE CASCADE)",
        "CREATE TABLE c (id integer PRIMARY KEY, b integer REFERENCES b"
        " ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED)",
        "CREATE TABLE d (id integer PRIMARY KEY)",
        "CREATE FUNCTION more() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN INSERT INTO d VALUES (new.id); RETURN NULL; END $$",
        "CREATE TRIGGER more AFTER INSERT ON a FOR EACH ROW EXECUTE FUNCTION more()",
        "CREATE RULE twice AS ON DELETE TO d DO ALSO DELETE FROM a WHERE id = old.id",
    )
    for name in "abcd":
        feed.watch(name)
    assert sorted(feed.written("INSERT INTO a VALUES (1)")) == [("a", "I", [1]), ("d", "I", [1])]
    feed.sql("INSERT INTO b VALUES (2, 1)", "INSERT INTO c VALUES (3, 2)")
    assert sorted(feed.written("UPDATE a SET id = 9")) == [("a", "U", [1, 9]), ("b", "U", [2])]
    found = feed.written("DELETE FROM a")
    assert sorted(found) == [("a", "D", [9]), ("b", "D", [2]), ("c", "U", [3])]
    feed.sql("INSERT INTO a VALUES (5)")
    assert ("a", "D", [5]) in feed.written("DELETE FROM d WHERE id = 5")


def test_writers_need_no_rights(feed: Feed, t: Relation) -> None:
    """A role with no right but on the table writes, whatever its names and search path hide."""
    feed.sql("DROP ROLE IF EXISTS feed_writer", "CREATE ROLE feed_writer")
    try:
        feed.sql("GRANT INSERT, SELECT, UPDATE ON t TO feed_writer", "SET ROLE feed_writer")
        feed.sql(
            "CREATE TEMP TABLE changelog (xid text)",
            "CREATE TEMP TABLE new_rows (id text)",
            "SET search_path = pg_temp, public",
        )
        assert feed.written("INSERT INTO t VALUES (1)") == [("t", "I", [1])]
        with pytest.raises(DBAPIError, match="permission denied for schema sa_tablecache"):
            feed.sql("DELETE FROM sa_tablecache.changelog")
    finally:
        feed.sql("RESET ROLE", "DROP OWNED BY feed_writer", "DROP ROLE feed_writer")


def test_a_reader_needs_two_grants(feed: Feed, t: Relation) -> None:
    """Without them it is told which; with them it polls, trims and invalidates, and no more."""
    reader = feed.reader
    feed.sql("DROP ROLE IF EXISTS feed_reader", "CREATE ROLE feed_reader")
    try:
        reader.exec_driver_sql("SET ROLE feed_reader")
        with pytest.raises(FeedUnavailable, match="GRANT USAGE ON SCHEMA sa_tablecache"):
            feed.poll()
        feed.sql("GRANT USAGE ON SCHEMA sa_tablecache TO feed_reader")
        with pytest.raises(FeedUnavailable, match="GRANT SELECT ON ALL TABLES"):
            LOG.position(reader)
        feed.sql("GRANT SELECT ON ALL TABLES IN SCHEMA sa_tablecache TO feed_reader")
        assert feed.written("INSERT INTO t VALUES (1)") == [("t", "I", [1])]
        assert LOG.installed(reader).watched[t].key == ("id",)
        reader.exec_driver_sql(*LOG.invalidate(t))
        LOG.notify(reader)
        assert feed.changes() == [("t", "T", None)]
        assert LOG.trim(reader, 0) == 0
        assert LOG.trim(reader, 0) > 0
        feed.sql("DELETE FROM sa_tablecache.alive")  # as a crash does
        assert feed.poll().gap is not None
        assert feed.poll().gap is None
        with pytest.raises(DBAPIError, match="permission denied"):
            reader.exec_driver_sql("DELETE FROM sa_tablecache.changelog")
    finally:
        reader.exec_driver_sql("RESET ROLE")
        feed.sql("DROP OWNED BY feed_reader", "DROP ROLE feed_reader")


@pytest.mark.usefixtures("t")
def test_replicas_are_no_exception(feed: Feed) -> None:
    """What is written in the role of a replica is logged."""
    feed.sql("SET session_replication_role = replica")
    assert feed.written("INSERT INTO t VALUES (1)") == [("t", "I", [1])]


def test_unlogged_tables_are_watched_and_others_refused(feed: Feed) -> None:
    """Temporary tables, views and materialized views cannot be watched, and the error says why."""
    feed.sql("CREATE UNLOGGED TABLE u (id integer PRIMARY KEY)")
    feed.watch("u")
    assert feed.written("INSERT INTO u VALUES (1)") == [("u", "I", [1])]
    feed.sql("CREATE VIEW w AS SELECT * FROM u", "CREATE MATERIALIZED VIEW m AS SELECT * FROM u")
    feed.sql("CREATE TEMP TABLE x (id integer PRIMARY KEY)")
    ((schema,),) = feed.connection.exec_driver_sql(
        "SELECT nspname FROM pg_namespace WHERE oid = pg_my_temp_schema()"
    )
    for name, where in (("w", "public"), ("m", "public"), ("x", schema)):
        with pytest.raises(
            DBAPIError, match=rf"cannot watch {where}\.{name}: it is not an ordinary"
        ):
            feed.watch(name, where)
        relations = frozenset({Relation(where, name)})
        untrusted = LOG.poll(feed.reader, feed.position, relations).untrusted
        assert list(untrusted.values()) == ["it is not an ordinary table"]
    with pytest.raises(DBAPIError, match=r"cannot watch public\.nothing: no such table"):
        feed.watch("nothing")
    with pytest.raises(DBAPIError, match="it has no column other"):
        feed.watch("u", key=("other",))
    with pytest.raises(DBAPIError, match="a limit is at least 1"):
        feed.watch("u", limit=0)


def test_keys_depend_on_no_setting(feed: Feed) -> None:
    """Keys of every type are logged in one way, whatever the session says of output."""
    columns = {
        "flag boolean": ("true", True),
        "small smallint": ("-1", -1),
        "big bigint": ("9007199254740993", 9007199254740993),
        "exact numeric": ("'12345678901234567890.120'", "12345678901234567890.120"),
        "wide double precision": ("0.1::float8 + 0.2::float8", 0.30000000000000004),
        "label text": ("E'a\"b\\\\c\\'d\\u20ac'", "a\"b\\c'd€"),
        "padded character(4)": ("'ab'", "ab  "),
        "raw bytea": ("'\\x00ff'", "00ff"),
        "id uuid": (f"'{{{'A0' * 16}}}'", "a0a0a0a0-a0a0-a0a0-a0a0-a0a0a0a0a0a0"),
        "day date": ("'2024-02-03'", "2024-02-03"),
        "clock time": ("'04:05:06.7'", "04:05:06.7"),
        "at timestamp": ("'2024-02-03 04:05:06.7'", "2024-02-03T04:05:06.7"),
        "zoned timestamptz": ("'2024-02-03 04:05:06.7+09'", "2024-02-02T19:05:06.7+00:00"),
        "mood mood": ("'so so'", "so so"),
        "amount amount": ("3", 3),
        "span interval": ("'1 day 2 hours'", "1 day 02:00:00"),
        "several timestamptz[]": ("'{2024-02-03 04:05:06+00}'", '{"2024-02-03 04:05:06+00"}'),
    }  # fmt: skip
    feed.sql(
        "CREATE TYPE mood AS ENUM ('so so')",
        "CREATE DOMAIN amount AS integer",
        f"CREATE TABLE k ({', '.join(columns)}, maybe integer)",
    )
    key = (*(column.split()[0] for column in columns), "maybe")
    feed.watch("k", key=key)
    insert = f"INSERT INTO k VALUES ({', '.join(value for value, _ in columns.values())}, NULL)"
    expected = (*(logged for _, logged in columns.values()), None)
    assert feed.written(insert) == [("k", "I", [expected])]
    settings = {
        "bytea_output": "escape",
        "DateStyle": "German",
        "TimeZone": "Asia/Tokyo",
        "IntervalStyle": "iso_8601",
        "extra_float_digits": "-10",
        "quote_all_identifiers": "on",
        "standard_conforming_strings": "off",
    }
    feed.sql(*(f"SET {name} = '{value}'" for name, value in settings.items()))
    assert feed.written("DELETE FROM k") == [("k", "D", [expected])]
    feed.again("k")
    feed.sql("SET standard_conforming_strings = on")
    assert feed.written(insert) == [("k", "I", [expected])]


HOSTILE = [
    'quo"te', "apo'strophe", "do.t", "UPPER case", "per%cent %s %(a)s", "col:on :bind", "q", "k",
    "back\\slash", "dol$lar $1 $x$", "ques?tion", "select", "ünïcode→🎉", "é" * 31 + "x", "{}",
    "new_rows", "counted", "logged", "spanned", "found", "tg_op", "changelog",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_identifiers_of_any_kind(feed: Feed, name: str) -> None:
    """Schemas, tables and columns may be named as the database allows."""
    quoted = '"' + name.replace('"', '""') + '"'
    feed.sql(
        f"CREATE SCHEMA {quoted}",
        f"CREATE TABLE {quoted}.{quoted} ({quoted} integer PRIMARY KEY, other integer)",
    )
    relation = feed.watch(name, name, ranges=(name,), limit=2)
    assert LOG.resolve(feed.connection, [(name, name), (None, name), (name, "no")]) == {
        (name, name): relation
    }
    insert = f"INSERT INTO {quoted}.{quoted} SELECT generate_series"
    assert feed.written(f"{insert}(1, 2)") == [(name, "I", [1, 2])]
    assert feed.written(f"{insert}(3, 8)") == [(name, "I", {name: (3, 8)})]
    watched = LOG.installed(feed.connection).watched
    assert watched == {relation: Watch(relation, (name,), (name,), 2)}
    feed.sql(*LOG.unwatch(relation))
    assert LOG.installed(feed.connection).watched == {}


async def test_the_same_with_asyncpg(feed: Feed) -> None:
    """Statements, positions and polls are the same for a driver that prepares everything."""
    feed.sql('CREATE TABLE "per%cent \'n :a" (id integer PRIMARY KEY, at timestamptz)')
    relation = Relation("public", "per%cent 'n :a")

    def use(connection: Connection) -> None:
        for statement in LOG.create():
            connection.exec_driver_sql(statement)
        for statement in LOG.watch(LOG.propose(connection, relation, ("at",))):
            connection.exec_driver_sql(statement)
        position = LOG.position(connection)
        feed.sql('INSERT INTO "per%cent \'n :a" VALUES (1, now())')
        poll = LOG.poll(connection, position, frozenset({relation}))
        assert [brief(change) for change in poll.changes] == [(relation.name, "I", [1])]
        assert not poll.untrusted and not poll.gap
        assert LOG.installed(connection).watched.keys() == {relation}
        assert LOG.resolve(connection, [(None, relation.name)]) == {(None, relation.name): relation}
        assert LOG.trim(connection, 100) == 0
        LOG.notify(connection)
        for statement in (*LOG.invalidate(relation), *LOG.unwatch(relation), *LOG.drop()):
            connection.exec_driver_sql(statement)
        with pytest.raises(FeedUnavailable, match="no change feed is installed"):
            LOG.position(connection)

    engine = create_async_engine(asynchronous(feed.url), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.run_sync(use)
    await engine.dispose()


# --- big statements -------------------------------------------------------------------------------


def test_more_rows_than_the_limit_are_any_row(feed: Feed, t: Relation) -> None:
    """At the limit a statement has its keys, above it has none; without a key it never has."""
    feed.watch("t", limit=10)
    assert feed.written("INSERT INTO t SELECT generate_series(1, 10)") == [
        ("t", "I", list(range(1, 11)))
    ]
    assert feed.written("UPDATE t SET id = id + 100") == [
        ("t", "U", [*range(1, 11), *range(101, 111)])
    ]
    assert feed.written("INSERT INTO t SELECT generate_series(1, 11)") == [("t", "I", None)]
    assert feed.written("UPDATE t SET v = 1 WHERE id < 12") == [("t", "U", None)]
    assert feed.written("DELETE FROM t WHERE id < 12") == [("t", "D", None)]
    feed.sql("CREATE TABLE bare (v integer)")
    feed.watch("bare")
    assert feed.written("INSERT INTO bare VALUES (1)") == [("bare", "I", None)]
    assert feed.written("UPDATE bare SET v = 2 WHERE v = 9") == []
    feed.watch("bare", ranges=("v",))
    assert feed.written("UPDATE bare SET v = 5") == [("bare", "U", {"v": (1, 5)})]


def test_a_key_that_is_not_unique_is_never_cut_off(feed: Feed) -> None:
    """Many rows with few different keys are counted as rows: no key can be missing."""
    feed.sql("CREATE TABLE g (grp integer)", "INSERT INTO g SELECT 1 FROM generate_series(1, 20)")
    feed.sql("INSERT INTO g VALUES (2)")
    feed.watch("g", key=("grp",), limit=20)
    assert feed.written("UPDATE g SET grp = grp WHERE grp = 1") == [("g", "U", [1])]
    assert feed.written("UPDATE g SET grp = grp") == [("g", "U", None)]


def test_big_statements_have_ranges(feed: Feed) -> None:
    """The smallest and largest value, old and new; NULLs alone are said, among others hide them."""
    feed.sql(
        "CREATE TABLE r (id integer PRIMARY KEY, i bigint, n numeric, f double precision, d date,"
        ' at timestamp, z timestamptz, c time, s text COLLATE "C", w varchar)'
    )
    ranges = ("i", "n", "f", "d", "at", "z", "c", "s", "w")
    feed.watch("r", ranges=ranges, limit=1)
    feed.sql("SET TimeZone = 'Asia/Tokyo'", "SET DateStyle = German", "SET extra_float_digits = 0")
    insert = """
        INSERT INTO r SELECT i, i, i + 0.5, i + 0.1, date '2024-01-01' + i,
            timestamp '2024-01-01' + i * interval '1 hour',
            timestamptz '2024-01-01 00:00Z' + i * interval '1 hour',
            time '10:00' + i * interval '1 hour', chr(64 + i), chr(64 + i) || 'x'
        FROM generate_series(1, 3) AS i
        """
    expected = {
        "i": (1, 3),
        "n": ("1.5", "3.5"),
        "f": (1.1, 3.1),
        "d": ("2024-01-02", "2024-01-04"),
        "at": ("2024-01-01T01:00:00", "2024-01-01T03:00:00"),
        "z": ("2024-01-01T01:00:00+00:00", "2024-01-01T03:00:00+00:00"),
        "c": ("11:00:00", "13:00:00"),
        "s": ("A", "C"),
        "w": ("Ax", "Cx"),
    }
    assert feed.written(insert) == [("r", "I", expected)]
    ((_, operation, found),) = feed.written("UPDATE r SET i = i + 10, n = NULL, f = NULL, w = 'a'")
    assert operation == "U"
    rest = {k: v for k, v in expected.items() if k not in ("i", "n", "f", "w")}
    assert found == {**rest, "i": (1, 13), "w": ("Ax", "a")}  # a NULL among others: left out
    ((_, _, found),) = feed.written("DELETE FROM r WHERE i < 13")
    assert found["i"] == (11, 12)
    assert found["n"] == found["f"] == (None, None)  # all were NULL
    values = "(21, 'NaN', 'Infinity', 'infinity'), (22, 1, 1, '2024-01-01')"
    ((_, _, found),) = feed.written(f"INSERT INTO r (id, n, f, z) VALUES {values}")
    assert not found.keys() & {"n", "f", "z"}  # nothing that Python could compare
    with pytest.raises(DBAPIError, match=r"no range of flag can be logged, whose type is boolean"):
        feed.sql("CREATE TABLE no (id integer PRIMARY KEY, flag boolean)")
        feed.watch("no", ranges=("flag",))


def test_ranges_of_text_are_those_of_its_bytes(feed: Feed) -> None:
    """A collation of the language sorts otherwise than Python; the ranges hold all in its order."""
    feed.sql("CREATE TABLE s (id integer PRIMARY KEY, s text)")
    feed.watch("s", ranges=("s",), limit=1)
    insert = "INSERT INTO s VALUES (1, 'a'), (2, 'B'), (3, 'ä')"
    assert feed.written(insert) == [("s", "I", {"s": ("B", "ä")})]


# --- partitions and children ----------------------------------------------------------------------


def test_partitions_are_logged_as_their_parent(feed: Feed) -> None:
    """By the parent, by a partition of any depth, and from one partition to another."""
    feed.sql(*TABLES)
    part = feed.watch("part")
    assert feed.written("INSERT INTO part VALUES (1), (2000), (2001)") == [
        ("part", "I", [1, 2000, 2001])
    ]
    assert feed.written("INSERT INTO part_low VALUES (2)") == [("part", "I", [2])]
    (row,) = feed.connection.exec_driver_sql("SELECT min(id) FROM part_even").all()
    assert feed.written(f"UPDATE part_even SET v = 1 WHERE id = {row[0]}") == [
        ("part", "U", [row[0]])
    ]
    assert feed.written("UPDATE part SET id = 3000 WHERE id = 1") == [("part", "U", [1, 3000])]
    assert feed.written("DELETE FROM part_high WHERE id = 3000") == [("part", "D", [3000])]
    assert set(feed.written("TRUNCATE part")) == {("part", "T", None)}
    assert LOG.installed(feed.connection).watched.keys() == {part}


def test_a_partition_is_written_by_its_parents(feed: Feed) -> None:
    """Triggers of a partition do not fire for statements that name its parent: those of it do."""
    feed.sql(*TABLES)
    relations = [feed.watch(name) for name in ("part_low", "part_even")]
    assert sorted(feed.written("INSERT INTO part VALUES (1)")) == [
        ("part_even", "I", [1]),  # one cannot tell where it went
        ("part_low", "I", [1]),
    ]
    assert feed.written("UPDATE part_low SET v = 2") == [("part_low", "U", [1])]
    assert feed.written("INSERT INTO part_high VALUES (2000)") == [("part_even", "I", [2000])]
    assert ("part_low", "T", None) in feed.written("TRUNCATE part")
    feed.sql("CREATE TABLE top (LIKE part) PARTITION BY RANGE (id)")
    feed.sql("ALTER TABLE top ATTACH PARTITION part DEFAULT")
    assert set(feed.poll().untrusted) == set(relations)
    for name in ("part_low", "part_even"):
        feed.again(name)
    assert len(feed.written("INSERT INTO top VALUES (1)")) == 2


def test_children_are_written_by_all_of_their_parents(feed: Feed) -> None:
    """A row of a child is one of each parent, and statements on any of those write it."""
    feed.sql(
        "CREATE TABLE a (id integer PRIMARY KEY)",
        "CREATE TABLE b (id integer PRIMARY KEY)",
        "CREATE TABLE c (PRIMARY KEY (id)) INHERITS (a, b)",
    )
    for name in "abc":
        feed.watch(name)
    feed.sql("INSERT INTO a VALUES (2)")
    every = [("a", "I", [1]), ("b", "I", [1]), ("c", "I", [1])]
    assert sorted(feed.written("INSERT INTO c VALUES (1)")) == every
    expected = [(name, "D", [1, 2]) for name in "abc"]
    assert sorted(feed.written("DELETE FROM a")) == expected


def test_a_parent_that_lacks_the_key(feed: Feed) -> None:
    """What it writes may be any row of the child; what the child writes is known."""
    feed.sql(
        "CREATE TABLE base (v integer)",
        "CREATE TABLE child (id integer PRIMARY KEY) INHERITS (base)",
    )
    feed.watch("child", ranges=("v",), limit=1)
    feed.sql("INSERT INTO child VALUES (1, 1), (2, 2)")
    assert feed.written("UPDATE base SET v = 3") == [("child", "U", None)]
    assert feed.written("UPDATE child SET v = 4 WHERE id = 1") == [("child", "U", [1])]
    feed.sql("ALTER TABLE child NO INHERIT base")
    feed.again("child")
    assert feed.written("INSERT INTO base VALUES (1)") == []


@pytest.mark.parametrize(
    ("column", "ddl"),
    [
        ("id", "RENAME id TO pk"),
        ("id", "DROP COLUMN id"),
        ("id", "ALTER id TYPE text USING chr(34) || ', ' || id"),
        ("id", "ALTER id TYPE integer[] USING ARRAY[id]"),
        ("id", "ALTER id TYPE smallint"),
        ("raw", "ALTER raw TYPE uuid USING NULL"),
        ("s", "ALTER s TYPE boolean USING true"),
        ("s", "DROP COLUMN s"),
        ("at", "ALTER at TYPE text"),
        ("mood", "ALTER mood TYPE text"),
    ],
)
def test_no_ddl_keeps_the_application_from_writing(feed: Feed, column: str, ddl: str) -> None:
    """Where a logged column has gone or is of another type, the table is not trusted any more.

    Until it is watched again, what is logged of it is read, whatever it is.
    """
    feed.sql(
        "CREATE TYPE mood AS ENUM ('so so')",
        "CREATE TABLE w (id integer PRIMARY KEY, raw bytea, s text, at timestamptz, mood mood,"
        " v integer)",
        "INSERT INTO w SELECT i, 'a', 'a', now(), 'so so' FROM generate_series(1, 5) AS i",
    )
    for key in (("id",), ("id", "raw", "at", "mood")):
        relation = feed.watch("w", key=key, ranges=("s",), limit=10)
        ((_, _, keys),) = feed.written("UPDATE w SET v = 1")
        assert len(keys) == 5
        before = feed.poll().fingerprints[relation]
        with feed.engine.execution_options(isolation_level="READ COMMITTED").connect() as other:
            other.exec_driver_sql(f"ALTER TABLE w {ddl}")
            for statement in ("UPDATE w SET v = 1", "DELETE FROM w", "TRUNCATE w"):
                other.exec_driver_sql(statement)
            poll = LOG.poll(other, feed.position, frozenset({relation}))
            assert poll.fingerprints[relation] != before
            assert [change.operation for change in poll.changes] == ["U", "D", "T"]
            if column in (*key, "s"):
                assert f"when it was watched: {column};" in poll.untrusted[relation]
            else:
                assert not poll.untrusted
            other.rollback()
        assert not feed.poll().untrusted


def test_temporary_children_are_their_sessions_own(feed: Feed, t: Relation) -> None:
    """A temporary child of another session shows nobody a row, and changes nothing."""
    before = feed.poll().fingerprints
    feed.sql("CREATE TEMP TABLE mine () INHERITS (t)")
    feed.sql("INSERT INTO mine VALUES (7)")
    poll = feed.poll()
    assert not poll.untrusted
    again = LOG.poll(feed.reader, feed.position, frozenset({t})).fingerprints
    feed.sql("DROP TABLE mine", "CREATE TEMP TABLE mine () INHERITS (t)")
    assert LOG.poll(feed.reader, feed.position, frozenset({t})).fingerprints == again
    assert before.keys() == {t}


def test_partitions_that_come_and_go(feed: Feed) -> None:
    """Each makes the fingerprint move; one without triggers is named until it is watched again."""
    feed.sql(*TABLES)
    feed.sql("CREATE TABLE loose (LIKE part INCLUDING ALL)", "INSERT INTO loose VALUES (-5, 0)")
    part = feed.watch("part")
    before = feed.poll().fingerprints[part]

    def ddl(statement: str, *, unwatched: str | None = None) -> None:
        """Run it; check what polls tell; watch again."""
        nonlocal before
        feed.sql(statement)
        poll = feed.poll()
        assert poll.fingerprints[part] != before
        if unwatched is None:
            assert not poll.untrusted
        else:
            assert unwatched in poll.untrusted[part]
            assert unwatched in LOG.installed(feed.reader).outdated[part]
            feed.again("part")
            poll = feed.poll()
            assert not poll.untrusted
        before = poll.fingerprints[part]

    ddl("CREATE TABLE part_none PARTITION OF part DEFAULT", unwatched="part_none")
    assert feed.written("INSERT INTO part_none VALUES (-9)") == [("part", "I", [-9])]
    ddl("DROP TABLE part_none")
    ddl("ALTER TABLE part ATTACH PARTITION loose FOR VALUES FROM (-9) TO (0)", unwatched="loose")
    assert feed.written("UPDATE loose SET v = 1") == [("part", "U", [-5])]
    ddl("ALTER TABLE part DETACH PARTITION loose")
    assert feed.written("UPDATE loose SET v = 2") == [("part", "U", [-5])]  # more than needed
    feed.again("part")
    assert feed.written("UPDATE loose SET v = 3") == []
    before = feed.poll().fingerprints[part]
    ddl("TRUNCATE part_odd")
    if feed_is(feed, 14):
        ddl("ALTER TABLE part DETACH PARTITION part_low CONCURRENTLY")


def test_foreign_partitions_are_refused(feed: Feed) -> None:
    """Nobody sees the rows of a foreign table change: neither watched nor trusted."""
    try:
        feed.sql("CREATE EXTENSION file_fdw")
    except DBAPIError:
        pytest.skip("this server has no foreign data wrapper")
    feed.sql("CREATE TABLE part (id integer) PARTITION BY RANGE (id)")
    part = feed.watch("part", key=("id",))
    feed.sql(
        "CREATE SERVER files FOREIGN DATA WRAPPER file_fdw",
        "CREATE FOREIGN TABLE far PARTITION OF part DEFAULT SERVER files"
        " OPTIONS (filename '/dev/null')",
    )
    assert "foreign table public.far" in feed.poll().untrusted[part]
    with pytest.raises(DBAPIError, match="far is a foreign table"):
        feed.again("part")


# --- what triggers do not see ---------------------------------------------------------------------

SILENT = "triggers are missing or disabled on public.shape"

SHAPES = (
    "CREATE TYPE mood AS ENUM ('a', 'b')",
    "CREATE TABLE shape (id integer PRIMARY KEY, v integer, w integer, m mood, secret boolean)",
    "INSERT INTO shape VALUES (1, 1, 2, 'a')",
    "CREATE TABLE other (LIKE shape INCLUDING ALL)",
)


@pytest.mark.parametrize(
    ("statements", "untrusted"),
    [
        (["ALTER TABLE shape ALTER v TYPE bigint USING v * 2"], None),
        (["ALTER TABLE shape ALTER v TYPE numeric"], None),
        (["ALTER TABLE shape ADD COLUMN x integer DEFAULT 5"], None),
        (["ALTER TABLE shape DROP COLUMN v"], None),
        (
            [
                "ALTER TABLE shape RENAME v TO x",
                "ALTER TABLE shape RENAME w TO v",
                "ALTER TABLE shape RENAME x TO w",
            ],
            None,
        ),
        (["ALTER TYPE mood RENAME VALUE 'a' TO 'c'"], None),
        (["ALTER TABLE shape ENABLE ROW LEVEL SECURITY"], None),
        (["ALTER TABLE shape FORCE ROW LEVEL SECURITY"], None),
        (["CREATE POLICY p ON shape USING (secret)"], None),
        (["CREATE RULE r AS ON UPDATE TO shape DO INSTEAD NOTHING"], None),
        (["TRUNCATE shape"], None),
        (["CLUSTER shape USING shape_pkey"], None),
        (["DROP TABLE shape"], "there is no such table"),
        (["ALTER TABLE shape RENAME TO gone"], "there is no such table"),
        (["CREATE SCHEMA s", "ALTER TABLE shape SET SCHEMA s"], "there is no such table"),
        (
            ["ALTER TABLE shape RENAME TO old", "ALTER TABLE other RENAME TO shape"],
            SILENT,
        ),
        (
            ["DROP TABLE shape", "CREATE TABLE shape (id integer PRIMARY KEY)"],
            SILENT,
        ),
        (
            ["ALTER TABLE shape DISABLE TRIGGER ALL"],
            SILENT,
        ),
        (
            ["ALTER TABLE shape DISABLE TRIGGER USER"],
            SILENT,
        ),
        # As after pg_restore --disable-triggers: they are back, but not for replicas.
        (
            ["ALTER TABLE shape DISABLE TRIGGER ALL", "ALTER TABLE shape ENABLE TRIGGER ALL"],
            SILENT,
        ),
        (["DROP FUNCTION {logger} CASCADE"], "its trigger function is gone"),
        (["DROP TRIGGER {trigger} ON shape"], SILENT),
        (
            [
                "ALTER TABLE shape DISABLE TRIGGER {trigger}",
                "ALTER TABLE shape ENABLE ALWAYS TRIGGER {trigger}",
            ],
            None,
        ),
        (["SELECT sa_tablecache.unwatch('public', 'shape')"], "it is not watched"),
        (["SELECT sa_tablecache.watch('public', 'shape', ARRAY['v'])"], None),
        (
            [
                "SELECT sa_tablecache.unwatch('public', 'shape')",
                "SELECT sa_tablecache.watch('public', 'shape')",
            ],
            None,
        ),
    ],
)
def test_ddl_moves_the_fingerprint(
    feed: Feed, statements: list[str], untrusted: str | None
) -> None:
    """What changes rows without a trigger, or what is logged, moves it; watching again heals."""
    feed.sql(*SHAPES)
    shape = feed.watch("shape")
    suffix = feed.connection.exec_driver_sql(
        "SELECT logger FROM sa_tablecache.watched"
    ).scalar_one()[4:]
    before = feed.poll().fingerprints[shape]
    names = {"logger": f"sa_tablecache.log_{suffix}", "trigger": f"sa_tablecache_update_{suffix}"}
    with feed.engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement.format(**names))
    poll = feed.poll()
    assert poll.fingerprints[shape] != before
    if untrusted is None:
        assert not poll.untrusted
        return
    assert untrusted in poll.untrusted[shape]
    if "no such table" not in untrusted:
        feed.watch("shape")
        assert feed.written("INSERT INTO shape (id) VALUES (7)") == [("shape", "I", [7])]


def test_work_that_changes_no_row_leaves_the_fingerprint(feed: Feed) -> None:
    """Vacuuming, indexes, and watching again what is watched mark nothing."""
    feed.sql(*SHAPES)
    shape = feed.watch("shape", ranges=("v",))
    feed.sql("ANALYZE shape", "CREATE INDEX before ON shape (v)")
    before = feed.poll().fingerprints[shape]
    for statement in (
        "INSERT INTO shape SELECT i, i FROM generate_series(10, 5000) AS i",
        "DELETE FROM shape WHERE id > 20",
        "VACUUM (ANALYZE, FREEZE) shape",
        "CREATE INDEX more ON shape (w)",
        "REINDEX TABLE shape",
        "DROP INDEX more",
        "COMMENT ON TABLE shape IS 'a table'",
        "SELECT sa_tablecache.watch('public', 'shape')",
        "SELECT sa_tablecache.watch('public', 'other')",
        "CREATE TABLE unrelated (id integer)",
    ):
        feed.sql(statement)
        assert feed.poll().fingerprints[shape] == before, statement
    feed.watch("shape", ranges=("v",))
    assert feed.poll().fingerprints[shape] == before


def test_virtual_columns_change_without_a_trace(feed: Feed) -> None:
    """What a virtual column is made of is in the fingerprint: nothing else tells."""
    if not feed_is(feed, 18):
        pytest.skip("virtual columns came with PostgreSQL 18")
    feed.sql(
        "CREATE TABLE shape (id integer PRIMARY KEY, v integer GENERATED ALWAYS AS (id) VIRTUAL)"
    )
    shape = feed.watch("shape")
    before = feed.poll().fingerprints[shape]
    feed.sql("ALTER TABLE shape ALTER v SET EXPRESSION AS (id * 3)")
    assert feed.poll().fingerprints[shape] != before


def test_tables_of_a_subscription_are_not_trusted(feed: Feed, t: Relation) -> None:
    """Logical replication fires no statement triggers."""
    feed.sql(
        "CREATE SUBSCRIPTION feed_sub CONNECTION 'dbname=none' PUBLICATION p"
        " WITH (connect = false, slot_name = NONE)"
    )
    try:
        feed.sql(
            "INSERT INTO pg_subscription_rel (srsubid, srrelid, srsubstate)"
            " SELECT oid, 't'::regclass, 'r' FROM pg_subscription"
            if feed.connection.exec_driver_sql("SHOW allow_system_table_mods").scalar() == "on"
            else "SET allow_system_table_mods = on"
        )
        feed.sql(
            "INSERT INTO pg_subscription_rel (srsubid, srrelid, srsubstate)"
            " SELECT oid, 't'::regclass, 'r' FROM pg_subscription WHERE subname = 'feed_sub'"
        )
        assert "logical replication writes public.t" in feed.poll().untrusted[t]
    finally:
        feed.sql("DROP SUBSCRIPTION feed_sub")


# --- once each, in the order in which they become visible -----------------------------------------


class Follower:
    """Keeps a copy of tables by what polls tell, and compares it with them."""

    def __init__(self, feed: Feed, relations: Sequence[Relation]) -> None:
        self.engine = feed.engine.execution_options(isolation_level="REPEATABLE READ")
        self.relations = relations
        self.copies: dict[Relation, dict[int, Any]] = {}
        self.delivered: Counter[Logged] = Counter()
        self.gaps: list[str] = []
        with self.engine.connect() as connection:
            self.position: Position = LOG.position(connection)
            for relation in relations:
                self.copies[relation] = self._rows(connection, relation)

    def poll(self) -> Poll:
        """Poll, read again what has changed, and compare, all in one snapshot."""
        with self.engine.connect() as connection:
            poll = LOG.poll(connection, self.position, frozenset(self.relations))
            if poll.gap is not None:
                self.gaps.append(poll.gap)
                self.copies = {r: self._rows(connection, r) for r in self.relations}
            for change in poll.changes:
                assert change.keys is not None
                assert poll.position.sees(change)
                assert not self.position.sees(change)
                keys = tuple(sorted(key for (key,) in change.keys))
                self.delivered[change.relation.name, change.operation, keys] += 1
                self._read(connection, change.relation, keys)
            for relation, copy in self.copies.items():
                assert copy == self._rows(connection, relation)
            connection.commit()
        assert poll.position.includes(self.position) or poll.gap is not None
        self.position = poll.position
        return poll

    def _read(self, connection: Connection, relation: Relation, keys: Sequence[int]) -> None:
        found = self._rows(connection, relation, f"WHERE id IN ({', '.join(map(str, keys))})")
        for key in keys:
            self.copies[relation].pop(key, None)
        self.copies[relation].update(found)

    def _rows(self, connection: Connection, relation: Relation, where: str = "") -> dict[int, Any]:
        rows = connection.exec_driver_sql(f"SELECT * FROM {relation.name} {where}")
        return {row[0]: tuple(row) for row in rows}


@pytest.fixture
def family(feed: Feed) -> list[Relation]:
    """The tables of the writing processes, watched."""
    feed.sql(*TABLES)
    return [feed.watch(name) for name in ("item", "part", "parent", "child")]


def check_once_each(feed: Feed, family: list[Relation], seeds: range, count: int) -> None:
    """Follow writers, trimming what is behind after each poll, and compare what both tell."""
    follower = Follower(feed, family)
    with writing(feed.url, seeds, count) as processes:
        while any(process.poll() is None for process in processes):
            follower.poll()
            LOG.trim(feed.reader, 0)
        follower.poll()
        expected = Counter(committed(processes))
    assert expected.total() > count
    assert sorted(follower.delivered - expected) == []
    assert sorted(expected - follower.delivered) == []
    assert not follower.gaps


def test_each_change_comes_once(feed: Feed, family: list[Relation]) -> None:
    """Of processes that write in every way at once, each committed change comes exactly once.

    After every poll a copy that follows the changes equals the tables, in the same snapshot.
    """
    check_once_each(feed, family, range(1, 4), 40)


@pytest.mark.slow
def test_each_change_comes_once_for_longer(feed: Feed, family: list[Relation]) -> None:
    """The same with other seeds, and more of it."""
    check_once_each(feed, family, range(11, 15), 150)


def test_transactions_that_end_in_another_order(feed: Feed, t: Relation) -> None:
    """A change comes when its transaction commits, though later ones have come already."""
    plain = feed.engine.execution_options(isolation_level="READ COMMITTED")
    with plain.connect() as first, plain.connect() as second, plain.connect() as third:
        for at, connection in enumerate((first, second, third)):
            connection.exec_driver_sql(f"INSERT INTO t VALUES ({at})")
        assert feed.changes() == []
        third.commit()
        assert feed.changes() == [("t", "I", [2])]
        first.commit()
        second.rollback()
        assert feed.changes() == [("t", "I", [0])]
    assert feed.changes() == []


def test_prepared_transactions(feed: Feed, t: Relation) -> None:
    """A prepared transaction comes when it is committed, from whichever connection."""
    if feed.connection.exec_driver_sql("SHOW max_prepared_transactions").scalar() == "0":
        pytest.skip("this server allows no prepared transactions")
    feed.sql("BEGIN", "INSERT INTO t VALUES (1)", "PREPARE TRANSACTION 'feed'")
    assert feed.written("INSERT INTO t VALUES (2)") == [("t", "I", [2])]
    feed.reader.exec_driver_sql("COMMIT PREPARED 'feed'")
    assert feed.changes() == [("t", "I", [1])]


def test_positions_of_snapshots(feed: Feed, t: Relation) -> None:
    """The position of an old snapshot does not see what was committed after it."""
    with feed.engine.connect().execution_options(isolation_level="REPEATABLE READ") as old:
        before = LOG.position(old)
        feed.sql("INSERT INTO t VALUES (1)")
        assert LOG.position(old) == before
        poll = feed.poll()
        (change,) = poll.changes
        assert not before.sees(change)
        assert poll.position.sees(change)
        assert poll.position.includes(before) and not before.includes(poll.position)
        assert LOG.parse(str(poll.position)) == poll.position


# --- trimming and gaps ----------------------------------------------------------------------------


def test_trimming_loses_nothing_that_somebody_may_need(feed: Feed, t: Relation) -> None:
    """A long transaction's changes stay until it has ended and some seconds have passed."""
    plain = feed.engine.execution_options(isolation_level="READ COMMITTED")
    with plain.connect() as writer:
        writer.exec_driver_sql("INSERT INTO t VALUES (1)")
        feed.sql("INSERT INTO t VALUES (2)")
        feed.changes()
        for _ in range(3):
            LOG.trim(feed.reader, 0)
        writer.commit()
    assert LOG.trim(feed.reader, 0) == 0  # it ended after the last horizon
    assert feed.changes() == [("t", "I", [1])]
    assert LOG.trim(feed.reader, 3600) == 0
    assert LOG.trim(feed.reader, 0) == 2
    assert feed.changes() == []


def test_a_reader_behind_what_was_trimmed_finds_a_gap(feed: Feed, t: Relation) -> None:
    """Once; one that is not behind finds none, however long it has slept."""
    feed.poll()
    asleep = feed.position
    feed.sql("INSERT INTO t VALUES (1)")
    awake = feed.poll().position
    feed.sql("SELECT pg_current_xact_id()")
    LOG.trim(feed.reader, 0)
    assert LOG.trim(feed.reader, 0) == 1
    poll = LOG.poll(feed.reader, asleep, frozenset({t}))
    assert poll.gap is not None and "trimmed" in poll.gap
    assert LOG.poll(feed.reader, poll.position, frozenset({t})).gap is None
    assert LOG.poll(feed.reader, awake, frozenset({t})).gap is None


def test_one_trims_and_nobody_waits(feed: Feed, t: Relation) -> None:
    """While one process trims, others are told so, and writers and readers go on."""
    feed.sql("INSERT INTO t VALUES (1)", "SET statement_timeout = '5s'", "SET lock_timeout = '1s'")
    LOG.trim(feed.reader, 0)
    plain = feed.engine.execution_options(isolation_level="READ COMMITTED")
    with plain.connect() as trimmer:
        assert LOG.trim(trimmer, 0) == 1
        assert LOG.trim(feed.connection, 0) == -1
        assert feed.written("INSERT INTO t VALUES (2)") == [("t", "I", [2])]
        trimmer.rollback()
    assert LOG.trim(feed.connection, 0) == 1


def test_trimming_goes_in_batches(feed: Feed, t: Relation, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much there is, no statement deletes more than a batch."""
    monkeypatch.setattr("sa_tablecache.feed.postgresql.TRIM_BATCH", 10)
    feed.sql("DO $$ BEGIN FOR i IN 1..25 LOOP INSERT INTO t VALUES (i); END LOOP; END $$")
    LOG.trim(feed.reader, 0)
    assert LOG.trim(feed.reader, 0) == 25


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_reader_that_was_cut_off(feed: Feed, t: Relation, trimmed: bool) -> None:
    """Its position outlives its connection: it goes on where it was, or finds a gap."""
    follower = Follower(feed, [t])
    follower.engine = create_engine(feed.url, isolation_level="REPEATABLE READ")
    with follower.engine.connect() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    feed.sql(f"SELECT pg_terminate_backend({pid}, 5000)" if feed_is(feed, 14) else
             f"SELECT pg_terminate_backend({pid})")  # fmt: skip
    feed.sql(*(f"INSERT INTO t VALUES ({i})" for i in range(20)))
    with pytest.raises(OperationalError):
        follower.poll()
    if trimmed:
        LOG.trim(feed.reader, 0)
        assert LOG.trim(feed.reader, 0) == 20
    follower.poll()
    assert len(follower.gaps) == trimmed
    assert follower.delivered.total() == (0 if trimmed else 20)
    feed.sql("INSERT INTO t VALUES (30)")
    follower.poll()
    assert len(follower.gaps) == trimmed
    follower.engine.dispose()


def test_another_database_with_the_same_content(
    feed: Feed, t: Relation, postgres: Postgres
) -> None:
    """A copy has an incarnation of its own, and forgets a future that is not its own."""
    feed.sql("INSERT INTO t VALUES (1)")
    before = feed.poll().position
    # A dump brings along the rows of the changelog, and another server may be far ahead.
    feed.sql(
        "INSERT INTO sa_tablecache.changelog VALUES ('9000000000', 'public', 't', 'U', '[[1]]')"
    )
    feed.connection.close()
    feed.reader.close()
    feed.engine.dispose()
    copy = postgres.url.set(database=f"{feed.url.database}_copy")
    postgres._execute(f"CREATE DATABASE {copy.database} TEMPLATE {feed.url.database}")
    try:
        engine = create_engine(copy, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            assert not LOG.position(connection).includes(before)
            assert LOG.trim(connection, 0) == 0
            poll = LOG.poll(connection, before, frozenset({t}))
            assert poll.gap is not None
            assert poll.changes == ()
            connection.exec_driver_sql("INSERT INTO t VALUES (5)")
            again = LOG.poll(connection, poll.position, frozenset({t}))
            assert [brief(change) for change in again.changes] == [("t", "I", [5])]
            assert again.gap is None
        engine.dispose()
    finally:
        postgres.drop_database(copy)
    feed.connection, feed.reader = feed.engine.connect(), feed.engine.connect()


@pytest.mark.slow
# Connections to a server that was killed are left to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_server_that_was_killed_or_restarted() -> None:
    """A crash, a clean restart and a failover are a gap, once; between them nothing is lost."""
    with (
        tempfile.TemporaryDirectory(prefix="sa_tablecache_") as directory,
        own_postgres(Path(directory)) as server,
    ):
        feed = Feed(server.url)
        feed.sql("CREATE TABLE t (id integer PRIMARY KEY, v integer)")
        t = feed.watch("t")
        follower = Follower(feed, [t])
        follower.engine = create_engine(
            server.url, isolation_level="REPEATABLE READ", pool_pre_ping=True
        )
        feed.sql("CHECKPOINT")

        def write(first: int) -> None:
            """Write, some of it in a transaction that the server does not survive."""
            engine = create_engine(server.url, poolclass=NullPool)
            with engine.begin() as connection:
                connection.exec_driver_sql(f"INSERT INTO t VALUES ({first}), ({first + 1})")

        def promoted() -> None:
            server.restart_as_standby()
            with (
                follower.engine.connect() as connection,
                pytest.raises(FeedUnavailable, match="standby"),
            ):
                LOG.position(connection)
            with follower.engine.connect() as connection:
                assert connection.exec_driver_sql("SELECT pg_promote()").scalar_one()

        write(0)
        follower.poll()
        for at, event in enumerate((server.crash, server.restart, promoted), start=1):
            token = str(follower.position)
            write(at * 10)
            event()
            with follower.engine.connect() as connection:
                assert not LOG.position(connection).includes(LOG.parse(token))
            follower.poll()
            assert len(follower.gaps) == at
            assert "started, recovered, failed over or restored" in follower.gaps[-1]
            write(at * 10 + 5)
            delivered = follower.delivered.total()
            follower.poll()
            assert len(follower.gaps) == at
            assert follower.delivered.total() == delivered + 1
        follower.engine.dispose()
        feed.connection.invalidate()
        feed.reader.invalidate()
        feed.close()


def test_transaction_ids_that_went_back(feed: Feed, t: Relation) -> None:
    """A position from the future of the same incarnation is a gap."""
    now = LOG.position(feed.reader)
    poll = LOG.poll(feed.reader, Snapshot(now.incarnation, now.xmax + 1000), frozenset({t}))
    assert poll.gap is not None and "went back" in poll.gap


def test_a_read_only_snapshot_begins_no_incarnation(feed: Feed, t: Relation) -> None:
    """After a crash it is a gap each time, until somebody polls who may write."""
    before = feed.poll().position
    feed.sql("DELETE FROM sa_tablecache.alive")  # as a crash does
    options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with feed.engine.connect().execution_options(**options) as snapshot:
        first = LOG.poll(snapshot, before, frozenset({t}))
        second = LOG.poll(snapshot, first.position, frozenset({t}))
        assert first.gap is not None and second.gap is not None
        assert not second.position.includes(first.position)
        assert first.fingerprints.keys() == {t}
    feed.position = second.position
    assert feed.poll().gap is not None
    assert feed.written("INSERT INTO t VALUES (1)") == [("t", "I", [1])]


# --- installing -----------------------------------------------------------------------------------


def test_installing_twice_and_dropping(feed: Feed, t: Relation) -> None:
    """Installing is harmless where it is installed; dropping leaves nothing, twice as well."""
    position = feed.poll().position
    before = LOG.installed(feed.reader)
    assert before.version == VERSION
    assert before.watched == {t: Watch(t, ("id",), (), MOST_KEYS)}
    assert before.outdated == {}
    feed.sql(*LOG.create())
    assert LOG.installed(feed.reader) == before
    assert feed.poll().gap is None
    feed.sql("INSERT INTO t VALUES (1)", *LOG.drop(), *LOG.drop(), "INSERT INTO t VALUES (2)")
    assert LOG.installed(feed.reader).version is None
    for use in (
        LOG.position,
        lambda c: LOG.poll(c, position, frozenset({t})),
        lambda c: LOG.trim(c, 1),
    ):
        with pytest.raises(FeedUnavailable, match="no change feed is installed"):
            use(feed.reader)
    left = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'sa_tablecache%%'"
    assert feed.connection.exec_driver_sql(left).scalar_one() == 0
    feed.sql(*LOG.create())
    feed.watch("t")
    poll = LOG.poll(feed.reader, position, frozenset({t}))
    assert poll.gap is not None
    assert LOG.poll(feed.reader, poll.position, frozenset({t})).gap is None


def test_statements_are_plain(feed: Feed, t: Relation) -> None:
    """No driver or template finds a parameter in a statement, and one statement is one command."""
    statements = [
        *LOG.create(),
        *LOG.watch(Watch(Relation("%s :a ?", "$1"), ("%(a)s",), (":b",))),
        *LOG.unwatch(Relation("%s :a ?", "$1")),
        *LOG.invalidate(Relation("%s :a ?", "$1")),
        *LOG.drop(),
    ]
    for statement in statements:
        assert "%" not in statement
        assert not text(statement)._bindparams
    for statement in statements[len(LOG.create()) :]:
        assert not set(statement) & set("?$")


def test_other_versions(feed: Feed, t: Relation) -> None:
    """A changelog of a newer version is not read; triggers of an older one are said to be old."""
    feed.sql("UPDATE sa_tablecache.watched SET definition = definition || '{\"version\": 0}'")
    assert "version 0" in LOG.installed(feed.reader).outdated[t]
    assert not feed.poll().untrusted  # what they log is still understood
    feed.sql("UPDATE sa_tablecache.meta SET version = version + 1")
    assert LOG.installed(feed.reader) == Installation(VERSION + 1)
    with pytest.raises(FeedUnavailable, match=f"of version {VERSION + 1}"):
        LOG.position(feed.reader)
    with pytest.raises(FeedUnavailable, match=f"of version {VERSION + 1}"):
        feed.poll()
    feed.sql(*LOG.create())  # by a program that is older
    with pytest.raises(FeedUnavailable, match=f"of version {VERSION + 1}"):
        feed.poll()
    feed.sql(*LOG.drop())


def test_watching_otherwise(feed: Feed, t: Relation) -> None:
    """A watch replaces the one before; a call with the name alone keeps what was said of it."""
    feed.watch("t", key=("id", "v"), ranges=("v",), limit=3)
    expected = Watch(t, ("id", "v"), ("v",), 3)
    assert LOG.installed(feed.reader).watched == {t: expected}
    feed.again("t")
    assert LOG.installed(feed.reader).watched == {t: expected}
    assert feed.written("INSERT INTO t VALUES (1, 2)") == [("t", "I", [(1, 2)])]
    feed.sql(*LOG.unwatch(t), *LOG.unwatch(t))
    feed.again("t")
    assert LOG.installed(feed.reader).watched == {t: Watch(t, ("id",))}
    feed.sql("CREATE TABLE two (b integer, a integer, PRIMARY KEY (a, b))")
    assert LOG.propose(feed.reader, Relation("public", "two")).key == ("a", "b")


def test_watching_again_locks_nothing(feed: Feed, t: Relation) -> None:
    """Where nothing is to be done, writers and readers of the table do not wait."""
    feed.sql("SET lock_timeout = '1s'")
    plain = feed.engine.execution_options(isolation_level="READ COMMITTED")
    with plain.connect() as writer:
        writer.exec_driver_sql("INSERT INTO t VALUES (1)")
        feed.again("t")
        writer.rollback()


def test_installing_again_keeps_nobody_waiting(feed: Feed, t: Relation) -> None:
    """A migration that installs it again, and goes on for long, stops neither writers nor polls.

    A session that polled meanwhile would wait for the migration, which may wait for a table that
    the session has read: for ever, and no database could see it.
    """
    feed.sql("SET lock_timeout = '1s'")
    feed.reader.exec_driver_sql("SET lock_timeout = '1s'")
    plain = feed.engine.execution_options(isolation_level="READ COMMITTED")
    with plain.connect() as migration:
        for statement in (*LOG.create(), *LOG.watch(Watch(t, ("id",)))):
            migration.exec_driver_sql(statement, execution_options={"no_parameters": True})
        assert feed.written("INSERT INTO t VALUES (1)") == [("t", "I", [1])]
        migration.rollback()


def test_names_are_those_of_the_connection(feed: Feed, t: Relation) -> None:
    """A name without a schema is looked up on the search path."""
    feed.sql("CREATE SCHEMA s", "CREATE TABLE s.t (id integer)", "CREATE TABLE s.x (id integer)")
    names = [(None, "t"), ("s", "t"), (None, "x"), ("s", "no"), (None, "T")]
    assert LOG.resolve(feed.connection, names) == {
        (None, "t"): t,
        ("s", "t"): Relation("s", "t"),
    }
    feed.sql("SET search_path = s, public")
    assert LOG.resolve(feed.connection, names)[None, "t"] == Relation("s", "t")
    assert LOG.resolve(feed.connection, []) == {}


def test_its_own_tables(feed: Feed) -> None:
    """It names all tables and views of its schema."""
    rows = feed.connection.exec_driver_sql(
        "SELECT relname FROM pg_class WHERE relnamespace = 'sa_tablecache'::regnamespace"
        " AND relkind IN ('r', 'v')"
    )
    assert LOG.owned() == {Relation("sa_tablecache", name) for (name,) in rows}
