"""Asking the database which rows a statement wrote leaves no trace for who executes it.

Each statement runs twice, with and without a cache that follows its table, from the same rows. What
callers can see of the results is the same: values, counts, keys, and the errors of what is missing.
"""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Result,
    String,
    create_engine,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from sa_tablecache import CachedView, ScoreIndex, TableCache


class Base(DeclarativeBase):
    """Models of these tests."""


class Part(Base):
    """Something with a key that the database makes, and another."""

    __tablename__ = "returning_part"
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str | None] = mapped_column(String(20), unique=True)
    number: Mapped[int | None] = mapped_column(default=0)


class Parts(CachedView):
    """All of them."""

    __select__ = select(Part.id, Part.code, Part.number)
    by_number = ScoreIndex("number")


parts: Any = Part.__table__
Statement = Callable[[Connection], Any]


def _upsert(connection: Connection) -> Any:
    dialect = connection.dialect.name
    if dialect in ("mysql", "mariadb"):
        return mysql.insert(parts).on_duplicate_key_update(number=5)
    insert_ = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert_(parts).on_conflict_do_update(index_elements=["code"], set_={"number": 5})


def _ignore(connection: Connection) -> Any:
    dialect = connection.dialect.name
    if dialect in ("mysql", "mariadb"):
        return mysql.insert(parts).prefix_with("IGNORE")
    insert_ = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert_(parts).on_conflict_do_nothing()


def _orm(work: Callable[[Session], Any]) -> Statement:
    def run(connection: Connection) -> Any:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            result = work(session)
            seen = _seen(result) if isinstance(result, Result) else repr(result)
            session.commit()
            return seen

    return run


_few = parts.c.id < 4
_some = select(parts.c.code + "x", parts.c.number).where(parts.c.id < 3)

CORE: dict[str, Statement] = {
    "update": lambda c: c.execute(parts.update().where(_few).values(number=7)),
    "update of no row": lambda c: c.execute(parts.update().where(parts.c.id > 99).values(number=7)),
    "update by key": lambda c: c.execute(parts.update().where(parts.c.id == 2).values(number=8)),
    "update of the key": lambda c: c.execute(parts.update().where(parts.c.id == 3).values(id=33)),
    "delete": lambda c: c.execute(parts.delete().where(parts.c.number == 1)),
    "insert": lambda c: c.execute(parts.insert().values(code="a")),
    "insert with key": lambda c: c.execute(parts.insert().values(id=77, code="a")),
    "insert many": lambda c: c.execute(parts.insert(), [{"code": "a"}, {"code": "b"}]),
    "insert many with keys": lambda c: c.execute(
        parts.insert(), [{"id": 80, "code": "a"}, {"id": 81, "code": "b"}]
    ),
    "insert values": lambda c: c.execute(parts.insert().values([{"code": "a"}, {"code": "b"}])),
    "insert from select": lambda c: c.execute(
        parts.insert().from_select(["code", "number"], _some)
    ),
    "preserve_rowcount": lambda c: c.execute(
        parts.insert().values([{"code": "a"}, {"code": "b"}]),
        execution_options={"preserve_rowcount": True},
    ),
    "upsert of a new row": lambda c: c.execute(_upsert(c), {"code": "a", "number": 1}),
    "upsert of an old row": lambda c: c.execute(_upsert(c), {"code": "c2", "number": 1}),
    "upsert with another key": lambda c: c.execute(_upsert(c), {"id": 90, "code": "c2"}),
    "insert or nothing": lambda c: c.execute(_ignore(c), {"code": "c2", "number": 1}),
    "insert or something": lambda c: c.execute(_ignore(c), {"code": "a", "number": 1}),
    "orm update": _orm(lambda s: s.execute(update(Part).where(Part.number < 9).values(number=9))),
    "orm update, unsynchronized": _orm(
        lambda s: s.execute(
            update(Part).where(Part.number < 9).values(number=9),
            execution_options={"synchronize_session": False},
        )
    ),
    "orm update, fetching": _orm(
        lambda s: s.execute(
            update(Part).where(Part.number < 9).values(number=9),
            execution_options={"synchronize_session": "fetch"},
        )
    ),
    "orm update by key": _orm(
        lambda s: s.execute(update(Part), [{"id": 1, "number": 5}, {"id": 2, "number": 6}])
    ),
    "orm insert": _orm(lambda s: s.execute(insert(Part), [{"code": "a"}, {"code": "b"}])),
    "orm insert values": _orm(
        lambda s: s.execute(insert(Part).values([{"code": "a"}, {"code": "b"}]))
    ),
    "orm insert returning": _orm(
        lambda s: sorted(
            (part.id, part.code)
            for part in s.scalars(insert(Part).returning(Part), [{"code": "a"}, {"code": "b"}])
        )
    ),
    "orm delete": _orm(lambda s: s.execute(delete(Part).where(Part.code.like("c%")))),
    "query update": _orm(lambda s: s.query(Part).filter(Part.number == 1).update({"number": 3})),
    "query delete": _orm(lambda s: s.query(Part).filter(Part.number == 1).delete()),
    "mappings": _orm(lambda s: s.bulk_insert_mappings(Part, [{"code": "a"}, {"code": "b"}])),
}
RETURNING: dict[str, Statement] = {
    "update returning": lambda c: c.execute(
        parts.update().where(_few).values(number=9).returning(parts.c.code, parts.c.id)
    ),
    "update returning no key": lambda c: c.execute(
        parts.update().where(_few).values(number=9).returning(parts.c.code)
    ),
    "update returning nothing": lambda c: c.execute(
        parts.update().where(parts.c.id > 99).values(number=9).returning(parts.c.id)
    ),
    "delete returning": lambda c: c.execute(
        parts.delete().where(_few).returning(parts.c.id, (parts.c.number + 1).label("more"))
    ),
    "orm update returning": _orm(
        lambda s: (
            s.scalars(update(Part).where(Part.id < 3).values(number=9).returning(Part))
            .unique()
            .all()[0]
            .number
        )
    ),
}


