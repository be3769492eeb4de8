"""The change feed: what others write becomes visible, exactly, once, and never too late.

Others are connections that no cache watches; where it matters, processes of their own. Nothing
polls in the background here, so that each poll is one that a test asked for.
"""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.util.concurrency import greenlet_spawn

from sa_tablecache import (
    AsyncTableCache,
    ChangeFeed,
    FeedUnavailable,
    TableCache,
    TableCacheError,
    bypass_cache,
)
from sa_tablecache.feed import Consumer
from sa_tablecache.following import NOTIFY
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flight, hour, insert_flights
from tests.zoo import Airline, Airport, CarrierTotals, Flight, OuterBoard, Plane

pytestmark = pytest.mark.every_database

log = logging.getLogger(__name__)

HOUR = timedelta(hours=1)
EVERYTHING = select(OuterBoard).order_by(OuterBoard.id)


def consumer_of(world: World) -> Consumer:
    """Return what follows the database for the cache of a world."""
    consumer = world.cache.consumer
    assert consumer is not None
    return consumer


@contextmanager
def followed(
    database: Database, *views: Any, install: bool = True, **options: Any
) -> Iterator[World]:
    """Lend a world whose cache follows the database; nobody polls but readers who have to."""
    with database.lent_engine() as engine:
        with engine.begin() as connection:
            insert_flights(connection)
        feed = ChangeFeed(**{"max_lag": HOUR, **options})
        cache = TableCache(engine, views=views or [OuterBoard], feed=feed)
        try:
            if install:
                cache.install_feed()
            for view in cache.views:
                cache.load(view)
                cache.refresh(view)
            yield World(database, engine, cache, cache.sessionmaker())
            cache._check()
        finally:
            cache.uninstall_feed()
            cache.close()


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """A cache that follows the database."""
    with followed(database) as world:
        yield world


def write(world: World, *statements: Any) -> None:
    """Write elsewhere, in one transaction."""
    with world.outside() as session:
        for statement in statements:
            session.execute(statement)
        session.commit()


def check(world: World, kind: str = "hit") -> str:
    """Compare what a new session reads with the database; return why it was answered so."""
    with world.Session() as session:
        cached = session.scalars(EVERYTHING).all()
        assert session.last_read is not None
        read = session.last_read
        stored = session.scalars(EVERYTHING.options(bypass_cache())).all()
    assert cached == stored
    assert read.kind == kind, read
    return read.reason


def marks(world: World) -> dict[str, int]:
    """Return how many marks were made so far, by kind."""
    return dict(world.cache.stats(OuterBoard).marks)


@contextmanager
def marked(world: World, **kinds: int) -> Iterator[None]:
    """Check how many marks are made in a block, by kind, and that everything is marked never."""
    before, invalidations = marks(world), consumer_of(world).counts["invalidations"]
    yield
    made = {kind: n - before.get(kind, 0) for kind, n in marks(world).items()}
    assert {kind: n for kind, n in made.items() if n} == kinds
    assert consumer_of(world).counts["invalidations"] == invalidations


# -- writes elsewhere ---------------------------------------------------------------------------


def test_a_write_elsewhere_is_seen_behind_a_barrier(world: World) -> None:
    """What another connection has committed is visible after a barrier, and marked exactly."""
    with marked(world, row=2):
        write(world, insert(Flight).values(flight(7, 9)), delete(Flight).where(Flight.id == 1))
        world.cache.barrier()
    assert world.ids() == [2, 3, 4, 5, 6, 7]
    check(world)
    assert consumer_of(world).counts["changes"] == 2
    with marked(world), counting() as statements:
        world.cache.barrier()
        check(world)
    statements = [s for s in statements if "information_schema" not in s]
    assert not any("flights" in s.lower() and "join" not in s.lower() for s in statements)


def test_rolled_back_writes_are_not_seen(world: World) -> None:
    """A rollback elsewhere, of a transaction or of a savepoint, marks nothing."""
    with marked(world, row=1):
        with world.outside() as session:
            session.execute(insert(Flight).values(flight(7, 9)))
            session.rollback()
            session.execute(insert(Flight).values(flight(8, 9)))
            with session.begin_nested() as nested:
                session.execute(insert(Flight).values(flight(9, 9)))
                nested.rollback()
            session.commit()
        world.cache.barrier()
    assert world.ids() == [1, 2, 3, 4, 5, 6, 8]


