"""Reading the database: snapshots, the catalog, and rows into records.

In: a plan and the criteria of what to read. Out: :class:`Rows`, records with their hidden values.

Every load and refresh runs in one read-only REPEATABLE READ transaction on a small pool of the
cache's own: on the application's pool it could starve behind the very readers that wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import (
    Boolean,
    Connection,
    Date,
    DateTime,
    Engine,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Time,
    Uuid,
    select,
    text,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import SingletonThreadPool, StaticPool
from sqlalchemy.sql import ColumnElement

from .analysis import TableName, ViewPlan, table_label, table_name
from .comparison import Comparison, StoredColumn, comparison
from .exc import UnsuitableEngine, ViewDefinitionError
from .readers import EveryScope

Progress = Callable[[int], object]
"""Called now and then during a load with the number of records read so far."""

PARTITION = 1_000
"""Rows fetched at a time: few enough to be made into records while they are in the CPU's cache."""

#: Marks a pooled connection as one of ours, for listeners that the pool was copied with.
READER = "sa_tablecache.reader"

_IMMUTABLE = (
    Boolean, Date, DateTime, Enum, Float, Integer, Interval, LargeBinary, Numeric, String, Time,
    Uuid,
)  # fmt: skip
_SHARED = (Date, DateTime, Enum, Float, Integer, LargeBinary, String, Time, Uuid)


class Snapshots:
    """Opens read-only snapshots of one database.

    :param engine: the application's engine; its connection settings are taken over.
    :param load_engine: an engine to use instead of a pool of the cache's own.
    :raises UnsuitableEngine: if all connections of the pool are one, so that a snapshot would
        show what others have not committed, and end their transaction.
    """

    def __init__(self, engine: Engine, load_engine: Engine | None = None) -> None:
        source = load_engine or engine
        database = source.url.database or ""
        in_memory = source.dialect.name == "sqlite" and (
            database in ("", ":memory:") or "mode=memory" in str(source.url)
        )
        if isinstance(source.pool, StaticPool | SingletonThreadPool) or in_memory:
            raise UnsuitableEngine(
                f"{source!r} shares one DBAPI connection ({type(source.pool).__name__}): a load "
                "through it would read uncommitted rows and end the application's transaction; "
                "use a database file (SQLite) or a QueuePool, or give load_engine= to the cache"
            )
        self._source = source
        self._owned = load_engine is None
        self._engine: Engine | None = None if load_engine is None else load_engine
        self.dialect = source.dialect

    @property
    def engine(self) -> Engine:
        """The engine to read through; a pool of the cache's own is made when it is first used.

        By then the application has added what it listens to, such as what sets a search_path.
        """
        if self._engine is None:
            source = self._source
            self._engine = Engine(source.pool.recreate(), source.dialect, source.url)
            self._engine.update_execution_options(**source.get_execution_options())
        return self._engine

    @contextmanager
    def open(self) -> Iterator[Connection]:
        """Open one snapshot. It emits BEGIN, and on a new PostgreSQL connection one SELECT.

        :raises UnsuitableEngine: if the server is a standby.
        """
        dialect = self.engine.dialect.name
        with self.engine.connect() as connection:
            if self._owned:  # a pool given to the cache may be the application's
                connection.info[READER] = True
            if dialect == "sqlite":
                connection = connection.execution_options()
                driver = cast("Any", connection.connection.driver_connection)
                if not driver.in_transaction:
                    connection.exec_driver_sql("BEGIN")
            else:
                options: dict[str, Any] = {"isolation_level": "REPEATABLE READ"}
                if dialect == "postgresql":
                    options["postgresql_readonly"] = True
                connection = connection.execution_options(**options)
                if dialect == "postgresql" and "sa_tablecache.primary" not in connection.info:
                    if connection.scalar(text("SELECT pg_is_in_recovery()")):
                        raise UnsuitableEngine(
                            f"{self.engine!r} is connected to a standby, which lags behind: a "
                            "cache reads the primary only"
                        )
                    connection.info["sa_tablecache.primary"] = True
            yield connection

    def nobody_writes(self) -> bool:
        """Whether no connection to an SQLite file has a writing transaction; does not wait."""
        with self.engine.connect() as connection:
            timeout = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
            connection.exec_driver_sql("PRAGMA busy_timeout = 0")
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            except OperationalError:
                return False
            finally:
                connection.rollback()
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {timeout}")
        return True

    def close(self) -> None:
        """Close the pool, if it is the cache's own."""
        if self._owned and self._engine is not None:
            self._engine.dispose()


