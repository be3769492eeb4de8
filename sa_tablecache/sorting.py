"""Sorting many records in short steps.

In: records, and what gives the key of each. Out: the same in order, as ``list.sort`` would give
them. ``list.sort`` of 300,000 records is one call that no other thread and no other task gets to
interrupt, for a good part of a second. Here no call looks at more than some thousand records, and
whoever sorts may let others have a turn between them.

Where values repeat, as most scores do, records are put into one bucket for each value, and only the
values are compared; that takes a fraction of the time. The buckets of one score after the other,
the last one first, sort by all of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from operator import is_
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Get: TypeAlias = Callable[[Any], Any]
Pause: TypeAlias = Callable[[], object]
"""Called between two steps of what takes long: others may have a turn."""

STEP = 4_096
"""Records in one step: sorting them takes some milliseconds."""

SAMPLE = 64
"""Of so many sorted records one is looked at to find out where steps of a merge begin."""


def no_pause() -> None:
    """Go on at once."""


def steps(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the items, so many at a time."""
    return (items[at : at + STEP] for at in range(0, len(items), STEP))


def itself(value: Any) -> Any:
    """Return what is its own key."""
    return value


def joined(lists: Iterable[Sequence[Any]], pause: Pause) -> list[Any]:
    """Return one list of the items of all."""
    result: list[Any] = []
    for each in lists:
        result += each
        pause()
    return result


def ids(records: Sequence[Any], pause: Pause) -> set[int]:
    """Return the ids of records."""
    found: set[int] = set()
    for some in steps(records):
        found.update(map(id, some))
        pause()
    return found


def along(
    others: Sequence[Any], items: Sequence[Any], sorted_: Sequence[Any], pause: Pause
) -> list[Any]:
    """Return what runs beside items as it runs beside the same items in another order."""
    # Not ==, which would compare the values of records, where they are not the very same.
    if all(all(map(is_, a, b)) for a, b in zip(steps(items), steps(sorted_), strict=True)):
        return list(others)
    other_of: dict[int, Any] = {}
    for some, beside in zip(steps(items), steps(others), strict=True):
        other_of.update(zip(map(id, some), beside, strict=True))
        pause()
    return joined((list(map(other_of.__getitem__, map(id, s))) for s in steps(sorted_)), pause)


def sort_by_scores(items: list[T], scores: Sequence[Get], get: Get | None, pause: Pause) -> list[T]:
    """Return items sorted by scores; those with equal ones stay in the order in which they are.

    :param scores: what gives each score of an item, most significant first.
    :param get: what gives all of them at once; ``None`` if items sort by themselves.
    """
    result = items
    for score in reversed(scores):
        sorted_ = _by_value(result, score, pause)
        if sorted_ is None:
            return sort(items, get, pause)
        result = sorted_
    return result


def sort_by_values(items: list[T], values: list[Any], pause: Pause) -> tuple[list[T], list[Any]]:
    """Return items sorted by the values beside them, and the values; the sort is stable.

    Equal values become one.
    """
    buckets: defaultdict[Any, list[T]] = defaultdict(list)
    seen = 0
    for some, beside in zip(steps(items), steps(values), strict=True):
        for item, value in zip(some, beside, strict=True):
            buckets[value].append(item)
        seen += len(some)
        if len(buckets) * 2 > seen:
            break
        pause()
    else:
        found: list[T] = []
        scores: list[Any] = []
        for value in sort(list(buckets), None, pause):
            bucket = buckets.pop(value)
            found += bucket
            scores += [value] * len(bucket)
            pause()
        return found, scores
    at = sort(joined(steps(range(len(items))), pause), values.__getitem__, pause)
    gathered = ([[each[i] for i in some] for some in steps(at)] for each in (items, values))
    left, right = (joined(lists, pause) for lists in gathered)
    return left, right


def _by_value(items: list[T], get: Get, pause: Pause) -> list[T] | None:
    """Return items sorted by a value with buckets; ``None`` if there would be too many of them."""
    buckets: defaultdict[Any, list[T]] = defaultdict(list)
    seen = 0
    for some in steps(items):
        try:
            for item in some:
                buckets[get(item)].append(item)
        except TypeError:  # it cannot be hashed
            return None
        seen += len(some)
        if len(buckets) * 2 > seen:
            return None
        pause()
    result: list[T] = []
    for value in sort(list(buckets), None, pause):
        result += buckets.pop(value)
        pause()
    return result


def sort(items: list[Any], get: Get | None, pause: Pause) -> list[Any]:
    """Return items sorted by a key, or by themselves; the sort is stable."""
    if len(items) <= STEP:
        return sorted(items, key=get)
    runs: list[list[Any]] = []
    for some in steps(items):
        runs.append(sorted(some, key=get))
        pause()
    key = get or itself
    if not any(key(right[0]) < key(left[-1]) for left, right in pairwise(runs)):
        return joined(runs, pause)
    return _merged(runs, get, pause)


def _merged(runs: list[list[T]], get: Get | None, pause: Pause) -> list[T]:
    """Merge sorted runs, from one value to another at a time, about a step each."""
    key = get or itself
    samples = [key(run[at]) for run in runs for at in range(SAMPLE - 1, len(run), SAMPLE)]
    each = STEP // SAMPLE
    begins = [0] * len(runs)
    result: list[T] = []
    for splitter in (*sort(samples, None, pause)[each::each], None):
        piece: list[T] = []
        for number, run in enumerate(runs):
            begin = begins[number]
            if splitter is None:
                piece += run[begin:]
            else:
                begins[number] = bisect_left(run, splitter, begin, key=get)
                piece += run[begin : begins[number]]
        # They are sorted pieces one after another, which is what the sort of Python merges best.
        piece.sort(key=get)
        result += piece
        pause()
    return result
