"""Whether a session may read from the cache, or its own SQL could see something else.

In: a session and a table. Out: a reason to ask the database, or none. The application listens where
it could change what is read, the session's transaction wrote a table of the view, asked for an
isolation level, ran SET, is bound to another database or schema, or (where the database's default
isolation is a snapshot) began before the view changed.

And the scope in which a session reads the views that declare one.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine, Select, select
from sqlalchemy.orm import Session

from .attempts import ATTEMPT
from .cache import BaseTableCache
from .commits import KEY, Transaction
from .drivers import CURSOR, TAINTED
from .events import Watcher, root_of
from .exc import TableCacheError, UnscopedRead
from .figures import Reason
from .following import AnswerFreshness
from .readers import in_scope
from .shapes import HARMLESS_OPTIONS
from .table import CachedTable
from .view import CachedView

CONNECTIONS: Final = "sa_tablecache.connections"
"""In ``Session.info``: the connections of its transaction."""

_ASKED_ON_ENGINE: Final = Reason("isolation", "an isolation level was asked for on the engine")
ANOTHER_SCHEMA: Final = Reason("bind", "another schema_translate_map")
_ASKED: Final = ("REPEATABLE READ", "SERIALIZABLE", "SNAPSHOT")


Scope: TypeAlias = Callable[[Session], Any]
"""Says the scope of a session; ``None`` or a ``LookupError`` if it has none."""


class Attachment(NamedTuple):
    """How a cache is attached to sessions; it hangs on the listeners that do it."""

    cache: BaseTableCache
    scope: Scope | None
    freshness: AnswerFreshness = "feed"


def attachment_of(listener: Any) -> Attachment | None:
    """Return the attachment of a listener; ``None`` if it is the application's."""
    return getattr(listener, "_sa_tablecache", None)


def freshness_of(session: Session, cache: BaseTableCache) -> AnswerFreshness:
    """Return how fresh a session wants answers of a cache."""
    for attachment in map(attachment_of, session.dispatch.do_orm_execute):
        if attachment is not None and attachment.cache is cache:
            return attachment.freshness
    return "feed"


def check_freshness(freshness: Any) -> None:
    """Refuse what is no freshness.

    :raises TableCacheError: for it.
    """
    if freshness in ("feed", "barrier"):
        return
    if not isinstance(freshness, timedelta) or freshness < timedelta(0):
        raise TableCacheError(
            f"freshness={freshness!r}: it is 'feed', 'barrier', or how old the last poll of the "
            "change feed may be, a timedelta"
        )


def scope_of(session: Session, view: type[CachedView]) -> Any:
    """Return the value of a view's scope column in the records that a session may see.

    :raises UnscopedRead: if nobody says.
    """
    for attachment in map(attachment_of, session.dispatch.do_orm_execute):
        if attachment is None or attachment.scope is None or view not in attachment.cache.views:
            continue
        try:
            value = attachment.scope(session)
        except LookupError as error:
            raise UnscopedRead(
                f"{view.__name__} is read by its scope, {view.__scope__}, and the session has "
                f"none: looking it up raised {error!r}"
            ) from error
        if value is not None:
            return value
    raise UnscopedRead(
        f"{view.__name__} is read by its scope, {view.__scope__}, and the session has none: attach "
        "it with scope=, a function that says for a session which"
    )


def in_own_scope(session: Session, statement: Select[Any], view: type[CachedView]) -> Select[Any]:
    """Return a SELECT of a view, kept to the session's scope if the view has scopes.

    :raises UnscopedRead: if it has, and the session has none.
    """
    if view.__scope__ is None:
        return statement
    return statement.where(in_scope(view, view.__table__, value=scope_of(session, view)))


def cache_of(session: Any) -> BaseTableCache:
    """Return the cache that a session of :meth:`.TableCache.sessionmaker` belongs to.

    :raises TableCacheError: if it was made by hand.
    """
    cache: BaseTableCache | None = getattr(session, "cache", None)
    if cache is None:
        raise TableCacheError(
            "this CacheSession belongs to no cache: make it with cache.sessionmaker()"
        )
    return cache


# -- the application's own listeners -----------------------------------------------------------

L = TypeVar("L", bound=Callable[..., Any])


def harmless(listener: L) -> L:
    """Say that a listener of the application does not change what is read; a decorator.

    A read that is answered from memory runs no listeners. So the database answers all reads of
    sessions of which the application listens to ``do_orm_execute`` or ``after_begin``, and of
    engines of which it listens to ``begin`` or ``engine_connect``: there it could add criteria or
    SET what they depend on. A listener that only watches is marked with this::

        @event.listens_for(Session, "after_begin")
        @harmless
        def log_begin(session, transaction, connection):
            log.debug("begin")
    """
    listener._sa_tablecache_harmless = True  # type: ignore[attr-defined]
    return listener


