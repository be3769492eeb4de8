"""Range reads: the records between two scores of an index, from the cache or the database.

In: the arguments of ``session.range(...)``. Out: a list of records, or a SELECT for the database.
The questions are those of ``reading.py``, without a statement to be understood first.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from sqlalchemy import Select, literal, select
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from .answering import holds_first
from .cache import BaseTableCache
from .clauses import intervals_clause
from .comparison import Inexact
from .exc import CriteriaError
from .figures import Reason
from .keeping import Keeper
from .layout import Layout
from .orders import Record
from .reading import (
    ATTEMPTS,
    CHANGED,
    NOT_LOADED,
    OVERRUN,
    REFRESHED,
    SKIP,
    fetch_records,
    filling,
    freshen,
    gaps_of,
    lacking,
    missed,
    note_kept,
    remember,
    remember_hit,
)
from .scopes import database_reason, flush_pending
from .scores import MAX, MIN, NULLS_FIRST, NULLS_LAST, Cut, Interval, IntervalSet
from .staleness import tolerated
from .state import State
from .table import CachedTable
from .view import ViewIndex


class RangeRead(NamedTuple):
    """The arguments of one ``session.range(...)``."""

    by: ViewIndex[Any]
    prefix: tuple[Any, ...]
    ge: Any
    gt: Any
    le: Any
    lt: Any
    descending: bool
    limit: int | None
    after: Any


def range_from_cache(
    cache: BaseTableCache, session: Session, read: RangeRead, *, fetch: bool = True
) -> list[Record] | None:
    """Answer a range read from storage, or return ``None`` after noting why not."""
    table = cache.table(read.by.view)
    try:
        if not flush_pending(session, flush=fetch):
            return None
        refreshed = loaded = False
        keeper = table.keeper
        fills = keeper is not None and fetch and filling(table)
        for attempt in range(ATTEMPTS):
            if table.guards:
                reason = table.guarded(session, fetch=fetch)
                if reason is not None:
                    raise Inexact(reason)
            # In this order: a transaction that has a snapshot may be answered from this state if
            # the view has not changed since, and from none that a refresh brings.
            state = table.current
            reason = database_reason(session, cache, table)
            if reason is not None:
                raise Inexact(reason)
            stale: Reason | None = None
            if state is None:
                stale = tolerated(table, strict=cache.is_strict(session))
                state = None if stale is None else table.state
            if state is not None:
                if not state.coverage.sets and not fills:
                    if fetch and missed(session, table, NOT_LOADED):
                        continue
                    return None
                layout, name = table.layout or table.set_up(), read.by.name
                interval = range_interval(layout, read, state)
                elsewhere = None
                covered = (
                    state.coverage.everything
                    or state.coverage.of(name).covers(interval)
                    or (elsewhere := _covered_otherwise(layout, read, state)) is not None
                    or _holds_enough(read, state, interval)
                )
                lent = False
                if not covered and keeper is not None:
                    more = keeper.lent(state)
                    covered = lent = more is not state and (
                        more.coverage.of(name).covers(interval)
                        or _covered_otherwise(layout, read, more) is not None
                    )
                if not (covered or fetch):
                    return None
                if (
                    not covered
                    and keeper is not None
                    and fills
                    and attempt < ATTEMPTS - 1
                    and _filled(keeper, layout, read, interval)
                ):
                    loaded = True
                    continue
                marked = stale is not None or (
                    state.stale is not None and state.is_stale(name, (interval,))
                )
                if not marked and not covered:
                    return _partial_range(session, table, read, state, interval)
                if covered and marked:
                    stale = stale or tolerated(table, strict=cache.is_strict(session))
                if covered and (not marked or stale is not None):
                    order = state.storage.orders[name]
                    if read.limit is None:
                        records = order.between(interval)
                        if read.descending:
                            records.reverse()
                    else:
                        records = order.some(interval, read.limit, from_end=read.descending)
                    if keeper is None:
                        if stale is None and not refreshed:
                            remember_hit(session, table)
                        else:
                            remember(session, table, "hit", stale or REFRESHED)
                    else:
                        if not loaded:
                            where, inner = elsewhere or (name, interval)
                            keeper.used(where, (inner,))
                        note_kept(session, table, stale, loaded=loaded, lent=lent, again=refreshed)
                    if stale is not None:
                        cache.refreshing.behind(table)
                    return layout.given(records) if layout.loader.mutable else records
            if not fetch or not freshen(session, cache, table):
                return None
            refreshed = True
        remember(session, table, "bypass", OVERRUN)
        return None
    except Inexact as inexact:
        if fetch:
            remember(session, table, "bypass", inexact.args[0])
        return None


def _holds_enough(read: RangeRead, state: State, interval: Interval) -> bool:
    """Whether as many records as are wanted are known to be there."""
    return read.limit is not None and holds_first(
        state, read.by.name, interval, read.limit, from_end=read.descending
    )


def _filled(keeper: Keeper, layout: Layout, read: RangeRead, interval: Interval) -> bool:
    """Load what is missing of a range; say whether it is worth asking storage again."""
    wanted = IntervalSet([interval])
    return layout.is_expressible(read.by.name, wanted) and keeper.fill(
        read.by.name, wanted, most=read.limit, descending=read.descending
    )


def _partial_range(
    session: Session, table: CachedTable, read: RangeRead, state: State, interval: Interval
) -> list[Record] | None:
    """Fetch what storage lacks of a range, and merge: one SELECT, in the session."""
    layout, name = table.set_up(), read.by.name
    missing = state.coverage.missing(name, IntervalSet([interval]))
    present = IntervalSet([interval]) - missing
    order = state.storage.orders[name]
    if not present or order.order.stored or not layout.is_expressible(name, missing):
        remember(session, table, "miss", lacking(table, state))
        return None
    gaps = range_statement(session, table, read).where(
        intervals_clause(layout.score_columns(name), missing)
    )
    with table.misses.slot():
        fetched = fetch_records(session, table.view, gaps)
    if not table.may_merge(state, name, present):
        remember(session, table, "miss", CHANGED)
        return None
    records = layout.given([r for i in present for r in order.between(i)]) + fetched
    records.sort(key=order.order.prefixes[-1], reverse=read.descending)
    remember(session, table, "partial", gaps_of(table, name, missing))
    return records if read.limit is None else records[: read.limit]


def _covered_otherwise(
    layout: Layout, read: RangeRead, state: State
) -> tuple[str, Interval] | None:
    """Return another index whose coverage contains the range, and the interval of it that does.

    A range of ("tailnum", "time_hour") is covered by times that contain its times, for instance.
    """
    names = read.by.column_names
    at = len(read.prefix)
    for index, covered in state.coverage.sets.items():
        parts = layout.orders[index].parts
        if not parts or parts[0].name not in names[: at + 1]:
            continue
        position = names.index(parts[0].name)
        if position < at:
            inner = layout.orders[index].prefix((read.prefix[position],))
        else:
            inner = Interval(*_bounds(layout, read, position, ()))
        if covered.covers(inner):
            return index, inner
    return None


def _bounds(layout: Layout, read: RangeRead, position: int, prefix: Cut) -> tuple[Cut, Cut]:
    """Return the cuts of the bounds on one score, below a prefix of others."""
    part = layout.orders[read.by.name].parts[position]
    how = layout.columns.comparisons[part.name]
    bounded = not (read.ge is None and read.gt is None and read.le is None and read.lt is None)
    if bounded and not how.order:
        raise Inexact(f"{part.name}: {how.reason or 'no order that Python knows'}")
    # Without min() and max(), which would compare cuts that are known to be the outer ones.
    lower: tuple[Any, ...] | None = None
    upper: tuple[Any, ...] | None = None
    if read.ge is not None:
        lower = (*prefix, how.parameter(read.ge), MIN)
    if read.gt is not None:
        cut = (*prefix, how.parameter(read.gt), MAX)
        lower = cut if lower is None else max(lower, cut)
    if read.le is not None:
        upper = (*prefix, how.parameter(read.le), MAX)
    if read.lt is not None:
        cut = (*prefix, how.parameter(read.lt), MIN)
        upper = cut if upper is None else min(upper, cut)
    nulls_last = not layout.columns.nulls_first
    if lower is None:
        # A bound leaves out NULL, wherever it sorts.
        first = bounded and part.nullable and not nulls_last
        lower = (*prefix, NULLS_FIRST, MAX) if first else (*prefix, MIN)
    if upper is None:
        last = bounded and part.nullable and nulls_last
        upper = (*prefix, NULLS_LAST, MIN) if last else (*prefix, MAX)
    return lower, upper


def range_interval(layout: Layout, read: RangeRead, state: State) -> Interval:
    """Return the interval of the index that a range read asks for.

    :raises Inexact: if the database has to answer.
    """
    columns = layout.columns
    order = layout.orders[read.by.name]
    prefix: tuple[Any, ...] = ()
    if read.prefix:
        values = []
        for value, part in zip(read.prefix, order.parts, strict=False):
            how = columns.comparisons[part.name]
            if not how.equality:
                raise Inexact(f"{part.name}: {how.reason}")
            values.append(None if value is None else how.parameter(value))
        prefix = order.cut_values(values)
    paged = read.limit is not None or read.after is not None
    comparisons = columns.comparisons
    for part in order.parts[len(prefix) : None if paged else order.scores]:
        if part.hashed or not comparisons[part.name].order:
            raise Inexact(f"{part.name}: {comparisons[part.name].reason}")
    if len(prefix) == order.scores:
        lower, upper = (*prefix, MIN), (*prefix, MAX)
    else:
        lower, upper = _bounds(layout, read, len(prefix), prefix)
    if read.after is not None:
        key = _key_after(layout, read, state)
        if read.descending:
            upper = min(upper, (*key, MIN))
        else:
            lower = max(lower, (*key, MAX))
    return Interval(lower, upper)


def _key_after(layout: Layout, read: RangeRead, state: State) -> tuple[Any, ...]:
    """Return the place in the index of the record that a page comes after."""
    order = layout.orders[read.by.name]
    if not order.stored:
        return order.key_of(read.after, None)
    found = state.storage.get(layout.plan.key_tuple(read.after))
    if found is None:
        raise Inexact("the score of the record to go on after is not in storage")
    return order.key_of(*found)


def range_statement(session: Session, table: CachedTable, read: RangeRead) -> Select[Any]:
    """Return the SELECT that answers a range read from the database.

    With ``after=`` of an index that sorts by an expression, it emits one to learn the score.
    """
    index = read.by
    columns: list[ColumnElement[Any]] = list(index.columns)
    statement = select(index.view)
    for column, value in zip(columns, read.prefix, strict=False):
        statement = statement.where(
            column.is_(None) if value is None else column == literal(value, column.type)
        )
    rest = columns[len(read.prefix) :]
    bounds = ((operator.ge, read.ge), (operator.gt, read.gt),
              (operator.le, read.le), (operator.lt, read.lt))  # fmt: skip
    for compare, value in bounds:
        if value is not None:
            statement = statement.where(compare(rest[0], literal(value, rest[0].type)))
    if read.after is not None:
        layout = table.set_up()
        cut = _database_key(session, layout, read)
        interval = (
            Interval((MIN,), (*cut, MIN)) if read.descending else Interval((*cut, MAX), (MAX,))
        )
        statement = statement.where(
            intervals_clause(layout.score_columns(index.name), IntervalSet([interval]))
        )
    names = [name for name in table.plan.key if name not in index.column_names]
    ordered = [*rest, *(index.view.__table__.c[name] for name in names)]
    if read.descending:
        ordered = [column.desc() for column in ordered]
    return statement.order_by(*ordered).limit(read.limit)


def _database_key(session: Session, layout: Layout, read: RangeRead) -> tuple[Any, ...]:
    """Return the place in the index of the record that a page comes after, asking if need be."""
    order = layout.orders[read.by.name]
    public = {column.name for column in layout.plan.columns}
    values = {name: getattr(read.after, name) for name in public}
    hidden = [part.name for part in order.parts if part.hidden is not None]
    if hidden:
        key = zip(layout.plan.key, layout.plan.key_tuple(read.after), strict=True)
        columns = read.by.view.__table__.c
        scores = select(*(layout.plan.column(name).clause for name in hidden)).where(
            *(columns[name] == value for name, value in key)
        )
        row = session.execute(scores, execution_options={SKIP: True}).first()
        if row is None:
            raise CriteriaError(
                f"after={read.after!r} is no record of {layout.plan.name} any more, so that its "
                f"place in {read.by.name} is not known: start again from the first page"
            )
        values |= dict(zip(hidden, row, strict=True))
    nulls = order.cut_values((None,) * len(order.parts))
    wanted = [values[part.name] for part in order.parts]
    return tuple(n if v is None else v for v, n in zip(wanted, nulls, strict=True))
