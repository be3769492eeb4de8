"""Taking turns: one at a time, in threads and in tasks alike.

A :class:`Section` is for what takes no time. The garbage collector may run in the middle of it, and
have a connection that somebody forgot return to its pool; what follows from that waits for the end.

A lock that is held while the database is asked cannot be a ``threading.Lock``: two tasks of one
event loop would wait for each other for ever. A :class:`Turn` waits on a future, which a thread
waits for by blocking and a task by awaiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, local
from types import TracebackType
from typing import Any, Final

from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

PAUSE_EVERY = 0.005
"""For so many seconds a task works on without letting others go on."""


def wait_for(future: Future[Any], timeout: float | None = None, *, in_task: bool) -> bool:
    """Wait for a future, as a thread or from inside a greenlet; say whether it was done in time.

    A caller that gives up, or is cancelled, does not cancel the future for the others.
    """
    if not in_task:
        try:
            future.result(timeout)
        except TimeoutError:
            return False
        return True

    async def wait() -> bool:
        done, _ = await asyncio.wait([asyncio.wrap_future(future)], timeout=timeout)
        return bool(done)

    return bool(await_only(wait()))


def sleep(seconds: float, *, in_task: bool) -> None:
    """Do nothing for a while, as a thread or from inside a greenlet."""
    if in_task:
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def pauses(*, in_task: bool) -> Callable[[], object]:
    """Return what has to be called again and again in the middle of what takes long.

    In a task it lets other tasks go on every few milliseconds, so that it may raise what a
    cancellation raises; not outside of a greenlet, where nothing can be awaited. Threads take their
    turns by themselves, between any two calls.
    """
    due = time.perf_counter() + PAUSE_EVERY

    def pause() -> None:
        nonlocal due
        if time.perf_counter() >= due:
            await_only(asyncio.sleep(0))
            due = time.perf_counter() + PAUSE_EVERY

    return pause if in_task and in_greenlet() else _go_on


def _go_on() -> None:
    pass


def new_future() -> Future[Any]:
    """Return a future that nobody who waits for it can cancel."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class _Inside(local):
    """How deep the thread is in sections, and what waits for their end."""

    depth = 0

    def __init__(self) -> None:
        self.waiting: list[Callable[[], object]] = []


_inside: Final = _Inside()


def after_sections(work: Callable[[], object]) -> bool:
    """Leave work to the end of the sections that this thread is in; say whether it is in any.

    A finalizer that entered one would wait for its own thread, for ever.
    """
    if _inside.depth:
        _inside.waiting.append(work)
        return True
    return False


class Section:
    """Mutual exclusion of threads, for a moment without I/O. Use as a context manager."""

    def __init__(self) -> None:
        self._lock = Lock()

    @property
    def taken(self) -> bool:
        """Whether some thread is inside, or was when this process was forked."""
        return self._lock.locked()

    def __enter__(self) -> None:
        _inside.depth += 1
        self._lock.acquire()

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._lock.release()
        _inside.depth -= 1
        while _inside.waiting and not _inside.depth:
            _inside.waiting.pop(0)()


class Turn:
    """Mutual exclusion that may span I/O. Use as a context manager.

    :param in_task: whether callers are greenlets of an event loop.
    """

    def __init__(self, *, in_task: bool) -> None:
        self._in_task = in_task
        self._lock = Lock()
        self._current: Future[Any] | None = None

    @property
    def taken(self) -> bool:
        """Whether it is somebody's turn, or was when this process was forked."""
        return self._current is not None

    def __enter__(self) -> None:
        while True:
            with self._lock:
                current = self._current
                if current is None:
                    self._current = new_future()
                    return
            wait_for(current, in_task=self._in_task)

    def wait(self) -> bool:
        """Wait for the end of the turn that somebody has; say whether somebody had one."""
        with self._lock:
            current = self._current
        return current is not None and wait_for(current, in_task=self._in_task)

    def try_enter(self) -> bool:
        """Enter if nobody is inside, without waiting; whoever may enter has to leave."""
        with self._lock:
            if self._current is not None:
                return False
            self._current = new_future()
            return True

    def leave(self) -> None:
        """End what :meth:`try_enter` began."""
        self.__exit__(None, None, None)

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        with self._lock:
            current, self._current = self._current, None
        assert current is not None
        current.set_result(None)
