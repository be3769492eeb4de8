"""The database indexes that reads of the views need: proposed where they are lacking.

In: the plans of the views and the operations that autogenerate found so far. Out: operations that
create indexes, named by the naming convention of the metadata. No metadata declares them, so that
autogenerate wants to drop them again: such an operation is taken back where an index is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from alembic.autogenerate.api import AutogenContext
from alembic.operations import ops
from sqlalchemy import Column, Index, MetaData, Table
from sqlalchemy.exc import NoSuchTableError

from sa_tablecache.analysis import ViewPlan, table_name
from sa_tablecache.indexing import (
    KnownIndex,
    LackingIndex,
    declared_indexes,
    existing_indexes,
    lacking_indexes,
)

log = logging.getLogger(__name__)


def compare_indexes(
    context: AutogenContext, upgrade_ops: ops.UpgradeOps, plans: Iterable[ViewPlan]
) -> None:
    """Add what creates lacking indexes; take back what drops indexes that are needed."""
    dialect = context.dialect.name
    tables = {table_name(table): table for table in context.sorted_tables}
    # By the metadata alone, so that an index is needed before it exists and afterwards.
    assert context.connection is not None
    for lacking in lacking_indexes(plans, lambda t: declared_indexes(t, dialect), dialect):
        table = tables.get(table_name(lacking.table))
        if table is None:
            continue  # what Alembic does not look after
        _keep(upgrade_ops, lacking, context.dialect.default_schema_name)
        try:
            existing = existing_indexes(context.connection, table_name(table))
            taken = {index["name"] for index in context.inspector.get_indexes(*_place(table))}
        except NoSuchTableError:  # created by this migration
            existing, taken = [], set()
        if any(index.serves(lacking.least) for index in existing):
            continue
        index = _named(table, lacking.columns, taken | {index.name for index in table.indexes})
        if context.run_object_filters(index, index.name, "index", False, None):
            upgrade_ops.ops.append(ops.CreateIndexOp.from_index(index))
            log.info("Detected that %s", lacking)


def _place(table: Table) -> tuple[str, str | None]:
    return table.name, table.schema


def _keep(upgrade_ops: ops.UpgradeOps, lacking: LackingIndex, default: str | None) -> None:
    """Take back what drops an index that serves."""
    for modify in list(upgrade_ops.ops):
        if not isinstance(modify, ops.ModifyTableOps):
            continue
        schema, name = table_name(lacking.table)
        if modify.table_name != name or (modify.schema or default) != (schema or default):
            continue
        for op in list(modify.ops):
            if isinstance(op, ops.DropIndexOp):
                columns = op.to_index().columns
                if KnownIndex(tuple(c.name for c in columns)).serves(lacking.least):
                    modify.ops.remove(op)
                    log.info("Kept index %s: %s", op.index_name, lacking.why)
        if modify.is_empty():
            upgrade_ops.ops.remove(modify)


def _named(table: Table, columns: tuple[str, ...], taken: set[Any]) -> Index:
    """Return an index with a name of its own, of a copy of the table: the models stay as they are.

    The usual convention names an index by its first column alone.
    """
    copy = Table(
        table.name,
        MetaData(naming_convention=table.metadata.naming_convention),
        *(Column(column.name, column.type) for column in table.columns if column.name in columns),
        schema=table.schema,
    )
    index = Index(None, *(copy.c[name] for name in columns))
    if index.name not in taken:
        return index
    return Index("_".join(("ix", table.name, *columns)), *(copy.c[name] for name in columns))
