"""ReadThrough: what reads fill, what leaves, and that the answers stay those of the database."""

import asyncio
import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import OperationalError

from sa_tablecache import (
    AsyncTableCache,
    ChangeFeed,
    ReadThrough,
    TableCache,
    TableCacheError,
    bypass_cache,
    no_store,
)
from sa_tablecache.limits import MemoryLimit
from sa_tablecache.readthrough import MOST_FILLS, WASTE, ReadRanges
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world, hour, ids, insert_flights
from tests.integration.pausing import Held, Running
from tests.zoo import Flight, InnerBoard, OuterBoard, Plane


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights, of which reads keep what they read."""
    with flights_world(database) as world:
        keep(world)
        yield world


def keep(world: World, **limits: Any) -> ReadRanges:
    """Have reads keep what they read, within limits."""
    world.cache.add(OuterBoard, policy=ReadThrough(**limits))
    keeper = world.cache.table(OuterBoard).keeper
    assert isinstance(keeper, ReadRanges)
    return keeper


def kind(world: World, *criteria: Any) -> str:
    """Return how a read of what meets the criteria is answered."""
    with world.Session() as session:
        session.scalars(select(OuterBoard).where(*criteria)).all()
        assert session.last_read is not None
        world.cache._check()
        return session.last_read.kind


def records(world: World) -> int:
    """Return the number of records in storage."""
    return world.cache.stats(OuterBoard).records


def between(start: float, end: float) -> tuple[Any, Any]:
    """Return criteria for the flights from one hour until another."""
    return OuterBoard.hour >= hour(start), OuterBoard.hour < hour(end)


def asked(statements: list[str]) -> int:
    """Return how many SELECTs there were."""
    return sum("SELECT" in statement for statement in statements)


# -- filling -------------------------------------------------------------------------------------


def test_a_miss_is_loaded_with_one_statement_and_the_next_read_is_a_hit(world: World) -> None:
    """What a read asks for, by the index that it uses, is covered from then on."""
    world.cache.table(OuterBoard).set_up()
    with counting() as statements:
        assert world.ids(*between(1, 3)) == [2, 3, 4]
    assert asked(statements) == 1
    assert world.cache.covers(OuterBoard, *between(1, 3))
    with counting() as statements:
        assert world.ids(*between(1, 3)) == [2, 3, 4]
        assert world.ids(*between(1, 2)) == [2, 3]
    assert not statements
    stats = world.cache.stats(OuterBoard)
    assert (stats.misses, stats.hits, stats.fills, stats.records) == (1, 2, 1, 3)
    assert stats.reasons == {"loaded": 1}


def test_only_what_is_missing_is_loaded(world: World) -> None:
    """Of a range that is there in part, the rest is fetched."""
    world.ids(*between(1, 2))
    world.ids(*between(0, 4))
    assert world.cache.stats(OuterBoard).records_loaded == 5
    assert kind(world, *between(0, 4)) == "hit"


def test_ranges_of_an_index_are_loaded(world: World) -> None:
    """session.range() fills, too, whatever its direction."""
    with world.Session() as session:
        for _ in range(2):
            found = session.range(OuterBoard.by_plane, "N1", ge=hour(0), descending=True)
            assert [record.id for record in found] == [4, 1]
        assert session.last_read is not None
        assert session.last_read.kind == "hit"
    world.cache._check()


def test_reads_by_key_are_remembered_absent_ones_too(world: World) -> None:
    """A key that was asked for is known, or known to be absent, until an insert marks it."""
    with world.Session() as session:
        for key, there in ((1, True), (77, False)):
            assert (session.get(OuterBoard, key) is not None) == there
            with counting() as statements:
                assert (session.get(OuterBoard, key) is not None) == there
            assert not statements
    with world.engine.begin() as connection:
        connection.execute(insert(Flight).values(flight(77, 5)))
    with world.Session() as session:
        assert session.get(OuterBoard, 77) is not None
        with counting() as statements:
            assert session.get(OuterBoard, 77) is not None
    assert not statements
    world.cache._check()


def test_equality_on_an_index_is_remembered_absence_too(world: World) -> None:
    """An aircraft that has no flights has none from memory, until it has one."""
    absent = OuterBoard.tailnum == "N2X"
    assert world.ids(absent) == []
    assert kind(world, absent) == "hit"
    with world.engine.begin() as connection:
        connection.execute(insert(Plane).values(tailnum="N2X"))
        connection.execute(insert(Flight).values(flight(8, 5, tailnum="N2X")))
    assert world.ids(absent) == [8]
    with world.engine.begin() as connection:
        connection.execute(delete(Flight).where(Flight.id == 8))
    assert world.ids(absent) == []
    assert kind(world, absent) == "hit"


def test_the_first_records_are_enough_for_a_limit(world: World) -> None:
    """A read with a limit, in the order of an index, loads no more than it needs."""
    statement = select(OuterBoard).order_by(OuterBoard.hour, OuterBoard.id).limit(2)
    last = select(OuterBoard).order_by(OuterBoard.hour.desc(), OuterBoard.id.desc()).limit(2)
    with world.Session() as session:
        assert [record.id for record in session.scalars(statement)] == [1, 2]
        assert records(world) == 2
        with counting() as statements:
            assert [record.id for record in session.scalars(statement)] == [1, 2]
        assert not statements
        assert [record.id for record in session.scalars(last)] == [6, 5]
        assert records(world) == 4
        with counting() as statements:
            assert [record.id for record in session.scalars(last)] == [6, 5]
        assert not statements
    world.cache._check()
    with world.engine.begin() as connection:
        connection.execute(insert(Flight).values(flight(9, 0)))
    with world.Session() as session:
        assert [record.id for record in session.scalars(statement)] == [1, 9]
    world.cache._check()


def test_pages_load_as_they_are_turned(world: World) -> None:
    """Each page of a keyset pagination is one statement, once."""
    world.cache.table(OuterBoard).set_up()
    for turn in range(2):
        seen: list[int] = []
        with world.Session() as session, counting() as statements:
            after = None
            while page := session.range(OuterBoard.by_hour, limit=2, after=after):
                seen += [record.id for record in page]
                after = page[-1]
        assert seen == [1, 2, 3, 4, 5, 6]
        assert asked(statements) == (4 if turn == 0 else 0)
        world.cache._check()


def test_counts_are_filled_and_answered(world: World) -> None:
    """A count over a range is from memory once the range is there."""
    counted = select(func.count()).select_from(OuterBoard).where(*between(1, 4))
    with world.Session() as session:
        assert session.scalar(counted) == 4
        with counting() as statements:
            assert session.scalar(counted) == 4
    assert not statements


def test_all_of_a_view_is_only_loaded_where_there_is_a_limit(world: World) -> None:
    """A read of everything would load everything, however much that is."""
    assert kind(world) == "miss"
    assert records(world) == 0
    keep(world, max_records=6)
    assert kind(world) == "miss"
    assert records(world) == 6
    assert kind(world) == "hit"
    assert world.cache.covers(OuterBoard)


def test_explain_tells_that_misses_are_loaded(world: World) -> None:
    """And that the first records are enough for a limit."""
    statement = select(OuterBoard).where(*between(1, 3))
    assert "ReadThrough loads" in world.cache.explain(statement).reason
    world.ids(*between(1, 3))
    assert world.cache.explain(statement).kind == "hit"
    assert "ReadThrough loads" in str(world.cache.explain(select(OuterBoard).where(*between(2, 5))))
    first = select(OuterBoard).where(OuterBoard.hour >= hour(1)).order_by(OuterBoard.hour)
    assert world.cache.explain(first.limit(3)).kind == "hit"
    assert world.cache.explain(first.limit(4)).kind == "partial"


def test_what_no_index_serves_is_left_to_the_database(world: World) -> None:
    """A condition that no index begins with would load all of the view."""
    assert kind(world, OuterBoard.airline == "United") == "miss"
    assert records(world) == 0


def test_no_store_is_respected(world: World) -> None:
    """A read that says so leaves nothing behind, and is still answered from memory."""
    statement = select(OuterBoard).where(*between(1, 3)).options(no_store())
    with world.Session() as session:
        assert ids(session.scalars(statement)) == [2, 3, 4]
        assert records(world) == 0
    world.ids(*between(1, 3))
    with world.Session() as session, counting() as statements:
        assert ids(session.scalars(statement)) == [2, 3, 4]
    assert not statements


def test_a_session_that_must_bypass_fills_nothing(world: World) -> None:
    """Own writes, bypass_cache() and asked-for isolation go to the database, and only there."""
    with world.Session() as session:
        session.execute(update(Flight).where(Flight.id == 2).values(delay=7))
        assert ids(session.scalars(select(OuterBoard).where(*between(1, 3)))) == [2, 3, 4]
        session.rollback()
        session.scalars(select(OuterBoard).where(*between(1, 3)).options(bypass_cache())).all()
    with world.Session() as session:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        session.scalars(select(OuterBoard).where(*between(1, 3))).all()
    assert world.cache.stats(OuterBoard).fills == 0
    assert records(world) == 0


def test_uncommitted_rows_of_others_are_not_stored(postgresql: Database) -> None:
    """A fill reads a snapshot of its own, not the transaction of whoever asks."""
    with flights_world(postgresql) as world:
        keep(world)
        with world.Session() as writer:
            writer.execute(insert(Flight).values(flight(9, 1)))
            assert world.ids(*between(1, 3)) == [2, 3, 4]
            writer.commit()
        assert world.ids(*between(1, 3)) == [2, 3, 4, 9]
        world.cache._check()


# -- one for all ---------------------------------------------------------------------------------


def test_a_burst_of_equal_misses_makes_one_query(world: World) -> None:
    """All who ask for the same wait for the one who reads it."""
    table = world.cache.table(OuterBoard)
    table.set_up()
    held = Held(table, "loaded")
    with counting() as statements:
        readers = [Running(lambda: world.ids(*between(1, 3))) for _ in range(8)]
        assert held.reached.wait(20)
        held.let_go()
        for reader in readers:
            assert reader.result() == [2, 3, 4]
    assert asked(statements) == 1
    world.cache._check()


def test_an_overlapping_miss_loads_the_rest_and_waits(world: World) -> None:
    """Who asks for more than what is being read reads the rest."""
    table = world.cache.table(OuterBoard)
    table.set_up()
    held = Held(table, "loaded")
    first = Running(lambda: world.ids(*between(1, 3)))
    assert held.reached.wait(20)
    second = Running(lambda: world.ids(*between(0, 4)))
    held.let_go()
    assert first.result() == [2, 3, 4]
    assert second.result() == [1, 2, 3, 4, 5]
    assert world.cache.stats(OuterBoard).records_loaded == 5
    world.cache._check()


def test_different_misses_do_not_wait_for_each_other(world: World) -> None:
    """A slow load of one range does not hold up another; too many are left to the database."""
    table = world.cache.table(OuterBoard)
    table.set_up()
    held = Held(table, "loaded")
    slow = Running(lambda: world.ids(*between(0, 1)))
    assert held.reached.wait(20)
    assert world.ids(*between(2, 3)) == [4]
    assert kind(world, *between(2, 3)) == "hit"
    held.let_go()
    assert slow.result() == [1]
    assert MOST_FILLS > 1


def test_a_commit_between_the_miss_and_the_fill_is_seen(world: World) -> None:
    """What commits while a range is being read is read again before it is answered."""
    table = world.cache.table(OuterBoard)
    table.set_up()
    held = Held(table, "loaded")
    reader = Running(lambda: world.ids(*between(1, 3)))
    assert held.reached.wait(20)
    with world.engine.begin() as connection:
        connection.execute(insert(Flight).values(flight(9, 2)))
        connection.execute(delete(Flight).where(Flight.id == 2))
        connection.execute(update(Flight).where(Flight.id == 3).values(hour=hour(5)))
    held.let_go()
    assert reader.result() == [4, 9]
    assert world.ids(*between(1, 3)) == [4, 9]
    world.cache._check()


def test_a_fill_that_fails_leaves_the_answer_to_the_database(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reader is answered all the same, nothing is stored, and those who waited go on."""
    table = world.cache.table(OuterBoard)
    table.set_up()
    held = Held(table, "loaded")

    def failing(*_: Any, **__: Any) -> Any:
        raise OperationalError("SELECT", {}, Exception("the server is gone"))

    monkeypatch.setattr(table, "_change", failing)
    readers = [Running(lambda: world.ids(*between(1, 3))) for _ in range(3)]
    assert held.reached.wait(20)
    held.let_go()
    assert [reader.result() for reader in readers] == [[2, 3, 4]] * 3
    assert records(world) == 0
    assert "what a read missed was not loaded" in caplog.text
    monkeypatch.undo()
    assert world.ids(*between(1, 3)) == [2, 3, 4]
    assert records(world) == 3
    world.cache._check()


