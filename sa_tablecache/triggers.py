"""What a database does by itself when a row is written: triggers, rules, generated columns.

In: a connection and a view's plan. Out: for each base table, what of that its catalog names. An
UPDATE of a table that has any may change columns that it does not set. What triggers write into
other tables nobody can see: the application says it, with ``cache.side_effects()``.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text

from .analysis import TableName, ViewPlan, table_label
from .asking import full_name, quoted, translated

OURS: Final = "sa_tablecache"
"""What the names of triggers of this package begin with: they change no row of a table."""

_POSTGRESQL: Final = text(
    """
    WITH RECURSIVE tables AS (
        SELECT to_regclass(:name)::oid AS oid
        UNION SELECT inhrelid FROM pg_inherits JOIN tables ON inhparent = tables.oid
    )
    SELECT tgname::text AS name, true AS acts FROM pg_trigger JOIN tables ON tgrelid = tables.oid
    WHERE NOT tgisinternal
    UNION
    SELECT rulename::text, NULL FROM pg_rewrite JOIN tables ON ev_class = tables.oid
    WHERE rulename <> '_RETURN'
    UNION
    SELECT attname::text, false FROM pg_attribute JOIN tables ON attrelid = tables.oid
    WHERE attgenerated <> '' AND NOT attisdropped
    """
)
_MYSQL: Final = text(
    """
    SELECT trigger_name AS name, true AS acts FROM information_schema.triggers
    WHERE event_object_table = :table AND event_object_schema = coalesce(:schema, database())
    UNION
    SELECT column_name, false FROM information_schema.columns
    WHERE table_name = :table AND table_schema = coalesce(:schema, database())
    AND (lower(extra) LIKE '%on update%' OR lower(extra) LIKE '%generated%')
    """
)


@dataclass(frozen=True, slots=True)
class Automatic:
    """What a table does by itself when a row of it is written."""

    triggers: frozenset[str] = frozenset()
    """Triggers and rules, which may write other tables too."""
    rules: frozenset[str] = frozenset()
    """Those of them that are rules, which have a statement do something else."""
    columns: frozenset[str] = frozenset()
    """Columns that the database computes."""

    def __bool__(self) -> bool:
        return bool(self.triggers or self.columns)


def unexplained(
    found: Mapping[TableName, Automatic], explained: Container[TableName]
) -> Iterator[str]:
    """Say of which tables nobody said what their triggers write."""
    for name, what in sorted(found.items(), key=str):
        if what.triggers and name not in explained:
            yield (
                f"{table_label(name)} has triggers or rules, {', '.join(sorted(what.triggers))}, "
                "and what they write is not seen: say it with cache.side_effects(Model, "
                "writes=[...]), empty if they write no table of a view"
            )


def acting(automatic: Mapping[TableName, Automatic]) -> frozenset[str]:
    """Return the names of the tables that have triggers or rules."""
    return frozenset(name for (_, name), what in automatic.items() if what.triggers)


def automatic(connection: Connection, plan: ViewPlan) -> dict[TableName, Automatic]:
    """Return what the base tables of a view do by themselves: one statement for each table."""
    found = {table: _automatic(connection, table) for table in sorted(plan.tables, key=str)}
    return {table: what for table, what in found.items() if what}


def _automatic(connection: Connection, table: TableName) -> Automatic:
    schema, name = translated(connection, table)
    rows: list[tuple[str, bool | None]] = []
    match connection.dialect.name:
        case "postgresql":
            label = {"name": full_name(connection, table)}
            rows = [(r.name, r.acts) for r in connection.execute(_POSTGRESQL, label)]
        case "mysql" | "mariadb":
            given = {"table": name, "schema": schema}
            rows = [(r.name, bool(r.acts)) for r in connection.execute(_MYSQL, given)]
        case "sqlite":
            prefix = f"{quoted(connection, schema)}." if schema else ""
            for (trigger,) in connection.exec_driver_sql(
                f"SELECT name FROM {prefix}sqlite_master "
                "WHERE type = 'trigger' AND lower(tbl_name) = lower(?)",
                (name,),
            ):
                rows.append((trigger, True))
            for column in connection.exec_driver_sql(
                f"PRAGMA {prefix}table_xinfo({quoted(connection, name)})"
            ):
                if column[6] in (2, 3):
                    rows.append((column[1], False))
    return Automatic(
        frozenset(n for n, acts in rows if acts is not False and not n.startswith(OURS)),
        frozenset(n for n, acts in rows if acts is None),
        frozenset(n for n, acts in rows if acts is False),
    )
