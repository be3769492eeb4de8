"""The protocol of ``sa_tablecache/table.py``, checked over every interleaving of a small world.

The world is a database with two parents and one child, and a view of the parents left joined with
the child, anchored on the parent: moving the child changes two records at once. Writers commit
and publish, refreshes and loads go their steps, readers read; between any two steps any other
actor may take one. Every reachable state is visited, and four promises are checked:

* *strict*: an answer is never older than what was committed when the read started;
* *read your writes*: nor, all the more, than what was acknowledged then;
* *whole*: an answer is the view of one state of the database, never of a mixture;
* *convergent*: when all is quiet, one refresh makes the records those of the database.

Then rules of the protocol are broken, one at a time, and the checker has to notice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest

Mark = str
"""``child``, a parent's number, or ``view``."""
Parents = frozenset[int]
Record = tuple[int, bool]
"""A parent's value, and whether it has the child."""
Records = dict[int, Record]

BOTH: Parents = frozenset({1, 2})
ONE: Parents = frozenset({1})
NONE: Parents = frozenset()


# -- the database ------------------------------------------------------------------------------


class Database(NamedTuple):
    """Committed rows: the parent of the child, and the values of the parents."""

    child_at: int = 1
    first: int = 0
    second: int = 0

    def view(self, parents: Parents) -> Records:
        """The records that the view's SELECT returns for some parents."""
        every = {1: (self.first, self.child_at == 1), 2: (self.second, self.child_at == 2)}
        return {number: record for number, record in every.items() if number in parents}


@dataclass(frozen=True)
class Change:
    """What a transaction writes, and the mark that follows from it."""

    mark: Mark
    write: Callable[[Database], Database]


MOVE = Change("child", lambda db: db._replace(child_at=3 - db.child_at))
FIRST = Change("1", lambda db: db._replace(first=db.first + 1))
SECOND = Change("2", lambda db: db._replace(second=db.second + 1))
UNKNOWN = Change("view", lambda db: Database(3 - db.child_at, db.first + 1, db.second + 1))


# -- the protocol ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """The rules; each field other than its default is a mutation."""

    commit: tuple[str, ...] = ("lease", "commit", "publish")
    """The steps of a writer. ``publish`` marks and releases in one critical section."""
    token_first: bool = True
    """Whether a refresh or load notes the sequence before it opens its snapshot."""
    clear: str = "noted"
    """Which marks a refresh clears: ``noted`` with that number, ``named``, or ``all``."""
    remark: bool = True
    """Whether marks made while a load or refresh was under way are pending after it."""
    stored_lineage: bool = True
    joined_lineage: bool = True
    """Whether records are found by the rows that made them, and by those the database joins now."""
    retry: bool = True
    """Whether a refresh starts again if the coverage changed under it."""
    recheck: bool = True
    """Whether a reader that fetched gaps looks again whether the view has changed."""
    whole: bool = True
    """Whether records are swapped in all at once."""
    marks_block: bool = True
    """Whether readers go to the database while anything is marked."""


class Table(NamedTuple):
    """The state of the cached table; all of it changes only in critical sections."""

    records: tuple[tuple[int, Record], ...]
    coverage: Parents
    coverage_id: int = 0
    stamp: int = 0
    sequence: int = 0
    leases: int = 0
    pending: tuple[tuple[Mark, int], ...] = ()
    log: tuple[tuple[int, Mark], ...] = ()
    underway: tuple[int, ...] = ()
    refreshing: bool = False
    loading: bool = False


class World(NamedTuple):
    """One state of everything."""

    history: tuple[Database, ...]
    acknowledged: int
    table: Table
    actors: tuple["Actor", ...]