@dataclass(frozen=True)
class Catalog:
    """What the database says of the tables of one view."""

    columns: dict[tuple[TableName, str], StoredColumn] = field(default_factory=dict)

    related: dict[TableName, TableName] = field(default_factory=dict)
    """Partitions, inheritance children and database views, by name, and a table behind each."""

    def stored(self, plan: ViewPlan) -> dict[tuple[TableName, str], StoredColumn]:
        """Return how the columns that a view uses are stored."""
        used = [column.source for column in plan.columns + plan.hidden]
        keys = {
            (table_name(c.table), c.name) for c in (*used, *plan.compared_text) if c is not None
        }
        return {key: column for key, column in self.columns.items() if key in keys}

    def tells_apart(self, column: Any, dialect: Any) -> bool:
        """Whether equal text of a stored column is the same text."""
        if column.type.collation is not None:
            return False
        table = column.table
        stored = self.columns.get(((table.schema, table.name), column.name), StoredColumn())
        return comparison(String(), dialect, stored).equality

    def comparison(self, plan: ViewPlan, name: str, connection_dialect: Any) -> Comparison:
        """Return how the values of a view's column compare."""
        column = plan.column(name)
        stored = None
        if column.source is not None:
            table = column.source.table
            stored = self.columns.get(
                ((table.schema, table.name), column.source.name), StoredColumn()
            )
        return comparison(column.clause.type, connection_dialect, stored)


_POSTGRESQL_COLUMNS = text(
    """
    SELECT c.relkind::text AS kind, c.relrowsecurity AS row_security, a.attname AS column,
           t.typname AS type, co.collname AS collation, co.collprovider::text AS provider,
           co.collcollate AS locale, co.collisdeterministic AS deterministic,
           to_jsonb(d) ->> 'datlocprovider' AS database_provider, d.datcollate AS database_locale,
           coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') AS builtin_locale
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_collation co ON co.oid = a.attcollation
    JOIN pg_database d ON d.datname = current_database()
    WHERE c.oid = to_regclass(:name)
    """
)


_POSTGRESQL_RELATED = text(
    """
    WITH RECURSIVE edge (parent, child) AS (
        SELECT inhparent, inhrelid FROM pg_inherits
        UNION
        SELECT d.refobjid, r.ev_class
        FROM pg_rewrite r
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
        WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class
    ), related (oid) AS (
        SELECT to_regclass(:name)::oid
        UNION
        SELECT edge.child FROM edge JOIN related ON edge.parent = related.oid
    )
    SELECT n.nspname AS schema, c.relname AS name
    FROM related
    JOIN pg_class c ON c.oid = related.oid
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid <> to_regclass(:name)
    """
)


def probe(connection: Connection, plan: ViewPlan) -> Catalog:
    """Look up how the tables of a view are stored: one statement for each table.

    :raises ViewDefinitionError: if one of them is a database view, a foreign table, or under row
        security, so that a change of what the cache read could go unnoticed or a cached answer
        show what the reader may not see.
    """
    dialect = connection.dialect.name
    columns: dict[tuple[TableName, str], StoredColumn] = {}
    related: dict[TableName, TableName] = {}
    if dialect == "postgresql":
        for table in sorted(plan.tables, key=table_label):
            columns.update(_probe_postgresql(connection, plan, table))
            for row in connection.execute(
                _POSTGRESQL_RELATED, {"name": _postgresql_name(connection, table)}
            ):
                related[row.schema, row.name] = table
    elif dialect == "sqlite":
        for table in sorted(plan.tables, key=table_label):
            columns.update(_probe_sqlite(connection, plan, table))
    elif dialect in ("mysql", "mariadb"):
        for table in sorted(plan.tables, key=table_label):
            kind = connection.scalar(
                text(
                    "SELECT table_type FROM information_schema.tables "
                    "WHERE table_name = :name AND table_schema = coalesce(:schema, database())"
                ),
                {"name": table[1], "schema": _translated(connection, table)[0]},
            )
            if kind is not None and kind != "BASE TABLE":
                raise _not_a_table(plan, table, str(kind).lower())
    # A writer may leave out the default schema where the view says it, and the other way round.
    default = "main" if dialect == "sqlite" else connection.dialect.default_schema_name
    for (schema, name), table in [*related.items(), *((t, t) for t in plan.tables)]:
        if schema == default and (None, name) not in plan.tables:
            related[None, name] = table
    return Catalog(columns, related)


