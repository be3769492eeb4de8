"""Listening to an engine: which transaction wrote what, and when it has ended.

In: SQLAlchemy's engine and pool events. Out: what each connection's transaction has written, noted
in its :class:`.Transaction`, and calls of ``commits.py`` when it is about to end or has ended.

Engine events see every statement of every session and connection, so nothing is missed whichever
way it was written. A statement is noted before it is executed, and what it wrote when it is over:
then it is known whether it wrote any row at all, and which, where the statement did not name them.
Savepoints that are rolled back leave superfluous marks; that is harmless.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from operator import methodcaller
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, Table, event
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.sql.dml import UpdateBase

from .analysis import table_name
from .cascades import all_cascades
from .changes import ChangeSet
from .commits import (
    KEY,
    Subscriber,
    Transaction,
    Underway,
    orphan,
    publish,
    release,
    take_leases,
    transaction_of,
    wrap_commit,
)
from .drivers import (
    CURSOR,
    TAINTED,
    autocommits,
    count_unknown,
    in_transaction,
    is_open,
    keeps_keys,
    knows_transactions,
    watch_cursors,
)
from .interests import Followed, Interest, as_declared, followed, tables_written, together
from .loading import READER
from .returning import (
    WRITES,
    Rows,
    ask_for_keys,
    finish,
    hide_rows,
    read_rows,
    returning_suffix,
    returns_more,
    suffixed_rows,
    tells_keys,
    was_asked,
)
from .statements import ANYTHING, NOTHING, Writes, rows_of, writes_of

SUFFIXED: Final = "_sa_tablecache_suffixed"
"""Attribute of the context of a statement behind which RETURNING was written."""
RAW: Final = "sa_tablecache.raw"
MOVED: Final = "sa_tablecache.moved"
"""In the connection's info: USE or the like ran, and names without a schema mean other tables."""
tick: Final = count(1).__next__
"""Returns a number that is larger than all before, to order events of this process by."""
_INTEREST: Final = methodcaller("interest")
_NO_OPTIONS: Final[dict[str, Any]] = {}


