"""The report: what was measured, as Markdown tables between two marks of a page, and its plots.

In: results. Out: text, and files. A row of the first table is a result that has a goal; it need not
be known here. Those that must be there are, so that a benchmark which is renamed, or which measures
nothing any more, is an error and no row less.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.harness import Growth, Result
from benchmarks.plots import Plot, plots

BEGIN = "<!-- measured: written by `make bench`, from here -->"
END = "<!-- measured: to here -->"

AIMS: tuple[tuple[str, str, str], ...] = (
    ("ranges", "range of * records", "session.range"),
    ("ranges", "range of * records", "session.scalars, prebuilt select"),
    ("peers", "range of * records, beside the peers", "tablecache 4.3, local storage"),
    ("peers", "memory of * records, beside the peers", "sa_tablecache, session.range"),
    ("hits", "50 records, the query built anew", "session.query(...).all(), built anew"),
    ("hits", "a record by its key", "session.get"),
    ("hits", "range, awaited", "more by"),
    ("hits", "get, awaited", "more by"),
    ("hits", "a residual condition over * records", "session.scalars"),
    ("hits", "count()", "of * records"),
    ("hits", "a statement that touches no view", "more by"),
    ("loading", "load of * records from PostgreSQL", "cache.load"),
    ("memory", "memory of * records, three indexes", "bytes per record"),
    ("stalls", "longest stall of the event loop, * records", "load of everything"),
    ("stalls", "longest stall of the event loop, * records", "sliding the window"),
    ("stalls", "longest stall of a thread, * records", "load of everything"),
    ("stalls", "a full garbage collection is made longer, *", "by * of them"),
    ("transactions", "a transfer of money", "in_transaction"),
    ("feed", "catching up", "changes of a row"),
    ("refreshes", "next read after a commit, * records", "the next read"),
    ("refreshes", "next read after * commits of a row", "statements"),
    ("refreshes", "a range beside * marks elsewhere", "they are"),
    ("refreshes", "a record changed 100 times", "3 distinct scores"),
    ("refreshes", "a window slides", "sliding by a tenth"),
    ("commits", "flush and commit, PostgreSQL: *", "a cache watches"),
    ("commits", "flush and commit, SQLite: *", "a cache watches"),
    ("commits", "hits beside updates in place elsewhere, *", "2,000 commits/s"),
    ("commits", "hits beside inserts elsewhere, *", "2,000 commits/s"),
)
"""Part, benchmark and case of the aims: patterns, because some names have numbers in them."""


def missing(results: Iterable[Result], *, peers: bool = True) -> list[str]:
    """Return which aims no result is about.

    :param peers: whether all peers took part; else what is measured beside them may be missing.
    """
    names = [(result.part, result.benchmark, result.case) for result in results]
    return [
        " / ".join(aim)
        for aim in AIMS
        if (peers or aim[0] != "peers") and not any(all(map(fnmatchcase, n, aim)) for n in names)
    ]


def read_json(text: str) -> tuple[list[Result], dict[str, Any]]:
    """Return the results that ``--json`` has written, and what it says about them."""
    found = json.loads(text)
    results = []
    for each in found["results"]:
        if each["growth"] is not None:
            each["growth"] = Growth(**each["growth"])
        if each["spread"] is not None:
            each["spread"] = tuple(each["spread"])
        results.append(Result(**each))
    return results, found["about"]


def together(about: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be said of results of two runs: a machine was as busy as in the worse."""
    left_out = sorted({*about["left_out"], *earlier["left_out"]})
    return {**about, "load": max(about["load"], earlier["load"]), "left_out": left_out}


