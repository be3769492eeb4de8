"""Positions in the changelog of MariaDB and MySQL: the last id that was seen, and the gaps before.

Pure. A gap is a range of ids of which no entry could be seen.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from .contract import Change, Position

Gaps = tuple[tuple[int, int], ...]
"""First and last ids, in order."""

_TOKEN: Final = re.compile(
    r"(?P<era>[0-9a-f]+-[0-9a-f]+)\.(?P<last>[0-9a-z]{1,13})"
    r"(?P<gaps>(_[0-9a-z]{1,13}(-[0-9a-z]{1,13})?)*)"
)
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class MySQLPosition(Position):
    """The last entry that was visible, and the ids before it of which no entry was."""

    era: str
    """The incarnation of the changelog, and the server; in another one ids may begin anew."""
    last: int
    gaps: Gaps = ()
    primary: bool = field(default=False, compare=False)
    """Whether it is known that the server is no replica."""

    @classmethod
    def parse(cls, token: str) -> MySQLPosition:
        """Return the position that a token says.

        :raises ValueError: if it is none.
        """
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(f"{token!r} is no position of a changelog of MySQL")
        gaps, before = [], 0
        for part in match["gaps"].split("_")[1:]:
            distance, _, length = part.partition("-")
            low = before + int(distance, 36)
            before = low + int(length or "0", 36)
            gaps.append((low, before))
        return cls(match["era"], int(match["last"], 36), tuple(gaps))

    @property
    def floor(self) -> int:
        """All ids up to this one are behind it."""
        return self.gaps[0][0] - 1 if self.gaps else self.last

    def having_seen(self, numbers: Iterable[int]) -> MySQLPosition:
        """Return the position of one who has seen more ids, or the same ones again."""
        found = sorted(numbers)
        new = found[bisect_right(found, self.last) :]
        gaps = (*without(self.gaps, found), *between(self.last, new))
        return replace(self, last=new[-1] if new else self.last, gaps=gaps)

    def beyond(self, trimmed: int) -> MySQLPosition:
        """Return the position of one for whom all ids up to one are behind it."""
        gaps = tuple((max(low, trimmed + 1), high) for low, high in self.gaps if high > trimmed)
        return replace(self, last=max(self.last, trimmed), gaps=gaps)

    def sees(self, change: Change) -> bool:
        """Whether all entries of a change were visible.

        Of a change that was collapsed only the first and the last are known.
        """
        era, numbers = change.at
        if era != self.era or numbers[-1] > self.last:
            return False
        if isinstance(numbers, range):
            return not overlaps(self.gaps, numbers[0], numbers[-1])
        return not any(overlaps(self.gaps, number, number) for number in numbers)

    def includes(self, other: Position) -> bool:
        """Whether all that was visible at another position was visible at this one."""
        if not isinstance(other, MySQLPosition) or other.era != self.era or other.last > self.last:
            return False
        mine = self.gaps[: bisect_right(self.gaps, (other.last, math.inf))]
        return all(_covers(other.gaps, low, min(high, other.last)) for low, high in mine)

    def __str__(self) -> str:
        """Return ``era.last_gap_gap``; a gap is its distance from what was before, and a length."""
        text, before = f"{self.era}.{_base36(self.last)}", 0
        for low, high in self.gaps:
            more = f"-{_base36(high - low)}" if high > low else ""
            text += f"_{_base36(low - before)}{more}"
            before = high
        return text


def overlaps(gaps: Gaps, low: int, high: int) -> bool:
    """Return whether an id from one to another is in a gap."""
    place = bisect_right(gaps, (high, math.inf)) - 1
    return place >= 0 and gaps[place][1] >= low


def _covers(gaps: Gaps, low: int, high: int) -> bool:
    place = bisect_right(gaps, (low, math.inf)) - 1
    return place >= 0 and gaps[place][1] >= high


def without(gaps: Gaps, numbers: Sequence[int]) -> Gaps:
    """Return gaps without some ids, which are in order."""
    left = []
    for low, high in gaps:
        for number in numbers[bisect_left(numbers, low) : bisect_right(numbers, high)]:
            if low < number:
                left.append((low, number - 1))
            low = number + 1
        if low <= high:
            left.append((low, high))
    return tuple(left)


def between(before: int, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the gaps after an id, before and between some others, which are in order."""
    for number in numbers:
        if number > before + 1:
            yield before + 1, number - 1
        before = number


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits or "0"
