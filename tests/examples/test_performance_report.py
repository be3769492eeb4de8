"""The report of the benchmarks: tables, plots, and what it refuses. Nothing is measured here."""

import json
from dataclasses import asdict, replace
from xml.etree import ElementTree as ET

import pytest

import benchmarks.report as reports
from benchmarks.harness import Growth, Result
from benchmarks.plots import EXPECTED, plots

PAGE = f"""# Performance

Before.

{reports.BEGIN}
{reports.END}

After.
"""
ABOUT = {
    "python": "3.13.0",
    "sqlalchemy": "2.1.9",
    "cores": 2,
    "machine": "x86_64",
    "load": 0.1,
    "left_out": [],
}


def result(benchmark, case, value=1.0, **more):
    """Return a result in seconds."""
    return Result(**{"benchmark": benchmark, "case": case, "value": value, "unit": "s", **more})


def everything():
    """Return a result for each aim, most of them reached, and some growth."""
    aims = [
        result(benchmark, case, part=part, ratio=1.5, goal=2.0, over="the least", spread=(0.5, 2.0))
        for part, benchmark, case in reports.AIMS
    ]
    growing = [
        result("reads", f"{case}: {size:,}", value, growth=Growth("records", size, grows), part="g")
        for case, grows in (("a & b", "log n"), ("flat", "1"), ("all of it", "n"))
        for size, value in ((10_000, 0.001), (3_000_000, 0.002))
    ]
    return [*aims, *growing]


def parts(results):
    """Return the parts that have been measured."""
    return {each.part for each in results}


@pytest.fixture
def page(tmp_path):
    """Return a page with the marks."""
    path = tmp_path / "performance.md"
    path.write_text(PAGE)
    return path


def test_the_marked_section_is_written_and_nothing_else(page):
    """What stands before and after stays; a second report takes the place of the first."""
    results = everything()
    reports.write(results, ABOUT, parts(results), page)
    first = page.read_text()
    reports.write(results, ABOUT, parts(results), page)
    assert page.read_text() == first
    assert first.startswith("# Performance\n\nBefore.\n")
    assert first.endswith("After.\n")
    assert f"{len(reports.AIMS)} of {len(reports.AIMS)} are reached" in first
    assert "](performance/reads.svg)" in first
    assert "| 1 s (500 ms to 2 s) | 1.5 x the least |" in first


def test_plots_that_are_drawn_no_more_go(page):
    """Of an earlier report nothing is left, so that no page shows it by mistake."""
    results = everything()
    directory = page.with_suffix("")
    directory.mkdir()
    (directory / "renamed.svg").write_text("<svg/>")
    reports.write(results, ABOUT, parts(results), page)
    assert [path.name for path in directory.iterdir()] == ["reads.svg"]


def test_an_aim_that_was_not_measured_is_an_error(page):
    """A benchmark that was renamed is no row less, but an error that names it."""
    first, *others = everything()
    renamed = replace(first, case="called otherwise")
    with pytest.raises(LookupError, match="nothing was measured of ranges / range of"):
        reports.write([renamed, *others[1:]], ABOUT, parts(others), page)
    with pytest.raises(LookupError, match="nothing was measured of growth"):
        reports.write([first, *others], ABOUT, {*parts(others), "growth"}, page)
    with pytest.raises(LookupError, match="nothing was measured of ranges / range of"):
        reports.write([replace(first, goal=None), *others[1:]], ABOUT, parts(others), page)
    assert page.read_text() == PAGE


def test_a_peer_that_this_python_does_not_have_is_named(page):
    """What is measured beside it is missing, and nothing else may be."""
    results = [each for each in everything() if each.part != "peers"]
    about = {**ABOUT, "left_out": ["tablecache 4.3"]}
    measured = {*parts(results), "peers"}
    with pytest.raises(LookupError, match="nothing was measured of peers"):
        reports.write(results, ABOUT, measured, page)
    results.append(result("range of 9 records, beside the peers", "the database", part="peers"))
    reports.write(results, about, measured, page)
    assert "Left out, because this Python does not have it: tablecache 4.3." in page.read_text()
    with pytest.raises(LookupError, match="nothing was measured of ranges / range of"):
        reports.write(results[1:], about, measured, page)


def test_a_page_without_marks_is_an_error(page):
    """A report is not appended to whatever file is named."""
    page.write_text("# Performance\n")
    results = everything()
    with pytest.raises(LookupError, match="has no lines"):
        reports.write(results, ABOUT, parts(results), page)


def test_a_report_of_a_busy_machine_says_so(page):
    """Also when only one of the runs that it is made of was disturbed."""
    results = everything()
    reports.write(results, ABOUT, parts(results), page)
    assert "busy" not in page.read_text()
    about = reports.together(ABOUT, {**ABOUT, "load": 5.0})
    reports.write(results, about, parts(results), page)
    assert "The load average was 5.0 when it began, so **the machine was busy" in page.read_text()


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"ratio": 1.5, "goal": 2.0}, "reached"),
        ({"ratio": 2.5, "goal": 2.0}, "**missed by 25%**"),
        ({"ratio": 2.001, "goal": 2.0}, "**just missed**"),
        ({"ratio": 4.0, "goal": 8.0, "at_least": True}, "**missed by 50%**"),
        ({"ratio": 9.0, "goal": 8.0, "at_least": True}, "reached"),
        ({"value": 3.0, "unit": "us", "goal": 2.0}, "**missed by 50%**"),
    ],
)
def test_by_how_much_an_aim_is_missed(measured, words):
    """By how much of the aim, in either direction, with a ratio or without."""
    assert reports.verdict(result("b", "c", **measured)) == words


def test_results_survive_json():
    """What is read back is what was written."""
    results = everything()
    text = json.dumps({"about": ABOUT, "results": [asdict(each) for each in results]})
    assert reports.read_json(text) == (results, ABOUT)


def test_a_plot_has_its_lines_and_what_was_expected():
    """Well-formed, two lines for each case, within its frame, and with the names as text."""
    (plot,) = plots(everything())
    root = ET.fromstring(plot.svg)
    space = "{http://www.w3.org/2000/svg}"
    dashed = [e for e in root.iter(f"{space}polyline") if e.get("stroke-dasharray")]
    texts = " ".join(element.text or "" for element in root.iter(f"{space}text"))
    assert len(dashed) == 3
    assert len(list(root.iter(f"{space}circle"))) == 6
    for name in ("a & b", "flat", "all of it", "records", *(name for name, _ in EXPECTED.values())):
        assert name in texts
    for line in root.iter(f"{space}polyline"):
        for point in (line.get("points") or "").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= float(root.get("width") or 0)
            assert 0 <= y <= float(root.get("height") or 0)
