"""The SQL that makes the triggers of MariaDB and MySQL, and the text that says how they watch.

In: a :class:`.Watch`. Out: statements, one by one. Pure.

A trigger knows one row, and so each row is one entry. What foreign keys do to other rows fires no
trigger: who watches a table therefore makes triggers on the tables that cascade into it, too, which
log the rows that are about to be deleted, or were changed. See ``mysql_cascades.py``.

What of the catalog a trigger depends on is in ``Watch.cascades``: the kinds of the columns that are
logged, as ``(kind, column, ...)``, and the foreign keys on the way to the table, as ``("foreign
key", child, columns, parent, columns, on delete, on update)``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Final, NamedTuple

from .contract import VERSION, Relation, Watch
from .mysql_cascades import ForeignKey, Way, action_flags, ways

PREFIX: Final = "sa_tablecache_"
LOG: Final = f"{PREFIX}changelog"

MOST_PARENTS: Final = 16
"""So many tables may cascade into a watched one: :meth:`unwatch` does not know which they are."""

_KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "integer": ("tinyint", "smallint", "mediumint", "int", "bigint", "year", "bit"),
    "decimal": ("decimal",),
    "double": ("double",),
    "text": ("char", "varchar", "tinytext", "text", "mediumtext", "longtext", "enum", "set"),
    "binary": ("binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob"),
    "plain": ("date", "time", "uuid", "inet4", "inet6"),
    "datetime": ("datetime",),
    "timestamp": ("timestamp",),
}
_BYTEWISE: Final = frozenset(("utf8mb4_nopad_bin", "utf8mb3_nopad_bin", "utf8mb4_0900_bin"))
"""Collations under which text sorts as it does in Python."""

_FORMS: Final[Mapping[str, str]] = {
    "integer": "{0} + 0",  # without the zeros of ZEROFILL, which are no JSON
    "decimal": "CAST({0} AS CHAR)",
    "double": "{0}",
    "text": "CONVERT({0} USING utf8mb4)",
    "bytewise": "CONVERT({0} USING utf8mb4)",
    "binary": "LOWER(HEX({0}))",
    "plain": "CAST({0} AS CHAR)",
    "date": "CAST({0} AS CHAR)",
    "datetime": "REPLACE(CAST(CAST({0} AS DATETIME(6)) AS CHAR), ' ', 'T')",
    # Whatever the time zone of the session; a TIMESTAMP is read without a detour through that.
    "timestamp": "CONCAT(REPLACE(CAST(CAST('1970-01-01' AS DATETIME(6)) "
    "+ INTERVAL UNIX_TIMESTAMP({0}) SECOND AS CHAR), ' ', 'T'), '+00:00')",
}
"""How JSON is made of a value: text that depends on no setting, numbers without loss."""
SORTED: Final = frozenset(
    ("integer", "decimal", "double", "bytewise", "date", "datetime", "timestamp")
)
"""Kinds of which the smallest and the largest value can be told from what is logged."""

_SAFE: Final = re.compile(r"[A-Za-z0-9_ .,\[\]{}\":-]*")


def kind_of(data_type: str, collation: str | None) -> str:
    """Return the kind of a column; empty if nothing can be said of its values."""
    data_type = data_type.lower()
    if data_type == "date":
        return "date"
    kind = next((kind for kind, types in _KINDS.items() if data_type in types), "")
    return "bytewise" if kind == "text" and collation in _BYTEWISE else kind


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(f"sql/mysql/{name}.sql").read_text(encoding="utf-8").strip()


def query(file: str, /, **given: Any) -> str:
    """Return the text of a file of one statement."""
    return _file(file).format_map(given)


def statements(file: str, /, **given: Any) -> list[str]:
    """Return the statements of a file."""
    return [part.format_map(given) for part in _file(file).split("\n\n")]


def quoted(name: str) -> str:
    """Return a name in backticks, which are right in each SQL mode."""
    return "`" + name.replace("`", "``") + "`"


def full_name(relation: Relation) -> str:
    """Return the name of a table, without that of the database of the changelog."""
    return ".".join(quoted(part) for part in relation if part)


def literal(value: str) -> str:
    """Return text as SQL, in ASCII and without what a mode or a driver takes for something else."""
    if _SAFE.fullmatch(value):
        return f"'{value}'"
    return f"CONVERT(X'{value.encode().hex()}' USING utf8mb4)"


def schema_literal(schema: str) -> str:
    """Return the name of a database as SQL."""
    return literal(schema) if schema else "DATABASE()"


# -- how a table is watched -----------------------------------------------------------------------


def kinds(watch: Watch) -> dict[str, str]:
    """Return the kinds of the columns of a table."""
    return {
        column: kind
        for kind, *columns in watch.cascades
        if kind != "foreign key"
        for column in columns
    }


def foreign_keys(watch: Watch) -> list[ForeignKey]:
    """Return the foreign keys by which changes of other tables come to a table."""
    return [
        ForeignKey(child, tuple(columns), parent, tuple(referred), on_delete, on_update)
        for kind, *key in watch.cascades
        if kind == "foreign key"
        for child, columns, parent, referred, on_delete, on_update in (key,)
    ]


def dump(watch: Watch) -> str:
    """Return what the registry has of a table: how it is watched, and its triggers."""
    return json.dumps(
        {
            "version": VERSION,
            "key": watch.key,
            "ranges": watch.ranges,
            "limit": watch.limit,
            "cascades": watch.cascades,
            "triggers": [
                (trigger.table, trigger.name, trigger.digest) for trigger in triggers(watch)
            ],
        }
    )


class Watched(NamedTuple):
    """What the registry has of a table."""

    watch: Watch
    version: int
    triggers: frozenset[tuple[str, str, str]]
    """Tables, names and digests."""
    expected: Mapping[tuple[str, str, int], int]
    """Children, parents and actions of the foreign keys, counted."""


@cache
def load(relation: Relation, definition: str) -> Watched:
    """Return what a text of the registry says."""
    said = json.loads(definition)
    watch = Watch(
        relation,
        tuple(said["key"]),
        tuple(said["ranges"]),
        said["limit"],
        tuple(_tuples(cascade) for cascade in said["cascades"]),
    )
    actions = Counter(
        (key.child, key.parent, action_flags(key.on_delete, key.on_update))
        for key in foreign_keys(watch)
    )
    found = frozenset((table, name, digest) for table, name, digest in said["triggers"])
    return Watched(watch, said["version"], found, actions)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


# -- triggers -------------------------------------------------------------------------------------


class Trigger(NamedTuple):
    """A trigger, on the watched table or on one that cascades into it."""

    table: str
    name: str
    sql: str

    @property
    def digest(self) -> str:
        """The MD5 of its body, which is what the catalog has of its text."""
        body = self.sql.partition(" FOR EACH ROW\n")[2]
        return hashlib.md5(body.encode(), usedforsecurity=False).hexdigest()


def trigger_name(kind: str, relation: Relation) -> str:
    """Return the name of a trigger: that of the table may be too long for it."""
    digest = hashlib.sha256(relation.name.encode()).hexdigest()[:12]
    plain = re.sub(r"\W+", "", relation.name, flags=re.ASCII).lower()[:24]
    return f"{PREFIX}{kind}_{plain}_{digest}"


def trigger_names(relation: Relation) -> Iterator[str]:
    """Yield the names of all triggers that there may be for a table."""
    for kind in ("insert", "update", "delete"):
        yield trigger_name(kind, relation)
    for number in range(MOST_PARENTS):
        yield trigger_name(f"d{number}", relation)
        yield trigger_name(f"u{number}", relation)


def _array(columns: Iterable[str], known: Mapping[str, str], of: str) -> str:
    """Return SQL that makes a JSON array of columns of ``OLD``, ``NEW`` or another table."""
    forms = [_FORMS[known[name]].format(f"{of}.{quoted(name)}") for name in columns]
    return f"JSON_ARRAY({', '.join(forms)})"


def _bounds(watch: Watch, *rows: str) -> str:
    known = kinds(watch)
    pairs = [
        f"{literal(name)}, JSON_ARRAY("
        + ", ".join(_FORMS[known[name]].format(f"{row}.{quoted(name)}") for row in rows)
        + ")"
        for name in watch.ranges
        if known.get(name) in SORTED
    ]
    return f"JSON_OBJECT({', '.join(pairs)})" if pairs else "NULL"


def _logged(relation: Relation, operation: str, changed: str, bounds: str = "NULL") -> str:
    return query(
        "log",
        schema=literal(relation.schema),
        name=literal(relation.name),
        operation=operation,
        changed=changed,
        bounds=bounds,
    )


def loggable(watch: Watch) -> bool:
    """Whether the values of the key have a form in JSON that is known."""
    known = kinds(watch)
    return bool(watch.key) and all(known.get(column) in _FORMS for column in watch.key)


def triggers(watch: Watch) -> list[Trigger]:
    """Return the triggers that log the changes of a table."""
    relation, known = watch.relation, kinds(watch)
    keyed = loggable(watch)
    old, new = (_array(watch.key, known, of) if keyed else "NULL" for of in ("OLD", "NEW"))
    names = {kind: trigger_name(kind, relation) for kind in ("insert", "update", "delete")}
    texts = statements(
        "triggers",
        table=full_name(relation),
        **{kind: _placed(relation, name) for kind, name in names.items()},
        old_key=old,
        new_key=new,
        logs_insert=_logged(relation, "I", f"CONCAT('[', {new}, ']')", _bounds(watch, "NEW")),
        logs_update=_logged(
            relation,
            "U",
            "IF(old_key = new_key, CONCAT('[', old_key, ']'), "
            "CONCAT('[', old_key, ',', new_key, ']'))",
            _bounds(watch, "OLD", "NEW"),
        ),
        logs_delete=_logged(relation, "D", f"CONCAT('[', {old}, ']')", _bounds(watch, "OLD")),
    )
    made = [
        Trigger(relation.name, name, text) for name, text in zip(names.values(), texts, strict=True)
    ]
    keys = foreign_keys(watch)
    for number, parent in enumerate(sorted({key.parent for key in keys})):
        made += _cascading(watch, keys, parent, number)
    return made


def _placed(relation: Relation, name: str) -> str:
    return full_name(Relation(relation.schema, name))


def _cascading(
    watch: Watch, keys: Sequence[ForeignKey], parent: str, number: int
) -> Iterator[Trigger]:
    """Yield the triggers of a table whose changes cascade to the watched one.

    What is deleted is looked up before, and what is moved after it has got its new values.
    """
    relation = watch.relation
    for kind, event, row in (("d", "BEFORE DELETE", "OLD"), ("u", "AFTER UPDATE", "NEW")):
        paths = ways(keys, parent, relation.name, watch.key, deleted=kind == "d")
        if not paths:
            continue
        bodies = []
        for path in paths:
            body = _logs_path(watch, path, row)
            if kind == "u":
                # By bytes, as InnoDB compares them: not by collation.
                same = " AND ".join(
                    f"CAST(OLD.{quoted(name)} AS BINARY) <=> CAST(NEW.{quoted(name)} AS BINARY)"
                    for name in path.steps[0].key.referred
                )
                body = f"IF NOT ({same}) THEN\n    {body}\n    END IF;"
            bodies.append(f"    {body}\n")
        name = trigger_name(f"{kind}{number}", relation)
        text = (
            f"CREATE TRIGGER {_placed(relation, name)} {event} "
            f"ON {full_name(Relation(relation.schema, parent))} FOR EACH ROW\n"
            "BEGIN\n"
            "    DECLARE taken BOOLEAN DEFAULT FALSE;\n"
            "    DECLARE found BIGINT;\n"
            "    DECLARE rows_found LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;\n"
            "    DECLARE CONTINUE HANDLER FOR 1062 SET taken = TRUE;\n"
            f"{''.join(bodies)}END"
        )
        yield Trigger(parent, name, text)


def _logs_path(watch: Watch, path: Way, row: str) -> str:
    """Return statements of a trigger that log the rows at the end of the way of a cascade.

    They are locked, as the cascade is about to do: a SELECT that locks nothing would miss rows that
    were committed since the statement began, and under REPEATABLE READ since the transaction did.
    FOR UPDATE is refused in a trigger if the statement reads one of the tables itself.
    """
    relation = watch.relation
    logs = _logged(relation, "D" if path.deletes else "U", "rows_found")
    if not path.followed:
        return f"SET rows_found = NULL, taken = TRUE;\n    {logs}"
    tables, conditions = [], []
    for place, (key, _) in enumerate(path.steps):
        tables.append(f"{full_name(Relation(relation.schema, key.child))} AS t{place}")
        before = f"t{place - 1}" if place else row
        conditions += [
            f"t{place}.{quoted(column)} = {before}.{quoted(referred)}"
            for column, referred in zip(key.columns, key.referred, strict=True)
        ]
    source = f"FROM {' JOIN '.join(tables)} WHERE {' AND '.join(conditions)}"
    if path.known and loggable(watch):
        columns = ", ".join(f"t{len(tables) - 1}.{quoted(column)}" for column in watch.key)
        # MariaDB cuts JSON_ARRAYAGG off at group_concat_max_len, and may close the array.
        array = f"JSON_ARRAYAGG({_array(watch.key, kinds(watch), 'q')})"
        whole = f"IF(JSON_VALID({array}), JSON_LENGTH({array}) = COUNT(*), FALSE)"
        select = (
            f"SELECT COUNT(*), IF(COUNT(*) <= {watch.limit}, IF({whole}, {array}, NULL), NULL) "
            "INTO found, rows_found "
            f"FROM (SELECT {columns} {source} LIMIT {watch.limit + 1} LOCK IN SHARE MODE) AS q;"
        )
    else:
        select = (
            "SELECT COUNT(*), NULL INTO found, rows_found "
            f"FROM (SELECT 1 AS one {source} LIMIT 1 LOCK IN SHARE MODE) AS q;"
        )
    return f"{select}\n    SET taken = found > 0;\n    {logs}"
