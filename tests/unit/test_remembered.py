"""Ranges in the order of their use: checked against a list that is searched from end to end."""

import random

import pytest

from sa_tablecache.coverage import Coverage
from sa_tablecache.remembered import Ranges
from sa_tablecache.scores import MAX, MIN, NOTHING, Interval, IntervalSet


def between(low: float, high: float) -> Interval:
    """Return the interval from one score up to another."""
    return Interval((low, MIN), (high, MIN))


def order(ranges: Ranges) -> list[tuple[str, float, float]]:
    """Return the ranges, the least recently used first."""
    return [(r.index, r.interval.lower[0], r.interval.upper[0]) for r in ranges]


def test_use_brings_a_range_to_the_end() -> None:
    """Every range that an interval touches is the latest; others stay where they were."""
    ranges = Ranges()
    for low in (0, 10, 20, 30):
        ranges.add("a", IntervalSet([between(low, low + 5)]), low)
    ranges.add("b", IntervalSet([between(0, 100)]), 40)
    ranges.use("a", between(12, 22))
    assert order(ranges) == [
        ("a", 0, 5), ("a", 30, 35), ("b", 0, 100), ("a", 10, 15), ("a", 20, 25)
    ]  # fmt: skip
    ranges.use("a", between(5, 10))
    ranges.use("a", Interval((35, MIN), (MAX,)))
    ranges.use("nothing", between(0, 1))
    assert [found.used for found in ranges] == [False, False, False, True, True]
    ranges._check()


def test_age_is_that_of_loading() -> None:
    """The oldest is the one that was loaded first, however it was used."""
    ranges = Ranges()
    assert ranges.oldest() is None
    for low, at in ((0, 5.0), (10, 3.0), (20, 9.0)):
        ranges.add("a", IntervalSet([between(low, low + 5)]), at)
    assert ranges.oldest() == 3.0
    ranges.use("a", between(10, 11))
    assert [found.loaded_at for found in ranges.older(5.0)] == [5.0, 3.0]
    for found in ranges.older(5.0):
        ranges.remove(found)
    assert ranges.oldest() == 9.0
    ranges._check()


@pytest.mark.parametrize("seed", range(20))
def test_random_changes_keep_the_invariants(seed: int) -> None:
    """Whatever is added, used, removed and followed, ranges are those of the coverage."""
    rng = random.Random(seed)
    ranges, coverage = Ranges(), Coverage()
    for now in range(80):
        index = rng.choice("ab")
        low = rng.randrange(40)
        some = IntervalSet([between(low, low + rng.randrange(1, 8))])
        match rng.randrange(4):
            case 0 | 1:
                missing = coverage.missing(index, some)
                coverage = coverage.plus(index, some)
                ranges.add(index, missing, now)
            case 2:
                coverage = coverage.minus(index, some)
                ranges.follow(coverage, now)
            case _:
                for interval in some:
                    ranges.use(index, interval)
                if rng.random() < 0.3 and len(ranges):
                    gone = next(iter(ranges))
                    ranges.remove(gone)
                    coverage = coverage.minus(gone.index, IntervalSet([gone.interval]))
        ranges._check()
        for name in "ab":
            assert ranges.of(name) == coverage.sets.get(name, NOTHING)
        ages = [found.loaded_at for found in ranges]
        assert ranges.oldest() == (min(ages) if ages else None)


def test_following_all_of_a_view() -> None:
    """Where everything is covered there is one range, and none of the indexes has one."""
    ranges = Ranges()
    ranges.add("a", IntervalSet([between(0, 5)]), 0)
    ranges.follow(Coverage({"b": IntervalSet([Interval((MIN,), (MAX,))])}), 1)
    assert [found.index for found in ranges] == [""]
    ranges.follow(Coverage(), 2)
    assert not len(ranges)
    ranges._check()