def may_change_reads(listener: Any) -> bool:
    """Whether a listener is the application's, and not known to be harmless."""
    return not getattr(listener, "_sa_tablecache_harmless", False)


def is_filtered(session: Session) -> bool:
    """Whether the application listens to what is executed, and may add criteria to it."""
    # Loops where any(map()) would read better: each call counts for a hit. See is_plain.
    listeners = session.dispatch.do_orm_execute
    for listener in listeners.listeners:
        if not getattr(listener, "_sa_tablecache_harmless", False):
            return True
    for listener in listeners.parent_listeners:
        if not getattr(listener, "_sa_tablecache_harmless", False):
            return True
    return False


harmless(Watcher.begin)
harmless(Watcher.engine_connect)


def _is_sqlalchemys(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "sqlalchemy"


def _listening_reason(session: Session, dispatch: Any) -> str | None:
    """Return where the application could SET what its SQL depends on, when a transaction begins."""
    for listeners in (session.dispatch.after_begin, dispatch.begin, dispatch.engine_connect):
        for listener in listeners:
            # SQLAlchemy itself sets isolation levels in one; those are looked at by themselves.
            if may_change_reads(listener) and not _is_sqlalchemys(listener):
                return Reason(
                    "listener",
                    f"the application listens to {listeners.name}, and may SET something there",
                )
    return None


# -- the session and its connections -----------------------------------------------------------


def is_plain(session: Any, engine: Engine | None) -> bool:
    """Whether nothing keeps a session from the cache of an engine, but perhaps its transaction.

    That is seen at a glance. If not, :func:`flush_pending`, :func:`is_filtered`, :func:`overrides`
    and :func:`database_reason` say what it is, if anything: they find nothing where this is true
    and no transaction is open; and where one is, what :func:`transaction_reason` finds.
    """
    own = session.__dict__
    if (
        session._new
        or session._deleted
        or session.identity_map._modified
        or session.bind is not engine
        or own.get("binds")
        or own.get("_Session__binds")
        or type(session).__dict__.get(_OVERRIDES) is not False
        or engine is None
        or engine.__dict__.get(_ISOLATED) is not engine._execution_options
        or own.get("execution_options")
        or ATTEMPT in session.info
    ):
        return False
    mine, theirs = session.dispatch, engine.dispatch
    try:
        # The two collections of each are gone through here, because SQLAlchemy's own iteration is
        # a call and a chain. Were they renamed, no session would be free, and the budgets of the
        # tests would say so.
        for listeners in (
            mine.do_orm_execute,
            mine.after_begin,
            theirs.begin,
            theirs.engine_connect,
        ):
            for listener in listeners.listeners:
                if not listener._sa_tablecache_harmless:
                    return False
            for listener in listeners.parent_listeners:
                if not listener._sa_tablecache_harmless:
                    return False
    except AttributeError:  # the application's
        return False
    return True


def flush_pending(session: Session, *, flush: bool = True) -> bool:
    """Flush as any query would, so that the session's own changes count as written.

    That comes before the state of a view is looked at, because it may change the state: where each
    statement commits, for instance.

    :param flush: whether it may; else the answer says whether nothing had to be.
    """
    # The public way, new/dirty/deleted, builds three sets for each read, and _is_clean(), which
    # is as private as these, is two calls. Were they renamed, all tests would fail.
    if session._new or session._deleted or session.identity_map._modified:
        if not flush:
            return False
        if session.autoflush and not session._flushing:
            session.flush()
    return True


def database_reason(
    session: Session, cache: BaseTableCache, table: CachedTable, statement: Any = None
) -> str | None:
    """Return why a session has to read the database, or ``None`` if it may use the cache.

    Of a session without pending changes: see :func:`flush_pending`.

    :param statement: what it reads, where the session may choose its bind by that.
    """
    engine = cache.engine
    if is_plain(session, engine):
        if session._transaction is None:
            return None
        return transaction_reason(session, cache, table)
    if ATTEMPT in session.info:  # what the database does not see it finds in no conflict
        return Reason(
            "isolation", "the session is in a transaction of in_transaction or Transaction"
        )
    bind = session.bind
    own = session.__dict__
    if (
        bind is not engine
        or own.get("binds")  # of mappers and tables: SQLAlchemy 2.1
        or own.get("_Session__binds")  # 2.0
        or (type(session).__dict__.get(_OVERRIDES) is not False and overrides(session))
    ):
        clause = select(table.view) if statement is None else statement
        reason = _foreign_bind(session, engine, clause)
        if reason is not None:
            return reason
    if isolation_asked_for(engine):
        return _ASKED_ON_ENGINE
    options = getattr(
        session, "execution_options", None
    )  # of all statements of the session: SQLAlchemy 2.1
    if options and not HARMLESS_OPTIONS.issuperset(options):
        return Reason("statement", "execution options of the session are left to the database")
    dispatch = engine.dispatch if bind is None else bind.dispatch
    for listeners in (session.dispatch.after_begin, dispatch.begin, dispatch.engine_connect):
        for listener in listeners:
            if not getattr(listener, "_sa_tablecache_harmless", False):
                reason = _listening_reason(session, dispatch)
                if reason is not None:
                    return reason
    return transaction_reason(session, cache, table)


def transaction_reason(session: Session, cache: BaseTableCache, table: CachedTable) -> str | None:
    """Return why the open transaction of a session keeps it from the cache, or ``None``."""
    bind = session.bind
    if session._transaction is None and not isinstance(bind, Connection):
        return None
    connections = list(session.info.get(CONNECTIONS, ()))
    if isinstance(bind, Connection):
        connections.append(bind)
    for connection in connections:
        if connection.closed or connection.invalidated:
            continue
        reason = _connection_reason(connection, cache, table, cache.engine)
        if reason is not None:
            return reason
    return None


#: Where is remembered what a class of sessions and an engine are like: on themselves, where it is
#: found without a call, and goes with them. Of an engine it is the execution options with which it
#: asks for no isolation: Engine.update_execution_options() puts another object in their place.
_OVERRIDES: Final = "_sa_tablecache_overrides"
_ISOLATED: Final = "_sa_tablecache_isolated"


def overrides(session: Session) -> bool:
    """Whether the application's own class of sessions chooses binds or changes what is executed."""
    class_ = type(session)
    known: bool | None = class_.__dict__.get(_OVERRIDES)  # not that of a base class
    if known is None:
        modules = {
            str(getattr(getattr(class_, name), "__module__", "")).partition(".")[0]
            for name in ("get_bind", "execute", "scalars", "scalar")
        }
        known = not modules <= {"sqlalchemy", "sa_tablecache"}
        setattr(class_, _OVERRIDES, known)
    return known


def _foreign_bind(session: Session, engine: Engine, clause: Any) -> str | None:
    try:
        bind = session.get_bind(clause=clause)
    except Exception:
        return Reason("bind", "the session has no bind that the cache could recognise")
    other = bind.engine
    if root_of(other) is not root_of(engine):
        return Reason("bind", "the session is bound to another engine")
    mine, theirs = (e.get_execution_options().get("schema_translate_map") for e in (engine, bind))
    if mine != theirs:
        return ANOTHER_SCHEMA
    return _ASKED_ON_ENGINE if isolation_asked_for(other) else None


def isolation_asked_for(engine: Engine) -> bool:
    """Whether all transactions of an engine are to be REPEATABLE READ or SERIALIZABLE."""
    options = engine._execution_options  # get_execution_options() is a call for each read
    if engine.__dict__.get(_ISOLATED) is options:
        return False
    dialect = engine.dialect
    asked = options.get("isolation_level") or getattr(dialect, "_on_connect_isolation_level", None)
    if asked is None and dialect.name == "postgresql":
        # A default other than READ COMMITTED was set by someone: server, database, role. It is
        # known when the engine has connected; until then it may be any.
        asked = getattr(dialect, "default_isolation_level", None)
        if asked is None:
            return True
    if asked is None and dialect.name in ("mysql", "mariadb"):
        # There REPEATABLE READ is what everybody gets who asks for nothing.
        default = getattr(dialect, "default_isolation_level", None)
        if default is None:
            return True
        asked = None if default == "REPEATABLE READ" else default
    if asked in _ASKED:
        return True
    setattr(engine, _ISOLATED, options)
    return False


def _connection_reason(
    connection: Connection, cache: BaseTableCache, table: CachedTable, engine: Engine
) -> str | None:
    info = connection.info
    transaction: Transaction | None = info.get(KEY)
    at_home = cache.lives_in is connection
    if transaction is not None:
        wrote = transaction.underway or transaction.changes or transaction.settled is not None
        if wrote and transaction.touches(cache.affecting(table.tables), settled=not at_home):
            return Reason("own_writes", "the transaction wrote a table of the view")
        if transaction.locks:
            return Reason(
                "isolation",
                "the transaction has locked tables, for which a refresh could have to wait",
            )
    if CURSOR in info:
        return Reason("connection", "the transaction used a cursor of the driver")
    if info.get(TAINTED):
        return Reason("connection", "the connection ran SET or the like")
    options, of_engine = connection.get_execution_options(), engine.get_execution_options()
    asked = options.get("isolation_level")
    if asked in _ASKED:
        return Reason("isolation", f"{asked} was asked for")
    if options.get("schema_translate_map") != of_engine.get("schema_translate_map"):
        return ANOTHER_SCHEMA
    if (
        asked is None
        and not at_home
        and engine.dialect.name != "postgresql"
        and connection.in_transaction()
        and (transaction is None or transaction.began < table.changed_at)
    ):
        return Reason("isolation", "the view changed since the transaction began")
    return None
