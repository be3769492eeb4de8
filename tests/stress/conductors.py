"""Many at once: in threads, or in the tasks of one event loop.

The same synchronous code runs in both: in tasks it runs in greenlets, as all of SQLAlchemy's
asyncio extension does, and waits there by ``await_only``.
"""

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, suppress
from random import Random
from types import TracebackType
from typing import Any, Protocol

from sqlalchemy.util.concurrency import await_only, greenlet_spawn

Work = Callable[[], None]


class Conductor(Protocol):
    """How several actors run at once."""

    def run(self, works: Sequence[Work]) -> None:
        """Run all, and raise the first error when all have ended."""

    def lock(self) -> AbstractContextManager[Any]:
        """Return a new lock."""

    def pause(self, seconds: float) -> None:
        """Let others go on."""

    def cut(self, connection: Any, seconds: float) -> None:
        """Break a connection of a driver to its server after a while."""

    def attempt(self, work: Work, rng: Random) -> bool:
        """Run something that may be cancelled in the middle; say whether it came to its end."""


class Threads:
    """Actors are threads."""

    def run(self, works: Sequence[Work]) -> None:
        """Start all, and wait for them."""
        errors: list[BaseException] = []

        def one(work: Work) -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        try:
            threads = [threading.Thread(target=one, args=(work,), daemon=True) for work in works]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        if errors:
            raise errors[0]

    def lock(self) -> AbstractContextManager[Any]:
        """Return a lock of threads."""
        return threading.Lock()

    def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def cut(self, connection: Any, seconds: float) -> None:
        """Shut its socket down, which psycopg takes for the end of the server."""
        copy = socket.socket(fileno=os.dup(connection.fileno()))

        def shut() -> None:
            with copy, suppress(OSError):
                copy.shutdown(socket.SHUT_RDWR)

        threading.Timer(seconds, shut).start()

    def attempt(self, work: Work, rng: Random) -> bool:
        """Nobody cancels a thread."""
        work()
        return True


class _TaskLock:
    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    def __enter__(self) -> None:
        await_only(self._lock.acquire())

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._lock.release()


class Tasks:
    """Actors are tasks of one event loop, and some of what they do is cancelled.

    All of this is called in a greenlet: see :meth:`main`.
    """

    cancelled = 0.06
    """How likely something is cancelled."""

    def main(self, work: Callable[[], Any]) -> Any:
        """Run a program of actors in an event loop."""

        async def program() -> Any:
            return await greenlet_spawn(work)

        return asyncio.run(program())

    def run(self, works: Sequence[Work]) -> None:
        """Start all, and wait for them."""

        async def everybody() -> None:
            tasks = [asyncio.create_task(_spawned(work)) for work in works]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result

        await_only(everybody())

    def lock(self) -> AbstractContextManager[Any]:
        """Return a lock of tasks."""
        return _TaskLock()

    def pause(self, seconds: float) -> None:
        """Let other tasks go on."""
        await_only(asyncio.sleep(seconds))

    def cut(self, connection: Any, seconds: float) -> None:
        """Abort the transport of asyncpg."""
        asyncio.get_running_loop().call_later(seconds, connection._transport.abort)

    def attempt(self, work: Work, rng: Random) -> bool:
        """Run it in a task of its own, and cancel that after a while, now and then."""
        delay = rng.choice([0, 0.0005, 0.001, 0.003, 0.01, 0.03])
        if rng.random() > self.cancelled:
            work()
            return True

        async def both() -> bool:
            task = asyncio.create_task(_spawned(work))
            await asyncio.sleep(delay)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                return False
            return True

        return bool(await_only(both()))


def _spawned(work: Work) -> Coroutine[Any, Any, None]:
    return greenlet_spawn(work)
