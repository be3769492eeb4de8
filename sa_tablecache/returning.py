"""Having the database tell which rows a statement wrote: RETURNING, without a trace for the caller.

In: a statement about to be executed that names no rows, and later its result. Out: the same
statement with RETURNING for the primary key where the dialect has it, the keys of the rows that it
wrote, and the result as it would have been.

UPDATE, DELETE and the INSERT of many parameters get ``return_defaults()``, by which SQLAlchemy
itself fetches what the database computed: so that is compiled, cached and batched like any
statement. It does not do that for an INSERT of several VALUES, of a SELECT, or with ON CONFLICT:
there RETURNING is written behind the SQL, where nothing can be ambiguous. A statement that has a
RETURNING of its own is left alone; if the key is among what it returns, the rows are looked at and
given back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Delete, Insert, Table, Update
from sqlalchemy.engine import cursor as cursors

from .changes import MOST_KEYS, RowKey
from .statements import (
    Writes,
    exact_rows,
    inserted_rows,
    pinned,
    replaces,
    returned_rows,
    returned_value,
)

#: Execution option by which the application says what an opaque statement writes.
WRITES: Final = "writes"

_ASKED: Final = "_sa_tablecache_before"
"""Attribute of a statement to which RETURNING was added: the further columns it returns."""


class Rows(NamedTuple):
    """The rows that a statement wrote."""

    keys: list[RowKey]
    before: Sequence[Mapping[str, Any]] | None = None
    """Beside each key, what is known of the row as it was before."""


def ask_for_keys(
    connection: Connection,
    statement: Any,
    multiparams: Any,
    params: Any,
    options: Mapping[str, Any],
    wanted: frozenset[str],
) -> Any:
    """Return an INSERT, UPDATE or DELETE that tells which rows it writes, or the same if it does.

    :param wanted: names of columns whose values are wanted of rows that are deleted.
    """
    if statement._returning or statement._return_defaults:
        return statement
    table, dialect = statement.table, connection.dialect
    many = len(multiparams) if multiparams else 1
    inserts = isinstance(statement, Insert)
    if not 1 < many <= MOST_KEYS if inserts else many > 1:
        return statement
    key = tuple(table.primary_key.columns)
    first = (multiparams[0] if multiparams else params) or {}
    further: tuple[Any, ...] = ()
    if not key:
        return statement
    if inserts:
        named = statement._post_values_clause is None and not statement._prefixes
        if (
            not dialect.insert_executemany_returning
            or replaces(statement, table)
            or (named and all(_is_given(column, first) for column in key))
        ):
            return statement
    else:
        deletes = isinstance(statement, Delete)
        if deletes and wanted:
            further = tuple(c for c in table.columns if c.name in wanted and c not in key)
        keys = {column.key for column in key}
        if (
            not (dialect.delete_returning if deletes else dialect.update_returning)
            # Those of the unit of work are such.
            or (not further and pinned(statement, table).keys() >= keys)
            or not (deletes or keys.isdisjoint(_written(statement, first)))
            or _orm_fetches(options)
        ):
            return statement
        if dialect.name in ("mysql", "mariadb") and _reads_others(statement, table):
            return statement  # a DELETE of several tables, which has no RETURNING
    asked = statement.return_defaults(*key, *further)
    asked.__dict__[_ASKED] = further
    return asked


def _is_given(column: Any, parameters: Mapping[str, Any]) -> bool:
    """Whether the value of a key's column is known before the row is inserted."""
    default = column.default
    return parameters.get(column.key) is not None or (
        default is not None and (default.is_scalar or default.is_callable)
    )


def _orm_fetches(options: Mapping[str, Any]) -> bool:
    """Whether the ORM itself has an UPDATE or DELETE return the keys: synchronize_session."""
    orm = options.get("_sa_orm_update_options")
    return getattr(orm, "_synchronize_session", None) == "fetch"


def returning_suffix(writes: Writes, context: Any) -> str:
    """Return a RETURNING to write behind an INSERT that would not tell its keys; or nothing."""
    dialect = context.dialect
    if (
        not writes.unnamed
        or not writes.primary_key
        or context.executemany
        or not dialect.insert_returning
        # There a caller may look at ``lastrowid``, which an INSERT with RETURNING leaves unset.
        or dialect.name in ("mysql", "mariadb")
        or context.compiled.effective_returning
    ):
        return ""
    quote = dialect.identifier_preparer.quote
    return "\nRETURNING " + ", ".join(quote(column.name) for column in writes.primary_key)


