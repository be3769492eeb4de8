"""The operations of migration files, each with its implementation and how it is rendered.

They run the SQL of ``feed/``, statement by statement, or print it where a migration is run with
``--sql``. What the catalog knows has to be given then: it cannot be asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Final

from alembic.autogenerate.render import renderers
from alembic.operations import MigrateOperation, Operations
from alembic.util import CommandError
from sqlalchemy import Dialect

from sa_tablecache.analysis import TableName
from sa_tablecache.feed.contract import MOST_KEYS, Changelog, Relation, Watch, run
from sa_tablecache.feed.dialects import changelog_for

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

MYSQL: Final = ("mysql", "mariadb")


def name_of(dialect: Dialect, relation: Relation) -> TableName:
    """Return the name by which migrations call a relation."""
    default = relation.schema in ("", dialect.default_schema_name)
    return None if default else relation.schema, relation.name


@Operations.register_operation("create_change_feed")
class CreateChangeFeedOp(MigrateOperation):
    """Install the changelog.

    :param renewed: whether there was one, of an older version: the reverse keeps it.
    """

    def __init__(self, *, renewed: bool = False) -> None:
        self.renewed = renewed

    @classmethod
    def create_change_feed(cls, operations: Operations) -> None:
        """Install the changelog, into which triggers log the changes of watched tables.

        It is the one of the installed version of sa_tablecache. Where there is one of the same
        version, nothing happens; an older one is brought up to date.
        """
        operations.invoke(cls())

    def reverse(self) -> MigrateOperation:
        return self if self.renewed else DropChangeFeedOp()

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return ("create_change_feed",)


@Operations.register_operation("drop_change_feed")
class DropChangeFeedOp(MigrateOperation):
    """Remove the changelog."""

    @classmethod
    def drop_change_feed(cls, operations: Operations) -> None:
        """Remove the changelog, and the triggers of all tables that are watched.

        Caches of processes that still run ask the database from then on.
        """
        operations.invoke(cls())

    def reverse(self) -> MigrateOperation:
        return CreateChangeFeedOp()

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return ("drop_change_feed",)


@Operations.register_operation("watch_table")
class WatchTableOp(MigrateOperation):
    """Watch a table.

    :param previous: how it was watched before, if it was: the reverse restores that.
    """

    def __init__(
        self,
        table_name: str,
        *,
        schema: str | None = None,
        key: Sequence[str] | None = None,
        ranges: Sequence[str] = (),
        limit: int = MOST_KEYS,
        cascades: Sequence[Any] | None = None,
        previous: WatchTableOp | None = None,
    ) -> None:
        self.table_name = table_name
        self.schema = schema
        self.key = key
        self.ranges = ranges
        self.limit = limit
        self.cascades = cascades
        self.previous = previous

    @classmethod
    def watch_table(
        cls,
        operations: Operations,
        table_name: str,
        *,
        schema: str | None = None,
        key: Sequence[str] | None = None,
        ranges: Sequence[str] = (),
        limit: int = 1_000,
        cascades: Sequence[Any] | None = None,
    ) -> None:
        """Log the changes of a table from now on, or log them otherwise than before.

        :param key: the columns that are logged of each changed row; its primary key by default,
            which has to be given where the migration is run with ``--sql``.
        :param ranges: columns of which a statement that changes more rows than the limit logs the
            smallest and the largest value, old and new.
        :param limit: of how many rows a statement logs the keys.
        :param cascades: what of a change fires no trigger by itself: what foreign keys do on
            MariaDB and MySQL, and what REPLACE deletes on SQLite. By default it is what the catalog
            says; it has to be given where the migration is run with ``--sql`` for one of these.
        """
        operations.invoke(
            cls(
                table_name,
                schema=schema,
                key=key,
                ranges=ranges,
                limit=limit,
                cascades=cascades,
            )
        )

    @classmethod
    def of(
        cls,
        schema: str | None,
        name: str,
        watch: Watch,
        *,
        previous: WatchTableOp | None = None,
        ask: bool = False,
    ) -> WatchTableOp:
        """Return the operation that watches a table so.

        :param ask: leave to the catalog, when it is run, what that says of other tables.
        """
        return cls(
            name,
            schema=schema,
            key=watch.key,
            ranges=watch.ranges,
            limit=watch.limit,
            cascades=None if ask else watch.cascades,
            previous=previous,
        )

    def reverse(self) -> MigrateOperation:
        if self.previous is None:
            return UnwatchTableOp(self.table_name, schema=self.schema, previous=self)
        before = copy(self.previous)
        before.previous = self
        return before

    def to_diff_tuple(self) -> tuple[Any, ...]:
        key = None if self.key is None else tuple(self.key)
        return ("watch_table", self.schema, self.table_name, key, tuple(self.ranges))


@Operations.register_operation("unwatch_table")
class UnwatchTableOp(MigrateOperation):
    """No longer watch a table.

    :param previous: how it was watched: the reverse restores that.
    """

    def __init__(
        self, table_name: str, *, schema: str | None = None, previous: WatchTableOp | None = None
    ) -> None:
        self.table_name = table_name
        self.schema = schema
        self.previous = previous

    @classmethod
    def unwatch_table(
        cls, operations: Operations, table_name: str, *, schema: str | None = None
    ) -> None:
        """No longer log the changes of a table; nothing happens if it is not watched.

        Caches of processes that still run ask the database about views of the table.
        """
        operations.invoke(cls(table_name, schema=schema))

    def reverse(self) -> MigrateOperation:
        return self.previous or WatchTableOp(self.table_name, schema=self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return ("unwatch_table", self.schema, self.table_name)


@Operations.register_operation("invalidate_table")
class InvalidateTableOp(MigrateOperation):
    """Tell caches that any row of a table may have changed."""

    def __init__(self, table_name: str, *, schema: str | None = None) -> None:
        self.table_name = table_name
        self.schema = schema

    @classmethod
    def invalidate_table(
        cls, operations: Operations, table_name: str, *, schema: str | None = None
    ) -> None:
        """Log that any row of a watched table may have changed.

        For what triggers do not see: rows that were written while they were disabled, or that
        logical replication applied.
        """
        operations.invoke(cls(table_name, schema=schema))

    def reverse(self) -> MigrateOperation:
        return self

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return ("invalidate_table", self.schema, self.table_name)


# -- what they do -------------------------------------------------------------------------------


def _changelog(operations: Operations) -> Changelog:
    return changelog_for(operations.get_context().dialect.name)


def _run(operations: Operations, statements: Iterable[str]) -> None:
    """Run statements, or print them."""
    context = operations.get_context()
    if not context.as_sql:
        run(operations.get_bind(), statements)
        return
    for statement in statements:
        # What the client of MariaDB and MySQL takes for the end of a statement.
        body = context.dialect.name in MYSQL and ";" in statement.rstrip("; \n")
        end = " $$\n\nDELIMITER ;" if body else context.impl.command_terminator
        context.impl.static_output(
            ("DELIMITER $$\n\n" if body else "") + statement.strip().rstrip(";") + end
        )


def _relation(operations: Operations, op: Any) -> Relation | None:
    """Return the relation that an operation names; the default schema is left open offline."""
    if operations.get_context().as_sql:
        return Relation(op.schema or "", op.table_name)
    name = (op.schema, op.table_name)
    connection = operations.get_bind()
    changelog = _changelog(operations)
    found = changelog.resolve(connection, [name]).get(name)
    if found is None:  # a table that is gone may still be watched by name
        for relation in changelog.installed(connection).watched:
            if name == name_of(connection.dialect, relation):
                return relation
    return found


def _existing(operations: Operations, op: Any) -> Relation:
    relation = _relation(operations, op)
    if relation is None:
        raise CommandError(
            f"{_called(op)}: there is no table {op.table_name!r}"
            + (f" in schema {op.schema!r}" if op.schema else "")
            + ": create it before, or say its schema"
        )
    return relation


def _called(op: Any) -> str:
    return f"op.{op.to_diff_tuple()[0]}({op.table_name!r})"


@Operations.implementation_for(CreateChangeFeedOp)
def _create_change_feed(operations: Operations, op: CreateChangeFeedOp) -> None:
    _run(operations, _changelog(operations).create())


@Operations.implementation_for(DropChangeFeedOp)
def _drop_change_feed(operations: Operations, op: DropChangeFeedOp) -> None:
    changelog = _changelog(operations)
    online = not operations.get_context().as_sql
    _run(
        operations,
        changelog.drop(changelog.installed(operations.get_bind()).watched if online else ()),
    )


@Operations.implementation_for(WatchTableOp)
def _watch_table(operations: Operations, op: WatchTableOp) -> None:
    changelog = _changelog(operations)
    relation = _existing(operations, op)
    dialect = operations.get_context().dialect.name
    key, cascades = op.key, op.cascades
    if operations.get_context().as_sql:
        needed = {"key": key} if dialect == "postgresql" else {"key": key, "cascades": cascades}
        missing = [f"{name}=[...]" for name, value in needed.items() if value is None]
        if missing:
            raise CommandError(
                f"{_called(op)}: with --sql the catalog cannot be asked; say "
                f"{' and '.join(missing)}, as autogenerate renders it if env.py gives "
                "context.configure() sa_tablecache_offline=True"
            )
    elif changelog.installed(operations.get_bind()).version is None:
        raise CommandError(
            f"{_called(op)}: there is no changelog in this database: op.create_change_feed() has "
            "to come before"
        )
    elif key is None or cascades is None:
        proposed = changelog.propose(operations.get_bind(), relation, op.ranges, key or ())
        key = proposed.key if key is None else key
        cascades = proposed.cascades if cascades is None else cascades
    watch = Watch(relation, tuple(key or ()), tuple(op.ranges), op.limit, tuple(cascades or ()))
    _run(operations, changelog.watch(watch))


@Operations.implementation_for(UnwatchTableOp)
def _unwatch_table(operations: Operations, op: UnwatchTableOp) -> None:
    relation = _relation(operations, op)
    if relation is not None:
        _run(operations, _changelog(operations).unwatch(relation))


@Operations.implementation_for(InvalidateTableOp)
def _invalidate_table(operations: Operations, op: InvalidateTableOp) -> None:
    _run(operations, _changelog(operations).invalidate(_existing(operations, op)))


# -- how they are rendered ----------------------------------------------------------------------


def _call(context: AutogenContext, name: str, *arguments: str) -> str:
    return f"{context.opts['alembic_module_prefix']}{name}({', '.join(arguments)})"


def _table(op: Any) -> list[str]:
    schema = [] if op.schema is None else [f"schema={str(op.schema)!r}"]
    return [repr(str(op.table_name)), *schema]


def _plain(value: Any) -> Any:
    """Return a value made of named tuples and the like as one made of tuples."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


