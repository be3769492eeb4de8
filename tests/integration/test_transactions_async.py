"""The asynchronous twins of transactions, and what cancelling them leaves."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import URL, func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)

from sa_tablecache import (
    AsyncTableCache,
    Transaction,
    TransactionConflict,
    TransactionError,
    attempts,
    in_transaction,
    transactions,
)
from tests.integration.accounts import Account, AccountBoard, Tag, async_twin, bank

pytestmark = pytest.mark.every_database


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> URL:
    """A database of each kind in turn; PostgreSQL takes its time to create one, and keeps it."""
    name = {"postgresql": "postgres_module"}.get(request.param, request.param)
    url: URL = request.getfixturevalue(f"{name}_url")
    return url


@pytest.fixture
async def engine(database_url: URL) -> AsyncIterator[AsyncEngine]:
    """Accounts 1 and 2, each with 100; the driver is asynchronous."""
    with bank(database_url):
        engine = async_twin(database_url, pool_size=10)
        yield engine
        await engine.dispose()


@pytest.fixture
def factory(engine: AsyncEngine) -> "async_sessionmaker[AsyncSession]":
    """What makes the sessions of the application."""
    return async_sessionmaker(engine)


async def add(session: AsyncSession, number: int, amount: int) -> None:
    """Add to a balance, in the database."""
    await session.execute(
        update(Account).where(Account.id == number).values(balance=Account.balance + amount),
        execution_options={"synchronize_session": False},
    )


async def balances(engine: AsyncEngine) -> list[int]:
    """Return all balances, as committed."""
    async with AsyncSession(engine) as session:
        return list(await session.scalars(select(Account.balance).order_by(Account.id)))


class Meeting:
    """Has two tasks wait for each other, in their first tries."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._parties = 1 if engine.dialect.name == "sqlite" else 2
        self._met: set[Any] = set()
        self._all = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the other one."""
        self._met.add(asyncio.current_task())
        if len(self._met) == self._parties:
            self._all.set()
        await asyncio.wait_for(self._all.wait(), 20)


async def test_no_update_is_lost(engine: AsyncEngine, factory: Any):
    """Two tasks that read the same balance and write it back both count."""
    together = Meeting(engine)

    @in_transaction(factory)
    async def add_in_python(session: AsyncSession, amount: int) -> int:
        account = await session.get_one(Account, 1)
        await together.wait()
        account.balance += amount
        return amount

    assert await asyncio.gather(add_in_python(1), add_in_python(10)) == [1, 10]
    assert await balances(engine) == [111, 100]


async def test_no_decision_is_overtaken(engine: AsyncEngine, factory: Any):
    """Of two tasks that may each take 150 of 200 in all, from different accounts, one does."""
    together = Meeting(engine)

    @in_transaction(factory)
    async def withdraw(session: AsyncSession, account: int) -> bool:
        total = await session.scalar(select(func.sum(Account.balance)))
        await together.wait()
        if total < 150:
            return False
        await add(session, account, -150)
        return True

    assert sorted(await asyncio.gather(withdraw(1), withdraw(2))) == [False, True]
    assert sum(await balances(engine)) == 50


async def test_many_that_get_or_create_make_one(engine: AsyncEngine, factory: Any):
    """Of 50 tasks that look for a row and insert it if it is not there, one inserts."""

    @in_transaction(factory, tries=200)
    async def get_or_create(session: AsyncSession, name: str) -> int:
        found = (await session.scalars(select(Tag.id).where(Tag.name == name))).first()
        if found is None:
            tag = Tag(name=name)
            session.add(tag)
            await session.flush()
            found = tag.id
        return found

    found = await asyncio.gather(*[get_or_create("new") for _ in range(50)])
    assert len(set(found)) == 1
    async with factory() as session:
        assert (await session.scalars(select(Tag.id))).all() == [found[0]]


class Conflicting:
    """A relaxed or strict function that meets a conflict in its first tries."""

    def __init__(self, engine: AsyncEngine, failing: int) -> None:
        self.engine, self.failing, self.runs = engine, failing, 0

    async def __call__(self, session: AsyncSession) -> int:
        """Write, and meet a conflict with another session if there are tries left to fail."""
        self.runs += 1
        if self.runs <= self.failing:
            await self.provoke(session)
        await add(session, 2, 1)
        return self.runs

    async def provoke(self, session: AsyncSession) -> None:
        """Have another session commit between the read and the write of this one."""
        if self.engine.dialect.name != "mysql":
            await session.scalar(select(Account.balance))
            async with AsyncSession(self.engine) as other:
                await add(other, 1, 1)
                await other.commit()
            await add(session, 1, 10)
            return
        async with AsyncSession(self.engine) as other:
            other.add_all(Tag(name="weight") for _ in range(20))
            await other.flush()
            await add(other, 2, 0)
            await add(session, 1, 10)
            closing = asyncio.create_task(add(other, 1, 1))
            try:
                await add(session, 2, 10)
            finally:
                await closing
                await other.commit()


async def test_conflicts_are_retried(engine: AsyncEngine, factory: Any):
    """Nothing of the tries that failed is left."""
    function = Conflicting(engine, failing=2)

    @in_transaction(factory, relaxed=True)
    async def change(session: AsyncSession) -> int:
        return await function(session)

    assert await change() == 3
    assert await balances(engine) == [102, 101]


async def test_the_last_conflict_is_an_error(engine: AsyncEngine, factory: Any):
    """A TransactionConflict comes from the error of the database, of a function and a block."""
    function = Conflicting(engine, failing=9)

    @in_transaction(factory, relaxed=True, tries=2)
    async def change(session: AsyncSession) -> int:
        return await function(session)

    with pytest.raises(TransactionConflict) as raised:
        await change()
    assert attempts.is_conflict(raised.value.__cause__)
    assert function.runs == 2
    with pytest.raises(TransactionConflict) as raised:
        async with Transaction(factory, relaxed=True) as txn:
            await function(txn.session)
    assert attempts.is_conflict(raised.value.__cause__)
    assert await balances(engine) == [103, 100]
    assert engine.pool.checkedout() == 0  # type: ignore


async def test_cancelling_during_a_pause_leaves_nothing(
    engine: AsyncEngine, factory: Any, monkeypatch: pytest.MonkeyPatch
):
    """A task that is cancelled while it waits for its next try ends, and holds no connection."""
    function = Conflicting(engine, failing=9)
    pausing = asyncio.Event()

    async def sleep(_: float) -> None:
        pausing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(transactions, "_sleep_async", sleep)

    @in_transaction(factory, relaxed=True)
    async def change(session: AsyncSession) -> int:
        return await function(session)

    task = asyncio.create_task(change())
    await asyncio.wait_for(pausing.wait(), 20)
    assert engine.pool.checkedout() == 0  # type: ignore
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert function.runs == 1
    assert await balances(engine) == [101, 100]


@pytest.mark.parametrize("block", [False, True])
async def test_cancelling_the_function_discards_everything(
    engine: AsyncEngine, factory: Any, block: bool
):
    """The connection is clean when it is back in its pool."""
    inside = asyncio.Event()

    async def body(session: AsyncSession) -> None:
        await add(session, 1, 5)
        inside.set()
        await asyncio.Event().wait()

    async def in_block() -> None:
        async with Transaction(factory) as txn:
            await body(txn.session)

    function = in_transaction(factory)(body)
    task = asyncio.create_task(in_block() if block else function())
    await asyncio.wait_for(inside.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.pool.checkedout() == 0  # type: ignore
    assert await balances(engine) == [100, 100]


async def test_a_block_is_committed_or_aborted(engine: AsyncEngine, factory: Any):
    """It ends as the synchronous one does."""
    async with Transaction(factory) as txn:
        (await txn.session.get_one(Account, 1)).balance = 1
    async with Transaction(factory) as txn:
        await add(txn.session, 2, 5)
        txn.abort()
    with pytest.raises(LookupError):
        async with Transaction(factory) as txn:
            await add(txn.session, 2, 5)
            raise LookupError
    assert await balances(engine) == [1, 100]


async def test_an_inner_one_joins_and_a_child_task_does_not(engine: AsyncEngine, factory: Any):
    """In the same task a function is a part of the outer one; a child task has its own."""

    @in_transaction(factory, relaxed=True)
    async def inner(session: AsyncSession) -> AsyncSession:
        return session

    async def asking() -> AsyncSession:
        return await inner()

    @in_transaction(factory, relaxed=True)
    async def outer(session: AsyncSession) -> None:
        assert await inner() is session
        assert await asking() is session
        first, second = await asyncio.gather(asking(), asking())
        assert len({session, first, second}) == 3
        assert await inner() is session

    await outer()
    assert await inner() is not await inner()


async def test_a_swallowed_conflict_is_retried(engine: AsyncEngine, factory: Any):
    """What is left of a transaction after a conflict is not committed."""
    function = Conflicting(engine, failing=1)

    @in_transaction(factory, relaxed=True)
    async def change(session: AsyncSession) -> int:
        try:
            return await function(session)
        except DBAPIError:
            return -1

    assert await change() == 2
    assert await balances(engine) == [101, 101]


async def test_a_function_does_not_end_the_transaction(engine: AsyncEngine, factory: Any):
    """The commit is in_transaction's."""

    @in_transaction(factory)
    async def change(session: AsyncSession) -> None:
        await add(session, 1, 5)
        await session.commit()

    with pytest.raises(TransactionError, match="leave the commit"):
        await change()
    assert await balances(engine) == [100, 100]


