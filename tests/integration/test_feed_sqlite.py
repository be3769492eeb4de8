"""The changelog of SQLite: what its triggers log, and what a poll says of it.

The random tests compare a table before and after a transaction, so that what a statement did to it
is known without regard to how: each row that is not what it was has to be in the log.
"""

import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.ext.asyncio import create_async_engine

from sa_tablecache.exc import FeedUnavailable, TableCacheError
from sa_tablecache.feed.contract import Poll, Relation, Watch
from sa_tablecache.feed.sqlite import SQLiteChangelog, SQLitePosition
from tests.conftest import asynchronous

CHANGELOG = SQLiteChangelog()


@dataclass
class Feed:
    """A database file with a changelog, and a reader of it."""

    engine: Engine
    relations: set[Relation] = field(default_factory=set)
    position: SQLitePosition | None = None

    def run(self, *statements: str) -> None:
        """Run statements, each a transaction of its own."""
        with self.engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def watch(
        self, name: str, ranges: Sequence[str] = (), schema: str = "main", **options: Any
    ) -> None:
        """Watch a table as a migration does, and read on from there."""
        with self.engine.connect() as connection:
            watch = CHANGELOG.propose(connection, Relation(schema, name), ranges)
            for statement in CHANGELOG.watch(replace(watch, **options)):
                connection.exec_driver_sql(statement)
            self.relations.add(watch.relation)
            self.position = CHANGELOG.position(connection)

    def poll(self) -> Poll:
        """Poll, and read on from there."""
        assert self.position is not None
        with self.engine.connect() as connection:
            poll = CHANGELOG.poll(connection, self.position, frozenset(self.relations))
        assert isinstance(poll.position, SQLitePosition)
        self.position = poll.position
        return poll

    def logged(self) -> list[tuple[str, Any]]:
        """Poll, and return operations and keys of what was found; nothing else must be."""
        poll = self.poll()
        assert poll.gap is None
        assert not poll.untrusted
        return [(c.operation, c.keys and c.keys[0]) for c in poll.changes]


