"""What autogenerate runs: what the declared views need, compared with what the database has.

In: the context of autogenerate and the operations that it found so far. Out: further operations.

* A table of a view that is not watched, or is watched otherwise than is needed, or whose triggers
  are missing (a batch operation on SQLite drops them): it is watched.
* A table that is dropped, or altered so that its triggers would be lost or wrong: it is not watched
  meanwhile.
* A table that no view needs any more: workers of the release before may need it as long as they
  run. It is told of, and goes on being watched, unless ``sa_tablecache_cleanup`` is set.

Where nothing is to be done nothing is added, so that ``alembic check`` passes. What keeps changes
of a watched table from being seen, and what watching it again does not end, is a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

import msgspec
from alembic.autogenerate.api import AutogenContext
from alembic.operations import MigrateOperation, ops
from alembic.util import PriorityDispatchResult
from sqlalchemy.exc import NoReferenceError

from sa_tablecache.analysis import TableName, ViewPlan, plan_of, table_label, table_name
from sa_tablecache.exc import FeedUnavailable, TableCacheError
from sa_tablecache.feed.contract import VERSION, Installation, Relation, Watch
from sa_tablecache.feed.dialects import changelog_for
from sa_tablecache.feed.needs import Need, needs_of
from sa_tablecache.triggers import OURS
from sa_tablecache.usage import base_tables
from sa_tablecache.view import CachedView

from .indexes import compare_indexes
from .operations import MYSQL, CreateChangeFeedOp, UnwatchTableOp, WatchTableOp, name_of

log = logging.getLogger(__name__)

_KINDS: Final = frozenset(
    """
    schema table column index unique_constraint foreign_key_constraint check_constraint
    """.split()
)
"""What Alembic itself compares."""


def leave_out_own_tables(
    context: AutogenContext, _: Any, schemas: set[str | None]
) -> PriorityDispatchResult:
    """Keep autogenerate from looking at the changelog, which no metadata declares."""
    try:
        owned = changelog_for(context.dialect.name).owned()
    except FeedUnavailable:
        return PriorityDispatchResult.CONTINUE
    schemas -= {relation.schema for relation in owned if relation.schema}
    names = {relation.name for relation in owned if not relation.schema}

    def is_not_ours(name: str | None, kind: str, _: Any) -> bool:
        if kind == "table":
            return name not in names
        # Of other plugins: a function or a trigger, perhaps with the name of its schema.
        return kind in _KINDS or not (name or "").rpartition(".")[2].startswith(OURS)

    # There is no public way to add a filter to those of env.py.
    context._name_filters.append(is_not_ours)
    return PriorityDispatchResult.CONTINUE


def compare(context: AutogenContext, upgrade_ops: ops.UpgradeOps, _: Any) -> PriorityDispatchResult:
    """Add what is needed to the operations of a migration."""
    plans = [plan_of(view) for view in declared_views(context)]
    try:
        changelog_for(context.dialect.name)
    except FeedUnavailable as error:
        if plans:
            log.warning("%s", error)
        return PriorityDispatchResult.CONTINUE
    _Comparison(context, upgrade_ops, plans).run()
    if context.opts.get("sa_tablecache_indexes", True):
        compare_indexes(context, upgrade_ops, plans)
    return PriorityDispatchResult.CONTINUE


def declared_views(context: AutogenContext) -> list[type[CachedView]]:
    """Return the views that migrations are made for.

    Those that ``sa_tablecache_views`` names (a cache names its own), or else all that were
    imported and read a table of ``target_metadata``.
    """
    given = context.opts.get("sa_tablecache_views")
    if given is not None:
        return list(getattr(given, "views", given))
    targets = context.metadata if isinstance(context.metadata, Iterable) else [context.metadata]
    targets = list(targets)
    return [
        view
        for view in dict.fromkeys(_subclasses(CachedView))
        if any(
            table.metadata is target for table in base_tables(plan_of(view)) for target in targets
        )
    ]


def _subclasses(parent: type[CachedView]) -> Iterator[type[CachedView]]:
    for view in parent.__subclasses__():
        if not issubclass(view, msgspec.Struct):  # those are the classes of records
            if not view.__abstract__:
                yield view
            yield from _subclasses(view)


class _Comparison:
    """One run of autogenerate."""

    def __init__(
        self, context: AutogenContext, upgrade_ops: ops.UpgradeOps, plans: list[ViewPlan]
    ) -> None:
        assert context.connection is not None
        self.context = context
        self.connection = context.connection
        self.changelog = changelog_for(context.dialect.name)
        self.ops: list[MigrateOperation] = upgrade_ops.ops
        self.found = list(upgrade_ops.ops)
        """What the comparisons before found."""
        self.mentioned: dict[TableName, Relation | None] = {}
        """The relations that these are about."""
        self.cleanup = bool(context.opts.get("sa_tablecache_cleanup"))
        self.needs = needs_of(plans)
        tables = {table_name(table): table for table in context.sorted_tables}
        self.tables = {
            **{table_name(table): table for plan in plans for table in base_tables(plan)},
            **tables,
        }

    @cached_property
    def installed(self) -> Installation:
        """What the database has."""
        return self.changelog.installed(self.connection)

    @cached_property
    def outdated(self) -> Mapping[Relation, str]:
        """The tables that have to be watched again, and why."""
        return self.installed.outdated

    @cached_property
    def relations(self) -> dict[TableName, Relation]:
        """The relations of all tables that there are."""
        return dict(self.changelog.resolve(self.connection, self.tables))

    def run(self) -> None:
        if self.needs or self.installed.version is not None:
            if self._changelog():
                self._needed()
                self._others()

    def _changelog(self) -> bool:
        """Install the changelog or bring it up to date; return whether tables can be watched."""
        version = self.installed.version
        if version is None:
            self.ops.append(CreateChangeFeedOp())
        elif version > VERSION:
            log.warning(
                "the changelog of the database has version %s, and this sa_tablecache knows %s: "
                "nothing of it is compared; upgrade the package",
                version,
                VERSION,
            )
            return False
        elif version < VERSION - 1 or (version < VERSION and self.cleanup):
            self.ops.append(CreateChangeFeedOp(renewed=True))
        elif version < VERSION:
            self.outdated = {}
            log.info(
                "the changelog of the database has version %s, which workers of the release before "
                "read; when none is left, op.create_change_feed() (or sa_tablecache_cleanup) "
                "brings it up to version %s",
                version,
                VERSION,
            )
        return True

    def _needed(self) -> None:
        """Look at the tables of views."""
        needs: dict[Relation, tuple[TableName, Need]] = {}
        for name, need in self.needs.items():
            relation = self.relations.get(name)
            if not self._included(name):
                log.warning(
                    "%s is read by views, but include_name or include_object of env.py leave it "
                    "out: it has to be watched by other means",
                    table_label(name),
                )
            elif relation is None and self._creating(name):
                self.ops.append(
                    WatchTableOp(name[1], schema=name[0], key=need.key or None, ranges=need.ranges)
                )
            elif relation is None or self._is_view(name):
                log.warning(
                    "%s is read by views, and is no table of the database: watch those that it "
                    "is made of, if it is a view",
                    table_label(name),
                )
            else:
                # Models may call one table by two names, with its schema and without.
                first, before = needs.get(relation, (name, Need(())))
                needs[relation] = first, before.and_also(need)
        for relation, (name, need) in needs.items():
            have = self.installed.watched.get(relation)
            try:
                wanted = self._wanted(relation, need, have)
            except TableCacheError as error:  # of a kind that has no triggers
                log.warning("%s", error)
            else:
                self._watch(name, wanted, have)

    def _others(self) -> None:
        """Look at the tables that are watched and that no view needs."""
        called = {relation: name for name, relation in self.relations.items()}
        needed = {self.relations.get(name) for name in self.needs}
        for relation, have in self.installed.watched.items():
            if relation in needed:
                continue
            name = called.get(relation)
            if name is None:
                name = name_of(self.context.dialect, relation)
                gone = name not in self.changelog.resolve(self.connection, [name])
                if gone or self._dropped(relation):
                    self._unwatch(name, have)
            elif not self._included(name):
                continue
            elif self.cleanup:
                log.info("Detected watched table '%s' that no view needs", relation)
                self._unwatch(name, have)
            else:
                log.info(
                    "%s is watched, and no view needs it any more; when no worker of the release "
                    "before is left, op.unwatch_table() (or sa_tablecache_cleanup) ends that",
                    relation,
                )
                try:
                    wanted = self._wanted(relation, None, have)
                except TableCacheError as error:
                    log.warning("%s", error)
                else:
                    self._watch(name, wanted, have)

    # -- one table ------------------------------------------------------------------------------

    def _wanted(self, relation: Relation, need: Need | None, have: Watch | None) -> Watch:
        """Return how a table should be watched after the migration."""
        key: tuple[str, ...] = () if need is None else need.key
        ranges: tuple[str, ...] = () if need is None else need.ranges
        if need is not None and not key:
            key = self.changelog.propose(self.connection, relation).key
        if have is not None and not self.cleanup:
            # Workers of the release before may need what is logged now.
            key = have.key if set(have.key) >= set(key) else (*key, *have.key)
            ranges = (*have.ranges, *ranges)
        removed = self._removed(relation)
        key = tuple(column for column in dict.fromkeys(key) if column not in removed)
        ranges = tuple(column for column in dict.fromkeys(ranges) if column not in removed)
        if need is None and have is not None and (not key or relation not in self.outdated):
            return replace(have, key=key, ranges=ranges)
        # Columns that the migration adds are not there yet.
        added = self._added(relation)
        wanted = self.changelog.propose(
            self.connection,
            relation,
            [column for column in ranges if column not in added],
            [column for column in key if column not in added],
        )
        limit = wanted.limit if have is None else have.limit
        return replace(wanted, key=key, ranges=ranges, limit=limit)

    def _watch(self, name: TableName, wanted: Watch, have: Watch | None) -> None:
        """Watch a table so, unless it is watched so already."""
        before = None if have is None else WatchTableOp.of(*name, have)
        disturbing = None if have is None else self._disturbing(name, have)
        if disturbing is not None:
            unwatch = UnwatchTableOp(name[1], schema=name[0], previous=before)
            self.ops.insert(self.ops.index(disturbing), unwatch)
            self.ops.append(WatchTableOp.of(*name, wanted, ask=True))
            return
        why = self.outdated.get(wanted.relation)
        if have is None:
            log.info("Detected table '%s' that is not watched", wanted.relation)
        elif why is not None:
            log.info("Detected table '%s' whose watch is outdated: %s", wanted.relation, why)
        elif self._statements(have) != self._statements(wanted):
            log.info("Detected table '%s' that is watched otherwise", wanted.relation)
        else:
            if wanted.relation in self.installed.hindered:
                log.warning(
                    "%s is watched, and changes of it are not seen all the same, so that the "
                    "database answers for its views: %s",
                    wanted.relation,
                    self.installed.hindered[wanted.relation],
                )
            return
        added = self._added(wanted.relation)
        ask = not added.isdisjoint((*wanted.key, *wanted.ranges))
        self.ops.append(WatchTableOp.of(*name, wanted, previous=before, ask=ask))

    def _statements(self, watch: Watch) -> list[str]:
        """Return what makes a watch; in which order columns are logged does not matter."""
        key, ranges = tuple(sorted(watch.key)), tuple(sorted(watch.ranges))
        return list(self.changelog.watch(replace(watch, key=key, ranges=ranges)))

    def _unwatch(self, name: TableName, have: Watch) -> None:
        """No longer watch a table: first of all, for it may be dropped."""
        previous = WatchTableOp.of(*name, have)
        self.ops.insert(0, UnwatchTableOp(name[1], schema=name[0], previous=previous))

    def _included(self, name: TableName) -> bool:
        """Whether env.py leaves a table to autogenerate."""
        schema, table = name
        default = self.context.dialect.default_schema_name
        schema = None if schema == default else schema
        return (
            self.context.run_name_filters(schema, "schema", {})
            and self.context.run_name_filters(table, "table", {"schema_name": schema})
            and self.context.run_object_filters(self.tables[name], table, "table", False, None)
        )

    def _is_view(self, name: TableName) -> bool:
        """Whether what is called so is a view of the database."""
        schema, table = name
        inspector = self.context.inspector
        views = inspector.get_view_names(schema)
        if self.context.dialect.name == "postgresql":
            views += inspector.get_materialized_view_names(schema)
        return table in views

    # -- what else the migration does -----------------------------------------------------------

    def _about(self, op: Any) -> Relation | None:
        """Return the table that an operation is about, if there is one already."""
        name = (op.schema, op.table_name)
        if name not in self.mentioned:
            found = self.changelog.resolve(self.connection, [name])
            self.mentioned[name] = found.get(name)
        return self.mentioned[name]

    def _creating(self, name: TableName) -> bool:
        return any(
            isinstance(op, ops.CreateTableOp) and (op.schema, op.table_name) == name
            for op in self.found
        )

    def _dropped(self, relation: Relation) -> bool:
        return any(
            isinstance(op, ops.DropTableOp) and self._about(op) == relation for op in self.found
        )

    def _altering(self, *relations: Relation) -> Iterator[ops.ModifyTableOps]:
        for op in self.found:
            if isinstance(op, ops.ModifyTableOps) and self._about(op) in relations:
                yield op

    def _added(self, relation: Relation) -> set[str]:
        """Return the columns that the migration adds to a table."""
        changes = [change for op in self._altering(relation) for change in op.ops]
        return {str(c.column.name) for c in changes if isinstance(c, ops.AddColumnOp)}

    def _removed(self, relation: Relation) -> set[str]:
        """Return the columns of a table that the migration drops."""
        changes = [change for op in self._altering(relation) for change in op.ops]
        return {str(c.column_name) for c in changes if isinstance(c, ops.DropColumnOp)}

    def _disturbing(self, name: TableName, have: Watch) -> ops.ModifyTableOps | None:
        """Return the first operation after which the triggers of a table are gone, or wrong."""
        dialect = self.context.dialect.name
        recreates = dialect == "sqlite" and self.context.opts.get("render_as_batch")
        tables = [have.relation]
        if dialect in MYSQL:  # changes come by foreign keys, of which the triggers are made
            tables += [self.relations[n] for n in self._referred(name) if n in self.relations]
        for op in self._altering(*tables):
            for change in op.ops:
                if _matters(change, dialect, {*have.key, *have.ranges}) or (
                    recreates and not isinstance(change, _IN_PLACE)
                ):
                    return op
        return None

    def _referred(self, name: TableName) -> set[TableName]:
        """Return the tables to which foreign keys lead from a table, directly or not."""
        found: set[TableName] = set()
        todo = [name]
        while todo:
            for constraint in self.tables[todo.pop()].foreign_key_constraints:
                try:
                    parent = table_name(constraint.referred_table)
                except NoReferenceError:  # it is not declared
                    continue
                if parent in self.tables and parent not in found:
                    found.add(parent)
                    todo.append(parent)
        return found


_IN_PLACE: Final = (ops.AddColumnOp, ops.CreateIndexOp, ops.DropIndexOp)
"""What a batch operation on SQLite does without recreating the table."""


def _matters(change: MigrateOperation, dialect: str, used: set[str]) -> bool:
    """Whether a change of a table makes its triggers wrong."""
    match change:
        case ops.DropColumnOp():
            return change.column_name in used
        case ops.AlterColumnOp():
            return change.modify_type is not None and change.column_name in used
        case ops.CreateForeignKeyOp():
            return dialect in MYSQL
        case ops.DropConstraintOp():
            return dialect in (*MYSQL, "sqlite")
        case ops.CreateUniqueConstraintOp():
            return dialect == "sqlite"
        case ops.CreateIndexOp():  # rows may give way to others by it
            return dialect == "sqlite" and bool(change.unique)
        case ops.DropIndexOp():
            return dialect == "sqlite" and bool(change.kw.get("unique"))
    return False
