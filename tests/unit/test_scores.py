"""Intervals of scores are an algebra of sets: checked against sets of keys, one by one.

Cuts are made at small integers, and the keys that stand for all others lie on and between them, so
that two interval sets are the same exactly if they hold the same keys.
"""

import copy
import pickle
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_tablecache.scores import (
    EVERYTHING,
    MAX,
    MIN,
    NOTHING,
    NULLS_FIRST,
    NULLS_LAST,
    Cut,
    Interval,
    IntervalSet,
    Key,
)

SCORES = range(3)
PLACES = [-0.5, *(place for score in SCORES for place in (score, score + 0.5))]
KEYS: list[Key] = list(product(PLACES, PLACES))

scores = st.sampled_from(SCORES)
prefixes = st.one_of(st.tuples(), st.tuples(scores), st.tuples(scores, scores))
cuts = st.builds(lambda prefix, side: (*prefix, side), prefixes, st.sampled_from([MIN, MAX]))
intervals = st.builds(Interval, cuts, cuts)
interval_sets = st.lists(intervals, max_size=4).map(IntervalSet)


def is_after(key: Key, cut: Cut) -> bool:
    """Whether a key comes after a cut, said without comparing the two."""
    prefix = cut[:-1]
    start = key[: len(prefix)]
    return start > prefix or (start == prefix and cut[-1] is MIN)


def keys_of(interval: Interval) -> set[Key]:
    """The keys of an interval, by its definition."""
    return {k for k in KEYS if is_after(k, interval.lower) and not is_after(k, interval.upper)}


def members(intervals: IntervalSet) -> set[Key]:
    """The keys that an interval set says it holds."""
    return {key for key in KEYS if key in intervals}


@given(intervals)
def test_an_interval_holds_the_keys_between_its_cuts(interval: Interval) -> None:
    """A cut stands just before or just after all keys that start with its prefix."""
    assert {key for key in KEYS if key in interval} == keys_of(interval)
    assert (interval.lower < interval.upper) == bool(keys_of(interval))


@given(st.lists(intervals, max_size=5))
def test_a_set_is_the_union_of_its_intervals(given: list[Interval]) -> None:
    """Intervals may be given in any order, overlap, touch, or be empty."""
    made = IntervalSet(given)
    made._check()
    assert members(made) == set().union(*map(keys_of, given))


@given(interval_sets, interval_sets)
def test_the_operations_are_those_of_sets(a: IntervalSet, b: IntervalSet) -> None:
    """Union, intersection, difference and complement do to intervals what they do to keys."""
    for result, wanted in (
        (a | b, members(a) | members(b)),
        (a & b, members(a) & members(b)),
        (a - b, members(a) - members(b)),
        (~a, set(KEYS) - members(a)),
    ):
        result._check()
        assert members(result) == wanted


many_intervals = st.sets(st.integers(0, 60), min_size=20, max_size=40).map(
    lambda starts: IntervalSet(
        Interval((start, start % 3, MIN), (start + start % 2, MIN if start % 2 else MAX))
        for start in starts
    )
)
few_intervals = st.lists(
    st.builds(
        lambda a, b, sides: Interval((min(a, b), sides[0]), (max(a, b), sides[1])),
        st.integers(0, 60),
        st.integers(0, 60),
        st.tuples(st.sampled_from([MIN, MAX]), st.sampled_from([MIN, MAX])),
    ),
    max_size=2,
).map(IntervalSet)


@given(many_intervals, few_intervals)
def test_a_small_set_is_worked_into_a_large_one(large: IntervalSet, small: IntervalSet) -> None:
    """The operations that go by the smaller set give what going through both gives."""
    keys = [(a, b) for a in range(-1, 63) for b in (-1, 0, 0.5, 1, 1.5, 2, 3)]
    inside = {key for key in keys if key in large}
    chosen = {key for key in keys if key in small}
    for result, wanted in (
        (large | small, inside | chosen),
        (small | large, inside | chosen),
        (large & small, inside & chosen),
        (large - small, inside - chosen),
        (small - large, chosen - inside),
    ):
        result._check()
        assert {key for key in keys if key in result} == wanted
    assert large | small == IntervalSet(large.intervals + small.intervals)
    assert large - small == large & ~small
    assert small - large == small & ~large


def test_a_set_of_many_intervals_shows_some() -> None:
    """Messages stay short however many ranges are covered."""
    many = IntervalSet(Interval((n, MIN), (n, MAX)) for n in range(1000))
    assert repr(many).endswith("and 990 more}")
    assert len(repr(many)) < 500


