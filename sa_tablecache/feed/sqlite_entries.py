"""What entries of a changelog of SQLite say: changes of single rows, or one of many.

In: a connection, and the numbers of two entries. Out: a :class:`.Change` after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection

from .contract import Change, Relation, Watch
from .sqlite_catalog import byte_columns
from .sqlite_conflicts import folded, quoted
from .sqlite_triggers import PREFIX


class Entry(NamedTuple):
    """An entry of a changelog: a place in the history of one database file."""

    incarnation: str
    seq: int
    at: int
    """When it was written, in milliseconds: that tells histories apart in which it has a number."""


def changes_between(
    connection: Connection,
    schema: str,
    after: int,
    last: Entry,
    watched: Mapping[Relation, Watch | None],
) -> Iterator[Change]:
    """Yield what entries of a changelog say: each row, or one change of a table with many."""
    log = f"{quoted(schema)}.{PREFIX}changelog"
    by_name = {
        watch.relation.name: (relation, watch) for relation, watch in watched.items() if watch
    }
    big: list[str] = []
    if last.seq - after > min((watch.limit for _, watch in by_name.values()), default=0):
        counts = connection.exec_driver_sql(
            f"SELECT relation, count(*), min(operation), max(operation), max(seq) FROM {log} "
            "WHERE seq > ? AND seq <= ? GROUP BY relation",
            (after, last.seq),
        )
        for name, count, least, most, seq in counts.all():
            if name not in by_name or count <= by_name[name][1].limit:
                continue
            big.append(name)
            relation, watch = by_name[name]
            ranges = None
            if watch.ranges and most != "T":
                ranges = _ranges(connection, log, watch, (after, last.seq, name))
            operation = least if least == most else ("T" if most == "T" else "U")
            yield Change(relation, operation, None, ranges, (schema, last.incarnation, seq))
    rows = connection.exec_driver_sql(
        f"SELECT relation, operation, CAST(keys AS BLOB), seq FROM {log} WHERE seq > ? "
        f"AND seq <= ? AND relation NOT IN ({', '.join('?' * len(big))}) ORDER BY seq",
        (after, last.seq, *big),
    )
    in_bytes: dict[Relation, frozenset[str]] = {}
    for name, operation, keys, seq in rows.all():
        if name not in by_name:
            continue
        relation, watch = by_name[name]
        at = (schema, last.incarnation, seq)
        key = None if keys is None else _key(keys)
        if key is not None and any(isinstance(value, list) for value in key):
            if relation not in in_bytes:
                in_bytes[relation] = byte_columns(connection, relation)
            key = _with_bytes(watch.key, key, in_bytes[relation])
        ranges = None
        if key is None and watch.ranges and operation != "T":
            ranges = _ranges(connection, log, watch, (seq - 1, seq, name))
        yield Change(relation, operation, None if key is None else (key,), ranges, at)


def _key(logged: bytes) -> tuple[Any, ...] | None:
    """Return a key, or ``None`` if it is not certain which one was meant.

    SQLite writes floats as they may not have been, infinity as no JSON at all, and bytes that are
    called text as they are.
    """
    try:
        key = json.loads(logged)
    except ValueError:
        return None
    return None if any(isinstance(value, float) for value in key) else tuple(key)


def _with_bytes(
    names: Sequence[str], key: Sequence[Any], binary: frozenset[str]
) -> tuple[Any, ...] | None:
    """Return a key with bytes as their digits; ``None`` if they could be taken for text."""
    if any(
        isinstance(v, list) and folded(n) not in binary for n, v in zip(names, key, strict=True)
    ):
        return None
    return tuple(value[0] if isinstance(value, list) else value for value in key)


def _ranges(
    connection: Connection, log: str, watch: Watch, where: tuple[int, int, str]
) -> dict[str, tuple[Any, Any]] | None:
    """Return the smallest and largest values of the columns of ranges among entries of a table."""
    condition = "seq > ? AND seq <= ? AND relation = ?"
    unsaid = connection.exec_driver_sql(
        f"SELECT count(*) FROM {log} WHERE {condition} AND NOT coalesce(json_valid(bounds), 0)",
        where,
    )
    if unsaid.scalar_one():
        return None
    found: dict[str, tuple[Any, Any]] = {}
    for place, name in enumerate(watch.ranges):
        kinds = {
            kind: (least, most)
            for kind, least, most in connection.exec_driver_sql(
                f"SELECT json_type(pair.value, '$[{place}]'), "
                f"min(json_extract(pair.value, '$[{place}]')), "
                f"max(json_extract(pair.value, '$[{place}]')) "
                f"FROM {log} AS log, json_each(log.bounds) AS pair WHERE {condition} GROUP BY 1",
                where,
            )
        }
        if kinds.keys() == {"null"}:
            found[name] = (None, None)
        elif kinds.keys() == {"text"}:
            found[name] = kinds["text"]
        elif kinds and kinds.keys() <= {"integer", "real"}:
            least, most = zip(*kinds.values(), strict=True)
            found[name] = (_widened(min(least), -math.inf), _widened(max(most), math.inf))
    return found


def _widened(bound: float, towards: float) -> float:
    """Return a bound that holds for the float that SQLite wrote with its last digits wrong."""
    if isinstance(bound, float):
        for _ in range(4):
            bound = math.nextafter(bound, towards)
    return bound
