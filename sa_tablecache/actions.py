"""Foreign keys of the database that change tables of a view, and of which the models do not know.

In: a connection and a view's plan. Out: for each such foreign key with ON DELETE or ON UPDATE, on a
table of the view or on one that it follows from, which table's rows act on which. Those that the
models declare are followed more exactly, by each statement: see ``cascades.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Table, text
from sqlalchemy.sql import visitors

from .analysis import TableName, ViewPlan
from .asking import full_name, quoted, translated


@dataclass(frozen=True, slots=True)
class Action:
    """What one foreign key does to its table when a row that it refers to is gone, or changed."""

    parent: TableName
    child: TableName
    columns: frozenset[str] | None
    """For ON UPDATE, the names of the columns that it refers to; ``None`` for ON DELETE."""


_POSTGRESQL: Final = text(
    """
    WITH RECURSIVE action AS (
        SELECT * FROM pg_constraint
        WHERE contype = 'f' AND (confdeltype NOT IN ('a', 'r') OR confupdtype NOT IN ('a', 'r'))
    ), change (follows, changed) AS (
        SELECT conrelid, confrelid FROM action
        UNION
        SELECT inhparent, inhrelid FROM pg_inherits
    ), children (oid) AS (
        SELECT to_regclass(:name)::oid
        UNION
        SELECT changed FROM change JOIN children ON follows = children.oid
    ), edge (written, reached) AS (
        SELECT inhparent, inhrelid FROM pg_inherits
        UNION
        SELECT r.ev_class, d.refobjid
        FROM pg_rewrite r
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
        WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class
    ), parents (oid, written) AS (
        SELECT confrelid, confrelid FROM action JOIN children ON conrelid = children.oid
        UNION
        SELECT parents.oid, edge.written FROM parents JOIN edge ON edge.reached = parents.written
    )
    SELECT cn.nspname AS child_schema, child.relname AS child,
           pn.nspname AS parent_schema, parent.relname AS parent,
           c.confdeltype NOT IN ('a', 'r') AS deletes, c.confupdtype NOT IN ('a', 'r') AS updates,
           (SELECT array_agg(a.attname::text) FROM pg_attribute a
            WHERE a.attrelid = c.confrelid AND a.attnum = ANY (c.confkey)) AS columns
    FROM action c
    JOIN children ON c.conrelid = children.oid
    JOIN parents ON parents.oid = c.confrelid
    JOIN pg_class child ON child.oid = c.conrelid
    JOIN pg_namespace cn ON cn.oid = child.relnamespace
    JOIN pg_class parent ON parent.oid = parents.written
    JOIN pg_namespace pn ON pn.oid = parent.relnamespace
    -- A key that a partition has from its parent does what the parent's does.
    WHERE NOT EXISTS (
        SELECT FROM action whole JOIN children ON whole.conrelid = children.oid
        WHERE whole.oid = c.conparentid AND whole.conrelid <> c.conrelid
    )
    """
)
_MYSQL: Final = text(
    """
    SELECT r.unique_constraint_schema, r.referenced_table_name, r.delete_rule, r.update_rule,
           group_concat(k.referenced_column_name)
    FROM information_schema.referential_constraints r
    JOIN information_schema.key_column_usage k
      ON k.constraint_name = r.constraint_name
    WHERE r.table_name = :table AND r.constraint_schema = coalesce(:schema, database())
    AND k.table_name = :table AND k.table_schema = coalesce(:schema, database())
    GROUP BY r.constraint_schema, r.constraint_name, r.unique_constraint_schema,
             r.referenced_table_name, r.delete_rule, r.update_rule
    """
)
_NOTHING: Final = ("NO ACTION", "RESTRICT")


def undeclared_actions(connection: Connection, plan: ViewPlan) -> frozenset[Action]:
    """Return the actions of foreign keys on a view's tables that no model declares.

    One statement for each table of the view on PostgreSQL; elsewhere also for those that they
    refer to.
    """
    declared = _declared(plan)
    found = _postgresql if connection.dialect.name == "postgresql" else _others
    return frozenset(
        action
        for action in found(connection, plan)
        if (action.parent[1], action.child[1], action.columns is None) not in declared
    )


def _declared(plan: ViewPlan) -> set[tuple[str, str, bool]]:
    """Return parent, child, and whether ON DELETE is meant, of what the models declare."""
    tables = {e for e in visitors.iterate(plan.statement) if isinstance(e, Table)}
    declared = set()
    for metadata in {table.metadata for table in tables}:
        for child in metadata.tables.values():
            for constraint in child.foreign_key_constraints:
                for action, deletes in ((constraint.ondelete, True), (constraint.onupdate, False)):
                    if (action or "NO ACTION").upper() not in _NOTHING:
                        parent = constraint.elements[0].target_fullname.split(".")[-2]
                        declared.add((parent, child.name, deletes))
    return declared


def _postgresql(connection: Connection, plan: ViewPlan) -> Iterator[Action]:
    default = connection.dialect.default_schema_name

    def name(schema: str, table: str) -> TableName:
        return None if schema == default else schema, table

    for table in sorted(plan.tables, key=str):
        parts = translated(connection, table)
        for row in connection.execute(_POSTGRESQL, {"name": full_name(connection, table)}):
            child = name(row.child_schema, row.child)
            if (row.child_schema, row.child) == (parts[0] or default, parts[1]):
                child = table  # as the view calls it
            parent = name(row.parent_schema, row.parent)
            if row.deletes:
                yield Action(parent, child, None)
            if row.updates:
                yield Action(parent, child, frozenset(row.columns))


def _others(connection: Connection, plan: ViewPlan) -> Iterator[Action]:
    todo, seen = sorted(plan.tables, key=str), set[TableName]()
    while todo:
        child = todo.pop()
        if child in seen:
            continue
        seen.add(child)
        for parent, deletes, updates, columns in _keys_of(connection, child):
            if deletes not in _NOTHING:
                yield Action(parent, child, None)
            if updates not in _NOTHING:
                yield Action(parent, child, columns)
            if not {deletes, updates} <= set(_NOTHING):
                todo.append(parent)


def _keys_of(
    connection: Connection, table: TableName
) -> Iterator[tuple[TableName, str, str, frozenset[str]]]:
    """Yield for each foreign key of a table what it refers to, and its actions."""
    schema, name = translated(connection, table)
    if connection.dialect.name == "sqlite":
        prefix = f"{quoted(connection, schema)}." if schema else ""
        keys: dict[int, list[tuple[str, ...]]] = {}
        for number, _, *key in connection.exec_driver_sql(
            f"PRAGMA {prefix}foreign_key_list({quoted(connection, name)})"
        ):
            keys.setdefault(number, []).append(tuple(key))
        for columns in keys.values():
            parent, _, _, updates, deletes, *_ = columns[0]
            names = frozenset(to for _, _, to, *_ in columns if to)
            yield (table[0], parent), deletes.upper(), updates.upper(), names
    else:
        default = connection.dialect.default_schema_name
        given = {"table": name, "schema": schema}
        for where, parent, deletes, updates, names in connection.execute(_MYSQL, given):
            at = (None if where == default else where, parent)
            yield at, deletes, updates, frozenset(str(names).split(","))
