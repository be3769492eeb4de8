"""Upkeep: what a cache does beside its readers, again and again, in the background.

In: jobs, functions that do one step and say when they want to be run again. Out: their effects, and
their health. Each job has a daemon thread of its own (or a task, where the engine is asynchronous),
so that the poll of a change feed does not wait for a load of minutes, and a step that hangs in the
database holds up no other.

A step that raises is tried again, later and later; that is logged once, and once more when it is
over. A thread or task that ends without having been told to is logged and seen in the health.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, RLock, Thread, current_thread
from typing import Any, Final, TypeAlias
from weakref import WeakSet

from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from .exc import TableCacheError, one_line

log = logging.getLogger(__name__)

Step: TypeAlias = Callable[[], float | None]
"""Does one step; returns the seconds until the next, ``None`` if it waits to be woken."""

FIRST_PAUSE = 0.5
"""Seconds until a step that failed is tried again; twice as many each time it fails again."""
LONGEST_PAUSE = 30.0
STOP_SECONDS = 5.0
"""How long :meth:`Upkeep.stop` waits for steps to end, all of them together."""
EXIT_SECONDS = 1.0
"""The same, when the interpreter exits."""


@dataclass(frozen=True, slots=True)
class JobHealth:
    """How a job of the upkeep is doing. Times are ages in seconds."""

    running: bool
    """Whether there is a thread or task for it."""
    last_success: float | None
    """How long ago a step succeeded; ``None`` if none has."""
    failing: float | None
    """For how long all steps have failed; ``None`` if the last one succeeded."""
    error: str | None
    """What the last step raised, or what ended the thread or task."""


class _Job:
    """One job: its step, how it went, and, while it runs, how to wake it."""

    def __init__(self, name: str, run: Step, interrupt: Callable[[], object] | None) -> None:
        self.name = name
        self.run = run
        self.interrupt = interrupt
        self.busy = RLock()
        """Held by a step: a fork in the middle of one could leave a lock of a driver taken."""
        self.last_success: float | None = None
        self.failing_since: float | None = None
        self.error: str | None = None
        self._pause = FIRST_PAUSE
        self.runner: _Thread | _Task | _Nobody | None = None

    def step(self) -> tuple[float | None, bool]:
        """Do one step; return the seconds until the next, and whether it may be woken before."""
        try:
            with self.busy:
                delay = self.run()
        except Exception as error:
            return self._failed(error), False
        self._succeeded()
        return delay, True

    def _failed(self, error: Exception) -> float:
        now = time.monotonic()
        self.error = one_line(error)
        if self.failing_since is None:
            self.failing_since = now
            self._pause = FIRST_PAUSE
            log.warning("upkeep: %s fails, and is tried again: %s", self.name, self.error)
            log.debug("upkeep: %s failed", self.name, exc_info=error)
        pause, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE)
        return pause

    def _succeeded(self) -> None:
        now = time.monotonic()
        if self.failing_since is not None:
            log.warning("upkeep: %s works again, after %.1f s", self.name, now - self.failing_since)
        self.last_success = now
        self.failing_since = self.error = None

    def died(self, error: BaseException) -> None:
        """Note that the thread or task has ended, and nobody had told it to."""
        self.error = f"it was ended by {one_line(error)}"
        self.failing_since = self.failing_since or time.monotonic()
        log.error("upkeep: %s is no longer run: %s", self.name, self.error)

    def health(self) -> JobHealth:
        now = time.monotonic()
        success, failing, error = self.last_success, self.failing_since, self.error
        return JobHealth(
            running=self.runner is not None and self.runner.alive,
            last_success=None if success is None else now - success,
            failing=None if failing is None else now - failing,
            error=error,
        )


class _Thread:
    """Runs a job in a daemon thread."""

    def __init__(self, job: _Job, name: str) -> None:
        self._job = job
        # Its put() may be called by the garbage collector in the middle of itself, and by
        # signal handlers: an Event has a lock on which these would wait for themselves.
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._woken = False
        self._ended = False
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._calls.put(None)

    def end(self) -> None:
        self._ended = True
        self._calls.put(None)

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end; say whether it has."""
        if self._thread is not current_thread():  # a step may close its own cache
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def _work(self) -> None:
        try:
            while not self._ended:
                self._woken = False  # before the step: what comes meanwhile is another reason
                self._wait(*self._job.step())
        except BaseException as error:  # SystemExit, say
            if not self._ended:
                self._job.died(error)

    def _wait(self, delay: float | None, heeds: bool) -> None:
        until = None if delay is None else time.monotonic() + delay
        while not self._ended and not (heeds and self._woken):
            rest = None if until is None else until - time.monotonic()
            if rest is not None and rest <= 0:
                return
            try:
                self._calls.get(timeout=rest)
            except Empty:
                return


