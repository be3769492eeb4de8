"""The protocol of a cache that follows others, checked over every interleaving of a small world.

The world is that of ``test_protocol_model.py``, with writers elsewhere, of whom nobody tells but a
changelog. Local commits whose rows are not known leave an *unread* mark. Polls, refreshes and loads
take a turn, open a snapshot, read in it what the changelog has since the position, and publish that
in one step; between any two steps any other actor may take one. Promises:

* *strict*: an answer lacks nothing that polls had published when the read started, and no commit of
  this process that had ended by then, if it could have changed the answer;
* *whole*: an answer is the view of one state of the database, never of a mixture;
* *convergent*: when all is quiet, a poll and a refresh make the records those of the database:
  nothing that others have committed is lost.

Then rules of the protocol are broken, one at a time, and the checker has to notice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest

from tests.unit.test_protocol_model import (
    BOTH,
    FIRST,
    MOVE,
    NONE,
    ONE,
    PAIR,
    SECOND,
    TOUCH,
    TWO,
    Broken,
    Change,
    Database,
    Mark,
    Marks,
    Numbered,
    Parents,
    Protocol,
    Records,
    Table,
    begun,
    concerned,
    leased,
    looked_up,
    read_touched,
    released,
)

UNREAD = Mark("unread", moves=True)
VIEW = Mark("view", moves=True)
RULES = Protocol()


@dataclass(frozen=True)
class Following:
    """The rules; each field other than its default is a mutation."""

    inside: str = "both"
    """Who polls in the snapshot that is read: ``both``, ``refreshes`` or ``loads``."""
    gaps_poll: bool = True
    """Whether a reader that has fetched gaps polls before it merges them."""
    until: bool = True
    """Whether a poll leaves alone what became unread after it began."""
    marks_first: bool = True
    """Whether the position moves only when the marks are made."""
    seed_marks: bool = True
    """Whether a feed that begins marks everything."""
    trust: bool = True
    """Whether readers ask the database until the feed has begun."""
    logs: bool = True
    """Whether marks that a poll makes are noted for what is under way."""
    found: str = "that mark"
    """What a refresh does not mark again: ``that mark`` which it found itself, or the ``name``."""


class Actor(NamedTuple):
    """Somebody with a program, and where in it they are."""

    kind: str
    argument: object
    at: str
    runs: int = 1
    token: int = 0
    until: int = 0
    snapshot: int = 0
    noted: Numbered = ()
    coverage: Parents = NONE
    coverage_id: int = 0
    stamp: int = 0
    stored: tuple[tuple[int, tuple[int, int | None]], ...] = ()
    read: tuple[tuple[int, tuple[int, int | None]], ...] = ()
    touched: Parents = NONE
    owed: int = 0
    local: tuple[int, ...] = ()


class World(NamedTuple):
    """One state of everything."""

    history: tuple[Database, ...]
    logged: tuple[Marks, ...]
    """What the changelog says of each of them; of the first, nothing."""
    local: tuple[int, ...]
    """Which of them were committed here."""
    position: int | None
    owed: int
    """What polls have published."""
    busy: bool
    table: Table
    actors: tuple[Actor, ...]


def here(change: Change, *, known: bool = True) -> Actor:
    """A transaction of this process, of known rows or not."""
    return Actor("writer", (change, change.marks if known else (UNREAD,)), "lease")


def elsewhere(change: Change) -> Actor:
    """A transaction of somebody else."""
    return Actor("writer", (change, ()), "commit")


def poller(runs: int = 1, *, dies: bool = False) -> Actor:
    """Somebody who polls so many times, or is cancelled in the middle of it."""
    return Actor("poller", dies, "turn", runs)


def refresher(runs: int = 1) -> Actor:
    """Somebody who refreshes, so many times."""
    return Actor("refresher", None, "begin", runs)


def loader(target: Parents, *, extend: bool = False) -> Actor:
    """Somebody who makes the coverage a target, or adds that to it."""
    return Actor("loader", (target, extend), "begin")


def reader(wanted: Parents = BOTH) -> Actor:
    """Somebody who reads all records of the view, or one."""
    return Actor("reader", wanted, "start")


def marked(table: Table, marks: Marks, who: str = "", *, logs: bool = True) -> Table:
    """Add marks; ``who`` has found the changes in its snapshot."""
    for mark in marks:
        sequence = table.sequence + 1
        pending = {**dict(table.pending), mark: sequence}
        entry: tuple[int, Mark, str] = (sequence, mark, who)
        log = (*table.log, entry) if table.underway and logs else table.log
        table = table._replace(
            sequence=sequence,
            pending=tuple(pending.items()),
            log=log,  # type: ignore[arg-type]
        )
    return forgotten(table)


def forgotten(table: Table) -> Table:
    """Drop marks of what is not stored."""
    if not table.coverage and not table.underway:
        table = table._replace(pending=())
    return looked_up(table)


def ended(table: Table, token: int) -> Table:
    """Forget a token, and of the log what nobody needs any more."""
    underway = list(table.underway)
    underway.remove(token)
    oldest = min(underway, default=table.sequence)
    log = tuple(entry for entry in table.log if entry[0] > oldest)
    return forgotten(table._replace(underway=tuple(underway), log=log))


def applied(
    rules: Following,
    table: Table,
    token: int,
    who: str,
    records: Records,
    coverage: Parents,
    noted: Numbered,
) -> Table:
    """Swap in what a load or refresh made."""
    pending = dict(table.pending)
    log: tuple[tuple[int, Mark, str], ...] = table.log  # type: ignore[assignment]
    for mark, number in noted:
        if pending.get(mark) == number:
            pending.pop(mark)
    own = {mark for _, mark, finder in log if finder == who}
    newer = {
        mark
        for number, mark, finder in log
        if number > token and (finder != who if rules.found == "that mark" else mark not in own)
    }
    sequence = table.sequence
    for mark in sorted(newer):
        sequence += 1
        pending[mark] = sequence
        log = (*log, (sequence, mark, ""))
    table = table._replace(
        records=tuple(sorted(records.items())),
        coverage=coverage,
        stamp=table.stamp + 1,
        sequence=sequence,
        pending=tuple(pending.items()),
        log=log,  # type: ignore[arg-type]
    )
    return looked_up(table, again=True)


def delivered(rules: Following, world: World, snapshot: int, until: int, who: str = "") -> World:
    """Publish what a poll has found, in one step."""
    if world.position is None:
        marks: Marks = (VIEW,) if rules.seed_marks else ()
    else:
        news = world.logged[world.position + 1 : snapshot + 1]
        marks = tuple(sorted({mark for change in news for mark in change}))
    table = marked(world.table, marks, who, logs=rules.logs)
    if not rules.until:
        until = table.sequence
    pending = dict(table.pending)
    if pending.get(UNREAD, until + 1) <= until:
        pending.pop(UNREAD)
    log = tuple(entry for entry in table.log if entry[1] != UNREAD or entry[0] > until)
    table = looked_up(table._replace(pending=tuple(pending.items()), log=log))
    return world._replace(table=table, position=snapshot, owed=max(world.owed, snapshot))


class Moves:
    """What an actor can do next in a world."""

    def __init__(self, rules: Following) -> None:
        self.rules = rules

    def __call__(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        yield from getattr(self, actor.kind)(world, actor)

    def poll(self, world: World, actor: Actor, then: str) -> Iterator[tuple[World, Actor]]:
        """Take a turn, open a snapshot, publish; ``then`` is where it goes on."""
        rules = self.rules
        match actor.at:
            case "turn" if not world.busy:
                yield (
                    world._replace(busy=True),
                    actor._replace(at="open", until=world.table.sequence),
                )
            case "open":
                snapshot = len(world.history) - 1
                moved = world
                if not rules.marks_first and world.position is not None:
                    moved = world._replace(position=snapshot)
                yield moved, actor._replace(at="deliver", snapshot=snapshot)
                if actor.argument is True:  # cancelled
                    yield moved._replace(busy=False), actor._replace(at="end")
            case "deliver":
                before = world
                if not rules.marks_first and world.position is not None:
                    before = world._replace(position=min(world.position, actor.until))
                after = delivered(
                    rules, before, actor.snapshot, actor.until, actor.kind if then == "note" else ""
                )
                yield after._replace(busy=False), actor._replace(at=then)

    def snapshot(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Open a snapshot to read in, with a poll in it if the rules say so."""
        name = {"refresher": "refreshes", "loader": "loads"}[actor.kind]
        if actor.at != "turn" or (
            world.position is not None and self.rules.inside in ("both", name)
        ):
            yield from self.poll(world, actor, "note")
        else:
            yield world, actor._replace(at="note", snapshot=len(world.history) - 1)

    def writer(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Go the steps of a COMMIT; one elsewhere has no others."""
        assert isinstance(actor.argument, tuple)
        change, marks = actor.argument
        table = world.table
        match actor.at:
            case "lease":
                yield world._replace(table=leased(table, marks)), actor._replace(at="commit")
            case "commit":
                logged = tuple(mark._replace(moves=True) for mark in change.marks)
                number = len(world.history)
                world = world._replace(
                    history=(*world.history, change.write(world.history[-1])),
                    logged=(*world.logged, logged),
                    local=(*world.local, number) if marks else world.local,
                )
                yield world, actor._replace(at="publish" if marks else "end")
            case "publish":
                table = released(marked(table, marks), marks)
                yield world._replace(table=table), actor._replace(at="end")

    def poller(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Poll, so many times."""
        if actor.runs:
            for moved, after in self.poll(world, actor, "turn"):
                done = actor.at == "deliver"
                yield moved, after._replace(runs=after.runs - 1, snapshot=0) if done else after

    def refresher(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Note the sequence, poll in a snapshot, note the marks, read, swap in."""
        rules, table = self.rules, world.table
        over = Actor("refresher", None, "begin", runs=actor.runs - 1)
        match actor.at:
            case "begin" if actor.runs and table.pending and not table.refreshing:
                yield (
                    world._replace(table=begun(table)._replace(refreshing=True)),
                    actor._replace(at="turn", token=table.sequence),
                )
            case "turn" | "open" | "deliver":
                yield from self.snapshot(world, actor)
            case "note":
                noted = tuple((m, n) for m, n in table.pending if m != UNREAD)
                if not noted:
                    table = ended(table, actor.token)._replace(refreshing=False)
                    yield world._replace(table=table), over
                    return
                touched, found = read_touched(
                    RULES,
                    dict(table.records),
                    table.coverage,
                    noted,
                    world.history[actor.snapshot],
                )
                yield (
                    world,
                    actor._replace(
                        at="apply",
                        noted=noted,
                        coverage=table.coverage,
                        coverage_id=table.coverage_id,
                        touched=touched,
                        read=tuple(found.items()),
                    ),
                )
            case "apply" if table.coverage_id != actor.coverage_id:
                yield world, actor._replace(at="turn", noted=(), read=(), touched=NONE)
            case "apply":
                records = {n: r for n, r in table.records if n not in actor.touched}
                records |= dict(actor.read)
                table = applied(
                    rules, table, actor.token, actor.kind, records, actor.coverage, actor.noted
                )
                table = ended(table, actor.token)._replace(refreshing=False)
                yield world._replace(table=table), over

    def loader(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Note the sequence, poll in a snapshot, read what is missing, swap in."""
        rules, table = self.rules, world.table
        assert isinstance(actor.argument, tuple)
        target, extend = actor.argument
        match actor.at:
            case "begin" if not table.loading:
                yield (
                    world._replace(table=begun(table)._replace(loading=True)),
                    actor._replace(at="turn", token=table.sequence, coverage=table.coverage),
                )
            case "turn" | "open" | "deliver":
                yield from self.snapshot(world, actor)
            case "note":
                missing = target - table.coverage
                read = tuple(world.history[actor.snapshot].view(missing).items())
                yield world, actor._replace(at="apply", read=read)
            case "apply":
                coverage = table.coverage | target if extend else target
                records = {n: r for n, r in table.records if n in coverage} | dict(actor.read)
                log: tuple[tuple[int, Mark, str], ...] = table.log  # type: ignore[assignment]
                pending = dict(table.pending)
                found = tuple(
                    (mark, number)
                    for number, mark, who in log
                    if who == actor.kind and pending.get(mark) == number and not actor.coverage
                )
                table = applied(rules, table, actor.token, actor.kind, records, coverage, found)
                table = table._replace(coverage_id=table.coverage_id + 1, loading=False)
                table = ended(table, actor.token)
                yield world._replace(table=table), Actor("loader", actor.argument, "end")

    def reader(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Answer from the records, with gaps from the database, or from the database alone."""
        table, wanted = world.table, actor.argument
        assert isinstance(wanted, frozenset)
        match actor.at:
            case "start":
                yield world, actor._replace(at="look", owed=world.owed, local=world.local)
            case "look" if (
                (world.position is None and self.rules.trust)
                or not wanted & table.coverage
                or concerned(RULES, table, wanted & table.coverage)
            ):
                yield world, actor._replace(at="ask")
            case "look" if wanted <= table.coverage:
                stored = {n: record for n, record in table.records if n in wanted}
                yield self.answered(world, actor, stored)
            case "look":
                yield (
                    world,
                    actor._replace(
                        at="gaps",
                        stamp=table.stamp,
                        coverage=table.coverage,
                        stored=tuple((n, record) for n, record in table.records if n in wanted),
                    ),
                )
            case "gaps":
                gaps = world.history[-1].view(wanted - actor.coverage)
                at = "turn" if self.rules.gaps_poll else "merge"
                yield world, actor._replace(at=at, read=tuple(gaps.items()))
            case "turn" | "open" | "deliver":
                yield from self.poll(world, actor, "merge")
            case "merge" if table.stamp != actor.stamp or concerned(
                RULES, table, wanted & actor.coverage
            ):
                yield world, actor._replace(at="ask", stored=(), read=())
            case "merge":
                yield self.answered(world, actor, {**dict(actor.stored), **dict(actor.read)})
            case "ask":
                yield self.answered(world, actor, world.history[-1].view(wanted))

    def answered(self, world: World, actor: Actor, answer: Records) -> tuple[World, Actor]:
        """Check the answer of a read against all states that the database has had."""
        wanted, history = actor.argument, world.history
        assert isinstance(wanted, frozenset)
        ages = [n for n, state in enumerate(history) if state.view(wanted) == answer]
        if not ages:
            raise Broken("whole")
        for age in ages:
            missed = [n for n in actor.local if n > age]
            if age >= actor.owed and all(
                history[n].view(wanted) == history[n - 1].view(wanted) for n in missed
            ):
                return world, Actor("reader", wanted, "end")
        raise Broken("strict")


def check_quiet(rules: Following, world: World) -> None:
    """Check that a world in which nobody can move converges, after a last poll."""
    assert not world.busy
    assert not world.table.leases
    assert not world.table.underway
    assert not world.table.log
    if world.position is None:
        return
    after = delivered(rules, world, len(world.history) - 1, world.table.sequence)
    table, database = after.table, world.history[-1]
    records, coverage = dict(table.records), table.coverage
    assert UNREAD not in dict(table.pending)
    if table.pending:
        touched, read = read_touched(RULES, records, coverage, table.pending, database)
        records = {n: r for n, r in records.items() if n not in touched} | read
    if records != database.view(coverage):
        raise Broken("convergent")


def explore(rules: Following, coverage: Parents, position: int | None, *actors: Actor) -> int:
    """Visit every state that can be reached; return how many there are.

    :raises Broken: at the first broken promise.
    """
    moves = Moves(rules)
    start = Database()
    table = Table(tuple(start.view(coverage).items()), coverage)
    first = World((start,), ((),), (), position, 0, False, table, actors)
    seen, todo = {first}, [first]
    while todo:
        world = todo.pop()
        quiet = True
        for number, actor in enumerate(world.actors):
            for moved, after in moves(world, actor):
                quiet = False
                new = moved._replace(
                    actors=(*world.actors[:number], after, *world.actors[number + 1 :])
                )
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
        if quiet:
            check_quiet(rules, world)
    return len(seen)


Scenario = tuple[Parents, int | None, tuple[Actor, ...]]
SCENARIOS: dict[str, Scenario] = {
    "a poll of moves elsewhere": (
        BOTH,
        0,
        (elsewhere(MOVE), elsewhere(SECOND), poller(2), refresher(2), reader()),
    ),
    "a pair elsewhere and a row here": (
        BOTH,
        0,
        (elsewhere(PAIR), here(FIRST), poller(), refresher(2), reader()),
    ),
    "unknown rows here": (
        BOTH,
        0,
        (here(MOVE, known=False), poller(), refresher(2), reader()),
    ),
    "a move elsewhere and one here": (
        BOTH,
        0,
        (elsewhere(MOVE), here(MOVE), here(FIRST), refresher(), reader()),
    ),
    "unknown rows here, twice": (
        BOTH,
        0,
        (here(MOVE, known=False), here(SECOND, known=False), refresher(2), reader()),
    ),
    "unknown rows here and a move elsewhere": (
        BOTH,
        0,
        (here(TOUCH, known=False), elsewhere(MOVE), poller(), refresher(2), reader(TWO)),
    ),
    "a touch here and a move elsewhere": (
        BOTH,
        0,
        (here(TOUCH), elsewhere(MOVE), poller(), refresher(2), reader(ONE)),
    ),
    "a poll that is cancelled": (
        BOTH,
        0,
        (elsewhere(MOVE), here(FIRST), poller(dies=True), poller(), refresher()),
    ),
    "a load of the rest": (
        ONE,
        0,
        (elsewhere(PAIR), loader(BOTH), refresher(), reader(), poller()),
    ),
    "a load beside a refresh": (
        ONE,
        0,
        (elsewhere(MOVE), here(FIRST), loader(BOTH), refresher(2)),
    ),
    "a first load": (NONE, 0, (elsewhere(PAIR), here(MOVE), loader(BOTH), reader(), poller())),
    "a feed that begins during a load": (
        NONE,
        None,
        (elsewhere(PAIR), loader(BOTH), poller(), refresher(), reader()),
    ),
    "a feed that begins late": (
        BOTH,
        None,
        (elsewhere(PAIR), elsewhere(MOVE), poller(2), refresher(), reader()),
    ),
    "gaps": (ONE, 0, (elsewhere(PAIR), here(MOVE), refresher(), reader())),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_interleaving_keeps_the_promises(scenario: str) -> None:
    """Whoever is faster, answers are strict and whole, and nothing of others is lost."""
    coverage, position, actors = SCENARIOS[scenario]
    assert explore(Following(), coverage, position, *actors) > 100


MUTATIONS: dict[str, tuple[Following, str, str]] = {
    "refreshes do not poll in their snapshot": (
        Following(inside="loads"),
        "a pair elsewhere and a row here",
        "whole",
    ),
    "loads do not poll in their snapshot": (
        Following(inside="refreshes"),
        "a load of the rest",
        "whole",
    ),
    "gaps are merged without a poll": (Following(gaps_poll=False), "gaps", "whole"),
    "a poll clears what became unread after it began": (
        Following(until=False),
        "unknown rows here",
        "strict",
    ),
    "the position moves before the marks are made": (
        Following(marks_first=False),
        "a poll that is cancelled",
        "convergent",
    ),
    "a feed that begins marks nothing": (
        Following(seed_marks=False),
        "a feed that begins late",
        "convergent",
    ),
    "marks of a poll are not noted for what is under way": (
        Following(logs=False),
        "a load beside a refresh",
        "convergent",
    ),
    "what was marked again since a refresh has found it is not marked again": (
        Following(found="name"),
        "a move elsewhere and one here",
        "strict",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rule_is_noticed(mutation: str) -> None:
    """Every rule is needed: without it, some interleaving breaks a promise."""
    rules, scenario, promise = MUTATIONS[mutation]
    coverage, position, actors = SCENARIOS[scenario]
    with pytest.raises(Broken, match=promise):
        explore(rules, coverage, position, *actors)
