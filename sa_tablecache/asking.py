"""How the catalog of a database is asked for a table: by which name, and as a mere reader.

In: a connection, and a table as a view knows it. Out: its name where it is, and as SQL has it.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection

from .analysis import TableName

READS: Final[dict[str, Any]] = {"writes": []}
"""Execution options of what the cache asks by itself: it writes no table of a view."""


def translated(connection: Connection, table: TableName) -> TableName:
    """Return a table's name after ``schema_translate_map``."""
    translate = connection.get_execution_options().get("schema_translate_map") or {}
    return translate.get(table[0], table[0]), table[1]


def full_name(connection: Connection, table: TableName) -> str:
    """Return a table's name as SQL has it: a value to look for, and no text to format."""
    return ".".join(quoted(connection, part) for part in translated(connection, table) if part)


def quoted(connection: Connection, name: str, *, always: bool = False) -> str:
    """Return a quoted name; only where it has to be, or always.

    The dialect's own function doubles ``%`` for drivers that format statements.
    """
    preparer = connection.dialect.identifier_preparer
    found = str((preparer.quote_identifier if always else preparer.quote)(name))
    doubles = preparer.quote_identifier("%").count("%") == 2
    return found.replace("%%", "%") if doubles else found
