"""Ranges beside the peers: the database, ``tablecache``, ``dogpile.cache`` and bare structures.

Each contestant is a process of its own; they take turns, interval by interval and round by round,
so that a busy machine slows them alike. One whose package this Python does not have is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from statistics import median
from typing import Any

from sqlalchemy import URL

from benchmarks.contestants import CONTESTANTS, Cached, Contestant, Sorted, TableCache43
from benchmarks.harness import Result
from benchmarks.processes import Process
from benchmarks.ranges import intervals

FASTER_THAN_TABLECACHE = (8, 50, 100)
"""How many times, for each of the three intervals."""
BYTES_OF_TABLECACHE = 0.45


class Seat:
    """A contestant, seen from outside."""

    def __init__(self, contestant: type[Contestant], url: str) -> None:
        self.contestant = contestant
        self._process = Process("benchmarks.contestants", contestant.__name__, url)
        self.loaded = self._process.ready
        self.close = self._process.close

    def read(self, interval: tuple[datetime, datetime]) -> Any:
        """Have it read an interval."""
        return self._process.ask([each.isoformat() for each in interval])


@contextmanager
def seats(url: URL) -> Iterator[list[Seat]]:
    """Start those who can take part, one after the other."""
    rendered = url.render_as_string(hide_password=False)
    with ExitStack() as stack:
        started = []
        for contestant in CONTESTANTS:
            if contestant.missing():
                print(f"\n{contestant.name}: not installable on this Python, left out")
                continue
            seat = Seat(contestant, rendered)
            stack.callback(seat.close)
            started.append(seat)
        yield started


def run(url: URL, *, quick: bool) -> list[Result]:
    """Have the contestants read three intervals, and compare what they hold."""
    results: list[Result] = []
    with seats(url) as all_of_them:
        for number, interval in enumerate(intervals(quick=quick)):
            goal = None if quick else FASTER_THAN_TABLECACHE[number]
            results += _in_turns(all_of_them, interval, goal, rounds=5 if quick else 15)
        results += _sizes(all_of_them, quick=quick)
    return results


def _in_turns(
    contestants: Sequence[Seat],
    interval: tuple[datetime, datetime],
    goal: float | None,
    *,
    rounds: int,
) -> list[Result]:
    samples: dict[str, list[float]] = {each.contestant.name: [] for each in contestants}
    said = set()
    for turn in range(rounds):
        first = turn % len(contestants)
        for each in (*contestants[first:], *contestants[:first]):
            answer = each.read(interval)
            samples[each.contestant.name].append(answer["seconds"])
            said.add((answer["records"], answer["same"]))
    ((count, _),) = said  # all of them read the same records
    base = samples[Cached.name]
    return [
        Result(
            benchmark=f"range of {count:,} records, beside the peers",
            case=name,
            value=median(mine),
            unit="s",
            ratio=median(one / other for one, other in zip(mine, base, strict=True)),
            over=Cached.name if name != Cached.name else None,
            goal=goal if name == TableCache43.name else None,
            at_least=True,
            spread=(min(mine), max(mine)),
            rounds=rounds,
        )
        for name, mine in samples.items()
    ]


def _sizes(contestants: Sequence[Seat], *, quick: bool) -> list[Result]:
    holding = [each for each in contestants if each.contestant.holds]
    everything = (datetime(2000, 1, 1), datetime(2100, 1, 1))
    count = holding[0].read(everything)["records"]
    sizes = {each.contestant: each.loaded["bytes"] / count for each in holding}
    peer: type[Contestant] = TableCache43 if TableCache43 in sizes else Sorted
    return [
        Result(
            benchmark=f"memory of {count:,} records, beside the peers",
            case=contestant.name,
            value=size,
            unit="B",
            ratio=size / sizes[peer],
            over=peer.name if contestant is not peer else None,
            goal=BYTES_OF_TABLECACHE
            if contestant is Cached and TableCache43 in sizes and not quick
            else None,
        )
        for contestant, size in sizes.items()
    ]
