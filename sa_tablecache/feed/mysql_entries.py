"""What the entries of the changelog of MariaDB and MySQL say, as changes.

In: the rows of one poll. Out: changes. Pure.

A trigger knows one row and not its statement: what one connection has logged between two polls
stands for that. If it is more than the limit of the watch, only ranges are kept of it, and if all
connections together log many times as much, of all: what a poll keeps in memory is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final, NamedTuple

import msgspec

from .contract import Change, Relation, Watch
from .mysql_positions import MySQLPosition, overlaps
from .mysql_triggers import Watched, kinds, load

_BIG: Final = 20
"""Entries of so many times the limit of a watch are collapsed, whoever wrote them."""

_keys = msgspec.json.Decoder(tuple[tuple[Any, ...], ...]).decode


class Entry(NamedTuple):
    """An entry of a watched relation."""

    number: int
    operation: str
    changed: str | None
    bounds: str | None


class _Bounds:
    """The smallest and the largest value of each column of ranges, among some entries."""

    def __init__(self, watch: Watch) -> None:
        known = kinds(watch)
        self._orders = {
            name: Decimal if known.get(name) == "decimal" else None for name in watch.ranges
        }
        self._values: dict[str, tuple[Any, Any]] = {}
        self._nulls: set[str] = set()
        self._unknown: set[str] = set()
        self._nothing = False

    def add(self, said: str | None) -> None:
        if said is None:
            self._nothing = True
            return
        logged = json.loads(said)
        for name, order in self._orders.items():
            values = logged.get(name)
            if values is None:
                self._unknown.add(name)
                continue
            present = [value for value in values if value is not None]
            if len(present) < len(values):
                self._nulls.add(name)
            if present:
                present += self._values.get(name, ())
                self._values[name] = min(present, key=order), max(present, key=order)

    def found(self) -> dict[str, tuple[Any, Any]] | None:
        if self._nothing:
            return None
        return {
            name: self._values.get(name, (None, None))
            for name in self._orders
            if name not in self._unknown and not (name in self._nulls and name in self._values)
        }


class _Batch:
    """What one connection did to one relation, as far as a poll has read."""

    def __init__(self, relation: Relation, watch: Watch) -> None:
        self.relation = relation
        self.watch = watch
        self.entries: list[Entry] = []
        self.weight = 0
        self.bounds: _Bounds | None = None
        self.operations: set[str] = set()
        self.first = self.last = 0

    def add(self, entry: Entry) -> int:
        """Add an entry; return how many rows it tells of, about."""
        self.first, self.last = self.first or entry.number, entry.number
        self.operations.add(entry.operation)
        weight = 1 + (entry.changed.count("],[") if entry.changed else 0)
        self.weight += weight
        if self.bounds is not None:
            self.bounds.add(entry.bounds)
        else:
            self.entries.append(entry)
            if self.weight > self.watch.limit:
                self.collapse()
        return weight

    def collapse(self) -> None:
        """Keep no keys."""
        if self.bounds is None:
            self.bounds = _Bounds(self.watch)
            for entry in self.entries:
                self.bounds.add(entry.bounds)
            self.entries = []

    def changes(self, era: str) -> Iterator[Change]:
        """Yield what was done, by operation."""
        if self.bounds is not None:
            operation = min(self.operations) if len(self.operations) == 1 else "U"
            span = range(self.first, self.last + 1)
            yield Change(self.relation, operation, None, self.bounds.found(), (era, span))
            return
        for operation in sorted(self.operations):
            keyed, numbers = list[tuple[Any, ...]](), list[int]()
            any_row, others = _Bounds(self.watch), list[int]()
            for entry in self.entries:
                if entry.operation != operation:
                    continue
                if entry.changed is None:
                    any_row.add(entry.bounds)
                    others.append(entry.number)
                else:
                    keyed += _keys(entry.changed)
                    numbers.append(entry.number)
            if numbers:
                at = era, tuple(numbers)
                yield Change(self.relation, operation, tuple(keyed), None, at)
            if others:
                at = era, tuple(others)
                yield Change(self.relation, operation, None, any_row.found(), at)


class Entries:
    """The entries that one poll reads.

    :param position: where it begins: what was seen there is left out.
    """

    def __init__(self, relations: frozenset[Relation], position: MySQLPosition) -> None:
        self._relations = relations
        self._position = position
        self.watched: dict[Relation, Watched] = {}
        self.numbers: list[int] = []
        self._batches: dict[tuple[str, str, int], _Batch] = {}
        self._weights: dict[tuple[str, str], int] = {}

    def note(self, relation: Relation, definition: str) -> None:
        """Note how a relation is watched."""
        if relation in self._relations:
            self.watched[relation] = load(relation, definition)

    def add(self, number: int, writer: int, schema: str, name: str, *said: Any) -> None:
        """Add an entry."""
        before = self._position
        if number <= before.last and not overlaps(before.gaps, number, number):
            return
        self.numbers.append(number)
        batch = self._batches.get((schema, name, writer))
        if batch is None:
            relation = Relation(schema, name)
            if relation not in self._relations:
                return
            known = self.watched.get(relation)
            watch = Watch(relation, ()) if known is None else known.watch
            batch = self._batches[schema, name, writer] = _Batch(relation, watch)
        weight = self._weights.get((schema, name), 0) + batch.add(Entry(number, *said))
        self._weights[schema, name] = weight
        if weight > batch.watch.limit * _BIG:
            batch.collapse()

    def changes(self, era: str) -> Iterator[Change]:
        """Yield what was done."""
        for batch in self._batches.values():
            yield from batch.changes(era)
