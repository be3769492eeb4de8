"""What the caches of an engine ask of written tables, and what that makes of a statement; pure.

In: what a compiled statement writes, and the interests of all caches that watch its engine. Out:
under which names views know the tables, whether its rows are followed, and by which key. Both are
worked out once for each compiled statement, and again only when a view comes or its tables change:
the unit of work executes the same few statements again and again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Table, inspect
from sqlalchemy.orm import Mapper

from .actions import Action
from .analysis import TableName, table_name
from .exc import CriteriaError
from .statements import Writes


@dataclass(frozen=True, slots=True, eq=False)
class Interest:
    """What caches ask of tables; another object as soon as they ask something else."""

    wanted: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """For tables (their names, whatever the schema) of which somebody asks which rows are written,
    the columns whose values are wanted of rows that are deleted."""
    keys: Mapping[str, frozenset[tuple[str, ...]]] = field(default_factory=dict)
    """The primary keys, by column names, by which rows of a table are followed."""
    acting: frozenset[str] = frozenset()
    """The tables with which the database may do something by itself when they are written."""
    unexplained: frozenset[str] = frozenset()
    """Those of them of which nobody said what."""
    at_once: frozenset[TableName] = frozenset()
    """The tables whose rows are visible when they are written, and stay: no transactions."""
    actions: frozenset[Action] = frozenset()
    """What foreign keys of the database do of which the models do not know."""


def together(interests: Sequence[Interest]) -> Interest:
    """Return what several caches ask."""
    if len(interests) == 1:
        return interests[0]
    wanted: dict[str, frozenset[str]] = {}
    keys: dict[str, frozenset[tuple[str, ...]]] = {}
    for interest in interests:
        for table, columns in interest.wanted.items():
            wanted[table] = wanted.get(table, frozenset()) | columns
        for table, known in interest.keys.items():
            keys[table] = keys.get(table, frozenset()) | known
    return Interest(
        wanted,
        keys,
        frozenset[str]().union(*(each.acting for each in interests)),
        frozenset[str]().union(*(each.unexplained for each in interests)),
        frozenset[TableName]().union(*(each.at_once for each in interests)),
        frozenset[Action]().union(*(each.actions for each in interests)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """What a statement writes, as the caches see it."""

    interest: Interest
    original: Writes
    default_schema: str | None
    """What these were when it was worked out."""
    writes: Writes
    """Without a key, if that is not the one by which rows are followed."""
    names: Mapping[TableName, Sequence[TableName]]
    """For each table that it writes, the names under which a view may know it."""
    asked: bool
    """Whether anybody asks which rows of its table are written."""
    acts: bool
    """Whether the database may write something even if it wrote no row."""


def followed(
    interest: Interest, original: Writes, writes: Writes, dialect: Any, translate: Mapping[Any, Any]
) -> Followed:
    """Work out what a statement means for the caches.

    :param original: what it says itself that it writes; ``writes`` may be by other words.
    :param translate: the ``schema_translate_map`` of its execution.
    """
    asked = acts = False
    if writes.table is not None:
        name = writes.table[1]
        asked, acts = name in interest.wanted, name in interest.acting
        if writes.primary_key and not _knows_key(interest, writes, name):
            writes = replace(
                writes, further=writes.further | tables_written(writes), key=(), primary_key=()
            )
    names = {table: _names(table, interest, dialect, translate) for table in tables_written(writes)}
    return Followed(interest, original, dialect.default_schema_name, writes, names, asked, acts)


def tables_written(writes: Writes) -> frozenset[TableName]:
    """Return all tables of which a statement may write rows."""
    own = frozenset() if writes.table is None else frozenset({writes.table})
    return writes.tables | writes.further | own


def _knows_key(interest: Interest, writes: Writes, name: str) -> bool:
    """Whether the keys of the rows that a statement tells are what they are followed by."""
    key = tuple(column.name for column in writes.primary_key)
    # Other models may have another key of the same table. A trigger may change a new one.
    return all(known == key for known in interest.keys.get(name, ())) and not (
        writes.kind in ("insert", "upsert") and name in interest.unexplained
    )


def _names(
    table: TableName, interest: Interest, dialect: Any, translate: Mapping[Any, Any]
) -> list[TableName]:
    """Return all names under which a view may know a written table."""
    schema, name = table
    schemas = {schema, translate.get(schema, schema)}
    default = "main" if dialect.name == "sqlite" else None
    default = default or dialect.default_schema_name
    if default in schemas:
        schemas.add(None)
    elif None in schemas and schema is not None:
        schemas.add(default)
    names = [(s, name) for s in schemas]
    folds = dialect.name == "sqlite" or getattr(dialect, "_casing", 0)
    if folds and name not in interest.wanted:
        names += [(s, n.lower()) for s, n in names]
    return names


def as_declared(writes: Writes, declared: Any) -> Writes:
    """Return what a statement writes by the application's own word.

    That replaces what cannot be read from it, and is added to what can.
    """
    tables = frozenset(table_name(table) for model in declared for table in tables_of(model))
    if writes.anything or writes.opaque or writes.kind == "text":
        return Writes(tables=tables, sets=writes.sets and not writes.opaque)
    return replace(writes, tables=writes.tables | tables)


def tables_of(target: Any) -> list[Table]:
    """Return the tables of a mapped class, or a table itself.

    :raises CriteriaError: for anything else.
    """
    if isinstance(target, Table):
        return [target]
    mapper = inspect(target, raiseerr=False)
    if not isinstance(mapper, Mapper):
        raise CriteriaError(f"{target!r} is neither a mapped class nor a Table")
    return [table for table in mapper.tables if isinstance(table, Table)]
