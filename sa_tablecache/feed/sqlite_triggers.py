"""The SQL that makes the triggers of an SQLite table, and the text that says how it is watched.

In: a :class:`.Watch`. Out: statements, one by one. Nothing in a trigger depends on the name under
which its database file is attached: what one connection has installed, another one compares with
what it would have installed itself.

A trigger of SQLite knows one row: so each row is one entry. The changelog has no constraint that
could fail, because the conflict clause of a statement (INSERT OR IGNORE) rules in the triggers that
it fires as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, Final

from .contract import VERSION, Relation, Watch
from .sqlite_conflicts import Conflict, quoted

PREFIX: Final = "sa_tablecache_"
KINDS: Final = ("insert", "update", "delete", "replace_insert", "replace_update")


def statements(file: str, /, **names: Any) -> list[str]:
    text = files(__package__).joinpath(f"sql/sqlite/{file}.sql").read_text(encoding="utf-8")
    return [statement.strip().format_map(names) for statement in text.split("\n\n")]


def schema_of(relation: Relation) -> str:
    return relation.schema or "main"


def full_name(relation: Relation) -> str:
    return f"{quoted(schema_of(relation))}.{quoted(relation.name)}"


def literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def trigger_name(kind: str, relation: Relation) -> str:
    return f"{PREFIX}{kind}_{relation.name}"


def drop_triggers(relation: Relation) -> list[str]:
    schema = quoted(schema_of(relation))
    return [
        f"DROP TRIGGER IF EXISTS {schema}.{quoted(trigger_name(kind, relation))}" for kind in KINDS
    ]


def _json(value: str) -> str:
    """Return SQL that makes JSON of a value: bytes as a list of their hexadecimal digits."""
    return (
        f"CASE typeof({value}) WHEN 'blob' THEN '[\"' || hex({value}) || '\"]' "
        f"WHEN 'real' THEN printf('%!.17g', {value}) ELSE json_quote({value}) END"
    )


def _row(of: str, columns: Sequence[str]) -> str:
    """Return SQL that makes a JSON array of some columns of ``OLD``, ``NEW`` or ``t``."""
    if not columns:
        return "NULL"
    return _array(_json(f"{of}.{quoted(name)}") for name in columns)


def _bounds(ranges: Sequence[str], *rows: str) -> str:
    """Return SQL that makes a JSON array of rows of the columns of ranges."""
    if not ranges:
        return "NULL"
    return _array(_row(row, ranges) for row in rows)


def _array(items: Iterable[str]) -> str:
    return f"""'[' || {" || ',' || ".join(items)} || ']'"""


def _changed(columns: Iterable[str]) -> str:
    """Return SQL for: one of some columns is not what it was. By bytes, not by collation."""
    terms = (f"NEW.{quoted(name)} IS NOT OLD.{quoted(name)} COLLATE BINARY" for name in columns)
    return " OR ".join(terms) or "0"


def triggers(watch: Watch) -> dict[str, str]:
    """Return the statements that make the triggers of a table, by the names of these."""
    relation, key, ranges = watch.relation, watch.key, watch.ranges
    texts = statements(
        "triggers",
        schema=quoted(schema_of(relation)),
        table=quoted(relation.name),
        name=literal(relation.name),
        **{kind: quoted(trigger_name(kind, relation)) for kind in KINDS},
        new_key=_row("NEW", key),
        old_key=_row("OLD", key),
        key_changed=_changed(key),
        new_bounds=_bounds(ranges, "NEW"),
        old_bounds=_bounds(ranges, "OLD"),
        both_bounds=_bounds(ranges, "OLD", "NEW"),
    )
    made = {trigger_name(k, relation): sql for k, sql in zip(KINDS[:3], texts, strict=True)}
    cascades = [Conflict(*cascade) for cascade in watch.cascades]
    if key and cascades:
        same = " AND ".join(f"t.{quoted(name)} IS OLD.{quoted(name)}" for name in key)
        for kind, event in zip(KINDS[3:], ("INSERT", "UPDATE"), strict=True):
            name = trigger_name(kind, relation)
            body = "".join(
                f"    {_logs_replaced(watch, cascade, same if event == 'UPDATE' else None)};\n"
                for cascade in cascades
            )
            made[name] = (
                f"CREATE TRIGGER {quoted(schema_of(relation))}.{quoted(name)} "
                f"BEFORE {event} ON {quoted(relation.name)} BEGIN\n{body}END"
            )
    return made


def _logs_replaced(watch: Watch, conflict: Conflict, same: str | None) -> str:
    """Return a statement of a trigger that logs the rows that may give way to NEW."""
    log = f"INSERT INTO {PREFIX}changelog (relation, operation, keys, bounds) SELECT"
    name = literal(watch.relation.name)
    condition = conflict.condition
    if same is not None and conflict.columns:
        condition = f"({_changed(conflict.columns)}) AND {condition}"
    if conflict.any_row:
        return f"{log} {name}, 'T', NULL, NULL WHERE {condition}"
    if same is not None:
        condition = f"{condition} AND NOT ({same})"
    return (
        f"{log} {name}, 'U', {_row('t', watch.key)}, {_bounds(watch.ranges, 't')} "
        f"FROM {quoted(watch.relation.name)} AS t WHERE {condition}"
    )


def dump(watch: Watch) -> str:
    return json.dumps(
        {
            "version": VERSION,
            "key": watch.key,
            "ranges": watch.ranges,
            "limit": watch.limit,
            "cascades": watch.cascades,
        },
        ensure_ascii=False,
    )


def load(relation: Relation, text: str) -> Watch:
    said = json.loads(text)
    return Watch(
        relation,
        tuple(said["key"]),
        tuple(said["ranges"]),
        said["limit"],
        tuple(Conflict(tuple(c[0]), *c[1:]) for c in said["cascades"]),
    )