def _translated(connection: Connection, table: TableName) -> TableName:
    """Return a table's name after ``schema_translate_map``."""
    translate = connection.get_execution_options().get("schema_translate_map") or {}
    return translate.get(table[0], table[0]), table[1]


def _not_a_table(plan: ViewPlan, table: TableName, kind: str) -> ViewDefinitionError:
    return ViewDefinitionError(
        f"view {plan.name}: {table_label(table)} is a {kind}, so that changes of what feeds it "
        "would not be noticed; select from the tables behind it"
    )


def _postgresql_name(connection: Connection, table: TableName) -> str:
    quote = connection.dialect.identifier_preparer.quote
    return ".".join(quote(part) for part in _translated(connection, table) if part)


def _probe_postgresql(
    connection: Connection, plan: ViewPlan, table: TableName
) -> Iterator[tuple[tuple[TableName, str], StoredColumn]]:
    name = _postgresql_name(connection, table)
    kinds = {"v": "view", "m": "materialized view", "f": "foreign table"}
    for row in connection.execute(_POSTGRESQL_COLUMNS, {"name": name}):
        if row.kind in kinds:
            raise _not_a_table(plan, table, kinds[row.kind])
        if row.row_security and plan.view.__row_security__ != "ignore":
            raise ViewDefinitionError(
                f"view {plan.name}: {table_label(table)} is under row-level security, which a "
                "cache shared by all cannot apply; say __row_security__ = 'ignore' if every "
                "reader of the view may see every row of it"
            )
        provider, locale = row.provider, row.locale
        if row.collation == "default":
            provider = row.database_provider or "c"
            locale = row.builtin_locale if provider == "b" else row.database_locale
        bytewise = row.collation in ("C", "POSIX", "ucs_basic", "pg_c_utf8") or (
            provider in ("c", "b") and str(locale).lower() in ("c", "posix", "c.utf-8", "c.utf8")
        )
        yield (
            (table, row.column),
            StoredColumn(row.type, row.deterministic is not False, bytewise),
        )


def _probe_sqlite(
    connection: Connection, plan: ViewPlan, table: TableName
) -> Iterator[tuple[tuple[TableName, str], StoredColumn]]:
    schema, name = _translated(connection, table)
    quote = connection.dialect.identifier_preparer.quote
    master = f"{quote(schema)}.sqlite_master" if schema else "sqlite_master"
    row = connection.exec_driver_sql(
        f"SELECT type, sql FROM {master} WHERE lower(name) = lower(?)",
        (name,),
    ).first()
    if row is None:
        return
    if row[0] != "table" or re.match(r"\s*CREATE\s+VIRTUAL", row[1] or "", re.IGNORECASE):
        raise _not_a_table(plan, table, row[0] if row[0] != "table" else "virtual table")
    collations = re.findall(r"\bCOLLATE\s+\W?(\w+)", row[1] or "", re.IGNORECASE)
    # Which column a COLLATE belongs to is the database's to parse: one makes all text coarse.
    bytewise = all(collation.upper() == "BINARY" for collation in collations)
    sources = [column.source for column in plan.columns + plan.hidden]
    for source in (*sources, *plan.compared_text):
        if source is not None and (source.table.schema, source.table.name) == table:
            written = source.server_default is not None or source.server_onupdate is not None
            yield (table, source.name), StoredColumn(None, bytewise, bytewise, written)


@dataclass(slots=True)
class Rows:
    """Records, and beside each its hidden values if the view keeps any."""

    records: list[Any] = field(default_factory=list)
    hidden: list[tuple[Any, ...]] | None = None

    def pairs(self) -> list[tuple[Any, tuple[Any, ...] | None]]:
        """Return the records with their hidden values."""
        if self.hidden is None:
            return [(record, None) for record in self.records]
        return list(zip(self.records, self.hidden, strict=True))


