"""Whatever way a row is written, and however its transaction ends, the next read is right.

The random tests choose among these paths; here each of them is taken, for each model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from threading import Thread
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Integer,
    MetaData,
    Table,
    create_engine,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import FlushError, ObjectDeletedError, StaleDataError

from sa_tablecache import CachedView, ScoreIndex, TableCache
from tests.integration import writer as paths
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world
from tests.integration.rows import DAYS, fill
from tests.integration.truth import Truth, same
from tests.integration.writer import CONNECTION_WRITES, SESSION_WRITES, Writer
from tests.zoo import (
    KINDS,
    Badge,
    Code,
    DayPlan,
    Flight,
    Manager,
    OuterBoard,
    Person,
    Plane,
    Sample,
)

pytestmark = pytest.mark.every_database

VIEWS = {
    "sky": ("OuterBoard", "FiveTables", "IdlePlanes", "AirportChain", "CarrierTotals"),
    "staff": ("PeopleAndTags", "PeopleAndBosses", "Managers", "BossBudgets", "Everyone"),
    "shop": ("CustomersAndOrders", "WholeChain", "OrdersByNumber", "OpenPerCustomer", "Backlog"),
    "depot": ("Depot", "BothCrates"),
    "types": ("Samples", "LabelledSamples"),
}


class Bench:
    """A family of models, some cached views of it, and a writer."""

    def __init__(self, cache: TableCache, family: str, connection: Connection, seed: int) -> None:
        self.cache = cache
        self.factory = cache.sessionmaker()
        self.truths = [Truth(KINDS[name], connection) for name in VIEWS[family]]
        self.writer = Writer(cache.engine, self.factory, family, seed)

    def check(self) -> None:
        """Compare all views, as a new session sees them."""
        with self.factory() as session:
            self._compare(session, None)

    def observe(self, target: Session | Connection) -> None:
        """Compare all views, as a transaction that is open sees them and as the others do."""
        if isinstance(target, Session):
            self._compare(target, target.connection())
        else:
            with self.factory(bind=target) as session:
                self._compare(session, target)
        self.check()

    def _compare(self, session: Session, connection: Connection | None) -> None:
        for truth in self.truths:
            view = truth.kind.view
            records = truth.of(session.scalars(select(view)))
            rows = truth.rows(connection=connection)
            assert same(records, rows), f"{view.__name__} after {self.writer.log[-6:]}"


@contextmanager
def benches(database: Database, seed: int) -> Iterator[list[Bench]]:
    """Lend a bench for each family, over one engine."""
    views = [KINDS[name].view for names in VIEWS.values() for name in names]
    with (
        database.lent_engine() as engine,
        database.bystander() as bystander,
        TableCache(engine, views=views) as cache,
    ):
        result = [Bench(cache, family, bystander, seed) for family in VIEWS]
        for bench in result:
            fill(bystander, bench.writer.family, seed)
        for view in views:
            cache.load(view)
        yield result
        cache._check()


@pytest.mark.parametrize("write", dict.fromkeys(SESSION_WRITES), ids=lambda write: write.__name__)
def test_what_a_session_writes_is_read(database: Database, write: Callable[..., None]):
    """After a commit of any write of a session, in any model, the cached answers are right."""
    with benches(database, seed=1) as family_benches:
        for bench in family_benches:
            for model in bench.writer.models:
                bench.writer.run(paths.session_commit, write, models=(model,))
                bench.check()


@pytest.mark.parametrize(
    "write", dict.fromkeys(CONNECTION_WRITES), ids=lambda write: write.__name__
)
def test_what_a_connection_writes_is_read(database: Database, write: Callable[..., None]):
    """After a commit of any write of a connection, in any model, the cached answers are right."""
    with benches(database, seed=2) as family_benches:
        for bench in family_benches:
            for model in bench.writer.models:
                shell = bench.writer.rng.choice([paths.engine_begin, paths.session_commit])
                bench.writer.run(shell, write, models=(model,))
                bench.check()


@pytest.mark.parametrize(
    "shell",
    [*paths.SESSION_SHELLS, *paths.CONNECTION_SHELLS],
    ids=lambda shell: shell.__name__,
)
def test_however_a_transaction_ends_the_next_read_is_right(
    database: Database, shell: Callable[..., None]
):
    """Commits are read, rollbacks are not, and nobody else reads what is not committed."""
    if shell is paths.two_phase and database.dialect == "sqlite":
        pytest.skip("SQLite has no prepared transactions")
    with benches(database, seed=3) as family_benches:
        for bench in family_benches:
            bench.writer.observe = bench.observe
            for _ in range(2):
                bench.writer.run(shell)
                bench.check()


@pytest.mark.filterwarnings("ignore:DELETE statement on table")  # what another has just deleted
@pytest.mark.parametrize("seed", [4, 5, 6])
def test_writers_on_several_threads_leave_every_view_right(postgresql: Database, seed: int):
    """After transactions of all kinds at once, beside readers and loads, all views are right."""
    with benches(postgresql, seed) as family_benches:
        bench = family_benches[seed % 3]
        views = [truth.kind.view for truth in bench.truths]
        factory = bench.factory
        done: list[int] = []

        def write(number: int) -> None:
            writer = Writer(bench.cache.engine, factory, bench.writer.family, 100 * seed + number)
            try:
                for _ in range(12):
                    try:
                        writer.step()
                    except (DBAPIError, StaleDataError, ObjectDeletedError, FlushError):
                        continue  # deadlocks, and rows that others deleted in the meantime
            finally:
                done.append(number)

        def read(number: int) -> None:
            rng = Random(number)
            while len(done) < 3:
                view = rng.choice(views)
                if number and rng.random() < 0.1:
                    bench.cache.clear(view)
                    bench.cache.load(view)
                with factory() as session:
                    session.scalars(select(view)).all()

        threads = [Thread(target=write, args=(number,)) for number in range(3)]
        threads += [Thread(target=read, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        bench.check()
        for other in family_benches:
            other.check()


# --- one row, and what it may be missed by --------------------------------------------------------


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights, all of them cached."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        yield world


def test_a_bulk_insert_into_a_hierarchy_is_seen_in_the_parents_table(database: Database):
    """`insert(Subclass)` writes the tables of the whole hierarchy."""
    views = [KINDS[name].view for name in ("PeopleAndTags", "Managers")]
    with database.lent_engine() as engine, TableCache(engine, views=views) as cache:
        for view in views:
            cache.load(view)
        factory = cache.sessionmaker()
        with factory() as session:
            session.execute(insert(Manager), [{"id": 1, "name": "ada"}, {"id": 2, "name": "bob"}])
            session.commit()
        with factory() as session:
            for view in views:
                assert sorted(record.id for record in session.scalars(select(view))) == [1, 2]
        with factory() as session:
            session.execute(update(Manager), [{"id": 1, "name": "eve", "budget": 5}])
            session.commit()
        with factory() as session:
            record = session.scalars(select(views[1]).where(views[1].id == 1)).one()
            assert (record.name, record.budget) == ("eve", 5)


def test_keys_that_the_database_stores_differently_are_followed(database: Database):
    """A padded, folded or converted key marks the row that it means."""
    view = KINDS["LabelledSamples"].view
    with database.lent_engine() as engine, TableCache(engine, views=[view]) as cache:
        with engine.begin() as connection:
            connection.execute(insert(Sample), [{"id": 1, "word": "a"}, {"id": 2, "word": "b"}])
            connection.execute(insert(Code), [{"code": "AB", "sample_id": 1}])
            connection.execute(insert(Badge), [{"badge": "Gold", "sample_id": 1}])
        cache.load(view)
        factory = cache.sessionmaker()

        def notes() -> dict[int, Any]:
            with factory() as session:
                return {r.id: (r.code_note, r.badge_note) for r in session.scalars(select(view))}

        with factory() as session:
            session.get_one(Code, "AB").note = "one"
            session.get_one(Badge, "GOLD").note = "two"
            session.commit()
        assert notes() == {1: ("one", "two"), 2: (None, None)}
        with factory() as session:
            session.execute(update(Code).where(Code.code == "AB").values(note="three"))
            session.execute(update(Badge), [{"badge": "gOLD", "note": "four"}])
            session.commit()
        assert notes() == {1: ("three", "four"), 2: (None, None)}
        with factory() as session:
            session.merge(Badge(badge="GOLD", sample_id=2, note="five"))
            session.commit()
        assert notes() == {1: ("three", None), 2: (None, "five")}


def test_a_key_of_another_type_is_followed(database: Database):
    """A number given as text is the row with that number, where the driver takes it."""
    view = KINDS["Samples"].view
    with database.lent_engine() as engine, TableCache(engine, views=[view]) as cache:
        with engine.begin() as connection:
            connection.execute(insert(Sample), [{"id": 17, "word": "a"}])
        cache.load(view)
        factory = cache.sessionmaker()
        with factory() as session:
            session.get_one(Sample, "17").word = "b"
            session.commit()
        with factory() as session:
            assert [record.word for record in session.scalars(select(view))] == ["b"]
            session.add(Sample(id="18", word="c"))
            session.commit()
        with factory() as session:
            assert sorted(r.word for r in session.scalars(select(view))) == ["b", "c"]


def test_rows_that_the_database_changes_by_itself_are_read(database: Database):
    """ON DELETE and ON UPDATE actions reach tables that no statement names."""
    views = [KINDS[name].view for name in ("PeopleAndBosses", "OuterBoard", "InnerBoard")]
    with flights_world(database, *views) as world:
        with world.Session() as session:
            session.add_all([Person(id=1, name="ada"), Person(id=2, name="bob", boss_id=1)])
            session.commit()
        for view in views:
            world.cache.load(view)
        with world.Session() as session:
            session.delete(session.get_one(Person, 1))
            session.delete(session.get_one(Plane, "N1"))
            session.commit()
        with world.Session() as session:
            boss = session.scalars(select(views[0])).one()
            assert (boss.id, boss.boss_id) == (2, None)
            assert session.get(OuterBoard, 1).tailnum is None
            session.execute(text("UPDATE airlines SET carrier = 'AL' WHERE carrier = 'AA'"))
            session.commit()
        with world.Session() as session:
            assert session.get(views[2], 1).carrier == "AL"
            session.execute(text("DELETE FROM airlines WHERE carrier = 'AL'"))
            session.commit()
        with world.Session() as session:
            assert sorted(r.id for r in session.scalars(select(views[2]))) == [3, 4, 6]
            assert sorted(r.id for r in session.scalars(select(OuterBoard))) == [3, 4, 6]


def test_an_upsert_that_changes_a_key_is_read(database: Database):
    """The row has left its old key, which no RETURNING tells."""
    view = KINDS["Plans"].view
    with database.lent_engine() as engine, TableCache(engine, views=[view]) as cache:
        with engine.begin() as connection:
            connection.execute(insert(DayPlan), [{"day": DAYS[0]}, {"day": DAYS[1]}])
        cache.load(view)
        dialects: dict[str, Any] = {"sqlite": sqlite, "postgresql": postgresql, "mysql": mysql}
        statement = dialects[database.dialect].insert(DayPlan).values(day=DAYS[0])
        if database.dialect == "mysql":
            statement = statement.on_duplicate_key_update(day=DAYS[2])
        else:
            statement = statement.on_conflict_do_update(
                index_elements=["day"], set_={"day": DAYS[2]}
            )
        with engine.begin() as connection:
            connection.execute(statement)
        with cache.sessionmaker()() as session:
            assert sorted(r.day for r in session.scalars(select(view))) == [DAYS[1], DAYS[2]]


def test_names_without_their_capitals_are_the_same_table(sqlite_url: URL):
    """Where a database takes them for one, so does the cache."""
    declared, written = (
        Table(name, MetaData(), Column("id", Integer, primary_key=True), Column("x", Integer))
        for name in ("Thing", "THING")
    )

    class Things(CachedView):
        """One table."""

        __select__ = select(declared)
        by_x = ScoreIndex("x")

    engine = create_engine(sqlite_url)
    declared.create(engine)
    with TableCache(engine, views=[Things]) as cache:
        cache.load(Things)
        for x, statement in enumerate(
            [
                insert(written).values(id=1, x=0),
                update(written).values(x=1),
                text("UPDATE thing SET x = 2"),
                text("UPDATE Thing SET x = 3"),
                update(declared).where(declared.c.id == 1).values(x=4),
            ]
        ):
            with engine.begin() as connection:
                connection.execute(statement)
            with cache.sessionmaker()() as session:
                assert [r.x for r in session.range(Things.by_x)] == [x]
    engine.dispose()


def test_a_database_trigger_is_covered_by_declaring_the_statement(world: World):
    """`execution_options(writes=[..])` names what an opaque statement writes."""
    with world.engine.begin() as connection:
        connection.execute(
            text("UPDATE flights SET delay = 3.5 WHERE id = 1").execution_options(writes=[Flight])
        )
    assert world.ids(OuterBoard.delay == 3.5) == [1]


def test_a_select_that_writes_is_noticed(postgresql: Database):
    """A SELECT that calls an unknown function may write, and counts as a write of anything."""
    with flights_world(postgresql) as world:
        with world.engine.begin() as connection:
            connection.execute(
                text(
                    "CREATE OR REPLACE FUNCTION bump() RETURNS void LANGUAGE sql AS"
                    " 'UPDATE flights SET delay = coalesce(delay, 0) + 100'"
                )
            )
        world.cache.load(OuterBoard)
        with world.Session() as session:
            session.execute(text("SELECT bump()"))
            session.commit()
        assert len(world.ids(OuterBoard.delay > 90)) == 6
        with world.Session() as session:
            session.execute(text("WITH x AS (SELECT 1) SELECT bump() FROM x"))
            session.commit()
        assert len(world.ids(OuterBoard.delay > 190)) == 6
        with world.engine.connect() as connection:
            connection.exec_driver_sql("DO $$ BEGIN UPDATE flights SET delay = 1; END $$")
            connection.commit()
            connection.exec_driver_sql("DROP FUNCTION bump()")
            connection.commit()
        assert len(world.ids(OuterBoard.delay == 1)) == 6


def test_ddl_is_noticed(database: Database):
    """TRUNCATE, and a table that is emptied by being dropped and made again, leave nothing."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard)
        with world.engine.begin() as connection:
            if database.dialect == "postgresql":
                connection.execute(text("TRUNCATE flights"))
            else:
                Flight.__table__.drop(connection)
                Flight.__table__.create(connection)
        assert world.ids() == []
        with world.Session() as session:
            session.add(Flight(**flight(1, 1)))
            session.commit()
        assert world.ids() == [1]


def test_a_commit_that_fails_leaves_the_cache_right(postgresql: Database):
    """A constraint that is only checked at COMMIT undoes the transaction, for the cache too."""
    with flights_world(postgresql) as world:
        with world.engine.begin() as connection:
            connection.execute(
                text(
                    "ALTER TABLE flights ADD CONSTRAINT late UNIQUE (origin, delay)"
                    " DEFERRABLE INITIALLY DEFERRED"
                )
            )
        try:
            world.cache.load(OuterBoard)
            with world.Session() as session:
                session.execute(update(Flight).where(Flight.id < 3).values(delay=71.0))
                with pytest.raises(Exception, match="late"):
                    session.commit()
            assert world.ids(OuterBoard.delay == 71) == []
            with world.Session() as session:
                session.execute(update(Flight).where(Flight.id == 1).values(delay=71.0))
                session.commit()
            assert world.ids(OuterBoard.delay == 71) == [1]
        finally:
            with world.engine.begin() as connection:
                connection.execute(text("ALTER TABLE flights DROP CONSTRAINT late"))