def test_misses_do_not_keep_refreshes_from_ending(world: World) -> None:
    """While a refresh reads, fills wait to be stored; both are there in the end."""
    table = world.cache.table(OuterBoard)
    world.ids(*between(0, 1))
    with world.engine.begin() as connection:
        connection.execute(update(Flight).where(Flight.id == 1).values(hour=hour(0.5)))
    held = Held(table, "read")
    refresh = Running(table.refresh)
    assert held.reached.wait(20)
    filled = Running(lambda: world.ids(*between(1, 3)))
    held.let_go()
    refresh.result()
    assert filled.result() == [2, 3, 4]
    assert world.cache.stats(OuterBoard).refreshes == 1
    assert kind(world, *between(0, 1)) == "hit"
    world.cache._check()


async def test_one_who_reads_is_cancelled_while_others_wait(database: Database) -> None:
    """Those who wait for a reader that is cancelled read for themselves."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    cache = AsyncTableCache(engine)
    cache.add(OuterBoard, policy=ReadThrough())
    table = cache.sync_cache.table(OuterBoard)
    Session = cache.sessionmaker()
    reached, go = asyncio.Event(), asyncio.Event()
    from sqlalchemy.util import await_only

    original = table._pause

    def pause(point: str) -> None:
        if point == "loaded" and not reached.is_set():
            reached.set()
            await_only(go.wait())
        original(point)

    table._pause = pause  # type: ignore[method-assign]

    async def read() -> list[int]:
        async with Session() as session:
            return ids(await session.scalars(select(OuterBoard).where(*between(1, 3))))

    first = asyncio.create_task(read())
    await asyncio.wait_for(reached.wait(), 20)
    others = [asyncio.create_task(read()) for _ in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await asyncio.wait_for(asyncio.gather(*others), 20) == [[2, 3, 4]] * 3
    assert cache.stats(OuterBoard).fills == 1
    async with Session() as session:
        assert await session.get(OuterBoard, 1) is not None
        assert len(await session.range(OuterBoard.by_hour, ge=hour(1), lt=hour(3))) == 3
        assert session.last_read is not None
        assert session.last_read.kind == "hit"
    cache._check()
    await cache.close()
    await engine.dispose()


# -- room ----------------------------------------------------------------------------------------


def test_the_least_recently_used_range_leaves(world: World) -> None:
    """Where there is no room, the range leaves of which nobody asked for the longest time."""
    keep(world, max_records=4)
    world.ids(*between(0, 1))  # 1 record
    world.ids(*between(1, 2))  # 2 records
    world.ids(*between(0, 1))
    world.ids(*between(2, 4))  # 2 records: one range has to leave
    assert records(world) == 3
    assert not world.cache.covers(OuterBoard, *between(1, 2))
    assert kind(world, *between(0, 1)) == "hit"
    assert kind(world, *between(2, 4)) == "hit"
    assert world.cache.stats(OuterBoard).ranges_evicted == 1
    world.cache._check()


def test_ranges_of_several_indexes_share_records(world: World) -> None:
    """A record that another range covers stays when one of its ranges leaves."""
    keep(world, max_records=5)
    world.ids(OuterBoard.tailnum == "N1")  # 1 and 4
    world.ids(*between(0, 3))  # 1, 2, 3, 4
    assert records(world) == 4
    world.ids(*between(0, 3))
    world.ids(*between(3, 6))  # 5 and 6: the aircraft leaves, and takes nothing along
    world.cache._check()
    assert records(world) <= 5
    assert kind(world, *between(3, 6)) == "hit"


def test_what_is_larger_than_the_limit_is_served_and_not_stored(world: World) -> None:
    """One answer that does not fit leaves what is there alone, and is not read twice again."""
    keep(world, max_records=2)
    world.ids(*between(0, 1))
    assert world.ids(*between(1, 5)) == [2, 3, 4, 5, 6]
    assert kind(world, *between(0, 1)) == "hit"
    with counting() as statements:
        assert world.ids(*between(1, 5)) == [2, 3, 4, 5, 6]
    assert asked(statements) == 1
    world.cache._check()


def test_absent_rows_take_room_too(world: World) -> None:
    """Keys that are not there are forgotten like others: their number is limited."""
    keeper = keep(world, max_records=3)
    for key in range(100, 120):
        assert world.ids(OuterBoard.id == key) == []
        world.cache._check()
    assert len(keeper._ranges) == 3


def test_bytes_are_limited(world: World) -> None:
    """max_bytes makes room as max_records does."""
    keep(world, max_bytes=1_000_000)
    world.ids(*between(0, 2))
    assert records(world) == 3
    keep(world, max_bytes=10)
    world.cache.clear(OuterBoard)
    assert world.ids(*between(0, 2)) == [1, 2, 3]
    assert records(world) == 0
    world.cache._check()


def test_inserts_into_a_range_do_not_pass_the_limit(world: World) -> None:
    """What a refresh adds makes something leave, and answers stay right."""
    keep(world, max_records=3)
    world.ids(*between(1, 3))
    with world.engine.begin() as connection:
        connection.execute(insert(Flight), [flight(10 + n, 2) for n in range(5)])
    assert world.ids(*between(1, 3)) == [2, 3, 4, *range(10, 15)]
    assert records(world) <= 3
    world.cache._check()


def test_a_mark_of_the_whole_view_gives_up_what_was_read(world: World) -> None:
    """Nothing is read again that nobody asks for again."""
    world.ids(*between(1, 3))
    world.cache.invalidate(OuterBoard)
    with counting() as statements:
        assert world.ids(*between(3, 4)) == [5]
    assert asked(statements) == 1
    assert records(world) == 1
    world.cache._check()


def test_what_leaves_unused_is_filled_the_second_time(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Where filling is in vain, only what is missed twice is loaded; that is said once."""
    keep(world, max_records=1)
    for key in range(1000, 1000 + WASTE + 2):
        world.ids(OuterBoard.id == key)
    fills = world.cache.stats(OuterBoard).fills
    for key in range(2000, 2016):
        world.ids(OuterBoard.id == key)
    assert world.cache.stats(OuterBoard).fills == fills
    for _ in range(3):
        assert world.ids(OuterBoard.id == 2003) == []
    assert world.cache.stats(OuterBoard).fills == fills + 1
    assert kind(world, OuterBoard.id == 2003) == "hit"
    assert caplog.text.count("had never been used again") == 1
    world.cache._check()


