"""Positions in the changelog of PostgreSQL: sets of transactions, and tokens that say them."""

from itertools import combinations

import pytest

from sa_tablecache.feed.contract import Change, Relation
from sa_tablecache.feed.postgresql import PostgreSQLChangelog, Snapshot

RELATION = Relation("public", "t")
XIDS = range(3, 8)
SNAPSHOTS = [
    Snapshot("a", xmax, running)
    for xmax in XIDS
    for count in range(3)
    for running in combinations(range(3, xmax), count)
]


def behind(snapshot: Snapshot) -> set[int]:
    """Return the transactions that a snapshot sees, by the definition."""
    return {xid for xid in XIDS if xid < snapshot.xmax and xid not in snapshot.running}


def change(xid: int, incarnation: str = "a") -> Change:
    """Return a change of a transaction."""
    return Change(RELATION, "U", ((1,),), None, (incarnation, xid))


@pytest.mark.parametrize("snapshot", SNAPSHOTS, ids=str)
def test_a_snapshot_sees_what_had_ended_before_it(snapshot: Snapshot) -> None:
    """It sees the transactions below its end that were not running."""
    assert {xid for xid in XIDS if snapshot.sees(change(xid))} == behind(snapshot)


@pytest.mark.parametrize("snapshot", SNAPSHOTS, ids=str)
def test_a_snapshot_includes_those_behind_it(snapshot: Snapshot) -> None:
    """What it includes it sees all of; itself it includes; and only what it sees all of."""
    assert snapshot.includes(snapshot)
    for other in SNAPSHOTS:
        if snapshot.includes(other):
            assert behind(other) <= behind(snapshot)
        elif other.xmax <= snapshot.xmax:
            assert not behind(other) <= behind(snapshot)


def test_incarnations_know_nothing_of_each_other() -> None:
    """After a crash transaction ids may be used again, and no position says anything of them."""
    snapshot = Snapshot("a", 10)
    assert snapshot.sees(change(5)) and snapshot.includes(Snapshot("a", 5))
    assert not snapshot.sees(change(5, "b"))
    assert not snapshot.includes(Snapshot("b", 5))
    unknown = Snapshot("", 10)
    assert not unknown.sees(change(5, ""))
    assert not unknown.includes(unknown)


@pytest.mark.parametrize("snapshot", [*SNAPSHOTS, Snapshot("", 2**63, (3, 2**62))], ids=str)
def test_a_token_says_a_position(snapshot: Snapshot) -> None:
    """A position is read back from its token."""
    assert PostgreSQLChangelog().parse(str(snapshot)) == snapshot


def test_a_token_is_short() -> None:
    """A token fits into a header or a cookie, with hundreds of transactions running as well."""
    busy = Snapshot("0123456789ab", 2**40, tuple(range(2**40 - 400, 2**40, 2)))
    assert len(str(Snapshot("0123456789ab", 2**40, (2**40 - 7,)))) < 30
    assert len(str(busy)) < 1000
    assert not set(str(busy)) & set("\"',; \\")


@pytest.mark.parametrize(
    "token",
    ["", ".", "a.", ".g", "a.10-", "a.10-0", "a.10-11", "a.10-2-2", "a.10-3-2", "x.10", "a.10 ",
     "a.10\n", "a.-1", "a.1-1-1-1", "A.10", "a.11111111111111111", "a.१"],
)  # fmt: skip
def test_what_is_no_token_is_refused(token: str) -> None:
    """A token that no position has written raises ValueError."""
    with pytest.raises(ValueError, match="no position"):
        PostgreSQLChangelog().parse(token)
