"""Listeners of sessions: how a ``select(View)`` of any attached session gets to the cache.

In: an application's own sessions, or a factory of them. Out: results of the cache, or of the
database, which then come as records too; and which connections a session's transaction has.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy import Connection, Select, event
from sqlalchemy.engine.result import Result
from sqlalchemy.orm import ORMExecuteState, Session

from . import reading
from .cache import BaseTableCache
from .figures import Reason
from .following import AnswerFreshness
from .misses import is_wanting
from .readers import reading_as
from .reading import SKIP
from .results import result_of, selects_views, with_records, without_row_order
from .scopes import CONNECTIONS, Attachment, Scope, harmless, may_change_reads, scope_of
from .shadow import compared, is_to_compare
from .shapes import HARMLESS_OPTIONS, view_of

OTHER_LISTENERS = Reason(
    "listener", "the application listens to do_orm_execute, and may add criteria"
)


COMMITTED = "sa_tablecache.committed"
"""In ``Session.info``, after a commit: its token, once somebody has asked for it."""


def listen(
    cache: BaseTableCache,
    target: Any,
    scope: Scope | None = None,
    freshness: AnswerFreshness = "feed",
) -> None:
    """Have sessions answered by the cache: a Session class, a Session, or a factory of them."""

    def do_orm_execute(state: ORMExecuteState) -> Result[Any] | None:
        if scope is None:
            return answered(state)
        with reading_as(partial(scope_of, state.session)):
            # What goes on to the database goes on here, where it is known who reads.
            result = answered(state)
            return state.invoke_statement() if result is None else result

    def answered(state: ORMExecuteState) -> Result[Any] | None:
        statement = state.statement
        if not isinstance(statement, Select):
            return None
        view = view_of(statement)
        if view is None and not selects_views(statement):
            return None
        if state.local_execution_options.get(SKIP):
            return None
        if cache.closed and not _is_cached(state.session):
            return None
        run = partial(database_answers, state)
        if view is not None and (view in cache.views or _is_cached(state.session)):
            if _others_follow(state.session, do_orm_execute):
                reading.remember(state.session, cache.table(view), "bypass", OTHER_LISTENERS)
            elif (
                not state.parameters
                and "bind" not in state.bind_arguments
                and _plain(state.local_execution_options)
            ):
                answer = reading.answer(cache, state.session, statement, view=view)
                if answer is not None:
                    return result_of(answer, statement)
                table = cache.table(view)
                if table.guards and is_to_compare(state.session):
                    return compared(cache, state.session, statement, run)
                if view.__max_misses__ is not None and is_wanting(state.session):
                    with table.misses.slot():
                        return run()
            else:
                reading.remember(
                    state.session,
                    cache.table(view),
                    "bypass",
                    "parameters or execution options of the call",
                )
        if view is not None:
            state.statement = statement = without_row_order(statement)
        return run() if selects_views(statement) else None

    def database_answers(state: ORMExecuteState) -> Result[Any]:
        statement: Any = state.statement
        if view_of(statement) is not None:
            state.statement = statement = without_row_order(statement)
        result = state.invoke_statement(execution_options={SKIP: True})
        return with_records(statement, result) if selects_views(statement) else result

    def after_begin(session: Session, _: Any, connection: Connection) -> None:
        known = session.info.setdefault(CONNECTIONS, [])
        known[:] = [c for c in known if not c.closed and c is not connection]
        known.append(connection)

    def after_commit(session: Session) -> None:
        session.info[COMMITTED] = None

    listeners: tuple[Any, ...] = (do_orm_execute, after_begin)
    for listener in listeners:
        harmless(listener)._sa_tablecache = Attachment(cache, scope, freshness)
    event.listen(target, "do_orm_execute", do_orm_execute)
    event.listen(target, "after_begin", after_begin)
    event.listen(target, "after_commit", after_commit)
    if isinstance(target, Session) and target.in_transaction():
        # Its transaction began before anybody listened: its own writes could be missed.
        transaction = target.get_transaction()
        assert transaction is not None
        known = target.info.setdefault(CONNECTIONS, [])
        known += [entry[0] for entry in transaction._connections.values()]


def _others_follow(session: Session, mine: Any) -> bool:
    """Whether listeners of the application, which may add criteria, run after this one."""
    listeners = list(session.dispatch.do_orm_execute)
    return mine in listeners and any(map(may_change_reads, listeners[listeners.index(mine) :]))


def _plain(options: Any) -> bool:
    """Whether the execution options of a call change nothing about which rows are right."""
    return not options or all(
        name in HARMLESS_OPTIONS or name.startswith(("_sa_orm_", "_result_")) for name in options
    )


def _is_cached(session: Session) -> bool:
    """Whether a session is one that :meth:`.TableCache.sessionmaker` makes."""
    return getattr(session, "cache", None) is not None
