"""``python -m benchmarks``: fill databases, measure, print what was measured, and write reports."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import sqlalchemy

from benchmarks import (
    commits,
    contestants,
    database,
    feed,
    growth,
    hits,
    loading,
    memory,
    peers,
    ranges,
    refreshes,
    report,
    stalls,
    throughput,
    transactions,
)
from benchmarks.harness import Result

PARTS: dict[str, dict[Callable[..., Any], str | None]] = {
    "ranges": {ranges.run: "sqlite"},
    "peers": {peers.run: "postgres"},
    "hits": {hits.run: "sqlite"},
    "loading": {loading.run: "postgres"},
    "memory": {memory.run: "postgres"},
    "stalls": {stalls.run: "postgres", stalls.run_threads: "sqlite"},
    "transactions": {transactions.run: "postgres"},
    "feed": {feed.run: "postgres"},
    "commits": {commits.run: "postgres"},
    "refreshes": {refreshes.run: None},
    "throughput": {throughput.run: "sqlite"},
    "growth": {growth.run: None},
}
"""What measures each part, and the database that it is given; the report has this order."""
QUICK_DAYS = 14


def measure(parts: Collection[str], *, quick: bool) -> Iterator[list[Result]]:
    """Run the parts that are asked for, and yield the results of each."""
    days = QUICK_DAYS if quick else None
    urls: dict[str, sqlalchemy.URL] = {}
    with ExitStack() as stack:
        for part, runs in PARTS.items():
            for run, name in runs.items() if part in parts else ():
                if name is None:
                    found = run(quick=quick)
                else:
                    if name not in urls:
                        urls[name] = stack.enter_context(getattr(database, name)(days))
                    found = run(urls[name], quick=quick)
                if asyncio.iscoroutine(found):
                    found = asyncio.run(found)
                yield [replace(result, part=part) for result in found]


def show(results: Sequence[Result]) -> None:
    """Print results, one benchmark after the other."""
    for benchmark, cases in groupby(results, attrgetter("benchmark")):
        print(f"\n{benchmark}")
        for case in cases:
            ratio = "" if case.ratio is None else f"{case.ratio:10.2f} x"
            print(f"  {case.case:<48}{case.shown:>14}{ratio:>12}{_goal(case)}", flush=True)


def _goal(result: Result) -> str:
    if result.goal is None:
        return ""
    unit = " x" if result.ratio is not None else f" {result.unit}"
    bound = "at least " if result.at_least else ""
    return f"   goal {bound}{result.goal:g}{unit}: {'reached' if result.reached else 'MISSED'}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument("--quick", action="store_true", help="a fortnight of data, no goals")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part")
    parser.add_argument(
        "--from", type=Path, metavar="FILE", dest="earlier",
        help="take the parts that are not measured now, all of them without --only, from there",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="write tables into the marked section of this file, and plots into a directory "
        "beside it that is called like it: docs/performance.md",
    )  # fmt: skip
    options = parser.parse_args()
    if options.report is not None and options.quick:
        parser.error("a quick run measures nothing that is worth a report")
    measured = options.only or ([] if options.earlier is not None else list(PARTS))
    results: list[Result] = []
    about = _about(quick=options.quick)
    if options.earlier is not None:
        results, earlier = report.read_json(options.earlier.read_text())
        if earlier["quick"] != options.quick:
            parser.error(f"{options.earlier} is of a run with other data: one of the two is quick")
        about = report.together(about if measured else earlier, earlier)
        results = [result for result in results if result.part not in measured]
    if options.report is not None:  # rather now than after a quarter of an hour
        report.marked(options.report)
        if lacking := set(PARTS) - {result.part for result in results} - {*measured}:
            parser.error(f"a report needs all parts: --from FILE with {', '.join(sorted(lacking))}")
    for part in measure(measured, quick=options.quick):
        show(part)
        results += part
        results.sort(key=lambda result: list(PARTS).index(result.part))
        if options.json is not None:  # after each, so that a run which is broken off has some
            found = {"about": about, "results": [asdict(result) for result in results]}
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.report is not None:
        report.write(results, about, PARTS, options.report)


def _about(*, quick: bool) -> dict[str, Any]:
    # sys._is_gil_enabled is new in Python 3.13: before it, there was always one.
    free_threaded = not getattr(sys, "_is_gil_enabled", lambda: True)()
    return {
        "python": platform.python_version() + (", free-threaded" if free_threaded else ""),
        "sqlalchemy": sqlalchemy.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "left_out": [each.name for each in contestants.CONTESTANTS if each.missing()],
        "quick": quick,
    }


if __name__ == "__main__":
    main()
