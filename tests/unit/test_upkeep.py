"""The jobs of the upkeep, in threads and in tasks: when they run, how they fail, how they end."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.util import await_only, greenlet_spawn

from sa_tablecache import upkeep as upkeep_module
from sa_tablecache.exc import TableCacheError
from sa_tablecache.health import health
from sa_tablecache.upkeep import Upkeep

SOON = 10.0
"""Seconds after which something that does not happen is a failure."""


class Counter:
    """A step that counts its runs, and lets a test wait for them."""

    def __init__(self, delay: float | None = None) -> None:
        self.delay = delay
        self.runs = 0
        self.errors: list[BaseException] = []
        self._ran = threading.Semaphore(0)

    def __call__(self) -> float | None:
        self.runs += 1
        self._ran.release()
        if self.errors:
            raise self.errors.pop(0)
        return self.delay

    def wait(self) -> None:
        """Wait for one more run."""
        assert self._ran.acquire(timeout=SOON)

    def idle(self) -> bool:
        """Whether all runs were waited for."""
        return not self._ran.acquire(blocking=False)


@pytest.fixture
def upkeep() -> Iterator[Upkeep]:
    """An upkeep that is stopped at the end."""
    upkeep = Upkeep()
    yield upkeep
    upkeep.stop()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep_module, "FIRST_PAUSE", 0.001)


def settled(upkeep: Upkeep, name: str) -> None:
    """Wait until a job has noted how its last step went."""
    for _ in range(int(SOON * 1000)):
        job = upkeep.health()[name]
        if job.last_success is not None and job.failing is None:
            return
        threading.Event().wait(0.001)
    raise AssertionError(f"{name} has not succeeded")


def test_a_job_runs_at_once_and_then_when_it_said(upkeep: Upkeep) -> None:
    """A job says after how many seconds it wants to run again."""
    job = Counter(delay=0.0)
    upkeep.add("job", job)
    assert job.idle()
    upkeep.start()
    for _ in range(3):
        job.wait()


def test_a_job_that_was_added_later_runs_at_once(upkeep: Upkeep) -> None:
    """A job can be added to an upkeep that runs."""
    upkeep.start()
    job = Counter()
    upkeep.add("job", job)
    job.wait()


def test_a_job_that_waits_runs_when_it_is_woken(upkeep: Upkeep) -> None:
    """A job that returns None, or a long time, runs when it is woken."""
    jobs = {"never": Counter(), "later": Counter(delay=1000.0)}
    for name, job in jobs.items():
        upkeep.add(name, job)
    upkeep.start()
    for name, job in jobs.items():
        for _ in range(3):
            job.wait()
            upkeep.wake(name)
        job.wait()


def test_what_wakes_a_step_under_way_runs_it_once_more(upkeep: Upkeep) -> None:
    """Any number of wakes during a step are one more run after it."""
    began, go_on = threading.Event(), threading.Event()
    runs = []

    def step() -> None:
        runs.append(len(runs))
        began.set()
        assert go_on.wait(SOON)

    upkeep.add("job", step)
    other = Counter()
    upkeep.add("other", other)
    upkeep.start()
    assert began.wait(SOON)
    began.clear()
    for _ in range(5):
        upkeep.wake("job")
    go_on.set()
    assert began.wait(SOON)
    upkeep.stop()
    assert len(runs) == 2


def test_a_step_that_hangs_holds_up_no_other_job(upkeep: Upkeep) -> None:
    """Each job has a thread of its own."""
    go_on = threading.Event()
    upkeep.add("hangs", lambda: go_on.wait(SOON) and None)
    job = Counter(delay=0.0)
    upkeep.add("job", job)
    upkeep.start()
    for _ in range(3):
        job.wait()
    go_on.set()


def test_waking_is_harmless(upkeep: Upkeep) -> None:
    """What is not there, does not run, or has been stopped can be woken."""
    job = Counter()
    upkeep.wake("job")
    upkeep.add("job", job)
    upkeep.wake("job")
    upkeep.start()
    job.wait()
    upkeep.stop()
    upkeep.wake("job")
    assert job.idle()


def test_a_name_is_one_job(upkeep: Upkeep) -> None:
    """Two jobs of one name are an error; a name that was removed is free."""
    upkeep.add("job", Counter())
    with pytest.raises(TableCacheError, match="has a job 'job' already"):
        upkeep.add("job", Counter())
    upkeep.remove("job")
    upkeep.remove("job")
    assert "job" not in upkeep
    upkeep.add("job", Counter())


def test_a_job_that_was_removed_runs_no_more(upkeep: Upkeep) -> None:
    """Removing a job ends its thread."""
    job = Counter()
    upkeep.add("job", job)
    upkeep.start()
    job.wait()
    (thread,) = (t for t in threading.enumerate() if t.name == "sa_tablecache job")
    upkeep.remove("job")
    thread.join(SOON)
    assert not thread.is_alive()


def test_an_outage_is_logged_once_and_seen_in_the_health(
    upkeep: Upkeep, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that fails is tried again; one line tells when that began, and one when it ended."""
    job = Counter()
    job.errors = [ConnectionError("the server is gone") for _ in range(6)]
    failing = threading.Event()

    def step() -> float | None:
        if job.runs == 3:
            seen.append(health(upkeep))
            failing.set()
        return job()

    seen: list[Any] = []
    upkeep.add("poll", step)
    with caplog.at_level(logging.INFO, "sa_tablecache"):
        upkeep.start()
        assert failing.wait(SOON)
        for _ in range(7):
            job.wait()
        settled(upkeep, "poll")
    assert not seen[0].ok
    assert "poll has failed for" in seen[0].reasons[0]
    assert "ConnectionError: the server is gone" in seen[0].reasons[0]
    assert health(upkeep).ok
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "upkeep: poll fails, and is tried again: ConnectionError: the server is gone"
    assert lines[1].startswith("upkeep: poll works again, after")
    assert len(lines) == 2


