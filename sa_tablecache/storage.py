"""All records of a view in memory, in each of its orders; immutable like these.

In: records, and what is hidden of each. Out: those with certain keys, or a storage with others in
the place of some, in which all orders agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from .merging import CHUNK
from .orders import Hidden, Order, Record
from .records import SortedRecords
from .scores import EVERYTHING, MIN
from .sorting import Pause, ids, joined, no_pause, steps

BULK = 20
"""Changing more than one in so many records is done by going through all of them."""

SCAN = 32
"""Looking at all records costs as much as finding one in so many by key."""


class Storage:
    """The records of a view in all their orders, immutable.

    The order called ``""`` is that of the primary key; it also holds the hidden values. Orders that
    only lead from base rows to records are made when they are first needed: most base tables are
    hardly ever written.
    """

    __slots__ = ("__weakref__", "_lazy", "orders")

    def __init__(self, orders: dict[str, SortedRecords], lazy: Mapping[str, Order]) -> None:
        self.orders = orders
        self._lazy = lazy

    @classmethod
    def build(
        cls,
        orders: Iterable[Order],
        lazy: Mapping[str, Order],
        records: list[Record],
        hidden: list[Hidden] | None,
        pause: Pause = no_pause,
    ) -> Storage:
        """Sort records into all orders but the lazy ones."""
        first, *others = orders
        primary = SortedRecords.build(first, records, hidden, pause)
        storage = cls({first.name: primary}, lazy)
        for order in others:
            storage.orders[order.name] = storage._sorted(order, pause)
        return storage

    def _sorted(self, order: Order, pause: Pause = no_pause) -> SortedRecords:
        """Sort all records into one more order."""
        primary = self.orders[""]
        records = joined(primary.chunks, pause)
        hidden = None
        if order.stored:
            assert primary.beside is not None
            hidden = joined(primary.beside, pause)
        # They come in the order of the key, which the sort keeps among equal scores.
        return SortedRecords.build(order, records, hidden, pause, scores_only=True)

    def order(self, name: str) -> SortedRecords:
        """Return the records in one order, made now if it is a lazy one."""
        found = self.orders.get(name)
        if found is None:
            found = self._sorted(self._lazy[name])
            # Others may read the orders meanwhile: they get another dictionary.
            self.orders = {**self.orders, name: found}
        return found

    def starting_with(self, name: str, prefixes: Iterable[Sequence[Any]]) -> list[Record]:
        """Return the records whose keys in an order start with one of some values."""
        order = self.order(name)
        found: list[Record] = []
        for prefix in prefixes:
            found += order.between(order.order.prefix(prefix))
        return found

    def __len__(self) -> int:
        return len(self.orders[""])

    def __iter__(self) -> Iterator[Record]:
        return iter(self.orders[""])

    def pairs(self) -> Iterator[tuple[Record, Hidden | None]]:
        """Iterate over all records with their hidden values."""
        primary = self.orders[""]
        if primary.beside is None:
            return ((record, None) for record in primary)
        return (
            pair
            for chunk, values in zip(primary.chunks, primary.beside, strict=True)
            for pair in zip(chunk, values, strict=True)
        )

    def get(self, key: tuple[Any, ...]) -> tuple[Record, Hidden | None] | None:
        """Return the record with a primary key, with its hidden values."""
        primary = self.orders[""]
        parts = primary.order.parts
        if len(parts) == 1 and not parts[0].hashed and key[0] is not None:
            # The usual case by itself, because nothing is read more often: one bisection.
            chunk, at = primary.find((key[0], MIN))
            if chunk < len(primary.chunks) and at == len(primary.chunks[chunk]):
                chunk, at = chunk + 1, 0
            if chunk == len(primary.chunks):
                return None
            record = primary.chunks[chunk][at]
            if getattr(record, parts[0].name) != key[0]:
                return None
            return record, None if primary.beside is None else primary.beside[chunk][at]
        interval = primary.order.prefix(key)
        chunk, start = primary.find(interval[0])
        last, stop = primary.find(interval[1])
        while (chunk, start) < (last, stop):
            items = primary.chunks[chunk]
            for at in range(start, stop if chunk == last else len(items)):
                record = items[at]
                for part, value in zip(parts, key, strict=True):
                    if getattr(record, part.name) != value:
                        break  # only a hash was equal
                else:
                    return record, None if primary.beside is None else primary.beside[chunk][at]
            chunk, start = chunk + 1, 0
        return None

    def with_hidden(
        self, records: Sequence[Record], pause: Pause = no_pause
    ) -> list[tuple[Record, Hidden | None]]:
        """Return stored records with their hidden values."""
        if self.orders[""].beside is None:
            return [(record, None) for record in records]
        if len(records) * SCAN > len(self):
            wanted = ids(records, pause)
            primary, result = self.orders[""], []
            for chunk, values in zip(primary.chunks, primary.beside or (), strict=True):
                result += [p for p in zip(chunk, values, strict=True) if id(p[0]) in wanted]
                pause()
            return result
        names = [part.name for part in self.orders[""].order.parts]
        result = []
        for record in records:
            pause()
            found = self.get(tuple(getattr(record, name) for name in names))
            assert found is not None
            result.append(found)
        return result

    def ids_of_keys(self, records: Sequence[Record], pause: Pause) -> set[int]:
        """Return the ids of the stored records that have the primary key of one of many."""
        key_of = attrgetter(*(part.name for part in self.orders[""].order.parts))
        keys: set[Any] = set()
        for some in steps(records):
            keys.update(map(key_of, some))
            pause()
        found: set[int] = set()
        for chunk in self.orders[""].chunks:
            if not keys.isdisjoint(map(key_of, chunk)):
                found.update(id(record) for record in chunk if key_of(record) in keys)
            pause()
        return found

    def same_keys(
        self, records: Sequence[Record], pause: Pause = no_pause
    ) -> list[tuple[Record, Hidden | None]]:
        """Return the stored records that have the primary key of one of the given."""
        key_of = attrgetter(*(part.name for part in self.orders[""].order.parts))
        if len(records) * SCAN > len(self):
            gone = self.ids_of_keys(records, pause)
            return self.with_hidden([r for r in self if id(r) in gone], pause)
        single = len(self.orders[""].order.parts) == 1
        found = []
        for record in records:
            pair = self.get((key_of(record),) if single else key_of(record))
            if pair is not None:
                found.append(pair)
            pause()
        return found

    def replace(
        self,
        removed: Sequence[tuple[Record, Hidden | None]],
        added: Sequence[tuple[Record, Hidden | None]],
        pause: Pause = no_pause,
    ) -> Storage:
        """Return a storage without some records and with others.

        A few changes cost O(changes), many O(records).
        """
        if not removed and not added:
            return self
        if not self.is_bulk(len(removed) + len(added)):
            replaced = {n: each.replace(removed, added, pause) for n, each in self.orders.items()}
            return Storage(replaced, self._lazy)
        return self.exchanged(
            {id(record) for record, _ in removed},
            [record for record, _ in added],
            [hidden for _, hidden in added],
            pause,
        )

    def is_bulk(self, changes: int) -> bool:
        """Whether so many changes are made by going through all records."""
        return changes * BULK > len(self)

    def exchanged(
        self,
        gone: set[int],
        records: list[Record],
        hidden: Sequence[Hidden | None] | None,
        pause: Pause = no_pause,
    ) -> Storage:
        """Return a storage without the records of some ids and with others: O(all)."""
        mine = self.orders  # readers may have more made in the pauses, which this one lacks
        values: Any = None if mine[""].beside is None else hidden
        orders = [records.order for records in mine.values()]
        added = Storage.build(orders, {}, records, values, pause)
        merged = {name: each.merged(gone, added.orders[name], pause) for name, each in mine.items()}
        return Storage(merged, self._lazy)

    def _check(self) -> None:
        """Assert the invariants: all orders are sorted and hold the very same records."""
        everything = {id(record) for record in self}
        assert len(everything) == len(self)
        for records in self.orders.values():
            records._check()
            assert {id(r) for r in records.between(EVERYTHING.intervals[0])} == everything


def dropped(storage: Storage, changes: int) -> list[Any]:
    """Return what :func:`.merging.let_go` is to drop of a storage that was replaced, if much."""
    if changes < CHUNK:
        return []
    orders = [each for name, each in storage.orders.items() if name] + [storage.orders[""]]
    return [c for each in orders for some in (each.beside or (), each.chunks) for c in some]
