"""Coverage says which records must be in storage: checked against sets of records."""

import random

import pytest

from sa_tablecache.coverage import Coverage
from sa_tablecache.scores import EVERYTHING, MAX, MIN, NOTHING, Interval, IntervalSet, Key

INDEXES = ("", "by_a", "by_b")
RECORDS = [(key, a, b) for key, (a, b) in enumerate((a, b) for a in range(6) for b in range(6))]


def keys_of(record: tuple[int, int, int]) -> list[tuple[str, Key]]:
    """The keys of a record in each index."""
    key, a, b = record
    return [("", (key,)), ("by_a", (a, key)), ("by_b", (b, key))]


def scores(low: int, high: int) -> IntervalSet:
    """All keys with a score from one number up to another."""
    return IntervalSet([Interval((low, MIN), (high, MIN))])


def inside(index: str, intervals: IntervalSet) -> set[tuple[int, int, int]]:
    """The records of some intervals of an index."""
    return {record for record in RECORDS if dict(keys_of(record))[index] in intervals}


def covered(coverage: Coverage) -> set[tuple[int, int, int]]:
    """The records that have to be in storage."""
    return {record for record in RECORDS if coverage.has(keys_of(record))}


@pytest.mark.parametrize("seed", range(20))
def test_coverage_grows_and_shrinks_index_by_index(seed: int) -> None:
    """A record is covered exactly if its score in at least one index is."""
    chance = random.Random(seed)
    coverage = Coverage()
    known: dict[str, IntervalSet] = dict.fromkeys(INDEXES, NOTHING)
    for _ in range(30):
        index = chance.choice(INDEXES)
        low = chance.randrange(36 if not index else 6)
        wanted = scores(low, low + chance.randrange(4))
        assert inside(index, coverage.missing(index, wanted)) == inside(index, wanted) - inside(
            index, known[index]
        )
        assert coverage.covers(index, wanted) == (not coverage.missing(index, wanted))
        if chance.random() < 0.6:
            coverage = coverage.plus(index, wanted)
            known[index] |= wanted
        else:
            coverage = coverage.minus(index, wanted)
            known[index] -= wanted
        coverage._check()
        assert covered(coverage) == set().union(*(inside(i, known[i]) for i in INDEXES))
        assert all(coverage.of(i) == known[i] for i in INDEXES)


def test_everything_is_everything_in_every_index() -> None:
    """Whichever index was loaded whole, all of them are."""
    for index in INDEXES:
        whole = Coverage({index: EVERYTHING})
        whole._check()
        assert whole.everything
        assert whole == Coverage({"": EVERYTHING})
        assert hash(whole) == hash(Coverage({"": EVERYTHING}))
        assert all(whole.covers(other, EVERYTHING) for other in INDEXES)
        assert whole.plus("by_a", scores(0, 1)) == whole
        assert not whole.missing("by_b", EVERYTHING)
        assert repr(whole) == "everything"


def test_halves_of_one_index_make_everything() -> None:
    """Ranges that together leave no gap are recognised as everything."""
    low, high = IntervalSet([Interval((MIN,), (3, MIN))]), IntervalSet([Interval((3, MIN), (MAX,))])
    assert Coverage({"by_a": low}).plus("by_a", high).everything
    assert not Coverage({"by_a": low}).plus("by_b", high).everything


def test_less_than_everything_is_the_rest_of_one_index() -> None:
    """Evicting a range from a view that is held whole leaves the complement of that range."""
    rest = Coverage({"": EVERYTHING}).minus("by_a", scores(2, 4))
    rest._check()
    assert covered(rest) == {record for record in RECORDS if not 2 <= record[1] < 4}
    assert not rest.covers("by_b", scores(0, 1))


def test_no_coverage_covers_nothing() -> None:
    """Empty intervals are no coverage; of nothing, everything is missing."""
    nothing = Coverage({"by_a": NOTHING})
    assert not nothing
    assert nothing == Coverage()
    assert repr(nothing) == "nothing"
    assert nothing.missing("by_a", EVERYTHING) == EVERYTHING
    assert nothing.covers("by_a", NOTHING)
    assert not covered(nothing)


def test_coverage_is_immutable() -> None:
    """A reader that holds a coverage sees no later change of it."""
    before = Coverage({"by_a": scores(0, 2)})
    copy = Coverage({"by_a": scores(0, 2)})
    before.plus("by_a", scores(4, 5))
    before.minus("by_a", scores(0, 1))
    assert before == copy
    assert before != "by_a"
    assert "by_a" in repr(before)
