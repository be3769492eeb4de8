"""The tables and views whose every answer can be judged, and how answers are read as observations.

Accounts are numbered by ``name``, which stays while the primary key, the score, the owner and the
peer change. An account and its mirror are always written together, with the same version; amounts
are only moved, so that their sum is 0 at any moment.
"""

from collections.abc import Callable, Iterable
from random import Random
from typing import Any, NamedTuple

from sqlalchemy import Connection, ForeignKey, exists, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column, relationship

from sa_tablecache import CachedView, ScoreIndex
from tests.stress.ledger import Entity, Impossible, Ledger, Seen

ACCOUNTS, OWNERS, SCORES = 14, 4, 20
NEW_KEYS = 10_000
"""What is added to the key of an account to give it another one."""


class Base(DeclarativeBase):
    """Models of the stress test, beside those of the zoo."""


class Owner(Base):
    """The optional side of one join, and the preserved side of another."""

    __tablename__ = "stress_owner"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int]


class Account(Base):
    """What is written most."""

    __tablename__ = "stress_account"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[int] = mapped_column(index=True)
    version: Mapped[int]
    score: Mapped[int] = mapped_column(index=True)
    amount: Mapped[int]
    peer: Mapped[int]
    owner_id: Mapped[int | None] = mapped_column(ForeignKey(Owner.id))

    owner: Mapped[Owner | None] = relationship(post_update=True)


class Mirror(Base):
    """The other half of each account."""

    __tablename__ = "stress_mirror"

    id: Mapped[int] = mapped_column(
        ForeignKey(Account.id, ondelete="CASCADE", onupdate="CASCADE"),
        primary_key=True,
        autoincrement=False,
    )
    version: Mapped[int]


class Slow(Base):
    """No view has it: on PostgreSQL its rows make COMMIT take a while."""

    __tablename__ = "stress_slow"

    id: Mapped[int] = mapped_column(primary_key=True)


class Board(CachedView):
    """An inner and an outer join."""

    __select__ = (
        select(
            Account.id,
            Account.name,
            Account.version,
            Account.score,
            Account.amount,
            Account.peer,
            Account.owner_id,
            Mirror.version.label("mirrored"),
            Owner.version.label("owner_version"),
        )
        .join(Mirror, Mirror.id == Account.id)
        .outerjoin(Owner, Owner.id == Account.owner_id)
    )

    by_name = ScoreIndex("name")
    by_score = ScoreIndex("score")
    by_owner = ScoreIndex("owner_id", "score")
    by_amount = ScoreIndex(func.coalesce(Account.amount, 0))


class Household(CachedView):
    """The same from the other side: owners without accounts are NULL-extended."""

    __select__ = select(
        Owner.id,
        Owner.version,
        Account.name,
        Account.version.label("account_version"),
        Account.score,
    ).outerjoin(Account, Account.owner_id == Owner.id)
    __primary_key__ = ("id", "name")

    by_owner = ScoreIndex("id")
    by_score = ScoreIndex("score")


_peer = aliased(Account)


class Peers(CachedView):
    """A self join, by a column that is no foreign key."""

    __select__ = select(
        Account.name,
        Account.version,
        Account.score,
        _peer.name.label("peer"),
        _peer.version.label("peer_version"),
        _peer.score.label("peer_score"),
    ).join(_peer, _peer.name == Account.peer)
    __primary_key__ = ("name",)

    by_name = ScoreIndex("name")
    by_score = ScoreIndex("peer_score", "score")


class Watched(CachedView):
    """A correlated subquery, which is a coarse table."""

    __select__ = select(
        Account.id,
        Account.name,
        Account.version,
        Account.score,
        Account.amount,
        Account.peer,
        Account.owner_id,
    ).where(exists(select(1).where(Mirror.id == Account.id, Mirror.version == Account.version)))

    by_name = ScoreIndex("name")
    by_score = ScoreIndex("score")


class Totals(CachedView):
    """A GROUP BY."""

    __select__ = select(
        Account.owner_id,
        func.count().label("accounts"),
        func.sum(Account.amount).label("amount"),
        func.max(Account.score).label("best"),
    ).group_by(Account.owner_id)

    by_owner = ScoreIndex("owner_id")


VIEWS: tuple[type[Any], ...] = (Board, Household, Peers, Watched, Totals)

RANGES: dict[type[Any], tuple[str, ...]] = {
    Board: ("name", "score"),
    Household: ("id", "score"),
    Peers: ("name",),
    Watched: ("name", "score"),
}
"""The columns that lead an index, to load a part by."""


class AccountState(NamedTuple):
    """What the ledger knows of an account."""

    name: int
    id: int
    score: int
    amount: int
    peer: int
    owner: int | None


