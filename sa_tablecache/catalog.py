"""What the database says of the tables behind a view: how values are stored, and what compares.

In: a plan and a connection. Out: a :class:`Catalog`, asked for once, when a view is first used: the
stored type and collation of every column, the types of what the database computes, and which other
relations are parts of the tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy import Connection, String, false, func, literal, select, sql, text

from .actions import Action, undeclared_actions
from .analysis import TableName, ViewPlan, table_label, table_name
from .asking import full_name, quoted, translated
from .comparison import Comparison, StoredColumn, comparison
from .exc import ViewDefinitionError
from .readers import EveryScope


@dataclass(frozen=True)
class Catalog:
    """What the database says of the tables of one view."""

    columns: dict[tuple[TableName, str], StoredColumn] = field(default_factory=dict)

    computed: dict[str, StoredColumn] = field(default_factory=dict)
    """What is known of the view's columns that are no columns of a table."""

    related: dict[TableName, TableName] = field(default_factory=dict)
    """Partitions, inheritance children, the parents of both, and database views, by name: whatever
    else a statement may name to write rows of a table; and which table that is."""

    at_once: frozenset[TableName] = frozenset()
    """Tables whose rows are visible when they are written, and stay: they have no transactions."""

    unfollowed: dict[TableName, str] = field(default_factory=dict)
    """Tables whose rows may get other keys than were sent, and why."""

    actions: frozenset[Action] = frozenset()
    """What foreign keys do to the tables, and no model declares."""

    def stored(self, plan: ViewPlan) -> dict[tuple[TableName, str], StoredColumn]:
        """Return how the columns that a view uses are stored."""
        used = [column.source for column in plan.columns + plan.hidden]
        keys = {
            (table_name(c.table), c.name) for c in (*used, *plan.compared_text) if c is not None
        }
        return {key: column for key, column in self.columns.items() if key in keys}

    def tells_apart(self, column: Any, dialect: Any) -> bool:
        """Whether equal text of a stored column is the same text."""
        table = column.table
        stored = self.columns.get(((table.schema, table.name), column.name), StoredColumn())
        return comparison(String(), dialect, stored).equality

    def comparison(self, plan: ViewPlan, name: str, connection_dialect: Any) -> Comparison:
        """Return how the values of a view's column compare."""
        column = plan.column(name)
        stored = self.computed.get(name)
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
           coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') AS builtin_locale,
           pg_encoding_to_char(d.encoding) AS encoding
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_collation co ON co.oid = a.attcollation
    JOIN pg_database d ON d.datname = current_database()
    WHERE c.oid = to_regclass(:name)
    """
)

_PG_TYPE = sql.table("pg_type", sql.column("oid"), sql.column("typname"), schema="pg_catalog")

_POSTGRESQL_RELATED = text(
    """
    WITH RECURSIVE below (oid) AS (
        SELECT to_regclass(:name)::oid
        UNION
        SELECT inhrelid FROM pg_inherits JOIN below ON inhparent = below.oid
    ), edge (written, reached) AS (
        SELECT inhparent, inhrelid FROM pg_inherits
        UNION
        SELECT r.ev_class, d.refobjid
        FROM pg_rewrite r
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
        WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class
    ), related (oid) AS (
        SELECT oid FROM below
        UNION
        SELECT edge.written FROM edge JOIN related ON edge.reached = related.oid
    )
    SELECT n.nspname AS schema, c.relname AS name
    FROM related
    JOIN pg_class c ON c.oid = related.oid
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid <> to_regclass(:name)
    """
)


_MYSQL_COLUMNS = text(
    """
    SELECT t.table_name, t.table_type AS kind, t.engine, c.column_name AS name,
           c.data_type AS type, c.collation_name AS collation
    FROM information_schema.tables t
    JOIN information_schema.columns c USING (table_schema, table_name)
    WHERE t.table_name = :name AND t.table_schema = coalesce(:schema, database())
    AND c.table_name = :name AND c.table_schema = coalesce(:schema, database())
    """
)

_MYSQL_VIEWS = text(
    """
    SELECT table_schema AS "schema", table_name AS name, view_definition AS definition
    FROM information_schema.views
    WHERE is_updatable = 'YES' AND table_schema NOT IN ('mysql', 'sys')
    """.replace('"', "`")
)

_MYSQL_TRANSACTIONAL = ("innodb", "rocksdb", "tokudb", "ndbcluster")
_MYSQL_AT_ONCE = ("myisam", "aria")
#: Others are empty after a restart, or show rows of other tables.

#: Collations of MariaDB and MySQL that compare code points, and pad nothing.
_MYSQL_BYTEWISE = ("utf8mb4_nopad_bin", "utf8mb4_0900_bin")

#: What the numbers of types mean in the protocol of MariaDB and MySQL.
_MYSQL_TYPES = {
    0: "decimal", 1: "tinyint", 2: "smallint", 3: "int", 4: "float", 5: "double", 7: "timestamp",
    8: "bigint", 9: "mediumint", 10: "date", 11: "time", 12: "datetime", 246: "decimal",
}  # fmt: skip


def probe(connection: Connection, plan: ViewPlan) -> Catalog:
    """Look up how the tables of a view are stored: one statement for each table.

    MariaDB and MySQL are asked for the mode of the session and for database views, too.
    A view with computed columns costs one more on PostgreSQL, MariaDB and MySQL.

    :raises ViewDefinitionError: if one of them is a database view, a foreign table, or under row
        security, so that a change of what the cache read could go unnoticed or a cached answer
        show what the reader may not see.
    """
    dialect = connection.dialect.name
    columns: dict[tuple[TableName, str], StoredColumn] = {}
    related: dict[TableName, TableName] = {}
    at_once: set[TableName] = set()
    unfollowed: dict[TableName, str] = {}
    if dialect == "postgresql":
        for table in sorted(plan.tables, key=table_label):
            columns.update(_probe_postgresql(connection, plan, table))
            for row in connection.execute(
                _POSTGRESQL_RELATED, {"name": full_name(connection, table)}
            ):
                related[row.schema, row.name] = table
    elif dialect == "sqlite":
        for table in sorted(plan.tables, key=table_label):
            columns.update(_probe_sqlite(connection, plan, table))
    elif dialect in ("mysql", "mariadb"):
        strict = "STRICT" in str(connection.scalar(text("SELECT @@sql_mode")))
        for table in sorted(plan.tables, key=table_label):
            engine = _probe_mysql(connection, plan, table, columns)
            if engine in _MYSQL_AT_ONCE:
                at_once.add(table)
                unfollowed[table] = f"{engine} has no transactions"
            elif not strict:
                unfollowed[table] = "without a strict sql_mode keys that do not fit are changed"
        related.update(_mysql_views(connection, plan))
    if dialect == "sqlite" or getattr(connection.dialect, "_casing", False):
        # Where capitals make no difference, a writer may leave them out.
        lower = {(schema, name.lower()): (schema, name) for schema, name in plan.tables}
        related |= {name: t for name, t in lower.items() if name not in plan.tables}
    # A writer may leave out the default schema where the view says it, and the other way round.
    default = "main" if dialect == "sqlite" else connection.dialect.default_schema_name
    for (schema, name), table in [*related.items(), *((t, t) for t in plan.tables)]:
        if schema == default and (None, name) not in plan.tables:
            related[None, name] = table
    computed = _computed(connection, plan)
    actions = undeclared_actions(connection, plan)
    return Catalog(columns, computed, related, frozenset(at_once), unfollowed, actions)


def _not_a_table(plan: ViewPlan, table: TableName, kind: str) -> ViewDefinitionError:
    return ViewDefinitionError(
        f"view {plan.name}: {table_label(table)} is a {kind}, so that changes of what feeds it "
        "would not be noticed; select from the tables behind it"
    )


def _probe_postgresql(
    connection: Connection, plan: ViewPlan, table: TableName
) -> Iterator[tuple[tuple[TableName, str], StoredColumn]]:
    name = full_name(connection, table)
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
            StoredColumn(
                row.type,
                row.deterministic is not False,
                # Other encodings order characters otherwise than by code points.
                bytewise and row.encoding == "UTF8",
                collation=row.collation,
            ),
        )


def _probe_mysql(
    connection: Connection,
    plan: ViewPlan,
    table: TableName,
    columns: dict[tuple[TableName, str], StoredColumn],
) -> str:
    """Add the columns of a table, and return the name of its storage engine."""
    schema, name = translated(connection, table)
    rows = connection.execute(_MYSQL_COLUMNS, {"name": name, "schema": schema}).all()
    # Where names are told apart by case, information_schema may not do so.
    rows = [row for row in rows if row.table_name == name] or rows
    declared = {c.name.lower(): c.name for c in _sources(plan, table)}
    engine = ""
    for row in rows:
        engine = str(row.engine).lower()
        if row.kind not in ("BASE TABLE", "SYSTEM VERSIONED"):
            raise _not_a_table(plan, table, str(row.kind).lower())
        if engine not in (*_MYSQL_TRANSACTIONAL, *_MYSQL_AT_ONCE):
            raise _not_a_table(plan, table, f"table of the engine {row.engine}")
        bytewise = row.collation in _MYSQL_BYTEWISE
        columns[table, declared.get(row.name.lower(), row.name)] = StoredColumn(
            row.type.lower(), bytewise, bytewise, collation=row.collation
        )
    return engine


def _mysql_views(connection: Connection, plan: ViewPlan) -> dict[TableName, TableName]:
    """Return the database views through which the tables of a view can be written."""
    default = str(connection.dialect.default_schema_name)
    quote = partial(quoted, connection, always=True)
    behind: dict[str, TableName] = {}
    for table in plan.tables:
        schema, name = translated(connection, table)
        behind[f"{quote(schema or default)}.{quote(name)}"] = table
    views = list(connection.execute(_MYSQL_VIEWS))
    found: dict[TableName, TableName] = {}
    while True:
        more = {
            (row.schema, row.name): table
            for row in views
            for known, table in behind.items()
            # Whoever may not see what a view shows, may not know that it shows something else.
            if (row.schema, row.name) not in found and known in (row.definition or known)
        }
        if not more:
            return found
        found |= more
        behind |= {f"{quote(schema)}.{quote(name)}": t for (schema, name), t in more.items()}


def _sources(plan: ViewPlan, table: TableName) -> list[Any]:
    """Return the columns of a table that a view selects, sorts by or compares."""
    sources = [column.source for column in plan.columns + plan.hidden]
    return [
        source
        for source in (*sources, *plan.compared_text)
        if source is not None and (source.table.schema, source.table.name) == table
    ]


def _probe_sqlite(
    connection: Connection, plan: ViewPlan, table: TableName
) -> Iterator[tuple[tuple[TableName, str], StoredColumn]]:
    schema, name = translated(connection, table)
    master = f"{quoted(connection, schema)}.sqlite_master" if schema else "sqlite_master"
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
    binary = all(collation.upper() == "BINARY" for collation in collations)
    # Text in UTF-16 is compared by its bytes, which is not the order of code points.
    bytewise = binary and connection.exec_driver_sql("PRAGMA encoding").scalar() == "UTF-8"
    for source in _sources(plan, table):
        written = source.server_default is not None or source.server_onupdate is not None
        yield (table, source.name), StoredColumn(None, binary, bytewise, written)


def _computed(connection: Connection, plan: ViewPlan) -> dict[str, StoredColumn]:
    """Return the types that the database gives to what it computes; no row is read."""
    clauses = [c.clause for c in plan.columns + plan.hidden if c.source is None]
    dialect = connection.dialect.name
    if not clauses or dialect == "sqlite":
        return {}
    everything = EveryScope(plan.view)
    if dialect == "postgresql":
        view = plan.view.__table__
        one = select(literal(1).label("one")).subquery()
        types = [
            select(_PG_TYPE.c.typname)
            .where(_PG_TYPE.c.oid == func.pg_typeof(clause))
            .scalar_subquery()
            for clause in clauses
        ]
        names = [
            *connection.execute(
                select(*types).select_from(one.outerjoin(view, false())).options(everything)
            ).one()
        ]
    else:
        with connection.execute(select(*clauses).limit(0).options(everything)) as result:
            description: Any = result.cursor.description
            names = [_MYSQL_TYPES.get(c[1], "text") for c in description]
    return {c.name: StoredColumn(name) for c, name in zip(clauses, names, strict=True)}