def test_a_second_process_is_seen_by_its_token(world: World) -> None:
    """A token that another process has got for its commit makes that visible here."""
    code = (
        "import sys; from sqlalchemy import create_engine, insert;"
        "from sa_tablecache import *; from tests.zoo import *; from tests.integration.flights "
        "import flight; from tests.integration.databases import Database; "
        "from sqlalchemy import make_url; database = Database(make_url(sys.argv[1]));"
        "cache = TableCache(database.engine(), views=[OuterBoard], feed=ChangeFeed());"
        "session = cache.sessionmaker()(); session.execute(insert(Flight).values(flight(7, 9)));"
        "session.commit(); print(session.commit_token); session.close(); cache.close()"
    )
    url = world.database.url.render_as_string(hide_password=False)
    token = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, url], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert token.isascii()
    assert not set(token) & set("\"',; \n")
    assert world.ids() == [1, 2, 3, 4, 5, 6]
    assert world.cache.wait_for(token, timeout=1)
    assert world.ids() == [1, 2, 3, 4, 5, 6, 7]
    with counting() as statements:
        assert world.cache.wait_for(token)
    assert not statements


def test_tokens_cost_nothing_unless_they_are_asked_for(world: World) -> None:
    """A commit asks for no token; the first who does costs one SELECT, the others nothing."""
    with world.Session() as session:
        assert session.commit_token is None
        session.add(Airline(carrier="ZZ", name="Zeppelins"))
        with counting() as statements:
            session.commit()
        assert not any("sa_tablecache" in s for s in statements)
        token = session.commit_token
        assert token is not None
        with counting() as statements:
            assert session.commit_token == token
            assert world.cache.wait_for(world.cache.commit_token())
        session.execute(update(Airline).values(name="z"))
        session.commit()
        assert session.commit_token != token
    with pytest.raises(ValueError, match="no position"):
        world.cache.wait_for("nonsense")


# -- local writes -------------------------------------------------------------------------------