@contextmanager
def feed_of(url: URL) -> Iterator[Feed]:
    """Make a feed of an empty file."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    event.listen(engine, "connect", lambda driver, _: driver.execute("PRAGMA synchronous = OFF"))
    feed = Feed(engine)
    try:
        feed.run(*CHANGELOG.create())
        yield feed
    finally:
        engine.dispose()


@pytest.fixture
def feed(sqlite_url: URL) -> Iterator[Feed]:
    """A feed of an empty file."""
    with feed_of(sqlite_url) as feed:
        yield feed


def test_each_row_is_logged_by_its_key(feed: Feed) -> None:
    """Inserted, changed, moved and deleted rows are logged, and nothing else is."""
    feed.run("CREATE TABLE plane (id INTEGER PRIMARY KEY, model TEXT)")
    feed.watch("plane")
    feed.run("INSERT INTO plane VALUES (1, 'a'), (2, 'b')")
    assert feed.logged() == [("I", (1,)), ("I", (2,))]
    feed.run("UPDATE plane SET model = 'c' WHERE id = 1", "UPDATE plane SET id = 3 WHERE id = 2")
    assert feed.logged() == [("U", (1,)), ("U", (2,)), ("U", (3,))]
    feed.run("UPDATE plane SET model = 'd' WHERE id = 9", "DELETE FROM plane")
    assert feed.logged() == [("D", (1,)), ("D", (3,))]
    assert feed.logged() == []


#: Tables of every kind that has a word in what REPLACE does, and whether each replaced row is
#: logged by its key.
TABLES: Mapping[str, tuple[str, bool]] = {
    "rowid alias": ("id INTEGER PRIMARY KEY, a TEXT UNIQUE, b INT, c TEXT", True),
    "alias that is none": ("id INT PRIMARY KEY, a TEXT UNIQUE, b INT, c TEXT", True),
    "descending": ("id INTEGER PRIMARY KEY DESC, a TEXT UNIQUE, b INT, c TEXT", True),
    "text key": ("id TEXT PRIMARY KEY COLLATE NOCASE, a TEXT UNIQUE, b INT, c TEXT", True),
    "without rowid": (
        "id TEXT PRIMARY KEY, a INT, b INT, c TEXT, UNIQUE (a, b)) WITHOUT ROWID --(",
        True,
    ),
    "strict": ("id INTEGER PRIMARY KEY, a TEXT UNIQUE, b INT, c TEXT) STRICT --(", True),
    "two columns": ("id INT, a TEXT, b INT UNIQUE, c TEXT, PRIMARY KEY (a, id)", False),
    "conflict clauses": (
        (
            "id INTEGER PRIMARY KEY ON CONFLICT REPLACE, a TEXT UNIQUE ON CONFLICT REPLACE, "
            "b INT UNIQUE ON CONFLICT IGNORE, c TEXT"
        ),
        True,
    ),
    "default for NULL": (
        (
            "id INTEGER PRIMARY KEY, a TEXT NOT NULL ON CONFLICT REPLACE DEFAULT 'x' UNIQUE, "
            "b INT NOT NULL DEFAULT 2, c TEXT, UNIQUE (b, c)"
        ),
        False,
    ),
    "default for the key": (
        (
            "id TEXT NOT NULL DEFAULT 'x', a TEXT NOT NULL DEFAULT 'y', b INT UNIQUE, c TEXT, "
            "PRIMARY KEY (id, a)) WITHOUT ROWID --("
        ),
        False,
    ),
    "collations": (
        (
            "id INTEGER PRIMARY KEY, a TEXT COLLATE NOCASE UNIQUE, b INT, c TEXT); "
            "CREATE UNIQUE INDEX i ON plane (a COLLATE BINARY, c COLLATE RTRIM"
        ),
        True,
    ),
    "partial": (
        (
            "id INTEGER PRIMARY KEY, a TEXT, b INT, c TEXT); CREATE UNIQUE INDEX [i (] ON plane "
            "/* ( */ (a /* , */ COLLATE NOCASE) -- where\n WHERE b > 1 AND c <> 'where' --("
        ),
        True,
    ),
    "partial, double quotes": (
        (
            "id INTEGER PRIMARY KEY, a TEXT, b INT, c TEXT); "
            'CREATE UNIQUE INDEX i ON plane (a) WHERE c = "x" --('
        ),
        False,
    ),
    "expressions": (
        (
            "id INTEGER PRIMARY KEY, a TEXT, b REAL, c TEXT); CREATE UNIQUE INDEX i ON plane "
            "(lower(a) DESC, (b + 1) /* , */, coalesce(c, '(,') COLLATE NOCASE -- x\n); "
            "CREATE UNIQUE INDEX j ON plane (abs(b), trim(c)"
        ),
        True,
    ),
    "comparing expression": (
        (
            "id INTEGER PRIMARY KEY, a TEXT, b TEXT, c TEXT); "
            "CREATE UNIQUE INDEX i ON plane (a, b = 1) --("
        ),
        False,
    ),
    "expression of the rowid": (
        (
            "id INTEGER PRIMARY KEY, a TEXT, b TEXT, c TEXT); "
            "CREATE UNIQUE INDEX i ON plane (id % 3, a) --("
        ),
        False,
    ),
    "generated": (
        (
            "id INTEGER PRIMARY KEY, a TEXT, b INT, c TEXT, "
            "d GENERATED ALWAYS AS (lower(a)) UNIQUE, e AS (b % 3) STORED, UNIQUE (e, c)"
        ),
        True,
    ),
    "generated of the rowid": (
        "id INTEGER PRIMARY KEY, a TEXT, b INT, c TEXT, d AS (id % 4) UNIQUE",
        False,
    ),
    "no affinity": ("id PRIMARY KEY, a UNIQUE, b, c", False),
    "no key": ("id INT, a TEXT UNIQUE, b INT, c TEXT", False),
    "hidden rowid": (
        "id INTEGER PRIMARY KEY, rowid TEXT UNIQUE, a INT AS (1), b INT, c TEXT",
        True,
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_row_that_changed_is_logged(feed: Feed, kind: str) -> None:
    """Whatever a conflict does to rows, by whichever form of statement, each is in the log."""
    definition, exact = TABLES[kind]
    feed.run(*f"CREATE TABLE plane ({definition})".split("; "))
    feed.watch("plane")
    random = Random(kind)
    with feed.engine.connect() as connection:
        columns = {
            column[1]
            for column in connection.exec_driver_sql("PRAGMA table_xinfo(plane)")
            if column[6] == 0
        }
        key = CHANGELOG.propose(connection, Relation("main", "plane")).key
        coarse = changed = 0
        for step in range(200):
            connection.exec_driver_sql(f"PRAGMA recursive_triggers = {random.random() < 0.1}")
            before = rows_of(connection)
            statement = random_write(random, sorted(columns), bool(key == ("id",)))
            with suppress(DatabaseError):
                connection.exec_driver_sql(statement)
            after = rows_of(connection)
            differ = {
                tuple(row[name] for name in key)
                for one, other in ((before, after), (after, before))
                for row in one.values()
                if row not in other.values()
            }
            logged = feed.logged()
            changed += len(differ)
            if any(keys is None for _, keys in logged):
                coarse += 1
            else:
                missing = differ - {keys for _, keys in logged}
                assert not missing, f"{step}: {statement} changed {missing}, logged {logged}"
    assert changed > 40, "the statements did hardly anything"
    assert not coarse or not exact


def rows_of(connection: Connection) -> dict[int, dict[str, Any]]:
    """Return the rows of the table, in any order."""
    rows = connection.exec_driver_sql("SELECT * FROM plane").mappings()
    return dict(enumerate(map(dict, rows)))


def random_write(random: Random, columns: Sequence[str], numbered: bool) -> str:
    """Return a statement that is likely to meet other rows, in one of the forms that there are."""

    def value(column: str) -> str:
        if column == "id" and random.random() < 0.3:
            return "NULL"
        if column in ("id", "b"):
            return random.choice(
                ["1", "2", "3", "4", "5", "-1", "'3'", "2.0", "NULL"][: 9 if column == "b" else 8]
            )
        return random.choice(
            ["'x'", "'X'", "'y'", "'x '", "'z'", "'1'", "1", "NULL", "'(,'", "x'78'"]
        )

    def values() -> str:
        return f"({', '.join(map(value, names))})"

    names = random.sample(list(columns), random.randint(1, len(columns)))
    into = f"plane ({', '.join(names)})"
    rows = ", ".join(values() for _ in range(random.choice([1, 1, 1, 3])))
    settings = ", ".join(
        f"{n} = {value(n)}" for n in random.sample(names, random.randint(1, min(2, len(names))))
    )
    action = random.choice(["REPLACE", "REPLACE", "REPLACE", "IGNORE", "FAIL", "ROLLBACK", "ABORT"])
    where = random.choice(["", f"WHERE id = {value('id')}", f"WHERE b = {value('b')}"])
    forms = [
        f"INSERT INTO {into} VALUES {rows}",
        f"REPLACE INTO {into} VALUES {rows}",
        f"INSERT OR {action} INTO {into} VALUES {rows}",
        f"INSERT OR {action} INTO {into} SELECT {', '.join(names)} FROM plane {where}",
        f"UPDATE OR {action} plane SET {settings} {where}",
        f"UPDATE plane SET {settings} {where}",
        f"INSERT INTO {into} VALUES {rows} ON CONFLICT DO UPDATE SET {settings}",
        f"INSERT INTO {into} VALUES {rows} ON CONFLICT DO NOTHING",
        f"DELETE FROM plane WHERE id = {value('id')}",
    ]
    if numbered and "rowid" not in columns:
        forms.append(f"UPDATE OR REPLACE plane SET rowid = {random.randint(1, 5)} {where}")
        forms.append(f"REPLACE INTO plane (rowid, c) VALUES ({random.randint(1, 5)}, 'x')")
    return random.choice(forms)


def test_what_is_rolled_back_is_not_logged(feed: Feed) -> None:
    """Of transactions and savepoints only what was committed is found, in the order of commits."""
    feed.run("CREATE TABLE plane (id INTEGER PRIMARY KEY)")
    feed.watch("plane")
    feed.run(
        "BEGIN", "INSERT INTO plane VALUES (1)", "ROLLBACK",
        "BEGIN", "INSERT INTO plane VALUES (2)", "SAVEPOINT a", "INSERT INTO plane VALUES (3)",
        "ROLLBACK TO a", "INSERT INTO plane VALUES (4)", "COMMIT",
    )  # fmt: skip
    assert feed.logged() == [("I", (2,)), ("I", (4,))]
    with feed.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.exec_driver_sql("INSERT INTO plane VALUES (5)")
        assert feed.logged() == []
        connection.exec_driver_sql("COMMIT")
    assert feed.logged() == [("I", (5,))]


def test_cascades_are_logged(feed: Feed) -> None:
    """What foreign keys do to other tables is logged, also where REPLACE deleted the parent."""
    feed.run(
        "CREATE TABLE plane (id INTEGER PRIMARY KEY, a TEXT UNIQUE)",
        "CREATE TABLE flight (id INTEGER PRIMARY KEY, plane_id INT REFERENCES plane "
        "ON DELETE CASCADE ON UPDATE CASCADE)",
        "CREATE TABLE seat (id INTEGER PRIMARY KEY, flight_id INT REFERENCES flight "
        "ON DELETE SET NULL)",
    )
    for name in ("plane", "flight", "seat"):
        feed.watch(name)
    feed.run(
        "INSERT INTO plane VALUES (1, 'x'), (2, 'y')",
        "INSERT INTO flight VALUES (11, 1), (12, 2)",
        "INSERT INTO seat VALUES (21, 11), (22, 12)",
    )
    feed.poll()
    with feed.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        connection.exec_driver_sql("UPDATE plane SET id = 3 WHERE id = 1")
        assert by_table(feed.poll()) == {"plane": {1, 3}, "flight": {11}}
        connection.exec_driver_sql("REPLACE INTO plane VALUES (4, 'x')")
        assert by_table(feed.poll()) == {"plane": {3, 4}, "flight": {11}, "seat": {21}}
        connection.exec_driver_sql("DELETE FROM plane")
        assert by_table(feed.poll()) == {"plane": {2, 4}, "flight": {12}, "seat": {22}}
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")


def by_table(poll: Poll) -> dict[str, set[Any]]:
    """Return the keys of one column that were logged, by table."""
    assert poll.gap is None
    assert not poll.untrusted
    found: dict[str, set[Any]] = {}
    for change in poll.changes:
        assert change.keys is not None
        found.setdefault(change.relation.name, set()).add(change.keys[0][0])
    return found


def test_keys_are_what_was_stored_or_any_row(feed: Feed) -> None:
    """A key that JSON cannot say, or of which the type is not certain, counts as any row."""
    feed.run(
        "CREATE TABLE plane (id INTEGER PRIMARY KEY, k TEXT)",
        "CREATE TABLE word (k TEXT PRIMARY KEY)",
        "CREATE TABLE hash (k BLOB PRIMARY KEY)",
        "CREATE TABLE odd (k PRIMARY KEY)",
    )
    for name in ("plane", "word", "hash", "odd"):
        feed.watch(name)
    for table, value, key in (
        ("plane (id)", "9223372036854775807", 2**63 - 1),
        ("plane (id)", "-9223372036854775808", -(2**63)),
        ("word", "'a\"\\''é" + "🙂'", "a\"\\'é🙂"),
        ("word", "'a' || char(0) || 'b'", "a\0b"),
        ("word", "12", "12"),
        ("word", "NULL", None),
        ("word", "CAST(x'ff' AS TEXT)", ...),
        ("word", "x'6162'", ...),
        ("hash", "x'00ff'", "00FF"),
        ("hash", "x''", ""),
        ("odd", "x'00ff'", "00FF"),
        ("odd", "7", 7),
        ("odd", "0.1 + 0.2", ...),
        ("odd", "9e999", ...),
    ):
        feed.run(f"INSERT INTO {table} VALUES ({value})")
        assert feed.logged() == [("I", None if key is ... else (key,))], value


HOSTILE = [
    'a"b',
    "a'b",
    "a b",
    "select",
    "é🙂",
    "a%sb",
    "a:b",
    "{a}",
    "a--b",
    "a;b",
    "t",
    "new",
    "NEW",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_quoted(feed: Feed, name: str) -> None:
    """Tables, columns and databases may have any name."""
    quoted = '"' + name.replace('"', '""') + '"'
    feed.run(
        f"CREATE TABLE {quoted} ({quoted} TEXT PRIMARY KEY, u TEXT UNIQUE, "
        f"g AS (lower({quoted}) || u) UNIQUE)",
        f"CREATE UNIQUE INDEX i ON {quoted} (upper({quoted})) WHERE {quoted} <> ''",
    )
    feed.watch(name, [name])
    feed.run(
        f"INSERT INTO {quoted} VALUES ('a', 'x')",
        f"REPLACE INTO {quoted} VALUES ('b', 'x')",
        f"REPLACE INTO {quoted} VALUES ('B', 'y')",
    )
    assert feed.logged() == [
        ("I", ("a",)),
        ("U", ("a",)),
        ("I", ("b",)),
        ("U", ("b",)),
        ("I", ("B",)),
    ]
    with feed.engine.connect() as connection:
        assert CHANGELOG.installed(connection).watched.keys() == feed.relations
    feed.run(*CHANGELOG.unwatch(Relation("main", name)))
    assert feed.poll().untrusted == {Relation("main", name): "it is not watched"}
    feed.run(*CHANGELOG.unwatch(Relation("main", name)))


def test_a_missing_column_is_found_before_triggers_are_made(feed: Feed) -> None:
    """What would let every write fail is refused when it is installed."""
    feed.run("CREATE TABLE plane (id INTEGER PRIMARY KEY)")
    for wrong in (
        Watch(Relation("main", "plane"), ("key",)),
        Watch(Relation("main", "plane"), ("id",), ("missing",)),
        Watch(Relation("main", "train"), ("id",)),
    ):
        with pytest.raises(DatabaseError, match="no such"):
            feed.run(*CHANGELOG.watch(wrong))
    with feed.engine.connect() as connection, pytest.raises(TableCacheError, match="no column x"):
        CHANGELOG.propose(connection, Relation("main", "plane"), ["x"])
    feed.run("INSERT INTO plane VALUES (1)")


@pytest.mark.parametrize(
    ("statement", "name", "why"),
    [
        ("CREATE VIEW it AS SELECT 1", "it", "database view"),
        ("CREATE VIRTUAL TABLE it USING fts5(a)", "it", "virtual table"),
        ("CREATE TEMP TABLE it (id INTEGER PRIMARY KEY)", "it", "temporary table"),
        ("SELECT 1", "it", "no such table"),
        (
            "CREATE TABLE it (id INTEGER PRIMARY KEY AUTOINCREMENT)",
            "sqlite_sequence",
            "SQLite itself",
        ),
    ],
)
def test_what_has_no_triggers_is_refused(feed: Feed, statement: str, name: str, why: str) -> None:
    """Relations of which no trigger sees the changes cannot be watched, nor be trusted."""
    with feed.engine.connect() as connection:
        connection.exec_driver_sql(statement)
        relation = CHANGELOG.resolve(connection, [(None, name)]).get((None, name))
        relation = relation or Relation("main", name)
        with pytest.raises(TableCacheError, match=why):
            CHANGELOG.propose(connection, relation)
        position = CHANGELOG.position(connection)
        poll = CHANGELOG.poll(connection, position, frozenset({relation}))
    assert poll.untrusted.keys() == {relation}


def test_names_are_resolved_as_sqlite_does(feed: Feed, tmp_path: Path) -> None:
    """A name without a schema is looked for in TEMP, in the main database, in attached ones."""
    with feed.engine.connect() as connection:
        for statement in (
            f"ATTACH '{tmp_path}/other.sqlite' AS Other",
            "CREATE TABLE Plane (id INTEGER PRIMARY KEY)",
            "CREATE TABLE Other.plane (id INTEGER PRIMARY KEY)",
            "CREATE TABLE other.train (id INTEGER PRIMARY KEY)",
            "CREATE TEMP TABLE bus (id INTEGER PRIMARY KEY)",
        ):
            connection.exec_driver_sql(statement)
        names = [(None, "PLANE"), ("main", "plane"), ("OTHER", "plane"), (None, "train")]
        found = CHANGELOG.resolve(connection, [*names, (None, "bus"), (None, "ship"), ("x", "bus")])
        connection.exec_driver_sql("DETACH other")
    assert [found[name] for name in names] == [
        ("main", "Plane"), ("main", "Plane"), ("Other", "plane"), ("Other", "train"),
    ]  # fmt: skip
    assert found[None, "bus"] == ("temp", "bus")
    assert len(found) == 5


def test_a_trigger_that_was_away_is_noticed(feed: Feed) -> None:
    """A trigger that is missing costs the trust, and one that is back marks the table."""
    feed.run("CREATE TABLE plane (id INTEGER PRIMARY KEY)")
    feed.watch("plane")
    (plane,) = feed.relations
    before = feed.poll().fingerprints[plane]
    assert feed.poll().fingerprints[plane] == before
    with feed.engine.connect() as connection:
        name, sql = connection.exec_driver_sql(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND name LIKE '%insert%'"
        ).one()
    feed.run(f"DROP TRIGGER {name}")
    poll = feed.poll()
    assert poll.untrusted == {plane: f"its trigger {name} is missing"}
    feed.run(sql.replace("'I'", "'X'"))
    assert feed.poll().untrusted == {plane: f"its trigger {name} is not what it should be"}
    feed.run(f"DROP TRIGGER {name}", sql)
    poll = feed.poll()
    assert not poll.untrusted
    before = poll.fingerprints[plane]
    feed.run(f"DROP TRIGGER {name}", "INSERT INTO plane VALUES (1)", sql)
    poll = feed.poll()
    assert not poll.untrusted
    assert not poll.changes
    assert poll.fingerprints[plane] != before


def test_a_table_that_was_made_anew_is_noticed(feed: Feed) -> None:
    """A batch recreate, as Alembic does it, drops the triggers; watching it again marks it."""
    feed.run("CREATE TABLE plane (id INTEGER PRIMARY KEY, a TEXT UNIQUE)")
    feed.watch("plane")
    (plane,) = feed.relations
    old = feed.position
    feed.run(
        "CREATE TABLE _new (id INTEGER PRIMARY KEY, a TEXT UNIQUE, b TEXT)",
        "INSERT INTO _new SELECT id, a, 'b' FROM plane",
        "DROP TABLE plane",
        "ALTER TABLE _new RENAME TO plane",
    )
    poll = feed.poll()
    assert "is missing" in poll.untrusted[plane]
    with feed.engine.connect() as connection:
        assert CHANGELOG.installed(connection).outdated.keys() == {plane}
    feed.watch("plane")
    feed.position = old
    assert feed.logged() == [("T", None)]
    feed.run("ALTER TABLE plane RENAME TO old", "CREATE TABLE plane (id INTEGER PRIMARY KEY)")
    assert "is missing" in feed.poll().untrusted[plane]
    feed.watch("plane")
    feed.run("INSERT INTO old VALUES (7, 'a', 'b')", "INSERT INTO plane VALUES (8)")
    assert feed.logged() == [("I", (8,))]


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("CREATE UNIQUE INDEX i ON plane (b)", "unique indexes"),
        ("DROP INDEX u", "unique indexes"),
        ("ALTER TABLE plane RENAME COLUMN id TO key", "not what it should be"),
        ("ALTER TABLE plane RENAME TO other", "no such table"),
        (
            "CREATE TRIGGER x AFTER INSERT ON plane BEGIN SELECT RAISE /* */ ( ignore ); END",
            "x may raise IGNORE",
        ),
    ],
)
def test_ddl_that_blinds_the_triggers_is_noticed(feed: Feed, statement: str, why: str) -> None:
    """An index, a name or a trigger that was not there when the table was watched costs trust."""
    feed.run(
        "CREATE TABLE plane (id INTEGER PRIMARY KEY, a TEXT, b TEXT)",
        "CREATE UNIQUE INDEX u ON plane (a)",
        "CREATE TRIGGER fine BEFORE INSERT ON plane WHEN NEW.a = '!' "
        "BEGIN SELECT RAISE(IGNORE); END",
    )
    feed.watch("plane")
    assert not feed.poll().untrusted
    feed.run(statement)
    assert why in feed.poll().untrusted[Relation("main", "plane")]


def test_a_trigger_that_raises_ignore_hides_changes(feed: Feed) -> None:
    """Such a trigger keeps ours from firing: that is why the table is not trusted with it."""
    feed.run("CREATE TABLE plane (id INTEGER PRIMARY KEY)")
    feed.watch("plane")
    feed.run(
        "CREATE TRIGGER x AFTER INSERT ON plane BEGIN SELECT RAISE(IGNORE); END",
        "INSERT INTO plane VALUES (1)",
    )
    poll = feed.poll()
    assert not poll.changes
    assert poll.untrusted
    with feed.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT id FROM plane").scalars().all() == [1]


def test_many_rows_are_one_change_with_bounds(feed: Feed) -> None:
    """More entries than the limit are one change of any row between the bounds of their columns."""
    feed.run(
        "CREATE TABLE plane (id INTEGER PRIMARY KEY, year INT, x REAL, name TEXT, odd)",
        "CREATE TABLE other (id INTEGER PRIMARY KEY)",
    )
    feed.watch("plane", ["year", "x", "name", "odd"], limit=3)
    feed.watch("other", limit=3)

    def collapsed(*statements: str) -> tuple[str, Any]:
        feed.run(*statements)
        (change,) = feed.poll().changes
        assert change.keys is None
        return change.operation, change.ranges

    some = "INSERT INTO plane VALUES (1, 3, 0.1, 'b', 1), (2, 5, 0.3, 'a', 'x'), (3, 4, 2, NULL, 2)"
    feed.run(some)
    assert feed.logged() == [("I", (1,)), ("I", (2,)), ("I", (3,))]
    operation, ranges = collapsed("DELETE FROM plane", some)
    assert operation == "U"
    assert ranges.keys() == {"year", "x"}, "NULL, or values that do not compare, bound nothing"
    assert ranges["year"] == (3, 5)
    assert 0.1 - 1e-15 < ranges["x"][0] <= 0.1
    assert 2.0 <= ranges["x"][1] < 2 + 1e-14
    feed.run("DELETE FROM plane WHERE id = 3", "INSERT INTO plane (id, year) VALUES (4, 7)")
    feed.poll()
    operation, ranges = collapsed(
        "UPDATE plane SET year = year + 10, odd = 'z' || id, x = NULL, name = NULL",
        "UPDATE plane SET year = 1 WHERE id = 1",
    )
    assert (operation, ranges) == ("U", {"year": (1, 17)})
    assert collapsed("UPDATE plane SET year = 2, odd = 'y'", "DELETE FROM plane") == (
        "U", {"year": (1, 17), "x": (None, None), "name": (None, None), "odd": ("y", "z4")},
    )  # fmt: skip
    numbers = "WITH n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000)"
    assert collapsed(f"{numbers} INSERT INTO plane (year, x) SELECT i, 9e999 FROM n") == ("I", None)
    feed.run("DELETE FROM plane", f"{numbers} INSERT INTO other SELECT i FROM n")
    found = {c.relation.name: (c.operation, c.keys, c.ranges) for c in feed.poll().changes}
    assert found == {"plane": ("D", None, None), "other": ("I", None, None)}
    feed.run(some, *CHANGELOG.invalidate(Relation("main", "plane")))
    (change,) = feed.poll().changes
    assert (change.operation, change.keys, change.ranges) == ("T", None, None)


def test_a_change_is_seen_by_the_positions_behind_it(feed: Feed, tmp_path: Path) -> None:
    """Positions are compared by database and entry, and travel as short tokens."""
    feed.run("CREATE TABLE plane (id INTEGER PRIMARY KEY)")
    feed.watch("plane")
    first = feed.position
    feed.run("INSERT INTO plane VALUES (1)")
    poll = feed.poll()
    second = feed.position
    assert first is not None
    assert second is not None
    (change,) = poll.changes
    assert second.sees(change)
    assert not first.sees(change)
    assert second.includes(first)
    assert second.includes(second)
    assert not first.includes(second)
    token = str(second)
    assert CHANGELOG.parse(token) == second
    assert len(token) < 60
    assert re.fullmatch(r"[!#-+\--:<-\[\]-~]+", token), "fit for a cookie"
    with feed_of(URL.create("sqlite", database=str(tmp_path / "copy"))) as other:
        assert other.position is None
        other.run("CREATE TABLE plane (id INTEGER PRIMARY KEY)")
        other.watch("plane")
        assert other.position is not None
        assert not other.position.includes(first)
        assert not other.position.sees(change)
    for wrong in ("", "main", "main.1.2", "main.ab-1.x.3", token + "~", "7:8:9", "\N{SNOWMAN}"):
        with pytest.raises(ValueError, match="no position"):
            CHANGELOG.parse(wrong)


RESTORED = ("backup", "backup, grown", "replace", "replace, grown")


@pytest.mark.parametrize(
    ("mode", "way"),
    # With WAL, a file that is replaced under open connections is read with the old log after it:
    # that is no database any more.
    [(m, w) for m in ("DELETE", "WAL") for w in RESTORED] + [("DELETE", "replace, kept open")],
)
def test_a_restored_file_is_a_gap(feed: Feed, tmp_path: Path, mode: str, way: str) -> None:
    """A database that went back to what it was is noticed, also when it has grown since."""
    feed.run(f"PRAGMA journal_mode = {mode}", "CREATE TABLE plane (id INTEGER PRIMARY KEY)")
    feed.watch("plane")
    feed.run("INSERT INTO plane VALUES (1)", f"VACUUM INTO '{tmp_path}/backup.sqlite'")
    feed.run("INSERT INTO plane VALUES (2), (3)")
    assert len(feed.logged()) == 3
    if "replace" in way:
        if "kept" not in way:
            feed.engine.dispose()
        (tmp_path / "backup.sqlite").replace(str(feed.engine.url.database))
    else:
        source = sqlite3.connect(tmp_path / "backup.sqlite")
        target = sqlite3.connect(str(feed.engine.url.database))
        source.backup(target)
        source.close()
        target.close()
    if "grown" in way:
        feed.run(*(f"INSERT INTO plane VALUES ({i})" for i in range(12, 16)))
    poll = feed.poll()
    assert poll.gap is not None
    assert ("another file" if "replace" in way else "restored") in poll.gap
    assert not poll.changes
    if "kept" in way:
        assert "restored" in str(feed.poll().gap), "of the pool, who polls has no old connection"
    feed.run("INSERT INTO plane VALUES (99)")
    assert feed.logged() == [("I", (99,))]


def test_a_file_that_is_gone_has_no_feed(feed: Feed) -> None:
    """An open connection still reads a file that was deleted: nobody else does."""
    with feed.engine.connect() as connection:
        position = CHANGELOG.position(connection)
        Path(str(feed.engine.url.database)).unlink()
        with pytest.raises(FeedUnavailable, match="gone"):
            CHANGELOG.poll(connection, position, frozenset())


def test_trimming_leaves_what_readers_need(feed: Feed) -> None:
    """Old entries go, and a reader who stands before them finds a gap; one behind them does not."""
    feed.run("CREATE TABLE plane (id INTEGER PRIMARY KEY)")
    feed.watch("plane")
    far = feed.position
    numbers = "WITH n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 12000)"
    feed.run(f"{numbers} INSERT INTO plane SELECT i FROM n")
    feed.poll()
    assert trim(feed, 60) == 0
    feed.run("UPDATE sa_tablecache_changelog SET at = at - 120000")
    assert feed.poll().gap is not None, "the time of the entry is how one knows it"
    feed.run("INSERT INTO plane VALUES (20001)")
    assert trim(feed, 60) == 12001, "all old entries but the last one, where readers stand"
    assert feed.logged() == [("I", (20001,))]
    assert trim(feed, 60) == 0
    feed.position, near = far, feed.position
    assert "trimmed" in str(feed.poll().gap)
    # The clock was set back: what is old stands behind what is young.
    feed.position = near
    feed.run("INSERT INTO plane VALUES (20002)")
    feed.run(
        "UPDATE sa_tablecache_changelog SET at = at - 120000 WHERE seq = "
        "(SELECT max(seq) FROM sa_tablecache_changelog)"
    )
    assert trim(feed, 60) == 0
    assert feed.logged() == [("I", (20002,))]
    feed.run("DELETE FROM sa_tablecache_changelog")
    assert "emptied" in str(feed.poll().gap)


def test_trimming_does_not_wait_for_writers_for_ever(feed: Feed) -> None:
    """Where somebody else writes, it is left for the next time."""
    numbers = "WITH n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10)"
    feed.run(
        f"{numbers} INSERT INTO sa_tablecache_changelog (at) SELECT i FROM n",
        "UPDATE sa_tablecache_changelog SET at = 1",
    )
    url = feed.engine.url.update_query_dict({"timeout": "0"})
    hasty = create_engine(url, isolation_level="AUTOCOMMIT")
    with feed.engine.connect() as writer, hasty.connect() as connection:
        writer.exec_driver_sql("BEGIN IMMEDIATE")
        assert CHANGELOG.trim(connection, 60) == -1
        writer.exec_driver_sql("ROLLBACK")
        assert CHANGELOG.trim(connection, 60) == 10
    hasty.dispose()


def test_names_are_compared_as_sqlite_does(feed: Feed) -> None:
    """Tables and columns may be spelled otherwise by whoever watches them."""
    feed.run("CREATE TABLE Plane (Id BLOB PRIMARY KEY, Year INT, U TEXT UNIQUE)")
    with feed.engine.connect() as connection:
        watch = CHANGELOG.propose(connection, Relation("main", "PLANE"), ["YEAR"], ["ID", "year"])
        for statement in CHANGELOG.watch(watch):
            connection.exec_driver_sql(statement)
        feed.position = CHANGELOG.position(connection)
    assert watch.relation.name == "Plane"
    feed.relations = {watch.relation, Relation("main", "plane")}
    feed.run(
        "INSERT INTO plane VALUES (x'01', 7, 'x')", "REPLACE INTO plane VALUES (x'01', 8, 'y')"
    )
    poll = feed.poll()
    assert not poll.untrusted
    assert {change.keys for change in poll.changes} == {(("01", 7),), (("01", 8),)}
    feed.run(*CHANGELOG.unwatch(Relation("", "pLANE")))
    assert feed.poll().untrusted.keys() == feed.relations


def trim(feed: Feed, keep: float) -> int:
    """Trim the changelog."""
    with feed.engine.connect() as connection:
        return CHANGELOG.trim(connection, keep)


def test_dropping_never_leaves_triggers_without_a_changelog(feed: Feed) -> None:
    """A changelog is not dropped under a table whose writes would fail then."""
    feed.run("CREATE TABLE plane (id INTEGER PRIMARY KEY)", "CREATE TABLE bus (id INT PRIMARY KEY)")
    feed.watch("plane")
    feed.watch("bus")
    with pytest.raises(DatabaseError, match="still watched"):
        feed.run(*CHANGELOG.drop([Relation("main", "plane")]))
    feed.run("INSERT INTO plane VALUES (1)", "INSERT INTO bus VALUES (1)")
    with feed.engine.connect() as connection:
        watched = CHANGELOG.installed(connection).watched
    feed.run(*CHANGELOG.drop(watched), *CHANGELOG.drop(watched))
    with feed.engine.connect() as connection:
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master").scalars().all()
        assert not [name for name in names if "tablecache" in name]
        assert CHANGELOG.installed(connection).version is None
        with pytest.raises(FeedUnavailable, match="install it"):
            CHANGELOG.position(connection)
    feed.run(*CHANGELOG.create(), *CHANGELOG.create())
    assert feed.poll().gap is not None


def test_another_version_is_refused(feed: Feed) -> None:
    """A changelog that is newer than the program is not guessed at."""
    feed.run("UPDATE sa_tablecache_meta SET value = 99 WHERE name = 'version'")
    with feed.engine.connect() as connection, pytest.raises(FeedUnavailable, match="version 99"):
        CHANGELOG.position(connection)


def test_attached_databases_have_their_own_changelog(feed: Feed, tmp_path: Path) -> None:
    """Tables of an attached database are watched there, whoever writes them under which name."""
    event.listen(
        feed.engine,
        "connect",
        lambda driver, _: driver.execute(f"ATTACH '{tmp_path}/other.sqlite' AS \"o.t~'her\""),
    )
    feed.engine.dispose()
    feed.run(
        "CREATE TABLE plane (id INTEGER PRIMARY KEY)",
        'CREATE TABLE "o.t~\'her".plane (id INTEGER PRIMARY KEY, a TEXT UNIQUE)',
    )
    feed.watch("plane")
    feed.watch("plane", schema="o.t~'her")
    before = feed.position
    feed.run("INSERT INTO plane VALUES (1)", "INSERT INTO \"o.t~'her\".plane VALUES (2, 'x')")
    alone = create_engine(f"sqlite:///{tmp_path}/other.sqlite", isolation_level="AUTOCOMMIT")
    with alone.connect() as connection:
        connection.exec_driver_sql("REPLACE INTO plane VALUES (3, 'x')")
    alone.dispose()
    poll = feed.poll()
    assert [(c.relation.schema, c.operation, c.keys) for c in poll.changes] == [
        ("main", "I", ((1,),)),
        ("o.t~'her", "I", ((2,),)),
        ("o.t~'her", "U", ((2,),)),
        ("o.t~'her", "I", ((3,),)),
    ]
    assert before is not None
    assert poll.position.includes(before)
    assert CHANGELOG.parse(str(poll.position)) == poll.position
    assert all(poll.position.sees(c) and not before.sees(c) for c in poll.changes)
    with feed.engine.connect() as connection:
        assert CHANGELOG.installed(connection).watched.keys() == feed.relations
    missing = Relation("third", "plane")
    with feed.engine.connect() as connection:
        poll = CHANGELOG.poll(connection, poll.position, frozenset({missing}))
    assert "no changelog" in poll.untrusted[missing]


async def test_it_is_read_through_asynchronous_drivers(sqlite_url: URL) -> None:
    """Aiosqlite polls as pysqlite does, in a transaction or not, and leaves none behind."""
    engine = create_async_engine(asynchronous(sqlite_url))
    async with engine.begin() as connection:
        await connection.exec_driver_sql("CREATE TABLE plane (id INTEGER PRIMARY KEY)")
        for statement in CHANGELOG.create():
            await connection.exec_driver_sql(statement)
        watch = await connection.run_sync(CHANGELOG.propose, Relation("main", "plane"))
        for statement in CHANGELOG.watch(watch):
            await connection.exec_driver_sql(statement)
    relations = frozenset({watch.relation})
    async with engine.connect() as connection:
        position = await connection.run_sync(CHANGELOG.position)
    async with engine.begin() as connection:
        await connection.exec_driver_sql("INSERT INTO plane VALUES (1)")
    async with engine.connect() as connection:
        poll = await connection.run_sync(CHANGELOG.poll, position, relations)
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        assert not driver.in_transaction
    assert [change.keys for change in poll.changes] == [((1,),)]
    await engine.dispose()


WRITER = """
import random, sqlite3, sys
file, seed = sys.argv[1], int(sys.argv[2])
connection = sqlite3.connect(file, isolation_level=None, timeout=30)
connection.execute("PRAGMA synchronous = OFF")
choose = random.Random(seed)
for step in range(400):
    connection.execute("BEGIN IMMEDIATE")
    for _ in range(choose.randint(1, 3)):
        key = seed * 1000 + choose.randint(1, 100)
        connection.execute("SAVEPOINT a")
        connection.execute("REPLACE INTO plane VALUES (?, ?)", (key, choose.randint(1, 30)))
        connection.execute(choose.choice(["RELEASE a", "ROLLBACK TO a"]))
    connection.execute(choose.choice(["COMMIT", "COMMIT", "ROLLBACK"]))
