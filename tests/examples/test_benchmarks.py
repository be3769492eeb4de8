"""The benchmarks run on a slice of their data; what they measure is not judged here."""

import pytest

pytest.importorskip("sortedcontainers", reason="it comes with the extra 'bench', not with 'test'")

from benchmarks import contestants, peers, plots, report
from benchmarks.__main__ import PARTS, measure, show

DIFFERENCES = {"more by", "by 1,000,000 of them"}
"""Cases whose values are differences of two times, which noise may turn around."""


@pytest.mark.slow
def test_all_parts_measure_and_show(capsys, monkeypatch):
    """Each part gives a ratio or a size for each of its cases, all of which read the same."""
    few = (contestants.Sorted, contestants.Cached, contestants.Asyncpg)
    monkeypatch.setattr(peers, "CONTESTANTS", few)
    results = [result for part in measure(PARTS, quick=True) for result in part]
    show(results)
    printed = capsys.readouterr().out
    for result in results:
        assert result.value > 0 or result.unit == "retries" or result.case in DIFFERENCES
        assert result.benchmark in printed
        assert result.case in printed
    assert {result.case for result in results} >= {
        "bytes per record", "asyncpg fetch", "cache.load", "SortedKeyList slice", "session.range",
        "in_transaction", contestants.Cached.name,
    }  # fmt: skip
    assert {result.part for result in results} == set(PARTS)
    # The report asks for more than these: what it says is missing must be what was left out.
    assert all(contestants.TableCache43.name in aim for aim in report.missing(results))
    assert {plot.file for plot in plots.plots(results)} >= {
        "changes-by-records.svg", "hits-commits-and-polls-by-views.svg",
    }  # fmt: skip