@renderers.dispatch_for(CreateChangeFeedOp)
def _render_create_change_feed(context: AutogenContext, op: CreateChangeFeedOp) -> str:
    return _call(context, "create_change_feed")


@renderers.dispatch_for(DropChangeFeedOp)
def _render_drop_change_feed(context: AutogenContext, op: DropChangeFeedOp) -> str:
    return _call(context, "drop_change_feed")


@renderers.dispatch_for(WatchTableOp)
def _render_watch_table(context: AutogenContext, op: WatchTableOp) -> str:
    arguments = _table(op)
    if op.key is not None:
        arguments.append(f"key={list(map(str, op.key))!r}")
    if op.ranges:
        arguments.append(f"ranges={list(map(str, op.ranges))!r}")
    if op.limit != MOST_KEYS:
        arguments.append(f"limit={op.limit!r}")
    # They are of one dialect: left to the catalog, the file can be run on others, too.
    if op.cascades is not None and context.opts.get("sa_tablecache_offline"):
        arguments.append(f"cascades={list(map(_plain, op.cascades))!r}")
    return _call(context, "watch_table", *arguments)


@renderers.dispatch_for(UnwatchTableOp)
def _render_unwatch_table(context: AutogenContext, op: UnwatchTableOp) -> str:
    return _call(context, "unwatch_table", *_table(op))


@renderers.dispatch_for(InvalidateTableOp)
def _render_invalidate_table(context: AutogenContext, op: InvalidateTableOp) -> str:
    return _call(context, "invalidate_table", *_table(op))
