"""What a statement writes, read from its compiled form.

In: the execution context of one statement. Out: :class:`Writes`: nothing, rows by primary key,
tables, or anything. The answer depends on the compiled statement alone but for the values of the
key, so that it is worked out once for each compiled statement.

A row is known exactly where the statement names it: an INSERT with the whole primary key among its
parameters, an UPDATE or DELETE whose WHERE pins it. All statements of a unit of work are such; what
others wrote ``returning.py`` has the database tell. Text names no table and counts as writing
anything, unless it can be seen to only read.
"""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Delete, Insert, Table, Update, types
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.ddl import ExecutableDDLElement
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    ColumnClause,
    ReleaseSavepointClause,
    RollbackToSavepointClause,
    SavepointClause,
    TextClause,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import SelectBase

from .analysis import TableName, table_name
from .cascades import all_cascades, cascades
from .changes import RowKey
from .comparison import to_utc
from .functions import READING_FUNCTIONS, function_name
from .joins import conjuncts
from .wording import (
    MOVES,
    MYSQL,
    TEMPORARY,
    UNKNOWN_NAME,
    UNSEEN,
    bare,
    hides,
    only_reads,
    sets_nothing,
)


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """Where the value of one column of a primary key is found among the parameters."""

    column: Column[Any]
    parameters: tuple[str, ...]
    """More than one for an UPDATE of the key: the old and the new value."""
    plain: type | None = None
    """Values of this very type need no :func:`exact_value`: they come back as they are."""


@dataclass(frozen=True, slots=True)
class Writes:
    """What a compiled statement writes."""

    tables: frozenset[TableName] = frozenset()
    """Tables of which any row may have changed, by parts of the statement."""
    table: TableName | None = None
    """The table that it inserts into, updates or deletes from itself."""
    further: frozenset[TableName] = frozenset()
    """Tables of which any row may have changed if it wrote a row of its table: cascades."""
    kind: str = ""
    """``insert``, ``upsert`` (an INSERT that may change or skip rows), ``update``, ``delete``.

    ``text`` is an INSERT, UPDATE or DELETE of one table, whose name is all that is known of it.
    """
    key: tuple[KeyColumn, ...] = ()
    """Where the primary key of the rows is found, if the statement names them."""
    columns: frozenset[str] | None = None
    """The names of the columns that an UPDATE sets, if it keeps the key."""
    unnamed: bool = False
    """Whether SQLAlchemy does not fetch the keys of an INSERT: VALUES, SELECT, ON CONFLICT."""
    anything: bool = False
    opaque: bool = False
    """Whether it could have ended the transaction, or be undone by no rollback."""
    sets: bool = False
    """Whether it may have changed what the connection sees (SET and the like)."""
    rolls_back: bool = False
    """Whether it rolls back to a savepoint."""
    moves: bool = False
    """Whether a name without a schema may mean another table from now on."""
    replaces: bool = False
    """Whether it may delete rows that it does not name: REPLACE."""
    locks: bool = False
    """Whether others may have to wait, to read what it locks, until the transaction ends."""
    primary_key: tuple[Column[Any], ...] = field(default=(), compare=False)

    def __bool__(self) -> bool:
        return self.anything or self.table is not None or bool(self.tables)


NOTHING: Final = Writes()
ANYTHING: Final = Writes(anything=True, opaque=True)
CALLS: Final = Writes(anything=True, opaque=True, sets=True)
"""What calls a function that is not known, which may call ``set_config`` itself."""
ROLLBACK: Final = Writes(rolls_back=True)

_by_compiled: WeakKeyDictionary[Any, Writes] = WeakKeyDictionary()
_by_text: dict[tuple[str, str], Writes] = {}


def writes_of(context: Any, statement: str) -> Writes:
    """Return what a statement about to be executed writes."""
    compiled = None if context is None else context.compiled
    if compiled is None or (context.is_crud and statement.startswith("SELECT")):
        # The second asks for the default of a column, in the context of the INSERT.
        return _text(statement, "" if context is None else context.dialect.name)
    known = _by_compiled.get(compiled)
    if known is None:
        known = _read(compiled, statement)
        # Most statements only read: that is seen by the identity of what they write.
        known = _by_compiled[compiled] = NOTHING if known == NOTHING else known
    return known


def rows_of(writes: Writes, context: Any) -> list[RowKey] | None:
    """Return the keys of the rows that a statement names, or ``None`` if they are not known."""
    if not writes.key:
        return None
    keys: list[RowKey] = []
    dialect = context.dialect.name
    # The old values, and the new ones where an UPDATE sets them.
    versions = (0, -1) if any(len(c.parameters) > 1 for c in writes.key) else (0,)
    for parameters in context.compiled_parameters:
        for which in versions:
            key = []
            for column in writes.key:
                value = parameters.get(column.parameters[which])
                if type(value) is not column.plain:
                    value = exact_value(column.column, value, dialect)
                    if value is None:
                        return None
                key.append(value)
            keys.append(tuple(key))
    return keys