@given(interval_sets, interval_sets)
def test_equal_keys_are_equal_sets(a: IntervalSet, b: IntervalSet) -> None:
    """There is one way to write a set: what holds the same keys is equal and hashes equal."""
    assert (a == b) == (members(a) == members(b))
    assert ~~a == a
    assert hash(~~a) == hash(a)
    assert (a | b) == (b | a)
    assert ~(a | b) == (~a & ~b)


@given(interval_sets, interval_sets, intervals)
def test_covering_is_holding_every_key(a: IntervalSet, b: IntervalSet, one: Interval) -> None:
    """A set covers an interval, or another set, if no key of it is missing."""
    assert a.covers(one) == (keys_of(one) <= members(a))
    assert (a >= b) == (members(b) <= members(a))
    assert a >= (a & b)
    assert (a | b) >= b


@given(interval_sets)
def test_emptiness_and_fullness_show(a: IntervalSet) -> None:
    """A set is false if it is empty, and knows whether it is everything."""
    assert bool(a) == bool(members(a))
    assert a.is_everything == (len(members(a)) == len(KEYS))
    assert len(a) == len(list(a))


def test_everything_and_nothing_are_opposites() -> None:
    """The complement of everything is nothing, and the other way round."""
    assert ~EVERYTHING == NOTHING
    assert ~NOTHING == EVERYTHING
    assert EVERYTHING.is_everything
    assert not NOTHING.is_everything
    assert NOTHING != "nothing"


def test_intervals_that_touch_become_one() -> None:
    """``[0, 1)`` and ``[1, 2)`` are ``[0, 2)``; a single missing score keeps intervals apart."""
    touching = IntervalSet([Interval((1, MIN), (2, MIN)), Interval((0, MIN), (1, MIN))])
    assert touching.intervals == (Interval((0, MIN), (2, MIN)),)
    apart = EVERYTHING - IntervalSet([Interval((1, MIN), (1, MAX))])
    assert len(apart) == 2
    assert (1, 7) not in apart
    assert (1.1, 7) in apart


@pytest.mark.parametrize("value", [-(10**30), 0, 1.5, float("inf"), "", "z", b"\xff"])
def test_extremes_compare_with_values_of_every_type(value: object) -> None:
    """MIN and a NULL that sorts first are less than any value; a NULL that sorts last is more."""
    order = [MIN, NULLS_FIRST, value, NULLS_LAST, MAX]
    for low, high in combinations(order, 2):
        assert low < high
        assert high > low
        assert low <= high
        assert high >= low
        assert not high < low
        assert not high <= low
    for extreme in (MIN, NULLS_FIRST, NULLS_LAST, MAX):
        assert extreme <= extreme  # noqa: PLR0124
        assert not extreme < extreme  # noqa: PLR0124


@pytest.mark.parametrize("extreme", [MIN, NULLS_FIRST, NULLS_LAST, MAX])
def test_there_is_one_of_each_extreme(extreme: object) -> None:
    """Copies and pickles of an extreme are the extreme itself, so that ``is`` may be used."""
    assert pickle.loads(pickle.dumps(extreme)) is extreme
    assert copy.deepcopy(extreme) is extreme


def test_keys_with_null_lie_inside_everything() -> None:
    """NULL is a place like any other: before all values, or after them."""
    assert (NULLS_FIRST, 1) in EVERYTHING
    assert (NULLS_LAST, 1) in EVERYTHING
    upwards = IntervalSet([Interval((0, MIN), (MAX,))])
    assert (NULLS_FIRST, 1) not in upwards
    assert (NULLS_LAST, 1) in upwards


def test_what_is_no_set_of_disjoint_intervals_fails_its_check() -> None:
    """The check finds empty intervals, touching ones, and bounds that are no cuts."""
    good = Interval((0, MIN), (1, MIN))
    for bad in (
        (Interval((1, MIN), (0, MIN)),),
        (good, Interval((1, MIN), (2, MIN))),
        (Interval((0, 0), (1, MIN)),),
    ):
        broken = IntervalSet()
        broken.intervals = bad
        broken._lowers = [interval.lower for interval in bad]
        with pytest.raises(AssertionError):
            broken._check()


def test_intervals_read_like_ranges() -> None:
    """What people see of intervals in logs and explanations are scores, not internals."""
    assert repr(EVERYTHING) == "{[-inf .. +inf)}"
    assert repr(IntervalSet([Interval((1, MIN), (2, MAX))])) == "{[1 .. after 2)}"
    assert repr(Interval((NULLS_LAST, MIN), (MAX,))) == "[NULL .. +inf)"
