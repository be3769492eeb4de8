"""What storage becomes: with the rows of a load, or of a refresh; pure.

In: storage, and rows read from the database. Out: another storage, which shares with the first what
did not change.
"""

from __future__ import annotations

from typing import Any, cast

from .deltas import Touched
from .exc import DuplicateKey
from .layout import Layout
from .loading import Rows
from .orders import Hidden, Record
from .redaction import shown_key
from .scores import IntervalSet
from .storage import Storage


def loaded(
    layout: Layout,
    storage: Storage,
    rows: Rows,
    index: str,
    target: IntervalSet,
    *,
    extend: bool,
) -> tuple[Storage, int]:
    """Return the storage with loaded rows, without what is no longer covered, and how much is not.

    :param extend: whether everything stays covered.
    :raises DuplicateKey: see :func:`check_unique`.
    """
    outside: list[Record] = []
    if not extend:
        for interval in ~target:
            outside += storage.orders[index].between(interval)
    if len(outside) == len(storage):
        storage = layout.build(rows)
    else:
        removed = storage.with_hidden(outside)
        gone = {id(record) for record in outside}
        # What another index had covered is there already, and so may be a stale record of a row
        # whose score has moved.
        removed += [p for p in storage.same_keys(rows.records) if id(p[0]) not in gone]
        storage = storage.replace(removed, rows.pairs())
    check_unique(layout, storage)
    return storage, len(outside)


def refreshed(
    layout: Layout,
    storage: Storage,
    touched: Touched | None,
    pairs: list[tuple[Record, Hidden | None]],
) -> Storage:
    """Return the storage with the touched records (``None``: all) replaced.

    :raises DuplicateKey: see :func:`check_unique`.
    """
    if touched is None:
        rows = layout.no_rows()
        rows.records += [record for record, _ in pairs]
        if rows.hidden is not None:
            rows.hidden += [cast("Hidden", hidden) for _, hidden in pairs]
        result = layout.build(rows)
        check_unique(layout, result)
        return result
    gone = {
        id(record): record
        for order, values in touched.keys.items()
        for record in storage.starting_with(order, values)
    }
    for index, intervals in touched.ranges.items():
        for interval in intervals:
            gone.update((id(r), r) for r in storage.orders[index].between(interval))
    result = storage.replace(storage.with_hidden(list(gone.values())), pairs)
    if not layout.key_is_proven:
        primary = result.orders[""]
        for record, _ in pairs:
            if primary.count(primary.order.prefix(layout.plan.key_tuple(record))) > 1:
                check_unique(layout, result)
    return result


def check_unique(layout: Layout, storage: Storage) -> None:
    """Refuse rows that share a primary key, where the user said what the key is.

    :raises DuplicateKey: if there are such.
    """
    if layout.key_is_proven:
        return
    plan = layout.plan
    previous: Any = object()
    for record in storage.orders[""]:
        key = plan.key_of(record)
        if key == previous:
            shown = shown_key(plan, plan.key, plan.key_tuple(record))
            raise DuplicateKey(
                f"view {plan.name}: two rows have {', '.join(plan.key)} = {shown}, so that is no "
                "key; correct __primary_key__"
            )
        previous = key