def _plain(column: Column[Any], dialect: str) -> type | None:
    """Return the type of which all values are exact: see :func:`exact_value`."""
    if isinstance(column.type, types.Integer) and dialect not in MYSQL:
        return int
    return uuid.UUID if isinstance(column.type, types.Uuid) else None


def inserted_rows(writes: Writes, context: Any) -> list[RowKey] | None:
    """Return the keys that an executed INSERT gave its rows, or ``None`` if they are not known."""
    rows = context.inserted_primary_key_rows
    if rows is None or len(rows) != len(context.compiled_parameters):
        return None
    return exact_rows(writes, rows, context)


def exact_rows(writes: Writes, rows: Iterable[Any], context: Any) -> list[RowKey] | None:
    """Return keys as the database will give them back, or ``None`` if that is not sure."""
    dialect = context.dialect.name
    return _all_known(
        tuple(
            exact_value(c, value, dialect) for c, value in zip(writes.primary_key, row, strict=True)
        )
        for row in rows
    )


def returned_rows(writes: Writes, rows: Iterable[Any]) -> list[RowKey] | None:
    """Return the keys of rows that RETURNING gave, or ``None`` if they are not known."""
    return _all_known(
        tuple(returned_value(row._mapping[column]) for column in writes.primary_key) for row in rows
    )


def _all_known(keys: Iterable[RowKey]) -> list[RowKey] | None:
    result = list(keys)
    return None if any(None in key for key in result) else result


def returned_value(value: Any) -> Any:
    """Return a key's value that the database gave back in the form in which records have it.

    ``None`` for one that can be no key in Python: an array.
    """
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        return to_utc(value)
    return None if isinstance(value, list | dict | set) else value


_EXACT: Final[tuple[tuple[type[types.TypeEngine[Any]], type], ...]] = (
    (types.Integer, int),
    (types.Uuid, uuid.UUID),
    (types.LargeBinary, bytes),
    (types.String, str),
    (types.Date, dt.date),
    (types.DateTime, dt.datetime),
)


def exact_value(column: Column[Any], value: Any, dialect: str = "") -> Any:
    """Return a key's value as the database will give it back, or ``None`` if that is not sure."""
    type_ = column.type
    mysql = dialect in MYSQL
    if value is None or isinstance(type_, types.Enum | types.CHAR):
        return None
    if mysql and value == 0 and column is column.table._autoincrement_column:
        return None  # it is given the next number instead
    if type(value) is str and value.endswith(" "):
        return None  # VARCHAR(n) cuts off the spaces that do not fit
    for kind, python in _EXACT:
        if isinstance(type_, kind):
            if type(value) is not python:
                return None
            if isinstance(value, dt.datetime) and isinstance(type_, types.DateTime):
                if type_.timezone and dialect not in ("postgresql", ""):
                    return None  # the zone is dropped
                if (value.tzinfo is not None) is not type_.timezone:
                    return None
                if value.microsecond and (mysql or getattr(type_, "precision", None) is not None):
                    return None  # it may be cut off
                return to_utc(value) if type_.timezone else value
            return value
    return None


# -- compiled statements -----------------------------------------------------------------------


def _read(compiled: Any, text: str) -> Writes:
    statement = compiled.statement
    dialect = compiled.dialect.name
    if isinstance(statement, RollbackToSavepointClause):
        return ROLLBACK
    if isinstance(statement, SavepointClause | ReleaseSavepointClause):
        return NOTHING
    if isinstance(statement, TextClause):
        return _text(text, dialect)
    if isinstance(statement, ExecutableDDLElement):
        return replace(ANYTHING, sets=TEMPORARY.search(text) is not None)
    if isinstance(statement, Insert | Update | Delete) and isinstance(statement.table, Table):
        inside = _reading(statement, dialect, inside_of=statement)
        if inside is None:
            return CALLS
        return replace(_dml(statement, compiled), tables=inside)
    if isinstance(statement, SelectBase):
        inside = _reading(statement, dialect, inside_of=None)
        if inside is None:
            return CALLS
        return Writes(tables=inside, sets="set_config" in text.lower())
    return ANYTHING


