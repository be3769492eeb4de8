"""What storage becomes: with the rows of a load, or of a refresh; pure.

In: storage, and rows read from the database. Out: another storage, which shares with the first what
did not change.
"""

from __future__ import annotations

from typing import Any

from .deltas import Touched
from .exc import DuplicateKey
from .layout import Layout
from .orders import Record
from .redaction import shown_key
from .rows import Rows
from .scores import IntervalSet
from .sorting import Pause, ids, no_pause
from .storage import Storage


def loaded(
    layout: Layout,
    storage: Storage,
    rows: Rows,
    index: str,
    target: IntervalSet,
    *,
    extend: bool,
    pause: Pause = no_pause,
) -> tuple[Storage, int]:
    """Return the storage with loaded rows, without what is no longer covered, and how much is not.

    :param extend: whether everything stays covered.
    :raises DuplicateKey: see :func:`check_unique`.
    """
    outside: list[Record] = []
    if not extend:
        for interval in ~target:
            outside += storage.orders[index].between(interval)
            pause()
    if len(outside) == len(storage):
        storage = layout.build(rows, pause)
    elif storage.is_bulk(len(outside) + len(rows.records)):
        gone = ids(outside, pause) | storage.ids_of_keys(rows.records, pause)
        storage = storage.exchanged(gone, rows.records, rows.hidden, pause)
    else:
        removed = storage.with_hidden(outside, pause)
        gone = {id(record) for record in outside}
        # What another index had covered is there already, and so may be a stale record of a row
        # whose score has moved.
        removed += [p for p in storage.same_keys(rows.records, pause) if id(p[0]) not in gone]
        storage = storage.replace(removed, rows.pairs(), pause)
    check_unique(layout, storage, pause)
    return storage, len(outside)


def refreshed(
    layout: Layout,
    storage: Storage,
    touched: Touched | None,
    rows: Rows,
    pause: Pause = no_pause,
) -> Storage:
    """Return the storage with the touched records (``None``: all) replaced.

    :raises DuplicateKey: see :func:`check_unique`.
    """
    if touched is None:
        result = layout.build(rows, pause)
        check_unique(layout, result, pause)
        return result
    gone = {
        id(record): record
        for order, values in touched.keys.items()
        for record in storage.starting_with(order, values)
    }
    for index, intervals in touched.ranges.items():
        for interval in intervals:
            gone.update((id(r), r) for r in storage.orders[index].between(interval))
    if storage.is_bulk(len(gone) + len(rows.records)):
        result = storage.exchanged(set(gone), rows.records, rows.hidden, pause)
    else:
        removed = storage.with_hidden(list(gone.values()), pause)
        result = storage.replace(removed, rows.pairs(), pause)
    if not layout.key_is_proven:
        primary = result.orders[""]
        for record in rows.records:
            if primary.count(primary.order.prefix(layout.plan.key_tuple(record))) > 1:
                check_unique(layout, result, pause)
    return result


def check_unique(layout: Layout, storage: Storage, pause: Pause = no_pause) -> None:
    """Refuse rows that share a primary key, where the user said what the key is.

    :raises DuplicateKey: if there are such.
    """
    if layout.key_is_proven:
        return
    plan = layout.plan
    previous: Any = object()
    for chunk in storage.orders[""].chunks:
        for record in chunk:
            key = plan.key_of(record)
            if key == previous:
                shown = shown_key(plan, plan.key, plan.key_tuple(record))
                raise DuplicateKey(
                    f"view {plan.name}: two rows have {', '.join(plan.key)} = {shown}, so that is "
                    "no key; correct __primary_key__"
                )
            previous = key
        pause()
