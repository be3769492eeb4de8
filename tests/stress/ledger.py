"""What was written when, and whether an answer can have been the database's at any moment.

In: transactions, as their writers report them, and answers, as observations of versions. Out: an
:class:`Impossible` for an answer that no state of the database explains.

Each row that a test watches is an *entity*; each transaction gives some entities their next
version, whose number the row carries. Writers hold an entity while they write it, so its versions
are a sequence; which of them an answer may show follows from when each commit began and when it was
acknowledged:

* *dirty*: a version that was rolled back, or whose COMMIT was not sent yet;
* *stale*: a version older than one whose COMMIT had returned before the read began, or which an
  answer had shown before;
* *torn*: a transaction of which the answer shows one row and not the other, or a later transaction
  without one that was acknowledged before that one's COMMIT was sent.

Pure: no SQL, and no waiting. Lists only grow while others read them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any, TypeAlias

Entity: TypeAlias = tuple[str, int]
State: TypeAlias = Any
"""What the row says, beside its version; ``None`` for a row that is not there."""

NEVER = float("inf")


class Impossible(AssertionError):
    """An answer that the database cannot have given."""


@dataclass(eq=False)
class Transaction:
    """One transaction: when its COMMIT was about to be sent, and when it had returned."""

    writes: dict[Entity, "Version"] = field(default_factory=dict)
    committing: float = NEVER
    acknowledged: float = NEVER
    dead: bool = False
    quiet: bool = False
    """Whether the cache only hears of it when it is acknowledged, so that it may be seen before."""
    elsewhere: bool = False
    """Whether the cache only hears of it by its change feed."""


@dataclass(frozen=True, eq=False)
class Version:
    """What one transaction made of one entity."""

    number: int
    state: State
    transaction: Transaction


@dataclass(frozen=True)
class Seen:
    """A version that an answer shows, with what the answer says of its state."""

    number: int
    agrees: Callable[[State], bool] = lambda _: True


class Ledger:
    """The versions of all entities.

    :param states: the number and the state of each, as everybody sees them at the start.
    """

    def __init__(self, states: Mapping[Entity, tuple[int, State]]) -> None:
        origin = Transaction(committing=0, acknowledged=0)
        for entity, (number, state) in states.items():
            origin.writes[entity] = Version(number, state, origin)
        self._versions = {entity: [version] for entity, version in origin.writes.items()}

    def now(self) -> int:
        """Return a moment that is later than all before: nanoseconds."""
        return monotonic_ns()

    # -- writing --------------------------------------------------------------------------------

    def entities(self, kind: str) -> list[Entity]:
        """Return the entities of a kind."""
        return [entity for entity in self._versions if entity[0] == kind]

    def latest(self, entity: Entity) -> Version:
        """Return the version that the next one will follow; for who holds the entity."""
        return next(v for v in reversed(self._versions[entity]) if not v.transaction.dead)

    def begin(self, states: Mapping[Entity, State]) -> Transaction:
        """Note what a transaction is going to write, and number the versions."""
        transaction = Transaction()
        for entity, state in states.items():
            versions = self._versions[entity]
            version = Version(versions[-1].number + 1, state, transaction)
            transaction.writes[entity] = version
            versions.append(version)
        return transaction

    def commits(self, transaction: Transaction) -> None:
        """Note that COMMIT is about to be sent."""
        transaction.committing = self.now()

    def acknowledge(self, transaction: Transaction) -> None:
        """Note that COMMIT has returned, to whoever heard of it first."""
        if not transaction.dead:
            transaction.acknowledged = min(transaction.acknowledged, self.now())

    def abandon(self, transaction: Transaction) -> None:
        """Note that the transaction was rolled back."""
        transaction.dead = True

    # -- reading --------------------------------------------------------------------------------

    def judge(
        self,
        began: int,
        seen: Iterable[tuple[Entity, Seen]],
        unseen: Mapping[Entity, Callable[[State], bool]],
        *,
        since: int | None = None,
    ) -> None:
        """Check an answer.

        :param began: a moment before the read began.
        :param seen: the versions that the answer shows; one may occur several times.
        :param unseen: entities that the answer does not show, and in which states it would have
            shown them.
        :param since: up to when it has to have what was committed elsewhere; all by default.
        :raises Impossible: if the database cannot have given this answer.
        """
        ended = self.now()
        since = began if since is None else since
        shown: dict[Entity, Version] = {}
        for entity, what in seen:
            version = self._version(entity, what.number)
            if version is None or version.transaction.dead:
                raise Impossible(f"dirty: {entity} in version {what.number}, {version}")
            if version.transaction.committing > ended:
                raise Impossible(f"dirty: {entity} in version {what.number}, not committed yet")
            if shown.setdefault(entity, version) is not version:
                msg = f"torn: {entity} in versions {shown[entity].number} and {version.number}"
                raise Impossible(msg)
            if version.state is None or not what.agrees(version.state):
                msg = f"mixed: {entity} in version {version.number}, which was {version.state}"
                raise Impossible(msg)
        for entity, would_show in unseen.items():
            candidates = [
                version
                for version in self._possible(entity, began, since)
                if version.state is None or not would_show(version.state)
            ]
            if not candidates:
                possible = [(v.number, v.state) for v in self._possible(entity, began, since)]
                raise Impossible(f"missing: {entity}, which may have been {possible}")
            if len(candidates) == 1:
                shown[entity] = candidates[0]
        self._check_moment(began, since, shown)
        for version in shown.values():
            # What one has seen, nobody may miss any more.
            transaction = version.transaction
            if not transaction.quiet:
                transaction.acknowledged = min(transaction.acknowledged, ended)

    def _check_moment(self, began: int, since: int, shown: Mapping[Entity, Version]) -> None:
        """Check that one moment, not before the read began, has all these versions."""
        included: dict[Transaction, Entity] = {}
        excluded: dict[Transaction, Entity] = {}
        for entity, version in shown.items():
            for other in tuple(self._versions[entity]):
                if not other.transaction.dead:
                    side = included if other.number <= version.number else excluded
                    side[other.transaction] = entity
        for transaction in included.keys() & excluded.keys():
            writes = {entity: v.number for entity, v in transaction.writes.items()}
            raise Impossible(
                f"torn: of the transaction that wrote {writes}, {included[transaction]} is shown"
                f" and {excluded[transaction]} is not"
            )
        latest = max((t.committing for t in included), default=0)
        for transaction, entity in excluded.items():
            missed = {e: v.number for e, v in transaction.writes.items()}
            if transaction.acknowledged < (since if transaction.elsewhere else began):
                msg = f"stale: {entity} in version {shown[entity].number}, after {missed} was done"
                raise Impossible(msg)
            if transaction.acknowledged < latest:
                raise Impossible(f"torn: a later transaction is shown, and {missed} is not")

    def _version(self, entity: Entity, number: int) -> Version | None:
        found = [v for v in tuple(self._versions.get(entity, ())) if v.number == number]
        return found[0] if found else None

    def _possible(self, entity: Entity, began: int, since: int) -> list[Version]:
        """Return the versions that a read which began at this moment may show."""
        versions = [
            version
            for version in tuple(self._versions[entity])
            if not version.transaction.dead and version.transaction.committing < NEVER
        ]
        done = [
            v.number
            for v in versions
            if v.transaction.acknowledged < (since if v.transaction.elsewhere else began)
        ]
        oldest = max(done, default=versions[0].number)
        return [version for version in versions if version.number >= oldest]