class Watcher:
    """Watches one engine for any number of subscribers."""

    def __init__(self, engine: Engine) -> None:
        self.subscribers: list[Subscriber] = []
        self._together: tuple[list[Interest], Interest] = ([], Interest())
        self._meanings: WeakKeyDictionary[Any, Followed] = WeakKeyDictionary()
        """What compiled statements mean for the subscribers."""
        self.prepared: dict[Any, ChangeSet] = {}
        """What prepared transactions have written, which any connection may commit."""
        for name in (
            "after_cursor_execute", "handle_error",
            "begin", "begin_twophase", "commit", "rollback",
            "release_savepoint", "rollback_savepoint",
            "prepare_twophase", "commit_twophase", "rollback_twophase",
            "engine_connect", "checkout", "checkin", "close_detached",
        ):  # fmt: skip
            event.listen(engine, name, getattr(self, name))
        for name in ("before_execute", "before_cursor_execute"):
            event.listen(engine, name, getattr(self, name), retval=True)
        # The result is as the caller expects it before anybody else looks at it.
        event.listen(engine, "after_execute", self.after_execute, insert=True)
        wrap_commit(engine.dialect)

    # -- statements -----------------------------------------------------------------------------

    def before_execute(
        self, connection: Connection, statement: Any, multiparams: Any, params: Any, options: Any
    ) -> tuple[Any, Any, Any]:
        """Have a statement tell which rows it writes, if somebody asks."""
        if isinstance(statement, UpdateBase) and WRITES not in options:
            table = statement.table
            if isinstance(table, Table):
                wanted = self._interest().wanted.get(table.name)
                if wanted is not None:
                    statement = ask_for_keys(
                        connection, statement, multiparams, params, options, wanted
                    )
        return statement, multiparams, params

    def _interest(self) -> Interest:
        """Return what all subscribers ask: the same object while that is the same."""
        asked = list(map(_INTEREST, self.subscribers))
        known, together_ = self._together
        if known != asked:  # they are compared by identity
            together_ = together(asked)
            self._together = asked, together_
        return together_

    def _resolved(self, writes: Writes) -> Writes:
        """Return what a text writes that names one table: one that is known, or anything."""
        assert writes.table is not None
        schema, name = writes.table
        tables = {
            table
            for subscriber in self.subscribers
            for table in subscriber.tables_named(name)
            if schema is None or table.schema in (None, schema)
        }
        if not tables:  # a database view, say
            return ANYTHING
        further = frozenset(table_name(table) for table in tables)
        for table in tables:
            further |= all_cascades(table)
        return replace(writes, further=further)

    def before_cursor_execute(
        self,
        connection: Connection,
        cursor: Any,
        statement: str,
        parameters: Any,
        context: Any,
        many: Any,
    ) -> tuple[str, Any]:
        """Note what a statement is about to write."""
        info = connection.connection.info
        if info.get(CURSOR) is cursor:
            del info[CURSOR]
        options = _NO_OPTIONS if context is None else context.execution_options
        original = writes = writes_of(context, statement)
        declared = options.get(WRITES)
        if writes is NOTHING and declared is None:
            return statement, parameters
        if writes.sets:
            info[TAINTED] = True
        if writes.moves:
            info[MOVED] = True
        if writes.locks:
            transaction_of(info).locks = True
        if writes.rolls_back and KEY in info:
            transaction_of(info).changes.forget_before()
        if declared is not None:
            writes = as_declared(writes, declared)
        if not writes and not writes.opaque:
            return statement, parameters
        transaction = transaction_of(info)
        if transaction.ending:
            return statement, parameters
        meaning = self._meaning(connection, context, original, writes)
        writes = meaning.writes
        transaction.opaque = transaction.opaque or writes.opaque
        keys = rows_of(writes, context) if keeps_keys(connection) else None
        # Results of statements on other tables are nobody's business but their callers'.
        suffix = returning_suffix(writes, context) if meaning.asked and declared is None else ""
        transaction.underway[id(context)] = Underway(
            context,
            writes,
            meaning.names,
            meaning.acts,
            keys,
            asks=(meaning.asked or was_asked(context))
            and (keys is None or returns_more(context))
            and tells_keys(writes, context),
            suffixed=bool(suffix),
        )
        if writes.opaque or autocommits(connection) or self._at_once(transaction):
            self._lease_underway(transaction, connection, with_earlier=writes.opaque)
        return statement + suffix, parameters

    def _meaning(
        self, connection: Connection, context: Any, original: Writes, writes: Writes
    ) -> Followed:
        """Return what a statement means for the subscribers; remembered where it may be.

        Not where the application says what it writes, nor where names may mean other tables.
        """
        interest, dialect = self._interest(), connection.dialect
        options = (
            connection.get_execution_options() if context is None else context.execution_options
        )
        translate = options.get("schema_translate_map")
        moved = connection.info.get(MOVED)
        usual = not (writes is not original or writes.kind == "text" or translate or moved)
        compiled = None if context is None else context.compiled
        if usual and compiled is not None:
            known = self._meanings.get(compiled)
            if (
                known is not None
                and known.interest is interest
                and known.original is original
                and known.default_schema == dialect.default_schema_name
            ):
                return known
        if writes.kind == "text":
            writes = self._resolved(writes)
        if moved and any(schema is None for schema, _ in tables_written(writes)):
            writes = replace(writes, anything=True)
        meaning = followed(interest, original, writes, dialect, translate or {})
        if usual and compiled is not None:
            self._meanings[compiled] = meaning
        return meaning

    def _lease_underway(
        self, transaction: Transaction, connection: Connection, *, with_earlier: bool
    ) -> None:
        """Lease what a statement could commit: what it writes, and perhaps all before it."""
        changes, transaction.changes = transaction.changes, ChangeSet()
        if with_earlier:
            transaction.changes.update(changes)
        underway = dict(transaction.underway)
        transaction.settle()  # the rows are not known yet: any that it could be
        take_leases(self.subscribers, transaction, connection.connection)
        transaction.changes, transaction.underway = changes, underway

    def after_cursor_execute(
        self, connection: Connection, cursor: Any, statement: str, _: Any, context: Any, many: Any
    ) -> None:
        """Note what a statement wrote, unless its result is to tell."""
        transaction: Transaction | None = connection.connection.info.get(KEY)
        if transaction is None:
            return
        executed = transaction.underway.get(id(context))
        sqlite = connection.dialect.name == "sqlite"
        if executed is None:
            if transaction.changes:  # RELEASE of a savepoint commits on SQLite, say
                self._publish_if_over(connection, transaction, NOTHING)
            if sqlite and transaction.leases is not None and not transaction.ending:
                release(transaction)  # it did not
            return
        if sqlite and autocommits(connection):
            if context.execute_style is ExecuteStyle.INSERTMANYVALUES:
                return  # SQLAlchemy fetches the rows of this batch next, and then it is committed
            if not executed.suffixed:
                finish(context, cursor)
        if executed.asks:
            return
        if executed.suffixed:
            rows = suffixed_rows(executed.writes, context, cursor)
            context.__dict__[SUFFIXED] = True
            none = rows is not None and not rows.keys
        else:
            rows = None if executed.keys is None else Rows(executed.keys)
            quiet = (
                not context.compiled.effective_returning
                if context.is_crud
                else executed.writes.kind == "text" and cursor.description is None
            )
            none = quiet and not many and cursor.rowcount == 0
        if none and executed.acts:
            rows, none = None, False
        transaction.wrote(executed, rows, any_row=not none)
        self._publish_if_over(connection, transaction, executed.writes)

    def after_execute(
        self, connection: Connection, statement: Any, _: Any, __: Any, ___: Any, result: Any
    ) -> None:
        """Note the rows that a result tells."""
        transaction: Transaction | None = connection.connection.info.get(KEY)
        context = getattr(result, "context", None)
        if transaction is None or context is None:
            return
        if SUFFIXED in context.__dict__:
            hide_rows(context, result)
        executed = transaction.underway.get(id(context))
        if executed is not None:
            rows = read_rows(executed.writes, context, statement, result)
            if (rows is not None and not rows.keys and executed.acts) or (
                executed.writes.kind == "insert" and not keeps_keys(connection)
            ):
                rows = None
            transaction.wrote(executed, rows, any_row=rows is None or bool(rows.keys))
            self._publish_if_over(connection, transaction, executed.writes)

    def _publish_if_over(
        self, connection: Connection, transaction: Transaction, writes: Writes
    ) -> None:
        """Publish at once what no COMMIT will follow: AUTOCOMMIT, and what text may have ended."""
        if (
            not in_transaction(connection)  # nor is it in AUTOCOMMIT
            if connection.dialect.name == "sqlite"
            else autocommits(connection)
        ):
            publish(self.subscribers, transaction)
            if knows_transactions(connection):
                transaction.forget()
        elif self._at_once(transaction) or writes.opaque:
            publish(self.subscribers, transaction)

    def _at_once(self, transaction: Transaction) -> bool:
        """Whether it wrote tables that have no transactions."""
        at_once = self._interest().at_once
        return bool(at_once) and transaction.touches(at_once)

    def handle_error(self, context: Any) -> None:
        """Publish what a failed statement may have written where each statement commits."""
        connection = context.connection
        if connection is None or connection.invalidated or connection.closed:
            return
        transaction: Transaction | None = connection.info.get(KEY)
        if transaction is None:
            return
        transaction.settle()
        if transaction.leases is not None:
            if not context.is_disconnect:
                publish(self.subscribers, transaction)
                if autocommits(connection):
                    transaction.forget()
            else:
                # Where each statement commits, this one may do so yet.
                orphan(transaction, transaction.backend)
                connection.info.pop(KEY, None)

    # -- transactions ---------------------------------------------------------------------------

    def begin(self, connection: Connection) -> None:
        """Note when a transaction began."""
        transaction_of(connection.connection.info).began = tick()

    def begin_twophase(self, connection: Connection, _xid: Any) -> None:
        """Note when a transaction began."""
        self.begin(connection)

    def rollback_savepoint(self, connection: Connection, _name: Any, _context: Any) -> None:
        """Forget what rows were before what is undone."""
        if connection.closed or connection.invalidated:
            return  # its info is gone, and nothing of it was committed
        transaction: Transaction | None = connection.info.get(KEY)
        if transaction is not None:
            transaction.changes.forget_before()

    def release_savepoint(self, connection: Connection, _name: Any, _context: Any) -> None:
        """Lease what RELEASE may be about to make visible: on SQLite the outermost one commits."""
        transaction: Transaction | None = connection.info.get(KEY)
        if connection.dialect.name == "sqlite" and transaction is not None and transaction.changes:
            transaction.settle()
            take_leases(self.subscribers, transaction, connection.connection)

    def commit(self, connection: Connection) -> None:
        """Lease what COMMIT is about to make visible."""
        info = connection.connection.info
        if CURSOR in info:
            count_unknown(info)
        transaction = transaction_of(info)
        if not transaction.began:  # it began before anybody watched
            transaction.changes.add_everything()
        if transaction.underway:
            transaction.settle()
        if transaction.written:
            take_leases(self.subscribers, transaction, connection.connection)
        # Whoever listens after us may write, too; see wrap_commit().
        transaction.subscribers = self.subscribers

    def prepare_twophase(self, connection: Connection, xid: Any) -> None:
        """Keep what is about to be prepared, for whoever commits it."""
        transaction = transaction_of(connection.info)
        if not transaction.began:
            transaction.changes.add_everything()
        transaction.settle()
        self.prepared[xid] = transaction.written

    def commit_twophase(self, connection: Connection, xid: Any, prepared: Any) -> None:
        """Lease what COMMIT PREPARED is about to make visible."""
        transaction = transaction_of(connection.info)
        if prepared:
            changes = self.prepared.pop(xid, None)
            if changes is None:  # prepared by somebody else
                transaction.changes.add_everything()
            elif changes is not transaction.changes:
                transaction.changes.update(changes)
            transaction.began = transaction.began or tick()
        self.commit(connection)

    def rollback(self, connection: Connection, *, known: bool = False) -> None:
        """Forget what is rolled back, unless it may have become durable all the same.

        :param known: whether it is known that a transaction is open, which its driver cannot tell.
        """
        if connection.closed or connection.invalidated:
            return  # its info is gone; the checkin has published what it had written
        count_unknown(connection.info)
        transaction: Transaction | None = connection.info.pop(KEY, None)
        if transaction is None:
            return
        transaction.settle()
        if transaction.written and (
            transaction.opaque
            or connection.dialect.name in ("mysql", "mariadb")
            or not (known or is_open(connection))
        ):
            publish(self.subscribers, transaction)
        else:
            release(transaction)  # taken for a COMMIT that was never sent

    def rollback_twophase(self, connection: Connection, xid: Any, _prepared: Any) -> None:
        """Forget what is rolled back."""
        self.prepared.pop(xid, None)
        self.rollback(connection, known=True)

    # -- connections ----------------------------------------------------------------------------

    def checkout(self, _dbapi: Any, record: Any, _proxy: Any) -> None:
        """Take a connection for a raw one until an engine Connection claims it."""
        record.info[RAW] = True

    def engine_connect(self, connection: Connection) -> None:
        """Note that the connection's statements will be seen."""
        connection.info[RAW] = False
        watch_cursors(connection)

    def close_detached(self, _dbapi: Any) -> None:
        """Count on a connection that left its pool to have written unseen."""
        for subscriber in list(self.subscribers):
            subscriber.publish(ChangeSet(everything=True), None)

    def checkin(self, _dbapi: Any, record: Any) -> None:
        """Publish what was written unseen: by a raw connection, or with its end unknown."""
        if READER in record.info:
            return
        info = record.info
        if CURSOR in info:
            count_unknown(info)
        transaction: Transaction | None = info.pop(KEY, None)
        if info.get(RAW):
            info[TAINTED] = True  # nobody saw what it SET
            for subscriber in list(self.subscribers):
                subscriber.publish(ChangeSet(everything=True), None)
        elif transaction is not None:
            transaction.settle()
            if transaction.written or transaction.leases is not None:
                publish(self.subscribers, transaction)


_watchers: WeakKeyDictionary[Engine, Watcher] = WeakKeyDictionary()


def watch(engine: Engine, subscriber: Subscriber) -> None:
    """Have a subscriber told of the commits of an engine and of all its option engines."""
    root = root_of(engine)
    watcher = _watchers.get(root)
    if watcher is None:
        watcher = _watchers[root] = Watcher(root)
    if subscriber not in watcher.subscribers:
        watcher.subscribers.append(subscriber)


def all_subscribers() -> list[Subscriber]:
    """Return who is told of the commits of any engine of this process."""
    return [each for watcher in list(_watchers.values()) for each in watcher.subscribers]


def unwatch(engine: Engine, subscriber: Subscriber) -> None:
    """Stop telling a subscriber."""
    watcher = _watchers.get(root_of(engine))
    if watcher is not None and subscriber in watcher.subscribers:
        watcher.subscribers.remove(subscriber)


def root_of(engine: Engine) -> Engine:
    """Return the engine that an option engine was made from; events of one reach the other."""
    while hasattr(engine, "_proxied"):
        engine = engine._proxied
    return engine
