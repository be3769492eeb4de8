"""What the database itself writes when a row is deleted or changed: ON DELETE and ON UPDATE.

In: a table, and what was done to a row of it. Out: the tables that follow from the foreign keys in
its metadata, as many levels deep as they go. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import MetaData, Table
from sqlalchemy.exc import NoReferenceError

from .analysis import TableName, table_name

_references: WeakKeyDictionary[MetaData, tuple[int, dict[TableName, list[Any]]]] = (
    WeakKeyDictionary()
)


def cascades(
    table: Table, *, deleted: bool, columns: frozenset[str] | None
) -> frozenset[TableName]:
    """Return the tables that the database itself changes through ON DELETE and ON UPDATE.

    :param columns: for an UPDATE, the columns it sets; ``None`` if any.
    """
    seen: set[tuple[TableName, bool]] = set()
    todo = [(table, deleted, columns)]
    while todo:
        parent, gone, changed = todo.pop()
        for constraint in _constraints_on(parent):
            action = ((constraint.ondelete if gone else constraint.onupdate) or "").upper()
            if action in ("", "NO ACTION", "RESTRICT"):
                continue
            if not gone and changed is not None:
                if not changed & {element.column.name for element in constraint.elements}:
                    continue
            child = constraint.table
            # Deleted by a cascade, or changed in the columns of the foreign key.
            deleted_too = gone and action == "CASCADE"
            if (table_name(child), deleted_too) in seen:
                continue
            seen.add((table_name(child), deleted_too))
            todo.append((child, deleted_too, frozenset(c.name for c in constraint.columns)))
    return frozenset(name for name, _ in seen)


def all_cascades(table: Table) -> frozenset[TableName]:
    """Return the tables that the database itself changes when anything is done to a table."""
    return cascades(table, deleted=True, columns=None) | cascades(
        table, deleted=False, columns=None
    )


def _constraints_on(table: Table) -> Iterator[Any]:
    metadata = table.metadata
    known = _references.get(metadata)
    if known is None or known[0] != len(metadata.tables):
        references: dict[TableName, list[Any]] = {}
        for child in metadata.tables.values():
            for constraint in child.foreign_key_constraints:
                try:
                    parent = constraint.referred_table
                except NoReferenceError:  # to a table that is not declared (yet)
                    continue
                references.setdefault(table_name(parent), []).append(constraint)
        known = _references[metadata] = (len(metadata.tables), references)
    return iter(known[1].get(table_name(table), ()))
