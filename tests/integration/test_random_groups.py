"""Any view that groups, at random, after any writes: a cached answer is the database's.

The views are made at random, too: trees of inner and outer joins over aliases of three tables full
of NULLs, grouped by some of their columns, or joined to subqueries that group. The writes are made
behind the cache's back, which is then told, more or less exactly, what they were: this searches for
groups that are not read again, and for nothing else. A failure names its seed::

    SA_TABLECACHE_TEST_SEEDS=17 pytest tests/integration/test_random_groups.py
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Table,
    and_,
    create_engine,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from sa_tablecache import CachedView, ScoreIndex, TableCache
from sa_tablecache.analysis import plan_of
from sa_tablecache.changes import VIEW, ChangeSet, Written
from tests.integration.test_random_writes import SEEDS

VIEWS = 12
"""Views for each seed."""
STEPS = 8
"""Transactions for each view."""

metadata = MetaData()
P = Table(
    "group_p",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("x", Integer),
    Column("y", Integer),
)
C = Table(
    "group_c",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("p", Integer),
    Column("x", Integer),
)
D = Table(
    "group_d",
    metadata,
    Column("k", Integer, primary_key=True),
    Column("l", Integer, primary_key=True),
    Column("x", Integer),
)
TABLES = (P, C, D)
SMALL = 4
"""The number of different values, so that many rows match."""


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A database with the tables, of which a cache is told nothing."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: URL = request.getfixturevalue(name)
    engine = create_engine(url)
    metadata.create_all(engine)
    yield engine
    engine.dispose()


# -- views at random ---------------------------------------------------------------------------


def some_join(rng: Random, most: int) -> tuple[Any, list[Any]]:
    """Return a FROM element, and the tables in it."""
    if most == 1 or rng.random() < 0.25:
        table = rng.choice(TABLES).alias(f"t{rng.randrange(10**6)}")
        return table, [table]
    left, left_tables = some_join(rng, most - 1)
    right, right_tables = some_join(rng, max(1, most - len(left_tables) - 1))
    on = [some_column(rng, left_tables) == some_column(rng, right_tables)]
    if rng.random() < 0.3:
        on.append(some_condition(rng, left_tables + right_tables))
    if rng.random() < 0.1:
        on = [func.coalesce(some_column(rng, left_tables), 0) == some_column(rng, right_tables)]
    joined = left.join(right, and_(*on), isouter=rng.random() < 0.6)
    return joined, left_tables + right_tables


def some_column(rng: Random, tables: list[Any]) -> Any:
    """Return a column of one of the tables."""
    return rng.choice(list(rng.choice(tables).c))


def some_condition(rng: Random, tables: list[Any]) -> Any:
    """Return a condition on one or two columns."""
    one, other = some_column(rng, tables), some_column(rng, tables)
    return rng.choice(
        [one > 1, one.is_(None), one == other, or_(one == 2, other.is_(None)), one != 3]
    )


def some_groups(rng: Random, most: int = 3) -> tuple[Any, list[Any]]:
    """Return a select that groups, and the columns of its groups."""
    joined, tables = some_join(rng, most)
    by = list({str(c): c for c in (some_column(rng, tables) for _ in range(3))}.values())
    by = by[: rng.randrange(1, 4)]
    labelled = [column.label(f"g{at}") for at, column in enumerate(by)]
    statement = (
        select(
            *labelled,
            func.count().label("n"),
            func.sum(some_column(rng, tables), type_=Integer).label("s"),
            func.max(some_column(rng, tables)).label("m"),
        )
        .select_from(joined)
        .group_by(*by)
    )
    if rng.random() < 0.4:
        statement = statement.where(some_condition(rng, tables))
    if rng.random() < 0.3:
        statement = statement.having(func.count() > 1)
    return statement, labelled


def some_grouped_view(rng: Random) -> Any:
    """Return a view whose records are groups."""
    statement, by = some_groups(rng, rng.choice([1, 2, 3, 4]))
    return type(CachedView)(
        f"Groups{rng.randrange(10**9)}",
        (CachedView,),
        {
            "__select__": statement,
            "by_n": ScoreIndex("n"),
            "by_g": ScoreIndex(by[-1].name),
            "by_s": ScoreIndex(func.coalesce(func.min(by[0].element), 0)),
        },
    )


def some_joining_view(rng: Random) -> Any:
    """Return a view that joins a subquery or a CTE which groups, perhaps twice."""
    joined, tables = some_join(rng, 2)
    statement = select(*(t.c[key].label(f"{t.name}_{key}") for t in tables for key in t.c.keys()))  # noqa: SIM118
    for number in range(rng.choice([1, 1, 2])):
        groups, by = some_groups(rng, 2)
        sub = groups.cte(f"sub{number}") if rng.random() < 0.5 else groups.subquery(f"sub{number}")
        on = [some_column(rng, tables) == sub.c[column.name] for column in by]
        if rng.random() < 0.3:
            on = on[:1]
        joined = joined.join(sub, and_(*on), isouter=rng.random() < 0.6)
        statement = statement.add_columns(
            *(sub.c[column.name].label(f"s{number}_{column.name}") for column in by),
            sub.c.n.label(f"s{number}_n"),
            sub.c.s.label(f"s{number}_s"),
        )
    statement = statement.select_from(joined)
    if rng.random() < 0.2:
        statement = statement.where(some_condition(rng, tables))
    return type(CachedView)(
        f"Joining{rng.randrange(10**9)}",
        (CachedView,),
        {
            "__select__": statement,
            "by_n": ScoreIndex("s0_n"),
            "by_g": ScoreIndex("s0_g0"),
            "by_s": ScoreIndex("s0_s"),
        },
    )


# -- writes at random --------------------------------------------------------------------------


@dataclass
class Writer:
    """Writes at random, and says what it wrote."""

    engine: Engine
    rng: Random

    def fill(self) -> None:
        """Start with a few rows in each table."""
        with self.engine.begin() as connection:
            for table in TABLES:
                connection.execute(delete(table))
            for _ in range(15):
                self._insert(connection, self.rng.choice(TABLES), ChangeSet())

    def write(self) -> ChangeSet:
        """Commit a transaction."""
        changes = ChangeSet()
        with self.engine.begin() as connection:
            for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
                table = self.rng.choice(TABLES)
                rows = connection.execute(select(table)).mappings().all()
                if not rows or self.rng.random() < 0.3:
                    self._insert(connection, table, changes)
                    continue
                row = dict(self.rng.choice(rows))
                if self.rng.random() < 0.4:
                    connection.execute(delete(table).where(*self._is(table, row)))
                    self._note(changes, table, row, Written(None, (row,)))
                else:
                    values = self._values(table)
                    connection.execute(update(table).where(*self._is(table, row)).values(values))
                    before = (row,) if self.rng.random() < 0.8 else None
                    self._note(changes, table, row, Written(frozenset(values), before))
        return changes

    def _insert(self, connection: Connection, table: Table, changes: ChangeSet) -> None:
        row = {column.key: self._value() for column in table.c if not column.primary_key}
        row |= {column.key: self.rng.randrange(6) for column in table.primary_key}
        if connection.execute(select(table).where(*self._is(table, row))).first() is None:
            connection.execute(insert(table).values(row))
            self._note(changes, table, row, Written(None, ()))

    def _note(self, changes: ChangeSet, table: Table, row: dict[str, Any], how: Written) -> None:
        if self.rng.random() < 0.05:
            how = Written()
        key = tuple(row[column.key] for column in table.primary_key)
        changes.add_rows((None, table.name), [key], how)

    def _values(self, table: Table) -> dict[str, Any]:
        keys = [column.key for column in table.c if not column.primary_key]
        some = self.rng.sample(keys, k=self.rng.choice([1, len(keys)]))
        return {key: self._value() for key in some}

    def _value(self) -> int | None:
        return None if self.rng.random() < 0.2 else self.rng.randrange(SMALL)

    @staticmethod
    def _is(table: Table, row: dict[str, Any]) -> list[Any]:
        return [column == row[column.key] for column in table.primary_key]


# -- the test ----------------------------------------------------------------------------------


def rows_of(records: Any) -> list[tuple[Any, ...]]:
    """Return records or rows as they compare."""
    return sorted((tuple(r._asdict().values()) for r in records), key=repr)


def compare(cache: TableCache, view: Any, writer: Engine, part: Any, said: str) -> None:
    """Assert that the cache says of a part of a view what the database says."""
    statement = select(view) if part is None else select(view).where(part)
    with writer.connect() as connection:
        expected = rows_of(connection.execute(statement))
    with cache.sessionmaker()() as session:
        found = rows_of(session.scalars(statement))
    assert found == expected, f"{said}\n{plan_of(view).statement}"
    cache._check()


def run(view: Any, writer: Writer, seen: Counter[str], said: str) -> None:
    """Write, tell, compare."""
    rng = writer.rng
    writer.fill()
    told = create_engine(writer.engine.url)
    with TableCache(told, views=[view]) as cache:
        name = rng.choice(["by_n", "by_g", "by_s"])
        part = None
        if rng.random() < 0.4:
            part = [view.by_n >= 2, view.by_g <= 1, view.by_s >= 1, view.by_g.is_(None)][
                rng.randrange(4)
            ]
        cache.load(view, *([] if part is None else [part]))
        table = cache.table(view)
        for step in range(STEPS):
            for _ in range(rng.choice([1, 1, 2])):
                changes = writer.write()
                marks = table.marks_of(changes)
                seen["coarse" if VIEW in marks else "exact" if marks else "none"] += 1
                cache.publish(changes, None)
            if rng.random() < 0.1:
                cache.extend(view, view.by_n >= rng.randrange(3))
            compare(cache, view, writer.engine, part, f"{said}, step {step}, {name}")
    told.dispose()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("make", [some_grouped_view, some_joining_view])
def test_groups_are_the_databases_after_random_writes(engine: Engine, make: Any, seed: int) -> None:
    """Whatever joins and groups there are, every group that a row leaves or joins is read again."""
    seen: Counter[str] = Counter()
    for number in range(VIEWS):
        rng = Random(f"{make.__name__} {engine.dialect.name} {seed} {number}")
        view = make(rng)
        run(view, Writer(engine, rng), seen, f"seed {seed}, view {number}")
    assert seen["exact"], seen
