"""Changes of this process that a change feed tells of again, and who has read them already.

In: marks of local commits, and the positions in the changelog at which refreshes have read what
they are about. Out: whether a change that the feed delivers was read by one of them: then marking
it again would only repeat the refresh.

A refresh at a position has read all that a change of the same row, group or view did if the
position *sees* the change: whatever else has happened to the row since, and whoever did it. Only a
load that was under way with an older snapshot could have brought back what was before; beside one
nothing is remembered. Pure; the caller holds the table's lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from .changes import VIEW, AnyMark, GroupMark, Mark, Marks

if TYPE_CHECKING:
    from collections.abc import Hashable

MOST_EXPECTED: Final = 10_000
"""With more marks than this between two polls, the changes are simply marked again."""


class Echoes:
    """What a view expects to hear again of the marks that local commits have made.

    It holds what was marked locally since the last poll but one, and what of that was refreshed:
    nothing, where nobody writes.
    """

    def __init__(self) -> None:
        self._expected: dict[Hashable, int] = {}
        """When a mark was made locally, by the sequence of the view's marks."""
        self._read: dict[Hashable, Any] = {}
        """The position at which a refresh has read what a mark is about."""

    def expect(self, marks: Iterable[AnyMark], sequence: int) -> None:
        """Note marks of a local commit."""
        if len(self._expected) > MOST_EXPECTED:
            self._expected.clear()
        for mark in marks:
            if isinstance(mark, Mark | GroupMark):
                self._expected[_what(mark)] = sequence

    def expects(self, marks: Iterable[AnyMark]) -> bool:
        """Whether the feed is going to tell of one of the marks again."""
        return bool(self._expected) and any(_what(mark) in self._expected for mark in marks)

    def was_read(self, marks: Iterable[AnyMark], position: Any) -> None:
        """Note that a refresh has read what marks are about, at a position of the changelog."""
        if len(self._read) > MOST_EXPECTED:
            self._read.clear()
        for mark in marks:
            self._read[_what(mark)] = position

    def delivered(self, until: int, position: Any | None) -> None:
        """Forget what the feed will not tell of any more.

        :param until: the sequence from before the poll began.
        :param position: how far the poll has read; ``None`` if what it begins anew is all marked.
        """
        if self._expected:
            self._expected = {w: made for w, made in self._expected.items() if made > until}
        if position is None:
            self._read.clear()
        elif self._read:
            self._read = {w: at for w, at in self._read.items() if not position.includes(at)}

    @property
    def silent(self) -> bool:
        """Whether nothing was read that the feed could tell of."""
        return not self._read

    def new(self, marks: Marks, change: Any) -> Marks:
        """Return those of the marks of one change of the feed that no refresh has read."""
        read = self._read
        whole = read.get(_what(VIEW))
        if whole is not None and whole.sees(change):
            return frozenset()
        return frozenset(m for m in marks if not ((at := read.get(_what(m))) and at.sees(change)))


def _what(mark: AnyMark) -> Hashable:
    """Return what a mark is about, whether it moves records or not."""
    return mark[:2] if isinstance(mark, Mark) else mark
