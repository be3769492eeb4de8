"""The judge of the stress test: which answers it calls impossible, and why."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.stress.ledger import Entity, Impossible, Ledger, Seen, Transaction

A: Entity = ("account", 1)
B: Entity = ("account", 2)


def ledger() -> Ledger:
    """Return a ledger of two entities in version 1, whose state is a letter."""
    return Ledger({A: (1, "a"), B: (1, "b")})


def commit(known: Ledger, states: Mapping[Entity, Any]) -> Transaction:
    """Commit a transaction, and be told of it."""
    transaction = known.begin(states)
    known.commits(transaction)
    known.acknowledge(transaction)
    return transaction


def judge(
    known: Ledger, began: int, seen: dict[Entity, int], unseen: Mapping[Entity, Any] | None = None
) -> None:
    """Judge an answer that shows these numbers."""
    observed = [(entity, Seen(number)) for entity, number in seen.items()]
    known.judge(began, observed, unseen or {})


def test_what_the_database_may_have_said_is_possible() -> None:
    """Before COMMIT has returned an answer shows all of the transaction or nothing."""
    known = ledger()
    transaction = known.begin({A: "x", B: "y"})
    known.commits(transaction)
    judge(known, known.now(), {A: 1, B: 1})
    judge(known, known.now(), {A: 2, B: 2})
    known.acknowledge(transaction)
    judge(known, known.now(), {A: 2, B: 2})


def _rolled_back(known: Ledger) -> None:
    transaction = known.begin({A: "x"})
    known.abandon(transaction)
    judge(known, known.now(), {A: 2})


def _not_committed_yet(known: Ledger) -> None:
    known.begin({A: "x"})
    judge(known, known.now(), {A: 2})


def _never_written(known: Ledger) -> None:
    judge(known, known.now(), {A: -1})


def _old(known: Ledger) -> None:
    commit(known, {A: "x"})
    judge(known, known.now(), {A: 1})


def _seen_before(known: Ledger) -> None:
    known.commits(known.begin({A: "x"}))
    judge(known, known.now(), {A: 2})
    judge(known, known.now(), {A: 1})


def _half(known: Ledger) -> None:
    known.commits(known.begin({A: "x", B: "y"}))
    judge(known, known.now(), {A: 2, B: 1})


def _twice(known: Ledger) -> None:
    known.commits(known.begin({A: "x"}))
    known.judge(known.now(), [(A, Seen(1)), (A, Seen(2))], {})


def _out_of_turn(known: Ledger) -> None:
    began = known.now()
    commit(known, {A: "x"})
    commit(known, {B: "y"})
    judge(known, began, {A: 1, B: 2})


def _other_values(known: Ledger) -> None:
    known.judge(known.now(), [(A, Seen(1, lambda state: state == "z"))], {})


def _deleted(known: Ledger) -> None:
    commit(known, {A: None})
    judge(known, known.now(), {A: 2})


def _left_out(known: Ledger) -> None:
    judge(known, known.now(), {B: 1}, {A: lambda state: state == "a"})


def _half_deleted(known: Ledger) -> None:
    began = known.now()
    commit(known, {A: None, B: "y"})
    judge(known, began, {B: 1}, {A: lambda _: True})


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (_rolled_back, "dirty"),
        (_not_committed_yet, "dirty"),
        (_never_written, "dirty"),
        (_old, "stale"),
        (_seen_before, "stale"),
        (_half, "torn"),
        (_twice, "torn"),
        (_out_of_turn, "torn"),
        (_half_deleted, "torn"),
        (_other_values, "mixed"),
        (_deleted, "mixed"),
        (_left_out, "missing"),
    ],
)
def test_what_it_cannot_have_said_is_not(wrong: Callable[[Ledger], None], why: str) -> None:
    """Answers that no state of the database explains are refused, for the right reason."""
    with pytest.raises(Impossible, match=why):
        wrong(ledger())