WRITES: dict[str, Any] = {
    "UPDATE": text("UPDATE flights SET delay = 7 WHERE carrier = 'AA'"),
    "DELETE": text("DELETE FROM flights WHERE delay > 1 OR id = 4"),
    "INSERT FROM SELECT": text(
        "INSERT INTO flights (id, hour, carrier, tailnum, origin, dest) "
        "SELECT id + 100, hour, carrier, tailnum, origin, dest FROM flights"
    ),
    "a subquery": text(
        "UPDATE flights SET delay = 9 WHERE tailnum IN (SELECT tailnum FROM planes)"
    ),
    "SET NULL": delete(Plane).where(Plane.model.is_(None)),
    "CASCADE": update(Airline).where(Airline.carrier == "UA").values(carrier="XX"),
    "no row": text("UPDATE flights SET delay = 7 WHERE id + id = 999"),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_local_write_of_unknown_rows_becomes_exact(world: World, name: str) -> None:
    """After a local write that names no rows the first read polls once, and refreshes these."""
    before = marks(world)
    polls = consumer_of(world).counts["polls"]
    with world.Session() as session:
        session.execute(WRITES[name], execution_options={"synchronize_session": False})
        session.commit()
    check(world)
    assert consumer_of(world).counts["polls"] <= polls + 1
    assert marks(world).get("view", 0) == before.get("view", 0)
    with counting() as statements:
        assert len(world.ids()) > 0
    assert not statements
    world.cache.barrier()
    assert consumer_of(world).counts["invalidations"] == 1


def test_a_raw_connection_becomes_exact_where_the_feed_finds_anything(world: World) -> None:
    """What a raw connection wrote is found by a poll, or marks the view where that is not sure."""
    finds = consumer_of(world).changelog.finds_anything
    with marked(world, **({"unread": 1, "row": 1} if finds else {"view": 1, "row": 1})):
        raw = world.engine.raw_connection()
        cursor = raw.cursor()
        cursor.execute("UPDATE flights SET delay = 7 WHERE id = 2")
        cursor.close()
        raw.commit()
        raw.close()
        check(world)


def test_exact_local_writes_have_no_echo(world: World) -> None:
    """A commit of known rows is refreshed once, and is no news when the feed tells of it."""
    with marked(world, row=2):
        with world.Session() as session:
            session.get_one(Flight, 2).delay = 42.0
            session.commit()
        assert world.ids(OuterBoard.delay == 42.0) == [2]
    with marked(world):
        world.cache.barrier()
        with counting() as statements:
            assert world.ids(OuterBoard.delay == 42.0) == [2]
        assert not statements
    assert consumer_of(world).counts["changes"] == 1


def test_an_echo_that_nobody_has_read_yet_is_refreshed_once(world: World) -> None:
    """A poll before the first read marks the row again; one refresh is for both."""
    with world.Session() as session:
        session.get_one(Flight, 2).delay = 42.0
        session.commit()
    world.cache.barrier()
    refreshes = world.cache.stats(OuterBoard).refreshes
    check(world)
    world.cache.barrier()
    check(world)
    assert world.cache.stats(OuterBoard).refreshes == refreshes + 1


def test_a_change_elsewhere_after_a_refresh_is_no_echo(world: World) -> None:
    """A row that was written here, refreshed, and then written elsewhere is marked again."""
    with world.Session() as session:
        session.get_one(Flight, 2).delay = 42.0
        session.commit()
    check(world)
    write(world, update(Flight).where(Flight.id == 2).values(delay=43.0))
    world.cache.barrier()
    assert world.ids(OuterBoard.delay == 43.0) == [2]


def test_an_echo_is_marked_if_a_load_was_under_way(world: World) -> None:
    """Beside a load with an older snapshot, what a refresh has read proves nothing."""
    table = world.cache.table(OuterBoard)
    world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
    loaded, go_on = threading.Event(), threading.Event()

    def pause(point: str) -> None:
        if point == "loaded":
            loaded.set()
            assert go_on.wait(20)

    table._pause = pause  # type: ignore[method-assign]
    loading = threading.Thread(target=world.cache.load, args=[OuterBoard])
    loading.start()
    assert loaded.wait(20)
    try:
        # The load has read what flight 5 was; what it becomes elsewhere is read by a refresh
        # here, of another row, that the load then swaps out again.
        write(world, update(Flight).where(Flight.id == 5).values(delay=77.0))
        with world.Session() as session:
            session.get_one(Flight, 5).origin = "LGA"
            session.commit()
        world.cache.refresh(OuterBoard)
    finally:
        go_on.set()
        loading.join()
        del table._pause
    world.cache.barrier()
    assert world.ids(OuterBoard.delay == 77.0) == [5]
    check(world)


def test_groups_are_marked_by_what_rows_were_and_are(database: Database) -> None:
    """Of a view that groups, changes elsewhere mark the groups that rows have left or come to."""
    statement = select(CarrierTotals)
    with followed(database, CarrierTotals, OuterBoard) as world:

        def totals() -> tuple[Any, ...]:
            with world.Session() as session:
                cached = session.scalars(statement).all()
                assert session.last_read is not None
                assert session.last_read.kind == "hit", session.last_read
                assert set(cached) == set(session.scalars(statement.options(bypass_cache())))
                return tuple(cached)

        before = totals()
        write(world, update(Flight).where(Flight.id == 1).values(carrier="UA"))
        world.cache.barrier()
        assert totals() != before
        with world.Session() as session:
            session.get_one(Flight, 1).carrier = "AA"
            session.commit()
        assert set(totals()) == set(before)
        refreshes = world.cache.stats(CarrierTotals).refreshes
        world.cache.barrier()
        assert set(totals()) == set(before)
        assert world.cache.stats(CarrierTotals).refreshes == refreshes, "the echo was no news"
        assert world.cache.stats(CarrierTotals).marks.get("view", 0) == 1, "when it was seeded"


# -- big statements -----------------------------------------------------------------------------


def many(after: float, number: int = 1_500) -> list[dict[str, Any]]:
    """Return the values of many flights, a second apart."""
    return [flight(1_000 + n, after + n / 3600) for n in range(number)]


@pytest.fixture
def windowed(world: World) -> World:
    """A cache of which three hours are loaded."""
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4))
    return world


def insert_all(values: list[dict[str, Any]]) -> Any:
    """Return one INSERT of many rows."""
    return insert(Flight).values([{**v, "tailnum": None, "delay": None} for v in values])


def test_a_big_statement_outside_the_coverage_costs_nothing(windowed: World) -> None:
    """1,500 rows inserted and deleted beside what is loaded: no SQL but the poll."""
    write(windowed, insert_all(many(24)), delete(Flight).where(Flight.hour >= hour(24)))
    with marked(windowed, range=1):
        windowed.cache.barrier()
    with counting() as statements:
        assert windowed.ids(OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4))
    assert not statements
    with windowed.Session() as session:
        inside = EVERYTHING.where(OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4))
        assert (
            session.scalars(inside).all() == session.scalars(inside.options(bypass_cache())).all()
        )


