"""How the records of a view lie in memory, for one database.

In: a view's plan, and what the catalog says of its tables. Out: a :class:`Layout`: the sort orders
(those of the indexes, of the primary key, and those that lead from base rows to records), which
hidden values are kept, which tables can be followed exactly, and how intervals of an index are said
in SQL.

It is worked out once, when a view is first used with an engine, and never changes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any, TypeAlias

from sqlalchemy import Dialect
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import NullType

from .analysis import Leaf, TableName, ViewPlan, table_label
from .catalog import Catalog
from .changes import Concern, RangeMark
from .clauses import ScoreColumn, intervals_clause
from .comparison import Comparison, Inexact, is_sortable
from .coverage import Coverage
from .exc import ViewDefinitionError
from .groups import GroupPath
from .loading import Loader
from .orders import Hidden, Order, Part, Record
from .prepared import Columns
from .rows import Rows
from .scores import MAX, MIN, Cut, Extreme, Interval, IntervalSet
from .sorting import Pause, no_pause
from .storage import Storage
from .triggers import Automatic, acting
from .usage import placing_columns, score_columns, used_columns

log = logging.getLogger(__name__)

RowKey: TypeAlias = tuple[Any, ...]

LINEAGE = "lineage "
"""What the names of orders that only lead from base rows to records begin with."""


def _leading(cut: Cut, end: Extreme) -> Cut:
    """Return a cut that only looks at the leading score, so far out that it leaves none out."""
    return (cut[0], end) if len(cut) > 1 else cut


MOST_CLAUSES = 100
"""So many intervals of an index at most are said in one SELECT."""


def coarsened(intervals: IntervalSet) -> IntervalSet:
    """Return few intervals that contain all of many."""
    size = -(-len(intervals) // MOST_CLAUSES)
    if size <= 1:
        return intervals
    all_ = intervals.intervals
    groups = (all_[at : at + size] for at in range(0, len(all_), size))
    return IntervalSet(Interval(group[0].lower, group[-1].upper) for group in groups)


def log_coarse(plan: ViewPlan, table: TableName, why: str) -> None:
    """Tell that changes of a table cannot be followed to records."""
    log.info("view %s: any change of %s marks all of it (%s)", plan.name, table_label(table), why)


class Layout:
    """How the records of one view lie in memory, for one database."""

    def __init__(
        self,
        plan: ViewPlan,
        dialect: Dialect,
        catalog: Catalog,
        automatic: Mapping[TableName, Automatic],
    ) -> None:
        self.plan = plan
        self.automatic = automatic
        """What tables do by themselves when a row is written."""
        self.acting = acting(automatic)
        """The names of those that have triggers or rules."""
        self.coarse: dict[TableName, str] = dict(plan.coarse)
        """Tables of which any change marks the whole view, and why."""
        self._leaf_orders: dict[int, str] = {}
        self.group_orders: dict[tuple[str, ...], str] = {}
        """For columns that show groups, the order by which records are found from them."""
        self.path_of: dict[tuple[str, ...], GroupPath] = {}
        """For these columns, one of the paths that lead to them."""
        comparisons = {name: catalog.comparison(plan, name, dialect) for name in plan.by_name}
        if dialect.name in ("mysql", "mariadb"):
            # Where a row value has columns of an outer join, they make an inner join of it, as if
            # one NULL decided. It does not: (1, NULL) < (2, 0) is true.
            comparisons = {
                name: replace(how, alone=plan.column(name).nullable)
                for name, how in comparisons.items()
            }
        wanted, hidden = self._index_orders()
        hidden += self._lineage_orders(wanted, comparisons, catalog, dialect)
        hidden = list(dict.fromkeys(hidden))
        nulls_first = dialect.name != "postgresql"
        positions = {name: at for at, name in enumerate(hidden)}

        def part(name: str) -> Part:
            column = plan.column(name)
            return Part(
                name,
                column.nullable,
                positions.get(name),
                hashed=not is_sortable(column.clause.type),
                nan=comparisons[name].nan_is_greatest,
            )

        self.orders: dict[str, Order] = {
            name: Order(name, tuple(map(part, columns)), scores, nulls_first)
            for name, (columns, scores) in wanted.items()
        }
        self._lazy = {n: o for n, o in self.orders.items() if n.startswith(LINEAGE)}
        self.loader = Loader(plan, hidden, comparisons, dialect)
        self.tables: frozenset[TableName] = plan.tables | catalog.related.keys()
        """The tables of which a change concerns the view, partitions and the like included."""
        self.actions = catalog.actions
        self.at_once = catalog.at_once
        """Those of them that have no transactions."""
        self._stored = catalog.stored(plan)
        self._covered: tuple[Coverage, tuple[Comparison, ...], list[ColumnElement[bool]]] = (
            Coverage(), (), []
        )  # fmt: skip
        self.lookups: dict[str, tuple[list[ColumnElement[bool]], Any]] = {}
        """The last SELECT of records by values of a column, and the coverage that it reads."""
        self.columns = Columns(
            plan,
            comparisons,
            {n: o for n, o in self.orders.items() if not n.startswith(LINEAGE)},
            nulls_first,
        )
        for table in self.coarse.keys() - plan.coarse.keys():
            log_coarse(plan, table, self.coarse[table])

    def renew(self, catalog: Catalog, automatic: Mapping[TableName, Automatic]) -> None:
        """Take in what the catalog says after DDL: partitions and triggers come and go.

        :raises ViewDefinitionError: if columns of the view are stored otherwise.
        """
        if catalog.stored(self.plan) != self._stored:
            raise ViewDefinitionError(
                f"view {self.plan.name}: columns of its tables are stored otherwise than when it "
                "was first used; until the application is started again, the database answers"
            )
        self.tables = self.plan.tables | catalog.related.keys()
        self.actions = catalog.actions
        self.at_once = catalog.at_once
        self.automatic = automatic
        self.acting = acting(automatic)
        self.concerns = self._concerns(self.followed - catalog.unfollowed.keys())

    def _index_orders(self) -> tuple[dict[str, tuple[tuple[str, ...], int]], list[str]]:
        """Return the orders of the key and the indexes, and the hidden columns they need."""
        plan = self.plan
        hidden: list[str] = []
        wanted: dict[str, tuple[tuple[str, ...], int]] = {"": (plan.key, len(plan.key))}
        for index in plan.view.__indexes__.values():
            names = index.column_names
            for name in names:
                type_ = plan.column(name).clause.type
                if not is_sortable(type_):
                    raise ViewDefinitionError(
                        f"index {index!r} sorts by {name}, whose type {type_!r} "
                        + (
                            "is not known: say it with type_coerce(expression, Integer) or the like"
                            if isinstance(type_, NullType)
                            else "has no order in Python: sort by an expression of another type"
                        )
                    )
            wanted[index.name] = (names + plan.key_without(names), len(names))
            hidden += plan.hidden_among(names)
        return wanted, hidden

    def _order_by(
        self, names: tuple[str, ...], wanted: dict[str, tuple[tuple[str, ...], int]]
    ) -> str:
        """Return the order that begins with some columns, added if there is none."""
        for name, (columns, _) in wanted.items():
            if columns[: len(names)] == names:
                return name
        name = LINEAGE + " ".join(names)
        wanted[name] = (names + self.plan.key_without(names), len(names))
        return name

    def _lineage_orders(
        self,
        wanted: dict[str, tuple[tuple[str, ...], int]],
        comparisons: dict[str, Comparison],
        catalog: Catalog,
        dialect: Dialect,
    ) -> list[str]:
        """Add the orders that lead from base rows to records; an index may do as well."""
        plan = self.plan
        hidden: list[str] = []
        followed: set[TableName] = set()
        self.coarse |= {t: why for t, why in catalog.unfollowed.items() if t not in self.coarse}
        lost: set[TableName] = set(catalog.unfollowed)

        def usable(name: str) -> bool:
            return comparisons[name].equality and is_sortable(plan.column(name).clause.type)

        for leaf in plan.leaves:
            shown = leaf.visible if all(map(usable, leaf.visible or ())) else None
            names = (shown or leaf.hidden) if all(map(usable, leaf.hidden)) else ()
            if not names:
                lost.add(leaf.table)
                self.coarse.setdefault(leaf.table, "its primary key cannot be compared in Python")
                continue
            if leaf.table not in plan.coarse:
                followed.add(leaf.table)
            self._leaf_orders[leaf.number] = self._order_by(names, wanted)
            hidden += plan.hidden_among(names)
        paths: list[GroupPath] = []
        for whole in plan.paths:
            shown = tuple(
                s if usable(s) else n for n, s in zip(whole.names, whole.stored, strict=True)
            )
            path = replace(whole, stored=shown).only(
                [comparisons[name] if usable(name) else None for name in whole.names]
            )
            if not path.names:
                lost.add(path.table)
                self.coarse.setdefault(path.table, "its groups cannot be compared in Python")
                continue
            if path.table not in plan.coarse:
                followed.add(path.table)
            self.group_orders[path.names] = self._order_by(path.stored, wanted)
            hidden += plan.hidden_among(path.stored)
            self.path_of[path.names] = path
            paths.append(path)
        folded = [c for c in plan.compared_text if not catalog.tells_apart(c, dialect)]
        if folded:
            # What follows from "equal, so the same" does not follow: keys, anchors and lineage.
            followed.clear()
            for table in plan.tables:
                self.coarse.setdefault(table, f"joined by {folded[0]}, whose collation folds text")
        self.key_is_proven = plan.key_is_derived and not folded
        """Whether no two rows can share the primary key."""
        anchored = plan.anchor is not None and plan.anchor.number in self._leaf_orders
        if not anchored and not plan.grouped:
            followed.clear()
            for table in plan.tables:
                self.coarse.setdefault(table, "no row to anchor its changes on")
        self.paths = tuple(path for path in paths if path.table in followed - lost)
        """How changed rows lead to groups."""
        self.concerns = self._concerns(frozenset(followed - lost))
        """What the view has to do with each of its tables."""
        self.wanted: dict[str, frozenset[str]] = {}
        """For tables whose changed rows can be followed (their names, whatever the schema), the
        columns whose values lead to groups."""
        self.keys: dict[str, set[tuple[str, ...]]] = {}
        """For all base tables (their names, whatever the schema), the columns of their keys."""
        known = [(leaf.table, leaf.primary_key) for leaf in plan.leaves]
        known += [(path.table, path.primary_key) for path in self.paths]
        for (_, name), key in known:
            self.keys.setdefault(name, set()).add(tuple(column.name for column in key))
        for schema, name in self.followed:
            if self.automatic.get((schema, name), Automatic()).rules:
                continue  # a rule may have no RETURNING to give
            columns = {
                column.name for path in self.concerns[schema, name].paths for column in path.columns
            }
            self.wanted[name] = self.wanted.get(name, frozenset()) | columns
        return hidden

    def _concerns(self, followed: frozenset[TableName]) -> dict[TableName, Concern]:
        used, placing = used_columns(self.plan), placing_columns(self.plan)
        scores = score_columns(self.plan)
        none: frozenset[str] = frozenset()
        leaves = {leaf.table for leaf in self.plan.leaves}
        concerns = {}
        for table in self.plan.tables:
            paths = tuple(path for path in self.paths if path.table == table)
            concerns[table] = Concern(
                used.get(table, none),
                # Any column of a row may be in an aggregate of its group.
                (used if paths else placing).get(table, none),
                followed=table in followed,
                opaque=table in self.automatic,
                by_key=table in leaves or not all(path.follows_from_key for path in paths),
                paths=paths,
                scores=tuple((column.name, index) for column, index in scores.get(table, ())),
                interval=self._interval,
            )
        return concerns

    def _interval(self, index: str, lower: Any, upper: Any) -> Interval | None:
        """Return all keys of an index from one leading score to another, if Python knows them.

        :param lower: the smallest as the database sorts; with ``upper`` ``None``: NULL.
        """
        order = self.orders[index]
        part, how = order.parts[0], self.columns.comparisons[order.parts[0].name]
        if lower is None and upper is None:
            return order.prefix([None]) if part.nullable else None
        try:
            lower, upper = how.parameter(lower), how.parameter(upper)
        except Inexact:
            return None
        if part.hashed or not how.order or None in (lower, upper) or upper < lower:
            return None
        return Interval((lower, MIN), (upper, MAX))

    def is_outside(self, coverage: Coverage, mark: RangeMark) -> bool:
        """Whether none of the records that a mark may concern is, or could be, in storage."""
        if coverage.everything:
            return False
        lead = self.orders[mark.index].parts[0].name
        for index, covered in coverage.sets.items():
            same = index == mark.index
            if mark.leave or not (same or self.orders[index].parts[0].name == lead):
                return False  # what covers them may be elsewhere
            lower, upper = mark.interval
            if not same:
                lower, upper = _leading(lower, MIN), _leading(upper, MAX)
            if covered & IntervalSet([Interval(lower, upper)]):
                return False
        return True

    @property
    def followed(self) -> frozenset[TableName]:
        """Tables whose changed rows can be followed to records."""
        return frozenset(table for table, concern in self.concerns.items() if concern.followed)

    @property
    def no_hidden(self) -> list[Hidden] | None:
        """An empty list of hidden values, or ``None`` if the view keeps none."""
        return [] if self.loader.hidden else None

    def no_rows(self) -> Rows:
        """Return rows without records."""
        return Rows(hidden=self.no_hidden)

    def build(self, rows: Rows, pause: Pause = no_pause) -> Storage:
        """Sort rows into a storage of their own."""
        orders = self.columns.orders.values()
        return Storage.build(orders, self._lazy, rows.records, rows.hidden, pause)

    def empty(self) -> Storage:
        """Return a storage without records."""
        return self.build(self.no_rows())

    def is_covered(self, coverage: Coverage, record: Record, hidden: Hidden | None) -> bool:
        """Whether a record is covered by any index."""
        return coverage.everything or any(
            self.orders[name].key_of(record, hidden) in intervals
            for name, intervals in coverage.sets.items()
        )

    def may_reveal(self, coverage: Coverage, leaf: int) -> bool:
        """Whether a NULL-extended row may be covered where what it takes the place of is not.

        If so, nothing in storage leads to it from the row of the leaf that is gone.
        """
        if coverage.everything or leaf not in self.plan.extensions:
            return False
        stay, vanish = self.plan.extensions[leaf]
        for index, intervals in coverage.sets.items():
            order = self.orders[index]
            names = [part.name for part in order.parts]
            if stay.issuperset(names):
                continue
            if names[0] in vanish and not intervals & IntervalSet([order.prefix([None])]):
                continue
            return True
        return False

    def covered(self, rows: Rows, coverage: Coverage, pause: Pause = no_pause) -> Rows:
        """Return the rows that are covered."""
        if coverage.everything:
            return rows
        return rows.only(lambda record, hidden: self.is_covered(coverage, record, hidden), pause)

    # -- base rows -------------------------------------------------------------------------------

    def records_of(self, storage: Storage, leaf: Leaf, keys: Iterable[RowKey]) -> list[Record]:
        """Return the stored records made from certain rows of a leaf."""
        return storage.starting_with(self._leaf_orders[leaf.number], keys)

    def anchor_key(self, record: Record, hidden: Hidden | None) -> RowKey:
        """Return the primary key of the anchor's row that a record was made from."""
        anchor = self.plan.anchor
        assert anchor is not None
        order = self.orders[self.anchor_order]
        return order.key_of(record, hidden)[: len(anchor.primary_key)]

    @property
    def anchor_order(self) -> str:
        """The order by which the records of an anchor are found."""
        assert self.plan.anchor is not None
        return self._leaf_orders[self.plan.anchor.number]

    # -- intervals as SQL ------------------------------------------------------------------------

    def score_columns(self, index: str) -> tuple[ScoreColumn, ...]:
        """Return the columns of an index, with its tie-breaking key, as SQL."""
        order = self.orders[index]
        return tuple(
            ScoreColumn(self.plan.column(part.name).clause, part.nullable, order.nulls_first)
            for part in order.parts
        )

    def where(self, index: str, intervals: IntervalSet) -> list[ColumnElement[bool]]:
        """Return criteria for all rows of the intervals, and perhaps more (see :meth:`only`)."""
        if intervals.is_everything or not self.is_expressible(index, intervals):
            return []
        return [intervals_clause(self.score_columns(index), intervals)]

    def is_expressible(self, index: str, intervals: IntervalSet) -> bool:
        """Whether the database compares as Python does wherever the intervals have a bound."""
        parts = self.orders[index].parts
        how = self.columns.comparisons
        for lower, upper in intervals:
            at = 0
            while at < min(len(lower), len(upper)) - 1 and lower[at] == upper[at]:
                if not how[parts[at].name].equality:
                    return False
                at += 1
            for cut in (lower, upper):
                for part, value in zip(parts[at:], cut[at:-1], strict=False):
                    if not (how[part.name].order or isinstance(value, Extreme)):
                        return False
        return True

    def only(self, rows: Rows, index: str, intervals: IntervalSet, pause: Pause = no_pause) -> Rows:
        """Return the rows that really are in the intervals."""
        if intervals.is_everything or self.is_expressible(index, intervals):
            return rows
        key_of = self.orders[index].key_of
        return rows.only(lambda record, hidden: key_of(record, hidden) in intervals, pause)

    def coverage_clause(self, coverage: Coverage) -> list[ColumnElement[bool]]:
        """Return criteria for all that is covered, and perhaps more.

        They are the same list while nothing changes, for refreshes one after the other.
        """
        known = self.columns.comparisons
        how = tuple(known[part.name] for name in coverage.sets for part in self.orders[name].parts)
        last, compared, clauses = self._covered
        if last is not coverage or compared != how:
            clauses = self._coverage_clause(coverage)
            self._covered = coverage, how, clauses
        return clauses

    def _coverage_clause(self, coverage: Coverage) -> list[ColumnElement[bool]]:
        if coverage.everything:
            return []
        clauses = []
        for index, intervals in coverage.sets.items():
            where = self.where(index, coarsened(intervals))
            if not where:
                return []
            clauses += where
        result = clauses[0]
        for clause in clauses[1:]:
            result = result | clause
        return [result]

    def knows_zone(self, name: str) -> bool:
        """Whether a column has no aware datetimes, or their time zone was seen."""
        return self.columns.comparisons[name].normalise is None or name in self.loader.zones

    # -- records for readers ---------------------------------------------------------------------

    def given(self, records: list[Record]) -> list[Record]:
        """Return records as readers get them: mutable values are the reader's own."""
        mutable = self.loader.mutable
        if not mutable:
            return records
        make = self.plan.view.__record__
        names = [c.name for c in self.plan.columns]
        get = attrgetter(*names)
        single = len(names) == 1
        return [
            make(
                *(
                    copy.deepcopy(value) if name in mutable else value
                    for name, value in zip(names, (get(r),) if single else get(r), strict=True)
                )
            )
            for r in records
        ]
