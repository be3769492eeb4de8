"""What of one view may be stale: marks, leases, and the numbers by which they are put in order.

In: marks made from changes, leases of commits under way, the beginnings and ends of loads and
refreshes. Out: whether readers may be answered, and beside which rows. This is the protocol of
``table.py`` without its I/O; whoever calls it holds the table's lock.

* A mark is *pending*, with a sequence number, until a refresh or load has read the database after
  the change. A refresh clears a mark only under the number with which it noted it.
* A *lease* stands for the marks that a commit under way will make.
* A load or refresh has a *token*, the sequence number from before its snapshot. What was marked
  since may be missing in what it read, so that it is pending again when that is applied.
* Marks and leases have an *age*: a mark counts from when its commit was leased, since from then on
  others may have seen what it changed.
* Marks and leases that move records keep all readers from storage; those *in place* only the
  answers with the records of their rows.
* :data:`.UNREAD` says that a change feed has changes that nobody has read. No refresh clears it,
  but a poll that began after it was made, in one step with making the marks that it found.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from .changes import UNREAD, VIEW, AnyMark, Mark, Marks, in_place

MOST_IN_PLACE = 10_000
"""With more marks in place than this the next read refreshes, whatever it reads."""


MOST_PENDING = 20_000
"""More marks than this become one of the whole view: nobody may read for a long time."""


class Freshness:
    """The marks and leases of one view."""

    def __init__(self) -> None:
        self.sequence = 0
        self.pending: dict[AnyMark, int] = {}
        self.leased: Counter[AnyMark] = Counter()
        self.leases = 0
        """The number of commits under way."""
        self._since: dict[AnyMark, float] = {}
        """From when each pending mark counts, by the monotonic clock."""
        self._leased_since: dict[AnyMark, float] = {}
        """The same for leased marks."""
        self._oldest: float | None = None
        """The smallest of the first; ``None`` if it is to be looked for."""
        self._begun: dict[int, float] = {}
        """When the loads and refreshes under way began, by their tokens."""
        self._moving = 0
        """The number of pending marks that move records."""
        self._moving_leases = 0
        """The number of leased marks that do."""
        self._log: list[tuple[int, AnyMark, object]] = []
        """Marks made while loads or refreshes are under way, for when they are applied; and which
        of them has the change in its snapshot, having found it there."""
        self._underway: Counter[int] = Counter()

    @property
    def blocked(self) -> bool:
        """Whether no reader may be answered from storage."""
        return self._moving > 0 or self._moving_leases > 0 or len(self.pending) > MOST_IN_PLACE

    @property
    def waits_for_commit(self) -> bool:
        """Whether a commit under way keeps all readers from storage."""
        return self._moving_leases > 0

    @property
    def clean(self) -> bool:
        """Whether nothing is pending or leased."""
        return not self.pending and not self.leased

    def has(self, mark: AnyMark) -> bool:
        """Whether a mark is pending or leased."""
        return mark in self.pending or mark in self.leased

    def in_place(self) -> frozenset[Mark]:
        """Return the marks, pending or leased, of which only the records may be stale."""
        return in_place((*self.pending, *self.leased))

    @property
    def underway(self) -> bool:
        """Whether a load or refresh is under way."""
        return bool(self._underway)

    @property
    def oldest(self) -> float | None:
        """From when the oldest pending mark counts, by the monotonic clock."""
        if self._oldest is None and self._since:
            self._oldest = min(self._since.values())
        return self._oldest

    @property
    def age(self) -> float | None:
        """For how many seconds something has been marked or leased; ``None`` if nothing is."""
        since = [self.oldest] if self.oldest is not None else []
        since += [min(self._leased_since.values())] if self._leased_since else []
        return time.monotonic() - min(since) if since else None

    def since(self, mark: AnyMark) -> float | None:
        """From when a pending mark counts."""
        return self._since.get(mark)

    # -- leases and marks -----------------------------------------------------------------------

    def lease(self, marks: Marks) -> None:
        """Have a commit under way stand for the marks that it will make."""
        self.leases += 1
        now = time.monotonic()
        for mark in marks:
            self._leased_since.setdefault(mark, now)
            self._moving_leases += mark.moves and not self.leased[mark]
            self.leased[mark] += 1

    def release(self, marks: Marks) -> None:
        """End a lease."""
        self.leases -= 1
        for mark in marks:
            self.leased[mark] -= 1
            if not self.leased[mark]:
                del self.leased[mark], self._leased_since[mark]
                self._moving_leases -= mark.moves

    def mark(self, marks: Marks, reader: object = None, first: float | None = None) -> None:
        """Make marks pending, each with a number of its own.

        :param reader: the load or refresh that has found the changes in its snapshot.
        :param first: from when they count, if that is known.
        """
        if len(self.pending) + len(marks) > MOST_PENDING:
            since = [] if self.oldest is None else [self.oldest]
            self.forget()
            marks = frozenset({VIEW})
        else:
            since = []
        # It is not known here whose they are: they are as old as any commit that is under way.
        # So is what a feed tells of what was unread.
        since += [self._since[UNREAD]] if UNREAD in self._since else []
        first = time.monotonic() if first is None else first
        first = min((first, *since, *self._leased_since.values()))
        for mark in marks:
            self._set(mark, first)
            if self._underway:
                self._log.append((self.sequence, mark, reader))

    def note(self, marks: Iterable[AnyMark], reader: object = None) -> None:
        """Note marks of which nothing is in storage now, for what is under way."""
        for mark in marks:
            if self._underway:
                self.sequence += 1
                self._log.append((self.sequence, mark, reader))

    def found_by(self, reader: object) -> dict[AnyMark, int]:
        """Return the pending marks of changes that a load or refresh has found in its snapshot."""
        return {
            mark: number
            for number, mark, who in self._log
            if who is reader and self.pending.get(mark) == number
        }

    def drop(self, marks: Iterable[AnyMark]) -> None:
        """Drop pending marks of which nothing is in storage any more."""
        for mark in list(marks):
            self._unset(mark)

    def read(self, until: int) -> None:
        """A poll that began when the sequence was this has read all that was unread then."""
        if self.pending.get(UNREAD, until + 1) <= until:
            self._unset(UNREAD)
        # What is under way will find the marks that the poll made.
        self._log = [entry for entry in self._log if entry[1] != UNREAD or entry[0] > until]

    def _set(self, mark: AnyMark, since: float) -> None:
        if mark not in self.pending:
            self._moving += mark.moves
        self.sequence += 1
        self.pending[mark] = self.sequence
        if since < self._since.setdefault(mark, since):
            self._since[mark] = since
        if self._oldest is not None:
            self._oldest = min(self._oldest, since)

    def _unset(self, mark: AnyMark) -> None:
        del self.pending[mark]
        self._moving -= mark.moves
        if self._since.pop(mark) == self._oldest:
            self._oldest = None

    def forget(self) -> None:
        """Drop all pending marks: nothing is stored that could be stale."""
        for mark in list(self.pending):
            self._unset(mark)

    # -- loads and refreshes --------------------------------------------------------------------

    def begin(self) -> int:
        """Return the token of a load or refresh that is about to open its snapshot."""
        self._underway[self.sequence] += 1
        self._begun.setdefault(self.sequence, time.monotonic())
        return self.sequence

    def end(self, token: int) -> None:
        """A load or refresh is over, applied or not."""
        self._underway[token] -= 1
        if not self._underway[token]:
            del self._underway[token], self._begun[token]
        oldest = min(self._underway, default=self.sequence)
        self._log = [entry for entry in self._log if entry[0] > oldest]

    def apply(self, token: int, cleared: dict[AnyMark, int], reader: object = None) -> None:
        """What was read after the token is being applied, with these marks, as they were numbered.

        Marks newer than the token, but for those that it has found itself, become pending again,
        with newer numbers: a refresh under way may have read the database before what is applied
        now, and be about to clear them.
        """
        again = {
            mark
            for sequence, mark, who in self._log
            if sequence > token and (who is None or who is not reader)
        }
        since = {mark: self._since.get(mark, self._begun[token]) for mark in again}
        for mark, sequence in cleared.items():
            if self.pending.get(mark) == sequence:
                self._unset(mark)
        for mark in again:
            self._set(mark, since[mark])
            # Those that began meanwhile must find it again when they are applied.
            self._log.append((self.sequence, mark, None))

    def after_fork(self) -> None:
        """Forget commits, loads and refreshes of the parent process: they end there."""
        self.leased.clear()
        self._leased_since.clear()
        self.leases = self._moving_leases = 0
        self._underway.clear()
        self._begun.clear()
        self._log.clear()

    def _check(self) -> None:
        """Assert the invariants of marks and leases."""
        assert self.leases >= 0
        assert all(number > 0 for number in self.leased.values())
        assert self.leases or not self.leased
        assert self._moving == sum(mark.moves for mark in self.pending)
        assert self._moving_leases == sum(mark.moves for mark in self.leased)
        assert all(number <= self.sequence for number in self.pending.values())
        assert len(set(self.pending.values())) == len(self.pending)
        assert self._since.keys() == self.pending.keys()
        assert self._leased_since.keys() == self.leased.keys()
        assert self._begun.keys() == self._underway.keys()
        assert self.oldest == min(self._since.values(), default=None)
        assert self._underway or not self._log