def test_loads_and_evictions_by_hand_are_followed(world: World) -> None:
    """What is loaded otherwise is a range like others, and may have to leave."""
    keep(world, max_records=4)
    world.cache.load(OuterBoard, *between(0, 3))
    world.cache._check()
    world.cache.evict(OuterBoard, *between(1, 2))
    assert world.ids(*between(3, 5)) == [5, 6]
    world.cache._check()
    assert kind(world, *between(3, 5)) == "hit"
    assert records(world) <= 4
    keep(world, max_records=100)
    world.cache.load(OuterBoard)
    assert world.ids(*between(3, 5)) == [5, 6]
    world.cache._check()
    world.cache.clear(OuterBoard)
    world.ids(*between(3, 5))
    world.cache._check()


def test_a_load_does_not_count_on_what_has_left_meanwhile(world: World) -> None:
    """What was there when a load began may leave under it: it reads that, too, in the end."""
    keep(world, max_records=3)
    table = world.cache.table(OuterBoard)
    for load in (world.cache.extend, world.cache.load):
        world.cache.clear(OuterBoard)
        world.ids(*between(0, 1))
        held = Held(table, "loaded")
        loading = Running(lambda load=load: load(OuterBoard, *between(0, 2)))
        assert held.reached.wait(20)
        assert world.ids(*between(2, 5)) == [4, 5, 6]
        assert not world.cache.covers(OuterBoard, *between(0, 1))
        held.let_go()
        loading.result()
        world.cache._check()
        assert world.ids(*between(0, 2)) == [1, 2, 3]
        world.cache._check()


