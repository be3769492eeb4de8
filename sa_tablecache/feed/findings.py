"""What a poll found, as changes of the tables that the models know.

In: the changes of a changelog, by relation, and what is known of the views' tables. Out: one
:class:`.ChangeSet`. A row that was logged with the columns by which views group tells which groups
it was in, and is: all of its values in the poll, since a refresh may have come between two of them.

Pure.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sa_tablecache.analysis import TableName
from sa_tablecache.changes import UNKNOWN, ChangeSet, RowKey, Written

from .contract import Change, Poll, Relation
from .keys import LoggedTable, Unexact

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Findings:
    """What a poll found."""

    poll: Poll
    names: Mapping[TableName, Relation]
    """The tables of the views, as the models name them."""
    logged: Mapping[TableName, LoggedTable | None]
    """How their rows are logged; ``None``: not so that views could follow them."""
    moved: set[Relation]
    """Those that are new, or whose fingerprint is another."""
    untrusted: Mapping[TableName, str]
    """Those whose changes are not logged, and why."""
    back: frozenset[TableName]
    """Those that can be trusted again."""
    fills: Mapping[TableName, frozenset[TableName]]
    """Tables that the application says are filled when a row of a table is written."""
    seeded: bool
    """Whether nothing was known before."""

    @property
    def everything(self) -> bool:
        """Whether any row of any table may have changed."""
        return self.seeded or self.poll.gap is not None

    def wholly(self) -> ChangeSet:
        """Return the tables of which any row may have changed, unseen."""
        result = ChangeSet(everything=self.everything)
        for name, relation in self.names.items():
            if relation in self.moved or name in self.back:
                result.add_table(name)
        self._add_filled(result)
        return result

    def news(self) -> Sequence[Change]:
        """Return the changes of tables of which not any row may have changed."""
        relations = {
            relation
            for name, relation in self.names.items()
            if relation not in self.moved and name not in self.back
        }
        return [change for change in self.poll.changes if change.relation in relations]

    def changes(self, news: Sequence[Change]) -> ChangeSet:
        """Return changes as changes of the models' tables."""
        names: dict[Relation, list[TableName]] = {}
        for name, relation in self.names.items():
            names.setdefault(relation, []).append(name)
        result = ChangeSet()
        rows: dict[TableName, dict[RowKey, list[dict[str, Any]]]] = {}
        for change in news:
            for name in names[change.relation]:
                how = self.logged[name]
                if how is None or (change.keys is None and change.ranges is None):
                    result.add_table(name)
                elif change.keys is None:
                    result.add_ranges(name, how.ranges(change.ranges or {}))
                else:
                    try:
                        _add(rows.setdefault(name, {}), how, change.keys)
                    except Unexact as why:
                        log.debug("a change of %s is not known exactly: %s", name, why)
                        result.add_table(name)
        for name, known in rows.items():
            for key, befores in known.items():
                written = Written(before=tuple(befores), logged=True) if befores else UNKNOWN
                result.add_rows(name, [key], written)
        self._add_filled(result)
        return result

    def _add_filled(self, changes: ChangeSet) -> None:
        """Add tables that cannot be watched, where what fills them has changed."""
        added = bool(self.fills)
        while added:
            added = False
            for source, targets in list(self.fills.items()):
                unseen = {t for t in targets if t in self.untrusted or t not in self.names}
                if not unseen <= changes.tables and changes.touches([source]):
                    for table in unseen:
                        changes.add_table(table)
                    added = True


def _add(
    known: dict[RowKey, list[dict[str, Any]]], how: LoggedTable, keys: Sequence[Sequence[Any]]
) -> None:
    """Add logged rows to those that are known."""
    for values in keys:
        key, beside = how.row(values)
        befores = known.setdefault(key, [])
        if beside and beside not in befores:
            befores.append(beside)