def test_pauses_grow_to_a_limit_and_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps failing is tried less and less often, and a success forgets that."""
    monkeypatch.setattr(upkeep_module, "FIRST_PAUSE", 0.5)
    job = Counter(delay=7.0)
    job.errors = [OSError(str(number)) for number in range(9)]
    upkeep = Upkeep()
    upkeep.add("job", job)
    steps = [upkeep._jobs["job"].step() for _ in range(10)]
    pauses = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert steps == [*((pause, False) for pause in pauses), (7.0, True)]
    job.errors = [OSError("again")]
    assert upkeep._jobs["job"].step() == (0.5, False)


def test_waking_does_not_shorten_the_pause_after_an_error(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is down is not asked once for each commit that would wake the job."""
    monkeypatch.setattr(upkeep_module, "FIRST_PAUSE", 1000.0)
    job = Counter()
    job.errors = [OSError("down"), OSError("down")]
    upkeep.add("job", job)
    upkeep.start()
    job.wait()
    while upkeep.health()["job"].failing is None:
        threading.Event().wait(0.001)
    for _ in range(100):
        upkeep.wake("job")
    upkeep.stop()  # and it ends a pause
    assert job.idle()


def test_a_thread_that_dies_is_logged_and_seen(
    upkeep: Upkeep, caplog: pytest.LogCaptureFixture
) -> None:
    """What ends a thread, such as sys.exit() in a step, is no silence."""
    job = Counter()
    job.errors = [SystemExit(3)]
    upkeep.add("job", job)
    upkeep.start()
    job.wait()
    while upkeep.health()["job"].running:
        threading.Event().wait(0.001)
    assert health(upkeep).reasons == ("job is no longer run: it was ended by SystemExit: 3",)
    assert "upkeep: job is no longer run: it was ended by SystemExit: 3" in caplog.text


def test_an_upkeep_is_started_once(upkeep: Upkeep) -> None:
    """Starting twice is an error that says so; after a stop it can be started again."""
    assert not upkeep.running
    upkeep.start()
    assert upkeep.running
    with pytest.raises(TableCacheError, match="is running already: start it once"):
        upkeep.start()
    upkeep.stop()
    upkeep.stop()
    assert not upkeep.running
    upkeep.start()


