"""What the catalogs of MariaDB and MySQL say of watched tables.

In: a connection, relations, and what the registry has of them. Out: how a table is best watched;
for each relation, a fingerprint, and why not all its changes are logged, if so.

TRUNCATE and the like leave no trace but another number of the table in InnoDB, which only accounts
with the privilege PROCESS see: without it no table can be trusted. Triggers are seen by accounts
with the privilege TRIGGER on their table.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from sa_tablecache.exc import TableCacheError

from .contract import Relation, Watch
from .mysql_cascades import ForeignKey
from .mysql_triggers import (
    LOG,
    MOST_PARENTS,
    PREFIX,
    Watched,
    kind_of,
    literal,
    schema_literal,
)

# Each table of the catalog is given the names of a database and of a table, as constants: then
# MariaDB looks into that one. Otherwise it opens all that the server has.

_ACCESS_DENIED: Final = (1044, 1045, 1142, 1143, 1227, 1370)

_COLUMNS: Final = text(
    """
    SELECT column_name AS column_name, data_type AS data_type, collation_name AS collation_name
    FROM information_schema.columns
    WHERE table_schema = COALESCE(NULLIF(:schema, ''), DATABASE()) AND table_name = :name
    """
)
_PRIMARY_KEY: Final = text(
    """
    SELECT column_name AS column_name FROM information_schema.statistics
    WHERE table_schema = COALESCE(NULLIF(:schema, ''), DATABASE()) AND table_name = :name
        AND index_name = 'PRIMARY'
    ORDER BY seq_in_index
    """
)
_TABLE: Final = text(
    """
    SELECT table_type AS table_type, engine AS engine FROM information_schema.tables
    WHERE table_schema = COALESCE(NULLIF(:schema, ''), DATABASE()) AND table_name = :name
    """
)
_FOREIGN_KEYS: Final = text(
    """
    SELECT r.constraint_name AS constraint_name, r.referenced_table_name AS parent,
        r.unique_constraint_schema AS parent_schema, r.delete_rule AS on_delete,
        r.update_rule AS on_update, k.column_name AS column_name,
        k.referenced_column_name AS referred
    FROM information_schema.referential_constraints AS r
    JOIN information_schema.key_column_usage AS k ON k.constraint_name = r.constraint_name
    WHERE r.constraint_schema = COALESCE(NULLIF(:schema, ''), DATABASE())
        AND r.table_name = :name
        AND k.table_schema = COALESCE(NULLIF(:schema, ''), DATABASE()) AND k.table_name = :name
        AND (r.delete_rule IN ('CASCADE', 'SET NULL') OR r.update_rule IN ('CASCADE', 'SET NULL'))
    ORDER BY r.constraint_name, k.ordinal_position
    """
)
_RESOLVE: Final = text(
    """
    SELECT table_schema, table_name, DATABASE(), @@lower_case_table_names
    FROM information_schema.tables
    WHERE table_schema = COALESCE(:schema, DATABASE()) AND table_name = :name
    """
)


def error_code(error: DBAPIError) -> int | None:
    """Return the number that the server gave an error."""
    arguments = getattr(error.orig, "args", ())
    code = arguments[0] if arguments else getattr(error.orig, "errno", None)
    return code if isinstance(code, int) else None


def denied(error: DBAPIError) -> bool:
    """Whether a privilege was missing."""
    return error_code(error) in _ACCESS_DENIED


# -- how tables can be watched --------------------------------------------------------------------


def resolve(
    connection: Connection, names: Iterable[tuple[str | None, str]]
) -> Iterator[tuple[tuple[str | None, str], Relation]]:
    """Yield the relations that names mean; the schema is empty for the connection's own."""
    for name in names:
        given = {"schema": name[0], "name": name[1]}
        for schema, table, default, folds in connection.execute(_RESOLVE, given):
            if folds or (table == name[1] and name[0] in (None, schema)):
                yield name, Relation("" if schema == default else schema, table)


def propose(
    connection: Connection, relation: Relation, ranges: Sequence[str], key: Sequence[str]
) -> Watch:
    """Return how a table is best watched.

    :raises TableCacheError: if triggers cannot see its changes.
    """
    given = {"schema": relation.schema, "name": relation.name}
    table = connection.execute(_TABLE, given).first()
    if table is None:
        raise TableCacheError(f"{relation} cannot be watched: there is no such table")
    if table.table_type == "VIEW":
        raise TableCacheError(f"{relation} is a database view: watch the tables that it reads")
    if table.engine != "InnoDB":
        raise TableCacheError(
            f"{relation} cannot be watched: its engine is {table.engine}, and only what is written "
            "to a table of InnoDB becomes visible together with its entry in the changelog"
        )
    columns = {column.column_name: column for column in connection.execute(_COLUMNS, given)}
    if missing := {*ranges, *key}.difference(columns):
        raise TableCacheError(f"{relation} has no column {', '.join(sorted(missing))}")
    key = tuple(key) or tuple(connection.execute(_PRIMARY_KEY, given).scalars())
    by_kind: dict[str, set[str]] = defaultdict(set)
    for name in (*key, *ranges):
        column = columns[name]
        if kind := kind_of(column.data_type, column.collation_name):
            by_kind[kind].add(name)
    kinds = [(kind, *sorted(by_kind[kind])) for kind in sorted(by_kind)]
    keys = [("foreign key", *key) for key in sorted(_foreign_keys(connection, relation))]
    return Watch(relation, key, tuple(ranges), cascades=(*kinds, *keys))


