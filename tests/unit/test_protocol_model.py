"""The protocol of ``sa_tablecache/table.py``, checked over every interleaving of a small world.

The world is a database with two parents and one child, and a view of the parents left joined with
the child, anchored on the parent: moving the child changes two records at once. Marks and leases
*move* records, and then concern every reader, or are *in place*, and then concern only readers of
the stored records with that row in their lineage. Writers commit and publish, refreshes and loads
go their steps, readers read all of the view or one record; between any two steps any other actor
may take one. Every reachable state is visited, and four promises are checked:

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


class Mark(NamedTuple):
    """A base row (``child``, or a parent's number) that was written, or all of the ``view``."""

    row: str
    moves: bool = False
    """Whether records may have come, gone or moved; if not, only their values have changed."""


Marks = tuple[Mark, ...]
Numbered = tuple[tuple[Mark, int], ...]
Parents = frozenset[int]
Record = tuple[int, int | None]
"""A parent's value, and that of the child if it is there."""
Records = dict[int, Record]

BOTH: Parents = frozenset({1, 2})
ONE: Parents = frozenset({1})
TWO: Parents = frozenset({2})
NONE: Parents = frozenset()


# -- the database ------------------------------------------------------------------------------


class Database(NamedTuple):
    """Committed rows: the parent of the child, and the values of all three."""

    child_at: int = 1
    child: int = 0
    first: int = 0
    second: int = 0

    def view(self, parents: Parents) -> Records:
        """The records that the view's SELECT returns for some parents."""
        every = {
            1: (self.first, self.child if self.child_at == 1 else None),
            2: (self.second, self.child if self.child_at == 2 else None),
        }
        return {number: record for number, record in every.items() if number in parents}


@dataclass(frozen=True)
class Change:
    """What a transaction writes, and the marks that follow from it."""

    marks: Marks
    write: Callable[[Database], Database]


MOVE = Change((Mark("child", moves=True),), lambda db: db._replace(child_at=3 - db.child_at))
TOUCH = Change((Mark("child"),), lambda db: db._replace(child=db.child + 1))
FIRST = Change((Mark("1"),), lambda db: db._replace(first=db.first + 1))
SECOND = Change((Mark("2"),), lambda db: db._replace(second=db.second + 1))
PAIR = Change(
    (Mark("1"), Mark("2")), lambda db: db._replace(first=db.first + 1, second=db.second + 1)
)
UNKNOWN = Change(
    (Mark("view", moves=True),),
    lambda db: Database(3 - db.child_at, db.child + 1, db.first + 1, db.second + 1),
)


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
    marks_count: bool = True
    leases_count: bool = True
    """Whether readers go to the database for what is marked, and for what is leased."""
    tell_apart: bool = True
    """Whether a mark that moves records is taken for one."""
    kind_kept: bool = True
    """Whether a mark that is pending again still is one that moves records."""
    look_again: bool = True
    """Whether the records of a mark in place are looked up in what was swapped in."""


class Table(NamedTuple):
    """The state of the cached table; all of it changes only in critical sections."""

    records: tuple[tuple[int, Record], ...]
    coverage: Parents
    coverage_id: int = 0
    stamp: int = 0
    sequence: int = 0
    leases: Marks = ()
    pending: Numbered = ()
    stale: tuple[tuple[Mark, Parents], ...] = ()
    """For each mark in place, pending or leased, the records that it concerns."""
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


def lineage(row: str, records: Records) -> Parents:
    """The records with a base row in them."""
    if row == "child":
        return frozenset(number for number, (_, child) in records.items() if child is not None)
    return frozenset({int(row)} & records.keys())


def looked_up(table: Table, *, again: bool = False) -> Table:
    """Find the records of marks and leases in place; the ones known already only if told to."""
    known = {} if again else dict(table.stale)
    records = dict(table.records)
    in_place = {mark for mark in (*dict(table.pending), *table.leases) if not mark.moves}
    stale = {mark: known.get(mark, lineage(mark.row, records)) for mark in in_place}
    return table._replace(stale=tuple(sorted(stale.items())))


def leased(table: Table, marks: Marks) -> Table:
    """Announce marks, in the critical section that the caller is in."""
    return looked_up(table._replace(leases=tuple(sorted((*table.leases, *marks)))))


def released(table: Table, marks: Marks) -> Table:
    """End a lease."""
    leases = list(table.leases)
    for mark in marks:
        leases.remove(mark)
    return looked_up(table._replace(leases=tuple(leases)))


def marked(table: Table, marks: Marks) -> Table:
    """Add marks."""
    for mark in marks:
        sequence = table.sequence + 1
        pending = {**dict(table.pending), mark: sequence}
        log = (*table.log, (sequence, mark)) if table.underway else table.log
        table = table._replace(sequence=sequence, pending=tuple(pending.items()), log=log)
    if not table.coverage and not table.underway:
        table = table._replace(pending=())
    return looked_up(table)


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
        table = looked_up(table._replace(pending=()))
    return table


def applied(
    rules: Protocol,
    table: Table,
    token: int,
    records: Records,
    coverage: Parents,
    noted: Numbered,
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
            if not rules.kind_kept:
                pending.pop(mark, None)
                mark = mark._replace(moves=False)
            pending[mark] = sequence
            log = (*log, (sequence, mark))
    table = table._replace(
        records=tuple(sorted(records.items())),
        coverage=coverage,
        stamp=table.stamp + 1,
        sequence=sequence,
        pending=tuple(pending.items()),
        log=log,
    )
    return looked_up(table, again=rules.look_again)


def read_touched(
    rules: Protocol,
    stored: Records,
    coverage: Parents,
    noted: Numbered,
    snapshot: Database,
) -> tuple[Parents, Records]:
    """The anchors that marks touch, as stored and as joined now, and their records now."""
    rows = {mark.row for mark, _ in noted}
    now = snapshot.view(coverage)
    if "view" in rows:
        return BOTH, now
    touched = frozenset(int(row) for row in rows if row != "child")
    if "child" in rows:
        if rules.stored_lineage:
            touched |= lineage("child", stored)
        if rules.joined_lineage:
            touched |= lineage("child", now)
    return touched, {n: record for n, record in now.items() if n in touched}


def concerned(rules: Protocol, table: Table, wanted: Parents) -> bool:
    """Whether marks or leases could concern an answer with these records."""
    marks = dict(table.pending) if rules.marks_count else {}
    leases = table.leases if rules.leases_count else ()
    if any(mark.moves for mark in (*marks, *leases)):
        return True
    return any(
        not records.isdisjoint(wanted)
        for mark, records in table.stale
        if mark in marks or mark in leases
    )


# -- actors ------------------------------------------------------------------------------------


class Actor(NamedTuple):
    """Somebody with a program, and where in it they are."""

    kind: str
    argument: object
    at: str
    token: int = 0
    noted: Numbered = ()
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


def reader(wanted: Parents = BOTH) -> Actor:
    """Somebody who reads all records of the view, or one."""
    return Actor("reader", wanted, "start")


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
        marks = change.marks
        if not self.rules.tell_apart:
            marks = tuple(mark._replace(moves=False) for mark in marks)
        table, history, committed = world.table, world.history, actor.started
        match steps[at]:
            case "lease":
                table = leased(table, marks)
            case "commit":
                history = (*history, change.write(history[-1]))
                committed = len(history) - 1
            case "mark":
                table = marked(table, marks)
            case "release":
                table = released(table, marks)
            case "publish":
                table = released(marked(table, marks), marks)
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
                    stale=(),
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
        """Answer from the records, with gaps from the database, or from the database alone."""
        rules, table, wanted = self.rules, world.table, actor.argument
        assert isinstance(wanted, frozenset)
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
            case "look" if not wanted & table.coverage or concerned(
                rules, table, wanted & table.coverage
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
                yield world, actor._replace(at="merge", read=tuple(gaps.items()))
            case "merge" if rules.recheck and (
                table.stamp != actor.stamp or concerned(rules, table, wanted & actor.coverage)
            ):
                yield world, actor._replace(at="ask", stored=(), read=())
            case "merge":
                yield self.answered(world, actor, {**dict(actor.stored), **dict(actor.read)})
            case "ask":
                yield self.answered(world, actor, world.history[-1].view(wanted))

    def answered(self, world: World, actor: Actor, answer: Records) -> tuple[World, Actor]:
        """Check the answer of a read against all states that the database has had."""
        wanted = actor.argument
        assert isinstance(wanted, frozenset)
        ages = [n for n, state in enumerate(world.history) if state.view(wanted) == answer]
        if not ages:
            raise Broken("whole")
        if ages[-1] < actor.token:
            raise Broken("read your writes")
        if ages[-1] < actor.started:
            raise Broken("strict")
        return world, Actor("reader", wanted, "end")


def check_quiet(rules: Protocol, world: World) -> None:
    """Check that a world in which nobody can move converges."""
    table, database = world.table, world.history[-1]
    assert not table.leases
    assert not table.underway
    assert not table.log
    assert {mark for mark, _ in table.stale} <= dict(table.pending).keys()
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
    "gaps of a pair": (ONE, (writer(PAIR), writer(TOUCH), refresher(2), reader())),
    "one record": (BOTH, (writer(FIRST), writer(SECOND), refresher(2), reader(TWO), reader())),
    "a pair": (BOTH, (writer(PAIR), writer(SECOND), refresher(), reader(ONE), reader())),
    "a touch and a move": (BOTH, (writer(TOUCH), writer(MOVE), refresher(2), reader(TWO))),
    "two moves and a touch": (
        BOTH,
        (writer(TOUCH), writer(MOVE), writer(MOVE), refresher(), reader(TWO)),
    ),
    "a touch during a load": (
        ONE,
        (writer(TOUCH), writer(MOVE), loader(BOTH), refresher(2), reader(TWO)),
    ),
    "a touch during a slide": (
        ONE,
        (writer(TOUCH), writer(MOVE), loader(TWO), refresher(2), reader(TWO)),
    ),
    "an unknown write beside a touch": (
        BOTH,
        (writer(UNKNOWN), writer(TOUCH), refresher(2), reader(ONE), reader(TWO)),
    ),
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
        Protocol(marks_count=False),
        "two refreshes",
        "strict",
    ),
    "readers are answered in spite of leases": (
        Protocol(leases_count=False),
        "two refreshes",
        "strict",
    ),
    "readers of one record are answered in spite of leases": (
        Protocol(leases_count=False),
        "one record",
        "strict",
    ),
    "the lease in place is released before the marks are made": (
        Protocol(commit=("lease", "commit", "release", "mark")),
        "one record",
        "strict",
    ),
    "a change that moves records is taken for one in place": (
        Protocol(tell_apart=False),
        "a touch and a move",
        "strict",
    ),
    "a mark that is made again is taken for one in place": (
        Protocol(kind_kept=False),
        "a touch during a load",
        "strict",
    ),
    "the records of marks in place are those of before the swap": (
        Protocol(look_again=False),
        "a touch and a move",
        "strict",
    ),
    "gaps are merged without looking at marks in place again": (
        Protocol(recheck=False),
        "gaps of a pair",
        "whole",
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
