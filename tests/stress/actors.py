"""What one thread or task does: write, read its own writes back, read others', move the coverage.

Everything is chosen by a generator of random numbers of the actor's own, so that a seed gives the
same operations again; what they meet depends on who is faster, as far as the operations do.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from tests.integration.checking import Checker
from tests.integration.writer import Writer
from tests.stress import partitions, writes
from tests.stress.conductors import Conductor
from tests.stress.elsewhere import KEEP, Elsewhere, SecondProcess, untriggered
from tests.stress.ledger import NEVER, Entity, Impossible, Ledger, Transaction
from tests.stress.world import (
    ACCOUNTS,
    NEW_KEYS,
    OWNERS,
    RANGES,
    SCORES,
    VIEWS,
    Account,
    AccountState,
    Board,
    Household,
    Mirror,
    Owner,
    Peers,
    Shown,
    Slow,
    Watched,
    account,
    committed,
    judge,
    owner,
)

Operation = tuple[str, Any, int, dict[str, Any]]
"""`insert`, `update` or `delete`; the model; the key; the values."""

COMMITTED = "tests.stress.committed"
"""In the info of a connection: what to call when its next COMMIT has returned."""

CUT = "tests.stress.cut"
"""In the info of a connection: that it breaks while its next COMMIT is under way."""

READ_ERRORS = (DBAPIError,)
WRITE_ERRORS = (DBAPIError, StaleDataError, InvalidRequestError)

LONGEST_WAIT = 60.0
"""Seconds after which a transaction of unknown outcome counts as stuck."""


@dataclass
class Scene:
    """What all actors of a round share."""

    conductor: Conductor
    engine: Engine
    cache: Any
    factory: Callable[..., Session]
    ledger: Ledger
    counts: Counter[str]
    entities: dict[Entity, Any]
    """A lock for each entity."""
    gates: list[Any]
    """A lock for each actor, which it holds while it writes in the zoo."""
    family: str
    kinds: list[Any]
    kills: bool
    two_phase: bool
    threads: bool = True
    elsewhere: Elsewhere | None = None
    """Those who write beside the cache, if it has a change feed."""
    stop: bool = False
    pids: set[int] = field(default_factory=set)

    @property
    def fresh(self) -> Callable[..., Session]:
        """What makes sessions that see everything that was committed."""
        return self.factory if self.elsewhere is None else self.elsewhere.fresh


class Actor:
    """One of many.

    :param bystander: a connection of its own that nothing is attached to, in AUTOCOMMIT mode.
    """

    def __init__(self, scene: Scene, number: int, seed: str, bystander: Connection) -> None:
        self.scene = scene
        self.number = number
        self.rng = Random(seed)
        self.bystander = bystander
        self.log: deque[str] = deque(maxlen=40)
        self.hand = writes.Hand(self.rng, self.log.append)
        self.writer = Writer(
            scene.engine, scene.factory, scene.family, self.rng.randrange(10**9), self._look
        )
        self.writers = [self.writer]
        if scene.elsewhere is not None:
            engine, factory = scene.elsewhere.engine, scene.elsewhere.factory
            others = Writer(engine, factory, scene.family, self.rng.randrange(10**9))
            others.log = self.writer.log
            self.writers.append(others)
        self.since: int | None = None
        """Up to when answers have to have what was committed elsewhere."""
        self.checkers = [
            Checker(kind, scene.fresh, bystander, Random(self.rng.randrange(10**9)))
            for kind in scene.kinds
        ]
        self.driver_errors: Any = scene.engine.dialect.loaded_dbapi.Error  # type: ignore[union-attr]

    def run(self, steps: int) -> None:
        """Take so many steps, or fewer if somebody finds that an answer is wrong."""
        acts: list[tuple[Callable[[], None], float]] = [
            (self.write, 4),
            (self.undo, 0.6),
            (self.read, 7),
            (self.move, 2),
            (self.write_zoo, 2),
            (self.check_zoo, 1),
            (self.move_zoo, 0.5),
        ]
        if self.scene.kills:
            acts.append((self.kill, 0.4))
        if self.scene.elsewhere is not None:
            # Checks in the zoo have the feed read all the time, after which nothing is unseen.
            acts = [(act, w) for act, w in acts if act != self.check_zoo]
            acts += [(self.check_zoo, self.scene.elsewhere.strict), (self.step, 1.5)]
            acts.append((self.trim, 0.3 * self.scene.elsewhere.strict))
            # A bystander that waits for a lock would stop the event loop, and who holds the lock.
            if self.scene.engine.dialect.name == "postgresql" and self.scene.threads:
                acts += [(self.write_unseen, 0.3), (self.write_slices, 1), (self.read_slices, 1)]
        for _ in range(steps):
            if self.scene.stop:
                return
            (act,) = self.rng.choices([a for a, _ in acts], weights=[w for _, w in acts])
            self.log.append(f"  {act.__name__}")
            try:
                act()
            except BaseException as error:
                self.log.append(f"  -> {error!r}")
                self.scene.stop = True
                raise

    # -- writing accounts -----------------------------------------------------------------------

    def write(self, *, unseen: bool = False) -> None:
        """Write some accounts and owners in one transaction, and read them back.

        :param unseen: whether to have triggers switched off meanwhile, and write elsewhere.
        """
        rng = self.rng
        if rng.random() < 0.15:
            names, owners = [], [rng.randint(1, OWNERS)]
        else:
            names = rng.sample(range(1, ACCOUNTS + 1), k=rng.choice([1, 1, 2, 3]))
            owners = rng.sample(range(1, OWNERS + 1), k=rng.choice([0, 0, 1, 2]))
        entities = [*map(account, names), *map(owner, owners)]
        # A cancellation is answered by who holds the entities: they are not given up before the
        # outcome is known.
        with self._holding(entities):
            states = self._new_states(names) | {owner(number): () for number in owners}
            before = {entity: self.scene.ledger.latest(entity).state for entity in states}
            transaction = self.scene.ledger.begin(states)
            operations = self._operations(before, transaction)
            pids: set[int] = set()
            job = self._job(names, operations, transaction, pids)
            shells = writes.SHELLS
            if len(operations) == 1:
                shells = writes.OF_ONE_STATEMENT * 2 + shells
            if self.scene.two_phase:
                shells = (*shells, writes.two_phase)
            shell = rng.choice(shells)
            transaction.quiet = shell is writes.raw_connection
            others = self.scene.elsewhere
            if others is not None and (unseen or rng.random() < 0.6):
                transaction.elsewhere, transaction.quiet = True, False
                job.engine, job.factory = others.engine, others.factory
                if others.process is not None and rng.random() < 0.3:
                    shell = partial(_by_process, others.process)
            self.log.append(
                f"    {_name(shell)}{' elsewhere' if transaction.elsewhere else ''}"
                f" {[(o[0], o[2], o[3]) for o in operations]}"
            )
            with untriggered(self.bystander) if unseen else nullcontext():
                done = self.scene.conductor.attempt(
                    partial(self._transact, shell, job, transaction, pids), rng
                )
            if not done:
                self.log.append("    cancelled")
                self.scene.counts["cancelled"] += 1
            if not transaction.dead:
                self.scene.counts["transactions"] += 1
                if transaction.elsewhere and others is not None:
                    if rng.random() < others.strict:
                        self._attempt_read(partial(self._read_back, names, self.scene.fresh))
                else:
                    self._attempt_read(partial(self._read_back, names, self.scene.factory))

    def _transact(
        self, shell: writes.Shell, job: writes.Job, transaction: Transaction, pids: set[int]
    ) -> None:
        ledger = self.scene.ledger
        try:
            shell(job)
        except (*WRITE_ERRORS, self.driver_errors) as error:
            self.log.append(f"    -> {type(error).__name__}: {str(error)[:100]}")
            self.scene.counts["failed writes"] += 1
            self._resolve(transaction, pids)
        except BaseException:
            self._resolve(transaction, pids)
            raise
        else:
            ledger.acknowledge(transaction)

    def _resolve(self, transaction: Transaction, pids: set[int]) -> None:
        """Find out what became of a transaction of which nobody told."""
        ledger = self.scene.ledger
        if transaction.committing == NEVER:
            ledger.abandon(transaction)
            return
        self._wait_for_end(pids)
        states = committed(self.bystander, transaction.writes)
        landed = {
            entity: states[entity] == (version.number, version.state)
            or (version.state is None and states[entity][1] is None)
            for entity, version in transaction.writes.items()
        }
        if len(set(landed.values())) != 1:
            raise Impossible(f"a transaction was committed in part: {landed}, {states}")
        self.scene.counts["unknown outcomes"] += 1
        if all(landed.values()):
            ledger.acknowledge(transaction)
        else:
            ledger.abandon(transaction)

    def _wait_for_end(self, pids: set[int]) -> None:
        """Wait until the server processes have ended what they did."""
        deadline = monotonic() + LONGEST_WAIT

        def pause() -> None:
            if monotonic() > deadline:
                raise TimeoutError("a transaction that was cut off holds its locks for ever")
            self.scene.conductor.pause(0.01)

        if self.bystander.dialect.name == "postgresql":
            known = text("SELECT pid, xact_start FROM pg_stat_activity WHERE pid = ANY(:pids)")
            running = {(pid, at) for pid, at in self.bystander.execute(known, {"pids": [*pids]})}
            while running := {pair for pair in running if pair[1] is not None}:
                pause()
                running &= {(p, at) for p, at in self.bystander.execute(known, {"pids": [*pids]})}
        elif self.bystander.dialect.name == "sqlite":
            # Who has the lock for writing knows that nobody else is about to commit. It does not
            # wait for it: a task that did would keep who holds it from going on.
            patience = self.bystander.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
            self.bystander.exec_driver_sql("PRAGMA busy_timeout = 0")
            try:
                while True:
                    with suppress(DBAPIError):
                        self.bystander.exec_driver_sql("BEGIN IMMEDIATE")
                        self.bystander.exec_driver_sql("ROLLBACK")
                        return
                    pause()
            finally:
                self.bystander.exec_driver_sql(f"PRAGMA busy_timeout = {patience}")

    def _new_states(self, names: list[int]) -> dict[Entity, Any]:
        rng, ledger = self.rng, self.scene.ledger
        states: dict[Entity, Any] = {}
        for name in names:
            state: AccountState | None = ledger.latest(account(name)).state
            if state is None:
                state = AccountState(name, name, rng.randrange(SCORES), 0, name, None)
            elif state.amount == 0 and rng.random() < 0.12:
                state = None
            else:
                match rng.choice(["touch", "touch", "touch", "score", "owner", "peer", "key"]):
                    case "score":
                        state = state._replace(score=rng.randrange(SCORES))
                    case "owner":
                        state = state._replace(owner=rng.choice([None, *range(1, OWNERS + 1)]))
                    case "peer":
                        state = state._replace(peer=rng.randint(1, ACCOUNTS))
                    case "key":
                        key = name + NEW_KEYS * rng.randrange(5)
                        state = state._replace(id=key)
            states[account(name)] = state
        alive = [entity for entity, state in states.items() if state is not None]
        if len(alive) > 1:
            # One gives, one takes; as often as not, so much that nothing is left.
            one, other = rng.sample(alive, k=2)
            amount = rng.choice([states[one].amount, rng.randint(1, 9)])
            states[one] = states[one]._replace(amount=states[one].amount - amount)
            states[other] = states[other]._replace(amount=states[other].amount + amount)
        return states

    def _operations(self, before: dict[Entity, Any], transaction: Transaction) -> list[Operation]:
        operations: list[Operation] = []
        for entity, version in transaction.writes.items():
            (kind, number), old, new = entity, before[entity], version.state
            numbered = {"version": version.number}
            if kind == "owner":
                operations.append(("update", Owner, number, numbered))
            elif new is None:
                if old is not None:
                    operations.append(("delete", Account, old.id, {}))
            elif old is None:
                values = {"id": new.id, "name": number, **numbered, **_columns(new)}
                operations.append(("insert", Account, new.id, values))
                operations.append(("insert", Mirror, new.id, {"id": new.id, **numbered}))
            else:
                was = {"id": old.id, **_columns(old)}
                will = {"id": new.id, **_columns(new)}
                values = numbered | {n: v for n, v in will.items() if v != was[n]}
                operations.append(("update", Account, old.id, values))
                operations.append(("update", Mirror, new.id, numbered))
        return operations

    def _job(
        self,
        names: list[int],
        operations: list[Operation],
        transaction: Transaction,
        pids: set[int],
    ) -> writes.Job:
        slow = self.scene.kills and self.rng.random() < 0.15 and len(operations) > 1
        cut = slow and self.rng.random() < 0.4

        def commits() -> None:
            if transaction.committing == NEVER:
                self.scene.ledger.commits(transaction)

        def work(target: writes.Target) -> None:
            if self.scene.engine.dialect.name == "sqlite":
                # To release a savepoint may be to commit: the driver begins late.
                commits()
            if slow:
                target.execute(insert(Slow.__table__))
            for what, model, key, values in operations:
                match what:
                    case "insert":
                        self.hand.insert(target, model, **values)
                    case "update":
                        self.hand.update(target, model, key, **values)
                    case _:
                        self.hand.delete(target, model, key)
            if hasattr(target, "last_read") and self.rng.random() < 0.3:
                self._see_own(target, names, transaction)

        def connected(connection: Any) -> None:
            pids.update(_pid_of(connection))
            connection.info[CUT] = cut
            connection.info[COMMITTED] = lambda: self.scene.ledger.acknowledge(transaction)

        return writes.Job(
            self.scene.engine,
            self.scene.factory,
            self.rng,
            work,
            lambda target: writes.spoil(self.hand, target, names),
            commits,
            connected,
            lambda: [_sql(*operation) for operation in operations],
        )

    def undo(self) -> None:
        """Write and roll back: nothing of it may ever be seen."""
        names = self.rng.sample(range(1, ACCOUNTS + 1), k=self.rng.choice([1, 2]))
        with self._holding(list(map(account, names))):
            shells = writes.UNDOING
            if self.scene.two_phase:
                shells = (*shells, writes.prepared_and_rolled_back)
            shell = self.rng.choice(shells)
            self.log.append(f"    {shell.__name__} {names}")
            job = self._job(names, [], Transaction(), set())
            try:
                self.scene.conductor.attempt(partial(shell, job), self.rng)
            except writes.Undone:
                pass
            except (*WRITE_ERRORS, self.driver_errors) as error:
                self.log.append(f"    -> {type(error).__name__}: {str(error)[:100]}")
                self.scene.counts["failed writes"] += 1

    @contextmanager
    def _holding(self, entities: list[Entity]) -> Iterator[None]:
        with ExitStack() as stack:
            for entity in sorted(entities):
                stack.enter_context(self.scene.entities[entity])
            yield

    def _see_own(self, session: Session, names: list[int], transaction: Transaction) -> None:
        """Read what this very transaction wrote, and nobody else sees."""
        view = self.rng.choice([Board, Peers, Watched])
        numbers = {
            entity[1]: version.number
            for entity, version in transaction.writes.items()
            if entity[0] == "account" and version.state is not None
        }
        records = session.scalars(select(view).where(view.name.in_(names))).all()
        found = {record.name: record.version for record in records}
        if view is Peers:  # whose peer may be gone
            numbers = {name: number for name, number in numbers.items() if name in found}
        if found != numbers:
            raise Impossible(f"own writes: {view.__name__} has {found} instead of {numbers}")

    # -- reading accounts -----------------------------------------------------------------------

    def read(self) -> None:
        """Ask one question or two, and judge the answers."""
        self._attempt_read(self._ask)

    def _attempt_read(self, ask: Callable[[], None]) -> None:
        try:
            self.scene.conductor.attempt(ask, self.rng)
        except READ_ERRORS as error:
            self.log.append(f"    -> {type(error).__name__}: {str(error)[:100]}")
            self.scene.counts["failed reads"] += 1

    def _ask(self) -> None:
        questions = [
            self._all,
            self._all,
            self._by_name,
            self._by_score,
            self._by_owner,
            self._filtered,
            self._page,
            self._by_key,
        ]
        factory, seen = self._reader()
        with factory() as session:
            began = None
            for _ in range(self.rng.choice([1, 1, 2])):
                # Where a transaction reads one snapshot, the second answer may be as old.
                if began is None or session.get_bind().dialect.name == "postgresql":
                    began = self.scene.ledger.now()
                    self.since = began if seen is None else max(seen, began - self._lag)
                question = self.rng.choice(questions)
                self.log.append(f"    {question.__name__}")
                question(session, began)
                self._count(session)

    @property
    def _lag(self) -> int:
        return 0 if self.scene.elsewhere is None else self.scene.elsewhere.lag

    def _reader(self) -> tuple[Callable[..., Session], int | None]:
        """Return what makes a session, and until when it has to see what was written elsewhere.

        All until its reads, if that is not said.
        """
        others = self.scene.elsewhere
        if others is None:
            return self.scene.factory, None
        if self.rng.random() >= others.strict:
            return self.scene.factory, 0
        if self.rng.random() < 0.5:
            return self.scene.fresh, None
        seen = self.scene.ledger.now()
        self.scene.cache.wait_for(self.scene.cache.commit_token())
        return self.scene.factory, seen

    def _count(self, session: Any) -> None:
        self.scene.counts["reads"] += 1
        last = session.last_read
        self.scene.counts[last.kind if last is not None else "database"] += 1

    def _judge(
        self, began: int, view: type[Any], records: Any, shown: Shown, *, whole: bool = False
    ) -> None:
        records = list(records)
        try:
            judge(self.scene.ledger, began, view, records, shown, whole=whole, since=self.since)
        except Impossible as error:
            error.add_note(f"{view.__name__} answered {records}")
            raise

    def _all(self, session: Any, began: int) -> None:
        view = self.rng.choice(VIEWS)
        if self.rng.random() < 0.5:
            records = session.scalars(select(view)).all()
        else:
            records = session.range(self.rng.choice(_indexes(view)))

        def shown(state: AccountState) -> bool:
            return view is not Household or state.owner is not None

        self._judge(began, view, records, shown, whole=True)

    def _by_name(self, session: Any, began: int) -> None:
        view: Any = self.rng.choice([Board, Peers, Watched])
        low = self.rng.randint(1, ACCOUNTS)
        high = low + self.rng.choice([1, 3, ACCOUNTS])
        if self.rng.random() < 0.5:
            records = session.range(view.by_name, ge=low, lt=high)
        else:
            criteria = view.name >= low, view.name < high
            records = session.scalars(select(view).where(*criteria)).all()
        self._judge(began, view, records, lambda state: low <= state.name < high)

    def _by_score(self, session: Any, began: int) -> None:
        view: Any = self.rng.choice([Board, Household, Watched])
        low = self.rng.randrange(SCORES)
        high = low + self.rng.choice([1, 5, SCORES])
        descending = self.rng.random() < 0.3
        records = session.range(view.by_score, ge=low, lt=high, descending=descending)
        scores = [record.score for record in records]
        if scores != sorted(scores, reverse=descending):
            raise Impossible(f"out of order: {scores}")

        def shown(state: AccountState) -> bool:
            return low <= state.score < high and (view is not Household or state.owner is not None)

        self._judge(began, view, records, shown)

    def _by_owner(self, session: Any, began: int) -> None:
        number = self.rng.randint(1, OWNERS)
        if self.rng.random() < 0.5:
            records = session.range(Board.by_owner, number)
            self._judge(began, Board, records, lambda state: state.owner == number)
        else:
            records = session.scalars(select(Household).where(Household.id == number)).all()
            self._judge(began, Household, records, lambda state: state.owner == number)

    def _filtered(self, session: Any, began: int) -> None:
        view: Any = self.rng.choice([Board, Watched])
        if self.rng.random() < 0.5:
            names = self.rng.sample(range(1, ACCOUNTS + 1), k=3)
            records = session.query(view).filter(view.name.in_(names)).all()
            self._judge(began, view, records, lambda state: state.name in names)
        else:
            low = self.rng.randrange(SCORES)
            criterion = (view.amount > 0) & (view.score >= low)
            records = session.scalars(select(view).where(criterion)).all()
            self._judge(began, view, records, lambda state: state.amount > 0 and state.score >= low)

    def _page(self, session: Any, began: int) -> None:
        view: Any = self.rng.choice([Board, Watched])
        size = self.rng.choice([1, 3, 6])
        statement = select(view).order_by(view.score, view.name).limit(size)
        records = session.scalars(statement).all()
        places = [(record.score, record.name) for record in records]
        if places != sorted(places) or len(places) > size:
            raise Impossible(f"out of order: {places}")
        full = len(records) == size
        self._judge(
            began,
            view,
            records,
            lambda state: not full or (state.score, state.name) < places[-1],
        )

    def _by_key(self, session: Any, began: int) -> None:
        name = self.rng.randint(1, ACCOUNTS)
        key = name + NEW_KEYS * self.rng.choice([0, 0, 0, 1, 2])
        record = session.get(Board, key)
        records = [] if record is None else [record]
        self._judge(began, Board, records, lambda state: state.id == key)

    def _read_back(self, names: list[int], factory: Callable[..., Session]) -> None:
        """Read what was just committed, and what nobody else can have written since."""
        began = self.since = self.scene.ledger.now()
        if factory is not self.scene.fresh:
            self.since = began - self._lag
        states = [self.scene.ledger.latest(account(name)).state for name in names]
        alive = [state for state in states if state is not None]
        with factory() as session:
            for view in self.rng.sample([Board, Peers, Watched], k=2):
                records = session.scalars(select(view).where(view.name.in_(names))).all()
                self._judge(began, view, records, lambda state: state.name in names)
                self._count(session)
            if not names:
                self._all(session, began)
            for state in alive[:1]:
                record = session.get(Board, state.id)
                if record is None or record.name != state.name:
                    raise Impossible(f"missing: {state}, which was just committed: {record}")
            counted = session.scalar(
                select(func.count()).select_from(Board).where(Board.name.in_(names))
            )
            if counted != len(alive):
                raise Impossible(f"{counted} are counted of {alive}")
            self._count(session)

    # -- moving the coverage --------------------------------------------------------------------

    def move(self) -> None:
        """Load, extend, evict, clear, refresh or invalidate some view."""
        view = self.rng.choice(VIEWS)
        self._attempt_read(partial(self._move, view, self._some_range(view)))

    def _some_range(self, view: Any) -> list[Any]:
        if view not in RANGES or self.rng.random() < 0.4:
            return []
        column = getattr(view, self.rng.choice(RANGES[view]))
        low = self.rng.randrange(SCORES)
        return [column >= low, column < low + self.rng.choice([3, 8, SCORES])]

    def _move(self, view: Any, criteria: list[Any]) -> None:
        cache = self.scene.cache
        match self.rng.choice(["load", "extend", "evict"] * 2 + ["refresh", "other"]):
            case "load":
                cache.load(view, *criteria)
            case "extend":
                cache.extend(view, *criteria)
            case "evict":
                cache.evict(view, *criteria)
            case "refresh":
                cache.refresh(view)
            case _ if self.rng.random() < 0.2:
                cache.clear(view)
            case _ if self.rng.random() < 0.5:
                cache.invalidate(Account, self.rng.randint(1, ACCOUNTS))
            case _:
                cache.invalidate(view)
        self.scene.counts["moves"] += 1

    # -- the zoo --------------------------------------------------------------------------------

    def write_zoo(self) -> None:
        """Write in the zoo, by any path that there is."""
        with self.scene.gates[self.number]:
            try:
                self.rng.choice(self.writers).step()
            except (SQLAlchemyError, self.driver_errors) as error:
                # Others write the same rows: deadlocks, and rows that are gone, are in the game.
                self.writer.log.append(f"  -> {type(error).__name__}: {str(error)[:100]}")
                self.scene.counts["failed writes"] += 1
            else:
                self.scene.counts["transactions"] += 1

    def _look(self, target: Session | Connection) -> None:
        """Read inside the transaction, which is left alone by it."""
        if isinstance(target, Session):
            target.scalars(select(self.rng.choice(self.scene.kinds).view)).all()

    def check_zoo(self) -> None:
        """Ask for everything in the zoo while nobody writes there."""
        checker = self.rng.choice(self.checkers)
        with ExitStack() as stack:
            for gate in self.scene.gates:
                stack.enter_context(gate)
            try:
                checker.check()
            except READ_ERRORS as error:
                self.log.append(f"    -> {type(error).__name__}: {str(error)[:100]}")
                self.scene.counts["failed reads"] += 1
            else:
                self.scene.counts["reads"] += 5

    def move_zoo(self) -> None:
        """Load or clear a view of the zoo."""
        kind = self.rng.choice(self.scene.kinds)
        act = self.rng.choice([self.scene.cache.load] * 4 + [self.scene.cache.clear])
        self._attempt_read(partial(act, kind.view))

    # -- a cache with a change feed -------------------------------------------------------------

    def step(self) -> None:
        """Let time go by, and have a policy do a step."""
        others = self.scene.elsewhere
        assert others is not None
        if self.rng.random() < 0.5:
            others.now = max(0, min(SCORES, others.now + self.rng.choice([-1, 1, 2])))
        self._attempt_read(partial(self.scene.cache.step, self.rng.choice(VIEWS)))

    def trim(self) -> None:
        """Trim the changelog, perhaps past what the cache has read."""
        changelog = self.scene.cache.consumer.changelog
        with suppress(*READ_ERRORS):
            self.scene.counts["trimmed"] += changelog.trim(self.bystander, KEEP.total_seconds())

    def write_unseen(self) -> None:
        """Write while the triggers of accounts are switched off."""
        self.write(unseen=True)

    def write_slices(self) -> None:
        """Write in a partitioned table, or move its partitions, and compare."""
        others, connection = self.scene.elsewhere, self.bystander
        assert others is not None
        with others.slices:
            factory = self.rng.choice([others.factory, self.scene.factory])
            with suppress(*READ_ERRORS):  # a deadlock with a load
                self.log.append(f"    {partitions.write(connection, factory, self.rng)}")
            if self.rng.random() < 0.2:  # a partition that was detached then has lost its triggers
                self._attempt_read(self.scene.cache.install_feed)
            self._attempt_read(
                partial(partitions.check, connection, others.fresh, Random(self.rng.random()))
            )
            self.scene.counts["reads"] += 1

    def read_slices(self) -> None:
        """Read or load the view of a partitioned table."""
        cache, view = self.scene.cache, partitions.Slices
        act = self.rng.choice([cache.load, cache.clear, cache.refresh, self._read_slices])
        self._attempt_read(partial(act, view))

    def _read_slices(self, view: Any) -> None:
        with self.scene.factory() as session:
            session.scalars(select(view)).all()

    # -- violence -------------------------------------------------------------------------------

    def kill(self) -> None:
        """Terminate the server process of somebody who is in a transaction, or none."""
        self.bystander.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE"
                " datname = current_database() AND application_name <> 'bystander'"
                " AND xact_start IS NOT NULL ORDER BY random() LIMIT 1) AS victim"
            )
        )


def _by_process(process: SecondProcess, job: writes.Job) -> None:
    """Have the second process write it."""
    job.commits()
    process.write(job.sql())


def _name(shell: Any) -> str:
    return str(getattr(shell, "func", shell).__name__)


def _indexes(view: Any) -> list[Any]:
    return [getattr(view, name) for name in sorted(view.__indexes__)]


def _columns(state: AccountState) -> dict[str, Any]:
    return {
        "score": state.score,
        "amount": state.amount,
        "peer": state.peer,
        "owner_id": state.owner,
    }


def _sql(what: str, model: Any, key: int, values: dict[str, Any]) -> str:
    match what:
        case "insert":
            return writes.insert_sql(model, values)
        case "update":
            return writes.update_sql(model, key, values)
        case _:
            return writes.delete_sql(model, key)


def _pid_of(connection: Any) -> list[int]:
    """Return the number of the server process of a connection, where there is one."""
    pooled = connection.connection if isinstance(connection, Connection) else connection
    driver = pooled.driver_connection
    if hasattr(driver, "get_server_pid"):
        return [driver.get_server_pid()]
    pid = getattr(getattr(driver, "info", None), "backend_pid", None)
    return [] if pid is None else [pid]
