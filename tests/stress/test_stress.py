"""The stress test in its short form, and the proof that it notices broken rules.

By the hour: ``make stress ARGS='--minutes 60'``.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import URL

from sa_tablecache import changes, freshness, loads, state
from sa_tablecache.feed import consumer, findings
from tests.integration.databases import Database
from tests.stress.actors import Actor
from tests.stress.run import Run

UNTIL_NOTICED = 50
"""Rounds in which a broken rule has to show: the first wrong answer ends them.

When threads take turns is the interpreter's business: Python 3.13 needs more rounds than 3.11.
"""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Killed connections, and refreshes that fail because of them, are in the game."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def database(database_url: URL) -> Database:
    """A database of each kind, with the tables of the zoo."""
    database = Database(database_url)
    database.create()
    return database


@pytest.fixture
def sqlite(sqlite_url: URL) -> Database:
    """The same on SQLite only."""
    database = Database(sqlite_url)
    database.create()
    return database


@pytest.mark.slow
# On SQLite tasks are for `make stress`: one that is cancelled may leave a lock for a long time.
@pytest.mark.parametrize(
    ("database_url", "asynchronous"),
    [("sqlite", False), ("postgresql", False), ("postgresql", True)],
    ids=["sqlite-threads", "postgresql-threads", "postgresql-tasks"],
    indirect=["database_url"],
)
# What is killed or cancelled may leave a connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_no_answer_is_wrong(database: Database, asynchronous: bool) -> None:
    """Whatever is written, moved, killed and cancelled at once, every answer is possible."""
    run = Run(database, seed=11, asynchronous=asynchronous)
    run.rounds(range(4))
    assert run.counts["rounds"] == 4
    assert run.counts["transactions"] > 50
    assert run.counts["hit"] > 100, "the cache was of use"


# What is killed may leave a connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_no_answer_is_wrong_with_a_change_feed(database: Database) -> None:
    """Whatever others write beside the cache, what it answers is not older than it says, and whole.

    Others are an engine that it does not watch, and a second process.
    """
    run = Run(database, seed=17, feed=True, actors=3, steps=20)
    run.rounds(range(1))
    assert run.counts["rounds"] == 1
    assert run.counts["transactions"] > 5
    assert run.counts["hit"] > 10, "the cache was of use"


def _loses_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polls forget what they have found."""
    monkeypatch.setattr(findings.Findings, "news", lambda _self: ())


def _reads_more_than_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads and refreshes read in snapshots in which nobody has polled."""
    monkeypatch.setattr(loads.Loads, "_opened", lambda self, _reader: self._snapshots.open())


def _trusts_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll is good for longer than was said, whoever reads."""
    reason = consumer.Consumer.reason

    def patient(self: Any, view: Any, *, bound: float | None = None, fetch: bool = True) -> Any:
        return reason(self, view, bound=10.0, fetch=fetch)

    monkeypatch.setattr(consumer.Consumer, "reason", patient)


@pytest.mark.parametrize(
    "mutation",
    [
        _loses_changes,
        pytest.param(_reads_more_than_was_told, marks=pytest.mark.slow),
        _trusts_for_too_long,
    ],
)
def test_a_broken_rule_of_change_feeds_is_noticed(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, mutation: Callable[..., None]
) -> None:
    """Without a rule by which caches follow others, some answer of a few rounds is wrong."""
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        Run(sqlite, seed=1, feed=True).rounds(range(UNTIL_NOTICED))


def _clears_all_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refresh forgets marks that came while it read."""

    def apply(self: Any, token: int, cleared: Any, reader: object = None) -> None:
        if cleared:
            self.forget()

    monkeypatch.setattr(freshness.Freshness, "apply", apply)


def _marks_the_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in the keys of changed rows are off by one."""
    add_rows = changes.ChangeSet.add_rows

    def off_by_one(self: Any, name: Any, keys: Any, *arguments: Any) -> None:
        wrong = [tuple(part + 1 if isinstance(part, int) else part for part in k) for k in keys]
        add_rows(self, name, wrong, *arguments)

    monkeypatch.setattr(changes.ChangeSet, "add_rows", off_by_one)


def _takes_moves_for_changes_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that come, go and move are marked as if they stayed where they are."""
    marks_of = state.marks_of

    def in_place(*arguments: Any, **options: Any) -> Any:
        marks = marks_of(*arguments, **options)
        return frozenset(m._replace(moves=False) if _is_of_a_row(m) else m for m in marks)

    def _is_of_a_row(mark: Any) -> bool:
        return isinstance(mark, changes.Mark) and mark != changes.VIEW

    monkeypatch.setattr(state, "marks_of", in_place)


@pytest.mark.parametrize(
    "mutation", [_clears_all_marks, _marks_the_wrong_rows, _takes_moves_for_changes_in_place]
)
def test_a_broken_rule_is_noticed(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, mutation: Callable[..., None]
) -> None:
    """Without a rule of the protocol some answer of a few rounds is wrong, and the report says
    how to see it again.
    """
    mutation(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        Run(sqlite, seed=1).rounds(range(UNTIL_NOTICED))
    notes = "\n".join(caught.value.__notes__)
    assert "seed 1, round" in notes
    assert "actor 5:" in notes


def test_a_round_is_replayable(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor does the same again: seed and round decide on all operations."""
    logs: list[list[str]] = []
    take = Actor.run

    def run(self: Actor, steps: int) -> None:
        take(self, steps)
        logs.append([*self.log, *self.writer.log])

    monkeypatch.setattr(Actor, "run", run)
    for first in (3, 4, 3):
        Run(sqlite, seed=5, actors=1, steps=20).rounds(range(first, first + 1))
    assert logs[0] == logs[2] != logs[1]
