"""What was written, and what of a view it may have made stale.

In: a :class:`ChangeSet`, the tables and rows that one transaction wrote. Out: *marks*, for one
view. Completeness comes before exactness: what has no exact keys marks whole tables, and a
superfluous mark costs one query, while a missing one would be a wrong answer.

Pure: no SQL, no SQLAlchemy events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

from .analysis import TableName
from .groups import GroupPath
from .scores import Interval

RowKey: TypeAlias = tuple[Any, ...]

MOST_KEYS = 5_000
"""More changed rows of one table than this mark the table."""

MOST_RANGES = 100
"""More statements than this of which only ranges are known mark the table."""


@dataclass(frozen=True, slots=True)
class Written:
    """What one transaction did to one row of a table; by default nothing is known of it."""

    columns: frozenset[str] | None = None
    """The names of the columns that were set, if all it did were UPDATEs that keep the key."""
    before: tuple[Mapping[str, Any], ...] | None = None
    """What the row was before, by column name, if that is known; empty if it did not exist.

    A mapping may lack columns.
    """
    logged: bool = False
    """Whether a change feed says so, which has what the row really was and became, both."""

    def then(self, later: Written) -> Written:
        """Return both, one after the other."""
        columns = (
            None if self.columns is None or later.columns is None else self.columns | later.columns
        )
        before = self.before
        if before is None and self.columns is not None and later.before is not None:
            # What the first did not set was the same before it.
            before = tuple(
                {name: value for name, value in row.items() if name not in self.columns}
                for row in later.before
            )
        return Written(columns, before)


UNKNOWN: Final = Written()

Ranges: TypeAlias = Mapping[str, tuple[Any, Any]]
"""For columns of a table, the smallest and the largest value, old and new, of rows that changed.

Twice ``None``: all were NULL. Otherwise none was.
"""


@dataclass(slots=True)
class ChangeSet:
    """The rows that a transaction wrote; a table without known rows was written somewhere."""

    rows: dict[TableName, dict[RowKey, Written]] = field(default_factory=dict)
    tables: set[TableName] = field(default_factory=set)
    everything: bool = False
    ranges: dict[TableName, list[Ranges]] = field(default_factory=dict)
    """Of tables of which the rows are not known, where they are; each of one statement."""
    unlogged: bool = False
    """Whether a change feed may not tell of some of it: rows that REPLACE deletes."""

    def add_rows(
        self, table: TableName, keys: Iterable[RowKey], written: Written = UNKNOWN
    ) -> None:
        """Note rows by primary key."""
        if table in self.tables:
            return
        known = self.rows.setdefault(table, {})
        for key in keys:
            earlier = known.get(key)
            known[key] = written if earlier is None else earlier.then(written)
        if len(known) > MOST_KEYS:
            self.add_table(table)
        elif not known:
            del self.rows[table]

    def add_table(self, table: TableName) -> None:
        """Note a table of which any row may have changed."""
        self.tables.add(table)
        self.rows.pop(table, None)
        self.ranges.pop(table, None)

    def add_ranges(self, table: TableName, ranges: Ranges) -> None:
        """Note a table of which any row in a range of values may have changed."""
        if not ranges or len(self.ranges.get(table, ())) >= MOST_RANGES:
            self.add_table(table)
        elif table not in self.tables:
            self.ranges.setdefault(table, []).append(ranges)

    def add_everything(self) -> None:
        """Note that any row of any table may have changed."""
        self.everything = True

    def update(self, other: ChangeSet) -> None:
        """Note all that another change set has."""
        self.everything = self.everything or other.everything
        self.unlogged = self.unlogged or other.unlogged
        for table in other.tables:
            self.add_table(table)
        for table, statements in other.ranges.items():
            for ranges in statements:
                self.add_ranges(table, ranges)
        for table, rows in other.rows.items():
            for key, written in rows.items():
                self.add_rows(table, [key], written)

    def forget_before(self) -> None:
        """Forget what rows were before: a savepoint was rolled back, and their locks with it.

        What it undid may be written by others, and by this transaction again. The rows stay noted:
        a superfluous mark is harmless.
        """
        for rows in self.rows.values():
            for key, written in rows.items():
                rows[key] = Written(written.columns)

    def touches(self, tables: Iterable[TableName]) -> bool:
        """Whether one of the tables was written."""
        return self.everything or any(
            t in self.tables or t in self.rows or t in self.ranges for t in tables
        )

    def sets_off(self, table: TableName, columns: frozenset[str] | None) -> bool:
        """Whether what was done to a table may set off actions of foreign keys that refer to it.

        :param columns: those of ON UPDATE of certain columns; ``None`` for those of ON DELETE.
        """
        return (table in self.tables or table in self.ranges) or any(
            written.before != ()
            if written.columns is None
            else columns is not None and not written.columns.isdisjoint(columns)
            for written in self.rows.get(table, {}).values()
        )

    def __bool__(self) -> bool:
        return self.everything or bool(self.tables or self.rows or self.ranges)


class Mark(NamedTuple):
    """Records that may be stale: those of a base row, or (:data:`VIEW`) all of the view."""

    table: TableName
    key: RowKey
    moves: bool = True
    """Whether records may have come, gone, or changed their place in an index.

    If not, exactly the stored records with the row in their lineage may be stale, and they are
    where they were: answers without them are right.
    """

    @property
    def kind(self) -> str:
        """By which marks are counted."""
        if self.table != VIEW.table:
            return "row"
        return "view" if self == VIEW else "unread"


VIEW: Final = Mark((None, ""), ())
"""The mark of a whole view."""

UNREAD: Final = Mark((None, ""), ("unread",))
"""The change feed has changes of the view that nobody has read: a poll says which rows they are."""


@dataclass(frozen=True, slots=True)
class GroupMark:
    """Records that may be stale because a row is, or was, in one of their groups."""

    names: tuple[str, ...]
    """Columns of the rendered view."""
    values: RowKey
    """What they are in these groups."""
    moves: ClassVar[bool] = True
    """A group may have come or gone, and so may any aggregate of it."""
    kind: ClassVar[str] = "group"
    """By which marks are counted."""


@dataclass(frozen=True, slots=True)
class RangeMark:
    """Records that may be stale because they are, or were, in an interval of an index."""

    index: str
    interval: Interval
    leave: bool = False
    """Whether records may have come into the interval from elsewhere, or left it."""
    moves: ClassVar[bool] = True
    kind: ClassVar[str] = "range"


AnyMark: TypeAlias = Mark | GroupMark | RangeMark
Marks: TypeAlias = frozenset[AnyMark]

_THE_VIEW: Final[Marks] = frozenset({VIEW})
_UNREAD: Final[Marks] = frozenset({UNREAD})
_NONE: Final[Marks] = frozenset()


def in_place(marks: Iterable[AnyMark]) -> frozenset[Mark]:
    """Return the marks that leave records where they are."""
    return frozenset(mark for mark in marks if isinstance(mark, Mark) and not mark.moves)


@dataclass(frozen=True, slots=True)
class Concern:
    """What a view has to do with one of its tables."""

    used: frozenset[str]
    """The names of the columns that the view's statement uses in any way."""
    placing: frozenset[str]
    """Those that decide which records there are, and where in an index."""
    followed: bool = True
    """Whether a changed row can be followed to the view's records, by its key or by groups."""
    by_key: bool = True
    """Whether its key leads to records, or to the groups that it is part of now."""
    opaque: bool = False
    """Whether an UPDATE may change columns that it does not name: generated ones, triggers."""
    paths: tuple[GroupPath, ...] = ()
    """How a changed row leads to groups."""
    scores: tuple[tuple[str, str], ...] = ()
    """Columns by whose values all records with a row are found: the names of a column, and of the
    index that it leads."""
    interval: Callable[[str, Any, Any], Interval | None] | None = None
    """Returns the interval of an index between two values, if Python sorts them as the database."""

    def range_mark(self, ranges: Ranges) -> RangeMark | None:
        """Return the mark of the records with rows in a range of values, if that can be told."""
        if self.followed and self.interval is not None:
            for column, index in self.scores:
                if column in ranges:
                    interval = self.interval(index, *ranges[column])
                    if interval is not None:
                        return RangeMark(index, interval)
        return None