def _reading(statement: Any, dialect: str, *, inside_of: Any) -> frozenset[TableName] | None:
    """Return the tables written by parts of a statement (CTEs); ``None`` if it may do anything."""
    tables: set[TableName] = set()
    for element in visitors.iterate(statement):
        if isinstance(element, UpdateBase) and element is not inside_of:
            if not isinstance(element.table, Table):
                return None
            tables.add(table_name(element.table))
            tables |= all_cascades(element.table)
        elif isinstance(element, FunctionElement):
            if function_name(element) not in READING_FUNCTIONS:
                return None
        elif isinstance(element, TextClause) and not only_reads(element.text, dialect):
            return None
        elif isinstance(element, ColumnClause) and element.is_literal:
            if not only_reads(element.name, dialect):
                return None
    return frozenset(tables)


def _dml(statement: Any, compiled: Any) -> Writes:
    # For a class in a hierarchy, the ORM runs one statement for each of its tables.
    table = getattr(compiled.compile_state, "dml_table", statement.table)
    if not isinstance(table, Table):
        return ANYTHING
    name, dialect = table_name(table), compiled.dialect.name
    primary_key = tuple(table.primary_key.columns)
    if isinstance(statement, Insert):
        if replaces(statement, table):
            # Rows that the statement does not name are deleted.
            others = frozenset({name}) | cascades(table, deleted=True, columns=None)
            return Writes(table=name, further=others, kind="upsert", replaces=True)
        if statement._post_values_clause is not None or statement._prefixes:
            others = cascades(table, deleted=False, columns=None)
            known = () if _moves_key(statement._post_values_clause, primary_key) else primary_key
            return Writes(
                table=name, further=others, kind="upsert", unnamed=bool(known), primary_key=known
            )
        named = statement.select is None and not statement._multi_values
        key = (
            tuple(KeyColumn(c, (c.key,), _plain(c, dialect)) for c in primary_key) if named else ()
        )
        return Writes(
            table=name, kind="insert", key=key, unnamed=not named, primary_key=primary_key
        )
    deleted = isinstance(statement, Delete)
    written = (
        frozenset() if deleted else _written_columns(statement, table, compiled.column_keys or ())
    )
    tables = cascades(table, deleted=deleted, columns=written)
    replacing = False
    if not deleted:  # MySQL: UPDATE a, b SET b.x = ...
        for other, columns in _other_targets(statement, table).items():
            tables |= {table_name(other)} | cascades(other, deleted=False, columns=columns)
        replacing = replaces(statement, table)
        if replacing:
            # Rows that are in the way of the new values are deleted.
            tables |= {name} | cascades(table, deleted=True, columns=None)
    pins = pinned(statement, table)
    keys: list[KeyColumn] = []
    for column in primary_key:
        if column.key not in pins:
            keys = []
            break
        bound = pins[column.key]
        names: tuple[str, ...] = (compiled.bind_names.get(bound, bound.key),)
        if column.name in written:
            names = (*names, column.key)
        keys.append(KeyColumn(column, names, _plain(column, dialect)))
    moves_key = deleted or any(column.name in written for column in primary_key)
    return Writes(
        table=name,
        further=tables,
        kind="delete" if deleted else "update",
        key=tuple(keys),
        columns=None if moves_key else written,
        replaces=replacing,
        primary_key=primary_key,
    )


def _moves_key(clause: Any, primary_key: Sequence[Column[Any]]) -> bool:
    """Whether ON CONFLICT or ON DUPLICATE KEY may change a key, of which RETURNING is the new."""
    sets = dict(getattr(clause, "update_values_to_set", getattr(clause, "update", None)) or ())
    names = {str(getattr(column, "key", column)) for column in sets}
    return any(not names.isdisjoint((column.key, column.name)) for column in primary_key)


def _other_targets(statement: Update, table: Table) -> dict[Table, frozenset[str]]:
    """Return the columns that an UPDATE sets in other tables than its own."""
    result: dict[Table, frozenset[str]] = {}
    for column in _set_columns(statement):
        other = getattr(column, "table", None)
        if isinstance(other, Table) and other is not table:
            result[other] = result.get(other, frozenset()) | {column.name}
    return result


def _set_columns(statement: Any) -> list[Any]:
    return [
        *(statement._values or ()),
        *(column for column, _ in getattr(statement, "_ordered_values", None) or ()),
    ]


def pinned(statement: Any, table: Table) -> dict[str, BindParameter[Any]]:
    """Return the columns that the WHERE of an UPDATE or DELETE says are equal to a value."""
    result: dict[str, BindParameter[Any]] = {}
    for criterion in statement._where_criteria:
        for conjunct in conjuncts(criterion):
            if isinstance(conjunct, BinaryExpression) and conjunct.operator is operators.eq:
                left, right = conjunct.left, conjunct.right
                if (
                    isinstance(left, Column)
                    and isinstance(right, BindParameter)
                    and table.c.get(left.key) is not None
                    and left.table == table
                ):
                    result[left.key] = right
    return result