def test_a_big_statement_inside_the_coverage_reads_its_interval(world: World) -> None:
    """1,500 rows inserted, moved by an hour and deleted: each time their interval is read again."""
    for statement in (
        insert_all(many(2)),
        update(Flight).where(Flight.id >= 1_000).values(delay=5.0),
        delete(Flight).where(Flight.id >= 1_000),
    ):
        write(world, statement)
        with marked(world, range=1):
            world.cache.barrier()
        with counting() as statements:
            world.ids()
        assert len([s for s in statements if "JOIN airlines" in s]) == 1, statements
        check(world)


def test_invalidating_by_criteria_reads_what_meets_them(world: World) -> None:
    """invalidate() with a range of an index reads the records of that range, wherever they are."""
    with world.database.bystander() as connection:
        if world.database.dialect == "postgresql":
            connection.execute(text("SET session_replication_role = replica"))
        connection.execute(
            update(Flight).where(Flight.id == 2).values(hour=hour(30)),
        )
        connection.execute(update(Flight).where(Flight.id == 3).values(delay=8.0))
    before = marks(world).get("view", 0)
    world.cache.invalidate(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(2))
    check(world)
    assert marks(world)["range"] == 1
    world.cache.invalidate(OuterBoard, OuterBoard.model.like("A%"))
    assert marks(world)["view"] == before + 1


# -- one moment ---------------------------------------------------------------------------------


def test_a_refresh_shows_no_half_of_what_others_committed(world: World) -> None:
    """A refresh of one row reads what others have changed until then, too, and not a part of it."""
    write(
        world,
        update(Flight).where(Flight.id == 2).values(delay=50.0),
        update(Flight).where(Flight.id == 5).values(delay=50.0),
    )
    with world.Session() as session:
        session.get_one(Flight, 2).tailnum = "N3"
        session.commit()
    assert world.ids(OuterBoard.delay == 50.0) == [2, 5]
    check(world)


def test_gaps_are_not_merged_with_what_others_have_changed(world: World) -> None:
    """What is fetched for the gaps of an answer is newer than the rest, unless nothing changed."""
    world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
    write(world, update(Flight).values(delay=50.0))
    assert "changed" in check(world, "miss")
    assert check(world, "partial")
    with world.Session() as session:
        session.execute(update(Flight).values(delay=51.0))
        session.commit()
        ranged = session.range(OuterBoard.by_hour)
        assert {record.delay for record in ranged} == {51.0}
    write(world, update(Flight).values(delay=52.0))
    with world.Session() as session:
        assert {record.delay for record in session.range(OuterBoard.by_hour)} == {52.0}


def test_a_load_brings_no_half_of_what_others_committed(world: World) -> None:
    """After a load of the rest all records are of one moment."""
    world.cache.load(OuterBoard, OuterBoard.hour < hour(2))
    write(world, update(Flight).values(delay=50.0))
    world.cache.load(OuterBoard)
    assert {r.delay for r in _all(world)} == {50.0}
    check(world)


def _all(world: World) -> list[Any]:
    with world.Session() as session:
        found = session.scalars(EVERYTHING).all()
        assert session.last_read is not None
        assert session.last_read.kind == "hit"
        return list(found)


def test_a_first_load_is_not_read_twice(database: Database) -> None:
    """What was committed between the beginning of the feed and a first load is no news after it."""
    with followed(database) as world:
        world.cache.clear(OuterBoard)
        write(world, update(Flight).values(delay=50.0))
        world.cache.load(OuterBoard)
        with counting() as statements:
            check_all = world.ids()
        assert check_all == [1, 2, 3, 4, 5, 6]
        assert not statements


# -- trust --------------------------------------------------------------------------------------


def reading(world: World) -> str:
    """Check that the database answers, rightly; return why."""
    return check(world, "bypass")


def drop_a_trigger(world: World) -> None:
    """Drop one of the triggers of flights."""
    with world.database.bystander() as connection:
        find = {
            "postgresql": "SELECT tgname FROM pg_trigger WHERE tgrelid = 'flights'::regclass"
            " AND tgname LIKE 'sa\\_tablecache%'",
            "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name ="
            " 'flights' AND name LIKE 'sa\\_tablecache%' ESCAPE '\\'",
            "mysql": "SELECT trigger_name FROM information_schema.triggers WHERE"
            " event_object_schema = database() AND event_object_table = 'flights'",
        }[world.database.dialect]
        names = connection.exec_driver_sql(find.replace("%", "%%")).scalars().all()
        name = connection.dialect.identifier_preparer.quote(min(names))
        on = " ON flights" if world.database.dialect == "postgresql" else ""
        connection.exec_driver_sql(f"DROP TRIGGER {name}{on}")


