"""Rounds of many actors at once, each of which ends with a comparison of everything.

A failure names the seed, the round and what each actor did last. A round starts with rows of its
own, so that seed and round give the same operations again; threads interleave as they like, so that
a failure may need several runs to be seen again, and what is written may depend on who was faster.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from random import Random
from typing import Any

from sqlalchemy import Engine, event, select
from sqlalchemy.orm import Session, sessionmaker

from sa_tablecache import AsyncTableCache, ChangeFeed, TableCache
from tests.integration.checking import Checker
from tests.integration.databases import Database
from tests.integration.rows import fill as fill_zoo
from tests.stress import partitions
from tests.stress.actors import COMMITTED, CUT, Actor, Scene
from tests.stress.conductors import Conductor, Tasks, Threads
from tests.stress.elsewhere import LAGS, Elsewhere, SecondProcess, policy_for
from tests.stress.ledger import Impossible, Ledger
from tests.stress.world import (
    ACCOUNTS,
    OWNERS,
    SLOW_COMMITS,
    VIEWS,
    Base,
    account,
    committed,
    fill,
    owner,
)
from tests.zoo import DEPOT, FAMILIES, KINDS, person_tag

KINDS_AT_ONCE = 4
STEPS = 30
"""What each actor does in one round."""


@dataclass
class Run:
    """Some rounds on one database.

    :param database: has the tables of the zoo; those of the accounts are made here.
    :param actors: how many threads or tasks there are.
    :param views: the views of accounts, and kinds of the zoo, that are cached.
    :param feed: whether the cache follows a change feed, and others write beside it.
    :param slow: whether to wait at the places where others could come between.
    """

    database: Database
    seed: int = 1
    actors: int = 6
    steps: int = STEPS
    asynchronous: bool = False
    feed: bool = False
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

    def _rounds(self, conductor: Conductor, numbers: range, after: Callable[[int], bool]) -> None:
        with self._bystanders() as bystanders:
            with bystanders.connect() as connection:
                if connection.dialect.name == "postgresql":
                    partitions.drop(connection)
                Base.metadata.drop_all(connection)
                Base.metadata.create_all(connection)
                if connection.dialect.name == "postgresql":
                    partitions.create(connection)
                    connection.exec_driver_sql(SLOW_COMMITS)
            engine, bound = self._engines(conductor)
            with ExitStack() as stack:
                stack.callback(engine.dispose)
                others = self._others(conductor, stack) if self.feed else None
                for number in numbers:
                    self._round(conductor, engine, bound, bystanders, number, others)
                    self.counts["rounds"] += 1
                    if not after(number):
                        break

    def _round(
        self,
        conductor: Conductor,
        engine: Engine,
        bound: Any,
        bystanders: Engine,
        number: int,
        others: tuple[Engine, SecondProcess | None] | None,
    ) -> None:
        rng = Random(f"{self.seed} {number}")
        dialect = engine.dialect.name
        families = [f for f in FAMILIES if not (f == "depot" and dialect == "sqlite")]
        family = rng.choice(families)
        of_family = sorted(name for name, kind in KINDS.items() if kind.family == family)
        if self.database.dialect == "mysql":
            of_family = [name for name in of_family if name != "FullJoin"]  # which it has not
        chosen = rng.sample(of_family, k=min(KINDS_AT_ONCE, len(of_family)))
        kinds = [KINDS[name] for name in chosen]
        kills = dialect == "postgresql" and rng.random() < 0.3
        views = [*VIEWS, *(kind.view for kind in kinds)]
        with ExitStack() as stack:
            connection = stack.enter_context(bystanders.connect())
            self._empty(connection, family)
            fill_zoo(connection, family, self.seed + number)
            fill(connection, rng)
            taste = Random(f"{self.seed} {number} feed")
            lag, strict = taste.choice(LAGS), taste.choice([0.03, 0.1, 0.5])
            cache, factory, fresh = self._cache(bound, [] if others else views, lag)
            stack.callback(cache.close)
            elsewhere = None
            if others is not None:
                elsewhere = Elsewhere(
                    others[0],
                    sessionmaker(others[0]),
                    fresh,
                    others[1],
                    conductor.lock(),
                    int(lag.total_seconds() * 1e9),
                    strict,
                )
                if dialect == "postgresql":
                    views.append(partitions.Slices)
                cache.clock = elsewhere.clock
                for view in views:
                    policy = policy_for(view, taste) if view in VIEWS else None
                    elsewhere.policies[view] = str(policy)
                    cache.add(view, policy=policy)
                cache.install_feed()
            entities = [*map(account, range(1, ACCOUNTS + 1)), *map(owner, range(1, OWNERS + 1))]
            ledger = Ledger(committed(connection, entities))
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
                threads=not self.asynchronous,
                elsewhere=elsewhere,
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
        elif self.asynchronous:
            # A bystander blocks the event loop, of which whoever has the lock is in need.
            options["connect_args"] = {"timeout": 0.02}
        engine = self.database.engine(**options)
        try:
            yield engine
        finally:
            engine.dispose()

    def _engines(self, conductor: Conductor) -> tuple[Engine, Any]:
        """Return an engine, and the same as a cache is bound to it."""
        options: dict[str, Any] = {"pool_size": self.actors + 2, "max_overflow": self.actors}
        bound: Any
        if self.asynchronous:
            bound = self.database.async_engine(**options)
            engine = bound.sync_engine
        else:
            engine = bound = self.database.engine(**options)
        if self.database.dialect == "sqlite":
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
                connection.exec_driver_sql(f"PRAGMA {DEPOT}.journal_mode = WAL")
        _watch_commits(engine, conductor, Random(self.seed), slow=self.slow)
        return engine, bound

    def _others(
        self, conductor: Conductor, stack: ExitStack
    ) -> tuple[Engine, SecondProcess | None]:
        """Return an engine that no cache watches, and, beside threads, a process."""
        engine, _ = self._engines(conductor)
        stack.callback(engine.dispose)
        if self.asynchronous:
            return engine, None
        process = SecondProcess(self.database.url, conductor.lock())
        stack.callback(process.close)
        return engine, process

    def _cache(
        self, engine: Any, views: list[Any], lag: timedelta
    ) -> tuple[Any, Callable[..., Session], Callable[..., Session]]:
        """Return a cache, and what makes sessions: plain ones, and those behind a barrier."""
        feed = ChangeFeed(max_lag=lag) if self.feed else None
        if not self.asynchronous:
            cache = TableCache(engine, views=views, feed=feed)
            return cache, cache.sessionmaker(), cache.sessionmaker(freshness="barrier")
        outer = AsyncTableCache(engine, views=views, feed=feed)

        def factory(make: Any, **options: Any) -> Session:
            """Make the sessions inside asynchronous ones; those on a connection are plain."""
            return Session(**options) if options.get("bind") else make(**options).sync_session

        plain, fresh = outer.sessionmaker(), outer.sessionmaker(freshness="barrier")
        return outer.sync_cache, partial(factory, plain), partial(factory, fresh)

    def _empty(self, connection: Any, family: str) -> None:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
        if family == "staff":
            connection.execute(person_tag.delete())
        for model in reversed(FAMILIES[family]):
            if not model.__mapper__.single:
                connection.execute(model.__table__.delete())

    def _slow_down(self, conductor: Conductor, table: Any, rng: Random) -> None:
        chance = Random(rng.random())

        def pause(_point: str) -> None:
            if chance.random() < 0.5:
                conductor.pause(chance.random() ** 2 * 0.03)

        table._pause = pause

    # -- the end of a round ---------------------------------------------------------------------

    def _compare(self, scene: Scene, connection: Any, rng: Random, entities: list[Any]) -> None:
        """Nobody writes any more: every answer is the database's."""
        for _ in range(500):
            if not any(scene.cache.stats(view).leases for view in scene.cache.views):
                break
            scene.conductor.pause(0.02)
            with scene.fresh() as session:
                session.scalars(select(VIEWS[0])).all()
        for entity, (number, state) in committed(connection, entities).items():
            known = scene.ledger.latest(entity)
            if known.state != state or number not in (None, known.number):
                raise Impossible(f"the database has {state} of {entity}, the ledger {known}")
        for view in scene.cache.views:
            leases = scene.cache.stats(view).leases
            if leases:
                raise Impossible(f"{view.__name__} is leased {leases} times, and nobody writes")
        for view in VIEWS:
            statement = view.__dict__["__select__"]
            expected = Counter(map(tuple, connection.execute(statement)))
            for _ in range(2):
                with scene.fresh() as session:
                    records = session.scalars(select(view)).all()
                answer = Counter(tuple(record._asdict().values()) for record in records)
                if answer != expected:
                    wrong, missing = answer - expected, expected - answer
                    raise Impossible(f"{view.__name__} at rest: {wrong} instead of {missing}")
                self.counts["reads"] += 1
        for kind in scene.kinds:
            Checker(kind, scene.fresh, connection, rng).check()
            self.counts["reads"] += 5
        scene.cache._check()

    def _report(self, number: int, scene: Scene, actors: list[Actor]) -> str:
        mode = "tasks" if self.asynchronous else "threads"
        kinds = [kind.view.__name__ for kind in scene.kinds]
        lines = [
            f"seed {self.seed}, round {number}, {self.database.dialect}, {self.actors} {mode},"
        ]
        lines.append(f"family {scene.family}, kinds {kinds}, kills {scene.kills}; did last:")
        if scene.elsewhere is not None:
            lines.append(f"policies {scene.elsewhere.policies}")
        for actor in actors:
            lines.append(f"actor {actor.number}:")
            lines += list(actor.log)[-25:]
            lines += [f"    zoo {entry}" for entry in actor.writer.log[-8:]]
        return "\n".join(lines)


def _watch_commits(engine: Engine, conductor: Conductor, rng: Random, *, slow: bool) -> None:
    """Tell of a COMMIT when it has returned, before the cache hears of it, and wait around it."""
    do_commit = engine.dialect.do_commit

    def commit(connection: Any) -> None:
        if slow and rng.random() < 0.3:
            conductor.pause(rng.random() * 0.005)
        if connection.info.pop(CUT, False):
            conductor.cut(connection.driver_connection, rng.random() * 0.02)
        do_commit(connection)
        committed = connection.info.pop(COMMITTED, None)
        if committed is not None:
            committed()
        if slow and rng.random() < 0.5:
            conductor.pause(rng.random() * 0.01)

    engine.dialect.do_commit = commit  # type: ignore[method-assign]

    @event.listens_for(engine, "checkin")
    def forget(_dbapi_connection: Any, record: Any) -> None:
        record.info.pop(COMMITTED, None)
        record.info.pop(CUT, None)