async def test_an_async_registry_stands_for_its_factory(factory: Any):
    """The session of the task's registry is left alone."""
    registry = async_scoped_session(factory, asyncio.current_task)
    mine = registry()

    @in_transaction(registry)
    async def own(session: AsyncSession) -> AsyncSession:
        return session

    assert await own() is not mine
    await registry.remove()


async def test_the_cache_is_fresh_afterwards(engine: AsyncEngine):
    """Inside, views are read from the database; after the commit the cache knows."""
    async with AsyncTableCache(engine, views=[AccountBoard]) as cache:
        await cache.load(AccountBoard)

        @cache.in_transaction()
        async def double(session: Any) -> None:
            record = await session.get(AccountBoard, 1)
            assert session.last_read.kind == "bypass"
            account = await session.get_one(Account, 1)
            account.balance = record.balance * 2

        await double()
        async with cache.sessionmaker()() as session:
            record = await session.get(AccountBoard, 1)
            assert record is not None
            assert record.balance == 200
            assert session.last_read is not None
            assert session.last_read.kind == "hit"


async def test_a_deadlock_is_retried(engine: AsyncEngine, factory: Any):
    """Two tasks that lock the same rows in different orders both get through."""
    together = Meeting(engine)

    @in_transaction(factory)
    async def move(session: AsyncSession, source: int, target: int) -> None:
        await add(session, source, -5)
        await together.wait()
        await add(session, target, 5)

    assert await asyncio.gather(move(1, 2), move(2, 1)) == [None, None]
    assert await balances(engine) == [100, 100]