def marks_of(
    tables: frozenset[TableName],
    concerns: Mapping[TableName, Concern],
    changes: ChangeSet,
    *,
    unread: bool = False,
) -> Marks:
    """Return what changes mark of a view.

    :param tables: the tables that concern the view.
    :param concerns: what is known of them; a change of another marks the whole view.
    :param unread: whether a change feed will tell which rows changed, where that is not known.
    """
    if not changes.touches(tables):
        return _NONE
    unknown = _UNREAD if unread else _THE_VIEW
    if changes.everything:
        return unknown
    anywhere = changes.tables & tables
    if anywhere:
        lost = any(t in concerns and not concerns[t].followed for t in anywhere)
        return _THE_VIEW if lost else unknown
    marks: set[AnyMark] = set()
    for table, statements in changes.ranges.items():
        concern = concerns.get(table)
        if table not in tables:
            continue
        for ranges in statements:
            mark = None if concern is None else concern.range_mark(ranges)
            if mark is None:
                return unknown
            marks.add(mark)
    for table, rows in changes.rows.items():
        if table not in tables:
            continue
        concern = concerns.get(table)
        if concern is None:  # a partition, say
            return unknown
        for key, written in rows.items():
            columns = None if concern.opaque else written.columns
            if columns is not None and columns.isdisjoint(concern.used):
                continue
            if not concern.followed:
                return _THE_VIEW
            # What it was before an UPDATE is pieced together from the columns that it names.
            pieced = concern.opaque and not written.logged
            before = None if pieced and written.before else written.before
            for path in concern.paths:
                groups = path.of_key(key) if path.follows_from_key else path.before(columns, before)
                if groups is None:
                    return unknown
                marks.update(GroupMark(path.names, values) for values in groups)
            if concern.by_key:
                moves = columns is None or not columns.isdisjoint(concern.placing)
                marks.add(Mark(table, key, moves))
    return frozenset(marks)
