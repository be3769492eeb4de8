"""The stress test by the hour: `python -m tests.stress --minutes 20`, or `make stress`.

Databases take turns, threads and tasks too; a seed leads to the same operations. The exit status
is 1 if any answer was wrong.
"""

import argparse
import logging
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import URL

from tests.integration.databases import Database
from tests.mariadb import VARIABLE as MARIADB
from tests.mariadb import configured_mariadb
from tests.postgres import running_postgres
from tests.stress.run import Run
from tests.zoo import DEPOT

ROUNDS_IN_A_TURN = 10


def main() -> int:
    """Run until the time is over, or a number of rounds is reached, or an answer is wrong."""
    arguments = _parser().parse_args()
    # Killed connections and failing refreshes are what this is about, not news.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    seed = arguments.seed if arguments.seed is not None else random.randrange(10**6)
    console, started = Console(), time.monotonic()
    counts: Counter[str] = Counter()
    violations = 0
    with ExitStack() as stack:
        databases = [stack.enter_context(_DATABASES[name]()) for name in arguments.database]
        runs = [
            Run(
                database,
                seed,
                arguments.threads,
                arguments.steps,
                asynchronous=asynchronous,
                feed=feed,
                counts=counts,
            )
            for database in databases
            for feed in _feeds(arguments.feed)
            for asynchronous in _modes(arguments.mode)
            if not (asynchronous and database.dialect in ("mysql", "mariadb"))
        ]
        console.print(f"seed {seed}: {', '.join(map(_name, runs))}")
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
        )
        with bar as progress:
            total = arguments.rounds or arguments.minutes * 60
            task = progress.add_task("starting", total=total)
            turn, failed = 0, 0

            def spent() -> float:
                return counts["rounds"] if arguments.rounds else time.monotonic() - started

            def after(run: Run, number: int) -> bool:
                described = f"{_name(run)} round {number}: {counts['reads']} reads, {failed} wrong"
                progress.update(task, completed=spent(), description=described)
                return bool(spent() < total)

            while spent() < total:
                run = runs[turn % len(runs)]
                first = arguments.first + turn // len(runs) * ROUNDS_IN_A_TURN
                try:
                    run.rounds(
                        range(first, first + ROUNDS_IN_A_TURN), lambda n, run=run: after(run, n)
                    )
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        break
                    failed += 1
                    report = "".join(traceback.format_exception(error, limit=-8))
                    progress.console.print(report, markup=False, highlight=False, soft_wrap=True)
                    if failed >= arguments.failures:
                        break
                turn += 1
        violations = failed
    answers = ", ".join(f"{counts[kind]} {kind}" for kind in ("hit", "partial", "miss", "bypass"))
    console.print(
        f"seed {seed}: {counts['rounds']} rounds, {counts['transactions']} transactions,"
        f" {counts['reads']} reads checked ({answers}), {counts['cancelled']} cancelled,"
        f" {counts['unknown outcomes']} unknown outcomes, {violations} violations",
        soft_wrap=True,
    )
    return 1 if violations else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.stress", description=__doc__)
    known = [name for name in _DATABASES if name != "mariadb" or os.environ.get(MARIADB)]
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=0, help="stop after these instead")
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--first", type=int, default=0, help="the first round, to see one again")
    parser.add_argument("--threads", type=int, default=6, help="or tasks")
    parser.add_argument("--steps", type=int, default=30, help="of each thread in a round")
    parser.add_argument("--database", action="append", choices=list(_DATABASES))
    parser.add_argument("--mode", choices=["threads", "asyncio", "both"], default="both")
    parser.add_argument(
        "--feed", choices=["no", "yes", "both"], default="both", help="caches with a change feed"
    )
    parser.add_argument("--failures", type=int, default=1, help="stop after so many")
    parser.set_defaults(database=None)
    parse = parser.parse_args

    def parse_args() -> argparse.Namespace:
        arguments = parse()
        arguments.database = arguments.database or known
        return arguments

    parser.parse_args = parse_args  # type: ignore[assignment]
    return parser


def _modes(mode: str) -> list[bool]:
    return {"threads": [False], "asyncio": [True], "both": [False, True]}[mode]


def _feeds(feed: str) -> list[bool]:
    return {"no": [False], "yes": [True], "both": [False, True]}[feed]


def _name(run: Run) -> str:
    feed = ", with a change feed" if run.feed else ""
    return f"{run.database.dialect} in {'tasks' if run.asynchronous else 'threads'}{feed}"


@contextmanager
def _postgresql() -> Iterator[Database]:
    with running_postgres() as server, server.database() as url:
        database = Database(url)
        database.create()
        yield database


@contextmanager
def _sqlite() -> Iterator[Database]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "zoo.sqlite"
        database = Database(URL.create("sqlite", database=str(path)))
        database.create()
        yield database


@contextmanager
def _mariadb() -> Iterator[Database]:
    server = configured_mariadb()
    if server is None:
        sys.exit(f"name a MariaDB server in {MARIADB}")
    with server.database(name=DEPOT), server.database() as url:
        database = Database(url)
        database.create()
        yield database


_DATABASES = {"postgresql": _postgresql, "sqlite": _sqlite, "mariadb": _mariadb}

if __name__ == "__main__":
    sys.exit(main())
