"""A process that writes at random, and tells which changes it has committed.

``python -m tests.integration.feed_writer URL SEED COUNT``: each writer has a range of keys of its
own, and so knows which rows its statements hit. What it committed is written to standard output as
JSON: ``[[table, operation, [key, ...]], ...]``, one for each statement that changed rows.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import psycopg
from sqlalchemy import URL

SPAN = 1_000
"""The writer with seed n has the keys from n * SPAN."""

TABLES = (
    "CREATE TABLE item (id integer PRIMARY KEY, v integer DEFAULT 0)",
    "CREATE TABLE part (id integer PRIMARY KEY, v integer DEFAULT 0) PARTITION BY RANGE (id)",
    f"CREATE TABLE part_low PARTITION OF part FOR VALUES FROM (0) TO ({2 * SPAN})",
    f"""
    CREATE TABLE part_high PARTITION OF part FOR VALUES FROM ({2 * SPAN}) TO (MAXVALUE)
        PARTITION BY HASH (id)
    """,
    "CREATE TABLE part_even PARTITION OF part_high FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
    "CREATE TABLE part_odd PARTITION OF part_high FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    "CREATE TABLE parent (id integer PRIMARY KEY, v integer DEFAULT 0)",
    """
    CREATE TABLE child (id integer PRIMARY KEY, v integer DEFAULT 0,
        parent_id integer NOT NULL REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE)
    """,
)

Logged = tuple[str, str, tuple[int, ...]]


@contextmanager
def writing(url: URL, seeds: range, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Run writers in processes of their own, which end after some transactions each."""
    arguments = [str(count), url.render_as_string(hide_password=False)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.feed_writer", str(seed), *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in seeds
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def committed(processes: list[subprocess.Popen[str]]) -> Iterator[Logged]:
    """Yield what the processes say that they have committed."""
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        for table, operation, keys in json.loads(output):
            yield table, operation, tuple(keys)


class Writer:
    """Knows its rows, and what its open transaction has done to them."""

    def __init__(self, connection: psycopg.Connection[Any], seed: int) -> None:
        self.connection = connection
        self.rng = Random(seed)
        self.first = seed * SPAN
        self.rows: dict[str, dict[int, int | None]] = {
            name: {} for name in ("item", "part", "parent", "child")
        }
        self.log: list[Logged] = []
        self.merges = connection.info.server_version >= 150_000
        limit = connection.execute("SHOW max_prepared_transactions").fetchone()
        self.prepares = limit is not None and limit[0] != "0"
        self.serial = 0

    def transaction(self) -> None:
        """Write in one transaction, and end it in some way."""
        before, logged = self._copy(), len(self.log)
        self.serial += 1
        name = f"feed_{self.first}_{self.serial}"
        self._execute("BEGIN")
        for _ in range(self.rng.choice([1, 1, 2, 4])):
            if self.rng.random() < 0.3:
                self._savepoint()
            else:
                self._write()
            if self.rng.random() < 0.2:
                self._execute("SELECT pg_sleep(0.002)")
        end = self.rng.choice(["COMMIT", "COMMIT", "COMMIT", "ROLLBACK", "PREPARE"])
        if end == "PREPARE" and not self.prepares:
            end = "COMMIT"
        if end == "PREPARE":
            self._execute(f"PREPARE TRANSACTION '{name}'")
            end = self.rng.choice(["COMMIT", "ROLLBACK"])
            self._execute(f"{end} PREPARED '{name}'")
        else:
            self._execute(end)
        if end == "ROLLBACK":
            self.rows, self.log = before, self.log[:logged]

    def _savepoint(self) -> None:
        before, logged = self._copy(), len(self.log)
        self._execute("SAVEPOINT s")
        self._write()
        if self.rng.random() < 0.3:
            self._savepoint()
        if self.rng.random() < 0.5:
            self._execute("ROLLBACK TO s")
            self.rows, self.log = before, self.log[:logged]
        self._execute("RELEASE s")

    def _copy(self) -> dict[str, dict[int, int | None]]:
        return {table: dict(rows) for table, rows in self.rows.items()}

    def _execute(self, statement: str) -> None:
        self.connection.execute(statement.encode())

    def _logged(self, table: str, operation: str, keys: set[int]) -> None:
        if keys:
            self.log.append((table, operation, tuple(sorted(keys))))

    def _write(self) -> None:
        writes: list[Callable[[str], None]] = [
            self.insert, self.insert, self.upsert, self.copy, self.update, self.move, self.delete,
            self.nothing,
        ]  # fmt: skip
        if self.merges:
            writes.append(self.merge)
        self.rng.choice(writes)(self.rng.choice(["item", "part", "parent", "child"]))

    def _fresh(self, table: str, most: int = 3) -> list[int]:
        free = sorted(set(range(self.first, self.first + 60)) - set(self.rows[table]))
        return self.rng.sample(free, min(len(free), self.rng.randint(1, most)))

    def _some(self, table: str) -> list[int]:
        keys = sorted(self.rows[table])
        return self.rng.sample(keys, min(len(keys), self.rng.randint(1, 3)))

    def _values(self, table: str, keys: list[int]) -> list[tuple[int, ...]] | None:
        if table != "child":
            return [(key, self.rng.randrange(100)) for key in keys]
        parents = sorted(self.rows["parent"])
        return [(k, 0, self.rng.choice(parents)) for k in keys] if parents else None

    def _add(self, table: str, values: list[tuple[int, ...]]) -> None:
        self.rows[table].update({v[0]: v[2] if table == "child" else None for v in values})

    def insert(self, table: str) -> None:
        """Insert some rows; of a partitioned table sometimes into a partition."""
        values = self._values(table, self._fresh(table))
        if not values:
            return
        target = table
        if table == "part" and self.rng.random() < 0.5:
            target = "part_low" if self.first < 2 * SPAN else "part_high"
        self._execute(f"INSERT INTO {target} VALUES {', '.join(map(str, values))}")
        self._add(table, values)
        self._logged(table, "I", {v[0] for v in values})

    def copy(self, table: str) -> None:
        """Copy rows in."""
        values = self._values(table, self._fresh(table, 6))
        if not values:
            return
        with self.connection.cursor().copy(f"COPY {table} FROM STDIN".encode()) as copy:
            for row in values:
                copy.write_row(row)
        self._add(table, values)
        self._logged(table, "I", {v[0] for v in values})

    def upsert(self, table: str) -> None:
        """Insert rows of which some are there."""
        values = self._values(table, [*self._fresh(table), *self._some(table)])
        if not values:
            return
        self._execute(
            f"INSERT INTO {table} VALUES {', '.join(map(str, values))}"
            " ON CONFLICT (id) DO UPDATE SET v = excluded.v + 1"
        )
        there = {v[0] for v in values} & set(self.rows[table])
        new = [v for v in values if v[0] not in there]
        self._add(table, new)
        self._logged(table, "I", {v[0] for v in new})
        self._logged(table, "U", there)

    def merge(self, table: str) -> None:
        """Merge rows: some are inserted, some updated, some deleted."""
        if table != "item":  # of partitioned tables more is logged than needed
            return
        there = self._some(table)
        fresh = self._fresh(table)
        gone = set(there[:1])
        rows = ", ".join(f"({key}, {str(key in gone).lower()})" for key in [*fresh, *there])
        self._execute(
            f"MERGE INTO {table} AS t USING (VALUES {rows}) AS s (id, gone) ON t.id = s.id"
            " WHEN MATCHED AND s.gone THEN DELETE WHEN MATCHED THEN UPDATE SET v = v + 1"
            " WHEN NOT MATCHED THEN INSERT VALUES (s.id, 0)"
        )
        for key in gone:
            del self.rows[table][key]
        self._add(table, [(key,) for key in fresh])
        self._logged(table, "I", set(fresh))
        self._logged(table, "U", set(there) - gone)
        self._logged(table, "D", gone)

    def update(self, table: str) -> None:
        """Update rows in place."""
        if keys := self._some(table):
            self._execute(f"UPDATE {table} SET v = v + 1 WHERE id IN ({', '.join(map(str, keys))})")
            self._logged(table, "U", set(keys))

    def move(self, table: str) -> None:
        """Give a row another key; the children of a parent follow, and rows change partitions."""
        old, new = self._some(table)[:1], self._fresh(table)[:1]
        if not old or not new:
            return
        self._execute(f"UPDATE {table} SET id = {new[0]} WHERE id = {old[0]}")
        self.rows[table][new[0]] = self.rows[table].pop(old[0])
        self._logged(table, "U", {old[0], new[0]})
        if table == "parent":
            children = {k for k, parent in self.rows["child"].items() if parent == old[0]}
            self.rows["child"].update(dict.fromkeys(children, new[0]))
            self._logged("child", "U", children)

    def delete(self, table: str) -> None:
        """Delete rows; the children of parents go with them, and their triggers fire once."""
        keys = self._some(table)
        if not keys:
            return
        self._execute(f"DELETE FROM {table} WHERE id IN ({', '.join(map(str, keys))})")
        for key in keys:
            del self.rows[table][key]
        self._logged(table, "D", set(keys))
        if table == "parent":
            children = {k for k, parent in self.rows["child"].items() if parent in keys}
            for child in children:
                del self.rows["child"][child]
            self._logged("child", "D", children)

    def nothing(self, table: str) -> None:
        """Run statements that find no row."""
        self._execute(f"UPDATE {table} SET v = v + 1 WHERE id = -1")
        self._execute(f"DELETE FROM {table} WHERE id = -1")
        self._execute(f"INSERT INTO {table} SELECT * FROM {table} WHERE id = -1")


def main() -> None:
    """Write, and tell what was committed."""
    seed, count, url = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    url = url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, autocommit=True) as connection:
        writer = Writer(connection, seed)
        for _ in range(count):
            writer.transaction()
        json.dump(writer.log, sys.stdout)


if __name__ == "__main__":
    main()