def test_the_health_says_that_nothing_was_started(upkeep: Upkeep) -> None:
    """Jobs that nobody runs are something to complain about; no jobs are not."""
    assert health(upkeep).ok
    upkeep.add("poll", Counter())
    assert health(upkeep).reasons == ("nothing runs poll: call cache.start()",)
    assert not health(upkeep).running


def test_the_health_waits_for_the_first_step(upkeep: Upkeep) -> None:
    """A cache whose jobs have not run once is not ready."""
    began, go_on = threading.Event(), threading.Event()

    def step() -> None:
        began.set()
        go_on.wait(SOON)

    upkeep.add("window", step)
    upkeep.start()
    assert began.wait(SOON)
    assert health(upkeep).reasons == ("window has not ended its first step yet",)
    go_on.set()
    settled(upkeep, "window")
    assert health(upkeep).ok


def test_a_stop_does_not_wait_for_ever(upkeep: Upkeep, caplog: pytest.LogCaptureFixture) -> None:
    """A step that hangs is left behind, which is logged."""
    began, go_on = threading.Event(), threading.Event()

    def step() -> None:
        began.set()
        go_on.wait(SOON)

    upkeep.add("hangs", step)
    upkeep.start()
    assert began.wait(SOON)
    upkeep.stop(timeout=0.01)
    assert "still busy after 0.0 s, and left behind: hangs" in caplog.text
    go_on.set()


def test_a_step_may_stop_its_own_upkeep(upkeep: Upkeep) -> None:
    """A step that closes the cache does not wait for itself."""
    stopped = threading.Event()

    def step() -> None:
        upkeep.stop()
        stopped.set()

    upkeep.add("job", step)
    upkeep.start()
    assert stopped.wait(SOON)


def test_an_interpreter_exits_while_a_step_hangs() -> None:
    """Neither a step that hangs nor one that works keeps a process from exiting."""
    program = (
        "import sys, threading, time\n"
        "from sa_tablecache import upkeep\n"
        "upkeep.EXIT_SECONDS = 0.05\n"
        "began = threading.Event()\n"
        "def hang():\n"
        "    began.set()\n"
        "    time.sleep(60)\n"
        "kept = upkeep.Upkeep()\n"
        "kept.add('hangs', hang)\n"
        "kept.add('busy', lambda: 0.0)\n"
        "kept.start()\n"
        "began.wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=30, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0
    assert "left behind: hangs" in done.stderr
    assert "Traceback" not in done.stderr


# -- tasks ---------------------------------------------------------------------------------------


class AsyncCounter:
    """The same for steps in greenlets: a step awaits something, as drivers do."""

    def __init__(self, delay: float | None = None) -> None:
        self.delay = delay
        self.runs = 0
        self.errors: list[BaseException] = []
        self._ran = asyncio.Semaphore(0)

    def __call__(self) -> float | None:
        await_only(asyncio.sleep(0))
        self.runs += 1
        self._ran.release()
        if self.errors:
            raise self.errors.pop(0)
        return self.delay

    async def wait(self) -> None:
        """Wait for one more run."""
        await asyncio.wait_for(self._ran.acquire(), SOON)


async def stop(upkeep: Upkeep) -> None:
    """Stop an upkeep as AsyncTableCache.close() does."""
    await greenlet_spawn(upkeep.stop)


async def test_jobs_are_tasks() -> None:
    """In an event loop jobs run as tasks, when they said, and when they are woken."""
    upkeep = Upkeep()
    often, woken = AsyncCounter(delay=0.0), AsyncCounter()
    upkeep.add("often", often)
    upkeep.start(in_task=True)
    upkeep.add("woken", woken)
    for _ in range(3):
        await often.wait()
        await woken.wait()
        upkeep.wake("woken")
    await woken.wait()
    before = threading.active_count()
    await asyncio.to_thread(upkeep.wake, "woken")
    await woken.wait()
    assert health(upkeep).ok
    assert threading.active_count() <= before + 1
    await stop(upkeep)
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("sa_tablecache")]