async def test_no_phantom_is_missed(engine: AsyncEngine, factory: Any):
    """Of two that insert where they saw no row of the other, one sees it in its second try."""
    together = Meeting(engine)

    @in_transaction(factory)
    async def open_one(session: AsyncSession, number: int) -> int:
        found = len((await session.scalars(select(Account).where(Account.balance == 7))).all())
        await together.wait()
        session.add(Account(id=number, balance=7))
        return found

    assert sorted(await asyncio.gather(open_one(8), open_one(9))) == [0, 1]


@pytest.mark.parametrize("relaxed", [True, False])
async def test_what_is_read_is_of_one_moment(engine: AsyncEngine, factory: Any, relaxed: bool):
    """No read skew: what is committed between two reads shows in none of them, or in both."""
    moved: list[asyncio.Task[None]] = []

    @in_transaction(factory)
    async def move(session: AsyncSession) -> None:
        await add(session, 1, -5)
        await add(session, 2, 5)

    @in_transaction(factory, relaxed=relaxed)
    async def add_up(session: AsyncSession) -> int:
        first = await session.scalar(select(Account.balance).where(Account.id == 1))
        if not moved:
            moved.append(asyncio.create_task(move()))
            # On SQLite and MariaDB a writer may have to wait for this reader.
            await asyncio.wait(moved, timeout=0.2)
        second = await session.scalar(select(Account.balance).where(Account.id == 2))
        return int(first or 0) + int(second or 0)

    assert await add_up() == 200
    await asyncio.gather(*moved)
    assert await balances(engine) == [95, 105]


async def test_a_conflict_at_commit(postgres_module_url: URL):
    """Two that wrote what the other one had read: PostgreSQL tells the second one at its COMMIT."""
    with bank(postgres_module_url):
        engine = async_twin(postgres_module_url)
        factory = async_sessionmaker(engine)
        second = Transaction(factory)
        with pytest.raises(TransactionConflict) as raised:
            async with second, Transaction(async_sessionmaker(engine)) as first:
                for session, number in ((first.session, 1), (second.session, 2)):
                    (await session.scalars(select(Account.balance))).all()
                    await add(session, number, 5)
        assert attempts.is_conflict(raised.value.__cause__)
        assert await balances(engine) == [105, 100]
        await engine.dispose()


async def test_money_is_moved_and_never_made(database_url: URL):
    """16 tasks move money while others add it up in the cache: each sum is of one commit."""
    with bank(database_url, [100] * 8):
        engine = async_twin(database_url, pool_size=10)
        async with AsyncTableCache(engine, views=[AccountBoard]) as cache:
            await cache.load(AccountBoard)
            readers = cache.sessionmaker()
            kinds: set[str] = set()

            async def total() -> int:
                async with readers() as session:
                    records = await session.range(AccountBoard.by_id)
                    assert session.last_read is not None
                    kinds.add(session.last_read.kind)
                    return sum(record.balance for record in records)

            @cache.in_transaction(tries=200)
            async def move(session: Any, source: int, target: int) -> None:
                await add(session, min(source, target), -1 if source < target else 1)
                await add(session, max(source, target), 1 if source < target else -1)

            async def write(seed: int) -> None:
                for turn in range(2):
                    source, target = (seed + turn) % 8 + 1, (seed * 3 + turn + 4) % 8 + 1
                    if source != target:
                        await move(source, target)
                    assert await total() == 800

            async def read(writers: asyncio.Future[Any]) -> None:
                while not writers.done():
                    assert await total() == 800
                    await asyncio.sleep(0)

            writers = asyncio.gather(*map(write, range(16)))
            await asyncio.gather(writers, read(writers))
            assert await total() == 800
            assert "hit" in kinds
            assert sum(await balances(engine)) == 800
        await engine.dispose()
