"""A seeded random writer over the models of the zoo, which knows every way to write.

A *write* changes some rows inside the transaction that it is given; a *shell* opens a transaction
of some kind, runs a few writes in it and ends it in its own way. ``Writer.step()`` combines them
at random; what it did is in ``Writer.log``. Errors of the database (a duplicate key, a missing
parent) are part of the game: they end the transaction like a rollback.
"""

from collections.abc import Callable
from random import Random
from typing import Any

from sqlalchemy import (
    JSON,
    BindParameter,
    Column,
    Connection,
    Engine,
    Executable,
    bindparam,
    delete,
    false,
    func,
    insert,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import CompileError, IntegrityError, OperationalError
from sqlalchemy.orm import Session, class_mapper
from sqlalchemy.sql import visitors

from tests.integration.rows import COUNTS, NAN, Rows, Values, columns_by_table
from tests.zoo import (
    FAMILIES,
    Airline,
    Airport,
    Base,
    Bin,
    Code,
    Contractor,
    Customer,
    DayPlan,
    DepotCrate,
    Flight,
    Item,
    Manager,
    Order,
    Person,
    Plane,
    Sample,
    Tag,
    Weather,
    person_tag,
)

Model = type[Base]
Observer = Callable[[Session | Connection], None]

PARENTS: dict[Model, dict[str, Model]] = {
    Flight: {"carrier": Airline, "tailnum": Plane, "origin": Airport, "dest": Airport},
    Person: {"boss_id": Person},
    Contractor: {"boss_id": Manager},
    Order: {"customer_id": Customer},
    Item: {"order_id": Order},
    DepotCrate: {"bin_key": Bin},
    Code: {"sample_id": Sample},
}
"""The foreign keys that can be moved to another parent."""

MOVABLE_KEYS = (Airline, Weather, DayPlan, Code)
"""The models whose primary key may change."""


class Writer:
    """Writes at random.

    :param engine: where Core connections come from.
    :param factory: makes the sessions, for instance `cache.sessionmaker()`.
    :param family: the family of models that is written.
    :param observe: called inside each transaction after its writes, with what it was written
        through.
    """

    def __init__(
        self,
        engine: Engine,
        factory: Callable[..., Session],
        family: str,
        seed: int,
        observe: Observer = lambda _: None,
    ) -> None:
        self.rng = Random(seed)
        self.engine = engine
        self.factory = factory
        self.family = family
        self.models: list[Model] = list(FAMILIES[family])
        self.rows = Rows(self.rng, engine.dialect.name)
        self.observe = observe
        self.log: list[str] = []

    def step(self) -> None:
        """Run one transaction of a random kind, or one that replaces rows that are gone."""
        with self.engine.connect() as connection:
            scarce = [model for model in self.models if self._is_scarce(connection, model)]
        if scarce:
            writes = self.rng.choices([add, orm_insert, core_insert, core_insert_many], k=4)
            return self.run(session_commit, *writes, models=tuple(scarce[:1]))
        self.run(self.rng.choice(sorted(self.shells(), key=lambda shell: shell.__name__)))
        return None

    def run(
        self,
        shell: Callable[..., None],
        *writes: Callable[..., None],
        models: tuple[Model, ...] = (),
    ) -> None:
        """Run one transaction of this kind, with these writes or random ones."""
        self.log.append(f"{shell.__name__}:")
        models = models or tuple(self.models)
        connection_only = shell in CONNECTION_SHELLS

        def some(target: Session | Connection) -> None:
            count = len(writes) or self.rng.choice([1, 1, 2, 3])
            for number in range(count):
                known = CONNECTION_WRITES if connection_only else CONNECTION_WRITES + SESSION_WRITES
                write = writes[number] if writes else self.rng.choice(known)
                model = self.rng.choice(models)
                self.log.append(f"  {write.__name__}({model.__name__})")
                if isinstance(target, Session):
                    target.expire_all()
                if isinstance(target, Session) and write in CONNECTION_WRITES:
                    target.flush()
                    write(self, target.connection(), model)
                    target.expire_all()
                else:
                    write(self, target, model)
                if isinstance(target, Session):
                    target.flush()
            if shell is not raw_connection:
                self.observe(target)

        driver: Any = self.engine.dialect.loaded_dbapi
        try:
            shell(self, some)
        except (IntegrityError, driver.IntegrityError, _Intended) as error:
            self.log.append(f"  -> {type(error).__name__}")
        except OperationalError as error:
            # What MariaDB says where others say that a column must not be NULL.
            if error.orig is None or error.orig.args[0] != 1364:
                raise
            self.log.append(f"  -> {error.orig}")

    def shells(self) -> list[Callable[..., None]]:
        """Return the kinds of transactions that the database has."""
        known = [*SESSION_SHELLS, *CONNECTION_SHELLS]
        if self.engine.dialect.name == "sqlite":
            known.remove(two_phase)
        return known

    def _is_scarce(self, connection: Connection, model: Model) -> bool:
        count = connection.execute(select(func.count()).select_from(model)).scalar_one()
        return count < COUNTS.get(model, 9) // 3

    def criterion(self, connection: Connection, model: Model) -> Any:
        """Return a criterion that some rows meet: by key, by another column, or none at all."""
        mapper = class_mapper(model)
        table = mapper.local_table
        names = [
            attribute.key
            for attribute in mapper.column_attrs
            for column in attribute.columns[:1]
            if column.table is table
            and not column.primary_key
            and not isinstance(column.type, JSON)  # PostgreSQL cannot compare it
        ]
        names = [name for name in names if name in self.rows.values(connection, model)]
        if self.rng.random() < 0.3 and names:
            name = self.rng.choice(names)
            column = mapper.columns[name]
            value = self.rows.values(connection, model).get(name)
            return column.is_(None) if value is None else column == value
        keys = {self.rows.key(connection, model) for _ in range(self.rng.choice([1, 1, 3]))}
        columns = list(table.primary_key)
        return or_(
            false(),
            *(
                tuple_(*columns) == key if len(columns) > 1 else columns[0] == key[0]
                for key in sorted(keys - {None}, key=repr)
            ),
        )


class _Intended(Exception):
    """Raised by the application inside a transaction."""


# --- writes through a connection ------------------------------------------------------------------


def _table_and_values(
    writer: Writer, connection: Connection, model: Model
) -> tuple[Any, dict[Column[Any], Any]]:
    """Return one table of the model with one or two columns and their new values."""
    values: Values = {}
    while not values:
        values = writer.rows.some(connection, model)
        if model is Manager:
            values.setdefault("budget", 5)
    parts = [
        (table, {c: v for c, v in columns.items() if not c.primary_key and c.key != "kind"})
        for table, columns in columns_by_table(model, values)
    ]
    table, columns = writer.rng.choice([part for part in parts if part[1]])
    return table, columns


def core_insert(writer: Writer, connection: Connection, model: Model) -> None:
    """`INSERT` of one row."""
    for table, columns in _new(writer, connection, model):
        connection.execute(table.insert().values(columns))


def core_insert_many(writer: Writer, connection: Connection, model: Model) -> None:
    """`executemany` of INSERT."""
    rows: dict[Any, list[Values]] = {}
    for _ in range(3):
        for table, columns in _new(writer, connection, model):
            keyed = {column.key: value for column, value in columns.items()}
            rows.setdefault(table, []).append(keyed)
    for table, several in rows.items():
        key = [column.key for column in table.primary_key]
        distinct = {tuple(str(row[k]).lower() for k in key): row for row in several}
        connection.execute(table.insert(), list(distinct.values()))


def core_update(writer: Writer, connection: Connection, model: Model) -> None:
    """`UPDATE` with some criterion."""
    table, values = _table_and_values(writer, connection, model)
    criterion = _criterion_on(writer, connection, model, table)
    connection.execute(table.update().where(criterion).values(values))


def core_update_returning(writer: Writer, connection: Connection, model: Model) -> None:
    """`UPDATE .. RETURNING` of something that is not the key."""
    if connection.dialect.name == "mysql":  # has no such thing
        return core_update(writer, connection, model)
    table, values = _table_and_values(writer, connection, model)
    criterion = _criterion_on(writer, connection, model, table)
    statement = table.update().where(criterion).values(values).returning(next(iter(values)))
    connection.execute(statement).all()
    return None


def core_update_many(writer: Writer, connection: Connection, model: Model) -> None:
    """`executemany` of UPDATE."""
    table, values = _table_and_values(writer, connection, model)
    keys = sorted({writer.rows.key(connection, model) for _ in range(3)} - {None}, key=repr)
    primary = list(table.primary_key)
    statement = (
        table.update()
        .where(*(column == bindparam(f"key_{at}") for at, column in enumerate(primary)))
        .values({column: bindparam(f"value_{at}") for at, column in enumerate(values)})
    )
    new = {f"value_{at}": value for at, value in enumerate(values.values())}
    if keys:
        connection.execute(
            statement, [{**{f"key_{at}": k for at, k in enumerate(key)}, **new} for key in keys]
        )


def core_delete(writer: Writer, connection: Connection, model: Model) -> None:
    """`DELETE`, with the actions of the foreign keys that refer to the rows."""
    criterion = _key_criterion(writer, connection, model)
    if criterion is not None:
        table = class_mapper(model).base_mapper.local_table
        connection.execute(table.delete().where(criterion))


def core_delete_many(writer: Writer, connection: Connection, model: Model) -> None:
    """`executemany` of DELETE."""
    table = class_mapper(model).base_mapper.local_table
    primary = list(table.primary_key)
    keys = sorted({writer.rows.key(connection, model) for _ in range(2)} - {None}, key=repr)
    if keys:
        statement = table.delete().where(
            *(column == bindparam(f"key_{at}") for at, column in enumerate(primary))
        )
        connection.execute(
            statement, [{f"key_{at}": k for at, k in enumerate(key)} for key in keys]
        )


def core_new_key(writer: Writer, connection: Connection, model: Model) -> None:
    """`UPDATE` of a primary key, followed by the foreign keys that cascade."""
    if model not in MOVABLE_KEYS:
        return core_update(writer, connection, model)
    table = class_mapper(model).local_table
    criterion = _key_criterion(writer, connection, model)
    new = columns_by_table(model, writer.rows.new_key(connection, model))[0][1]
    if criterion is not None:
        connection.execute(table.update().where(criterion).values(new))
    return None


def insert_from_select(writer: Writer, connection: Connection, model: Model) -> None:
    """`INSERT .. SELECT` of a copy of some row under another key."""
    if class_mapper(model).inherits:
        return core_insert(writer, connection, model)
    new = _new(writer, connection, model)
    key = writer.rows.key(connection, model)
    if not new or key is None:
        return None
    ((table, columns),) = new
    source = table.alias("source")
    primary = list(table.primary_key)
    # Unique columns cannot be copied either.
    fresh = {c: v for c, v in columns.items() if c.primary_key or c.unique}
    others = [column for column in table.columns if column not in fresh]
    statement = table.insert().from_select(
        [column.key for column in (*fresh, *others)],
        select(
            *(bindparam(None, value, type_=column.type) for column, value in fresh.items()),
            *(source.c[column.key] for column in others),
        ).where(*(source.c[c.key] == value for c, value in zip(primary, key, strict=True))),
    )
    connection.execute(statement)
    return None


def update_from(writer: Writer, connection: Connection, model: Model) -> None:
    """`UPDATE .. WHERE` with a subquery over another table."""
    table, values = _table_and_values(writer, connection, model)
    other = class_mapper(writer.rng.choice(writer.models)).base_mapper.local_table
    exists = select(1).select_from(other.alias("other")).exists()
    criterion = _criterion_on(writer, connection, model, table)
    connection.execute(table.update().where(criterion, exists).values(values))


def upsert(writer: Writer, connection: Connection, model: Model) -> None:
    """`INSERT .. ON CONFLICT DO UPDATE`, or `ON DUPLICATE KEY UPDATE`."""
    values = writer.rows.row(connection, model)
    if values is None or class_mapper(model).inherits:
        return core_update(writer, connection, model)
    ((table, columns),) = columns_by_table(model, values)
    updated = {c.name: v for c, v in columns.items() if not (c.primary_key or c.name == "kind")}
    if connection.dialect.name == "mysql":
        connection.execute(mysql.insert(table).values(columns).on_duplicate_key_update(updated))
        return None
    dialect = {"sqlite": sqlite, "postgresql": postgresql}[connection.dialect.name]
    connection.execute(
        dialect.insert(table)
        .values(columns)
        .on_conflict_do_update(index_elements=list(table.primary_key), set_=updated)
    )
    return None


def dml_in_cte(writer: Writer, connection: Connection, model: Model) -> None:
    """DML inside a CTE of a SELECT, where the database can."""
    table, values = _table_and_values(writer, connection, model)
    criterion = _criterion_on(writer, connection, model, table)
    statement = table.update().where(criterion).values(values)
    if connection.dialect.name in ("sqlite", "mysql"):
        connection.execute(statement)
    else:
        changed = statement.returning(*table.primary_key).cte("changed")
        connection.execute(select(changed)).all()


def text_update(writer: Writer, connection: Connection, model: Model) -> None:
    """`text()` with an UPDATE."""
    table, values = _table_and_values(writer, connection, model)
    criterion = _criterion_on(writer, connection, model, table)
    _as_text(connection, table.update().where(criterion).values(values))


def text_delete(writer: Writer, connection: Connection, model: Model) -> None:
    """`text()` with a DELETE."""
    criterion = _key_criterion(writer, connection, model)
    if criterion is not None:
        table = class_mapper(model).base_mapper.local_table
        _as_text(connection, table.delete().where(criterion))


def driver_sql(writer: Writer, connection: Connection, model: Model) -> None:
    """`exec_driver_sql` with an UPDATE."""
    table, values = _table_and_values(writer, connection, model)
    criterion = _criterion_on(writer, connection, model, table)
    sql = literal_sql(connection, table.update().where(criterion).values(values))
    if sql is not None:
        connection.exec_driver_sql(sql)


def link_insert(writer: Writer, connection: Connection, model: Model) -> None:
    """`INSERT` of a many-to-many link."""
    if writer.family != "staff":
        return core_insert(writer, connection, model)
    person, tag = writer.rows.one(connection, Person), writer.rows.one(connection, Tag)
    connection.execute(person_tag.insert().values(person_id=person, tag_id=tag))
    return None


def link_delete(writer: Writer, connection: Connection, model: Model) -> None:
    """`DELETE` of many-to-many links."""
    if writer.family != "staff":
        return core_delete(writer, connection, model)
    person = writer.rows.one(connection, Person)
    connection.execute(person_tag.delete().where(person_tag.c.person_id == person))
    return None


_NO_LITERAL = (float("inf"), NAN)


def literal_sql(connection: Connection, statement: Executable) -> str | None:
    """Return the SQL of a statement with its values in it; None where a value has no literal."""
    try:
        compiled = statement.compile(  # type: ignore[attr-defined]
            dialect=connection.dialect, compile_kwargs={"literal_binds": True}
        )
    except (CompileError, NotImplementedError):
        return None
    values = [p.value for p in visitors.iterate(statement) if isinstance(p, BindParameter)]
    return None if any(isinstance(v, bytes) or v in _NO_LITERAL for v in values) else str(compiled)


def _unescaped(connection: Connection, sql: str) -> str:
    """Undo the escapes that a driver wants where it looks for placeholders."""
    escapes = connection.dialect.paramstyle in {"format", "pyformat"}
    return sql.replace("%%", "%") if escapes else sql


def _as_text(connection: Connection, statement: Executable) -> None:
    sql = literal_sql(connection, statement)
    if sql is not None:
        connection.execute(text(_unescaped(connection, sql).replace(":", "\\:")))


def _new(
    writer: Writer, connection: Connection, model: Model
) -> list[tuple[Any, dict[Column[Any], Any]]]:
    values = writer.rows.row(connection, model)
    return columns_by_table(model, values) if values else []


def _key_criterion(writer: Writer, connection: Connection, model: Model) -> Any:
    key = writer.rows.key(connection, model)
    primary = list(class_mapper(model).base_mapper.local_table.primary_key)
    if key is None:
        return None
    return tuple_(*primary) == key if len(primary) > 1 else primary[0] == key[0]


def _criterion_on(writer: Writer, connection: Connection, model: Model, table: Any) -> Any:
    if table is class_mapper(model).local_table:
        return writer.criterion(connection, model)
    return list(table.primary_key)[0] == writer.rows.one(connection, model)  # noqa: RUF015


# --- writes through a session ---------------------------------------------------------------------


def add(writer: Writer, session: Session, model: Model) -> None:
    """`session.add` of a new object."""
    values = writer.rows.row(session.connection(), model)
    if values is not None and session.get(_root(model), _identity(model, values)) is None:
        session.add(model(**values))


def modify(writer: Writer, session: Session, model: Model) -> None:
    """Setting attributes of a loaded object."""
    row = _loaded(writer, session, model)
    if row is not None:
        for name, value in writer.rows.some(session.connection(), type(row)).items():
            setattr(row, name, value)


def remove(writer: Writer, session: Session, model: Model) -> None:
    """`session.delete` of a loaded object."""
    row = _loaded(writer, session, model)
    if row is not None:
        session.delete(row)


def add_and_remove(writer: Writer, session: Session, model: Model) -> None:
    """A row that lives only inside the transaction."""
    values = writer.rows.row(session.connection(), model)
    if values is not None and session.get(_root(model), _identity(model, values)) is None:
        row = model(**values)
        session.add(row)
        session.flush()
        session.delete(row)


def new_key(writer: Writer, session: Session, model: Model) -> None:
    """Setting the primary key of a loaded object."""
    row = _loaded(writer, session, model) if model in MOVABLE_KEYS else None
    if row is not None:
        for name, value in writer.rows.new_key(session.connection(), model).items():
            setattr(row, name, value)


def move_expired(writer: Writer, session: Session, model: Model) -> None:
    """Setting a foreign key of an expired object, whose history lacks the old value."""
    model = writer.rng.choice([known for known in PARENTS if known in writer.models] or [model])
    row = _loaded(writer, session, model)
    for name, parent in PARENTS.get(model, {}).items():
        target = writer.rows.one(session.connection(), parent)
        if row is not None and target is not None and writer.rng.random() < 0.7:
            session.expire(row)
            setattr(row, name, target)


def relate(writer: Writer, session: Session, model: Model) -> None:
    """Changing relationships: many-to-one, one-to-many and many-to-many."""
    rng = writer.rng

    def some(of: Model) -> Any:
        return _loaded(writer, session, of)

    match writer.family:
        case "sky":
            flight, plane, airline = some(Flight), some(Plane), some(Airline)
            if flight is not None:
                flight.plane = rng.choice([None, plane])
                flight.airline = airline or flight.airline
        case "staff":
            person, boss, tag = some(Person), some(Person), some(Tag)
            if person is not None:
                person.boss = rng.choice([None, boss])
            if person is not None and tag is not None:
                match rng.choice(["append", "remove", "replace"]):
                    case "append" if tag not in person.tags:
                        person.tags.append(tag)
                    case "remove" if person.tags:
                        person.tags.remove(rng.choice(person.tags))
                    case _:
                        person.tags = [tag]
        case "shop":
            customer, order = some(Customer), some(Order)
            if customer is not None and order is not None:
                customer.orders.append(order)
            if order is not None and order.items and rng.random() < 0.4:
                order.items.remove(rng.choice(order.items))
        case _:
            modify(writer, session, model)


def merge(writer: Writer, session: Session, model: Model) -> None:
    """`session.merge` of an object that may exist."""
    values = writer.rows.row(session.connection(), model)
    if values is None:
        return
    existing = session.get(_root(model), _identity(model, values))
    if existing is None or type(existing) is model:
        session.merge(model(**values))


def orm_insert(writer: Writer, session: Session, model: Model) -> None:
    """`session.execute(insert(Model))`, with one row or several, with RETURNING or without."""
    rows: dict[Any, Values] = {}
    for _ in range(2):
        values = writer.rows.row(session.connection(), model)
        if values and session.get(_root(model), _identity(model, values)) is None:
            rows[tuple(str(value).lower() for value in _identity(model, values))] = values
    if not rows:
        return
    statement = insert(model)
    if writer.rng.random() < 0.5 and not class_mapper(model).inherits:
        session.execute(statement.values(next(iter(rows.values()))))
    elif writer.rng.random() < 0.3:
        session.scalars(statement.returning(model), list(rows.values())).all()
    else:
        session.execute(statement, list(rows.values()))


def orm_update(writer: Writer, session: Session, model: Model) -> None:
    """`session.execute(update(Model).where())`."""
    connection = session.connection()
    _, values = _table_and_values(writer, connection, model)
    table = class_mapper(model).local_table
    names = {
        attribute.key: values[column]
        for attribute in class_mapper(model).column_attrs
        for column in attribute.columns
        if column in values and column.table is table
    }
    if names:
        session.execute(
            update(model).where(writer.criterion(connection, model)).values(names),
            execution_options={"synchronize_session": writer.rng.choice([False, "fetch"])},
        )


def orm_update_by_key(writer: Writer, session: Session, model: Model) -> None:
    """`session.execute(update(Model), [..])` and `bulk_update_mappings`."""
    key = writer.rows.key(session.connection(), model)
    if key is not None and type(session.get(_root(model), key)) is model:
        names = [attribute.key for attribute in _key_attributes(model)]
        mapping = {
            **dict(zip(names, key, strict=True)),
            **writer.rows.some(session.connection(), model),
        }
        if writer.rng.random() < 0.5:
            session.execute(update(model), [mapping])
        else:
            session.bulk_update_mappings(class_mapper(model), [mapping])


def orm_delete(writer: Writer, session: Session, model: Model) -> None:
    """`session.execute(delete(Model).where())`."""
    criterion = _key_criterion(writer, session.connection(), model)
    if criterion is not None:
        session.execute(
            delete(_root(model)).where(criterion),
            execution_options={"synchronize_session": writer.rng.choice([False, "fetch"])},
        )


def legacy_update(writer: Writer, session: Session, model: Model) -> None:
    """`session.query(Model).update()` and `.delete()`."""
    criterion = _key_criterion(writer, session.connection(), model)
    if criterion is None:
        return
    query = session.query(_root(model)).filter(criterion)
    if writer.rng.random() < 0.3:
        query.delete(synchronize_session=False)
    else:
        values = writer.rows.some(session.connection(), _root(model))
        if values:
            query.update(dict(values), synchronize_session=False)


def bulk_insert(writer: Writer, session: Session, model: Model) -> None:
    """`bulk_insert_mappings` and `bulk_save_objects`."""
    values = writer.rows.row(session.connection(), model)
    if values is None or session.get(_root(model), _identity(model, values)) is not None:
        return
    if writer.rng.random() < 0.5:
        session.bulk_insert_mappings(class_mapper(model), [values])
    else:
        session.bulk_save_objects([model(**values)])


def session_text(writer: Writer, session: Session, model: Model) -> None:
    """`session.execute(text())` with bound values."""
    table, values = _table_and_values(writer, session.connection(), model)
    column, value = next(iter(values.items()))
    key = writer.rows.key(session.connection(), model)
    if key is None:
        return
    quote = session.connection().dialect.identifier_preparer

    def name(of: Column[Any]) -> str:
        return _unescaped(session.connection(), quote.format_column(of)).replace(":", "\\:")

    where = " AND ".join(f"{name(c)} = :key_{at}" for at, c in enumerate(table.primary_key))
    sql = f"UPDATE {quote.format_table(table)} SET {name(column)} = :value WHERE {where}"
    statement = text(sql)
    statement = statement.bindparams(
        bindparam("value", value, type_=column.type),
        *(
            bindparam(f"key_{at}", part, type_=c.type)
            for at, (c, part) in enumerate(zip(table.primary_key, key, strict=True))
        ),
    )
    session.execute(statement)


def _root(model: Model) -> Any:
    return class_mapper(model).base_mapper.class_


def _key_attributes(model: Model) -> list[Any]:
    mapper = class_mapper(model)
    return [mapper.get_property_by_column(column) for column in mapper.primary_key]


def _identity(model: Model, values: Values) -> tuple[Any, ...]:
    return tuple(values[attribute.key] for attribute in _key_attributes(model))


def _loaded(writer: Writer, session: Session, model: Model) -> Any:
    key = writer.rows.key(session.connection(), model)
    return None if key is None else session.get(_root(model), key)


# --- shells around a session ----------------------------------------------------------------------

Work = Callable[[Session | Connection], None]


def session_commit(writer: Writer, work: Work) -> None:
    """Commit."""
    with writer.factory() as session:
        work(session)
        session.commit()


def session_begin(writer: Writer, work: Work) -> None:
    """The context manager of a transaction."""
    with writer.factory() as session, session.begin():
        work(session)


def session_twice(writer: Writer, work: Work) -> None:
    """Two transactions of one session, the first of them rolled back."""
    with writer.factory() as session:
        work(session)
        session.rollback()
        work(session)
        session.commit()


def session_rollback(writer: Writer, work: Work) -> None:
    """Roll back."""
    with writer.factory() as session:
        work(session)
        session.rollback()


def session_close(writer: Writer, work: Work) -> None:
    """Close without commit."""
    with writer.factory() as session:
        work(session)


def session_error(writer: Writer, work: Work) -> None:
    """An exception of the application."""
    with writer.factory() as session, session.begin():
        work(session)
        raise _Intended


def savepoint_released(writer: Writer, work: Work) -> None:
    """A savepoint that is released, with writes around it."""
    with writer.factory() as session:
        if writer.rng.random() < 0.5:
            work(session)
        with session.begin_nested():
            work(session)
        work(session)
        _commit_or_roll_back(writer, session)


def savepoint_rolled_back(writer: Writer, work: Work) -> None:
    """A savepoint that is rolled back, with writes around it."""
    with writer.factory() as session:
        if writer.rng.random() < 0.5:
            work(session)
        savepoint = session.begin_nested()
        work(session)
        if writer.rng.random() < 0.3:
            with session.begin_nested():
                work(session)
        savepoint.rollback()
        work(session)
        _commit_or_roll_back(writer, session)


def session_autocommit(writer: Writer, work: Work) -> None:
    """A session on a connection in AUTOCOMMIT mode."""
    with writer.factory() as session:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        work(session)
        if writer.rng.random() < 0.5:
            session.commit()


def session_joined(writer: Writer, work: Work) -> None:
    """A session that joins the transaction of a connection, whose end decides."""
    mode = writer.rng.choice(["conditional_savepoint", "rollback_only", "create_savepoint"])
    with writer.engine.connect() as connection:
        transaction = connection.begin()
        with writer.factory(bind=connection, join_transaction_mode=mode) as session:
            work(session)
            _commit_or_roll_back(writer, session)
        if transaction.is_active:
            if writer.rng.random() < 0.6:
                transaction.commit()
            else:
                transaction.rollback()


def two_phase(writer: Writer, work: Work) -> None:
    """A prepared transaction."""
    with writer.factory(twophase=True) as session:
        work(session)
        session.prepare()
        _commit_or_roll_back(writer, session)


def _commit_or_roll_back(writer: Writer, session: Session) -> None:
    if writer.rng.random() < 0.8:
        session.commit()
    else:
        session.rollback()


# --- shells around a connection -------------------------------------------------------------------


def engine_begin(writer: Writer, work: Work) -> None:
    """`engine.begin()`."""
    with writer.engine.begin() as connection:
        work(connection)


def engine_commit(writer: Writer, work: Work) -> None:
    """`connection.commit()`, twice on one connection."""
    with writer.engine.connect() as connection:
        work(connection)
        connection.commit()
        work(connection)
        connection.commit()


def engine_rollback(writer: Writer, work: Work) -> None:
    """A connection that is rolled back or closed without commit."""
    with writer.engine.connect() as connection:
        work(connection)
        if writer.rng.random() < 0.5:
            connection.rollback()


def engine_savepoints(writer: Writer, work: Work) -> None:
    """Savepoints of a connection, some rolled back."""
    with writer.engine.connect() as connection:
        if writer.rng.random() < 0.5:
            work(connection)
        for _ in range(2):
            savepoint = connection.begin_nested()
            work(connection)
            if writer.rng.random() < 0.5:
                savepoint.commit()
            else:
                savepoint.rollback()
        if writer.rng.random() < 0.8:
            connection.commit()


def engine_autocommit(writer: Writer, work: Work) -> None:
    """An AUTOCOMMIT connection that is closed without commit."""
    if writer.rng.random() < 0.5:
        engine = writer.engine.execution_options(isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            work(connection)
    else:
        with writer.engine.connect() as connection:
            work(connection.execution_options(isolation_level="AUTOCOMMIT"))


def raw_connection(writer: Writer, work: Work) -> None:
    """A connection of the driver, borrowed from the pool."""
    model = writer.rng.choice(writer.models)
    with writer.engine.connect() as connection:
        table, values = _table_and_values(writer, connection, model)
        criterion = _criterion_on(writer, connection, model, table)
        sql = literal_sql(connection, table.update().where(criterion).values(values))
        sql = sql and _unescaped(connection, sql)
    if sql is None:
        return
    raw = writer.engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute(sql)
        cursor.close()
        if writer.rng.random() < 0.8:
            raw.commit()
    finally:
        raw.close()


CONNECTION_WRITES: list[Callable[..., None]] = [
    core_insert,
    core_insert_many,
    core_update,
    core_update_returning,
    core_update_many,
    core_delete,
    core_delete_many,
    core_new_key,
    insert_from_select,
    update_from,
    upsert,
    dml_in_cte,
    text_update,
    text_delete,
    driver_sql,
    link_insert,
    link_delete,
]
SESSION_WRITES: list[Callable[..., None]] = [
    add,
    add,
    modify,
    modify,
    remove,
    add_and_remove,
    new_key,
    move_expired,
    relate,
    relate,
    merge,
    orm_insert,
    orm_update,
    orm_update_by_key,
    orm_delete,
    legacy_update,
    bulk_insert,
    session_text,
]
SESSION_SHELLS: list[Callable[..., None]] = [
    session_commit,
    session_begin,
    session_twice,
    session_rollback,
    session_close,
    session_error,
    savepoint_released,
    savepoint_rolled_back,
    session_autocommit,
    session_joined,
    two_phase,
]
CONNECTION_SHELLS: list[Callable[..., None]] = [
    engine_begin,
    engine_commit,
    engine_rollback,
    engine_savepoints,
    engine_autocommit,
    raw_connection,
]
