"""The changelog of SQLite: what its triggers log, and what a poll says of it.

The random tests compare a table before and after a transaction, so that what a statement did to it
is known without regard to how: each row that is not what it was has to be in the log.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError

from sa_tablecache.feed.contract import Poll, Relation
from sa_tablecache.feed.sqlite import SQLiteChangelog, SQLitePosition

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