def suffixed_rows(writes: Writes, context: Any, cursor: Any) -> Rows | None:
    """Return the rows that an INSERT with :func:`returning_suffix` gave."""
    rows = cursor.fetchall()
    if context._rowcount is not None:  # preserve_rowcount
        context._rowcount = len(rows)
    keys = exact_rows(writes, rows, context)
    return None if keys is None else Rows(keys)


def hide_rows(context: Any, result: Any) -> None:
    """Make a result that of a statement without RETURNING."""
    result._metadata = cursors._NO_RESULT_METADATA
    result.cursor_strategy = cursors._NO_CURSOR_DML


def _written(statement: Update, parameters: Mapping[str, Any]) -> set[str]:
    values = [
        *(statement._values or ()),
        *(column for column, _ in getattr(statement, "_ordered_values", None) or ()),
    ]
    return {str(getattr(column, "key", column)) for column in values} | parameters.keys()


def _reads_others(statement: Any, table: Table) -> bool:
    return any(
        selectable != table
        for criterion in statement._where_criteria
        for selectable in criterion._from_objects
    )


def was_asked(context: Any) -> bool:
    """Whether RETURNING was added to a statement, which is to be hidden from its caller."""
    return getattr(getattr(context, "invoked_statement", None), _ASKED, None) is not None


def returns_more(context: Any) -> bool:
    """Whether a statement returns more than the keys of the rows that it writes."""
    return bool(getattr(getattr(context, "invoked_statement", None), _ASKED, ()))


def tells_keys(writes: Writes, context: Any) -> bool:
    """Whether the keys of the rows that a statement wrote can be known when it has a result."""
    return bool(writes.primary_key) and (
        (writes.kind == "insert" and not writes.unnamed) or context.compiled.effective_returning
    )


def read_rows(writes: Writes, context: Any, statement: Any, result: Any) -> Rows | None:
    """Return the rows that an executed statement wrote, or ``None`` if they are not known."""
    rows = _told_rows(writes, context, statement, result)
    # An UPDATE of the key tells the new one, and not which row is gone.
    return None if writes.kind == "update" and writes.columns is None else rows


def _told_rows(writes: Writes, context: Any, statement: Any, result: Any) -> Rows | None:
    if context._is_explicit_returning:
        return _callers_rows(writes, context, result)
    further = getattr(statement, _ASKED, None)
    if further is not None and context.compiled.effective_returning:
        return _asked_rows(writes, context, further, result)
    if writes.kind == "insert" and not writes.unnamed:
        keys = inserted_rows(writes, context)
    else:
        returned = context.returned_default_rows or []
        known = not returned or _has_key(writes, returned[0]._mapping)
        keys = returned_rows(writes, returned) if known else None
    return None if keys is None else Rows(keys)


def _asked_rows(writes: Writes, context: Any, further: tuple[Any, ...], result: Any) -> Rows | None:
    returned = context.returned_default_rows or []
    keys = returned_rows(writes, returned)
    before = None
    if writes.kind == "delete":
        columns = (*writes.primary_key, *further)
        before = [{c.name: returned_value(row._mapping[c]) for c in columns} for row in returned]
    context.returned_default_rows = None
    if not context.isinsert or context._rowcount is not None:
        context._rowcount = len(returned)
    if context.isinsert:
        context.inserted_primary_key_rows = context._setup_ins_pk_from_empty()
    hide_rows(context, result)
    return None if keys is None else Rows(keys, before)


def _callers_rows(writes: Writes, context: Any, result: Any) -> Rows | None:
    """Look at the rows that a caller's own RETURNING gives, and give them back."""
    options = context.execution_options
    if "yield_per" in options or options.get("stream_results"):
        return None
    metadata = result._metadata
    if not all(metadata._has_key(column) for column in writes.primary_key):
        return None
    rows = result.all()
    result._rewind(rows)
    keys = returned_rows(writes, rows)
    return None if keys is None else Rows(keys)


def _has_key(writes: Writes, mapping: Mapping[Any, Any]) -> bool:
    return all(column in mapping for column in writes.primary_key)


def finish(context: Any, cursor: Any) -> None:
    """Fetch all rows of a statement now: where SQLite commits by itself, it does so at the last.

    Before that nobody else sees what it wrote, and a refresh would read what was before it.
    """
    if cursor.description is not None and context.cursor_fetch_strategy is cursors._DEFAULT_FETCH:
        context.cursor_fetch_strategy = cursors.FullyBufferedCursorFetchStrategy(
            cursor, initial_buffer=deque(cursor.fetchall())
        )
