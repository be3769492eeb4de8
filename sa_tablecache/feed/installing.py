"""Installing a changelog from a running application, with the SQL that migrations render.

In: a connection, and what views need. Out: triggers on the tables that the views read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from sa_tablecache.analysis import TableName, ViewPlan, table_label
from sa_tablecache.exc import TableCacheError

from .contract import Changelog, Relation, Watch, run
from .needs import Need, needs_of

log = logging.getLogger(__name__)


def wanted_watches(
    connection: Connection, changelog: Changelog, needs: Mapping[TableName, Need]
) -> tuple[dict[Relation, Watch], dict[TableName, str]]:
    """Return how tables are to be watched, and of which that is not possible, and why."""
    translate = connection.get_execution_options().get("schema_translate_map") or {}
    meant = {name: (translate.get(name[0], name[0]), name[1]) for name in needs}
    found = changelog.resolve(connection, meant.values())
    watches: dict[Relation, Watch] = {}
    refused: dict[TableName, str] = {}
    for name, need in needs.items():
        relation = found.get(meant[name])
        if relation is None:
            refused[name] = "there is no such table"
            continue
        known = watches.get(relation)
        key, ranges = need.key, need.ranges
        if known is not None:
            key = tuple(dict.fromkeys((*known.key, *key)))
            ranges = tuple(dict.fromkeys((*known.ranges, *ranges)))
        try:
            watches[relation] = changelog.propose(connection, relation, ranges, key)
        except TableCacheError as why:
            refused[name] = str(why)
    return watches, refused


@dataclass(frozen=True, slots=True)
class Outstanding:
    """What the change feed of a database lacks for some views."""

    watches: tuple[Watch, ...]
    """How tables have to be watched that are not, or not so."""
    refused: Mapping[TableName, str]
    """Tables that cannot be watched, and why."""
    hindered: Mapping[Relation, str]
    """Tables whose changes are not all seen however they are watched, and why."""


def outstanding(
    connection: Connection, changelog: Changelog, plans: Iterable[ViewPlan]
) -> Outstanding:
    """Return what has to be done for some views.

    What others watch stays as it is, and of a table what they have logged stays logged.
    """
    have = changelog.installed(connection)
    watches = []
    wanted_by_relation, refused = wanted_watches(connection, changelog, needs_of(plans))
    for relation, wanted in wanted_by_relation.items():
        watch, known = wanted, have.watched.get(relation)
        if known is not None:
            key = known.key if set(known.key) >= set(wanted.key) else (*wanted.key, *known.key)
            ranges = tuple(dict.fromkeys((*known.ranges, *wanted.ranges)))
            watch = changelog.propose(connection, relation, ranges, tuple(dict.fromkeys(key)))
            watch = replace(watch, limit=known.limit)
            if watch == known and relation not in have.outdated:
                continue
        watches.append(watch)
    hindered = {r: why for r, why in have.hindered.items() if r in wanted_by_relation}
    return Outstanding(tuple(watches), refused, hindered)


def install(
    connection: Connection, changelog: Changelog, plans: Iterable[ViewPlan]
) -> tuple[Watch, ...]:
    """Install the changelog, watch what views read, and return what was not watched so before."""
    run(connection, changelog.create())
    todo = outstanding(connection, changelog, plans)
    for name, why in todo.refused.items():
        log.warning("%s is not watched: %s", table_label(name), why)
    for relation, why in todo.hindered.items():
        log.warning("changes of %s are not seen, though it is watched: %s", relation, why)
    for watch in todo.watches:
        run(connection, changelog.watch(watch))
    return todo.watches


def uninstall(connection: Connection, changelog: Changelog) -> None:
    """Remove the changelog, with all triggers."""
    run(connection, changelog.drop(changelog.installed(connection).watched))


def script(statements: Iterable[str], dialect: str) -> str:
    """Return statements as the database's own client reads them from a file."""
    text = []
    for statement in statements:
        statement = statement.strip().rstrip(";")
        if dialect in ("mysql", "mariadb") and ";" in statement:
            text.append(f"DELIMITER $$\n\n{statement} $$\n\nDELIMITER ;\n")
        else:
            text.append(f"{statement};\n")
    return "\n".join(text)
