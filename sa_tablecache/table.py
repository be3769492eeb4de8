"""One view's records in one cache: load, answer, mark, refresh.

The stages meet here. What readers see is one immutable :class:`State` (records and coverage
together), replaced as a whole; they take no lock. ``_current`` is that state while it is *clean*,
and ``None`` while anything is leased or marked, so that one attribute read decides whether the
cache may answer.

The protocol that keeps answers right, under any interleaving:

* Before a COMMIT, what it will mark is leased; after it, one critical section adds the marks and
  ends the lease. From the moment a change is visible in the database until it is in the records,
  the table is therefore not clean, and readers refresh or ask the database.
* Marks carry sequence numbers. A load or refresh notes the sequence (its token) *before* it opens
  its snapshot, so that the snapshot contains every change marked up to the token, and clears no
  mark that is newer.
* When it is applied, every mark newer than its token is pending (again), whatever happened
  meanwhile, with a number newer than that of any refresh under way: what it read may lack that
  change. Records that are touched by a pending mark are found by their lineage as stored *and* by
  what the database joins now, so that refreshing a mark mends whatever an older snapshot brought.
* One refresh runs at a time; readers that need one wait for it, and go on by themselves if it
  fails. A load runs beside refreshes. One that fails or is cancelled leaves no trace.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import attrgetter
from threading import Lock
from typing import Any, NamedTuple, TypeAlias, cast

from sqlalchemy import Connection, func, select, tuple_
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.elements import BindParameter

from .analysis import Leaf, TableName, ViewPlan, table_label
from .changes import ChangeSet, Marks, RowKey, marks_of
from .comparison import Inexact, is_sortable
from .coverage import Coverage
from .criteria import columns_of
from .events import tick
from .exc import DuplicateKey, NotExpressible, ViewDefinitionError
from .loading import (
    Catalog,
    Loader,
    Progress,
    Rows,
    ScoreColumn,
    Snapshots,
    intervals_clause,
    probe,
)
from .planner import Candidate, Columns, Question, Shape, ask
from .scores import EVERYTHING, Extreme, IntervalSet
from .storage import Hidden, Order, Part, Record, Storage
from .turns import Turn, new_future, wait_for

log = logging.getLogger(__name__)

Mark: TypeAlias = tuple[TableName, RowKey] | None
"""A base row whose records may be stale; ``None`` marks the whole view."""

BATCH = 5_000
"""Keys in one delta query."""

SAMPLE = 1_000
"""Rows that an estimate looks at."""

MOST_ANCHORS = 20_000
"""More touched anchors than this are refreshed by reading the whole coverage again."""


class State(NamedTuple):
    """What readers see: records and what is known to be among them."""

    storage: Storage
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a load would cost: rows, bytes of memory, seconds."""

    rows: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of one view. Times are in seconds, sizes in bytes."""

    records: int
    coverage: str
    hits: int
    partial_hits: int
    misses: int
    bypasses: int
    loads: int
    refreshes: int
    records_loaded: int
    records_expired: int
    pending_marks: int
    oldest_mark: float
    leases: int
    coarse: dict[str, str] = field(default_factory=dict)


class CachedTable:
    """The records of one view, and everything that happens to them.

    :param plan: the view's plan.
    :param snapshots: where to read from.
    """

    def __init__(self, plan: ViewPlan, snapshots: Snapshots) -> None:
        self.plan = plan
        self.view = plan.view
        self._snapshots = snapshots
        self._in_task = bool(snapshots.engine.dialect.is_async)
        self._lock = Lock()
        self._loading = Turn(in_task=self._in_task)
        self._refreshing = Turn(in_task=self._in_task)
        self._ready: Future[Any] = new_future()
        self._setting_up = Turn(in_task=self._in_task)
        self.columns: Columns | None = None
        """What the database says of the columns; ``None`` until it was asked."""
        self.loader: Loader
        self.followed: frozenset[TableName] = frozenset()
        """Tables whose changed rows can be followed to records."""
        self._leaf_orders: dict[int, str] = {}
        self.coarse: dict[TableName, str] = dict(plan.coarse)

        self._state = State(Storage({}), Coverage())
        self._current: State | None = self._state
        self.changed_at = 0
        """When records, marks or leases changed last, as an :func:`.events.tick`."""
        self._sequence = 0
        self._pending: dict[Mark, int] = {}
        self._oldest: float | None = None
        self._leases = 0
        self._log: list[tuple[int, Mark]] = []
        """Marks made while loads or refreshes are under way, for when they are applied."""
        self._underway: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()

    # -- setting up -----------------------------------------------------------------------------

    def set_up(self) -> Columns:
        """Ask the database, once, what it stores; see :func:`.loading.probe`."""
        if self.columns is None:
            with self._setting_up:
                if self.columns is None:
                    with self._snapshots.open() as connection:
                        catalog = probe(connection, self.plan)
                    self._set_up(catalog)
        assert self.columns is not None
        return self.columns

    def _set_up(self, catalog: Catalog) -> None:
        plan, dialect = self.plan, self._snapshots.engine.dialect
        comparisons = {
            name: catalog.comparison(plan, name, dialect) for name in plan.by_name
        }
        nulls_first = dialect.name != "postgresql"
        hidden: list[str] = []
        wanted: dict[str, tuple[tuple[str, ...], int]] = {"": (plan.key, len(plan.key))}
        for index in plan.view.__indexes__.values():
            names = index.column_names
            for name in names:
                if not is_sortable(plan.column(name).clause.type):
                    raise ViewDefinitionError(
                        f"index {index!r} sorts by {name}, whose type "
                        f"{plan.column(name).clause.type!r} has no order in Python; sort by an "
                        "expression of another type"
                    )
            rest = tuple(name for name in plan.key if name not in names)
            wanted[index.name] = (names + rest, len(names))
            hidden += [n for n in names if n in {h.name for h in plan.hidden}]
        followed: set[TableName] = set()
        lost: set[TableName] = set()
        for leaf in plan.leaves:
            names = self._leaf_columns(leaf, comparisons)
            if not names:
                lost.add(leaf.table)
                self.coarse.setdefault(
                    leaf.table, "its primary key cannot be compared in Python"
                )
                continue
            if leaf.table not in plan.coarse:
                followed.add(leaf.table)
            for name, (columns, _) in wanted.items():
                if columns[: len(names)] == names:
                    self._leaf_orders[leaf.number] = name
                    break
            else:
                rest = tuple(name for name in plan.key if name not in names)
                wanted[f"leaf {leaf.number}"] = (names + rest, len(names))
                self._leaf_orders[leaf.number] = f"leaf {leaf.number}"
                hidden += [n for n in names if n in {h.name for h in plan.hidden}]
        anchor = plan.anchor
        if anchor is None or anchor.number not in self._leaf_orders:
            followed.clear()
            for table in plan.tables:
                self.coarse.setdefault(table, "no row to anchor its changes on")
        self.followed = frozenset(followed - lost)
        hidden = list(dict.fromkeys(hidden))
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

        orders = {
            name: Order(name, tuple(map(part, columns)), scores, nulls_first)
            for name, (columns, scores) in wanted.items()
        }
        self.orders = orders
        self.loader = Loader(plan, hidden, comparisons)
        self._anchor_order = (
            None if anchor is None else orders.get(self._leaf_orders.get(anchor.number, "?"))
        )
        self.columns = Columns(
            plan,
            comparisons,
            {n: o for n, o in orders.items() if not n.startswith("leaf ")},
            nulls_first,
        )
        with self._lock:
            self._set_state(State(Storage.build(orders.values(), [], self._no_hidden()), Coverage()))
        for table, why in self.coarse.items():
            log.info("view %s: any change of %s marks all of it (%s)", plan.name,
                     table_label(table), why)  # fmt: skip

    def _no_hidden(self) -> list[Hidden] | None:
        return [] if self.loader.hidden else None

    def _leaf_columns(self, leaf: Leaf, comparisons: dict[str, Any]) -> tuple[str, ...]:
        """Return the columns by which records are found from a row of a leaf; empty if none do."""

        def usable(names: Sequence[str]) -> bool:
            return all(comparisons[n].equality and is_sortable(self.plan.column(n).clause.type)
                       for n in names)  # fmt: skip

        if not usable(leaf.hidden):
            return ()
        if leaf.visible is not None and usable(leaf.visible):
            return leaf.visible
        return leaf.hidden

    # -- state ----------------------------------------------------------------------------------

    def _set_state(self, state: State) -> None:
        """Publish what readers see; only under the lock."""
        self._state = state
        self.changed_at = tick()
        clean = not self._leases and not self._pending
        self._current = state if clean else None
        if not self._pending:
            self._oldest = None

    @property
    def current(self) -> State | None:
        """What readers may be answered from; ``None`` while anything is leased or marked."""
        return self._current

    @property
    def state(self) -> State:
        """Records and coverage, fresh or not."""
        return self._state

    @property
    def leased(self) -> bool:
        """Whether a commit that touches the view is under way."""
        return self._leases > 0

    def lease(self, changes: ChangeSet) -> bool:
        """Have readers ask the database until :meth:`publish`; say whether it concerns this view."""
        if not changes.touches(self.plan.tables):
            return False
        with self._lock:
            self._leases += 1
            self._set_state(self._state)
        return True

    def publish(self, changes: ChangeSet, *, leased: bool) -> None:
        """Mark what changed and end the lease, in one critical section."""
        marks = marks_of(self.plan, changes, self.followed)
        if not marks and not leased:
            return
        with self._lock:
            self._mark(marks)
            if leased:
                self._leases -= 1
            self._set_state(self._state)

    def mark(self, marks: Marks) -> None:
        """Mark records as possibly stale."""
        with self._lock:
            self._mark(marks)
            self._set_state(self._state)

    def _mark(self, marks: Marks) -> None:
        if marks and self._oldest is None:
            self._oldest = time.monotonic()
        for mark in [None] if marks.view else marks.rows:
            self._sequence += 1
            self._pending[mark] = self._sequence
            if self._underway:
                self._log.append((self._sequence, mark))
        if not self._state.coverage and not self._underway:
            self._pending.clear()  # nothing is stored that could be stale

    def _begin(self) -> int:
        with self._lock:
            token = self._sequence
            self._underway[token] += 1
            return token

    def _end(self, token: int) -> None:
        with self._lock:
            self._underway[token] -= 1
            if not self._underway[token]:
                del self._underway[token]
            oldest = min(self._underway, default=self._sequence)
            self._log = [entry for entry in self._log if entry[0] > oldest]
            if not self._state.coverage and not self._underway and self._pending:
                self._pending.clear()
                self._set_state(self._state)

    def _apply(self, token: int, state: State, cleared: dict[Mark, int]) -> None:
        """Publish what a load or refresh made; only under the lock."""
        for mark, sequence in cleared.items():
            if self._pending.get(mark) == sequence:
                del self._pending[mark]
        for mark in {mark for sequence, mark in self._log if sequence > token}:
            self._sequence += 1
            self._pending[mark] = self._sequence
            # Those that began meanwhile must find it again when they are applied.
            self._log.append((self._sequence, mark))
        if self._pending and self._oldest is None:
            self._oldest = time.monotonic()
        self._set_state(state)

    # -- loading --------------------------------------------------------------------------------

    def interval_target(
        self, conditions: Sequence[ColumnElement[bool]], shape: Shape | None,
        parameters: Sequence[BindParameter[Any]],
    ) -> tuple[str, IntervalSet]:
        """Return the index and the intervals that criteria of a load say.

        :raises NotExpressible: if no index can express all of them.
        """
        columns = self.set_up()
        if not conditions or shape is None:
            return "", EVERYTHING
        try:
            question = ask(shape, parameters, columns)
        except Inexact as reason:
            raise NotExpressible(
                f"view {self.plan.name}: the criteria cannot be a range of scores ({reason})"
            ) from None
        for candidate in question.candidates:
            if not candidate.residual:
                return candidate.index, candidate.intervals
        needed = sorted({c for node in shape.conjuncts for c in columns_of(node)})
        suggestion = ", ".join(f'"{name}"' for name in needed)
        raise NotExpressible(
            f"view {self.plan.name}: no index can express these criteria as a range of scores; "
            f"ScoreIndex({suggestion}) would, with its columns in the order in which they are "
            "fixed to single values; the last may be a range"
        )

    def refuse_criteria(self, reason: str) -> None:
        """Refuse criteria that are no ranges at all.

        :raises NotExpressible: always.
        """
        raise NotExpressible(
            f"view {self.plan.name}: the criteria cannot be a range of scores ({reason})"
        )

    def estimate(self, index: str, intervals: IntervalSet) -> Estimate:
        """Estimate the rows, bytes and seconds of a load, from a count and a sample."""
        self.set_up()
        where = self._where(index, intervals)
        table = self.view.__table__
        with self._snapshots.open() as connection:
            total = connection.scalar(select(func.count()).select_from(table).where(*where)) or 0
            started = time.perf_counter()
            sample = connection.execute(self.loader.statement(*where).limit(SAMPLE)).all()
            elapsed = time.perf_counter() - started
        if not sample:
            return Estimate(total, 0, 0.0)
        seen: set[tuple[int, Any]] = set()
        size = 0
        for row in sample:
            # A record is a header and a pointer for each field; equal values are shared.
            size += 16 + 8 * len(self.plan.columns) + 8 * len(self.orders)
            for at, value in enumerate(row):
                try:
                    known = (at, value) in seen
                    seen.add((at, value))
                except TypeError:
                    known = False
                if not known:
                    size += sys.getsizeof(value)
        return Estimate(
            total, size * total // len(sample), max(elapsed, 1e-9) * total / len(sample)
        )

    def load(
        self, index: str, target: IntervalSet, *, extend: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Make the coverage the target (or, with ``extend``, include it): one SELECT at most.

        Only the difference is fetched and expired. A load that fails leaves everything as it was.
        """
        self.set_up()
        started = time.monotonic()
        with self._loading:
            token = self._begin()
            try:
                before = self._state
                missing = before.coverage.missing(index, target)
                rows = Rows(hidden=self._no_hidden())
                if missing:
                    with self._snapshots.open() as connection:
                        rows = self.loader.read(
                            connection, self._where(index, missing), stream=True, progress=progress
                        )
                    rows = self._only(rows, index, missing)
                expired = 0
                while True:
                    state = self._state
                    coverage = (
                        state.coverage.plus(index, target) if extend else Coverage({index: target})
                    )
                    storage, expired = self._moved(state, rows, index, target, extend=extend)
                    with self._lock:
                        if self._state is state:
                            self._apply(token, State(storage, coverage), {})
                            if not self._ready.done():
                                self._ready.set_result(None)
                            break
            finally:
                self._end(token)
            self.counts["loads"] += 1
            self.counts["records_loaded"] += len(rows.records)
            self.counts["records_expired"] += expired
            log.info(
                "view %s: loaded %d and expired %d records in %.3f s", self.plan.name,
                len(rows.records), expired, time.monotonic() - started,
            )  # fmt: skip

    def _moved(
        self, state: State, rows: Rows, index: str, target: IntervalSet, *, extend: bool
    ) -> tuple[Storage, int]:
        """Return the storage with loaded rows, without what is no longer covered."""
        storage = state.storage
        outside: list[Record] = []
        if not extend:
            for interval in ~target:
                outside += storage.orders[index].between(interval)
        if len(outside) == len(storage):
            storage = Storage.build(self.orders.values(), rows.records, rows.hidden)
            self._check_unique(storage)
            return storage, len(outside)
        removed = storage.with_hidden(outside)
        gone = {id(record) for record in outside}
        added = rows.pairs()
        if len(storage) > len(outside):
            key_of = self.plan.key_tuple
            for record, _ in added:
                # What another index had covered is there already.
                old = storage.get(key_of(record))
                if old is not None and id(old[0]) not in gone:
                    removed.append(old)
                    gone.add(id(old[0]))
        storage = storage.replace(removed, added)
        self._check_unique(storage)
        return storage, len(outside)

    def _check_unique(self, storage: Storage) -> None:
        """Refuse rows that share a primary key, where the user said what the key is."""
        if self.plan.key_is_derived:
            return
        primary = storage.orders[""]
        key_of = self.plan.key_of
        previous: Any = object()
        for record in primary:
            key = key_of(record)
            if key == previous:
                raise DuplicateKey(
                    f"view {self.plan.name}: two rows have {', '.join(self.plan.key)} = {key!r}, "
                    "so that is no key; correct __primary_key__"
                )
            previous = key

    def evict(self, index: str, intervals: IntervalSet) -> None:
        """Give up records; those that the coverage of another index needs stay."""
        self.set_up()
        with self._loading:
            token = self._begin()
            try:
                while True:
                    state = self._state
                    coverage = state.coverage.minus(index, intervals)
                    gone = [
                        (record, hidden)
                        for record, hidden in state.storage.pairs()
                        if not self._is_covered(coverage, record, hidden)
                    ]
                    storage = state.storage.replace(gone, [])
                    with self._lock:
                        if self._state is state:
                            self._apply(token, State(storage, coverage), {})
                            break
            finally:
                self._end(token)
            self.counts["records_expired"] += len(gone)

    def clear(self) -> None:
        """Give up all records."""
        if self.columns is None:
            return
        with self._loading, self._lock:
            empty = Storage.build(self.orders.values(), [], self._no_hidden())
            if not self._underway:
                self._pending.clear()
            self._set_state(State(empty, Coverage()))
            if self._ready.done():
                self._ready = new_future()

    def wait_ready(self, timeout: float | None) -> bool:
        """Wait for the first load to end."""
        return wait_for(self._ready, timeout, in_task=self._in_task)

    @property
    def ready(self) -> bool:
        """Whether a load has ended since the start, or since :meth:`clear`."""
        return self._ready.done()

    def _is_covered(self, coverage: Coverage, record: Record, hidden: Hidden | None) -> bool:
        return coverage.everything or any(
            self.orders[name].key_of(record, hidden) in intervals
            for name, intervals in coverage.sets.items()
        )

    def score_columns(self, index: str) -> tuple[ScoreColumn, ...]:
        """Return the columns of an index, with its tie-breaking key, as SQL."""
        order = self.orders[index]
        return tuple(
            ScoreColumn(self.plan.column(part.name).clause, part.nullable, order.nulls_first)
            for part in order.parts
        )

    def _where(self, index: str, intervals: IntervalSet) -> list[ColumnElement[bool]]:
        """Return criteria for all rows of the intervals, and perhaps more (see :meth:`_only`)."""
        if intervals.is_everything or not self._is_expressible(index, intervals):
            return []
        return [intervals_clause(self.score_columns(index), intervals)]

    def _is_expressible(self, index: str, intervals: IntervalSet) -> bool:
        """Whether the database compares as Python does wherever the intervals have a bound."""
        assert self.columns is not None
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

    def _only(self, rows: Rows, index: str, intervals: IntervalSet) -> Rows:
        """Return the rows that really are in the intervals."""
        if intervals.is_everything or self._is_expressible(index, intervals):
            return rows
        key_of = self.orders[index].key_of
        pairs = [(r, h) for r, h in rows.pairs() if key_of(r, h) in intervals]
        return Rows(
            [r for r, _ in pairs],
            None if rows.hidden is None else [cast("Hidden", h) for _, h in pairs],
        )

    def _coverage_clause(self, coverage: Coverage) -> list[ColumnElement[bool]]:
        """Return criteria for all that is covered, and perhaps more."""
        if coverage.everything:
            return []
        clauses = []
        for index, intervals in coverage.sets.items():
            where = self._where(index, intervals)
            if not where:
                return []
            clauses += where
        result = clauses[0]
        for clause in clauses[1:]:
            result = result | clause
        return [result]

    # -- refreshing -----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read again what is marked, unless somebody just did: see the module's docstring.

        It emits one SELECT for each base table that has marks, and one for the touched anchors
        that those did not return; or one SELECT of all that is covered if the view is marked.
        """
        if not self._pending:
            return
        with self._refreshing:
            if self._pending:
                self._refresh()

    def _refresh(self) -> None:
        started = time.monotonic()
        token = self._begin()
        try:
            with self._lock:
                marks = dict(self._pending)
                state = self._state
            if not state.coverage:
                read = Rows(hidden=self._no_hidden())
                anchors: set[RowKey] | None = None
            else:
                with self._snapshots.open() as connection:
                    self._pause("snapshot")
                    if None in marks:
                        anchors, read = None, self._read_coverage(connection, state)
                    else:
                        anchors, read = self._read_touched(
                            connection, state, cast("Iterable[tuple[TableName, RowKey]]", marks)
                        )
                self._pause("read")
            while True:
                state = self._state
                pairs = [
                    (record, hidden)
                    for record, hidden in read.pairs()
                    if self._is_covered(state.coverage, record, hidden)
                ]
                storage = self._refreshed(state.storage, anchors, pairs)
                with self._lock:
                    if self._state.storage is state.storage and (
                        self._state.coverage is state.coverage
                    ):
                        self._apply(token, State(storage, state.coverage), marks)
                        break
        finally:
            self._end(token)
        self.counts["refreshes"] += 1
        log.debug(
            "view %s: refreshed %d marks, %d records in %.3f s", self.plan.name, len(marks),
            len(read.records), time.monotonic() - started,
        )  # fmt: skip

    def _pause(self, point: str) -> None:
        """Do nothing; tests stop a refresh here."""

    def _refreshed(
        self,
        storage: Storage,
        anchors: set[RowKey] | None,
        pairs: list[tuple[Record, Hidden | None]],
    ) -> Storage:
        """Return the storage with all records of some anchors (or all) replaced."""
        if anchors is None:
            result = Storage.build(
                self.orders.values(),
                [record for record, _ in pairs],
                None if self._no_hidden() is None else [cast("Hidden", h) for _, h in pairs],
            )
            self._check_unique(result)
            return result
        removed = storage.with_hidden(self._records_of(storage, self.plan.anchor, anchors))
        result = storage.replace(removed, pairs)
        if not self.plan.key_is_derived:
            for record, hidden in pairs:
                interval = self.orders[""].prefix(self.orders[""].key_of(record, hidden))
                if result.orders[""].count(interval) > 1:
                    self._check_unique(result)
        return result

    def _records_of(
        self, storage: Storage, leaf: Leaf | None, keys: Iterable[RowKey]
    ) -> list[Record]:
        """Return the stored records made from certain rows of a leaf."""
        assert leaf is not None
        order = storage.orders[self._leaf_orders[leaf.number]]
        found: list[Record] = []
        for key in keys:
            found += order.between(order.order.prefix(key))
        return found

    def _anchor_key(self, record: Record, hidden: Hidden | None) -> RowKey:
        assert self._anchor_order is not None and self.plan.anchor is not None
        length = len(self.plan.anchor.primary_key)
        return self._anchor_order.key_of(record, hidden)[:length]

    def _read_coverage(self, connection: Connection, state: State) -> Rows:
        return self.loader.read(
            connection, self._coverage_clause(state.coverage), stream=True
        )

    def _read_touched(
        self,
        connection: Connection,
        state: State,
        marks: Iterable[tuple[TableName, RowKey]],
    ) -> tuple[set[RowKey] | None, Rows]:
        """Read the records that changed rows touch, now or as they are stored."""
        anchor = self.plan.anchor
        assert anchor is not None
        keys: dict[TableName, set[RowKey]] = {}
        for table, key in marks:
            keys.setdefault(table, set()).add(key)
        covered = self._coverage_clause(state.coverage)
        touched: set[RowKey] = set()
        complete: dict[RowKey, tuple[Record, Hidden | None]] = {}
        for leaf in self.plan.leaves:
            wanted = keys.get(leaf.table)
            if wanted is None:
                continue
            if leaf is anchor:
                touched |= wanted
                continue
            stored = state.storage.with_hidden(
                self._records_of(state.storage, leaf, wanted)
            )
            touched.update(self._anchor_key(record, hidden) for record, hidden in stored)
            for record, hidden in self._delta(connection, leaf, wanted, covered).pairs():
                key = self._anchor_key(record, hidden)
                touched.add(key)
                if self.plan.one_row_per_anchor:
                    complete[key] = record, hidden
            if len(touched) > MOST_ANCHORS + len(complete):
                return None, self._read_coverage(connection, state)
        rows = Rows(hidden=self._no_hidden())
        rest = touched - complete.keys()
        if len(rest) > MOST_ANCHORS:
            return None, self._read_coverage(connection, state)
        if rest:
            rows = self._delta(connection, anchor, rest, covered)
        for record, hidden in complete.values():
            rows.records.append(record)
            if rows.hidden is not None:
                rows.hidden.append(cast("Hidden", hidden))
        return touched, rows

    def _delta(
        self,
        connection: Connection,
        leaf: Leaf,
        keys: set[RowKey],
        covered: list[ColumnElement[bool]],
    ) -> Rows:
        """Read the covered records that certain rows of one leaf are part of now."""
        columns = [self.plan.column(name).clause for name in leaf.hidden]
        ordered = sorted(keys, key=repr)
        rows = Rows(hidden=self._no_hidden())
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            criterion = (
                columns[0].in_([key[0] for key in batch])
                if len(columns) == 1
                else tuple_(*columns).in_(batch)
            )
            more = self.loader.read(connection, [criterion, *covered])
            rows.records += more.records
            if rows.hidden is not None:
                rows.hidden += more.hidden or []
        return rows

    # -- answering ------------------------------------------------------------------------------

    def covered_candidate(self, question: Question, state: State) -> Candidate | None:
        """Return the index with the fewest records in range, of those that are covered."""
        best: Candidate | None = None
        fewest = 0
        for candidate in question.candidates:
            if state.coverage.covers(candidate.index, candidate.intervals):
                order = state.storage.orders[candidate.index]
                size = sum(map(order.count, candidate.intervals))
                if best is None or size < fewest:
                    best, fewest = candidate, size
        return best

    def partial_candidate(
        self, question: Question, state: State
    ) -> tuple[Candidate, IntervalSet] | None:
        """Return the index of which storage holds most of the answer, and what is missing."""
        best: tuple[Candidate, IntervalSet] | None = None
        most = 0
        for candidate in question.candidates:
            missing = state.coverage.missing(candidate.index, candidate.intervals)
            present = candidate.intervals - missing
            if not present or not self._is_expressible(candidate.index, missing):
                continue
            order = state.storage.orders[candidate.index]
            size = sum(map(order.count, present))
            if size > most:
                best, most = (candidate, missing), size
        return best

    def records_in(
        self, state: State, index: str, intervals: Iterable[Any], *, descending: bool = False
    ) -> list[Record]:
        """Return the stored records of intervals of an index, in its order."""
        order = state.storage.orders[index]
        result: list[Record] = []
        for interval in intervals:
            part = order.between(interval)
            result = part if not result else result + part
        if descending:
            result.reverse()
        return result

    def given(self, records: list[Record]) -> list[Record]:
        """Return records as readers get them: mutable values are the reader's own."""
        mutable = self.loader.mutable
        if not mutable:
            return records
        make = self.view.__record__
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

    # -- figures --------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return the figures of the view."""
        with self._lock:
            state = self._state
            oldest = self._oldest
            pending, leases = len(self._pending), self._leases
        return Stats(
            records=len(state.storage) if self.columns is not None else 0,
            coverage=repr(state.coverage),
            hits=self.counts["hit"],
            partial_hits=self.counts["partial"],
            misses=self.counts["miss"],
            bypasses=self.counts["bypass"],
            loads=self.counts["loads"],
            refreshes=self.counts["refreshes"],
            records_loaded=self.counts["records_loaded"],
            records_expired=self.counts["records_expired"],
            pending_marks=pending,
            oldest_mark=0.0 if oldest is None else time.monotonic() - oldest,
            leases=leases,
            coarse={table_label(table): why for table, why in self.coarse.items()},
        )

    def _check(self) -> None:
        """Assert the invariants of records, coverage and marks."""
        with self._lock:
            state = self._state
            assert (self._current is state) == (not self._leases and not self._pending)
            assert self._leases >= 0
            assert all(s <= self._sequence for s in self._pending.values())
            assert self._underway or not self._log
        if self.columns is None:
            return
        state.coverage._check()
        state.storage._check()
        for record, hidden in state.storage.pairs():
            assert self._is_covered(state.coverage, record, hidden), record

