"""Positions of the changelog of MariaDB and MySQL, against the sets of ids that they stand for."""

from hypothesis import given
from hypothesis import strategies as st

from sa_tablecache.feed.contract import Change, Relation
from sa_tablecache.feed.mysql_positions import MySQLPosition, between, overlaps, without

IDS = st.sets(st.integers(1, 40))


def position(ids: set[int], era: str = "ab-cd") -> MySQLPosition:
    """Return the position of one who has seen some ids."""
    return MySQLPosition(era, max(ids, default=0), tuple(between(0, sorted(ids))))


def seen(position: MySQLPosition) -> set[int]:
    """Return the ids that a position has seen."""
    lacking = {n for low, high in position.gaps for n in range(low, high + 1)}
    return set(range(1, position.last + 1)) - lacking


def change(numbers: list[int] | range, era: str = "ab-cd") -> Change:
    """Return a change with some ids."""
    return Change(Relation("", "t"), "U", None, None, (era, numbers))


@given(IDS)
def test_a_position_is_a_set_of_ids(ids: set[int]) -> None:
    """The last id and the gaps say which ids were seen, also as a token."""
    assert seen(position(ids)) == ids
    token = str(position(ids))
    assert MySQLPosition.parse(token) == position(ids)
    assert token.isascii()
    assert not set(token) & set("'\",; ")
    floor = position(ids).floor
    assert set(range(1, floor + 1)) <= ids
    assert floor + 1 not in ids


@given(IDS, IDS)
def test_a_position_includes_another(mine: set[int], other: set[int]) -> None:
    """It does if all that was seen there was seen here, in the same era."""
    assert position(mine).includes(position(other)) is (other <= mine)
    assert not position(mine).includes(position(other, "ab-ce"))


@given(IDS, st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True))
def test_a_position_sees_a_change(ids: set[int], numbers: list[int]) -> None:
    """It does if all of its entries were seen; of a span all that are in it count."""
    numbers = sorted(numbers)
    assert position(ids).sees(change(numbers)) is (set(numbers) <= ids)
    span = range(numbers[0], numbers[-1] + 1)
    assert position(ids).sees(change(span)) is (set(span) <= ids)
    assert not position(ids).sees(change(numbers, "ab-ce"))


@given(IDS, IDS)
def test_gaps_close(ids: set[int], more: set[int]) -> None:
    """Gaps without what was seen in them are the gaps of both."""
    before = position(ids)
    new = sorted(n for n in more if n not in ids and n <= before.last)
    after = without(before.gaps, new)
    assert after == position(ids | set(new)).gaps
    assert before.having_seen(more) == position(ids | more)
    for number in range(1, 42):
        assert overlaps(after, number, number) is (
            number <= before.last and number not in ids | set(new)
        )


@given(IDS, st.integers(0, 45))
def test_beyond_what_was_trimmed(ids: set[int], trimmed: int) -> None:
    """All that was trimmed counts as seen."""
    assert position(ids).beyond(trimmed) == position(ids | set(range(1, trimmed + 1)))
