"""The changelog of MariaDB: no committed change is lost, none is told twice, whoever writes it how.

Most tests write through one connection and read through another: ``feed.poll()`` gives what has
become visible since the last one, as ``(table, operation, keys)``. A server of its own is started
where the test kills it or sets what rules for the whole server.
"""

import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sa_tablecache import TableCacheError
from sa_tablecache.exc import FeedUnavailable
from sa_tablecache.feed import contract
from sa_tablecache.feed.contract import Poll, Relation
from sa_tablecache.feed.dialects import changelog_for
from sa_tablecache.feed.mysql import MySQLChangelog
from sa_tablecache.feed.mysql_catalog import error_code
from sa_tablecache.feed.mysql_positions import MySQLPosition
from tests.conftest import asynchronous
from tests.mariadb import Mariadb

LOG = "sa_tablecache_changelog"


def run(connection: Connection, *statements: str) -> None:
    """Execute statements as they are."""
    contract.run(connection, statements)


class Feed:
    """A database with a changelog, and one who reads it."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.engine = create_engine(url, isolation_level="AUTOCOMMIT")
        self.log = MySQLChangelog()
        self.connection = self.engine.connect()
        self.relations = frozenset[Relation]()
        run(self.connection, *self.log.create())
        self.position: Any = self.log.position(self.connection)

    def run(self, *statements: str) -> None:
        """Execute statements, each in a transaction of its own."""
        with self.engine.connect() as connection:
            run(connection, *statements)

    def watch(
        self,
        name: str,
        ranges: Sequence[str] = (),
        key: Sequence[str] = (),
        schema: str = "",
        **options: Any,
    ) -> Relation:
        """Watch a table as the catalog says it is best."""
        relation = Relation(schema, name)
        watch = replace(self.log.propose(self.connection, relation, ranges, key), **options)
        run(self.connection, *self.log.watch(watch))
        self.relations |= {relation}
        self.poll()
        return relation

    def read(self) -> Poll:
        """Return what is new; the reader has seen it then."""
        poll = self.log.poll(self.connection, self.position, self.relations)
        self.position = poll.position
        return poll

    def poll(self) -> list[tuple[str, str, Any]]:
        """Return the changes that are new."""
        poll = self.read()
        assert poll.gap is None, poll.gap
        return [(c.relation.name, c.operation, c.keys) for c in poll.changes]

    def keys(self) -> list[Any]:
        """Return the keys that are new."""
        changes = self.poll()
        assert all(keys is not None for _, _, keys in changes)
        return [key for _, _, keys in changes for key in keys]

    def logged(self) -> int:
        """Return how many entries there are, those of others included."""
        return int(self.connection.exec_driver_sql(f"SELECT COUNT(*) FROM {LOG}").scalar_one())

    @contextmanager
    def writer(self, isolation: str = "REPEATABLE READ") -> Iterator[Connection]:
        """Lend a connection whose transaction is ended by hand."""
        engine = create_engine(self.url, isolation_level=isolation, poolclass=NullPool)
        with engine.connect() as connection:
            yield connection
            connection.rollback()

    def close(self) -> None:
        """Give the connections back."""
        self.connection.close()
        self.engine.dispose()


@pytest.fixture
def feed(mariadb_url: URL) -> Iterator[Feed]:
    """A changelog in an empty database."""
    feed = Feed(mariadb_url)
    yield feed
    feed.close()


@pytest.fixture
def stock(feed: Feed) -> Feed:
    """A changelog and a watched table."""
    feed.run("CREATE TABLE stock (id INT PRIMARY KEY, amount INT)")
    feed.watch("stock")
    return feed


# -- each change exactly once ---------------------------------------------------------------------


def test_a_row_is_told_once(stock: Feed) -> None:
    """Each way to write a row is an entry, and is read once."""
    stock.run("INSERT INTO stock VALUES (1, 1), (2, 2)")
    assert stock.poll() == [("stock", "I", ((1,), (2,)))]
    stock.run("UPDATE stock SET amount = 5 WHERE id = 1", "UPDATE stock SET id = 7 WHERE id = 2")
    assert stock.poll() == [("stock", "U", ((1,), (2,), (7,)))]
    stock.run("REPLACE INTO stock VALUES (1, 9)")
    assert sorted(stock.poll()) == [("stock", "D", ((1,),)), ("stock", "I", ((1,),))]
    stock.run("INSERT INTO stock VALUES (1, 3) ON DUPLICATE KEY UPDATE amount = 4")
    assert stock.poll() == [("stock", "U", ((1,),))]
    stock.run("INSERT IGNORE INTO stock VALUES (1, 3), (8, 8)", "DELETE FROM stock WHERE id > 1")
    assert sorted(stock.poll()) == [("stock", "D", ((7,), (8,))), ("stock", "I", ((8,),))]
    assert stock.poll() == []


def test_transactions_that_end_out_of_order(stock: Feed) -> None:
    """Who got an earlier id and commits later is not overlooked."""
    with stock.writer() as first, stock.writer() as second:
        run(first, "INSERT INTO stock VALUES (1, 1)")
        run(second, "INSERT INTO stock VALUES (2, 2)")
        assert stock.keys() == []
        second.commit()
        assert stock.keys() == [(2,)]
        for _ in range(4):
            assert stock.keys() == []
        run(first, "INSERT INTO stock VALUES (3, 3)")
        first.commit()
        assert stock.keys() == [(1,), (3,)]
        assert stock.position.gaps == ()


def test_gaps_of_rollbacks_are_closed(stock: Feed) -> None:
    """Ids of what was rolled back do not stay gaps, whatever long transactions there are."""
    with stock.writer() as long, stock.writer() as writer:
        run(long, "INSERT INTO stock VALUES (1, 1)")
        for number in range(10, 20):
            run(writer, f"INSERT INTO stock VALUES ({number}, 0)", "SAVEPOINT here")
            run(writer, f"INSERT INTO stock VALUES ({number + 100}, 0)", "ROLLBACK TO here")
            if number % 2:
                writer.rollback()
            else:
                writer.commit()
        expected = [(n,) for n in range(10, 20, 2)]
        assert stock.keys() == expected
        assert len(stock.position.gaps) > 3
        assert stock.keys() == []
        assert stock.keys() == []
        (gap,) = stock.position.gaps  # the long transaction
        assert gap[0] == gap[1]
        long.commit()
        assert stock.keys() == [(1,)]
    assert stock.position.gaps == ()


def test_an_id_is_taken_by_one_reader_for_all(stock: Feed) -> None:
    """Another reader finds the entry of the one who took an id, and it says nothing to it."""
    other = stock.position
    with stock.writer() as writer:
        run(writer, "INSERT INTO stock VALUES (1, 1)")
        writer.rollback()
    stock.run("INSERT INTO stock VALUES (2, 2)")
    assert [stock.keys() for _ in range(3)] == [[(2,)], [], []]
    assert stock.position.gaps == ()
    poll = stock.log.poll(stock.connection, other, stock.relations)
    assert [change.keys for change in poll.changes] == [((2,),)]
    assert poll.position == stock.position


def next_id(feed: Feed) -> int:
    """Return the id that the next entry gets."""
    statement = text(
        "SELECT auto_increment FROM information_schema.tables "
        f"WHERE table_schema = DATABASE() AND table_name = '{LOG}'"
    )
    return int(feed.connection.execute(statement).scalar_one())


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("INSERT INTO stock VALUES (5, 5)", {("stock", "I", ((5,),))}),
        ("INSERT IGNORE INTO stock VALUES (5, 5)", {("stock", "I", ((5,),))}),
        ("REPLACE INTO stock VALUES (5, 5)", {("stock", "I", ((5,),))}),
        ("UPDATE stock SET amount = 7", {("stock", "U", ((1,),))}),
        ("UPDATE IGNORE stock SET amount = 7", {("stock", "U", ((1,),))}),
        ("DELETE FROM stock", {("stock", "D", ((1,),)), ("parts", "D", ((11,), (12,)))}),
        ("DELETE IGNORE FROM stock", {("stock", "D", ((1,),)), ("parts", "D", ((11,), (12,)))}),
        ("UPDATE stock SET id = 2", {("stock", "U", ((1,), (2,))), ("parts", "U", ((11,), (12,)))}),
        ("TRUNCATE parts", set()),
    ],
)
def test_a_writer_whose_id_was_taken(stock: Feed, statement: str, expected: set[Any]) -> None:
    """A writer that had got an id when it was taken gets another one, and nobody notices.

    What happens in between is done here by hand: an UPDATE of an id does not move the counter.
    """
    stock.run(
        "CREATE TABLE parts (id INT PRIMARY KEY, stock INT, FOREIGN KEY (stock) "
        "REFERENCES stock (id) ON DELETE CASCADE ON UPDATE CASCADE)",
        "INSERT INTO stock VALUES (1, 1)",
        "INSERT INTO parts VALUES (11, 1), (12, 1)",
    )
    stock.watch("parts")
    for _ in range(3):
        with stock.writer() as writer:
            run(writer, "UPDATE stock SET amount = -1")
            writer.rollback()
    stock.run("UPDATE stock SET amount = -2")
    for _ in range(3):
        stock.poll()
    assert stock.position.gaps == ()
    number = next_id(stock)
    taken = stock.connection.exec_driver_sql(f"SELECT id FROM {LOG} WHERE operation = 'X'").all()
    assert len(taken) == 3
    for place, (before,) in enumerate(taken):
        stock.run(f"UPDATE {LOG} SET id = {number + place} WHERE id = {before}")
    with stock.writer() as writer:
        run(writer, statement)
        assert writer.exec_driver_sql("SHOW WARNINGS").all() == []
        writer.commit()
    changes = stock.read().changes
    assert {(c.relation.name, c.operation, c.keys) for c in changes} == expected
    assert all(min(c.at[1]) >= number + 3 for c in changes)


def test_a_prepared_transaction_is_under_way(stock: Feed) -> None:
    """XA PREPARE keeps its ids, though its connection is gone."""
    with stock.writer() as writer:
        run(writer, "XA START 'sa_feed'", "INSERT INTO stock VALUES (1, 1)", "XA END 'sa_feed'")
        run(writer, "XA PREPARE 'sa_feed'")
        writer.invalidate()
    stock.run("INSERT INTO stock VALUES (2, 2)")
    assert [stock.keys() for _ in range(4)] == [[(2,)], [], [], []]
    assert stock.position.gaps
    stock.run("XA COMMIT 'sa_feed'")
    assert stock.keys() == [(1,)]


def test_many_gaps(stock: Feed) -> None:
    """A transaction that interleaves with a hundred others is read whole, and only once."""
    with stock.writer() as long:
        for number in range(130):
            run(long, f"INSERT INTO stock VALUES ({1000 + number}, 0)")
            stock.run(f"INSERT INTO stock VALUES ({number}, 0)")
        assert stock.keys() == [(n,) for n in range(130)]
        assert len(stock.position.gaps) == 130
        assert stock.log.parse(str(stock.position)) == stock.position
        stock.run("INSERT INTO stock VALUES (999, 0)")
        assert stock.keys() == [(999,)]
        assert stock.log.position(stock.connection) == stock.position
        long.commit()
    assert stock.keys() == [(1000 + n,) for n in range(130)]
    assert stock.position.gaps == ()


def test_a_session_with_its_own_auto_increment_increment(stock: Feed) -> None:
    """Ids that a session leaves out are gaps that close, however many there are."""
    with stock.writer() as writer:
        run(writer, "SET SESSION auto_increment_increment = 700")
        run(writer, "INSERT INTO stock VALUES (1, 1), (2, 2)")
        writer.commit()
    stock.run("INSERT INTO stock VALUES (3, 3)")
    assert stock.keys() == [(1,), (2,), (3,)]
    for _ in range(5):
        assert stock.keys() == []
    assert stock.position.gaps == ()


class Committed:
    """What writers have committed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.keys: list[int] = []

    def add(self, keys: list[int]) -> None:
        with self.lock:
            self.keys += keys


