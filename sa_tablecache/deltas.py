"""Which records a set of changed rows touches: the delta queries.

In: marks, and the storage as it is. Out: which records have to be replaced, as values that their
keys start with in some order, and what takes their place in one snapshot.

A changed row touches the stored records with it in their lineage, and the records that the database
joins it into now. For each base table with marks one SELECT finds the latter; another reads the
anchors that it did not return whole: those that the changed row has left, for instance.

Where rows are grouped, a changed row touches the groups with the values that it had, which its
marks say, and those that it has now, which one SELECT of its table says. The records of a view that
groups are read by these values, with one SELECT; those of a view that joins a subquery which groups
are followed to their anchors from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    Connection,
    Integer,
    String,
    Uuid,
    and_,
    bindparam,
    literal,
    or_,
    select,
    tuple_,
)
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.operators import in_op

from .analysis import TableName
from .changes import AnyMark, GroupMark, Mark, RangeMark
from .coverage import Coverage
from .groups import GroupPath
from .layout import Layout, RowKey
from .orders import Hidden, Record
from .rows import Rows
from .scores import IntervalSet
from .storage import Storage

KEYS = "sa_tablecache_keys"
"""The parameter of a delta query that is made once."""

BATCH = 5_000
"""Keys in one delta query."""

MOST_ANCHORS = 20_000
"""More touched anchors than this are refreshed by reading the whole coverage again."""


def read_coverage(layout: Layout, connection: Connection, coverage: Coverage) -> Rows:
    """Read all that is covered: one SELECT."""
    return layout.loader.read(connection, layout.coverage_clause(coverage), stream=True)


class Touched(NamedTuple):
    """Which records are to be replaced."""

    keys: dict[str, set[RowKey]]
    """For some orders, what the keys of touched records start with."""
    ranges: dict[str, IntervalSet]
    """For some indexes, where they are."""


class Delta(NamedTuple):
    """What a refresh has read."""

    touched: Touched | None
    """Which records to replace; ``None`` for all of them."""
    rows: Rows
    """What they are now."""


def read_touched(
    layout: Layout,
    connection: Connection,
    storage: Storage,
    coverage: Coverage,
    marks: Iterable[AnyMark],
    *,
    reread: bool = True,
) -> Delta:
    """Read the records that changed rows touch, now or as they are stored.

    :param reread: whether to read all that is covered where that cannot be said.
    """
    keys: dict[TableName, set[RowKey]] = {}
    groups: dict[tuple[str, ...], set[RowKey]] = {}
    ranges: list[RangeMark] = []
    for mark in marks:
        match mark:
            case Mark():
                keys.setdefault(mark.table, set()).add(mark.key)
            case GroupMark():
                groups.setdefault(mark.names, set()).add(mark.values)
            case RangeMark():
                ranges.append(mark)
    known = True
    for path in layout.paths:
        if path.table in keys and not path.follows_from_key:
            now = _groups_of(connection, path, keys[path.table])
            known = known and now is not None
            groups.setdefault(path.names, set()).update(now or ())
    if known and sum(map(len, groups.values())) <= BATCH:
        covered = layout.coverage_clause(coverage)
        touched, rows = (
            _read_groups(layout, connection, groups, covered)
            if layout.plan.grouped
            else _read_anchors(layout, connection, storage, coverage, covered, keys, groups, ranges)
        )
        if rows is not None:
            delta = Delta(touched, rows)
            _read_ranges(layout, connection, ranges, covered, delta)
            return delta
    rest = read_coverage(layout, connection, coverage) if reread else layout.no_rows()
    return Delta(None, rest)


def _groups_of(connection: Connection, path: GroupPath, keys: set[RowKey]) -> set[RowKey] | None:
    """Return the values of the groups that rows of a table are part of now, if they compare."""
    found: set[RowKey] = set()
    names = [column.name for column in path.columns]
    for criterion in _criteria(path.primary_key, keys):
        for row in connection.execute(select(*path.columns).where(criterion).distinct()):
            values = path.values(dict(zip(names, row, strict=True)))
            if values is None:
                return None
            found.update(values)
    return found


def _read_groups(
    layout: Layout,
    connection: Connection,
    groups: dict[tuple[str, ...], set[RowKey]],
    covered: list[ColumnElement[bool]],
) -> tuple[Touched, Rows]:
    """Read the records of groups: one SELECT."""
    touched = Touched({}, {})
    for names, values in groups.items():
        touched.keys.setdefault(layout.group_orders[names], set()).update(values)
    if not any(groups.values()):
        return touched, layout.no_rows()
    criterion = or_(
        *(
            criterion
            for names, values in groups.items()
            for criterion in _criteria([layout.plan.column(n).clause for n in names], values)
        )
    )
    return touched, layout.loader.read(connection, [criterion, *covered])


def _read_anchors(
    layout: Layout,
    connection: Connection,
    storage: Storage,
    coverage: Coverage,
    covered: list[ColumnElement[bool]],
    keys: dict[TableName, set[RowKey]],
    groups: dict[tuple[str, ...], set[RowKey]],
    ranges: list[RangeMark],
) -> tuple[Touched, Rows | None]:
    """Read all records of the anchors that marks lead to; none if those are too many."""
    plan = layout.plan
    anchor = plan.anchor
    assert anchor is not None
    touched: set[RowKey] = set()
    complete: dict[RowKey, tuple[Record, Hidden | None]] = {}
    result = Touched({layout.anchor_order: touched}, {})
    ways: list[tuple[int, list[Record], tuple[str, ...], tuple[str, ...], set[RowKey]]] = []
    for leaf in plan.leaves:
        wanted = keys.get(leaf.table, set())
        if leaf is anchor:
            touched |= wanted
        elif wanted:
            stored = layout.records_of(storage, leaf, wanted)
            shown = leaf.visible or leaf.hidden
            ways.append((leaf.number, stored, leaf.hidden, shown, wanted))
    for names, values in groups.items():
        path = layout.path_of[names]
        assert path.leaf is not None
        stored = storage.starting_with(layout.group_orders[names], values)
        ways.append((path.leaf, stored, names, path.stored, values))
    for leaf_number, stored, names, shown, values in ways:
        for record, hidden in storage.with_hidden(stored):
            touched.add(layout.anchor_key(record, hidden))
        if layout.may_reveal(coverage, leaf_number):
            # Columns that stay lead to NULL-extended rows, too, if they show the same values.
            if not plan.extensions[leaf_number][0].issuperset(shown):
                return result, None
            names = shown
        for record, hidden in _read(layout, connection, names, values, covered).pairs():
            key = layout.anchor_key(record, hidden)
            touched.add(key)
            if plan.one_row_per_anchor:
                complete[key] = record, hidden
    for mark in ranges:
        if mark.leave:
            stored = storage.orders[mark.index].between(mark.interval)
            interval = IntervalSet([mark.interval])
            found = _read_range(layout, connection, mark.index, interval, covered)
            for record, hidden in (*storage.with_hidden(stored), *found.pairs()):
                touched.add(layout.anchor_key(record, hidden))
    rest = touched - complete.keys()
    if len(rest) > MOST_ANCHORS:
        return result, None
    rows = _read(layout, connection, anchor.hidden, rest, covered)
    for record, hidden in complete.values():
        rows.records.append(record)
        if rows.hidden is not None:
            rows.hidden.append(cast("Hidden", hidden))
    return result, rows


def _read_ranges(
    layout: Layout,
    connection: Connection,
    ranges: list[RangeMark],
    covered: list[ColumnElement[bool]],
    delta: Delta,
) -> None:
    """Read intervals that no record has left or come into, as they are: one SELECT an index."""
    assert delta.touched is not None
    key_of, rows = layout.orders[""].key_of, delta.rows
    known = {key_of(record, hidden) for record, hidden in rows.pairs()}
    for index in dict.fromkeys(mark.index for mark in ranges if not mark.leave):
        intervals = IntervalSet(m.interval for m in ranges if m.index == index and not m.leave)
        delta.touched.ranges[index] = intervals
        read = _read_range(layout, connection, index, intervals, covered).pairs()
        new = [(r, h) for r, h in read if key_of(r, h) not in known]
        known.update(key_of(record, hidden) for record, hidden in new)
        rows.records += [record for record, _ in new]
        if rows.hidden is not None:
            rows.hidden += [cast("Hidden", hidden) for _, hidden in new]


def _read_range(
    layout: Layout,
    connection: Connection,
    index: str,
    intervals: IntervalSet,
    covered: list[ColumnElement[bool]],
) -> Rows:
    """Read the covered records in intervals of an index: one SELECT."""
    where = [*layout.where(index, intervals), *covered]
    return layout.only(layout.loader.read(connection, where, stream=True), index, intervals)


def _read(
    layout: Layout,
    connection: Connection,
    names: tuple[str, ...],
    values: set[RowKey],
    covered: list[ColumnElement[bool]],
) -> Rows:
    """Read the covered records in which columns of the rendered view have certain values now."""
    if len(names) == 1 and 0 < len(values) <= BATCH and (None,) not in values:
        [name], keys = names, sorted((value for [value] in values), key=repr)
        column = layout.plan.column(name).clause
        # In a list, values of another type are compared as what they are; other types, such as
        # those of an application, may have an IN of their own.
        as_is = column.type.coerce_compared_value(in_op, keys[0]) is column.type
        if as_is and isinstance(column.type, Integer | String | Uuid):
            return _look_up(layout, connection, name, keys, covered)
    rows = layout.no_rows()
    for criterion in _criteria([layout.plan.column(name).clause for name in names], values):
        more = layout.loader.read(connection, [criterion, *covered])
        rows.records += more.records
        if rows.hidden is not None:
            rows.hidden += more.hidden or []
    return rows


def _look_up(
    layout: Layout,
    connection: Connection,
    name: str,
    keys: list[Any],
    covered: list[ColumnElement[bool]],
) -> Rows:
    """Read the covered records in which a column has one of some values now: one SELECT.

    It is made once for a coverage: making it, and SQLAlchemy's looking for how it compiled it
    before, take longer than all else that a refresh of one record does in Python.
    """
    made_for, statement = layout.lookups.get(name, (None, None))
    if made_for is not covered:
        column = layout.plan.column(name).clause
        wanted = column.in_(bindparam(KEYS, type_=column.type, expanding=True))
        statement = layout.loader.statement(wanted, *covered)
        layout.lookups[name] = covered, statement
    return layout.loader.run(connection, statement, {KEYS: keys})


def _criteria(
    columns: Sequence[ColumnElement[Any]], values: set[RowKey]
) -> Iterator[ColumnElement[bool]]:
    """Yield, for a batch of values each, that columns have one of them; NULL is a value."""
    ordered = sorted(values, key=repr)
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        whole = [value for value in batch if None not in value]
        clauses = [
            and_(
                *(
                    column.is_(None) if part is None else column == literal(part, column.type)
                    for column, part in zip(columns, value, strict=True)
                )
            )
            for value in batch
            if None in value
        ]
        if whole:
            clauses.append(
                columns[0].in_([value[0] for value in whole])
                if len(columns) == 1
                else tuple_(*columns).in_(whole)
            )
        yield or_(*clauses)