async def test_a_task_survives_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    """A step that fails in a task is tried again, too."""
    upkeep = Upkeep()
    job = AsyncCounter()
    job.errors = [OSError("down") for _ in range(3)]
    upkeep.add("poll", job)
    upkeep.start(in_task=True)
    for _ in range(4):
        await job.wait()
    await asyncio.sleep(0)
    assert health(upkeep).ok
    assert [r.getMessage().partition(",")[0] for r in caplog.records] == [
        "upkeep: poll fails",
        "upkeep: poll works again",
    ]
    await stop(upkeep)


async def test_stopping_cancels_a_step_under_way() -> None:
    """A task that awaits the database is cancelled, and is over when stop() returns."""
    upkeep = Upkeep()
    began, ended = asyncio.Event(), []

    def step() -> None:
        began.set()
        try:
            await_only(asyncio.sleep(SOON))
        finally:
            ended.append("rolled back")

    upkeep.add("job", step)
    upkeep.start(in_task=True)
    await began.wait()
    await stop(upkeep)
    assert ended == ["rolled back"]


async def test_a_task_that_somebody_cancels_is_logged_and_seen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever cancels all tasks of a loop cancels the upkeep, which is no silence."""
    upkeep = Upkeep()
    job = AsyncCounter()
    upkeep.add("job", job)
    upkeep.start(in_task=True)
    await job.wait()
    (task,) = (t for t in asyncio.all_tasks() if t.get_name() == "sa_tablecache job")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert health(upkeep).reasons == ("job is no longer run: it was ended by CancelledError",)
    assert "upkeep: job is no longer run" in caplog.text
    await stop(upkeep)


async def test_tasks_start_in_a_loop() -> None:
    """Without a running event loop there is nobody to run tasks."""
    upkeep = Upkeep()
    with pytest.raises(TableCacheError, match="no event loop is running"):
        await asyncio.to_thread(upkeep.start, in_task=True)
    assert not upkeep.running


def test_a_loop_is_closed_under_the_upkeep(caplog: pytest.LogCaptureFixture) -> None:
    """When a loop ends, so do its tasks: it is seen, waking is harmless, and so is stopping."""
    upkeep = Upkeep()
    job = AsyncCounter()

    async def main() -> None:
        upkeep.add("job", job)
        upkeep.start(in_task=True)
        await job.wait()

    asyncio.run(main())
    assert "upkeep: job is no longer run: it was ended by CancelledError" in caplog.text
    upkeep.wake("job")
    (reason,) = health(upkeep).reasons
    assert reason.startswith("job is no longer run")
    upkeep.add("late", AsyncCounter())
    asyncio.run(main_again(upkeep))
    upkeep.stop()


async def main_again(upkeep: Upkeep) -> None:
    """Start an upkeep in another loop, which takes no stop: nothing runs."""
    upkeep.remove("job")
    upkeep.remove("late")
    job = AsyncCounter()
    upkeep.add("job", job)
    upkeep.start(in_task=True)
    await job.wait()
    await stop(upkeep)


async def test_a_task_does_not_run_in_the_context_of_who_started_it() -> None:
    """What the starter's context says, such as a tenant, is nothing to the upkeep."""
    from contextvars import ContextVar

    tenant: ContextVar[str] = ContextVar("tenant", default="none")
    tenant.set("acme")
    seen = []
    upkeep = Upkeep()
    done = asyncio.Event()

    def step() -> None:
        seen.append(tenant.get())
        done.set()

    upkeep.add("job", step)
    upkeep.start(in_task=True)
    await done.wait()
    await stop(upkeep)
    assert seen == ["none"]


async def test_a_step_in_a_task_may_stop_its_own_upkeep() -> None:
    """A step that closes the cache goes on to its end."""
    upkeep = Upkeep()
    ended = asyncio.Event()

    def step() -> None:
        upkeep.stop()
        await_only(asyncio.sleep(0))
        ended.set()

    upkeep.add("job", step)
    upkeep.start(in_task=True)
    await asyncio.wait_for(ended.wait(), SOON)
    await asyncio.sleep(0)
    assert not upkeep.running
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("sa_tablecache")]
