"""What the catalog of SQLite says of tables and their triggers.

In: a connection. Out: which database files it has, how their tables are watched, and why changes of
a table are not all logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from sqlalchemy import Connection

from .contract import Relation, Watch
from .sqlite_conflicts import conflicts, folded, quoted, raises_ignore
from .sqlite_triggers import PREFIX, load, schema_of, triggers


@contextmanager
def one_moment(connection: Connection) -> Iterator[None]:
    """Read all of one moment: in the transaction that is open, or in one that leaves nothing."""
    if cast("Any", connection.connection.driver_connection).in_transaction:
        yield
        return
    connection.exec_driver_sql("BEGIN")
    try:
        yield
    finally:
        connection.exec_driver_sql("ROLLBACK")


def databases_of(connection: Connection) -> dict[str, str]:
    """Return the database files of a connection, by the names of their schemas."""
    rows = connection.exec_driver_sql("PRAGMA database_list").all()
    return {name: file for _, name, file in rows if name != "temp"}


def version_of(connection: Connection, schema: str) -> int | None:
    """Return the version of the changelog of a database file, if it has one."""
    meta = f"{quoted(schema)}.{PREFIX}meta"
    if catalog_row(connection, Relation(schema, f"{PREFIX}meta")) is None:
        return None
    version = connection.exec_driver_sql(f"SELECT value FROM {meta} WHERE name = 'version'")
    return cast("int | None", version.scalar())


def registry_of(connection: Connection, schema: str) -> dict[str, Watch]:
    """Return how the tables of a database file are watched, by their folded names."""
    rows = connection.exec_driver_sql(f"SELECT name, watch FROM {quoted(schema)}.{PREFIX}watched")
    return {folded(name): load(Relation(schema, name), text) for name, text in rows}


def catalog_row(connection: Connection, relation: Relation) -> Any:
    """Return what the catalog has of a table or view."""
    return connection.exec_driver_sql(
        f"SELECT type, name, rootpage, sql FROM {quoted(schema_of(relation))}.sqlite_master "
        "WHERE type IN ('table', 'view') AND name = ? COLLATE NOCASE",
        (relation.name,),
    ).first()


def describe(connection: Connection, relation: Relation) -> tuple[Any, str | None]:
    """Return what the catalog has of a table, or why triggers cannot see its changes."""
    row = catalog_row(connection, relation)
    if row is None:
        return None, "there is no such table"
    if folded(schema_of(relation)) == "temp":
        return None, "it is a temporary table, which no other connection knows"
    if row.type == "view":
        return None, "it is a database view: watch the tables that it reads"
    if not row.rootpage:
        return None, "it is a virtual table, which can have no triggers"
    if folded(row.name).startswith("sqlite_"):
        return None, "it is a table of SQLite itself"
    return row, None


class Problem(NamedTuple):
    """Why not all changes of a table are logged."""

    why: str
    outdated: bool
    """Whether watching the table again helps."""


def problem_of(connection: Connection, relation: Relation, watch: Watch) -> Problem | None:
    """Return why not all changes of a table are logged, if so: some statements of the catalog."""
    table, problem = describe(connection, relation)
    if table is None:
        return Problem(str(problem), outdated=False)
    schema = schema_of(relation)
    found = {
        folded(row.name): row.sql
        for row in connection.exec_driver_sql(
            f"SELECT name, sql FROM {quoted(schema)}.sqlite_master "
            "WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE",
            (table.name,),
        )
    }
    for name, sql in triggers(watch).items():
        there = found.pop(folded(name), None)
        if there is None:
            return Problem(f"its trigger {name} is missing", outdated=True)
        if there != sql.replace(f" {quoted(schema)}.", " ", 1):
            return Problem(f"its trigger {name} is not what it should be", outdated=True)
    if watch.cascades != tuple(conflicts(connection, relation, table.sql, watch.key)):
        return Problem(
            "its unique indexes are not those that it had when it was watched: watch it again",
            outdated=True,
        )
    for name, sql in sorted(found.items()):
        if raises_ignore(sql):
            return Problem(
                f"its trigger {name} may raise IGNORE after a row was written, and then no other "
                "trigger is run: have it do so before",
                outdated=False,
            )
    return None


def looked_at(
    connection: Connection, schema: str, relations: Iterable[Relation]
) -> Iterator[tuple[Relation, tuple[Watch | None, str | None]]]:
    """Yield how relations are watched, and why not all their changes are logged."""
    registry = registry_of(connection, schema)
    for relation in relations:
        watch = registry.get(folded(relation.name))
        if watch is None:
            yield relation, (None, "it is not watched")
        else:
            problem = problem_of(connection, relation, watch)
            yield relation, (watch, None if problem is None else problem.why)


def byte_columns(connection: Connection, relation: Relation) -> frozenset[str]:
    """Return the columns of a table in which bytes are to be expected, by folded name."""
    columns = connection.exec_driver_sql(
        f"PRAGMA {quoted(schema_of(relation))}.table_xinfo({quoted(relation.name)})"
    )
    return frozenset(folded(c[1]) for c in columns if not c[2] or "blob" in folded(c[2]))