def _foreign_keys(connection: Connection, relation: Relation) -> Iterator[ForeignKey]:
    """Yield the foreign keys by which changes of other tables come to a table."""
    todo, seen = [relation.name], set[str]()
    default = connection.scalar(text("SELECT DATABASE()"))
    while todo:
        child = todo.pop()
        if child in seen:
            continue
        seen.add(child)
        if len(seen) > MOST_PARENTS:
            raise TableCacheError(
                f"{relation} cannot be watched: foreign keys of more than {MOST_PARENTS} tables "
                "cascade into it"
            )
        rows: dict[str, list[Any]] = defaultdict(list)
        given = {"schema": relation.schema, "name": child}
        for row in connection.execute(_FOREIGN_KEYS, given):
            rows[row.constraint_name].append(row)
        for parts in rows.values():
            first = parts[0]
            if first.parent_schema != (relation.schema or default):
                raise TableCacheError(
                    f"{relation} cannot be watched: {first.parent_schema}.{first.parent} cascades "
                    "into it from another database"
                )
            todo.append(first.parent)
            yield ForeignKey(
                child,
                tuple(part.column_name for part in parts),
                first.parent,
                tuple(part.referred for part in parts),
                first.on_delete,
                first.on_update,
            )


# -- whether they are -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """What the catalog has of a relation."""

    table: Any = None
    triggers: dict[tuple[str, str], Any] = field(default_factory=dict)
    """By table and name."""
    numbers: list[str] = field(default_factory=list)
    actions: Counter[tuple[str, str, int]] = field(default_factory=Counter)


def look(
    connection: Connection, watched: Mapping[Relation, Watched | None], database: str | None
) -> tuple[dict[Relation, str], dict[Relation, str]]:
    """Return fingerprints, and of relations whose changes are not all logged, why: two statements.

    :param database: the name of the database of the connection; ``None``: look at triggers alone.
    """
    if not watched:
        return {}, {}
    seen = {relation: _Seen() for relation in watched}
    tables = sorted({table for pair in watched.items() for table in _tables(*pair)})
    triggers: dict[Relation, dict[str, Any]] = defaultdict(dict)
    for place, kind, *row in connection.exec_driver_sql(_catalog(tables, seen)):
        table = tables[int(place)]
        if kind == "t":
            seen[table].table = row
        else:
            triggers[table][row[0]] = row
    for relation, known in watched.items():
        for table in _tables(relation, known):
            for name, row in triggers[table].items():
                seen[relation].triggers[table.name, name] = row
    process = database is None or _numbers(connection, watched, seen, database)
    fingerprints, untrusted = {}, {}
    for relation, known in watched.items():
        found = seen[relation]
        why = _problem(relation, known, found)
        if why is None and not process:
            why = (
                "TRUNCATE would not be seen: the account that polls needs GRANT PROCESS ON *.* to "
                "see the numbers of tables in InnoDB"
            )
        elif why is None and database is not None and known and found.actions != known.expected:
            why = "the foreign keys that cascade into it are other ones: watch it again"
        if why is not None:
            untrusted[relation] = why
        fingerprints[relation] = _fingerprint(found)
    return fingerprints, untrusted


def _tables(relation: Relation, known: Watched | None) -> set[Relation]:
    """Return a relation and the tables that cascade into it."""
    others = {Relation(relation.schema, t) for t, _, _ in known.triggers} if known else set()
    return {relation} | others


