"""The shortest way from a session to a record: most reads of ranges and keys, most of the time.

In: the arguments of ``session.range()`` and ``session.get()``. Out: what storage holds, or ``None``
where anything at all is out of the ordinary; ``ranges.py`` and ``reading.py`` then ask what it is,
and say so. What is found here is what they would have found: the same questions in the same order,
each in its cheapest form, in as few calls as can be.
"""

from __future__ import annotations

from typing import Any

from .comparison import Inexact
from .modes import COMPARING
from .orders import Record
from .scopes import is_plain, transaction_reason
from .scores import MAX, MIN, Cut, Interval
from .state import State
from .table import CachedTable
from .view import ViewIndex


def _state_of(session: Any, view: Any) -> tuple[CachedTable, State] | None:
    """Return the table of a view, and its state if a session may be answered from it.

    But for records that may be stale.
    """
    cache: Any = getattr(session, "cache", None)  # a session made by hand has none
    table: CachedTable | None = None if cache is None else cache._tables.get(view)
    if (
        table is None
        or cache._closed
        or table.keeper is not None
        or table.layout is None
        or view.__scope__ is not None
        or not is_plain(session, cache._engine)
        or (table.guards and table.guarded(session, fetch=False) is not None)
    ):
        return None
    # Before its transaction is looked at, which may have a snapshot: see ranges.py.
    state = table.current
    if (
        state is None
        or not state.coverage.sets
        or (
            session._transaction is not None
            and transaction_reason(session, cache, table) is not None
        )
    ):
        return None
    return table, state


def _is_read(session: Any, table: CachedTable) -> None:
    """Note a plain hit; see :func:`.reading.remember_hit`."""
    session.last_read = table.hit
    if not (table.shadowed and COMPARING in session.info):
        table.counts.hits += 1


def range_of(
    session: Any, index: ViewIndex[Any], prefix: tuple[Any, ...], ge: Any, gt: Any, le: Any, lt: Any
) -> list[Record] | None:
    """Return the records of a range of an index, below values of its first scores.

    Not where NULL could be among the scores of the range, which has a place of its own.
    """
    found = _state_of(session, index.view)
    if found is None:
        return None
    table, state = found
    layout, name = table.layout, index.name
    assert layout is not None
    records = state.storage.orders[name]
    order = records.order
    parts, comparisons, depth = order.parts, layout.columns.comparisons, len(prefix)
    if depth >= order.scores or layout.loader.mutable:
        return None
    part = parts[depth]
    how = comparisons[part.name]
    if part.nullable or part.hashed or not how.order:
        return None
    for later in parts[depth + 1 : order.scores]:
        if later.hashed or not comparisons[later.name].order:
            return None
    cut: tuple[Any, ...] = ()
    # Without min() and max(), which would compare cuts that are known to be the outer ones.
    try:
        for value, earlier in zip(prefix, parts, strict=False):
            equal = comparisons[earlier.name]
            if value is None or earlier.hashed or not equal.equality:
                return None
            cut += (equal.parameter(value),)
        lower: Cut = (*cut, MIN)
        upper: Cut = (*cut, MAX)
        if ge is not None:
            lower = (*cut, how.parameter(ge), MIN)
        if gt is not None:
            other = (*cut, how.parameter(gt), MAX)
            lower = other if ge is None else max(lower, other)
        if le is not None:
            upper = (*cut, how.parameter(le), MAX)
        if lt is not None:
            other = (*cut, how.parameter(lt), MIN)
            upper = other if le is None else min(upper, other)
    except Inexact:
        return None
    coverage = state.coverage
    if not coverage.everything and not coverage.of(name).covers(Interval(lower, upper)):
        return None
    if state.stale is not None and state.is_stale(name, (Interval(lower, upper),)):
        return None
    _is_read(session, table)
    return records.between((lower, upper))


def record_of(session: Any, view: Any, ident: Any) -> Record | None:
    """Return the stored record with a primary key of one column."""
    found = _state_of(session, view)
    if found is None:
        return None
    table, state = found
    layout = table.layout
    assert layout is not None
    order = layout.orders[""]
    parts = order.parts
    how = layout.columns.comparisons[parts[0].name]
    if len(parts) != 1 or ident is None or not how.equality or layout.loader.mutable:
        return None
    try:
        key = (how.parameter(ident),)
    except Inexact:
        return None
    pair = state.storage.get(key)
    if pair is None or (state.stale is not None and state.is_stale("", (order.prefix(key),))):
        return None
    _is_read(session, table)
    return pair[0]
