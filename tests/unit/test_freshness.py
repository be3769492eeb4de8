"""From when marks and leases count."""

from random import Random
from typing import Any

import pytest

from sa_tablecache import freshness as module
from sa_tablecache.changes import VIEW, Mark, Marks
from sa_tablecache.freshness import Freshness

T = (None, "t")
ONE, TWO, THREE = (Mark(T, (number,)) for number in (1, 2, 3))


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which marks age."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def marks(*some: Mark) -> Marks:
    """Return a set of marks."""
    return frozenset(some)


def test_a_mark_counts_from_its_first_change(clock: Clock) -> None:
    """A row that is written again is stale since it was written first."""
    fresh = Freshness()
    assert fresh.age is None
    fresh.mark(marks(ONE))
    clock.now = 5
    fresh.mark(marks(ONE, TWO))
    clock.now = 7
    assert fresh.age == 7
    assert [fresh.since(m) for m in (ONE, TWO, THREE)] == [0, 5, None]


def test_what_a_refresh_has_read_does_not_count(clock: Clock) -> None:
    """After a refresh the oldest mark is the oldest of those that came meanwhile."""
    fresh = Freshness()
    fresh.mark(marks(ONE))
    clock.now = 5
    token, noted = fresh.begin(), dict(fresh.pending)
    clock.now = 6
    fresh.mark(marks(TWO))
    clock.now = 8
    fresh.mark(marks(THREE))
    fresh.apply(token, noted)
    fresh.end(token)
    fresh._check()
    assert fresh.oldest == 6
    fresh.forget()
    assert fresh.age is None


def test_a_mark_that_comes_during_a_refresh_keeps_its_age(clock: Clock) -> None:
    """What a refresh may have missed is as old as it was, whoever cleared it in between."""
    fresh = Freshness()
    load = fresh.begin()
    clock.now = 3
    fresh.mark(marks(ONE))
    clock.now = 4
    refresh, noted = fresh.begin(), dict(fresh.pending)
    clock.now = 5
    fresh.apply(refresh, noted)
    fresh.end(refresh)
    assert fresh.age is None
    clock.now = 9
    fresh.apply(load, {})
    fresh.end(load)
    fresh._check()
    assert fresh.since(ONE) == 0, "it was made after the load began, and nobody knows when"
    token, noted = fresh.begin(), dict(fresh.pending)
    fresh.mark(marks(ONE))
    fresh.apply(token, noted)
    assert fresh.since(ONE) == 0


def test_a_mark_counts_from_the_lease_of_its_commit(clock: Clock) -> None:
    """Others may have seen what it changed since then; a coarser mark is as old as any lease."""
    fresh = Freshness()
    fresh.lease(marks(ONE))
    clock.now = 4
    assert fresh.age == 4
    fresh.lease(marks(TWO))
    fresh.mark(marks(TWO))
    fresh.release(marks(TWO))
    assert fresh.since(TWO) == 0, "nobody knows here which of the two commits it is of"
    fresh.mark(marks(VIEW))
    fresh.release(marks(ONE))
    assert fresh.since(VIEW) == 0
    clock.now = 6
    fresh.mark(marks(ONE))
    assert fresh.since(ONE) == 6
    fresh._check()


def test_too_many_marks_are_as_old_as_the_oldest(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark of the whole view that takes the place of many counts from the first of them."""
    monkeypatch.setattr(module, "MOST_PENDING", 2)
    fresh = Freshness()
    fresh.mark(marks(ONE))
    clock.now = 3
    fresh.mark(marks(TWO, THREE))
    assert list(fresh.pending) == [VIEW]
    assert fresh.age == 3
    fresh._check()


@pytest.mark.parametrize("seed", range(20))
def test_the_age_is_never_too_small(clock: Clock, seed: int) -> None:
    """Whatever happens in which order, no pending mark is younger than its first change."""
    rng = Random(seed)
    fresh = Freshness()
    first: dict[Any, float] = {}
    underway: list[tuple[int, dict[Any, int]]] = []
    leased: list[tuple[Marks, float]] = []
    for _ in range(300):
        clock.now += rng.random()
        some = marks(*rng.sample([ONE, TWO, THREE, VIEW], rng.randint(1, 2)))
        match rng.choice(["mark", "lease", "publish", "begin", "apply"]):
            case "mark":
                fresh.mark(some)
                for m in some:
                    first.setdefault(m, clock.now)
            case "lease":
                fresh.lease(some)
                leased.append((some, clock.now))
            case "publish" if leased:
                wanted, since = leased.pop(rng.randrange(len(leased)))
                made = wanted if rng.random() < 0.7 else marks(VIEW)
                fresh.mark(made)
                fresh.release(wanted)
                for m in made:
                    first[m] = min(first.get(m, since), since)
            case "begin":
                underway.append((fresh.begin(), dict(fresh.pending)))
            case "apply" if underway:
                token, noted = underway.pop(rng.randrange(len(underway)))
                cleared = {m for m, at in noted.items() if fresh.pending.get(m) == at}
                fresh.apply(token, noted)
                fresh.end(token)
                for m in cleared - fresh.pending.keys():
                    del first[m]
                for m in fresh.pending:
                    first.setdefault(m, clock.now)
        fresh._check()
        for m in fresh.pending:
            since_mark = fresh.since(m)
            assert since_mark is not None
            assert since_mark <= first[m]
        oldest = [*first.values(), *(since for _, since in leased)]
        assert (fresh.age or 0) >= (clock.now - min(oldest) if oldest else 0) - 1e-9
