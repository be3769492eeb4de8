"""``python -m benchmarks``: fill databases, measure, and print what was measured."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import sqlalchemy

from benchmarks import database, feed, hits, loading, memory, peers, ranges, stalls, transactions
from benchmarks.harness import Result

PARTS = ("ranges", "hits", "peers", "loading", "memory", "stalls", "transactions", "feed")
QUICK_DAYS = 14


def measure(parts: Sequence[str], *, quick: bool) -> Iterator[list[Result]]:
    """Run the parts that are asked for, and yield the results of each."""
    days = QUICK_DAYS if quick else None
    if {"peers", "memory", "loading", "stalls", "transactions", "feed"} & set(parts):
        with database.postgres(days) as url:
            if "transactions" in parts:
                yield transactions.run(url, quick=quick)
            if "feed" in parts:
                yield feed.run(url, quick=quick)
            if "peers" in parts:
                yield peers.run(url, quick=quick)
            if "memory" in parts:
                yield memory.run(url, quick=quick)
            if "loading" in parts:
                yield asyncio.run(loading.run(url, quick=quick))
            if "stalls" in parts:
                yield asyncio.run(stalls.run(url, quick=quick))
    if {"ranges", "hits", "stalls"} & set(parts):
        with database.sqlite(days) as url:
            if "ranges" in parts:
                yield ranges.run(url, quick=quick)
            if "hits" in parts:
                yield hits.run(url, quick=quick)
            if "stalls" in parts:
                yield stalls.run_threads(url, quick=quick)


def show(results: Sequence[Result]) -> None:
    """Print results, one benchmark after the other."""
    for benchmark, cases in groupby(results, attrgetter("benchmark")):
        print(f"\n{benchmark}")
        for case in cases:
            ratio = "" if case.ratio is None else f"{case.ratio:10.2f} x"
            print(f"  {case.case:<36}{_value(case):>12}{ratio:>12}{_goal(case)}", flush=True)


def _value(result: Result) -> str:
    if result.unit != "s":
        return f"{result.value:,.0f} {result.unit}"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if result.value >= size or unit == "us":
            break
    return f"{result.value / size:.3g} {unit}"


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
    options = parser.parse_args()
    results: list[Result] = []
    for part in measure(options.only or PARTS, quick=options.quick):
        show(part)
        results += part
    if options.json is not None:
        about = {
            "python": platform.python_version(),
            "sqlalchemy": sqlalchemy.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "quick": options.quick,
        }
        report = {"about": about, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
