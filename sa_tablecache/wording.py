"""What SQL text can be seen to do, by its words; pure.

Nothing here parses SQL: what cannot be seen to only read counts as writing.
"""

from __future__ import annotations

import re
from typing import Final

from .functions import READING_FUNCTIONS

MYSQL: Final = ("mysql", "mariadb")
"""The names of SQLAlchemy's dialects of which comments and commits are peculiar."""


def _quoting(comment: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?P<name>\"[^\"]*\"|`[^`]*`)|(?P<comment>{comment}|/\*.*?\*/)"
        r"|'(?:[^'\\]|''|\\.)*'|(?<![\w$])\$(?P<tag>\w*)\$.*?\$(?P=tag)\$",
        re.DOTALL,
    )


_QUOTED = _quoting(r"--[^\n]*")
_MYSQL_QUOTED = _quoting(r"--(?=\s|$)[^\n]*|\#[^\n]*")


UNKNOWN_NAME: Final = "_quoted_name_"


def bare(text: str, dialect: str) -> str:
    """Return text without strings and comments; a quoted name is one that nobody knows."""
    return (_MYSQL_QUOTED if dialect in MYSQL else _QUOTED).sub(
        lambda m: f" {UNKNOWN_NAME} " if m["name"] else " " if m["comment"] else " '' ", text
    )


def hides(text: str) -> bool:
    """Whether anything in the text may hide what it does: an escape, an executable comment."""
    return "\\" in text or "/*!" in text or "/*M!" in text


_WRITING = re.compile(
    r"\b(insert|update|delete|merge|into|call|do|copy|create|alter|drop|truncate|execute|import"
    r"|refresh|grant|revoke|rename|attach|detach|load|handler)\b|\breplace\b(?!\s*\()",
    re.IGNORECASE,
)
_CALLS = re.compile(r"([\w.]+)\s*\(")
_LOCKS = re.compile(r"\bfor\s+(no\s+key\s+)?update\b", re.IGNORECASE)
TEMPORARY = re.compile(r"\btemp(orary)?\b", re.IGNORECASE)
"""What may put another table in front of the one that a name means elsewhere."""
MOVES = re.compile(r"search_path|\bschema\b|\brole\b|\bauthorization\b|set_config\s*\(\s*[^'\s]")

#: ``SET STATEMENT .. FOR`` runs any statement, and the others commit what somebody has prepared.
UNSEEN = re.compile(r"set\s+statement\b|xa\s+commit\b|commit\s+prepared\b")


def only_reads(text: str, dialect: str) -> bool:
    """Whether text can be seen to write nothing: no writing word, and known functions only."""
    if hides(text):
        return False
    words = _LOCKS.sub(" ", bare(text, dialect))
    if _WRITING.search(words) or ";" in words.strip().rstrip(";"):
        return False
    return _calls_only_known(words)


def _calls_only_known(words: str) -> bool:
    """Whether text calls no function that might do anything."""
    return all(name.lower() in READING_FUNCTIONS for name in _CALLS.findall(words))


#: First words of statements that write, and set nothing if the functions that they call do not.
_WRITES: Final = frozenset("insert update delete merge replace".split())
_DEFINES: Final = frozenset("create alter drop truncate copy comment grant revoke refresh".split())
#: A table with its columns, which is no function with its arguments.
_INTO: Final = re.compile(r"\binto\s+[\w.]+\s*\(")


def sets_nothing(first: str, words: str) -> bool:
    """Whether a single statement, by its first word, cannot change what the connection sees."""
    if first in _DEFINES:
        return "select" not in words
    if "set_config" in words:
        return False
    return first in _WRITES and _calls_only_known(_INTO.sub(" ", words))
