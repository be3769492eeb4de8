"""Every way to write a given row, and every way to end a transaction.

A *path* puts given values into a given row. A *shell* opens a transaction, has its work done in it
and commits; many also do work that is undone, in the same rows, with values that no answer may
ever show.
"""

from collections.abc import Callable
from random import Random
from typing import Any, TypeAlias

from sqlalchemy import Connection, Engine, Integer, bindparam, delete, insert, select, text, update
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import Session, class_mapper

from tests.stress.world import Account, Mirror, Owner

Values: TypeAlias = dict[str, Any]
Target: TypeAlias = Session | Connection

UNDONE = -1
"""The version of what is rolled back: no answer may show it."""


class Undone(Exception):
    """Raised by the application inside a transaction that is to be rolled back."""


# -- paths: one row ----------------------------------------------------------------------------


def orm_set(session: Session, model: Any, key: int, values: Values) -> None:
    """Set attributes of a loaded object."""
    row = session.get_one(model, key)
    for name, value in values.items():
        setattr(row, name, value)


def orm_set_expired(session: Session, model: Any, key: int, values: Values) -> None:
    """Set attributes of an expired object, whose history lacks the old values."""
    row = session.get_one(model, key)
    session.expire(row)
    for name, value in values.items():
        setattr(row, name, value)


def orm_relate(session: Session, model: Any, key: int, values: Values) -> None:
    """Set the owner by its relationship, which is a post_update."""
    values = dict(values)
    row = session.get_one(model, key)
    if "owner_id" in values:
        number = values.pop("owner_id")
        row.owner = None if number is None else session.get_one(Owner, number)
    for name, value in values.items():
        setattr(row, name, value)


def orm_merge(session: Session, model: Any, key: int, values: Values) -> None:
    """`session.merge`."""
    session.merge(model(id=key, **values))


def orm_update(session: Session, model: Any, key: int, values: Values) -> None:
    """`session.execute(update(Model).where())`."""
    session.execute(update(model).where(model.id == key).values(values))


def orm_update_by_key(session: Session, model: Any, key: int, values: Values) -> None:
    """`session.execute(update(Model), [..])`."""
    session.execute(update(model), [{"id": key, **values}])


def bulk_update(session: Session, model: Any, key: int, values: Values) -> None:
    """`bulk_update_mappings`."""
    session.bulk_update_mappings(class_mapper(model), [{"id": key, **values}])


def query_update(session: Session, model: Any, key: int, values: Values) -> None:
    """`session.query(Model).update()`."""
    session.query(model).filter(model.id == key).update(dict(values), synchronize_session=False)


def core_update(connection: Connection, model: Any, key: int, values: Values) -> None:
    """`UPDATE` by key."""
    connection.execute(update(model.__table__).where(model.id == key).values(values))


def core_update_between(connection: Connection, model: Any, key: int, values: Values) -> None:
    """`UPDATE` with a criterion from which no key can be read."""
    criterion = model.id.between(key, key)
    connection.execute(update(model.__table__).where(criterion).values(values))


def core_update_returning(connection: Connection, model: Any, key: int, values: Values) -> None:
    """`UPDATE .. RETURNING` of something that is not the key."""
    statement = update(model.__table__).where(model.id.between(key, key)).values(values)
    if connection.dialect.update_returning:
        connection.execute(statement.returning(model.version)).all()
    else:
        connection.execute(statement)


def core_update_many(connection: Connection, model: Any, key: int, values: Values) -> None:
    """`executemany` of UPDATE."""
    statement = (
        update(model.__table__)
        .where(model.id == bindparam("old_id"))
        .values({name: bindparam(f"new_{name}") for name in values})
    )
    new = {f"new_{name}": value for name, value in values.items()}
    connection.execute(statement, [{"old_id": key, **new}, {"old_id": -1, **new}])


def core_upsert(connection: Connection, model: Any, key: int, values: Values) -> None:
    """`INSERT .. ON CONFLICT DO UPDATE` of a row that exists."""
    table = model.__table__
    row = connection.execute(select(table).where(table.c.id == key)).one()._asdict() | values
    if row["id"] != key:
        core_update(connection, model, key, values)
    elif connection.dialect.name in ("mysql", "mariadb"):
        statement = mysql.insert(table).values(row)
        connection.execute(statement.on_duplicate_key_update(**values))
    else:
        dialect = {"sqlite": sqlite, "postgresql": postgresql}[connection.dialect.name]
        statement = dialect.insert(table).values(row)
        connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))


