"""The ways on which foreign keys of MariaDB and MySQL carry a change from one table to another.

In: foreign keys with actions. Out: for a row of one table that is deleted or changed, the chains of
foreign keys by which rows of another one are. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

MOST_WAYS: Final = 8
"""If there are more ways from a row to those that go with it, only their first steps are taken."""


class ForeignKey(NamedTuple):
    """A foreign key of the database that changes the rows of its table by itself."""

    child: str
    columns: tuple[str, ...]
    parent: str
    referred: tuple[str, ...]
    on_delete: str
    on_update: str


class Step(NamedTuple):
    """A foreign key on the way of a cascade, and whether it deletes."""

    key: ForeignKey
    deletes: bool


class Way(NamedTuple):
    """How a change comes from a row of one table to rows of another."""

    steps: tuple[Step, ...]
    known: bool = True
    """Whether the rows at its end are those that change; else: if there are any, any row may."""
    followed: bool = True
    """Whether the rows on it can be found, when it is looked for them."""

    @property
    def deletes(self) -> bool:
        """Whether the rows at its end are deleted."""
        return self.known and self.steps[-1].deletes


def action_flags(on_delete: str, on_update: str) -> int:
    """Return the actions of a foreign key as InnoDB numbers them."""
    return {"CASCADE": 1, "SET NULL": 2}.get(on_delete, 0) | {"CASCADE": 4, "SET NULL": 8}.get(
        on_update, 0
    )


def ways(
    keys: Sequence[ForeignKey],
    parent: str,
    table: str,
    row_key: Collection[str],
    *,
    deleted: bool,
) -> list[Way]:
    """Return the ways by which a change of a row of a table comes to rows of another.

    Where a cycle would go on, a way ends after two rounds: how deep it goes only the rows say.

    :param row_key: the columns by which rows of the other table are known.
    :param deleted: whether the row is deleted, or changed in columns that are referred to. Then the
        others are looked for when they have changed: those that were set to NULL are not found, nor
        is what a row was called whose key has changed.
    """
    found: list[Way] = []

    def follow(steps: tuple[Step, ...], at: str, gone: bool, changed: Collection[str]) -> None:
        for key in keys:
            if key.parent != at or len(found) > MOST_WAYS:
                continue
            acts = _acts(key, deleted=gone, changed=changed if steps else key.referred)
            if acts is None:
                continue
            further = (*steps, Step(key, acts))
            if sum(step.key == key for step in steps) == 2:
                found.append(_way(further, row_key, deleted=deleted, known=False))
                continue
            if key.child == table:
                found.append(_way(further, row_key, deleted=deleted, known=True))
            follow(further, key.child, acts, key.columns)

    follow((), parent, deleted, ())
    if len(found) > MOST_WAYS:
        firsts = dict.fromkeys(way.steps[:1] for way in found)
        firsts.update(
            ((Step(key, deleted),), None)
            for key in keys
            if key.parent == parent
            and _acts(key, deleted=deleted, changed=key.referred) is not None
        )
        found = [_way(first, row_key, deleted=deleted, known=False) for first in firsts]
    return [way for way in found if way.known or _reaches(keys, way, table)]


def _way(steps: tuple[Step, ...], row_key: Collection[str], *, deleted: bool, known: bool) -> Way:
    if deleted:
        return Way(steps, known)
    followed = all(step.key.on_update == "CASCADE" for step in steps)
    same = set(steps[-1].key.columns).isdisjoint(row_key)
    return Way(steps, known and followed and same, followed)


def _acts(key: ForeignKey, *, deleted: bool, changed: Collection[str]) -> bool | None:
    """Return what a foreign key does to its rows: delete (true), change (false), or nothing."""
    if deleted:
        return {"CASCADE": True, "SET NULL": False}.get(key.on_delete)
    acts = key.on_update in ("CASCADE", "SET NULL") and not set(key.referred).isdisjoint(changed)
    return False if acts else None


def _reaches(keys: Sequence[ForeignKey], way: Way, table: str) -> bool:
    """Whether a way that is not followed further could lead to a table."""
    seen, todo = set[str](), [way.steps[-1].key.child]
    while todo:
        at = todo.pop()
        if at == table:
            return True
        if at not in seen:
            seen.add(at)
            todo += [key.child for key in keys if key.parent == at]
    return False