def _seen(result: Any) -> dict[str, str]:
    """Return all that a caller can see of a result."""
    seen = {}
    names = [
        "returns_rows", "rowcount", "inserted_primary_key_rows", "returned_defaults",
        "returned_defaults_rows", "is_insert", "closed", "keys", "all", "first",
    ]  # fmt: skip
    if not getattr(getattr(result, "context", None), "executemany", False):
        # The DBAPI defines it for single rows; where it has none, asking closes the cursor.
        names += ["inserted_primary_key", "lastrowid"]
    for name in names:
        try:
            value = getattr(result, name)
            value = value() if callable(value) else value
            seen[name] = repr([tuple(v) for v in value] if isinstance(value, list) else value)
        except Exception as error:
            seen[name] = repr(error)[:80]
    return seen


def run(engine: Engine, statement: Statement, between: Callable[[], None]) -> Any:
    """Return what is seen of a statement, and the rows that it leaves."""
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            insert(Part), [{"code": f"c{number}", "number": number % 2} for number in range(1, 6)]
        )
    between()
    with engine.begin() as connection:
        result = statement(connection)
        seen = result if isinstance(result, dict | str) else _seen(result)
        rows = connection.execute(select(parts).order_by(parts.c.id)).all()
    return seen, rows


@pytest.mark.parametrize("name", [*CORE, *RETURNING])
def test_a_caller_sees_what_it_would_see_without_a_cache(database_url: URL, name: str) -> None:
    """Results, counts, keys and errors are the same, and the cache is right afterwards."""
    statement = CORE.get(name) or RETURNING[name]
    plain, attached = (create_engine(database_url, poolclass=NullPool) for _ in range(2))
    if name in RETURNING and not plain.dialect.update_returning:
        pytest.skip("no RETURNING here")
    without = run(plain, statement, lambda: None)
    with TableCache(attached, views=[Parts]) as cache:
        seen, rows = run(attached, statement, lambda: cache.load(Parts))
        assert rows == without[1]
        if isinstance(seen, dict):
            assert {k: v for k, v in seen.items() if v != without[0][k]} == {}
        assert seen == without[0]
        with cache.sessionmaker()() as session:
            records = session.range(Parts.by_number)
            assert session.last_read is not None
            assert session.last_read.kind == "hit"
        assert sorted(tuple(r._asdict().values()) for r in records) == [tuple(r) for r in rows]


def test_statements_on_other_tables_are_left_alone(sqlite_url: URL) -> None:
    """Nothing is added to a statement, and its result is not looked at, if no view follows it."""
    engine = create_engine(sqlite_url)
    Base.metadata.create_all(engine)
    returning = parts.update().values(number=2).returning(parts.c.id)
    with TableCache(engine, views=[Parts]) as cache:
        with engine.begin() as connection:
            connection.execute(insert(Part), [{"code": "a"}, {"code": "b"}])
            result = connection.execute(parts.update().values(number=1))  # nothing is loaded
            assert "RETURNING" not in result.context.statement
            own = connection.execute(returning)
            assert not own._soft_closed, "the caller's rows were fetched"
            assert sorted(own.scalars()) == [1, 2]
        cache.load(Parts)
        with engine.begin() as connection:
            own = connection.execute(returning.values(number=3))
            assert own._soft_closed, "they tell which rows to mark"
            assert sorted(own.scalars()) == [1, 2]
        with cache.sessionmaker()() as session:
            assert [r.number for r in session.range(Parts.by_number)] == [3, 3]
    engine.dispose()