def test_a_dropped_trigger_costs_the_trust_until_it_is_back(world: World) -> None:
    """While a trigger is missing the database answers; afterwards the table is read again."""
    drop_a_trigger(world)
    write(world, update(Flight).values(delay=1.0), delete(Flight).where(Flight.id == 6))
    world.cache.barrier()
    assert "changes of flights are not seen" in reading(world)
    assert "changes of flights are not seen" in world.cache.explain(EVERYTHING).reason
    health = world.cache.health()
    assert health.feed.untrusted.keys() == {"flights"}
    assert any("flights" in reason for reason in health.reasons)
    assert any("flights" in str(problem) for problem in world.cache.check())
    assert world.cache.install_feed() >= 1
    world.cache.barrier()
    check(world)
    write(world, update(Flight).values(delay=2.0))
    world.cache.barrier()
    check(world)
    assert not world.cache.health().feed.untrusted


def test_a_feed_that_is_not_installed_leaves_all_to_the_database(database: Database) -> None:
    """Without a changelog the database answers, and says why; once there is one the cache does."""
    with followed(database, install=False, max_lag=timedelta(microseconds=1)) as world:
        assert "the change feed cannot be read" in reading(world)
        assert world.cache.health().feed.state == "cut off"
        with pytest.raises(FeedUnavailable):
            world.cache.barrier()
        with pytest.raises(FeedUnavailable):
            world.cache.commit_token()
        write(world, delete(Flight).where(Flight.id == 1))
        world.cache.install_feed()
        world.cache.barrier()
        check(world)
        world.cache.uninstall_feed()
        with pytest.raises(FeedUnavailable):
            world.cache.barrier()
        assert "the change feed cannot be read" in reading(world)
        write(world, delete(Flight).where(Flight.id == 2))
        world.cache.install_feed()
        world.cache.barrier()
        check(world)
        assert consumer_of(world).counts["invalidations"] == 2


def test_a_reader_polls_when_the_last_poll_is_too_old(database: Database) -> None:
    """A cache that was not started is never staler than max_lag: who reads it polls."""
    with followed(database, max_lag=timedelta(microseconds=1)) as world:
        for number in range(7, 10):
            write(world, insert(Flight).values(flight(number, 9)))
            check(world)


def test_a_fresh_feed_is_not_polled_by_readers(world: World) -> None:
    """Within max_lag a hit emits no SQL, whatever others have written."""
    write(world, insert(Flight).values(flight(7, 9)))
    with counting() as statements:
        assert world.ids() == [1, 2, 3, 4, 5, 6]
        with world.Session() as session:
            assert session.get(OuterBoard, 2) is not None
            assert session.range(OuterBoard.by_hour)
    assert not statements


def test_sessions_choose_how_fresh_their_answers_are(world: World) -> None:
    """A session with a barrier sees all that was committed before it read, others may not yet."""
    factories = {
        "barrier": world.cache.sessionmaker(freshness="barrier"),
        "no time": world.cache.sessionmaker(freshness=timedelta(0)),
        "a long time": world.cache.sessionmaker(freshness=timedelta(days=1)),
    }
    known = [1, 2, 3, 4, 5, 6]
    for number, (name, factory) in enumerate(factories.items(), 7):
        write(world, insert(Flight).values(flight(number, 9)))
        assert world.ids() == known
        with factory() as session:
            seen = sorted(record.id for record in session.scalars(EVERYTHING))
            assert session.last_read is not None
            assert session.last_read.kind == "hit", name
            assert seen == (known if name == "a long time" else [*known, number])
        world.cache.barrier()
        known = world.ids()
    for wrong in ("eventually", -timedelta(1), 3):
        with pytest.raises(TableCacheError, match="freshness"):
            world.cache.sessionmaker(freshness=wrong)  # type: ignore[arg-type]


def test_a_poll_that_fails_or_is_given_up_loses_nothing(world: World) -> None:
    """What a poll has read and not published is found by the next one."""
    consumer = consumer_of(world)
    write(world, delete(Flight).where(Flight.id == 1))
    for error in (RuntimeError("failed"), KeyboardInterrupt()):

        def pause(_: str, error: BaseException = error) -> None:
            raise error

        consumer._pause = pause  # type: ignore[method-assign]
        with pytest.raises(type(error)):
            world.cache.barrier()
        write(world, delete(Flight).where(Flight.id == 2))
    del consumer._pause
    world.cache.barrier()
    check(world)
    assert consumer.counts["changes"] == 2