SLOW_COMMITS = """
CREATE OR REPLACE FUNCTION stress_sleep() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(0.03 * random()); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER stress_sleep AFTER INSERT ON stress_slow
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION stress_sleep()
"""


def account(name: int) -> Entity:
    """Return the entity of an account."""
    return "account", name


def owner(number: int) -> Entity:
    """Return the entity of an owner."""
    return "owner", number


# -- the database ------------------------------------------------------------------------------


def fill(connection: Connection, rng: Random) -> None:
    """Insert the rows that a run starts with."""
    for number in range(1, OWNERS + 1):
        connection.execute(Owner.__table__.insert().values(id=number, version=1))
    for name in range(1, ACCOUNTS + 1):
        connection.execute(
            Account.__table__.insert().values(
                id=name,
                name=name,
                version=1,
                score=rng.randrange(SCORES),
                amount=0,
                peer=rng.randint(1, ACCOUNTS),
                owner_id=rng.choice([None, *range(1, OWNERS + 1)]),
            )
        )
        connection.execute(Mirror.__table__.insert().values(id=name, version=1))


def committed(connection: Connection, entities: Iterable[Entity]) -> dict[Entity, Any]:
    """Return number and state of entities, as the database has them; the number of a row that is
    not there is None.
    """
    found: dict[Entity, Any] = dict.fromkeys(entities, (None, None))
    for row in connection.execute(select(Account.__table__)):
        if account(row.name) in found:
            state = AccountState(row.name, row.id, row.score, row.amount, row.peer, row.owner_id)
            found[account(row.name)] = (row.version, state)
    for row in connection.execute(select(Owner.__table__)):
        if owner(row.id) in found:
            found[owner(row.id)] = (row.version, ())
    return found


# -- answers -----------------------------------------------------------------------------------

Shown = Callable[[AccountState], bool]
"""Whether an answer would show an account in some state."""


def judge(
    ledger: Ledger,
    began: int,
    view: type[Any],
    records: Iterable[Any],
    shown: Shown,
    *,
    whole: bool = False,
    since: int | None = None,
) -> None:
    """Check the records of a view that are to be those of accounts in certain states.

    :param shown: in which states accounts are among the records that were asked for.
    :param whole: whether all records were asked for.
    :param since: see :meth:`.Ledger.judge`.
    :raises Impossible: if they cannot have been.
    """
    records = list(records)
    if view is Totals:
        if sum(record.amount for record in records):
            raise Impossible(f"torn: the amounts of {records} are not 0 in all")
        return
    if whole and view in (Board, Watched) and sum(record.amount for record in records):
        raise Impossible("torn: the amounts are not 0 in all")
    seen = [pair for record in records for pair in _OBSERVED[view](record)]
    names = {entity for entity, _ in seen}
    unseen: dict[Entity, Any] = {}
    if view is not Peers:
        missing = [entity for entity in ledger.entities("account") if entity not in names]
        unseen = dict.fromkeys(missing, shown)
    if whole and view is Household:
        unseen |= {e: lambda _: True for e in ledger.entities("owner") if e not in names}
    ledger.judge(began, seen, unseen, since=since)


def _of_account(record: Any) -> list[tuple[Entity, Seen]]:
    state = AccountState(
        record.name, record.id, record.score, record.amount, record.peer, record.owner_id
    )
    return [(account(record.name), Seen(record.version, lambda known: known == state))]


def _of_board(record: Any) -> list[tuple[Entity, Seen]]:
    seen = _of_account(record)
    seen.append((account(record.name), Seen(record.mirrored)))
    if record.owner_id is not None:
        seen.append((owner(record.owner_id), Seen(record.owner_version)))
    return seen


def _of_household(record: Any) -> list[tuple[Entity, Seen]]:
    seen = [(owner(record.id), Seen(record.version))]
    if record.name is not None:
        known = record.id, record.score
        agrees = Seen(record.account_version, lambda state: (state.owner, state.score) == known)
        seen.append((account(record.name), agrees))
    return seen


def _of_peers(record: Any) -> list[tuple[Entity, Seen]]:
    peer, score, peer_score = record.peer, record.score, record.peer_score
    return [
        (
            account(record.name),
            Seen(record.version, lambda state: (state.peer, state.score) == (peer, score)),
        ),
        (account(peer), Seen(record.peer_version, lambda state: state.score == peer_score)),
    ]


_OBSERVED: dict[type[Any], Callable[[Any], list[tuple[Entity, Seen]]]] = {
    Board: _of_board,
    Household: _of_household,
    Peers: _of_peers,
    Watched: _of_account,
}
