"""Other tasks go on in the middle of loads and refreshes, and whatever they do there is right.

The pauses are where an event loop would otherwise be held up. Here each of them is taken, so that a
few records have as many as some hundred thousand have in earnest.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import select

from sa_tablecache import AsyncTableCache, merging, sorting, storage, turns
from tests.integration.databases import Database
from tests.integration.flights import hour, ids, insert_flights
from tests.zoo import Flight, OuterBoard

Step = Callable[[AsyncTableCache], Awaitable[object]]


@pytest.fixture(autouse=True)
def many_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every pause, and have as many as there can be."""
    monkeypatch.setattr(turns, "PAUSE_EVERY", -1.0)
    for module in (merging, storage):
        monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(storage, "BULK", 1_000)
    monkeypatch.setattr(sorting, "STEP", 4)
    monkeypatch.setattr(sorting, "SAMPLE", 2)


@asynccontextmanager
async def flights(database: Database) -> AsyncIterator[AsyncTableCache]:
    """Six flights, none of them cached."""
    engine = database.async_engine()
    async with engine.begin() as connection:
        await connection.run_sync(insert_flights)
    async with AsyncTableCache(engine, views=[OuterBoard]) as cache:
        yield cache
    await engine.dispose()


async def load_window(cache: AsyncTableCache) -> None:
    await cache.load(OuterBoard, OuterBoard.hour < hour(2))


async def slide(cache: AsyncTableCache) -> None:
    await cache.load(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4))


async def extend(cache: AsyncTableCache) -> None:
    await cache.extend(OuterBoard, OuterBoard.hour < hour(4))


async def evict(cache: AsyncTableCache) -> None:
    await cache.evict(OuterBoard, OuterBoard.hour < hour(1))


async def load_everything(cache: AsyncTableCache) -> None:
    await cache.load(OuterBoard)


async def reload(cache: AsyncTableCache) -> None:
    cache.invalidate(OuterBoard)
    await cache.refresh(OuterBoard)


async def clear(cache: AsyncTableCache) -> None:
    await cache.clear(OuterBoard)


STEPS: list[Step] = [load_window, slide, extend, evict, load_everything, reload, clear]


def state_of(cache: AsyncTableCache) -> Any:
    return cache.sync_cache.table(OuterBoard).state


async def read(cache: AsyncTableCache) -> list[Any]:
    """Read all flights from the cache or the database, with their delays."""
    async with cache.sessionmaker()() as session:
        found = await session.scalars(select(OuterBoard))
        return sorted((record.id, record.delay) for record in found)


async def test_other_tasks_go_on(sqlite: Database) -> None:
    """While a load sorts what it has read, other tasks have their turns."""
    async with flights(sqlite) as cache:
        table = cache.sync_cache.table(OuterBoard)
        turns_before_end = 0
        sorting_ = False

        def pause(point: str) -> None:
            nonlocal sorting_
            sorting_ = sorting_ or point == "loaded"

        table._pause = pause  # type: ignore[method-assign]
        load = asyncio.create_task(cache.load(OuterBoard))
        while not load.done():
            turns_before_end += sorting_
            await asyncio.sleep(0)
        assert turns_before_end > 20
        assert await read(cache) == [(1, None), (2, 5.0), (3, 30.0), (4, -3.0), (5, 0.0), (6, None)]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
async def test_a_cancelled_pause_leaves_no_trace(sqlite: Database, step: Step) -> None:
    """Wherever it is cancelled, a step has happened or it has not; the next one is as if."""
    async with flights(sqlite) as cache:
        table = cache.sync_cache.table(OuterBoard)
        done = False
        turn = 0
        while not done:
            for before in STEPS[: STEPS.index(step)]:
                await before(cache)
            earlier = state_of(cache)
            task: asyncio.Task[Any] = asyncio.create_task(step(cache))  # type: ignore[arg-type]
            for _ in range(turn):
                await asyncio.sleep(0)
            at_the_pause = state_of(cache)
            task.cancel()
            await asyncio.wait([task])
            done = not task.cancelled()
            assert table._is_still(earlier) or table._is_still(at_the_pause)
            assert not any(t.taken for t in (table._loading, table._refreshing, table._setting_up))
            table._check()
            turn += 1 + turn // 8
        assert turn > 10
        await read(cache)
        await load_everything(cache)
        assert await cache.covers(OuterBoard)
        table._check()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
async def test_commits_and_refreshes_go_on_meanwhile(sqlite: Database, step: Step) -> None:
    """Others commit and read in the pauses: the step ends, and all read what the database says."""
    async with flights(sqlite) as cache:
        for before in STEPS[: STEPS.index(step)]:
            await before(cache)
        task: asyncio.Task[Any] = asyncio.create_task(step(cache))  # type: ignore[arg-type]
        delay = 0.0
        while not task.done():
            delay += 1
            async with cache.sessionmaker()() as session:
                (await session.get_one(Flight, 2)).delay = delay
                await session.commit()
            assert (2, delay) in await read(cache)
            async with cache.sessionmaker()() as session:
                inside = select(OuterBoard).where(OuterBoard.hour == hour(1))
                assert ids(await session.scalars(inside)) == [2, 3]
        await task
        cache.sync_cache.table(OuterBoard)._check()
        assert (2, delay) in await read(cache)
        await load_everything(cache)
        assert (2, delay) in await read(cache)
        cache.sync_cache.table(OuterBoard)._check()
