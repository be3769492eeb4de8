"""Rounds of many actors at once, each of which ends with a comparison of everything.

A failure names the seed, the round and what each actor did last. The same seed gives the same
operations; threads interleave as they like, so that a failure may need several runs to be seen
again.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sa_tablecache import AsyncTableCache, TableCache
from tests.integration.databases import Database
from tests.integration.checking import Checker
from tests.integration.rows import fill as fill_zoo
from tests.stress.actors import Actor, Scene
from tests.stress.conductors import Conductor, Tasks, Threads
from tests.stress.ledger import Impossible, Ledger
from tests.stress.world import ACCOUNTS, OWNERS, RANGES, VIEWS, Base, account, committed, fill, owner
from tests.zoo import DEPOT, FAMILIES, KINDS

KINDS_AT_ONCE = 4
STEPS = 30
"""What each actor does in one round."""


@dataclass
class Run:
    """Some rounds on one database.

    :param database: has the tables of the zoo; those of the accounts are made here.
    :param actors: how many threads or tasks there are.
    :param views: the views of accounts, and kinds of the zoo, that are cached.
    :param slow: whether to wait at the places where others could come between.
    """

    database: Database
    seed: int = 1
    actors: int = 6
    steps: int = STEPS
    asynchronous: bool = False
    slow: bool = True
    tamper: Callable[[Any], None] = lambda _: None
    """Called with each cache: a test breaks a rule there, to see that it is noticed."""
    counts: Counter[str] = field(default_factory=Counter)

    def rounds(self, numbers: range, after: Callable[[int], bool] = lambda _: True) -> None:
        """Run rounds, until `after` says no.

        :raises AssertionError: at the first wrong answer.
        """
        if self.asynchronous:
            conductor: Conductor = Tasks()
            Tasks().main(lambda: self._rounds(conductor, numbers, after))
        else:
            self._rounds(Threads(), numbers, after)

    def _rounds(
        self, conductor: Conductor, numbers: range, after: Callable[[int], bool]
    ) -> None:
        with self._bystanders() as bystanders:
            with bystanders.connect() as connection:
                Base.metadata.drop_all(connection)
                Base.metadata.create_all(connection)
                fill(connection, Random(self.seed))
            engine = self._engine(conductor)
            ledger = Ledger()
            try:
                for number in numbers:
                    self._round(conductor, engine.engine, engine.owner, bystanders, ledger, number)
                    self.counts["rounds"] += 1
                    if not after(number):
                        break
            finally:
                engine.dispose()

    def _round(
        self,
        conductor: Conductor,
        engine: Engine,
        owner_of_engine: Any,
        bystanders: Engine,
        ledger: Ledger,
        number: int,
    ) -> None:
        rng = Random(f"{self.seed} {number}")
        dialect = engine.dialect.name
        families = [f for f in FAMILIES if not (f == "depot" and dialect == "sqlite")]
        family = rng.choice(families)
        of_family = sorted(name for name, kind in KINDS.items() if kind.family == family)
        chosen = rng.sample(of_family, k=min(KINDS_AT_ONCE, len(of_family)))
        kinds = [KINDS[name] for name in chosen]
        kills = dialect == "postgresql" and rng.random() < 0.3
        views = [*VIEWS, *(kind.view for kind in kinds)]
        with ExitStack() as stack:
            connection = stack.enter_context(bystanders.connect())
            self._empty(connection, family)
            fill_zoo(connection, family, self.seed + number)
            cache, factory = self._cache(owner_of_engine, views)
            stack.callback(cache.close)
            entities = [*map(account, range(1, ACCOUNTS + 1)), *map(owner, range(1, OWNERS + 1))]
            self._start(ledger, connection, entities, first=number == 0 or not ledger.entities("owner"))
            scene = Scene(
                conductor,
                engine,
                cache,
                factory,
                ledger,
                self.counts,
                {entity: conductor.lock() for entity in entities},
                [conductor.lock() for _ in range(self.actors)],
                family,
                kinds,
                kills,
                two_phase=dialect == "postgresql" and not kills and not self.asynchronous,
            )
            for view in views:
                if view in VIEWS or rng.random() < 0.8:
                    cache.load(view)
                if self.slow:
                    self._slow_down(conductor, cache.table(view), rng)
            self.tamper(cache)
            actors = [
                Actor(
                    scene,
                    at,
                    f"{self.seed} {number} {at}",
                    stack.enter_context(bystanders.connect()),
                )
                for at in range(self.actors)
            ]
            try:
                conductor.run([lambda actor=actor: actor.run(self.steps) for actor in actors])  # type: ignore[misc]
                self._compare(scene, connection, rng, entities)
            except BaseException as error:
                error.add_note(self._report(number, scene, actors))
                raise

    # -- setting up -----------------------------------------------------------------------------

    @contextmanager
    def _bystanders(self) -> Iterator[Engine]:
        options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "pool_size": 20}
        if self.database.dialect == "postgresql":
            options["connect_args"] = {"application_name": "bystander"}
        engine = self.database.engine(**options)
        try:
            yield engine
        finally:
            engine.dispose()

    def _engine(self, conductor: Conductor) -> "_Engine":
        options: dict[str, Any] = {"pool_size": self.actors + 2, "max_overflow": self.actors}
        if self.asynchronous:
            asynchronous = self.database.async_engine(**options)
            engine, lent, dispose = asynchronous.sync_engine, asynchronous, asynchronous.sync_engine.dispose
        else:
            engine = lent = self.database.engine(**options)
            dispose = engine.dispose
        if self.database.dialect == "sqlite":
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
                connection.exec_driver_sql(f"PRAGMA {DEPOT}.journal_mode = WAL")
        if self.slow:
            _slow_commits(engine, conductor, Random(self.seed))
        return _Engine(engine, lent, dispose)

    def _cache(self, engine: Any, views: list[Any]) -> tuple[Any, Callable[..., Session]]:
        if not self.asynchronous:
            cache = TableCache(engine, views=views)
            return cache, cache.sessionmaker()
        outer = AsyncTableCache(engine, views=views)
        make = outer.sessionmaker()

        def factory(**options: Any) -> Session:
            """Make the sessions inside asynchronous ones; those on a connection are plain."""
            return Session(**options) if options.get("bind") else make(**options).sync_session

        return outer.sync_cache, factory

    def _empty(self, connection: Any, family: str) -> None:
        from tests.zoo import person_tag

        if family == "staff":
            connection.execute(person_tag.delete())
        for model in reversed(FAMILIES[family]):
            if not model.__mapper__.single:
                connection.execute(model.__table__.delete())

    def _start(self, ledger: Ledger, connection: Any, entities: list[Any], *, first: bool) -> None:
        states = committed(connection, entities)
        ledger.start(
            {
                entity: (
                    number if number is not None else (0 if first else ledger.last(entity)),
                    state,
                )
                for entity, (number, state) in states.items()
            }
        )

    def _slow_down(self, conductor: Conductor, table: Any, rng: Random) -> None:
        chance = Random(rng.random())

        def pause(_point: str) -> None:
            if chance.random() < 0.5:
                conductor.pause(chance.random() * 0.01)

        table._pause = pause

    # -- the end of a round ---------------------------------------------------------------------

    def _compare(self, scene: Scene, connection: Any, rng: Random, entities: list[Any]) -> None:
        """Nobody writes any more: every answer is the database's."""
        for _ in range(500):
            if not any(scene.cache.stats(view).leases for view in scene.cache.views):
                break
            scene.conductor.pause(0.02)
            with scene.factory() as session:
                session.scalars(select(VIEWS[0])).all()
        for entity, (number, state) in committed(connection, entities).items():
            known = scene.ledger.latest(entity)
            if (known.state, known.number) != (state, number if state is not None else known.number):
                raise Impossible(f"the database has {state} of {entity}, the ledger {known}")
        for view in scene.cache.views:
            leases = scene.cache.stats(view).leases
            if leases:
                raise Impossible(f"{view.__name__} is leased {leases} times, and nobody writes")
        for view in VIEWS:
            statement = view.__dict__["__select__"]
            expected = Counter(map(tuple, connection.execute(statement)))
            for _ in range(2):
                with scene.factory() as session:
                    records = session.scalars(select(view)).all()
                answer = Counter(tuple(record._asdict().values()) for record in records)
                if answer != expected:
                    msg = f"{view.__name__} at rest: {answer - expected} instead of {expected - answer}"
                    raise Impossible(msg)
                self.counts["reads"] += 1
        for kind in scene.kinds:
            Checker(kind, scene.factory, connection, rng).check()
            self.counts["reads"] += 5
        scene.cache._check()

    def _report(self, number: int, scene: Scene, actors: list[Actor]) -> str:
        lines = [
            f"seed {self.seed}, round {number}, {self.actors} actors, {self.database.dialect}"
            f"{' (asyncio)' if self.asynchronous else ''}, family {scene.family},"
            f" kinds {[kind.view.__name__ for kind in scene.kinds]}; what they did last:"
        ]
        for actor in actors:
            lines.append(f"actor {actor.number}:")
            lines += list(actor.log)[-25:]
            lines += [f"    zoo {entry}" for entry in actor.writer.log[-8:]]
        return "\n".join(lines)


@dataclass
class _Engine:
    engine: Engine
    owner: Any
    dispose: Callable[[], None]


def _slow_commits(engine: Engine, conductor: Conductor, rng: Random) -> None:
    """Wait right before COMMIT is sent, and between its end and what the cache hears of it."""
    do_commit = engine.dialect.do_commit

    def commit(connection: Any) -> None:
        if rng.random() < 0.3:
            conductor.pause(rng.random() * 0.005)
        do_commit(connection)
        if rng.random() < 0.5:
            conductor.pause(rng.random() * 0.01)

    engine.dialect.do_commit = commit  # type: ignore[method-assign]