def core_cte(connection: Connection, model: Any, key: int, values: Values) -> None:
    """`UPDATE` inside a CTE, where the database can."""
    statement = update(model.__table__).where(model.id == key).values(values)
    if connection.dialect.name == "postgresql":
        connection.execute(select(statement.returning(model.id).cte("changed"))).all()
    else:
        connection.execute(statement)


def text_update(connection: Connection, model: Any, key: int, values: Values) -> None:
    """`text()`."""
    columns = ", ".join(f"{name} = :{name}_" for name in values)
    statement = text(f"UPDATE {model.__tablename__} SET {columns} WHERE id = :key_")
    parameters = {f"{name}_": value for name, value in values.items()}
    connection.execute(statement, {"key_": key, **parameters})


def driver_update(connection: Connection, model: Any, key: int, values: Values) -> None:
    """`exec_driver_sql`."""
    connection.exec_driver_sql(update_sql(model, key, values))


def core_insert(connection: Connection, model: Any, values: Values) -> None:
    """`INSERT`."""
    connection.execute(insert(model.__table__).values(values))


def core_insert_many(connection: Connection, model: Any, values: Values) -> None:
    """`executemany` of INSERT."""
    connection.execute(insert(model.__table__), [values])


def core_insert_from_select(connection: Connection, model: Any, values: Values) -> None:
    """`INSERT .. SELECT`."""
    columns = [bindparam(None, value, type_=Integer()) for value in values.values()]
    connection.execute(insert(model.__table__).from_select(list(values), select(*columns)))


def text_insert(connection: Connection, model: Any, values: Values) -> None:
    """`text()`."""
    names = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    connection.execute(
        text(f"INSERT INTO {model.__tablename__} ({names}) VALUES ({places})"), values
    )


def orm_add(session: Session, model: Any, values: Values) -> None:
    """`session.add`."""
    session.add(model(**values))
    session.flush()


def orm_insert(session: Session, model: Any, values: Values) -> None:
    """`session.execute(insert(Model))`."""
    session.execute(insert(model), [values])


def bulk_insert(session: Session, model: Any, values: Values) -> None:
    """`bulk_insert_mappings`."""
    session.bulk_insert_mappings(class_mapper(model), [values])


def bulk_save(session: Session, model: Any, values: Values) -> None:
    """`bulk_save_objects`."""
    session.bulk_save_objects([model(**values)])


def core_delete(connection: Connection, model: Any, key: int) -> None:
    """`DELETE`."""
    connection.execute(delete(model.__table__).where(model.id == key))


def core_delete_many(connection: Connection, model: Any, key: int) -> None:
    """`executemany` of DELETE."""
    statement = delete(model.__table__).where(model.id == bindparam("key_"))
    connection.execute(statement, [{"key_": key}, {"key_": -1}])


def text_delete(connection: Connection, model: Any, key: int) -> None:
    """`text()`."""
    connection.execute(text(f"DELETE FROM {model.__tablename__} WHERE id = :key_"), {"key_": key})


def orm_remove(session: Session, model: Any, key: int) -> None:
    """`session.delete`."""
    session.delete(session.get_one(model, key))
    session.flush()


def orm_delete(session: Session, model: Any, key: int) -> None:
    """`session.execute(delete(Model).where())`."""
    session.execute(delete(model).where(model.id == key))


def query_delete(session: Session, model: Any, key: int) -> None:
    """`session.query(Model).delete()`."""
    session.query(model).filter(model.id == key).delete(synchronize_session=False)


def _literal(value: Any) -> str:
    return "NULL" if value is None else str(value)


def update_sql(model: Any, key: int, values: Values) -> str:
    """Return an UPDATE with its values in it."""
    columns = ", ".join(f"{name} = {_literal(value)}" for name, value in values.items())
    return f"UPDATE {model.__tablename__} SET {columns} WHERE id = {key}"


def insert_sql(model: Any, values: Values) -> str:
    """Return an INSERT with its values in it."""
    places = ", ".join(map(_literal, values.values()))
    return f"INSERT INTO {model.__tablename__} ({', '.join(values)}) VALUES ({places})"


def delete_sql(model: Any, key: int) -> str:
    """Return a DELETE by key."""
    return f"DELETE FROM {model.__tablename__} WHERE id = {key}"


Path = Callable[..., None]

UPDATES: tuple[tuple[Path, ...], tuple[Path, ...]] = (
    (
        core_update,
        core_update_between,
        core_update_returning,
        core_update_many,
        core_upsert,
        core_cte,
        text_update,
        driver_update,
    ),
    (
        orm_set,
        orm_set_expired,
        orm_relate,
        orm_merge,
        orm_update,
        orm_update_by_key,
        bulk_update,
        query_update,
    ),
)
INSERTS: tuple[tuple[Path, ...], tuple[Path, ...]] = (
    (core_insert, core_insert_many, core_insert_from_select, text_insert),
    (orm_add, orm_insert, bulk_insert, bulk_save),
)
DELETES: tuple[tuple[Path, ...], tuple[Path, ...]] = (
    (core_delete, core_delete_many, text_delete),
    (orm_remove, orm_delete, query_delete),
)
"""Paths through a connection, and through a session; text is chosen as seldom as any other."""