def write(feed: Feed, number: int, until: float, committed: Committed, seed: int) -> None:
    """Write rows with unique keys, in transactions of all kinds, until it is time."""
    chance = random.Random(seed * 100 + number)
    isolation = chance.choice(["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
    count = 0
    with feed.writer(isolation) as connection:
        if chance.random() < 0.2:
            run(connection, "SET SESSION auto_increment_increment = 3")
        while time.monotonic() < until:
            kept: list[int] = []
            xa = f"'sa{seed}_{number}_{count}'" if chance.random() < 0.15 else None
            if xa:
                connection.rollback()
                run(connection, f"XA START {xa}")
            for _ in range(chance.choice([1, 1, 1, 3, 20])):
                keys = [number * 10_000_000 + count + n for n in range(chance.choice([1, 1, 5]))]
                count += len(keys)
                undo = chance.random() < 0.2
                if undo:
                    run(connection, "SAVEPOINT here")
                values = ", ".join(f"({key}, 0)" for key in keys)
                run(connection, f"INSERT INTO stock VALUES {values}")
                if undo:
                    run(connection, "ROLLBACK TO here")
                else:
                    kept += keys
                if chance.random() < 0.05:
                    time.sleep(chance.random() * 0.1)
            fate = chance.random()
            if xa:
                run(connection, f"XA END {xa}", f"XA PREPARE {xa}")
                time.sleep(chance.random() * 0.05)
                run(connection, f"XA {'ROLLBACK' if fate < 0.3 else 'COMMIT'} {xa}")
                connection.invalidate() if fate > 0.95 else None
            elif fate < 0.2:
                connection.rollback()
            elif fate < 0.23:
                connection.invalidate()  # the server rolls it back
                connection.rollback()
                kept = []
                continue
            else:
                connection.commit()
            if fate >= (0.3 if xa else 0.2):
                committed.add(kept)
            connection.rollback()


def exactly_once(feed: Feed, *, seconds: float, writers: int, seed: int) -> dict[str, int]:
    """Have many write at once while two read, and a third trims; return figures."""
    committed, until = Committed(), time.monotonic() + seconds
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            write(feed, number, until, committed, seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(1, writers + 1)]
    readers = [feed.position, feed.position]
    found: list[Counter[int]] = [Counter(), Counter()]
    figures: Counter[str] = Counter()
    for thread in threads:
        thread.start()
    quiet = 0
    while quiet < 4:
        alive = any(thread.is_alive() for thread in threads)
        quiet = 0 if alive else quiet + 1
        for place, position in enumerate(readers):
            poll = feed.log.poll(feed.connection, position, feed.relations)
            assert poll.gap is None
            assert poll.position.includes(position)
            for change in poll.changes:
                assert not position.sees(change)
                assert poll.position.sees(change)
                found[place].update(key for (key,) in change.keys or ())
            readers[place] = poll.position
            assert isinstance(poll.position, MySQLPosition)
            figures["most gaps"] = max(figures["most gaps"], len(poll.position.gaps))
            figures["polls"] += 1
        if figures["polls"] % 20 == 0:
            # What the slower of both has not seen is not deleted: entries are kept a while.
            figures["trimmed"] += max(feed.log.trim(feed.connection, 5), 0)
            token = feed.log.position(feed.connection)
            assert feed.log.parse(str(token)) == token
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert readers[0] == readers[1] == feed.log.position(feed.connection)
    for counter in found:
        assert counter.total() == len(counter), "a change was told twice"
        assert counter.keys() == set(committed.keys)
    assert all(position.gaps == () for position in readers if isinstance(position, MySQLPosition))
    return {
        **figures,
        "committed": len(committed.keys),
        "last id": readers[0].last,
        "gaps left": len(readers[0].gaps),
    }


def test_exactly_once_under_load(stock: Feed) -> None:
    """Savepoints, rollbacks, killed connections, XA, long transactions: nothing lost or double."""
    figures = exactly_once(stock, seconds=4, writers=6, seed=1)
    assert figures["committed"] > 100
    assert figures["most gaps"] > 1


# -- what a key looks like ------------------------------------------------------------------------


def test_keys_do_not_depend_on_the_session(feed: Feed) -> None:
    """Text, bytes, decimals and times are logged alike, whatever the session has set."""
    feed.run(
        "CREATE TABLE odd (t VARCHAR(20) CHARACTER SET latin1, b VARBINARY(8), d DECIMAL(30, 10), "
        "n BIGINT UNSIGNED, z INT(8) ZEROFILL, s TIMESTAMP(3) NULL, w DATETIME(2), c DATE, "
        "e ENUM('x', 'ü'), u UUID, bit BIT(12), f DOUBLE, "
        "PRIMARY KEY (t, b, d, n, z, w, c, e, u, bit))"
    )
    watch = feed.log.propose(feed.connection, Relation("", "odd"))
    feed.watch("odd", key=(*watch.key, "s", "f"))
    insert = (
        "INSERT INTO odd VALUES (CONVERT(X'c3a927225c' USING utf8mb4), X'00ff27', "
        "12345678901234567890.0123456789, 18446744073709551615, 12, FROM_UNIXTIME(1600000000.125), "
        "CONVERT('2020-10-25 02:30:00.50' USING utf8mb4), CONVERT('2020-02-29' USING utf8mb4), 2, "
        "CONVERT('123e4567-e89b-12d3-a456-426655440000' USING utf8mb4), X'0801', 0.1)"
    )
    expected = (
        "é'\"\\",
        "00ff27",
        "12345678901234567890.0123456789",
        18446744073709551615,
        12,
        "2020-10-25T02:30:00.500000",
        "2020-02-29",
        "ü",
        "123e4567-e89b-12d3-a456-426655440000",
        2049,
        "2020-09-13T12:26:40.125000+00:00",
        0.1,
    )
    settings = (
        "SET sql_mode = ''",
        "SET sql_mode = 'ANSI_QUOTES,NO_BACKSLASH_ESCAPES,PIPES_AS_CONCAT,PAD_CHAR_TO_FULL_LENGTH'",
        "SET NAMES latin1",
        "SET NAMES utf8mb4 COLLATE utf8mb4_turkish_ci",
        "SET time_zone = '+05:30'",
        "SET lc_time_names = 'de_DE', group_concat_max_len = 4",
        "SET div_precision_increment = 0",
        "SET foreign_key_checks = 0, unique_checks = 0",
    )
    for setting in settings:
        with feed.writer() as writer:
            run(writer, setting, insert)
            writer.commit()
            assert feed.poll() == [("odd", "I", (expected,))], setting
            run(writer, "DELETE FROM odd")
            writer.commit()
            assert feed.poll() == [("odd", "D", (expected,))], setting


def test_a_table_whose_keys_have_no_exact_form(feed: Feed) -> None:
    """Without a primary key, or with one of floats, an entry says: any row."""
    feed.run("CREATE TABLE heap (v INT)", "CREATE TABLE floats (f FLOAT PRIMARY KEY)")
    feed.watch("heap")
    feed.watch("floats")
    feed.run("INSERT INTO heap VALUES (1)", "INSERT INTO floats VALUES (1.1)")
    assert sorted(feed.poll()) == [("floats", "I", None), ("heap", "I", None)]
    feed.run("UPDATE heap SET v = 2", "DELETE FROM floats")
    assert sorted(feed.poll()) == [("floats", "D", None), ("heap", "U", None)]


def test_hostile_names(feed: Feed) -> None:
    """Quotes, backticks, percent signs, other alphabets and 64 characters are names as any."""
    strange = "a`b\"c'd\\e%f:g$é#-/ ы"
    long = ("x" * 58 + "ü" * 6, "x" * 58 + "ü" * 5 + "y")
    for name in (strange, *long):
        quoted = "`" + name.replace("`", "``") + "`"
        column = "`k``'\"\\%é`"
        feed.run(
            f"CREATE TABLE {quoted} ({column} INT PRIMARY KEY, `r'\"%é` INT)",
        )
        relation = feed.watch(name, ranges=["r'\"%é"], limit=3)
        found = feed.log.resolve(feed.connection, [(None, name)])
        assert found == {(None, name): relation}
        feed.run(f"INSERT INTO {quoted} VALUES (1, 1)", f"UPDATE {quoted} SET {column} = 2")
        assert feed.poll() == [(name, "I", ((1,),)), (name, "U", ((1,), (2,)))]
        feed.run(f"INSERT INTO {quoted} VALUES (3, 3), (4, 4), (5, 5), (6, 6)")
        (change,) = feed.read().changes
        assert (change.keys, change.ranges) == (None, {"r'\"%é": (3, 6)})
        assert feed.log.installed(feed.connection).outdated == {}
        feed.run(f"TRUNCATE {quoted}")
    assert not feed.read().untrusted


def test_a_table_of_another_database(feed: Feed, mariadb: Mariadb) -> None:
    """A trigger in another database logs into the changelog of this one."""
    schema = f"{feed.url.database}-`x`"
    quoted = f"`{feed.url.database}-``x```"
    feed.run(f"CREATE DATABASE {quoted}")
    try:
        feed.run(f"CREATE TABLE {quoted}.t (id INT PRIMARY KEY)")
        feed.run("CREATE TABLE t (id INT PRIMARY KEY)")
        feed.watch("t", schema=schema)
        feed.run(f"INSERT INTO {quoted}.t VALUES (1)", "INSERT INTO t VALUES (2)")
        poll = feed.read()
        assert [(c.relation, c.keys) for c in poll.changes] == [(Relation(schema, "t"), ((1,),))]
        assert not poll.untrusted
        feed.run(f"TRUNCATE {quoted}.t")
        assert feed.read().fingerprints != poll.fingerprints
        assert feed.log.resolve(feed.connection, [(schema, "t"), (None, "t")]) == {
            (schema, "t"): Relation(schema, "t"),
            (None, "t"): Relation("", "t"),
        }
        watched = feed.log.installed(feed.connection).watched
        assert set(watched) == {Relation(schema, "t")}
        with mariadb.database() as third:
            second = Feed(third)
            with pytest.raises(DBAPIError, match="already exists"):
                second.watch("t", schema=schema)
            second.close()
        run(feed.connection, *feed.log.drop(watched))
        feed.run(f"INSERT INTO {quoted}.t VALUES (3)")
    finally:
        feed.run(f"DROP DATABASE {quoted}")


# -- big statements -------------------------------------------------------------------------------


def test_a_big_statement_is_told_by_its_ranges(feed: Feed) -> None:
    """More rows than the limit are one change, with the smallest and largest values."""
    feed.run(
        "CREATE TABLE t (id INT PRIMARY KEY, at DATETIME, price DECIMAL(10, 2), note VARCHAR(9), "
        "big BIGINT UNSIGNED, name VARCHAR(9) COLLATE utf8mb4_general_ci)"
    )
    feed.watch("t", ranges=["at", "price", "note", "big", "name"], limit=5)
    feed.run(
        "INSERT INTO t SELECT seq, '2020-01-01' + INTERVAL seq DAY, seq * 9.99, "
        "CASE WHEN seq < 5 THEN 'b' ELSE 'ä' END, NULL, 'x' FROM seq_1_to_12"
    )
    (change,) = feed.read().changes
    assert change.operation == "I"
    assert change.keys is None
    assert change.ranges == {
        "at": ("2020-01-02T00:00:00.000000", "2020-01-13T00:00:00.000000"),
        "price": ("9.99", "119.88"),
        "note": ("b", "ä"),
        "big": (None, None),
    }
    feed.run("UPDATE t SET big = 18446744073709551615, price = -1 WHERE id <= 6")
    (change,) = feed.read().changes
    assert change.ranges is not None
    assert "big" not in change.ranges  # some were NULL
    assert change.ranges["price"] == ("-1.00", "59.94")
    feed.run("DELETE FROM t WHERE id > 8")
    (change,) = feed.read().changes
    assert change.keys == ((9,), (10,), (11,), (12,))


def test_many_small_statements_keep_their_keys(stock: Feed) -> None:
    """The limit is for what one connection writes; a poll of many writers has all keys."""
    for number in range(4):
        with stock.writer() as writer:
            values = ", ".join(f"({number * 1000 + n}, 0)" for n in range(600))
            run(writer, f"INSERT INTO stock VALUES {values}")
            writer.commit()
    assert len(stock.keys()) == 2400


# -- cascades -------------------------------------------------------------------------------------


def test_cascades(feed: Feed) -> None:
    """What foreign keys delete and change is logged, some levels deep, whoever is watched."""
    feed.run(
        "CREATE TABLE a (id INT PRIMARY KEY, n INT)",
        "CREATE TABLE b (x INT, y INT, a INT, PRIMARY KEY (x, y), "
        "FOREIGN KEY (a) REFERENCES a (id) ON DELETE CASCADE)",
        "CREATE TABLE c (id INT PRIMARY KEY, x INT, y INT, "
        "FOREIGN KEY (x, y) REFERENCES b (x, y) ON DELETE SET NULL ON UPDATE CASCADE)",
        "INSERT INTO a VALUES (1, 0), (2, 0), (3, 0)",
        "INSERT INTO b VALUES (1, 1, 1), (1, 2, 1), (2, 1, 2)",
        "INSERT INTO c VALUES (111, 1, 1), (112, 1, 2), (121, 2, 1), (122, NULL, 1)",
    )
    feed.watch("c")
    feed.run("DELETE FROM a WHERE id = 1")
    assert feed.poll() == [("c", "U", ((111,), (112,)))]
    feed.run("DELETE FROM a WHERE id = 3", "UPDATE a SET n = 1", "UPDATE b SET x = x")
    assert feed.poll() == []
    feed.run("UPDATE b SET y = 5 WHERE x = 2", "UPDATE b SET y = 6, a = 3 WHERE x = 99")
    assert feed.poll() == [("c", "U", ((121,),))]
    feed.watch("b")
    feed.run("DELETE a FROM a JOIN b ON b.a = a.id JOIN c ON c.x = b.x")
    assert sorted(feed.poll()) == [("b", "D", ((2, 5),)), ("c", "U", ((121,),))]
    run(feed.connection, *feed.log.unwatch(Relation("", "c")))
    feed.run("INSERT INTO a VALUES (3, 0)")
    feed.run("INSERT INTO b VALUES (3, 3, 3)", "INSERT INTO c VALUES (333, 3, 3)")
    feed.run("DELETE FROM a")
    assert sorted(feed.poll()) == [("b", "D", ((3, 3),)), ("b", "I", ((3, 3),))]


def test_cascades_of_new_values(feed: Feed) -> None:
    """Rows that follow a new value are named, unless they have another key or none to refer to."""
    feed.run(
        "CREATE TABLE a (id VARCHAR(9) COLLATE utf8mb4_general_ci PRIMARY KEY, n INT)",
        "CREATE TABLE b (id INT PRIMARY KEY, a VARCHAR(9) COLLATE utf8mb4_general_ci, "
        "FOREIGN KEY (a) REFERENCES a (id) ON UPDATE CASCADE)",
        "CREATE TABLE c (id INT, a VARCHAR(9) COLLATE utf8mb4_general_ci, PRIMARY KEY (id, a), "
        "FOREIGN KEY (a) REFERENCES a (id) ON UPDATE CASCADE)",
        "CREATE TABLE d (id INT PRIMARY KEY, a VARCHAR(9) COLLATE utf8mb4_general_ci, "
        "FOREIGN KEY (a) REFERENCES a (id) ON UPDATE SET NULL)",
        "INSERT INTO a VALUES ('x', 0), ('y', 0)",
        *(f"INSERT INTO {name} VALUES (1, 'x'), (2, 'x'), (3, 'y')" for name in "bcd"),
    )
    for name in "bcd":
        feed.watch(name)
    feed.run("UPDATE a SET n = 5", "UPDATE a SET id = 'x' WHERE id = 'x'")
    assert feed.poll() == []
    feed.run("UPDATE a SET id = 'X' WHERE id = 'x'")
    expected = [("b", "U", ((1,), (2,))), ("c", "U", None), ("d", "U", None)]
    assert sorted(feed.poll()) == expected
    feed.run("UPDATE a SET id = 'z' WHERE id = 'x'")
    assert sorted(feed.poll()) == expected


def test_a_table_that_refers_to_itself(feed: Feed) -> None:
    """Children and grandchildren are named; where there are more, any row may be gone."""
    feed.run(
        "CREATE TABLE tree (id INT PRIMARY KEY, up INT, "
        "FOREIGN KEY (up) REFERENCES tree (id) ON DELETE CASCADE)",
        "INSERT INTO tree VALUES (1, NULL), (2, 1), (3, 2), (4, 3), (5, 4), (6, NULL), (7, 6)",
        "INSERT INTO tree VALUES (8, NULL), (9, 8), (10, 9)",
    )
    feed.watch("tree")
    feed.run("DELETE FROM tree WHERE id = 7")
    assert feed.poll() == [("tree", "D", ((7,),))]
    feed.run("DELETE FROM tree WHERE id = 8")
    assert feed.poll() == [("tree", "D", ((9,), (10,), (8,)))]
    feed.run(
        "DELETE FROM tree WHERE id IN (SELECT id FROM (SELECT id FROM tree) AS t WHERE id < 2)"
    )
    assert ("tree", "U", None) in feed.poll()


def test_a_cascade_with_more_rows_than_the_limit(feed: Feed) -> None:
    """No more keys are logged than the limit allows, and none is lost by the limit of a session."""
    feed.run(
        "CREATE TABLE a (id INT PRIMARY KEY)",
        "CREATE TABLE b (id INT PRIMARY KEY, a INT, "
        "FOREIGN KEY (a) REFERENCES a (id) ON DELETE CASCADE)",
        "INSERT INTO a VALUES (1), (2)",
        "INSERT INTO b SELECT seq, 1 FROM seq_1_to_20",
        "INSERT INTO b SELECT seq, 2 FROM seq_21_to_41",
    )
    feed.watch("b", limit=20)
    feed.run("DELETE FROM a WHERE id = 2")
    assert feed.poll() == [("b", "D", None)]
    with feed.writer() as writer:
        run(writer, "SET SESSION group_concat_max_len = 30", "DELETE FROM a")
        writer.commit()
    assert feed.poll() == [("b", "D", None)]


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_a_child_that_came_while_its_parent_was_waited_for(feed: Feed, isolation: str) -> None:
    """A cascade deletes what its statement or transaction could not see yet, and that is logged."""
    feed.run(
        "CREATE TABLE a (id INT PRIMARY KEY)",
        "CREATE TABLE b (id INT PRIMARY KEY, a INT, "
        "FOREIGN KEY (a) REFERENCES a (id) ON DELETE CASCADE)",
        "INSERT INTO a VALUES (1), (2), (3)",
        "INSERT INTO b VALUES (11, 1)",
    )
    feed.watch("b")
    with feed.writer() as writer, feed.writer(isolation) as deleter:
        assert deleter.exec_driver_sql("SELECT COUNT(*) FROM b").scalar() == 1
        run(writer, "INSERT INTO b VALUES (21, 2)")
        thread = threading.Thread(target=lambda: run(deleter, "DELETE FROM a"))
        thread.start()
        waiting = text(
            "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT' "
            "AND trx_mysql_thread_id = :id"
        )
        number: Any = deleter.connection.driver_connection
        until = time.monotonic() + 20
        while not feed.connection.execute(waiting, {"id": number.thread_id()}).scalar():
            assert time.monotonic() < until
            time.sleep(0.11)  # the server refreshes that table when nobody asks for 0.1 s
        writer.commit()
        thread.join()
        deleter.commit()
    assert sorted(feed.keys()) == [(11,), (21,), (21,)]  # deleted, inserted and deleted


def random_schema(chance: random.Random) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Return tables with foreign keys among them, and the columns of these keys."""
    names = [f"t{n}" for n in range(chance.randint(3, 5))]
    statements = [f"CREATE TABLE {name} (id INT PRIMARY KEY)" for name in names]
    keys: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for number in range(chance.randint(3, 7)):
        child, parent = chance.choice(names), chance.choice(names)
        action = chance.choice(["CASCADE", "CASCADE", "SET NULL"])
        moving = chance.choice(["", "ON UPDATE CASCADE", "ON UPDATE SET NULL"])
        column = f"f{number}"
        statements += [
            f"ALTER TABLE {child} ADD {column} INT",
            (
                f"ALTER TABLE {child} ADD FOREIGN KEY ({column}) REFERENCES {parent} (id) "
                f"ON DELETE {action} {moving}"
            ),
        ]
        keys[child].append((column, parent))
    return statements, keys


@pytest.mark.parametrize("seed", range(3))
def test_random_cascades(feed: Feed, seed: int) -> None:
    """Whatever foreign keys there are, each row that a statement changes is logged."""
    chance = random.Random(seed)
    statements, keys = random_schema(chance)
    feed.run(*statements)
    for name in keys:
        feed.watch(name)

    def rows() -> dict[tuple[str, int], Any]:
        return {
            (name, row[0]): tuple(row)
            for name in keys
            for row in feed.connection.exec_driver_sql(f"SELECT * FROM {name}")
        }

    written = 0
    for step in range(50):
        name = chance.choice(list(keys))
        before = rows()
        present = [key for table, key in before if table == name]
        if step < 25 or not present:
            columns = {
                column: chance.choice([None, *(i for t, i in before if t == parent)])
                for column, parent in keys[name]
            }
            values = ["NULL" if v is None else str(v) for v in columns.values()]
            listed = ", ".join(["id", *columns])
            statement = f"INSERT INTO {name} ({listed}) VALUES ({', '.join([str(step), *values])})"
        elif chance.random() < 0.3:
            statement = f"UPDATE {name} SET id = {1000 + step} WHERE id = {chance.choice(present)}"
        else:
            picked = ", ".join(map(str, chance.sample(present, min(2, len(present)))))
            statement = f"DELETE FROM {name} WHERE id IN ({picked})"
        try:
            feed.run(statement)
        except DBAPIError as error:
            if error_code(error) not in (1062, 1451, 1452, 1761):  # refused by a foreign key
                raise
        after = rows()
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        written += len(changed)
        any_row, told = set(), set()
        for table, _, found in feed.poll():
            if found is None:
                any_row.add(table)
            else:
                told |= {(table, key) for (key,) in found}
        missing = {key for key in changed if key not in told and key[0] not in any_row}
        assert not missing, (statement, missing)
    assert written > 30


# -- what triggers cannot see ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "TRUNCATE stock",
        "ALTER TABLE stock MODIFY amount BIGINT",
        "ALTER TABLE stock ADD more INT DEFAULT 5",
        "ALTER TABLE stock DROP amount",
        "RENAME TABLE stock TO old, other TO stock, old TO other",
        "ALTER TABLE stock EXCHANGE PARTITION p WITH TABLE other",
        "ALTER TABLE stock TRUNCATE PARTITION p",
        "ALTER TABLE stock DROP PARTITION p",
    ],
)
def test_ddl_moves_the_fingerprint(feed: Feed, statement: str) -> None:
    """What changes rows without a trigger is noticed by the next poll."""
    parts = (
        " PARTITION BY RANGE (id) "
        "(PARTITION p VALUES LESS THAN (10), PARTITION q VALUES LESS THAN (99))"
    )
    feed.run(
        "CREATE TABLE stock (id INT PRIMARY KEY, amount INT)"
        + (parts if "PARTITION" in statement else ""),
        "CREATE TABLE other (id INT PRIMARY KEY, amount INT)",
    )
    relation = feed.watch("stock")
    before = feed.read().fingerprints[relation]
    feed.run(statement)
    assert feed.read().fingerprints[relation] != before


def test_truncate_twice_in_one_second(stock: Feed) -> None:
    """TRUNCATE is noticed by the number of the table, which no clock blurs; else nothing moves."""
    relation = Relation("", "stock")
    time.sleep(max(0, 2.2))  # the fingerprint of a new table moves for two seconds
    prints = {stock.read().fingerprints[relation] for _ in range(3)}
    assert len(prints) == 1
    for _ in range(3):
        stock.run("TRUNCATE stock")
        prints.add(stock.read().fingerprints[relation])
    assert len(prints) == 4
    stock.run("INSERT INTO stock VALUES (1, 1)")
    assert stock.read().fingerprints[relation] in prints


def test_a_trigger_that_is_dropped(stock: Feed) -> None:
    """A missing trigger is reported, also of a table that cascades; one that is back is another."""
    relation = Relation("", "stock")
    stock.run(
        "CREATE TABLE up (id INT PRIMARY KEY)",
        "ALTER TABLE stock ADD up INT",
        "ALTER TABLE stock ADD FOREIGN KEY (up) REFERENCES up (id) ON DELETE CASCADE",
    )
    poll = stock.read()
    assert "foreign keys" in poll.untrusted[relation]
    outdated = stock.log.installed(stock.connection).outdated
    assert "foreign keys" in outdated[relation]
    stock.watch("stock")
    poll = stock.read()
    assert poll.untrusted == {}
    assert stock.log.installed(stock.connection).outdated == {}
    triggers = stock.connection.exec_driver_sql(
        "SELECT trigger_name, action_statement, action_timing, event_manipulation, "
        "event_object_table FROM information_schema.triggers "
        "WHERE event_object_schema = DATABASE()"
    ).all()
    assert len(triggers) == 4
    for name, body, timing, operation, table in triggers:
        before = stock.read().fingerprints[relation]
        stock.run(f"DROP TRIGGER {name}")
        assert name in stock.read().untrusted[relation]
        assert name in stock.log.installed(stock.connection).outdated[relation]
        create = f"CREATE TRIGGER {name} {timing} {operation} ON {table} FOR EACH ROW\n"
        stock.run(create + "SET @nothing = 1")
        assert name in stock.read().untrusted[relation]
        stock.run(f"DROP TRIGGER {name}", create + body)
        poll = stock.read()
        assert poll.untrusted == {}
        assert poll.fingerprints[relation] != before


def test_other_triggers_stay(feed: Feed) -> None:
    """Triggers of others, before and after ours, run as ever, and are seen by ours."""
    feed.run(
        "CREATE TABLE t (id INT PRIMARY KEY, n INT)",
        "CREATE TRIGGER first BEFORE INSERT ON t FOR EACH ROW SET NEW.id = NEW.id + 100",
        "CREATE TABLE audit (id INT)",
        "CREATE TRIGGER last AFTER INSERT ON t FOR EACH ROW INSERT INTO audit VALUES (NEW.id)",
    )
    relation = feed.watch("t")
    feed.run("CREATE TRIGGER more AFTER INSERT ON t FOR EACH ROW PRECEDES last SET @more = NEW.id")
    feed.run("INSERT INTO t VALUES (1, 1)")
    assert feed.poll() == [("t", "I", ((101,),))]
    run(feed.connection, *feed.log.unwatch(relation))
    run(feed.connection, *feed.log.unwatch(relation))
    names = feed.connection.exec_driver_sql(
        "SELECT trigger_name FROM information_schema.triggers "
        "WHERE event_object_schema = DATABASE()"
    ).scalars()
    assert set(names) == {"first", "last", "more"}
    assert "not watched" in feed.read().untrusted[relation]


def test_what_cannot_be_watched(feed: Feed) -> None:
    """Other engines, views and missing tables are refused, and are not trusted."""
    feed.run(
        "CREATE TABLE my (id INT PRIMARY KEY) ENGINE = MyISAM", "CREATE VIEW v AS SELECT 1 AS n"
    )
    feed.run("CREATE TABLE ok (id INT PRIMARY KEY)")
    for name, why in (("my", "MyISAM"), ("v", "view"), ("nope", "no such table")):
        with pytest.raises(TableCacheError, match=why):
            feed.log.propose(feed.connection, Relation("", name))
    with pytest.raises(TableCacheError, match="no column x"):
        feed.log.propose(feed.connection, Relation("", "ok"), ["x"])
    feed.watch("ok")
    feed.relations |= {Relation("", "my"), Relation("", "v"), Relation("", "nope")}
    untrusted = feed.read().untrusted
    assert {relation.name for relation in untrusted} == {"my", "v", "nope"}
    feed.run("ALTER TABLE ok ENGINE = Aria")
    assert "Aria" in feed.read().untrusted[Relation("", "ok")]
    assert "Aria" in feed.log.installed(feed.connection).outdated[Relation("", "ok")]


# -- installing -----------------------------------------------------------------------------------


def test_installing(feed: Feed) -> None:
    """What was proposed is what is installed; doing it again is nothing that readers notice."""
    feed.run("CREATE TABLE a (id INT PRIMARY KEY, at DATETIME)")
    feed.run(
        "CREATE TABLE b (id INT PRIMARY KEY, a INT, FOREIGN KEY (a) REFERENCES a (id) "
        "ON DELETE CASCADE)"
    )
    for name in "ab":
        feed.watch(name)
    before = str(feed.position)
    run(feed.connection, *feed.log.create())
    installation = feed.log.installed(feed.connection)
    assert installation.version == 1
    assert installation.outdated == {}
    assert installation.watched == {
        relation: feed.log.propose(feed.connection, relation) for relation in feed.relations
    }
    feed.run("ALTER TABLE b ADD note TEXT")
    installation = feed.log.installed(feed.connection)
    assert installation.outdated == {}
    relation = Relation("", "b")
    assert installation.watched[relation] == feed.log.propose(feed.connection, relation)
    assert feed.poll() == []
    assert feed.position.includes(feed.log.parse(before))
    with pytest.raises(OperationalError, match="tables are still watched"):
        run(feed.connection, *feed.log.drop())
    feed.run("INSERT INTO a VALUES (1, NULL)")
    assert feed.poll() == [("a", "I", ((1,),))]
    run(feed.connection, *feed.log.invalidate(Relation("", "a")))
    assert feed.poll() == [("a", "T", None)]
    run(feed.connection, *feed.log.drop(feed.relations))
    feed.run("DELETE FROM a")
    assert feed.log.installed(feed.connection).version is None
    with pytest.raises(FeedUnavailable, match="no change feed is installed"):
        feed.read()
    with pytest.raises(FeedUnavailable, match="no change feed is installed"):
        feed.log.position(feed.connection)
    run(feed.connection, *feed.log.create())
    assert "installed anew" in str(feed.read().gap)
    feed.run("UPDATE sa_tablecache_meta SET version = 99")
    with pytest.raises(FeedUnavailable, match="version 99"):
        feed.read()


def test_watching_a_table_that_is_written(stock: Feed) -> None:
    """Watching again ends with a change of any row, for what was written meanwhile."""
    relation = Relation("", "stock")
    watch = stock.log.propose(stock.connection, relation, ["amount"])
    statements = stock.log.watch(watch)
    place = next(n for n, s in enumerate(statements) if s.startswith("CREATE TRIGGER"))
    run(stock.connection, *statements[:place])
    stock.run("INSERT INTO stock VALUES (1, 1)")
    run(stock.connection, *statements[place:])
    assert stock.poll() == [("stock", "T", None)]
    assert stock.log.installed(stock.connection).watched == {relation: watch}
    mode = stock.connection.exec_driver_sql("SELECT @@SESSION.sql_mode = @@GLOBAL.sql_mode")
    assert mode.scalar() == 1
    with pytest.raises(DBAPIError, match="nope"):
        run(stock.connection, *stock.log.watch(replace(watch, key=("nope",))))
    stock.run("INSERT INTO stock VALUES (2, 1)")
    assert stock.keys() == [(2,)]


# -- rights ---------------------------------------------------------------------------------------


@contextmanager
def account(feed: Feed, *grants: str) -> Iterator[Engine]:
    """Lend an engine of an account with some privileges."""
    name = f"sa_{random.randrange(10**9)}"
    feed.run(f"CREATE USER {name}@'%' IDENTIFIED BY 'x'")
    try:
        feed.run(*(f"GRANT {grant} TO {name}@'%'" for grant in grants))
        engine = create_engine(
            feed.url.set(username=name, password="x"),
            isolation_level="AUTOCOMMIT",
            poolclass=NullPool,
        )
        yield engine
    finally:
        feed.run(f"DROP USER {name}@'%'")


def test_writers_need_no_rights(stock: Feed) -> None:
    """Who may write the table, and nothing else, is logged, with cascades."""
    stock.run(
        "CREATE TABLE parts (id INT PRIMARY KEY, stock INT, "
        "FOREIGN KEY (stock) REFERENCES stock (id) ON DELETE CASCADE)"
    )
    stock.watch("parts")
    db = stock.url.database
    grants = f"INSERT, DELETE, SELECT ON {db}.stock", f"INSERT ON {db}.parts"
    with account(stock, *grants) as engine, engine.connect() as connection:
        run(connection, "INSERT INTO stock VALUES (1, 1)", "INSERT INTO parts VALUES (11, 1)")
        run(connection, "DELETE FROM stock")
        with pytest.raises(DBAPIError, match="denied"):
            run(connection, f"SELECT * FROM {LOG}")
    assert sorted(stock.poll()) == [
        ("parts", "D", ((11,),)),
        ("parts", "I", ((11,),)),
        ("stock", "D", ((1,),)),
        ("stock", "I", ((1,),)),
    ]


def test_what_a_reader_needs(stock: Feed) -> None:
    """Each privilege that lacks is named; with all of them a reader can do everything."""
    db = stock.url.database
    relation = Relation("", "stock")
    grants = [
        (f"SELECT ON {db}.stock", "GRANT SELECT, INSERT, DELETE"),
        (f"SELECT ON {db}.{LOG}", "GRANT SELECT, INSERT, DELETE"),
        (f"SELECT ON {db}.sa_tablecache_meta", "GRANT SELECT, INSERT, DELETE"),
        (f"SELECT ON {db}.sa_tablecache_watched", "GRANT TRIGGER ON stock"),
        (f"TRIGGER ON {db}.stock", "GRANT PROCESS"),
        ("PROCESS ON *.*", None),
    ]
    for count in range(1, len(grants) + 1):
        with (
            account(stock, *(grant for grant, _ in grants[:count])) as engine,
            engine.connect() as connection,
        ):
            missing = grants[count - 1][1]
            if count < 4:
                with pytest.raises(FeedUnavailable, match=str(missing)):
                    stock.log.poll(connection, stock.position, stock.relations)
                continue
            poll = stock.log.poll(connection, stock.position, stock.relations)
            if missing is None:
                assert poll.untrusted == {}
            else:
                assert missing in poll.untrusted[relation]
    with stock.writer() as writer:
        run(writer, "INSERT INTO stock VALUES (1, 1)")
        writer.rollback()
    stock.run("INSERT INTO stock VALUES (2, 2)")
    stock.poll()
    all_grants = [grant for grant, _ in grants]
    with (
        account(stock, *all_grants) as engine,
        engine.connect() as connection,
        pytest.raises(FeedUnavailable, match="GRANT SELECT, INSERT, DELETE"),
    ):
        stock.log.poll(connection, stock.position, stock.relations)
    with (
        account(
            stock,
            *all_grants,
            f"INSERT, DELETE ON {db}.{LOG}",
            f"UPDATE ON {db}.sa_tablecache_meta",
        ) as engine,
        engine.connect() as connection,
    ):
        position = stock.position
        for _ in range(2):
            position = stock.log.poll(connection, position, stock.relations).position
        assert position.gaps == ()
        assert stock.log.trim(connection, 0) > 0


# -- trimming, and readers that were away ---------------------------------------------------------


def test_trimming(stock: Feed) -> None:
    """What is old is deleted; a reader who has not seen it is told so, another one is not."""
    stock.run("INSERT INTO stock VALUES (1, 1)")
    late = stock.position
    stock.run("INSERT INTO stock VALUES (2, 2)", "INSERT INTO stock VALUES (3, 3)")
    assert stock.keys() == [(1,), (2,), (3,)]
    assert stock.log.trim(stock.connection, 3600) == 0
    count = stock.logged()
    assert stock.log.trim(stock.connection, 0) == count - 1
    assert stock.logged() == 1
    assert stock.keys() == []
    poll = stock.log.poll(stock.connection, late, stock.relations)
    assert "trimmed" in str(poll.gap)
    assert poll.position == stock.position
    assert stock.log.trim(stock.connection, 0) == 0
    stock.run("INSERT INTO stock VALUES (4, 4)")
    assert stock.keys() == [(4,)]


def test_trimming_stops_at_what_is_under_way(stock: Feed) -> None:
    """What was logged after an open transaction's entry stays until that has ended."""
    with stock.writer() as writer:
        run(writer, "INSERT INTO stock VALUES (1, 1)")
        late = stock.position
        stock.run("INSERT INTO stock VALUES (2, 2)", "INSERT INTO stock VALUES (3, 3)")
        assert stock.keys() == [(2,), (3,)]
        stock.log.trim(stock.connection, 0)
        assert stock.logged() == 3
        poll = stock.log.poll(stock.connection, late, stock.relations)
        assert [change.keys for change in poll.changes] == [((2,), (3,))]
        writer.commit()
    assert stock.keys() == [(1,)]
    assert stock.log.trim(stock.connection, 0) == 3
    with stock.writer() as writer:
        run(writer, "INSERT INTO stock VALUES (5, 5)")
        writer.rollback()
    stock.run("INSERT INTO stock VALUES (6, 6)")
    assert stock.keys() == [(6,)]
    assert stock.log.trim(stock.connection, 0) == 0  # but it took the id that lacked
    assert stock.keys() == []
    assert stock.log.trim(stock.connection, 0) == 2
    assert stock.keys() == []


def test_trimming_blocks_no_writer(stock: Feed) -> None:
    """While a trim's transaction is open others write, and one trims at a time."""
    stock.run(*(f"INSERT INTO stock VALUES ({n}, 0)" for n in range(5)))
    stock.poll()
    with stock.writer() as trimmer:
        original = trimmer.exec_driver_sql
        written: list[int] = []

        def slow(statement: str, *args: Any, **options: Any) -> Any:
            result = original(statement, *args, **options)
            if len(written) < 2 and statement.startswith(("DELETE", "UPDATE sa_tablecache_meta")):
                with stock.writer() as writer:
                    number = 100 + len(written)
                    run(writer, "SET SESSION innodb_lock_wait_timeout = 1")
                    run(writer, f"INSERT INTO stock VALUES ({number}, 0)")
                    writer.commit()
                    written.append(number)
                assert stock.log.trim(stock.connection, 0) == -1
            return result

        trimmer.exec_driver_sql = slow  # type: ignore[method-assign]
        late = stock.log.position(stock.connection)
        assert stock.log.trim(trimmer, 0) > 0
    assert late.last < stock.log.position(stock.connection).last
    assert len(written) == 2


def test_an_id_that_is_used_after_it_was_trimmed(stock: Feed) -> None:
    """The next trim notices it, and everybody begins anew."""
    stock.run(*(f"INSERT INTO stock VALUES ({n}, 0)" for n in range(5)))
    stock.poll()
    assert stock.log.trim(stock.connection, 0) > 2
    first = stock.connection.exec_driver_sql(f"SELECT MIN(id) FROM {LOG}").scalar_one()
    stock.run(
        f"INSERT INTO {LOG} (id, at, writer, table_schema, table_name, operation) "
        f"VALUES ({first - 2}, UTC_TIMESTAMP(), 0, '', 'stock', 'T')"
    )
    stock.log.trim(stock.connection, 0)
    assert "another one" in str(stock.read().gap)
    stock.run("INSERT INTO stock VALUES (9, 9)")
    assert stock.keys() == [(9,)]


def test_a_changelog_that_was_emptied(stock: Feed) -> None:
    """TRUNCATE of the changelog itself is a gap, and after the next trim all is well again."""
    stock.run(*(f"INSERT INTO stock VALUES ({n}, 0)" for n in range(5)))
    stock.poll()
    stock.log.trim(stock.connection, 0)
    stock.run(f"TRUNCATE {LOG}")
    stock.run("INSERT INTO stock VALUES (9, 9)")
    assert stock.read().gap is not None
    stock.log.trim(stock.connection, 0)
    assert stock.read().gap is not None
    stock.run("INSERT INTO stock VALUES (10, 9)")
    assert stock.keys() == [(10,)]


def test_the_position_of_now(stock: Feed) -> None:
    """It is found from where somebody stood lately, whatever was under way then, or is now."""
    with stock.writer() as long, stock.writer() as longer:
        run(long, "INSERT INTO stock VALUES (9001, 1)")
        run(longer, "INSERT INTO stock VALUES (9002, 1)")
        stock.run("INSERT INTO stock SELECT seq, 0 FROM seq_1_to_600")
        stock.read()
        noted = stock.connection.exec_driver_sql("SELECT position FROM sa_tablecache_meta")
        assert stock.log.parse(noted.scalar_one()) == stock.position
        assert len(stock.position.gaps) == 1
        stock.run("INSERT INTO stock VALUES (9003, 1)")
        long.commit()
        asked: list[str] = []
        event.listen(stock.engine, "before_cursor_execute", lambda *args: asked.append(args[2]))
        now = stock.log.position(stock.connection)
        assert len(asked) == 2
        assert f"id > {stock.position.last} OR id BETWEEN" in asked[1]
        stock.read()
        assert now == stock.position
        longer.rollback()
        stock.run("INSERT INTO stock VALUES (9004, 1)")
        for _ in range(3):
            stock.read()
        assert stock.log.trim(stock.connection, 0) > 600
        stock.run("INSERT INTO stock VALUES (9005, 1)")
        now = stock.log.position(stock.connection)  # what was noted is trimmed
        assert now.gaps == ()
        stock.read()
        assert now == stock.position
        run(long, "INSERT INTO stock VALUES (9006, 1)")
        stock.run("INSERT INTO stock VALUES (9007, 1)")
        now = stock.log.position(stock.connection)
        stock.read()
        assert now == stock.position
        assert len(now.gaps) == 1


def test_a_reader_whose_connection_is_killed(stock: Feed) -> None:
    """A poll that fails has read nothing; the next one finds all of it."""
    reader = stock.engine.connect()
    driver: Any = reader.connection.driver_connection
    stock.run("INSERT INTO stock VALUES (1, 1)", f"KILL CONNECTION {driver.thread_id()}")
    with pytest.raises(OperationalError):
        stock.log.poll(reader, stock.position, stock.relations)
    reader.close()
    stock.run("INSERT INTO stock VALUES (2, 2)")
    assert stock.keys() == [(1,), (2,)]


def test_a_poll_in_a_transaction(stock: Feed) -> None:
    """Its snapshot is the one of the transaction, and it takes no id."""
    with stock.writer() as reader, stock.writer() as writer:
        run(writer, "INSERT INTO stock VALUES (1, 1)")
        writer.rollback()
        stock.run("INSERT INTO stock VALUES (2, 2)")
        position = stock.log.poll(reader, stock.position, stock.relations).position
        stock.run("INSERT INTO stock VALUES (3, 3)")
        assert stock.log.position(reader) == position
        assert reader.exec_driver_sql("SELECT COUNT(*) FROM stock").scalar() == 1
        poll = stock.log.poll(reader, position, stock.relations)
        assert poll.changes == ()
        assert len(poll.position.gaps) == 1  # type: ignore[attr-defined]
    assert stock.keys() == [(2,), (3,)]


def test_a_connection_that_reads_uncommitted_rows(stock: Feed) -> None:
    """It would tell of what is rolled back, and not again of what is committed: it is refused."""
    with stock.engine.connect() as connection:
        run(connection, "SET SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED")
        for read in (
            lambda: stock.log.position(connection),
            lambda: stock.log.poll(connection, stock.position, stock.relations),
        ):
            with pytest.raises(FeedUnavailable, match="READ UNCOMMITTED"):
                read()
        run(connection, "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        with stock.writer() as writer:
            run(writer, "INSERT INTO stock VALUES (1, 1)")
            assert stock.log.poll(connection, stock.position, stock.relations).changes == ()
            assert stock.log.position(connection) == stock.position
        connection.invalidate()


def test_tokens(stock: Feed) -> None:
    """A token of after a commit is included by each poll that begins later, and by none before."""
    with stock.writer() as long, stock.engine.connect() as other:
        run(long, "INSERT INTO stock VALUES (1, 1)")
        before = stock.log.position(other)
        stock.run("INSERT INTO stock VALUES (2, 2)")
        token = stock.log.parse(str(stock.log.position(other)))
        assert not before.includes(token)
        assert token.includes(before)
        (change,) = stock.read().changes
        assert stock.position.includes(token)
        assert token.sees(change)
        assert not before.sees(change)
        long.commit()
        later = stock.log.position(other)
        assert not stock.position.includes(later)
        assert later.includes(stock.position)
        (change,) = stock.read().changes
        assert stock.position.includes(later)
        assert later.sees(change)
        assert not token.sees(change)
    for wrong in ("", "x", "1.2", "abc-def.1_", str(token) + ";"):
        with pytest.raises(ValueError, match="no position"):
            stock.log.parse(wrong)
    for character in "'\",; ":
        assert character not in str(token)


async def test_an_asynchronous_driver(stock: Feed) -> None:
    """It reads, takes ids, trims and installs as others do, and has nothing to warn of."""
    engine = create_async_engine(asynchronous(stock.url), isolation_level="AUTOCOMMIT")
    with stock.writer() as writer:
        run(writer, "INSERT INTO stock VALUES (1, 1)")
        writer.rollback()
    stock.run("INSERT INTO stock SELECT seq, 0 FROM seq_2_to_1200")
    async with engine.connect() as connection:

        def read(connection: Connection) -> list[Any]:
            poll = stock.log.poll(connection, stock.position, stock.relations)
            stock.position = poll.position
            return [change.keys for change in poll.changes]

        assert await connection.run_sync(read) == [None]
        assert len(stock.position.gaps) == 1
        for _ in range(2):
            assert await connection.run_sync(read) == []
        assert stock.position.gaps == ()
        assert await connection.run_sync(stock.log.position) == stock.position
        assert await connection.run_sync(stock.log.trim, 0) > 1000
        (relation,) = stock.relations
        watch = await connection.run_sync(stock.log.propose, relation, ["amount"])
        for statements in (stock.log.create(), stock.log.watch(watch), stock.log.watch(watch)):
            await connection.run_sync(contract.run, statements)
        installed = await connection.run_sync(stock.log.installed)
        assert installed.watched == {relation: watch}
        assert await connection.run_sync(read) == [None]
        await connection.run_sync(contract.run, stock.log.drop([relation]))
    await engine.dispose()


def test_the_changelog_is_found_by_the_dialect() -> None:
    """MariaDB and MySQL have the same one."""
    for name in ("mysql", "mariadb"):
        assert isinstance(changelog_for(name), MySQLChangelog)


# -- a server of one's own ------------------------------------------------------------------------


class Server:
    """A server that a test may kill, and whose settings it may change.

    It has a directory of its own for temporary files, also while it is installed: a server that
    starts deletes those of all others that share it, and they crash.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.temporary = directory / "temporary"
        self.temporary.mkdir()
        self.environment = {**os.environ, "TMPDIR": str(self.temporary)}
        self.process: subprocess.Popen[bytes] | None = None
        subprocess.run(
            [
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={directory / 'data'}",
                f"--tmpdir={self.temporary}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                *(["--user=root"] if directory.owner() == "root" else []),
            ],
            check=True,
            capture_output=True,
            env=self.environment,
        )

    @property
    def url(self) -> URL:
        query = {"unix_socket": str(self.directory / "socket")}
        return URL.create("mysql+pymysql", "root", database="feed", query=query)

    def start(self, *options: str) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(
            [
                "mariadbd",
                "--no-defaults",
                f"--datadir={self.directory / 'data'}",
                f"--tmpdir={self.temporary}",
                f"--socket={self.directory / 'socket'}",
                "--skip-networking",
                "--innodb-buffer-pool-size=32M",
                *(["--user=root"] if self.directory.owner() == "root" else []),
                *options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment,
        )
        self.started = time.monotonic()
        while not self.answers():
            assert self.process.poll() is None
            assert time.monotonic() < self.started + 60
            time.sleep(0.05)
        engine = create_engine(self.url.set(database="mysql"), poolclass=NullPool)
        with engine.connect() as connection:
            run(connection, "CREATE DATABASE IF NOT EXISTS feed")

    def answers(self) -> bool:
        """Whether it takes connections."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.directory / "socket")) == 0

    def kill(self) -> None:
        """End it as a crash does, when it has run for a second: by that its runs are told apart."""
        if self.process is not None:
            time.sleep(max(0.0, self.started + 1.1 - time.monotonic()))
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server(mariadb: Mariadb, tmp_path: Path) -> Iterator[Server]:
    """A server of one's own."""
    if shutil.which("mariadbd") is None or shutil.which("mariadb-install-db") is None:
        pytest.skip("no mariadbd is installed here")
    server = Server(tmp_path)
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_of_ones_own(server: Server) -> None:
    """After a crash everything is read anew, and what is prepared is still under way.

    Replicas, and servers that are one of several who write, are refused.
    """
    server.start()
    feed = Feed(server.url)
    feed.run("CREATE TABLE stock (id INT PRIMARY KEY, amount INT)")
    feed.watch("stock")
    with feed.writer() as writer, feed.writer() as prepared:
        run(writer, "INSERT INTO stock VALUES (1, 1)")
        run(prepared, "XA START 'x'", "INSERT INTO stock VALUES (2, 2)", "XA END 'x'")
        run(prepared, "XA PREPARE 'x'")
        feed.run("INSERT INTO stock VALUES (3, 3)")
        assert feed.keys() == [(3,)]
        feed.run("INSERT INTO stock VALUES (4, 4)")
        feed.close()
        server.kill()
        writer.invalidate()
        prepared.invalidate()
    server.start()

    def again() -> Feed:
        after = Feed(server.url)
        after.position, after.relations = feed.position, feed.relations
        return after

    feed = again()
    assert "was started" in str(feed.read().gap)
    feed.run("INSERT INTO stock VALUES (5, 5)")
    assert [feed.keys() for _ in range(4)] == [[(5,)], [], [], []]
    assert len(feed.position.gaps) == 1  # what is prepared
    feed.run("XA COMMIT 'x'")
    assert feed.keys() == [(2,)]
    assert feed.position.gaps == ()
    rows = feed.connection.exec_driver_sql("SELECT id FROM stock ORDER BY id").scalars()
    assert list(rows) == [2, 3, 4, 5]

    feed.close()
    server.kill()
    server.start("--log-bin", "--sync-binlog=0", "--binlog-format=STATEMENT")
    feed = again()
    assert "was started" in str(feed.read().gap)
    feed.run("INSERT INTO stock VALUES (7, 7)")
    assert feed.keys() == [(7,)]
    assert feed.log.trim(feed.connection, 0) > 0

    feed.run("SET GLOBAL read_only = 1")
    with pytest.raises(FeedUnavailable, match="read-only"):
        feed.read()
    with pytest.raises(FeedUnavailable, match="read-only"):
        feed.log.position(feed.connection)
    feed.run("SET GLOBAL read_only = 0", "SET GLOBAL auto_increment_increment = 2")
    with pytest.raises(FeedUnavailable, match="auto_increment_increment"):
        feed.read()
    feed.run("SET GLOBAL auto_increment_increment = 1")
    assert feed.keys() == []
    feed.close()
