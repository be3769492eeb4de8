"""The demo runs on a slice of its data, on both databases, and shows what it promises."""

import asyncio
import io
import re
from itertools import pairwise

import pytest
from rich.console import Console

from examples import flights


@pytest.fixture(scope="module", params=["main_sqlite", "main_postgres"])
def output(request):
    """What the demo prints for three weeks of flights."""
    console = Console(file=io.StringIO(), width=100)
    asyncio.run(getattr(flights, request.param)(console, 21))
    return console.file.getvalue()


def row(output, label):
    """Return the records, the number of SQL statements and the outcome of a printed step."""
    found = re.search(
        rf"^  {re.escape(label)} +([\d,]+) +[\d.]+ (?:s|ms|us) +(\d+) *(\w*)", output, re.MULTILINE
    )
    assert found, f"no line {label!r} in:\n{output}"
    return int(found[1].replace(",", "")), int(found[2]), found[3]


def test_hits_emit_no_sql(output):
    """The same records come from the database with one statement, from the cache with none."""
    records, statements, outcome = row(output, "database")
    assert (statements, outcome) == (1, "bypass")
    for label in ("cache, the same select", "cache, session.range"):
        assert row(output, label) == (records, 0, "hit")


def test_commit_is_seen_by_the_next_read(output):
    """The read after the commit shows the new model; the one after that needs no SQL."""
    models = re.findall(r" model (.*)$", output, re.MULTILINE)
    old, new = models[:2]
    assert new == old + "-X"
    assert models == [old, new, new, new, "never", new]
    assert row(output, "after the commit")[2] == "hit"
    assert row(output, "once more")[1:] == (0, "hit")


def test_own_uncommitted_writes_come_from_the_database(output):
    """The writer reads its own open transaction; everybody else, and it after a rollback, hits."""
    assert row(output, "one's own")[2] == "bypass"
    assert row(output, "another's open transaction")[1:] == (0, "hit")
    assert row(output, "after the rollback")[1:] == (0, "hit")


def test_coverage_decides(output):
    """Inside of the coverage is a hit, across its edge a partial hit, outside of it a miss."""
    assert row(output, "a day of them")[1:] == (0, "hit")
    assert row(output, "a day across the edge")[2] == "partial"
    assert row(output, "a day before them")[1:] == (1, "miss")


def test_explain(output):
    """A hit and a miss are explained."""
    hit, miss = re.split(r"explain\(\) of a (?:hit|miss)", output)[1:]
    assert "hit" in hit
    assert "miss" in miss


def test_the_window_slides(output):
    """Each step costs one statement for what came in; reads up to now are right before it, too."""
    window = output[output.index("The last three days") :]
    steps = re.findall(r":00 +([\d,]+) +[\d.]+ \w+ +(\d) +\+([\d,]+) ([+-][\d,]+)", window)
    assert [int(step[1]) for step in steps] == [0, 1, 1, 1, 1, 1]
    numbers = [[int(value.replace(",", "")) for value in (s[0], *s[2:])] for s in steps]
    for (before, _, _), (after, came, went) in pairwise(numbers):
        assert after == before + came + went
    before, after = row(output, "six hours, before a step"), row(output, "six hours, after it")
    assert before[1:] == (1, "partial")
    assert after == (before[0], 0, "hit")