BY_OLD_KEY = (orm_merge, orm_update_by_key, bulk_update)
"""Paths that cannot give a row another key."""


class Hand:
    """Writes rows by paths that it chooses at random, and says which.

    :param note: called with a description of each write.
    """

    def __init__(self, rng: Random, note: Callable[[str], None]) -> None:
        self.rng = rng
        self.note = note

    def update(self, target: Target, model: Any, key: int, **values: Any) -> None:
        """Give a row other values."""
        known = UPDATES if values.get("id", key) == key else _with_new_keys()
        self._take(known, target, model, key, values)

    def insert(self, target: Target, model: Any, **values: Any) -> None:
        """Insert a row."""
        self._take(INSERTS, target, model, values)

    def delete(self, target: Target, model: Any, key: int) -> None:
        """Delete a row."""
        self._take(DELETES, target, model, key)

    def _take(
        self, known: tuple[tuple[Path, ...], tuple[Path, ...]], target: Target, *what: Any
    ) -> None:
        by_connection, by_session = known
        if isinstance(target, Connection) or self.rng.random() < 0.4:
            path = self.rng.choice(by_connection)
        else:
            path = self.rng.choice(by_session)
        self.note(f"    {path.__name__} {what[0].__name__} {what[1:]}")
        if isinstance(target, Session):
            target.flush()
            target.expire_all()
            path(target.connection() if path in by_connection else target, *what)
            target.flush()
            target.expire_all()
        else:
            path(target, *what)


def _with_new_keys() -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    by_connection, by_session = UPDATES
    return by_connection, tuple(path for path in by_session if path not in BY_OLD_KEY)


def spoil(hand: Hand, target: Target, names: list[int]) -> None:
    """Write what will be rolled back: no answer may ever show it."""
    keys = target.scalars(select(Account.id).where(Account.name.in_(names))).all()
    for key in keys:
        match hand.rng.choice(["update", "move", "delete"]):
            case "update":
                hand.update(target, Account, key, version=UNDONE)
                hand.update(target, Mirror, key, version=UNDONE)
            case "move":
                hand.update(target, Account, key, version=UNDONE, score=UNDONE, owner_id=None)
            case _:
                hand.delete(target, Account, key)
    if hand.rng.random() < 0.3:
        key = hand.rng.randint(1_000_000, 2_000_000)
        values = {"version": UNDONE, "score": 0, "amount": 99, "peer": 1, "owner_id": None}
        hand.insert(target, Account, id=key, name=UNDONE, **values)
        hand.insert(target, Mirror, id=key, version=UNDONE)


# -- shells: one transaction -------------------------------------------------------------------

Work: TypeAlias = Callable[[Target], None]


class Job:
    """What a shell does: work to commit, work to undo, and whom to tell.

    :param work: writes what is to be committed.
    :param undone: writes what is rolled back.
    :param commits: called right before COMMIT is sent.
    :param connected: called with each connection before it writes.
    :param sql: the work as SQL.
    """

    def __init__(
        self,
        engine: Engine,
        factory: Callable[..., Session],
        rng: Random,
        work: Work,
        undone: Work,
        commits: Callable[[], None],
        connected: Callable[[Connection], None],
        sql: Callable[[], list[str]],
    ) -> None:
        self.engine, self.factory, self.rng = engine, factory, rng
        self.work, self.undone, self.sql = work, undone, sql
        self.commits, self.connected = commits, connected


def session_commit(job: Job) -> None:
    """A session that commits."""
    with job.factory() as session:
        job.connected(session.connection())
        job.work(session)
        job.commits()
        session.commit()


def session_begin(job: Job) -> None:
    """The context manager of a transaction."""
    with job.factory() as session, session.begin():
        job.connected(session.connection())
        job.work(session)
        job.commits()


def session_twice(job: Job) -> None:
    """A transaction that is rolled back, and then one that is not."""
    with job.factory() as session:
        job.connected(session.connection())
        job.undone(session)
        session.rollback()
        job.connected(session.connection())
        job.work(session)
        job.commits()
        session.commit()