def test_a_load_does_not_count_on_what_a_mark_has_emptied(world: World) -> None:
    """A mark of the whole view gives up what a load had found to be there."""
    table = world.cache.table(OuterBoard)
    world.ids(*between(0, 1))
    held = Held(table, "loaded")
    loading = Running(lambda: world.cache.load(OuterBoard, *between(0, 2)))
    assert held.reached.wait(20)
    with world.engine.begin() as connection:
        connection.execute(insert(Flight).values(flight(9, 0.5)))
    world.cache.invalidate(OuterBoard)
    world.cache.refresh(OuterBoard)
    assert records(world) == 0
    held.let_go()
    loading.result()
    world.cache._check()
    assert world.ids(*between(0, 2)) == [1, 2, 3, 9]


def test_reads_by_key_and_by_other_indexes_count_as_uses(world: World) -> None:
    """What is read with get(), or through another index, is not what leaves next."""
    keeper = keep(world, max_records=100)
    world.ids(*between(0, 3))
    world.ids(OuterBoard.id == 5)
    with world.Session() as session:
        assert session.get(OuterBoard, 5) is not None
        assert len(session.range(OuterBoard.by_plane, "N1", ge=hour(0), lt=hour(2))) == 1
        assert session.last_read is not None
        assert session.last_read.kind == "hit"
    keeper._drain()
    assert all(found.used for found in keeper._ranges)