def test_barriers_at_the_same_time_share_a_poll(world: World) -> None:
    """Who comes while a poll is under way waits for it, and shares the next with all others."""
    consumer, polling, go_on = consumer_of(world), threading.Event(), threading.Event()

    def pause(_: str) -> None:
        polling.set()
        assert go_on.wait(20)

    consumer._pause = pause  # type: ignore[method-assign]
    first = threading.Thread(target=world.cache.barrier)
    first.start()
    assert polling.wait(20)
    write(world, delete(Flight).where(Flight.id == 1))
    others = [threading.Thread(target=world.cache.barrier) for _ in range(5)]
    before = consumer.counts["polls"]
    for other in others:
        other.start()
    while sum(other.is_alive() for other in others) < len(others):
        pass
    go_on.set()
    for thread in (first, *others):
        thread.join()
    assert world.ids() == [2, 3, 4, 5, 6]
    assert before + 2 <= consumer.counts["polls"] <= before + 1 + len(others)


def test_a_reader_away_for_too_long_reads_everything_once(world: World) -> None:
    """Changes that were trimmed before they were polled invalidate everything, once."""
    consumer = consumer_of(world)
    write(world, update(Flight).values(delay=1.0))
    with consumer.connect() as connection:
        assert consumer.changelog.trim(connection, 0) >= 0
        write(world, update(Flight).values(delay=2.0))
        consumer.changelog.trim(connection, 0)
    world.cache.barrier()
    check(world)
    assert consumer.counts["invalidations"] == 2
    with marked(world):
        world.cache.barrier()
    write(world, update(Flight).values(delay=3.0))
    world.cache.barrier()
    check(world)
    assert consumer.counts["invalidations"] == 2


def test_a_reader_that_is_cut_off_loses_nothing(world: World) -> None:
    """When its connections are killed a poll fails, and the next one finds all changes."""
    if world.database.dialect == "sqlite":
        pytest.skip("nobody can kill a connection to a file")
    consumer = consumer_of(world)
    with consumer.connect() as connection, world.database.bystander() as killer:
        ask, kill = (
            ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})")
            if world.database.dialect == "postgresql"
            else ("SELECT connection_id()", "KILL {}")
        )
        pid = connection.exec_driver_sql(ask).scalar_one()
        killer.exec_driver_sql(kill.format(pid))
        with pytest.raises(OperationalError):
            connection.exec_driver_sql("SELECT 1")
    with marked(world, row=3):
        for number in (7, 8, 9):
            write(world, insert(Flight).values(flight(number, 9)))
        try:
            world.cache.barrier()
        except OperationalError:
            world.cache.barrier()
    check(world)


def test_a_view_that_is_added_later_is_followed_too(world: World) -> None:
    """A view that comes while others are followed is loaded and marked as they are."""
    world.cache.add(CarrierTotals)
    world.cache.install_feed()
    world.cache.load(CarrierTotals)
    write(world, delete(Flight).where(Flight.carrier == "UA"))
    world.cache.barrier()
    with world.Session() as session:
        cached = session.scalars(select(CarrierTotals)).all()
        assert session.last_read is not None
        assert session.last_read.kind == "hit", session.last_read
        assert set(cached) == set(
            session.scalars(select(CarrierTotals).options(bypass_cache())).all()
        )


def test_ddl_marks_the_table_and_asks_the_catalog_again(world: World) -> None:
    """A table that others have altered is marked, and what was known of it is asked again."""
    if world.database.dialect == "postgresql":
        statement = "ALTER TABLE flights ALTER COLUMN delay TYPE double precision USING delay + 1"
    else:
        statement = "ALTER TABLE flights ADD COLUMN note VARCHAR(10)"
    with world.database.bystander() as connection:
        connection.exec_driver_sql(statement)
    try:
        world.cache.barrier()
        assert world.cache.table(OuterBoard).doubtful
        if not world.cache.health().feed.untrusted:
            check(world)
        else:
            reading(world)
            world.cache.install_feed()
            world.cache.barrier()
            check(world)
    finally:
        if world.database.dialect != "postgresql":
            world.cache.uninstall_feed()
            with world.database.bystander() as connection:
                connection.exec_driver_sql("ALTER TABLE flights DROP COLUMN note")


