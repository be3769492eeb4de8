"""Which rows of an SQLite table REPLACE would delete: its unique indexes, as conditions in SQL.

In: a connection and a table. Out: :class:`Conflict` after :class:`Conflict`, for triggers that fire
before a row is written. SQLite fires no DELETE trigger for a row that gives way to another, unless
the writer has set ``recursive_triggers``, which nobody can rely on.

A condition may hold for more rows than give way (those of an upsert, say), never for fewer. What
cannot be said in a condition is said as "any row of the table".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from .contract import Relation

_PIECE: Final = re.compile(
    r"""--[^\n]* | /\*(?:.*?\*/|.*) | '(?:[^']|'')*' | "(?:[^"]|"")*" | `(?:[^`]|``)*`
    | \[[^\]]*\] | [\w$]+ | \s+ | .""",
    re.VERBOSE | re.DOTALL,
)
_ROWIDS: Final = ("rowid", "_rowid_", "oid")

#: Functions and words of which an expression means the same over NEW as over a stored row: none of
#: them asks for the affinity or the collation of a column.
_FUNCTIONS: Final = frozenset(
    """abs cast char coalesce date datetime format hex ifnull instr json_extract julianday length
    lower ltrim printf quote replace round rtrim strftime substr substring time trim unicode
    upper""".split()
)
_WORDS: Final = frozenset(
    "as asc binary blob collate desc integer nocase null numeric real rtrim text".split()
)


class Conflict(NamedTuple):
    """Rows that may give way to a row that is about to be written."""

    columns: tuple[str, ...]
    """Unless an UPDATE changes one of these columns, none does; empty: that is not known."""
    condition: str
    """In SQL, over ``NEW`` and the table as ``t``."""
    any_row: bool = False
    """Whether the condition is about ``NEW`` alone, and any row may give way if it holds."""


def quoted(name: str) -> str:
    """Quote an identifier."""
    return '"' + name.replace('"', '""') + '"'


def folded(name: str) -> str:
    """Return a name as SQLite compares names: without regard to the case of ASCII letters."""
    return re.sub("[A-Z]+", lambda letters: letters[0].lower(), name)


def words(sql: str) -> list[str]:
    """Return the words, literals and signs of SQL text; words in lower case, names unquoted."""
    pieces = (piece for piece in _PIECE.findall(sql) if not piece.isspace())
    return [folded(_bare(piece)) for piece in pieces if piece[:2] not in ("--", "/*")]


def raises_ignore(trigger: str) -> bool:
    """Whether a trigger may keep others of the same event from firing after the row was written."""
    pieces = words(trigger)
    return "after" in pieces and any(
        pieces[place : place + 3] == ["raise", "(", "ignore"] for place in range(len(pieces))
    )


def has_rowid(sql: str) -> bool:
    """Whether CREATE TABLE makes a table with a rowid."""
    return "without" not in words(sql[_parts(sql)[1] :])


def conflicts(
    connection: Connection, relation: Relation, sql: str, key: Sequence[str]
) -> Iterator[Conflict]:
    """Yield what a row that is written may replace: two statements, and one for each index.

    Nothing for a table of which each change is one of any row, having no key, and nothing for a row
    of the same key: that is logged with the row that is written.

    :param sql: CREATE TABLE, as the catalog has it.
    """
    if not key:
        return
    schema, table = quoted(relation.schema or "main"), quoted(relation.name)
    prefix = f"PRAGMA {schema}"
    columns = connection.exec_driver_sql(f"{prefix}.table_xinfo({table})").all()
    indexes = connection.exec_driver_sql(f"{prefix}.index_list({table})").all()
    names = {folded(column[1]): column[1] for column in columns}
    rowid = None
    if has_rowid(sql):
        rowid = next((alias for alias in _ROWIDS if alias not in names), None)
        keys = [column for column in columns if column[5]]
        if len(keys) == 1 and folded(keys[0][2]) == "integer":
            if not any(index[3] == "pk" for index in indexes):
                rowid = keys[0][1]
    logged = {folded(name) for name in key}
    if rowid is not None and {folded(rowid)} != logged:
        yield Conflict((rowid,), f"t.{quoted(rowid)} = NEW.{quoted(rowid)}")
    generated = {folded(column[1]) for column in columns if column[6] in (2, 3)}
    made_of = _columns_in(sql, generated)
    # Before INSERT nobody knows the rowid that the row is going to have, nor what is made of it.
    rowids = {folded(rowid), *_ROWIDS} if rowid is not None else set()
    lost = generated if made_of is None or not made_of.isdisjoint(rowids) else set()
    sources = sorted(names[name] for name in (made_of or ()) if name in names)
    unique = [index for index in indexes if index[2]]
    for index in sorted(unique, key=lambda index: str(index[1])):
        terms: list[Any] = [
            term
            for term in connection.exec_driver_sql(f"{prefix}.index_xinfo({quoted(index[1])})")
            if term[5]
        ]
        bytewise = {folded(term[2]) for term in terms if term[2] and term[4] == "BINARY"}
        if bytewise.issuperset(logged):
            continue
        made = connection.exec_driver_sql(
            f"SELECT sql FROM {schema}.sqlite_master WHERE type = 'index' AND name = ?",
            (index[1],),
        ).scalar()
        conflict = _conflict(names, lost, rowids, terms, made, index[4])
        if sources and not conflict.any_row and not generated.isdisjoint(words(conflict.condition)):
            # Before UPDATE, SQLite computes them from those columns of NEW that triggers name.
            named = ", ".join(f"NEW.{quoted(name)}" for name in sources)
            conflict = Conflict((), f"{conflict.condition} AND coalesce({named}, 1) IS NOT NULL")
        yield conflict
    if not unique:
        return
    for column in columns:
        # REPLACE stores the default where NEW has NULL.
        if column[3] and column[4] is not None and column[1] != rowid and column[6] == 0:
            yield Conflict((column[1],), f"NEW.{quoted(column[1])} IS NULL", any_row=True)


_ANY: Final = Conflict((), "1", any_row=True)


def _conflict(
    names: dict[str, str],
    lost: set[str],
    rowids: set[str],
    terms: Sequence[Any],
    sql: str | None,
    partial: Any,
) -> Conflict:
    """Return the condition of one unique index.

    :param names: the table's columns, by folded name.
    :param lost: columns of which nobody knows the values before INSERT.
    :param rowids: names of the rowid, of which nobody knows it either; but it is a new one then.
    """
    expressions, where = _index_parts(sql or "")
    conditions, plain = [], []
    for place, (_, number, name, _, collation, _) in enumerate(terms):
        collate = f"COLLATE {quoted(collation)}"
        if number >= 0:
            if folded(name) in lost:
                return _ANY
            plain.append(name)
            conditions.append(f"t.{quoted(name)} = NEW.{quoted(name)} {collate}")
            continue
        if place >= len(expressions):
            return _ANY
        expression = re.sub(r"(?is)\s(asc|desc)\s*$", "", expressions[place]).strip()
        used = words(expression)
        if not _same_over_new(expression, names) or not (lost | rowids).isdisjoint(used):
            return _ANY
        row = ", ".join(
            f"NEW.{quoted(names[name])} AS {quoted(names[name])}" for name in names if name in used
        )
        conditions.append(f"({expression}) = (SELECT {expression} FROM (SELECT {row})) {collate}")
    if partial:
        if where is None or not _names_are_names(where, names):
            return _ANY
        conditions.append(f"({where})")
    guarded = not partial and len(plain) == len(terms)
    return Conflict(tuple(plain) if guarded else (), " AND ".join(conditions))


def _bare(piece: str) -> str:
    """Return a quoted name without its quotes, and anything else as it is."""
    if piece[0] in '"`' and len(piece) > 1:
        return piece[1:-1].replace(piece[0] * 2, piece[0])
    return piece[1:-1] if piece[0] == "[" else piece


def _pieces(sql: str) -> Iterator[tuple[str, int, int]]:
    """Yield each piece with its depth in parentheses and its place; comments are left out."""
    depth = 0
    for match in _PIECE.finditer(sql):
        piece = match[0]
        depth -= piece == ")"
        if not piece.isspace() and piece[:2] not in ("--", "/*"):
            yield piece, depth, match.start()
        depth += piece == "("


def _parts(sql: str) -> tuple[list[str], int]:
    """Return what stands between the commas of the first parentheses, and where they end."""
    start: int | None = None
    parts: list[str] = []
    for piece, depth, place in _pieces(sql):
        if start is None:
            if piece == "(":
                start = place + 1
        elif depth == 0 and piece == ")":
            return [*parts, sql[start:place]], place + 1
        elif depth == 1 and piece == ",":
            parts.append(sql[start:place])
            start = place + 1
    return parts, len(sql)


def _index_parts(sql: str) -> tuple[list[str], str | None]:
    """Return the terms of CREATE INDEX, and its WHERE."""
    sql = "".join(" " if piece[:2] in ("--", "/*") else piece for piece in _PIECE.findall(sql))
    parts, end = _parts(sql)
    for piece, _, place in _pieces(sql[end:]):
        if piece.lower() == "where":
            return parts, sql[end + place + 5 :].strip()
    return parts, None


def _columns_in(sql: str, columns: set[str]) -> set[str] | None:
    """Return the words in the definitions of columns, in CREATE TABLE; ``None``: not found."""
    found, used = set(), set()
    for part in _parts(sql)[0]:
        column, *definition = words(part) or [""]
        if column in columns:
            found.add(column)
            used.update(definition)
    return used if found == columns else None


def _names_are_names(sql: str, columns: dict[str, str]) -> bool:
    """Whether what stands in double quotes is a column: else it may be text, or an error."""
    return all(folded(_bare(piece)) in columns for piece, _, _ in _pieces(sql) if piece[0] in '"`')


def _same_over_new(sql: str, columns: dict[str, str]) -> bool:
    """Whether an expression over columns means the same over a row that is not stored yet."""
    pieces = [piece for piece, _, _ in _pieces(sql)]
    for piece, following in zip(pieces, [*pieces[1:], ""], strict=True):
        word = folded(piece)
        if piece[0] in '"`[' or re.match(r"[^\W\d]|\$", piece):
            known = word in (_FUNCTIONS if following == "(" else _WORDS)
            if not known and folded(_bare(piece)) not in columns:
                return False
        elif piece in ("=", "<", ">", "!", "&", "~"):
            return False
    return _names_are_names(sql, columns)