def _catalog(tables: Iterable[Relation], watched: Container[Relation]) -> str:
    """Return a SELECT of tables and triggers: each a look-up by its name, which opens no other."""
    parts = []
    for place, table in enumerate(tables):
        schema, name = schema_literal(table.schema), literal(table.name)
        if table in watched:
            # What is done twice in a second looks like once: until it is over, and the tick by
            # which the clock of the files may be late, each poll finds something else.
            parts.append(
                f"SELECT {place} AS place, 't' AS kind, COALESCE(t.engine, '') AS a, "
                "t.table_type AS b, CAST(UNIX_TIMESTAMP(t.create_time) AS CHAR) AS c, "
                "IF(UNIX_TIMESTAMP(SYSDATE(6)) - UNIX_TIMESTAMP(t.create_time) BETWEEN -1 AND 1.1, "
                "CAST(SYSDATE(6) AS CHAR), '') AS d FROM information_schema.tables AS t "
                f"WHERE t.table_schema = {schema} AND t.table_name = {name}"
            )
        parts.append(
            f"SELECT {place}, 'g', g.trigger_name, CAST(g.created AS CHAR), g.definer, "
            f"MD5(g.action_statement) FROM information_schema.triggers AS g "
            f"WHERE g.event_object_schema = {schema} AND g.event_object_table = {name} "
            f"AND LEFT(g.trigger_name, {len(PREFIX)}) = '{PREFIX}'"
        )
    return " UNION ALL ".join(parts)


def _numbers(
    connection: Connection,
    watched: Mapping[Relation, Watched | None],
    seen: Mapping[Relation, _Seen],
    database: str,
) -> bool:
    """Note the numbers of tables in InnoDB, and their foreign keys; return whether one may.

    InnoDB writes names as the file system has them; partitions have numbers of their own.
    """
    tables, keys = (
        ("innodb_sys_tables", "innodb_sys_foreign")
        if getattr(connection.dialect, "is_mariadb", False)
        else ("innodb_tables", "innodb_foreign")
    )
    wanted = {tuple(relation): relation for relation in watched}
    parents: dict[tuple[str, ...], set[Relation]] = defaultdict(set)
    for relation, known in watched.items():
        names = {relation.name, *(parent for _, parent, _ in known.expected)} if known else set()
        for name in names:
            parents[relation.schema, name].add(relation)
    file_names = sorted({_in_files(*table) for table in (*wanted, *parents)})
    statement = (
        f"SELECT {_decoded('s.name', 0)}, {_decoded('s.name', 1)}, '', '', s.table_id "
        f"FROM information_schema.{tables} AS s "
        f"WHERE SUBSTRING_INDEX(s.name, '#', 1) IN ({', '.join(file_names)}) UNION ALL "
        f"SELECT {_decoded('f.for_name', 0)}, {_decoded('f.for_name', 1)}, "
        f"{_decoded('f.ref_name', 0)}, {_decoded('f.ref_name', 1)}, f.type & 15 "
        f"FROM information_schema.{keys} AS f "
        f"WHERE (f.type & 15) > 0 AND f.for_name IN ({', '.join(file_names)})"
    )
    try:
        rows = connection.exec_driver_sql(statement).all()
    except DBAPIError as error:
        if denied(error):
            return False
        raise
    for schema, table, parent_schema, parent, number in rows:
        place = "" if schema == database else schema, table
        if parent:
            label = parent if parent_schema == schema else f"{parent_schema}.{parent}"
            for relation in parents.get(place, set()):
                seen[relation].actions[table, label, int(number)] += 1
        elif place in wanted:
            seen[wanted[place]].numbers.append(str(number))
    return True


def _in_files(schema: str, name: str) -> str:
    def encoded(value: str) -> str:
        return f"CONVERT(CAST(CONVERT({value} USING filename) AS BINARY) USING utf8mb4)"

    return f"CONCAT({encoded(schema_literal(schema))}, '/', {encoded(literal(name))})"


def _decoded(column: str, part: int) -> str:
    which = f"SUBSTRING_INDEX(SUBSTRING_INDEX({column}, '#', 1), '/', {-1 if part else 1})"
    return f"CONVERT(CONVERT(CAST({which} AS BINARY) USING filename) USING utf8mb4)"


def _fingerprint(found: _Seen) -> str:
    if found.table is None:
        return ""
    triggers = sorted(" ".join((table, *row)) for (table, _), row in found.triggers.items())
    return "|".join([*map(str, found.table), *sorted(found.numbers), *triggers])


def _problem(relation: Relation, known: Watched | None, found: _Seen) -> str | None:
    """Return why not all changes of a relation are logged."""
    if found.table is None:
        return "there is no such table, or the account that polls may not see it"
    if found.table[1] == "VIEW":
        return "it is a database view: watch the tables that it reads"
    if found.table[0] != "InnoDB":
        return f"its engine is {found.table[0]}, which does not commit together with {LOG}"
    if known is None:
        return "it is not watched"
    there = {trigger: row[-1] for trigger, row in found.triggers.items()}
    for table, name, digest in sorted(known.triggers):
        if (table, name) not in there:
            return (
                f"the trigger {name} of {table} is missing, or the account that polls lacks "
                f"GRANT TRIGGER ON {table}"
            )
        if there[table, name] != digest:
            return f"the trigger {name} of {table} is another one: watch {relation} again"
    return None
