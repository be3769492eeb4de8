"""Installing a changelog from a running application, with the SQL that migrations render.

In: a connection, and what views need. Out: triggers on the tables that the views read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from sqlalchemy import Connection

from sa_tablecache.analysis import TableName, ViewPlan, table_label

from .contract import Changelog, Relation, Watch
from .needs import Need, needs_of

log = logging.getLogger(__name__)


def wanted_watches(
    connection: Connection, changelog: Changelog, needs: Mapping[TableName, Need]
) -> dict[Relation, Watch]:
    """Return how tables are to be watched; those that are not there, or are no tables, are not."""
    translate = connection.get_execution_options().get("schema_translate_map") or {}
    meant = {name: (translate.get(name[0], name[0]), name[1]) for name in needs}
    found = changelog.resolve(connection, meant.values())
    watches: dict[Relation, Watch] = {}
    for name, need in needs.items():
        relation = found.get(meant[name])
        if relation is None:
            log.warning("%s is not watched: there is no such table", table_label(name))
            continue
        known = watches.get(relation)
        key, ranges = need.key, need.ranges
        if known is not None:
            key = tuple(dict.fromkeys((*known.key, *key)))
            ranges = tuple(dict.fromkeys((*known.ranges, *ranges)))
        watches[relation] = changelog.propose(connection, relation, ranges, key)
    return watches


def install(connection: Connection, changelog: Changelog, plans: Iterable[ViewPlan]) -> int:
    """Install the changelog, watch what views read, and say of how many tables that was new.

    What others watch stays as it is, and of a table what they have logged stays logged.
    """
    for statement in changelog.create():
        connection.exec_driver_sql(statement)
    have = changelog.installed(connection)
    changed = 0
    for relation, wanted in wanted_watches(connection, changelog, needs_of(plans)).items():
        watch, known = wanted, have.watched.get(relation)
        if known is not None:
            key = known.key if set(known.key) >= set(wanted.key) else (*wanted.key, *known.key)
            ranges = tuple(dict.fromkeys((*known.ranges, *wanted.ranges)))
            watch = changelog.propose(connection, relation, ranges, tuple(dict.fromkeys(key)))
            watch = replace(watch, limit=known.limit)
            if watch == known and relation not in have.outdated:
                continue
        for statement in changelog.watch(watch):
            connection.exec_driver_sql(statement)
        changed += 1
    return changed


def uninstall(connection: Connection, changelog: Changelog) -> None:
    """Remove the changelog, with all triggers."""
    for statement in changelog.drop(changelog.installed(connection).watched):
        connection.exec_driver_sql(statement)
