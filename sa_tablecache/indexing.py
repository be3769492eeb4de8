"""Which database indexes the reads of a cache need, and which of these there are not.

In: plans of views, and the indexes that are known of each table. Out: the indexes that are lacking,
each with the reason. Pure, but for :func:`existing_indexes`, which asks the catalog.

What a cache reads by, and what an index is therefore needed for:

* a *load* of a range goes by the scores of an index of the view: by its leading columns, where they
  are plain columns of one table;
* a *delta query* (see ``deltas.py``) starts at rows of one table with given primary keys, or at
  groups with given values, and joins all other tables to them. From each start, the joins are
  walked outwards: a table that is reached by equality of columns has to be found by them.

An index serves if it begins with these columns in any order, or if it is unique and has no other
columns. Conditions that are no equality of plain columns need what no index of one table gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Enum,
    ForeignKeyConstraint,
    LargeBinary,
    String,
    Table,
    UniqueConstraint,
    inspect,
)
from sqlalchemy.types import ARRAY

from .analysis import TableName, ViewPlan, table_name
from .groups import column_of, read_grouped
from .joins import Grouped, Joins, LeafColumn, is_stored


class KnownIndex(NamedTuple):
    """An index of a table by the names of its columns, whatever it was made for."""

    columns: tuple[str, ...]
    unique: bool = False

    def serves(self, columns: tuple[str, ...]) -> bool:
        """Whether rows with certain values of some columns are found by it."""
        if self.unique and set(self.columns) <= set(columns):
            return True
        return set(self.columns[: len(columns)]) == set(columns)


@dataclass(frozen=True)
class LackingIndex:
    """An index that reads of a view need and that its table does not have."""

    view: str
    table: Table
    columns: tuple[str, ...]
    least: tuple[str, ...]
    """The columns that are enough to begin with."""
    why: str

    def __str__(self) -> str:
        return f"{self.table.fullname} has no index on ({', '.join(self.columns)}): {self.why}"


Known: TypeAlias = Callable[[Table], Iterable[KnownIndex]]


def declared_indexes(table: Table, dialect: str) -> list[KnownIndex]:
    """Return the indexes that a table has by its metadata: keys, unique constraints, indexes.

    :param dialect: MariaDB and MySQL have an index for each foreign key.
    """
    found = [KnownIndex(tuple(column.name for column in table.primary_key.columns), unique=True)]
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            found.append(KnownIndex(tuple(c.name for c in constraint.columns), unique=True))
        elif isinstance(constraint, ForeignKeyConstraint) and dialect in ("mysql", "mariadb"):
            found.append(KnownIndex(tuple(c.name for c in constraint.columns)))
    for index in table.indexes:
        partial = any(key.endswith("_where") for key in index.dialect_kwargs)
        if not partial and all(isinstance(part, Column) for part in index.expressions):
            columns = tuple(column.name for column in index.columns)
            found.append(KnownIndex(columns, bool(index.unique)))
    return found


def existing_indexes(connection: Connection, table: TableName) -> list[KnownIndex]:
    """Return the indexes that a table has in the database: three questions to its catalog.

    :raises NoSuchTableError: if there is no such table.
    """
    inspector = inspect(connection)
    translate = connection.get_execution_options().get("schema_translate_map") or {}
    schema, name = translate.get(table[0], table[0]), table[1]
    key = inspector.get_pk_constraint(name, schema)
    found = [KnownIndex(tuple(key["constrained_columns"]), unique=True)]
    found += [
        KnownIndex(tuple(constraint["column_names"]), unique=True)
        for constraint in inspector.get_unique_constraints(name, schema)
    ]
    for index in inspector.get_indexes(name, schema):
        options: Mapping[str, Any] = index.get("dialect_options", {})
        sorts = options.get("postgresql_using", "btree") == "btree"
        partial = any(
            key.endswith("_where") and value is not None for key, value in options.items()
        )
        names = tuple(column for column in index["column_names"] if column is not None)
        if sorts and not partial and len(names) == len(index["column_names"]):
            found.append(KnownIndex(names, bool(index["unique"])))
    return found


def indexes_lacking_in(connection: Connection, plans: Iterable[ViewPlan]) -> list[LackingIndex]:
    """Return the indexes that reads of views need and that a database does not have."""
    return lacking_indexes(
        plans,
        lambda table: existing_indexes(connection, table_name(table)),
        connection.dialect.name,
    )


def lacking_indexes(plans: Iterable[ViewPlan], known: Known, dialect: str) -> list[LackingIndex]:
    """Return the indexes that reads of views need and that are not known.

    One that begins as another does stands for both.

    :param known: what indexes a table has.
    :param dialect: the name of the dialect, which may be unable to index a type.
    """
    search = _Search(known, dialect)
    plans = list(plans)
    for plan in plans:
        search.view = plan.name
        search.loads(plan)
    for plan in plans:
        search.view = plan.name
        search.deltas(plan)
    found = search.found
    return [
        index
        for index in found
        if not any(
            other.table is index.table
            and len(other.columns) > len(index.columns)
            and KnownIndex(other.columns).serves(index.columns)
            for other in found
        )
    ]


Filter: TypeAlias = dict[int, list[str]]
"""By the numbers of leaves, the keys of columns whose values are given."""


class _Search:
    """Collects what is lacking; what was found counts as known from then on."""

    def __init__(self, known: Known, dialect: str) -> None:
        self.view = ""
        self.found: list[LackingIndex] = []
        self._ask = known
        self._dialect = dialect
        self._known: dict[TableName, list[KnownIndex]] = {}

    def known(self, table: Table) -> list[KnownIndex]:
        name = table_name(table)
        if name not in self._known:
            self._known[name] = list(self._ask(table))
        return self._known[name]

    def need(
        self, table: Table, columns: tuple[str, ...], least: tuple[str, ...], why: str
    ) -> None:
        if any(index.serves(least) for index in self.known(table)):
            return
        if all(_indexable(table, name, self._dialect) for name in columns):
            self.found.append(LackingIndex(self.view, table, columns, least, why))
            self.known(table).append(KnownIndex(columns))

    def loads(self, plan: ViewPlan) -> None:
        """Look for indexes by which ranges of the view's own indexes are loaded."""
        for index in plan.view.__indexes__.values():
            columns: list[Column[Any]] = []
            for name in index.column_names:
                source = plan.column(name).source
                if source is None or (columns and source.table is not columns[0].table):
                    break
                columns.append(source)
            if not columns:
                continue
            table: Any = columns[0].table
            names = tuple(column.name for column in columns)
            why = f"loads of ranges of {plan.name}.{index.name} go by it"
            self.need(table, names, names[:1], why)

    def deltas(self, plan: ViewPlan) -> None:
        """Look for indexes by which the other tables are joined to changed rows."""
        if plan.coarse.keys() >= plan.tables:
            return
        statement: Any = plan.statement
        joins = Joins(read_grouped)
        for element in statement.get_final_froms():
            joins.read_from(element)
        joins.read_dependencies(statement._where_criteria)
        for leaf in plan.leaves:
            if leaf.table not in plan.coarse or leaf is plan.anchor:
                self.walk(joins, leaf.number, f"a changed row of {leaf} is joined by it")
        shown = {
            str(label.name): column_of(label.element, joins) for label in statement._raw_columns
        }
        for path in plan.paths:
            if path.table in plan.coarse:
                continue
            inner, why = joins, f"groups of {path.table[1]} are read again by it"
            by = [shown.get(name) for name in path.names]
            if path.leaf is not None:
                grouped = joins.leaves[path.leaf].source
                assert isinstance(grouped, Grouped)
                self.walk(joins, path.leaf, why)
                group_of = dict(zip(grouped.key, grouped.by, strict=True))
                inner, by = grouped.joins, [group_of[at.name] for at in by if at is not None]
            start = self.start(inner, [at for at in by if at is not None], why)
            if start is not None:
                self.walk(inner, start, why)

    def start(self, joins: Joins, by: list[LeafColumn], why: str) -> int | None:
        """Return the leaf at which rows with certain values are found."""
        given: Filter = {}
        for at in by:
            given.setdefault(at.leaf, []).append(at.name)
        return self.reach(joins, given, why)

    def walk(self, joins: Joins, start: int, why: str) -> None:
        """Join all other leaves to one, as far as equality of columns leads."""
        reached = {start}
        while (given := _equal_to(joins, reached)) and (
            leaf := self.reach(joins, given, why)
        ) is not None:
            reached.add(leaf)

    def reach(self, joins: Joins, given: Filter, why: str) -> int | None:
        """Return a leaf that some index leads to; if none does, one is lacking."""
        wanted: list[tuple[int, Table, tuple[str, ...]]] = []
        for number, keys in sorted(given.items()):
            leaf = joins.leaves[number]
            if not isinstance(leaf.source, Table):
                return number  # no index can help: it is computed
            stored = [leaf.columns[key] for key in keys if is_stored(leaf.columns[key])]
            names = _ordered(leaf.source, [column.name for column in stored])
            if any(index.serves(names) for index in self.known(leaf.source)):
                return number
            wanted.append((number, leaf.source, names))
        for number, table, names in wanted:
            self.need(table, names, names, why)
            return number
        return None