def marked(table: Table, marks: tuple[Mark, ...]) -> Table:
    """Add marks, in the critical section that the caller is in."""
    for mark in marks:
        sequence = table.sequence + 1
        pending = {**dict(table.pending), mark: sequence}
        log = (*table.log, (sequence, mark)) if table.underway else table.log
        table = table._replace(sequence=sequence, pending=tuple(pending.items()), log=log)
    if not table.coverage and not table.underway:
        table = table._replace(pending=())
    return table


def begun(table: Table) -> Table:
    """Note that something with this token is under way."""
    return table._replace(underway=(*table.underway, table.sequence))


def ended(table: Table, token: int) -> Table:
    """Forget a token, and of the log what nobody needs any more."""
    underway = list(table.underway)
    underway.remove(token)
    oldest = min(underway, default=table.sequence)
    log = tuple(entry for entry in table.log if entry[0] > oldest)
    table = table._replace(underway=tuple(underway), log=log)
    if not table.coverage and not underway:
        table = table._replace(pending=())
    return table


def applied(
    rules: Protocol,
    table: Table,
    token: int,
    records: Records,
    coverage: Parents,
    noted: tuple[tuple[Mark, int], ...],
) -> Table:
    """Swap in what a load or refresh made."""
    pending = dict(table.pending)
    sequence, log = table.sequence, table.log
    for mark, number in noted:
        if rules.clear == "named" or pending.get(mark) == number:
            pending.pop(mark, None)
    if noted and rules.clear == "all":
        pending.clear()
    if rules.remark:
        for mark in sorted({mark for number, mark in log if number > token}):
            sequence += 1
            pending[mark] = sequence
            log = (*log, (sequence, mark))
    return table._replace(
        records=tuple(sorted(records.items())),
        coverage=coverage,
        stamp=table.stamp + 1,
        sequence=sequence,
        pending=tuple(pending.items()),
        log=log,
    )


def read_touched(
    rules: Protocol,
    stored: Records,
    coverage: Parents,
    noted: tuple[tuple[Mark, int], ...],
    snapshot: Database,
) -> tuple[Parents, Records]:
    """The anchors that marks touch, as stored and as joined now, and their records now."""
    marks = {mark for mark, _ in noted}
    now = snapshot.view(coverage)
    if "view" in marks:
        return BOTH, now
    touched = {int(mark) for mark in marks if mark != "child"}
    if "child" in marks:
        if rules.stored_lineage:
            touched |= {number for number, (_, child) in stored.items() if child}
        if rules.joined_lineage:
            touched |= {number for number, (_, child) in now.items() if child}
    return frozenset(touched), {n: record for n, record in now.items() if n in touched}


def clean(rules: Protocol, table: Table) -> bool:
    """Whether readers may be answered from the records."""
    return not table.leases and not (table.pending and rules.marks_block)


# -- actors ------------------------------------------------------------------------------------


class Actor(NamedTuple):
    """Somebody with a program, and where in it they are."""

    kind: str
    argument: object
    at: str
    token: int = 0
    noted: tuple[tuple[Mark, int], ...] = ()
    coverage: Parents = NONE
    coverage_id: int = 0
    stamp: int = 0
    stored: tuple[tuple[int, Record], ...] = ()
    read: tuple[tuple[int, Record], ...] = ()
    touched: Parents = NONE
    started: int = 0
    runs: int = 0


def writer(change: Change) -> Actor:
    """One transaction."""
    return Actor("writer", change, "0")


def refresher(runs: int = 1) -> Actor:
    """Somebody who refreshes, so many times."""
    return Actor("refresher", None, "begin", runs=runs)


def loader(target: Parents, *, extend: bool = False) -> Actor:
    """Somebody who makes the coverage a target, or adds that to it."""
    return Actor("loader", (target, extend), "begin")


def reader() -> Actor:
    """Somebody who reads all records of the view."""
    return Actor("reader", None, "start")


class Broken(Exception):
    """A promise of the protocol was broken; says which."""