def test_a_refused_load_waits_for_a_refresh_before_it_is_refused(world: World) -> None:
    """Room that only a refresh under way keeps from being made is waited for."""
    world.cache.add(InnerBoard)
    for view in (InnerBoard, OuterBoard):
        world.cache.load(view)
    memory = MemoryLimit(int(world.cache.stats(InnerBoard).bytes * 1.2))
    for view in (InnerBoard, OuterBoard):
        table = world.cache.table(view)
        memory.add(table)
        table.memory = memory
    world.cache.clear(InnerBoard)
    keep(world)
    table = world.cache.table(OuterBoard)
    with world.engine.begin() as connection:
        connection.execute(update(Flight).where(Flight.id == 2).values(delay=1.0))
    held = Held(table, "read")
    refresh = Running(table.refresh)
    assert held.reached.wait(20)
    load = Running(lambda: world.cache.load(InnerBoard))
    held.let_go()
    refresh.result()
    load.result()
    assert world.cache.stats(InnerBoard).records == 6
    assert records(world) == 0
    world.cache._check()


# -- age -----------------------------------------------------------------------------------------


def test_ranges_older_than_their_ttl_are_read_again(world: World) -> None:
    """By the next read, or by the upkeep, whichever comes first."""
    now = datetime(2024, 3, 1, tzinfo=UTC)
    world.cache.clock = lambda: now
    keeper = keep(world, ttl=timedelta(minutes=10))
    world.ids(*between(1, 3))
    with world.outside() as session:
        session.execute(update(Flight).where(Flight.id == 2).values(delay=99))
        session.commit()
    now += timedelta(minutes=9)
    assert kind(world, *between(1, 3)) == "hit"
    world.ids(*between(3, 4))
    now += timedelta(minutes=2)
    with world.Session() as session:
        found = session.scalars(select(OuterBoard).where(*between(1, 3))).all()
        assert {record.id: record.delay for record in found}[2] == 99
    assert kind(world, *between(3, 4)) == "hit"
    world.cache._check()
    now += timedelta(minutes=20)
    assert keeper.step() == 60.0
    assert records(world) == 0
    world.cache._check()


