"""Answering one read of one session: from the cache, partly from it, or not at all.

In: a cache, a session, a SELECT of a view. Out: an :class:`Answer`, or ``None``, which means that
the database has to answer; ``session.last_read`` tells which it was, and why.

The order of the questions is the order of the guarantees. May this session read from a cache
(own writes, isolation, scope)? Is the cache clean, or can it be refreshed? Does it cover what is
asked, wholly or in part? Every "no" is a reason to ask the database, never an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import DateTime, Select, select
from sqlalchemy.orm import Session

from .answering import (
    check_sortable,
    covered_candidate,
    filter_records,
    finished,
    from_state,
    limited_candidate,
    partial_candidate,
    records_in,
)
from .cache import BaseTableCache
from .clauses import intervals_clause
from .comparison import Inexact, to_utc
from .exc import one_line
from .figures import LastRead, Reason, category_of
from .modes import COMPARING
from .options import BypassCache, NoStore
from .orders import Record
from .planner import Question, ask
from .prepared import Candidate
from .redaction import shown_coverage, shown_intervals
from .scopes import database_reason, flush_pending, in_own_scope
from .scores import IntervalSet
from .shapes import Asked, Shape, shape_of, view_of
from .staleness import tolerated
from .state import State
from .table import CachedTable
from .view import CachedView

log = logging.getLogger(__name__)

#: Execution option of a statement that the database is to answer.
SKIP = "sa_tablecache_skip"


class Answer(NamedTuple):
    """What the cache answered: records, tuples of columns, or one count."""

    rows: Sequence[Any]
    shape: Shape


def remember(session: Any, table: CachedTable, kind: str, reason: str = "") -> None:
    """Note how a read was answered."""
    if kind == "hit" and not reason:
        remember_hit(session, table)
        return
    if table.shadowed and COMPARING in session.info:
        session.last_read = LastRead(kind, reason, table.view)
        return
    session.last_read = read = LastRead(kind, reason, table.view)
    table.count_read(kind, category_of(reason))
    table.recent.append(read)
    log.debug("view %s: %s (%s)", table.plan.name, kind, reason)


def remember_hit(session: Any, table: CachedTable) -> None:
    """Note that a read was answered from storage, as it was."""
    session.last_read = table.hit
    if not (table.shadowed and COMPARING in session.info):
        table.counts.hits += 1


# -- what the cache can say --------------------------------------------------------------------


COMMIT_UNDER_WAY: Final = Reason("commit", "a commit is under way")
NOT_LOADED: Final = Reason("not_loaded", "nothing is loaded")
CHANGED: Final = Reason("changed", "the view changed while gaps were fetched")
OVERRUN: Final = Reason("overrun", "changes arrive faster than refreshes")
LOADED: Final = Reason("loaded", "what was missing was loaded first")
LENT: Final = Reason("staleness", "without what came in since the window's last step")
REFRESHED: Final = Reason("refresh", "after a refresh of what was marked")


def lacking(table: CachedTable, state: State) -> Reason:
    """Return why storage does not help a reader: the coverage is another."""
    return Reason("coverage", f"the coverage is {shown_coverage(table.plan, state.coverage)}")


def gaps_of(table: CachedTable, index: str, missing: IntervalSet) -> Reason:
    """Return what storage lacked of an answer."""
    return Reason("gaps", f"{shown_intervals(table.plan, index, missing)} was fetched")


def missed(session: Session, table: CachedTable, reason: Reason) -> bool:
    """Note a miss; say whether the cache is to be asked again, because a load has ended since.

    :raises CacheUnavailable: if the view says so.
    """
    shadowed = table.shadowed and COMPARING in session.info
    if table.view.__on_miss__ == "wait" and not shadowed and table.wait_for_load():
        return True
    remember(session, table, "miss", reason)
    if not shadowed:
        table.misses.refuse(reason)
    return False


def filling(table: CachedTable) -> bool:
    """Whether what reads of a view miss is loaded; what that needs to know is asked, once."""
    if table.keeper is None or not table.keeper.fills:
        return False
    try:
        table.set_up()
    except Exception as error:
        log.warning("view %s: nothing can be loaded: %s", table.plan.name, one_line(error))
        return False
    return True


def freshen(session: Session, cache: BaseTableCache, table: CachedTable) -> bool:
    """Do what can be done for a reader whom marks or leases concern; note why, if nothing."""
    if table.waits_for_commit or not table.refresh_needed:
        cache.settle_orphans()
        if table.waits_for_commit or (table.leased and not table.refresh_needed):
            remember(session, table, "bypass", COMMIT_UNDER_WAY)
            return False
    try:
        table.refresh()
    except Exception as error:
        why = one_line(error)
        log.warning("view %s: refresh failed: %s", table.plan.name, why)
        remember(session, table, "bypass", Reason("refresh_failed", f"the refresh failed: {why}"))
        return False
    return True


ATTEMPTS = 3
"""How often a reader refreshes before the database has to answer."""


def answer(
    cache: BaseTableCache,
    session: Session,
    statement: Select[Any] | None,
    *,
    view: type[CachedView] | None = None,
    asked: Asked | None = None,
    fetch: bool = True,
    free: bool = False,
) -> Answer | None:
    """Answer a SELECT of a view, or return ``None`` after noting why the database has to.

    :param statement: ``None`` if ``asked`` says it, which only goes without ``fetch`` and for views
        without scopes.
    :param view: that of the statement, if it is known.
    :param asked: what the statement asks, if that is known.
    :param fetch: whether refreshing and fetching gaps is allowed. Without it the caller tries
        whether the cache alone can answer, and nothing is noted if not.
    :param free: that the session is known to be free to be answered; only without ``fetch``.
    :raises CriteriaError: if the criteria use a table that the statement does not join.
    :raises UnscopedRead: if the view is read by scope, and the session has none.
    """
    view = view or view_of(statement)
    assert view is not None
    table = cache.table(view)
    if view.__scope__ is not None:
        assert statement is not None
        statement = in_own_scope(session, statement, view)
    try:
        shape, parameters = asked or shape_of(statement)  # type: ignore[arg-type]
        for option in shape.options:
            if isinstance(option, BypassCache):
                raise Inexact(Reason("requested", "bypass_cache()"))
        if not free and not flush_pending(session, flush=fetch):
            return None
        refreshed = loaded = False
        keeper = table.keeper
        fills = keeper is not None and fetch and filling(table) and not _no_store(shape)
        for attempt in range(ATTEMPTS):
            if table.guards:
                reason = table.guarded(session, statement, fetch=fetch)
                if reason is not None:
                    raise Inexact(reason)
            # In this order: a transaction that has a snapshot may be answered from this state if
            # the view has not changed since, and from none that a refresh brings.
            state = table.current
            reason = None if free else database_reason(session, cache, table, statement)
            if reason is not None:
                raise Inexact(reason)
            stale: Reason | None = None
            if state is None:
                stale = tolerated(table, shape.options, strict=cache.is_strict(session))
                state = None if stale is None else table.state
            if state is not None:
                if not state.coverage.sets and not fills:
                    if fetch and missed(session, table, NOT_LOADED):
                        continue
                    return None
                layout = table.layout or table.set_up()
                question = ask(shape, parameters, layout.columns)
                candidate = covered_candidate(question, state)
                lent = False
                if candidate is None:
                    candidate = limited_candidate(question, state)
                if candidate is None and keeper is not None:
                    more = keeper.lent(state)
                    if more is not state:
                        candidate = covered_candidate(question, more)
                        lent = candidate is not None
                if candidate is None:
                    if not fetch:
                        return None
                    if (
                        keeper is not None
                        and fills
                        and attempt < ATTEMPTS - 1
                        and keeper.fill_for(layout, question, state)
                    ):
                        loaded = True
                        continue
                    partial = partial_candidate(layout, question, state)
                    if partial is None:
                        if missed(session, table, lacking(table, state)):
                            continue
                        return None
                    found, missing = partial
                    present = found.intervals - missing
                    if stale is None and not state.is_stale(found.index, present):
                        assert statement is not None
                        return _partial(session, table, statement, question, state, *partial)
                elif (
                    stale is not None
                    or state.stale is None
                    or not state.is_stale(candidate.index, candidate.intervals)
                    or (stale := tolerated(table, shape.options, strict=cache.is_strict(session)))
                    is not None
                ):
                    rows = from_state(layout, question, state, candidate)
                    if keeper is None:
                        if stale is None and not refreshed:
                            remember_hit(session, table)
                        else:
                            remember(session, table, "hit", stale or REFRESHED)
                    else:
                        if not loaded:
                            keeper.used(candidate.index, candidate.intervals)
                        note_kept(session, table, stale, loaded=loaded, lent=lent, again=refreshed)
                    if stale is not None:
                        cache.refreshing.behind(table, shape.options)
                    return Answer(rows, shape)
            if not fetch or not freshen(session, cache, table):
                return None
            refreshed = True
        remember(session, table, "bypass", OVERRUN)
        return None
    except Inexact as reason:
        if fetch:
            remember(session, table, "bypass", reason.args[0])
        return None


def note_kept(
    session: Session,
    table: CachedTable,
    stale: Reason | None,
    *,
    loaded: bool,
    lent: bool,
    again: bool,
) -> None:
    """Note that storage gave an answer, and what the policy had to do for it."""
    if loaded:
        remember(session, table, "miss", LOADED)
    else:
        why = LENT if lent else REFRESHED if again else ""
        remember(session, table, "hit", stale or why)


def _no_store(shape: Shape) -> bool:
    return any(isinstance(option, NoStore) for option in shape.options)


def _partial(
    session: Session,
    table: CachedTable,
    statement: Select[Any],
    question: Question,
    state: State,
    candidate: Candidate,
    missing: IntervalSet,
) -> Answer | None:
    """Fetch what storage lacks of an answer, and merge: one SELECT, in the session."""
    layout = table.set_up()
    columns = layout.columns
    present = candidate.intervals - missing
    check_sortable(question.shape.orderings, columns)
    gaps = (
        select(table.view)
        .where(*statement._where_criteria)
        .where(intervals_clause(layout.score_columns(candidate.index), missing))
    )
    if question.limit is not None and question.shape.orderings:
        gaps = gaps.order_by(*statement._order_by_clauses).limit(question.limit + question.offset)
    with table.misses.slot():
        fetched = fetch_records(session, table.view, gaps)
    if not table.may_merge(state, candidate.index, present):
        # Something was written between the two halves: together they may be no answer at all.
        remember(session, table, "miss", CHANGED)
        return None
    records = records_in(state, candidate.index, present)
    kept = filter_records(question.shape, candidate.residual, question, columns, records)
    rows = finished(layout, question, [*kept, *fetched], ordered=not question.shape.orderings)
    remember(session, table, "partial", gaps_of(table, candidate.index, missing))
    return Answer(rows, question.shape)


# -- rows of the database as records -----------------------------------------------------------


def record_maker(view: type[CachedView]) -> Callable[..., Record]:
    """Return what makes a record from the values of a row, in the form that the cache has them."""
    make = view.__record__
    aware = {
        at
        for at, column in enumerate(view.__table__.c)
        if isinstance(column.type, DateTime) and column.type.timezone
    }
    if not aware:
        return make

    def normalised(at: int, value: Any) -> Any:
        # Databases that drop the zone give naive values.
        return to_utc(value) if at in aware and value is not None and value.tzinfo else value

    return lambda *values: make(*(normalised(at, value) for at, value in enumerate(values)))


def fetch_records(session: Session, view: type[CachedView], statement: Select[Any]) -> list[Record]:
    """Have the database answer a SELECT of whole records, in the session's transaction."""
    result = session.execute(statement, execution_options={SKIP: True})
    make = record_maker(view)
    return [make(*row) for row in result]