class Loader:
    """Reads records of one view.

    Equal values of a column are shared between records: that makes a record of the flights view
    three times smaller. Each column has a pool of its own, since ``1 == 1.0 == True``; one that
    turns out not to repeat itself is given up.
    """

    def __init__(
        self, plan: ViewPlan, hidden: Sequence[str], comparisons: dict[str, Comparison]
    ) -> None:
        self.plan = plan
        self.hidden = tuple(hidden)
        self.columns = (*(c.name for c in plan.columns), *self.hidden)
        self.clauses = tuple(plan.column(name).clause for name in self.columns)
        self.mutable = tuple(
            c.name for c in plan.columns if not isinstance(c.clause.type, _IMMUTABLE)
        )
        """Columns whose values a reader could change; copied for each reader."""
        self._normalise = [
            comparisons[name].normalise if name in comparisons else None for name in self.columns
        ]
        self._makers: dict[tuple[bool, ...], Callable[..., None]] = {}

    def statement(self, *criteria: ColumnElement[bool]) -> Any:
        """Return the SELECT that reads the records that meet the criteria."""
        return select(*self.clauses).where(*criteria).options(EveryScope(self.plan.view))

    def read(
        self,
        connection: Connection,
        criteria: Sequence[ColumnElement[bool]],
        *,
        stream: bool = False,
        progress: Progress | None = None,
    ) -> Rows:
        """Read records: one SELECT; ``stream`` for many, in parts of 1,000 rows."""
        rows = Rows(hidden=[] if self.hidden else None)
        statement = self.statement(*criteria)
        if not stream:
            self._add(rows, connection.execute(statement).all(), None)
            return rows
        pools: list[dict[Any, Any] | None] = [
            {} if isinstance(clause.type, _SHARED) else None for clause in self.clauses
        ]
        options = {"yield_per": PARTITION}
        with connection.execution_options(**options).execute(statement) as result:
            for partition in result.partitions():
                self._add(rows, partition, pools)
                for at, pool in enumerate(pools):
                    if pool is not None and len(pool) * 2 > len(rows.records):
                        pools[at] = None
                if progress is not None:
                    progress(len(rows.records))
        return rows

    def _add(
        self, rows: Rows, batch: Sequence[Any], pools: list[dict[Any, Any] | None] | None
    ) -> None:
        shared = tuple(pool is not None for pool in pools or [None] * len(self.columns))
        maker = self._makers.get(shared)
        if maker is None:
            maker = self._makers[shared] = self._maker(shared)
        maker(
            batch,
            rows.records.append,
            rows.hidden.append if rows.hidden is not None else None,
            *(pool.setdefault for pool in pools or () if pool is not None),
        )

    def _maker(self, shared: tuple[bool, ...]) -> Callable[..., None]:
        """Generate the loop that turns rows into records: it is most of the cost of a load."""
        names = [f"v{at}" for at in range(len(self.columns))]
        public = len(self.plan.columns)
        pools = [f"share{at}" for at, used in enumerate(shared) if used]
        body: list[str] = []
        for at, name in enumerate(names):
            if self._normalise[at] is not None:
                body.append(f"{name} = normalise{at}({name})")
            if not shared[at]:
                continue
            if isinstance(self.clauses[at].type, Float):
                # Neither 0.0 and -0.0, which are equal, nor a NaN may be exchanged.
                body.append(f"if {name} and {name} == {name}: {name} = share{at}({name}, {name})")
            else:
                body.append(f"{name} = share{at}({name}, {name})")
        body.append(f"add(Record({', '.join(names[:public])}))")
        if self.hidden:
            body.append(f"add_hidden(({', '.join(names[public:])},))")
        source = (
            f"def make(batch, add, add_hidden, {', '.join(pools)}):\n"
            f"    for {', '.join(names)}, in batch:\n        " + "\n        ".join(body)
        )
        scope: dict[str, Any] = {
            "Record": self.plan.view.__record__,
            **{f"normalise{at}": f for at, f in enumerate(self._normalise) if f is not None},
        }
        exec(source, scope)  # noqa: S102 - built from numbers and our own words only
        return cast("Callable[..., None]", scope["make"])