"""


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_other_processes_write(feed: Feed, mode: str) -> None:
    """What several processes write at once is found once each, and nothing is missing."""
    feed.run(
        f"PRAGMA journal_mode = {mode}",
        "CREATE TABLE plane (id INTEGER PRIMARY KEY, a INT UNIQUE)",
    )
    feed.watch("plane")
    file = str(feed.engine.url.database)
    known: dict[int, int] = {}
    seen: list[Any] = []
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, file, str(seed)]) for seed in range(3)
    ]
    try:
        while True:
            over = all(writer.poll() is not None for writer in writers)
            poll = feed.poll()
            assert poll.gap is None
            seen += [change.at for change in poll.changes]
            keys = {change.keys[0][0] for change in poll.changes if change.keys is not None}
            some = ", ".join(map(str, keys)) or "NULL"
            with feed.engine.connect() as connection:
                found = connection.exec_driver_sql(f"SELECT id, a FROM plane WHERE id IN ({some})")
                rows = {row.id: row.a for row in found}
            known = {k: a for k, a in known.items() if k not in keys} | rows
            if over:
                break
        assert [writer.returncode for writer in writers] == [0, 0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    with feed.engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT id, a FROM plane")
        rows = {row.id: row.a for row in found}
        entries = connection.scalar(text("SELECT count(*) FROM sa_tablecache_changelog"))
    assert known == rows
    assert len(seen) == len(set(seen))
    assert len(seen) > 1000
    assert entries == len(seen) + 2, "those that were made when it was installed"