class Moves:
    """What an actor can do next in a world."""

    def __init__(self, rules: Protocol) -> None:
        self.rules = rules

    def __call__(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        yield from getattr(self, actor.kind)(world, actor)

    def writer(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Go the steps of a COMMIT."""
        steps, at = self.rules.commit, int(actor.at)
        if at == len(steps):
            return
        change = actor.argument
        assert isinstance(change, Change)
        table, history, committed = world.table, world.history, actor.started
        match steps[at]:
            case "lease":
                table = table._replace(leases=table.leases + 1)
            case "commit":
                history = (*history, change.write(history[-1]))
                committed = len(history) - 1
            case "mark":
                table = marked(table, (change.mark,))
            case "release":
                table = table._replace(leases=table.leases - 1)
            case "publish":
                table = marked(table, (change.mark,))
                table = table._replace(leases=table.leases - 1)
        acknowledged = world.acknowledged
        if at + 1 == len(steps):
            acknowledged = max(acknowledged, committed)
        yield (
            World(history, acknowledged, table, world.actors),
            actor._replace(at=str(at + 1), started=committed),
        )

    def refresher(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Note the sequence, the marks, read a snapshot, swap in; one refresh at a time."""
        rules, table = self.rules, world.table
        match actor.at:
            case "begin" if actor.runs and table.pending and not table.refreshing:
                begun_table = begun(table) if rules.token_first else table
                yield (
                    world._replace(table=begun_table._replace(refreshing=True)),
                    actor._replace(at="note", token=table.sequence),
                )
            case "note":
                yield (
                    world,
                    actor._replace(
                        at="snapshot",
                        noted=table.pending,
                        coverage=table.coverage,
                        coverage_id=table.coverage_id,
                        stored=table.records,
                    ),
                )
            case "snapshot":
                touched, found = read_touched(
                    rules, dict(actor.stored), actor.coverage, actor.noted, world.history[-1]
                )
                at = "apply" if rules.token_first else "late token"
                read = tuple(found.items())
                yield world, actor._replace(at=at, touched=touched, read=read, stored=())
            case "late token":
                yield (
                    world._replace(table=begun(table)),
                    actor._replace(at="apply", token=table.sequence, noted=table.pending),
                )
            case "apply" if rules.retry and table.coverage_id != actor.coverage_id:
                yield world, actor._replace(at="note", noted=(), read=(), touched=NONE)
            case "apply" if not rules.whole:
                # One record goes out before the others come in, for all to see.
                records = {n: r for n, r in table.records if n not in actor.touched}
                stepping = table._replace(
                    records=tuple(records.items()),
                    pending=(),
                    stamp=table.stamp + 1,
                )
                yield world._replace(table=stepping), actor._replace(at="rest")
            case "apply" | "rest":
                records = {n: r for n, r in table.records if n not in actor.touched}
                records |= dict(actor.read)
                table = applied(rules, table, actor.token, records, actor.coverage, actor.noted)
                table = ended(table, actor.token)._replace(refreshing=False)
                yield (
                    world._replace(table=table),
                    Actor("refresher", None, "begin", runs=actor.runs - 1),
                )

    def loader(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Note the sequence, read what is missing in a snapshot, swap in; beside refreshes."""
        rules, table = self.rules, world.table
        assert isinstance(actor.argument, tuple)
        target, extend = actor.argument
        match actor.at:
            case "begin" if not table.loading:
                begun_table = begun(table) if rules.token_first else table
                yield (
                    world._replace(table=begun_table._replace(loading=True)),
                    actor._replace(at="snapshot", token=table.sequence),
                )
            case "snapshot":
                missing = target - table.coverage
                read = tuple(world.history[-1].view(missing).items())
                yield (
                    world,
                    actor._replace(at="apply" if rules.token_first else "late token", read=read),
                )
            case "late token":
                yield (
                    world._replace(table=begun(table)),
                    actor._replace(at="apply", token=table.sequence),
                )
            case "apply":
                coverage = table.coverage | target if extend else target
                records = {n: r for n, r in table.records if n in coverage} | dict(actor.read)
                table = applied(rules, table, actor.token, records, coverage, ())
                table = table._replace(coverage_id=table.coverage_id + 1, loading=False)
                table = ended(table, actor.token)
                yield world._replace(table=table), Actor("loader", actor.argument, "end")

    def reader(self, world: World, actor: Actor) -> Iterator[tuple[World, Actor]]:
        """Answer from clean records, with gaps from the database, or from the database alone."""
        rules, table = self.rules, world.table
        match actor.at:
            case "start":
                yield (
                    world,
                    actor._replace(
                        at="look",
                        started=len(world.history) - 1,
                        token=world.acknowledged,
                    ),
                )
            case "look" if not clean(rules, table) or not table.coverage:
                yield world, actor._replace(at="ask")
            case "look" if table.coverage == BOTH:
                yield self.answered(world, actor, dict(table.records))
            case "look":
                yield (
                    world,
                    actor._replace(
                        at="gaps",
                        stamp=table.stamp,
                        coverage=table.coverage,
                        stored=table.records,
                    ),
                )
            case "gaps":
                gaps = world.history[-1].view(BOTH - actor.coverage)
                yield world, actor._replace(at="merge", read=tuple(gaps.items()))
            case "merge" if rules.recheck and not (
                clean(rules, table) and table.stamp == actor.stamp
            ):
                yield world, actor._replace(at="ask", stored=(), read=())
            case "merge":
                yield self.answered(world, actor, {**dict(actor.stored), **dict(actor.read)})
            case "ask":
                yield self.answered(world, actor, world.history[-1].view(BOTH))

    def answered(self, world: World, actor: Actor, answer: Records) -> tuple[World, Actor]:
        """Check the answer of a read against all states that the database has had."""
        ages = [n for n, state in enumerate(world.history) if state.view(BOTH) == answer]
        if not ages:
            raise Broken("whole")
        if ages[-1] < actor.token:
            raise Broken("read your writes")
        if ages[-1] < actor.started:
            raise Broken("strict")
        return world, Actor("reader", None, "end")


def check_quiet(rules: Protocol, world: World) -> None:
    """Check that a world in which nobody can move converges."""
    table, database = world.table, world.history[-1]
    assert not table.leases
    assert not table.underway
    assert not table.log
    records, coverage = dict(table.records), table.coverage
    if table.pending:
        touched, read = read_touched(rules, records, coverage, table.pending, database)
        records = {n: r for n, r in records.items() if n not in touched} | read
    if records != database.view(coverage):
        raise Broken("convergent")


def explore(rules: Protocol, coverage: Parents, *actors: Actor, at_rest: bool = True) -> int:
    """Visit every state that can be reached; return how many there are.

    :param at_rest: whether to check that the world converges when it comes to rest.

    :raises Broken: at the first broken promise.
    """
    moves = Moves(rules)
    start = Database()
    table = Table(tuple(start.view(coverage).items()), coverage)
    first = World((start,), 0, table, actors)
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
        if quiet and at_rest:
            check_quiet(rules, world)
    return len(seen)


SCENARIOS: dict[str, tuple[Parents, tuple[Actor, ...]]] = {
    "a move beside a refresh": (BOTH, (writer(MOVE), writer(SECOND), refresher(3), reader())),
    "three writers": (BOTH, (writer(MOVE), writer(FIRST), writer(MOVE), refresher(), reader())),
    "two refreshes": (BOTH, (writer(MOVE), writer(MOVE), refresher(), refresher(), reader())),
    "an unknown write": (BOTH, (writer(UNKNOWN), writer(MOVE), refresher(3), reader())),
    "a first load": (NONE, (writer(MOVE), writer(FIRST), loader(BOTH), refresher(), reader())),
    "a load of the rest": (ONE, (writer(MOVE), writer(SECOND), loader(BOTH), refresher(2))),
    "a load with readers": (ONE, (writer(MOVE), loader(BOTH), refresher(2), reader(), reader())),
    "an extension": (ONE, (writer(MOVE), loader(BOTH, extend=True), refresher(2), reader())),
    "a slide": (ONE, (writer(MOVE), writer(SECOND), loader(BOTH - ONE), refresher(2))),
    "two loads": (ONE, (writer(MOVE), loader(BOTH - ONE), loader(BOTH), refresher(2), reader())),
    "an eviction": (BOTH, (writer(MOVE), writer(SECOND), loader(ONE), refresher(2))),
    "a clearing": (BOTH, (writer(MOVE), loader(NONE), loader(BOTH), refresher(2), reader())),
    "gaps": (ONE, (writer(MOVE), writer(SECOND), refresher(2), reader())),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_interleaving_keeps_the_promises(scenario: str) -> None:
    """Whoever is faster, answers are strict and whole, and the records converge."""
    coverage, actors = SCENARIOS[scenario]
    assert explore(Protocol(), coverage, *actors) > 100


MUTATIONS: dict[str, tuple[Protocol, str, str]] = {
    "marks before COMMIT only": (
        Protocol(commit=("mark", "commit")),
        "a move beside a refresh",
        "convergent",
    ),
    "marks after COMMIT without a lease": (
        Protocol(commit=("commit", "mark")),
        "two refreshes",
        "strict",
    ),
    "marks before COMMIT, with a lease during it": (
        Protocol(commit=("lease", "mark", "commit", "release")),
        "a move beside a refresh",
        "convergent",
    ),
    "the lease is released before the marks are made": (
        Protocol(commit=("lease", "commit", "release", "mark")),
        "two refreshes",
        "strict",
    ),
    "a refresh clears all marks": (
        Protocol(clear="all", remark=False),
        "a move beside a refresh",
        "convergent",
    ),
    "a refresh clears marks that are newer than the ones it saw": (
        Protocol(clear="named", remark=False),
        "two refreshes",
        "convergent",
    ),
    "newer marks are not made again when something is applied": (
        Protocol(remark=False),
        "a load of the rest",
        "convergent",
    ),
    "the token is noted after the snapshot": (
        Protocol(token_first=False),
        "a move beside a refresh",
        "convergent",
    ),
    "lineage is followed only as stored": (
        Protocol(joined_lineage=False),
        "a move beside a refresh",
        "convergent",
    ),
    "lineage is followed only as joined now": (
        Protocol(stored_lineage=False),
        "a move beside a refresh",
        "convergent",
    ),
    "a refresh is applied to another coverage": (
        Protocol(retry=False),
        "a slide",
        "convergent",
    ),
    "gaps are merged without looking again": (
        Protocol(recheck=False),
        "gaps",
        "whole",
    ),
    "records are swapped in one by one": (
        Protocol(whole=False),
        "a move beside a refresh",
        "whole",
    ),
    "readers are answered in spite of marks": (
        Protocol(marks_block=False),
        "two refreshes",
        "strict",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rule_is_noticed(mutation: str) -> None:
    """Every rule is needed: without it, some interleaving breaks a promise."""
    rules, scenario, promise = MUTATIONS[mutation]
    coverage, actors = SCENARIOS[scenario]
    with pytest.raises(Broken, match=promise):
        explore(rules, coverage, *actors)


def test_acknowledged_writes_are_what_is_missed_without_marks() -> None:
    """A read that starts after a commit was acknowledged notices that nothing was marked."""
    coverage, actors = SCENARIOS["two refreshes"]
    with pytest.raises(Broken, match="read your writes"):
        explore(Protocol(commit=("commit",)), coverage, *actors[:1], actors[-1], at_rest=False)


def test_every_mutation_is_another_protocol() -> None:
    """No mutation is the protocol itself."""
    assert all(rules != Protocol() for rules, _, _ in MUTATIONS.values())
