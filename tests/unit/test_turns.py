"""One at a time: in threads that block, and in tasks that must not."""

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from sqlalchemy.util import await_only, greenlet_spawn

from sa_tablecache import turns
from sa_tablecache.turns import Section, Turn, after_sections, new_future, wait_for


class Crowd:
    """Counts who is inside, and how many were at once at most."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.entered = 0

    def enter(self) -> None:
        """Step in."""
        self.inside += 1
        self.entered += 1
        self.most = max(self.most, self.inside)

    def leave(self) -> None:
        """Step out."""
        self.inside -= 1


def test_threads_take_turns() -> None:
    """Of many threads one is inside at a time, and all get their turn."""
    turn, crowd, together = Turn(in_task=False), Crowd(), threading.Barrier(8)

    def work() -> None:
        together.wait()
        for _ in range(50):
            with turn:
                crowd.enter()
                crowd.leave()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work) for _ in range(8)]:
            future.result(10)
    assert crowd.most == 1
    assert crowd.entered == 400


def test_a_thread_waits_while_another_is_inside() -> None:
    """Whoever comes second is let in when the first leaves, and not before."""
    turn, inside, go = Turn(in_task=False), threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        with turn:
            inside.set()
            go.wait(10)
            order.append("first")

    def second() -> None:
        with turn:
            order.append("second")

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        inside.wait(10)
        other = pool.submit(second)
        assert not other.done()
        go.set()
        one.result(10)
        other.result(10)
    assert order == ["first", "second"]


def test_an_error_ends_a_turn() -> None:
    """Whoever fails inside lets the next one in."""
    turn = Turn(in_task=False)
    with pytest.raises(ZeroDivisionError), turn:
        1 / 0
    with turn:
        pass


async def test_tasks_take_turns() -> None:
    """Tasks of one event loop wait for each other without stopping the loop."""
    turn, crowd = Turn(in_task=True), Crowd()

    def work() -> None:
        for _ in range(5):
            with turn:
                crowd.enter()
                await_only(asyncio.sleep(0))
                await_only(asyncio.sleep(0))
                crowd.leave()

    await asyncio.wait_for(asyncio.gather(*(greenlet_spawn(work) for _ in range(8))), 10)
    assert crowd.most == 1
    assert crowd.entered == 40


async def test_a_cancelled_task_ends_its_turn() -> None:
    """A task that is cancelled inside lets the next one in."""
    turn = Turn(in_task=True)
    inside = asyncio.Event()

    def stay() -> None:
        with turn:
            inside.set()
            await_only(asyncio.sleep(3600))

    def pass_by() -> str:
        with turn:
            return "in"

    staying = asyncio.create_task(greenlet_spawn(stay))
    await inside.wait()
    waiting = asyncio.create_task(greenlet_spawn(pass_by))
    await asyncio.sleep(0)
    assert not waiting.done()
    staying.cancel()
    assert await asyncio.wait_for(waiting, 10) == "in"
    with pytest.raises(asyncio.CancelledError):
        await staying


async def test_a_cancelled_task_in_the_queue_harms_nobody() -> None:
    """A task that gives up waiting leaves the turn to the one inside and to the next."""
    turn = Turn(in_task=True)
    inside, go = asyncio.Event(), asyncio.Event()

    def stay() -> str:
        with turn:
            inside.set()
            await_only(go.wait())
            return "stayed"

    def pass_by() -> str:
        with turn:
            return "in"

    staying = asyncio.create_task(greenlet_spawn(stay))
    await inside.wait()
    impatient = asyncio.create_task(greenlet_spawn(pass_by))
    patient = asyncio.create_task(greenlet_spawn(pass_by))
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    go.set()
    assert await asyncio.wait_for(staying, 10) == "stayed"
    assert await asyncio.wait_for(patient, 10) == "in"


def test_waiting_ends_in_time() -> None:
    """Waiting says whether it was done in time, and giving up harms the future not at all."""
    future: Future[None] = new_future()
    assert not wait_for(future, 0.01, in_task=False)
    future.set_result(None)
    assert wait_for(future, 0.01, in_task=False)
    assert wait_for(future, in_task=False)


async def test_waiting_in_a_task_ends_in_time() -> None:
    """The same from inside a greenlet."""
    future: Future[None] = new_future()
    assert not await greenlet_spawn(lambda: wait_for(future, 0.01, in_task=True))
    future.set_result(None)
    assert await greenlet_spawn(lambda: wait_for(future, 10, in_task=True))


async def test_a_cancelled_waiter_does_not_cancel_the_future() -> None:
    """Many may wait for one future; one that is cancelled takes it from nobody."""
    future: Future[None] = new_future()
    one = asyncio.create_task(greenlet_spawn(lambda: wait_for(future, in_task=True)))
    other = asyncio.create_task(greenlet_spawn(lambda: wait_for(future, in_task=True)))
    await asyncio.sleep(0)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    assert not future.cancelled()
    future.set_result(None)
    assert await asyncio.wait_for(other, 10)


def test_what_a_finalizer_does_inside_a_section_waits_for_its_end() -> None:
    """The garbage collector may call back in the middle of a section, in the same thread."""
    inner, outer, done = Section(), Section(), list[str]()

    def work() -> None:
        if not after_sections(work):
            with inner, outer:
                done.append("done")

    with outer:
        with inner:
            work()
            assert done == []
        assert done == []
    assert done == ["done"]
    work()
    assert done == ["done", "done"]


def test_nothing_is_awaited_outside_of_a_greenlet() -> None:
    """What an asynchronous cache does for a synchronous caller takes no pauses."""
    pause = turns.pauses(in_task=True)
    time.sleep(2 * turns.PAUSE_EVERY)
    pause()