def _equal_to(joins: Joins, reached: set[int]) -> Filter:
    """Return the columns of other leaves that equal some of the given ones."""
    given: Filter = {}
    for one, other in _equalities(joins):
        if one.leaf in reached and other.leaf not in reached:
            names = given.setdefault(other.leaf, [])
            if other.name not in names:
                names.append(other.name)
    return given


def _equalities(joins: Joins) -> Iterator[tuple[LeafColumn, LeafColumn]]:
    for one, others in joins.equal.items():
        for other in sorted(others):
            yield one, other
            yield other, one


def _ordered(table: Table, names: list[str]) -> tuple[str, ...]:
    """Return columns in the order of a foreign key that consists of them, if there is one."""
    for constraint in table.foreign_key_constraints:
        if {column.name for column in constraint.columns} == set(names):
            return tuple(column.name for column in constraint.columns)
    return tuple(names)


def _indexable(table: Table, name: str, dialect: str) -> bool:
    """Whether a column has a type of which each dialect makes an index without being told how."""
    type_ = next(column.type for column in table.columns if column.name == name)
    if isinstance(type_, JSON | ARRAY | LargeBinary):
        return False
    unbounded = isinstance(type_, String) and not isinstance(type_, Enum) and not type_.length
    return not (unbounded and dialect in ("mysql", "mariadb"))