class _Task:
    """Runs a job in a task of an event loop, its steps in greenlets."""

    def __init__(self, job: _Job, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._job = job
        self._name = name
        self.loop = loop
        self._calls = asyncio.Event()
        self._woken = False
        self._ended = False
        self.task: asyncio.Task[None] | None = None
        if _running_loop() is loop:
            self._begin()
        else:
            self._call(self._begin)

    def _begin(self) -> None:
        if not self._ended:
            # Not in the context of whoever happens to start it: a tenant, a trace.
            self.task = self.loop.create_task(self._work(), name=self._name, context=Context())
            self.task.add_done_callback(self._done)

    @property
    def alive(self) -> bool:
        if self.loop.is_closed():
            return False
        return self.task is None or not self.task.done()

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._call(self._calls.set)

    def end(self) -> None:
        self._ended = True
        if self.task is None:
            return
        if _running_loop() is not self.loop or asyncio.current_task() is not self.task:
            self._call(self.task.cancel)  # a step that closes its own cache is not cancelled in it

    def _call(self, what: Callable[[], object]) -> None:
        try:
            self.loop.call_soon_threadsafe(what)
        except RuntimeError:
            # The loop is closed, and the task with it; alive says so.
            log.debug("upkeep: the event loop of %s is closed", self._job.name)

    async def _work(self) -> None:
        while True:
            self._woken = False
            self._calls.clear()
            delay, heeds = await greenlet_spawn(self._job.step)
            if self._ended:
                return
            if heeds:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._calls.wait(), delay)
            else:
                await asyncio.sleep(delay or 0)

    def _done(self, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None and not self._ended:
            self._job.died(error)


def has_running_loop() -> bool:
    """Whether the caller is in an event loop, so that tasks can be started."""
    return _running_loop() is not None


class _Nobody:
    """Runs no job: a test does, by :meth:`Upkeep.run_once`."""

    alive = True
    task = None

    def wake(self) -> None:
        """Have it wait for the next :meth:`Upkeep.run_once`, as it does anyway."""

    def end(self) -> None:
        """There is nothing to end."""


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Upkeep:
    """The jobs of one cache. Threads and tasks may call everything here.

    ::

        upkeep.add("poll", poll)   # def poll() -> float | None
        upkeep.start(in_task=False)
        upkeep.wake("poll")        # rather now than when it wanted
        upkeep.stop()
    """

    def __init__(self) -> None:
        self.in_background = True
        """Whether jobs run by themselves; if not, only :meth:`run_once` runs them."""
        self._lock = Lock()
        self._jobs: dict[str, _Job] = {}
        self._started = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- jobs -----------------------------------------------------------------------------------

    def add(self, name: str, run: Step, interrupt: Callable[[], object] | None = None) -> None:
        """Add a job. It is run at once where the upkeep runs, else when it starts.

        :param run: does one step and returns the seconds until the next one; ``None``: when it is
            woken. If it raises, it is run again after 0.5 s, then 1 s, and so on up to 30 s, and
            waking it does not change that.
        :param interrupt: is called when the upkeep stops, to end a step that waits for long.
        :raises TableCacheError: if there is a job of that name.
        """
        with self._lock:
            if name in self._jobs:
                raise TableCacheError(f"the upkeep has a job {name!r} already")
            job = self._jobs[name] = _Job(name, run, interrupt)
            if self._started:
                self._begin(job)

    def ensure(self, name: str, run: Step) -> None:
        """Add a job, unless there is one of that name."""
        if name not in self._jobs:
            with suppress(TableCacheError):  # another thread has added it meanwhile
                self.add(name, run)

    def remove(self, name: str) -> Step | None:
        """Take a job away, if it is there; a step of it that is under way is not waited for.

        :returns: what it did.
        """
        with self._lock:
            job = self._jobs.pop(name, None)
        if job is not None and job.runner is not None:
            job.runner.end()
        return None if job is None else job.run

    def wake(self, name: str) -> None:
        """Have a job run now; once more, if it is running. Harmless if there is none.

        It takes no lock, and may be called by the garbage collector.
        """
        job = self._jobs.get(name)
        if job is not None and job.runner is not None:
            job.runner.wake()

    def __contains__(self, name: str) -> bool:
        return name in self._jobs

    # -- running --------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._started

    def start(self, *, in_task: bool = False) -> None:
        """Begin to run the jobs, each in a daemon thread.

        :param in_task: in tasks of the running event loop instead.
        :raises TableCacheError: if it runs already (tasks of a loop that is closed do not), or no
            event loop does.
        """
        loop = _running_loop() if in_task else None
        if in_task and loop is None:
            raise TableCacheError(
                "no event loop is running: start the upkeep of an AsyncTableCache inside of one, "
                "with `async with cache:` or cache.start() in a coroutine"
            )
        with self._lock:
            if self._started and not (self._loop is not None and self._loop.is_closed()):
                raise TableCacheError(
                    "the upkeep of this cache is running already: start it once, by cache.start() "
                    "or by entering the cache, not both"
                )
            self._started = True
            self._loop = loop
            for job in self._jobs.values():
                self._begin(job)
        _running.add(self)

    def _begin(self, job: _Job) -> None:
        name = f"sa_tablecache {job.name}"
        if not self.in_background:
            job.runner = _Nobody()
            return
        job.runner = _Thread(job, name) if self._loop is None else _Task(job, name, self._loop)

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End all threads or tasks, and wait for that; harmless if none runs.

        Threads finish the step that they are in; tasks are cancelled in it. A step that hangs in
        the database longer than the timeout is left behind: that is logged, and its thread, a
        daemon, ends with the step or with the process.

        :param timeout: in seconds, for all of them together.
        """
        with self._lock:
            loop, self._loop, self._started = self._loop, None, False
            jobs = list(self._jobs.values())
            runners = [(job, job.runner) for job in jobs if job.runner is not None]
            for job in jobs:
                job.runner = None
        _running.discard(self)
        for job, runner in runners:
            runner.end()
            if job.interrupt is not None:
                job.interrupt()
        if loop is None:
            until = time.monotonic() + timeout
            left = [
                job.name
                for job, runner in runners
                if isinstance(runner, _Thread) and not runner.join(until - time.monotonic())
            ]
        elif in_greenlet() and _running_loop() is loop:
            left = await_only(_ended(runners, timeout))
        else:
            left = []  # cancelled when the loop comes to it, or gone with the loop
        if left:
            log.warning(
                "upkeep: still busy after %.1f s, and left behind: %s", timeout, ", ".join(left)
            )

    def run_once(self) -> None:
        """Do one step of each job, here and now, one after another; what one raises is raised.

        It does not matter whether the upkeep runs; where the engine is asynchronous, the caller is
        in a greenlet.
        """
        for job in list(self._jobs.values()):
            job.run()
            job._succeeded()

    def health(self) -> dict[str, JobHealth]:
        """Return how each job is doing."""
        with self._lock:
            return {name: job.health() for name, job in self._jobs.items()}

    def after_fork(self) -> bool:
        """In a forked child: forget threads and tasks, which are the parent's; say whether any ran.

        Nobody else runs in the child yet.
        """
        self._lock = Lock()
        ran = self._started
        self._started = False
        self._loop = None
        for job in self._jobs.values():
            job.busy = RLock()
            job.runner = None
            job.last_success = job.failing_since = job.error = None
        return ran


async def _ended(runners: list[tuple[_Job, Any]], seconds: float) -> list[str]:
    """Wait for cancelled tasks to end, and return the names of those that have not."""
    mine = asyncio.current_task()
    tasks = {
        runner.task: job.name
        for job, runner in runners
        if runner.task is not None and runner.task is not mine
    }
    if not tasks:
        return []
    _, pending = await asyncio.wait(tasks, timeout=seconds)
    return [tasks[task] for task in pending]


_running: Final[WeakSet[Upkeep]] = WeakSet()


def _stop_all() -> None:
    """Stop what still runs when the interpreter exits: its modules are about to go."""
    for upkeep in list(_running):
        upkeep.stop(EXIT_SECONDS)


atexit.register(_stop_all)


_held: Final[list[Any]] = []
FORK_SECONDS: Final = 0.5
"""So long a fork waits for steps to end."""


def _before_fork() -> None:
    """Wait for steps to end, but for those that wait long for something themselves."""
    until = time.monotonic() + FORK_SECONDS
    for upkeep in list(_running):
        for job in list(upkeep._jobs.values()):
            if job.interrupt is None and isinstance(job.runner, _Thread):
                if job.busy.acquire(timeout=max(0.0, until - time.monotonic())):
                    _held.append(job.busy)


def _go_on() -> None:
    """In the parent, after a fork: let steps begin again."""
    while _held:
        _held.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_go_on, after_in_child=_held.clear)