def replaces(statement: Any, table: Table) -> bool:
    """Whether an INSERT or UPDATE may delete other rows: REPLACE."""
    return _replaces(table) or any(
        "REPLACE" in str(prefix).upper() for prefix, _ in statement._prefixes
    )


def _replaces(table: Table) -> bool:
    """Whether a constraint has SQLite delete other rows: ON CONFLICT REPLACE."""
    return any(
        str(value).upper() == "REPLACE"
        for element in (*table.constraints, *table.columns)
        for name, value in element.dialect_kwargs.items()
        if name.startswith("sqlite_on_conflict")
    )


def _written_columns(statement: Any, table: Table, parameters: Sequence[str]) -> frozenset[str]:
    """Return the columns that an UPDATE sets, by its values and by its parameters' names.

    Those that are set by themselves are among them: ``onupdate``, generated columns.
    """
    names = {str(getattr(column, "key", column)) for column in _set_columns(statement)}
    names.update(name for name in parameters if name in table.c)
    names.update(
        column.key
        for column in table.c
        if column.onupdate is not None
        or column.server_onupdate is not None
        or column.computed is not None
    )
    # Other models may have other keys for the same columns.
    return frozenset(table.c[name].name if name in table.c else name for name in names)


# -- text --------------------------------------------------------------------------------------

#: First words of statements that write no row.
_QUIET: Final = frozenset(
    """show set reset begin start savepoint release rollback lock unlock pragma describe desc
    deallocate fetch close listen unlisten notify vacuum use xa""".split()
)
_READS: Final = frozenset("select values table with explain analyze".split())
_ENDS: Final = frozenset("commit end prepare".split())
_SETS: Final = frozenset("set reset use".split())
#: Those that commit what was written before, on MySQL and MariaDB.
_COMMIT_ON_MYSQL: Final = frozenset("set reset begin start lock unlock analyze".split())


_TARGET = re.compile(
    r"(?:insert\s+(?:ignore\s+)?into|update(?:\s+only)?|delete\s+from(?:\s+only)?)\s+"
    r"(?!(?:ignore|low_priority)\b)"
    r"(?:(?P<schema>[a-z_]\w*)\.)?(?P<table>[a-z_]\w*)\s*"
    r"(?:(?:as\s+)?(?!(?:set|where|values|select|default|using|returning)\b)[a-z_]\w*\s*)?"
    r"(?=\(|$|(?:set|where|values|select|default|using|returning)\b)"
)
_HARMLESS = re.compile(
    r"\bon\s+conflict\b|\bdo\s+(?:update|nothing)\b|\bon\s+duplicate\s+key\s+update\b"
)


def _target(words: str, text: str, dialect: str) -> TableName | None:
    """Return the one table that a text writes, if it can be seen that it writes no other."""
    found = _TARGET.match(words)
    if found is None or UNKNOWN_NAME in found.group():
        return None
    if not only_reads(_HARMLESS.sub(" ", words[found.end() :]), dialect):
        return None
    if dialect in MYSQL and found["table"] not in text:
        return None  # its name has capitals, which may make it another table
    return found["schema"], found["table"]


def _text(text: str, dialect: str) -> Writes:
    known = _by_text.get((dialect, text))
    if known is None:
        if len(_by_text) > 1_000:
            _by_text.clear()
        known = _read_text(text, dialect)
        known = _by_text[dialect, text] = NOTHING if known == NOTHING else known
    return known


def _read_text(text: str, dialect: str) -> Writes:
    mysql = dialect in MYSQL
    words = bare(text, dialect).strip().lstrip("( ").lower()
    word = re.match(r"\w*", words)
    first = word.group() if word else ""
    single = ";" not in words.rstrip(";").rstrip() and not hides(text)
    commits = mysql and first in _COMMIT_ON_MYSQL
    calls_set = "set_config" in words
    moves = first == "use" or MOVES.search(text.lower()) is not None
    if single and first in _QUIET and not UNSEEN.match(words):
        return Writes(
            opaque=commits,
            # LOCK TABLES outlives the transaction.
            sets=first in _SETS or "isolation" in words or (mysql and first == "lock"),
            rolls_back=first == "rollback",
            moves=first in _SETS and moves,
            locks=first == "lock",
        )
    if first in _READS and only_reads(text, dialect):
        return Writes(opaque=commits, sets=calls_set, moves=calls_set and moves)
    if single and first in _ENDS and not UNSEEN.match(words):
        return Writes(opaque=True)
    if single and (target := _target(words, text, dialect)) is not None:
        return Writes(table=target, kind="text", sets=calls_set, moves=calls_set and moves)
    if single and sets_nothing(first, words):
        return replace(ANYTHING, sets=TEMPORARY.search(words) is not None)
    return replace(CALLS, moves=moves)
