"""What a round has in addition where the cache follows a change feed: those who write elsewhere.

In: a cache with a feed. Out: engines that it does not watch, here and in a second process; sessions
that want to see everything; policies; and now and then what triggers do not see.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

from sqlalchemy import URL, Connection, Engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sa_tablecache import Manual, ReadThrough, SlidingWindow
from tests.integration.databases import Database
from tests.stress.world import SCORES, Account, Board, Household, Watched

LAGS = (timedelta(seconds=0.15), timedelta(seconds=3))
KEEP = timedelta(seconds=0.05)
"""So long trimming keeps entries: now and then a reader is too far behind."""

WINDOWS: tuple[type[Any], ...] = (Board, Household, Watched)
"""The views that have an index by score."""


class SecondProcess:
    """A process of its own that writes what it is told.

    :param lock: one job at a time.
    """

    def __init__(self, url: URL, lock: Any) -> None:
        self._lock = lock
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.elsewhere"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._say(url.render_as_string(hide_password=False))

    def _say(self, what: Any) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return str(json.loads(self._process.stdout.readline()))

    def write(self, statements: list[str]) -> None:
        """Run statements in one transaction.

        :raises DBAPIError: if that fails.
        """
        with self._lock:
            error = self._say(statements)
        if error:
            raise DBAPIError("; ".join(statements), None, Exception(error))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@dataclass
class Elsewhere:
    """Those who write elsewhere.

    :param factory: makes sessions of the engine that the cache does not watch.
    :param fresh: makes sessions that see whatever was committed before a read.
    """

    engine: Engine
    factory: Callable[..., Session]
    fresh: Callable[..., Session]
    process: SecondProcess | None
    slices: Any
    """The lock of who writes in the partitioned table."""
    lag: int
    """In nanoseconds, how long what is written elsewhere may stay unseen."""
    strict: float
    """How many readers want to see it at once: each of them has the feed read."""
    policies: dict[type[Any], str] = field(default_factory=dict)
    now: float = SCORES / 2
    """What the clock of the cache says; it is a score, too."""

    def clock(self) -> datetime:
        """Say what time it is."""
        return datetime.fromtimestamp(self.now, UTC)


def policy_for(view: type[Any], rng: Random) -> Any:
    """Return one of the policies that can keep a view."""
    match rng.choice(["manual", "read", "read", "window"]):
        case "read":
            ttl = rng.choice([None, None, timedelta(seconds=3)])
            return ReadThrough(max_records=rng.choice([4, 10, 30, None]), ttl=ttl)
        case "window" if view in WINDOWS:
            return SlidingWindow(
                "score",
                past=timedelta(seconds=rng.choice([3, 8])),
                future=rng.choice([timedelta(seconds=3), timedelta.max]),
            )
    return Manual()


# -- what triggers do not see -------------------------------------------------------------------


@contextmanager
def untriggered(connection: Connection, model: Any = Account) -> Iterator[None]:
    """Have the triggers of a table switched off in a block: PostgreSQL."""
    table = model.__tablename__
    with ExitStack() as stack:
        with suppress(DBAPIError):  # a deadlock, or a lock that is held for long
            connection.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))
            stack.callback(_enabled, connection, table)
        yield


def _enabled(connection: Connection, table: str) -> None:
    names = connection.scalars(
        text(
            "SELECT tgname FROM pg_trigger "
            "WHERE tgrelid = CAST(:t AS regclass) AND NOT tgisinternal"
        ),
        {"t": table},
    ).all()
    for name in names:
        while True:
            with suppress(DBAPIError):
                connection.execute(text(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}"))
                break


def main() -> None:
    """Write what the standard input says, one transaction a line, and say how it ended."""
    engine: Engine | None = None
    for line in sys.stdin:
        said = json.loads(line)
        error = ""
        if engine is None:
            engine = Database(make_url(said)).engine()
        else:
            try:
                with engine.begin() as connection:
                    for statement in said:
                        connection.exec_driver_sql(statement)
            except DBAPIError as failed:
                error = str(failed.orig) or repr(failed.orig)
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
