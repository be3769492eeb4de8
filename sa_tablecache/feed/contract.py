"""What a dialect provides for a change feed: a changelog filled by triggers, and how it is read.

A :class:`Changelog` is stateless: each method is given a connection, or returns SQL. Who reads
keeps the :class:`Position` of the last poll. What flows out of a poll is frozen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

from sqlalchemy import Connection

VERSION: Final = 1
"""The version of the changelog that is installed; a reader understands it and the one before."""

MOST_KEYS: Final = 1_000
"""A statement that changes more rows than this is logged without their keys."""


class Relation(NamedTuple):
    """A table of the database, by its resolved name."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name


@dataclass(frozen=True, slots=True)
class Watch:
    """How one table is to be watched; what autogenerate compares and migrations render."""

    relation: Relation
    key: tuple[str, ...]
    """The columns that are logged of a changed row, old and new; empty: none can tell which it is.

    The primary key, and perhaps others by which views group.
    """
    ranges: tuple[str, ...] = ()
    """Columns of which a big statement logs the smallest and the largest value, old and new."""
    limit: int = MOST_KEYS
    cascades: tuple[Any, ...] = ()
    """What a write does to other rows without firing triggers, as the dialect puts it.

    Foreign keys of MariaDB and MySQL; REPLACE, in SQLite. :meth:`Changelog.propose` finds it.
    """


class Change(NamedTuple):
    """What one statement did to one table, or a part of it."""

    relation: Relation
    operation: str
    """``I``, ``U``, ``D`` or ``T`` (TRUNCATE)."""
    keys: tuple[tuple[Any, ...], ...] | None
    """Values of the watched key, as JSON has them; ``None``: any row of the table."""
    ranges: Mapping[str, tuple[Any, Any]] | None = None
    """With ``keys=None``: the smallest and largest value, as JSON has them, of each range column.

    ``(None, None)`` if all were NULL. A column of which a NULL was among others is left out.
    """
    at: Any = None
    """Where in the changelog it stands: an xid, a sequence number."""


class Position(ABC):
    """How far a changelog was read: which transactions are behind it. Immutable."""

    @abstractmethod
    def sees(self, change: Change) -> bool:
        """Whether a change was committed before this position; ``False`` if that is not known."""

    @abstractmethod
    def includes(self, other: Position) -> bool:
        """Whether everything before another position is before this one.

        ``False`` if it is not known, or if they are of different incarnations of the server.
        """

    @abstractmethod
    def __str__(self) -> str:
        """Return it as a short token of printable ASCII, without quotes, commas and semicolons."""


@dataclass(frozen=True, slots=True)
class Poll:
    """What one poll found, all of one moment."""

    position: Position
    changes: tuple[Change, ...] = ()
    gap: str | None = None
    """Why changes may be missing, so that everything is stale: trimmed past, crash, restore."""
    fingerprints: Mapping[Relation, str] = field(default_factory=dict)
    """Of each relation, what changes whenever DDL may have changed its rows or its triggers."""
    untrusted: Mapping[Relation, str] = field(default_factory=dict)
    """Relations whose changes are not (all) logged now, and why: for health() and check()."""


@dataclass(frozen=True, slots=True)
class Installation:
    """What of a change feed a database has."""

    version: int | None
    """``None`` if nothing is installed."""
    watched: Mapping[Relation, Watch] = field(default_factory=dict)
    outdated: Mapping[Relation, str] = field(default_factory=dict)
    """Watched relations whose triggers are missing, disabled or of another version, and why."""
    hindered: Mapping[Relation, str] = field(default_factory=dict)
    """Watched relations whose changes are not all logged for another reason, and why: watching them
    again would not help."""


def run(connection: Connection, statements: Iterable[str]) -> None:
    """Execute statements as they are."""
    for statement in statements:
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


class Changelog(ABC):
    """The changelog of one dialect.

    Its statements are for :func:`run`, one by one: names in them may have percent signs.
    """

    finds_anything: ClassVar[bool] = False
    """Whether a poll tells of whatever SQL may do to a watched table: TRUNCATE, DDL, functions.

    Logged, or by a fingerprint that moves, even where triggers were switched off and on again.
    """
    finds_replaced: ClassVar[bool] = True
    """Whether the rows that REPLACE deletes are logged, whatever the settings of the writer."""
    wakes: ClassVar[bool] = False
    """Whether :meth:`notify` wakes anybody."""

    # -- installing: SQL only, so that it can be rendered offline -------------------------------

    @abstractmethod
    def create(self) -> Sequence[str]:
        """Return the statements that install the changelog; harmless where it is installed."""

    @abstractmethod
    def drop(self, watched: Iterable[Relation] = ()) -> Sequence[str]:
        """Return the statements that remove the changelog, all triggers included.

        :param watched: the tables that are watched, as :meth:`installed` has them: SQLite, MariaDB
            and MySQL have no statement that finds triggers and drops them. Others may ignore it.
        """

    @abstractmethod
    def watch(self, watch: Watch) -> Sequence[str]:
        """Return the statements that watch a table, or watch it otherwise than before."""

    @abstractmethod
    def unwatch(self, relation: Relation) -> Sequence[str]:
        """Return the statements that no longer watch a table; harmless if it is not watched."""

    @abstractmethod
    def invalidate(self, relation: Relation) -> Sequence[str]:
        """Return the statements that log a change of any row of a table."""

    # -- asking the catalog ---------------------------------------------------------------------

    @abstractmethod
    def installed(self, connection: Connection) -> Installation:
        """Return what is installed."""

    @abstractmethod
    def resolve(
        self, connection: Connection, names: Iterable[tuple[str | None, str]]
    ) -> Mapping[tuple[str | None, str], Relation]:
        """Return the relations that names, with or without a schema, mean; absent: no such."""

    @abstractmethod
    def propose(
        self,
        connection: Connection,
        relation: Relation,
        ranges: Sequence[str] = (),
        key: Sequence[str] = (),
    ) -> Watch:
        """Return how a table is best watched: its primary key, its cascades.

        :param key: columns to log instead of the primary key; what a write does depends on them.
        """

    @abstractmethod
    def owned(self) -> frozenset[Relation]:
        """Return the changelog's own tables, ``schema=""`` for the default one."""

    # -- reading --------------------------------------------------------------------------------

    @abstractmethod
    def position(self, connection: Connection) -> Position:
        """Return the position of now (in a snapshot: that of the snapshot).

        :raises FeedUnavailable: if no changelog of a known version is installed.
        """

    @abstractmethod
    def parse(self, token: str) -> Position:
        """Return the position that a token says.

        :raises ValueError: if it is none.
        """

    @abstractmethod
    def poll(
        self, connection: Connection, position: Position, relations: frozenset[Relation]
    ) -> Poll:
        """Return what was committed between a position and now; each change exactly once.

        :param connection: in autocommit, or at the begin of a transaction.
        :param relations: those whose fingerprint and triggers are to be looked at; changes of
            others may be left out.
        :raises FeedUnavailable: if no changelog of a known version is installed.
        """

    @abstractmethod
    def trim(self, connection: Connection, keep: float) -> int:
        """Delete what is older than some seconds and nobody can need; blocks no writer.

        A reader whose position is before what was deleted finds a gap at its next poll.

        :returns: the number of deleted entries; -1 if another process is trimming.
        """

    @abstractmethod
    def notify(self, connection: Connection) -> None:
        """Wake up those who listen; nothing where the dialect has no such thing."""
