"""What has happened to a view is counted exactly, and scraped from one process or several."""

import ast
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import select, update

from sa_tablecache import AsyncTableCache, ChangeFeed, TableCache, TableCacheError, bypass_cache
from sa_tablecache.figures import REASONS
from sa_tablecache.metrics import Exporter, export
from tests.integration.databases import Database
from tests.integration.flights import World, flights_world, hour
from tests.zoo import InnerBoard, OuterBoard, Plane

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(sqlite: Database) -> Iterator[World]:
    """Six flights; nothing of them is loaded."""
    with flights_world(sqlite) as world:
        yield world


@pytest.fixture
def registry(world: World) -> CollectorRegistry:
    """A registry to which the cache is exported."""
    registry = CollectorRegistry()
    export(world.cache, registry=registry)
    return registry


def value(registry: CollectorRegistry, name: str, **labels: Any) -> float | None:
    """Return a sample of the outer board."""
    labels = {"cache": "", "view": "OuterBoard", **labels}
    return registry.get_sample_value(f"sa_tablecache_{name}", labels)


def reads(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """Return how many reads there were of each type, and why."""
    return {
        (sample.labels["type"], sample.labels["reason"]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "sa_tablecache_reads_total" and sample.value
    }


# -- what is counted ------------------------------------------------------------------------------


def test_each_read_is_counted_by_how_it_was_answered_and_why(world: World, registry: Any):
    """One read of each type, each with its category, and the figures of the cache agree."""
    cache = world.cache
    board = select(OuterBoard)
    world.ids()
    cache.load(OuterBoard, OuterBoard.hour < hour(2))
    world.ids(OuterBoard.hour > hour(2))
    world.ids(OuterBoard.hour < hour(3))
    world.ids(OuterBoard.hour < hour(1))
    with world.Session() as session:
        session.get_one(Plane, "N1").model = "A380"
        session.scalars(board.where(OuterBoard.hour < hour(1))).all()
        session.commit()
        session.scalars(board.where(OuterBoard.hour < hour(1))).all()
        session.scalars(board.options(bypass_cache())).all()
        session.range(OuterBoard.by_hour, lt=hour(1))
        session.get(OuterBoard, 1)
    assert reads(registry) == {
        ("miss", "not_loaded"): 1,
        ("miss", "coverage"): 1,
        ("partial", "gaps"): 1,
        ("hit", ""): 3,
        ("hit_with_refresh", "refresh"): 1,
        ("bypass", "own_writes"): 1,
        ("bypass", "requested"): 1,
    }
    stats = cache.stats(OuterBoard)
    assert (stats.hits, stats.hits_with_refresh, stats.partial_hits) == (4, 1, 1)
    assert (stats.misses, stats.bypasses) == (2, 2)
    assert stats.reasons == {
        "not_loaded": 1,
        "coverage": 1,
        "gaps": 1,
        "refresh": 1,
        "own_writes": 1,
        "requested": 1,
    }


def test_loads_refreshes_marks_and_sizes_are_told(world: World, registry: Any):
    """Counters, gauges and histograms of what happens to the records."""
    cache = world.cache
    cache.load(OuterBoard)
    cache.evict(OuterBoard, OuterBoard.hour < hour(1))
    with world.Session() as session:
        session.execute(update(Plane).where(Plane.tailnum == "N1").values(model="A380"))
        session.commit()
    cache.invalidate(OuterBoard)
    assert value(registry, "records") == cache.stats(OuterBoard).records == 5
    assert value(registry, "bytes") == cache.stats(OuterBoard).bytes > 0
    assert value(registry, "pending_marks") == 2
    assert value(registry, "oldest_mark_seconds") > 0
    cache.refresh(OuterBoard)
    assert value(registry, "pending_marks") == 0
    assert value(registry, "oldest_mark_seconds") == 0
    assert value(registry, "loads_total") == 1
    assert value(registry, "refreshes_total") == 1
    assert value(registry, "records_loaded_total") == 6
    assert value(registry, "records_expired_total") == 1
    assert value(registry, "mismatches_total") == 0
    assert value(registry, "marks_total", kind="row") == 1
    assert value(registry, "marks_total", kind="view") == 1
    stats = cache.stats(OuterBoard)
    assert stats.marks == {"row": 1, "view": 1}
    assert value(registry, "load_seconds_count") == 1
    assert value(registry, "load_seconds_sum") == pytest.approx(stats.load_seconds)
    assert value(registry, "refresh_seconds_count") == 1
    assert value(registry, "refresh_seconds_sum") == pytest.approx(stats.refresh_seconds)


def test_answers_that_are_compared_are_counted(world: World, registry: Any):
    """In shadow mode each read is compared, or skipped where the cache has no answer."""
    world.cache.set_mode(OuterBoard, "shadow")
    world.ids()
    world.cache.load(OuterBoard)
    world.ids()
    assert reads(registry) == {("bypass", "shadow"): 2}
    assert value(registry, "comparisons_total") == 1
    assert value(registry, "comparisons_skipped_total") == 1
    assert value(registry, "mismatches_total") == 0


def test_all_that_is_counted_is_exported(world: World, registry: Any):
    """A count that nobody exports would be missed by those who look at metrics alone."""
    table = world.cache.table(OuterBoard)
    before = samples(registry)
    for name, count in vars(table.counts).items():
        if name.endswith("_seconds"):
            continue  # of which there are histograms
        if isinstance(count, int):
            setattr(table.counts, name, count + 1)
        else:
            count["kind" if name == "marks" else ("miss", "coverage")] += 1
        now = samples(registry)
        assert now != before, name
        before = now


def samples(registry: CollectorRegistry) -> dict[Any, float]:
    """Return all counters."""
    return {
        (sample.name, *sample.labels.items()): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


def test_threads_lose_no_count(world: World):
    """Reads of several threads at once, interrupted as often as the interpreter can, all count."""
    world.cache.load(OuterBoard)
    statement = select(OuterBoard).where(OuterBoard.hour < hour(2))

    def read() -> None:
        with world.Session() as session:
            for number in range(600):
                if number % 3:
                    session.scalars(statement).all()
                elif number % 2:
                    session.range(OuterBoard.by_hour, lt=hour(2))
                else:
                    session.get(OuterBoard, 1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert world.cache.stats(OuterBoard).hits == 2400


def test_every_category_is_explained_and_no_other_is_used():
    """The values of the label `reason` are those of a fixed list."""
    used = set()
    for path in (ROOT / "sa_tablecache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Reason":
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
                used.add(node.args[0].value)
    assert used | {"statement"} == set(REASONS)


def test_no_value_of_a_statement_is_in_a_label(world: World, registry: Any):
    """However many different statements the database has to answer, there is one series of them."""
    world.cache.load(OuterBoard)
    for number in range(5):
        world.ids(OuterBoard.tailnum.like(f"secret {number}%"))
    page = generate_latest(registry).decode()
    assert "secret" not in page
    lines = [line for line in page.splitlines() if line.startswith("sa_tablecache_reads_total{")]
    assert len(lines) == 2, lines


def test_a_change_feed_is_told_of_until_it_is_closed(sqlite: Database):
    """Its lag and whether it can be trusted; what the feed is the reason of is counted as that."""
    registry = CollectorRegistry()
    with flights_world(sqlite, feed=ChangeFeed()) as world:
        export(world.cache, registry=registry, name="fed")

        def feed(name: str) -> float | None:
            return registry.get_sample_value(f"sa_tablecache_feed_{name}", {"cache": "fed"})

        assert feed("trusted") == 0
        world.cache.upkeep.stop()
        world.ids()
        assert ("bypass", "feed") in reads(registry)
        world.cache.install_feed()
        world.cache.load(OuterBoard)
        world.cache.barrier()
        world.ids()
        assert feed("trusted") == 1
        assert 0 <= feed("lag_seconds") < 60
        world.cache.uninstall_feed()
    assert feed("trusted") is None
    assert feed("lag_seconds") is None


# -- whose it is ----------------------------------------------------------------------------------


def test_several_caches_share_a_registry_by_name(world: World, registry: CollectorRegistry):
    """Each has the label `cache`; a second one of the same name, or twice the same, is refused."""
    with TableCache(world.engine, views=[OuterBoard]) as other:
        with pytest.raises(TableCacheError, match="give each a name"):
            export(other, registry=registry)
        with pytest.raises(TableCacheError, match="already"):
            export(world.cache, registry=registry, name="again")
        export(other, registry=registry, name="other")
        other.load(OuterBoard)
        assert value(registry, "loads_total", cache="other") == 1
        assert value(registry, "loads_total") == 0
    second = CollectorRegistry()
    export(world.cache, registry=second)
    assert value(second, "loads_total") == 0


def test_a_closed_cache_keeps_its_counters_and_has_no_size(world: World, registry: Any):
    """What happened before the end is told after it, whether or not it was scraped meanwhile."""
    world.cache.load(OuterBoard)
    world.ids()
    world.cache.close()
    assert value(registry, "loads_total") == 1
    assert reads(registry) == {("hit", ""): 1}
    assert value(registry, "records") is None
    with TableCache(world.engine, views=[OuterBoard]) as successor:
        export(successor, registry=registry)
        successor.load(OuterBoard)
        assert value(registry, "loads_total") == 2
        assert value(registry, "records") == 6


def test_a_cache_may_be_exported_before_it_is_bound(world: World):
    """Views that are added later, and an engine that is bound later, count from the first load."""
    registry = CollectorRegistry()
    with contextlib.closing(TableCache(views=[InnerBoard])) as cache:
        export(cache, registry=registry)
        assert value(registry, "loads_total") is None
        cache.bind(world.engine)
        cache.add(OuterBoard)
        cache.load(OuterBoard)
        cache.load(InnerBoard)
        for view in ("InnerBoard", "OuterBoard"):
            assert value(registry, "loads_total", view=view) == 1
            assert value(registry, "load_seconds_count", view=view) == 1


async def test_an_asynchronous_cache_is_exported_as_any(sqlite: Database):
    """Its counters are those of the cache that it is a proxy of."""
    engine = sqlite.async_engine()
    registry = CollectorRegistry()
    async with AsyncTableCache(engine, views=[OuterBoard]) as cache:
        export(cache, registry=registry)
        await cache.load(OuterBoard)
        async with cache.sessionmaker()() as session:
            await session.range(OuterBoard.by_hour)
        assert reads(registry) == {("hit", ""): 1}
        assert value(registry, "loads_total") == 1
    await engine.dispose()


# -- several processes ----------------------------------------------------------------------------

PROCESSES = """
import os, sys
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine, event
from sa_tablecache import TableCache
from sa_tablecache.metrics import Exporter, export
from tests.zoo import OuterBoard

engine = create_engine("sqlite:///" + sys.argv[1])
cache = TableCache(engine, views=[OuterBoard])
export(cache)
export(TableCache(engine, views=[OuterBoard]), registry=CollectorRegistry(), name="other")
cache.load(OuterBoard)

def read(times):
    with cache.sessionmaker()() as session:
        for _ in range(times):
            session.range(OuterBoard.by_hour)

read(3)
children = []
for number in (10, 100):
    pid = os.fork()
    if not pid:
        engine.dispose(close=False)
        cache.load(OuterBoard)  # without a feed nothing proves what was inherited
        read(number)
        cache.invalidate(OuterBoard)
        sys.exit()  # as a worker does
    children.append(pid)
read(4)
for pid in children:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
if sys.argv[2:] == ["close"]:
    cache.close()
elif sys.argv[2:] == ["upkeep"]:
    cache.start()
    import time
    while cache.health().jobs["metrics"].last_success is None:
        time.sleep(0.001)
    os._exit(0)  # nothing else has written it
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("end", ["exit", "close", "upkeep"])
def test_counters_of_several_processes_add_up(world: World, tmp_path: Path, end: str):
    """Forked workers write what they count themselves, and it is there after they have ended."""
    from prometheus_client.multiprocess import MultiProcessCollector

    database = world.database.url.database
    subprocess.run(
        [sys.executable, "-W", "error", "-c", PROCESSES, str(database), end],
        cwd=ROOT,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        check=True,
        timeout=60,
    )
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    assert value(registry, "reads_total", type="hit", reason="") == 117
    assert value(registry, "loads_total") == 3
    assert value(registry, "load_seconds_count") == 3
    assert value(registry, "marks_total", kind="view") == 2
    assert value(registry, "loads_total", cache="other") == 0


# -- the manual -----------------------------------------------------------------------------------

OPERATING = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")


def test_the_manual_has_all_metrics_and_reasons_and_no_others():
    """Names and label values in docs/operating.md, its alerts included, are those of the code."""
    names = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in Exporter().describe()
    }
    rows = set(re.findall(r"^\| `(sa_tablecache_\w+)` \|", OPERATING, re.MULTILINE))
    assert rows == names
    samples = names | {f"{name}_bucket" for name in names if name.endswith("_seconds")}
    assert set(re.findall(r"sa_tablecache_\w+", OPERATING)) - {"sa_tablecache_"} <= samples
    table = OPERATING[OPERATING.index("| reason |") :].partition("\n\n")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE)) == dict(REASONS)
    types = {"hit", "hit_with_refresh", "partial", "miss", "bypass"}
    known = {
        "reason": set(REASONS),
        "type": types,
        "kind": {"row", "group", "range", "view", "unread"},
    }
    matchers = re.findall(r'(\w+)=~?"([\w|]+)"', OPERATING.partition("## Alerts")[2])
    assert matchers
    for label, values in matchers:
        assert set(values.split("|")) <= known[label], label


def test_the_alerts_of_the_manual_are_well_formed():
    """Their expressions have as many brackets open as closed, and a comparison each."""
    rules = OPERATING.partition("```yaml\n")[2].partition("```")[0]
    alerts = re.split(r"^      - alert: ", rules, flags=re.MULTILINE)[1:]
    assert len(alerts) > 5
    for alert in alerts:
        expression = re.split(r"\n {8}\w+: ", alert.partition("expr:")[2])[0]
        for opening, closing in ("()", "[]", "{}"):
            assert expression.count(opening) == expression.count(closing), alert
        assert re.search(r"(>|==) [\d.e]+\s*$", expression), alert
