"""The primary key of a view, by functional dependencies.

In: the select of a view, and what its FROM clause says of what determines what. Out: the names of
the view's columns that tell its rows apart; where none do, the user is asked for them.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.sql.selectable import CompoundSelect

from .expressions import Expressions
from .joins import Joins, LeafColumn, closure


def derived_key(
    select: Expressions, joins: Joins, visible: Mapping[LeafColumn, str]
) -> tuple[str, ...]:
    """Return the smallest set of visible columns, by greedy removal, that identifies a row."""
    statement = select.view.__statement__
    if isinstance(statement, CompoundSelect):
        if statement.keyword.name.endswith("ALL"):
            raise select.refuse(
                f"{statement.keyword.value} can give the same row twice, so it has no key",
                "use a set operation that removes duplicates, or name the key with __primary_key__",
            )
        return tuple(select.names)
    if select.statement._distinct:
        return tuple(select.names)
    if select.statement._group_by_clauses:
        return _grouping_key(select)
    if not joins.leaves or any(r.endswith("in FROM") for r in select.reasons):
        raise select.refuse(
            "no primary key can be derived from a subquery in FROM",
            "name the columns that identify a row with __primary_key__",
        )
    if any(j.full for j, _, _ in joins.joins) or any(not o.key for o in joins.leaves):
        raise select.refuse(
            "no primary key can be derived over a FULL JOIN or a table without primary key",
            "name the columns that identify a row with __primary_key__",
        )
    wanted = {LeafColumn(o.number, key) for o in joins.leaves for key in o.key}
    candidates = list(visible)
    if not wanted <= closure(candidates, joins.dependencies):
        key = sorted(wanted)
        for column in sorted(wanted, reverse=True):
            rest = [c for c in key if c != column]
            if wanted <= closure(rest, joins.dependencies):
                key = rest
        missing = ", ".join(
            f"{joins.leaves[c.leaf].name}.{c.name}" for c in key if c not in visible
        )
        raise select.refuse(
            f"no primary key can be derived from the selected columns: {missing} is missing",
            "add it to the select, or name the columns that identify a row with __primary_key__",
        )
    position = {name: at for at, name in enumerate(select.names)}
    for column in sorted(
        candidates,
        key=lambda c: (c not in wanted, c.leaf, position[visible[c]]),
        reverse=True,
    ):
        rest = [c for c in candidates if c != column]
        if wanted <= closure(rest, joins.dependencies):
            candidates = rest
    names = tuple(sorted((visible[c] for c in candidates), key=position.__getitem__))
    return names or (select.names[0],)  # of a view of one row at most, any column is a key


def _grouping_key(select: Expressions) -> tuple[str, ...]:
    key: list[str] = []
    elements = {
        name: label.element
        for name, label in zip(select.names, select.statement._raw_columns, strict=True)
    }
    for clause in select.statement._group_by_clauses:
        plain = clause._deannotate()
        for name, element in elements.items():
            if element is plain or element._deannotate().compare(plain):
                key.append(name)
                break
        else:
            raise select.refuse(
                f"GROUP BY {clause} is not among the selected columns, so no primary key "
                "can be derived",
                "select it, or name the columns that identify a row with __primary_key__",
            )
    return tuple(dict.fromkeys(key))
