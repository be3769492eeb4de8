"""A partitioned table of PostgreSQL, and what DDL does to its rows behind all triggers.

One actor at a time writes it, here or elsewhere, or attaches, detaches and truncates partitions; it
then compares what a reader behind a barrier is told with the database. Others load and read the
view meanwhile, so that there are older snapshots to be applied later.
"""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from sqlalchemy import Connection, delete, insert, select, text, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from sa_tablecache import CachedView, ScoreIndex
from tests.stress.ledger import Impossible
from tests.stress.world import Base

PARTITIONS, ROWS = 4, 6


class Slice(Base):
    """A row of a partition."""

    __tablename__ = "stress_slice"
    __table_args__ = {"postgresql_partition_by": "LIST (part)"}

    part: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    v: Mapped[int]


class Slices(CachedView):
    """All of them."""

    __select__ = select(Slice.part, Slice.id, Slice.v)

    by_v = ScoreIndex("v")


def create(connection: Connection) -> None:
    """Create the partitions."""
    for number in range(PARTITIONS):
        connection.exec_driver_sql(
            f"CREATE TABLE IF NOT EXISTS stress_slice_{number} PARTITION OF stress_slice "
            f"FOR VALUES IN ({number})"
        )


def drop(connection: Connection) -> None:
    """Drop the partitions, attached or not."""
    for number in range(PARTITIONS):
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS stress_slice_{number}")


def attached(connection: Connection) -> list[int]:
    """Return the numbers of the partitions that are attached."""
    found = connection.scalars(
        text(
            "SELECT inhrelid::regclass::text FROM pg_inherits "
            "WHERE inhparent = 'stress_slice'::regclass"
        )
    )
    return sorted(int(name.rpartition("_")[2]) for name in found)


def write(connection: Connection, factory: Callable[..., Session], rng: Random) -> str:
    """Do something to the rows, and say what.

    :param connection: of somebody whom no cache watches, in AUTOCOMMIT mode.
    :param factory: makes the sessions of somebody else.
    """
    there = attached(connection)
    number = rng.randrange(PARTITIONS)
    name, key, v = f"stress_slice_{number}", rng.randrange(ROWS), rng.randrange(20)
    what = rng.choice(["put", "put", "delete", "attach", "attach", "detach", "truncate", "inside"])
    if what == "attach" and number not in there:
        connection.exec_driver_sql(
            f"ALTER TABLE stress_slice ATTACH PARTITION {name} FOR VALUES IN ({number})"
        )
    elif what == "detach" and len(there) > 1 and number in there:
        connection.exec_driver_sql(f"ALTER TABLE stress_slice DETACH PARTITION {name}")
    elif what == "truncate":
        connection.exec_driver_sql(f"TRUNCATE {name}")
    elif what == "inside":  # of a partition that may be attached or not
        connection.exec_driver_sql(
            f"INSERT INTO {name} VALUES ({number}, {key}, {v}) "
            f"ON CONFLICT (part, id) DO UPDATE SET v = {v}"
        )
    elif number in there:
        with factory() as session:
            mine = (Slice.part == number) & (Slice.id == key)
            if what == "delete":
                session.execute(delete(Slice).where(mine))
            elif session.get(Slice, (number, key)) is None:
                session.execute(insert(Slice).values(part=number, id=key, v=v))
            else:
                session.execute(update(Slice).where(mine).values(v=v))
            session.commit()
    return f"{what} {name} ({key}, {v})"


def check(connection: Connection, fresh: Callable[..., Session], rng: Random) -> None:
    """Compare what a reader is told with the database.

    :raises Impossible: if it is something else.
    """
    low = rng.choice([None, None, rng.randrange(20)])
    statement: Any = select(Slices)
    table = Slice.__table__
    plain = select(table)
    if low is not None:
        statement, plain = statement.where(Slices.v >= low), plain.where(table.c.v >= low)
    expected = Counter(map(tuple, connection.execute(plain)))
    with fresh() as session:
        records = session.scalars(statement).all()
        how = session.last_read  # type: ignore[attr-defined]
    answer = Counter((r.part, r.id, r.v) for r in records)
    if answer != expected:
        wrong, missing = answer - expected, expected - answer
        raise Impossible(f"Slices: {wrong} instead of {missing}, {how}")