def savepoints(job: Job) -> None:
    """Savepoints in any nesting: what is undone in one of them, another writes again."""
    with job.factory() as session:
        job.connected(session.connection())
        if job.rng.random() < 0.5:
            with session.begin_nested():
                job.work(session)
            savepoint = session.begin_nested()
            with session.begin_nested():
                job.undone(session)
            savepoint.rollback()
        else:
            savepoint = session.begin_nested()
            job.undone(session)
            savepoint.rollback()
            with session.begin_nested():
                inner = session.begin_nested()
                job.undone(session)
                inner.rollback()
                job.work(session)
        job.commits()
        session.commit()


def joined(job: Job) -> None:
    """A session that joins the transaction of a connection, which decides."""
    mode = job.rng.choice(["conditional_savepoint", "rollback_only", "create_savepoint"])
    with job.engine.connect() as connection:
        job.connected(connection)
        transaction = connection.begin()
        with job.factory(bind=connection, join_transaction_mode=mode) as session:
            job.work(session)
            session.commit()
        job.commits()
        transaction.commit()


def two_sessions(job: Job) -> None:
    """Two sessions on one connection: one is rolled back to its savepoint, one is not."""
    with job.engine.connect() as connection:
        job.connected(connection)
        transaction = connection.begin()
        mode = "create_savepoint"
        with job.factory(bind=connection, join_transaction_mode=mode) as first:
            job.undone(first)
            first.rollback()
            with job.factory(bind=connection, join_transaction_mode=mode) as second:
                job.work(second)
                second.commit()
        job.commits()
        transaction.commit()


def two_phase(job: Job) -> None:
    """A prepared transaction."""
    with job.factory(twophase=True) as session:
        job.connected(session.connection())
        job.work(session)
        session.prepare()
        job.commits()
        session.commit()


def engine_begin(job: Job) -> None:
    """`engine.begin()`."""
    with job.engine.begin() as connection:
        job.connected(connection)
        job.work(connection)
        job.commits()


def engine_savepoints(job: Job) -> None:
    """Savepoints of a connection, around the work or before it."""
    with job.engine.connect() as connection:
        job.connected(connection)
        before = job.rng.random() < 0.5
        if before:
            job.work(connection)
        savepoint = connection.begin_nested()
        job.undone(connection)
        savepoint.rollback()
        if not before:
            with connection.begin_nested():
                job.work(connection)
        job.commits()
        connection.commit()


def raw_connection(job: Job) -> None:
    """A connection of the driver, borrowed from the pool."""
    raw = job.engine.raw_connection()
    job.connected(raw)
    try:
        cursor = raw.cursor()
        for sql in job.sql():
            cursor.execute(sql)
        cursor.close()
        job.commits()
        raw.commit()
    except BaseException as error:
        if not isinstance(error, Exception):
            # Cancelled. Unlike a Connection it does not know that its state is unknown: the pool
            # would keep an open transaction, and lend it to others.
            raw.invalidate(error)
        raise
    finally:
        raw.close()


def autocommit(job: Job) -> None:
    """A connection in AUTOCOMMIT mode, closed without commit: each statement is a transaction."""
    with job.engine.connect() as connection:
        job.connected(connection)
        job.commits()
        job.work(connection.execution_options(isolation_level="AUTOCOMMIT"))


def session_autocommit(job: Job) -> None:
    """A session on a connection in AUTOCOMMIT mode, closed without commit."""
    with job.factory() as session:
        job.connected(session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}))
        job.commits()
        job.work(session)


def rolled_back(job: Job) -> None:
    """A session that is rolled back."""
    with job.factory() as session:
        job.undone(session)
        session.rollback()


def closed(job: Job) -> None:
    """A session that is closed without commit."""
    with job.factory() as session:
        job.undone(session)


def failed(job: Job) -> None:
    """An exception of the application."""
    with job.factory() as session, session.begin():
        job.undone(session)
        raise Undone


def joined_and_rolled_back(job: Job) -> None:
    """A session that commits, in an outer transaction that does not."""
    with job.engine.connect() as connection:
        transaction = connection.begin()
        with job.factory(bind=connection) as session:
            job.undone(session)
            session.commit()
        transaction.rollback()


def prepared_and_rolled_back(job: Job) -> None:
    """A prepared transaction that is rolled back."""
    with job.factory(twophase=True) as session:
        job.undone(session)
        session.prepare()
        session.rollback()


Shell = Callable[[Job], None]

SHELLS: tuple[Shell, ...] = (
    session_commit,
    session_begin,
    session_twice,
    savepoints,
    joined,
    two_sessions,
    engine_begin,
    engine_savepoints,
    raw_connection,
)
OF_ONE_STATEMENT: tuple[Shell, ...] = (autocommit, session_autocommit)
UNDOING: tuple[Shell, ...] = (rolled_back, closed, failed, joined_and_rolled_back)
