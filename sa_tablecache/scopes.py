"""Whether a session may read from the cache, or its own SQL could see something else.

In: a session and a table. Out: a reason to ask the database, or none: the session's transaction
wrote a table of the view, asked for an isolation level, ran SET, is bound to another database or
schema, or (where the database's default isolation is a snapshot) began before the view changed.
"""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from .cache import BaseTableCache
from .commits import KEY, Transaction
from .events import TAINTED, root_of
from .table import CachedTable

CONNECTIONS: Final = "sa_tablecache.connections"
"""In ``Session.info``: the connections of its transaction."""

_ASKED_ON_ENGINE: Final = "an isolation level was asked for on the engine"
_ASKED: Final = ("REPEATABLE READ", "SERIALIZABLE", "SNAPSHOT")


def flush_pending(session: Session) -> None:
    """Flush as any query would, so that the session's own changes count as written."""
    # The public way, new/dirty/deleted, builds three sets for each read.
    if session.autoflush and not session._flushing and not session._is_clean():
        session.flush()


def database_reason(session: Session, cache: BaseTableCache, table: CachedTable) -> str | None:
    """Return why a session has to read the database, or ``None`` if it may use the cache."""
    flush_pending(session)
    engine = cache.engine
    bind = session.bind
    if bind is not engine or not _plain_bind(type(session)):
        reason = _foreign_bind(session, engine)
        if reason is not None:
            return reason
    if isolation_asked_for(engine):
        return _ASKED_ON_ENGINE
    if not isinstance(bind, Connection) and not session.in_transaction():
        return None
    connections = list(session.info.get(CONNECTIONS, ()))
    if isinstance(bind, Connection):
        connections.append(bind)
    for connection in connections:
        if connection.closed or connection.invalidated:
            continue
        reason = _connection_reason(connection, cache, table, engine)
        if reason is not None:
            return reason
    return None


_plain_binds: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def _plain_bind(session_class: type) -> bool:
    """Whether sessions of a class choose their engine as SQLAlchemy does."""
    known = _plain_binds.get(session_class)
    if known is None:
        module = str(getattr(session_class.get_bind, "__module__", ""))  # type: ignore[attr-defined]
        known = module.partition(".")[0] in ("sqlalchemy", "sa_tablecache")
        _plain_binds[session_class] = known
    return known


def _foreign_bind(session: Session, engine: Engine) -> str | None:
    try:
        bind = session.get_bind()
    except Exception:
        return "the session has no bind that the cache could recognise"
    other = bind.engine
    if root_of(other) is not root_of(engine):
        return "the session is bound to another engine"
    mine, theirs = (e.get_execution_options().get("schema_translate_map") for e in (engine, bind))
    if mine != theirs:
        return "another schema_translate_map"
    return _ASKED_ON_ENGINE if isolation_asked_for(other) else None


_isolation: WeakKeyDictionary[Engine, bool] = WeakKeyDictionary()


def isolation_asked_for(engine: Engine) -> bool:
    """Whether all transactions of an engine are to be REPEATABLE READ or SERIALIZABLE."""
    known = _isolation.get(engine)
    if known is not None:
        return known
    dialect = engine.dialect
    asked = engine.get_execution_options().get("isolation_level") or getattr(
        dialect, "_on_connect_isolation_level", None
    )
    if asked is None and dialect.name == "postgresql":
        # A default other than READ COMMITTED was set by someone: server, database, role. It is
        # known when the engine has connected.
        asked = dialect.default_isolation_level
        if asked is None:
            return False
    if asked is None and dialect.name in ("mysql", "mariadb"):
        # There REPEATABLE READ is what everybody gets who asks for nothing.
        default = dialect.default_isolation_level
        if default is None:
            return False
        asked = None if default == "REPEATABLE READ" else default
    result = asked in _ASKED
    _isolation[engine] = result
    return result


def _connection_reason(
    connection: Connection, cache: BaseTableCache, table: CachedTable, engine: Engine
) -> str | None:
    transaction: Transaction | None = connection.info.get(KEY)
    if transaction is not None and transaction.touches(cache.affecting(table.tables)):
        return "the transaction wrote a table of the view"
    if transaction is not None and transaction.locks:
        return "the transaction has locked tables, for which a refresh could have to wait"
    if connection.info.get(TAINTED):
        return "the connection ran SET or the like"
    options = connection.get_execution_options()
    asked = options.get("isolation_level")
    if asked in _ASKED:
        return f"{asked} was asked for"
    if options.get("schema_translate_map") != engine.get_execution_options().get(
        "schema_translate_map"
    ):
        return "another schema_translate_map"
    if (
        asked is None
        and engine.dialect.name != "postgresql"
        and connection.in_transaction()
        and (transaction is None or transaction.began < table.changed_at)
    ):
        return "the view changed since the transaction began"
    return None