def marked(page: Path) -> tuple[str, str]:
    """Return what a page has before and after its marked section.

    :raises LookupError: when it has none.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise LookupError(f"{page} has no lines {BEGIN!r} and {END!r}")
    return before, after


def write(
    results: Sequence[Result], about: dict[str, Any], parts: Collection[str], page: Path
) -> None:
    """Write the tables into the page, and the plots into the directory beside it.

    :raises LookupError: when a part or an aim was not measured, or the page has no marks.
    """
    aims = [result for result in results if result.goal is not None]
    lacking = sorted(set(parts) - {result.part for result in results}) + missing(
        aims, peers=not about["left_out"]
    )
    if lacking:
        raise LookupError(f"nothing was measured of {', '.join(lacking)}")
    before, after = marked(page)
    drawn = plots(results)
    directory = page.with_suffix("")
    directory.mkdir(exist_ok=True)
    for stale in {*directory.glob("*.svg")} - {directory / plot.file for plot in drawn}:
        stale.unlink()
    for plot in drawn:
        (directory / plot.file).write_text(plot.svg, encoding="utf-8")
    measured = "\n".join(_section(results, about, drawn, directory.name))
    page.write_text(f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}", encoding="utf-8")


def _section(
    results: Sequence[Result], about: dict[str, Any], drawn: Sequence[Plot], directory: str
) -> Iterator[str]:
    aims = [result for result in results if result.goal is not None]
    reached = sum(bool(result.reached) for result in aims)
    yield (
        f"Measured with Python {about['python']} and SQLAlchemy {about['sqlalchemy']}, "
        f"on {about['cores']} cores ({about['machine']}). {_busy(about)}"
    )
    if about["left_out"]:
        yield f"\nLeft out, because this Python does not have it: {', '.join(about['left_out'])}."
    yield "\n## The aims\n"
    yield f"{reached} of {len(aims)} are reached.\n"
    yield "| what | aim | measured | |\n|---|---|---|---|"
    yield from map(_aim, aims)
    yield "\n## Growth\n"
    yield (
        "Both axes are logarithmic. The dashed line of each colour is the growth that is expected, "
        "from where the line begins."
    )
    for plot in drawn:
        yield f"\n![{plot.title}: {plot.text}]({directory}/{plot.file})"
    yield "\n## All that was measured\n"
    yield (
        "Medians, and in parentheses the least and the greatest of the rounds; the ratio is the "
        "median of the rounds' ratios to the case that it names.\n"
    )
    yield "| benchmark | case | measured | ratio |\n|---|---|---|---|"
    previous = None
    for result in results:
        if result.growth is not None:
            continue
        benchmark = "" if result.benchmark == previous else result.benchmark
        previous = result.benchmark
        cells = _cell(benchmark), _cell(result.case), _spread(result), _ratio(result)
        yield f"| {' | '.join(cells)} |"


def _busy(about: dict[str, Any]) -> str:
    load = f"The load average was {about['load']:.1f} when it began"
    if about["load"] < about["cores"] / 2:
        return f"{load}."
    return f"{load}, so **the machine was busy with something else**: measure again."


def _aim(result: Result) -> str:
    unit = "times" if result.ratio is not None else result.unit
    measured = result.value if result.ratio is None else result.ratio
    assert result.goal is not None
    bound = "at least" if result.at_least else "at most"
    over = f", over {result.over}" if result.over is not None else ""
    what = f"{result.benchmark}: {result.case}{over}"
    aim = f"{bound} {_number(result.goal)} {unit}"
    return f"| {_cell(what)} | {aim} | {_number(measured)} {unit} | {verdict(result)} |"


def verdict(result: Result) -> str:
    """Return ``reached``, or by how much of itself a goal was missed."""
    assert result.goal is not None
    if result.reached:
        return "reached"
    measured = result.value if result.ratio is None else result.ratio
    by = abs(measured - result.goal) / result.goal
    return f"**missed by {by:.0%}**" if by >= 0.005 else "**just missed**"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(result: Result) -> str:
    if result.spread is None:
        return result.shown
    least, greatest = (result.at(value) for value in result.spread)
    return f"{result.shown} ({least} to {greatest})"


def _ratio(result: Result) -> str:
    if result.ratio is None:
        return ""
    over = "" if result.over is None else f" {_cell(result.over)}"
    return f"{_number(result.ratio)} x{over}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