async def test_a_range_that_is_too_old_is_no_hit_inline(database: Database) -> None:
    """An asynchronous read notices the age before it answers without a greenlet."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    now = datetime(2024, 3, 1, tzinfo=UTC)
    async with AsyncTableCache(engine) as cache:
        cache.clock = lambda: now
        cache.add(OuterBoard, policy=ReadThrough(ttl=timedelta(minutes=1)))
        async with cache.sessionmaker()() as session:
            for age, expected in ((0, "miss"), (0, "hit"), (2, "miss"), (0, "hit")):
                now += timedelta(minutes=age)
                await session.range(OuterBoard.by_hour, ge=hour(1), lt=hour(3))
                assert session.last_read is not None
                assert session.last_read.kind == expected
            await cache.step(OuterBoard)
        cache._check()
    await engine.dispose()


# -- policies as such ------------------------------------------------------------------------------


def test_wrong_limits_are_refused() -> None:
    """What cannot be a limit is an error that names it."""
    for wrong in ({"max_records": 0}, {"max_bytes": -1}, {"max_records": True}):
        with pytest.raises(TableCacheError, match=next(iter(wrong))):
            ReadThrough(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TableCacheError, match="ttl"):
        ReadThrough(ttl=timedelta(0))


def test_a_policy_can_be_exchanged(world: World) -> None:
    """Adding the view again with another policy ends the first."""
    keep(world, ttl=timedelta(minutes=1))
    table = world.cache.table(OuterBoard)
    assert len(table.guards) == 1
    keep(world)
    assert not table.guards
    world.cache.add(OuterBoard)
    assert isinstance(table.keeper, ReadRanges)


# -- random --------------------------------------------------------------------------------------


@contextmanager
def followed(database: Database) -> Iterator[World]:
    """Lend a world whose cache follows what others write."""
    feed = ChangeFeed(max_lag=timedelta(hours=1))
    with flights_world(database, feed=feed) as world:
        world.cache.install_feed()
        try:
            yield world
        finally:
            world.cache.uninstall_feed()


@pytest.mark.every_database
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("seed", range(int(os.environ.get("SA_TABLECACHE_TEST_EXAMPLES", "2"))))
def test_random_reads_and_writes_agree_with_the_database(
    database: Database, seed: int, elsewhere: bool
) -> None:
    """Whatever is read, written, loaded and evicted, here or elsewhere, the answers are right."""
    rng = random.Random(seed)
    with followed(database) if elsewhere else flights_world(database) as world:
        keep(world, max_records=rng.choice([2, 5, 12]))
        next_id = 100

        def criteria() -> tuple[Any, ...]:
            start = rng.choice([0, 0.5, 1, 2, 3])
            return rng.choice(
                [
                    between(start, start + rng.choice([0.5, 1, 3])),
                    (OuterBoard.id == rng.randrange(12),),
                    (OuterBoard.tailnum == rng.choice(["N1", "N2", "N3", "N4"]),),
                    (OuterBoard.tailnum.is_(None),),
                    (OuterBoard.year == rng.choice([1999, 2010, 5]), *between(start, 9)),
                    (OuterBoard.hour >= hour(start),),
                    (OuterBoard.by_delay >= rng.choice([0, 5, 30]), OuterBoard.by_delay < 31),
                ]
            )

        def write() -> None:
            nonlocal next_id
            number, after = rng.randrange(1, 12), rng.choice([0, 0.5, 1, 2, 3, 4])
            with ExitStack() as stack:
                connection: Any = (
                    stack.enter_context(world.outside())
                    if elsewhere
                    else stack.enter_context(world.engine.begin())
                )
                match rng.randrange(6):
                    case 0:
                        next_id += 1
                        tailnum = rng.choice([None, "N1", "N3"])
                        connection.execute(
                            insert(Flight).values(flight(next_id, after, tailnum=tailnum))
                        )
                    case 1:
                        connection.execute(
                            update(Flight).where(Flight.id == number).values(hour=hour(after))
                        )
                    case 2:
                        connection.execute(delete(Flight).where(Flight.id == number))
                    case 3:
                        year = rng.choice([1999, 5, None])
                        connection.execute(
                            update(Plane).where(Plane.tailnum == "N1").values(year=year)
                        )
                    case 4:
                        connection.execute(
                            update(Flight).where(Flight.id == number).values(delay=after * 10)
                        )
                    case _:
                        connection.execute(text("UPDATE flights SET delay = 3 WHERE id = 4"))
                connection.commit()
            if elsewhere and rng.random() < 0.8:
                world.cache.barrier()

        for _ in range(120):
            action = rng.random()
            if action < 0.25:
                write()
            elif action < 0.28:
                world.cache.extend(OuterBoard, *between(1, 2))
            elif action < 0.31:
                world.cache.evict(OuterBoard, *between(0, rng.choice([1, 3])))
            elif action < 0.33:
                world.cache.invalidate(OuterBoard)
            else:
                where = criteria()
                statement = select(OuterBoard).where(*where)
                if rng.random() < 0.3:
                    direction = rng.choice([lambda c: c, lambda c: c.desc()])
                    statement = statement.order_by(
                        direction(OuterBoard.hour), direction(OuterBoard.id)
                    ).limit(rng.choice([1, 2, 4]))
                if elsewhere:
                    world.cache.barrier()
                with world.Session() as session:
                    found = session.scalars(statement).all()
                    truth = session.scalars(statement.options(bypass_cache())).all()
                    assert sorted(found, key=repr) == sorted(truth, key=repr), statement
            world.cache._check()
            assert world.cache.stats(OuterBoard).fills < 200


def test_readers_writers_and_evictions_beside_each_other(database: Database) -> None:
    """Threads that read, write and are short of room see their own commits and nothing torn."""
    with flights_world(database) as world:
        if database.dialect == "sqlite":
            with world.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        keep(world, max_records=4)
        errors: list[BaseException] = []

        def work(number: int) -> None:
            rng = random.Random(number)
            try:
                for turn in range(15):
                    key = 100 * number + turn
                    with world.Session() as session:
                        session.execute(insert(Flight).values(flight(key, rng.choice([1, 2, 3]))))
                        session.commit()
                        start = rng.choice([0, 1, 2])
                        world.ids(*between(start, start + 1.5))
                        assert session.get(OuterBoard, key) is not None
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        world.cache._check()
        assert len(world.ids(*between(0, 9))) == 6 + 45


def test_a_cache_bound_later_keeps_its_policies(database: Database) -> None:
    """A policy that is given before the engine is known works from then on."""
    late = TableCache()
    late.add(OuterBoard, policy=ReadThrough())
    with flights_world(database) as world:
        late.bind(world.engine)
        with late, late.sessionmaker()() as session:
            session.scalars(select(OuterBoard).where(*between(1, 3))).all()
            assert late.stats(OuterBoard).records == 3