# -- saying so ----------------------------------------------------------------------------------


def test_a_cache_without_feed_says_what_it_cannot_see(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning for each cache that neither follows others nor says that there are none."""
    with database.lent_engine() as engine, caplog.at_level(logging.WARNING):
        TableCache(engine, views=[OuterBoard, CarrierTotals]).close()
        assert [r.message for r in caplog.records if "invisible" in r.message]
        assert len(caplog.records) == 1
        caplog.clear()
        cache = TableCache(engine, views=[OuterBoard], exclusive_writer=True)
        cache.barrier()
        with pytest.raises(TableCacheError, match="has no change feed"):
            cache.commit_token()
        cache.close()
        TableCache(engine, views=[OuterBoard], feed=ChangeFeed()).close()
        assert not caplog.records
        with pytest.raises(TableCacheError, match="give one of them"):
            TableCache(engine, feed=ChangeFeed(), exclusive_writer=True)
    for wrong in ({"poll_interval": 0}, {"max_lag": timedelta(0)}, {"keep": -HOUR}):
        with pytest.raises(TableCacheError, match="has to be positive"):
            ChangeFeed(**wrong)


def test_health_tells_the_state_of_the_feed(world: World) -> None:
    """A feed is unseeded, follows, lags, and is cut off."""
    with world.database.lent_engine() as engine:
        cache = TableCache(engine, views=[OuterBoard], feed=ChangeFeed())
        assert cache.health().feed.state == "unseeded"
        assert not cache.health().ok
        cache.close()
    feed = world.cache.health().feed
    assert feed.state == "following"
    assert feed.lag is not None
    assert not feed.complaints
    with world.database.lent_engine() as engine:
        cache = TableCache(
            engine, views=[OuterBoard], feed=ChangeFeed(max_lag=timedelta(microseconds=1))
        )
        cache.barrier()
        assert cache.health().feed.state == "lagging"
        cache.close()


# -- asynchronous -------------------------------------------------------------------------------


async def test_the_asynchronous_cache_follows_as_well(database: Database) -> None:
    """Barriers, tokens, local writes of unknown rows and hits, through an asynchronous driver."""
    engine = database.async_engine()
    elsewhere = database.engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    cache = AsyncTableCache(engine, views=[OuterBoard], feed=ChangeFeed(max_lag=HOUR))
    factory = cache.sessionmaker()
    try:
        await cache.install_feed()
        await cache.load(OuterBoard)
        await cache.refresh(OuterBoard)
        consumer = cache.sync_cache.consumer
        assert consumer is not None

        async def check() -> None:
            async with factory() as session:
                cached = (await session.scalars(EVERYTHING)).all()
                assert session.last_read is not None
                assert session.last_read.kind == "hit", session.last_read
                stored = await session.scalars(EVERYTHING.options(bypass_cache()))
                assert cached == stored.all()

        with elsewhere.begin() as sync_connection:
            sync_connection.execute(insert(Flight).values(flight(7, 9)))
        await cache.barrier()
        await check()
        async with factory() as session:
            assert await session.commit_token is None
            await session.execute(WRITES["UPDATE"])
            await session.commit()
            token = await session.commit_token
        assert token is not None
        polls = consumer.counts["polls"]
        await check()
        assert consumer.counts["polls"] == polls + 1
        assert await cache.wait_for(token)
        assert await cache.wait_for(await cache.commit_token(), timeout=1)
        async with cache.sessionmaker(freshness="barrier")() as session:
            with elsewhere.begin() as sync_connection:
                sync_connection.execute(delete(Flight).where(Flight.id == 7))
            assert await session.get(OuterBoard, 7) is None
            assert session.last_read is not None
            count = select(func.count()).select_from(OuterBoard)
            assert await session.scalar(count) == 6
        with counting() as statements:
            await check_hit(factory)
        assert not statements
        assert consumer.counts["invalidations"] == 1
    finally:
        await cache.uninstall_feed()
        await cache.close()
        await engine.dispose()
        elsewhere.dispose()


async def check_hit(factory: Any) -> None:
    """Read everything, from memory."""
    async with factory() as session:
        await session.scalars(EVERYTHING)
        assert session.last_read.kind == "hit"
        await greenlet_spawn(lambda: None)


# -- in the background --------------------------------------------------------------------------


def wait_until(world: World, ids: list[int]) -> None:
    """Wait until sessions of a world see certain flights."""
    deadline = time.monotonic() + 20
    while world.ids() != ids:
        assert time.monotonic() < deadline, world.ids()


@contextmanager
def started(world: World, **options: Any) -> Iterator[World]:
    """Lend a second cache over the same database, which polls in the background."""
    with world.database.lent_engine() as engine:
        feed = ChangeFeed(**{"max_lag": HOUR, **options})
        with TableCache(engine, views=[OuterBoard], feed=feed) as cache:
            cache.load(OuterBoard)
            yield World(world.database, engine, cache, cache.sessionmaker())


def test_a_started_cache_polls_by_itself(world: World) -> None:
    """In the background it polls at its interval, trims, and is healthy."""
    with started(world, poll_interval=0.01) as other:
        write(world, delete(Flight).where(Flight.id == 1))
        wait_until(other, [2, 3, 4, 5, 6])
        deadline = time.monotonic() + 20
        while not other.cache.health().ok:
            assert time.monotonic() < deadline, other.cache.health().reasons


def test_commits_wake_up_the_caches_of_others(world: World) -> None:
    """On PostgreSQL a cache hears of a commit of another one before its next poll is due."""
    if world.database.dialect != "postgresql":
        pytest.skip("only PostgreSQL has notifications")
    world.cache.start()
    with started(world, poll_interval=3600) as other:
        deadline = time.monotonic() + 20
        while other.cache._listener is None or not other.cache._listener.listening:
            assert time.monotonic() < deadline
        polls = consumer_of(other).counts["polls"]
        with world.Session() as session:
            session.execute(delete(Flight).where(Flight.id == 1))
            session.commit()
        wait_until(other, [2, 3, 4, 5, 6])
        assert consumer_of(other).counts["polls"] > polls
    assert other.cache._listener is None


def test_answers_are_of_one_moment_under_load(world: World) -> None:
    """While many move minutes of delay from one flight to another, here and elsewhere, no answer
    has half of it: their sum is always the same.
    """
    with world.database.bystander() as connection:
        connection.execute(update(Flight).values(delay=10.0))
    world.cache.barrier()
    done, failures = threading.Event(), list[BaseException]()

    def move(session: Any, rng: Random) -> None:
        """Move some minutes, in the order of the keys, so that nobody waits for somebody else."""
        one, other = sorted(rng.sample(range(1, 7), 2))
        if rng.random() < 0.5:
            change = f"CASE WHEN id = {one} THEN delay - 1 ELSE delay + 1 END"
            session.execute(
                text(f"UPDATE flights SET delay = {change} WHERE id IN ({one}, {other})")
            )
        else:
            for number, by in ((one, -1), (other, 1)):
                session.execute(
                    update(Flight).where(Flight.id == number).values(delay=Flight.delay + by),
                    execution_options={"synchronize_session": False},
                )
        session.commit()

    def writing(seed: int) -> None:
        rng = Random(seed)
        try:
            for _ in range(25):
                lent = world.Session() if seed % 2 else world.outside()
                try:
                    with lent as session:
                        move(session, rng)
                except OperationalError as error:  # a lock that was not to be had
                    log.debug("not moved: %s", error)
        except BaseException as error:
            failures.append(error)

    def reading() -> None:
        try:
            while not done.is_set():
                with world.cache.sessionmaker(freshness="barrier")() as session:
                    records = session.scalars(EVERYTHING).all()
                    assert sum(r.delay for r in records) == 60.0, session.last_read
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=writing, args=[seed]) for seed in range(4)]
    readers = [threading.Thread(target=reading) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not failures
    world.cache.barrier()
    check(world)
    assert consumer_of(world).counts["invalidations"] == 1


def test_who_only_writes_wakes_up_others(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before it has polled: what concerns its views may concern those of others."""
    with postgresql.lent_engine() as engine:
        with engine.begin() as connection:
            insert_flights(connection)
        cache = TableCache(engine, views=[OuterBoard], feed=ChangeFeed())
        woken: list[str] = []
        monkeypatch.setattr(cache.upkeep, "wake", woken.append)
        with cache.sessionmaker()() as session:
            session.get_one(Flight, 1).delay = 7.5
            session.commit()
            assert woken.count(NOTIFY) == 1
            session.execute(update(Airport).values(name="elsewhere"))
            session.commit()
        assert woken.count(NOTIFY) == 1
        assert cache.consumer is not None
        assert cache.consumer.counts["polls"] == 0
        cache.close()
